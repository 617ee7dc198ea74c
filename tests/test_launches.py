"""Counts the kernels that the Triton backend launches, which cost time if a GPU is faster than Python's launches."""

import os
import subprocess
import sys

import pytest
import torch
from backends import configurations, triton
from torch.utils._python_dispatch import TorchDispatchMode

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)

from fused_mos._backends.triton_kernels import launch, proof, shapes

NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")


class Launches(TorchDispatchMode):
    """Counts torch's operations that launch a kernel: all but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NO_KERNEL and not function.is_view and name != "_unsafe_view":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(operation) -> list[str]:
    """Names of the kernels that an operation launches on an H100."""
    with launch.overridden(configurations.ARCHITECTURES["sm_90"], record=True) as calls, Launches() as torch_calls:
        operation()
    return [call.kernel.__name__ for call in calls] + torch_calls.names


@pytest.mark.parametrize(
    ("names", "most"),
    [
        (("gradient, in the forward pass", "backward pass"), 9),  # and one of autograd, the loss's own gradient
        (("statistics", "gradient, recomputed"), 9),
        (("loss",), 3),
        (("normalisers", "log_prob"), 3),
        (("normalisers", "predict"), 4),
        (("sample",), 5),
    ],
    ids=["step of a mean", "step of none", "loss", "log_prob", "predict", "sample"],
)
def test_launches_at_the_shape_of_penn_treebank(names, most):
    operations = proof.operations(shapes.SHAPES["ptb"], torch.bfloat16, "meta")
    found = [name for operation in names for name in launches(operations[operation])]
    assert len(found) <= most, found


def test_what_torch_launches_is_counted():
    x = torch.empty(3, 4, device="meta")
    assert launches(lambda: (x.t().mul_(2), x.view(12)[:3].new_empty(2), x.sum())) == ["mul_", "sum"]


CENSUS = """
import collections
import torch
from fused_mos._backends.triton_kernels import configurations, launch, proof

NAMES = ("gradient, in the forward pass", "backward pass", "loss", "statistics", "gradient, recomputed")
variants = collections.defaultdict(set)
for length in range(1, 120):
    with launch.overridden(configurations.ARCHITECTURES["sm_90"], record=True) as calls:
        operations = proof.operations((12 * length, 15, 280, 10_000), torch.bfloat16, "meta")
        for name in NAMES:
            if name in operations:
                operations[name]()
    for call in calls:
        width = call.constants.get("WIDTH")  # of rows that are rounded, or that have a column beside them
        variants[call.kernel.__name__, call.key, call.constants.get("MEAN"), width].add(proof.variant(call))
for key, found in variants.items():
    print(len(found), *key)
"""


def test_lengths_of_text_compile_few_variants():
    """Random lengths of segments, as in training, in one block and in two."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", CENSUS], env=environment, capture_output=True, text=True, check=True)
    counts = [int(line.split()[0]) for line in result.stdout.splitlines()]
    assert len(counts) > 10 and max(counts) <= 2, result.stdout
