"""JSON of a run with a correct digest, but a value of the wrong type or out of range. For every field, the command
prints one line on stderr and exits with status 2."""

import json
import math
import warnings
from typing import get_args

import pytest
import torch
from runs import refused

from fused_mos import evaluate, finetune, generate, reproduce, train
from fused_mos.runtime import files
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training import settings
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint
from fused_mos.training.config import MOST_LAYERS, ConfigError, HeadName, LatentName, Precision, TrainConfig
from fused_mos.training.lm1b.config import LM1BConfig
from fused_mos.training.metrics import plot_learning_curves

VALUES = ["x", None, True, 3, -3, 1.5, math.nan, 10**400, [], ["x"], [1.5], [None], [[3]], [True], {}, {"a": 1}]
"""Of every type that JSON has."""


def fields_of(values):
    """(names that lead to it, value) of each field, also of nested configurations."""
    for name, value in values.items():
        yield (name,), value
        if isinstance(value, dict):
            yield from (((name, *inner), each) for inner, each in fields_of(value))


def with_field(values, names, value):
    name, *inner = names
    return values | {name: with_field(values[name], inner, value) if inner else value}


def is_of_its_type(names, default, value):
    """Values that are allowed, by the type of the default unless the names tell more."""
    if names[-1] in ("out", "resume", "start"):
        return value is None or isinstance(value, str)
    if isinstance(default, tuple):
        return isinstance(value, list) and value != [] and all(type(item) is int for item in value)
    if names[-1] == "rank":
        return value is None or type(value) is int
    choices = {"head": get_args(HeadName), "precision": get_args(Precision), "latent": get_args(LatentName)}
    choices |= {"optimizer": ("sgd", "adagrad", "adam"), "decay": ("none", "linear", "cosine")}
    if names[-1] in choices:
        return value in choices[names[-1]]
    if type(default) is float:
        return type(value) in (int, float) and abs(value) <= settings.LARGEST
    return type(value) is type(default)


@pytest.mark.parametrize("kind", [TrainConfig, LM1BConfig])
def test_every_field_of_a_configuration_takes_its_type_alone(kind):
    values = kind().to_json()
    refusals = 0
    for names, default in fields_of(values):
        for value in VALUES:
            try:
                kind.from_json(with_field(values, names, value)).check()
            except ConfigError:
                refusals += 1
            else:
                assert isinstance(default, dict) or is_of_its_type(names, default, value), (names, value)
    assert refusals > 10 * len(list(fields_of(values)))
    for value in VALUES:
        if value != {}:  # which has the defaults
            with pytest.raises(ConfigError, match="does not fit this version"):
                kind.from_json(value)


def test_a_configuration_of_an_earlier_version_with_wrong_values():
    for values in ({"optim": {"small_batch_size": "x", "batch_size": 4}}, {"optim": {"small_batch_size": 2}}):
        with pytest.raises(ConfigError, match="does not fit this version"):
            TrainConfig.from_json(values)


@pytest.mark.trains
def test_a_damaged_configuration_of_a_run(finished_run, capsys):
    run = finished_run(1)
    path = run / "config.json"
    config = json.loads(path.read_text())
    for sizes, message in (
        (["x"], "each of hidden_sizes must be a whole number, got 'x'"),
        ("abc", "hidden_sizes must be a list, got 'abc'"),
        ([1.5], "each of hidden_sizes must be a whole number, got 1.5"),
        ([1] * (MOST_LAYERS + 1), f"hidden_sizes must be at most {MOST_LAYERS} widths"),
    ):
        path.write_text(json.dumps(with_field(config, ("model", "hidden_sizes"), sizes)))
        for command in (evaluate, generate, finetune):
            refused(command, [run], capsys, message)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def out_of_place(record):
    """(field, value) that must not be let in, for each field of a record's JSON: values of other types, and numbers
    that are negative or too large."""
    for name, default in record.items():
        other = [3, "x"] if isinstance(default, bool) else ["x", True]
        other += [None] if name != "best" else []
        other += [-5, 10**30] if type(default) is int else [10**400, math.nan] if type(default) is float else []
        yield from ((name, value) for value in [*other, {"a": 1}])


@pytest.fixture
def checkpoint_of(finished_run, monkeypatch):
    """Edits a checkpoint of a finished run, which has no older one then; NaN stays in its JSON."""
    monkeypatch.setattr(files, "to_json", lambda value, **options: json.dumps(value, **options))
    run = finished_run(2)
    (run / "last.safetensors.previous").unlink()
    saved = {name: load_checkpoint(run / name) for name in ("last.safetensors", "best.safetensors")}

    def write(name, tensors=(), *path_and_value):
        old, meta = saved[name]
        meta = with_field(meta, path_and_value[:-1], path_and_value[-1]) if path_and_value else meta
        save_checkpoint(run / name, old | dict(tensors), meta)
        return run

    write.meta = saved["last.safetensors"][1]
    write.best = saved["best.safetensors"]
    return write


@pytest.mark.trains
@pytest.mark.parametrize("group", ["progress", "optimizer"])
def test_the_last_checkpoint_with_wrong_values(group, checkpoint_of, capsys):
    record = checkpoint_of.meta[group]
    for name, value in [*out_of_place(record), *(("history", [value]) for value in ["x", None, 10**400])]:
        if name in record:
            run = checkpoint_of("last.safetensors", (), group, name, value)
            refused(train, ["--resume", run, "--epochs", 3], capsys, "of another version or model: ", name)
    for value in ("x", None, [], {}):
        run = checkpoint_of("last.safetensors", (), group, value)
        refused(train, ["--resume", run, "--epochs", 3], capsys, "of another version or model: it ")
    if group == "progress":
        run = checkpoint_of("last.safetensors", (), group, "row", 10**6)
        refused(train, ["--resume", run, "--epochs", 3], capsys, "row must be less than", "the rows of the text")


@pytest.mark.trains
def test_a_checkpoint_with_a_wrong_configuration(checkpoint_of, capsys):
    for value in (None, [], "x", 3):
        run = checkpoint_of("last.safetensors", (), "config", value)
        refused(train, ["--resume", run], capsys, "it must be an object with named values")
        run = checkpoint_of("best.safetensors", (), "config", value)
        for command in (evaluate, generate, finetune):
            refused(command, [run], capsys, "best.safetensors is of another version", "it must be an object")
    run = checkpoint_of("last.safetensors", (), "config", "model", "head", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(train, ["--resume", run], capsys, "head must be one of mos, moc, softmax, got 'x'")


@pytest.mark.trains
def test_a_best_model_with_wrong_values(checkpoint_of, capsys):
    tensors, _ = checkpoint_of.best
    for name, value in (("epoch", "x"), ("epoch", None), ("epoch", -1), ("valid_loss", "x"), ("valid_loss", math.nan)):
        run = checkpoint_of("best.safetensors", (), name, value)
        refused(evaluate, [run], capsys, f"best.safetensors is of another version: {name} must")
    run = checkpoint_of("best.safetensors", (), "valid_loss", None)  # as of a converted model
    assert evaluate.main([str(run)]) == 0
    refused(train, ["--resume", run], capsys, "best.safetensors is a converted model, not the best one")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool):
        run = checkpoint_of("best.safetensors", {"encoder.weight": tensors["encoder.weight"].to(dtype)})
        refused(evaluate, [run], capsys, f"encoder.weight must be torch.float32, got {dtype}")
    nan = torch.full_like(tensors["encoder.weight"], math.nan).to(torch.float8_e5m2)
    refused(evaluate, [checkpoint_of("best.safetensors", {"encoder.weight": nan})], capsys, "are not finite")


@pytest.mark.trains
def test_sizes_that_are_not_those_of_the_best_model(checkpoint_of, monkeypatch, capsys):
    """No memory is taken for them."""
    made = []
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda tensor, *_: made.append(tensor.device.type))
    run = checkpoint_of("best.safetensors", (), "config", "model", "hidden_sizes", [2**20, 10])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(with_field(config, ("model", "hidden_sizes"), [2**20, 10])))
    refused(evaluate, [run], capsys, "does not fit the model: ", "must be (4194304, 8), got (48, 8)")
    assert set(made) == {"meta"}


# --------------------------------------------------------------------------------------------------- dynamic evaluation


@pytest.mark.trains
def test_work_of_dynamic_evaluation_with_wrong_values(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    run = finished_run(1)
    arguments = [run, "--dynamic", "--split", "valid"]
    assert evaluate.main([*map(str, arguments), "--time-limit", "0.001"]) == 0
    path = run / "dynamic" / "gradient-statistics.safetensors"
    tensors, meta = load_checkpoint(path)
    another = "is of another version: "
    for name, value in (
        *(("row", value) for value in ("x", None, -5, 1.5, 10**9)),
        ("sum.0", None),
        ("sum.0", torch.zeros(3)),
        ("sum.0", tensors["sum.0"].double()),
        ("hidden.1.h", None),
        ("hidden.1.h", torch.zeros(2)),
    ):
        harmed = tensors | {name: value} if name in tensors else tensors
        harmed = {key: tensor for key, tensor in harmed.items() if tensor is not None}
        save_checkpoint(path, harmed, meta | {name: value} if name == "row" else meta)
        refused(evaluate, arguments, capsys, path, another, name, "delete it to recompute it")
    del meta["row"]
    save_checkpoint(path, tensors, meta)
    refused(evaluate, arguments, capsys, path, another, "row")


@pytest.mark.trains
def test_an_unfinished_dynamic_evaluation_with_wrong_values(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    run = finished_run(1)
    arguments = [run, "--dynamic", "--split", "valid"]
    while not (paths := list((run / "dynamic").glob("valid-*.safetensors"))):
        assert evaluate.main([*map(str, arguments), "--time-limit", "0.001"]) == 0
    (path,) = paths
    tensors, meta = load_checkpoint(path)
    for name, value in (("total", torch.zeros(2)), ("hidden.0.c", torch.zeros(0)), ("model.encoder.weight", None)):
        harmed = {key: tensor for key, tensor in (tensors | {name: value}).items() if tensor is not None}
        save_checkpoint(path, harmed, meta)
        refused(evaluate, arguments, capsys, path, "is of another version: ", name)
    save_checkpoint(path, tensors, meta | {"row": "x"})
    refused(evaluate, arguments, capsys, path, "row must be a whole number, got 'x'")


@pytest.mark.trains
def test_a_search_with_wrong_values(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    run = finished_run(1)
    path = run / "dynamic" / "tuning.json"
    arguments = [run, "--dynamic", "--tune"]
    while not path.exists():
        assert evaluate.main([*map(str, arguments), "--time-limit", "0.1"]) == 0
    content = files.read_sealed(path)
    (first, *_) = content["tried"]
    for tried in (
        *(None, 3, "x", [None], [3], [{}]),
        *([with_field(first, names, value)] for names in (("rule",), ("loss",)) for value in (None, "x", [])),
        [with_field(first, ("rule", "lr"), "x")],
    ):
        files.write_sealed(path, content | {"tried": tried})
        refused(evaluate, arguments, capsys, path, "is of another version: ", "delete it to search again")


# ------------------------------------------------------------------------------------------------------ logs and tables


def test_a_learning_curve_of_wrong_values(tmp_path):
    """Points that are not finite numbers are left out."""
    lines = [json.dumps({"kind": kind, "step": 1, "ppl": 3, "epoch": 2, "epoch_fraction": 0.5, "averaging": True})
             for kind in ("train", "valid")]  # fmt: skip
    for kind in ("train", "valid", ["x"], None):
        for ppl in VALUES:
            lines.append(json.dumps({"kind": kind, "step": 1, "ppl": ppl, "epoch": ppl, "averaging": ppl}))
        lines.append(json.dumps({"kind": kind, "step": 1}))
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[" * 100_000]))
    plot_learning_curves({"mos": tmp_path}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.trains
def test_a_reproduction_with_wrong_values(corpus_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert reproduce.main(["demo", "--data", str(corpus_folder), "--out", str(out), "--time-limit", "1e-9"]) == 0
    (out / "last.safetensors").touch()  # the folder of a run, then
    path = out / "reproduction.json"
    good = {"ppl": 3.0, "ppl_published": 3.0}
    for results in (
        *({"made with": value} for value in (3, None, "x", [])),
        *({"trained": value} for value in (3, None, "x", [])),
        *({"trained": {"test": value}} for value in (3, None, "x", {}, good | {"ppl": "x"})),
    ):
        files.write_sealed(path, results)
        refused(reproduce, ["demo", "--data", corpus_folder, "--out", out], capsys, f"{path} is of another version")
    files.write_sealed(path, {"made with": {}})
    refused(reproduce, ["demo", "--data", corpus_folder, "--out", out], capsys, "recipe cannot change")
