"""The sdist and the wheel hold all files, and what is installed shares one pool of threads with torch."""

import os
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
    tracked = _tracked_files()
    for name in tracked:  # a copy: what an older build left in the clone would be packed, too
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)

    with tarfile.open(_build("sdist", tmp_path / "clone")) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    assert set(tracked) - packed == LEFT_OUT & set(tracked)

    (source,) = tmp_path.glob("fused_mos-*/")
    with zipfile.ZipFile(_build("wheel", source)) as wheel:
        installed = {name for name in wheel.namelist() if name.startswith("fused_mos/")}
    assert installed == {name for name in tracked if name.startswith("fused_mos/")}
    assert source.name == f"fused_mos-{fused_mos.__version__}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_use_the_threads_of_torch():
    pytest.importorskip("fused_mos._cpu")
    command = [sys.executable, str(ROOT / "tests" / "installed.py"), "--editable"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
