"""What the trainers record as a CUDA graph never makes the host wait for a GPU, and copies nothing to one or from one.

On fake CUDA tensors. cuDNN's LSTM, which torch cannot call without a device, is written out.
"""

from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from test_host_reads import Audit
from torch._subclasses import FakeTensorMode

from fused_mos.lm import AWDLSTM, NTASGD
from fused_mos.training import ModelConfig, OptimConfig
from fused_mos.training.graphs import allocate_gradients
from fused_mos.training.lm1b.loss import SummedLoss
from fused_mos.training.lm1b.trainer import LM1BTrainer
from fused_mos.training.trainer import Trainer

pytestmark = fake_cuda.only_without_a_device

T, B, N_WORDS = 7, 6, 50
MODEL = ModelConfig(n_experts=3, embedding_size=16, hidden_sizes=(24, 20), dropoutl=0.2)


def lstm(x, hidden, weights, *_):
    """`torch.lstm` of one layer: (T, B, features), h and c (1, B, width) -> (T, B, width), h, c."""
    (h, c), (w_ih, w_hh, b_ih, b_hh) = hidden, weights
    outputs = []
    for row in x.unbind():
        i, f, g, o = (row @ w_ih.T + b_ih + h[0] @ w_hh.T + b_hh).chunk(4, 1)
        c = (f.sigmoid() * c[0] + i.sigmoid() * g.tanh())[None]
        h = o.sigmoid()[None] * c.tanh()
        outputs.append(h[0])
    return torch.stack(outputs), h, c


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    monkeypatch.setattr(torch, "lstm", lstm)
    for trainer in ("trainer", "lm1b.trainer"):
        monkeypatch.setattr(
            f"fused_mos.training.{trainer}.autocast", lambda _, precision: fake_cuda.autocast(precision == "bfloat16")
        )


@pytest.fixture
def model(monkeypatch):
    with FakeTensorMode(), torch.device("cuda"):
        model = AWDLSTM(N_WORDS, **vars(MODEL) | {"backend": "tiled"})
        allocate_gradients(model.parameters())

        def backward(loss):
            parameters = list(model.parameters())
            for parameter, gradient in zip(parameters, fake_cuda.grad(loss, parameters)):
                parameter.grad.add_(gradient)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        yield model


def audited(trainer_type, trainer) -> list[str]:
    inputs, targets = torch.zeros(T, B, dtype=torch.int64), torch.zeros(T, B, dtype=torch.int64)
    with Audit() as audit:
        trainer_type._gradients(trainer, inputs, targets)
    assert audit.n_operations > 100
    return audit.waits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step(parts, precision, model):
    optim = OptimConfig(batch_size=B, micro_batches=parts)
    trainer = SimpleNamespace(
        config=SimpleNamespace(optim=optim, precision=precision),
        device=torch.device("cuda"),
        model=model,
        optimizer=NTASGD(model.parameters(), 1.0),
        graphs=True,
        hidden=[model.initial_hidden(B // parts) for _ in range(parts)],
        interval_loss=torch.zeros((), dtype=torch.float64),
        _micro_batch=B // parts,
        _mark=lambda _: None,
    )
    assert audited(Trainer, trainer) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_one_billion_words(precision, model):
    trainer = SimpleNamespace(
        config=SimpleNamespace(precision=precision),
        device=torch.device("cuda"),
        distributed=None,
        graphs=True,
        loss=SummedLoss(model, 0),
        optimizer=torch.optim.SGD(model.parameters(), 1.0, fused=True),
        parts=[range(0, B // 2), range(B // 2, B)],
        hidden=[model.initial_hidden(B // 2) for _ in range(2)],
        nll=torch.zeros((), dtype=torch.float64),
        loss_scale=torch.ones(()),
    )
    assert audited(LM1BTrainer, trainer) == []
