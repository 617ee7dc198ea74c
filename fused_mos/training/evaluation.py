"""Static evaluation: the mean negative log-likelihood of a text."""

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import batchify, segment
from ..lm import AWDLSTM


@torch.no_grad()
def evaluate(model: AWDLSTM, tokens: Tensor, batch_size: int, bptt: int, description: str = "evaluate") -> float:
    """Mean NLL in nats over every predicted word of `tokens` (n,), read as `batch_size` columns in segments of `bptt`
    with the hidden state carried on.

    The mean is exact: the paper's published code divides by one more row than it predicts, which lowers its
    perplexities by about 0.03 on Penn Treebank.
    """
    model.eval()
    device = model.encoder.weight.device
    source = batchify(tokens, batch_size).to(device)
    hidden = model.initial_hidden(batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    rows = source.shape[0] - 1
    with tqdm(total=rows, desc=description, unit="rows", leave=False, mininterval=0.5, dynamic_ncols=True) as bar:
        for start in range(0, rows, bptt):
            inputs, targets = segment(source, start, bptt)
            output = model(inputs, targets, hidden)
            hidden = output.hidden
            total -= output.log_likelihood.sum(dtype=torch.float64)
            bar.update(inputs.shape[0])
    return total.item() / (rows * batch_size)
