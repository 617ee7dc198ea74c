"""Configurations as frozen dataclasses: ranges beside the fields, JSON, and what may change when a run goes on.

    lr: float = setting(20.0, POSITIVE)
    epochs: int = setting(1, POSITIVE, may_change=True)

A field whose type is a Literal takes its values alone. `check` looks at all of that, `changes` at what may change.
Whatever else a run keeps as JSON is a dataclass with such fields, too: `read_record` lets no other value in.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError

Config = TypeVar("Config")
Record = TypeVar("Record")


class Range(NamedTuple):
    """Values that a number may have. NaN is in no range, and infinity in none either."""

    words: str  # after "must"
    holds: Callable[[float], bool]


LARGEST = 1e30
"""No number of a configuration may be larger, so that its products are finite in float32, too."""

POSITIVE = Range("be positive", lambda value: 0 < value < math.inf)
SIZE = Range("be in [1, 2**31)", lambda value: 0 < value < 2**31)  # of a tensor's dimension
NOT_NEGATIVE = Range("not be negative", lambda value: 0 <= value < math.inf)
SHARE = Range("be in [0, 1)", lambda value: 0 <= value < 1)
SEED = Range("be in [0, 2**63)", lambda value: 0 <= value < 2**63)  # what torch takes
COUNT = Range("be in [0, 2**62)", lambda value: 0 <= value < 2**62)  # which still fits 64 bits when it grows
NUMBER = Range("be a number", lambda value: -LARGEST <= value <= LARGEST)


def setting(default: Any, allowed: Range | None = None, *, may_change: bool = False) -> Any:
    """A field of a dataclass: its default, the range of its values, and whether a run may go on with another value."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "may_change": may_change})


def check(config: Any) -> None:
    """Raises ConfigError for a value, also of a nested configuration, that is out of its field's range, or none of its
    Literal's."""
    for fault in _faults(config):
        raise ConfigError(fault)


def _faults(record: Any) -> Iterator[str]:
    """What is wrong with the values of a dataclass, whose types are right."""
    hints = get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value, allowed = getattr(record, field.name), field.metadata.get("allowed")
        if dataclasses.is_dataclass(value):
            yield from _faults(value)
        elif get_origin(hints[field.name]) is Literal and value not in (choices := get_args(hints[field.name])):
            yield f"{field.name} must be one of {', '.join(choices)}, got {value!r}"
        elif allowed and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                if words := _wanted(number, allowed):
                    yield f"{field.name} must {words}, got {number}"


def _wanted(number: float, allowed: Range) -> str | None:
    """What a number must do that is out of its range."""
    if number == math.inf:
        return "be finite"
    if number > LARGEST:
        return f"be at most {LARGEST:g}"
    return None if allowed.holds(number) else allowed.words


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: paths are strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(config_type: type[Config], values: Any, renew: Callable[[dict[str, Any]], Any] = dict) -> Config:
    """The inverse of `to_json`. A field that is missing has its default. Raises ConfigError for a field that this
    version does not know, or a value of another type.

    Args:
        renew: returns the values of an earlier version as this one has them.
    """
    try:
        return _dataclass(config_type, renew(_as_dict(values, "it")), "it")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the saved configuration does not fit this version: {error}") from None


def read_record(record_type: type[Record], values: Any) -> Record:
    """A dataclass from the JSON of `dataclasses.asdict`, which must have all of its fields, each of its type and in its
    range. Raises ValueError, naming the field."""
    try:
        record = _dataclass(record_type, values, "it", complete=True)
    except TypeError as error:
        raise ValueError(str(error)) from None
    for fault in _faults(record):
        raise ValueError(fault)
    return record


WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _dataclass(kind: Any, values: Any, name: str, complete: bool = False) -> Any:
    """Raises TypeError for a value of another type than its field, and, with `complete`, for a field without one."""
    hints, values = get_type_hints(kind), _as_dict(values, name)
    if unknown := values.keys() - hints.keys():
        raise TypeError(f"{min(unknown)!r} is not a field of {kind.__name__}")
    if complete and (missing := hints.keys() - values.keys()):
        raise TypeError(f"{name} lacks {min(missing)!r}")
    return kind(**{field: _typed(hints[field], value, field, complete) for field, value in values.items()})


def _as_dict(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be an object with named values, got {reprlib.repr(values)}")
    return values


def _typed(hint: Any, value: Any, name: str, complete: bool) -> Any:
    """A value of JSON as the type that its field is declared with. Raises TypeError."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:  # X | None
        return None if value is None else _typed(arguments[0], value, name, complete)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, name, complete)
    if kind is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(arguments[0], item, f"each of {name}", complete) for item in value)
        raise TypeError(f"{name} must be a list, got {reprlib.repr(value)}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        if abs(value) > LARGEST:
            raise TypeError(f"{name} must be at most {LARGEST:g} in size, got {reprlib.repr(value)}")
        return float(value)
    if kind is Literal and value not in arguments:
        raise TypeError(f"{name} must be one of {', '.join(arguments)}, got {reprlib.repr(value)}")
    if kind is Literal or type(value) is kind:
        return value
    raise TypeError(f"{name} must be {WORDS[kind]}, got {reprlib.repr(value)}")


def changes(saved: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """(field, saved value, asked value) where they differ and may not, also in nested configurations."""
    for field in dataclasses.fields(saved):
        before, now = getattr(saved, field.name), getattr(asked, field.name)
        if dataclasses.is_dataclass(before):
            yield from changes(before, now)
        elif before != now and not field.metadata.get("may_change"):
            yield field.name, before, now


def check_same_run(saved: Any, asked: Any) -> None:
    """Raises ConfigError, naming the field and both values, if `asked` would be another run than `saved`."""
    for name, before, now in changes(saved, asked):
        raise ConfigError(f"{name} cannot change when a run continues: it was {before}, got {now}; name another --out")
