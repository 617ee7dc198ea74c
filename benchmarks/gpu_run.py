"""The measuring process of benchmarks.gpu: measures the cases that are missing in its file.

Exit status: 0 if none is left, 1 if the time is up, 2 if there is no GPU, 3 if a case broke the CUDA context and
another process must continue.
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
"""For each step, the module whose function `measure` measures its cases."""


def row_of(case: Case, config: Config) -> dict:
    """The case's measurements or, under "failed" or "unavailable", the reason why there are none, in one line."""
    start = time.perf_counter()
    try:
        module = importlib.import_module(f".{MODULES[case.step]}", __package__)
        more = (config.run, config.data) if case.step == "filter" else ()
        row = module.measure(*case.parts, *more)
    except Exception as error:  # any error; the other cases still run
        first = (str(error).strip().splitlines() or ["no message"])[0][:200]
        known = getattr(error, "name_in_row", "")  # set for errors whose message is the reason
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
