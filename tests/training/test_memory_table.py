"""The memory that `train_1b` estimates for its head, compared with what a step takes. (For whole runs:
test_train_1b.py.)"""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_mos.lm import AWDLSTM
from fused_mos.training.lm1b import RECIPES, memory


class LiveMemory(TorchDispatchMode):
    """Peak bytes of the tensors that operations have allocated."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return results


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"latent_norm": True}, {"rank": 64}, {"latent_norm": True, "rank": 64}, {"latent": "residual"}],
    ids=str,
)
def test_the_memory_table_has_room_for_the_vectors(options, precision):
    """Compares with a head's step. `train_1b` refuses runs by this estimate, so it must not be much higher, either."""
    recipe = RECIPES["lm1b-tiny"]()
    model = dataclasses.replace(recipe.model, n_experts=7, hidden_sizes=(16, 96), **options)
    config = dataclasses.replace(recipe, model=model, precision=precision, batch_size=200)
    head = AWDLSTM(5, **dataclasses.asdict(model)).head
    features, target = torch.randn(20, 200, 96, requires_grad=True), torch.randint(0, 5, (20, 200))
    with LiveMemory([features, target, *head.parameters()]) as memory_of_step:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            loss = head(features, target).loss
        loss.backward()
    assert 0.35 < memory_of_step.peak / memory.table(config, 5, 1, "cpu")["head activations"] < 1
