"""Dynamic evaluation against a plain restatement of the published equations."""

import pytest
import torch
from torch import nn

from fused_mos.lm import AWDLSTM
from fused_mos.lm.dynamic_evaluation import DynamicEvaluation, DynamicRule, GradientStatistics

V, D, K = 23, 6, 3


def make(tied=True):
    torch.manual_seed(0)
    model = AWDLSTM(V, D, (9, 8), "mos", K, tied=tied).double()  # the dropouts of the paper, which must be off
    nn.init.normal_(model.head.decoder.bias)
    return model


def _gradients(model, inputs, targets, hidden):
    """Those of the mean loss, by autograd through the plain mixture."""
    _, dropped, hidden = model.features(inputs, hidden)
    latent, prior_logits = model.head.mixture(dropped)
    decoder = model.head.decoder
    probability = (
        torch.softmax(prior_logits, -1)[..., None] * torch.softmax(latent @ decoder.weight.T + decoder.bias, -1)
    ).sum(-2)
    losses = -probability.gather(-1, targets[..., None]).log()
    parameters = list(model.parameters())
    return losses, torch.autograd.grad(losses.mean(), parameters), [(h.detach(), c.detach()) for h, c in hidden]


def restated_statistics(model, source, bptt):
    model.eval()
    sums, hidden = [torch.zeros_like(p) for p in model.parameters()], None
    for start in range(0, source.shape[0] - 1, bptt):
        stop = min(start + bptt, source.shape[0] - 1)
        _, gradients, hidden = _gradients(model, source[start:stop], source[start + 1 : stop + 1], hidden)
        sums = [total + g * g for total, g in zip(sums, gradients)]
    return [total.sqrt() for total in sums]


@pytest.mark.parametrize("tied", [True, False])
def test_statistics(tied):
    model, source = make(tied), torch.randint(0, V, (14, 4))
    statistics = GradientStatistics(model, source, 5)
    assert list(statistics) == [5, 5, 3]
    for ours, wanted in zip(statistics.root_mean_squares(), restated_statistics(make(tied), source, 5), strict=True):
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule", [DynamicRule(), DynamicRule(lr=0.05, lamb=0.9, epsilon=0.01, bptt=3)], ids=["paper", "strong"]
)
def test_updates(rule):
    """θ += λ·min(MS/Σ, 1/λ)·(θ₀ − θ) − η·g/(MS + ε) after each segment, whose loss is of the parameters before it."""
    train, text = torch.randint(0, V, (14, 4)), torch.randint(0, V, (13, 1))
    model, plain = make(), make()
    ms = restated_statistics(plain, train, 5)
    scale = sum(m.mean() for m in ms)
    rates = [(m / scale).clamp(max=1 / rule.lamb) for m in ms]
    if rule.lamb == 0.9:
        assert any((m / scale > 1 / rule.lamb).any() for m in ms), "no rate is clipped here"
    evaluation = DynamicEvaluation(model, text, ms, rule)
    trained, hidden, total, row = [p.detach().clone() for p in plain.parameters()], None, 0.0, 0
    for n in evaluation:
        losses, gradients, hidden = _gradients(plain, text[row : row + n], text[row + 1 : row + 1 + n], hidden)
        total, row = total + losses.sum().item(), row + n
        with torch.no_grad():
            for p, p0, g, m, rate in zip(plain.parameters(), trained, gradients, ms, rates, strict=True):
                p += rule.lamb * rate * (p0 - p) - rule.lr * g / (m + rule.epsilon)
        for (name, ours), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours, wanted, rtol=0, atol=1e-12), name
    assert row == 12
    assert evaluation.loss == pytest.approx(total / 12, abs=1e-12)


def test_learns_what_repeats():
    """A text that repeats itself costs less and less; the words of a segment are predicted before they are learnt."""
    model, source = make(), torch.arange(V).repeat(12)[:, None]
    ms = [torch.full_like(p, 1.0) for p in model.parameters()]
    with torch.no_grad():
        static = model(source[:-1], source[1:]).loss.item()
    evaluation = DynamicEvaluation(model, source, ms, DynamicRule(lr=0.5, lamb=1e-3))
    first = next(iter(evaluation))
    with torch.no_grad():
        assert evaluation.loss == pytest.approx(
            make().eval()(source[:first], source[1 : first + 1]).loss.item(), abs=1e-12
        )
    for _ in evaluation:
        pass
    assert evaluation.loss < static - 0.2


@pytest.mark.parametrize("field", ["lr", "lamb", "epsilon", "bptt"])
def test_a_bad_rule_is_named(field):
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        DynamicRule(**{field: 0}).check()
