"""Builds the native kernels with CMake and Ninja; all other metadata is in pyproject.toml.

The kernels are optional: where they cannot be built (no C++ compiler), the package installs without them, and
`fused_mos.backends()` says why the backend `cpu` is missing. FUSED_MOS_NATIVE=0 leaves them out; =1 makes a failure fatal.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
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
        reason = package / "_cpu_missing.txt"
        for stale in [reason, *package.glob("_cpu.*")]:
            stale.unlink(missing_ok=True)
        try:
            self.build(package)
        except (OSError, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise
            cause = first_error(str(getattr(error, "output", "") or error))
            reason.write_text(f"the native kernels were not built when the package was installed: {cause}\n")
            print(f"warning: fused_mos installs without its native kernels: {cause}", file=sys.stderr)
            self.extensions = []  # so that setuptools does not look for them

    def package_folder(self) -> Path:
        """The package folder that the modules go to: the source tree's for an editable install, else the build's."""
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "fused_mos"

    def build(self, target: Path) -> None:
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            # afresh: an older cache names the ninja of an isolated build environment that is gone
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSED_MOS_SANITIZE={os.environ.get('FUSED_MOS_SANITIZE', 'OFF')}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(work)], ["cmake", "--install", str(work), "--prefix", str(target)]):
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(result.stdout)
            if result.returncode:
                raise subprocess.CalledProcessError(result.returncode, command, result.stdout)


setup(
    ext_modules=[] if WANTED == "0" else [Extension("fused_mos._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
