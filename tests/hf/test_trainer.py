"""transformers' Trainer: its loss, resumed runs, and what it does between forward and loss."""

import pytest
import torch
from torch import nn

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


def test_label_smoothing_shifts_the_labels(tmp_path):
    """Trainer does it itself, of logits; for a class whose name it does not know it would not shift the labels."""
    run = trainer(new(noise=0), tmp_path, label_smoothing_factor=0.2)
    expected = float64_loss(make("gpt2")(TEXT).logits, TEXT, label_smoothing=0.2)
    assert abs(run.compute_loss(run.model.train(), {"input_ids": TEXT, "labels": TEXT}) - expected) < 1e-5
    model = new(noise=0)
    model.label_smoothing = 0.2
    fused = trainer(model, tmp_path).compute_loss(model.train(), {"input_ids": TEXT, "labels": TEXT})
    assert abs(fused - expected) < 1e-5


def test_evaluation_has_logits_for_metrics(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"seen": 1}

    # of GPT-2, softmax or mixture, Trainer divides by the number of all labels, as if they were not shifted
    model = replace_head(make("llama"), 3, noise=0.3)
    result = trainer(model, tmp_path, compute_metrics=metrics).evaluate()
    assert seen["shape"] == (*TEXT.shape, V) and result["eval_seen"] == 1
    assert result["eval_loss"] == pytest.approx(float64_loss(model(TEXT).logits, TEXT).item(), abs=1e-4)


def test_a_trainer_made_before_the_replacement_is_refused(tmp_path):
    model = make("gpt2")
    run = trainer(model, tmp_path)
    run.create_optimizer()
    with pytest.raises(ValueError, match="an optimizer has parameters of this GPT2LMHeadModel already"):
        replace_head(model, 2)
    assert isinstance(model.lm_head, nn.Linear)
