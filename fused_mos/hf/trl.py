"""Computes TRL's fused head with the mixture.

TRL's trainers replace a model's forward by one that multiplies hidden states with the weight of the output embeddings.
This would silently train and score a single softmax. So a model with a mixture intercepts TRL's call and answers it
with its head.
"""

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .head import LMHead

IGNORED = -100


def is_fused_head(forward: Any) -> bool:
    """True if `forward` is the one that TRL's add_fused_lm_head sets."""
    function = getattr(forward, "__func__", None)
    if function is None:
        return False
    return "fused_lm_head" in inspect.signature(function, follow_wrapped=False).parameters


def by_the_mixture(forward: MethodType) -> MethodType:
    """Wrap TRL's forward: with `fused_lm_head`, the head's own methods compute TRL's output.

    At a temperature other than 1, the entropy and `is_top1` need the log-probabilities (tokens, V), which are formed.
    """
    of_trl = inspect.getclosurevars(forward.__func__)
    temperature, wanted = of_trl.nonlocals["temperature"], of_trl.nonlocals.get("outputs", ("log_probs", "entropy"))
    output_type = of_trl.globals["FusedCausalLMOutput"]

    @functools.wraps(forward.__func__)
    def fused(self, *arguments, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **named):
        of_loss = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return forward(*arguments, **of_loss, **named)
        if named.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            raise NotImplementedError(
                "TRL's fused head with the auxiliary loss of a mixture of experts is not supported by a mixture of "
                "softmaxes; set output_router_logits=False"
            )
        hidden = self.base_model(*arguments, **named | {"use_cache": False}).last_hidden_state
        if shift_labels is None:
            hidden, target = hidden[:, :-1], labels[:, 1:]
        else:
            target = shift_labels
        target, mask = target.to(hidden.device).contiguous(), (target != IGNORED).to(hidden.device)
        values = _values(self.heads()[-1], hidden, target, mask, temperature, wanted)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return output_type(loss=-values["log_probs"].sum() / count, label_mask=mask, **values)

    return MethodType(fused, forward.__self__)


def _values(
    head: LMHead, hidden: Tensor, target: Tensor, mask: Tensor, temperature: float, wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """TRL's output fields (B, T), 0 where the target is ignored."""
    dense = {"log_sum_sq_probs", "mean_logits"} | ({"entropy", "is_top1"} if temperature != 1 else set())
    if dense.isdisjoint(wanted):
        if not {"entropy", "is_top1"} & set(wanted):
            log_prob = head.log_prob_at(hidden, target, ignore_index=IGNORED, mixture_temperature=temperature)
            return {"log_probs": log_prob}
        score = head.score(hidden, target, ignore_index=IGNORED)
        values = {"log_probs": score.log_prob, "entropy": score.entropy, "is_top1": score.is_top1}
    else:
        logits = head.logits(hidden) / temperature
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        values = {
            "log_probs": chosen,
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "is_top1": log_p.argmax(-1) == target,
            "log_sum_sq_probs": torch.logsumexp(2 * log_p.detach(), -1),
            "mean_logits": logits.detach().mean(-1),
        }
        values = {name: value.masked_fill(~mask, 0) for name, value in values.items()}
    return {name: value for name, value in values.items() if name in ("log_probs", *wanted)}
