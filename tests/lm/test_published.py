"""Checkpoints of the paper's published code: what is read, and that nothing in them is run."""

import collections
import dataclasses
import json
import os
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fused_mos import convert, evaluate
from fused_mos.lm import AWDLSTM
from fused_mos.lm.published import PublishedError, read_published
from fused_mos.training import RECIPES
from fused_mos.training.checkpoint import load_checkpoint
from fused_mos.training.config import dynamic_rule
from fused_mos.training.stages import finetuning_config

V, D, K, WIDTHS = 23, 6, 3, (9, 9, 8)


@pytest.fixture
def published(monkeypatch):
    """A module of the published code's classes and names, with its attributes, in modules of its modules' names."""

    class LockedDropout(nn.Module):
        pass

    class WeightDrop(nn.Module):
        def __init__(self, lstm, dropout):
            super().__init__()
            self.module, self.dropout, self.weights, self.variational = lstm, dropout, ["weight_hh_l0"], False
            lstm.flatten_parameters = self.nothing
            raw = lstm.weight_hh_l0
            del lstm._parameters["weight_hh_l0"]
            lstm.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

        def nothing(self):
            return

    class RNNModel(nn.Module):
        def __init__(self, wdrop=0.5, tied=True):
            super().__init__()
            self.lockdrop = LockedDropout()
            self.encoder, self.decoder = nn.Embedding(V, D), nn.Linear(D, V)
            layers = [nn.LSTM(size, width) for size, width in zip((D, *WIDTHS), WIDTHS)]
            self.rnns = nn.ModuleList(WeightDrop(layer, wdrop) if wdrop else layer for layer in layers)
            self.prior = nn.Linear(WIDTHS[-1], K, bias=False)
            self.latent = nn.Sequential(nn.Linear(WIDTHS[-1], K * D), nn.Tanh())
            if tied:
                self.decoder.weight = self.encoder.weight
            self.dropout, self.dropoute, self.dropouti, self.dropouth, self.dropoutl = 0.4, 0.1, 0.45, 0.2, 0.3

    for name, kind in (("model", RNNModel), ("weight_drop", WeightDrop), ("locked_dropout", LockedDropout)):
        module = ModuleType(name)
        setattr(module, kind.__name__, kind)
        kind.__module__, kind.__qualname__ = name, kind.__name__
        monkeypatch.setitem(sys.modules, name, module)
    return RNNModel


@pytest.mark.parametrize("zipped", [True, False], ids=["today", "PyTorch 0.4"])
@pytest.mark.parametrize(("wdrop", "tied"), [(0.5, True), (0.0, True), (0.5, False)])
def test_a_pickled_module_becomes_a_run(published, zipped, wdrop, tied, tmp_path, capsys):
    source = published(wdrop, tied)
    torch.save(source, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    for name in ("model", "weight_drop", "locked_dropout"):
        del sys.modules[name]  # as on a machine without the published code
    assert convert.main([str(tmp_path / "model.pt"), str(tmp_path / "run")]) == 0
    assert "23 words, K = 3, d = 6" in capsys.readouterr().out
    tensors, meta = load_checkpoint(tmp_path / "run" / "best.safetensors")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert meta["config"] == config and config["optim"]["bptt_delta"] == 40
    model = config["model"]
    assert (model["hidden_sizes"], model["n_experts"], model["embedding_size"], model["tied"]) == (
        list(WIDTHS),
        K,
        D,
        tied,
    )
    assert [model[name] for name in ("dropout", "dropoute", "dropouti", "dropouth", "dropoutl")] == [
        0.4,
        0.1,
        0.45,
        0.2,
        0.3,
    ]
    assert model["wdrop"] == wdrop and len(tensors) == (17 if not tied else 16) + 1
    expected = source.rnns[1].module.weight_hh_l0_raw if wdrop else source.rnns[1].weight_hh_l0
    assert torch.equal(tensors["rnns.1.weight_hh_l0"], expected)
    assert torch.equal(tensors["head.prior.weight"], source.prior.weight)


def test_the_recipe_gives_what_comes_after(published, tmp_path):
    torch.save(published(), tmp_path / "model.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # of one that was killed
    assert convert.main([str(tmp_path / "model.pt"), str(tmp_path / "run"), "--recipe", "wikitext2"]) == 0
    assert finetuning_config(tmp_path / "run").optim == dataclasses.replace(RECIPES["wikitext2"]().optim, lr=20)
    assert evaluate.parse([str(tmp_path / "run")]).rule == dynamic_rule("wikitext2")


def test_from_published_names_what_is_wrong(published):
    state = published().state_dict()
    model = AWDLSTM.from_published(state, dropouti=0.1)
    assert model.dropouti == 0.1 and torch.equal(model.head.decoder.bias, state["decoder.bias"])
    lacking = {name: tensor for name, tensor in state.items() if name != "prior.weight"}
    with pytest.raises(ValueError, match="not of the published code: it lacks prior.weight"):
        AWDLSTM.from_published(lacking)
    with pytest.raises(ValueError, match=r"prior.weight must be \(3, 8\), got \(3, 5\)"):
        AWDLSTM.from_published(state | {"prior.weight": torch.zeros(K, 5)})
    with pytest.raises(ValueError, match=r"prior.weight must be a matrix, got \(3,\)"):
        AWDLSTM.from_published(state | {"prior.weight": torch.zeros(K)})
    for name, shape in {  # small tensors that ask for gigabytes
        "rnns.0.module.weight_hh_l0_raw": (1, 100_000),
        "rnns.2.module.weight_hh_l0_raw": (1, 100_000),
        "rnns.1.module.weight_ih_l0": (1, 100_000),
        "prior.weight": (100_000, 1),
        "encoder.weight": (1, 1_000_000),
        "latent.0.weight": (1, 1_000_000),
        "decoder.weight": (1_000_000, 1),
    }.items():
        with pytest.raises(ValueError, match=r"must be \(\d+, \d+\), got \(\d+, \d+\)"):
            AWDLSTM.from_published(state | {name: torch.zeros(shape)})
    for changed, message in (
        ({"more": torch.zeros(1)}, "Unexpected key"),
        ({"decoder.bias": torch.zeros(1)}, "size mismatch for head.decoder.bias"),
        (
            {"rnns.1.module.bias_hh_l0": torch.zeros(2, 2), "more": torch.zeros(1)},
            "Unexpected key.*; size mismatch for rnns",
        ),
    ):
        with pytest.raises(ValueError, match=f"not of the published code: {message}") as refused:
            AWDLSTM.from_published(state | changed)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(value, published, tmp_path, capsys):
    """Also those that float32 has not; no run may begin from them."""
    source = published().double()
    source.rnns[1].module.bias_hh_l0.data[3] = value
    torch.save(source, tmp_path / "model.pt")
    assert convert.main([str(tmp_path / "model.pt"), str(tmp_path / "run")]) == 2
    message = "numbers of rnns.1.module.bias_hh_l0 are not finite in float32"
    assert (
        capsys.readouterr().err == f"error: {tmp_path / 'model.pt'} cannot be used: {message}\n"
        and not (tmp_path / "run").exists()
    )


def test_a_model_saved_on_a_gpu_is_read(published, tmp_path):
    """PyTorch 0.4 called its storages torch.cuda.FloatStorage."""
    source = published()
    torch.save(source, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "model.pt").read_bytes()
    assert b"ctorch\nFloatStorage\n" in content
    (tmp_path / "model.pt").write_bytes(content.replace(b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n"))
    tensors, _ = read_published(tmp_path / "model.pt")
    assert torch.equal(tensors["encoder.weight"], source.encoder.weight)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["today", "PyTorch 0.4"])
def test_nothing_in_the_file_is_run(zipped, tmp_path):
    path, made = tmp_path / "model.pt", tmp_path / "made"
    for content in (_Evil(str(made)), collections.OrderedDict(weight=_Evil(str(made)))):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(PublishedError, match=r"it names \w+\.mkdir, which no model of the published code needs"):
            read_published(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), "the file is not what it claims to test"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_not_run(tmp_path, capfd):
    """torch.load hands such an archive to a loader that does not ask the unpickler."""

    class Evil(torch.nn.Module):
        def forward(self):
            return 0

        @torch.jit.export
        def __getstate__(self):
            return self.training

        @torch.jit.export
        def __setstate__(self, state: bool):
            self.training = state
            print("the code in the file")

    path = tmp_path / "model.pt"
    torch.jit.script(Evil()).save(str(path))
    with pytest.raises(PublishedError, match="it is a TorchScript archive"):
        read_published(path)
    assert "the code" not in capfd.readouterr().out
    torch.jit.load(str(path))
    assert "the code in the file" in capfd.readouterr().out, "the file is not what it claims to test"


def test_getattr_reaches_nothing(tmp_path):
    """The published code pickles a bound method, by getattr; here it is asked for a function of a class that may be
    named."""
    path = tmp_path / "model.pt"
    command = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR."
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        file.write(command)
        pickle.dump([], file, protocol=2)
    with pytest.raises(PublishedError, match="it holds no parameters"):
        read_published(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(PublishedError, match=f"{path} is not a model of the published code"):
        read_published(path)
    with pytest.raises(PublishedError, match="there is no file"):
        read_published(tmp_path / "missing.pt")


def test_a_folder_in_use_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.safetensors").write_text("precious")
    assert convert.main([str(tmp_path / "model.pt"), str(tmp_path / "run")]) == 2
    assert "is not empty; name another folder" in capsys.readouterr().err
