"""One LSTM layer whose hidden-to-hidden weight is dropped (Merity et al. 2017, section 2)."""

import math

import torch
from torch import Tensor, nn

from ..dropout import check_probability


class WeightDropLSTM(nn.Module):
    """A single-layer LSTM over (T, B, features) with DropConnect on the recurrent weight.

    The mask is element-wise, drawn anew at each forward pass in training, shared by all its time steps, and
    scaled by 1/(1 − weight_dropout). Parameters, gate order and initialisation are those of torch.nn.LSTM.
    """

    def __init__(self, input_size: int, hidden_size: int, weight_dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_dropout = check_probability("weight_dropout", weight_dropout)
        options = {"device": device, "dtype": dtype}
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size, input_size, **options))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **options))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden_size, **options))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(T, B, input_size) and h, c of (1, B, hidden_size) -> (T, B, hidden_size) and the last h, c."""
        recurrent = nn.functional.dropout(self.weight_hh_l0, self.weight_dropout, self.training)
        weights = [self.weight_ih_l0, recurrent, self.bias_ih_l0, self.bias_hh_l0]
        # nn.LSTM's own kernel, called with a weight that is not a Parameter; train only matters to cuDNN
        output, h, c = torch.lstm(x, hidden, weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
        return output, (h, c)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, weight_dropout={self.weight_dropout}"
