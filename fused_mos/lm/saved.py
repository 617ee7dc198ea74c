"""Reads files written by torch.save as data. No name in the file is imported and nothing that it asks for is called.

A pickle can call any function and set any attribute of an object that it reaches. This reader interprets only the
opcodes that torch.save writes. They can reach only values that the reader makes: numbers, strings, containers, and the
`Name`s, `Record`s, `Storage`s and `View`s below. It supports today's zip archive and the stream of PyTorch 0.4, but not
the older tar archive or TorchScript, which is a program.

Memory and time are bounded by the size of the file: the pickle and the archive's directory have a maximum size, nothing
is compressed, and dictionaries have strings as keys, whose hashes are fast and do not collide.
"""

import dataclasses
import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_MAX_BYTES = 4 << 20  # for the pickle and for the archive's directory: a thousand times what a language model needs
_MAX_STEPS = 200_000  # opcodes, and the values that some of them copy
_CHUNK = 1 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
}
_DTYPES = {
    f"{module}.{kind}Storage": dtype
    for module in ("torch", "torch.cuda")
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_CONTAINERS = ("collections.OrderedDict", "builtins.set")
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")
_DESCRIPTIONS = ("torch.Size", "torch.device", "torch.serialization._get_layout")
_KNOWN = {*_DTYPES, *_CONTAINERS, *_TENSORS, *_PARAMETERS, *_DESCRIPTIONS}


@dataclasses.dataclass(frozen=True)
class Name:
    """A function or class that the file names."""

    path: str


@dataclasses.dataclass(eq=False)
class Record:
    """An object of a class that the reader was told to accept: its attributes without its code."""

    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Storage:
    """The memory of tensors. `data` is (numel,) once the whole file has been read."""

    dtype: torch.dtype
    numel: int
    data: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0), repr=False)

    def fill(self, content: bytearray) -> None:
        if len(content) != self.numel * self.dtype.itemsize:
            raise ValueError(f"a storage has {len(content)} bytes instead of {self.numel} × {self.dtype.itemsize}")
        self.data = torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)


@dataclasses.dataclass(eq=False)
class View:
    """A tensor: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        if math.prod(self.size) > self.storage.numel:  # an expanded tensor would take this much memory when copied
            raise ValueError(f"a tensor of {math.prod(self.size)} numbers is kept in {self.storage.numel}")
        return self.storage.data.as_strided(self.size, self.stride, self.offset)


class _Unpickler:
    """Interprets the pickles of one file and collects the storages by key."""

    def __init__(self, classes: Collection[str]):
        self.storages: dict[str, Storage] = {}
        self._classes = classes
        self._steps = 0

    def load(self, file: BinaryIO) -> Any:
        """The value of the pickle at the file's position, which moves past it."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._count(1)
            match opcode.name:
                case "STOP":
                    return self._stack.pop()
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = self._stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    self._stack.append(memo[argument])
                case name:
                    self._step(name, argument)
        raise ValueError("its pickle has no end")

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise ValueError(f"its pickle takes more than {_MAX_STEPS:,} steps")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._popped(int(opcode[-1]) if opcode[-1].isdigit() else 0)))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(self._marked())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_put({}, self._marked()))
            case "EMPTY_SET":
                stack.append(set())
            case "APPEND" | "APPENDS":
                items = self._popped(1) if opcode == "APPEND" else self._marked()
                _as(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._popped(2) if opcode == "SETITEM" else self._marked()
                _put(_as(dict, stack[-1]), items)
            case "ADDITEMS":
                items = self._marked()
                _as(set, stack[-1]).update(_as(str, item) for item in items)
            case "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._named(*self._popped(2)))
            case "REDUCE" | "NEWOBJ":
                name, arguments = self._popped(2)
                stack.append(self._made(_as(Name, name).path, _as(tuple, arguments)))
            case "BUILD":
                (state,) = self._popped(1)
                self._set_state(stack[-1], state)
            case "BINPERSID":
                (identity,) = self._popped(1)
                stack.append(self._persistent(*_as(tuple, identity)[:7]))  # they have at most six parts
            case _:
                raise ValueError(f"its pickle has the opcode {opcode}, which torch.save does not write")

    def _popped(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        if start < 0:
            raise ValueError("its pickle takes values that it has not made")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _marked(self) -> list[Any]:
        return self._popped(len(self._stack) - self._marks.pop())

    def _named(self, module: str, name: str) -> Name:
        module = "builtins" if module == "__builtin__" else module  # the name in protocol 2
        path = f"{module}.{name}"
        if path not in _KNOWN and path not in self._classes:
            raise ValueError(f"it names {path[:100]}, which no model of the published code needs")
        return Name(path)

    def _made(self, path: str, arguments: tuple) -> Any:
        """The value that a call in the pickle stands for."""
        if path in self._classes:
            return Record()
        if path in _TENSORS:
            storage, offset, size, stride = arguments[:4]
            numbers = (offset, *_as(tuple, size), *_as(tuple, stride))
            if len(numbers) > 9 or not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
                raise ValueError("a tensor has no size, or more than four axes")  # limits the cost of their product
            return View(_as(Storage, storage), offset, size, stride)
        if path in _PARAMETERS:
            return arguments[0]
        if path in _DESCRIPTIONS:
            return arguments
        items = _as(list, arguments[0]) if arguments else []
        self._count(len(items))
        if path == "builtins.set":
            return {_as(str, item) for item in items}
        if path == "collections.OrderedDict":
            return _put({}, [part for item in items for part in _pair(item)])
        raise ValueError(f"it calls {path}")

    def _set_state(self, target: Any, state: Any) -> None:
        """Set the attributes of a record. Attributes of a dictionary, such as the versions in a state_dict, are
        dropped. Raises ValueError for anything else."""
        if type(target) not in (Record, dict):
            raise ValueError(f"its pickle sets attributes of a {type(target).__name__}")
        for part in state if type(state) is tuple else (state,):
            if part is not None and type(target) is Record:
                self._count(len(_as(dict, part)))
                target.attributes.update(part)

    def _persistent(self, kind: str, name: Any, *rest: Any) -> Any:
        if kind == "module":  # a class, which PyTorch 0.4 saved with its source
            return _as(Name, name)
        key, _, numel, *view = rest
        dtype = _DTYPES[_as(Name, name).path]
        if kind != "storage" or any(part is not None for part in view) or type(numel) is not int or numel < 0:
            raise ValueError("it refers to a storage as no PyTorch since 0.4 does")
        storage = self.storages.setdefault(_as(str, key), Storage(dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ValueError(f"storage {key[:100]} has two sizes")
        return storage


def _as(kind: type, value: Any) -> Any:
    """Return the value. Raises ValueError unless it is of exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} is needed")
    return value


def _pair(item: Any) -> Iterable[Any]:
    if type(item) not in (list, tuple) or len(item) != 2:
        raise ValueError("its pickle has a dictionary of what are no pairs")
    return item


def _put(target: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    """Add keys and values, which alternate in `items`, to a dictionary."""
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        target[_as(str, key)] = value
    return target


# ----------------------------------------------------------------------------------------------------------- containers


class _Reader(io.BufferedReader):
    """A file that refuses single reads that would take much memory, such as a huge archive directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_BYTES:
            raise ValueError(f"its directory has {size:,} bytes")
        return super().read(size)


def read_saved(path: Path, classes: Collection[str]) -> tuple[Any, list[Storage]]:
    """The value in a file written by torch.save, and its storages.

    Args:
        classes: names of classes to read as Records, such as "torch.nn.modules.linear.Linear".

    Raises ValueError if torch.save did not write the file or it names anything else. A damaged file can raise any
    Exception.
    """
    with _Reader(io.FileIO(path)) as file:
        start = file.read(512)
        file.seek(0)
        if start[257:262] == b"ustar":
            raise ValueError("it is a tar archive of PyTorch before 0.4; save its model again with PyTorch 0.4 to 1.x")
        unpickler = _Unpickler(classes)
        read = _read_zip if start.startswith(b"PK\x03\x04") else _read_stream
        return read(file, path.stat().st_size, unpickler), list(unpickler.storages.values())


def _read_zip(file: _Reader, size: int, unpickler: _Unpickler) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}

        def content(name: str) -> bytearray:
            if name not in entries:
                raise ValueError(f"it lacks {name[:100]}")
            with archive.open(entries[name]) as entry:
                return _content(entry, entries[name].file_size)

        folders = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError(f"it is an archive with {len(folders)} times data.pkl")
        (folder,) = folders
        if f"{folder}/constants.pkl" in entries:
            raise ValueError("it is a TorchScript archive")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("it is compressed, as torch.save does not do")
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise ValueError(f"its parts overlap: they are larger than the {size:,} bytes of the file")
        order = f"{folder}/byteorder"
        if order in entries and content(order) != sys.byteorder.encode():
            raise ValueError(f"it is from a machine whose bytes are not in the order {sys.byteorder}")
        if entries[f"{folder}/data.pkl"].file_size > _MAX_BYTES:
            raise ValueError(f"its pickle has more than {_MAX_BYTES:,} bytes")
        value = unpickler.load(io.BytesIO(content(f"{folder}/data.pkl")))
        for key, storage in unpickler.storages.items():
            storage.fill(content(f"{folder}/data/{key}"))
    return value


def _read_stream(file: _Reader, size: int, unpickler: _Unpickler) -> Any:
    """Read the stream of PyTorch 0.4: five pickles, then each storage after its length."""
    pickles = io.BytesIO(file.read(_MAX_BYTES))
    if unpickler.load(pickles) != _MAGIC or unpickler.load(pickles) != _PROTOCOL:
        raise ValueError("torch.save did not write it")
    unpickler.load(pickles)  # information on the machine, which PyTorch ignores
    value, keys = unpickler.load(pickles), _as(list, unpickler.load(pickles))
    if sorted(_as(str, key) for key in keys) != sorted(unpickler.storages):
        raise ValueError("its storages are not those of its tensors")
    file.seek(pickles.tell())
    for key in keys:
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.numel or numel * storage.dtype.itemsize > size - file.tell():
            raise ValueError(f"storage {key[:100]} has {numel} numbers instead of {storage.numel}, or is cut off")
        storage.fill(_content(file, numel * storage.dtype.itemsize))
    return value


def _content(file: Any, size: int) -> bytearray:
    """The next `size` bytes, or as many as there are."""
    content = bytearray()
    while len(content) < size and (chunk := file.read(min(_CHUNK, size - len(content)))):
        content += chunk
    return content
