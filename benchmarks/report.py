"""Keep measured rows, and make the documents' tables and plots from them:

    pytest benchmarks --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report --record run.json   # its rows into benchmarks/results/machines/; then as without
    python -m benchmarks.report                     # tables of README.md and docs/, and the plots, from JSON
    python -m benchmarks.report --verify            # exit status 1 where a document shows something else
    python -m benchmarks.report --show MACHINE      # the tables of one machine, in the terminal
    python -m benchmarks.report --compare run.json  # measures what fell by more than 10 % again; names what did each
                                                    # time, with exit status 1

A table of a document stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is one of experiments/tables.py,
made from experiments/results/. Or it is one of benchmarks/tables.py and the machine: the name of a file in
benchmarks/results/machines/, whose plot lies beside it. Or one of benchmarks/gpu_tables.py and the GPU: the name of a
file in benchmarks/results/, as benchmarks.gpu writes it.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro

from experiments.plots import draw
from experiments.tables import BLOCKS
from fused_mos.runtime import files, plots

from .gpu_tables import OF_A_GPU, gpus
from .plots import README_MACHINE, STEP_PLOT, head_axes, step_bars
from .tables import MACHINES, OF_A_MACHINE, OURS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FELL = 0.1
"""Relative worsening of a ratio that --compare reports."""
MACHINE = ("device", "device type", "instruction set", "threads")
"""Entries of a row's extra_info that all rows of a file share."""
VERSIONS = ("torch", "python")
"""Entries that each row keeps for itself."""


@dataclasses.dataclass
class Config:
    record: Path | None = None
    """A --benchmark-json file whose rows replace the recorded ones; other rows stay."""
    compare: Path | None = None
    """A --benchmark-json file to compare with the rows recorded for the same machine."""
    again: int = 2
    """How often --compare measures a worse row again, since a shared machine can be slow for minutes."""
    show: str | None = None
    """Print the tables of this machine."""
    verify: bool = False
    """Write nothing; exit status 1 if a document shows other tables."""


def condensed(path: Path) -> dict[str, Any]:
    """The rows of a --benchmark-json file and the machine they were measured on. Raises SystemExit for any other
    file."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found = [bench["extra_info"] for bench in run["benchmarks"] if "contender" in bench["extra_info"]]
        about = {name: run["machine_info"][name] for name in MACHINE}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"error: {path} must be a file that pytest benchmarks --benchmark-only --benchmark-json wrote: "
            f"{type(error).__name__}: {error}"
        ) from None
    rows = [
        {name: value for name, value in row.items() if name not in MACHINE} | {"date": run["datetime"][:10]}
        for row in found
    ]
    return about | {
        "units": "median, minimum, maximum; ms; MiB beside the inputs, of which gradients and results are kept",
        "rows": rows,
    }


def results_of(about: dict[str, Any]) -> Path:
    """Of a machine: a GPU by its name, a CPU with the instruction set and the number of threads that were used."""
    name = (
        about["device"]
        if about["device type"] == "cuda"
        else "{} {} {} threads".format(*(about[name] for name in MACHINE if name != "device type"))
    )
    return MACHINES / (re.sub(r"\W+", "-", name.lower()) + ".json")


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in ("figure", "case", "dtype", "operation", "contender"))


def record(path: Path) -> Path:
    """Rows that are new replace recorded ones in their place."""
    run = condensed(path)
    file = results_of(run)
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows = {key(row): row for row in old} | {key(row): row for row in run["rows"]}
    files.write_json(file, run | {"rows": list(rows.values())})
    return file


def fallen(recorded: dict[str, Any], fresh: dict[str, Any]) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """What is worse by more than FELL in the median, ours over the floor, and how much faster we are than a peer: by
    row, where even its best round is worse than the worst of the recorded ones; and where their rounds overlap, which
    is what noise does."""
    apart, overlapping, old = {}, [], {key(row): row for row in recorded["rows"]}
    for row in fresh["rows"]:
        before, name = old.get(key(row), {}), ", ".join(key(row)[:-1])
        if "failed" in row:
            if row["contender"] == OURS:
                apart[key(row)] = f"{name}: {row['failed']}"
            continue
        if row["contender"] == OURS and "over floor" in before:
            was, now = before["over floor"], row["over floor"]
            worst, best = was * before["ms"][2] / before["ms"][0], now * row["ms"][1] / row["ms"][0]
            fell, is_apart = now * (1 - FELL) > was, best > worst
            text = f"{name}: time ÷ floor was {was:.2f} (at most {worst:.2f}) and is {now:.2f} (at least {best:.2f})"
        elif row["contender"] != OURS and "times ours" in before:
            (was, worst, _), (now, _, best) = before["times ours"], row["times ours"]
            fell, is_apart = now < (1 - FELL) * was, best < worst
            text = (
                f"{name}: {row['contender']} took {was:.2f} times as long as ours (at least {worst:.2f}) and "
                f"takes {now:.2f} (at most {best:.2f})"
            )
        else:
            continue
        if fell and is_apart:
            apart[key(row)] = text
        elif fell:
            overlapping.append(text)
    return apart, overlapping


def measured_again(path: Path, rows: Iterable[tuple[str, ...]]) -> Path:
    """A file of --benchmark-json beside `path`, of these of its rows."""
    tests = [
        bench["fullname"]
        for bench in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        if key(bench["extra_info"]) in rows
    ]
    file = path.with_name(f"{path.stem}-again.json")
    subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "--benchmark-only", "-q", f"--benchmark-json={file.resolve()}"],
        cwd=ROOT,
        check=True,
    )
    return file


def compare(path: Path, again: int) -> int:
    run = condensed(path)
    file = results_of(run)
    if not file.is_file():
        print(
            f"error: nothing is recorded for this machine; python -m benchmarks.report --record {path} keeps this "
            f"run in {file}",
            file=sys.stderr,
        )
        return 2
    recorded = json.loads(file.read_text(encoding="utf-8"))
    for name in VERSIONS:
        before, now = (", ".join(sorted({row[name] for row in rows})) for rows in (recorded["rows"], run["rows"]))
        if before != now:
            print(f"note: recorded with {name} {before}, this is {now}")
    common = {key(row) for row in recorded["rows"]} & {key(row) for row in run["rows"]}
    found, overlapping = fallen(recorded, run)
    for text in overlapping:
        print(f"note: in rounds that overlap, {text}")
    for _ in range(again):
        if not found:
            break
        print("\n".join(["to be measured again:", *found.values()]), flush=True)
        found, _ = fallen(recorded, condensed(measured_again(path, found)))
    within = f", but {len(overlapping)} did within them" if overlapping else ""
    print(
        "\n".join(["fell:", *found.values()])
        if found
        else f"no ratio of {len(common)} rows fell by more than {FELL:.0%} in rounds worse than the recorded{within}"
    )
    return int(bool(found))


def with_tables(text: str, name: str) -> str:
    """A document with its tables made anew. Raises SystemExit for a NAME that does not exist."""

    def made(match: re.Match) -> str:
        block, *of = match[1].split()
        kinds = (BLOCKS, []), (OF_A_MACHINE, machines()), (OF_A_GPU, gpus())
        found = [(blocks, known) for blocks, known in kinds if block in blocks]
        if not found:
            names = ", ".join(name for blocks, _ in kinds for name in blocks)
            raise SystemExit(f"error: {name} asks for table {block!r}; there are {names}")
        ((blocks, known),) = found
        if bool(of) != bool(known) or of and (len(of) > 1 or of[0] not in known):
            needed = [f"{', '.join(blocks)} need one of {', '.join(known)}" for blocks, known in kinds if known]
            raise SystemExit(f"error: {name} asks for table {match[1]!r}; {', '.join(needed)}, others none")
        return f"<!-- table: {match[1]} -->\n{blocks[block](*of)}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def machines() -> list[str]:
    return sorted(file.stem for file in MACHINES.glob("*.json"))


def show(machine: str) -> int:
    if machine not in machines():
        print(f"error: --show must be one of {', '.join(machines()) or 'none yet'}, got {machine!r}", file=sys.stderr)
        return 2
    print("\n\n".join(f"{name}\n\n{block(machine)}" for name, block in OF_A_MACHINE.items()))
    return 0


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.report", description=__doc__)
    if config.compare:
        return compare(config.compare, config.again)
    if config.show:
        return show(config.show)
    if config.record:
        file = record(config.record)
        print(f"recorded in {file}; python -m benchmarks.report --show {file.stem}")
    different = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if (made := with_tables(text, document.name)) != text:
            different.append(document.name)
            if not config.verify:
                files.write_text(document, made)
    if config.verify:
        print(
            "\n".join(f"{name} shows other tables than python -m benchmarks.report makes" for name in different)
            or "all tables are those of the results"
        )
        return int(bool(different))
    for name in machines():
        head_axes(name)
    plots.save(step_bars(README_MACHINE), STEP_PLOT, dpi=200)
    drawn = [f"{name}.png" for name in machines()] + [STEP_PLOT.name, *(path.name for path in draw())]
    print(f"written: {', '.join([*different, *drawn])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
