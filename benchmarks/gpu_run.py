"""Measure the cases of benchmarks.gpu that its file lacks, in the process that it watches.

Exit status: 0 when none is left, 1 when the time is up, 2 if there is no GPU, 3 when a case took the CUDA context with
it, so that another process must go on.
"""

import importlib
import sys
import time

import tyro

from . import gpu_cases, gpu_device
from .gpu import LOST, TIME_IS_UP, UNUSABLE, Config, results_path
from .gpu_cases import SECONDS, Case
from .gpu_report import finish, line
from .gpu_results import Results, about

MODULES = {
    "head": "gpu_head",
    "training": "gpu_training",
    "decode": "gpu_decode",
    "filter": "gpu_filter",
    "checks": "gpu_checks",
    "sweep": "gpu_sweep",
}
"""The module with the function `measure` of each step's cases."""


def row_of(case: Case, config: Config) -> dict:
    """The case's measurements, or under "failed" or "unavailable" why there are none, in one line."""
    start = time.perf_counter()
    try:
        module = importlib.import_module(f".{MODULES[case.step]}", __package__)
        more = (config.run, config.data) if case.step == "filter" else ()
        row = module.measure(*case.parts, *more)
    except Exception as error:  # whatever it is, the other cases are not to blame
        first = (str(error).strip().splitlines() or ["no message"])[0][:200]
        known = getattr(error, "name_in_row", "")  # a reason that stands for itself
        row = {known: first} if known else {"failed": f"{type(error).__name__}: {first}"}
    return {"case": list(case.parts)} | row | {"seconds": round(time.perf_counter() - start, 1)}


def wanted_cases(config: Config) -> list[Case]:
    return [
        case
        for case in gpu_cases.cases(config.steps, config.shapes, config.dtypes)
        if all(word in case.key for word in config.only)
        and not any(word in case.key for word in config.without)
        and (case.step != "filter" or config.run)
    ]


def run(config: Config) -> int:
    if reason := gpu_device.prepare():
        print(f"error: {reason}", file=sys.stderr)
        return UNUSABLE
    facts = about(gpu_device.gpu_name(), gpu_device.ROOT, config.commit)
    results = Results(results_path(config), facts)
    wanted = wanted_cases(config)
    if config.again:
        for case in wanted:
            results.rows.pop(case.key, None)
    left = [case for case in wanted if not results.has(case.key)]
    print(f"{facts['gpu']}, {len(wanted)} cases, {len(left)} to run", flush=True)
    deadline = time.monotonic() + 60 * config.minutes
    for i, case in enumerate(left):
        if time.monotonic() > deadline:
            print(f"time is up: {len(left) - i} cases are left for the next call", flush=True)
            finish(results)
            return TIME_IS_UP
        results.begin(case.key, SECONDS[case.step])
        row = row_of(case, config)
        results.finish(case.key, row)
        print(line(case.key, row), flush=True)
        if "failed" in row and gpu_device.is_lost():
            return LOST
    finish(results)
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config)))
