"""What is more than a plain nn.Linear or nn.Embedding: adapters, quantized layers, hooks.

The heads and `vocab_parallel` read a module's weight and never call the module, so they would leave out, without a
word, whatever such a thing adds to its forward.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def addition(module: nn.Module, kind: type[nn.Module]) -> str:
    """What `module` is or has beyond a `kind`, in words that follow "it"; "" for a plain one. A parametrization is no
    addition: torch applies it where the weight is read."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        return f"is a {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for hook in hooks.values():
            return f"has the hook {getattr(hook, '__qualname__', type(hook).__name__)}"
    return ""


def read_decoder(decoder: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a head's decoder; once in a forward pass, since a parametrization computes them at each
    access. Raises TypeError unless the decoder is a plain nn.Linear of plain tensors."""
    more = addition(decoder, nn.Linear)
    if not more:
        weight, bias = decoder.weight, decoder.bias
        if torch.compiler.is_compiling() or not is_traceable_wrapper_subclass(weight):
            return weight, bias
        more = f"has a weight that is a {type(weight.data).__name__}"
    raise TypeError(
        f"decoder must be a plain nn.Linear, whose weight a head reads without calling it, but it {more}; merge an "
        "adapter (merge_and_unload) or train the decoder itself (modules_to_save), make pruning and the old weight "
        "norm permanent (prune.remove, remove_weight_norm), remove other hooks, quantize other modules alone, and "
        "give fully_shard the head, whose forward alone then works (register_fsdp_forward_method names other methods)"
    )
