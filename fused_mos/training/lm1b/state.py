"""The state of a run in its checkpoints, in a form that any number of ranks can save and load."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Shard

from ...data.token_stream import Position, PreparedCorpus
from ...lm import AWDLSTM
from ...lm.awd_lstm import Hidden, gradients
from ...vocab_parallel import VocabShard
from .. import meter, settings
from ..errors import CheckpointError
from ..settings import COUNT, NUMBER, setting
from .config import LM1BConfig
from .ranks import Ranks


def initialize(model: AWDLSTM, optimizer: torch.optim.Optimizer) -> None:
    """Creates the state of an optimizer that has not stepped yet, so that checkpoints can save it and load into it."""
    get_optimizer_state_dict(model, optimizer)  # takes a step without gradients, whose count is reset below
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


@dataclasses.dataclass
class Progress(meter.Progress):
    """Progress of a run, the same on all ranks. The rest of its state: parameters, optimizer, hidden states and random
    generators."""

    position: Position = dataclasses.field(default_factory=Position)
    evaluated: int = setting(0, COUNT)  # step of the last evaluation
    interval_loss: float = setting(0.0, NUMBER)  # sum since the last line of metrics.jsonl


def saved_form(config: LM1BConfig) -> dict[str, Any]:
    """Returns a run's configuration as JSON, with absolute paths so that later commands may start in any folder."""
    return dataclasses.replace(config, data=config.data.absolute(), resume=None).to_json()


def identity(config: LM1BConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    """Returns the part of a checkpoint that identifies its run."""
    shards = [file.sha256 for file in corpus.train]
    return {"config": saved_form(config), "vocabulary": corpus.digest, "shards": shards}


def check_identity(state: dict[str, Any], path: Path, config: LM1BConfig, corpus: PreparedCorpus) -> None:
    """Raises CheckpointError or ConfigError unless the `state` in `path` is that of this run."""
    now = identity(config, corpus)
    if missing := [key for key in now if key not in state]:
        raise CheckpointError(f"checkpoint {path} is of another version or kind: state.json has no {missing[0]!r}")
    if any(state[key] != now[key] for key in ("vocabulary", "shards")):
        raise CheckpointError(f"data: {config.data} is not the corpus that {path} was trained on")
    settings.check_same_run(LM1BConfig.from_json(state["config"]), config)


class RunTensors:
    """A run's state as named tensors, which are views of the run's memory.

    Sharded tensors are DTensors: rows of the decoder, with their optimizer state, over `vocab`; columns over `data`.
    """

    def __init__(self, model: AWDLSTM, optimizer: torch.optim.Optimizer, shard: VocabShard | None, ranks: Ranks):
        self.model, self.optimizer, self.shard, self.ranks = model, optimizer, shard, ranks

    def is_sharded(self, name: str) -> bool:
        """True for a parameter of which this rank holds a shard."""
        return self.shard is not None and name in ("encoder.weight", "head.decoder.bias")

    def parameters(self) -> dict[str, Tensor]:
        return {f"model.{name}": self._as_saved(name, p) for name, p in self.model.named_parameters()}

    def own_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by name; of a sharded parameter, its shard."""
        return {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}

    def own_optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state for `own_parameters`."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return {
            f"optimizer.{names[p]}.{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if value is not None
        }

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the gradients after a backward pass: those of this rank's shards, and those of whole parameters."""
        named = list(self.model.named_parameters())
        sharded = gradients(p for name, p in named if self.is_sharded(name))
        return sharded, gradients(p for name, p in named if not self.is_sharded(name))

    def training(self) -> dict[str, Tensor]:
        """The parameters and the optimizer's state."""
        state = self.own_optimizer_state()
        return self.parameters() | {name: self._as_saved(_parameter_of(name), value) for name, value in state.items()}

    def hidden(self, parts: list[Hidden]) -> dict[str, Tensor]:
        """Returns a copy of the hidden states, (columns of all ranks, width) for each layer. `parts_of` is the
        inverse."""
        tensors: dict[str, Tensor] = {}
        for layer in range(len(parts[0])):
            for i, name in enumerate("hc"):
                own = torch.cat([part[layer][i][0] for part in parts])
                tensors[f"hidden.{layer}.{name}"] = self._columns(own)
        return tensors

    @staticmethod
    def parts_of(tensors: dict[str, Tensor], size: int) -> list[Hidden]:
        """Returns the hidden states of this rank's columns, split into micro-batches of `size` columns."""
        layers = sum(name.startswith("hidden.") for name in tensors) // 2
        split = [[_own(tensors[f"hidden.{layer}.{name}"]).split(size) for name in "hc"] for layer in range(layers)]
        return [[(h[i][None].contiguous(), c[i][None].contiguous()) for h, c in split] for i in range(len(split[0][0]))]

    def random(self) -> dict[str, Tensor]:
        """The state of the CPU's random generator and, if the run uses one, of the GPU's."""
        device = self.ranks.device
        states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
        return {"random": self._columns(torch.cat(states)[None].to(device))}

    def set_random(self, tensors: dict[str, Tensor]) -> None:
        state, of_cpu = _own(tensors["random"])[0].cpu(), torch.get_rng_state().numel()
        torch.set_rng_state(state[:of_cpu])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state[of_cpu:], self.ranks.device)

    def _columns(self, own: Tensor) -> DTensor:
        return DTensor.from_local(own, self.ranks.mesh["data"], [Shard(0)], run_check=False)

    def _as_saved(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a parameter, or its optimizer state, as a checkpoint saves it."""
        if self.shard is not None and self.is_sharded(name) and tensor.dim():
            return self.shard.as_dtensor(tensor, self.ranks.mesh["vocab"])
        tensor = tensor.detach()
        return tensor.view(1) if tensor.dim() == 0 else tensor  # safetensors slices need at least one dimension


def _parameter_of(name: str) -> str:
    """Returns the PARAMETER in optimizer.PARAMETER.KEY."""
    return name.removeprefix("optimizer.").rpartition(".")[0]


def _own(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor."""
    return cast(DTensor, tensor).to_local()
