"""What `grad_filter_eps` at the dtype's rounding drops, saves and costs on a real model, before and after training:

    python benchmarks/gradient_filter.py RUN [--segments 10] [--out FILE.json]

RUN is a folder that `python -m fused_mos.train` left. Segments are of its training text, with dropout as in training.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from harness import seconds, step

from fused_mos import functional as F
from fused_mos.data import Corpus, batchify
from fused_mos.lm import AWDLSTM
from fused_mos.training.checkpoint import load_checkpoint, load_parameters


def _relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def measure(model: AWDLSTM, text: torch.Tensor, bptt: int, n_segments: int, dtype: torch.dtype) -> dict:
    """Medians over segments of the share of rows dropped, the speed-up of forward + backward, and the gradients' errors."""
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
            times[value] = seconds(lambda: step(lambda *x: F.mos_nll_loss(*x, grad_filter_eps=value), arguments))
            gradients[value] = (z.grad, w.grad)
        rows.append(
            {
                "share of rows dropped": (gradients[eps][0] == 0).all(-1).float().mean().item(),
                "times faster": times[0.0] / times[eps],
                "relative error of dz": _relative_error(gradients[0.0][0], gradients[eps][0]),
                "relative error of dE": _relative_error(gradients[0.0][1], gradients[eps][1]),
            }
        )
    return {"eps": eps} | {key: float(f"{statistics.median(row[key] for row in rows):.3g}") for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to write the table as JSON")
    options = parser.parse_args()
    config = json.loads((options.run / "config.json").read_text())
    corpus = Corpus(config["data"])
    text = batchify(corpus.train, config["optim"]["batch_size"])
    torch.manual_seed(0)
    model = AWDLSTM(len(corpus.vocabulary), **config["model"])
    table, best = {}, options.run / "best.safetensors"
    for when in ("fresh", "trained"):
        if when == "trained":
            load_parameters(model, load_checkpoint(best)[0], best)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{when} {str(dtype).removeprefix('torch.')}"
            table[name] = measure(model, text, config["optim"]["bptt"], options.segments, dtype)
            print(name, *(f"{key} {value:g}" for key, value in table[name].items()), sep="  ", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"recipe": config.get("recipe"), "torch": torch.__version__, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
