"""Many architectures, without code for any of them: replaced, trained for a step, saved and loaded."""

import inspect

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from tiny import CONFIGURATIONS, float64_loss, make, tokens
from transformers import AutoModelForCausalLM

from fused_mos.hf import replace_head


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_architecture(name, tmp_path):
    model, x = make(name), tokens()
    if "self.loss_function(" not in inspect.getsource(inspect.unwrap(model.forward)):  # Mamba in transformers 5.0
        with pytest.raises(ValueError, match="computes its loss of logits in a way"):
            replace_head(model, 3)
        return
    before = model(x, labels=x)
    (head,) = replace_head(model, 3).heads()
    after = model(x, labels=x)
    assert after.logits is None and abs(after.loss - before.loss) < 3e-6
    logits = model(x).logits
    assert (logits - before.logits).abs().max() < 2e-5

    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    after.loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    optimizer.step()
    trained = model(x, labels=x).loss
    assert trained < after.loss

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert abs(loaded(x, labels=x, skip_logits=True).loss - float64_loss(loaded(x).logits, x)) < 3e-6
    assert loaded.generate(x, max_new_tokens=2, pad_token_id=0, do_sample=False).shape == (2, 11)
    for weight in ("prior.weight", "latent.0.weight", "decoder.weight"):
        assert torch.equal(loaded.heads()[0].get_parameter(weight), head.get_parameter(weight))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_of_a_mixture_of_experts(name):
    """Is added to the fused loss as to that of logits."""
    model, x = make(name, output_router_logits=True, router_aux_loss_coef=0.5), tokens()
    before = model(x, labels=x)
    after = replace_head(model, 2)(x, labels=x)
    assert before.aux_loss > 0.5 and abs(after.loss - before.loss) < 3e-6


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_folded_scale_or_cap_has_its_effect(name):
    """Not only where logits are small: against a float64 softmax of the model's own formula."""
    model, x = make(name), tokens()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    before = model(x).logits
    replace_head(model, 2)
    assert (model(x).logits - before).abs().max() < 1e-5 * before.abs().max()
    assert abs(model(x, labels=x).loss - float64_loss(before, x)) < 1e-5 * float64_loss(before, x)
