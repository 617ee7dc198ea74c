"""The heads' options: soft caps, weights, targets and external components, in the shapes of a module's input."""

import pytest
import torch

from fused_mos import MoC, MoS, Softmax
from fused_mos import functional as F


def test_options_of_heads():
    """A soft cap is the head's, weights and targets are a call's; shapes are the input's."""
    h, target = torch.randn(4, 3, 6), torch.randint(0, 50, (4, 3))
    for kind in (MoS, MoC, Softmax):
        head = kind(6, 50, softcap=2.0)
        latent, prior, weight, bias = head._operands(h)
        options = {"class_weight": torch.rand(50), "label_smoothing": 0.1, "z_loss": 0.01}
        loss = head(h, target, token_weight=torch.ones(4, 3), reduction="none", **options).loss
        expected = F.mos_nll_loss(
            latent, prior, weight, target.view(-1), bias, softcap=2.0, reduction="none", backend="reference", **options
        )
        assert torch.allclose(loss.view(-1), expected, rtol=0, atol=1e-5) and loss.shape == target.shape
        (output, _), lse = head(h, target, return_lse=True)
        assert output.shape == target.shape and lse.shape == (4, 3, latent.shape[1])
        index = torch.randint(0, 50, (4, 3, 7))
        log_p = head.log_prob(h)
        assert torch.allclose(head.log_prob_at(h, index), log_p.gather(2, index), rtol=0, atol=1e-5)
        assert torch.allclose(
            head.log_prob_at(h, target), log_p.gather(2, target[..., None])[..., 0], rtol=0, atol=1e-5
        )
        soft = head(h, index, target_prob=torch.full((4, 3, 7), 1 / 7)).loss
        assert torch.allclose(soft, -head.log_prob_at(h, index).mean(), rtol=0, atol=1e-5)
        score = head.score(h, target)
        assert torch.allclose(score.entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4)
        assert score.is_top1.shape == score.log_prob.shape == target.shape
        assert head.sample(h, top_k=3, top_p=0.5, mixture_temperature=0.5).shape == target.shape
        assert "softcap=2" in repr(head)


def test_external_components_of_a_head():
    head = MoS(6, 50, 3, n_external=2)
    h, target, extra = torch.randn(4, 3, 6), torch.randint(0, 50, (4, 3)), torch.rand(4, 3, 2).log()
    assert head.prior.out_features == 5 and "n_external=2" in repr(head)
    output, loss = head(h, target, extra_log_prob=extra)
    assert torch.allclose(loss, -output.mean()) and output.shape == target.shape
    for call in ("log_prob", "predict", "sample"):
        with pytest.raises(RuntimeError, match=f"{call}.*external"):
            getattr(head, call)(h)
    for call, argument in (("topk", 3), ("log_prob_at", target), ("score", target)):
        with pytest.raises(RuntimeError, match=f"{call}.*external"):
            getattr(head, call)(h, argument)
    with pytest.raises(ValueError, match="extra_log_prob"):
        head(h, target)
    with pytest.raises(ValueError, match="extra_log_prob"):
        MoS(6, 50)(h, target, extra_log_prob=extra)
    with pytest.raises(ValueError, match="extra_log_prob"):
        head(h, target, extra_log_prob=extra[..., :1])
    with pytest.raises(ValueError, match="n_external"):
        MoC(6, 50, n_external=1)
    for bad in (-1, 1.5, 0.0, None):
        with pytest.raises((ValueError, TypeError), match="n_external"):
            MoS(6, 50, n_external=bad)


@pytest.mark.parametrize("name", ["target", "token_weight", "target_prob", "index"])
def test_shapes_of_options_are_named(name):
    head, h, target = MoS(6, 50), torch.randn(4, 3, 6), torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=name):
        if name == "index":
            head.log_prob_at(h, target[:2])
        elif name == "target":
            head.score(h, target[:2])
        elif name == "target_prob":
            head(h, target[..., None], target_prob=torch.ones(4, 3))
        else:
            head(h, target, token_weight=torch.ones(12))


def test_heads_that_an_earlier_version_pickled():
    """They have no soft cap, and no external components."""
    for head in (MoS(6, 50, 3), Softmax(6, 50)):
        for name in ("softcap", "n_external"):
            head.__dict__.pop(name, None)
        assert head(torch.randn(4, 6), torch.arange(4)).loss.isfinite() and "backend" in repr(head)


def test_no_tokens():
    head = MoS(6, 50, 3)
    (output, loss), lse = head(torch.randn(0, 2, 6), torch.zeros(0, 2, dtype=torch.int64), return_lse=True)
    assert output.shape == (0, 2) and lse.shape == (0, 2, 3) and loss.isnan()
