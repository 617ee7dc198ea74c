"""Configurations as dataclasses whose fields declare their range, and whether they may change when a run continues.

    lr: float = setting(20.0, POSITIVE)
    epochs: int = setting(1, POSITIVE, may_change=True)

`check` verifies ranges and the values of Literal fields; `check_same_run` verifies that nothing else has changed. All
other JSON of a run is also read into such dataclasses, by `read_record`, which refuses values of a wrong type or range.
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
    """A range of allowed numbers. No range contains NaN or infinity."""

    words: str  # completes "… must"
    holds: Callable[[float], bool]


LARGEST = 1e30
"""Largest number in a configuration, so that products of such numbers stay finite in float32."""

POSITIVE = Range("be positive", lambda value: 0 < value < math.inf)
SIZE = Range("be in [1, 2**31)", lambda value: 0 < value < 2**31)  # dimension of a tensor
NOT_NEGATIVE = Range("not be negative", lambda value: 0 <= value < math.inf)
SHARE = Range("be in [0, 1)", lambda value: 0 <= value < 1)
SEED = Range("be in [0, 2**63)", lambda value: 0 <= value < 2**63)  # what torch takes
COUNT = Range("be in [0, 2**62)", lambda value: 0 <= value < 2**62)  # with room to grow within 64 bits
NUMBER = Range("be a number", lambda value: -LARGEST <= value <= LARGEST)


def setting(default: Any, allowed: Range | None = None, *, may_change: bool = False) -> Any:
    """Declares a dataclass field: its default, its range, and whether a run may continue with another value."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "may_change": may_change})


def check(config: Any) -> None:
    """Raises ConfigError for a value outside its field's range or Literal, nested configurations included."""
    for fault in _faults(config):
        raise ConfigError(fault)


def _faults(record: Any) -> Iterator[str]:
    """Yields an error message for each wrong value of a dataclass whose types are right."""
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
    """Returns what a number outside its range must satisfy, or None for a number within it."""
    if number == math.inf:
        return "be finite"
    if number > LARGEST:
        return f"be at most {LARGEST:g}"
    return None if allowed.holds(number) else allowed.words


def to_json(config: Any) -> dict[str, Any]:
    """Returns a configuration as a JSON object, with paths as strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(config_type: type[Config], values: Any, renew: Callable[[dict[str, Any]], Any] = dict) -> Config:
    """The inverse of `to_json`. Missing fields get their defaults. Raises ConfigError for an unknown field or a value
    of the wrong type.

    Args:
        renew: translates the values of earlier versions.
    """
    try:
        return _dataclass(config_type, renew(_as_dict(values, "it")), "it")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the saved configuration does not fit this version: {error}") from None


def read_record(record_type: type[Record], values: Any) -> Record:
    """Returns a dataclass from the JSON of `dataclasses.asdict`. Raises ValueError, naming the field, unless all fields
    are there, each with the right type and in its range."""
    try:
        record = _dataclass(record_type, values, "it", complete=True)
    except TypeError as error:
        raise ValueError(str(error)) from None
    for fault in _faults(record):
        raise ValueError(fault)
    return record


WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _dataclass(kind: Any, values: Any, name: str, complete: bool = False) -> Any:
    """Raises TypeError for a value of the wrong type and, with `complete`, for a missing field."""
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
    """Converts a JSON value to the declared type of its field. Raises TypeError."""
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
    """Yields (field, saved value, requested value) for each field that differs but may not, in nested configurations,
    too."""
    for field in dataclasses.fields(saved):
        before, now = getattr(saved, field.name), getattr(asked, field.name)
        if dataclasses.is_dataclass(before):
            yield from changes(before, now)
        elif before != now and not field.metadata.get("may_change"):
            yield field.name, before, now


def check_same_run(saved: Any, asked: Any) -> None:
    """Raises ConfigError, naming the field and both values, unless `asked` can continue the run `saved`."""
    for name, before, now in changes(saved, asked):
        raise ConfigError(f"{name} cannot change when a run continues: it was {before}, got {now}; name another --out")
