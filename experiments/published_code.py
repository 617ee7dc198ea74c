"""The paper's published code under today's torch, from a folder that holds a checkout of it:

    git clone https://github.com/zihangdai/mos CODE
    python -m experiments.published_code CODE [flags of its main.py]

Runs its main.py, unchanged but for one repair that `load` makes. `PublishedTraining` takes single training steps with
its model. Nothing of it is copied here.
"""

import gc
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_mos.data import segment
from fused_mos.training import TrainConfig


def options(config: TrainConfig) -> dict[str, Any]:
    """Return the flags of the published main.py for the same model and optimizer as `config`."""
    model, optim = config.model, config.optim
    return {
        "emsize": model.embedding_size,
        "nhid": model.hidden_sizes[0],
        "nhidlast": model.hidden_sizes[-1],
        "nlayers": len(model.hidden_sizes),
        "n_experts": model.n_experts,
        "dropout": model.dropout,
        "dropouth": model.dropouth,
        "dropouti": model.dropouti,
        "dropoute": model.dropoute,
        "dropoutl": model.dropoutl,
        "wdrop": model.wdrop,
        "lr": optim.lr,
        "clip": optim.clip,
        "batch_size": optim.batch_size,
        "bptt": optim.bptt,
        "small_batch_size": optim.batch_size // optim.micro_batches,
        "max_seq_len_delta": optim.bptt_delta,
        "alpha": optim.alpha,
        "beta": optim.beta,
        "wdecay": optim.weight_decay,
        "nonmono": optim.nonmono,
    }


def load(code: Path) -> type[nn.Module]:
    """Return the model's class, RNNModel, from the folder `code`, repaired so that it can train after an evaluation.

    In evaluation, F.dropout now returns the recurrent weight itself, which is a Parameter. WeightDrop sets it as an
    attribute and thereby registers it. The next training step sets the dropped weight, a plain tensor, and torch
    refuses to put that in a Parameter's place. The repair removes the registered weight before each forward pass.

    Raises FileNotFoundError if `code` does not hold the published code.
    """
    code = code.resolve()
    if not (code / "weight_drop.py").is_file():
        raise FileNotFoundError(f"code must be a checkout of the published code, with its weight_drop.py, got {code}")
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    kind = importlib.import_module("weight_drop").WeightDrop
    set_weights = kind._setweights

    def set_weights_anew(self: Any) -> None:
        for name in self.weights:
            self.module._parameters.pop(name, None)
        set_weights(self)

    if set_weights.__module__ == "weight_drop":  # not repaired yet
        kind._setweights = set_weights_anew
    return importlib.import_module("model").RNNModel


class PublishedTraining:
    """Training steps of the published model, as its main.py takes them.

    Args:
        code: folder of the published code.
        n_words: V, size of the vocabulary.
        config: sizes, dropouts and optimizer.
        exact: leave out the 1e-8 that the published loss adds to each probability.
    """

    def __init__(self, code: Path, n_words: int, config: TrainConfig, device: torch.device, exact: bool = False):
        o = options(config)
        names = ("emsize", "nhid", "nhidlast", "nlayers", "dropout", "dropouth", "dropouti", "dropoute", "wdrop")
        make = load(code)
        self.model = make("LSTM", n_words, *(o[name] for name in names), True, o["dropoutl"], o["n_experts"]).to(device)
        self.optim, self.exact, self.columns = config.optim, exact, o["small_batch_size"]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.optim.lr, weight_decay=self.optim.weight_decay
        )
        self.start_epoch()
        self.total = torch.zeros((), device=device)

    def start_epoch(self) -> None:
        """Set the hidden states to zeros."""
        self.hidden = [self.model.init_hidden(self.columns) for _ in range(self.optim.micro_batches)]

    def start_averaging(self) -> None:
        optim = self.optim
        self.optimizer = torch.optim.ASGD(
            self.model.parameters(), lr=optim.lr, t0=0, lambd=0.0, weight_decay=optim.weight_decay
        )

    def step(self, source: Tensor, row: int, length: int) -> None:
        """Train on `length` rows of source (T, B), from `row` on."""
        inputs, targets = segment(source, row, length)
        optim, share = self.optim, self.columns / self.optim.batch_size
        self.model.train()
        self.optimizer.zero_grad()
        for i in range(optim.micro_batches):
            part = slice(i * self.columns, (i + 1) * self.columns)
            self.hidden[i] = [(h.detach(), c.detach()) for h, c in self.hidden[i]]
            found, self.hidden[i], raw, dropped = self.model(
                inputs[:, part], self.hidden[i], return_h=True, return_prob=self.exact
            )
            log_prob = found.log() if self.exact else found
            nll = nn.functional.nll_loss(log_prob.flatten(0, 1), targets[:, part].flatten())
            loss = nll + optim.alpha * dropped[-1].pow(2).mean()
            loss = loss + optim.beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
            self.total += nll.detach() * share
            (loss * share).backward()
            gc.collect()
        nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        self.optimizer.param_groups[0]["lr"] = optim.lr * length / optim.bptt
        self.optimizer.step()


def main() -> None:
    code, *flags = sys.argv[1:]
    load(Path(code))
    os.chdir(code)  # main.py copies its own sources from there
    sys.argv = ["main.py", *flags]
    runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    main()
