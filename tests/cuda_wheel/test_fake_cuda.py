"""Every function and head on fake CUDA tensors: called, compiled and exported without a device."""

import itertools

import fake_cuda
import pytest
import torch
from fake_cuda import D, H, K, N, V, assert_like, fake_inputs
from torch import nn
from torch._subclasses import FakeTensorMode

from fused_mos import MoC, MoS, Softmax, _backends
from fused_mos import functional as F

pytestmark = fake_cuda.only_without_a_device

BACKENDS = [name for name in _backends.NAMES if name != "cpu" and not _backends.why_absent(name)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINED = ("latent", "prior_logits", "weight", "bias")

FUNCTIONS = {  # name -> (function of the inputs and a backend, shape and dtype of its result, inputs with a gradient)
    **{
        f"nll, {reduction}": (
            lambda i, backend, reduction=reduction: F.mos_nll_loss(**i, reduction=reduction, backend=backend),
            ((N,) if reduction == "none" else (), torch.float32),
            TRAINED,
        )
        for reduction in F.REDUCTIONS
    },
    "log_prob": (lambda i, backend: F.mos_log_prob(**_of(i), backend=backend), ((N, V), torch.float32), TRAINED),
    "logsumexp": (
        lambda i, backend: F.mos_logsumexp(i["latent"], i["weight"], i["bias"], backend=backend),
        ((N, K), torch.float32),
        ("latent", "weight", "bias"),
    ),
    "predict": (lambda i, backend: F.mos_predict(**_of(i), backend=backend), ((N,), torch.int64), ()),
    "topk values": (lambda i, backend: F.mos_topk(**_of(i), k=4, backend=backend).values, ((N, 4), torch.float32), ()),
    "topk indices": (lambda i, backend: F.mos_topk(**_of(i), k=4, backend=backend).indices, ((N, 4), torch.int64), ()),
    "sample": (lambda i, backend: F.mos_sample(**_of(i), backend=backend), ((N,), torch.int64), ()),
}

HEADS = {
    "mos": lambda backend: MoS(H, V, K, D, latent_dropout=0.2, backend=backend),
    "moc": lambda backend: MoC(H, V, K, D, backend=backend),
    "softmax": lambda backend: Softmax(H, V, backend=backend),
}


class Method(nn.Module):
    """A head's method as a module, which is what torch.export takes."""

    METHODS = {
        "loss": lambda head, x, target: head(x, target).loss,
        "losses": lambda head, x, target: head(x, target, reduction="none").loss,
        "log_prob": lambda head, x, target: head.log_prob(x),
        "predict": lambda head, x, target: head.predict(x),
        "topk": lambda head, x, target: head.topk(x, 4),
        "sample": lambda head, x, target: head.sample(x),
    }
    SHAPES = {
        "loss": ((), torch.float32),
        "losses": ((4, 5), torch.float32),
        "log_prob": ((4, 5, V), torch.float32),
        "predict": ((4, 5), torch.int64),
        "topk": ((4, 5, 4), torch.float32),
        "sample": ((4, 5), torch.int64),
    }

    def __init__(self, head: nn.Module, name: str):
        super().__init__()
        self.head, self.method = head, self.METHODS[name]

    def forward(self, x, target):
        return self.method(self.head, x, target)


def _of(inputs):
    return {name: tensor for name, tensor in inputs.items() if name != "target"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Graphs of each test's own, and a backward pass that needs no device."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.autograd, "grad", fake_cuda.grad)


def check(compute, inputs, backend, expected, trained, dtype):
    result = compute(inputs, backend)
    assert_like(result, *expected)
    if trained:
        gradients = torch.autograd.grad(result.sum(), [inputs[name] for name in trained])
        for name, gradient in zip(trained, gradients):
            assert_like(gradient, tuple(inputs[name].shape), dtype)


def test_the_backward_pass_in_python_is_that_of_torch(monkeypatch):
    """On the CPU, where both can run."""
    head = MoS(H, V, K, D, backend="tiled")
    x, target = torch.randn(4, 5, H, requires_grad=True), torch.randint(V, (4, 5))
    tensors = [x, *head.parameters()]

    def gradients(engine):
        output, loss = head(x, target)
        return engine(loss + (output * output).mean(), tensors)

    ours = gradients(fake_cuda.grad)
    monkeypatch.undo()
    for a, b in zip(ours, gradients(torch.autograd.grad), strict=True):
        torch.testing.assert_close(a, b)


def test_the_backends_are_there():
    assert {"reference", "tiled", "triton"} < set(BACKENDS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "name"), list(itertools.product(BACKENDS, FUNCTIONS)))
def test_functions(backend, name, dtype):
    compute, expected, trained = FUNCTIONS[name]
    with FakeTensorMode():
        check(compute, fake_inputs(dtype), backend, expected, trained, dtype)


@pytest.mark.parametrize(("backend", "name"), list(itertools.product(BACKENDS, FUNCTIONS)))
def test_functions_compile_without_a_graph_break(backend, name):
    compute, expected, trained = FUNCTIONS[name]
    with FakeTensorMode():
        compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
        check(compiled, fake_inputs(torch.bfloat16), backend, expected, trained, torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("backend", "head"), list(itertools.product(BACKENDS, HEADS)))
def test_heads(backend, head, compiled, autocast):
    """A training step; under autocast the parameters' gradients stay float32."""
    with FakeTensorMode(), torch.device("cuda"):
        module = HEADS[head](backend)
        x, target = torch.randn(4, 5, module.in_features, requires_grad=True), torch.zeros(4, 5, dtype=torch.int64)
        step = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        with fake_cuda.autocast(autocast):
            output, loss = step(x, target)
        assert_like(output, (4, 5), torch.float32)
        assert_like(loss, (), torch.float32)
        for tensor, gradient in zip(tensors := [x, *module.parameters()], torch.autograd.grad(loss, tensors)):
            assert_like(gradient, tuple(tensor.shape), torch.float32)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("backend", "name"), list(itertools.product(BACKENDS, Method.METHODS)))
def test_heads_export(backend, name, head):
    with FakeTensorMode(), torch.device("cuda"):
        module = Method(HEADS[head](backend).eval(), name)
        inputs = torch.randn(4, 5, module.head.in_features), torch.zeros(4, 5, dtype=torch.int64)
        exported = torch.export.export(module, inputs, strict=True)
        (result, *_) = [node.meta["val"] for node in exported.graph.output_node().args[0]]
    assert_like(result, *Method.SHAPES[name])
