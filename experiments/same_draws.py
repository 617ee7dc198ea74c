"""Training steps of ours and of the paper's published code from the same weights and the same random draws, in float64:

    git clone https://github.com/zihangdai/mos CODE
    python -m experiments.same_draws CODE [--out FILE.json]

Both draw their dropout masks from torch's generator, in the same order and shapes, as long as no recurrent weight has
2**16 numbers or more, where ours draws faster in another way. So the same seed before each step gives both the same
masks. Two things are made equal, since they differ on purpose: the 1e-8 that the published code adds to each
probability is left out, and the text has no last word of the vocabulary, whose lookup the published code never trains.
Under ASGD all segments have one length, since torch's ASGD takes each step at the learning rate of the one before.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from fused_mos.data.sample import write_corpus
from fused_mos.dropout import MIN_FAST_NUMBERS
from fused_mos.lm import AWDLSTM
from fused_mos.runtime.files import write_json
from fused_mos.training import TrainConfig, Trainer
from fused_mos.training.config import ModelConfig, OptimConfig

from .published_code import PublishedTraining

MODEL = ModelConfig(n_experts=5, embedding_size=32, hidden_sizes=(96, 96, 64))
"""The paper's Penn Treebank model in small, with its dropouts."""
OPTIM = OptimConfig(bptt=20, bptt_delta=10)
RANDOM_LENGTHS = (20, 13, 28, 9, 17)


@dataclasses.dataclass(frozen=True)
class Case:
    averaging: bool = False
    lengths: Sequence[int] = RANDOM_LENGTHS
    micro_batches: int = 1
    dtype: torch.dtype = torch.float64


CASES = {
    "SGD": Case(),
    "SGD, gradients accumulated over 4 small batches": Case(micro_batches=4),
    "ASGD": Case(averaging=True, lengths=(20,)),
    "SGD, float32": Case(dtype=torch.float32),
}


@dataclasses.dataclass
class Config:
    code: Annotated[Path, tyro.conf.Positional]
    """Folder of the published code."""
    steps: int = 20
    """Steps of each case."""
    out: Path = Path(__file__).parent / "results" / "same-draws.json"
    """JSON file of the results."""


def published_names(model: AWDLSTM) -> dict[str, Tensor]:
    """Return the state of `model` under the names of the published code."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("head.")
        if name.startswith("rnns."):
            _, layer, weight = name.split(".")
            name = f"rnns.{layer}.module.{weight.replace('weight_hh_l0', 'weight_hh_l0_raw')}"
        state[name] = tensor
    return state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Pair:
    """Our trainer and the published model, with the same weights.

    Raises ValueError where the same seed would give them other masks, or where the text has the vocabulary's last word.
    """

    def __init__(self, code: Path, config: TrainConfig, case: Case = Case(), rows: int = 0):
        largest = max(config.model.hidden_sizes)
        if 4 * largest**2 >= MIN_FAST_NUMBERS:
            raise ValueError(f"hidden_sizes must be less than 128 for both to draw the same masks, got {largest}")
        optim = dataclasses.replace(config.optim, micro_batches=case.micro_batches)
        self.ours = Trainer(dataclasses.replace(config, optim=optim))
        self.ours.model.to(case.dtype).train()
        self.ours.hidden = self.ours._initial_hidden()
        n_words = len(self.ours.corpus.vocabulary)
        if (self.ours.source[:rows] == n_words - 1).any():
            raise ValueError(f"the first {rows} rows of the text must not hold the last word of its vocabulary")
        self.published = PublishedTraining(code, n_words, self.ours.config, self.ours.device, exact=True)
        self.published.model.to(case.dtype)
        self.dtype = case.dtype
        self.published.model.load_state_dict(published_names(self.ours.model))
        self.published.start_epoch()
        if case.averaging:
            self.ours.optimizer.start_averaging()
            self.published.start_averaging()

    def step(self, length: int, seed: int) -> None:
        """Take a step of `length` rows with each, from the same draws."""
        row = self.ours.progress.row
        torch.manual_seed(seed)
        self.ours.train_step(length)
        torch.manual_seed(seed)
        with default_dtype(self.dtype):  # torch's ASGD keeps its rate and the weight of its average in it
            self.published.step(self.ours.source, row, length)

    def apart(self) -> dict[str, float]:
        """Return the largest difference in each parameter, relative to its largest number; under ASGD the averages
        count, too."""
        theirs = self.published.model.state_dict()
        found = {name: _relative(tensor, theirs[name]) for name, tensor in published_names(self.ours.model).items()}
        if self.ours.optimizer.averaging:
            with self.ours.optimizer.averaged():
                averages = published_names(self.ours.model)
                for name, parameter in self.published.model.named_parameters():
                    average = self.published.optimizer.state[parameter]["ax"]
                    found[f"average of {name}"] = _relative(averages[name], average)
        return found


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(code: Path, config: TrainConfig, case: Case, steps: int) -> float:
    """Return the largest relative difference of a parameter after `steps` steps."""
    lengths = [case.lengths[i % len(case.lengths)] for i in range(steps)]
    pair = Pair(code, config, case, sum(lengths) + 1)
    for seed, length in enumerate(lengths):
        pair.step(length, seed)
    return max(pair.apart().values())


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.same_draws", description=__doc__)
    facts: dict[str, Any] = {"torch": torch.__version__, "steps": config.steps}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "data")
        default = TrainConfig(data=Path(folder) / "data", model=MODEL, optim=OPTIM)
        facts["largest relative difference of a parameter"] = {
            name: compare(config.code, dataclasses.replace(default, out=Path(folder) / str(i)), case, config.steps)
            for i, (name, case) in enumerate(CASES.items())
        }
    write_json(config.out, facts)
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
