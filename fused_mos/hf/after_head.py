"""What a model does to its logits after lm_head, such as Gemma 2's soft cap and Cohere's scale: found by a probe, taken
into the head, and made to do nothing in the model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping",)
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names that configurations and models have for them. Whether a scale multiplies or divides, the probe tells."""


@dataclasses.dataclass(frozen=True)
class AfterHead:
    """logits -> cap·tanh(scale·logits / cap), and the names by which the model knows the two."""

    scale: float = 1.0
    softcap: float | None = None
    names: tuple[str, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def neutralise(self, model: PreTrainedModel) -> dict[str, Any]:
        """Makes the model leave logits alone; returns the attributes of the model that it had before. The configuration
        has to be a copy."""
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
    """What the model does after `head`. Raises ValueError where that is something else."""
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
    """Logits put in the place of what `head` returns, and what the model makes of them. They are large, since a cap of
    30 leaves the logits of a model that was just made as they are."""
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
    """The root mean square of the hidden states that `head` gets."""
    squares = []
    hook = head.register_forward_pre_hook(lambda _, inputs: squares.append(inputs[0].double().square().mean()))
    try:
        model(tokens(model), use_cache=False)
    finally:
        hook.remove()
    return squares[-1].sqrt().item() or 1.0


def tokens(model: PreTrainedModel) -> Tensor:
    """Some, for a forward pass: (2, 8)."""
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
    """Within the rounding of bfloat16, in which a model may compute."""
    return expected.shape == seen.shape and bool(((expected - seen).abs() <= 0.02 * expected.abs() + 1e-3).all())
