"""The custom ops: gradcheck, opcheck, torch.compile, torch.export, autocast, and memory."""

import contextlib

import pytest
import torch
from backends import CPU, ON_GPU, TRITON, _cpu, configurations, cpu
from problem import EXACT, INPUTS, problem
from torch._subclasses import FakeTensorMode

import fused_mos
from fused_mos import functional as F
from fused_mos import ops
from fused_mos._backends import tiled_products

N, K, D, V = 5, 3, 4, 90
NEEDS = [True, True, True, True]


def _arguments(dtype=torch.float64):
    case = problem(N, K, D, V).to(dtype)
    return case, case.inputs()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_nll(reduction, workspace):
    case, inputs = _arguments()
    assert torch.autograd.gradcheck(
        lambda z, a, w, b: F.mos_nll_loss(z, a, w, case.target, b, reduction=reduction), inputs
    )


def test_gradcheck_log_prob_and_logsumexp(workspace):
    _, (z, a, w, b) = _arguments()
    assert torch.autograd.gradcheck(F.mos_log_prob, (z, a, w, b))
    assert torch.autograd.gradcheck(F.mos_logsumexp, (z, w, b))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("bias", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=["bias float32", "no bias bfloat16"]
)
@pytest.mark.parametrize("backend", ["tiled", TRITON, CPU])
def test_opcheck(bias, dtype, backend):
    """Schema, autograd registration, fake kernel, and AOT dispatch with dynamic shapes."""
    case = problem(N, K, D, V, bias=bias).to(dtype)
    z, a, w, b = case.inputs()
    needs = [True, True, True, bias]
    maximum, log_total, target_logit = torch.full((N, K), 3.0), torch.ones(N, K), torch.randn(N, K)
    checks = {
        ops.nll: (z, a, w, b, case.target, -100, 0.0, backend),
        ops.nll_with_gradients: (z, a, w, b, case.target, -100, 0.0, True, needs, backend),
        ops.logsumexp: (z, w, b, backend),
        ops.log_prob: (z, a, w, b, backend),
    }
    for op, arguments in checks.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    z, a, w, b = case.to(dtype, ()).inputs()
    log_prior, seed = torch.randn(N, K).log_softmax(-1), torch.tensor([5])
    checks = {
        ops.nll_backward: (
            torch.randn(N),
            z,
            a,
            w,
            b,
            case.target,
            maximum,
            log_total,
            target_logit,
            -100,
            0.0,
            needs,
            backend,
        ),
        ops.logsumexp_backward: (torch.randn(N, K), z, w, b, maximum, log_total, [True, True, bias], backend),
        ops.log_prob_backward: (torch.randn(N, V), z, a, w, b, maximum, log_total, needs, backend),
        ops.normalisers: (z, a, w, b, backend),
        ops.row_statistics: (z, w, b, case.target.clamp(0), backend),
        ops.mixture_log_prob: (z, log_prior, w, b, maximum, log_total, backend),
        ops.mixture_topk: (z, log_prior, w, b, maximum, log_total, 4, backend),
        ops.predict: (z, a, w, b, backend),
        ops.topk: (z, a, w, b, 4, backend),
        ops.sample: (z, a, w, b, 1.5, seed, backend),
    }
    for op, arguments in checks.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["tiled", "reference", TRITON, CPU])
def test_compiles_without_a_graph_break(backend):
    """The head twice in one graph, forward and all gradients, with a reused and a dynamic number of tokens."""
    dtype, tolerance = EXACT.get(backend, (torch.float64, 1e-12))
    head = fused_mos.MoS(6, V, K, D, backend=backend).to(dtype)

    def step(x, target):
        log_p = head.log_prob(x)
        return head(x, target).loss + 2 * head(x * 0.5, target, reduction="none").loss.sum() + log_p[..., 3].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 4):
        x = torch.randn(n, 2, 6, dtype=dtype, requires_grad=True)
        target = torch.randint(0, V, (n, 2))
        parameters = [x, *head.parameters()]
        expected = step(x, target)
        expected_grads = torch.autograd.grad(expected, parameters)
        actual = compiled(x, target)
        assert torch.allclose(actual, expected, rtol=0, atol=tolerance)
        for a, b in zip(torch.autograd.grad(actual, parameters), expected_grads):
            assert torch.allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.compiles
def test_compiles_with_inductor():
    head = fused_mos.MoS(6, V, K, D)
    x, target = torch.randn(7, 6), torch.randint(0, V, (7,))
    compiled = torch.compile(lambda x: head(x, target), fullgraph=True)
    assert torch.allclose(compiled(x).loss, head(x, target).loss, rtol=0, atol=1e-6)


def test_exports():
    head = fused_mos.MoS(6, V, K, D)
    x, target = torch.randn(7, 6), torch.randint(0, V, (7,))
    program = torch.export.export(head, (x, target))
    assert torch.allclose(program.module()(x, target).loss, head(x, target).loss, rtol=0, atol=1e-6)


class _Generation(torch.nn.Module):
    """All functions of a head that generation uses."""

    def __init__(self, backend: str):
        super().__init__()
        self.head = fused_mos.MoS(6, V, K, D, backend=backend)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head.log_prob(x), self.head.predict(x), *self.head.topk(x, 3), self.head.sample(x, temperature=0.01)


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("backend", ["auto", "tiled", "reference", TRITON, CPU])
def test_generation_compiles_and_exports(backend, how):
    module, x = _Generation(backend), torch.randn(70, 6)
    torch.nn.init.normal_(module.head.decoder.weight, std=100)  # at that temperature an expert has one class
    with torch.no_grad():
        traced = (
            torch.compile(module, fullgraph=True, backend="aot_eager")
            if how == "compile"
            else torch.export.export(module, (x,)).module()
        )
        log_prob, best, values, indices, drawn = traced(x)
        expected = module(x)
        latent = module.head.mixture(x)[0]
        tolerance = 1e-6 * (latent @ module.head.decoder.weight.t()).abs().max().item()  # of the largest logit
        assert torch.allclose(log_prob, expected[0], rtol=0, atol=tolerance)
        assert torch.allclose(values, expected[2], rtol=0, atol=tolerance)
        assert torch.equal(best, expected[1]) and torch.equal(indices, expected[3])
        assert (drawn[:, None] == (latent @ module.head.decoder.weight.t()).argmax(-1)).any(1).all()
        assert len(set(traced(x)[-1].tolist())) > 1


class _Losses(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.head = fused_mos.MoS(6, V, K, D, backend=backend)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(x, target).loss, self.head(x, target, reduction="none").loss


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("backend", ["tiled", "reference", TRITON, CPU])
def test_one_graph_for_any_number_of_tokens(backend, how):
    """Compiled without a graph break or a new graph for each number; exported without a bound, called with gradients
    on, trained through."""
    generation, losses = _Generation(backend), _Losses(backend)
    torch.nn.init.normal_(generation.head.decoder.weight, std=100)
    x, target = torch.randn(6, 6), torch.randint(0, V, (6,))
    if how == "compile":
        torch._dynamo.reset()  # the graphs of other tests count against the limit, too
        options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
        generates, trains = torch.compile(generation, **options), torch.compile(losses, **options)
    else:
        n = torch.export.Dim("N")
        generates = torch.export.export(generation, (x,), dynamic_shapes=({0: n},)).module()
        trains = torch.export.export(losses, (x, target), dynamic_shapes=({0: n}, {0: n})).module()
    for count in (2, 3, 17, 5_000 if backend in ("tiled", "cpu") else 40):
        x, target = torch.randn(count, 6), torch.randint(0, V, (count,))
        _, best, _, indices, drawn = generates(x)
        _, expected, _, expected_indices, _ = generation(x)
        assert torch.equal(best, expected) and torch.equal(indices, expected_indices) and drawn.shape == (count,)
        mean, each = trains(x, target)
        assert torch.allclose(mean, losses(x, target)[0]) and torch.allclose(each, losses(x, target)[1])
        (mean + each.sum()).backward()
    weight = (losses if how == "compile" else trains).head.decoder.weight
    assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("backend", ["tiled", TRITON, CPU])
def test_a_traced_graph_has_the_backend_s_own_ops(backend):
    with torch.no_grad():
        program = torch.export.export(_Generation(backend), (torch.randn(70, 6),))
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    called = {str(node.target): node.args for node in nodes if "fused_mos" in str(node.target)}
    assert {f"fused_mos.{name}.default" for name in ("log_prob", "predict", "topk", "sample")} <= called.keys()
    assert all(arguments[-1] == backend for arguments in called.values())


@pytest.mark.parametrize("backend", ["tiled", TRITON, CPU])
def test_a_default_device_of_another_kind_changes_nothing(backend):
    head, x = fused_mos.MoS(6, V, K, D, backend=backend), torch.randn(7, 6)
    target = torch.randint(0, V, (7,))

    def results():
        loss = head(x, target).loss
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        generator = torch.Generator(x.device).manual_seed(3)
        return loss, *gradients, head.log_prob(x), head.predict(x), *head.topk(x, 3), head.sample(x, 1.0, generator)

    expected = results()
    torch.set_default_device("meta")
    try:
        actual = results()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device):
    """Estimates of memory and FLOPs run the ops on tensors without values."""
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext():
        options = {"device": "cpu" if device == "fake" else "meta"}
        head = fused_mos.MoS(6, V, K, D, **options)
        x, target = torch.empty(7, 2, 6, **options), torch.empty(7, 2, dtype=torch.int64, **options)
        output, loss = head(x, target)
        loss.backward()
        shapes = [
            tuple(tensor.shape)
            for tensor in (output, loss, head.log_prob(x), head.decoder.weight.grad, head.prior.weight.grad)
        ]
        generated = [tuple(tensor.shape) for tensor in (head.predict(x), *head.topk(x, 4), head.sample(x))]
    assert shapes == [(7, 2), (), (7, 2, V), (V, D), (K, 6)]
    assert generated == [(7, 2), (7, 2, 4), (7, 2, 4), (7, 2)]


@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
def test_forward_mode_is_refused_where_it_would_be_ignored(backend):
    head, x, target = fused_mos.MoS(6, V, K, D, backend=backend), torch.randn(7, 6), torch.randint(0, V, (7,))
    for function in (lambda x: head(x, target).loss, lambda x: head.log_prob(x).sum()):
        if backend == "reference":
            gradient = torch.autograd.functional.vjp(function, x)[1]
            assert torch.allclose(torch.func.jvp(function, (x,), (torch.ones_like(x),))[1], gradient.sum(), atol=1e-5)
        else:
            with pytest.raises(RuntimeError, match="no forward-mode derivative; use backend='reference'"):
                torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.func.vmap])
@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
def test_transforms_are_refused_by_name(backend, transform):
    case = problem(N, K, D, V).to(torch.float32, ())
    z, a, w, b = case.inputs()
    argument = torch.stack([w, w]) if transform is torch.func.vmap else w
    for function in (
        lambda w: F.mos_nll_loss(z, a, w, case.target, b, backend=backend),
        lambda w: F.mos_log_prob(z, a, w, b, backend=backend).sum(),
        lambda w: F.mos_logsumexp(z, w, b, backend=backend).sum(),
    ):
        with pytest.raises(RuntimeError, match="transforms of torch.func .* use backend='reference'"):
            transform(function)(argument)


def test_the_reference_goes_through_transforms():
    head, x, target = fused_mos.MoS(6, V, K, D, backend="reference"), torch.randn(7, 6), torch.randint(0, V, (7,))
    expected = head(x, target, reduction="none").loss
    assert torch.allclose(
        torch.func.vmap(lambda x, target: head(x[None], target[None]).loss)(x, target), expected, atol=1e-6
    )
    leaf = x.clone().requires_grad_()
    head(leaf, target).loss.backward()
    assert torch.allclose(torch.func.grad(lambda x: head(x, target).loss)(x), leaf.grad, atol=1e-6)


def test_target_out_of_range_is_nan_where_values_cannot_be_checked():
    """In a compiled graph (as on a GPU) such a token's loss is NaN; memory is never read out of bounds."""
    case = problem(N, K, D, V)
    case.target[:2] = torch.tensor([V, -1])
    compiled = torch.compile(
        lambda z: F.mos_nll_loss(z, *case.inputs()[1:3], case.target, case.bias, reduction="none"), backend="aot_eager"
    )
    loss = compiled(case.latent)
    assert loss[:2].isnan().all() and loss[2:].isfinite().all()
    with pytest.raises(IndexError):
        case.nll()


@pytest.mark.parametrize("backend", ["tiled", "reference", TRITON, CPU])
def test_autocast(backend):
    """Products in bfloat16, the prior and the result in float32, gradients in the parameters' dtype."""
    case = problem(16, K, 24, 300).to(torch.float32)
    oracle = case.to(torch.float64)
    oracle.nll(backend="reference").backward()
    with torch.autocast(case.latent.device.type, dtype=torch.bfloat16):
        loss = case.nll(backend=backend)
        assert F.mos_log_prob(*case.inputs(), backend=backend).dtype == torch.float32
    loss.backward()
    bf16 = case.to(torch.bfloat16)
    bf16.prior_logits = case.prior_logits.detach()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, bf16.nll(backend=backend)), "autocast did not compute in bfloat16"
    for name in INPUTS:
        assert case.gradients()[name].dtype == torch.float32
        assert torch.allclose(case.gradients()[name].double(), oracle.gradients()[name], rtol=0, atol=5e-3)


def _peak_bytes(function) -> int:
    """Peak bytes of torch's allocator during `function()`, above those held before, plus the peak of the native
    kernels."""
    if torch.get_default_device().type == "cuda":
        torch.ones(1, 1) @ torch.ones(1, 1)  # the vendor's library has its own workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    if _cpu:
        _cpu.reset_peak_bytes()
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + (_cpu.peak_bytes() if _cpu else 0)


@pytest.mark.parametrize("backend", ["tiled", TRITON, CPU])
@pytest.mark.parametrize(
    "what, eps",
    [
        ("mean", 0.0),
        ("mean", 1e-3),
        ("none", 0.0),
        ("none", 1e-3),
        ("log_prob", 0.0),
        ("evaluate", 0.0),
        ("predict", 0.0),
        ("sample", 0.0),
    ],
)
def test_extra_memory_does_not_grow_with_nkv(what, eps, backend, monkeypatch):
    """Bytes above inputs at two vocabulary sizes: their difference is that of outputs and gradients, a small
    fraction of N·K·V, and the rest is about the workspace."""
    n, k, d = 64, 16, 8
    workspace, small, large = 2**20, 8_000, 24_000
    monkeypatch.setitem(tiled_products.WORKSPACE_BYTES, "cpu", workspace)
    if backend == "triton":  # fewer and larger tiles, since the interpreter's time goes with their number
        workspace, small, large = 2 * 2**20, 2_000, 6_000
        if ON_GPU:  # beyond the classes at which all multiprocessors have a split of the vocabulary, of at most 811 KB
            small, large = 40_000, 240_000
        monkeypatch.setattr("fused_mos._backends.triton_kernels.workspace.WORKSPACE_BYTES", workspace)
        monkeypatch.setattr("fused_mos._backends.triton_kernels.workspace.WORKSPACE_SHARE", 0)
        rows = 64 if what in ("log_prob", "predict") else 256  # of tokens, of which there are n, or of n·k rows
        monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(rows, 2048, 16, 4, 1))
    if backend == "cpu":
        monkeypatch.setattr("fused_mos._backends.cpu_operands.WORKSPACE_BYTES", workspace)
        monkeypatch.setattr(cpu, "FORWARD_WORKSPACE_BYTES", workspace)
        monkeypatch.setattr(cpu, "MAX_FORWARD_WORKSPACE_BYTES", 0)
    peaks = {}
    for v in (small, large):
        case = problem(n, k, d, v).to(torch.float32, () if what in ("evaluate", "predict", "sample") else INPUTS)

        def call():
            if what == "log_prob":
                F.mos_log_prob(*case.inputs(), backend=backend).sum().backward()
            elif what == "predict":
                F.mos_predict(*case.inputs(), backend=backend)
            elif what == "sample":
                F.mos_sample(*case.inputs(), backend=backend)
            else:
                loss = case.nll(
                    reduction="none" if what == "none" else "mean", grad_filter_eps=eps, backend=backend
                ).sum()
                if loss.requires_grad:
                    loss.backward()

        peaks[v] = _peak_bytes(call)
    growth = (peaks[large] - peaks[small]) / (large - small)
    gradients = 4 * (d + 1)  # bytes per class
    # a gradient may exist twice while it is scaled; the log-probabilities and their gradient have N columns each
    allowed = {"mean": 3 * gradients, "none": 2 * gradients, "log_prob": 2 * gradients + 3 * 4 * n}.get(what, 8)
    assert growth <= allowed < 4 * n * k / 4
    fixed = peaks[small] - small * allowed
    assert fixed <= 3 * workspace < 4 * n * k * small, f"{fixed / 2**20:.1f} MiB beside outputs and gradients"


def test_the_memory_measurement_sees_the_reference_materialise():
    """The measurement in the test above can fail."""
    case = problem(64, 16, 8, 8_000).to(torch.float32)
    assert _peak_bytes(lambda: case.nll(backend="reference").backward()) > 2 * 4 * 64 * 16 * 8_000


@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
def test_activation_checkpointing(backend):
    """Checkpointing raises an error if a backward pass reads a saved tensor more than once."""
    case = problem(6, 3, 8, 50, ignored=False).to(torch.float32, ("latent", "prior_logits", "weight", "bias"))
    inputs = (case.latent, case.prior_logits, case.weight, case.target, case.bias)
    expected = torch.autograd.grad(F.mos_nll_loss(*inputs, backend=backend), [case.latent, case.weight])
    loss = torch.utils.checkpoint.checkpoint(
        lambda *x: F.mos_nll_loss(*x, backend=backend), *inputs, use_reentrant=False
    )
    for gradient, wanted in zip(torch.autograd.grad(loss, [case.latent, case.weight]), expected):
        assert torch.equal(gradient, wanted)
