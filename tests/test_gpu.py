"""The Triton kernels on a GPU: the paper's shapes, float32 with TF32, and what only CUDA has. (The tests of all
backends run there, too, with tensors on the GPU: `pytest tests -k "triton or gpu"`.)

Without a GPU the numerical tests run in Triton's interpreter, at one small shape.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import ON_GPU, triton
from problem import check_forward_and_gradients, problem

import fused_mos
from fused_mos import functional as F

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.interpreted] if triton.INTERPRETED else []

from fused_mos._backends.triton_kernels.workspace import workspace_bytes

ROOT = Path(__file__).parent.parent
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU")

# N, K, D, V: the training steps of the paper, rows by the hundred of odd width, and the head of a large model
SHAPES = [
    (840, 15, 280, 10_000),
    (140, 15, 300, 33_278),
    (301, 10, 123, 9_999),
    (64, 7, 1_024, 50_000),
    (3_000, 1, 280, 10_000),
]
if not ON_GPU:
    SHAPES = [(9, 3, 17, 130)]

COMPUTATIONS = {
    "mean": lambda p, backend: p.nll(backend=backend),
    "none": lambda p, backend: p.nll(reduction="none", backend=backend),
    "log_prob": lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend),
}


@pytest.fixture(autouse=True)
def on_gpu():
    torch.set_default_device("cuda" if ON_GPU else None)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["highest", "high"])
def float32_precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(computation, shape, dtype):
    check_forward_and_gradients(problem(*shape), COMPUTATIONS[computation], dtype, "triton")


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(computation, shape, float32_precision):
    """In full precision and with TF32, which the unfused computation then has, too."""
    check_forward_and_gradients(problem(*shape), COMPUTATIONS[computation], torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_fifty_repeats_give_equal_bits(dtype, eps):
    def run():
        case = problem(*SHAPES[0]).to(dtype)
        loss = case.nll(grad_filter_eps=eps, backend="triton")
        (
            loss
            + F.mos_log_prob(*case.inputs(), backend="triton").mean()
            + case.nll(reduction="none", backend="triton").sum()
        ).backward()
        return [loss.detach(), *case.gradients().values()]

    first = run()
    for _ in range(49 if ON_GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_classes_of_all_functions_agree():
    """predict and topk are those of log_prob, and a cold sample of one expert is its most probable class."""
    case = problem(*SHAPES[0]).to(torch.bfloat16, ())
    log_p = F.mos_log_prob(*case.inputs(), backend="triton")
    assert torch.equal(F.mos_predict(*case.inputs(), backend="triton"), log_p.argmax(-1))
    assert torch.allclose(F.mos_topk(*case.inputs(), k=5, backend="triton").values, log_p.topk(5).values, atol=1e-4)
    single = case.latent[:, :1], case.prior_logits[:, :1], case.weight, case.bias
    assert torch.equal(
        F.mos_sample(*single, temperature=1e-6, backend="triton"), F.mos_predict(*single, backend="triton")
    )


@pytest.mark.skipif(ON_GPU, reason="on a GPU the script itself is to be run")
def test_the_benchmark_script_is_rehearsed(tmp_path):
    """benchmarks.gpu on the CPU, all but the device's own lines; a second call repeats nothing."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(path), "--shapes", "ptb"]
    command += ["--dtypes", "bfloat16", "--steps", "head", "training", "decode", "checks"]
    command += ["--without", "compiled", "tests"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(path.read_text())["rows"]
    for operation in ("step mean", "step none", "forward", "log_prob", "log_prob step", "predict", "sample", "topk"):
        row = rows[f"head | ptb | bfloat16 | {operation} | fused_mos | eager"]
        assert row["over mm"] > 0 and row["launches"] > 1 and len(row["wall ms"]) == len(row["host ms"]) == 3
    assert len(rows["head | ptb | bfloat16 | step mean | log-sum-exp | eager"]["times ours"]) == 3
    assert "CUDA" in rows["head | ptb | bfloat16 | step mean | fused_mos | graph"]["failed"]  # a row, not the end
    for recipe in ("demo", "lm1b-tiny"):
        row = rows[f"training | {recipe} | float32"]
        assert row["words/s"] > 0 and 0 < row["head share"] < 1 and 0 < row["LSTM share"] < 1
    assert {"triton log_prob", "triton topk", "triton sample"} <= rows["decode | tiny"]["rows"].keys()
    assert "| ptb | bfloat16 | step mean | published code |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 0 and (tmp_path / "gpu-training.png").stat().st_size > 0
    second = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (
        json.loads(path.read_text())["rows"].items()
        >= {key: row for key, row in rows.items() if "unavailable" not in row}.items()
    )
    assert "step mean | fused_mos" not in second.stdout.split("OPEN")[0]


# --------------------------------------------------------------------------------------------------- what only CUDA has


@only_on_gpu
def test_auto_takes_triton_for_cuda_tensors():
    case = problem(40, 3, 16, 300)
    assert fused_mos.backends()["triton"].startswith("available")
    assert torch.equal(case.to(torch.float32).nll(), case.to(torch.float32).nll(backend="triton"))
    assert torch.equal(case.nll(), case.nll(backend="tiled"))  # float64
    with pytest.raises(ValueError, match="it is for CUDA tensors, but latent is on cpu"):
        F.mos_nll_loss(
            *(tensor.float().cpu() for tensor in (case.latent, case.prior_logits, case.weight)),
            case.target.cpu(),
            backend="triton",
        )


@only_on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (2_560, 7, 1_024, 100_000)], ids=str)
def test_extra_memory(shape, dtype):
    """The workspace beside inputs, outputs and gradients, and a little for statistics."""
    n, k, d, v = shape
    latent, weight = (torch.randn(size, dtype=dtype, requires_grad=True) for size in ((n, k, d), (v, d)))
    prior_logits, bias = torch.randn(n, k, requires_grad=True), torch.zeros(v, dtype=dtype, requires_grad=True)
    target = torch.randint(v, (n,))
    gradients = sum(tensor.nbytes for tensor in (latent, prior_logits, weight, bias))
    for reduction in ("mean", "none", "none"):  # the first also warms the vendor's library up
        for tensor in (latent, prior_logits, weight, bias):
            tensor.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        F.mos_nll_loss(
            latent, prior_logits, weight, target, bias, reduction=reduction, backend="triton"
        ).sum().backward()
        extra = torch.cuda.max_memory_allocated() - before - gradients
        if reduction == "none":
            assert extra <= workspace_bytes(latent.device) + 8 * 2**20, f"{extra / 2**20:.0f} MiB"


@only_on_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_captured_in_a_graph(reduction):
    """Forward and backward replayed on new inputs give the bits of an ordinary call."""
    case = problem(96, 5, 40, 1_000).to(torch.bfloat16)
    arguments = case.inputs()

    def step():
        return torch.autograd.grad(case.nll(reduction=reduction, backend="triton").sum(), arguments)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = problem(96, 5, 40, 1_000, seed=seed)
        with torch.no_grad():
            for mine, theirs in zip(arguments, other.inputs()):
                mine.copy_(theirs)
            case.target.copy_(other.target)
        graph.replay()
        replayed = [gradient.clone() for gradient in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step()))


@only_on_gpu
def test_works_on_the_current_stream():
    """The result of a side stream waits for what was queued there before, and for nothing else."""
    case = problem(96, 5, 40, 1_000).to(torch.bfloat16, ())
    expected = case.nll(reduction="none", backend="triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(case.latent)
        torch.cuda._sleep(100_000_000)  # about 50 ms, in which work of another stream would see the zeros
        late.copy_(case.latent)
        loss = F.mos_nll_loss(late, *case.inputs()[1:3], case.target, case.bias, reduction="none", backend="triton")
    stream.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_works_on_a_device_that_is_not_the_current_one():
    case = problem(96, 5, 40, 1_000).to(torch.bfloat16)
    case.nll(backend="triton").backward()
    far = problem(96, 5, 40, 1_000).to(torch.bfloat16)
    arguments = [tensor.detach().to("cuda:1").requires_grad_() for tensor in far.inputs()]
    F.mos_nll_loss(*arguments[:3], far.target.to("cuda:1"), arguments[3], backend="triton").backward()
    assert torch.cuda.current_device() == 0
    for name, tensor in zip(case.gradients(), arguments):
        assert torch.equal(case.gradients()[name], tensor.grad.to("cuda:0"))


@only_on_gpu
def test_compiled_with_inductor_under_autocast():
    head = fused_mos.MoS(64, 1_000, 5, 40, backend="triton")
    x, target = torch.randn(96, 64), torch.randint(1_000, (96,))

    def step(x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return head(x, target).loss

    expected = step(x)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    loss = torch.compile(step, fullgraph=True)(x)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=0, atol=1e-3)
    for parameter, gradient in zip(head.parameters(), gradients):
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-2 * gradient.abs().max().item())


@only_on_gpu
def test_a_target_out_of_range_is_nan():
    """Values are not checked on a GPU, where that would stall it; no memory beyond the operands is read."""
    case = problem(96, 5, 40, 1_000, ignored=False).to(torch.bfloat16, ())
    case.target[:2] = torch.tensor([1_000, -1])
    loss = case.nll(reduction="none", backend="triton")
    assert loss[:2].isnan().all() and loss[2:].isfinite().all()
