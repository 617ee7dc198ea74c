"""Matrix products of 16-bit operands accumulated in float32, and spans to split large products into."""

from collections.abc import Iterator

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a·b or, with `accumulate`, out += a·b; `out` has the operands' dtype, or float32."""
    if a.dtype != out.dtype and a.device.type == "cpu":  # torch has no 16-bit product with a float32 result on CPUs
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def spans(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up. triton.cdiv, which kernels can also call, takes the host ten times as long."""
    return -(-n // size)
