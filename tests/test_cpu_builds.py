"""The CPU kernels' own test, csrc/cpu/self_test.cpp, as built with and without OpenMP."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_cpu = pytest.importorskip("fused_mos._cpu")

ROOT = Path(__file__).parent.parent
# as CMake builds them for each instruction set
KERNEL_SOURCES = re.search(r"set\(KERNEL_SOURCES (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL)[1].split()
OTHER_SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "workspace", "self_test")]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def _build(target: Path, *flags: str) -> Path:
    """Compile the program with the one instruction set that takes seconds; `make self-test` has all of them."""
    definitions = ("-DFUSED_MOS_NAMESPACE=generic", '-DFUSED_MOS_ISA_NAME="generic"')
    sources = [str(ROOT / source) for source in (*KERNEL_SOURCES, *OTHER_SOURCES)]
    warnings = ("-Wall", "-Wextra", "-Wno-psabi", "-Werror")
    command = [COMPILER, "-std=c++17", "-O1", *warnings, *definitions, *flags, *sources, "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def _run(program: Path, n_threads: int) -> str:
    """Return what the program prints, with its digest of all results."""
    result = subprocess.run([program, str(n_threads)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.compiles
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_kernels_give_the_same_bits_without_openmp(tmp_path):
    single = _run(_build(tmp_path / "single", "-Wno-unknown-pragmas"), 1)
    assert "generic: 0 failures" in single
    if not _cpu.threaded:
        pytest.skip("the compiler has no OpenMP")
    threaded = _build(tmp_path / "threaded", "-fopenmp")
    assert {_run(threaded, n_threads) for n_threads in (1, 2, 5)} == {single}
