"""Latent vectors other than the paper's tanh: their formulas, parameters and errors."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_mos import MoC, MoS

H, V, K, R = 8, 31, 3, 2
KINDS = {
    "tanh": {},
    "tanh, rank": {"rank": R},
    "tanh, norm": {"latent_norm": True},
    "tanh, norm, rank": {"latent_norm": True, "rank": R},
    "linear": {"latent": "linear"},
    "linear, norm, rank": {"latent": "linear", "latent_norm": True, "rank": R},
    "residual": {"latent": "residual"},
    "residual, rank": {"latent": "residual", "rank": R},
}


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(", ", "-"))
def options(request):
    return KINDS[request.param]


def made(kind=MoS, **options):
    """A head with random values in place of parameters that start at 0."""
    torch.manual_seed(0)
    head = kind(H, V, K, latent_features=H if options.get("latent") == "residual" else 5, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head


def formula(head, h):
    """The latent vectors (N, K, D) of h (N, H), one expert at a time."""
    state, d = head.state_dict(), head.decoder.in_features
    vectors = []
    for k in range(K):
        if head.rank is None:
            matrix = state["latent.0.weight"][k * d : (k + 1) * d]
        else:
            matrix = state["latent.0.up"][k] @ state["latent.0.down"][k * R : (k + 1) * R]
        z = h @ matrix.T
        if head.latent_kind == "residual":
            vectors.append(h + z)
            continue
        z = z + state["latent.0.bias"][k * d : (k + 1) * d]
        if head.latent_norm:
            z = z / (z.square().mean(1, keepdim=True) + 1e-6).sqrt()
        vectors.append(torch.tanh(z) if head.latent_kind == "tanh" else z)
    return torch.stack(vectors, 1)


@pytest.mark.parametrize("kind", [MoS, MoC])
def test_formulas(kind, options):
    head = made(kind, dtype=torch.float64, **options)
    h, target = torch.randn(12, H, dtype=torch.float64), torch.randint(0, V, (12,))
    latent, prior = formula(head, h), torch.softmax(h @ head.prior.weight.T, -1)
    if kind is MoC:
        latent, prior = (prior[..., None] * latent).sum(1, keepdim=True), torch.ones(12, 1, dtype=torch.float64)
    softmax = torch.softmax(latent @ head.decoder.weight.T + head.decoder.bias, -1)
    expected = (prior[..., None] * softmax).sum(1).log()
    assert torch.allclose(head.log_prob(h), expected, rtol=0, atol=1e-12)
    loss = head(h.view(3, 4, H), target.view(3, 4)).loss
    assert torch.allclose(loss, -expected.gather(1, target[:, None]).mean(), rtol=0, atol=1e-12)


def test_gradients(options):
    head = made(dtype=torch.float64, backend="tiled", **options)
    names, parameters = zip(*head.named_parameters())
    h = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, (4,))

    def loss(h, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters)), (h, target)).loss

    assert torch.autograd.gradcheck(loss, (h, *parameters), fast_mode=True)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 2, 2)], ids=str)
def test_any_leading_shape(shape, options):
    head = made(**options)
    h, target = torch.randn(*shape, H), torch.randint(0, V, shape)
    assert head.mixture(h)[0].shape == (*shape, K, head.decoder.in_features)
    assert head(h, target, reduction="none").loss.shape == shape


@pytest.mark.compiles
def test_compiles_into_one_graph(options):
    head = made(**options)
    h, target = torch.randn(6, H), torch.randint(0, V, (6,))
    torch.compiler.reset()
    loss = torch.compile(head, fullgraph=True, backend="aot_eager")(h, target).loss
    assert torch.allclose(loss, head(h, target).loss, rtol=0, atol=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_16_bits(dtype, options):
    head, h, target = made(**options), torch.randn(64, H), torch.randint(0, V, (64,))
    exact = head(h, target).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(head(h, target).loss, exact, rtol=0.02)
    assert torch.allclose(head.to(dtype)(h.to(dtype), target).loss, exact, rtol=0.02)


def test_copies(options):
    head, h = made(**options), torch.randn(5, H)
    expected = head.log_prob(h)
    saved = io.BytesIO()
    torch.save(head.state_dict(), saved)
    saved.seek(0)
    loaded = made(**options)
    loaded.reset_parameters()
    loaded.load_state_dict(torch.load(saved))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        assert torch.equal(other.log_prob(h), expected)


def test_dropout_keeps_one_mask_for_all_time_steps(options):
    head = made(latent_dropout=0.5, **options)
    latent, _ = head.mixture(torch.ones(4, 20, H))  # the same input at each of four time steps
    assert (latent[0] == latent).all() and (latent == 0).any() and (latent[:, 0] != latent[:, 1]).any()


def test_parameters():
    published = {"prior.weight", "latent.0.weight", "latent.0.bias", "decoder.weight", "decoder.bias"}
    for kind in ("tanh", "linear"):
        for norm in (False, True):
            assert set(MoS(H, V, K, latent=kind, latent_norm=norm).state_dict()) == published
    assert set(MoS(H, V, K, latent="residual").state_dict()) == published - {"latent.0.bias"}
    products = published - {"latent.0.weight"} | {"latent.0.down", "latent.0.up"}
    assert set(MoS(H, V, K, rank=R).state_dict()) == products
    assert set(MoS(H, V, K, latent="residual", rank=R).state_dict()) == products - {"latent.0.bias"}
    of_product = MoS(H, V, K, rank=R, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in of_product.parameters())


def test_the_default_head_is_what_it_was():
    """Its random numbers are unchanged, too: those of linear layers, drawn again by reset_parameters."""
    torch.manual_seed(3)
    head = MoS(H, V, K, 5)
    torch.manual_seed(3)
    decoder, prior, projections = nn.Linear(5, V), nn.Linear(H, K, bias=False), nn.Linear(H, K * 5)
    prior.reset_parameters()
    projections.reset_parameters()
    nn.init.uniform_(decoder.weight, -0.1, 0.1)
    expected = [decoder.weight, torch.zeros(V), prior.weight, projections.weight, projections.bias]
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), expected, strict=True))
    assert [type(part) for part in head.latent] == [nn.Linear, nn.Tanh]


def test_initialisation():
    for options in ({}, {"rank": 40}, {"rank": 4}):
        head = MoS(300, V, 5, 200, latent="linear", **options)
        moved = head.latent(torch.randn(500, 300)).std().item()
        assert abs(moved - 3**-0.5) < 0.05, "the scale of nn.Linear, whatever the rank"
    for rank in (None, 4):
        head = MoS(300, V, 5, latent="residual", rank=rank)
        h = torch.randn(500, 300)
        latent, prior_logits = head.mixture(h)
        assert torch.equal(latent, h[:, None].expand(-1, 5, -1))
        assert abs(prior_logits.std() - 1) < 0.15


def test_the_norm_keeps_tanh_from_saturating():
    for norm in (False, True):
        latent, _ = MoS(300, V, 5, latent_norm=norm).mixture(50 * torch.randn(100, 300))
        saturated = (latent.abs() > 0.99).float().mean()
        assert saturated < 0.05 if norm else saturated > 0.9


def test_repr_tells_what_is_not_default():
    assert "latent=" not in repr(MoS(H, V)) and "rank" not in repr(MoS(H, V)) and "norm" not in repr(MoS(H, V))
    assert "latent='linear', latent_norm=True, rank=2," in repr(MoS(H, V, latent="linear", latent_norm=True, rank=2))
    assert "in_features=8, n_experts=3, latent_features=8, rank=2, bias=True" in repr(MoS(H, V, K, rank=2))


@pytest.mark.parametrize("kind", [MoS, MoC])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latent": "relu"}, ValueError, "latent must be one of tanh, linear, residual, got 'relu'"),
        ({"latent": "residual", "latent_features": 5}, ValueError, "latent_features must be in_features, got 5 and 8"),
        ({"latent": "residual", "latent_norm": True}, ValueError, "latent_norm must be False for latent='residual'"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be an int, got 1.5"),
        ({"rank": 9}, ValueError, r"rank must be at most min\(in_features, latent_features\) = 8, got 9"),
        ({"rank": 6, "latent_features": 5}, ValueError, "= 5, got 6"),
    ],
)
def test_refusals(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(H, V, K, **options)
