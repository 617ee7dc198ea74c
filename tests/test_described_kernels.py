"""The kernels whose operands pass through descriptors, persistent ones among them, beside the plain ones."""

import pytest
import torch
from backends import configurations, triton
from problem import check_forward_and_gradients, problem

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from fused_mos._backends import IDENTITY, Transform
from fused_mos._backends.triton_kernels import launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [IDENTITY, Transform(2.0, 0.7)], ids=str)
@pytest.mark.parametrize("operation", ["in the forward pass", "recomputed"])
def test_persistent_kernels_make_the_same_gradients(operation, transform, dtype, workspace):
    """Bit for bit, since they multiply and add in the same order; with fewer programs than tiles, and with more."""
    case = problem(11, 3, 40, 130, ignored=True).to(dtype, ())
    results = []
    for described, multiprocessors in ((False, 4), (True, 4), (True, 1000)):
        tile = configurations.Tile(32, 64, 16, 4, 1, described=described)
        tiles = dict.fromkeys(configurations.ARCHITECTURES["sm_90"].tiles, tile)
        architecture = configurations.Architecture(multiprocessors, 2**30, tiles)
        with launch.overridden(architecture):
            if operation == "in the forward pass":
                needs = (True,) * 4
                found = triton.nll_with_gradients(*case.inputs(), case.target, -100, 0.0, True, needs, transform)
                results.append(found)
            else:
                _, *statistics = triton.nll(*case.inputs(), case.target, -100, transform)
                grad = torch.linspace(0, 1, 11)
                inputs = *case.inputs(), case.target, *statistics
                results.append(triton.nll_backward(grad, *inputs, -100, 0.0, (True,) * 4, transform))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [IDENTITY, Transform(2.0, 0.7)], ids=str)
@pytest.mark.parametrize("n_experts", [1, 3])
def test_described_operands_give_the_same_bits(n_experts, transform, dtype):
    """Statistics with targets and without, log-probabilities, the best class and the gradient of all of them. One
    token's classes are as improbable as ask for the pass that follows underflow."""
    case = problem(11, n_experts, 40, 130, ignored=True).to(dtype, ())
    case.latent[0] *= 500
    grad = torch.linspace(-1, 1, 11 * 130).view(11, 130)
    results = []
    for described in (False, True):
        tile = configurations.Tile(32, 64, 16, 4, 1, described=described)
        tiles = dict.fromkeys(configurations.ARCHITECTURES["sm_90"].tiles, tile)
        with launch.overridden(configurations.Architecture(4, 2**30, tiles)):
            losses = triton.nll(*case.inputs(), case.target, -100, transform)
            mixture = triton.normalisers(*case.inputs(), transform)
            inputs = case.latent, mixture[0], case.weight, case.bias, *mixture[1:]
            log_p = triton.log_prob(*inputs, transform)
            best = triton.predict(*inputs, transform)
            gradients = triton.log_prob_backward(grad, *inputs, (True,) * 4, transform)
            results.append((*losses, *mixture, log_p, best, *gradients))
    assert log_p.min() < -90 or transform.softcap, "no underflow"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("classes", [16, 32])
def test_tiles_beyond_the_last_class_are_zero(classes, described):
    """65 classes are filled up to 128 columns; rows whose first tile is masked have a reference that a tile without a
    class cannot be taken relative to."""
    case = problem(5, 2, 16, 65, ignored=False)
    case.bias[:classes] = -1e9
    case.target.clamp_(classes)
    tile = configurations.Tile(32, classes, 16, 4, 1, described=described)
    tiles = dict.fromkeys(configurations.ARCHITECTURES["sm_90"].tiles, tile)
    with launch.overridden(configurations.Architecture(4, 2**30, tiles)):
        check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), torch.float32, "triton")
