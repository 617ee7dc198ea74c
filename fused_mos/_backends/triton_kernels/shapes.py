"""The shapes and products that are proven and tuned.

Imports no triton: these are also the choices of a command's flags.
"""

import torch

SHAPES = {  # N, K, D, V
    "ptb": (840, 15, 280, 10_000),
    "wikitext2": (1_050, 15, 300, 33_278),
    "lm1b": (2_560, 7, 1_024, 100_000),
    "lm1b-all-words": (2_560, 7, 1_024, 793_471),
    "softmax": (12_600, 1, 280, 10_000),
    "some-rows": (48, 1, 280, 10_000),
    "some-wide-rows": (48, 1, 1_024, 100_000),
    "few-rows": (8, 1, 280, 10_000),
    "few-wide-rows": (8, 1, 1_024, 100_000),
}
"""The shapes whose calls are proven: those of the paper and of the benchmarks, and short inputs, as in generation."""

ODD_SHAPES = {f"odd-{v % 16}": (840, 3, 281, v) for v in (10_000, 10_002, 10_008, 10_014)}
"""Shapes whose rows are no multiple of anything; named by what the vocabulary is modulo 16."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
"""By the name of the products that are made."""
