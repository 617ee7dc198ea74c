"""Compare two sources of the package on the same GPU, each in a process of its own, in turns:

    python -m benchmarks.gpu_compare BEFORE [--after .] [--shapes ptb lm1b] [--operations 'step mean' forward]

BEFORE and --after are folders that contain fused_mos, for example from `git worktree add BEFORE main`. In each round
one process measures while the other waits, then the reverse. Ratios are the time before over the time after, as median,
minimum and maximum over the rounds; above 1, `after` is faster. `--dry-run` rehearses it on a CPU.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from .gpu_cases import OPERATIONS, OURS, SHAPES, STEP
from .gpu_device import ROOT, environment
from .gpu_results import source_digest
from .harness import spread

TIMES = ("gpu ms", "wall ms", "host ms")


@dataclasses.dataclass
class Config:
    before: Annotated[Path, tyro.conf.Positional]
    """Folder of the old source."""

    after: Path = ROOT
    """Folder of the new source."""

    shapes: tuple[str, ...] = ("ptb", "wikitext2", "lm1b", "gpt2", "llama")
    """Shapes of benchmarks.gpu."""

    dtypes: tuple[str, ...] = ("bfloat16",)
    """Products: bfloat16, float16, tf32, float32."""

    operations: tuple[str, ...] = (STEP, "step none", "forward", "log_prob", "sample")
    """Calls of benchmarks.gpu."""

    modes: tuple[str, ...] = ("eager",)
    """eager; graph and reduce-overhead for the mean step."""

    rounds: int = 7
    """Turns of each source."""

    minutes: float = 8.0
    """Minutes after which no case starts."""

    out: Path | None = None
    """JSON file of the ratios."""

    dry_run: bool = False
    """Rehearse on a CPU."""

    def check(self) -> None:
        for name, folder in (("before", self.before), ("after", self.after)):
            if not (folder / "fused_mos" / "__init__.py").is_file():
                raise ValueError(f"{name} must be a folder with a fused_mos, got {folder}")
        for name, given, known in (("shapes", self.shapes, SHAPES), ("operations", self.operations, OPERATIONS)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")


class Source:
    """A process that measures one source on request."""

    def __init__(self, tree: Path, dry_run: bool):
        self.tree, self.dry_run = tree.resolve(), dry_run
        self._process: subprocess.Popen | None = None

    def measure(self, *case: str) -> dict[str, Any]:
        """Times of one case, warmed up the first time, or under "failed" the reason why there are none. Starts a new
        process if the old one ended or lost its CUDA context."""
        try:
            answer = self._answer(case)
        except (BrokenPipeError, ValueError):
            return {"failed": f"the process ended with status {self.close()}"}
        if answer.get("lost"):
            self.close()
        return answer

    def _answer(self, case: tuple[str, ...]) -> dict[str, Any]:
        if self._process is None:
            # import benchmarks from here first, then fused_mos from the tree, which may contain benchmarks, too
            code = f"import sys, benchmarks; sys.path.insert(0, {str(self.tree)!r}); "
            code += "from benchmarks.gpu_compare import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment(self.dry_run),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(self.tree), *case]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> int:
        """End the process and return its status."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.kill()
        return process.wait()


def serve() -> None:
    """Run the process of a `Source`: answer each line of standard input, a tree and a case, with a line of times."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep output of libraries out of the answers
    import fused_mos

    from . import gpu_device, gpu_head

    unusable = gpu_device.prepare()
    for request in sys.stdin:
        tree, shape, dtype, operation, mode = json.loads(request)
        try:
            if unusable:
                raise RuntimeError(unusable)
            if Path(tree) not in Path(fused_mos.__file__).resolve().parents:
                raise RuntimeError(f"fused_mos was imported from {fused_mos.__file__}, not from {tree}")
            row = gpu_head.measure(shape, dtype, operation, OURS, mode)
            found = {name: row[name] if name == "gpu ms" else row[name][0] for name in TIMES}
            answer = found | {"launches": row["launches"], "peak MiB": row["peak MiB"], "over mm": row["over mm"]}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200], "lost": gpu_device.is_lost()}
        print(json.dumps(answer), file=answers, flush=True)


def compare(before: Source, after: Source, case: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The ratios of a case, before over after, and other figures of both from the last round."""
    turns: list[tuple[dict, dict]] = []
    for turn in range(rounds + 1):
        pair = before.measure(*case), after.measure(*case)
        for name, row in zip(("before", "after"), pair):
            if "failed" in row:
                return {"failed": f"{name}: {row['failed']}"}
        if turn:  # the first turn is a warm-up
            turns.append(pair)
    ratios = {name: spread((old[name] / new[name] for old, new in turns), 3) for name in TIMES}
    medians = {name: [round(statistics.median(pair[i][name] for pair in turns), 5) for i in (0, 1)] for name in TIMES}
    others = {name: [row[name] for row in turns[-1]] for name in ("launches", "peak MiB", "over mm")}
    return {"ratios": ratios, "medians": medians} | others


def line(case: tuple[str, ...], row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{' | '.join(case)}: {row['failed']}"
    ratios = ", ".join("{} {:.2f} ({:.2f}–{:.2f})".format(name[:-3], *row["ratios"][name]) for name in TIMES)
    gpu = row["medians"]["gpu ms"]
    return f"{' | '.join(case)}: {ratios}; GPU {gpu[0]:.3f} -> {gpu[1]:.3f} ms, launches {row['launches']}"


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.gpu_compare", description=__doc__)
    try:
        config.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * config.minutes
    cases = [
        (shape, dtype, operation, mode)
        for shape in config.shapes
        for dtype in config.dtypes
        for operation in config.operations
        for mode in config.modes
        if mode == "eager" or operation == STEP
    ]
    rows: dict[str, dict[str, Any]] = {}
    before, after = Source(config.before, config.dry_run), Source(config.after, config.dry_run)
    trees = {"before": before, "after": after}
    print(f"before: {before.tree}, after: {after.tree}; ratios above 1: after is faster", flush=True)
    try:
        for case in cases:
            if time.monotonic() > deadline:
                print(f"time is up: {len(cases) - len(rows)} cases are left", flush=True)
                break
            row = rows[" | ".join(case)] = compare(before, after, case, config.rounds)
            print(line(case, row), flush=True)
            if config.out:
                about = {name: [str(tree.tree), source_digest(tree.tree)] for name, tree in trees.items()}
                config.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    finally:
        before.close()
        after.close()
    return 0 if rows and all("failed" not in row for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
