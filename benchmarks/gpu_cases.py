"""The cases of benchmarks.gpu, the most valuable first."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fused_mos._backends.triton_kernels.configurations import FAMILIES

from .gpu_device import DRY_RUN

OURS = "fused_mos"
STEP = "step mean"
SHAPES: dict[str, tuple[int, int, int, int]] = {  # N, K, D, V
    "ptb": (840, 15, 280, 10_000),
    "wikitext2": (1_050, 15, 300, 33_278),
    "lm1b": (1_280, 7, 512, 100_000),
    "gpt2": (2_048, 8, 768, 50_257),
    "llama": (4_096, 1, 4_096, 128_256),
    "short": (14, 15, 280, 10_000),
}
"""Shapes of training steps: the paper's, larger models, a single softmax of a language model, and a short segment."""
DECODE_SHAPES: dict[str, tuple[int, int, int, int]] = {
    f"{name}, {n} tokens": (n, *rest)
    for name, rest in {
        "wikitext2": (15, 300, 33_278),
        "lm1b": (7, 1_024, 100_000),
        "lm1b-all-words": (7, 1_024, 793_471),
    }.items()
    for n in (1, 8)
}
if DRY_RUN:
    SHAPES = {"ptb": (6, 3, 24, 300), "llama": (18, 1, 24, 300)}
    DECODE_SHAPES = {"tiny": (2, 3, 24, 300)}

OPERATIONS = (STEP, "step none", "forward", "log_prob", "log_prob step", "predict", "sample", "topk")
MIXTURE_PEERS = (
    "published code",
    "log-sum-exp",
    "log-sum-exp, compiled",
    "five lines, Liger",
    "five lines, cut-cross-entropy",
    "five lines, F.linear_cross_entropy",
    "five lines, F.linear_cross_entropy, chunked",
)
SINGLE_PEERS = (
    "F.linear + F.cross_entropy",
    "F.linear + F.cross_entropy, compiled",
    "Liger",
    "Liger, per row",
    "quack",
    "cut-cross-entropy",
    "F.linear_cross_entropy",
    "F.linear_cross_entropy, chunked",
)
CAPTURED = {
    "graph": {
        "published code",
        "log-sum-exp",
        "log-sum-exp, compiled",
        "five lines, Liger",
        "F.linear + F.cross_entropy",
        "F.linear + F.cross_entropy, compiled",
        "Liger, per row",
        "quack",
    },
    "reduce-overhead": {"log-sum-exp", "F.linear + F.cross_entropy"},
}
"""Contenders, besides ours, whose mean step is also replayed from a CUDA graph or compiled with
torch.compile(mode=...)."""
SHAPES_OF = {"float32": ("ptb", "wikitext2", "short"), "tf32": ("ptb",), "float16": ("ptb",)}
"""Shapes to measure a dtype at; dtypes not listed are measured at all shapes."""
TRAININGS = (
    ("ptb", "float32"),
    ("ptb", "bfloat16"),
    ("wikitext2", "float32"),
    ("lm1b-mos", "float32"),
    ("wikitext2", "bfloat16"),
    ("lm1b-mos", "bfloat16"),
    ("lm1b-softmax", "bfloat16"),
    ("lm1b-full", "bfloat16"),
    ("ptb", "tf32"),
    ("wikitext2", "tf32"),
)
"""Recipes and precisions of training steps."""
if DRY_RUN:
    TRAININGS = (("demo", "float32"), ("lm1b-tiny", "float32"))
    CAPTURED = {"graph": {"published code"}}
SWEPT = (
    (("ptb", "bfloat16"), ("llama", "bfloat16"))
    if DRY_RUN
    else (
        ("ptb", "bfloat16"),
        ("wikitext2", "bfloat16"),
        ("lm1b", "bfloat16"),
        ("short", "bfloat16"),
        ("llama", "bfloat16"),
        ("ptb", "float32"),
        ("ptb", "tf32"),
    )
)
CHECKS = ("tests", "memcheck", "racecheck", "synccheck")
STEPS = ("head", "training", "decode", "filter", "checks")
"""Default of --steps."""
SECONDS = {"head": 180, "training": 240, "decode": 120, "filter": 240, "checks": 520, "sweep": 520}
"""Time limit of a case, by step."""


class Case(NamedTuple):
    step: str
    parts: tuple[str, ...]

    @property
    def key(self) -> str:
        return " | ".join((self.step, *self.parts))


def _head(
    shape: str, dtype: str, operations: Iterable[str], contenders: Iterable[str], mode: str = "eager"
) -> list[Case]:
    return [
        Case("head", (shape, dtype, operation, contender, mode)) for contender in contenders for operation in operations
    ]


def peers(shape: str) -> tuple[str, ...]:
    """Names, in peers.py, of the contenders at a shape."""
    return SINGLE_PEERS if SHAPES[shape][1] == 1 else MIXTURE_PEERS


def _heads(dtypes: Iterable[str]) -> Iterator[Case]:
    """Ours at all shapes, then for each shape ours captured, the peers, and the peers captured. Going shape by shape
    compiles everything once."""
    for dtype in dtypes:
        shapes = [name for name in SHAPES if name in SHAPES_OF.get(dtype, SHAPES)]
        for shape in shapes:
            yield from _head(shape, dtype, OPERATIONS, [OURS])
        for shape in shapes:
            for mode in CAPTURED:
                yield from _head(shape, dtype, [STEP], [OURS], mode)
            yield from _head(shape, dtype, [STEP], peers(shape))
            for mode, contenders in CAPTURED.items():
                yield from _head(shape, dtype, [STEP], [name for name in peers(shape) if name in contenders], mode)


def cases(
    steps: Iterable[str] = STEPS,
    shapes: Iterable[str] = tuple(SHAPES),
    dtypes: Iterable[str] = ("bfloat16", "float32", "tf32"),
) -> list[Case]:
    """All cases of the given steps, shapes and dtypes: first Penn Treebank's head and the first training steps, then
    other shapes, then the rest."""
    shapes, dtypes = set(shapes), list(dtypes)
    heads = [case for case in _heads(dtypes) if case.parts[0] in shapes]
    trainings = [Case("training", parts) for parts in TRAININGS]
    swept = [parts for parts in SWEPT if parts[0] in shapes and parts[1] in dtypes]
    first = [
        case
        for case in heads
        if case.parts[0] == "ptb" and case.parts[1] in ("bfloat16", "float32") and case.parts[3:] == (OURS, "eager")
    ]
    ordered = [
        *first,
        *trainings[:4],
        *(case for case in heads if case not in first),
        *trainings[4:],
        *(Case("decode", (name,)) for name in DECODE_SHAPES),
        Case("filter", ("trained model",)),
        *(Case("checks", (name,)) for name in CHECKS),
        *(Case("sweep", (*parts, family)) for parts in swept for family in FAMILIES),
    ]
    return [case for case in ordered if case.step in set(steps)]
