"""Runs whose latent vectors are not the paper's: every command that trains or reads one. (On many ranks:
test_train_1b_ranks.py; as CUDA graphs: test_graphs.py.)"""

import json

import pytest
import torch
from runs import losses, refused
from safetensors.torch import load_file

from fused_mos import evaluate, experts, finetune, generate, train, train_1b
from fused_mos.training import Trainer
from fused_mos.training import dynamic_evaluation as dynamic_module
from fused_mos.training.checkpoint import load_checkpoint, save_checkpoint
from fused_mos.training.run import load_run

FIELDS = ("latent", "latent_norm", "rank")


def assert_same_model(a, b):
    one, other = load_file(a / "best.safetensors"), load_file(b / "best.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.trains
@pytest.mark.parametrize(
    "options",
    ["--latent-norm --rank 3", "--latent residual --rank 3 --embedding-size 10", "--head moc --latent linear"],
)
def test_every_command_takes_such_a_run(options, small_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dynamic_module, "STATISTICS_BATCH_SIZE", 20)
    flags = [*small_flags, *options.split(), "--dropoutl", "0.1", "--epochs", "2"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    Trainer(train.parse([*flags, "--out", str(whole)])).run()
    for time_limit in ("1e-9", "1e-9", "0"):
        assert train.main([*flags, "--out", str(pieces), "--time-limit", time_limit]) == 0
    assert losses(pieces) == losses(whole)
    assert_same_model(pieces, whole)

    run = load_run(whole)
    head, asked = run.model.head, run.config.model
    assert (head.latent_kind, head.latent_norm, head.rank) == (asked.latent, asked.latent_norm, asked.rank)
    assert (asked.latent, asked.latent_norm, asked.rank) != ("tanh", False, None)

    for command, *arguments in (
        (evaluate,),
        (evaluate, "--dynamic", "--split", "valid"),
        (evaluate, "--cache", "--window", "5"),
        (generate, "--words", "5"),
        (finetune, "--epochs", "1"),
        (evaluate, "--dynamic"),
        *([(experts,)] if asked.head == "mos" else []),
    ):
        assert command.main([str(whole), *arguments]) == 0, command
    assert load_run(whole / "finetune").config.model == asked
    refused(train, [*flags, "--rank", "2", "--out", whole], capsys, "rank cannot change", f"was {asked.rank}, got 2")


@pytest.mark.trains
@pytest.mark.parametrize("chunk", ["0", "20"])
def test_train_1b_goes_on_bit_by_bit(chunk, flags, tmp_path):
    flags = [*flags, "--latent-norm", "--rank", "3", "--max-steps", "9", "--head-chunk", chunk]
    whole, pieces = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "pieces"))
    for arguments in (whole, [*pieces, "--time-limit", "1e-9"], pieces, [*whole, "--evaluate"]):
        assert train_1b.main(arguments) == 0
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")


@pytest.mark.trains
def test_a_run_of_before_these_fields_goes_on(finished_run, small_flags, tmp_path):
    """It continues unchanged: the new fields' defaults describe its model."""
    run, whole = finished_run(1), tmp_path / "whole"

    def without_the_fields(config):
        assert all(config["model"].pop(name) == default for name, default in zip(FIELDS, ("tanh", False, None)))
        return config

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(without_the_fields(config)))
    (run / "last.safetensors.previous").unlink()
    for name in ("best.safetensors", "last.safetensors"):
        tensors, meta = load_checkpoint(run / name)
        save_checkpoint(run / name, tensors, meta | {"config": without_the_fields(meta["config"])})
    for command in (evaluate, generate, finetune):
        assert command.main([str(run)]) == 0
    assert train.main([*small_flags, "--epochs", "2", "--out", str(run)]) == 0
    Trainer(train.parse([*small_flags, "--epochs", "2", "--out", str(whole)])).run()
    assert losses(run) == losses(whole)
    assert_same_model(run, whole)


@pytest.mark.trains
def test_sizes_that_cannot_be_in_a_configuration(finished_run, capsys):
    run = finished_run(1)
    config = json.loads((run / "config.json").read_text())
    for changed, message in (
        ({"rank": 9}, "rank must be at most"),
        ({"rank": True}, "rank must be a whole number, got True"),
        ({"rank": 2**40}, "rank must be in [1, 2**31)"),
        ({"latent_norm": 1}, "latent_norm must be true or false, got 1"),
        ({"latent": "relu"}, "latent must be one of tanh, linear, residual, got 'relu'"),
        ({"latent": "residual"}, "embedding_size must be the last of hidden_sizes, got 8 and 10"),
        ({"rank": 3}, "its rank is None, the run's 3"),
    ):
        (run / "config.json").write_text(json.dumps(config | {"model": config["model"] | changed}))
        for command in (evaluate, generate, finetune):
            refused(command, [run], capsys, message)
