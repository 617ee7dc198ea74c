"""Every mask: which tensor it falls on, which axes share it, its rate, its scale, and that it is fresh."""

import pytest
import torch
from restated import Masks, restated
from torch.utils._python_dispatch import TorchDispatchMode

import fused_mos
from fused_mos.dropout import LockedDropout, embedding_dropout, locked_dropout, weight_dropout
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
    assert torch.equal(
        embedding_dropout(torch.nn.Embedding(9, 3, _weight=weight), tokens, P, training=False), weight[tokens]
    )


def test_embedding_dropout_drops_whole_words_everywhere():
    tokens = torch.arange(2000).repeat(3, 2).reshape(3, 4000)
    embedded = embedding_dropout(torch.nn.Embedding(2000, 4, _weight=torch.ones(2000, 4)), tokens, P)
    assert (embedded == embedded[..., :1]).all(), "all features of a word"
    assert (embedded == embedded[:1]).all() and torch.equal(embedded[:, :2000], embedded[:, 2000:]), (
        "all places of a word"
    )
    assert_mask(embedded[0, :2000, 0])


def test_the_tied_decoder_uses_the_unmasked_weight():
    model = AWDLSTM(30, 5, (6, 4), "mos", 2, dropoute=0.5, dropouti=0, dropouth=0, dropout=0, dropoutl=0, wdrop=0)
    tokens, context = torch.arange(30).view(15, 2), torch.randn(3, 2, 4)
    before = model.head.log_prob(context)
    model.features(tokens)
    assert torch.equal(model.head.log_prob(context), before)
    assert not torch.equal(model.features(tokens)[0], model.features(tokens)[0]), (
        "the lookup is masked, afresh each time"
    )


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


@pytest.mark.parametrize("p", [0.5, 0.123456, 1e-3, 0.99])
@pytest.mark.parametrize("shape", [(300, 301), (65537,)])
def test_a_large_weight_is_dropped_at_its_rate(p, shape):
    weight = torch.full(shape, 2.0, requires_grad=True)
    dropped = weight_dropout(weight, p)
    kept = dropped != 0
    rate = round(p * 2**16) / 2**16
    assert abs(rate - p) <= 2**-17
    assert abs(kept.double().mean() - (1 - rate)) < 5 * (p * (1 - p) / weight.numel()) ** 0.5 + 1e-5
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 2 / (1 - rate)))
    if p == 0.5:
        pairs = kept.flatten()[: weight.numel() // 4 * 4].view(-1, 4).double()  # the four of one drawn number
        assert (torch.corrcoef(pairs.T) - torch.eye(4)).abs().max() < 0.05
        assert not torch.equal(weight_dropout(weight, p), dropped)
    (gradient,) = torch.autograd.grad(dropped.sum(), weight)
    assert torch.equal(gradient, dropped / 2)
    assert weight_dropout(weight, p, training=False) is weight or torch.equal(weight_dropout(weight, p, False), weight)


def test_a_large_weight_is_dropped_where_it_is():
    weight = torch.ones(300, 300)
    with torch.device("meta"):
        assert weight_dropout(weight, 0.5).device == weight.device


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


class DrawnMasks(TorchDispatchMode):
    """Keeps every tensor of random bits that is drawn while it is on."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "bernoulli_":
            self.drawn.append(result.clone())
        elif name == "native_dropout":
            self.drawn.append(result[1].to(result[0].dtype))
        return result


RATES = {"dropoute": 0.1, "dropouti": 0.2, "dropouth": 0.3, "dropout": 0.4, "dropoutl": 0.5, "wdrop": 0.6}
V, D, K, WIDTHS = 150, 16, 5, (60, 50, 40)


def masked_model(head="mos"):
    return AWDLSTM(V, D, WIDTHS, head, K, **RATES).double()


def draw(model, tokens):
    with DrawnMasks() as masks:
        output = model(tokens, tokens.roll(-1, 0))
    return output, masks.drawn


def in_order(drawn):
    """The masks in the order of the model's equations, with the rate of each."""
    e, i, w0, h0, w1, h1, w2, o, latent = drawn
    return Masks(e, i, [w0, w1, w2], [h0, h1], o, latent), [
        (RATES[name], mask)
        for name, mask in zip(
            ("dropoute", "dropouti", *("wdrop", "dropouth") * 2, "wdrop", "dropout", "dropoutl"), drawn
        )
    ]


def test_every_mask_of_the_model_has_its_shape_rate_and_is_fresh():
    """Nine masks a forward pass: the shapes say which axes share one, the rates which dropout it is."""
    model, tokens = masked_model(), torch.randint(0, V, (7, 12))
    _, first = draw(model, tokens)
    _, second = draw(model, tokens)
    assert [tuple(mask.squeeze(0).shape) for mask in first] == [
        (V, 1),
        (12, D),
        (240, 60),
        (12, 60),
        (200, 50),
        (12, 50),
        (160, 40),
        (12, 40),
        (12, K * D),
    ]
    for (p, mask), again in zip(in_order(first)[1], second):
        assert ((mask == 0) | (mask == 1)).all()
        both = torch.stack([mask, again])
        assert abs(both.mean() - (1 - p)) < 5 * (p * (1 - p) / both.numel()) ** 0.5
        agreement = p**2 + (1 - p) ** 2
        assert (
            abs((mask == again).double().mean() - agreement) < 5 * (agreement * (1 - agreement) / mask.numel()) ** 0.5
        ), "drawn afresh"


@pytest.mark.parametrize("head", ["mos", "moc"])
def test_every_mask_falls_on_its_tensor_and_is_rescaled(head):
    """The plain equations with the model's own masks, scaled by 1/(1 − p), give its loss, regularised outputs and
    gradients."""
    model, tokens = masked_model(head), torch.randint(0, V, (7, 4))
    output, drawn = draw(model, tokens)
    for p, mask in in_order(drawn)[1]:
        mask /= 1 - p
    expected = restated(model, head, tokens, K, in_order(drawn)[0])
    loss = -expected.probability.gather(2, tokens.roll(-1, 0)[..., None]).log().mean()
    assert torch.allclose(output.loss, loss, rtol=0, atol=1e-12)
    assert torch.allclose(output.raw, expected.raw, rtol=0, atol=1e-12) and torch.allclose(
        output.dropped, expected.dropped, rtol=0, atol=1e-12
    )
    for a, b in zip(
        torch.autograd.grad(output.loss, list(model.parameters())), torch.autograd.grad(loss, list(model.parameters()))
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_evaluation_draws_nothing():
    assert not draw(masked_model().eval(), torch.randint(0, V, (7, 4)))[1]
