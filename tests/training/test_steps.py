"""Steps of the trainer against the published equations written out, and the backends against each other over a run."""

import itertools
import json

import pytest
import torch
from runs import losses
from torch.utils._python_dispatch import TorchDispatchMode

from fused_mos.data.sample import write_corpus
from fused_mos.train import parse
from fused_mos.training import Trainer
from fused_mos.training.profiling import StepProfile

NO_DROPOUT = [
    f for name in ("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop") for f in (f"--{name}", "0")
]


def plain_lstm(x, h, c, w_ih, w_hh, b_ih, b_hh):
    outputs = []
    for row in x:
        i, f, g, o = (row @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


class Restatement:
    """One training step without dropout: loss, gradient by sub-batches, clipping, weight decay, SGD, then ASGD."""

    def __init__(self, trainer):
        self.optim, self.n_experts = trainer.config.optim, trainer.config.model.n_experts
        self.p = {name: p.detach().clone().requires_grad_() for name, p in trainer.model.named_parameters()}
        self.layers = len(trainer.model.rnns)
        self.states = [[(h[0].clone(), c[0].clone()) for h, c in hidden] for hidden in trainer.hidden]
        self.averages = None

    def loss(self, part, tokens, targets):
        p, x = self.p, self.p["encoder.weight"][tokens]
        for layer in range(self.layers):
            weights = [p[f"rnns.{layer}.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            x, h, c = plain_lstm(x, *self.states[part][layer], *weights)
            self.states[part][layer] = h.detach(), c.detach()
        prior = torch.softmax(x @ p["head.prior.weight"].T, -1)
        latent = torch.tanh(x @ p["head.latent.0.weight"].T + p["head.latent.0.bias"]).unflatten(
            -1, (self.n_experts, -1)
        )
        probability = (
            prior[..., None] * torch.softmax(latent @ p["encoder.weight"].T + p["head.decoder.bias"], -1)
        ).sum(-2)
        nll = -probability.gather(-1, targets[..., None]).log().mean()
        return nll + self.optim.alpha * (x**2).mean() + self.optim.beta * ((x[1:] - x[:-1]) ** 2).mean()

    def step(self, inputs, targets, drawn):
        optim, size = self.optim, self.optim.batch_size // self.optim.micro_batches
        parts = range(optim.batch_size // size)
        columns = [slice(part * size, (part + 1) * size) for part in parts]
        loss = sum(
            self.loss(part, inputs[:, c], targets[:, c]) * size / optim.batch_size for part, c in zip(parts, columns)
        )
        gradients = torch.autograd.grad(loss, list(self.p.values()))
        norm = sum((g**2).sum() for g in gradients).sqrt()
        with torch.no_grad():
            for value, g in zip(self.p.values(), gradients):
                g = g * min(1.0, optim.clip / (norm.item() + 1e-6)) + optim.weight_decay * value
                value -= optim.lr * drawn / optim.bptt * g
            if self.averages is not None:
                self.trail.append([value.clone() for value in self.p.values()])
                self.averages = [
                    torch.stack(values).mean(0) for values in zip(*(self.trail[1:] or self.trail))
                ]  # as torch's ASGD with t0 = 0


def test_sgd_and_asgd_steps_restated(small_flags, tmp_path, monkeypatch):
    flags = [
        *small_flags,
        *NO_DROPOUT,
        "--batch-size",
        "6",
        "--small-batch-size",
        "2",
        "--weight-decay",
        "1e-3",
        "--clip",
        "0.1",
    ]
    trainer = Trainer(parse([*flags, "--out", str(tmp_path / "run")]))
    trainer.model.double()
    trainer.hidden = trainer._initial_hidden()
    plain = Restatement(trainer)
    drawn = []
    monkeypatch.setattr(
        "fused_mos.training.trainer.random_bptt_length",
        lambda *_: drawn.append((7, 12, 15)[len(drawn) % 3]) or drawn[-1],
    )
    for step in range(7):
        if step == 3:
            trainer.optimizer.start_averaging()
            plain.averages, plain.trail = [], []
        row = trainer.progress.row
        trainer.train_step()
        stop = row + drawn[-1]
        plain.step(trainer.source[row:stop], trainer.source[row + 1 : stop + 1], drawn[-1])
        for name, value in trainer.model.named_parameters():
            assert torch.allclose(value, plain.p[name], rtol=0, atol=1e-6), (step, name)
    with trainer.optimizer.averaged():
        for value, average in zip(trainer.model.parameters(), plain.averages):
            assert torch.allclose(value, average, rtol=0, atol=1e-6)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("averaging", [False, True])
def test_a_step_draws_masks_for_each_part_and_reads_no_number_back(averaging, small_flags, tmp_path, monkeypatch):
    """On a GPU, reading a value would make the host wait for the device. The two places that read values only on a CPU
    are made to behave as on a GPU."""
    monkeypatch.setattr("fused_mos.training.trainer.random_bptt_length", lambda *_: 12)
    monkeypatch.setattr("fused_mos._inputs.values_can_be_read", lambda *_: False)
    monkeypatch.setattr(
        "fused_mos._backends.from_rows.scaled", lambda gradients, factor, *_: [g * factor for g in gradients]
    )
    trainer = Trainer(
        parse(
            [
                *small_flags,
                "--dropoutl",
                "0.1",
                "--small-batch-size",
                "2",
                "--backend",
                "tiled",
                "--out",
                str(tmp_path / "run"),
            ]
        )
    )
    if averaging:
        trainer.optimizer.start_averaging()
        trainer.train_step()
    with Calls() as calls:
        trainer.train_step()
    assert calls.names.count("bernoulli_") == 3 * 7, "three parts, seven masks each in a model of two layers"
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero"} & set(calls.names)


def test_a_profile_changes_no_more_than_rounding(small_flags, tmp_path, capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(
        StepProfile, "_now", lambda self: float(next(ticks))
    )  # a clock by which every stage takes as long
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    Trainer(parse([*small_flags, "--epochs", "1", "--out", str(plain)])).run()
    Trainer(
        parse([*small_flags, "--epochs", "1", "--small-batch-size", "6", "--profile", "5", "--out", str(profiled)])
    ).run()
    for (_, _, a), (_, _, b) in zip(losses(plain), losses(profiled), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    report = json.loads((profiled / "profile.json").read_text())
    assert list(report["stages"]) == [
        "data",
        "embedding, forward",
        "LSTM 1, forward",
        "dropout, forward",
        "LSTM 2, forward",
        "head, forward",
        "regularisers",
        "head, backward",
        "dropout, backward",
        "LSTM 2, backward",
        "LSTM 1, backward",
        "embedding, backward",
        "clipping",
        "optimizer",
    ]
    assert report["steps"] == 5 and all(stage["ms"] > 0 for stage in report["stages"].values())
    assert sum(stage["share"] for stage in report["stages"].values()) == pytest.approx(1)
    assert "profile of 5 steps on cpu" in capsys.readouterr().out


@pytest.mark.trains
def test_backends_train_alike(tmp_path):
    """Some 300 steps on CPython's documentation, dropout and all: the same random numbers, so the same losses up to
    rounding."""
    data = tmp_path / "data"
    write_corpus(data)
    backends = ["reference", "tiled", "auto"]
    perplexities = []
    for backend in backends:
        flags = [
            "--recipe",
            "demo",
            "--data",
            str(data),
            "--epochs",
            "1",
            "--log-interval",
            "1",
            "--backend",
            backend,
            "--out",
            str(tmp_path / backend),
        ]
        perplexities.append(Trainer(parse(flags)).run()["test_ppl"])
    expected, *others = [
        [loss for kind, _, loss in losses(tmp_path / backend) if kind == "train"] for backend in backends
    ]
    assert len(expected) >= 200
    for other in others:
        assert other[:32] == pytest.approx(expected[:32], rel=1e-5)
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=5e-3)
