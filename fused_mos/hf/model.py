"""Extends the class of a base model: puts the head in place of lm_head, and passes labels to the head in forward."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.loss.loss_utils import ForCausalLMLoss

from . import trl
from .head import HeadOptions, LMHead, build
from .loss import LossRequest


def _already_a_loss(logits: Tensor, *_, **__) -> Tensor:
    """Replaces the model's loss function while the head returns the loss instead of logits."""
    return logits


def name_default_loss(model: PreTrainedModel) -> None:
    """Name the loss that transformers takes for a class such as GPT2LMHeadModel, whose name does not tell one: the same
    loss, without the warning that none is set."""
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"


if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object


class ModelWithMoS(Base):
    """Mixin that precedes the base model's class in the method resolution order.

    `post_init` sets the head before transformers ties, initialises and loads weights. For transformers' own functions,
    the output embeddings are the head's decoder: resizing the vocabulary, for example, resizes the decoder.
    """

    lm_head_name: str
    """Name of the attribute with the head, which peft may have wrapped."""
    label_smoothing = 0.0
    """Label smoothing of the training loss, as in torch's CrossEntropyLoss. Trainer's label_smoothing_factor has the
    same effect, but makes Trainer withhold the labels and ask for the logits of all tokens."""
    _warned_of_logits = False

    def heads(self) -> list[LMHead]:
        """The head, or the original and its trained copies, in this order, if peft's modules_to_save has it."""
        found = getattr(self, self.lm_head_name).modules()
        return [module for module in found if isinstance(module, LMHead)]

    def post_init(self) -> None:
        options = HeadOptions(**self.config.mos)
        setattr(self, self.lm_head_name, build(getattr(self, self.lm_head_name), options))
        name_default_loss(self)
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # compare by identity, since transformers does not call this with modules of foreign code that hold no
        # parameters
        for head in self.heads():
            if module in (own := head.own_parameters()):
                std = getattr(self.config, "initializer_range", None) or 0.02
                for parameter in own[module]:
                    initialization.normal_(parameter, 0.0, std)
                return
        super()._init_weights(module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and trl.is_fused_head(value):
            value = trl.by_the_mixture(value)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------- output embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        heads = self.heads()
        return heads[-1].decoder if heads else super().get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if not isinstance(new_embeddings, nn.Linear):
            raise TypeError(
                "the output embeddings of a model with a mixture are its decoder and must be an nn.Linear, got "
                f"{type(new_embeddings).__name__}"
            )
        for head in self.heads():
            head.decoder = new_embeddings
            head.n_classes = new_embeddings.out_features

    def resize_token_embeddings(self, *arguments, **options):
        embeddings = super().resize_token_embeddings(*arguments, **options)
        for head in self.heads():  # transformers 5.0 ties a new weight without calling the setter
            head.n_classes = head.decoder.out_features = head.decoder.weight.shape[0]
        return embeddings


def forward_of(base: Callable) -> Callable:
    """Wrap a base model's forward to let the head compute the loss without logits, where possible."""
    names = list(inspect.signature(base).parameters)[1:]

    @functools.wraps(base)  # Trainer and generate read its signature
    def forward(self, *arguments, skip_logits: bool | None = None, **named):
        named = dict(zip(names, arguments)) | named
        if named.get("labels") is None and named.get("shift_labels") is not None:
            named["labels"] = named["shift_labels"]  # a base model computes a loss only with labels
        if skip_logits is None:
            skip_logits = self.training
        if named.get("labels") is None or not skip_logits or self.loss_function is not ForCausalLMLoss:
            output = base(self, **named)
            if named.get("labels") is None and skip_logits and not named.get("logits_to_keep"):
                _warn_of_logits(self, output[0])
            return output
        heads = self.heads()
        request = LossRequest.of(named, self.label_smoothing)
        for head in heads:
            head.request = request
        self.loss_function = _already_a_loss
        try:
            return _without_logits(base(self, **named))
        finally:
            self.loss_function = ForCausalLMLoss
            for head in heads:
                head.request = None

    return forward


def _warn_of_logits(model: ModelWithMoS, logits: Tensor) -> None:
    """Warn once per model of logits in training, which a fused loss should avoid; Trainer asks for them silently."""
    if torch.compiler.is_compiling() or model._warned_of_logits or not logits.requires_grad:
        return
    model._warned_of_logits = True
    n_classes = logits.shape[-1]
    warnings.warn(
        f"in training and without labels this model makes the logits of all tokens, {logits.numel() // n_classes} × "
        f"{n_classes} numbers or {logits.nbytes / 1e6:.1f} MB here, and again for their gradient; with labels=... it "
        "computes its loss without them. Trainer's label_smoothing_factor needs them: set model.label_smoothing "
        "instead. Pass skip_logits=False if you want the logits",
        stacklevel=5,
    )


def _without_logits(output: Any) -> Any:
    """The same output with logits removed. Until now their entry held the loss."""
    if isinstance(output, tuple):
        return output[:1] + output[2:]
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})
