"""Configuration of a run on One Billion Words, and the recipes. The paper says of this corpus: 100,000 words, a tied
embedding, two LSTM layers of 1,024, SGD at 20 with batches of 60 and gradients of norm 0.25 at most, 7 experts. What it
does not say (bptt, dropout) is ours."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import ConfigError, ModelConfig

NO_DROPOUT = {"dropoute": 0.0, "dropouti": 0.0, "dropouth": 0.0, "dropout": 0.0, "dropoutl": 0.0, "wdrop": 0.0}
"""Of 0.8 billion words a model of this size sees few twice."""


@dataclass(frozen=True)
class LM1BConfig:
    recipe: str = "lm1b-mos"
    """Named set of defaults for all other flags."""
    data: Path = Path("lm1b")
    """Folder that python -m fused_mos.data.lm1b prepare wrote. On many machines, each reads its own copy, or a shared
    one."""
    out: Path | None = None
    """Folder of the run, which must be on a file system that all ranks share. If it holds a checkpoint, the run goes on
    there. By default runs/RECIPE-seedSEED."""
    evaluate: bool = False
    """Instead of training, evaluate the best model of the run on all held-out shards."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(n_experts=7, embedding_size=900, hidden_sizes=(1024, 1024), **NO_DROPOUT)
    )
    optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    """PyTorch's, fused where it has that."""
    lr: float = 20.0
    """Learning rate."""
    initial_accumulator: float = 0.0
    """Of adagrad: what its sums of squared gradients start with. With 0, the first step moves every parameter by lr."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Of the learning rate, from the end of the warm-up to 0 at the end of the run."""
    weight_decay: float = 0.0
    """L2 decay of all weights (of adam: decoupled, as AdamW's)."""
    clip: float = 0.25
    """Largest norm of the gradient; 0: no clipping."""
    batch_size: int = 60
    """Columns of text over all ranks."""
    accumulate: int = 1
    """Parts of a rank's columns that are computed one after the other, to save memory."""
    head_chunk: int = 0
    """Tokens for which the head is computed at once, its vectors recomputed in the backward pass; 0: all, and kept."""
    bptt: int = 35
    """Rows of a segment of truncated backpropagation."""
    epochs: int = 1
    """Passes over the training shards."""
    max_steps: int = 0
    """Steps at most; 0: no limit."""
    vocab_parallel: int = 1
    """Ranks that share one copy of the decoder and embedding, and read the same text. The others are copies (data
    parallelism)."""
    seed: int = 1
    """Of initialisation, dropout and the order of shards."""
    device: str = "auto"
    """cpu or cuda; auto takes GPUs if there are any. Each rank of a machine takes the GPU of its LOCAL_RANK."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products in training: float32, tf32 (GPU alone), or bfloat16 in the head, and then tf32 in the LSTM on
    a GPU. Parameters, cell states, losses and evaluation are float32."""
    eval_interval: int = 2000
    """Steps between evaluations on the held-out text; there is one more at the end."""
    eval_shards: int = 1
    """Held-out shards to evaluate on in training; 0: all. The first is the usual test shard of the full benchmark."""
    eval_batch_size: int = 60
    """Columns of held-out text over all ranks."""
    log_interval: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints; 0 writes one after every step."""
    time_limit: float = 0.0
    """Seconds after which the run saves and exits; 0: none."""
    memory_gib: float = 0.0
    """Memory that a rank may use; 0: what the device has, shared by the ranks on it. A run that needs more is
    refused."""

    def check(self) -> None:
        """Raises ConfigError for a value that no run can have."""
        self.model.check()
        for name in (
            "lr",
            "batch_size",
            "accumulate",
            "bptt",
            "epochs",
            "vocab_parallel",
            "eval_interval",
            "eval_batch_size",
            "log_interval",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "initial_accumulator",
            "warmup_steps",
            "weight_decay",
            "clip",
            "head_chunk",
            "max_steps",
            "eval_shards",
            "checkpoint_minutes",
            "time_limit",
            "memory_gib",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("optimizer", "decay", "precision"):
            choices = get_args(type(self).__dataclass_fields__[name].type)
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.model.tied:
            raise ConfigError("tied must be True: the recipes share the embedding's weight with the decoder, got False")

    @property
    def run_folder(self) -> Path:
        return self.out or Path("runs") / f"{self.recipe}-seed{self.seed}"

    def check_ranks(self, n_ranks: int) -> None:
        """Raises ConfigError where the columns cannot be shared out."""
        n_data = n_ranks // self.vocab_parallel
        if self.eval_batch_size < n_data:
            raise ConfigError(
                f"eval_batch_size must be at least {n_data}, a column for each rank that reads other text, got "
                f"{self.eval_batch_size}"
            )
        parts = n_data * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size must be a multiple of {parts} (ranks that read other text × accumulate = "
                f"{parts // self.accumulate} × {self.accumulate}), "
                f"got {self.batch_size}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }


def lm1b_mos() -> LM1BConfig:
    """The paper's Mixture of Softmaxes, 113 million parameters at 100,000 words."""
    return LM1BConfig()


def lm1b_softmax() -> LM1BConfig:
    """The paper's softmax, 119 million parameters at 100,000 words."""
    model = ModelConfig(head="softmax", embedding_size=1024, hidden_sizes=(1024, 1024), **NO_DROPOUT)
    return LM1BConfig(recipe="lm1b-softmax", model=model)


def lm1b_full() -> LM1BConfig:
    """For all 793,471 words: a billion parameters. Adagrad as in Jozefowicz et al. 2016, for SGD hardly moves rare
    words: lr 0.2, and 1 to start with where losses are summed over the 20 rows of a segment. Ours is their mean, with
    gradients a 20th and squares a 400th of those."""
    model = ModelConfig(n_experts=7, embedding_size=1024, hidden_sizes=(1024, 1024), **NO_DROPOUT)
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
    to 0.005, MoS of this size stays for long at the perplexity of the words' frequencies."""
    model = ModelConfig(n_experts=3, embedding_size=96, hidden_sizes=(192, 128), **NO_DROPOUT)
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
