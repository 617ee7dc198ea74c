"""One LSTM layer over a whole sequence on a GPU, with bfloat16 products (csrc/cuda/lstm.cuh).

A launch keeps the recurrent weights on the chip for all steps. Products that do not depend on the previous step (those
of the inputs, and the gradients of weights and inputs) are computed over all steps at once, by cuBLAS. Sums and cell
states are float32.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backends.launching import NativeKernels, limits, on, too_new
from .._backends.products import product

_cuda: ModuleType | None
try:
    from .. import _cuda  # type: ignore[attr-defined, no-redef]  # compiled, without stubs
except ImportError:  # the package was built without nvcc
    _cuda = None


class RecurrentKernel(NativeKernels):
    """The LSTM kernels."""

    def plan(self, x: Tensor, weight_hh: Tensor) -> Any:
        """The launch plan for input x (T, B, features) and weights (4H, H). None if the kernels do not support them:
        for more than 16 columns, an odd width, or weights that do not fit on the chip."""
        n_steps, batch_size, _ = x.shape
        try:
            return self.native.Lstm(n_steps, batch_size, weight_hh.shape[1], *self.limits(x.device))
        except ValueError:
            return None

    def __call__(
        self,
        plan: Any,  # for x and weight_hh
        x: Tensor,  # (T, B, features), float32 like all arguments
        hidden: tuple[Tensor, Tensor],  # h, c, (1, B, H) each
        weight_ih: Tensor,  # (4H, features)
        weight_hh: Tensor,  # (4H, H)
        bias_ih: Tensor,  # (4H,)
        bias_hh: Tensor,  # (4H,)
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output (T, B, H) and the last h, c."""
        output, last_cell = _Lstm.apply(self, plan, x, *hidden, weight_ih, weight_hh, bias_ih, bias_hh)
        return output, (output[-1:], last_cell)

    def launch(self, function: Callable[..., None], *tensors: Tensor | None) -> None:
        device = next(tensor.device for tensor in tensors if tensor is not None)
        with self.on(device) as stream:
            function(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), stream)


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: RecurrentKernel, plan, x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        n_steps, n_rows, _ = x.shape
        width = weight_hh.shape[1]
        x16, weight_ih16 = _bfloat16_rows(x.flatten(0, 1)), _bfloat16_rows(weight_ih)
        h0, c0, weight_hh16 = h0.contiguous(), c0.contiguous(), _bfloat16_rows(weight_hh)
        gates = product(x16, weight_ih16.t(), x.new_empty(n_steps * n_rows, 4 * width))
        states = x.new_empty(n_steps, n_rows, plan.padded_width, dtype=torch.bfloat16)
        cells, output = (x.new_empty(n_steps, n_rows, width) for _ in range(2))
        last_cell = torch.empty_like(c0)
        biases = bias_ih.contiguous(), bias_hh.contiguous()
        kernel.launch(plan.forward, weight_hh16, *biases, h0, c0, gates, states, cells, output, last_cell)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.plan, ctx.n_features = kernel, plan, x.shape[2]
        ctx.save_for_backward(x16, weight_ih16, weight_hh16, c0, gates, states, cells)
        return output, last_cell

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_last_cell):
        x16, weight_ih16, weight_hh16, c0, gates, states, cells = ctx.saved_tensors
        n_steps, n_rows, width = cells.shape
        _, _, wants_x, wants_h0, _, wants_ih, wants_hh, *wants_bias = ctx.needs_input_grad
        grad_gates = torch.empty(n_steps * n_rows, 4 * width, dtype=torch.bfloat16, device=c0.device)
        grad_h0, grad_c0 = torch.empty_like(c0) if wants_h0 else None, torch.empty_like(c0)
        given = [None if grad is None else grad.contiguous() for grad in (grad_output, grad_last_cell)]
        transposed = weight_hh16[:, :width].t().contiguous()
        tensors = (transposed, gates, cells, c0, *given, grad_gates, grad_h0, grad_c0)
        ctx.kernel.launch(ctx.plan.backward, *tensors)
        grad_x = grad_ih = grad_hh = grad_bias = None
        if wants_x:
            grad_x = product(grad_gates, weight_ih16, c0.new_empty(n_steps * n_rows, weight_ih16.shape[1]))
            grad_x = grad_x[:, : ctx.n_features].unflatten(0, (n_steps, n_rows))
        if wants_ih:
            grad_ih = product(grad_gates.t(), x16, c0.new_empty(4 * width, x16.shape[1]))[:, : ctx.n_features]
        if wants_hh:
            grad_hh = product(grad_gates.t(), states.flatten(0, 1)[:, :width], c0.new_empty(4 * width, width))
        if any(wants_bias):
            grad_bias = grad_gates.sum(0, dtype=torch.float32)
        return None, None, grad_x, grad_h0, grad_c0, grad_ih, grad_hh, grad_bias, grad_bias


def _bfloat16_rows(matrix: Tensor) -> Tensor:
    """The matrix in bfloat16, padded with columns of zeros to a multiple of 8: cuBLAS is three times as fast if rows
    start at multiples of 16 bytes."""
    padding = -matrix.shape[1] % 8
    if not padding:
        return matrix.to(torch.bfloat16)
    rows = torch.zeros(matrix.shape[0], matrix.shape[1] + padding, dtype=torch.bfloat16, device=matrix.device)
    rows[:, : matrix.shape[1]] = matrix
    return rows


@cache
def kernel_for(device: torch.device) -> RecurrentKernel | None:
    """The kernels for an A100 or newer GPU. None for other devices and older drivers, or if built without nvcc."""
    if _cuda is None or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return None if too_new(*_cuda.versions()) else RecurrentKernel(_cuda, limits, on)
