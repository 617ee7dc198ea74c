"""Small word-level language models trained with AdamW, for `experiments.adam` and `experiments.transformer`: a
Transformer or an LSTM with any head.

They train on windows at random positions of a text, without state between windows, and are evaluated on consecutive
windows.
"""

import bisect
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_mos
from fused_mos.head import Head
from fused_mos.training.graphs import Recorder

WINDOW = 64
"""Words in a window, T."""
BATCH = 16
"""Windows in a step, B."""
GPU_EVALUATION_BATCH = 256
"""Windows that a GPU evaluates at once."""
WARMUP = 0.05
"""Fraction of the steps in which the learning rate rises."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Hyperparameters of a model."""

    body: str  # "transformer" or "lstm"
    head: str  # "softmax", "moc" or "mos"
    n_classes: int
    d: int
    width: int
    """Width of a Transformer's feed-forward layers, or of the first LSTM layer. The second LSTM layer has width d."""
    n_layers: int = 4
    """Layers of a Transformer."""
    n_experts: int = 4
    latent: str = "tanh"
    latent_norm: bool = False
    dropout: float = 0.1

    @functools.cache  # noqa: B019 - a few hundred shapes
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in LanguageModel(self).parameters())

    def with_parameters(self, count: int) -> "Shape":
        """Returns this shape with the smallest width that gives at least `count` parameters."""

        def of_width(width: int) -> int:
            return dataclasses.replace(self, width=width).parameters()

        return dataclasses.replace(self, width=bisect.bisect_left(range(1 << 16), count, lo=1, key=of_width))


class Block(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, d: int, width: int, dropout: float):
        super().__init__()
        self.n_heads = max(1, d // 32)
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.attention, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed_forward = nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, d))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        q, k, v = self.attention(self.norms[0](x)).unflatten(-1, (3, self.n_heads, -1)).transpose(1, 3).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, d / heads)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(self.norms[1](x)))


class Transformer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(WINDOW, shape.d) * 0.02)
        self.blocks = nn.Sequential(*[Block(shape.d, shape.width, shape.dropout) for _ in range(shape.n_layers)])
        self.norm = nn.LayerNorm(shape.d)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        return self.norm(self.blocks(x + self.positions[: x.shape[1]]))


class Lstm(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.LSTM(shape.d, shape.width, batch_first=True), nn.LSTM(shape.width, shape.d, batch_first=True)]
        )
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        return x


class LanguageModel(nn.Module):
    """Returns the mean loss of predicting `target` (B, T) from `words` (B, T). Embedding and decoder are tied."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.n_classes, shape.d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(shape.dropout)
        self.body = {"transformer": Transformer, "lstm": Lstm}[shape.body](shape)
        self.head = self._make_head(shape)

    def _make_head(self, shape: Shape) -> Head:
        sizes = {"in_features": shape.d, "n_classes": shape.n_classes, "weight": self.embedding.weight}
        if shape.head == "softmax":
            return fused_mos.Softmax(**sizes)
        kind = {"moc": fused_mos.MoC, "mos": fused_mos.MoS}[shape.head]
        return kind(**sizes, n_experts=shape.n_experts, latent=shape.latent, latent_norm=shape.latent_norm)

    def hidden(self, words: Tensor) -> Tensor:  # (B, T) -> (B, T, d)
        return self.body(self.dropout(self.embedding(words)))

    def forward(self, words: Tensor, target: Tensor) -> Tensor:
        return self.head(self.hidden(words), target).loss


def make_optimizer(parameters: list[nn.Parameter], learning_rate: float, replayed: bool = False) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices alone; the embedding, by far the largest, has none. `replayed` makes it one
    whose steps a graph can repeat."""
    groups = [
        {"params": [p for p in parameters if _decays(p)], "weight_decay": 0.1},
        {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
    ]
    how = {"fused": True, "capturable": True} if replayed else {}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.99), **how)


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.shape[0] < 8192


def learning_rate_factor(progress: float) -> float:
    """Learning rate as a fraction of the largest one, at `progress` from 0 to 1: linear warm-up, then a cosine."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def places_of(text: Tensor, steps: int, generator: torch.Generator) -> Tensor:  # (n,) -> (steps, B, 1)
    """Draws the positions at which the windows of all steps start."""
    return torch.randint(0, text.numel() - WINDOW, (steps, BATCH, 1), generator=generator)


def learning_rates(largest: float, steps: int) -> list[float]:
    """Returns the learning rate of each step."""
    return [largest * learning_rate_factor((step + 0.5) / steps) for step in range(steps)]


class Steps:
    """Training steps with windows and learning rates fixed in advance. Dropout uses torch's default generator.

    Args:
        places: (steps, B, 1), see `places_of`.
        rates: learning rate of each step.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        text: Tensor,  # (n,)
        places: Tensor,  # (steps, B, 1)
        rates: list[float],
    ):
        self.model, self.optimizer, self.text = model, optimizer, text
        self.loss = torch.zeros((), device=text.device)
        self._rest = iter(zip(places, rates))
        self._window = torch.arange(WINDOW, device=text.device)

    def run(self, count: int, name: str) -> None:
        """Takes the next `count` steps, with a progress bar called `name`."""
        self.model.train()
        for start, rate in tqdm(islice(self._rest, count), name, count, leave=False, disable=None, mininterval=1):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._step(start)

    def check(self, name: str) -> None:
        """Raises SystemExit unless the last loss is finite."""
        if not self.loss.isfinite():
            raise SystemExit(f"error: the loss of {name} became {self.loss.item()}; train with smaller learning rates")

    def _step(self, start: Tensor) -> None:  # (B, 1)
        index = start + self._window
        self.optimizer.zero_grad()
        loss = self.model(self.text.take(index), self.text.take(index + 1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())


class ReplayedSteps(Steps):
    """Steps that are recorded once and replayed, on a GPU as a CUDA graph. A counter on the device selects the window
    and the learning rate, so the host does nothing between steps. See fused_mos/training/graphs.py.

    Args:
        optimizer: one of `make_optimizer(..., replayed=True)`.
        recorder: records a step.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        text: Tensor,  # (n,)
        places: Tensor,  # (steps, B, 1)
        rates: list[float],
        recorder: Recorder,
    ):
        super().__init__(model, optimizer, text, places, rates)
        self._places, self._rates = places.to(text.device), torch.tensor(rates, device=text.device)
        self._number = torch.zeros(1, dtype=torch.int64, device=text.device)
        self._rate = torch.zeros((), device=text.device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        _fill_state(optimizer)
        model.train()
        self._warm_up(recorder)
        self._replay = recorder.record(self._next)

    def run(self, count: int, name: str) -> None:
        for _ in range(count):
            self._replay()

    def _next(self) -> None:
        self._rate.copy_(self._rates.index_select(0, self._number)[0])
        self._step(self._places.index_select(0, self._number)[0])
        self._number += 1

    def _warm_up(self, recorder: Recorder) -> None:
        """Takes three warm-up steps, which libraries need before recording, and undoes them."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        changed = [*self.model.parameters(), *states, self._number, self.loss]
        before = [tensor.detach().clone() for tensor in changed]
        devices = [self.text.device] if self.text.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            for _ in range(3):
                with torch.enable_grad():
                    recorder.run(self._next)
                for tensor, held in zip(changed, before):
                    tensor.copy_(held)


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state that AdamW creates in its first step: within a graph, each replay would reset it to 0."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                zeros = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}


@torch.no_grad()
def perplexity(model: LanguageModel, text: Tensor) -> float:  # (n,)
    model.eval()
    batch = GPU_EVALUATION_BATCH if text.is_cuda else BATCH
    total = sum(model(words, target).double() * target.numel() for words, target in _in_a_row(text, batch))
    return math.exp(total / (text.numel() - 1))


def _in_a_row(text: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields words and targets in batches (B, T) and a shorter rest (1, t). Every word but the first is a target."""
    inner = (text.numel() - 1) // WINDOW * WINDOW
    words, target = text[:inner].view(-1, WINDOW), text[1 : inner + 1].view(-1, WINDOW)
    yield from zip(words.split(batch), target.split(batch))
    if inner < text.numel() - 1:
        yield text[None, inner:-1], text[None, inner + 1 :]
