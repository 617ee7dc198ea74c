"""Whole runs: what they leave, that they learn, and that a kill changes nothing."""

import json

import pytest
import torch
from runs import killed_at, losses
from safetensors.torch import load_file

from fused_mos.train import main, parse
from fused_mos.training import Trainer, TrainingDiverged
from fused_mos.training.checkpoint import load_checkpoint
from fused_mos.training.evaluation import evaluate
from fused_mos.training.finite import first_not_finite
from fused_mos.training.metrics import perplexity, read_metrics
from fused_mos.training.run import load_run

NO_DROPOUT = [
    f for name in ("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop") for f in (f"--{name}", "0")
]


def run(flags, out):
    trainer = Trainer(parse([*flags, "--out", str(out)]))
    return trainer.run()


@pytest.mark.trains
def test_a_run_leaves_its_folder(small_flags, tmp_path):
    out = tmp_path / "run"
    wider = ["--hidden-sizes", "48", "--embedding-size", "24", "--lr", "20", "--alpha", "0", "--beta", "0"]
    result = run([*small_flags, *NO_DROPOUT, *wider, "--epochs", "8", "--nonmono", "9"], out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "vocabulary.txt",
        "metrics.jsonl",
        "tensorboard",
        "best.safetensors",
        "last.safetensors",
        "last.safetensors.previous",
        "learning-curve.png",
        "result.json",
    }
    assert any((out / "tensorboard").iterdir())
    assert (out / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "result.json").read_text()) == result
    assert {
        "valid_ppl",
        "test_ppl",
        "parameters",
        "words_per_second",
        "peak_memory_mib",
        "seed",
        "head",
    } <= result.keys()
    train = [m["loss"] for m in read_metrics(out) if m["kind"] == "train"]
    assert train[-1] < train[0] - 0.5, "the cyclic text was not learnt"


@pytest.mark.parametrize("head", ["softmax", "moc"])
def test_other_heads_train(head, small_flags, tmp_path):
    result = run([*small_flags, "--head", head, "--epochs", "1"], tmp_path / "run")
    assert result["head"] == head and result["test_ppl"] < 60


def test_bfloat16_trains_alike_with_float32_parameters_and_evaluation(small_flags, tmp_path):
    results = {
        p: run([*small_flags, "--epochs", "2", "--lr", "1", "--precision", p], tmp_path / p)
        for p in ("float32", "bfloat16")
    }
    (_, _, exact), *_ = a = losses(tmp_path / "float32")
    (_, _, rounded), *_ = b = losses(tmp_path / "bfloat16")
    assert exact != rounded and [loss for _, _, loss in b] == pytest.approx([loss for _, _, loss in a], rel=5e-3)
    saved = load_file(tmp_path / "bfloat16" / "last.safetensors")
    assert all(t.dtype == torch.float32 for name, t in saved.items() if name.startswith(("model.", "hidden.")))
    best = load_run(tmp_path / "bfloat16")
    loss = evaluate(best.model, best.text("valid"), best.config.valid_batch_size, best.config.optim.bptt)
    assert perplexity(loss) == results["bfloat16"]["valid_ppl"]


def test_the_seed_decides_everything(small_flags, tmp_path):
    flags = [*small_flags, "--epochs", "1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run([*flags, "--seed", str(seed)], tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_small_batches_accumulate_the_gradient_of_the_whole(small_flags, tmp_path):
    for name, small in (("whole", "0"), ("parts", "2")):
        run([*small_flags, *NO_DROPOUT, "--epochs", "1", "--small-batch-size", small], tmp_path / name)
    for (_, _, a), (_, _, b) in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert abs(a - b) < 1e-4


def test_killed_runs_resume_bit_identically(small_flags, tmp_path):
    """Killed in the middle of an epoch before averaging starts and again after: every loss, and the best model,
    equal those of an unbroken run."""
    flags = [*small_flags, "--epochs", "6"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(flags, whole)
    metrics = read_metrics(whole)
    steps = sum(m["kind"] == "train" and m["epoch"] == 1 for m in metrics)
    averaging = [i for i, m in enumerate(metrics) if m["kind"] == "valid" and m["averaging"]]
    assert averaging and averaging[0] > steps + 2, "averaging must start in this run, and not at once"

    killed_at([*flags, "--checkpoint-minutes", "0", "--out", str(broken)], broken, steps // 2)
    assert losses(broken) != losses(whole)
    killed_at(["--resume", str(broken)], broken, averaging[0] + steps // 2)
    _, meta = load_checkpoint(broken / "last.safetensors")
    assert meta["optimizer"]["averaging"] and 0 < meta["progress"]["row"]
    resumed = Trainer(parse(["--resume", str(broken)]))
    resumed.run()
    assert losses(broken) == losses(whole)
    a, b = load_file(whole / "best.safetensors"), load_file(broken / "best.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_kill_before_the_first_due_checkpoint_costs_nothing_but_time(small_flags, tmp_path):
    """Runs with the default interval between checkpoints, in minutes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(small_flags, whole)
    killed_at([*small_flags, "--out", str(broken)], broken, 1)
    assert not load_checkpoint(broken / "last.safetensors")[1]["progress"]["step"]
    assert main(["--resume", str(broken)]) == 0
    assert losses(broken) == losses(whole)


def test_a_kill_while_the_first_checkpoint_is_written_leaves_a_folder_to_start_in(small_flags, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.safetensors.partial").write_bytes(b"half")
    run([*small_flags, "--epochs", "1"], out)
    assert not list(out.glob("*.partial"))


@pytest.mark.trains
def test_a_run_in_pieces_is_the_whole_run(small_flags, tmp_path, capsys):
    """Each piece ends by the time limit, after a step at least, and leaves its checkpoint in small files."""
    whole, pieces, flags = tmp_path / "whole", tmp_path / "pieces", [*small_flags, "--hidden-sizes", "300", "10"]
    run(flags, whole)
    assert main([*flags, "--out", str(pieces), "--time-limit", "1e-9", "--checkpoint-max-mib", "1"]) == 0
    assert "time limit reached; run the same command to continue" in capsys.readouterr().out
    assert len(losses(pieces)) == 1 and len(list(pieces.glob("last.safetensors.*"))) > 1
    count = 1
    while not (pieces / "result.json").exists():
        assert main(["--resume", str(pieces), "--time-limit", "0.1"]) == 0
        count += 1
    assert count > 2 and losses(pieces) == losses(whole)
    assert (
        json.loads((pieces / "result.json").read_text())["test_ppl"]
        == json.loads((whole / "result.json").read_text())["test_ppl"]
    )


@pytest.mark.trains
def test_a_finished_run_resumes_to_more_epochs(small_flags, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    run([*small_flags, "--epochs", "4"], whole)
    run([*small_flags, "--epochs", "2"], longer)
    Trainer(parse(["--resume", str(longer), "--epochs", "4"])).run()
    assert losses(whole) == losses(longer)


def test_divergence_stops_the_run_and_keeps_the_checkpoints(small_flags, tmp_path):
    out = tmp_path / "run"
    run([*small_flags, "--epochs", "1"], out)
    best = (out / "best.safetensors").read_bytes()
    tensors, meta = load_checkpoint(out / "last.safetensors")
    trainer = Trainer(parse(["--resume", str(out), "--epochs", "2"]))
    with torch.no_grad():
        trainer.model.rnns[0].bias_ih_l0.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="training diverged at step .* lower --lr or --clip, and another --out"):
        trainer.run()
    with pytest.raises(TrainingDiverged, match="model.rnns.0.bias_ih_l0 is no longer finite"):
        trainer._write_last()
    assert (out / "best.safetensors").read_bytes() == best
    kept, _ = load_checkpoint(out / "last.safetensors")
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("where", ["validation", "a checkpoint"])
def test_a_run_that_diverges_ends_in_one_line(where, small_flags, tmp_path, monkeypatch, capsys):
    """The averages may be what is no longer finite, which training itself does not notice."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def spoilt(self, length=None, step=Trainer.train_step):
            rows = step(self, length)
            if self.progress.step == 3:
                self.optimizer.start_averaging()
            if self.progress.step == 6:
                self.optimizer.averages[0].fill_(torch.inf)
            return rows

        patch.setattr(Trainer, "train_step", spoilt)
        minutes = ["--checkpoint-minutes", "0"] if where == "a checkpoint" else []
        assert main([*small_flags, *minutes, "--epochs", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: training diverged at step") and "is no longer finite" in error
    assert (
        not (out / "best.safetensors").exists()
        and first_not_finite(load_checkpoint(out / "last.safetensors")[0]) is None
    )


def test_a_single_row_at_the_end_takes_no_step(small_flags, tmp_path, monkeypatch):
    """As in the published code, whose last segment has two rows at least; here 379 of the text's 380 and a single one,
    or 378 and two."""
    for drawn, steps in ((379, 1), (378, 2), (400, 1)):
        monkeypatch.setattr("fused_mos.training.trainer.random_bptt_length", lambda *_, drawn=drawn: drawn)
        trainer = Trainer(parse([*small_flags, "--out", str(tmp_path / str(drawn))]))
        assert trainer.source.shape[0] == 381
        trainer._train_epoch()
        assert trainer.progress.step == steps
