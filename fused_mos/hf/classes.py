"""Makes the classes of models with a mixture: subclasses of a base model's class and of its configuration class.

They are attributes of this module, made at first access, so pickle finds them in a new process, too.
"""

import functools
from typing import Any, NamedTuple

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from .config import ConfigWithMoS
from .head import LMHead
from .model import ModelWithMoS, forward_of

PREFIX = "MoS"


class Classes(NamedTuple):
    config: Any
    model: Any


@functools.cache
def classes_of(base_config: Any) -> Classes:
    """The classes for a base model's configuration class, registered with transformers' Auto classes. Raises ValueError
    if AutoModelForCausalLM does not know the configuration."""
    base = causal_lm_of(base_config)
    config = type(PREFIX + base_config.__name__, (ConfigWithMoS, base_config), _config_members())
    model = type(PREFIX + base.__name__, (ModelWithMoS, base), _model_members(base, config))
    for made in (config, model):
        globals()[made.__name__] = made
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    body = MODEL_MAPPING.get(base_config, None)
    if body is not None:  # AutoModel loads the base model's body, whose config_class `register` would not accept
        AutoModel._model_mapping.register(config, body, exist_ok=True)
    # for label smoothing, Trainer shifts labels only for the models named here
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"mos_{base_config.model_type}"] = model.__name__
    return Classes(config, model)


def causal_lm_of(config: Any) -> Any:
    """The model class that AutoModelForCausalLM uses for a configuration class. Raises ValueError if there is none."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
    if model is None:
        raise ValueError(f"{config.__name__} must be of a model that AutoModelForCausalLM knows")
    return model if isinstance(model, type) else model[0]


def _config_members() -> dict:
    return {"__module__": __name__, "__annotations__": {"mos": dict | None}, "mos": None}


def _model_members(base: type, config: type) -> dict:
    tied = getattr(base, "_tied_weights_keys", None) or {}
    name = _head_name(tied)
    members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with a mixture of softmaxes for its head (see fused_mos.hf).",
        "config_class": config,
        "lm_head_name": name,
        "forward": forward_of(base.forward),  # type: ignore[attr-defined]
        "_no_split_modules": [*(base._no_split_modules or []), LMHead.__name__],  # type: ignore[attr-defined]
        "_tied_weights_keys": {key.replace(f"{name}.", f"{name}.decoder.", 1): tied[key] for key in tied},
    }
    for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):  # plans to shard an nn.Linear
        if getattr(base, plan, None):
            members[plan] = {key: value for key, value in getattr(base, plan).items() if key != name}
    return members


def _head_name(tied: dict[str, str]) -> str:
    """The attribute with the output embeddings: "lm_head" except for a few models, whose tied weights tell it."""
    names = [key.removesuffix(".weight") for key in tied if key.endswith(".weight")]
    return next((name for name in names if "." not in name), "lm_head")


def __getattr__(name: str) -> type:
    """The class `name`, made at first access."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type):
        config: Any = base if issubclass(base, PreTrainedConfig) else getattr(base, "config_class", None)
        if config is not None:
            classes_of(config)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
