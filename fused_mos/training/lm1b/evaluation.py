"""Evaluation on held-out shards, by all ranks together."""

import torch

from ...data.token_stream import TokenFile, evaluation_segments
from ...runtime.progress import bar
from ..device import allow_tf32, on_device
from ..errors import ConfigError
from .loss import SummedLoss
from .ranks import Ranks


def check_columns(batch_size: int, shards: list[TokenFile]) -> None:
    """Raises ConfigError if there are more columns than tokens in any shard, so that some would always be empty."""
    longest = max(shard.n_tokens for shard in shards)
    if batch_size > longest:
        raise ConfigError(
            f"eval_batch_size must be at most {longest}, the tokens of the longest held-out shard, got {batch_size}"
        )


@torch.no_grad()
def evaluate(loss: SummedLoss, shards: list[TokenFile], batch_size: int, bptt: int, ranks: Ranks) -> tuple[float, int]:
    """Returns the mean NLL in nats over every word of the shards, including </S> and <UNK>, and the number of words.

    Each shard is read as `batch_size` columns over all ranks in segments of `bptt`, starting with a zero hidden state.
    """
    model, bos, device = loss.model, loss.ignored, ranks.device
    model.eval()
    allow_tf32(device, False)
    columns = ranks.columns(batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    no_bar = not ranks.is_main or len(shards) == 1
    for shard in bar(shards, desc="evaluate", unit="shards", leave=False, disable=no_bar):
        hidden = model.initial_hidden(len(columns))
        for inputs, targets in evaluation_segments(shard, bos, batch_size, columns, bptt):
            inputs, targets = on_device(inputs, device), on_device(targets, device)
            nll, hidden = loss(inputs, targets, hidden)
            total += nll
            count += (targets != bos).sum()
    total_nll, words = (ranks.sums(total, count) / ranks.n_vocab).tolist()
    return total_nll / words, round(words)
