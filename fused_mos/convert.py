"""Convert a checkpoint of the paper's published code to a run folder of this package.

    python -m fused_mos.convert OLD NEW [--recipe ptb|wikitext2] [--data DIR]

OLD is the published code's model.pt, written by PyTorch 0.4 or later. No code in it is run.

NEW becomes a folder that fused_mos.evaluate, fused_mos.finetune and fused_mos.generate can read.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .runtime import UserError, command, files
from .runtime.text import show
from .training.config import RECIPES, ModelConfig
from .training.errors import ConfigError

if TYPE_CHECKING:
    from .lm import AWDLSTM


@dataclasses.dataclass
class Flags:
    old: Annotated[Path, tyro.conf.Positional]
    """OLD: model.pt or finetune_model.pt of the published code."""
    new: Annotated[Path, tyro.conf.Positional]
    """NEW: folder to write, new or empty."""
    recipe: Literal["ptb", "wikitext2"] = "ptb"
    """Recipe that the model was trained with. It sets the hyperparameters of fine-tuning and dynamic evaluation."""
    data: Path | None = None
    """Folder of the corpus that the model was trained on. Its words become vocabulary.txt.
    Without it, later commands need --data."""


def convert(old: Path, new: Path, data: Path | None = None, recipe: str = "ptb") -> "AWDLSTM":
    """Writes the run folder `new` and returns its model.

    Args:
        data: the corpus that the model was trained on; its words become vocabulary.txt.
        recipe: sets the hyperparameters of fine-tuning and dynamic evaluation.

    Raises PublishedError, CorpusError, ConfigError (for a weight that is not finite, too), or ValueError if the shapes
    of the weights do not match.
    """
    from .data import Corpus
    from .lm import AWDLSTM
    from .lm.published import read_published
    from .module import MoS
    from .training.checkpoint import save_checkpoint
    from .training.finite import first_not_finite
    from .training.folder import check_name

    check_name("new", new)
    if new.exists() and (not new.is_dir() or not all(files.is_leftover(path) for path in new.iterdir())):
        raise ConfigError(f"{new} is not empty; name another folder")
    vocabulary = Corpus(data, RECIPES[recipe]().map_unknown).vocabulary if data else None
    tensors, dropouts = read_published(old)
    if name := first_not_finite(tensors):
        raise ConfigError(f"{old} cannot be used: numbers of {name} are not finite in float32")
    model = AWDLSTM.from_published(tensors, **dropouts)
    n_words, head = model.encoder.num_embeddings, model.head
    assert isinstance(head, MoS)  # the published code has no other head
    if vocabulary and len(vocabulary) != n_words:
        raise ConfigError(f"data: {data} has {len(vocabulary):,} words, and the model of {old} has {n_words:,}")
    config = dataclasses.replace(
        RECIPES[recipe](),
        model=ModelConfig(
            n_experts=head.n_experts,
            embedding_size=model.encoder.embedding_dim,
            hidden_sizes=tuple(model.widths),
            tied=head.decoder.weight is model.encoder.weight,
            **dropouts,
        ),
    )
    if data:
        config = dataclasses.replace(config, data=data.absolute())
    with files.FolderLock(new):
        meta = {"config": config.to_json(), "epoch": 0, "valid_loss": None}
        meta |= {"vocabulary": vocabulary.digest} if vocabulary else {}
        save_checkpoint(new / "best.safetensors", dict(model.named_parameters()), meta)
        if vocabulary:
            vocabulary.save(new / "vocabulary.txt")
        files.write_json(new / "config.json", config.to_json())
    return model


def work(arguments: list[str]) -> None:
    config = command.parse(Flags, "convert", __doc__, arguments)
    try:
        model = convert(config.old, config.new, config.data, config.recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    n_words, size = model.encoder.weight.shape
    n_parameters = sum(p.numel() for p in model.parameters())
    show(f"{config.new}: {n_parameters:,} parameters, {n_words:,} words, K = {model.head.n_experts}, d = {size}")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
