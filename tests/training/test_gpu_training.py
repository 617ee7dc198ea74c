"""Training on a GPU: cuDNN's flat weights, no waiting for the device, and the same losses as on the CPU."""

import warnings

import pytest
import torch
from runs import losses

from fused_mos.lm import WeightDropLSTM
from fused_mos.train import parse
from fused_mos.training import Trainer
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
def test_a_step_does_not_wait_for_the_device(precision, averaging, small_flags, tmp_path):
    trainer = Trainer(
        parse([*small_flags, "--device", "cuda", "--precision", precision, "--out", str(tmp_path / "run")])
    )
    if averaging:
        trainer.optimizer.start_averaging()
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the second writes what the first has noted
            trainer.train_step()
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
