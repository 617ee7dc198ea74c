"""Reads models saved by the paper's published code (zihangdai/mos), which are whole modules pickled by torch.save.

Unpickling such a file can run any code. `saved` reads it as data instead: it restores tensors and containers, and turns
objects of a fixed list of module classes into plain records of their attributes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime import UserError
from .saved import Record, View, read_saved


class PublishedError(UserError, ValueError):
    """The file, named in the message, is not a model of the published code."""


_CLASSES = {
    f"{module}.{name}"
    for module, names in {
        "model": ("RNNModel",),
        "weight_drop": ("WeightDrop",),
        "locked_dropout": ("LockedDropout",),
        "torch.nn.modules.sparse": ("Embedding",),
        "torch.nn.modules.container": ("ModuleList", "Sequential"),
        "torch.nn.modules.rnn": ("LSTM",),
        "torch.nn.modules.linear": ("Linear",),
        "torch.nn.modules.activation": ("Tanh",),
        "torch.nn.backends.thnn": ("THNNFunctionBackend", "_get_thnn_function_backend"),
        "builtins": ("getattr",),  # pickles the bound method with which weight drop replaces one of the LSTM's
    }.items()
    for name in names
}
_MAX_NAMES, _MAX_LENGTH = 1000, 200  # twenty times what the published models need


def read_published(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model saved by the published code: its state_dict on the CPU, under the published names, and its dropouts,
    under the names of AWDLSTM's arguments.

    The file may be in the format of PyTorch 0.4 or of today. No code in it is run. Raises PublishedError if it is not
    such a model.
    """
    path = Path(path)
    if not path.is_file():
        raise PublishedError(f"there is no file {path}")
    try:
        model, storages = read_saved(path, _CLASSES)
        views, dropouts = _views_and_dropouts(model)
        # a tied weight has two names; more could make the model much larger than its file
        if sum(math.prod(view.size) for view in views.values()) > 2 * sum(storage.numel for storage in storages):
            raise ValueError("its parameters share their memory")
        return {name: view.tensor().float() for name, view in views.items()}, dropouts
    except Exception as error:  # a damaged file can raise anything
        reason = str(error)[:300] or type(error).__name__
        raise PublishedError(f"{path} is not a model of the published code: {reason}") from None


def _views_and_dropouts(model: Any) -> tuple[dict[str, View], dict[str, float]]:
    if isinstance(model, dict):
        return dict(_named("state_dict", model, View)), {}
    if not isinstance(model, Record):
        raise ValueError(f"it holds a {type(model).__name__}")
    views: dict[str, View] = {}
    for prefix, module in _modules(model):
        views |= {f"{prefix}{name}": view for name, view in _children(module, "_parameters", View)}
        if len(views) > _MAX_NAMES:
            raise ValueError(f"it has more than {_MAX_NAMES} parameters")
    if not views:
        raise ValueError("it holds no parameters")
    dropouts = {
        name: _number(name, model.attributes[name])
        for name in ("dropout", "dropoute", "dropouti", "dropouth", "dropoutl")
        if name in model.attributes
    }
    rnns = [rnns for name, rnns in _children(model, "_modules", Record) if name == "rnns"]
    wdrop = [
        _number("dropout", layer.attributes.get("dropout"))
        for container in rnns
        for _, layer in _children(container, "_modules", Record)
        if any(name == "module" for name, _ in _children(layer, "_modules", Record))
    ]
    return views, dropouts | {"wdrop": wdrop[0] if wdrop else 0.0}


def _modules(model: Record) -> Iterator[tuple[str, Record]]:
    """Each module with the prefix of its parameters' names. Repeated modules count each time, so the limit also ends
    recursion through a module that holds itself, or chains that double at each level."""
    waiting, count = [("", model)], 1
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        children = [(f"{prefix}{name}.", child) for name, child in _children(module, "_modules", Record)]
        count += len(children)
        if count > _MAX_NAMES or len(prefix) > _MAX_LENGTH:
            raise ValueError(f"it has more than {_MAX_NAMES} modules, or one inside too many others")
        waiting += reversed(children)


def _children(module: Record, attribute: str, kind: type) -> list[tuple[str, Any]]:
    return _named(attribute, module.attributes.get(attribute, {}), kind)


def _named(what: str, values: Any, kind: type) -> list[tuple[str, Any]]:
    """The names and values of a dictionary, without None."""
    if not isinstance(values, dict) or not all(isinstance(value, kind | None) for value in values.values()):
        raise ValueError(f"a {what} holds something else than {kind.__name__}s")
    if len(values) > _MAX_NAMES or any(len(name) > _MAX_LENGTH for name in values):
        raise ValueError(f"a {what} has more than {_MAX_NAMES} names, or one of more than {_MAX_LENGTH} letters")
    return [(name, value) for name, value in values.items() if value is not None]


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is not a number")
    return float(value)
