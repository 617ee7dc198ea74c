"""Configuration of a training run, and the recipes: plain functions that return one.

The docstring below each field is its help line; the symbol or flag in parentheses is that of the paper and
its published code.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._backends import NAMES
from ..lm.awd_lstm import check_head
from ..lm.dynamic_evaluation import DynamicRule
from ..runtime import files
from . import settings
from .errors import ConfigError
from .settings import NOT_NEGATIVE, POSITIVE, SEED, SHARE, SIZE, setting

HeadName = Literal["mos", "moc", "softmax"]
LatentName = Literal["tanh", "linear", "residual"]
Precision = Literal["float32", "tf32", "bfloat16"]

MOST_LAYERS = 1000
"""LSTM layers of a model: more would take minutes to make, however narrow."""


@dataclass(frozen=True)
class ModelConfig:
    """The AWD-LSTM and its head. Defaults: the paper's Penn Treebank model."""

    head: HeadName = "mos"
    """Output layer: Mixture of Softmaxes, Mixture of Contexts, or one softmax (whose last LSTM layer is as wide as the
    embedding)."""
    n_experts: int = setting(15, SIZE)
    """Softmaxes in the mixture (K, n_experts)."""
    embedding_size: int = setting(280, SIZE)
    """Size of word embeddings and latent vectors (d, emsize)."""
    hidden_sizes: tuple[int, ...] = (960, 960, 620)
    """Width of each LSTM layer (nhid, nhid, nhidlast)."""
    latent: LatentName = "tanh"
    """Latent vectors of a mixture, from the context h: the paper's tanh(W h + c); linear, without tanh; or residual,
    h + U h with U = 0 at the start, which needs a last LSTM layer as wide as the embedding."""
    latent_norm: bool = False
    """Divide each W h + c by its root mean square, which keeps tanh from saturating under Adam. Not for residual."""
    rank: int | None = setting(None, SIZE)
    """Rank of each W or U, as a product of two matrices; None: whole matrices."""
    dropoute: float = setting(0.1, SHARE)
    """Dropout of whole words from the embedding (dropoute)."""
    dropouti: float = setting(0.4, SHARE)
    """Locked dropout of the embedded input (dropouti)."""
    dropouth: float = setting(0.225, SHARE)
    """Locked dropout between LSTM layers (dropouth)."""
    dropout: float = setting(0.4, SHARE)
    """Locked dropout of the last LSTM layer's output (dropout)."""
    dropoutl: float = setting(0.29, SHARE)
    """Locked dropout of the latent vectors, independent across experts (dropoutl)."""
    wdrop: float = setting(0.5, SHARE)
    """Dropout of the hidden-to-hidden weights (wdrop)."""
    tied: bool = True
    """Share the embedding's weight with the decoder (tied)."""
    backend: str = setting("auto", may_change=True)
    """Implementation of the head; fused_mos.backends() lists them."""
    grad_filter_eps: float = setting(0.0, SHARE)
    """Drop experts of responsibility below this from the backward pass; 0 is exact."""

    def check(self) -> None:
        """Raises ConfigError for a value that no model can have."""
        settings.check(self)
        if not self.hidden_sizes or not all(SIZE.holds(width) for width in self.hidden_sizes):
            raise ConfigError(f"hidden_sizes must be one or more widths in [1, 2**31), got {self.hidden_sizes}")
        if len(self.hidden_sizes) > MOST_LAYERS:
            raise ConfigError(f"hidden_sizes must be at most {MOST_LAYERS} widths, got {len(self.hidden_sizes)}")
        if self.backend not in NAMES:
            raise ConfigError(f"backend must be one of {', '.join(NAMES)}, got {self.backend!r}")
        try:
            check_head(self.head, self.embedding_size, self.hidden_sizes, self.latent, self.latent_norm, self.rank)
        except ValueError as error:
            raise ConfigError(str(error)) from None


@dataclass(frozen=True)
class OptimConfig:
    """NT-ASGD and its regularisers. Defaults: the paper's Penn Treebank training."""

    lr: float = setting(20.0, POSITIVE)
    """Learning rate of SGD and ASGD (lr)."""
    finetune_lr: float = setting(25.0, POSITIVE)
    """Learning rate that fine-tuning takes for lr."""
    batch_size: int = setting(12, POSITIVE)
    """Parallel columns of text (batch_size)."""
    micro_batches: int = setting(1, POSITIVE)
    """Parts of a batch's columns that are computed one after the other, their gradients accumulated, to save memory.
    (The published code's small_batch_size, the columns of a part, is taken, too.)"""
    epochs: int = setting(1000, POSITIVE, may_change=True)
    """Epochs at most (epochs)."""
    bptt: int = setting(70, POSITIVE)
    """Mean length of a segment of truncated backpropagation (bptt)."""
    bptt_delta: int = setting(40, NOT_NEGATIVE)
    """Segments are at most bptt + this long (max_seq_len_delta)."""
    clip: float = setting(0.25, NOT_NEGATIVE)
    """Largest norm of the gradient; 0: no clipping (clip)."""
    weight_decay: float = setting(1.2e-6, NOT_NEGATIVE)
    """L2 decay of all weights (wdecay)."""
    alpha: float = setting(2.0, NOT_NEGATIVE)
    """Weight of activation regularisation, AR (alpha)."""
    beta: float = setting(1.0, NOT_NEGATIVE)
    """Weight of temporal activation regularisation, TAR (beta)."""
    nonmono: int = setting(5, NOT_NEGATIVE)
    """Epochs without a better validation loss before averaging starts (nonmono, n)."""


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run that both trainers have."""

    recipe: str = ""
    """Named set of defaults for all other flags."""
    data: Path = setting(Path("data"), may_change=True)
    """Folder of the corpus."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run: a new one, or one in which the same command goes on."""
    resume: Path | None = setting(None, may_change=True)
    """Go on with the run in this folder: short for the command that began it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init_bias: bool = False
    """Start the head's bias at the logarithms of the words' frequencies in the training text, instead of 0: Adam takes
    thousands of steps to learn it. Acts at the start of a run that begins with a new model."""
    seed: int = setting(0, SEED)
    """Seed."""
    device: str = setting("auto", may_change=True)
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    precision: Precision = "float32"
    """Precision of matrix products in training: float32, tf32 (GPU alone), or bfloat16 in the head and, on a GPU, in
    the LSTM where a kernel has its sizes (at most 16 columns), else tf32 there. Parameters, cell states, losses and
    evaluation are float32."""
    cuda_graphs: bool = setting(True, may_change=True)
    """Record steps as CUDA graphs and replay them: the same losses, less work for the host. Does nothing on a CPU, with
    grad_filter_eps or with several ranks."""
    log_interval: int = setting(50, POSITIVE, may_change=True)
    """Steps between lines of metrics.jsonl (log-interval)."""
    checkpoint_minutes: float = setting(5.0, NOT_NEGATIVE, may_change=True)
    """Minutes between checkpoints; 0 writes one after every step."""
    time_limit: float = setting(0.0, NOT_NEGATIVE, may_change=True)
    """Seconds after which the run saves and exits, looked at after every step; the same command continues. 0: none."""

    @property
    def run_folder(self) -> Path:
        """Where the run is: by default named after the corpus and what makes it this run."""
        return self.out or self.resume or Path("runs") / "-".join([files.real(self.data).name, *self._names()])

    def _names(self) -> list[str]:
        return [self.recipe, f"seed{self.seed}"]

    def check(self) -> None:
        """Raises ConfigError for a value that no run can have."""
        settings.check(self)
        self.model.check()

    def to_json(self) -> dict[str, Any]:
        return settings.to_json(self)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run of the AWD-LSTM on a corpus of three files."""

    recipe: str = "ptb-small"
    """Named set of defaults for all other flags."""
    data: Path = setting(Path("data"), may_change=True)
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run: a new one, or one in which the same command goes on. By default
    runs/CORPUS-RECIPE-HEAD-seedSEED, with the name of the corpus's folder."""
    start: Path | None = setting(None, may_change=True)
    """Fine-tune: start from the best model of the run in this folder, average from the first step, and stop where
    averaging would have started."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = setting(28, SEED)
    """Seed of initialisation, dropout and segment lengths (seed)."""
    map_unknown: bool = False
    """Count words of valid.txt and test.txt that train.txt lacks as <unk>, instead of refusing them."""
    valid_batch_size: int = setting(10, POSITIVE)
    """Columns of validation text (eval_batch_size)."""
    test_batch_size: int = setting(1, POSITIVE)
    """Columns of test text (test_batch_size)."""
    checkpoint_max_mib: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Split checkpoints into files of at most this size; 0: one file."""
    profile: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Steps whose time to measure stage by stage, into profile.json; training goes on after them. Hooks order sums
    anew, so the losses' last digits may differ."""

    def check(self) -> None:
        """Raises ConfigError for a value that no run can have."""
        super().check()
        optim = self.optim
        if optim.batch_size % optim.micro_batches:
            raise ConfigError(f"micro_batches must divide batch_size = {optim.batch_size}, got {optim.micro_batches}")

    def _names(self) -> list[str]:
        return [self.recipe, self.model.head, f"seed{self.seed}"]

    @classmethod
    def from_json(cls, values: Any) -> "TrainConfig":
        """The inverse of `to_json`, also of versions before 0.2. Raises ConfigError for a field that this version does
        not know, or a value of another type."""
        return settings.from_json(cls, values, _renewed)


def _renewed(values: dict[str, Any]) -> dict[str, Any]:
    """The saved configuration of a version before 0.2, whose name for micro-batches was another, as that of today."""
    optim = values.get("optim")
    if isinstance(optim, dict) and "small_batch_size" in optim:
        optim = dict(optim)
        if columns := optim.pop("small_batch_size"):
            optim["micro_batches"] = optim["batch_size"] // columns
        values = {**values, "optim": optim}
    return values


def ptb() -> TrainConfig:
    """The paper's Penn Treebank model, 21,500,620 parameters."""
    return TrainConfig(recipe="ptb")


def wikitext2() -> TrainConfig:
    """The paper's WikiText-2 model, 34,909,528 parameters, in the pieces that its code computes on one GPU."""
    return TrainConfig(
        recipe="wikitext2",
        seed=1882,
        model=ModelConfig(embedding_size=300, hidden_sizes=(1150, 1150, 650), dropouti=0.55, dropouth=0.2),
        optim=OptimConfig(lr=15.0, finetune_lr=20.0, batch_size=15, micro_batches=3, bptt_delta=20),
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
