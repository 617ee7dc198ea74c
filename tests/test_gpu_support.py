"""Which GPUs the Triton backend is for, their tiles, and how it multiplies float32 there."""

import itertools

import pytest
import torch
from backends import configurations, triton

from fused_mos import _backends

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted


def test_gpus_that_are_too_old_are_named():
    assert configurations.OLDEST == (8, 0)
    assert triton.too_old("NVIDIA A100", (8, 0)) is None
    message = "it needs a GPU of compute capability 8.0 or newer, but Tesla T4 has 7.5; use backend='tiled'"
    assert triton.too_old("Tesla T4", (7, 5)) == message
    with pytest.raises(
        ValueError, match="backend 'triton' cannot be used: it is for CUDA tensors, but latent is on meta"
    ):
        _backends.resolve("triton", torch.device("meta"), torch.float32)
    with pytest.raises(
        TypeError, match="'triton' computes torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    ):
        _backends.resolve("triton", torch.device("cpu"), torch.float64)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_every_supported_gpu_has_tiles(capability, name):
    assert configurations.architecture_name(capability) == name
    for precision, rows_, features in itertools.product(configurations.PRECISIONS, (1, 17, 10_000), (8, 280, 1_024)):
        for family in configurations.FAMILIES:
            assert (
                configurations.tile_key(family, precision, rows_, features) in configurations.ARCHITECTURES[name].tiles
            )


def test_float32_products_follow_torch():
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert configurations.precision(torch.float32) == expected
    finally:
        torch.set_float32_matmul_precision("highest")
    assert configurations.precision(torch.bfloat16) == "16-bit"
