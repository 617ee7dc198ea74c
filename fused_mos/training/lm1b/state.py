"""The state of a run: what its checkpoints hold, in the form in which any number of ranks can save and read it."""

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
    """Makes the state of an optimizer that has not stepped yet, for a checkpoint to be written from or read into."""
    get_optimizer_state_dict(model, optimizer)  # takes a step without gradients, which counts
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


@dataclasses.dataclass
class Progress(meter.Progress):
    """Progress of a run, the same on all ranks; with the parameters, optimizer, hidden and random states this is all of
    its state."""

    position: Position = dataclasses.field(default_factory=Position)
    evaluated: int = setting(0, COUNT)  # step of the last evaluation
    interval_loss: float = setting(0.0, NUMBER)  # sum since the last line of metrics.jsonl


def saved_form(config: LM1BConfig) -> dict[str, Any]:
    """A run's configuration for a later command, wherever that is started."""
    return dataclasses.replace(config, data=config.data.absolute(), resume=None).to_json()


def identity(config: LM1BConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    """Tells a run from others, in what it saves."""
    shards = [file.sha256 for file in corpus.train]
    return {"config": saved_form(config), "vocabulary": corpus.digest, "shards": shards}


def check_identity(state: dict[str, Any], path: Path, config: LM1BConfig, corpus: PreparedCorpus) -> None:
    """Raises CheckpointError or ConfigError unless `state`, read from `path`, is that of this run."""
    now = identity(config, corpus)
    if missing := [key for key in now if key not in state]:
        raise CheckpointError(f"checkpoint {path} is of another version or kind: state.json has no {missing[0]!r}")
    if any(state[key] != now[key] for key in ("vocabulary", "shards")):
        raise CheckpointError(f"data: {config.data} is not the corpus that {path} was trained on")
    settings.check_same_run(LM1BConfig.from_json(state["config"]), config)


class RunTensors:
    """A run's state as named tensors, views of the run's own memory. What is cut over ranks comes as a DTensor: decoder
    rows (and what the optimizer keeps for them) over `vocab`, columns over `data`."""

    def __init__(self, model: AWDLSTM, optimizer: torch.optim.Optimizer, shard: VocabShard | None, ranks: Ranks):
        self.model, self.optimizer, self.shard, self.ranks = model, optimizer, shard, ranks

    def is_sharded(self, name: str) -> bool:
        """True for a parameter that is this rank's part of a larger one."""
        return self.shard is not None and name in ("encoder.weight", "head.decoder.bias")

    def parameters(self) -> dict[str, Tensor]:
        return {f"model.{name}": self._as_saved(name, p) for name, p in self.model.named_parameters()}

    def own_parameters(self) -> dict[str, Tensor]:
        """Those of this rank, by name: of a parameter that is cut over ranks, its part."""
        return {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}

    def own_optimizer_state(self) -> dict[str, Tensor]:
        """What this rank's optimizer keeps for `own_parameters`."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return {
            f"optimizer.{names[p]}.{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if value is not None
        }

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters' gradients after a backward pass: of this rank's parts of larger ones, and of whole ones."""
        named = list(self.model.named_parameters())
        sharded = gradients(p for name, p in named if self.is_sharded(name))
        return sharded, gradients(p for name, p in named if not self.is_sharded(name))

    def training(self) -> dict[str, Tensor]:
        """Parameters and the optimizer's state."""
        state = self.own_optimizer_state()
        return self.parameters() | {name: self._as_saved(_parameter_of(name), value) for name, value in state.items()}

    def hidden(self, parts: list[Hidden]) -> dict[str, Tensor]:
        """(columns of all ranks, width) of each layer. A copy: `parts_of` is the way back."""
        tensors: dict[str, Tensor] = {}
        for layer in range(len(parts[0])):
            for i, name in enumerate("hc"):
                own = torch.cat([part[layer][i][0] for part in parts])
                tensors[f"hidden.{layer}.{name}"] = self._columns(own)
        return tensors

    @staticmethod
    def parts_of(tensors: dict[str, Tensor], size: int) -> list[Hidden]:
        """The hidden states of this rank's columns, in parts of `size` columns."""
        layers = sum(name.startswith("hidden.") for name in tensors) // 2
        split = [[_own(tensors[f"hidden.{layer}.{name}"]).split(size) for name in "hc"] for layer in range(layers)]
        return [[(h[i][None].contiguous(), c[i][None].contiguous()) for h, c in split] for i in range(len(split[0][0]))]

    def random(self) -> dict[str, Tensor]:
        """The random states of the CPU and, if it trains on one, of the GPU."""
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
        """A parameter, or what the optimizer keeps for it."""
        if self.shard is not None and self.is_sharded(name) and tensor.dim():
            return self.shard.as_dtensor(tensor, self.ranks.mesh["vocab"])
        tensor = tensor.detach()
        return tensor.view(1) if tensor.dim() == 0 else tensor  # slices of safetensors have at least one dimension


def _parameter_of(name: str) -> str:
    """The parameter that optimizer.PARAMETER.KEY is kept for."""
    return name.removeprefix("optimizer.").rpartition(".")[0]


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut over ranks."""
    return cast(DTensor, tensor).to_local()
