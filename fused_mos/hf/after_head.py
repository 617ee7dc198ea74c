"""Moves what a model does to its logits after lm_head, such as Gemma 2's soft cap and Cohere's scale, into the head. A
probe finds it, and the model's own is disabled."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping",)
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names of scales in configurations and models. The probe tells whether a scale multiplies or divides."""


@dataclasses.dataclass(frozen=True)
class AfterHead:
    """logits -> cap·tanh(scale·logits / cap), and the model's names for scale and cap."""

    scale: float = 1.0
    softcap: float | None = None
    names: tuple[str, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def neutralise(self, model: PreTrainedModel) -> dict[str, Any]:
        """Make the model leave logits unchanged, and return the model's previous attributes. The model's configuration
        is changed and must be a copy."""
        before = {}
        for name in self.names:
            neutral = None if name in SOFTCAPS else 1.0
            if hasattr(model.config, name):
                setattr(model.config, name, neutral)
            if hasattr(model, name):
                before[name] = getattr(model, name)
                setattr(model, name, neutral)
        return before


NOTHING = AfterHead()


def find(model: PreTrainedModel, head: nn.Module) -> AfterHead:
    """Find what the model does after `head`. Raises ValueError if it is more than a scale and a soft cap."""
    given, seen = probe(model, head)
    for candidate in _candidates(model):
        if _close(candidate(given), seen):
            return candidate
    raise ValueError(
        f"{type(model).__name__} changes its logits after lm_head, and not by a scale or a soft cap of its "
        "configuration; a mixture's head cannot take that over"
    )


def leaves_logits_alone(model: PreTrainedModel, head: nn.Module) -> bool:
    return _close(*probe(model, head))


@torch.no_grad()
def probe(model: PreTrainedModel, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Large logits put in place of the output of `head`, and the model's output for them. They must be large: a cap of
    30 hardly changes the logits of an untrained model."""
    given = []

    def replace(_, __, logits: Tensor) -> Tensor:
        given.append(torch.linspace(-50, 50, logits.numel(), device=logits.device).view(logits.shape).to(logits.dtype))
        return given[-1]

    hook = head.register_forward_hook(replace)
    try:
        seen = model(tokens(model), use_cache=False).logits
    finally:
        hook.remove()
    return given[-1].double(), seen.double()


@torch.no_grad()
def input_rms(model: PreTrainedModel, head: nn.Module) -> float:
    """The root mean square of the hidden states that `head` receives."""
    squares = []
    hook = head.register_forward_pre_hook(lambda _, inputs: squares.append(inputs[0].double().square().mean()))
    try:
        model(tokens(model), use_cache=False)
    finally:
        hook.remove()
    return squares[-1].sqrt().item() or 1.0


def tokens(model: PreTrainedModel) -> Tensor:
    """Some tokens (2, 8) for a forward pass."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return (torch.arange(16, device=weight.device) * 7 + 1).view(2, 8) % len(weight)


def _candidates(model: PreTrainedModel) -> Iterator[AfterHead]:
    yield NOTHING
    configuration = model.config.get_text_config()
    numbers = {name: getattr(configuration, name, None) for name in (*SOFTCAPS, *SCALES)}
    there = {name: float(number) for name, number in numbers.items() if isinstance(number, int | float) and number}
    caps = [name for name in there if name in SOFTCAPS]
    for scaled in (None, *(name for name in there if name in SCALES)):
        for scale in (1.0,) if scaled is None else (there[scaled], 1 / there[scaled]):
            for cap in (None, *caps):
                names = tuple(name for name in (scaled, cap) if name is not None)
                yield AfterHead(scale, None if cap is None else there[cap], names)


def _close(expected: Tensor, seen: Tensor) -> bool:
    """True if they agree up to rounding to bfloat16, in which a model may compute."""
    return expected.shape == seen.shape and bool(((expected - seen).abs() <= 0.02 * expected.abs() + 1e-3).all())
