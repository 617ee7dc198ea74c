"""`replace_head`, which replaces a model's lm_head by a mixture in place."""

import contextlib
import copy
import gc
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .._inputs import check_backend
from .._plain import addition
from . import after_head
from .classes import causal_lm_of, classes_of
from .head import HeadOptions, LMHead, upcycle
from .model import ModelWithMoS, name_default_loss


def replace_head(
    model: PreTrainedModel, n_experts: int, *, rank: int | None = None, noise: float = 0.0, backend: str = "auto"
) -> PreTrainedModel:
    """Replace the lm_head of a causal language model by a mixture of softmaxes, in place, and return the model.

    The log-probabilities do not change at first: every expert equals the original softmax. The decoder keeps lm_head's
    Parameters, tied to the embedding or not; `lm_head.latent` and `lm_head.prior` are new. Make optimizers afterwards.

    In training, `model(..., labels=...)` then computes the loss without logits, and the output's logits are None. In
    evaluation, or with `skip_logits=False`, it returns both. `model.label_smoothing` smooths the labels in training.

    Args:
        model: a model of a class that AutoModelForCausalLM makes, with an nn.Linear as output embeddings.
        n_experts: K, the number of softmaxes.
        rank: rank of each expert's change to the hidden state; None for full rank.
        noise: initial length of that change, relative to the hidden state. 0 does not change the loss.
        backend: one of `fused_mos.backends()`, or "auto".

    Raises:
        TypeError, ValueError: the head cannot be replaced, for the reason in the message. The model is then unchanged.
    """
    linear = _check(model)
    options = HeadOptions(n_experts, rank)
    check_backend(backend)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    if rank is not None and rank > linear.in_features:
        raise ValueError(f"rank must be at most the hidden size {linear.in_features}, got {rank}")
    base_config: Any = type(model.config)
    classes = classes_of(base_config)
    if getattr(model, classes.model.lm_head_name, None) is not linear:
        raise ValueError(f"the output embeddings of {type(model).__name__} must be an attribute of the model itself")
    with _evaluating(model):
        after = after_head.find(model, linear)
        input_rms = after_head.input_rms(model, linear)
    if linear.bias is not None and after.scale != 1:
        raise ValueError("lm_head has a bias, and the model scales its logits; a mixture's head cannot take that over")
    options.scale, options.softcap = after.scale, after.softcap
    head = upcycle(linear, options, noise, input_rms, backend)
    head.train(model.training)

    name = classes.model.lm_head_name
    before = _State(type(model), model.config, linear, model.all_tied_weights_keys)
    config = copy.deepcopy(model.config)
    config.__class__ = classes.config
    config.mos = options.to_dict()
    attributes = {"loss_type": getattr(model, "loss_type", None)}
    try:
        _put(model, name, _State(classes.model, config, head, {}))
        name_default_loss(model)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        attributes |= after.neutralise(model)
        _compare_losses(model, head)
    except BaseException:
        _put(model, name, before)
        for attribute, value in attributes.items():
            setattr(model, attribute, value)
        raise
    return model


class _State(NamedTuple):
    """The parts of a model that the replacement changes."""

    kind: type
    config: PreTrainedConfig
    head: nn.Module
    tied: dict[str, str]


def _put(model: PreTrainedModel, name: str, state: _State) -> None:
    """Set the model to this state, with the head as its attribute `name`."""
    for module in [module for module in model.modules() if getattr(module, "config", None) is model.config]:
        module.config = state.config  # type: ignore[assignment]
    model.__class__ = state.kind
    setattr(model, name, state.head)
    model.all_tied_weights_keys = state.tied


# --------------------------------------------------------------------------------------------------------------- checks


def _check(model: PreTrainedModel) -> nn.Linear:
    """Return the model's lm_head. Raises TypeError or ValueError if it cannot be replaced."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}; replace the head before "
            "peft, DDP, FSDP or torch.compile wrap the model"
        )
    name = type(model).__name__
    if isinstance(model, ModelWithMoS):
        raise ValueError(f"the head of this {name} is a mixture already")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"this {name} is quantized; replace the head of the model as it was before")
    linear = model.get_output_embeddings()
    if linear is None:
        raise ValueError(f"{name} has no lm_head; load the model by AutoModelForCausalLM")
    if type(linear) is not nn.Linear:
        raise TypeError(f"the lm_head of {name} must be an nn.Linear, got {type(linear).__name__}")
    if causal_lm_of(type(model.config)) is not type(model):
        raise ValueError(
            f"model must be of the class that AutoModelForCausalLM makes of a {type(model.config).__name__}, "
            f"{causal_lm_of(type(model.config)).__name__}, got {name}"
        )
    if linear.weight.device.type == "meta":
        raise ValueError(
            f"the lm_head of this {name} is not in memory: it is offloaded, or its weights were never loaded"
        )
    if hasattr(linear, "_hf_hook"):
        raise ValueError(
            f"a device_map spreads this {name} over devices; replace the head of a model that was loaded without one, "
            "save it, and load that with the device_map"
        )
    if more := addition(linear, nn.Linear):
        raise ValueError(f"the lm_head of {name} must be a plain nn.Linear, but it {more}; remove that first")
    if (loss := _loss_function(model)) is not ForCausalLMLoss:
        loss = getattr(loss, "__name__", loss)
        raise ValueError(f"the loss of {name} must be transformers' ForCausalLMLoss, got {loss}")
    if _has_optimizer(model):
        raise ValueError(
            f"an optimizer has parameters of this {name} already and would never train the mixture's; replace the head "
            "first, and make the optimizer afterwards"
        )
    return linear


def _loss_function(model: PreTrainedModel) -> Any:
    """Return the model's loss, without transformers' warning if its class names none."""
    loss_type = getattr(model, "loss_type", None)
    name_default_loss(model)
    found = model.loss_function
    model.loss_type = loss_type  # type: ignore[assignment]
    return found


def _has_optimizer(model: nn.Module) -> bool:
    gc.collect()  # drop optimizers that only reference cycles keep alive
    ours = {id(parameter) for parameter in model.parameters()}
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return any(id(parameter) in ours for group in groups for parameter in group["params"])


def _compare_losses(model: PreTrainedModel, head: LMHead) -> None:
    """Raise ValueError unless the fused loss equals the loss of the logits."""
    tokens, name = after_head.tokens(model), type(model).__name__
    with _evaluating(model):
        if not after_head.leaves_logits_alone(model, head):
            raise ValueError(
                f"{name} changes its logits after lm_head, although its configuration says that it does not"
            )
        unfused = model(tokens, labels=tokens, use_cache=False).loss
        fused: Tensor | None = None
        with contextlib.suppress(Exception):  # models with a loss of their own take this one for logits, and may fail
            fused = model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss
    if fused is None or fused.dim() or not torch.allclose(fused.float(), unfused.float(), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{name} computes its loss of logits in a way that a mixture's head does not know: by the head it is "
            f"{fused}, of the logits {unfused}"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients inside the `with` block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
