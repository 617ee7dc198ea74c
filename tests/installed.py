"""Checks an installed package: `python tests/installed.py`, with the environment's own Python.

`make wheel-check` and the wheels' workflow run it. It needs neither pytest nor the clone. (With -m, Python would import
the clone instead.) `--editable` skips the check that the package is in the environment.
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

import torch

import fused_mos


def openmp_runtimes() -> set[str]:
    """Paths of the OpenMP runtimes that this process has loaded."""
    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in mapped if re.match(r"lib[gi]?omp", Path(path).name)}


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def step(head: fused_mos.MoS, backend: str) -> torch.Tensor:
    torch.manual_seed(0)
    hidden = torch.randn(400, 32, requires_grad=True)
    head.backend = backend
    head(hidden, torch.randint(2000, (400,))).loss.backward()
    return hidden.grad


def main(editable: bool) -> None:
    package = Path(fused_mos.__file__).resolve()
    environment = Path(sysconfig.get_path("platlib")).resolve()
    assert editable or environment in package.parents, f"imported {package}, outside {environment}"
    assert fused_mos.backends()["cpu"].startswith("available"), fused_mos.backends()["cpu"]

    torch.set_num_threads(4)  # more than one on any machine, so that each runtime has a pool
    head = fused_mos.MoS(in_features=32, n_classes=2000, n_experts=3, latent_features=24)
    expected = step(head, "reference")  # starts the threads of torch's pool, and those of autograd, if any
    before = n_threads()
    error = (step(head, "cpu") - expected).abs().max().item()
    assert error < 1e-4 * expected.abs().max().item(), f"gradients differ by {error}"

    # the threads of two runtimes would compete for the cores and slow small operations down a hundredfold
    runtimes = openmp_runtimes()
    assert len(runtimes) == 1, f"torch and the kernels must share one OpenMP runtime: {sorted(runtimes)}"
    assert n_threads() <= before, f"the kernels started {n_threads() - before} threads of their own"
    print(f"fused_mos {fused_mos.__version__}, {package.parent}, cpu {fused_mos.backends()['cpu']}, {runtimes.pop()}")


if __name__ == "__main__":
    main("--editable" in sys.argv[1:])
