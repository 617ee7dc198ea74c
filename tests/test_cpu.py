"""What only the native CPU kernels have: instruction sets, threads, their exp and log, and memory of their own."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import EXACT, INPUTS, check_forward_and_gradients, problem

_cpu = pytest.importorskip("fused_mos._cpu")

import fused_mos
from fused_mos import functional as F
from fused_mos._backends import Transform, cpu, cpu_operands


def _map(function, x: torch.Tensor) -> torch.Tensor:
    result = torch.full_like(x, torch.nan)
    function(x.data_ptr(), result.data_ptr(), x.numel())
    return result


def _ulps(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The error in units of the last place of the float32 nearest to the exact value."""
    mantissa, exponent = torch.frexp(exact.float())
    return (ours.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


def test_exp_is_within_1_02_ulp(instruction_set):
    x = torch.cat([-torch.logspace(-30, 1.94, 200_001), torch.linspace(-87.3, 0, 1_000_001), torch.tensor([0.0, -0.0])])
    assert _ulps(_map(_cpu.exponentials, x), x.double().exp()).max() <= 1.02


def test_exp_of_extreme_numbers(instruction_set):
    x = torch.tensor([-87.4, -1e4, -3.4e38, -torch.inf, torch.nan, 0.0])
    assert _map(_cpu.exponentials, x)[:4].eq(0).all()
    assert _map(_cpu.exponentials, x)[4].isnan() and _map(_cpu.exponentials, x)[5] == 1


def test_log_is_within_1_ulp(instruction_set):
    x = torch.cat([torch.logspace(-37.9, 38.5, 500_001), torch.linspace(0.5, 2, 1_000_001), torch.tensor([1.0])])
    assert _ulps(_map(_cpu.logarithms, x), x.double().log()).max() <= 1


def test_tanh_is_within_2_ulp(instruction_set):
    positive = torch.cat([torch.logspace(-37.9, 1.5, 500_001), torch.linspace(0, 12, 1_000_001)])
    x = torch.cat([positive, -positive])
    assert _ulps(_map(_cpu.hyperbolic_tangents, x), x.double().tanh()).max() <= 2


def test_tanh_of_extreme_numbers(instruction_set):
    x = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, -torch.nan])
    result = _map(_cpu.hyperbolic_tangents, x)
    assert torch.equal(result[:-2], torch.tensor([0.0, -0.0, 1e-45, 1.0, -1.0, 1.0, -1.0]))
    assert result[-2:].isnan().all() and torch.signbit(result[1])


def _everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, gradients of both kinds, log-probabilities and their gradients, of several blocks and panels."""
    case = problem(70, 3, 37, 900).to(dtype)
    results = []
    for compute in (
        lambda p: p.nll(backend="cpu"),
        lambda p: p.nll(backend="cpu", grad_filter_eps=0.1),
        lambda p: p.nll(backend="cpu", reduction="none"),
        lambda p: F.mos_log_prob(*p.inputs(), backend="cpu"),
    ):
        p = case.to(dtype)
        output = compute(p)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output) if output.dim() else output).sum().backward()
        results += [output.detach(), *p.gradients().values()]
    results.append(F.mos_predict(*case.inputs(), backend="cpu"))
    results.append(F.mos_sample(*case.inputs(), generator=torch.Generator().manual_seed(0), backend="cpu"))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, instruction_set, workspace):
    before = torch.get_num_threads()
    try:
        runs = []
        for n_threads in (1, 2, 2, 5):
            torch.set_num_threads(n_threads)
            runs.append(_everything(dtype))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_the_number_of_threads_does_not_cut_the_products_of_dz(instruction_set, monkeypatch):
    """A small workspace holds one panel of classes a thread, and tile registers add up four before they round. Many
    threads share rows, blocks of columns and, with tile registers, the panels that are transposed."""
    monkeypatch.setattr(cpu_operands, "WORKSPACE_BYTES", 1)
    case = problem(200, 2, 600, 3000).to(torch.bfloat16)
    before = torch.get_num_threads()
    try:
        gradients = []
        for n_threads in (1, 2, 3, 40):
            torch.set_num_threads(n_threads)
            p = case.to(torch.bfloat16)
            p.nll(backend="cpu", reduction="none").backward(torch.linspace(-1, 1, 200).bfloat16())
            gradients.append(p.latent.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 6),
    d=st.integers(1, 70),
    v=st.integers(1, 600),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
    workspace_bytes=st.sampled_from([1, 2**14, 2**18, 2**25]),
    isa=st.sampled_from(_cpu.instruction_sets()),
    reduction=st.sampled_from(["mean", "none"]),
    strided=st.booleans(),
)
def test_any_shape(dtype, n, k, d, v, scale, seed, workspace_bytes, isa, reduction, strided):
    """Random shapes, strides, magnitudes, workspaces and instruction sets against the float64 reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_MOS_ISA", isa)
        patch.setattr(cpu_operands, "WORKSPACE_BYTES", workspace_bytes)
        patch.setattr(
            cpu, "FORWARD_WORKSPACE_BYTES", workspace_bytes + 4 * v * d
        )  # so that 16-bit gradients come in blocks too
        patch.setattr(cpu, "MAX_FORWARD_WORKSPACE_BYTES", 0)
        for name in ("MIN_GRADIENT_ROWS", "MIN_GRADIENT_ROWS_WITH_AMX"):
            patch.setattr(cpu, name, 1 if seed % 2 else 96)
        case = problem(n, k, d, v, scale=scale, seed=seed, bias=seed % 3 > 0)

        def nll(p, backend):
            latent, weight = p.latent, p.weight
            if strided:
                latent, weight = (
                    latent.transpose(0, 2).contiguous().transpose(0, 2),
                    weight.repeat_interleave(2, 1)[:, ::2],
                )
            return F.mos_nll_loss(
                latent, p.prior_logits, weight, p.target, p.bias, reduction=reduction, backend=backend
            )

        slack = 32 * torch.finfo(dtype).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        check_forward_and_gradients(case, nll, dtype, "cpu", relative_slack=slack)
        check_forward_and_gradients(
            case, lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend), dtype, "cpu", relative_slack=slack
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"grad_filter_eps": 0.05}], ids=str)
def test_exponentials_of_a_part_of_the_classes_are_held(dtype, options, instruction_set, monkeypatch):
    """Those of the other classes are computed again when their gradients are formed: to the last bit as if all had
    been held, whatever the number of threads."""
    if instruction_set == "amx_bf16" and dtype == torch.bfloat16:
        pytest.skip("with AMX the product that is saved is cheap")
    case = problem(100, 3, 40, 1500, scale=2.0)
    case.prior_logits.mul_(4)
    case = case.to(dtype, ())
    assert cpu._held_exponentials(100, 3, case.weight) == (100, 1500)
    whole = _nll_and_gradients(case, options)
    monkeypatch.setattr(cpu, "FORWARD_WORKSPACE_BYTES", 900_000)
    monkeypatch.setattr(cpu, "MAX_FORWARD_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cpu, "MIN_GRADIENT_ROWS", 256)
    tokens, classes = cpu._held_exponentials(100, 3, case.weight)
    assert tokens == 100 and 0 < classes < 1500
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            in_part = _nll_and_gradients(case, options)
            assert all(torch.equal(a, b) for a, b in zip(whole, in_part, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_spans_of_held_panels(dtype, monkeypatch):
    """The tiles of all panels are larger than the cache, whatever is held and however many threads there are."""
    case = problem(700, 2, 33, 5000)
    check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), dtype, "cpu")
    case = case.to(dtype, ())
    whole = _nll_and_gradients(case, {})
    before = torch.get_num_threads()
    try:
        for n_threads, classes in ((1, 5000), (5, 5000), (1, 17 * 128), (2, 17 * 128), (5, 128)):
            torch.set_num_threads(n_threads)
            monkeypatch.setattr(cpu, "_held_exponentials", lambda *_, held=classes: (700, held))
            assert all(torch.equal(a, b) for a, b in zip(whole, _nll_and_gradients(case, {}), strict=True))
    finally:
        torch.set_num_threads(before)


def _nll_and_gradients(case, options: dict) -> list[torch.Tensor]:
    p = case.to(case.weight.dtype, INPUTS)
    loss = p.nll(backend="cpu", **options)
    loss.backward()
    return [loss.detach(), *(getattr(p, name).grad for name in INPUTS)]


def test_many_rows_of_several_panels(instruction_set, workspace):
    """More blocks of rows than one product of the weight's gradient takes at once, and a filter that drops most
    rows."""
    for dtype in (torch.float32, torch.bfloat16):
        case = problem(300, 4, 20, 700, scale=2.0)
        case.prior_logits.mul_(4)
        check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), dtype, "cpu")
        check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend, reduction="none"), dtype, "cpu")


@pytest.mark.parametrize("n_threads", [1, 5])
def test_many_features(n_threads, instruction_set):
    """More columns than one product of dz takes at once, and rows few enough that threads share the columns, or
    many."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        for n, dtype in ((3, torch.float32), (70, torch.float32), (3, torch.bfloat16), (70, torch.bfloat16)):
            case = problem(n, 2, 810, 300, scale=0.2)
            check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), dtype, "cpu")
            check_forward_and_gradients(
                case, lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend), dtype, "cpu"
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_filter_agrees_with_tiled(reduction, instruction_set, workspace):
    """The same rows are dropped, and what moves up in the tiles is the right rows."""
    gradients = {}
    for backend in ("cpu", "tiled"):
        case = problem(64, 8, 12, 300)
        case.prior_logits.mul_(4)
        p = case.to(torch.float32)
        p.nll(reduction=reduction, grad_filter_eps=0.02, backend=backend).sum().backward()
        gradients[backend] = p.gradients()
    assert gradients["tiled"]["latent"].eq(0).all(-1).float().mean() > 0.3
    for name in INPUTS:
        assert torch.allclose(gradients["cpu"][name], gradients["tiled"][name], rtol=0, atol=EXACT["cpu"][1]), name
    assert torch.equal(gradients["cpu"]["latent"].eq(0), gradients["tiled"]["latent"].eq(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [3, 4, 70])
def test_an_ignored_token_whose_logits_overflow(n, dtype, instruction_set):
    """Nothing moves into the lane of the last row, and what is left there takes no part in any gradient."""
    case = problem(n, 1, 5, 30, ignored=False).to(dtype)
    with torch.no_grad():
        case.target[-1] = -100
        case.latent[-1] = 1e38 * case.weight[0].sign()
        case.weight *= 100
    case.nll(backend="cpu").backward()
    for name, gradient in case.gradients().items():
        assert gradient.isfinite().all(), name


def test_no_features(instruction_set):
    """D = 0: every logit is its bias."""
    case = problem(5, 2, 0, 30, ignored=False).to(torch.float32)
    assert torch.allclose(
        case.nll(backend="cpu"), torch.nn.functional.cross_entropy(case.bias.expand(5, -1), case.target)
    )
    case.nll(backend="cpu").backward()
    case.nll(backend="cpu", reduction="none").sum().backward()
    F.mos_log_prob(*case.inputs(), backend="cpu").sum().backward()


def test_samples_never_have_probability_zero(instruction_set):
    """Classes masked by a bias of −inf are not drawn, at either end of the unit interval."""
    rows, weight, bias = torch.randn(40, 8), torch.randn(900, 8), torch.zeros(900)
    bias[:500], bias[700:] = -torch.inf, -torch.inf
    drawn = torch.cat([F.mos_sample(rows[:, None], torch.zeros(40, 1), weight, bias, backend="cpu") for _ in range(20)])
    assert drawn.min() >= 500 and drawn.max() < 700
    assert len(drawn.unique()) > 20  # also where the classes before, as a whole, have probability zero
    head, bias = cpu_operands.head_of(weight, bias, Transform())
    for u in (0.0, 1 - 2**-53):
        uniform, result = torch.full((40,), u, dtype=torch.float64), torch.empty(40, dtype=torch.int64)
        _cpu.sample(head, rows=rows.data_ptr(), n_rows=40, uniform=uniform.data_ptr(), sample=result.data_ptr())
        assert result.min() >= 500 and result.max() < 700


def test_extra_memory_at_a_large_vocabulary():
    """Forward + backward at V = 100,000 take at most 88 MiB of the kernels' own, in both dtypes, where all logits would
    take 107."""
    for dtype in (torch.float32, torch.bfloat16):
        case = problem(40, 7, 32, 100_000).to(dtype)
        _cpu.reset_peak_bytes()
        case.nll(backend="cpu").backward()
        case.nll(backend="cpu", reduction="none").sum().backward()
        F.mos_log_prob(*case.inputs(), backend="cpu").sum().backward()
        assert 0 < _cpu.peak_bytes() <= 88 * 2**20


@pytest.mark.parametrize(
    ("n", "v", "dtype"),
    [(63, 300_000, torch.float32), (20, 1_000_000, torch.bfloat16), (1800, 200_000, torch.bfloat16)],
    ids=str,
)
def test_the_workspace_is_as_large_as_it_may_be(n, v, dtype):
    """Also where lanes of no row and the statistics of each panel are a large part of it."""
    case = problem(n, 1, 8, v).to(dtype)
    _cpu.reset_peak_bytes()
    case.nll(backend="cpu").backward()
    assert 0 < _cpu.peak_bytes() <= cpu.FORWARD_WORKSPACE_BYTES + 2**20


def test_no_tokens():
    """The op itself, which the functions do not call then."""
    latent, weight = torch.zeros(0, 2, 4), torch.randn(10, 4)
    nll = torch.ops.fused_mos.nll_with_gradients
    target = torch.zeros(0, dtype=torch.long)
    results = nll(latent, torch.zeros(0, 2), weight, None, target, -100, 0.0, True, [True, True, True, False], "cpu")
    assert any(torch.equal(result, torch.zeros(10, 4)) for result in results)


def test_extra_memory_of_many_rows():
    """Rows whose copies outweigh the exponentials of a small vocabulary are cut into blocks, too."""
    case = problem(20_000, 2, 256, 200).to(torch.float32)
    _cpu.reset_peak_bytes()
    case.nll(backend="cpu").backward()
    assert 0 < _cpu.peak_bytes() <= 88 * 2**20


def test_auto_chooses_by_device_and_dtype():
    case = problem(5, 2, 4, 30)
    single = case.to(torch.float32)
    assert torch.equal(single.nll(), single.nll(backend="cpu"))
    double = case.to(torch.float64)
    assert torch.equal(double.nll(), double.nll(backend="tiled"))
    with pytest.raises(TypeError, match="'cpu' computes torch.float32, torch.bfloat16, got torch.float64"):
        double.nll(backend="cpu")


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FUSED_MOS_ISA", "sse9")
    with pytest.raises(ValueError, match="FUSED_MOS_ISA must be one of generic.* got 'sse9'"):
        problem(5, 2, 4, 30).to(torch.float32).nll(backend="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    """With two, their threads compete for the cores and small operations slow down a hundredfold."""
    code = (
        "import fused_mos; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in "
        "line.rsplit('/', 1)[-1]})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    runtimes = [path for path in loaded if "gomp" in path or "iomp" in path]
    assert len(runtimes) == 1, runtimes


def test_backends_tells_the_instruction_set(instruction_set):
    told = fused_mos.backends()["cpu"]
    assert told == f"available ({instruction_set}{'' if _cpu.threaded else ', single-threaded: built without OpenMP'})"
