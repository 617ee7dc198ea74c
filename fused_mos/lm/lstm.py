"""An LSTM layer with dropout on its hidden-to-hidden weight (Merity et al. 2017, section 2)."""

import math
import weakref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dropout import check_probability, weight_dropout
from ..ops.direct import is_ordinary
from . import cpu_recurrent
from .recurrent_kernel import kernel_for


class WeightDropLSTM(nn.Module):
    """A single-layer LSTM over (T, B, features) with DropConnect on the recurrent weight.

    In training, each forward pass draws an element-wise mask for all its time steps and scales by
    1/(1 − weight_dropout). Parameters, gate order and initialisation are those of torch.nn.LSTM. The layer computes in
    its parameters' dtype even under torch.autocast, since a 16-bit cell state would lose small increments.

    products: torch.bfloat16 lets training round the operands of matrix products, including h, to bfloat16 if a kernel
        is faster that way. This applies to CPUs with AMX, AMD CPUs with bfloat16, and GPUs with float32 parameters, at
        most 16 columns and an even hidden_size of at most 1,152; there, double backward is not supported. Sums and cell
        states stay float32.

    On a CPU, native kernels compute float32 layers with at least 64 units over at least 8 steps of at most 32 columns,
    and torch.lstm_cell a single step. Everything else uses torch.lstm.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        weight_dropout: float = 0.0,
        device=None,
        dtype=None,
        products: torch.dtype | None = None,
    ):
        super().__init__()
        if products not in (None, torch.bfloat16):
            raise ValueError(f"products must be None or torch.bfloat16, got {products}")
        self.products = products
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_dropout = check_probability("weight_dropout", weight_dropout)
        options = {"device": device, "dtype": dtype}
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size, input_size, **options))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **options))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size, **options))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size, **options))
        self._flat: _FlatWeights | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (T, B, input_size) and hidden (h, c) of (1, B, hidden_size) -> output (T, B, hidden_size) and the last (h,
        c).

        Raises ValueError for other shapes.
        """
        self._check_shapes(x, hidden)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight_ih_l0.dtype)
            if (result := self._by_kernel(x, hidden)) is not None:
                return result
            weights = [self.weight_ih_l0, self._recurrent(), self.bias_ih_l0, self.bias_hh_l0]
            if x.device.type == "cpu" and x.shape[0] == 1:
                # oneDNN's sequence kernel would first copy all weights into its own layout
                h, c = torch.lstm_cell(x[0], [state[0] for state in hidden], *weights)
                return h[None], (h[None], c[None])
            # the kernel of nn.LSTM, for a weight that is not a Parameter; only cuDNN uses `train`
            output, h, c = torch.lstm(x, hidden, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
        return output, (h, c)

    def _by_kernel(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """The forward pass by a native kernel, or None if it is not wanted, not available or not faster."""
        tensors = x, *hidden, *self.parameters()
        if not is_ordinary(tensors) or forward_ad._current_level >= 0:
            return None
        if any(t.dtype != torch.float32 or t.device != x.device for t in tensors):
            return None
        products = self.products if self.training else None
        if cpu_recurrent.pays(x, self.hidden_size):
            weights = self.weight_ih_l0, self._recurrent(), self.bias_ih_l0, self.bias_hh_l0
            return cpu_recurrent.lstm(x, hidden, *weights, products)
        kernel = None if products is None else kernel_for(x.device)
        if kernel is None:
            return None
        plan = kernel.plan(x, self.weight_hh_l0)
        if plan is None:
            return None
        recurrent = nn.functional.dropout(self.weight_hh_l0, self.weight_dropout)
        return kernel(plan, x, hidden, self.weight_ih_l0, recurrent, self.bias_ih_l0, self.bias_hh_l0)

    def _check_shapes(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> None:
        """Raise ValueError for wrong shapes. torch.lstm itself does not check, and reads beyond the end of small
        tensors."""
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x must be (T, B, input_size = {self.input_size}), got {tuple(x.shape)}")
        expected = (1, x.shape[1], self.hidden_size)
        given = [tuple(state.shape) for state in hidden]
        if given != [expected, expected]:
            raise ValueError(f"hidden must be h and c of (1, B, hidden_size) = {expected}, got {given}")

    def _recurrent(self) -> Tensor:
        weight, p = self.weight_hh_l0, self.weight_dropout
        if not _uses_cudnn(weight):
            return weight_dropout(weight, p, self.training)
        mask = torch.empty_like(weight).bernoulli_(1 - p).div_(1 - p) if self.training and p else None
        if self._flat is None or not self._flat.holds(self):
            self._flat = _FlatWeights(self)
        return self._flat.write(weight, mask)

    def __getstate__(self):
        return self.__dict__ | {"_flat": None}  # a copy makes its own buffer

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, weight_dropout={self.weight_dropout}"


class _FlatWeights:
    """The weights in one buffer, as cuDNN expects them. Otherwise it warns, and copies all weights at every call.

    All parameters but the recurrent weight become views of the buffer. Each forward pass writes the recurrent weight,
    after dropout, into its place in the buffer. While a backward pass still needs the contents of that place, the next
    dropped weight gets a tensor of its own.
    """

    def __init__(self, lstm: WeightDropLSTM):
        parameters = [lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0]
        self.buffer = torch.cat([p.detach().flatten() for p in parameters])
        views = [view.view_as(p) for view, p in zip(self.buffer.split([p.numel() for p in parameters]), parameters)]
        for p, view in zip(parameters, views):
            if p is not lstm.weight_hh_l0:
                p.data = view
        self.recurrent = views[1]
        self.reader: weakref.ref | None = None  # the autograd node that still reads `recurrent`

    def holds(self, lstm: WeightDropLSTM) -> bool:
        """True if the parameters are views of this buffer; False after a move to another device or dtype."""
        storage = self.buffer.untyped_storage().data_ptr()
        return all(
            p.untyped_storage().data_ptr() == storage for p in (lstm.weight_ih_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
        )

    def write(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        """Write weight·mask to the buffer and return it, differentiable with respect to `weight`."""
        reader = None if self.reader is None else self.reader()
        if reader is not None and not reader.finished:
            return weight if mask is None else weight * mask
        recurrent = _Write.apply(weight, mask, self.recurrent.detach())
        self.reader = weakref.ref(recurrent.grad_fn) if recurrent.grad_fn else None
        return recurrent


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor | None, place: Tensor) -> Tensor:
        ctx.finished = False
        ctx.save_for_backward(mask)
        ctx.mark_dirty(place)
        return place.copy_(weight) if mask is None else torch.mul(weight, mask, out=place)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.finished = True
        (mask,) = ctx.saved_tensors
        return grad if mask is None else grad * mask, None, None


def _uses_cudnn(weight: Tensor) -> bool:
    return weight.is_cuda and torch.backends.cudnn.enabled and not torch.compiler.is_compiling()
