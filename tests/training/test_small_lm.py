"""The steps of the small models: replayed steps equal ordinary ones."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from backends import ON_GPU
from operation_log import LogRecorder
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not installed

from experiments.small_lm import (
    BATCH,
    LanguageModel,
    ReplayedSteps,
    Shape,
    Steps,
    learning_rates,
    make_optimizer,
    places_of,
)
from fused_mos.training.graphs import CudaRecorder

N_STEPS = 7


class NoRecorder:
    """Repeats by calling again."""

    def run(self, function):
        function()

    def record(self, function):
        return function


@pytest.fixture
def text():
    return torch.randint(0, 50, (500,))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("fused_mos._inputs.values_can_be_read", lambda *_: False)
    monkeypatch.setattr(
        "fused_mos._backends.from_rows.scaled", lambda gradients, factor, *_: [g * factor for g in gradients]
    )


def shape(body, head):
    return Shape(body, head, n_classes=50, d=16, width=24, n_layers=2, n_experts=3)


def trained(model, text, recorder=None, first=N_STEPS, device="cpu"):
    """The losses after `first` and after all steps, and the parameters."""
    model = copy.deepcopy(model).to(device)
    optimizer = make_optimizer(list(model.parameters()), 0.01, replayed=recorder is not None)
    places = places_of(text, N_STEPS, torch.Generator().manual_seed(1))
    arguments = model, optimizer, text.to(device), places, learning_rates(0.01, N_STEPS)
    torch.manual_seed(2)
    steps = Steps(*arguments) if recorder is None else ReplayedSteps(*arguments, recorder)
    steps.run(first, "")
    loss = steps.loss.item()
    steps.run(N_STEPS - first, "")
    steps.check("")
    return [loss, steps.loss.item()], [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("body", ["lstm", "transformer"])
@pytest.mark.parametrize("head", ["softmax", "moc", "mos"])
def test_replayed_steps_have_the_bits_of_steps(body, head, text, as_on_a_gpu):
    """Windows, learning rates, dropout and the optimizer's state are the same; the warm-up leaves no trace."""
    model, recorder = LanguageModel(shape(body, head)), LogRecorder()
    losses, parameters = trained(model, text, recorder, first=3)
    assert (recorder.n_run, recorder.n_recorded, recorder.n_replayed) == (3, 1, N_STEPS)
    expected_losses, expected = trained(model, text, NoRecorder(), first=3)
    assert losses == expected_losses
    assert all(torch.equal(one, other) for one, other in zip(parameters, expected))
    ordinary_losses, ordinary = trained(model, text, first=3)  # an AdamW of another kernel
    assert losses == pytest.approx(ordinary_losses, rel=1e-5)
    # Of a key's bias the gradient is 0 but for rounding, which Adam magnifies: all parameters are compared at once.
    start = parameters_to_vector(model.parameters())
    one, other = (parameters_to_vector(moved) - start for moved in (parameters, ordinary))
    assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("body", ["lstm", "transformer"])
@pytest.mark.parametrize("head", ["softmax", "moc", "mos"])
def test_graphs_replay_steps(body, head, text):
    torch.use_deterministic_algorithms(False)
    model, cuda = LanguageModel(shape(body, head)), torch.device("cuda")
    losses, parameters = trained(model, text, CudaRecorder(cuda), device=cuda)
    expected_losses, expected = trained(model, text, NoRecorder(), device=cuda)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    for one, other in zip(parameters, expected):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_windows_drawn_at_once_are_those_drawn_one_by_one(text):
    one_by_one = torch.Generator().manual_seed(3)
    drawn = [torch.randint(0, text.numel() - 64, (BATCH, 1), generator=one_by_one) for _ in range(N_STEPS)]
    assert torch.equal(places_of(text, N_STEPS, torch.Generator().manual_seed(3)), torch.stack(drawn))


def test_a_loss_that_is_not_finite_ends_the_run(text):
    model = LanguageModel(shape("transformer", "softmax"))
    steps = Steps(
        model, make_optimizer(list(model.parameters()), 1.0), text, places_of(text, 1, torch.Generator()), [1]
    )
    steps.loss.fill_(torch.nan)
    with pytest.raises(SystemExit, match="the loss of it became nan; train with smaller learning rates"):
        steps.check("it")
