"""Builds the native kernels with CMake and Ninja; all metadata is in pyproject.toml.

The kernels are optional. Without a C++ compiler or nvcc, the package installs without them, and `fused_mos.backends()`
tells why the backend `cpu` or `cuda` is missing. Environment variables:

- FUSED_MOS_NATIVE=0 skips the kernels. FUSED_MOS_NATIVE=1 makes a failed build an error, as well as warnings and
  spilled registers of the CUDA kernels; a missing nvcc is still accepted.
- FUSED_MOS_OPENMP=OFF builds the CPU kernels for a single thread.
- FUSED_MOS_SANITIZE=ON builds them with AddressSanitizer and UBSan.
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
OPTIONS = {name: os.environ[name] for name in ("FUSED_MOS_OPENMP", "FUSED_MOS_SANITIZE") if name in os.environ}


def first_error(log: str) -> str:
    """Return the first line of a build's log that mentions an error, joined with the five lines after it."""
    lines = [line.strip() for line in log.splitlines()]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    return " ".join(line for line in lines[start : start + 6] if line)


class CMakeBuild(build_ext):
    """Run CMake and Ninja for each module, and install it where setuptools expects it."""

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
                    f"this package was built without the native kernels: {cause}\n"
                )
                print(f"warning: installing fused_mos without {module}: {cause}", file=sys.stderr)
        # setuptools expects a file for each extension in this list
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] in built]

    def package_folder(self) -> Path:
        """Return the folder for the modules: in the source tree for an editable install, else in the build's copy."""
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "fused_mos"

    def build(self, module: str, target: Path) -> None:
        """Build a module in its own folder, so that a broken nvcc cannot make the build of the CPU module fail."""
        import pybind11

        work = Path(self.build_temp).resolve() / module
        work.mkdir(parents=True, exist_ok=True)
        self.call(
            "cmake",
            # an old cache may point to the ninja of a deleted build environment
            "--fresh",
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(f"-D{name}={value}" for name, value in OPTIONS.items()),
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
