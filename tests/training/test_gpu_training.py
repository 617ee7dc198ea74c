"""Training on a GPU: cuDNN's flat weights, no waiting for the device, the same losses as on the CPU, and the same bits
from CUDA graphs as from ordinary steps."""

import subprocess
import sys
import warnings

import pytest
import torch
from runs import losses

from fused_mos import train_1b
from fused_mos.lm import WeightDropLSTM
from fused_mos.train import parse
from fused_mos.training import Trainer, graphs
from fused_mos.training.device import allow_tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


@pytest.fixture(autouse=True)
def float32_settings():
    yield
    allow_tf32(torch.device("cuda"), False)


def test_cudnn_takes_the_flat_weights_without_a_warning():
    lstm, x = WeightDropLSTM(64, 48, 0.5).cuda(), torch.randn(9, 4, 64, device="cuda")
    hidden = (torch.zeros(1, 4, 48, device="cuda"), torch.zeros(1, 4, 48, device="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            lstm(x, hidden)[0].sum().backward()
        lstm.eval()(x, hidden)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("flag", ["--no-cuda-graphs", "--cuda-graphs"])
def test_a_step_does_not_wait_for_the_device(flag, precision, averaging, small_flags, tmp_path):
    trainer = Trainer(
        parse([*small_flags, flag, "--device", "cuda", "--precision", precision, "--out", str(tmp_path / "run")])
    )
    if averaging:
        trainer.optimizer.start_averaging()
    trainer.model.train()
    for _ in range(2):  # one runs; a capture, which is the second, waits
        trainer.train_step(12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the second writes what the first has noted
            trainer.train_step(12)
            trainer.stopwatch.lap()
            trainer._end_interval()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("tf32", 2e-2), ("bfloat16", 2e-2)])
def test_losses_are_those_of_the_cpu(precision, tolerance, small_flags, tmp_path):
    flags = [*small_flags, "--epochs", "1", "--lr", "1"]
    for name in ("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop"):
        flags += [f"--{name}", "0"]  # the devices draw different masks
    Trainer(parse([*flags, "--device", "cpu", "--out", str(tmp_path / "cpu")])).run()
    Trainer(parse([*flags, "--device", "cuda", "--precision", precision, "--out", str(tmp_path / "cuda")])).run()
    for (_, _, a), (_, _, b) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert b == pytest.approx(a, rel=tolerance)


# --------------------------------------------------------------------------------------------------------- CUDA graphs

LENGTHS = [12, 9, 12, 12, 15, 9, 9, 12, 15, 15, 9, 7, 12]
"""Rows of the segments: each length but one runs, is captured, and is replayed."""


def trained(trainer, lengths):
    """The interval's loss after each step, and the state at the end: parameters, averages, hidden and random states.
    Averaging starts at the sixth step."""
    trainer.model.train()
    allow_tf32(trainer.device, trainer.config.precision != "float32")
    sums = []
    for length in lengths:
        if trainer.progress.step == 5:
            trainer.optimizer.start_averaging()
        trainer.train_step(length)
        sums.append(trainer.interval_loss.clone())
    tensors, _ = trainer.tensors.to_save(trainer.hidden, trainer.interval_loss)
    return torch.stack(sums).tolist(), {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture
def gpu_flags(small_flags):
    return [*small_flags, "--device", "cuda", "--dropoutl", "0.1"]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("parts", ["1", "2"])
def test_replayed_steps_have_the_bits_of_ordinary_ones(parts, precision, gpu_flags, tmp_path):
    flags = [*gpu_flags, "--precision", precision, "--micro-batches", parts]
    plain = Trainer(parse([*flags, "--no-cuda-graphs", "--out", str(tmp_path / "plain")]))
    losses_of_plain, state_of_plain = trained(plain, LENGTHS)
    replaying = Trainer(parse([*flags, "--out", str(tmp_path / "graphs")]))  # seeds the generators anew
    losses_of_replays, state_of_replays = trained(replaying, LENGTHS)
    assert plain.graphs is None and replaying.graphs.n_graphs == len(set(LENGTHS)) - 1
    assert losses_of_replays == losses_of_plain
    assert_equal_states(state_of_replays, state_of_plain)


@pytest.mark.parametrize("second", ["--cuda-graphs", "--no-cuda-graphs"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(second, gpu_flags, tmp_path):
    whole = Trainer(parse([*gpu_flags, "--out", str(tmp_path / "whole")]))
    losses_of_whole, state_of_whole = trained(whole, LENGTHS)
    broken = Trainer(parse([*gpu_flags, "--out", str(tmp_path / "broken")]))
    begun, _ = trained(broken, LENGTHS[:7])
    broken._save_last()
    broken.metrics.close()
    broken._lock.release()
    resumed = Trainer(parse(["--resume", str(tmp_path / "broken"), second]))
    ended, state_of_resumed = trained(resumed, LENGTHS[7:])
    assert [*begun, *ended] == losses_of_whole
    assert_equal_states(state_of_resumed, state_of_whole)


def test_replays_beside_checkpoints_averages_and_validation(gpu_flags, tmp_path):
    """A whole run, which evaluates by graphs, too, and saves after each step."""
    for name, flag in (("plain", "--no-cuda-graphs"), ("graphs", "--cuda-graphs")):
        Trainer(parse([*gpu_flags, flag, "--checkpoint-minutes", "0", "--out", str(tmp_path / name)])).run()
    assert losses(tmp_path / "graphs") == losses(tmp_path / "plain")


def test_the_number_of_graphs_is_bounded(gpu_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    trainer = Trainer(parse([*gpu_flags, "--out", str(tmp_path / "run")]))
    trained(trainer, LENGTHS)
    assert trainer.graphs.n_graphs == 2


def test_one_billion_word_steps_replayed_have_the_bits_of_ordinary_ones(flags, tmp_path):
    flags = [*flags, "--device", "cuda", "--dropout", "0.2", "--micro-batches", "2", "--max-steps", "40"]
    for name, flag in (("plain", "--no-cuda-graphs"), ("graphs", "--cuda-graphs")):
        assert train_1b.main([*flags, flag, "--out", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "graphs") == losses(tmp_path / "plain")


FAILING = """
import sys
from fused_mos.lm import AWDLSTM
from fused_mos.train import main

forward = AWDLSTM.forward

def waiting(self, *arguments):
    output = forward(self, *arguments)
    output.loss.item()
    return output

AWDLSTM.forward = waiting
sys.exit(main(sys.argv[1:]))
"""


def test_a_capture_that_fails_ends_the_run_and_names_the_flag(gpu_flags, tmp_path):
    """Runs in its own process, since a failed capture leaves torch's allocator unusable."""
    command = [sys.executable, "-c", FAILING, *gpu_flags, "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "train with --no-cuda-graphs" in result.stderr
