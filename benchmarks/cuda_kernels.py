"""List the resources of the compiled CUDA kernels and the plans of their launches. Needs no GPU:

    python -m benchmarks.cuda_kernels [--out FILE.json]

Shows registers, stack and spilled bytes per thread for each architecture, then blocks, shared memory per block and
workspace for the paper's decoders. The exit status is 1 if a kernel spills.
"""

import dataclasses
import json
import re
import sys
from datetime import date
from pathlib import Path

import tyro

from fused_mos import _cuda
from fused_mos._backends.resources import kernel_resources
from fused_mos._backends.triton_kernels.configurations import ARCHITECTURES
from fused_mos._backends.triton_kernels.proof import SHAPES
from fused_mos.runtime.files import write_json


@dataclasses.dataclass
class Config:
    out: Path = Path(__file__).parent / "results" / "cuda-kernels.json"
    """JSON file of the results."""


def kernels(module: Path) -> list[dict[str, object]]:
    found = []
    for resources in kernel_resources(module):
        if match := re.search(r"decode_kernel.*?\d(B?Float16)ELi(\d+)E", resources.function):
            name = f"decode, {match[1].lower()}, {8 * int(match[2])} rows"
        else:
            direction, units = re.search(r"lstm_(forward|backward)_kernel(?:ILi(\d+)E)?", resources.function).groups()
            name = f"LSTM, {direction}, {units or 16} units"
        found.append(
            {"kernel": name}
            | {k: v for k, v in dataclasses.asdict(resources).items() if k not in ("function", "shared")}
        )
    return sorted(found, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["architecture"]))))


def plans() -> list[dict[str, object]]:
    """Launch plans of log_prob for 1, 4 and 8 tokens."""
    found = []
    for name in ("sm_80", "sm_90", "sm_100"):  # none fits GPUs with 99 KiB per block
        architecture = ARCHITECTURES[name]
        for shape in ("ptb", "wikitext2", "lm1b", "lm1b-all-words"):
            _, k, d, v = SHAPES[shape]
            for n in (1, 4, 8):
                row = {"architecture": name, "shape": shape, "tokens": n}
                try:
                    plan = _cuda.Decode(
                        _cuda.DecodeMode.LogProb,
                        True,
                        n,
                        k,
                        d,
                        v,
                        0,
                        0,
                        0,
                        architecture.multiprocessors,
                        architecture.shared_memory,
                        0,
                    )
                except ValueError as reason:
                    found.append(row | {"not planned": str(reason)})
                else:
                    fields = ("n_blocks", "shared_bytes", "logits_in_shared", "workspace_bytes")
                    found.append(row | {field: getattr(plan, field) for field in fields})
    return found


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.cuda_kernels", description=__doc__)
    runtime = _cuda.versions()[0]
    result = {
        "nvcc": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "date": date.today().isoformat(),
        "kernels": kernels(Path(_cuda.__file__)),
        "plans": plans(),
    }
    write_json(config.out, result)
    for row in result["kernels"] + result["plans"]:
        print(json.dumps(row))
    return int(any(row["stack"] or row["local"] for row in result["kernels"]))


if __name__ == "__main__":
    sys.exit(main())
