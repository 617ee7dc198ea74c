"""Train a small GPT with a Mixture of Softmaxes in plain PyTorch, save it, reload it and generate text:

    python -m examples.transformer [--data TEXT_OR_FOLDER] [--steps 1000]

Without --data it trains on Python's own documentation, which takes a minute and a half on two cores.
"""

import json
from dataclasses import asdict, dataclass
from math import cos, exp, pi
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import fused_mos
from fused_mos.data import Vocabulary, sample
from fused_mos.runtime import files


@dataclass
class Config:
    data: Path | None = None
    """Text file, or folder with train.txt and valid.txt; by default Python's own documentation."""
    out: Path = Path("runs/transformer.safetensors")
    """File for the trained model."""
    steps: int = 1000
    """Training steps with AdamW."""
    batch: int = 16
    """Sequences per step (B)."""
    lr: float = 2e-3
    """Peak learning rate. Warm-up takes a tenth of the steps; a cosine then decays it to a tenth."""
    context: int = 64
    """Context length in words (T)."""
    channels: int = 128
    """Width of the model (C), a multiple of 32; an attention head has 32 channels."""
    experts: int = 4
    """Number of experts in the head."""


def read(data: Path) -> tuple[Vocabulary, Tensor, Tensor]:
    """Returns the training text's vocabulary, and both texts as word indices. A file's last tenth is for validation."""
    paths = [data / "train.txt", data / "valid.txt"] if data.is_dir() else [data]
    texts = [files.read_text(path).replace("\n", " <eos> ").split() for path in paths]
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        texts = [texts[0][:cut], texts[0][cut:]]
    vocabulary = Vocabulary(dict.fromkeys(["<eos>", "<unk>", *texts[0]]))  # of words 0, 1, …
    return vocabulary, *(torch.tensor([vocabulary.index.get(word, 1) for word in text]) for text in texts)


class Block(nn.Module):  # pre-norm attention and feed-forward network
    def __init__(self, c: int):
        super().__init__()
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(c), nn.LayerNorm(c), nn.Dropout(0.1)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.feed_forward = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """`model(words)` returns hidden states; `model.head` turns them into losses, probabilities or samples."""

    def __init__(self, n_words: int, config: Config):
        super().__init__()
        c, self.context = config.channels, config.context
        self.words, self.positions = nn.Embedding(n_words, c), nn.Embedding(config.context, c)
        for embedding in (self.words, self.positions):  # nn.Embedding's N(0, 1) is far too large for a tied decoder
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(4)), nn.LayerNorm(c))
        self.head = fused_mos.MoS(c, n_words, config.experts, weight=self.words.weight, latent="residual", rank=c // 4)

    def forward(self, words: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        return self.blocks(self.words(words) + self.positions.weight[: words.shape[1]])


def train(model: GPT, text: Tensor, config: Config) -> None:
    model.head.init_bias(torch.bincount(text, minlength=model.head.n_classes))
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=config.lr, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda i: min(10 * (i + 1) / config.steps, 0.55 + 0.45 * cos(pi * i / config.steps)))
    for _ in (bar := tqdm(range(config.steps), desc="train", unit="step", mininterval=0.5)):
        starts = torch.randint(len(text) - config.context, (config.batch, 1))
        batch = text[starts + torch.arange(config.context + 1)]  # (B, T + 1)
        loss = model.head(model(batch[:, :-1]), batch[:, 1:]).loss  # never forms the (B, T, V) logits
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


@torch.no_grad()
def perplexity(model: GPT, text: Tensor) -> float:
    """Perplexity over all words but the first, in pieces of the context length."""
    pieces = zip(text[:-1].split(model.context), text[1:].split(model.context))
    nll = sum(model.head(model(words[None]), targets[None], reduction="sum").loss.item() for words, targets in pieces)
    return exp(nll / (len(text) - 1))


def load(path: Path) -> tuple[GPT, Vocabulary]:
    """Loads the model that `main` saved, in evaluation mode."""
    with safe_open(path, "pt") as file:
        config, words = json.loads(file.metadata()["saved"])
    model = GPT(len(words), Config(**config))
    load_model(model, path)
    return model.eval(), Vocabulary(words)


@torch.no_grad()
def generate(model: GPT, words: list[int], count: int) -> list[int]:
    """Extends the words by `count` more, drawn by nucleus sampling with p = 0.9."""
    for _ in range(count):
        hidden = model(torch.tensor([words[-model.context :]]))
        words = [*words, model.head.sample(hidden[0, -1], top_p=0.9).item()]
    return words


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, prog="python -m examples.transformer", description=__doc__, args=arguments)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vocabulary, text, valid = read(config.data or sample.cached_corpus())
    assert len(text) > config.context and len(valid) > 1, f"{config.data} needs more than {config.context} words"
    model = GPT(len(vocabulary), config)
    print(f"{len(text):,} words, {len(vocabulary):,} distinct; perplexity {perplexity(model.eval(), valid):.1f}")
    train(model.train(), text, config)
    print(f"validation perplexity {perplexity(model.eval(), valid):.1f}")
    files.make_folder(config.out.parent)
    with files.replacing(config.out) as partial:  # leaves no partial file if the process is killed
        save_model(model, str(partial), {"saved": json.dumps([asdict(config), vocabulary.words], default=str)})
    model, vocabulary = load(config.out)
    print(" ".join(vocabulary.words[i] for i in generate(model, [0], 40)[1:]).replace(" <eos> ", "\n"))


if __name__ == "__main__":
    main()
