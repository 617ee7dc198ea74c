"""The head in CUDA graphs made in every way: replays on new inputs give the same bits as ordinary calls."""

import copy

import pytest
import torch
import torch.distributed as dist
from backends import ON_GPU, TRITON

import fused_mos
from fused_mos.vocab_parallel import parallelize

pytestmark = pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU")

T, B, H, V, K, D = 6, 16, 64, 1_000, 5, 40

CALLS = {
    "log_prob": lambda head, x: head.log_prob(x),
    "predict": lambda head, x: head.predict(x),
    "topk": lambda head, x: tuple(head.topk(x, 7)),
}


@pytest.fixture(autouse=True)
def on_gpu():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["tiled", TRITON])
def head(request):
    return fused_mos.MoS(H, V, K, D, backend=request.param)


@pytest.fixture
def x():
    return torch.randn(T, B, H, requires_grad=True)


@pytest.fixture
def target():
    return torch.randint(V, (T, B))


def captured(function, *generators):
    """A graph of the function, and what replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def replace(x, target=None):
    """Other values in the same memory."""
    with torch.no_grad():
        x.normal_()
        if target is not None:
            target.random_(V)


def check_replays(function, x, target=None):
    graph, result = captured(function)
    for _ in range(2):
        replace(x, target)
        graph.replay()
        replayed = [tensor.clone() for tensor in result]
        for one, other in zip(replayed, function(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_and_backward(reduction, precision, head, x, target):
    inputs = [x, *head.parameters()]

    def step():
        enabled = precision == torch.bfloat16
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled, cache_enabled=False):
            loss = head(x, target, reduction=reduction).loss.sum()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    check_replays(step, x, target)


@pytest.mark.parametrize("call", CALLS)
def test_forward(call, head, x):
    function = CALLS[call]

    def step():
        with torch.no_grad():
            result = function(head, x)
        return result if isinstance(result, tuple) else (result,)

    check_replays(step, x)


@pytest.mark.parametrize("limits", [{}, {"top_k": 20, "top_p": 0.9}], ids=["all classes", "some classes"])
def test_samples_go_on_with_the_default_generator(limits, head, x):
    x = x.detach()
    graph, result = captured(lambda: head.sample(x, **limits))
    torch.manual_seed(5)
    expected = [head.sample(x, **limits) for _ in range(3)]
    assert not torch.equal(expected[0], expected[1])
    torch.manual_seed(5)
    for one in expected:
        graph.replay()
        assert torch.equal(result, one)


def test_samples_go_on_with_a_generator_that_is_registered(head, x):
    x, generator = x.detach(), torch.Generator("cuda")
    graph, result = captured(lambda: head.sample(x, generator=generator), generator)
    generator.manual_seed(5)
    expected = [head.sample(x, generator=generator) for _ in range(3)]
    assert not torch.equal(expected[0], expected[1])
    generator.manual_seed(5)
    for one in expected:
        graph.replay()
        assert torch.equal(result, one)


class MeanLoss(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x, target):
        return self.head(x, target).loss


def test_make_graphed_callables(head, x, target):
    model = MeanLoss(head)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x.detach().clone().requires_grad_(), target))
    for _ in range(2):
        replace(x, target)
        results = []
        for module in (model, graphed):
            loss = module(x, target)
            results.append([loss.detach().clone(), *torch.autograd.grad(loss, [x, *module.parameters()])])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_compiled_to_reduce_overhead(head, x, target):
    """Inductor makes the graphs, and leaves none out."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, inputs = MeanLoss(head), [x, *head.parameters()]
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # one runs, one is captured, the others are replayed
        replace(x, target)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x, target)
        gradients = torch.autograd.grad(loss, inputs)
        replayed = [loss.detach().clone(), *(gradient.clone() for gradient in gradients)]
        expected = model(x, target)
        for one, other in zip(replayed, [expected, *torch.autograd.grad(expected, inputs)], strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.fixture
def group_of_one():
    if not (dist.is_available() and dist.is_nccl_available()):
        pytest.skip("torch has no NCCL")
    torch.set_default_device(None)  # the group's own tensors are on the CPU
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_default_device("cuda")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("call", ["loss", *CALLS])
def test_a_shard_of_the_vocabulary(call, group_of_one, head, x, target):
    """The exchanges of a group, if only of one rank, are part of the graph."""
    parallelize(head)
    inputs = [x, *head.parameters()]

    def step():
        if call == "loss":
            loss = head(x, target).loss
            return [loss.detach(), *torch.autograd.grad(loss, inputs)]
        with torch.no_grad():
            result = CALLS[call](head, x)
        return result if isinstance(result, tuple) else (result,)

    check_replays(step, x, target)
