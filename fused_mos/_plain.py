"""Detects modules that are more than a plain nn.Linear or nn.Embedding: adapters, quantized layers, hooks.

The heads and `vocab_parallel` read a module's weight without calling the module. They would silently skip whatever an
adapter or a hook adds to its forward.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def addition(module: nn.Module, kind: type[nn.Module]) -> str:
    """Describe what makes `module` more than a plain `kind`, as a phrase to follow "it", or return "" if nothing does.
    A parametrization does not count: torch applies it when the weight is read."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        return f"is a {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for hook in hooks.values():
            return f"has the hook {getattr(hook, '__qualname__', type(hook).__name__)}"
    return ""


def read_decoder(decoder: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a head's decoder. Call it once per forward pass: a parametrization recomputes them at each
    access. Raises TypeError unless the decoder is a plain nn.Linear with plain tensors."""
    more = addition(decoder, nn.Linear)
    if not more:
        weight, bias = decoder.weight, decoder.bias
        if torch.compiler.is_compiling() or not is_traceable_wrapper_subclass(weight):
            return weight, bias
        more = f"has a weight that is a {type(weight.data).__name__}"
    raise TypeError(
        f"decoder must be a plain nn.Linear, since a head reads its weight without calling it, but it {more}; merge "
        "an adapter (merge_and_unload) or train the decoder itself (modules_to_save), make pruning and the old weight "
        "norm permanent (prune.remove, remove_weight_norm), remove other hooks, quantize only other modules, and "
        "apply fully_shard to the whole head (methods other than forward need register_fsdp_forward_method)"
    )
