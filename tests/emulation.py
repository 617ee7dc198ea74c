"""Compiles the kernels of csrc/cuda into a module that runs them thread by thread on a CPU (csrc/cuda/emulation.h)."""

import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
SHARED_BYTES = 227 * 1024
"""Shared memory that a block may use on an H100."""

_numbers = itertools.count()


def emulation(sources: Path, folder: Path) -> ModuleType:
    """The module of bindings.cpp with the emulated kernels."""
    name = f"_cuda_emulation_{next(_numbers)}"  # a new name, since pybind11 returns the old module for a known one
    path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    flags = "-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
    names = "bindings", "plan", "lstm_plan", "decode_emulation", "lstm_emulation"
    files = [str(sources / f"{name}.cpp") for name in names]
    subprocess.run(["g++", *flags, f"-DFUSED_MOS_MODULE={name}", *includes, *files, "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken_emulation(file: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """`emulation` with an error: in `file`, `wrong` replaces the only occurrence of `right`."""
    for path in SOURCES.iterdir():
        shutil.copy(path, folder)
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    return emulation(folder, folder)
