"""The best model of a run, with the lowest held-out loss so far, in RUN/best."""

import dataclasses
from pathlib import Path

from ...data.token_stream import PreparedCorpus
from ..errors import CheckpointError
from ..finite import first_not_finite
from ..settings import COUNT, NUMBER, read_record, setting
from . import checkpoint
from .config import LM1BConfig
from .ranks import Ranks
from .state import RunTensors, check_identity, identity

OTHER_RANKS = 1e-4
"""Relative difference that a loss may have on another number of ranks."""


@dataclasses.dataclass
class BestRecord:
    """The fields of the model's state.json."""

    step: int = setting(0, COUNT)
    loss: float = setting(0.0, NUMBER)  # held-out


class BestModel:
    """Saves a run's parameters as its best model and loads them again. All ranks call it together."""

    def __init__(self, config: LM1BConfig, corpus: PreparedCorpus, tensors: RunTensors, ranks: Ranks):
        self.config, self.corpus, self.tensors, self.ranks = config, corpus, tensors, ranks
        self.folder = config.run_folder / "best"

    def save(self, step: int, loss: float) -> None:
        """Saves the model after `step`, with the held-out loss `loss`, in place of the previous one. Raises
        CheckpointError."""
        state = {"step": step, "loss": loss, **identity(self.config, self.corpus)}
        checkpoint.save(self.folder / checkpoint.step_name(step), self.tensors.parameters(), state, self.ranks)
        if self.ranks.is_main:
            checkpoint.remove_older(self.folder)

    def load(self, least: float | None, run: Path) -> BestRecord:
        """Loads the best model into the run's parameters, and returns its step and loss.

        Args:
            least: lowest loss in the run's checkpoint, if any. A model with a higher loss is outdated and refused.
            run: path of that checkpoint.

        Raises CheckpointError or ConfigError.
        """
        path = checkpoint.newest(self.folder, self.ranks)
        if path is None:
            raise CheckpointError(
                f"{self.folder.parent} has no best model: it is not the folder of a run that was evaluated"
            )
        state = checkpoint.read_state(path, "step", "loss")
        try:
            record = read_record(BestRecord, {name: state[name] for name in ("step", "loss")})
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} is of another version: {error}") from None
        if "config" in state:  # versions before 0.2 did not save it
            check_identity(state, path, self.config, self.corpus)
        if least is not None and record.loss > least * (1 + OTHER_RANKS):
            raise CheckpointError(
                f"{path} is older than {run}: its loss is {record.loss:.4f}, and the run's best is {least:.4f}; "
                "restore the newer one"
            )
        checkpoint.load(path, self.tensors.parameters())
        if name := first_not_finite(self.tensors.own_parameters()):
            raise CheckpointError(f"checkpoint {path} cannot be used: numbers of {name} are not finite")
        return record
