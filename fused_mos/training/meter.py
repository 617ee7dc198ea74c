"""Progress of a run: steps, words and seconds of training."""

import time
from dataclasses import dataclass

import torch

from .settings import COUNT, NOT_NEGATIVE, NUMBER, setting


@dataclass
class Progress:
    """Counters of a run, saved in its checkpoint. The trainers' subclasses add the position in the text."""

    step: int = setting(0, COUNT)
    words: int = setting(0, COUNT)  # predicted
    seconds: float = setting(0.0, NOT_NEGATIVE)  # of training, without evaluation and checkpoints
    best: float | None = setting(None, NUMBER)  # lowest validation loss
    interval_words: int = setting(0, COUNT)  # since the last line of metrics.jsonl
    interval_seconds: float = setting(0.0, NOT_NEGATIVE)
    metrics_bytes: int = setting(0, COUNT)  # length of metrics.jsonl at the checkpoint

    @property
    def words_per_second(self) -> float | None:
        """Mean speed of the whole run, or None before its first step."""
        return self.words / self.seconds if self.seconds else None

    def count(self, words: int) -> None:
        """Counts a finished step of `words` words."""
        self.step += 1
        self.words += words
        self.interval_words += words

    def start_interval(self) -> None:
        self.interval_words, self.interval_seconds = 0, 0.0


class Stopwatch:
    """Measures a run's seconds of training: the time from `start` to the first `lap`, and from lap to lap."""

    def __init__(self, progress: Progress, device: torch.device):
        self._progress, self._device = progress, device
        self.start()

    def start(self) -> None:
        """Starts or resumes the measurement; the time since the last lap does not count."""
        self._since = time.monotonic()

    def lap(self, wait: bool = False) -> None:
        """Counts the time until now. With `wait`, first waits until the GPU has finished its work."""
        if wait and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self._progress.seconds += now - self._since
        self._progress.interval_seconds += now - self._since
        self._since = now
