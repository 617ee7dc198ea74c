"""Builds the native kernels with CMake and Ninja; all other metadata is in pyproject.toml.

The kernels are optional: where they cannot be built (no C++ compiler, no nvcc), the package installs without them, and
`fused_mos.backends()` says why the backend `cpu` or `cuda` is missing. FUSED_MOS_NATIVE=0 leaves them out; =1 makes a
failure fatal, but for a missing nvcc, and warnings and spilled registers of the CUDA kernels, too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODULES = ("_cpu", "_cuda")
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc") or ""
WANTED = os.environ.get("FUSED_MOS_NATIVE", "")


def first_error(log: str) -> str:
    """The first line of a build's log that speaks of an error, and the lines of its paragraph, as one line."""
    lines = [line.strip() for line in log.splitlines()]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    return " ".join(line for line in lines[start : start + 6] if line)


class CMakeBuild(build_ext):
    """One run of CMake + Ninja; the modules are installed to where setuptools expects them."""

    def run(self) -> None:
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        for module in MODULES:
            for stale in [*package.glob(f"{module}.*"), *package.glob(f"{module}_missing.txt")]:
                stale.unlink()
        built = []
        for module in MODULES:
            try:
                if module == "_cuda" and not NVCC:
                    raise FileNotFoundError("there is no nvcc (CUDACXX names one that is not on the PATH)")
                self.build(module, package)
                built.append(module)
            except (OSError, subprocess.CalledProcessError) as error:
                if WANTED == "1" and (module == "_cpu" or NVCC):
                    raise
                cause = first_error(str(getattr(error, "output", "") or error))
                (package / f"{module}_missing.txt").write_text(
                    f"the native kernels were not built when the package was installed: {cause}\n"
                )
                print(f"warning: fused_mos installs without {module}: {cause}", file=sys.stderr)
        self.extensions = [
            e for e in self.extensions if e.name.rpartition(".")[2] in built
        ]  # so that setuptools does not look for others

    def package_folder(self) -> Path:
        """The package folder that the modules go to: the source tree's for an editable install, else the build's."""
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "fused_mos"

    def build(self, module: str, target: Path) -> None:
        """Each module in a folder of its own, so that an nvcc that does not work is not asked for the CPU's."""
        import pybind11

        work = Path(self.build_temp).resolve() / module
        work.mkdir(parents=True, exist_ok=True)
        self.call(
            # afresh: an older cache names the ninja of an isolated build environment that is gone
            "cmake",
            "--fresh",
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSED_MOS_SANITIZE={os.environ.get('FUSED_MOS_SANITIZE', 'OFF')}",
            f"-DFUSED_MOS_STRICT={'ON' if WANTED == '1' else 'OFF'}",
            f"-DFUSED_MOS_NVCC={NVCC if module == '_cuda' else ''}",
        )
        self.call("cmake", "--build", str(work), "--target", module)
        self.call("cmake", "--install", str(work), "--prefix", str(target), "--component", module)

    def call(self, *command: str) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(result.stdout)
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, command, result.stdout)


setup(
    ext_modules=[] if WANTED == "0" else [Extension(f"fused_mos.{module}", sources=[]) for module in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
