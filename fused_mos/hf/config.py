"""The configuration of a model with a mixture, and the Python file saved with its config.json.

In memory it has the base model's model_type: transformers converts weights by it (a mixture-of-experts model would
otherwise load random weights), and peft finds its defaults. On disk the model_type is "fused_mos", which belongs to no
other class, and the base model's is a separate entry.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "fused_mos"
STUB = Path(__file__).parent / "configuration_fused_mos.py"
"""Saved with config.json. If fused_mos.hf is not imported, transformers asks for permission to run it. It then loads
the model or names the package to install."""


if TYPE_CHECKING:
    Base = PreTrainedConfig
else:
    Base = object


class ConfigWithMoS(Base):
    """Mixed into the class of a base model's configuration."""

    mos: dict[str, Any] | None = None
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """TRL reads this from every class that is not transformers' own."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        on_disk_alone = ("model_type", "base_model_type", "auto_map")
        config_dict = {key: value for key, value in config_dict.items() if key not in on_disk_alone}
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries to save."""
        return {
            **super().to_diff_dict(),
            "model_type": MODEL_TYPE,
            "base_model_type": type(self).model_type,
            "auto_map": {"AutoConfig": f"{STUB.stem}.{MoSConfig.__name__}"},
        }

    def save_pretrained(self, save_directory, *arguments, **options):
        super().save_pretrained(save_directory, *arguments, **options)
        shutil.copyfile(STUB, Path(save_directory) / STUB.name)


class MoSConfig(PreTrainedConfig):
    """AutoConfig's class for "fused_mos". It makes the configuration of the base model that a file names."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        from .classes import classes_of

        base = config_dict.get("base_model_type")
        if base is None or not config_dict.get("mos"):
            raise ValueError(f"a configuration of model_type {MODEL_TYPE} must have base_model_type and mos")
        if base not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type must be one that this transformers knows, got {base!r}; upgrade it")
        return classes_of(CONFIG_MAPPING[base]).config.from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, MoSConfig, exist_ok=True)
