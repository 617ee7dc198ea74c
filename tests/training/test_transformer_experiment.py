"""experiments.transformer, and its common code with experiments.adam: equal parameters, the switch from a softmax to a
mixture, and a folder of runs that is continued."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not installed

from experiments import tables, transformer
from experiments.equal_budget import Budget, Store
from experiments.small_lm import LanguageModel, Steps, learning_rates, make_optimizer, places_of
from fused_mos import MoS


@pytest.fixture
def run(corpus_folder, tmp_path, monkeypatch):
    """Runs the experiment with additional flags, and returns what it wrote."""

    def run(*flags):
        flags = ["--data", str(corpus_folder), "--ds", "16", "--seeds", "0", *flags, "--device", "cpu"]
        flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "transformer.json")]
        monkeypatch.setattr(sys, "argv", ["transformer", "--steps", "5", *flags])
        assert transformer.main() == 0
        return json.loads((tmp_path / "transformer.json").read_text())

    return run


@pytest.mark.parametrize("d", [32, 64])
def test_heads_have_equal_parameters(d):
    shapes = transformer.shapes_of(d, n_experts=4, n_classes=1000, latent="residual")
    counts = [shape.parameters() for shape in shapes.values()]
    assert shapes["softmax"].width > shapes["MoS"].width == 4 * d
    assert counts[1] == counts[2] == min(counts)
    assert max(counts) - min(counts) <= shapes["MoS"].n_layers * (2 * d + 1)  # one more of the width


def test_the_switch_keeps_the_loss_and_what_the_optimizer_knows():
    text = torch.randint(0, 50, (2000,))
    shape = transformer.shapes_of(16, n_experts=4, n_classes=50, latent="residual")["softmax"]
    model = LanguageModel(shape)
    optimizer = make_optimizer(list(model.parameters()), 0.01)
    places = places_of(text, 40, torch.Generator().manual_seed(0))
    Steps(model, optimizer, text, places[:20], learning_rates(0.01, 20)).run(20, "")
    words, target = text[:1024].view(16, 64), text[1:1025].view(16, 64)
    shared = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in model.parameters()}
    model.eval()
    before = model(words, target)

    transformer.upcycle(model, optimizer, 4, words)
    assert isinstance(model.head, MoS) and model.head.decoder.weight is model.embedding.weight
    assert abs(model(words, target) - before) < 1e-6
    for p, state in shared.items():
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())
    new = [model.head.prior.weight, model.head.latent[0].weight]
    assert [id(p) for p in optimizer.param_groups[-1]["params"]] == [id(p) for p in new]

    held = [p.detach().clone() for p in new]
    Steps(model, optimizer, text, places[20:], learning_rates(0.01, 20)).run(20, "")
    assert not any(torch.equal(p, was) for p, was in zip(new, held))
    assert optimizer.state[model.embedding.weight]["step"] == 40


@pytest.mark.trains
def test_a_folder_goes_on(run, tmp_path, monkeypatch):
    whole = run("--seeds", "0", "1")
    assert {key for key in whole["rows"] if "seed 1" in key} == {f"d = 16, {name}, seed 1" for name in transformer.RUNS}
    assert (tmp_path / "transformer.png").is_file()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| MoS |" in tables.transformer() and f"| {transformer.UPCYCLED} |" in tables.transformer()

    for path in (tmp_path / "runs").glob("*MoS-after*_seed-0.json"):
        path.unlink()
    (tmp_path / "runs" / "d-=-16_softmax_equal-time_seed-0.pt").unlink()
    (tmp_path / "runs" / "d-=-16_MoC_seed-1.json").unlink()
    assert run("--seeds", "1")["rows"].keys() == whole["rows"].keys() - {f"d = 16, {transformer.UPCYCLED}, seed 0"}
    assert run("--seeds", "0")["rows"] == whole["rows"]

    monkeypatch.setattr(Budget, "begin", None)
    assert run("--seeds", "0", "1")["rows"] == whole["rows"]


def test_only_speeds(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("--only-speeds")
    names = [path.name for path in (tmp_path / "runs").glob("*.json")]
    assert sorted(names) == ["d-=-16_seconds-per-step.json", "settings.json"]


def test_runs_of_other_settings_are_refused(tmp_path):
    Store(tmp_path, {"steps": 5, "device": "cpu"})
    for name, value, was in (("steps", 6, 5), ("device", "cuda", "cpu"), ("d", 8, None)):
        with pytest.raises(SystemExit, match=f"has runs with {name} {was}, got {value}; name another --runs"):
            Store(tmp_path, {"steps": 5, "device": "cpu"} | {name: value})
