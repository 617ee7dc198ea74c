"""Estimates the memory that each rank of a run will need on its device, before the run starts.

The estimate follows from the shapes. It is exact for parameters, gradients and optimizer, and within some tens of
percent for the tensors of a step.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ... import _backends
from ...lm import AWDLSTM
from ..device import memory_bytes
from ..errors import ConfigError
from .config import LM1BConfig
from .ranks import Ranks

OPTIMIZER_COPIES = {"sgd": 0, "adagrad": 1, "adam": 2}
"""Number of optimizer states per parameter."""

CPU_WORKSPACE, TILED_WORKSPACE = 208 << 20, 256 << 20
"""Workspace of the head's kernels in bytes; Triton's kernels choose theirs by the GPU."""

PROCESS = {"cuda": 1200 << 20, "cpu": 500 << 20}
"""Bytes of an idle process: libraries, and on a GPU the context and cuDNN's workspace."""


def table(config: LM1BConfig, n_words: int, n_data: int, device_type: str) -> dict[str, int]:
    """Returns the bytes of each kind of memory on one rank.

    Args:
        n_words: size of the vocabulary.
        n_data: number of data-parallel ranks.
    """
    model, item = config.model, 4
    d, k = model.embedding_size, model.n_experts
    with torch.device("meta"):
        whole = AWDLSTM(n_words, **dataclasses.asdict(model))
    n_parameters = sum(p.numel() for p in whole.parameters())
    whole_bytes = n_parameters * item
    rows = -(-n_words // config.vocab_parallel)
    n_parameters -= (n_words - rows) * (d + 1)
    widths = whole.widths
    tokens = config.bptt * (config.batch_size // (n_data * config.micro_batches))
    in_head = min(tokens, config.head_chunk or tokens)
    half = 2 if config.precision == "bfloat16" else 0

    # each layer: input, gates, cell states and output, and in the backward pass the gradients of the gates
    lstm = sum(tokens * (size + 10 * width) for size, width in zip([d, *widths[:-1]], widths)) * item
    vectors_of_token = {"mos": k * d, "moc": (k + 1) * d, "softmax": 0}[model.head]
    inner_of_token = k * (model.rank or 0)  # between the two factors of a low-rank map
    vectors = in_head * vectors_of_token
    # vectors before and after tanh, and their gradient; latent_norm adds its input and two terms of its backward pass;
    # bfloat16 adds copies of two
    of_vectors = vectors * ((6 if model.latent_norm else 3) * item + 2 * half)
    head = of_vectors + (in_head * inner_of_token + tokens * widths[-1]) * 2 * item
    kept = {
        "parameters": n_parameters * item,
        "gradients": n_parameters * item,
        "optimizer": n_parameters * item * OPTIMIZER_COPIES[config.optimizer],
        "process": PROCESS[device_type],
    }
    step = {
        # gradients of decoder and embedding before they are added to .grad; chunks need one more sum
        "tied gradient's terms": rows * d * (item * (2 if in_head < tokens else 1) + item + 2 * half),
        "LSTM activations": lstm,
        "head activations": head,
    }
    # on a CPU the kernels' allocator keeps it
    (kept if device_type == "cpu" else step)["head workspace"] = _head_workspace(device_type)
    if config.vocab_parallel > 1:  # buffer of the gradient exchange, after the step's tensors are freed
        step["exchange, beyond"] = max((n_parameters - rows * (d + 1)) * item - sum(step.values()), 0)
    single = n_data * config.vocab_parallel == 1
    if device_type == "cuda" and single and config.cuda_graphs and not model.grad_filter_eps:
        # the last segment of a shard runs without a graph, and cannot use the graphs' memory pool
        step["a segment beside graphs"] = sum(step.values())
    # evaluation needs the last layer's output and the head's vectors before and after tanh, after the step's tensors
    # are freed
    evaluated = config.bptt * -(-config.eval_batch_size // n_data)  # tokens in a segment of held-out text
    evaluated_at_once = min(evaluated, config.head_chunk or evaluated)
    evaluation = (evaluated * widths[-1] + evaluated_at_once * (2 * vectors_of_token + inner_of_token)) * item
    if evaluation > sum(step.values()):
        step["evaluation, beyond"] = evaluation - sum(step.values())
    if device_type == "cpu":  # a run on a GPU initialises and saves tensors in host memory instead
        writing = 2 * (kept["parameters"] + kept["optimizer"]) - sum(step.values())
        making = whole_bytes - sum(kept.values()) - sum(step.values())
        step["a checkpoint, beyond"] = max(writing, making, 0)
    return kept | step


def _head_workspace(device_type: str) -> int:
    if device_type == "cpu":
        return CPU_WORKSPACE
    if _backends.why_absent("triton"):
        return TILED_WORKSPACE
    return _backends.kernels("triton").workspace_bytes(torch.device(device_type))


def available(config: LM1BConfig, ranks: Ranks) -> int:
    """Returns the bytes that a rank may use."""
    if config.memory_gib:
        return int(config.memory_gib * 2**30)
    return memory_bytes(ranks.device) // (1 if ranks.device.type == "cuda" else ranks.n_local)


def check(config: LM1BConfig, n_words: int, ranks: Ranks) -> str:
    """Returns the table as text. Raises ConfigError, suggesting the nearest setting that fits, if a rank needs more
    memory than it may use."""
    limit = ranks.least(available(config, ranks))
    needed = table(config, n_words, ranks.n_data, ranks.device.type)
    if sum(needed.values()) <= limit:
        return as_text(needed, limit)
    message = f"a rank needs {_size(sum(needed.values()))} but has {_size(limit)}:\n{as_text(needed, limit)}\n"
    for change in _smaller(config, ranks.n_data):
        smaller = dataclasses.replace(config, **change)
        n_data = ranks.n_ranks // smaller.vocab_parallel
        if n_data and sum(table(smaller, n_words, n_data, ranks.device.type).values()) <= limit:
            flags = " ".join(_flag(name, value) for name, value in change.items())
            raise ConfigError(message + f"it would fit with {flags}")
    raise ConfigError(
        message + "no smaller batch, other optimizer or vocab_parallel would make it fit; choose a smaller embedding "
        "or vocabulary"
    )


def _smaller(config: LM1BConfig, n_data: int) -> Iterator[dict[str, Any]]:
    """Yields changes of fields that save memory; first those that do not change the results."""
    yield {"cuda_graphs": False}
    if config.eval_batch_size > config.batch_size:
        yield {"eval_batch_size": config.batch_size}
    columns = config.batch_size // n_data
    splits = [n for n in range(config.micro_batches, columns + 1) if columns % n == 0]
    yield from ({"micro_batches": n} for n in splits)
    yield {"micro_batches": splits[-1], "head_chunk": config.bptt}
    ranks = n_data * config.vocab_parallel
    for n in range(config.vocab_parallel + 1, ranks + 1):
        if ranks % n == 0:
            yield {"vocab_parallel": n, "micro_batches": config.batch_size // (ranks // n)}
    cheaper = [name for name, copies in OPTIMIZER_COPIES.items() if copies < OPTIMIZER_COPIES[config.optimizer]]
    yield from ({"micro_batches": splits[-1], "optimizer": name} for name in reversed(cheaper))


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    return f"--no-{name}" if value is False else f"--{name} {value}"


def as_text(needed: dict[str, int], limit: int) -> str:
    lines = [f"  {name:<24}{_size(size):>13}" for name, size in needed.items()]
    return "\n".join([*lines, f"  {'total':<24}{_size(sum(needed.values())):>13} of {_size(limit)}"])


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"
