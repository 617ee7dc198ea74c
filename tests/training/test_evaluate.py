"""The command that evaluates: static and dynamic, interrupted, tuned, and its errors."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from fused_mos import evaluate
from fused_mos.lm.dynamic_evaluation import DynamicEvaluation, DynamicRule, GradientStatistics
from fused_mos.runtime import files
from fused_mos.runtime.files import FileError
from fused_mos.runtime.signals import CheckpointClock
from fused_mos.training import ConfigError
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training.checkpoint import load_checkpoint
from fused_mos.training.dynamic_evaluation import DynamicRun
from fused_mos.training.run import load_run


@pytest.fixture
def trained(finished_run, monkeypatch):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    return finished_run(2)


def results(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_static_is_what_training_reported(trained, capsys):
    assert evaluate.main([str(trained)]) == 0
    assert evaluate.main([str(trained), "--split", "valid", "--eval-context", "3"]) == 0
    reported = json.loads((trained / "result.json").read_text())
    test, valid = results(trained)
    assert test["ppl"] == pytest.approx(reported["test_ppl"], abs=1e-9)
    assert valid["ppl"] == pytest.approx(
        reported["valid_ppl"], abs=1e-3
    )  # the hidden state is carried over any segments
    # what the published code divides by: all rows of its one column, of which the first is not predicted
    rows = load_run(trained).text("test").numel()
    assert test["ppl_published"] == pytest.approx(math.exp(test["loss"] * (rows - 1) / rows), rel=1e-12)
    assert evaluate.main([str(trained), "--dynamic"]) == 0
    assert results(trained)[-1]["ppl_published"] == results(trained)[-1]["ppl"]
    assert "as the published code counts" in capsys.readouterr().out


def test_dynamic_learns_and_leaves_the_model_as_it_was(trained):
    run = load_run(trained)
    before = [p.detach().clone() for p in run.model.parameters()]
    repeated = run.text("valid")[:60].repeat(8)
    dynamic = DynamicRun(run, CheckpointClock(5))
    losses = [dynamic.evaluate(repeated, DynamicRule(lr=lr), "repeated") for lr in (1e-9, 0.004)]
    assert losses[1] < losses[0] - 0.01
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), before))


@pytest.mark.parametrize("interrupted", [GradientStatistics, DynamicEvaluation])
def test_interrupted_evaluations_continue_bit_identically(interrupted, trained, monkeypatch):
    tokens, rule = load_run(trained).text("valid"), DynamicRule(lr=0.01)
    whole = DynamicRun(load_run(trained), CheckpointClock(5)).evaluate(tokens, rule, "valid")
    for path in (trained / "dynamic").iterdir():
        path.unlink()
    rows, original = [], interrupted.__iter__

    def until_interrupted(self):
        for i, n in enumerate(original(self)):
            rows.append(self.row)
            yield n
            if i == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupted, "__iter__", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            DynamicRun(load_run(trained), CheckpointClock(0)).evaluate(tokens, rule, "valid")
    reached = rows[-1]
    with monkeypatch.context() as patch:
        patch.setattr(interrupted, "__iter__", lambda self: rows.append(self.row) or original(self))
        assert DynamicRun(load_run(trained), CheckpointClock(5)).evaluate(tokens, rule, "valid") == whole
    assert rows[-1] == reached, "it began again instead of continuing"


@pytest.mark.trains
def test_a_time_limit_cuts_a_dynamic_evaluation_into_pieces(trained, capsys):
    flags = [str(trained), "--dynamic", "--split", "valid"]
    assert evaluate.main(flags) == 0
    whole = results(trained)
    for path in (trained / "dynamic").iterdir():
        path.unlink()
    pieces = 0
    while len(results(trained)) == 1:
        assert evaluate.main([*flags, "--time-limit", "0.02"]) == 0
        pieces += 1
    assert pieces > 2 and results(trained) == whole * 2
    assert "run the same command to continue" in capsys.readouterr().out


def test_statistics_of_another_model_are_not_used(trained):
    run = load_run(trained)
    first = DynamicRun(run, CheckpointClock(5)).statistics()
    tensors, meta = load_checkpoint(trained / "best.safetensors")
    tensors = {name: p * 1.5 for name, p in tensors.items()}
    dynamic_module.save_checkpoint(trained / "best.safetensors", tensors, meta)
    second = DynamicRun(load_run(trained), CheckpointClock(5)).statistics()
    assert not all(torch.equal(a, b) for a, b in zip(first, second))


def test_statistics_of_another_text_are_not_used(trained, corpus_folder):
    """The text has the same words in another order, so the vocabulary does not reveal the change."""
    first = DynamicRun(load_run(trained), CheckpointClock(5)).statistics()
    lines = (corpus_folder / "train.txt").read_text().splitlines()
    (corpus_folder / "train.txt").write_text("\n".join([*lines[:-3], lines[-2], lines[-3], lines[-1]]) + "\n")
    second = DynamicRun(load_run(trained), CheckpointClock(5)).statistics()
    assert not all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_signal_after_the_last_segment_finds_everything_saved(trained, monkeypatch):
    flags, segments, calls = [str(trained), "--dynamic"], DynamicEvaluation.__iter__, []

    def and_a_signal(self):
        yield from segments(self)
        calls.append(self.row)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(DynamicEvaluation, "__iter__", and_a_signal)
        assert evaluate.main(flags) == 143
    (path,) = (trained / "dynamic").glob("test-*.safetensors")
    assert calls == [load_checkpoint(path)[1]["row"]]


def test_a_result_that_cannot_be_kept_is_shown(trained, monkeypatch, capsys):
    def full(path, record):
        raise FileError(f"the disk that holds {path} is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_json", full)
        assert evaluate.main([str(trained)]) == 2
    out, err = capsys.readouterr()
    assert "test, context 12: ppl" in out and "is full" in err


def test_only_what_was_begun_is_said_to_go_on(trained, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name, flags, said in (
        ("static_evaluation", [], "\nstopped\n"),
        ("dynamic_evaluation", ["--dynamic"], "\nstopped; run the same command to continue\n"),
    ):
        monkeypatch.setattr(f"fused_mos.training.evaluation.{name}", interrupted)
        assert evaluate.main([str(trained), *flags]) == 130
        assert capsys.readouterr().err.endswith(said)


def test_a_rule_that_diverges_is_named_and_does_not_end_the_search(trained, monkeypatch, capsys):
    assert evaluate.main([str(trained), "--dynamic", "--lr", "1e38", "--epsilon", "1e-30"]) == 2
    assert "dynamic evaluation diverges with DynamicRule(lr=1e+38" in capsys.readouterr().err
    dynamic, original = DynamicRun(load_run(trained), CheckpointClock(5)), DynamicRun.evaluate

    def some_diverge(self, tokens, rule, name):
        if rule.lr > 0.002:
            raise self._diverged(rule)
        return original(self, tokens, rule, name)

    monkeypatch.setattr(DynamicRun, "evaluate", some_diverge)
    assert dynamic.tune(DynamicRule()).lr <= 0.002
    monkeypatch.setattr(
        DynamicRun,
        "evaluate",
        lambda self, tokens, rule, name: some_diverge(self, tokens, dataclasses.replace(rule, lr=1), name),
    )
    with pytest.raises(ConfigError, match="diverges"):
        DynamicRun(load_run(trained), CheckpointClock(5)).evaluate(dynamic.run.text("valid"), DynamicRule(), "valid")


def test_nothing_is_left_of_finished_evaluations(trained):
    run = load_run(trained)
    run.config = dataclasses.replace(run.config, checkpoint_max_mib=1)
    run.model.encoder.weight.data = run.model.encoder.weight.data.clone()
    dynamic = DynamicRun(run, CheckpointClock(0))
    save = dynamic._save
    dynamic._save = lambda path, tensors, meta: save(path, tensors | {"filling": torch.zeros(1 << 19)}, meta)
    dynamic.evaluate(run.text("valid")[:40], DynamicRule(), "valid")
    names = {path.name.split(".")[0] for path in (trained / "dynamic").iterdir() if path.name != files.LOCK}
    assert names == {"gradient-statistics"}


def test_tuning_finds_a_better_rule_and_keeps_what_it_tried(trained, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "SCREENING_SHARE", 0.3)
    flags = [str(trained), "--dynamic", "--tune", "--lr", "0.02", "--split", "valid"]
    assert evaluate.main(flags) == 0
    tried = json.loads((trained / "dynamic" / "tuning.json").read_text())["tried"]
    finals = [row for row in tried if row["text"] == "valid"]
    result = results(trained)[-1]
    assert result["loss"] == min(row["loss"] for row in finals) and result["rule"] != dataclasses.asdict(
        DynamicRule(lr=0.02)
    )
    assert len(finals) == 3 < len(tried)
    with monkeypatch.context() as patch:
        calls = []
        original = DynamicRun.evaluate
        patch.setattr(
            DynamicRun, "evaluate", lambda self, *arguments: calls.append(arguments) or original(self, *arguments)
        )
        assert evaluate.main(flags) == 0
    assert len(calls) == 1, "only the split that was asked for is evaluated again"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tune"], "--tune searches hyperparameters of --dynamic or --cache; pass one of them, too"),
        (["--dynamic", "--lamb", "0"], "lamb must be positive, got 0.0"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--bptt", "7"], "are for --dynamic evaluation"),
        (["--dynamic", "--eval-context", "9"], "eval_context is for static evaluation and --cache, got 9"),
        (["--backend", "cuda"], "backend 'cuda' is not available"),
        (["--backend", "nonsense"], "backend must be one of"),
        (["--eval-context", "-1"], "eval_context must not be negative"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
    ],
)
def test_errors_name_the_flag(flags, message, trained, capsys):
    assert evaluate.main([str(trained), *flags]) == 2
    assert message in capsys.readouterr().err
