"""The heads against a plain restatement of the paper's equations, and their interface."""

import copy

import pytest
import torch
from torch import nn

import fused_mos
from fused_mos import _backends

H, V, K, D = 9, 61, 4, 7


def _paper(head: str, state: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, V), written as in sections 2.1, 2.3 and 2.4 of the paper, one token and expert at a time."""
    rows = []
    for h_t in h:
        if head == "Softmax":
            rows.append(torch.softmax(state["decoder.weight"] @ h_t + state["decoder.bias"], 0))
            continue
        prior = torch.softmax(state["prior.weight"] @ h_t, 0)
        contexts = [
            torch.tanh(w @ h_t + c) for w, c in zip(state["latent.0.weight"].split(D), state["latent.0.bias"].split(D))
        ]
        if head == "MoC":
            context = sum(p * c for p, c in zip(prior, contexts))
            rows.append(torch.softmax(state["decoder.weight"] @ context + state["decoder.bias"], 0))
        else:
            rows.append(
                sum(
                    p * torch.softmax(state["decoder.weight"] @ c + state["decoder.bias"], 0)
                    for p, c in zip(prior, contexts)
                )
            )
    return torch.stack(rows)


def _make(head: str, **options) -> nn.Module:
    if head == "Softmax":
        return fused_mos.Softmax(H, V, **options)
    return getattr(fused_mos, head)(H, V, K, D, **options)


HEADS = ["Softmax", "MoS", "MoC"]


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
@pytest.mark.parametrize("head", HEADS)
def test_restates_the_paper_with_all_gradients(head, backend):
    module = _make(head, backend=backend, dtype=torch.float64)
    nn.init.normal_(module.decoder.bias)
    h = torch.randn(12, H, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, (12,))
    probability = _paper(head, dict(module.named_parameters()), h)
    expected = -probability.gather(1, target[:, None]).log().mean()
    parameters = [h, *module.parameters()]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    output, loss = module(h, target)
    assert torch.allclose(loss, expected, rtol=0, atol=1e-12)
    assert torch.allclose(output, probability.gather(1, target[:, None])[:, 0].log(), rtol=0, atol=1e-12)
    assert torch.allclose(module.log_prob(h), probability.log(), rtol=0, atol=1e-11)
    assert torch.equal(module.predict(h), probability.argmax(-1))
    for a, b in zip(torch.autograd.grad(loss, parameters, allow_unused=True), wanted):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0,)], ids=str)
def test_any_leading_shape(head, shape):
    module = _make(head)
    h, target = torch.randn(*shape, H), torch.randint(0, V, shape)
    output, loss = module(h, target, reduction="none")
    assert output.shape == loss.shape == shape
    assert torch.equal(output, -loss)
    assert module(h, target, reduction="sum").loss.shape == ()
    assert module.log_prob(h).shape == (*shape, V)
    assert module.predict(h).shape == module.sample(h).shape == shape
    values, indices = module.topk(h, 3)
    assert values.shape == indices.shape == (*shape, 3)
    assert torch.equal(indices[..., 0], module.predict(h))
    assert torch.allclose(module.log_prob(h).gather(-1, target[..., None])[..., 0], output, atol=1e-5)


def test_ignored_targets():
    module = _make("MoS")
    h, target = torch.randn(6, H), torch.randint(0, V, (6,))
    target[2] = -100
    output, loss = module(h, target)
    assert output[2] == 0
    assert torch.allclose(loss, -output.sum() / 5)


def test_sample_uses_the_generator_and_temperature():
    module = _make("MoS", dtype=torch.float64)
    h = torch.randn(400, H, dtype=torch.float64)
    first = module.sample(h, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, module.sample(h, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, module.sample(h, generator=torch.Generator().manual_seed(6)))
    nn.init.normal_(module.prior.weight, std=1e5)  # one expert per token, whose best word a cold sample must be
    assert torch.equal(module.sample(h, temperature=1e-7), module.predict(h))


def test_parameters_are_named_as_in_the_published_code():
    expected = {"prior.weight", "latent.0.weight", "latent.0.bias", "decoder.weight", "decoder.bias"}
    assert set(_make("MoS").state_dict()) == set(_make("MoC").state_dict()) == expected
    assert set(_make("Softmax").state_dict()) == {"decoder.weight", "decoder.bias"}
    assert set(_make("MoS", bias=False).state_dict()) == expected - {"decoder.bias"}


def test_initialisation_is_the_papers():
    module = fused_mos.MoS(400, 5_000, 3, 100)
    assert module.decoder.weight.min() < -0.0999 and 0.0999 < module.decoder.weight.max() <= 0.1
    assert module.decoder.bias.eq(0).all()
    assert module.prior.weight.abs().max() <= 1 / 20  # torch's default for 400 inputs


def test_defaults():
    module = fused_mos.MoS(16, 30)
    assert module.n_experts == 10 and module.decoder.in_features == 16 and module.decoder.bias is not None


def small_embedding(**options) -> nn.Embedding:
    embedding = nn.Embedding(V, D, **options)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    return embedding


def test_tied_weight_is_the_embedding():
    embedding = small_embedding()
    before = embedding.weight.detach().clone()
    module = fused_mos.MoS(H, V, K, weight=embedding.weight)
    assert module.decoder.weight is embedding.weight and torch.equal(embedding.weight, before)
    module.reset_parameters()
    assert torch.equal(embedding.weight, before)
    module(torch.randn(3, H), torch.tensor([1, 2, 3])).loss.backward()
    assert embedding.weight.grad.abs().sum() > 0


def test_a_tied_head_is_what_its_weight_is():
    for head in (fused_mos.MoS, fused_mos.MoC):
        module = head(H, V, K, weight=small_embedding(dtype=torch.bfloat16).weight)
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
        module(torch.randn(3, H).bfloat16(), torch.tensor([1, 2, 3])).loss.backward()
        module = head(H, V, K, weight=nn.Embedding(V, D, device="meta").weight)
        assert all(p.device.type == "meta" for p in module.parameters())
    module = fused_mos.Softmax(D, V, weight=small_embedding(dtype=torch.float64).weight, device="cpu")
    assert all(p.dtype == torch.float64 for p in module.parameters())
    for wrong in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        with pytest.raises(
            ValueError, match="device and dtype must be those of weight, cpu and torch.float32, or None, got"
        ):
            fused_mos.MoS(H, V, K, weight=nn.Embedding(V, D).weight, **wrong)


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = small_embedding()
        self.head = fused_mos.MoS(H, V, K, weight=self.embedding.weight)


def broken_by_to_empty(model):
    with torch.device("meta"):
        model = TiedModel()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0**99)  # as uninitialised memory may be
    return model


def broken_by_assignment(model):
    model.load_state_dict(TiedModel().state_dict(), assign=True)
    return model


@pytest.mark.parametrize("breaking", [broken_by_to_empty, broken_by_assignment])
def test_a_tie_that_torch_breaks_is_told_and_tied_again(breaking):
    with pytest.warns(UserWarning, match=r"makes two parameters of a tied weight.*head.tie\(embedding.weight\)"):
        model = breaking(TiedModel())
    head = model.head
    assert not head.tied and "tied" not in repr(head) and head.decoder.weight is not model.embedding.weight
    head.reset_parameters()
    assert head.decoder.weight.abs().max() <= 0.1, "it has nobody else to initialise it"
    head.tie(model.embedding.weight)
    before = model.embedding.weight.detach().clone()
    head.reset_parameters()
    assert head.tied and head.decoder.weight is model.embedding.weight and torch.equal(before, head.decoder.weight)
    with pytest.raises(ValueError, match=r"weight must be \(n_classes, latent_features\) = \(61, 7\), got \(7, 61\)"):
        head.tie(nn.Parameter(torch.zeros(D, V)))


@pytest.mark.filterwarnings("error")
def test_a_tie_that_lasts():
    model = TiedModel()
    for moved in (model.to(torch.float64), model.half().float(), copy.deepcopy(model), model.cpu()):
        assert moved.head.tied and moved.head.decoder.weight is moved.embedding.weight
    model.load_state_dict(TiedModel().state_dict())
    with torch.device("meta"):
        other = TiedModel()
    other.head.load_state_dict({}, strict=False, assign=True)
    assert model.head.tied and other.head.tied
    nn.Module.to_empty(fused_mos.MoS(H, V, K, D, device="meta"), device="cpu")  # one that never was tied


def test_device_and_dtype():
    module = fused_mos.MoS(H, V, K, D, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in module.parameters())


def test_backends_are_told_with_reasons():
    table = fused_mos.backends()
    assert table["reference"] == table["tiled"] == "available"
    for name, reason in table.items():
        if not reason.startswith("available"):
            with pytest.raises(RuntimeError, match=f"'{name}' is not available: .*{reason[:20]}"):
                _make("MoS", backend=name)(torch.randn(1, H), torch.tensor([0]))


def test_a_clone_without_compiled_kernels_is_named(tmp_path, monkeypatch):
    """pip install . compiles them elsewhere, and commands in the clone import the clone's files."""
    monkeypatch.setattr(_backends, "__file__", str(tmp_path / "fused_mos" / "_backends" / "__init__.py"))
    (tmp_path / "fused_mos").mkdir()
    assert (
        _backends._why_missing("_cpu", ImportError("not there"))
        == f"{tmp_path / 'fused_mos'}, which Python imports, has no compiled _cpu; pip install -e . in its clone "
        "compiles it there"
    )
    (tmp_path / "fused_mos" / "_cpu.cpython-311-x86_64-linux-gnu.so").touch()
    assert (
        _backends._why_missing("_cpu", ImportError("undefined symbol"))
        == "the native kernels cannot be loaded: undefined symbol"
    )
    (tmp_path / "fused_mos" / "_cpu_missing.txt").write_text("no compiler\n")
    assert _backends._why_missing("_cpu", ImportError("not there")) == "no compiler"


def test_mos_has_a_higher_rank_than_softmax_and_moc():
    """The point of it all (sections 2.2 to 2.4): a softmax's log-probabilities, and MoC's, have rank at most d + 1
    (the normaliser adds one), a mixture's are not so limited."""
    contexts = torch.randn(60, H, dtype=torch.float64) * 3
    ranks = {}
    for head in HEADS:
        module = _make(head, dtype=torch.float64)
        nn.init.normal_(module.decoder.weight)
        ranks[head] = torch.linalg.matrix_rank(module.log_prob(contexts).detach(), rtol=1e-10).item()
    assert ranks["Softmax"] <= H + 2 and ranks["MoC"] <= D + 2
    assert ranks["MoS"] >= 55
