"""What the calls of the native kernels share: addresses, the operands that all take, and where their results go."""

import torch
from torch import Tensor

# after torch, so that both use the OpenMP runtime that torch loaded
from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from .reference import accumulation_dtype
from .transform import Transform

WORKSPACE_BYTES = 40 * 2**20
"""Bytes of exponentials of all rows for a span of the vocabulary; and half as much for rows in the layout of the
products."""

PANEL = 128  # kPanel of csrc/cpu/product.h
BLOCK = 96  # a multiple of each kBlock of csrc/cpu/product.h: rows come in blocks, of which the last is filled up


def padded_classes(n_classes: int) -> int:
    return (n_classes + PANEL - 1) // PANEL * PANEL


def rows_of_block(rows: int) -> int:
    """At most `rows`, of which the kernels' last block is not filled up where there are several."""
    return rows - rows % BLOCK if rows > BLOCK else rows


def equal_blocks(n: int, most: int) -> int:
    """The size of as few blocks of n as hold `most` at most, all of about one size; 0 where they can hold none."""
    if most == 0:
        return 0
    blocks = (n + most - 1) // most
    return (n + blocks - 1) // blocks


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def n_threads() -> int:
    """The threads that kernels share their work among: torch's, or 1 where they were built without OpenMP."""
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
    """Gradients of (rows, weight, bias) for the kernels to fill; of no elements where not needed."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]):
        self.dtype = weight.dtype
        self.rows = torch.zeros_like(rows) if needs[0] else rows.new_empty(0)
        # the kernels write all of it, if there are rows
        new = torch.empty_like if rows.shape[0] else torch.zeros_like
        self.weight = new(weight) if needs[1] else weight.new_empty(0)
        self.bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=torch.float32)

    def addresses(self) -> _cpu.Gradients:
        return _cpu.Gradients(rows=address(self.rows), weight=address(self.weight), bias=address(self.bias))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weight, self.bias.to(self.dtype)
