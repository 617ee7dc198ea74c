"""Measure how many rows `grad_filter_eps` drops, and its speedup and error, on a model before and after training:

    python -m experiments.gradient_filter RUN [--segments 10] [--device cuda] [--data FOLDER] [--out FILE.json]

RUN is the folder of a `python -m fused_mos.train` run. The threshold is the rounding error of the dtype. The tokens are
segments of the run's training text, with dropout as in training.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks.harness import seconds, step
from fused_mos import functional as F
from fused_mos.data import Corpus, batchify
from fused_mos.lm import AWDLSTM
from fused_mos.runtime.files import write_json
from fused_mos.training.checkpoint import load_checkpoint, load_parameters


def _relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def measure(model: AWDLSTM, text: torch.Tensor, bptt: int, n_segments: int, dtype: torch.dtype) -> dict:
    """Returns medians over segments: share of rows dropped, speedup of forward + backward, and relative errors of the
    gradients."""
    eps, hidden, rows = torch.finfo(dtype).eps, None, []
    for i in range(n_segments):
        inputs, target = text[i * bptt : (i + 1) * bptt], text[i * bptt + 1 : (i + 1) * bptt + 1]
        with torch.no_grad():
            _, features, hidden = model.features(inputs, hidden)
            latent, prior_logits = (x.flatten(0, 1) for x in model.head.mixture(features))
        tensors = (latent, prior_logits, model.head.decoder.weight, model.head.decoder.bias)
        z, a, w, b = (x.detach().to(dtype, copy=True).requires_grad_() for x in tensors)
        arguments, gradients, times = [z, a, w, target.flatten(), b], {}, {}
        for value in (0.0, eps, 0.0, eps):  # the first of each warms up
            times[value] = seconds(
                lambda: step(lambda *x: F.mos_nll_loss(*x, grad_filter_eps=value), arguments), text.is_cuda
            )
            gradients[value] = (z.grad, w.grad)
        rows.append(
            {
                "share of rows dropped": (gradients[eps][0] == 0).all(-1).float().mean().item(),
                "seconds, exact": times[0.0],
                "seconds, filtered": times[eps],
                "times faster": times[0.0] / times[eps],
                "relative error of dz": _relative_error(gradients[0.0][0], gradients[eps][0]),
                "relative error of dE": _relative_error(gradients[0.0][1], gradients[eps][1]),
            }
        )
    return {"eps": eps} | {key: float(f"{statistics.median(row[key] for row in rows):.3g}") for key in rows[0]}


def measure_run(run: Path, data: Path | None, n_segments: int, device: str, dtypes: dict[str, torch.dtype]) -> dict:
    """Returns the head's shape (N, K, D, V), and the results of `measure` for the fresh and the trained model in each
    dtype."""
    config = json.loads((run / "config.json").read_text())
    corpus = Corpus(data or config["data"])
    text = batchify(corpus.train, config["optim"]["batch_size"]).to(device)
    torch.manual_seed(0)
    model = AWDLSTM(len(corpus.vocabulary), **config["model"]).to(device)
    bptt, table, best = config["optim"]["bptt"], {}, run / "best.safetensors"
    for when in ("fresh", "trained"):
        if when == "trained":
            load_parameters(model, load_checkpoint(best)[0], best)
        for name, dtype in dtypes.items():
            row = table[f"{when} {name}"] = measure(model, text, bptt, n_segments, dtype)
            print(f"{when} {name}", *(f"{key} {value:g}" for key, value in row.items()), sep="  ", flush=True)
    v, d = model.head.decoder.weight.shape
    return {
        "recipe": config.get("recipe"),
        "shape": (bptt * text.shape[1], config["model"]["n_experts"], d, v),
        "rows": table,
    }


@dataclasses.dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a fused_mos.train run."""
    segments: int = 10
    """Number of segments of the training text to measure."""
    device: str = "cpu"
    """cpu or cuda."""
    data: Path | None = None
    """Folder of the corpus; by default the one that the run was trained on."""
    out: Path | None = None
    """JSON file for the results; by default they are only printed."""


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.gradient_filter", description=__doc__)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    result = measure_run(config.run, config.data, config.segments, config.device, dtypes)
    if config.out:
        write_json(config.out, result | {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
