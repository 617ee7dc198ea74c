"""The documents' tables of speed and memory, from a machine's JSON under results/machines/."""

import json
from collections.abc import Callable
from pathlib import Path

MACHINES = Path(__file__).parent / "results" / "machines"
OURS = "fused_mos"
SHAPE_NAMES = {"ptb": "Penn Treebank", "wikitext2": "WikiText-2", "lm1b": "One Billion Words", "softmax": "K = 1"}


def rows_of(machine: str, figure: str) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(case, dtype, operation) -> contender -> row, in the order of the run."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in json.loads((MACHINES / f"{machine}.json").read_text(encoding="utf-8"))["rows"]:
        if row["figure"] == figure:
            found.setdefault((row["case"], row["dtype"], row["operation"]), {})[row["contender"]] = row
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(values: list[float]) -> str:
    """Median (minimum–maximum)."""
    median, least, most = values
    return f"{median:.2f} ({least:.2f}–{most:.2f})"


def times_ours(row: dict) -> str:
    return times(row["times ours"]) if "times ours" in row else row.get("failed", "–")


def over_floor(row: dict) -> str:
    return f"{row['over floor']:.2f}" if "over floor" in row else row.get("failed", "–")


def mebibytes(row: dict) -> str:
    return "–" if row.get("peak MiB") is None else f"{row['peak MiB']:,.0f} MiB"


def head(machine: str) -> str:
    """A training step's time over ours by contender, with floor and memory. Like all tables, it leaves out what the
    machine has not measured."""
    found = []
    for (case, dtype, _), contenders in rows_of(machine, "shapes").items():
        some = next(iter(contenders.values()))
        shape = "×".join(f"{size:,}" for size in some["shape"])
        shape += f"<br>gradients {some['kept MiB']:,.0f} MiB" if some.get("kept MiB") else ""
        first, failed = f"{SHAPE_NAMES[case]}, {dtype}<br>{shape}", {}
        for name, row in contenders.items():
            if "failed" in row:
                failed.setdefault(row["failed"], []).append(name)
                continue
            found.append(
                [
                    first,
                    f"**{name}**" if name == OURS else name,
                    "1" if name == OURS else times(row["times ours"]),
                    over_floor(row),
                    mebibytes(row),
                ]
            )
            first = ""
        for reason, names in failed.items():
            found.append([first, "; ".join(names), "–", "–", reason])
            first = ""
    return table(["N × K × D × V", "a training step of the head by", "time ÷ ours", "time ÷ floor", "memory"], found)


def operations(machine: str) -> str:
    found = []
    for (_, _, operation), contenders in rows_of(machine, "operations").items():
        ours, theirs = contenders.get(OURS, {}), contenders.get("published code", {})
        found.append([operation, over_floor(ours), times_ours(theirs), mebibytes(ours), mebibytes(theirs)])
    return table(["", "time ÷ floor", "the published code's time ÷ ours", "memory", "its memory"], found)


def experts(machine: str) -> str:
    """Milliseconds of a step for each expert, by number of experts."""
    cases = rows_of(machine, "experts")
    names = list(dict.fromkeys(name for contenders in cases.values() for name in contenders))
    found = []
    for (case, _, _), contenders in cases.items():
        rows = [contenders.get(name, {}) for name in names]
        cells = [f"{row['ms'][0] / row['shape'][1]:.1f}" if "ms" in row else row.get("failed", "–") for row in rows]
        found.append([case, *cells, over_floor(contenders.get(OURS, {}))])
    return table(["", *(f"{name}, ms an expert" for name in names), "ours ÷ floor"], found)


def vocabulary(machine: str) -> str:
    cases = rows_of(machine, "vocabulary")
    names = list(dict.fromkeys(name for contenders in cases.values() for name in contenders if name != OURS))
    found = []
    for (case, _, _), contenders in cases.items():
        ours = contenders.get(OURS, {})
        slope = f"{ours['ms'][0] / ours['shape'][3] * 1e4:.1f}" if "ms" in ours else "–"
        found.append(
            [case, slope, over_floor(ours), mebibytes(ours), *(times_ours(contenders.get(name, {})) for name in names)]
        )
    return table(
        ["", "ms for each 10,000 words", "time ÷ floor", "memory", *(f"{name}, time ÷ ours" for name in names)], found
    )


def training(machine: str) -> str:
    found = []
    for (case, _, _), contenders in rows_of(machine, "training").items():
        for name, row in contenders.items():
            cells = ["–" if "failed" in row else f"{row['words a second'][0]:,.0f}", times_ours(row), mebibytes(row)]
            found.append([f"`{case}`" if name == OURS else "", f"**{name}**" if name == OURS else name, *cells])
    return table(["recipe", "", "words/s", "time ÷ ours", "memory"], found)


OF_A_MACHINE: dict[str, Callable[[str], str]] = {
    "head": head,
    "operations": operations,
    "experts": experts,
    "vocabulary": vocabulary,
    "training": training,
}
"""The table that a document's `<!-- table: NAME MACHINE -->` stands for, by NAME."""
