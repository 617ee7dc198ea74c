"""The cached lookup of a launch's compiled kernel finds the same kernel as Triton's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import triton

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)


def run(script: str) -> None:
    """Run a script in a process where Triton compiles but launches nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    script = "import unlaunched; unlaunched.install()\n" + script
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.compiles
def test_a_kept_kernel_is_the_one_that_triton_compiles_for_these_arguments():
    run("""
import itertools, torch
from fused_mos._backends.triton_kernels import finish, gradients, launch

def both(kernel, arguments, constants):
    # the grid, handles of the compiled kernel, arguments: as launched by the package and by Triton itself
    launch.launch(kernel, (1,), *arguments, **constants)
    kernel[(1,)](*arguments, **constants, num_warps=4, num_stages=1, enable_fp_fusion=True)
    kept, own = unlaunched.launched
    unlaunched.launched.clear()
    assert len(kept) == len(own) and kept[:6] == own[:6], (arguments, constants)
    assert all(a is b or a == b for a, b in zip(kept[9:], own[9:]))
    return own[4]

def cases():
    constants = {"COLUMNS": 0, "ROWS": 16, "FEATURES": 16, "OF_ALL": True, "TF32": False, "WIDTH": 16, "D": 16}
    sizes = itertools.product((torch.float32, torch.bfloat16), (0, 1), (16, 17), (None, 1), (1, 7, 32))
    for dtype, offset, width, factor, rows in sizes:
        source = torch.zeros(rows * 32 + 1, dtype=dtype)[offset : offset + rows * width].view(rows, width)
        factor = None if factor is None else torch.ones(())
        arguments = source, factor, torch.zeros(rows, 16, dtype=dtype), rows, rows
        yield both(finish.scaled_rows_kernel, arguments, constants | {"STRIDE": width})
    a, rows = torch.zeros(1024), torch.zeros(4, dtype=torch.int64)
    for columns, stride in itertools.product((1, 15, 16, 2**31), repeat=2):
        yield both(gradients.move_rows_kernel, (a, rows, rows, columns, stride), {"COLUMNS": 1024})

found = [set(cases()), len(launch._compiled), set(cases()), len(launch._compiled)]
assert found[0] == found[2] and found[1] == found[3], "the second time kernels are known"
assert len(found[0]) >= 12, len(found[0])  # the cases do differ
""")


@pytest.mark.compiles
def test_equal_calls_launch_the_same_kernels():
    run("""
import torch
from fused_mos._backends import triton as backend
from fused_mos._backends.triton_kernels import configurations, launch
from fused_mos._backends.triton_kernels.tiles import Logits
z, a, w = (torch.randn(shape, dtype=torch.bfloat16) for shape in [(96, 3, 16), (96, 3), (200, 16)])
y = torch.randint(200, (96,))
rows, exponentials, statistic = z.view(288, 16), torch.empty(288, 208, dtype=z.dtype), torch.empty(288)
described = configurations.Tile(128, 256, 64, 8, 3, described=True)
tiles = {key: described for key in configurations.ARCHITECTURES["sm_90"].tiles if "gradient" in key}
with launch.overridden(configurations.ARCHITECTURES["sm_90"], tiles):
    for repeat in range(3):
        backend.nll(z, a, w, None, y, -100)
        backend.predict(z, *backend.normalisers(z, a, w, None)[:1], w, None, a.float(), a.float())
        backend._exponentials(Logits(rows, w, None, 288, 200), y, statistic, exponentials, statistic, 3)
        kept, kernels = len(launch._compiled), [call[4] for call in unlaunched.launched]
        unlaunched.launched.clear()
        if repeat:
            assert (kept, kernels) == before
        before = kept, kernels
assert len(kernels) >= 8, len(kernels)
""")
