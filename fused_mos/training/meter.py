"""Progress of a run, and the words and seconds that it has trained."""

import time
from dataclasses import dataclass

import torch

from .settings import COUNT, NOT_NEGATIVE, NUMBER, setting


@dataclass
class Progress:
    """Counts of a run, part of its checkpoint. The trainers' subclasses add where in the text it stands."""

    step: int = setting(0, COUNT)
    words: int = setting(0, COUNT)  # predicted
    seconds: float = setting(0.0, NOT_NEGATIVE)  # of training, without evaluation and checkpoints
    best: float | None = setting(None, NUMBER)  # lowest validation loss
    interval_words: int = setting(0, COUNT)  # since the last line of metrics.jsonl
    interval_seconds: float = setting(0.0, NOT_NEGATIVE)
    metrics_bytes: int = setting(0, COUNT)  # of metrics.jsonl, which belong to the checkpoint

    @property
    def words_per_second(self) -> float | None:
        """Speed over the whole run, or None before its first step."""
        return self.words / self.seconds if self.seconds else None

    def count(self, words: int) -> None:
        """A step over so many words is done."""
        self.step += 1
        self.words += words
        self.interval_words += words

    def start_interval(self) -> None:
        self.interval_words, self.interval_seconds = 0, 0.0


class Stopwatch:
    """Adds to a run's seconds of training. What lies between `start` and `lap`, or between two laps, counts."""

    def __init__(self, progress: Progress, device: torch.device):
        self._progress, self._device = progress, device
        self.start()

    def start(self) -> None:
        """Training goes on after something else, which does not count."""
        self._since = time.monotonic()

    def lap(self, wait: bool = False) -> None:
        """Counts the time until now; with `wait`, until a GPU has done its work."""
        if wait and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self._progress.seconds += now - self._since
        self._progress.interval_seconds += now - self._since
        self._since = now
