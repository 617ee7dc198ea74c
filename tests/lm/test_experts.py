"""The experts' shares, against the mixture written out; and neighbours in the embedding."""

import pytest
import torch

from fused_mos import MoC, MoS
from fused_mos.lm.experts import expert_shares, nearest_words


def test_shares_are_bayes_rule():
    head = MoS(6, 11, n_experts=3, latent_features=5).double()
    torch.nn.init.normal_(head.decoder.bias)
    features, target = torch.randn(4, 2, 6, dtype=torch.float64) * 3, torch.randint(0, 11, (4, 2))
    shares = expert_shares(head, features, target)
    prior = torch.softmax(features @ head.prior.weight.T, -1)
    latent = torch.tanh(features @ head.latent[0].weight.T + head.latent[0].bias).view(4, 2, 3, 5)
    expert = torch.softmax(latent @ head.decoder.weight.T + head.decoder.bias, -1)
    joint = prior * expert.gather(-1, target[..., None, None].expand(4, 2, 3, 1)).squeeze(-1)
    assert torch.allclose(shares.prior, prior, rtol=0, atol=1e-12)
    assert torch.allclose(shares.responsibility, joint / joint.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    assert torch.allclose(shares.log_likelihood, joint.sum(-1).log(), rtol=0, atol=1e-12)
    assert torch.allclose(shares.log_likelihood, head(features, target).output, rtol=0, atol=1e-12)


def test_other_heads_have_no_experts():
    with pytest.raises(ValueError, match="head must be a MoS, .* got MoC"):
        expert_shares(MoC(6, 11, n_experts=3), torch.randn(2, 1, 6), torch.zeros(2, 1, dtype=torch.int64))


def test_nearest_words():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.3], [-1.0, -1.0]])
    cosine, index = nearest_words(weight, torch.tensor([0, 1]), 2)
    assert index.tolist() == [[2, 1], [2, 0]]
    assert cosine[0].tolist() == pytest.approx([3 / 9.09**0.5, 0])
    assert nearest_words(weight, torch.tensor([0]), 9)[1].shape == (1, 3), "no more than there are"
