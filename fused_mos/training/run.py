"""What a run leaves in its folder, for the commands that come after it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..data import Corpus, CorpusError
from ..lm import AWDLSTM
from .checkpoint import CheckpointError, load_checkpoint, load_parameters
from .config import TrainConfig
from .device import allow_tf32, check_backend, device_named


@dataclasses.dataclass
class Run:
    """The best model of a run, in evaluation mode, and the corpus that it was trained on."""

    folder: Path
    config: TrainConfig
    model: AWDLSTM
    corpus: Corpus
    device: torch.device


def load_run(folder: Path, data: Path | None = None, device: str = "auto", backend: str | None = None) -> Run:
    """Raises CheckpointError, ConfigError or CorpusError. `data` and `backend` replace those of the run."""
    config = read_config(folder)
    place = device_named(device)
    try:
        corpus = Corpus(data or config.data, config.map_unknown)
    except CorpusError as error:
        raise error if data else CorpusError(f"{error}; if the run's corpus has moved, name it with --data") from None
    check_vocabulary(corpus, folder / "vocabulary.txt")
    check_backend(backend or config.model.backend, place)
    options = dataclasses.asdict(config.model) | ({"backend": backend} if backend else {})
    model = AWDLSTM(len(corpus.vocabulary), **options).to(place).eval()
    allow_tf32(place, False)
    best = folder / "best.safetensors"
    load_parameters(model, load_checkpoint(best)[0], best)
    return Run(folder, config, model, corpus, place)


def read_config(folder: Path) -> TrainConfig:
    """Raises CheckpointError where the folder is not a run's, ConfigError where its configuration is not of this
    version."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        return TrainConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def check_vocabulary(corpus: Corpus, path: Path) -> None:
    """Raises CheckpointError unless the corpus has the words of the run's vocabulary.txt. A converted run has none."""
    if path.is_file() and path.read_text(encoding="utf-8").split("\n")[:-1] != corpus.vocabulary.words:
        raise CheckpointError(f"the vocabulary of the corpus is not the one in {path}; name the run's own --data")


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
