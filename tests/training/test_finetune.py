"""Fine-tuning: from the best model, averaging from the first step, to the rule that ends it."""

import json
import shutil

import pytest
import torch
from runs import killed_at, losses
from safetensors.torch import load_file

from fused_mos import finetune
from fused_mos.training import CheckpointError, Trainer
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint
from fused_mos.training.metrics import read_metrics


@pytest.fixture
def trained(finished_run):
    """A run of one epoch."""
    return finished_run(1)


def test_continues_from_the_best_model(trained, capsys):
    before = load_file(trained / "best.safetensors")
    assert finetune.main([str(trained), "--epochs", "1", "--lr", "1e-9", "--time-limit", "1e-9"]) == 0  # one step
    tensors, meta = load_checkpoint(trained / "finetune" / "best.safetensors")
    assert meta["epoch"] == 0 and all(torch.equal(tensors[name], before[name]) for name in before)
    assert meta["valid_loss"] == pytest.approx(
        load_checkpoint(trained / "best.safetensors")[1]["valid_loss"], abs=1e-12
    )
    trainer = Trainer(finetune.parse([str(trained), "--epochs", "1", "--out", str(trained / "again")]))
    assert trainer.optimizer.averaging and trainer.optimizer.lr == 12.5
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    steps = []
    for _ in range(4):
        trainer.train_step()
        steps.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
    with trainer.optimizer.averaged():
        for (
            name,
            parameter,
        ) in trainer.model.named_parameters():  # torch.optim.ASGD's average begins with the second step
            assert torch.allclose(parameter, sum(step[name] for step in steps[1:]) / 3, atol=1e-6), name


def test_stops_where_averaging_would_have_started(trained):
    """Validation text is random words, so that it soon gets worse; nonmono is 0."""
    assert finetune.main([str(trained), "--epochs", "30"]) == 0
    folder = trained / "finetune"
    valid = [m["loss"] for m in read_metrics(folder) if m["kind"] == "valid"]
    assert len(valid) < 30
    assert valid[-1] > min(valid[:-1])
    assert all(loss <= min(valid[:i]) for i, loss in enumerate(valid[:-1]) if i)
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == len(valid)
    assert result["valid_ppl"] <= json.loads((trained / "result.json").read_text())["valid_ppl"]
    assert finetune.main(["--resume", str(folder)]) == 0  # nothing left to train
    assert json.loads((folder / "result.json").read_text())["epochs"] == len(valid)


def test_killed_runs_resume_bit_identically(trained, tmp_path):
    flags = [str(trained), "--epochs", "2", "--nonmono", "9"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Trainer(finetune.parse([*flags, "--out", str(whole)])).run()
    steps = sum(m["kind"] == "train" for m in read_metrics(whole))
    killed_at([*flags, "--checkpoint-minutes", "0", "--out", str(broken)], broken, steps // 3, "finetune")
    Trainer(finetune.parse(["--resume", str(broken)])).run()
    assert losses(broken) == losses(whole)
    a, b = load_file(whole / "best.safetensors"), load_file(broken / "best.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_kill_in_the_first_validation_costs_nothing(trained, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    flags, whole, broken = [str(trained), "--epochs", "1"], tmp_path / "whole", tmp_path / "broken"
    Trainer(finetune.parse([*flags, "--out", str(whole)])).run()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupted)
        assert finetune.main([*flags, "--out", str(broken)]) == 130
    assert finetune.main([*flags, "--out", str(broken)]) == 0
    assert losses(broken) == losses(whole)
    assert (
        load_checkpoint(broken / "best.safetensors")[1]["valid_loss"]
        == load_checkpoint(whole / "best.safetensors")[1]["valid_loss"]
    )


def test_errors_name_what_is_missing(tmp_path, trained, capsys):
    for arguments, message in (
        ([], "name the folder of the run to fine-tune first"),
        (["--lr", "3", str(trained)], "name the folder of the run to fine-tune first"),
        ([str(trained), "--recipe", "ptb"], "recipe must be that of the run, demo, got ptb"),
        (
            [str(trained), "--out", str(trained)],
            "lr cannot change when a run continues: it was 10.0, got 12.5; name another --out",
        ),  # it is no fine-tuning of this run
        ([str(tmp_path / "none")], "is not the folder of a run: it has no config.json"),
        ([str(trained), "--lr", "-1"], "lr must be positive, got -1.0"),
        ([str(trained), "--finetune-lr", "3"], "to fine-tune, pass --lr 3"),
        ([str(trained), "--embedding-size", "9"], "does not fit the model"),
    ):
        assert finetune.main(arguments) == 2
        assert message in capsys.readouterr().err
    (trained / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint .*best.safetensors"):
        Trainer(finetune.parse([str(trained)]))


def test_another_runs_fine_tuning_does_not_go_on(trained, tmp_path, capsys):
    """Both runs may have the same flags. A run that has moved is still the same run."""
    flags, other = ["--epochs", "1", "--lr", "3"], tmp_path / "other"
    assert finetune.main([str(trained), *flags]) == 0
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("finetune"))
    tensors, meta = load_checkpoint(other / "best.safetensors")
    tensors["head.prior.weight"] += 1
    save_checkpoint(other / "best.safetensors", tensors, meta)
    folder = trained / "finetune"
    before = (folder / "last.safetensors").read_bytes()
    assert finetune.main([str(other), *flags, "--epochs", "2", "--out", str(folder)]) == 2
    message = f"out: the fine-tuning in {folder} began from another model than the best one that {other} has now"
    assert message in capsys.readouterr().err and (folder / "last.safetensors").read_bytes() == before
    trained.rename(moved := tmp_path / "moved")
    assert finetune.main([str(moved), *flags, "--epochs", "2"]) == 0
    (moved / "best.safetensors").unlink()  # then the folder tells
    assert finetune.main(["--resume", str(moved / "finetune"), "--epochs", "2"]) == 0
    assert finetune.main([str(other), *flags, "--epochs", "2", "--out", str(moved / "finetune")]) == 2


def test_fine_tuning_of_an_earlier_version_goes_on(trained, tmp_path, capsys):
    """Its checkpoint has no digest of the model that it began from."""
    folder, other = trained / "finetune", tmp_path / "other"
    assert finetune.main([str(trained), "--epochs", "1"]) == 0
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("finetune"))
    tensors, meta = load_checkpoint(folder / "last.safetensors")
    del meta["start"]
    save_checkpoint(folder / "last.safetensors", tensors, meta)
    assert finetune.main([str(other), "--epochs", "2", "--out", str(folder)]) == 2
    assert "began from another model" in capsys.readouterr().err
    assert finetune.main([str(trained), "--epochs", "2"]) == 0


def test_micro_batches_by_their_columns(trained):
    assert finetune.parse([str(trained), "--small-batch-size", "2"]).optim.micro_batches == 3
