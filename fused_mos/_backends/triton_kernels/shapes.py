"""The shapes and products to prove and tune.

This module does not import triton, since the flags of a command take their choices from it.
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
"""Shapes of the paper and the benchmarks, and short inputs as in generation."""

ODD_SHAPES = {f"odd-{v % 16}": (840, 3, 281, v) for v in (10_000, 10_002, 10_008, 10_014)}
"""Shapes that are multiples of no power of 2, named by their vocabulary modulo 16."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
"""Dtype of the operands, by the name of the products."""
