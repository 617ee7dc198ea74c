"""The file manifest.json, which describes a corpus prepared by `lm1b.prepare`."""

from pathlib import Path
from typing import Any

from ..runtime import files
from .corpus import CorpusError

FOLDERS = {"train": "training-monolingual.tokenized.shuffled", "heldout": "heldout-monolingual.tokenized.shuffled"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest that `prepare` wrote to the folder. Raises CorpusError."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CorpusError(f"there is no {path}; first run python -m fused_mos.data.lm1b prepare to its end")
    try:
        manifest = files.read_sealed(path)
    except files.FileError as error:
        raise CorpusError(f"{error}, or run python -m fused_mos.data.lm1b prepare again") from None
    if manifest.get("format") != 1 or not _is_complete(manifest):
        raise CorpusError(
            f"{path} is not of format 1, which python -m fused_mos.data.lm1b prepare writes; run it with another --out"
        )
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    """True if the manifest has all fields of the vocabulary and of each shard, with at least one shard per split."""
    try:
        texts = [manifest["vocabulary"]["sha256"]]
        for split in FOLDERS:
            if not manifest[split]:
                return False
            for entry in manifest[split]:
                texts += [entry["file"], entry["sha256"]]
                if type(entry["tokens"]) is not int or entry["tokens"] < 1:
                    return False
    except (KeyError, TypeError):
        return False
    return all(isinstance(text, str) for text in texts)
