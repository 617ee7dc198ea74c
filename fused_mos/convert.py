"""python -m fused_mos.convert OLD NEW: a checkpoint of the paper's published code as a run folder of this package.

OLD is the published code's model.pt, a pickled module, also of PyTorch 0.4; no code in it is run. NEW becomes a folder
with best.safetensors and config.json, for `fused_mos.evaluate`, `fused_mos.finetune` and `fused_mos.generate`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .lm import AWDLSTM
from .lm.published import PublishedError, read_published
from .training import RECIPES, ConfigError, ModelConfig
from .training.checkpoint import save_checkpoint
from .training.run import write_json


def convert(old: Path, new: Path, data: Path = Path("data"), recipe: str = "ptb") -> AWDLSTM:
    """Writes the run folder `new`; `recipe` gives the numbers of fine-tuning and dynamic evaluation. Raises
    PublishedError, ConfigError, or ValueError where weights do not fit each other."""
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise ConfigError(f"{new} is not empty; name another folder")
    tensors, dropouts = read_published(old)
    model = AWDLSTM.from_published(tensors, **dropouts)
    config = dataclasses.replace(
        RECIPES[recipe](),
        data=data,
        model=ModelConfig(
            n_experts=model.head.n_experts,
            embedding_size=model.encoder.embedding_dim,
            hidden_sizes=tuple(rnn.hidden_size for rnn in model.rnns),
            tied=model.head.decoder.weight is model.encoder.weight,
            **dropouts,
        ),
    )
    new.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        new / "best.safetensors",
        dict(model.named_parameters()),
        {"config": config.to_json(), "epoch": 0, "valid_loss": None},
    )
    write_json(new / "config.json", config.to_json())
    return model


@dataclasses.dataclass
class Config:
    old: Annotated[Path, tyro.conf.Positional]
    """model.pt or finetune_model.pt of the published code."""
    new: Annotated[Path, tyro.conf.Positional]
    """The folder to write, new or empty."""
    recipe: Literal["ptb", "wikitext2"] = "ptb"
    """The paper's corpus that it was trained on, whose numbers of fine-tuning and dynamic evaluation the run takes."""
    data: Path = Path("data")
    """The corpus that it was trained on, for the commands that come after."""


def main(arguments: list[str] | None = None) -> int:
    config = tyro.cli(Config, prog="python -m fused_mos.convert", description=__doc__.splitlines()[0], args=arguments)
    try:
        model = convert(config.old, config.new, config.data, config.recipe)
    except (PublishedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    n_words, size = model.encoder.weight.shape
    print(
        f"{config.new}: {sum(p.numel() for p in model.parameters()):,} parameters, {n_words:,} words, K = "
        f"{model.head.n_experts}, d = {size}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
