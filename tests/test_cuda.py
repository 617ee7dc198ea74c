"""The decode kernel of csrc/cuda, on a GPU if there is one, and always thread by thread on the CPU
(csrc/cuda/emulation.h).

The emulation runs the kernel's own source. Between barriers its threads take turns in a random order, and asynchronous
copies arrive as late as allowed, which exposes missing barriers and waits.
"""

import math
import shutil
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from backends import ON_GPU
from emulation import SHARED_BYTES, SOURCES, broken_emulation, emulation
from problem import assert_meets_criterion, problem

import fused_mos
from fused_mos import _backends
from fused_mos import functional as F
from fused_mos._backends import reference, tiled
from fused_mos._backends.resources import kernel_resources

cuda = None if _backends.why_absent("cuda") else _backends.kernels("cuda")
if shutil.which("g++") is None or cuda is None:
    pytest.skip("g++, nvcc or triton is not there", allow_module_level=True)

pytestmark = pytest.mark.compiles


def emulated(module, multiprocessors=3, order=1, shared_bytes=SHARED_BYTES) -> "cuda.Decoder":
    """An emulated decoder. `order` is the seed for the order of the threads' turns."""
    return cuda.Decoder(module, lambda _: (multiprocessors, shared_bytes), lambda _: nullcontext(order))


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    return emulation(SOURCES, tmp_path_factory.mktemp("emulation"))


@pytest.fixture(
    params=["emulated", pytest.param("gpu", marks=pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU"))]
)
def decoder(request):
    if request.param == "gpu":
        torch.set_default_device("cuda")
        return cuda.DECODER
    return emulated(request.getfixturevalue("module"))


def inputs(case, dtype):
    case = case.to(dtype, ())
    return case.latent, reference.log_softmax_prior(case.prior_logits).float(), case.weight, case.bias


def check(case, decoder, dtype):
    """Check log p by the criterion of all backends, and topk against log p."""
    log_p = decoder.log_prob(*inputs(case, dtype))
    of_reference = [reference.log_prob(*case.to(d, ()).inputs()) for d in (dtype, torch.float64)]
    assert_meets_criterion(log_p, *of_reference, 2, dtype, "log p")
    k = min(case.weight.shape[0], 9)
    values, indices = decoder.topk(*inputs(case, dtype), k)
    assert torch.equal(values, log_p.topk(k).values) and torch.equal(log_p.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


# one row; rows of two, eight and sixteen tiles of eight; V in one tile, of one class in the last, in many; copies of
# 16, 8 and 4 bytes
SHAPES = [
    (1, 1, 16, 2),
    (1, 3, 40, 3),
    (1, 15, 280, 507),
    (2, 7, 66, 545),
    (3, 5, 34, 129),
    (4, 15, 64, 1_000),
    (8, 1, 300, 999),
    (8, 15, 24, 257),
]
LARGE = [(1, 15, 280, 10_000), (8, 15, 300, 33_278), (1, 7, 1_024, 100_000), (4, 7, 1_024, 793_471)] if ON_GPU else []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_log_prob_and_topk(shape, dtype, decoder):
    if shape in LARGE and decoder is not cuda.DECODER:
        pytest.skip("too large to emulate")
    check(problem(*shape), decoder, dtype)


@pytest.mark.parametrize("scale", [30, 1e4])
def test_large_logits(scale, decoder):
    check(problem(2, 3, 32, 300, scale=scale), decoder, torch.bfloat16)


def test_rare_inputs(decoder):
    """No bias, a one-hot prior, masked classes including the last one, and a whole block of masked classes."""
    check(problem(2, 3, 32, 300, bias=False), decoder, torch.bfloat16)
    case = problem(3, 4, 48, 300)
    case.prior_logits[:] = -torch.inf
    case.prior_logits[range(3), [0, 3, 1]] = 0
    check(case, decoder, torch.bfloat16)
    case = problem(3, 4, 48, 300)
    case.bias[:150], case.bias[-1] = -torch.inf, -torch.inf
    check(case, decoder, torch.float16)


def test_equal_classes_come_in_the_order_of_their_indices(decoder):
    case = problem(2, 2, 16, 200)
    case.weight[:], case.bias[:] = case.weight[0], 0
    assert decoder.topk(*inputs(case, torch.bfloat16), 64)[1].tolist() == [list(range(64))] * 2


def test_nan_is_not_hidden(decoder):
    case = problem(2, 2, 16, 200)
    case.latent[1, 0, 3] = torch.nan
    log_p = decoder.log_prob(*inputs(case, torch.bfloat16))
    assert log_p[0].isfinite().all() and log_p[1].isnan().all()
    assert decoder.topk(*inputs(case, torch.bfloat16), 3)[0][1].isnan().all()


def test_rows_of_a_larger_matrix(decoder):
    """A weight whose address is not a multiple of 16 bytes."""
    case = problem(2, 3, 18, 300).to(torch.bfloat16, ())
    weight = torch.cat([case.weight[:1], case.weight])[1:]
    assert decoder.plan("LogProb", case.latent, weight, None).copy_bytes == 4
    log_prior = reference.log_softmax_prior(case.prior_logits).float()
    assert torch.equal(
        decoder.log_prob(case.latent, log_prior, weight, case.bias),
        decoder.log_prob(case.latent, log_prior, case.weight, case.bias),
    )


@pytest.mark.parametrize("shape", [(3, 5, 34, 600), (8, 15, 24, 257)], ids=str)
def test_the_order_of_threads_and_where_logits_are_change_no_bit(shape, module):
    """The division into blocks changes results only by the rounding of sums."""
    case = inputs(problem(*shape), torch.bfloat16)
    first = emulated(module)
    log_p, top = first.log_prob(*case), first.topk(*case, 5)
    made = first.plan("LogProb", *case[:1], *case[2:])
    small = emulated(module, shared_bytes=made.shared_bytes - 1)
    assert made.logits_in_shared and not small.plan("LogProb", *case[:1], *case[2:]).logits_in_shared
    for other in (emulated(module, order=2), emulated(module, order=3), small):
        assert torch.equal(other.log_prob(*case), log_p)
        assert all(torch.equal(a, b) for a, b in zip(other.topk(*case, 5), top))
    for multiprocessors in (1, 7):
        torch.testing.assert_close(emulated(module, multiprocessors).log_prob(*case), log_p, rtol=1e-5, atol=1e-5)


def test_samples(decoder):
    """A chi-square statistic of 5,120 draws of a class, within 5 standard deviations; the masked class never, and a
    cold one the best."""
    case = problem(1, 1, 16, 60).to(torch.bfloat16, ())
    case.bias[7] = -torch.inf
    rows = case.latent[:, 0].expand(128, -1)
    seeds = torch.arange(40)[:, None]
    drawn = torch.cat([decoder.sample(rows, case.weight, case.bias, 1.5, seed) for seed in seeds])
    expected = torch.softmax(
        (case.latent[0, 0].double() @ case.weight.double().t() + case.bias.double()) / 1.5, 0
    ) * len(drawn)
    counts, there = torch.bincount(drawn, minlength=60), expected > 0
    assert counts[7] == 0
    statistic = ((counts - expected)[there].square() / expected[there]).sum().item()
    n = int(there.sum())
    assert abs(statistic - (n - 1)) < 5 * math.sqrt(2 * (n - 1) + (1 / expected[there]).sum().item())
    best = (case.weight.double() @ case.latent[0, 0].double() + case.bias.double()).argmax()
    assert (decoder.sample(rows, case.weight, case.bias, 1e-4, seeds[0]) == best).all()
    masked = torch.full_like(case.bias, -torch.inf)
    assert (
        decoder.sample(rows, case.weight, masked, 1.0, seeds[0]) == 0
    ).all()  # a class, since others are looked up with it


def test_samples_depend_on_seed_row_and_class_alone(module):
    case = problem(40, 1, 16, 500).to(torch.bfloat16, ())
    seed = torch.tensor([12345])
    drawn = emulated(module).sample(case.latent[:, 0], case.weight, case.bias, 1.0, seed)
    assert torch.equal(
        emulated(module, multiprocessors=8, order=9).sample(case.latent[:, 0], case.weight, case.bias, 1.0, seed), drawn
    )
    assert torch.equal(emulated(module).sample(case.latent[:9, 0], case.weight, case.bias, 1.0, seed), drawn[:9])
    assert not torch.equal(emulated(module).sample(case.latent[:, 0], case.weight, case.bias, 1.0, seed + 1), drawn)


def test_random_words_are_those_of_philox(tmp_path):
    """The known answers of Salmon et al. 2011 (their Random123 library), for counters that the kernel can have."""
    program = tmp_path / "philox.cpp"
    program.write_text(
        f'#include "{SOURCES}/emulation.h"\n#include "{SOURCES}/decode.cuh"\n#include <cstdio>\n'
        'int main() { std::printf("%08x", fused_mos::random_word(0, 0, 0)); }\n'
    )
    subprocess.run(["g++", "-std=c++17", "-w", str(program), "-o", str(tmp_path / "philox")], check=True)
    assert subprocess.run([str(tmp_path / "philox")], capture_output=True, text=True, check=True).stdout == "6627e8d5"


# ---------------------------------------------------------------------------------------------------------------- plans


def plan(module, n, k, d, v, multiprocessors=132, mode="LogProb", top=5):
    return module.Decode(
        getattr(module.DecodeMode, mode), True, n, k, d, v, 0, 0, 0, multiprocessors, SHARED_BYTES, top
    )


def test_plans_of_the_papers_decoders(module):
    """On an H100: logits stay in shared memory up to four tokens of Penn Treebank and WikiText-2, and two of 100,000
    words."""
    for shape in [
        (1, 15, 280, 10_000),
        (4, 15, 280, 10_000),
        (1, 15, 300, 33_278),
        (4, 15, 300, 33_278),
        (2, 7, 1_024, 100_000),
    ]:
        made = plan(module, *shape)
        assert (
            made.logits_in_shared
            and made.n_blocks == 132
            and made.shared_bytes <= SHARED_BYTES
            and made.workspace_bytes < 2**20
        )
    assert (
        not plan(module, 1, 7, 1_024, 793_471).logits_in_shared
        and not plan(module, 8, 15, 300, 33_278).logits_in_shared
    )
    large = plan(module, 8, 7, 1_024, 793_471)
    assert (
        not large.logits_in_shared
        and large.shared_bytes <= SHARED_BYTES
        and large.workspace_bytes == pytest.approx(4 * 56 * 793_471, rel=0.03)
    )
    assert plan(module, 1, 1, 280, 100).n_blocks == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, "n_tokens .* n_experts must be from 1 to 128"),
        ({"n": 9, "k": 15}, "n_tokens .* n_experts must be from 1 to 128"),
        ({"d": 33}, "latent_features must be even"),
        ({"v": 2**31}, "n_classes must be from 1"),
        ({"n": 8, "k": 15, "d": 1_024}, "latent does not fit in shared memory"),
        ({"n": 8, "k": 16, "d": 2**24}, "latent does not fit in shared memory"),
        ({"d": 2**31 - 2}, "latent does not fit in shared memory"),
        ({"mode": "TopK", "top": 65}, "k must be from 1 to 64"),
    ],
)
def test_what_cannot_be_decoded(changed, message, module):
    with pytest.raises(ValueError, match=message):
        plan(module, **{"n": 1, "k": 3, "d": 32, "v": 100} | changed)


def test_what_it_cannot_do_is_left_to_others(module):
    decoder, case = emulated(module), problem(2, 3, 33, 100).to(torch.bfloat16, ())
    log_prior = reference.log_softmax_prior(case.prior_logits).float()
    assert decoder.log_prob(case.latent, log_prior, case.weight, case.bias) is None
    assert decoder.topk(case.latent, log_prior, case.weight, case.bias, 3) is None
    assert decoder.sample(case.latent[:, 0], case.weight, case.bias, 1.0, torch.tensor([1])) is None
    even = problem(2, 3, 32, 100).to(torch.float32, ())
    assert decoder.log_prob(even.latent, even.prior_logits, even.weight, even.bias) is None


# ------------------------------------------------------------------------------------------------------- in the package


only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU")


@only_on_gpu
def test_gpu_repeats_give_equal_bits_also_from_a_graph():
    torch.set_default_device("cuda")
    case = inputs(problem(8, 15, 280, 10_000), torch.bfloat16)
    log_p, top = cuda.DECODER.log_prob(*case), cuda.DECODER.topk(*case, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.DECODER.log_prob(*case)
    for _ in range(50):
        graph.replay()
        assert torch.equal(cuda.DECODER.log_prob(*case), log_p) and torch.equal(captured, log_p)
        assert all(torch.equal(a, b) for a, b in zip(cuda.DECODER.topk(*case, 5), top))


@only_on_gpu
def test_gpu_functions():
    torch.set_default_device("cuda")
    case = problem(4, 3, 64, 2_000).to(torch.bfloat16, ())
    for function in (F.mos_log_prob, lambda *x, **options: F.mos_topk(*x, k=7, **options).values):
        torch.testing.assert_close(
            function(*case.inputs(), backend="cuda"), function(*case.inputs(), backend="triton"), rtol=0, atol=1e-3
        )
    single = case.latent[:, :1], case.prior_logits[:, :1], case.weight, case.bias
    assert torch.equal(
        F.mos_sample(*single, temperature=1e-6, backend="cuda"), F.mos_predict(*single, backend="triton")
    )
    assert "auto does not choose it" in fused_mos.backends()["cuda"]


def test_functions_take_it_where_no_gradient_is_wanted(module, monkeypatch):
    """The backend here combines the kernels of tiled with the emulated decoder."""
    used = []

    class Recorded(cuda.Decoder):
        def plan(self, *arguments):
            used.append(made := super().plan(*arguments))
            return made

    names = {name: getattr(tiled, name) for name in dir(tiled)}
    monkeypatch.setattr(
        _backends,
        "tiled",
        SimpleNamespace(**names, DECODER=Recorded(module, lambda _: (2, SHARED_BYTES), lambda _: nullcontext(1))),
    )
    case = problem(4, 3, 16, 200).to(torch.bfloat16)
    oracle = reference.log_prob(*case.to(torch.float64, ()).inputs())
    with torch.no_grad():
        torch.testing.assert_close(F.mos_log_prob(*case.inputs(), backend="tiled").double(), oracle, rtol=0, atol=1e-3)
    assert len(used) == 1 and used[0]
    assert F.mos_log_prob(*case.inputs(), backend="tiled").requires_grad and len(used) == 1
    torch.testing.assert_close(
        F.mos_topk(*case.inputs(), k=3, backend="tiled").values.double(), oracle.topk(3).values, rtol=0, atol=1e-3
    )
    assert len(used) == 2 and used[1]
    many = problem(100, 3, 16, 200).to(torch.bfloat16, ())
    assert F.mos_log_prob(*many.inputs(), backend="tiled").shape == (100, 200) and used[2] is None


def test_no_kernel_spills():
    """Six of the decoder and three of the LSTM for each architecture, as they were compiled at the install."""
    found = kernel_resources(cuda._cuda.__file__)
    architectures = {resources.architecture for resources in found}
    assert {"sm_80", "sm_90a"} <= architectures and len(found) == 9 * len(architectures)
    assert all(resources.stack == resources.local == 0 and 0 < resources.registers <= 255 for resources in found)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu():
    """The module loads where there is no driver, and says what is missing."""
    assert fused_mos.backends()["cuda"] == "torch finds no CUDA GPU"
    case = problem(2, 3, 16, 100).to(torch.bfloat16, ())
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: torch finds no CUDA GPU"):
        F.mos_log_prob(*case.inputs(), backend="cuda")
    assert cuda._cuda.versions()[0] >= 11_000 and cuda.too_new(13_000, 13_020) is cuda.too_new(12_090, 12_040) is None
    assert "built with CUDA 13.0, but the driver is for 12.8" in cuda.too_new(13_000, 12_080)
    made = plan(cuda._cuda, 1, 3, 32, 100)
    with pytest.raises(RuntimeError, match="CUDA error [0-9]+: .*driver"):
        made.log_prob(0, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>"),
        ("device::sync_warp();  // all lanes' copies", "//"),
        ("    stream();\n    device::sync_block();", "    stream();"),
        ("    device::sync_grid();\n    for (int row", "    device::sync_block();\n    for (int row"),
        ("device::sync_block();  // all threads have read the statistics or", "//"),
    ],
)
def test_the_emulation_sees_a_barrier_too_few(right, wrong, tmp_path):
    broken, case = broken_emulation("decode.cuh", right, wrong, tmp_path), problem(5, 3, 200, 600)
    log_p = reference.log_prob(*case.to(torch.bfloat16, ()).inputs())

    def wrong_somewhere():
        for order in range(5):
            decoder = emulated(broken, order=order)
            yield not torch.allclose(decoder.log_prob(*inputs(case, torch.bfloat16)), log_p, atol=0.1)
            yield not torch.allclose(decoder.topk(*inputs(case, torch.bfloat16), 5)[0], log_p.topk(5).values, atol=0.1)

    assert any(wrong_somewhere())
