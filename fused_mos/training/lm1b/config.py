"""Configuration of a run on One Billion Words, and the recipes. The paper says of this corpus: 100,000 words, a tied
embedding, two LSTM layers of 1,024, SGD at 20 with batches of 60 and gradients of norm 0.25 at most, 7 experts. What it
does not say (bptt, dropout) is ours."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .. import settings
from ..config import ModelConfig, RunConfig
from ..errors import ConfigError
from ..settings import NOT_NEGATIVE, POSITIVE, SEED, setting

NO_DROPOUT = ModelConfig(dropoute=0.0, dropouti=0.0, dropouth=0.0, dropout=0.0, dropoutl=0.0, wdrop=0.0)
"""A model of this size sees few of 0.8 billion words twice."""


@dataclass(frozen=True)
class LM1BConfig(RunConfig):
    """A run on the One Billion Word benchmark, or a corpus in its form."""

    recipe: str = "lm1b-mos"
    """Named set of defaults for all other flags."""
    data: Path = setting(Path("lm1b"), may_change=True)
    """Folder that python -m fused_mos.data.lm1b prepare wrote. On many machines, each reads its own copy, or a shared
    one."""
    out: Path | None = setting(None, may_change=True)
    """Folder of the run, on a file system that all ranks share: a new one, or one in which the same command goes on. By
    default runs/CORPUS-RECIPE-seedSEED, with the name of the corpus's folder."""
    evaluate: bool = setting(False, may_change=True)
    """Instead of training, evaluate the best model of the run on all held-out shards."""
    model: ModelConfig = field(
        default_factory=lambda: replace(NO_DROPOUT, n_experts=7, embedding_size=900, hidden_sizes=(1024, 1024))
    )
    optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    """PyTorch's optimizer, fused where it has that."""
    lr: float = setting(20.0, POSITIVE)
    """Learning rate."""
    initial_accumulator: float = setting(0.0, NOT_NEGATIVE)
    """First value of adagrad's sums of squared gradients. With 0, the first step moves every parameter by lr."""
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """Steps over which the learning rate rises from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Fall of the learning rate from the end of the warm-up to 0 at the end of the run."""
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    """L2 decay of all weights (for adam decoupled, as AdamW's)."""
    clip: float = setting(0.25, NOT_NEGATIVE)
    """Largest norm of the gradient; 0: no clipping."""
    batch_size: int = setting(60, POSITIVE)
    """Columns of text over all ranks."""
    micro_batches: int = setting(1, POSITIVE, may_change=True)
    """Parts of a rank's columns that are computed one after the other, their gradients accumulated, to save memory.
    (--accumulate, its earlier name, is taken, too.)"""
    head_chunk: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Tokens for which the head is computed at once, its vectors recomputed in the backward pass; 0: all, and kept."""
    bptt: int = setting(35, POSITIVE)
    """Rows of a segment of truncated backpropagation."""
    epochs: int = setting(1, POSITIVE, may_change=True)
    """Passes over the training shards. A run that goes on with more, or with other max_steps, takes the learning rate
    of the new length from there on."""
    max_steps: int = setting(0, NOT_NEGATIVE, may_change=True)
    """Steps at most; 0: no limit."""
    vocab_parallel: int = setting(1, POSITIVE, may_change=True)
    """Ranks that share one copy of the decoder and embedding, and read the same text. The others are copies (data
    parallelism)."""
    seed: int = setting(1, SEED)
    """Seed of initialisation, dropout and the order of shards."""
    device: str = setting("auto", may_change=True)
    """cpu or cuda; auto takes GPUs if there are any. Each rank of a machine takes the GPU of its LOCAL_RANK."""
    eval_interval: int = setting(2000, POSITIVE, may_change=True)
    """Steps between evaluations on the held-out text; there is one more at the end."""
    eval_shards: int = setting(1, NOT_NEGATIVE, may_change=True)
    """Held-out shards to evaluate on in training; 0: all. The first is the usual test shard of the full benchmark."""
    eval_batch_size: int = setting(60, POSITIVE, may_change=True)
    """Columns of held-out text over all ranks."""
    checkpoint_minutes: float = setting(15.0, NOT_NEGATIVE, may_change=True)
    """Minutes between checkpoints; 0 writes one after every step."""
    memory_gib: float = setting(0.0, NOT_NEGATIVE, may_change=True)
    """Memory that a rank may use; 0: what the device has, shared by the ranks on it. A run that needs more is
    refused."""

    def check(self) -> None:
        """Raises ConfigError for a value that no run can have."""
        super().check()
        if not self.model.tied:
            raise ConfigError("tied must be True: the recipes share the embedding's weight with the decoder, got False")

    def check_ranks(self, n_ranks: int) -> None:
        """Raises ConfigError where the columns cannot be shared out."""
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
        """The inverse of `to_json`, also of versions before 0.2. Raises ConfigError for a field that this version does
        not know, or a value of another type."""
        return settings.from_json(cls, values, _renewed)


def _renewed(values: dict[str, Any]) -> dict[str, Any]:
    """The saved configuration of a version before 0.2, whose name for micro-batches was another, as that of today."""
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
    """A model of all 793,471 words: a billion parameters.

    Adagrad as in Jozefowicz et al. 2016, for SGD hardly moves rare words: lr 0.2, and 1 to start with where losses are
    summed over the 20 rows of a segment. Ours is their mean, with gradients a 20th and squares a 400th of those."""
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
    """Minutes on a CPU, for a few shards and vocabularies of some 10,000 words. The paper's SGD: with Adam, at 0.0007
    to 0.005, MoS of this size needs init_bias, or stays for long at the perplexity of the words' frequencies."""
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
