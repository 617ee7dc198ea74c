"""Models with a mixture on two gloo ranks: DDP, and FSDP2 of the blocks and the head."""

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", minversion="5")

from ranks import run_on_ranks
from tiny import make, tokens
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_mos.hf import replace_head


def trained(wrap):
    """Losses of some steps on this rank's half of the batch, averaged over the ranks."""
    model = wrap(replace_head(make("llama"), 3, noise=0.3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, losses = tokens(4, 9)[2 * dist.get_rank() :][:2], []
    for _ in range(3):
        output = model(x, labels=x)
        assert output.logits is None
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = output.loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    return fully_shard(model)


def agree():
    model, x, expected = replace_head(make("llama"), 3, noise=0.3), tokens(4, 9), []
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), 0.05)
    for _ in range(3):
        loss = alone(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert trained(DistributedDataParallel) == pytest.approx(expected, abs=1e-5)
    assert trained(shard) == pytest.approx(expected, abs=1e-5)


@pytest.mark.processes
def test_two_ranks_train_as_one():
    run_on_ranks(2, agree)
