"""Models that accelerate spreads over devices and disks."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
accelerate = pytest.importorskip("accelerate")

from tiny import make, tokens
from transformers import AutoModelForCausalLM

from fused_mos.hf import replace_head

ON_CPU = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
BODY_ON_DISK = {"model.layers": "disk"} | dict.fromkeys(ON_CPU, "cpu")
HEAD_ON_DISK = {"model": "cpu", "lm_head": "disk"}


@pytest.fixture
def load(tmp_path):
    def load(model, device_map):
        model.save_pretrained(tmp_path / "saved")
        options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options).eval()

    return load


def test_a_head_on_a_device(load):
    model, x = replace_head(make("llama"), 3, noise=0.3).eval(), tokens()
    spread = load(model, BODY_ON_DISK)
    assert spread.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(spread(x).logits, model(x).logits)
    assert torch.equal(spread(x, labels=x, skip_logits=True).loss, model(x, labels=x, skip_logits=True).loss)


def test_a_head_is_not_split(load):
    """Where it does not fit on a device, all of it goes to the next."""
    model = load(replace_head(make("llama"), 3), None)
    room = {"cpu": sum(parameter.nbytes for parameter in model.parameters()) - 100}
    spread = accelerate.infer_auto_device_map(model, room, no_split_module_classes=list(model._no_split_modules))
    assert {name: where for name, where in spread.items() if name.startswith("lm_head")} == {"lm_head": "disk"}


def test_a_head_on_disk_is_refused(load):
    model = load(replace_head(make("llama"), 3), HEAD_ON_DISK)
    with pytest.raises(RuntimeError, match="the decoder of this head is offloaded.* keeps lm_head"):
        model(tokens())


def test_no_head_is_replaced_in_a_model_that_is_spread(load):
    with pytest.raises(ValueError, match="a device_map spreads this LlamaForCausalLM over devices"):
        replace_head(load(make("llama"), BODY_ON_DISK), 2)
    with pytest.raises(ValueError, match="not in memory: it is offloaded"):
        replace_head(load(make("llama"), HEAD_ON_DISK), 2)
