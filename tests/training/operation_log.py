"""A stand-in for CUDA graphs without a GPU: a log of operations that is replayed on the same tensors.

As with a graph, no Python code runs again. So mistakes show in the results: a step that uses a host value, a tensor
that is replaced, or a new hidden state that is not written where the next step reads it.
"""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations that would make the host wait for a GPU."""


class OperationLog(TorchDispatchMode):
    """Logs operations. `undo` restores the tensors that existed before; `replay` repeats the operations."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # tensors that were there before, and what they held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not READS & set(function.tags), f"{function} would make the host wait"
        self.before += [(tensor, tensor.clone()) for tensor in _written(function, args, kwargs)]
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, held in reversed(self.before):
            tensor.copy_(held)
        self.before.clear()

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)


def _written(function, args, kwargs) -> list[Tensor]:
    """The tensors that an operation writes to."""
    schema = function._schema.arguments
    named = [*zip(schema, args), *((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs)]
    values = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


class LogRecorder:
    """A `graphs.Recorder` of operation logs."""

    def __init__(self):
        self.n_run = self.n_recorded = self.n_replayed = 0

    def run(self, function):
        self.n_run += 1
        function()

    def record(self, function):
        self.n_recorded += 1
        random = torch.get_rng_state()
        with OperationLog() as log:
            function()
        with torch.no_grad():
            log.undo()
        torch.set_rng_state(random)

        def replay():
            self.n_replayed += 1
            log.replay()

        return replay
