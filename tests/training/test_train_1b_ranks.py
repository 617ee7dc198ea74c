"""One Billion Word runs under torchrun: the same losses on other numbers of ranks, and through kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from runs import losses

from fused_mos import train_1b
from fused_mos.training import TrainingDiverged
from fused_mos.training.lm1b import LM1BTrainer
from fused_mos.training.lm1b.exchange import exchange
from fused_mos.training.lm1b.ranks import Ranks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(n_ranks, arguments, *options):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={n_ranks}",
        *options,
        "-m",
        "fused_mos.train_1b",
        *arguments,
    ]


def finish(command):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("n_ranks", "vocab_parallel", "accumulate", "options"),
    [
        (2, 1, 3, []),
        (2, 2, 1, []),
        # with the flags' 0.01 this model's losses part by 1e-2 after a rounding, on one rank, too
        (4, 2, 3, ["--latent-norm", "--rank", "4", "--lr", "0.003"]),
    ],
)
def test_ranks_train_as_one_and_one_continues_what_they_began(
    n_ranks, vocab_parallel, accumulate, options, flags, tmp_path
):
    """Data-parallel, with the decoder sharded, and both; one process goes on from their checkpoint, in other parts."""
    flags, whole, out = [*flags, *options, "--decay", "none", "--init-bias"], tmp_path / "whole", tmp_path / "run"
    assert train_1b.main([*flags, "--out", str(whole)]) == 0
    half = sum(kind == "train" for kind, _, _ in losses(whole)) // 2
    ranks = ["--vocab-parallel", str(vocab_parallel), "--micro-batches", str(accumulate)]
    finish(torchrun(n_ranks, [*flags, "--out", str(out), "--max-steps", str(half), *ranks]))
    assert train_1b.main([*flags, "--micro-batches", "2", "--out", str(out)]) == 0
    by_step = {(kind, step): loss for kind, step, loss in losses(out)}
    for kind, step, loss in losses(whole):
        assert by_step[kind, step] == pytest.approx(loss, rel=1e-5), (kind, step)
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (out, whole))
    assert a["parameters"] == b["parameters"] and a["heldout_words"] == b["heldout_words"] and a["words"] == b["words"]
    assert a["heldout_loss"] == pytest.approx(b["heldout_loss"], rel=1e-5)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def kill_one_rank(agent, out, draw, saving):
    """Waits for some steps, or for a checkpoint that is being written, and kills one of the ranks as an out-of-memory
    killer would."""
    metrics, before = out / "metrics.jsonl", time.monotonic()
    size = metrics.stat().st_size if metrics.exists() else 0
    target = draw.randrange(1, 8)
    while time.monotonic() < before + 120:
        assert agent.poll() is None, "the run ended before it could be killed"
        ranks = children(agent.pid)
        grown = metrics.exists() and metrics.read_bytes()[size:].count(b"\n") >= target
        if len(ranks) == 2 and grown and (not saving or list(out.glob("*/*.partial"))):
            os.kill(draw.choice(ranks), signal.SIGKILL)
            return
        time.sleep(0.0005 if saving else 0.005)
    raise AssertionError("no moment to kill at")


def unbroken_by_kills(flags, tmp_path, kills, seed):
    """Runs with torchrun's restarts under repeated kills. Every loss equals that of an uninterrupted run of two ranks,
    bit for bit."""
    whole, out, draw = tmp_path / "whole", tmp_path / "broken", random.Random(seed)
    flags = [*flags, "--dropout", "0.2", "--checkpoint-minutes", "0"]
    finish(torchrun(2, [*flags, "--out", str(whole)]))
    command = torchrun(2, [*flags, "--out", str(out)], f"--max-restarts={kills}")
    with (tmp_path / "stderr").open("wb") as stderr:  # a pipe that nobody reads would fill, and stop the ranks
        agent = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        for i in range(kills):
            kill_one_rank(agent, out, draw, saving=i % 2 == 1)
            ranks = children(agent.pid)
            deadline = time.monotonic() + 60
            while set(children(agent.pid)) & set(ranks):  # until the agent has started new ones
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert agent.wait(timeout=300) == 0, (tmp_path / "stderr").read_text()[-3000:]
    finally:
        agent.terminate()
    assert losses(out) == losses(whole)
    assert not list(out.glob("*/*.partial"))
    assert (
        json.loads((out / "result.json").read_text())["heldout_loss"]
        == json.loads((whole / "result.json").read_text())["heldout_loss"]
    )


def test_a_rank_that_is_killed_costs_nothing(flags, tmp_path):
    unbroken_by_kills([*flags, "--epochs", "3"], tmp_path, kills=1, seed=0)


@pytest.mark.slow
def test_ten_kills_cost_nothing(flags, tmp_path):
    unbroken_by_kills([*flags, "--epochs", "30"], tmp_path, kills=10, seed=1)


def test_a_signal_to_torchrun_stops_all_ranks_for_good(flags, tmp_path):
    out = tmp_path / "run"
    command = torchrun(2, [*flags, "--epochs", "1000", "--out", str(out)], "--max-restarts=3")
    agent = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    _, error = agent.communicate(timeout=60)
    assert b"stopped; run the same command to continue" in error and agent.returncode
    *_, checkpoint = sorted((out / "checkpoints").iterdir())
    assert int(checkpoint.name.removeprefix("step-")) >= 5 and (checkpoint / "state.json").is_file()


def exchange_few_tensors(flags, out):
    config = train_1b.parse([*flags, "--vocab-parallel", "2", "--out", str(out)])
    trainer = LM1BTrainer(config, Ranks(config.device, config.vocab_parallel))
    exchanged, all_reduce = [], dist.all_reduce

    def noted(tensor, *arguments, **options):
        exchanged.append(tensor.dtype)
        return all_reduce(tensor, *arguments, **options)

    def counted(*arguments):
        with mock.patch.object(dist, "all_reduce", noted):
            return exchange(*arguments)

    with mock.patch("fused_mos.training.lm1b.trainer.exchange", counted):
        trainer.train_step(next(trainer.stream.segments()))
    assert exchanged == [torch.float32, torch.float64]


def test_a_step_ends_with_one_tensor_of_gradients_and_one_of_numbers(flags, tmp_path):
    run_on_ranks(2, exchange_few_tensors, flags, tmp_path / "run", init=False)


def all_stop(flags, out):
    config = train_1b.parse([*flags, "--vocab-parallel", "2", "--out", str(out)])
    trainer = LM1BTrainer(config, Ranks(config.device, config.vocab_parallel))
    if trainer.ranks.rank == 1:
        trainer.model.rnns[0].weight_hh_l0.register_hook(lambda grad: grad * torch.inf)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainingDiverged, match="nothing was updated"):
        trainer.train_step(next(trainer.stream.segments()))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(flags, tmp_path):
    run_on_ranks(2, all_stop, flags, tmp_path / "run", init=False)
