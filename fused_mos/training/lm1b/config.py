"""The configuration of a run on One Billion Words, and the recipes.

The paper gives for this corpus: 100,000 words, a tied embedding, two LSTM layers of 1,024, 7 experts, SGD at a learning
rate of 20, batches of 60 and gradients clipped at norm 0.25. It does not give bptt and dropout; those are our choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import settings
from ..config import ModelConfig, RunConfig
from ..errors import ConfigError
from ..settings import NOT_NEGATIVE, POSITIVE, SEED, setting

NO_DROPOUT = ModelConfig(dropoute=0.0, dropouti=0.0, dropouth=0.0, dropout=0.0, dropoutl=0.0, wdrop=0.0)
"""With 0.8 billion words, training hardly sees a text twice, so nothing needs regularising."""


@dataclass(frozen=True)
class LM1BConfig(RunConfig):
    """A run on the One Billion Word benchmark, or on a corpus in the same format."""

    recipe: str = "lm1b-mos"
    """Recipe that sets the defaults of all other flags."""
    data: Path = setting(Path("lm1b"), may_change=True)
    """Folder written by python -m fused_mos.data.lm1b prepare.
    With several machines, each may read its own copy or a shared one."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run, which all ranks share. If the same command has begun a run there, that run continues.
    By default runs/CORPUS-RECIPE-seedSEED, where CORPUS is the name of the data folder."""
    evaluate: bool = setting(False, may_change=True)
    """Evaluate the best model of the run on all held-out shards instead of training."""
    model: ModelConfig = field(
        default_factory=lambda: replace(NO_DROPOUT, n_experts=7, embedding_size=900, hidden_sizes=(1024, 1024))
    )
    init_bias: bool = False
    """Start the head's bias at the log-frequencies of the training words instead of 0.
    Recommended with --optimizer adam. No effect on a run that continues."""
    optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    """Optimizer, in PyTorch's fused implementation where there is one."""
    lr: float = setting(20.0, POSITIVE)
    """Learning rate."""
    initial_accumulator: float = setting(0.0, NOT_NEGATIVE)
    """Initial value of adagrad's sums of squared gradients. With 0, the first step moves every parameter by lr."""
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """Steps over which the learning rate rises from 0 to lr."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of the learning rate, from the end of the warm-up to 0 at the end of the run."""
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    """L2 penalty on all weights; for adam, decoupled weight decay (AdamW)."""
    clip: float = setting(0.25, NOT_NEGATIVE)
    """Maximum norm of the gradient; 0 disables clipping."""
    batch_size: int = setting(60, POSITIVE)
    """Batch size over all ranks: columns of text that are read in parallel."""
    micro_batches: int = setting(1, POSITIVE, may_change=True)
    """Split each rank's batch into this many micro-batches and accumulate their gradients, to save memory.
    The earlier name --accumulate is accepted, too."""
    head_chunk: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Compute the head for this many tokens at a time, to save memory; 0 computes all at once."""
    bptt: int = setting(35, POSITIVE)
    """Segment length of truncated backpropagation."""
    epochs: int = setting(1, POSITIVE, may_change=True)
    """Passes over the training shards.
    If a run continues with other epochs or max_steps, its learning rate follows the new length from there on."""
    max_steps: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Maximum number of steps; 0 sets no limit."""
    vocab_parallel: int = setting(1, POSITIVE, may_change=True)
    """Number of ranks that share one copy of the decoder and embedding, and read the same text.
    Such groups of ranks are data-parallel."""
    seed: int = setting(1, SEED)
    """Random seed of initialisation, dropout and the order of shards."""
    device: str = setting("auto", may_change=True)
    """cpu or cuda; auto uses GPUs if there are any. Each rank uses the GPU numbered by its LOCAL_RANK."""
    eval_interval: int = setting(2000, POSITIVE, may_change=True)
    """Steps between evaluations on held-out text; one more follows at the end."""
    eval_shards: int = setting(1, NOT_NEGATIVE, may_change=True)
    """Number of held-out shards to evaluate on during training; 0 takes all.
    The first one is the usual test shard of the full benchmark."""
    eval_batch_size: int = setting(60, POSITIVE, may_change=True)
    """Batch size of evaluation over all ranks."""
    checkpoint_minutes: float = setting(15.0, NOT_NEGATIVE, may_change=True)
    """Minutes between checkpoints; 0 saves after every step."""
    memory_gib: float = setting(0.0, NOT_NEGATIVE, may_change=True)
    """Memory limit of a rank in GiB; a run that needs more is refused.
    0 takes the device's memory, divided by the number of ranks that share it."""

    def check(self) -> None:
        """Raises ConfigError for values that no run can have."""
        super().check()
        if not self.model.tied:
            raise ConfigError("tied must be True: the recipes share the embedding's weight with the decoder, got False")

    def check_ranks(self, n_ranks: int) -> None:
        """Raises ConfigError if the columns cannot be divided among the ranks."""
        n_data = n_ranks // self.vocab_parallel
        if self.eval_batch_size < n_data:
            raise ConfigError(
                f"eval_batch_size must be at least {n_data}, a column for each rank that reads other text, got "
                f"{self.eval_batch_size}"
            )
        parts = n_data * self.micro_batches
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size must be a multiple of {parts} (ranks that read other text × micro_batches = "
                f"{parts // self.micro_batches} × {self.micro_batches}), "
                f"got {self.batch_size}"
            )

    @classmethod
    def from_json(cls, values: Any) -> "LM1BConfig":
        """The inverse of `to_json`; reads files of versions before 0.2, too. Raises ConfigError for an unknown field or
        a value of the wrong type."""
        return settings.from_json(cls, values, _renewed)


def _renewed(values: dict[str, Any]) -> dict[str, Any]:
    """Translates a configuration saved before version 0.2, which had another name for micro-batches."""
    values = dict(values)
    if (parts := values.pop("accumulate", None)) is not None:
        values["micro_batches"] = parts
    return values


def lm1b_mos() -> LM1BConfig:
    """The paper's Mixture of Softmaxes, 113 million parameters at 100,000 words."""
    return LM1BConfig()


def lm1b_softmax() -> LM1BConfig:
    """The paper's softmax, 119 million parameters at 100,000 words."""
    model = replace(NO_DROPOUT, head="softmax", embedding_size=1024, hidden_sizes=(1024, 1024))
    return LM1BConfig(recipe="lm1b-softmax", model=model)


def lm1b_full() -> LM1BConfig:
    """A model with all 793,471 words, a billion parameters.

    It trains with Adagrad, as in Jozefowicz et al. 2016, since SGD hardly moves rare words. They take lr 0.2 and an
    initial accumulator of 1 for losses summed over the 20 rows of a segment. Our loss is the mean, so gradients are 20
    times smaller and their squares 400 times."""
    model = replace(NO_DROPOUT, n_experts=7, embedding_size=1024, hidden_sizes=(1024, 1024))
    return LM1BConfig(
        recipe="lm1b-full",
        model=model,
        optimizer="adagrad",
        lr=0.2,
        initial_accumulator=1 / 400,
        clip=1.0,
        batch_size=128,
        bptt=20,
        precision="bfloat16",
    )


def lm1b_tiny() -> LM1BConfig:
    """A model that trains in minutes on a CPU, for a few shards and about 10,000 words.

    It keeps the paper's SGD. With Adam at learning rates of 0.0007 to 0.005, a MoS of this size needs init_bias:
    without it, the perplexity long stays that of the word frequencies."""
    model = replace(NO_DROPOUT, n_experts=3, embedding_size=96, hidden_sizes=(192, 128))
    return LM1BConfig(
        recipe="lm1b-tiny",
        model=model,
        decay="linear",
        batch_size=24,
        bptt=20,
        epochs=3,
        eval_interval=200,
        eval_batch_size=24,
        log_interval=20,
        checkpoint_minutes=2.0,
    )


RECIPES: dict[str, Callable[[], LM1BConfig]] = {
    "lm1b-mos": lm1b_mos,
    "lm1b-softmax": lm1b_softmax,
    "lm1b-full": lm1b_full,
    "lm1b-tiny": lm1b_tiny,
}
