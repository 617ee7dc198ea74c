"""Tile sizes of the kernels: a table by architecture, precision and shape class, and tiles tuned on the user's GPU.

Nothing is tuned while a program runs. A kernel takes its tile from the user's cache for this GPU, which
`python -m fused_mos.tune` fills, or from the table.
"""

import dataclasses
import functools
import json
import re
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from ...runtime import files


@dataclass(frozen=True)
class Tile:
    """The tile of a program: rows (or tokens), classes, features per step of its product, warps and pipeline stages.

    resident: keep the operand that does not change between tiles in shared memory, with all D features and the loop
    over them unrolled. It is the latent rows in loops over the vocabulary, the embedding tile in loops over experts.

    described: load operands through descriptors, by the tensor memory accelerator (TMA) of an H100 or newer GPU. The
    family "gradient" also stores its results that way, from persistent programs, one per multiprocessor. Not for the
    family "sample".
    """

    rows: int
    classes: int
    features: int
    warps: int
    stages: int
    resident: bool = False
    described: bool = False


@dataclass(frozen=True)
class Architecture:
    multiprocessors: int
    shared_memory: int  # bytes available to one program
    tiles: dict[str, Tile]  # "family precision rows width" -> Tile
    has_tma: bool = False
    multiplies_parts: bool = False  # multiply float32 in 16-bit parts, at about fifteen times the rate


FAMILIES = ("statistics", "sample", "gradient", "mixture", "mixture-gradient")
"""What a program does. statistics, sample: keep a running result over a split of the vocabulary. gradient: write one
tile. mixture: sum the tiles of all experts, for rows that are tokens. mixture-gradient: the same, then compute each
expert's tile again."""

PRECISIONS = ("16-bit", "tf32", "ieee")
"""How operands are multiplied. "ieee" is torch's name for full float32, which takes three TF32 products."""
ROW_CLASSES = {"few": 16, "some": 64, "many": 2**31}
WIDTH_CLASSES = {"narrow": 320, "wide": 2**31}
"""Shape classes, by their largest number of rows or of features."""


def _table(changes: dict[str, Tile]) -> dict[str, Tile]:
    """The tile of every key: that of its longest prefix in the defaults and `changes`. `changes` win ties."""
    defaults = {
        "few 16-bit": Tile(16, 128, 64, 4, 4),
        "few tf32": Tile(16, 128, 32, 4, 3),
        "few ieee": Tile(16, 128, 32, 4, 2),
        "some 16-bit": Tile(64, 128, 64, 8, 3),
        "some tf32": Tile(64, 128, 32, 8, 3),
        "some ieee": Tile(64, 64, 16, 8, 2),
        "many 16-bit": Tile(128, 128, 64, 8, 3),
        "many tf32": Tile(128, 128, 32, 8, 3),
        "many ieee": Tile(64, 64, 16, 8, 2),
        "some 16-bit sample": Tile(64, 64, 64, 8, 3),
        "many 16-bit sample": Tile(64, 64, 64, 8, 3),
        "some tf32 sample": Tile(64, 64, 32, 8, 3),
        "many tf32 sample": Tile(64, 64, 32, 8, 3),
        "some tf32 mixture": Tile(64, 64, 32, 8, 3),
        "some ieee mixture": Tile(32, 64, 16, 8, 2),
        "some 16-bit mixture-gradient": Tile(64, 64, 64, 8, 3),
        "some ieee mixture-gradient": Tile(32, 64, 16, 8, 2),
        "many 16-bit mixture": Tile(64, 128, 64, 8, 3),
        "many tf32 mixture": Tile(64, 64, 32, 8, 3),
        "many ieee mixture": Tile(32, 32, 16, 4, 2),
        "many 16-bit mixture-gradient": Tile(64, 64, 64, 8, 3),
        "many ieee mixture-gradient": Tile(32, 64, 16, 8, 2),
    }
    rules = defaults | changes
    return {
        f"{rows} {precision} {family} {width}": max(
            ((rule, tile) for rule, tile in rules.items() if f"{rows} {precision} {family} {width}".startswith(rule)),
            key=lambda item: len(item[0]),
        )[1]
        for rows in ROW_CLASSES
        for precision in PRECISIONS
        for family in FAMILIES
        for width in WIDTH_CLASSES
    }


_RESIDENT = {
    "many 16-bit statistics narrow": Tile(128, 64, 64, 8, 2, True),
    "many 16-bit sample narrow": Tile(64, 64, 64, 8, 2, True),
    "many 16-bit mixture narrow": Tile(64, 64, 64, 8, 2, True),
    "many 16-bit mixture-gradient narrow": Tile(64, 64, 64, 8, 2, True),
}
_DESCRIBED = {  # the fastest of about fifteen tiles each, at the paper's shapes on an H200
    "many 16-bit statistics": Tile(128, 256, 64, 8, 3, described=True),
    "many 16-bit gradient": Tile(128, 256, 64, 8, 3, described=True),
    "many 16-bit sample": Tile(64, 128, 64, 8, 3),
    "many 16-bit mixture": Tile(128, 128, 64, 8, 4, described=True),
    "many 16-bit mixture-gradient": Tile(64, 128, 64, 8, 3, described=True),
}
_LARGE_IEEE = {  # these keep operands in shared memory, which leaves registers for larger tiles
    "some ieee": Tile(64, 128, 32, 8, 2),
    "many ieee": Tile(128, 128, 32, 8, 2),
    "some ieee sample": Tile(64, 64, 32, 8, 2),
    "many ieee sample": Tile(64, 64, 32, 8, 2),
    "some ieee mixture": Tile(64, 64, 32, 8, 2),
    "many ieee mixture": Tile(64, 64, 32, 8, 2),
    "some ieee mixture-gradient": Tile(64, 64, 32, 8, 2),
    "many ieee mixture-gradient": Tile(64, 64, 32, 8, 2),
}
_SMALL_MIXTURE = {"some 16-bit mixture": Tile(64, 64, 64, 8, 3), "many 16-bit mixture": Tile(64, 64, 64, 8, 3)}
_SHALLOW_MIXTURE = {
    "few tf32 mixture": Tile(16, 128, 32, 8, 3),
    "some 16-bit mixture": Tile(64, 64, 32, 8, 3),
    "some tf32 mixture": Tile(64, 32, 32, 8, 3),
    "many 16-bit mixture": Tile(64, 64, 32, 8, 3),
    "many tf32 mixture": Tile(64, 32, 32, 8, 3),
    "many tf32 mixture-gradient": Tile(64, 32, 32, 8, 3),
}
_SHALLOW_GRADIENT = {
    "many 16-bit gradient narrow": Tile(128, 128, 32, 8, 4),
    "many tf32 gradient narrow": Tile(128, 64, 32, 8, 3),
    "many ieee gradient wide": Tile(64, 64, 16, 4, 2),
}
_FLAT_MIXTURE = {"many ieee mixture": Tile(16, 32, 16, 4, 2)}
_SMALL_PREDICTION = {  # running maxima and their indices need registers besides the sums
    "few 16-bit mixture": Tile(16, 64, 64, 4, 4),
    "few tf32 mixture": Tile(16, 64, 32, 4, 3),
    "some ieee mixture wide": Tile(64, 32, 32, 8, 2),
}
ARCHITECTURES = {
    "sm_80": Architecture(108, 166_912, _table(_SMALL_MIXTURE | _RESIDENT | _SHALLOW_GRADIENT), multiplies_parts=True),
    "sm_86": Architecture(84, 101_376, _table(_SMALL_MIXTURE | _SHALLOW_GRADIENT | _FLAT_MIXTURE)),  # also sm_89
    "sm_90": Architecture(132, 232_448, _table(_DESCRIBED | _LARGE_IEEE), has_tma=True, multiplies_parts=True),
    "sm_100": Architecture(148, 232_448, _table(_LARGE_IEEE | _SMALL_PREDICTION), has_tma=True, multiplies_parts=True),
    "sm_120": Architecture(170, 101_376, _table(_SHALLOW_MIXTURE), has_tma=True),
}
INTERPRETER = Architecture(4, 2**30, {}, has_tma=True, multiplies_parts=True)
INTERPRETER_TILE = Tile(32, 2048, 128, 4, 1, True)
"""A large tile: the interpreter takes time per operation, not per element."""

LARGEST_ROUNDED = 62 * 2**20
"""Most bytes of an operand that is copied to round it to TF32."""

OLDEST = (8, 0)


def architecture_name(capability: tuple[int, int]) -> str:
    """The newest architecture in the table that is not newer than the GPU's compute capability."""
    known = {tuple(divmod(int(name.removeprefix("sm_")), 10)): name for name in ARCHITECTURES}
    return known[max(known_capability for known_capability in known if known_capability <= capability)]


def cache_file(gpu: str) -> Path:
    """The file in which `python -m fused_mos.tune` saves the tiles it found for a GPU."""
    import triton  # not at the top: the flags of `tune` need the tables even without triton

    return files.cache_folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-triton-{triton.__version__}.json"


def save_tuned(gpu: str, tiles: dict[str, Tile]) -> Path:
    path = cache_file(gpu)
    files.write_text(path, json.dumps({key: astuple(tile) for key, tile in tiles.items()}, indent=1) + "\n")
    return path


def load_tuned(gpu: str) -> dict[str, Tile]:
    """The tuned tiles of a GPU, if any. Raises ValueError if the file is not one that `tune` writes."""
    path = cache_file(gpu)
    if not path.exists():
        return {}
    try:
        tiles = {}
        for key, sizes in json.loads(path.read_text()).items():
            rows, classes, features, warps, stages = map(int, sizes[:5])
            tiles[key] = Tile(rows, classes, features, warps, stages, *map(bool, sizes[5:]))
        assert set(tiles) <= set(_table({}))
    except Exception as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error}); delete it, or run `python -m fused_mos.tune` again"
        ) from error
    return tiles


@functools.cache
def of_device(index: int) -> Architecture:
    """The architecture of a CUDA device. The user's tuned tiles replace those of the table."""
    properties = torch.cuda.get_device_properties(index)
    base = ARCHITECTURES[architecture_name((properties.major, properties.minor))]
    tiles = base.tiles | load_tuned(properties.name)
    return dataclasses.replace(base, multiprocessors=properties.multi_processor_count, tiles=tiles)


def precision(dtype: torch.dtype) -> str:
    """The precision of products of this dtype, one of PRECISIONS. float32 follows torch's setting for CUDA products.

    The setting is read by its new name, which also reflects `torch.set_float32_matmul_precision`. The old getter raises
    if TF32 was set by the new name.
    """
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_key(family: str, precision: str, n_rows: int, n_features: int) -> str:
    rows = next(name for name, largest in ROW_CLASSES.items() if n_rows <= largest)
    width = next(name for name, largest in WIDTH_CLASSES.items() if n_features <= largest)
    return f"{rows} {precision} {family} {width}"
