"""Reads the folder of a run, for evaluation and the other commands that follow training."""

import dataclasses
import shlex
from pathlib import Path

import torch
from torch import Tensor

from ..data import Corpus, CorpusError, Vocabulary, read_text
from ..lm import AWDLSTM
from ..runtime import files
from . import settings
from .checkpoint import Checkpoint, check_fit, load_checkpoint, load_parameters
from .config import TrainConfig
from .device import allow_tf32, check_backend, device_named
from .errors import CheckpointError, ConfigError
from .folder import check_name
from .settings import COUNT, NUMBER, setting


@dataclasses.dataclass
class Run:
    """The best model of a run, in evaluation mode, with its vocabulary and its corpus, whose texts are read on first
    use."""

    folder: Path
    config: TrainConfig
    model: AWDLSTM
    vocabulary: Vocabulary
    device: torch.device
    data: Path
    _moved: bool = False  # whether `data` was named by the user
    _texts: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def text(self, split: str) -> Tensor:
        """Returns the word indices (n,) of "train", "valid" or "test"; reads only that file. Raises CorpusError."""
        if split not in self._texts:
            try:
                self._texts[split] = read_text(self.data, split, self.vocabulary, self.config.map_unknown)
            except CorpusError as error:
                raise error if self._moved else _with_hint(error) from None
        return self._texts[split]


def load_run(folder: Path, data: Path | None = None, device: str = "auto", backend: str | None = None) -> Run:
    """Loads the best model of the run in `folder`. `data` and `backend` override those of the run.

    Raises CheckpointError, ConfigError or CorpusError.
    """
    config = read_config(folder)
    place = device_named(device)
    check_backend(backend or config.model.backend, place)
    best = load_best(folder, config)
    vocabulary = _vocabulary(folder, config, data)
    if best.meta.get("vocabulary", vocabulary.digest) != vocabulary.digest:
        raise CheckpointError(f"the words of {folder / 'vocabulary.txt'} are not those that {best.path} was trained on")
    options = dataclasses.asdict(config.model) | ({"backend": backend} if backend else {})
    with torch.device("meta"):  # check the shapes first: a wrong configuration could take any amount of memory
        check_fit(AWDLSTM(len(vocabulary), **options), best.tensors, best.path)
    model = AWDLSTM(len(vocabulary), **options).to(place).eval()
    allow_tf32(place, False)
    load_parameters(model, best.tensors, best.path)
    return Run(folder, config, model, vocabulary, place, data or config.data, _moved=data is not None)


@dataclasses.dataclass
class BestRecord:
    """Metadata of best.safetensors."""

    epoch: int = setting(0, COUNT)
    valid_loss: float | None = setting(None, NUMBER)  # None for a converted model


def load_best(folder: Path, config: TrainConfig, validated: bool = False) -> Checkpoint:
    """Loads the best model of the run in `folder` with the configuration `config`. Raises CheckpointError, even for an
    intact checkpoint if it belongs to another run or, with `validated`, has no validation loss."""
    path = folder / "best.safetensors"
    finished = (folder / "result.json").exists()
    if (folder / "config.json").is_file() and not (validated or finished or path.exists()):
        command = f"python -m fused_mos.train --resume {shlex.quote(str(folder))}"
        raise CheckpointError(
            f"{folder} has no best model yet: it is written after the first epoch; continue with `{command}`"
        )
    best = Checkpoint(*load_checkpoint(path, "config", "epoch", "valid_loss"), path)
    try:
        record = settings.read_record(BestRecord, {name: best.meta[name] for name in ("epoch", "valid_loss")})
        saved = TrainConfig.from_json(best.meta["config"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is of another version: {error}") from None
    if validated and record.valid_loss is None:
        raise CheckpointError(f"{path} is a converted model, not the best one of the run in {folder}; restore that one")
    for name, there, here in settings.changes(saved, config):
        raise CheckpointError(f"{best.path} is of another run than {folder}: its {name} is {there}, the run's {here}")
    return best


def _vocabulary(folder: Path, config: TrainConfig, data: Path | None) -> Vocabulary:
    """Returns the run's vocabulary or, for a run converted without a corpus, that of the corpus."""
    path = folder / "vocabulary.txt"
    if path.is_file():
        return Vocabulary.load(path)
    try:
        return Corpus(data or config.data, config.map_unknown).vocabulary
    except CorpusError as error:
        raise error if data else _with_hint(error) from None


def _with_hint(error: CorpusError) -> CorpusError:
    return CorpusError(f"{error}; if the run's corpus has moved, name it with --data")


def read_config(folder: Path) -> TrainConfig:
    """Reads config.json. Raises CheckpointError if the folder is not a run's, ConfigError if the configuration is of
    another version or out of range, FileError if the file is damaged."""
    check_name("run", folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not the folder of a run: it has no config.json")
    values = files.read_json(path)
    if "vocab_parallel" in values:
        command = f"python -m fused_mos.train_1b --resume {folder} --evaluate"
        raise ConfigError(f"{folder} is a run of train_1b; evaluate it with {command}")
    config = TrainConfig.from_json(values)
    config.check()
    return config


def check_vocabulary(corpus: Corpus, path: Path) -> None:
    """Raises CheckpointError unless the corpus has the words of the run's vocabulary.txt. A converted run may have no
    such file."""
    if path.is_file() and Vocabulary.load(path).words != corpus.vocabulary.words:
        raise CheckpointError(f"the vocabulary of the corpus is not the one in {path}; name the run's own --data")
