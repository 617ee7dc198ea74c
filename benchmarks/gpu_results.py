"""The file of GPU results, with a row for each case. It is written after each case, and a later call continues with it.

All rows are for one GPU, one set of versions and one source of the package. Rows of another are moved to a separate
file.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

from fused_mos.runtime import files

IDENTITY = ("gpu", "python", "torch", "triton", "cuda", "source")
"""Entries that all rows of a file share."""
PEERS = ("liger-kernel", "nvidia-cutlass-dsl", "cut-cross-entropy", "quack-kernels")


def about(gpu: str, tree: Path, commit: str = "") -> dict[str, Any]:
    """Identify a run: GPU, versions, commit, and a digest of the package's source (a commit does not show edits)."""
    import torch
    import triton

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True)
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "source": source_digest(tree),
        "commit": commit or git.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "units": "ms: median, minimum, maximum; gpu ms: time in which kernels run; over mm: gpu ms ÷ mm ms, the "
        "fastest of the step's three products by torch.mm; MiB beside the inputs",
    }


def driver() -> str | None:
    """Version of the GPU's driver, or None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def source_digest(tree: Path) -> str:
    """Digest of the package's Python, C++ and CUDA files."""
    digest = hashlib.sha256()
    for path in sorted([*tree.glob("fused_mos/**/*.py"), *tree.glob("csrc/**/*.[chu]*")]):
        digest.update(str(path.relative_to(tree)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """The rows of a file, by case. Existing rows are kept if they belong to the same run."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        saved = read(path)
        if saved and any(saved.get(name) != facts[name] for name in IDENTITY):
            old = path.with_name(f"{path.stem}-{saved.get('commit', 'old')}{path.suffix}")
            files.rename(path, old)
            print(f"{path.name} was of another source, GPU or version and is now {old.name}", flush=True)
            saved = {}
        self.content: dict[str, Any] = saved | facts
        self.rows: dict[str, dict] = self.content.setdefault("rows", {})

    def has(self, key: str) -> bool:
        """True if the case need not run again. A peer that was not installed is tried again."""
        return key in self.rows and "unavailable" not in self.rows[key]

    def begin(self, key: str, limit: float) -> None:
        """Note which case runs, and its limit in seconds, for the watching process."""
        self.content["running"] = {"key": key, "since": time.time(), "limit": limit}
        files.write_json(self.path, self.content)

    def finish(self, key: str, row: dict) -> None:
        self.rows[key] = row
        self.content.pop("running", None)
        files.write_json(self.path, self.content)

    def save(self, **entries: Any) -> None:
        self.content |= entries
        files.write_json(self.path, self.content)


def read(path: Path) -> dict[str, Any]:
    """The file's content, empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def fail_running(path: Path, why: str) -> str | None:
    """Record why the running case failed when its process ended. Return its key, or None if no case was running."""
    content = read(path)
    running = content.pop("running", None)
    if running is None:
        return None
    content.setdefault("rows", {})[running["key"]] = {"failed": why}
    files.write_json(path, content)
    return running["key"]
