"""LoRA beside a mixture, and with it."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make, tokens
from transformers import AutoModelForCausalLM

from fused_mos.hf import replace_head

TRAINED_OF_THE_HEAD = {
    "the defaults": ({}, set()),
    "all linear layers": ({"target_modules": "all-linear"}, {"prior", "latent.0"}),
    "the whole head": ({"modules_to_save": ["lm_head"]}, {"prior", "latent.0", "decoder"}),
}


def step(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("case", TRAINED_OF_THE_HEAD)
def test_lora(tmp_path, case):
    """Trains, forms no logits, and is what it was after it was saved and loaded."""
    options, expected = TRAINED_OF_THE_HEAD[case]
    replace_head(make("llama"), 3, noise=0.3).save_pretrained(tmp_path / "base")
    base, x = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokens()
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).train()
    assert model(input_ids=x, labels=x).logits is None
    losses = [step(model, x) for _ in range(4)]
    assert losses[-1] < losses[0]
    trained = [name for name, p in model.named_parameters() if p.grad is not None and "lm_head" in name]
    assert {
        part for part in ("prior", "latent.0", "decoder") if any(f".{part}." in name for name in trained)
    } == expected
    assert model.get_base_model().get_output_embeddings().weight.requires_grad == ("decoder" in expected)
    output = model.eval()(input_ids=x, labels=x)
    assert output.logits.dim() == 3 and output.loss < losses[-1]
    model.generate(input_ids=x, max_new_tokens=2, pad_token_id=0)

    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=x).logits, output.logits)
    merged = loaded.merge_and_unload()
    assert (merged(x).logits - output.logits).abs().max() < 1e-4
    assert abs(merged(x, labels=x, skip_logits=True).loss - output.loss) < 1e-5


def test_an_adapter_on_the_decoder_is_refused():
    """It is never called, so an adapter there would be left out in silence."""
    model = get_peft_model(replace_head(make("llama"), 3), LoraConfig(target_modules=["decoder"]))
    with pytest.raises(TypeError, match=r"merge an adapter .* or train the decoder itself \(modules_to_save\)"):
        model(input_ids=tokens(), labels=tokens())


def test_a_model_with_adapters_is_refused():
    model = get_peft_model(make("llama"), LoraConfig(r=2))
    with pytest.raises(TypeError, match="replace the head before peft"):
        replace_head(model, 2)
