"""The precision of float32 products on a GPU, however the program that imports the package has set it.

torch has two names for it and raises RuntimeError where the old one is read and the new one says something else. No GPU
is needed: what is tested are settings, and which of them are read.
"""

import json
import subprocess
import sys

import pytest

SETTINGS = {
    "untouched": "",
    "old, full": "torch.set_float32_matmul_precision('highest')",
    "old, TF32": "torch.set_float32_matmul_precision('high')",
    "old names of cuBLAS and cuDNN": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "new, full": "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "new, TF32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "new, TF32 everywhere": "torch.backends.fp32_precision = 'tf32'",
    "old, then new": "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
}
TF32 = {"old, TF32", "old names of cuBLAS and cuDNN", "new, TF32", "new, TF32 everywhere"}

PROGRAM = """
import json, sys
import torch

{setting}

import fused_mos
from fused_mos import functional
from fused_mos._backends.triton_kernels import configurations
from fused_mos.train import parse
from fused_mos.training import Trainer, device, trainer

seen = {{"import": [configurations.precision(torch.float32)]}}
seen["of the CPU"] = {{torch.backends.mkldnn.matmul.fp32_precision}}

inputs = [torch.randn(shape, requires_grad=True) for shape in ((5, 2, 8), (5, 2), (11, 8))]
functional.mos_nll_loss(*inputs, torch.arange(5), backend="tiled").backward()
seen["call"] = [configurations.precision(torch.float32)]


def precisions():
    return configurations.precision(torch.float32), torch.backends.cudnn.rnn.fp32_precision


def observed(name, method):
    def call(*arguments, **options):
        seen.setdefault(name, set()).add(precisions())
        seen["of the CPU"].add(torch.backends.mkldnn.matmul.fp32_precision)
        return method(*arguments, **options)

    return call


# the settings of a run on a GPU, for one on the CPU
trainer.allow_tf32 = lambda _, allowed: device.allow_tf32(torch.device("cuda"), allowed)
Trainer.train_step = observed("train", Trainer.train_step)
trainer.evaluate = observed("evaluate", trainer.evaluate)
# a CPU has no TF32, but the flag's only effect there is the setting
trainer.check_precision = lambda *_: None
Trainer(parse(sys.argv[1:])).run()
print(json.dumps({{name: sorted(values) for name, values in seen.items()}}))
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_read_and_changed_by_one_name(setting, small_flags, tmp_path):
    """Import, a call, training in TF32 and evaluation in full precision, under each of the user's settings."""
    flags = [*small_flags, "--epochs", "1", "--precision", "tf32", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", PROGRAM.format(setting=SETTINGS[setting]), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    users = "tf32" if setting in TF32 else "ieee"
    assert seen["import"] == seen["call"] == [users]
    assert len(seen["of the CPU"]) == 1, "the old name sets the CPU's precision, too"
    assert seen["train"] == [["tf32", "tf32"]] and seen["evaluate"] == [["ieee", "ieee"]]
