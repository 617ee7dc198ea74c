"""AWD-LSTM against a plain restatement of the paper's equations, and the published code's names and sizes."""

import dataclasses
from typing import get_args

import pytest
import torch
from restated import restated
from torch import nn

from fused_mos._latents import KINDS
from fused_mos.lm import AWDLSTM
from fused_mos.lm.awd_lstm import activation_regularization, temporal_activation_regularization
from fused_mos.training import RECIPES
from fused_mos.training.config import LatentName

V, D, K = 23, 6, 3
NO_DROPOUT = dict.fromkeys(("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop"), 0.0)


def make(head="mos", **options):
    model = AWDLSTM(V, D, (9, 8), head, K, **{**NO_DROPOUT, **options}).double()
    nn.init.normal_(model.head.decoder.bias)
    return model


@pytest.mark.parametrize("head", ["mos", "moc", "softmax"])
def test_restates_the_paper_with_all_gradients(head):
    model = make(head)
    tokens, target = torch.randint(0, V, (5, 4)), torch.randint(0, V, (5, 4))
    probability = restated(model, head, tokens, K).probability
    expected = -probability.gather(2, target[..., None]).log().mean()
    output = model(tokens, target)
    assert torch.allclose(output.loss, expected, rtol=0, atol=1e-12)
    assert torch.allclose(output.loss, -output.log_likelihood.mean(), rtol=0, atol=1e-12)
    assert torch.allclose(model.log_prob(tokens), probability.log(), rtol=0, atol=1e-11)
    names, parameters = zip(*model.named_parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for name, a, b in zip(names, torch.autograd.grad(output.loss, parameters), wanted):
        assert torch.allclose(a, b, rtol=0, atol=1e-12), name


def test_the_published_codes_names_load():
    source, model = make(), make()
    published = {}
    for name, tensor in source.state_dict().items():
        name = name.removeprefix("head.")
        if name.startswith("rnns."):
            _, layer, weight = name.split(".")
            name = f"rnns.{layer}.module.{weight}" + ("_raw" if weight == "weight_hh_l0" else "")
        published[name] = tensor
    assert {
        "encoder.weight",
        "rnns.1.module.weight_hh_l0_raw",
        "rnns.0.module.bias_hh_l0",
        "prior.weight",
        "latent.0.bias",
        "decoder.weight",
        "decoder.bias",
    } <= published.keys()
    model.load_state_dict(published, strict=True)
    tokens = torch.randint(0, V, (5, 2))
    assert torch.equal(model.log_prob(tokens), source.log_prob(tokens))
    model.load_state_dict(source.state_dict(), strict=True)
    assert len(published) == len(source.state_dict()), "loading must not change the caller's dictionary"


@pytest.mark.parametrize(
    ("recipe", "words", "parameters"), [("ptb", 10_000, 21_500_620), ("wikitext2", 33_278, 34_909_528)]
)
def test_the_papers_parameter_counts(recipe, words, parameters):
    with torch.device("meta"):
        model = AWDLSTM(words, **dataclasses.asdict(RECIPES[recipe]().model))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_hidden_states_carry_over_segments():
    model = make(dropouti=0.5, dropout=0.5, wdrop=0.5, dropoute=0.5, dropouth=0.5, dropoutl=0.5).eval()
    tokens = torch.randint(0, V, (7, 3))
    _, _, last = model.features(tokens)
    _, _, hidden = model.features(tokens[:3])
    _, _, end = model.features(tokens[3:], hidden)
    first, second = model.log_prob(tokens[:3]), model.log_prob(tokens[3:], hidden)
    assert torch.allclose(torch.cat([first, second]), model.log_prob(tokens), rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for x, y in zip(last, end) for a, b in zip(x, y))
    assert not torch.allclose(model.log_prob(tokens[3:]), second)


def test_regularisers_are_the_papers():
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    assert activation_regularization(x).item() == pytest.approx(sum(v**2 for v in x.flatten().tolist()) / 24)
    assert temporal_activation_regularization(x).item() == pytest.approx((x.diff(dim=0) ** 2).mean().item())
    assert temporal_activation_regularization(x[:1]).item() == 0


def test_tying():
    tied, untied = make(), make(tied=False)
    assert tied.head.decoder.weight is tied.encoder.weight
    assert untied.head.decoder.weight is not untied.encoder.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "linear"}, "head must be one of mos, moc, softmax, got 'linear'"),
        ({"dropouti": 1.0}, r"dropouti must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("head", ["mos", "moc"])
@pytest.mark.parametrize("options", [{"latent": "linear", "rank": 4}, {"latent_norm": True}, {"latent": "residual"}])
def test_the_head_gets_its_kind_of_latent_vectors(head, options):
    widths = (9, D if "residual" in options.values() else 8)
    model = AWDLSTM(V, D, widths, head, K, **NO_DROPOUT, **options)
    made = model.head
    wanted = {"latent": "tanh", "latent_norm": False, "rank": None} | options
    assert {"latent": made.latent_kind, "latent_norm": made.latent_norm, "rank": made.rank} == wanted
    tokens, target = torch.randint(0, V, (5, 4)), torch.randint(0, V, (5, 4))
    model(tokens, target).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("mos", {"rank": 7}, r"rank must be at most min\(the last of hidden_sizes, embedding_size\) = 6, got 7"),
        ("mos", {"rank": 0}, "rank must be at least 1, got 0"),
        ("moc", {"latent": "residual"}, "embedding_size must be the last of hidden_sizes, got 6 and 8"),
        ("mos", {"latent": "relu"}, "latent must be one of tanh, linear, residual, got 'relu'"),
        ("softmax", {"latent": "linear"}, "latent is for mixtures: it must be tanh where head is softmax, got linear"),
        ("softmax", {"latent_norm": True}, "latent_norm is for mixtures: it must be False"),
        ("softmax", {"rank": 2}, "rank is for mixtures: it must be None where head is softmax, got 2"),
    ],
)
def test_latent_vectors_that_cannot_be(head, options, message):
    with pytest.raises(ValueError, match=message):
        make(head, **options)


def test_the_trainers_know_all_kinds():
    assert get_args(LatentName) == KINDS
