"""Every mask: which tensor it falls on, which axes share it, its rate, its scale, and that it is fresh."""

import pytest
import torch

import fused_mos
from fused_mos.dropout import LockedDropout, embedding_dropout, locked_dropout
from fused_mos.lm import AWDLSTM, WeightDropLSTM

P = 0.3


def assert_mask(values, p=P):
    """Values of 0 and 1/(1 − p) alone, kept at the rate 1 − p within five standard deviations."""
    kept = values != 0
    assert torch.allclose(values[kept], torch.tensor(1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / values.numel()) ** 0.5


def test_locked_dropout_is_one_mask_for_all_time_steps():
    masked = locked_dropout(torch.ones(5, 40, 60), P)
    assert (masked == masked[:1]).all()
    assert_mask(masked[0])
    assert not torch.equal(masked[0, 0], masked[0, 1]), "columns have masks of their own"
    assert not torch.equal(masked, locked_dropout(torch.ones(5, 40, 60), P)), "each call draws a fresh mask"


def test_locked_dropout_without_a_time_axis_masks_each_row():
    masked = locked_dropout(torch.ones(50, 60), P)
    assert_mask(masked)
    assert not (masked == masked[:1]).all()


def test_no_dropout_in_evaluation():
    x = torch.randn(5, 4, 3)
    assert locked_dropout(x, P, training=False) is x
    assert LockedDropout(P).eval()(x) is x
    weight, tokens = torch.randn(9, 3), torch.tensor([[1, 2]])
    assert torch.equal(embedding_dropout(weight, tokens, P, training=False), weight[tokens])


def test_embedding_dropout_drops_whole_words_everywhere():
    tokens = torch.arange(2000).repeat(3, 2).reshape(3, 4000)
    embedded = embedding_dropout(torch.ones(2000, 4), tokens, P)
    assert (embedded == embedded[..., :1]).all(), "all features of a word"
    assert (embedded == embedded[:1]).all() and torch.equal(embedded[:, :2000], embedded[:, 2000:]), "all places of a word"
    assert_mask(embedded[0, :2000, 0])


def test_the_tied_decoder_uses_the_unmasked_weight():
    model = AWDLSTM(30, 5, (6, 4), "mos", 2, dropoute=0.9, dropouti=0, dropouth=0, dropout=0, dropoutl=0, wdrop=0)
    tokens, context = torch.randint(0, 30, (3, 2)), torch.randn(3, 2, 4)
    before = model.head.log_prob(context)
    model.features(tokens)
    assert torch.equal(model.head.log_prob(context), before)
    assert not torch.equal(model.features(tokens)[0], model.features(tokens)[0]), "the lookup is masked, afresh each time"


def test_weight_drop_masks_the_recurrent_weight_element_wise():
    """With zero input weights and one known hidden state, the first step shows the dropped recurrent weight."""
    lstm = WeightDropLSTM(3, 50, weight_dropout=0.5)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        lstm.weight_hh_l0.fill_(0.01)
        lstm.bias_ih_l0.fill_(0.1)  # so that no gate is closed, which would hide another's gradient
    h = torch.eye(50)[None]  # column b of the weight, in batch column b
    c = torch.ones(1, 50, 50)

    def recurrent_mask():
        lstm.zero_grad()
        output, _ = lstm(torch.randn(1, 50, 3), (h, c))
        output.sum().backward()
        return (lstm.weight_hh_l0.grad != 0).float()

    first, second = recurrent_mask(), recurrent_mask()
    assert abs(first.mean() - 0.5) < 5 * 0.5 / 100
    assert 0.4 < (first == second).float().mean() < 0.6, "each forward pass draws a fresh mask"
    assert 0.3 < first[:, 0].mean() < 0.7 and 0.3 < first[0].mean() < 0.7, "neither rows nor columns are dropped whole"
    assert lstm.weight_ih_l0.grad.ne(0).all() and lstm.bias_hh_l0.grad.ne(0).all(), "other weights are not dropped"
    lstm.eval()
    assert recurrent_mask().all()


def test_weight_drop_scales():
    lstm = WeightDropLSTM(3, 400, weight_dropout=0.5)
    x, hidden = torch.zeros(1, 1, 3), (torch.ones(1, 1, 400), torch.zeros(1, 1, 400))
    with torch.no_grad():
        lstm.weight_hh_l0.fill_(0.001)
        mean = torch.stack([lstm(x, hidden)[1][1].mean() for _ in range(20)]).mean()
        assert mean == pytest.approx(lstm.eval()(x, hidden)[1][1].mean().item(), rel=0.02)


def test_latent_dropout_is_locked_in_time_and_independent_across_experts():
    head = fused_mos.MoS(4, 9, n_experts=3, latent_features=500, latent_dropout=P)
    latent, _ = head.mixture(torch.ones(6, 2, 4))
    kept = latent != 0
    assert (kept == kept[:1]).all()
    assert abs(kept[0].float().mean() - (1 - P)) < 5 * (P * (1 - P) / kept[0].numel()) ** 0.5
    agreement = (kept[0, :, 0] == kept[0, :, 1]).float().mean()
    assert abs(agreement - (P**2 + (1 - P) ** 2)) < 0.1
    dense = head.eval().mixture(torch.ones(6, 2, 4))[0]
    assert torch.allclose(latent[kept], dense[kept] / (1 - P))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_probabilities(p):
    with pytest.raises(ValueError, match="p must be in"):
        LockedDropout(p)
    with pytest.raises(ValueError, match="weight_dropout must be in"):
        WeightDropLSTM(2, 2, p)
