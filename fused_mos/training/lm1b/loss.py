"""The model's loss as a module for DistributedDataParallel to wrap, with the head optionally computed in chunks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...lm import AWDLSTM
from ...lm.awd_lstm import Hidden, detach


class SummedLoss(nn.Module):
    """Returns Σ −log p over the targets (T, B) that are not `ignored`, and the detached hidden state.

    With `head_chunk`, the head processes about that many tokens at a time, in whole columns. Its (N, K, D) vectors are
    freed before the next chunk, and only gradients are kept; the number of matrix products stays the same.
    """

    def __init__(self, model: AWDLSTM, ignored: int, head_chunk: int = 0):
        super().__init__()
        self.model, self.ignored, self.head_chunk = model, ignored, head_chunk

    def forward(self, tokens: Tensor, target: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        _, features, hidden = self.model.features(tokens, hidden)
        n_columns = target.shape[1]
        columns = min(max(self.head_chunk // len(target), 1), n_columns) if self.head_chunk else n_columns
        if columns == n_columns or not torch.is_grad_enabled():
            chunks = zip(features.split(columns, 1), target.split(columns, 1))
            loss = torch.stack([self.nll(x, y) for x, y in chunks]).sum()
        else:
            loss = _ChunkedNLL.apply(self, features, target, columns, *self.model.head.parameters())
        return loss, detach(hidden)

    def nll(self, features: Tensor, target: Tensor) -> Tensor:
        options = {"ignore_index": self.ignored, "reduction": "sum", "grad_filter_eps": self.model.grad_filter_eps}
        return self.model.head(features, target, **options).loss


class _ChunkedNLL(torch.autograd.Function):
    """Computes the gradients of the features and the head's parameters chunk by chunk in the forward pass. The backward
    pass only scales them."""

    @staticmethod
    def forward(ctx, loss: SummedLoss, features: Tensor, target: Tensor, columns: int, *parameters: Tensor) -> Tensor:
        total, grad_features = features.new_zeros(()), torch.empty_like(features)
        gradients: list[Tensor] = []
        for start in range(0, target.shape[1], columns):
            part = slice(start, start + columns)
            with torch.enable_grad():
                x = features[:, part].detach().requires_grad_()
                nll = loss.nll(x, target[:, part])
            grad_features[:, part], *of_chunk = torch.autograd.grad(nll, [x, *parameters])
            gradients = _added(gradients, of_chunk)
            total += nll.detach()
        ctx.save_for_backward(grad_features, *gradients)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_features, *gradients = ctx.saved_tensors
        # in place, since the decoder's gradient is large; a loss is differentiated only once
        return None, grad_features * grad, None, None, *(g.mul_(grad) for g in gradients)


def _added(sums: list[Tensor], terms: Iterable[Tensor]) -> list[Tensor]:
    return [s.add_(t) for s, t in zip(sums, terms)] if sums else list(terms)
