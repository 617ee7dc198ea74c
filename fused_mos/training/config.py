"""Configuration of a training run, and the recipes: plain functions that return one.

The docstring below each field is its help line; the symbol or flag in parentheses is that of the paper and
its published code.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .._backends import NAMES
from ..lm.dynamic_eval import DynamicRule


class ConfigError(ValueError):
    """A configuration that cannot be run, with the field and its value."""


def check_seed(seed: int) -> None:
    """Raises ConfigError for what is no seed of torch's."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be in [0, 2**63), got {seed}")


@dataclass(frozen=True)
class ModelConfig:
    """The AWD-LSTM and its head. Defaults: the paper's Penn Treebank model."""

    head: Literal["mos", "moc", "softmax"] = "mos"
    """Output layer: Mixture of Softmaxes, Mixture of Contexts, or one softmax (whose last LSTM layer is as wide as the
    embedding)."""
    n_experts: int = 15
    """Softmaxes in the mixture (K, n_experts)."""
    embedding_size: int = 280
    """Size of word embeddings and latent vectors (d, emsize)."""
    hidden_sizes: tuple[int, ...] = (960, 960, 620)
    """Width of each LSTM layer (nhid, nhid, nhidlast)."""
    dropoute: float = 0.1
    """Dropout of whole words from the embedding (dropoute)."""
    dropouti: float = 0.4
    """Locked dropout of the embedded input (dropouti)."""
    dropouth: float = 0.225
    """Locked dropout between LSTM layers (dropouth)."""
    dropout: float = 0.4
    """Locked dropout of the last LSTM layer's output (dropout)."""
    dropoutl: float = 0.29
    """Locked dropout of the latent vectors, independent across experts (dropoutl)."""
    wdrop: float = 0.5
    """Dropout of the hidden-to-hidden weights (wdrop)."""
    tied: bool = True
    """Share the embedding's weight with the decoder (tied)."""
    backend: str = "auto"
    """Implementation of the head; fused_mos.backends() lists them."""
    grad_filter_eps: float = 0.0
    """Drop experts of responsibility below this from the backward pass; 0 is exact."""

    def check(self) -> None:
        """Raises ConfigError for a value that no model can have."""
        for name in ("embedding_size", "n_experts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("dropoute", "dropouti", "dropouth", "dropout", "dropoutl", "wdrop", "grad_filter_eps"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ConfigError(f"hidden_sizes must be one or more positive widths, got {self.hidden_sizes}")
        if self.head not in get_args(ModelConfig.__dataclass_fields__["head"].type):
            raise ConfigError(f"head must be mos, moc or softmax, got {self.head!r}")
        if self.backend not in NAMES:
            raise ConfigError(f"backend must be one of {', '.join(NAMES)}, got {self.backend!r}")


@dataclass(frozen=True)
class OptimConfig:
    """NT-ASGD and its regularisers. Defaults: the paper's Penn Treebank training."""

    lr: float = 20.0
    """Learning rate of SGD and ASGD (lr)."""
    finetune_lr: float = 25.0
    """Learning rate that fine-tuning takes for lr."""
    batch_size: int = 12
    """Parallel columns of text (batch_size)."""
    small_batch_size: int = 0
    """Columns computed at once, gradients accumulated over the batch; 0: all (small_batch_size)."""
    epochs: int = 1000
    """Epochs at most (epochs)."""
    bptt: int = 70
    """Mean length of a segment of truncated backpropagation (bptt)."""
    bptt_delta: int = 40
    """Segments are at most bptt + this long (max_seq_len_delta)."""
    clip: float = 0.25
    """Largest norm of the gradient; 0: no clipping (clip)."""
    weight_decay: float = 1.2e-6
    """L2 decay of all weights (wdecay)."""
    alpha: float = 2.0
    """Weight of activation regularisation, AR (alpha)."""
    beta: float = 1.0
    """Weight of temporal activation regularisation, TAR (beta)."""
    nonmono: int = 5
    """Epochs without a better validation loss before averaging starts (nonmono, n)."""


@dataclass(frozen=True)
class TrainConfig:
    recipe: str = "ptb-small"
    """Named set of defaults for all other flags."""
    data: Path = Path("data")
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path | None = None
    """Folder of the run, new or empty; by default runs/RECIPE-HEAD-seedSEED."""
    resume: Path | None = None
    """Continue the run in this folder exactly where its last checkpoint stands."""
    start: Path | None = None
    """Fine-tune: start from the best model of the run in this folder, average from the first step, and stop where
    averaging would have started."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 28
    """Seed of initialisation, dropout and segment lengths (seed)."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products in training: float32, tf32 (GPU alone), or bfloat16 in the head, and then tf32 in the LSTM on
    a GPU. Parameters, cell states, losses and evaluation are float32."""
    map_unknown: bool = False
    """Count words of valid.txt and test.txt that train.txt lacks as <unk>, instead of refusing them."""
    valid_batch_size: int = 10
    """Columns of validation text (eval_batch_size)."""
    test_batch_size: int = 1
    """Columns of test text (test_batch_size)."""
    log_interval: int = 50
    """Steps between lines of metrics.jsonl (log-interval)."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within an epoch; 0 writes one after every step."""
    checkpoint_max_mib: int = 0
    """Split checkpoints into files of at most this size; 0: one file."""
    time_limit: float = 0.0
    """Seconds after which the run saves and exits, to be continued with --resume; 0: none. Looked at after every
    step."""
    profile: int = 0
    """Steps whose time to measure stage by stage, into profile.json; training goes on after them. Hooks order sums
    anew, so the losses' last digits may differ."""

    def check(self) -> None:
        """Raises ConfigError for a value that no run can have."""
        model, optim = self.model, self.optim
        positive = {
            "batch_size": optim.batch_size,
            "epochs": optim.epochs,
            "bptt": optim.bptt,
            "lr": optim.lr,
            "finetune_lr": optim.finetune_lr,
            "valid_batch_size": self.valid_batch_size,
            "test_batch_size": self.test_batch_size,
            "log_interval": self.log_interval,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        for name in ("small_batch_size", "bptt_delta", "clip", "weight_decay", "alpha", "beta", "nonmono"):
            if getattr(optim, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(optim, name)}")
        for name in ("checkpoint_minutes", "checkpoint_max_mib", "time_limit", "profile"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        check_seed(self.seed)
        model.check()
        if optim.small_batch_size and optim.batch_size % optim.small_batch_size:
            raise ConfigError(
                f"small_batch_size must divide batch_size = {optim.batch_size}, got {optim.small_batch_size}"
            )
        if self.precision not in get_args(TrainConfig.__dataclass_fields__["precision"].type):
            raise ConfigError(f"precision must be float32, tf32 or bfloat16, got {self.precision!r}")

    @property
    def run_folder(self) -> Path:
        return self.out or Path("runs") / f"{self.recipe}-{self.model.head}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`; raises ConfigError for a field that this version does not know."""
        values = dict(values)
        try:
            model, optim = values.pop("model"), OptimConfig(**values.pop("optim"))
            model = ModelConfig(**{**model, "hidden_sizes": tuple(model["hidden_sizes"])})
            paths = {
                name: path and Path(path) for name, path in values.items() if name in ("data", "out", "resume", "start")
            }
            return cls(**{**values, **paths}, model=model, optim=optim)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the saved configuration does not fit this version: {error}") from None


def ptb() -> TrainConfig:
    """The paper's Penn Treebank model, 21,500,620 parameters."""
    return TrainConfig(recipe="ptb")


def wikitext2() -> TrainConfig:
    """The paper's WikiText-2 model, 34,909,528 parameters, in the pieces that its code computes on one GPU."""
    return TrainConfig(
        recipe="wikitext2",
        seed=1882,
        model=ModelConfig(embedding_size=300, hidden_sizes=(1150, 1150, 650), dropouti=0.55, dropouth=0.2),
        optim=OptimConfig(lr=15.0, finetune_lr=20.0, batch_size=15, small_batch_size=5, bptt_delta=20),
    )


def ptb_small() -> TrainConfig:
    """A Penn Treebank model for a CPU: about an hour on two cores."""
    return TrainConfig(
        recipe="ptb-small",
        model=ModelConfig(
            n_experts=4,
            embedding_size=128,
            hidden_sizes=(400, 256),
            dropoute=0.05,
            dropouti=0.15,
            dropouth=0.1,
            dropout=0.15,
            dropoutl=0.1,
            wdrop=0.15,
        ),
        optim=OptimConfig(batch_size=20, bptt=35, bptt_delta=20, epochs=10, nonmono=1),
    )


def wikitext2_small() -> TrainConfig:
    """A WikiText-2 model for a CPU: some three epochs in an hour on two cores."""
    return TrainConfig(
        recipe="wikitext2-small",
        seed=1882,
        model=ModelConfig(
            n_experts=4,
            embedding_size=100,
            hidden_sizes=(400, 256),
            dropoute=0.02,
            dropouti=0.1,
            dropouth=0.1,
            dropout=0.1,
            dropoutl=0.05,
            wdrop=0.1,
        ),
        optim=OptimConfig(batch_size=20, bptt=35, bptt_delta=20, epochs=10, nonmono=1, finetune_lr=20.0),
    )


def demo() -> TrainConfig:
    """A minute on two cores, for a text of some 100,000 words; the embedding is small, so that the softmax
    bottleneck binds."""
    return TrainConfig(
        recipe="demo",
        model=ModelConfig(
            n_experts=5,
            embedding_size=32,
            hidden_sizes=(192, 128),
            dropoute=0.1,
            dropouti=0.1,
            dropouth=0.1,
            dropout=0.2,
            dropoutl=0.0,
            wdrop=0.2,
        ),
        optim=OptimConfig(lr=10.0, finetune_lr=12.5, batch_size=10, bptt=35, bptt_delta=20, epochs=10, nonmono=2),
        log_interval=20,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "ptb": ptb,
    "wikitext2": wikitext2,
    "ptb-small": ptb_small,
    "wikitext2-small": wikitext2_small,
    "demo": demo,
}


def dynamic_rule(recipe: str) -> DynamicRule:
    """The numbers of dynamic evaluation that go with a recipe (Krause et al. 2018; the paper's on WikiText-2)."""
    return DynamicRule(lamb=0.02, epsilon=0.002) if recipe.startswith("wikitext2") else DynamicRule()
