"""Mixtures of softmaxes in Hugging Face models: `replace_head(model, n_experts)`.

    import fused_mos.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    fused_mos.hf.replace_head(model, n_experts=4)   # in place; then train, save and generate as before
    model.save_pretrained("gpt2-mos")
    model = AutoModelForCausalLM.from_pretrained("gpt2-mos")

`import fused_mos.hf` is what lets the Auto classes load such a folder. docs/huggingface.md says what else there is to
know. The modules: `head` stands where lm_head stood, `loss` is what a forward pass asks it for, `model` and `config`
are what the classes of a model and of its configuration get, `classes` makes these, `after_head` deals with what a
model does to logits, `trl` answers TRL's trainers, and `replace` puts all of it together.
"""

from .requirement import check_transformers

check_transformers()

from .config import MoSConfig  # noqa: E402
from .head import LMHead  # noqa: E402
from .replace import replace_head  # noqa: E402

__all__ = ["LMHead", "MoSConfig", "replace_head"]
