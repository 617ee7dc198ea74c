"""Mixtures of softmaxes in Hugging Face models: `replace_head(model, n_experts)`.

    import fused_mos.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    fused_mos.hf.replace_head(model, n_experts=4)   # in place; then train, save and generate as before
    model.save_pretrained("gpt2-mos")
    model = AutoModelForCausalLM.from_pretrained("gpt2-mos")

`import fused_mos.hf` lets the Auto classes load such a folder. See docs/huggingface.md for the options and limits.

Modules: `head` is the module that replaces lm_head; `loss` describes the loss that a forward pass asks it for; `model`
and `config` extend the classes of a model and its configuration; `classes` makes those classes; `after_head` moves the
model's scaling of logits into the head; `trl` supports TRL's trainers; `replace` combines everything.
"""

from .requirement import check_transformers

check_transformers()

from .config import MoSConfig  # noqa: E402
from .head import LMHead  # noqa: E402
from .replace import replace_head  # noqa: E402

__all__ = ["LMHead", "MoSConfig", "replace_head"]
