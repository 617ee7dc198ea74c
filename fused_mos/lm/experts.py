"""Analysis of a model: the experts' shares in each prediction, and nearest words in the embedding."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from .._plain import read_decoder
from ..head import Head
from ..module import MoC, MoS


class ExpertShares(NamedTuple):
    prior: Tensor  # (T, B, K), π before the word is seen
    responsibility: Tensor  # (T, B, K), each expert's for the word: π_k p_k(word) / p(word)
    log_likelihood: Tensor  # (T, B), log p(word) in nats


def expert_shares(head: Head, features: Tensor, target: Tensor) -> ExpertShares:
    """The experts' shares in each target's probability (Yang et al. 2018, section 2.3), from features
    (T, B, in_features) and target (T, B). Dropout is on if the head is in training mode.

    Raises ValueError unless the head is a MoS.
    """
    if isinstance(head, MoC) or not isinstance(head, MoS):
        raise ValueError(f"head must be a MoS, whose experts each predict words, got {type(head).__name__}")
    latent, prior_logits = head.mixture(features)
    weight, bias = read_decoder(head.decoder)
    logit = (latent * weight[target].unsqueeze(-2)).sum(-1)
    if bias is not None:
        logit = logit + bias[target].unsqueeze(-1)
    normaliser = F.mos_logsumexp(latent.flatten(0, 1), weight, bias, backend=head.backend).view_as(logit)
    log_prior = torch.log_softmax(prior_logits, -1)
    joint = log_prior + logit - normaliser
    log_likelihood = joint.logsumexp(-1)
    return ExpertShares(log_prior.exp(), (joint - log_likelihood.unsqueeze(-1)).exp(), log_likelihood)


def nearest_words(weight: Tensor, words: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of weight (V, D) with the largest cosine to those of `words` (n,), without the words themselves: cosines
    (n, count), highest first, and indices (n, count)."""
    unit = torch.nn.functional.normalize(weight, dim=-1)
    cosine = unit[words] @ unit.T
    cosine.scatter_(1, words[:, None], -torch.inf)
    return cosine.topk(min(count, weight.shape[0] - 1), dim=-1)
