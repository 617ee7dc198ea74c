"""From what was measured to what the documents show:

    pytest benchmarks --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report --record run.json    # its rows into benchmarks/results/; then as without --record:
    python -m benchmarks.report                      # tables of README.md and docs/, and plots, from benchmarks/results/
    python -m benchmarks.report --verify             # exit status 1 where a document shows something else
    python -m benchmarks.report --compare run.json   # exit status 1 where a ratio fell by more than 10 %, which is named

A table of a document stands between `<!-- table: NAME -->` and `<!-- end -->`; `benchmarks/tables.py` has its NAME.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import tyro

from fused_mos.training.run import write_json

from .plots import PLOTS
from .tables import BLOCKS, OURS, RESULTS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FELL = 0.1
"""Of a ratio: what is named."""


@dataclasses.dataclass
class Config:
    record: Path | None = None
    """A file of --benchmark-json whose rows to keep; rows that it lacks stay."""
    compare: Path | None = None
    """A file of --benchmark-json to compare with what is recorded for the same device."""
    verify: bool = False
    """Write nothing."""


def condensed(path: Path) -> dict[str, Any]:
    """The rows of a --benchmark-json file, and on what they were measured."""
    run = json.loads(path.read_text(encoding="utf-8"))
    machine, commit = run["machine_info"], run["commit_info"]
    about = {name: machine[name] for name in ("device", "device type", "threads", "torch", "python")}
    when = {"commit": commit["id"][:7] + (" and changes" if commit["dirty"] else ""), "date": run["datetime"][:10]}
    rows = [bench["extra_info"] | when for bench in run["benchmarks"] if "contender" in bench["extra_info"]]
    return about | {"units": "median, minimum, maximum; ms; MiB beside inputs, gradients and results", "rows": rows}


def results_of(about: dict[str, Any]) -> Path:
    """Of a device: cpu.json, or a GPU's name."""
    return RESULTS / ("cpu.json" if about["device type"] == "cpu" else re.sub(r"\W+", "-", about["device"].lower()) + ".json")


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("figure", "case", "dtype", "operation", "contender"))


def record(path: Path) -> Path:
    """Rows that are new replace recorded ones in their place."""
    run = condensed(path)
    file = results_of(run)
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows = {key(row): row for row in old} | {key(row): row for row in run["rows"]}
    write_json(file, run | {"rows": list(rows.values())})
    return file


def fallen(recorded: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """What is worse by more than FELL: ours over the floor, and how much faster we are than a peer."""
    found, old = [], {key(row): row for row in recorded["rows"]}
    for row in fresh["rows"]:
        before, name = old.get(key(row), {}), ", ".join(key(row)[:-1])
        if "failed" in row and row["contender"] == OURS:
            found.append(f"{name}: {row['failed']}")
        elif row["contender"] == OURS and "over floor" in before and row["over floor"] * (1 - FELL) > before["over floor"]:
            found.append(f"{name}: time ÷ floor was {before['over floor']:.2f} and is {row['over floor']:.2f}")
        elif row["contender"] != OURS and "times ours" in before and "times ours" in row and row["times ours"][0] < (1 - FELL) * before["times ours"][0]:
            found.append(f"{name}: {row['contender']} took {before['times ours'][0]:.2f} times as long as ours and takes {row['times ours'][0]:.2f}")
    return found


def compare(path: Path) -> int:
    run = condensed(path)
    file = results_of(run)
    if not file.is_file():
        print(f"error: nothing is recorded for this device ({file})", file=sys.stderr)
        return 2
    recorded = json.loads(file.read_text(encoding="utf-8"))
    for name in ("device", "threads", "torch"):
        if recorded[name] != run[name]:
            print(f"note: recorded with {name} {recorded[name]}, this is {run[name]}")
    common = {key(row) for row in recorded["rows"]} & {key(row) for row in run["rows"]}
    found = fallen(recorded, run)
    print("\n".join(found) or f"no ratio of {len(common)} rows fell by more than {FELL:.0%}")
    return int(bool(found))


def with_tables(text: str, name: str) -> str:
    """A document with its tables made anew. Raises SystemExit for a NAME that does not exist."""

    def made(match: re.Match) -> str:
        if match[1] not in BLOCKS:
            raise SystemExit(f"error: {name} asks for table {match[1]!r}; there are {', '.join(BLOCKS)}")
        return f"<!-- table: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.report", description=__doc__)
    if config.compare:
        return compare(config.compare)
    if config.record:
        print(f"recorded in {record(config.record)}")
    different = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if (made := with_tables(text, document.name)) != text:
            different.append(document.name)
            if not config.verify:
                document.write_text(made, encoding="utf-8")
    if config.verify:
        print("\n".join(f"{name} shows other tables than python -m benchmarks.report makes" for name in different) or "all tables are those of the results")
        return int(bool(different))
    for file, plot in PLOTS.items():
        plot(RESULTS / file)
    print(f"written: {', '.join([*different, *PLOTS])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
