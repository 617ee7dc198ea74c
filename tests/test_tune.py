"""Tile sizes tuned on this machine, and the proof, without a GPU, that every kernel compiles."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import configurations, triton

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from fused_mos import tune
from fused_mos._backends.triton_kernels import proof, shapes, tuning
from fused_mos._backends.triton_kernels.tiles import LogitGradients, Logits

# ------------------------------------------------------------------------------------------------------------ the tuner


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configurations.of_device.cache_clear()
    yield tmp_path
    configurations.of_device.cache_clear()


def test_tuned_tiles_are_used(cache, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    tile, key = configurations.Tile(64, 64, 32, 4, 2, False, True), "many 16-bit gradient narrow"
    path = configurations.save_tuned(gpu.name, {key: tile})
    assert cache in path.parents and "H100" in path.name
    architecture = configurations.of_device(0)
    assert architecture.tiles == configurations.ARCHITECTURES["sm_90"].tiles | {key: tile}
    for content in ("{", '{"unknown key": [1, 2, 3, 4, 5, false]}', f'{{"{key}": [64]}}'):
        path.write_text(content)
        configurations.of_device.cache_clear()
        with pytest.raises(
            ValueError, match=r"H100.*is not a table of tiles .*; delete it, or run `python -m fused_mos.tune` again"
        ):
            configurations.of_device(0)


def test_candidates_fit():
    for family, precision, rows_ in itertools.product(
        configurations.FAMILIES, configurations.PRECISIONS, configurations.ROW_CLASSES
    ):
        found = list(tuning.candidates(family, precision, rows_, 280, configurations.ARCHITECTURES["sm_120"]))
        assert len(found) == len(set(found)) > 5
        assert any(tile.described for tile in found) == (family != "sample")
        assert all(tile.rows * tile.classes <= 128 * 32 * tile.warps for tile in found)


def test_tuning_saves_the_fastest_and_goes_on_where_it_stopped(cache, monkeypatch, capsys):
    """The tuner with the interpreter's kernels, real times, and few candidates."""
    every = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *arguments: itertools.islice(every(*arguments), 2))
    monkeypatch.setitem(shapes.SHAPES, "few-rows", (4, 2, 8, 300))
    arguments = ["--shapes", "few-rows", "--dtypes", "float32"]
    assert tune.main(arguments) == 0
    tuned = configurations.load_tuned("interpreter")
    assert set(tuned) == {f"few ieee {family} narrow" for family in configurations.FAMILIES}
    assert (
        f"{len(configurations.FAMILIES)} configurations in {configurations.cache_file('interpreter')}"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(tuning, "_seconds", lambda operation: pytest.fail("measured what the cache has"))
    assert tune.main(arguments) == 0
    assert configurations.load_tuned("interpreter") == tuned


def test_the_tuner_says_what_it_needs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", "fused_mos.tune"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: torch finds no CUDA GPU to tune for; --compile-only needs none\n",
    )
    assert tune.main(["--compile-only"]) == 2


# ------------------------------------------------------------------------------------------------- proof by compilation


def _compile(architecture: str, path: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "fused_mos.tune",
        "--compile-only",
        "--arch",
        architecture,
        "--json",
        str(path),
        *flags,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result, json.loads(path.read_text())["kernels"]


def _assert_sound(result, kernels) -> None:
    assert result.returncode == 0, (
        "\n".join(line for line in result.stderr.splitlines() if "FAULT" in line) or result.stderr[-2000:]
    )
    assert "0 faults" in result.stdout
    products = [kernel for kernel in kernels if kernel["key"]]
    every = {
        f"{rows_} {p} {f} {w}"
        for rows_ in configurations.ROW_CLASSES
        for p in configurations.PRECISIONS
        for f in configurations.FAMILIES
        for w in configurations.WIDTH_CLASSES
    }
    assert {kernel["key"] for kernel in products} == every, "a configuration of the table was not compiled"
    for kernel in products:
        multiplies = any(kernel["instructions"][name] for name in ("wgmma", "tcgen05", "mma.sync"))
        assert multiplies, f"{kernel} has no tensor-core product"
        copies = kernel["instructions"]["cp.async"] or kernel["instructions"]["TMA"]
        assert copies, f"{kernel} has no asynchronous copy"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_every_configuration_compiles_without_spills(architecture, tmp_path):
    _assert_sound(*_compile(architecture, tmp_path / "kernels.json", "--brief"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_every_kernel_compiles_without_spills_for_every_shape_and_dtype(architecture, tmp_path):
    _assert_sound(*_compile(architecture, tmp_path / "kernels.json"))


def test_a_kernel_that_spills_is_found(tmp_path):
    """The proof can fail: a tile of 256 × 256 needs more registers than 4 warps have, and too much shared memory."""
    script = """
import fused_mos.tune
from fused_mos._backends.triton_kernels import configurations, proof
table = configurations.ARCHITECTURES["sm_90"].tiles
table["many 16-bit statistics narrow"] = configurations.Tile(256, 256, 64, 4, 2)
table["many 16-bit gradient narrow"] = configurations.Tile(64, 128, 128, 4, 8)
raise SystemExit(fused_mos.tune.main(["--compile-only", "--brief", "--shapes", "softmax", "--dtypes", "bfloat16"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "FAULT statistics_kernel bf16 (many 16-bit statistics narrow) (256, 256, 64, 4, 2): spills" in result.stderr
    assert "bytes of shared memory, sm_90 has 232448" in result.stderr


def test_described_kernels_compile_without_spills():
    """Loads by TMA, stores of tiles likewise, and one product of 256 columns."""
    script = """
from fused_mos._backends.triton_kernels import configurations, proof, shapes
import torch
architecture = configurations.ARCHITECTURES["sm_90"]
calls = proof.recorded_calls(architecture, shapes.SHAPES["ptb"], torch.bfloat16, {})
kinds = "persistent", "described", "log_prob", "predict", "mixture_gradient"
calls = {call.kernel.__name__: call for call in calls if call.kernel.__name__.startswith(kinds)}
assert len(calls) == 6, calls
for call in calls.values():
    compiled = proof.compile_call(call, "sm_90", ())
    assert not compiled.faults("sm_90"), compiled
    found = compiled.instructions
    assert found["wgmma"] and found["TMA"] >= 4, compiled
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_proof_compiles_every_kernel():
    modules = vars(sys.modules["fused_mos._backends.triton_kernels"]).values()
    kernels = {name for module in modules for name in getattr(module, "__dict__", ()) if name.endswith("_kernel")}
    calls = proof.distinct_calls("sm_90", ("ptb",), ("bfloat16", "float32"), brief=True)
    assert {call.kernel.__name__ for call, _ in calls} == kernels
    capped = {call.kernel.__name__ for call, _ in calls if proof.is_capped(call)}
    sixteen_bits = [call for call, _ in calls if "16-bit" in call.key]
    of_logits = {call.kernel.__name__ for call in sixteen_bits if any(isinstance(a, Logits) for a in call.arguments)}
    assert capped == of_logits | {"mix_kernel"} and len(capped) > 8


def test_the_proof_compiles_what_a_launch_would():
    """Types, constants and divisibility are those of Triton's own launcher, and so are their places in a NamedTuple."""
    from triton._C.libtriton import native_specialize_impl
    from triton._utils import find_paths_if, get_iterable_path
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.tools.tensor_descriptor import TensorDescriptor

    leaves = [0, 1, 2, 16, 280, 2**31, -5, 1.5, None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool):
        whole = torch.zeros(64, dtype=dtype)
        assert whole.data_ptr() % 16 == 0
        leaves += [whole, whole[1:], whole[16:]]
    leaves.append(TensorDescriptor.from_tensor(torch.zeros(300, 64, dtype=torch.bfloat16), [128, 32]))
    bundles = [Logits(whole, whole[1:], None, 1, 280), LogitGradients(None, 2**31, 1, 16)]
    for arguments in ([*leaves, *bundles], [*bundles, *leaves]):
        types, specialised = zip(*(native_specialize_impl(CUDABackend, a, False, True, True) for a in arguments))
        assert tuple(proof._type(argument) for argument in arguments) == types
        members = dict(proof._members(arguments))
        assert list(members) == find_paths_if(types, lambda path, kind: True)
        for path, member in members.items():
            kind, value, aligned = proof._specialisation(member)
            theirs = get_iterable_path(specialised, path)
            assert (value if kind == "constexpr" else "D" if aligned else "") == (
                theirs or (None if kind == "constexpr" else "")
            ), (path, member)
    assert proof._type(bundles[0])._fields == Logits._fields
