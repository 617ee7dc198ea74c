"""What is more than a plain nn.Linear or nn.Embedding: adapters, quantized layers, hooks.

The heads and `vocab_parallel` read a module's weight and never call the module, so they would leave out, without a
word, whatever such a thing adds to its forward.
"""

from torch import nn


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
