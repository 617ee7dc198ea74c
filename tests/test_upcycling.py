"""Upcycling a softmax layer to a mixture, and growing a mixture: results are kept, and the experts diverge."""

import copy
import re

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.nn.utils import parametrizations

from fused_mos import MoC, MoS
from fused_mos.vocab_parallel import parallelize

D, V, K, N = 32, 60, 4, 512
OPTIONS = {"whole": {}, "rank": {"rank": 4}}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return request.param


@pytest.fixture(params=[MoS, MoC])
def kind(request):
    return request.param


def trained(dtype=torch.float32, bias=True):
    """A layer with logits of some nats, and hidden states of root mean square 1."""
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias, dtype=dtype)
    nn.init.normal_(linear.weight, std=2 / D**0.5)
    if bias:
        nn.init.normal_(linear.bias)
    return linear, torch.randn(N, D).to(dtype), torch.randint(0, V, (N,))


def softmax_loss(linear, hidden, target):
    return nn.functional.cross_entropy(linear(hidden).double(), target)


def expert_distributions(head, hidden):  # (N, K, V)
    latent, _ = MoS.mixture(head, hidden)  # also of a MoC, which mixes them
    return torch.softmax(nn.functional.linear(latent, head.decoder.weight, head.decoder.bias).float(), -1)


def distance(head, hidden):
    """The mean total variation between the first expert's distribution and the others'."""
    p = expert_distributions(head, hidden).detach()
    return ((p[:, 1:] - p[:, :1]).abs().sum(-1) / 2).mean().item()


def train(head, hidden, target, steps=50, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        head(hidden, target).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_nothing_is_lost(kind, options, backend, bias):
    linear, hidden, target = trained(bias=bias)
    head = kind.from_linear(linear, K, backend=backend, **options)
    with torch.no_grad():
        assert abs(head(hidden, target).loss.double() - softmax_loss(linear, hidden, target)) < 1e-6
        expected = linear(hidden).log_softmax(-1)
        assert torch.allclose(head.log_prob(hidden), expected, rtol=0, atol=5e-6)
    assert type(head) is kind and head.latent_kind == "residual" and head.rank == options.get("rank")


def test_nor_is_it_in_16_bits_or_with_a_softcap(kind, options):
    linear, hidden, target = trained(torch.bfloat16)
    head = kind.from_linear(linear, K, **options)
    assert all(p.dtype == torch.bfloat16 for p in head.parameters())
    exact = softmax_loss(copy.deepcopy(linear).double(), hidden.double(), target)
    assert abs(head(hidden, target).loss - exact) <= 2e-3 + abs(softmax_loss(linear, hidden, target) - exact)

    linear, hidden, target = trained()
    head = kind.from_linear(linear, K, softcap=2.0, **options)
    expected = nn.functional.cross_entropy(2 * torch.tanh(linear(hidden) / 2), target)
    assert abs(head(hidden, target).loss - expected) < 1e-6


def test_the_decoder_is_shared(kind, options):
    linear, *_ = trained()
    linear.weight.requires_grad_(False)
    before = copy.deepcopy(linear.state_dict())
    head = kind.from_linear(linear.eval(), K, **options)
    assert head.decoder.weight is linear.weight and head.decoder.bias is linear.bias
    assert not head.decoder.weight.requires_grad and head.decoder.bias.requires_grad and not head.tied
    assert not head.training and (head.in_features, head.n_classes, head.n_experts) == (D, V, K)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    without = kind.from_linear(nn.Linear(D, V, bias=False), K, **options)
    assert without.decoder.bias is None and "decoder.bias" not in without.state_dict()
    on_meta = kind.from_linear(nn.Linear(D, V, device="meta"), K, **options)
    assert all(p.device.type == "meta" for p in on_meta.parameters())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.output = nn.Linear(D, V, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.filterwarnings("error")
def test_ties_survive():
    model = Model()
    model.output = MoS.from_linear(model.output, K)
    for moved in (model, copy.deepcopy(model), model.bfloat16().float()):
        assert moved.output.decoder.weight is moved.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == V * D + K * D + K * D * D
    nn.init.uniform_(model.embedding.weight, -0.1, 0.1)
    model.output.tie(model.embedding.weight)
    assert model.output.tied


def of_every_rank():
    linear, hidden, target = trained()
    for options in OPTIONS.values():
        head = MoS.from_linear(linear, K, **options)
        parallelize(head)
        expected = softmax_loss(linear, hidden, target)
        grown = head.grow(2)
        for each in (head, grown):
            assert abs(each(hidden, target).loss - expected) < 1e-6
        assert grown.vocabulary is head.vocabulary and grown.decoder.weight is head.decoder.weight
    model = Model()
    nn.init.uniform_(model.embedding.weight, -0.1, 0.1)
    expected = softmax_loss(model.output, hidden, target)
    model.output = MoS.from_linear(model.output, K)
    parallelize(model)
    assert model.output.decoder.weight is model.embedding.weight
    assert abs(model.output(hidden, target).loss - expected) < 1e-6


def test_shards():
    run_on_ranks(2, of_every_rank)


def test_the_prior_is_as_uncertain_as_documented(options):
    linear, hidden, _ = trained()
    for rms in (1.0, 30.0):
        head = MoS.from_linear(linear, 64, input_rms=rms, **options)
        _, prior_logits = head.mixture(rms * hidden)
        assert abs(prior_logits.std() - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_part(kind, options, dtype):
    linear, hidden, target = trained(dtype)
    head = kind.from_linear(linear, K, **options)
    assert distance(head, hidden) < 1e-6
    head(hidden, target).loss.backward()
    maps = head.latent[0]
    parameter = maps.up if head.rank else maps.weight
    gradients = parameter.grad.float().view(K, -1)
    cosine = nn.functional.cosine_similarity(gradients[1:], gradients[:1])
    assert (cosine < 0.95).all() and (gradients.norm(dim=1) > 0).all()
    train(head, hidden, target)
    assert distance(head, hidden) > 0.05


def test_experts_of_equal_shares_do_not():
    """This is why the prior is random: otherwise the experts' gradients are equal and the prior's is 0, up to rounding.
    SGD steps in proportion to it; Adam would make steps of full size from it on some processors."""
    linear, hidden, target = trained(torch.float64)
    head = MoS.from_linear(linear, K)
    nn.init.zeros_(head.prior.weight)
    train(head, hidden, target, optimizer=torch.optim.SGD(head.parameters(), lr=0.1))
    assert distance(head, hidden) < 1e-6 and head.prior.weight.abs().max() < 1e-6
    assert head(hidden, target).loss < softmax_loss(linear, hidden, target), "it did train"


@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_noise_is_relative(options, noise):
    linear, hidden, target = trained()
    head = MoS.from_linear(linear, 64, noise=noise, **options)
    for scale in (1.0, 100.0):
        latent, _ = head.mixture(scale * hidden)
        moved = latent - scale * hidden[:, None]
        relative = moved.norm(dim=-1).square().mean().sqrt() / (scale * hidden).norm(dim=-1).square().mean().sqrt()
        assert abs(relative / noise - 1) < 0.1
    assert distance(head, hidden) > 1e-4


HEADS = {
    "tanh": {"latent_features": 20},
    "tanh, norm, rank": {"latent_features": 20, "latent_norm": True, "rank": 3},
    "linear": {"latent": "linear"},
    "residual": {"latent": "residual"},
    "residual, rank": {"latent": "residual", "rank": 3},
    "tied": {"weight": nn.Parameter(0.1 * torch.randn(V, D))},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("made", HEADS.values(), ids=HEADS)
def test_growing_keeps_the_function(kind, made, m):
    torch.manual_seed(1)
    head = kind(D, V, K, **made)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    _, hidden, target = trained()
    before = {name: (p, p.clone()) for name, p in head.named_parameters()}
    grown = head.grow(m)
    assert type(grown) is kind and grown.n_experts == m * K and f"n_experts={m * K}" in repr(grown)
    assert grown.decoder.weight is head.decoder.weight and grown.decoder.bias is head.decoder.bias
    assert grown.tied == head.tied and head.n_experts == K
    assert all(p is q and torch.equal(p, value) for p, (q, value) in zip(head.parameters(), before.values()))
    own = {id(p) for name, p in grown.named_parameters() if not name.startswith("decoder")}
    assert not own & {id(p) for p in head.parameters()}
    with torch.no_grad():
        assert abs(grown(hidden, target).loss - head(hidden, target).loss) < 1e-6
        assert torch.allclose(grown.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=1e-5)
    fresh = kind(D, V, m * K, **made)
    fresh.load_state_dict(grown.state_dict())
    assert torch.equal(fresh.log_prob(hidden), grown.log_prob(hidden))


def test_a_grown_head_respects_what_is_frozen():
    head = MoS(D, V, K, rank=3)
    head.latent.requires_grad_(False)
    grown = head.eval().grow(2, noise=0.1)
    assert not grown.training and grown.prior.weight.requires_grad
    assert not any(p.requires_grad for p in grown.latent.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_part(options, dtype):
    linear, hidden, target = trained(dtype)
    grown = MoS.from_linear(linear, 1, **options).grow(K)
    assert distance(grown, hidden) < 1e-6
    train(grown, hidden, target)
    assert distance(grown, hidden) > 0.05


def test_copies_with_noise():
    _, hidden, target = trained()
    head = MoS(D, V, 1, latent="linear")
    moved = head.grow(64, noise=0.1).mixture(hidden)[0] - head.mixture(hidden)[0]
    relative = moved.norm(dim=-1).square().mean().sqrt() / hidden.norm(dim=-1).square().mean().sqrt()
    assert abs(relative / 0.1 - 1) < 0.1


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Embedding(V, D), TypeError, "linear must be a plain nn.Linear, but it is a torch.nn.modules.sparse.Emb"),
        (nn.Linear(D, V).weight, TypeError, "linear must be a plain nn.Linear, but it is a torch.nn.parameter.Param"),
        (
            parametrizations.weight_norm(nn.Linear(D, V)),
            TypeError,
            "linear must have a floating-point Parameter as its weight, got a Tensor of torch.float32 computed by a ",
        ),
    ],
)
def test_what_is_no_linear_layer(linear, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MoS.from_linear(linear, K)


def test_a_layer_with_more_to_it():
    linear = nn.Linear(D, V)
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="linear must be a plain nn.Linear, but it has the hook"):
        MoS.from_linear(linear, K)
    quantized = nn.Linear(D, V)
    quantized.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="linear must have a floating-point Parameter .* got a Tensor of torch.int8"):
        MoS.from_linear(quantized, K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "n_experts must be at least 1, got 0"),
        ({"rank": D + 1}, "rank must be at most min(in_features, latent_features) = 32, got 33"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
        ({"noise": float("nan")}, "noise must be at least 0 and finite, got nan"),
        ({"input_rms": 0.0}, "input_rms must be positive and finite, got 0.0"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"softcap": 0.0}, "softcap must be between"),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoS.from_linear(nn.Linear(D, V), **{"n_experts": K, **options})


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (MoS(D, V, K), {"m": 0}, "m must be at least 1, got 0"),
        (MoS(D, V, K), {"m": 2, "noise": -1}, "noise must be at least 0 and finite, got -1"),
        (MoS(D, V, K), {"m": 2, "input_rms": -1}, "input_rms must be positive and finite, got -1"),
        (MoS(D, V, K, n_external=1), {"m": 2}, "grow needs a head with n_external = 0, got 1"),
    ],
)
def test_what_does_not_grow(head, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        head.grow(**options)
