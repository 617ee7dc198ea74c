"""replace_head: what the model computes afterwards, with and without logits, and what is refused."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5")

from tiny import V, float64_loss, make, tokens

import fused_mos.hf
from fused_mos.hf import LMHead, replace_head


@pytest.fixture
def model():
    return replace_head(make("gpt2"), 3, noise=0.3)


@pytest.fixture
def widest(monkeypatch):
    """Rows of the largest (…, V) that an operation of torch returns."""
    largest = [0]

    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == V:
                    largest[0] = max(largest[0], tensor.numel() // V)
            return result

    with Widest():
        yield largest


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("rank", [None, 3])
def test_it_computes_what_the_model_did(name, rank):
    model, x = make(name), tokens()
    before = model(x, labels=x)
    assert replace_head(model, 4, rank=rank) is model and model.training
    after = model(x, labels=x, skip_logits=False)
    assert (after.logits - before.logits).abs().max() < 3e-6 * before.logits.abs().max()
    assert abs(after.loss - before.loss) < 3e-6 and abs(model(x, labels=x).loss - before.loss) < 3e-6


def test_nothing_is_logged_of_a_loss_that_the_class_does_not_name(caplog, monkeypatch, tmp_path):
    """transformers warns when it takes its default loss for a class such as GPT2LMHeadModel. It warns once in a
    process, hence the cleared caches."""
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    type(logger).warning_once.cache_clear()
    make("gpt2").loss_function  # noqa: B018
    assert "loss_type" in caplog.text, "transformers no longer warns: delete name_default_loss"
    caplog.clear()
    type(logger).warning_once.cache_clear()
    model = replace_head(make("gpt2"), 3)
    model(tokens(), labels=tokens(), skip_logits=False)
    model.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(), labels=tokens())
    assert "loss_type" not in caplog.text


@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_the_prior_is_of_order_one(name):
    """On the hidden states of the model, whatever their scale: experts that are equal part by their shares."""
    model = make(name)
    with torch.no_grad():
        (model.transformer.ln_f if name == "gpt2" else model.model.norm).weight.fill_(30)
    hidden = model.base_model(tokens(8, 9)).last_hidden_state
    head = replace_head(model, 64).lm_head
    assert 20 < hidden.square().mean().sqrt() < 40 and 0.8 < head.prior(hidden).std() < 1.25


def test_the_decoder_is_the_old_head():
    for name, tied in (("gpt2", True), ("llama", False)):
        model = make(name)
        weight = model.lm_head.weight
        replace_head(model, 2)
        assert model.lm_head.decoder.weight is weight
        assert (weight is model.get_input_embeddings().weight) == tied


def test_the_fused_loss_and_its_gradients(model):
    x = tokens()
    x[0, 4] = -100
    inputs = x.clamp(min=0)
    fused = model(inputs, labels=x)
    fused.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(inputs).logits
    expected = float64_loss(logits, x)
    expected.backward()
    assert abs(fused.loss - expected) < 3e-6
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * scale + 1e-7, name
    assert all(gradients[f"lm_head.{name}"].abs().max() > 0 for name in ("latent.0.weight", "prior.weight"))


def test_training_forms_no_logits(model, widest):
    x = tokens()
    output = model(x, labels=x)
    assert "logits" not in output and output.logits is None
    output.loss.backward()
    assert widest[0] < x.numel()
    assert model(x, labels=x, return_dict=False)[0].dim() == 0
    assert len(model(x, labels=x, return_dict=False, use_cache=False)) == 1
    assert model(x, labels=x, skip_logits=False).logits.shape == (*x.shape, V) and widest[0] == x.numel()


def test_evaluation_keeps_logits(model):
    x = tokens()
    trained = model(x, labels=x).loss
    model.eval()
    output = model(x, labels=x)
    assert output.logits.shape == (*x.shape, V) and abs(output.loss - trained) < 3e-6
    assert model(x, labels=x, skip_logits=True).logits is None


def ops_of_logits(head, hidden):
    """The logits, and the ops of this package that make them."""
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "fused_mos":
                called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Ops():
        return head(hidden), called


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
def test_logits_without_gradients_take_one_op(model, backend):
    """Two products: the normalisers that log p needs are those that are added to it. For few tokens, of which some
    backends have log p in one product, it is two in all, too."""
    head = model.lm_head
    head.backend = backend
    for n in (1, 200):
        hidden = torch.randn(n, 32)
        expected, trained = ops_of_logits(head, hidden)
        with torch.no_grad():
            found, evaluated = ops_of_logits(head, hidden)
        if backend != "reference":
            assert trained == ["log_prob", "logsumexp"]
            assert evaluated in (["log_prob"], ["logsumexp"]) and (n == 1 or evaluated == ["log_prob"])
        latent, prior_logits = head.double().mixture(hidden.double())
        experts = head.decoder(latent)
        level = (prior_logits.softmax(-1) * experts.logsumexp(-1)).sum(-1)
        mixed = (experts.softmax(-1) * prior_logits.softmax(-1).unsqueeze(-1)).sum(1)
        head.float()
        for logits in (expected, found):
            assert (logits - (mixed.log() + level.unsqueeze(-1))).abs().max() < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_shifted_labels_counts_and_what_is_ignored(model, training):
    model.train(training)
    x = tokens()
    labels = x.clone()
    labels[1, 5:] = 7
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    logits = model(x).logits
    plain = model(x, labels=labels).loss
    assert abs(plain - float64_loss(logits, labels)) < 3e-6
    for arguments in ({"shift_labels": shifted}, {"labels": labels, "shift_labels": shifted}):
        assert abs(model(x, **arguments).loss - plain) < 3e-6
    for count in (5, torch.tensor(5)):
        expected = float64_loss(logits, labels, reduction="sum") / 5
        assert abs(model(x, labels=labels, num_items_in_batch=count).loss - expected) < 1e-5
    expected = float64_loss(logits, labels, ignore_index=7)
    assert abs(model(x, labels=labels, ignore_index=7).loss - expected) < 3e-6
    before = list(inspect.signature(model.forward).parameters).index("labels") - 1
    assert abs(model(x, *[None] * before, labels).loss - plain) < 3e-6  # by position


def test_logits_to_keep(model):
    x = tokens()
    model.eval()
    assert torch.allclose(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:], rtol=0, atol=1e-5)
    model.train()
    kept = model(x, labels=x[:, -3:], logits_to_keep=3).loss
    assert abs(kept - float64_loss(model(x).logits[:, -3:], x[:, -3:])) < 3e-6
    with pytest.raises(ValueError, match="target must have input's leading shape"):
        model(x, labels=x, logits_to_keep=3)


def test_label_smoothing(model):
    x = tokens()
    model.label_smoothing = 0.1
    logits = model(x).logits
    assert abs(model(x, labels=x).loss - float64_loss(logits, x, label_smoothing=0.1)) < 3e-6
    model.eval()
    assert abs(model(x, labels=x).loss - float64_loss(logits, x)) < 3e-6


def test_a_loss_of_the_users_is_kept(model):
    """Set on the model: it gets logits, also in training."""
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 3
    assert model(tokens(), labels=tokens()).loss == 3


def test_a_failed_forward_leaves_no_request(model):
    with pytest.raises(IndexError):
        model(tokens(), labels=tokens() + V)
    assert model(tokens()).logits.dim() == 3


def test_no_plan_spreads_the_head_as_a_linear_layer():
    """The plans of tensor, pipeline and data parallelism name lm_head in most models."""
    assert "lm_head" in transformers.LlamaForCausalLM._tp_plan
    kind = type(replace_head(make("llama"), 2))
    assert all("lm_head" not in (getattr(kind, plan, None) or {}) for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"))


# ----------------------------------------------------------------------------------------- what comes after the head


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_scales_and_caps_move_into_the_head(name):
    model, x = make(name), tokens()
    before, logits = model(x, labels=x).loss, model(x).logits
    replace_head(model, 2)
    assert abs(model(x, labels=x).loss - before) < 3e-6
    assert (model(x).logits - logits).abs().max() < 1e-5
    expected = {"gemma2": (1.0, 5.0), "cohere": (0.25, None), "granite": (0.25, None)}[name]
    assert (model.lm_head.scale, model.lm_head.softcap) == expected


def test_what_no_head_can_do_is_refused():
    class Odd(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**3
            return output

    model = make("gpt2")
    model.__class__ = Odd
    with pytest.raises(ValueError, match="changes its logits after lm_head"):
        fused_mos.hf.after_head.find(model.eval(), model.lm_head)


@pytest.mark.parametrize("name", ["gpt2", "cohere"])
def test_a_loss_that_is_not_of_the_loss_function_is_refused(name, monkeypatch):
    """The model is afterwards what it was."""
    kind = type(make(name))
    forward = kind.forward

    def own_loss(self, input_ids, labels=None, use_cache=None, skip_logits=None):
        output = forward(self, input_ids, labels=labels, use_cache=use_cache)
        if labels is not None:
            output.loss = output.loss * 2 if output.logits.dim() == 3 else output.loss
        return output

    monkeypatch.setattr(kind, "forward", own_loss)
    fused_mos.hf.classes.classes_of.cache_clear()
    model, x = make(name), tokens()
    config, state, loss, tied = model.config, model.state_dict(), model(x, labels=x).loss, model.all_tied_weights_keys
    with pytest.raises(ValueError, match="computes its loss of logits in a way"):
        replace_head(model, 2)
    fused_mos.hf.classes.classes_of.cache_clear()
    assert type(model) is kind and type(model.lm_head) is nn.Linear and model.config is config
    assert model.base_model.config is config and model.state_dict().keys() == state.keys()
    assert torch.equal(model(x, labels=x).loss, loss) and model.training
    assert model.all_tied_weights_keys == tied and tied.keys() == {"lm_head.weight"}


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_arguments():
    model = make("gpt2")
    for arguments, error, message in [
        ((0,), ValueError, "n_experts must be at least 1, got 0"),
        ((2.5,), TypeError, "n_experts must be an int"),
    ]:
        with pytest.raises(error, match=message):
            replace_head(model, *arguments)
    for options, message in [
        ({"rank": 33}, "rank must be at most the hidden size 32, got 33"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"noise": float("nan")}, "noise must be at least 0"),
        ({"backend": "gpu"}, "backend must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace_head(model, 2, **options)
    assert type(model) is transformers.GPT2LMHeadModel


def refused(model, error, message):
    with pytest.raises(error, match=message):
        replace_head(model, 2)


def test_models_that_cannot_have_it():
    refused(nn.Linear(3, 4), TypeError, "must be a PreTrainedModel of transformers, got Linear")
    refused(replace_head(make("gpt2"), 2), ValueError, "is a mixture already")
    refused(make("gpt2").transformer, ValueError, "has no lm_head")
    model = make("gpt2")
    model.lm_head = nn.Sequential(model.lm_head)
    refused(model, TypeError, "must be an nn.Linear, got Sequential")
    model = make("gpt2")
    model.lm_head.register_forward_hook(lambda *_: None)
    refused(model, ValueError, "must be a plain nn.Linear, but it has the hook")
    model = make("gpt2")
    model.is_quantized = True
    refused(model, ValueError, "is quantized")
    model = make("gpt2")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    refused(model, ValueError, "must be transformers' ForCausalLMLoss, got <lambda>")
    assert model.loss_type is None, "it stays as it was"
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(make("gpt2").config)
    refused(model, ValueError, "not in memory")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=V, is_decoder=True, **sizes)
    refused(transformers.BertLMHeadModel(config), ValueError, "must be an attribute of the model itself")
    double = transformers.GPT2DoubleHeadsModel(make("gpt2").config)
    refused(double, ValueError, "that AutoModelForCausalLM makes of a GPT2Config, GPT2LMHeadModel, got GPT2DoubleHeads")


def test_a_model_with_an_optimizer_is_refused():
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    refused(model, ValueError, "an optimizer has parameters")
    del optimizer
    assert isinstance(replace_head(model, 2).lm_head, LMHead)
