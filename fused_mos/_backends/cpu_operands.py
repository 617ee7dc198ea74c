"""Shared parts of the calls to the native CPU kernels: addresses, common operands, and buffers for gradients."""

import torch
from torch import Tensor

# import it after torch, so that both use the OpenMP runtime that torch loaded
from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from .reference import accumulation_dtype
from .transform import Transform

WORKSPACE_BYTES = 40 * 2**20
"""Bytes of workspace for the exponentials of all rows over a span of the vocabulary. Rows packed for the products get
half as much besides."""

PANEL = 128  # kPanel of csrc/cpu/product.h
BLOCK = 96  # a multiple of each kBlock of csrc/cpu/product.h: the kernels pad rows to whole blocks


def padded_classes(n_classes: int) -> int:
    return (n_classes + PANEL - 1) // PANEL * PANEL


def equal_blocks(n: int, most: int) -> int:
    """The block size that cuts n into the fewest blocks of at most `most`, all of about one size; 0 if `most` is 0."""
    if most == 0:
        return 0
    blocks = (n + most - 1) // most
    return (n + blocks - 1) // blocks


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def n_threads() -> int:
    """The number of threads of the kernels: torch's, or 1 if they were built without OpenMP."""
    return torch.get_num_threads() if _cpu.threaded else 1


def head_of(weight: Tensor, bias: Tensor | None, transform: Transform) -> tuple[_cpu.Head, Tensor | None]:
    """The operands that all kernels share, and the float32 bias, which must outlive them."""
    bias = None if bias is None else bias.float().contiguous()
    head = _cpu.Head(
        weight=address(weight),
        bias=address(bias),
        n_classes=weight.shape[0],
        n_features=weight.shape[1],
        bf16=weight.dtype == torch.bfloat16,
        n_threads=n_threads(),
        softcap=transform.softcap,
        inverse_temperature=1 / transform.temperature,
        workspace_bytes=WORKSPACE_BYTES,
    )
    return head, bias


def empty_statistics(like: Tensor, *shape: int, count: int = 3) -> list[Tensor]:
    return [like.new_empty(shape, dtype=accumulation_dtype(like.dtype)) for _ in range(count)]


class Gradients:
    """Gradients of (rows, weight, bias) for the kernels to fill. Those that are not needed are empty."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]):
        self.dtype = weight.dtype
        self.rows = torch.zeros_like(rows) if needs[0] else rows.new_empty(0)
        # the kernels write every element if there are rows
        new = torch.empty_like if rows.shape[0] else torch.zeros_like
        self.weight = new(weight) if needs[1] else weight.new_empty(0)
        self.bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=torch.float32)

    def addresses(self) -> _cpu.Gradients:
        return _cpu.Gradients(rows=address(self.rows), weight=address(self.weight), bias=address(self.bias))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weight, self.bias.to(self.dtype)
