"""The Triton kernels beyond the tests of all backends: large addresses, rare paths and launch configurations."""

import math
import weakref

import numpy as np
import pytest
import torch
from backends import configurations, triton
from problem import check_forward_and_gradients, problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_mos import functional as F
from fused_mos._backends import IDENTITY, tiled

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from triton_interpreter import run_program

from fused_mos._backends.triton_kernels import (
    backward,
    forward,
    gradients,
    launch,
    loss,
    mixture,
    operands,
    proof,
    rows,
)
from fused_mos._backends.triton_kernels import workspace as workspace_module
from fused_mos._backends.triton_kernels.tiles import LogitGradients, Logits, TileConstants


def _untouched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are accessed."""
    bits = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)


# -------------------------------------------------------------------------------------------------------- far addresses


@pytest.mark.parametrize("what", ["rows", "classes"])
def test_rows_and_classes_beyond_two_billion_numbers(what):
    """R·D or V·D passes 2³¹: the last tile, from the statistics' and the gradient's kernel."""
    n, d = 2**21 + 64, 1024
    far, near = _untouched(n, d, dtype=torch.bfloat16), (torch.randn(64, d) / 8).bfloat16()
    assert far.numel() > 2**31
    far[-64:] = torch.randn(64, d) / 8
    z, e = (far, near) if what == "rows" else (near, far)
    row_block, class_tile = z.shape[0] // 64 - 1, e.shape[0] // 64 - 1
    logits = z[-64:].float() @ e[-64:].float().t()
    inputs = Logits(z, e, None, z.shape[0], e.shape[0])
    constants = {"D": d, "TILE": TileConstants(64, 64, 64, "ieee", False)}
    maximum, total = (torch.full((class_tile + 1, z.shape[0]), math.nan) for _ in range(2))
    program, splits = (row_block, class_tile), loss.Splits(maximum, total, None)
    run_program(rows.statistics_kernel, program, inputs, None, splits, 1, EXPERTS=1, **constants)
    assert torch.allclose(maximum[class_tile, -64:], logits.amax(1), atol=1e-4)
    assert torch.allclose(total[class_tile, -64:], (logits - logits.amax(1, keepdim=True)).exp().sum(1), rtol=1e-4)
    dl = _untouched(z.shape[0], 64, dtype=torch.bfloat16)
    zero, two = torch.zeros(z.shape[0]), torch.full((z.shape[0],), 2.0)
    statistics, weights = loss.Statistics(zero, zero, None), gradients.RowGradients(two, two)
    last_classes = LogitGradients(dl, e.shape[0] - 64, 64, 64)
    program = row_block, 0
    arguments = inputs, None, statistics, weights, last_classes
    run_program(gradients.gradient_kernel, program, *arguments, EXPERTS=1, **constants)
    assert torch.allclose(dl[-64:].float(), 2 * logits.exp(), rtol=1e-2)


def test_a_bias_gradient_beside_large_sums(monkeypatch):
    """If float32 sums of dE with extra columns would fill the workspace, dE is written directly, and the bias's
    gradient is summed separately."""
    case, kept = problem(16, 1, 64, 304, ignored=True), []
    monkeypatch.setattr(workspace_module, "WORKSPACE_BYTES", 100_000)
    monkeypatch.setattr(triton, "column_sums", lambda *inputs: kept.append(operands.column_sums(*inputs)) or kept[-1])
    check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), torch.bfloat16, "triton")
    assert len(kept) == 1


def test_log_probabilities_beyond_two_billion_numbers():
    """N·V passes 2³¹: the last tile of (2,880, 793,471) log-probabilities, and its gradient."""
    n, v, d, k = 2_880, 793_471, 16, 2
    case = problem(32, k, d, 64, ignored=False).to(torch.float32, ())
    z, log_prior = torch.zeros(n, k, d), torch.zeros(n, k)
    maximum, log_total = torch.zeros(n, k), torch.zeros(n, k)
    e, tokens, classes = torch.zeros(v, d), slice(n - 32, n), slice(v - 63, v)
    z[tokens], log_prior[tokens], e[classes] = case.latent, case.prior_logits.log_softmax(-1), case.weight[:63]
    out = _untouched(n, v, dtype=torch.float32)
    assert out.numel() > 2**31
    program = (n // 32 - 1, v // 64)
    constants = {"K": k, "D": d, "TILE": TileConstants(32, 64, 16, "ieee", False)}
    inputs = Logits(z, e, None, n, v), mixture.Mixture(log_prior, maximum, log_total)
    part = constants["TILE"]._replace(classes=32)
    run_program(mixture.log_prob_kernel, program, None, None, *inputs, out, **constants, PART=part)
    expected = torch.logsumexp(z[tokens] @ e[classes].t() + log_prior[tokens][..., None], 1)
    first = v // 64 * 64  # of the last tile
    assert torch.allclose(out[tokens, first:], expected[:, first - classes.start :], atol=1e-5)
    assert out[tokens, first - 64 : first].eq(0).all()

    out[tokens, first:] = torch.randn(32, v - first)
    s = torch.full((v // 64 + 1, n, k), math.nan)
    span = LogitGradients(None, 0, v, 0)
    arguments = None, None, *inputs, out, s, span
    run_program(mixture.mixture_gradient_kernel, program, *arguments, SECOND_SWEEP=False, **constants)
    logits = z[tokens] @ e[first:].t()
    posterior = (log_prior[tokens][..., None] + logits - expected[:, None, first - classes.start :]).exp()
    assert torch.allclose(s[v // 64, tokens], (posterior * out[tokens, None, first:]).sum(-1), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- rare paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["far above", "masked"])
def test_a_first_tile_that_says_nothing_about_the_maximum(masked, dtype, monkeypatch):
    """The forward pass takes exponentials relative to the first tile's maximum; here the others pass it by more than
    float32 has room for, in the rows of some tokens, or the whole first tile is masked."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 128, 16, 4, 1))
    case = problem(40, 3, 8, 700, ignored=False)
    case.latent[::3] *= 60
    case.weight[300:] *= 20
    case.target[:] = torch.arange(40) * 17
    if masked:
        case.bias[:128] = -1e38
        case.target[case.target < 128] = 500
    assert triton.gradient_in_forward_pays(40, 3, case.weight.to(dtype), case.bias)
    logits = case.latent @ case.weight.t() + case.bias
    assert ((logits.amax(-1) - logits[..., :128].amax(-1)) > 90).any()
    check_forward_and_gradients(
        case,
        lambda p, backend: p.nll(backend=backend),
        dtype,
        "triton",
        relative_slack=2**-7 if dtype == torch.bfloat16 else 1e-6,
    )


def test_a_target_alone_far_above_the_first_tile(monkeypatch):
    """Its exponential is in no tile's sum, and float32 has no room for it."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 128, 16, 4, 1))
    case = problem(40, 3, 8, 700, ignored=False)
    case.bias[500] += 120
    case.target[::2] = 500
    check_forward_and_gradients(
        case, lambda p, backend: p.nll(backend=backend), torch.float32, "triton", relative_slack=1e-6
    )


@pytest.mark.parametrize(
    "compute",
    [
        lambda p, backend: p.nll(backend=backend),
        lambda p, backend: p.nll(backend=backend, reduction="none"),
        lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend),
        lambda p, backend: F.mos_logsumexp(p.latent, p.weight, p.bias, backend=backend),
    ],
    ids=["mean", "none", "log_prob", "logsumexp"],
)
def test_float16(compute, workspace):
    """Weights of a mean are scaled into float16's range; a mean over many tokens would underflow."""
    requires_grad = ("latent", "prior_logits", "weight", "bias")
    case = problem(61, 3, 19, 333)
    names = (
        requires_grad
        if compute(case, "reference").dim() < 2 or compute(case, "reference").shape[-1] != 3
        else ("latent", "weight", "bias")
    )
    check_forward_and_gradients(case, compute, torch.float16, "triton", requires_grad=names)


_COMPUTED = {
    "mean": lambda p, backend: p.nll(backend=backend),
    "none": lambda p, backend: p.nll(backend=backend, reduction="none"),
    "log_prob": lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_tiles_of_gpus(architecture, dtype):
    """The tiles of the table, while other tests use one large tile: several rows of tiles with partial last ones,
    several steps of features, and resident operands."""
    case = problem(70, 3, 72, 300)
    with launch.overridden(configurations.ARCHITECTURES[architecture]):
        for compute in _COMPUTED.values():
            check_forward_and_gradients(case, compute, dtype, "triton")
        ours = F.mos_predict(*case.to(dtype, ()).inputs(), backend="triton")
    log_p = F.mos_log_prob(*case.to(torch.float64, ()).inputs(), backend="reference")
    assert torch.allclose(log_p.gather(1, ours[:, None])[:, 0], log_p.amax(1), atol=1e-5)


def test_float16_gradients_of_a_mean_do_not_underflow():
    case = problem(64, 2, 8, 50).to(torch.float16)
    (case.nll(backend="triton") * 1e-3).backward()
    oracle = case.to(torch.float64)
    (oracle.nll(backend="reference") * 1e-3).backward()
    error = (case.weight.grad.double() - oracle.weight.grad).abs().max() / oracle.weight.grad.abs().max()
    assert error < 1e-2


def test_a_factor_in_two_columns_is_rounded_twice():
    """The bias's gradient sums them: rounded once to 16 bits, it would have lost half of its digits."""
    z, factor = torch.randn(50, 8).bfloat16(), torch.rand(50)
    result = operands.scaled_rows(z, factor, z.new_empty(50, 16), 7, columns=2)
    assert torch.equal(result[:, :7], (z[:, :7].float() * factor[:, None]).bfloat16())
    assert torch.allclose(result[:, 7:9].float().sum(1), factor, rtol=2**-15, atol=0)
    assert result[:, 9:].eq(0).all()


def test_a_row_of_weight_zero_gives_no_gradient_whatever_its_statistics_are():
    rows_, weight, target = torch.randn(3, 8), torch.randn(40, 8), torch.tensor([3, 0, 39])
    log_total = torch.tensor([0.0, -math.inf, math.nan])  # as of a row whose classes are all masked
    zero = torch.zeros(3)
    for gradient in triton.rows_backward(rows_, weight, None, target, zero, log_total, zero, zero, (True,) * 3):
        assert gradient.eq(0).all()


def test_the_vocabulary_is_split_where_rows_are_few(monkeypatch):
    """One split or many: the same statistics, classes and samples but for rounding."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(16, 64, 16, 4, 1))
    case = problem(3, 2, 8, 2_000).to(torch.float32, ())
    tile, _ = launch.choose_tile("statistics", case.latent, 6, case.weight)
    results = []
    monkeypatch.setattr(forward, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    for multiprocessors in (5, 1):
        monkeypatch.setattr(configurations, "INTERPRETER", configurations.Architecture(multiprocessors, 2**30, {}))
        assert forward.splits_of_vocabulary(6, 2_000, tile, case.latent.device)[0] == multiprocessors
        generator = torch.Generator().manual_seed(0)
        results.append(
            [
                F.mos_logsumexp(case.latent, case.weight, case.bias, backend="triton"),
                F.mos_predict(*case.inputs(), backend="triton"),
                F.mos_sample(*case.inputs(), generator=generator, backend="triton"),
            ]
        )
    for split, whole in zip(*results):
        assert torch.allclose(split.double(), whole.double(), rtol=1e-6)


@pytest.mark.parametrize("k", [33, 1030])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_experts(reduction, k):
    """A program holds all experts of a token side by side."""
    case = problem(3, k, 4, 20)

    def compute(p, backend):
        return p.nll(backend=backend, reduction=reduction)

    check_forward_and_gradients(case, compute, torch.float32, "triton", relative_slack=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prior_that_is_no_distribution_draws_no_class(bad):
    """On a GPU values are not checked, and an index out of bounds or an assertion would end the process."""
    latent, prior_logits, seed = torch.randn(5, 3, 8), torch.zeros(5, 3), torch.tensor([3])
    prior_logits[0], prior_logits[2] = torch.tensor([0.0, -math.inf, -math.inf]), bad
    for backend in (triton, tiled):
        chosen = backend.choose_rows(latent, prior_logits, seed)
        assert torch.equal(chosen[0], latent[0, 0]) and chosen[2].isnan().all()
        assert all((latent[i] == chosen[i]).all(1).any() for i in (0, 1, 3, 4))
        drawn = backend.sample(chosen, torch.randn(20, 8), None, IDENTITY, seed)
        assert drawn[2] == -1 and (drawn[[0, 1, 3, 4]] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tile_narrower_than_what_fills_up_the_vocabulary(reduction, dtype, monkeypatch):
    """70 classes are padded to 128 columns of dl, but three tiles of 32 would write only 96. Memory starts as NaN to
    expose the columns that are not written."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 32, 16, 4, 1))
    empty = torch.Tensor.new_empty

    def unwritten(self, *shape, **options):
        result = empty(self, *shape, **options)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    case = problem(40, 3, 8, 70)

    def compute(p, backend):
        return p.nll(backend=backend, reduction=reduction)

    check_forward_and_gradients(case, compute, dtype, "triton", relative_slack=1e-6)


@pytest.mark.parametrize("largest_rounded", [2**20, 0], ids=["in memory", "in the kernel"])
def test_tf32_operands_are_rounded(largest_rounded, monkeypatch):
    """The products truncate: without rounding, all logits would be smaller by 0.066 %."""
    monkeypatch.setattr(configurations, "LARGEST_ROUNDED", largest_rounded)
    rows_, weight = torch.rand(100, 64) + 0.1, torch.rand(200, 64) + 0.1
    with proof.float32_products("tf32"):
        maximum, _, _ = triton.row_statistics(rows_, weight, None, None)
    exact = (rows_.double() @ weight.double().t()).amax(1)
    shift = (maximum.double() / exact - 1).mean().item()
    assert 0 < abs(shift) < 1e-4, shift


def test_the_workspace_follows_the_gpu_and_the_environment(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(workspace_module, "_memory_of_gpu", lambda: 80 * 2**30)
    assert workspace_module.workspace_bytes(gpu) == int(0.02 * 80 * 2**30)
    monkeypatch.setattr(workspace_module, "_memory_of_gpu", lambda: 8 * 2**30)
    assert workspace_module.workspace_bytes(gpu) == workspace_module.workspace_bytes(torch.device("cpu")) == 288 * 2**20
    monkeypatch.setenv("FUSED_MOS_WORKSPACE_MIB", "100")
    assert workspace_module.workspace_bytes(gpu) == 100 * 2**20
    monkeypatch.setenv("FUSED_MOS_WORKSPACE_MIB", "0.5")
    with pytest.raises(ValueError, match="FUSED_MOS_WORKSPACE_MIB must be a positive number of MiB, got '0.5'"):
        workspace_module.workspace_bytes(gpu)


def test_equal_calls_give_equal_bits():
    runs = []
    for _ in range(2):
        case = problem(50, 3, 17, 900).to(torch.bfloat16)
        case.nll(backend="triton", grad_filter_eps=0.05).backward()
        runs.append(case.gradients())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# --------------------------------------------------------------------------------------------------------------- memory


class _PeakBytes(TorchDispatchMode):
    """The peak bytes of tensors created in this mode."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in before | self.storages.keys()
            ):
                storage = tensor.untyped_storage()
                key, n_bytes = storage._cdata, storage.nbytes()
                self.storages[key] = weakref.ref(storage, lambda _, key=key, n_bytes=n_bytes: self._freed(key, n_bytes))
                self.held += n_bytes
                self.peak = max(self.peak, self.held)
        return result

    def _freed(self, key: int, n_bytes: int) -> None:
        self.held -= n_bytes
        del self.storages[key]


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
@pytest.mark.parametrize("shape", proof.SHAPES)
def test_extra_memory_at_full_size(shape, dtype, monkeypatch):
    """At most 296 MiB besides inputs and results, at the paper's shapes with an H100's tiles. Everything but the
    launches runs, on tensors without values."""
    for module in (triton, forward, backward, operands):
        monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)
    n, _, _, v = proof.SHAPES[shape]
    with proof.float32_products(dtype) as torch_dtype, launch.overridden(configurations.ARCHITECTURES["sm_90"]):
        for name, operation in proof.operations(proof.SHAPES[shape], torch_dtype, "meta").items():
            with _PeakBytes() as memory:
                result = operation()
            assert memory.peak > 0
            kept = {
                tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tree_leaves(result)
            }
            extra = (
                memory.peak - sum(kept.values()) - (4 * n * v if name == "log_prob backward" else 0)
            )  # it makes a gradient
            assert extra <= 296 * 2**20, f"{name}: {extra / 2**20:.1f} MiB"
