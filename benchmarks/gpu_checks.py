"""Runs the test suite on a GPU, and parts of it under compute-sanitizer."""

import importlib.util
import os
import shutil
import subprocess
import sys

from .gpu_device import DRY_RUN, ROOT


def run_tests(selection: list[str], wrapper: tuple[str, ...] = (), **environment: str) -> dict:
    """Run pytest in a process of its own. Return whether it passed, its summary and its failures."""
    command = [*wrapper, sys.executable, "-m", "pytest", *selection]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "========="))]
    return {"passed": result.returncode == 0, "summary": lines[-1] if lines else "", "failures": failures[:40]}


def tests() -> dict:
    """Run all tests of the GPU's kernels, except those of the interpreter and of compilation, which need no GPU."""
    if DRY_RUN:
        return run_tests(["tests/test_gpu.py", "-k", "classes"])
    workers = ["-n", str(min(len(os.sched_getaffinity(0)), 14))] if importlib.util.find_spec("xdist") else []
    ours = [f"--deselect=tests/{name}.py" for name in ("test_triton", "test_tune")]
    return run_tests(["tests", "-k", "triton or gpu or test_cuda", "-p", "no:benchmark", *workers, *ours])


def sanitize(tool: str) -> dict:
    """Run a tool of compute-sanitizer. memcheck runs without torch's caching allocator, to make tensors end where
    allocations end. racecheck and synccheck run on our CUDA kernel; the barriers of Triton's are its compiler's."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"passed": None, "summary": "compute-sanitizer was not found"}
    decoding = "gpu and (log_prob_and_topk or rare or samples) and not 100000 and not 793471"
    selections = [["tests/test_cuda.py", "-k", decoding]]
    if tool == "memcheck":
        functions = "triton and (without_bias or predict or topk or non_contiguous or filter or float16)"
        selections.append(["tests/test_functional.py", "-k", functions])
    wrapper = (sanitizer, "--tool", tool, "--error-exitcode", "9")
    results = [run_tests(selection, wrapper, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for selection in selections]
    return {
        "passed": all(result["passed"] for result in results),
        "summary": "; ".join(result["summary"] for result in results),
        "failures": [line for result in results for line in result["failures"]],
    }


def measure(name: str) -> dict:
    """The row of a check in gpu_cases."""
    return tests() if name == "tests" else sanitize(name)
