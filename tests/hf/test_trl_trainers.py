"""A few steps of TRL's own trainers: they score and train the mixture, not one softmax of its decoder."""

import functools
import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL's trainers take tables of datasets")
if not hasattr(pytest.importorskip("trl.trainer.utils"), "add_fused_lm_head"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)

from tiny import make, tokenizer, tokens
from transformers import AutoModelForCausalLM

from fused_mos.hf import replace_head

PROMPTS = ["w3 w4 w5", "w6 w7", "w8 w9 w10 w11", "w12"]
STEPS = 3
TOKENS = tokens(4, 9)


def saved_mixture(folder):
    """A model whose configuration names its folder, from which trainers load their reference model."""
    replace_head(make("llama"), 3, noise=0.3).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def run(trainer, config, model, folder, rows, *, configuration=None, **named):
    args = config(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=1,
        **(configuration or {}),
    )
    return trainer(model, args=args, train_dataset=rows, processing_class=tokenizer(), **named)


def table(**columns):
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="of tests")


def sft(model, folder):
    configuration = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    # the first label, which has no prediction, is none: some Trainers count labels before they are shifted
    labels = torch.nn.functional.pad(TOKENS[:, 1:], (1, 0), value=-100)
    rows = table(input_ids=TOKENS.tolist(), labels=labels.tolist())
    return run(trl.SFTTrainer, trl.SFTConfig, model, folder, rows, configuration=configuration)


def dpo(model, folder):
    rows = table(prompt=PROMPTS, chosen=[" w20 w21"] * 4, rejected=[" w30 w31 w32", " w33", " w34", " w35 w36"])
    # as an iterable it is tokenised on the way, without a cache on disk
    return run(trl.DPOTrainer, trl.DPOConfig, model, folder, rows.to_iterable_dataset())


def grpo(model, folder, **configuration):
    return by_reward(trl.GRPOTrainer, trl.GRPOConfig, model, folder, {"num_generations": 4, **configuration})


def rloo(model, folder):
    return by_reward(trl.RLOOTrainer, trl.RLOOConfig, model, folder, {"num_generations": 2})


def by_reward(trainer, config, model, folder, configuration):
    def prefer_small_words(completions, **_):
        return [-sum(int(word[1:]) for word in text.split()) / 100 for text in completions]

    configuration = {"max_completion_length": 6, **configuration}
    rows = table(prompt=PROMPTS)
    return run(trainer, config, model, folder, rows, configuration=configuration, reward_funcs=prefer_small_words)


def watch(model, temperature):
    """Compares each log-probability of the fused head with the model's logits from now on. Returns a list that gets
    each call's largest distance to the log-probabilities of a single softmax."""
    answer, distances = model.forward, []

    @functools.wraps(answer)
    def forward(*arguments, fused_lm_head=False, labels=None, **named):
        output = answer(*arguments, fused_lm_head=fused_lm_head, labels=labels, **named)
        if fused_lm_head:
            seen = {name: named[name] for name in ("input_ids", "attention_mask") if name in named}
            mask = labels[:, 1:] != -100
            target = labels[:, 1:].clamp(min=0).unsqueeze(-1)
            with torch.no_grad():
                mixture = answer(*arguments, **seen).logits[:, :-1]
                softmax = model.get_output_embeddings()(model.base_model(*arguments, **seen).last_hidden_state[:, :-1])
            expected, of_softmax = (
                (logits.double() / temperature).log_softmax(-1).gather(-1, target).squeeze(-1)[mask]
                for logits in (mixture, softmax)
            )
            found = output.log_probs.detach()[mask]
            assert (found - expected).abs().max() < 1e-4
            distances.append((found - of_softmax).abs().max().item())
        return output

    model.forward = forward
    return distances


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINERS = {
    "sft": sft,
    "dpo": dpo,
    "grpo": grpo,
    "grpo-with-a-reference": functools.partial(grpo, beta=0.1),
    "grpo-at-a-temperature": functools.partial(grpo, temperature=0.7),
    "rloo": rloo,
}


@pytest.mark.parametrize("make_trainer", TRAINERS.values(), ids=TRAINERS)
def test_it_trains_the_mixture(tmp_path, make_trainer):
    model = saved_mixture(tmp_path / "model")
    before = {name: parameter.detach().clone() for name, parameter in model.lm_head.named_parameters()}
    trainer = make_trainer(model, tmp_path / "run")
    distances = watch(model, getattr(trainer, "temperature", 1.0))
    trainer.train()
    assert len(losses(trainer)) == STEPS and all(map(math.isfinite, losses(trainer)))
    assert len(distances) >= STEPS and min(distances) > 1e-2
    assert not [name for name, parameter in model.lm_head.named_parameters() if torch.equal(parameter, before[name])]


def test_the_loss_of_sft_is_the_models(tmp_path):
    model = saved_mixture(tmp_path / "model")
    expected = model(TOKENS, labels=TOKENS).loss.item()
    trainer = sft(model, tmp_path / "run")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-4) and losses(trainer)[-1] < losses(trainer)[0]


def test_the_reference_of_dpo_is_a_mixture(tmp_path):
    """The same one at first, so that the loss begins at log 2."""
    trainer = dpo(saved_mixture(tmp_path / "model"), tmp_path / "run")
    assert type(trainer.ref_model) is type(trainer.model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5) and losses(trainer)[-1] < losses(trainer)[0]
