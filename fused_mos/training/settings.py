"""Configurations as frozen dataclasses: ranges beside the fields, JSON, and what may change when a run goes on.

    lr: float = setting(20.0, POSITIVE)
    epochs: int = setting(1, POSITIVE, may_change=True)

A field whose type is a Literal takes its values alone. `check` looks at all of that, `changes` at what may change.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError

Config = TypeVar("Config")


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


def setting(default: Any, allowed: Range | None = None, *, may_change: bool = False) -> Any:
    """A field of a dataclass: its default, the range of its values, and whether a run may go on with another value."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "may_change": may_change})


def check(config: Any) -> None:
    """Raises ConfigError for a value, also of a nested configuration, that is out of its field's range, or none of its
    Literal's."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata.get("allowed")
        if dataclasses.is_dataclass(value):
            check(value)
        elif get_origin(hints[field.name]) is Literal and value not in (choices := get_args(hints[field.name])):
            raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        elif not allowed or value is None:
            continue
        elif value == math.inf:
            raise ConfigError(f"{field.name} must be finite, got {value}")
        elif value > LARGEST:
            raise ConfigError(f"{field.name} must be at most {LARGEST:g}, got {value}")
        elif not allowed.holds(value):
            raise ConfigError(f"{field.name} must {allowed.words}, got {value}")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: paths are strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_json`. A field that is missing has its default. Raises ConfigError for a field that this
    version does not know."""
    try:
        return _from_json(config_type, values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the saved configuration does not fit this version: {error}") from None


def _from_json(config_type: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(config_type)
    converted = {}
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint):
            value = _from_json(hint, value)
        elif hint in (bool, int, float, str) and type(value) not in (hint, int if hint is float else hint):
            raise TypeError(f"{name} must be a {hint.__name__}, got {value!r}")
        elif value is not None and Path in (hint, *get_args(hint)):
            value = Path(value)
        elif get_origin(hint) is tuple:
            value = tuple(value)
        converted[name] = value
    return config_type(**converted)


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
        raise ConfigError(f"{name} cannot change when a run goes on: it was {before}, got {now}; name another --out")
