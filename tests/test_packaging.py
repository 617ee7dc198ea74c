"""The sdist and the wheel contain all files, and the installed package shares one thread pool with torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_mos

ROOT = Path(__file__).parent.parent
LEFT_OUT = {".gitignore", ".git-blame-ignore-revs"}
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('..'))"


def _tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def _copy_of_clone(target: Path) -> list[str]:
    """Copy the tracked files to `target`, without what an older build left in the clone, and return their names."""
    tracked = _tracked_files()
    for name in tracked:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return tracked


def _build(kind: str, source: Path) -> Path:
    """Build an sdist or a wheel with the setuptools that is here; without the native kernels, in a second."""
    environment = os.environ | {"FUSED_MOS_NATIVE": "0"}
    command = [sys.executable, "-c", BUILD.format(kind)]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return source.parent / result.stdout.splitlines()[-1]


def test_sdist_and_wheel_are_complete(tmp_path):
    """The wheel is built from the sdist, as pip does where there is no wheel for a machine."""
    pytest.importorskip("setuptools", minversion="77")
    tracked = _copy_of_clone(tmp_path / "clone")

    with tarfile.open(_build("sdist", tmp_path / "clone")) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    assert set(tracked) - packed == LEFT_OUT & set(tracked)

    (source,) = tmp_path.glob("fused_mos-*/")
    with zipfile.ZipFile(_build("wheel", source)) as wheel:
        installed = {name for name in wheel.namelist() if name.startswith("fused_mos/")}
    assert installed == {name for name in tracked if name.startswith("fused_mos/")}
    assert source.name == f"fused_mos-{fused_mos.__version__}"


def test_the_version_is_the_same_everywhere():
    released = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert fused_mos.__version__ == released[1] == cited[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_use_the_threads_of_torch():
    pytest.importorskip("fused_mos._cpu")
    command = [sys.executable, str(ROOT / "tests" / "installed.py"), "--editable"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


STEPS = """
import hashlib, torch, fused_mos
from fused_mos import _cpu
from fused_mos._backends import cpu_operands
torch.set_num_threads(4)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    head = fused_mos.MoS(in_features=32, n_classes=900, n_experts=3, latent_features=37, backend="cpu").to(dtype)
    hidden = torch.randn(70, 32, dtype=dtype, requires_grad=True)
    head(hidden, torch.randint(900, (70,))).loss.backward()
    for gradient in (hidden.grad, *(p.grad for p in head.parameters())):
        digest.update(gradient.float().numpy().tobytes())
print(digest.hexdigest(), cpu_operands.n_threads(), fused_mos.backends()["cpu"], sep="|")
"""


def _steps(package: Path) -> list[str]:
    """Return a digest of the gradients that a package computes, its threads, and its entry in `backends()`."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    result = subprocess.run([sys.executable, "-c", STEPS], cwd=package, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("|")


@pytest.mark.slow
def test_a_build_without_openmp_says_so_and_computes_the_same(tmp_path):
    if not pytest.importorskip("fused_mos._cpu").threaded:
        pytest.skip("the installed kernels are single-threaded, too")
    _copy_of_clone(tmp_path / "clone")
    environment = os.environ | {"FUSED_MOS_OPENMP": "OFF", "FUSED_MOS_NATIVE": "1", "CUDACXX": "none"}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "single"), "."]
    result = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    digest, n_threads, availability = _steps(tmp_path / "single")
    assert n_threads == "1" and availability.endswith(", single-threaded: built without OpenMP)")
    threaded_digest, threads, _ = _steps(ROOT)
    assert threads == "4" and digest == threaded_digest
