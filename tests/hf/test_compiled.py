"""torch.compile of a model with a mixture: one graph, the same numbers."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from tiny import make, tokens

from fused_mos.hf import replace_head

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_graph(name):
    model, x = replace_head(make(name), 3, noise=0.3), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for labels in (x, x.flip(0)):
        expected, result = model(x, labels=labels), compiled(x, labels=labels)
        assert result.logits is None and torch.allclose(result.loss, expected.loss, rtol=0, atol=1e-6)
    result.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.lm_head.parameters()]
    model.zero_grad()
    expected.loss.backward()
    for ours, parameter in zip(gradients, model.lm_head.parameters()):
        assert torch.allclose(ours, parameter.grad, rtol=0, atol=1e-6)
    model.eval()
    assert torch.allclose(compiled(x).logits, model(x).logits, rtol=0, atol=1e-5)
