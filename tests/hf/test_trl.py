"""TRL's fused head, which multiplies hidden states by the output embeddings itself, is answered by the mixture."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)

from tiny import make, tokens

from fused_mos.hf import replace_head

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1"), ALL], ids=len)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_its_values(noise, outputs, temperature):
    """With a new head those that TRL computes of the softmax, with another those of the mixture's distribution."""
    x = tokens()
    labels = x.clone()
    labels[0, :3] = -100
    softmax, model = make("llama"), replace_head(make("llama"), 3, noise=noise)
    logits = model(x).logits.detach()[:, :-1].double() / temperature
    for each in (softmax, model):
        utils.add_fused_lm_head(each, temperature, outputs=outputs)
    result = model(input_ids=x, labels=labels, fused_lm_head=True)
    log_p, mask = logits.log_softmax(-1), labels[:, 1:] != -100
    chosen = log_p.gather(-1, x[:, 1:, None]).squeeze(-1)
    expected = {
        "log_probs": chosen,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": log_p.argmax(-1) == x[:, 1:],
    }
    assert torch.equal(result.label_mask, mask)
    assert abs(result.loss + chosen[mask].mean()) < 1e-5
    for name in ALL:
        if name not in outputs:
            assert getattr(result, name) is None
        else:
            assert (result[name].double() - expected[name].double() * mask).abs().max() < 1e-4, name
    if noise == 0:
        of_softmax = softmax(input_ids=x, labels=labels, fused_lm_head=True)
        assert all((result[name].float() - of_softmax[name].float()).abs().max() < 1e-4 for name in outputs)
    result.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.lm_head.parameters())


def test_what_it_leaves_alone():
    x, model = tokens(), replace_head(make("llama"), 3, noise=0.5)
    before, shifted = model(x, labels=x), torch.nn.functional.pad(x, (0, 1), value=-100)[:, 1:].contiguous()
    utils.add_fused_lm_head(model)
    after = model(input_ids=x, labels=x)
    assert torch.equal(after.loss, before.loss) and after.logits is None
    assert abs(model(input_ids=x, shift_labels=shifted, fused_lm_head=True).loss - before.loss) < 1e-6
    half = model(input_ids=x, labels=x, fused_lm_head=True, num_items_in_batch=2 * 16).loss
    assert abs(2 * half - before.loss) < 1e-5
    assert model.generate(x, max_new_tokens=2, pad_token_id=0).shape == (2, 11)
