"""The backend that a run names in its first line, and copies to a GPU, as requested from torch. No GPU is needed: a
stand-in answers in its place."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fused_mos
from fused_mos.training.config import RECIPES
from fused_mos.training.device import backend_in_words, on_device
from fused_mos.training.lm1b.ranks import Ranks


class NotedCopies(TorchFunctionMode):
    """Stands in for a GPU: notes whether a copy to it is from pinned, contiguous memory and asynchronous."""

    def __init__(self):
        super().__init__()
        self.pinned: list[torch.Tensor] = []
        self.copies: list[tuple[bool, bool, bool]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if function is torch.Tensor.to and args[1] == torch.device("cuda"):
            is_pinned = any(args[0] is tensor for tensor in self.pinned)
            self.copies.append((is_pinned, args[0].is_contiguous(), (kwargs or {}).get("non_blocking", False)))
            return args[0].clone()
        return function(*args, **kwargs or {})


BACKENDS = """
import dataclasses, torch, fused_mos
from fused_mos.train import RECIPES
from fused_mos.training.device import backend_in_words
config = RECIPES["demo"]()
for backend in ("auto", "reference"):
    of_model = dataclasses.replace(config.model, backend=backend)
    print(backend_in_words(dataclasses.replace(config, model=of_model), torch.device("cpu")))
"""


@pytest.mark.processes
def test_the_first_line_says_that_the_compiled_kernels_are_missing(tmp_path):
    package = Path(fused_mos.__file__).parent
    shutil.copytree(package, tmp_path / "fused_mos", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # else an editable install would find its own
    (tmp_path / "fused_mos" / "_cpu.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", BACKENDS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    missing = "(no compiled kernels: see fused-mos info)"
    assert result.stdout.splitlines() == [f"backend tiled {missing}", f"backend reference {missing}"], result.stderr


@pytest.mark.parametrize(("precision", "backend"), [("float32", "auto"), ("bfloat16", "auto"), ("float32", "tiled")])
def test_the_first_line_names_the_backend(precision, backend):
    pytest.importorskip("fused_mos._cpu")
    config = RECIPES["demo"]()
    config = dataclasses.replace(config, precision=precision, model=dataclasses.replace(config.model, backend=backend))
    name = "cpu" if backend == "auto" else backend
    assert backend_in_words(config, torch.device("cpu")) == f"backend {name}"


def test_a_batch_is_copied_from_pinned_memory_and_not_waited_for():
    rows = torch.arange(12).view(3, 4).t()[:-1]
    assert not rows.is_contiguous()
    with NotedCopies() as noted:
        assert torch.equal(on_device(rows, torch.device("cuda")), rows)
    assert noted.copies == [(True, True, True)]


def test_numbers_of_the_host_are_one_copy(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    ranks = object.__new__(Ranks)
    ranks.device = torch.device("cuda")
    with NotedCopies() as noted:
        total = ranks.sums(torch.tensor(1.5), 2, torch.tensor(3), False, 4.25)
    assert noted.copies == [(True, True, True)]
    assert total.tolist() == [3, 4, 6, 0, 8.5] and total.dtype == torch.float64
