"""The configuration of a training run, and the recipes: plain functions that return one.

The docstring below each field is its help text. Parentheses give the symbol in the paper or the flag of its published
code. The help breaks lines where a docstring does, so each line there is a whole sentence.
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
"""Maximum number of LSTM layers: more would take minutes to construct, however narrow."""


@dataclass(frozen=True)
class ModelConfig:
    """The AWD-LSTM and its head."""

    head: HeadName = "mos"
    """Output layer: Mixture of Softmaxes (mos), Mixture of Contexts (moc) or a single softmax.
    For softmax, the last LSTM layer must be as wide as the embedding."""
    n_experts: int = setting(15, SIZE)
    """Number of experts in the mixture (K, n_experts)."""
    embedding_size: int = setting(280, SIZE)
    """Size of the word embeddings and the latent vectors (d, emsize)."""
    hidden_sizes: tuple[int, ...] = (960, 960, 620)
    """Width of each LSTM layer (nhid, nhid, nhidlast)."""
    latent: LatentName = "tanh"
    """How a mixture computes its latent vectors from the last LSTM layer's output h.
    tanh: tanh(W h + c), as in the paper. linear: W h + c. residual: h + U h, where U starts at 0.
    For residual, the last LSTM layer must be as wide as the embedding."""
    latent_norm: bool = False
    """Divide W h + c by its root mean square, which keeps tanh from saturating under Adam. Not for residual."""
    rank: int | None = setting(None, SIZE)
    """Factorise each W or U into two matrices of this rank; None keeps full matrices."""
    dropoute: float = setting(0.1, SHARE)
    """Dropout of whole words in the embedding (dropoute)."""
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
    """Backend that computes the head; fused_mos.backends() lists them."""
    grad_filter_eps: float = setting(0.0, SHARE)
    """Skip experts whose responsibility is below this in the backward pass; 0 is exact."""

    def check(self) -> None:
        """Raises ConfigError for values that no model can have."""
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
            raise ConfigError(f"{error}{self._remedy()}") from None

    def _remedy(self) -> str:
        """The flag that gives residual latent vectors a last layer of their width; "" if they have it."""
        widths = *self.hidden_sizes[:-1], self.embedding_size
        if self.latent != "residual" or self.head == "softmax" or self.hidden_sizes == widths:
            return ""
        return f"; for example, pass --hidden-sizes {' '.join(map(str, widths))}"


@dataclass(frozen=True)
class OptimConfig:
    """NT-ASGD and regularisation."""

    lr: float = setting(20.0, POSITIVE)
    """Learning rate of SGD and ASGD (lr)."""
    finetune_lr: float = setting(25.0, POSITIVE)
    """Learning rate of fine-tuning."""
    batch_size: int = setting(12, POSITIVE)
    """Batch size: columns of text that are read in parallel (batch_size)."""
    micro_batches: int = setting(1, POSITIVE)
    """Split each batch into this many micro-batches and accumulate their gradients, to save memory.
    --small-batch-size, the published code's number of columns in a micro-batch, is accepted instead."""
    epochs: int = setting(1000, POSITIVE, may_change=True)
    """Maximum number of epochs (epochs)."""
    bptt: int = setting(70, POSITIVE)
    """Mean segment length of truncated backpropagation (bptt)."""
    bptt_delta: int = setting(40, NOT_NEGATIVE)
    """Maximum segment length, as an excess over bptt (max_seq_len_delta)."""
    clip: float = setting(0.25, NOT_NEGATIVE)
    """Maximum norm of the gradient; 0 disables clipping (clip)."""
    weight_decay: float = setting(1.2e-6, NOT_NEGATIVE)
    """L2 penalty on all weights (wdecay)."""
    alpha: float = setting(2.0, NOT_NEGATIVE)
    """Weight of activation regularisation, AR (alpha)."""
    beta: float = setting(1.0, NOT_NEGATIVE)
    """Weight of temporal activation regularisation, TAR (beta)."""
    nonmono: int = setting(5, NOT_NEGATIVE)
    """Epochs without a better validation loss before averaging starts (nonmono, n)."""


@dataclass(frozen=True)
class RunConfig:
    """The settings that the runs of both trainers share."""

    recipe: str = ""
    """Recipe that sets the defaults of all other flags."""
    data: Path = setting(Path("data"), may_change=True)
    """Folder of the corpus."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run. If the same command has begun a run there, that run continues."""
    resume: Path | None = setting(None, may_change=True)
    """Continue the run in this folder: short for repeating the command that began it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init_bias: bool = False
    """Start the head's bias at the log-frequencies of the training words instead of 0.
    This gives a faster start, not always a better end.
    No effect on a run that continues or fine-tunes."""
    seed: int = setting(0, SEED)
    """Random seed."""
    device: str = setting("auto", may_change=True)
    """cpu, cuda, cuda:1, …; auto uses a GPU if there is one."""
    precision: Precision = "float32"
    """Precision of matrix products in training. tf32 needs a GPU.
    bfloat16 is for the head; the LSTM then uses bfloat16 on a CPU and tf32 on a GPU.
    Parameters, cell states, losses and evaluation are always float32."""
    cuda_graphs: bool = setting(True, may_change=True)
    """Record training steps as CUDA graphs and replay them: the same losses, less CPU overhead.
    No effect on a CPU, with grad_filter_eps, or with several ranks."""
    log_interval: int = setting(50, POSITIVE, may_change=True)
    """Steps between lines of metrics.jsonl (log-interval)."""
    checkpoint_minutes: float = setting(5.0, NOT_NEGATIVE, may_change=True)
    """Minutes between checkpoints; 0 saves after every step."""
    time_limit: float = setting(0.0, NOT_NEGATIVE, may_change=True)
    """Save and exit after this many seconds; 0 sets no limit. The same command continues the run."""

    @property
    def run_folder(self) -> Path:
        """Folder of the run; by default its name tells the corpus, the recipe and the seed."""
        return self.out or self.resume or Path("runs") / "-".join([files.real(self.data).name, *self._names()])

    def _names(self) -> list[str]:
        return [self.recipe, f"seed{self.seed}"]

    def check(self) -> None:
        """Raises ConfigError for values that no run can have."""
        settings.check(self)
        self.model.check()

    def to_json(self) -> dict[str, Any]:
        return settings.to_json(self)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run of the AWD-LSTM on train.txt, valid.txt and test.txt."""

    recipe: str = "ptb-small"
    """Recipe that sets the defaults of all other flags."""
    data: Path = setting(Path("data"), may_change=True)
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run. If the same command has begun a run there, that run continues.
    By default runs/CORPUS-RECIPE-HEAD-seedSEED, where CORPUS is the name of the data folder."""
    start: Path | None = setting(None, may_change=True)
    """Fine-tune the best model of the run in this folder.
    Weights are averaged from the first step, and training ends where averaging would otherwise have started."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = setting(28, SEED)
    """Random seed of initialisation, dropout and segment lengths (seed)."""
    map_unknown: bool = False
    """Read words of valid.txt and test.txt that are missing from train.txt as <unk>, instead of refusing them."""
    valid_batch_size: int = setting(10, POSITIVE)
    """Batch size of validation (eval_batch_size)."""
    test_batch_size: int = setting(1, POSITIVE)
    """Batch size of the test (test_batch_size)."""
    checkpoint_max_mib: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Split checkpoints into files of at most this many MiB; 0 writes a single file."""
    profile: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Time this many steps stage by stage and write profile.json.
    The profiler changes the order of some sums, so the last digits of losses may differ."""

    def check(self) -> None:
        """Raises ConfigError for values that no run can have."""
        super().check()
        optim = self.optim
        if optim.batch_size % optim.micro_batches:
            raise ConfigError(f"micro_batches must divide batch_size = {optim.batch_size}, got {optim.micro_batches}")

    def _names(self) -> list[str]:
        return [self.recipe, self.model.head, f"seed{self.seed}"]

    @classmethod
    def from_json(cls, values: Any) -> "TrainConfig":
        """The inverse of `to_json`; reads files of versions before 0.2, too. Raises ConfigError for an unknown field or
        a value of the wrong type."""
        return settings.from_json(cls, values, _renewed)


def _renewed(values: dict[str, Any]) -> dict[str, Any]:
    """Translates a configuration saved before version 0.2, which had another name for micro-batches."""
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
    """The paper's WikiText-2 model, 34,909,528 parameters, with the micro-batches of its published code."""
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
    """A WikiText-2 model for a CPU: about three epochs an hour on two cores."""
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
    """A model that trains in a minute on two cores, for about 100,000 words of text. Its small embedding makes the
    softmax bottleneck visible."""
    return TrainConfig(
        recipe="demo",
        init_bias=True,  # ahead from the first epoch, and no worse after ten (three seeds)
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
    """Hyperparameters of dynamic evaluation for a recipe (Krause et al. 2018; for WikiText-2, the paper's)."""
    return DynamicRule(lamb=0.02, epsilon=0.002) if recipe.startswith("wikitext2") else DynamicRule()
