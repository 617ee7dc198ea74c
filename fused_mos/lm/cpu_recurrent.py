"""One LSTM layer over a whole sequence on a CPU (csrc/cpu/lstm.cpp), with float32 or bfloat16 products.

Products that do not depend on the previous step (those of the inputs, and the gradients of weights and inputs) are
computed over all steps at once, by torch or, where it is faster, by csrc/cpu/matrix_product.cpp. Sums and cell states
are float32.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._backends.tracing import has_memory

_cpu: Any  # compiled, without stubs
try:
    from .. import _cpu  # type: ignore[attr-defined, no-redef]
except ImportError:  # the package was built without a C++ compiler
    _cpu = None

MIN_STEPS = 8
"""Fewest steps: for fewer, packing the weights costs more than it gains."""

MAX_BATCH = 32
"""Most rows: for more, torch.lstm's products of all rows at once are faster."""

MIN_WIDTH = 64

NATIVE_PRODUCTS = ("avx512_bf16",)
"""Instruction sets whose own products are faster than torch's: 0.9 to 1.5 times in float32, up to 1.8 in bfloat16."""


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pays(x: Tensor, width: int) -> bool:
    """True if the kernels are available and faster than torch.lstm for x (T, B, features)."""
    n_steps, batch_size, _ = x.shape
    return (
        _cpu is not None
        and x.device.type == "cpu"
        and n_steps >= MIN_STEPS
        and 1 <= batch_size <= MAX_BATCH
        and width >= MIN_WIDTH
    )


def lstm(
    x: Tensor,  # (T, B, features), float32 like all arguments
    hidden: tuple[Tensor, Tensor],  # h, c, (1, B, H) each
    weight_ih: Tensor,  # (4H, features)
    weight_hh: Tensor,  # (4H, H)
    bias_ih: Tensor,  # (4H,)
    bias_hh: Tensor,  # (4H,)
    products: torch.dtype | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The output (T, B, H) and the last h, c. With products=torch.bfloat16, operands of matrix products are rounded to
    bfloat16 if the processor multiplies it faster."""
    h0, c0 = (state.contiguous() for state in hidden)
    output, last_cell = _Lstm.apply(products == torch.bfloat16, x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    return output, (output[-1:].clone(), last_cell)


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bf16: bool, x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        n_steps, batch_size, _ = x.shape
        width = weight_hh.shape[1]
        gates = _product(x.flatten(0, 1), weight_ih.t(), bf16, bias_ih + bias_hh)
        weight = weight_hh.contiguous()
        cells, output = (x.new_empty(n_steps, batch_size, width) for _ in range(2))
        _cpu.lstm_forward(_arguments(bf16, weight, h0, c0, gates, cells, output=_address(output)))
        ctx.bf16 = bf16
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, gates, cells, output)
        return output, cells[-1:].clone()

    @staticmethod
    def backward(ctx, grad_output, grad_last_cell):
        *inputs, gates, cells, output = ctx.saved_tensors
        given = [gradient for gradient in (grad_output, grad_last_cell) if gradient is not None]
        # the gradients must be differentiable themselves, or are batched
        if torch.is_grad_enabled() or not all(has_memory(gradient) for gradient in given):
            return None, *_differentiable_gradients(inputs, ctx.needs_input_grad[1:], grad_output, grad_last_cell)
        x, h0, c0, weight_ih, weight_hh, _, _ = inputs
        _, wants_x, wants_h0, wants_c0, wants_ih, wants_hh, *wants_bias = ctx.needs_input_grad
        grad_output = None if grad_output is None else grad_output.contiguous()
        grad_gates = torch.empty_like(gates)
        grad_h0 = torch.empty_like(h0) if wants_h0 else None
        grad_c0 = (
            torch.zeros_like(c0)
            if grad_last_cell is None
            else grad_last_cell.clone(memory_format=torch.contiguous_format)
        )
        weight = weight_hh.contiguous()
        _cpu.lstm_backward(
            _arguments(
                ctx.bf16,
                weight,
                h0,
                c0,
                gates,
                cells,
                grad_output=_address(grad_output),
                grad_gates=_address(grad_gates),
                grad_h0=_address(grad_h0),
                grad_c0=_address(grad_c0),
            )
        )
        grad_x = grad_ih = grad_hh = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            if wants_x:
                grad_x = _product(grad_gates, weight_ih, ctx.bf16).view_as(x)
            if wants_ih:
                grad_ih = _product(grad_gates.t(), x.flatten(0, 1), ctx.bf16)
            if wants_hh:
                grad_hh = _product(grad_gates.t(), torch.cat([h0, output[:-1]]).flatten(0, 1), ctx.bf16)
        if any(wants_bias):
            grad_bias = grad_gates.sum(0)
        of_biases = grad_bias, grad_bias.clone() if all(wants_bias) else grad_bias  # the caller may write to each
        return None, grad_x, grad_h0, grad_c0 if wants_c0 else None, grad_ih, grad_hh, *of_biases


def _product(left: Tensor, right: Tensor, bf16: bool, bias: Tensor | None = None) -> Tensor:
    """left (M, depth) · right (depth, N) + bias (N,), float32."""
    if _cpu.instruction_set() not in NATIVE_PRODUCTS:
        with _products(bf16):
            return left @ right if bias is None else torch.addmm(bias, left, right)
    left, left_stride, left_steps = _operand(left)
    columns, right_stride, right_steps = _operand(right.t())
    out = left.new_empty(left.shape[0], columns.shape[0])
    _cpu.matrix_product(
        rows=left.shape[0],
        columns=columns.shape[0],
        depth=left.shape[1],
        bf16=bf16,
        n_threads=torch.get_num_threads(),
        left=_address(left),
        left_stride=left_stride,
        left_steps=left_steps,
        right=_address(columns),
        right_stride=right_stride,
        right_steps=right_steps,
        bias=_address(bias),
        out=_address(out),
    )
    return out


def _operand(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix (lanes, steps) with the stride of the dimension that is not contiguous, and whether that is the
    lanes."""
    if matrix.stride(0) == 1:
        return matrix, matrix.stride(1), False
    matrix = matrix.contiguous()
    return matrix, matrix.shape[1], True


def _arguments(bf16: bool, weight, h0, c0, gates, cells, **addresses: int):
    n_steps, batch_size, width = cells.shape
    return _cpu.Lstm(
        n_steps=n_steps,
        batch=batch_size,
        width=width,
        bf16=bf16,
        n_threads=torch.get_num_threads(),
        weight=_address(weight),
        h0=_address(h0),
        c0=_address(c0),
        gates=_address(gates),
        cells=_address(cells),
        **addresses,
    )


def _differentiable_gradients(inputs, needs, grad_output, grad_last_cell):
    """Gradients computed by torch.lstm, as part of the graph of this backward pass."""
    x, h0, c0, *weights = inputs
    with torch.enable_grad():
        output, _, last_cell = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, True, False, False)
        if grad_output is None and grad_last_cell is None:
            return [None] * len(needs)
        pairs = [(o, g) for o, g in ((output, grad_output), (last_cell, grad_last_cell)) if g is not None]
        wanted = [tensor for tensor, needed in zip(inputs, needs) if needed]
        outputs, gradients = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


# torch's setting is global to the process: the first thread that needs it sets it, the last restores it
_lock = threading.Lock()
_n_rounding, _precision = 0, ""


@contextlib.contextmanager
def _products(bf16: bool) -> Iterator[None]:
    """Let torch round the operands of float32 products to bfloat16, with float32 sums, if oneDNN is faster that way."""
    global _n_rounding, _precision
    if not bf16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set when it is imported
    with _lock:
        if _n_rounding == 0:
            _precision, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _n_rounding += 1
    try:
        yield
    finally:
        with _lock:
            _n_rounding -= 1
            if _n_rounding == 0:
                matmul.fp32_precision = _precision
