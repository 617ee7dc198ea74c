"""Decoders that are not a plain nn.Linear: refused by name, or used once in a forward pass."""

import warnings

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_mos import MoC, MoS, Softmax
from fused_mos.lm.experts import expert_shares

H, V, K, D = 6, 23, 3, 5


class Adapter(nn.Module):
    """As peft wraps a layer, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)

    in_features = property(lambda self: self.base.in_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Quantized(nn.Linear):
    """As quantization-aware training replaces a layer."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(), self.bias)


def old_weight_norm(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(head.decoder)


def quantized(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head.decoder = torch.ao.quantization.quantize_dynamic(head, {nn.Linear}).decoder


def replaced(kind):
    def wrap(head):
        head.decoder = kind(head.decoder) if kind is Adapter else kind(D, V)

    return wrap


def own_forward(head):
    head.decoder.forward = lambda x: x


class TwoTensorWeight:
    """A weight of a tensor subclass, as torchao and DTensor put into a layer."""

    def __call__(self, head):
        from torch.testing._internal.two_tensor import TwoTensor

        weight = head.decoder.weight.detach()
        head.decoder.weight = nn.Parameter(TwoTensor(weight, weight.clone()))


WRAPPED = {
    "adapter": (replaced(Adapter), r"it is a test_decoder.Adapter; merge an adapter \(merge_and_unload\)"),
    "quantization-aware": (replaced(Quantized), "it is a test_decoder.Quantized"),
    "quantize_dynamic": (quantized, "it is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "tensor subclass": (TwoTensorWeight(), "it has a weight that is a TwoTensor"),
    "pruning": (lambda head: prune.l1_unstructured(head.decoder, "weight", 0.5), "it has the hook L1Unstructured"),
    "old weight_norm": (old_weight_norm, "it has the hook WeightNorm"),
    "old spectral_norm": (lambda head: nn.utils.spectral_norm(head.decoder), "it has the hook SpectralNorm"),
    "forward hook": (lambda head: head.decoder.register_forward_hook(print), "it has the hook print"),
    "forward pre-hook": (lambda head: head.decoder.register_forward_pre_hook(print), "it has the hook print"),
    "backward hook": (lambda head: head.decoder.register_full_backward_hook(print), "it has the hook print"),
    "backward pre-hook": (lambda head: head.decoder.register_full_backward_pre_hook(print), "it has the hook print"),
    "own forward": (own_forward, "it has a forward of its own"),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_would_be_ignored_is_refused_by_every_method(wrap):
    head = MoS(H, V, K, D)
    x, target = torch.randn(4, H), torch.randint(V, (4,))
    change, message = WRAPPED[wrap]
    change(head)
    for call in (
        lambda: head(x, target),
        lambda: head.log_prob(x),
        lambda: head.predict(x),
        lambda: head.topk(x, 2),
        lambda: head.sample(x),
        lambda: expert_shares(head, x[None], target[None]),
    ):
        with pytest.raises(TypeError, match="decoder must be a plain nn.Linear, .* but " + message):
            call()


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    head = MoS(H, V, K, D)
    fully_shard(head.decoder)
    with pytest.raises(TypeError, match="plain nn.Linear"):
        head.sample(torch.randn(2, H))
    head = MoS(H, V, K, D)
    fully_shard(head)
    head(torch.randn(2, H), torch.tensor([0, 1])).loss.backward()
    head = fully_shard(MoS(H, V, K, D))
    with pytest.raises(TypeError, match="plain nn.Linear.*it has a weight that is a DTensor"):
        head.sample(torch.randn(2, H))


def test_a_sharded_decoder_is_refused():
    run_on_ranks(2, fully_sharded)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return 2 * weight


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("head_type", [MoS, MoC, Softmax])
def test_parametrizations_work_and_are_applied_once(head_type, backend):
    head = head_type(H, V, backend=backend) if head_type is Softmax else head_type(H, V, K, D, backend=backend)
    counted = Counted()
    plain = head.decoder.weight.detach().clone()
    parametrize.register_parametrization(head.decoder, "weight", counted)
    x, target = torch.randn(4, H), torch.randint(V, (4,))
    for call in (
        lambda: head(x, target),
        lambda: head.log_prob(x),
        lambda: head.predict(x),
        lambda: head.topk(x, 2),
        lambda: head.sample(x),
    ):
        counted.count = 0
        call()
        assert counted.count == 1
    twin = head_type(H, V) if head_type is Softmax else head_type(H, V, K, D)
    twin.load_state_dict({n: p for n, p in head.state_dict().items() if "parametrizations" not in n}, strict=False)
    twin.decoder.weight = nn.Parameter(2 * plain)
    for _ in range(2):  # a second step must not meet the first one's graph
        head.zero_grad()
        twin.zero_grad()
        head(x, target).loss.backward()
        twin(x, target).loss.backward()
    grad = head.decoder.parametrizations.weight.original.grad
    torch.testing.assert_close(grad, 2 * twin.decoder.weight.grad)


def test_weight_norm_trains():
    head = MoS(H, V, K, D)
    parametrizations.weight_norm(head.decoder)
    x, target = torch.randn(4, H), torch.randint(V, (4,))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = head(x, target).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_subclass_that_adds_nothing_is_plain():
    class Named(nn.Linear):
        pass

    head = MoS(H, V, K, D)
    head.decoder = Named(D, V)
    head(torch.randn(4, H), torch.randint(V, (4,)))


def test_the_check_compiles():
    head = MoS(H, V, K, D)
    x, target = torch.randn(4, H), torch.randint(V, (4,))
    compiled = torch.compile(lambda x: head(x, target).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x, target).loss)
    head.decoder.register_forward_hook(print)
    with pytest.raises(TypeError, match="it has the hook print"):
        torch.compile(lambda x: head(x, target).loss, backend="aot_eager")(x)
