"""The native CPU kernels against the processor's peak and against what a user would write instead.

One process, contenders in turns. A share of N products is N·2·N·K·D·V FLOP at the multiply-add peak that a register-only
loop reaches in the same turns, over the time; `torch.mm` is measured beside it. Each row's extra_info has the figures.
"""

import statistics

import pytest
import torch
from harness import cut_cross_entropy, eager, five_lines, inputs, interleaved, medians, softmax_cross_entropy, step, unavailable

from fused_mos import functional as F

_cpu = pytest.importorskip("fused_mos._cpu")
gradient_in_forward_pays = pytest.importorskip("fused_mos._backends.cpu").gradient_in_forward_pays

SHAPES = {  # N, K, D, V
    "ptb": (210, 15, 280, 10_000),
    "wikitext2": (210, 15, 300, 33_278),
    "lm1b": (128, 7, 512, 100_000),
    "softmax": (3150, 1, 280, 10_000),
}
ROUNDS = {"ptb": 7, "wikitext2": 3, "lm1b": 3, "softmax": 7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = {  # name -> the products that it needs
    "forward": 1,
    "forward + backward": 3,  # or 4, where it recomputes
    "forward + backward, recomputing": 4,
    "log_prob": 2,
}


def _our_calls(arguments: list[torch.Tensor]) -> dict:
    z, a, w, _, b = arguments

    def forward():
        with torch.no_grad():
            F.mos_nll_loss(*arguments, backend="cpu")

    def log_prob():
        with torch.no_grad():
            F.mos_log_prob(z, a, w, b, backend="cpu")

    return {
        "forward": forward,
        "forward + backward": lambda: step(lambda *x: F.mos_nll_loss(*x, backend="cpu"), arguments),
        "forward + backward, recomputing": lambda: step(lambda *x: F.mos_nll_loss(*x, backend="cpu", reduction="none").mean(), arguments),
        "log_prob": log_prob,
    }


def _mm_calls(n: int, k: int, d: int, v: int, dtype: torch.dtype) -> dict:
    """The three products of a training step by torch.mm, on at most 10,000 classes, whose rate is that of all."""
    v = min(v, 10_000)
    z, e, p = torch.randn(n * k, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(n * k, v).to(dtype)
    return {"mm z·Eᵀ": lambda: torch.mm(z, e.t()), "mm P·E": lambda: torch.mm(p, e), "mm Pᵀ·z": lambda: torch.mm(p.t(), z)}


@pytest.fixture(scope="module", params=[(s, d) for s in SHAPES for d in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def against_peak(request):
    shape, name = request.param
    n, k, d, v = SHAPES[shape]
    arguments = inputs(n, k, d, v, DTYPES[name])
    peaks, calls = [], _our_calls(arguments) | _mm_calls(n, k, d, v, DTYPES[name])
    bf16 = name == "bfloat16" and _cpu.bf16_products()
    calls["peak"] = lambda: peaks.append(_cpu.peak_gflops(torch.get_num_threads(), bf16))
    _cpu.reset_peak_bytes()
    times = interleaved(calls, ROUNDS[shape])
    gflop = 2 * n * k * d * v / 1e9
    best_mm = 2 * n * k * d * min(v, 10_000) / 1e9 / min(medians(times)[mm] for mm in times if mm.startswith("mm"))
    return shape, name, arguments, times, gflop, statistics.median(peaks), best_mm, _cpu.peak_bytes() / 2**20


@pytest.mark.parametrize("what", OURS)
def test_against_the_peak(benchmark, against_peak, what):
    shape, dtype, arguments, times, gflop, peak, best_mm, mebibytes = against_peak
    seconds, products = times[what], OURS[what]
    n, k, *_ = SHAPES[shape]
    if what == "forward + backward" and not gradient_in_forward_pays(n, k, arguments[2]):
        products = 4
    of_peak = [products * gflop / peak / value for value in seconds]
    of_mm = [products * gflop / best_mm / value for value in seconds]
    benchmark.group = f"{shape} {dtype}: N, K, D, V = {SHAPES[shape]}"
    benchmark.extra_info |= {
        "instruction set": _cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak GFLOP/s": round(peak),
        "torch.mm GFLOP/s": round(best_mm),
        "products": products,
        "share of the peak (median, min, max)": [round(f(of_peak), 3) for f in (statistics.median, min, max)],
        "share of torch.mm (median, min, max)": [round(f(of_mm), 3) for f in (statistics.median, min, max)],
        "workspace MiB, all calls": round(mebibytes, 1),
    }
    print(
        f"\n{shape:9} {dtype:8} {what:32} {statistics.median(seconds) * 1e3:7.1f} ms  {statistics.median(of_peak):4.0%}"
        f" ({min(of_peak):.0%}–{max(of_peak):.0%}) of {products} products at the peak of {peak:.0f} GFLOP/s,"
        f" {statistics.median(of_mm):4.0%} at torch.mm's {best_mm:.0f}; {mebibytes:.0f} MiB"
    )
    benchmark.pedantic(_our_calls(arguments)[what], rounds=1)


def _peers(shape: str) -> dict:
    ours = {"cpu": lambda *x: F.mos_nll_loss(*x, backend="cpu")}
    if SHAPES[shape][1] == 1:
        return ours | {"F.linear + F.cross_entropy": softmax_cross_entropy, "cut-cross-entropy": cut_cross_entropy, "five lines": five_lines}
    tiled = {"tiled": lambda *x: F.mos_nll_loss(*x, backend="tiled")}
    compiled = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    return ours | tiled | compiled | {"five lines": five_lines}


@pytest.fixture(scope="module", params=SHAPES)
def against_peers(request):
    """Seconds of a step by (name, dtype); bfloat16 of ours beside, for its ratio to float32 eager."""
    shape = request.param
    torch._dynamo.reset()
    arguments = {name: inputs(*SHAPES[shape], dtype) for name, dtype in DTYPES.items()}
    calls = {}
    for name, loss in _peers(shape).items():
        if unavailable(name) is None:
            calls[name, "float32"] = lambda loss=loss: step(loss, arguments["float32"])
            if name in ("cpu", "cut-cross-entropy"):
                calls[name, "bfloat16"] = lambda loss=loss: step(loss, arguments["bfloat16"])
    return shape, interleaved(calls, ROUNDS[shape])


def test_against_peers(benchmark, against_peers):
    """How many times faster a step is than each peer's: medians of the ratios of each turn, with minimum and maximum."""
    shape, times = against_peers
    rows = {}
    for (name, dtype), seconds in times.items():
        for ours in ("float32", "bfloat16"):
            if name == "cpu" or (dtype, ours) == ("bfloat16", "float32"):
                continue
            ratios = [theirs / mine for theirs, mine in zip(seconds, times["cpu", ours])]
            rows[f"{ours} vs {name} {dtype}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    print()
    for name, (median, low, high) in rows.items():
        print(f"{shape:9} {name:50} {median:5.2f} × ({low:.2f}–{high:.2f})")
    benchmark.group = f"{shape}: a training step against peers, N, K, D, V = {SHAPES[shape]}"
    benchmark.extra_info |= {"times faster (median, min, max)": rows, "instruction set": _cpu.instruction_set(), "torch": torch.__version__}
    benchmark.extra_info["seconds (median)"] = {f"{name} {dtype}": round(value, 4) for (name, dtype), value in medians(times).items()}
    arguments = inputs(*SHAPES[shape])
    benchmark.pedantic(lambda: step(lambda *x: F.mos_nll_loss(*x, backend="cpu"), arguments), rounds=1)


@pytest.mark.parametrize("concentration", [1.0, 8.0, 32.0], ids=lambda c: f"prior x{c:g}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_filter(benchmark, dtype, concentration):
    """grad_filter_eps at the dtype's rounding: the share of rows dropped, the speed, and the error it causes. A prior of
    larger logits stands for a trained model, whose experts are surer."""
    arguments = inputs(*SHAPES["ptb"], DTYPES[dtype])
    with torch.no_grad():
        arguments[1].mul_(concentration)
    eps = torch.finfo(DTYPES[dtype]).eps
    exact, filtered = (lambda *x, e=e: F.mos_nll_loss(*x, backend="cpu", grad_filter_eps=e) for e in (0.0, eps))
    times = interleaved({"exact": lambda: step(exact, arguments), "filtered": lambda: step(filtered, arguments)}, ROUNDS["ptb"])
    step(exact, arguments)
    wanted = arguments[2].grad.float().clone()
    step(filtered, arguments)
    error = (arguments[2].grad.float() - wanted).abs().max() / wanted.abs().max()
    dropped = arguments[0].grad.eq(0).all(-1).float().mean().item()
    ratios = [a / b for a, b in zip(times["exact"], times["filtered"])]
    print(f"\nfilter {dtype} prior ×{concentration:g}: {dropped:.0%} of rows dropped, {statistics.median(ratios):.2f} × faster, error {error:.1e}")
    benchmark.group = "grad_filter_eps at the dtype's rounding"
    benchmark.extra_info |= {
        "eps": eps, "share of rows dropped": round(dropped, 3), "relative error of dE": float(error),
        "times faster (median, min, max)": [round(f(ratios), 2) for f in (statistics.median, min, max)],
    }  # fmt: skip
    benchmark.pedantic(lambda: step(filtered, arguments), rounds=1)
