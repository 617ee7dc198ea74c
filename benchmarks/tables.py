"""The documents' tables of speed and memory, from a machine's JSON under results/machines/.

A row of a table has a number. What a machine could not run is named below the table, with the reason.
"""

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MACHINES = Path(__file__).parent / "results" / "machines"
OURS = "fused_mos"
SHAPE_NAMES = {"ptb": "Penn Treebank", "wikitext2": "WikiText-2", "lm1b": "One Billion Words", "softmax": "K = 1"}


def recorded(machine: str) -> dict[str, Any]:
    return json.loads((MACHINES / f"{machine}.json").read_text(encoding="utf-8"))


def rows_of(machine: str, figure: str) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(case, dtype, operation) -> contender -> row, in the order of the run."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in recorded(machine)["rows"]:
        if row["figure"] == figure:
            found.setdefault((row["case"], row["dtype"], row["operation"]), {})[row["contender"]] = row
    return found


def measured(machine: str, figure: str) -> list[tuple[tuple[str, str, str], dict[str, dict]]]:
    """The cases of a figure in which at least one contender has numbers, with these contenders."""
    cases = {
        case: {name: row for name, row in contenders.items() if "failed" not in row}
        for case, contenders in rows_of(machine, figure).items()
    }
    return [(case, contenders) for case, contenders in cases.items() if contenders]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(values: list[float]) -> str:
    """Median (minimum–maximum)."""
    median, least, most = values
    return f"{median:.2f} ({least:.2f}–{most:.2f})"


def times_ours(row: dict) -> str:
    return times(row["times ours"]) if "times ours" in row else "–"


def over_floor(row: dict) -> str:
    return f"{row['over floor']:.2f}" if "over floor" in row else "–"


def mebibytes(row: dict) -> str:
    return "–" if row.get("peak MiB") is None else f"{row['peak MiB']:,.0f} MiB"


def place(row: dict) -> str:
    return f"{SHAPE_NAMES.get(row['case'], row['case'])}, {row['dtype']}"


def with_notes(header: list[str], rows: list[list[str]], machine: str, figure: str) -> str:
    """The table, and below it, by reason, the contenders that could not run."""
    cases = [list(contenders.values()) for contenders in rows_of(machine, figure).values()]
    asked = [row for contenders in cases for row in contenders]
    reasons: dict[str, list[dict]] = {}
    for row in asked:
        if "failed" in row:
            reasons.setdefault(row["failed"], []).append(row)
    lines = []
    for reason, failed in reasons.items():
        names = list(dict.fromkeys(row["contender"] for row in failed))
        everywhere = sum(row["contender"] in names for row in asked) == len(failed)
        where = "" if everywhere else f" ({'; '.join(dict.fromkeys(map(place, failed)))})"
        lines.append(f"- {', '.join(f'*{name}*' for name in names)}{where}: {reason}")
    parts = [table(header, rows)] if rows else []
    return "\n\n".join([*parts, *(["Not measured here:", "\n".join(lines)] if lines else [])])


def head(machine: str) -> str:
    """A training step's time over ours by contender, with floor and memory."""
    found = []
    for (case, dtype, _), contenders in rows_of(machine, "shapes").items():
        some = next(iter(contenders.values()))
        shape = "×".join(f"{size:,}" for size in some["shape"])
        shape += f"<br>gradients {some['kept MiB']:,.0f} MiB" if some.get("kept MiB") else ""
        first = f"{SHAPE_NAMES[case]}, {dtype}<br>{shape}"
        for name, row in contenders.items():
            if "failed" in row:
                continue
            is_ours = name == OURS
            ratio = "1" if is_ours else times_ours(row)
            found.append([first, f"**{name}**" if is_ours else name, ratio, over_floor(row), mebibytes(row)])
            first = ""
    header = ["N × K × D × V", "implementation", "time ÷ ours", "time ÷ floor", "memory"]
    return with_notes(header, found, machine, "shapes")


def operations(machine: str) -> str:
    found = []
    for (_, _, operation), contenders in measured(machine, "operations"):
        ours, theirs = contenders.get(OURS, {}), contenders.get("published code", {})
        found.append([operation, over_floor(ours), times_ours(theirs), mebibytes(ours), mebibytes(theirs)])
    header = ["", "time ÷ floor", "published code, time ÷ ours", "memory", "published code, memory"]
    return with_notes(header, found, machine, "operations")


def experts(machine: str) -> str:
    """Milliseconds of a step per expert, by number of experts."""
    cases = measured(machine, "experts")
    names = list(dict.fromkeys(name for _, contenders in cases for name in contenders))
    found = []
    for (case, _, _), contenders in cases:
        rows = [contenders.get(name, {}) for name in names]
        cells = [f"{row['ms'][0] / row['shape'][1]:.1f}" if row else "–" for row in rows]
        found.append([case, *cells, over_floor(contenders.get(OURS, {}))])
    header = ["", *(f"{name}, ms per expert" for name in names), "ours ÷ floor"]
    return with_notes(header, found, machine, "experts")


def vocabulary(machine: str) -> str:
    cases = measured(machine, "vocabulary")
    names = list(dict.fromkeys(name for _, contenders in cases for name in contenders if name != OURS))
    found = []
    for (case, _, _), contenders in cases:
        ours = contenders.get(OURS, {})
        slope = f"{ours['ms'][0] / ours['shape'][3] * 1e4:.1f}" if ours else "–"
        ratios = [times_ours(contenders.get(name, {})) for name in names]
        found.append([case, slope, over_floor(ours), mebibytes(ours), *ratios])
    header = ["", "ms per 10,000 words", "time ÷ floor", "memory", *(f"{name}, time ÷ ours" for name in names)]
    return with_notes(header, found, machine, "vocabulary")


def options(machine: str) -> str:
    """A step with each option of the loss, over the step without any, and what the number of products predicts."""
    cases = measured(machine, "options")
    names = list(dict.fromkeys(name for _, contenders in cases for name in contenders))
    found = []
    for name in names:
        rows = [contenders.get(name, {}) for _, contenders in cases]
        pairs = [[times(row["times the mean loss"]), f"{row['by products']:.2f}"] if row else ["–"] * 2 for row in rows]
        found.append([name, *(cell for pair in pairs for cell in pair)])
    shapes = [SHAPE_NAMES[case] for (case, _, _), _ in cases]
    header = ["", *(cell for shape in shapes for cell in (f"{shape}: time ÷ mean loss", "products ÷ mean loss"))]
    return with_notes(header, found, machine, "options")


def training(machine: str) -> str:
    found = []
    for (case, _, _), contenders in measured(machine, "training"):
        first = f"`{case}`"
        for name, row in contenders.items():
            cells = [f"{row['words a second'][0]:,.0f}", times_ours(row), mebibytes(row)]
            found.append([first, f"**{name}**" if name == OURS else name, *cells])
            first = ""
    return with_notes(["recipe", "", "words/s", "time ÷ ours", "memory"], found, machine, "training")


def generation(machine: str) -> str:
    found = []
    for (case, _, operation), contenders in measured(machine, "generation"):
        first = [case, operation]
        for name, row in contenders.items():
            cells = [f"{row['words a second'][0]:,.0f}", times_ours(row)]
            found.append([*first, f"**{name}**" if name == OURS else name, *cells])
            first = ["", ""]
    return with_notes(["model", "drawn from", "", "words/s", "time ÷ ours"], found, machine, "generation")


def about(machine: str) -> str:
    """The processor, the versions and the dates of a machine's rows."""
    facts = recorded(machine)
    rows = facts["rows"]
    kernels = f", native kernels for {facts['instruction set']}" if facts["device type"] == "cpu" else ""
    threads = f", {facts['threads']} threads" if facts["device type"] == "cpu" else ""
    several = {name: ", ".join(sorted({row[name] for row in rows})) for name in ("torch", "python", "date", "commit")}
    return (
        f"{facts['device']}{threads}{kernels}; torch {several['torch']}, Python {several['python']}; "
        f"measured on {several['date']}, commit {several['commit']}."
    )


def behind(machine: str) -> str:
    """Every comparison in which a contender's median time is no longer than ours, or its memory no larger."""
    rows = contenders_of(machine)
    ahead = [
        f"- *{row['contender']}*, {place(row)}, {row['operation']}: {times(row['times ours'])}"
        for row, _ in rows
        if is_faster(row)
    ]
    parts = [f"fused_mos is faster in all {len(rows)} comparisons."]
    if ahead:
        parts = [f"fused_mos is faster in {len(rows) - len(ahead)} of {len(rows)} comparisons, but not in:"]
        parts.append("\n".join(ahead))
    leaner = places(row for row, ours in rows if is_leaner(row, ours))
    return "\n\n".join([*parts, *([f"Less memory than fused_mos takes: {leaner}."] if leaner else [])])


def chart(machine: str) -> str:
    """The caption of plots.py's bar chart: what it shows, and which contenders beat fused_mos."""
    facts = recorded(machine)
    rows = [(row, ours) for row, ours in contenders_of(machine) if row["figure"] == "shapes" and row["shape"][1] > 1]
    faster = places(row for row, _ in rows if is_faster(row)) or "no contender"
    leaner = places(row for row, ours in rows if is_leaner(row, ours)) or "no contender"
    caption = (
        f"One training step of the head, forward and backward, on {facts['threads']} threads of an {facts['device']}. "
        f"Shorter is better. Faster than fused_mos: {faster}. Less memory: {leaner}."
    )
    return textwrap.fill(caption, 120, break_on_hyphens=False)


def contenders_of(machine: str) -> list[tuple[dict, dict]]:
    """The measured rows of all contenders, each with ours, or {} where ours has none."""
    rows = [row for row in recorded(machine)["rows"] if "times ours" in row]
    ours = {comparison(row): row for row in rows if row["contender"] == OURS}
    return [(row, ours.get(comparison(row), {})) for row in rows if row["contender"] != OURS]


def comparison(row: dict) -> tuple[str, str, str, str]:
    return row["figure"], row["case"], row["dtype"], row["operation"]


def is_faster(row: dict) -> bool:
    return row["times ours"][0] <= 1


def is_leaner(row: dict, ours: dict) -> bool:
    return bool(row.get("peak MiB")) and row["peak MiB"] <= ours.get("peak MiB", 0)


def places(rows: Iterable[dict]) -> str:
    """Contenders by name, each with where it was."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["contender"], []).append(place(row))
    return ", ".join(f"*{name}* ({'; '.join(dict.fromkeys(where))})" for name, where in found.items())


OF_A_MACHINE: dict[str, Callable[[str], str]] = {
    "about": about,
    "behind": behind,
    "chart": chart,
    "head": head,
    "operations": operations,
    "experts": experts,
    "vocabulary": vocabulary,
    "options": options,
    "training": training,
    "generation": generation,
}
"""The table or text that a document's `<!-- table: NAME MACHINE -->` stands for, by NAME."""
