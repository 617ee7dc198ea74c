"""What a run keeps as JSON, with values of another type or out of their range under a right digest: one line on stderr
and exit status 2, whatever field it is."""

import json
import math
from typing import get_args

import pytest
from runs import refused

from fused_mos import evaluate, finetune, generate
from fused_mos.training import settings
from fused_mos.training.config import MOST_LAYERS, ConfigError, HeadName, Precision, TrainConfig
from fused_mos.training.lm1b.config import LM1BConfig

VALUES = ["x", None, True, 3, -3, 1.5, math.nan, 10**400, [], ["x"], [1.5], [None], [[3]], [True], {}, {"a": 1}]
"""Of every type that JSON has."""


def fields_of(values):
    """(names that lead to it, value) of each field, also of nested configurations."""
    for name, value in values.items():
        yield (name,), value
        if isinstance(value, dict):
            yield from (((name, *inner), each) for inner, each in fields_of(value))


def with_field(values, names, value):
    name, *inner = names
    return values | {name: with_field(values[name], inner, value) if inner else value}


def is_of_its_type(names, default, value):
    """What may be let in: by the default's type, where the names do not say more."""
    if names[-1] in ("out", "resume", "start"):
        return value is None or isinstance(value, str)
    if isinstance(default, tuple):
        return isinstance(value, list) and value != [] and all(type(item) is int for item in value)
    choices = {"head": get_args(HeadName), "precision": get_args(Precision)}
    choices |= {"optimizer": ("sgd", "adagrad", "adam"), "decay": ("none", "linear", "cosine")}
    if names[-1] in choices:
        return value in choices[names[-1]]
    if type(default) is float:
        return type(value) in (int, float) and abs(value) <= settings.LARGEST
    return type(value) is type(default)


@pytest.mark.parametrize("kind", [TrainConfig, LM1BConfig])
def test_every_field_of_a_configuration_takes_its_type_alone(kind):
    values = kind().to_json()
    refusals = 0
    for names, default in fields_of(values):
        for value in VALUES:
            try:
                kind.from_json(with_field(values, names, value)).check()
            except ConfigError:
                refusals += 1
            else:
                assert isinstance(default, dict) or is_of_its_type(names, default, value), (names, value)
    assert refusals > 10 * len(list(fields_of(values)))
    for value in VALUES:
        if value != {}:  # which has the defaults
            with pytest.raises(ConfigError, match="does not fit this version"):
                kind.from_json(value)


def test_a_configuration_of_an_earlier_version_with_wrong_values():
    for values in ({"optim": {"small_batch_size": "x", "batch_size": 4}}, {"optim": {"small_batch_size": 2}}):
        with pytest.raises(ConfigError, match="does not fit this version"):
            TrainConfig.from_json(values)


@pytest.mark.trains
def test_a_damaged_configuration_of_a_run(finished_run, capsys):
    run = finished_run(1)
    path = run / "config.json"
    config = json.loads(path.read_text())
    for sizes, message in (
        (["x"], "each of hidden_sizes must be a whole number, got 'x'"),
        ("abc", "hidden_sizes must be a list, got 'abc'"),
        ([1.5], "each of hidden_sizes must be a whole number, got 1.5"),
        ([1] * (MOST_LAYERS + 1), f"hidden_sizes must be at most {MOST_LAYERS} widths"),
    ):
        path.write_text(json.dumps(with_field(config, ("model", "hidden_sizes"), sizes)))
        for command in (evaluate, generate, finetune):
            refused(command, [run], capsys, message)
