"""Small word models under AdamW, a Transformer or an LSTM with any head: what `experiments.adam` and
`experiments.transformer` compare.

All train on windows at random places of a text, forget between windows, and are evaluated on windows in a row.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_mos
from fused_mos.head import Head

WINDOW = 64
"""Words in a window, T."""
BATCH = 16
"""Windows in a step, B."""
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    body: str  # "transformer" or "lstm"
    head: str  # "softmax", "moc" or "mos"
    n_classes: int
    d: int
    width: int
    """Of a Transformer's feed-forward layers, or of the first LSTM layer; the second has d."""
    n_layers: int = 4
    """Of a Transformer."""
    n_experts: int = 4
    latent: str = "tanh"
    latent_norm: bool = False
    dropout: float = 0.1

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in LanguageModel(self).parameters())

    def with_parameters(self, count: int) -> "Shape":
        """The shape of this kind with at least `count` parameters, by its width."""

        def of_width(width: int) -> int:
            return dataclasses.replace(self, width=width).parameters()

        return dataclasses.replace(self, width=bisect.bisect_left(range(1 << 16), count, lo=1, key=of_width))


class Block(nn.Module):
    """A Transformer's layer, with norms before its two parts."""

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
    """Words (B, T) -> the mean loss of the words after them. Embedding and decoder are tied."""

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


def make_optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices alone; the embedding, by far the largest, has none."""
    groups = [
        {"params": [p for p in parameters if _decays(p)], "weight_decay": 0.1},
        {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.99))


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.shape[0] < 8192


def learning_rate_factor(progress: float) -> float:
    """Of the largest learning rate, at a share of the training between 0 and 1: a line up, a cosine down."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def train(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    text: Tensor,  # (n,)
    steps: int,
    learning_rate: float,
    places: torch.Generator,
    name: str,
) -> None:
    """A whole training. Windows are drawn with `places`, dropout with torch's own generator."""
    model.train()
    for step in tqdm(range(steps), desc=name, leave=False, disable=None, mininterval=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor((step + 0.5) / steps)
        optimizer.zero_grad()
        loss = model(*_windows(text, places))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if not loss.isfinite():
        raise SystemExit(f"error: the loss of {name} became {loss.item()}; choose a smaller --learning-rate")


def _windows(text: Tensor, places: torch.Generator) -> tuple[Tensor, Tensor]:  # (n,) -> (B, T), (B, T)
    start = torch.randint(0, text.numel() - WINDOW, (BATCH, 1), generator=places)
    index = start + torch.arange(WINDOW)
    return text[index], text[index + 1]


def step_of(model: LanguageModel, text: Tensor) -> Callable[[], None]:
    """One step of training, for measuring its time."""
    optimizer, places = make_optimizer(list(model.parameters()), 1e-4), torch.Generator()
    return lambda: train(model, optimizer, text, 1, 1e-4, places, "")


@torch.no_grad()
def perplexity(model: LanguageModel, text: Tensor) -> float:  # (n,)
    model.eval()
    total = sum(model(words, target).double() * target.numel() for words, target in _in_a_row(text))
    return math.exp(total / (text.numel() - 1))


def _in_a_row(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All words but the first as targets, in batches (B, T) and a shorter rest (1, t)."""
    inner = (text.numel() - 1) // WINDOW * WINDOW
    words, target = text[:inner].view(-1, WINDOW), text[1 : inner + 1].view(-1, WINDOW)
    yield from zip(words.split(BATCH), target.split(BATCH))
    if inner < text.numel() - 1:
        yield text[None, inner:-1], text[None, inner + 1 :]
