"""transformers' Trainer: its loss, resumed runs, and what it does between forward and loss."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")  # Trainer's

from tiny import V, float64_loss, make, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fused_mos.hf import LMHead, replace_head

TEXT = tokens(16, 9)


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "logging_steps": 1}
        | {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 5}
        | {name: value for name, value in options.items() if name != "compute_metrics"},
    )
    examples = [{"input_ids": row, "labels": row} for row in TEXT]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=options.get("compute_metrics"),
    )


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def new(noise=0.3):
    return replace_head(make("gpt2"), 3, noise=noise)


@pytest.fixture
def unfused(monkeypatch):
    """After it was called, models compute their loss of logits."""
    return lambda: monkeypatch.setattr("fused_mos.hf.model.ForCausalLMLoss", None)


def test_it_trains_all_of_the_head_and_forms_no_logits(tmp_path, monkeypatch):
    model = new()
    monkeypatch.setattr(LMHead, "logits", lambda *_: pytest.fail("logits were formed"))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    trained = trainer(model, tmp_path, max_steps=12)
    trained.train()
    assert losses(trained)[-1] < losses(trained)[0] - 0.5
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"lm_head.latent.0.weight", "lm_head.prior.weight", "transformer.wte.weight"} <= moved


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_its_losses_are_those_of_logits(tmp_path, options, unfused):
    """Step by step, so the gradients are too."""
    fused = trainer(new(), tmp_path / "fused", **options)
    fused.train()
    unfused()
    plain = trainer(new(), tmp_path / "plain", **options)
    plain.train()
    assert len(losses(fused)) == 4
    assert losses(fused) == pytest.approx(losses(plain), abs=2e-2 if "bf16" in options else 1e-4)
    assert losses(fused)[0] > losses(fused)[-1]


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """Also where they have different numbers of labels."""
    labels = TEXT.clone()
    labels[::2, 3:] = -100
    found = []
    for options in ({}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}):
        run = trainer(new(), tmp_path, **options)
        run.train_dataset = [{"input_ids": x, "labels": y} for x, y in zip(TEXT, labels)]
        run.train()
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(new(), tmp_path, **options)
    whole.train()
    resumed = trainer(new(noise=0.1), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    assert torch.equal(loaded(TEXT).logits, whole.model.eval()(TEXT).logits)


def smoothed(noise, **options):
    """A model of a large vocabulary, and a function for the loss of TEXT that a Trainer computes in training."""
    model = replace_head(make("gpt2", vocab_size=2000), 3, noise=noise)
    model.label_smoothing = options.pop("label_smoothing", 0.0)
    run = trainer(model, **options)
    return model, lambda: run.compute_loss(model.train(), {"input_ids": TEXT, "labels": TEXT})


def test_label_smoothing_shifts_the_labels(tmp_path):
    """Trainer does it itself, of logits; for a class whose name it does not know it would not shift the labels."""
    _, by_trainer = smoothed(0.0, folder=tmp_path, label_smoothing_factor=0.2)
    _, by_the_head = smoothed(0.0, folder=tmp_path, label_smoothing=0.2)
    expected = float64_loss(make("gpt2", vocab_size=2000)(TEXT).logits, TEXT, label_smoothing=0.2)
    assert abs(by_trainer() - expected) < 1e-5
    assert abs(by_the_head() - expected) < 1e-5


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("by", ["head", "trainer"])
def test_label_smoothing_by_the_head_forms_no_logits(tmp_path, by):
    options = {"label_smoothing": 0.2} if by == "head" else {"label_smoothing_factor": 0.2}
    model, loss = smoothed(0.3, folder=tmp_path, **options)
    with warnings.catch_warnings(record=True) as caught, Largest() as largest:
        warnings.simplefilter("always")
        for _ in range(2):
            loss().backward()
    told = [str(warning.message) for warning in caught if "model.label_smoothing" in str(warning.message)]
    n_tokens = TEXT.numel() - len(TEXT)  # shifted
    assert (largest.elements < n_tokens * 2000) == (by == "head")
    assert len(told) == (by == "trainer")
    assert all(parameter.grad.abs().max() > 0 for parameter in model.lm_head.parameters())


def test_the_warning_of_logits_is_for_training_without_labels(tmp_path):
    model = new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TEXT, labels=TEXT).loss.backward()
        model(TEXT, skip_logits=False)
        model(TEXT, logits_to_keep=1)
        with torch.no_grad():
            model(TEXT)
        model.eval()(TEXT)
    with pytest.warns(UserWarning, match=r"logits of all tokens, 144 × 97 numbers or 0.1 MB"):
        model.train()(TEXT)


def test_evaluation_has_logits_for_metrics(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"seen": 1}

    model = new()
    run = trainer(model, tmp_path, compute_metrics=metrics)
    labels = TEXT.clone()
    labels[:, 0] = -100  # some Trainers divide by the number of labels before they are shifted
    run.eval_dataset = [{"input_ids": x, "labels": y} for x, y in zip(TEXT, labels)]
    result = run.evaluate()
    assert seen["shape"] == (*TEXT.shape, V) and result["eval_seen"] == 1
    assert result["eval_loss"] == pytest.approx(float64_loss(model(TEXT).logits, TEXT).item(), abs=1e-4)


def test_a_trainer_made_before_the_replacement_is_refused(tmp_path):
    model = make("gpt2")
    run = trainer(model, tmp_path)
    run.create_optimizer()
    with pytest.raises(ValueError, match="an optimizer has parameters of this GPT2LMHeadModel already"):
        replace_head(model, 2)
    assert isinstance(model.lm_head, nn.Linear)
