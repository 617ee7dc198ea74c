"""Models of the paper's published code (zihangdai/mos): whole modules, pickled by torch.save.

Such a file can run any code when it is unpickled, so this reader unpickles only a fixed list of names: tensors and
containers as what they are, and every class of a module as a plain record of its attributes.
"""

import collections
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..runtime import UserError


class PublishedError(UserError, ValueError):
    """A file that is not a model of the published code, with its path."""


class _Record:
    """An object's attributes, and none of its code."""

    dropout: float  # of a WeightDrop
    dump_patches = False  # torch.load compares the code that PyTorch 0.4 saved beside a module with this class's

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            self.__dict__.update(part or {})


_MODULES = {
    "model": ("RNNModel",),
    "weight_drop": ("WeightDrop",),
    "locked_dropout": ("LockedDropout",),
    "torch.nn.modules.sparse": ("Embedding",),
    "torch.nn.modules.container": ("ModuleList", "Sequential"),
    "torch.nn.modules.rnn": ("LSTM",),
    "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.activation": ("Tanh",),
    "torch.nn.backends.thnn": ("THNNFunctionBackend", "_get_thnn_function_backend"),
}
_TENSORS = {
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device", *(name for name in dir(torch) if name.endswith("Storage"))),
    "torch.storage": ("TypedStorage", "UntypedStorage"),
    "collections": ("OrderedDict",),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _MODULES.get(module, ()):
            return _Record
        if (module, name) in (("torch.nn.parameter", "Parameter"), ("builtins", "set"), ("__builtin__", "set")):
            return _parameter if name == "Parameter" else set
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return _Record  # a bound method, which weight drop puts in place of one of the LSTM's
        if name in _TENSORS.get(module, ()):
            return (
                collections.OrderedDict
                if module == "collections"
                else getattr(__import__(module, fromlist=[name]), name)
            )
        raise PublishedError(f"it names {module}.{name}, which no model of the published code needs")


def _parameter(data: Tensor, requires_grad: bool = True, *_) -> Tensor:
    return data


def _load(file, **options) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = SimpleNamespace(__name__="fused_mos.lm.published", Unpickler=_Unpickler, load=_load)


def read_published(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict of a model that the published code saved, with its own names, on the CPU; and its dropouts by the
    names of AWDLSTM's arguments.

    Reads the formats of PyTorch 0.4 and of today. Raises PublishedError where the file is another's; no code in it is
    run.
    """
    path = Path(path)
    if not path.is_file():
        raise PublishedError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            # torch.load would give a TorchScript archive to another loader, which runs the code in it
            if torch.serialization._is_zipfile(file):
                archive = torch._C.PyTorchFileReader(str(path))
                if archive.has_record("constants.pkl"):  # type: ignore[attr-defined]  # torch's stubs lack it
                    raise PublishedError("it is a TorchScript archive")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            model = torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except Exception as error:  # a damaged pickle can raise anything
        raise PublishedError(f"{path} is not a model of the published code: {error or type(error).__name__}") from None
    if isinstance(model, dict) and all(isinstance(value, Tensor) for value in model.values()):
        return dict(model), {}
    if not isinstance(model, _Record):
        raise PublishedError(f"{path} is not a model of the published code: it holds a {type(model).__name__}")
    tensors = dict(_parameters(model, ""))
    if not tensors:
        raise PublishedError(f"{path} is not a model of the published code: it holds no parameters")
    layers = _children(_children(model).get("rnns")).values()
    wdrop = [layer.dropout for layer in layers if "module" in _children(layer)]
    dropouts = {
        name: float(model.__dict__[name])
        for name in ("dropout", "dropoute", "dropouti", "dropouth", "dropoutl")
        if name in model.__dict__
    }
    return tensors, dropouts | {"wdrop": float(wdrop[0]) if wdrop else 0.0}


def _children(module: _Record | None) -> dict[str, _Record]:
    return module.__dict__.get("_modules", {}) if module else {}


def _parameters(module: _Record, prefix: str):
    for name, tensor in module.__dict__.get("_parameters", {}).items():
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in _children(module).items():
        if child is not None:
            yield from _parameters(child, f"{prefix}{name}.")
