"""generate in its modes: with a new head what the softmax model did, with another by the mixture."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from tiny import V, make, tokenizer, tokens
from transformers import GenerationConfig, pipeline

from fused_mos.hf import replace_head

MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.7},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "without a cache": {"use_cache": False},
}


def generate(model, **options):
    torch.manual_seed(1)
    config = GenerationConfig(max_new_tokens=20, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model.generate(tokens(1, 6), attention_mask=torch.ones(1, 6, dtype=int), generation_config=config, **options)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_head_generates_what_the_model_did(mode):
    model = make("llama").eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # logits of both signs and some size, which a repetition penalty tells from log p
    before = generate(model, **MODES[mode])
    assert before.shape[-1] == 26
    assert torch.equal(generate(replace_head(model, 3), **MODES[mode]), before)


def test_assisted_generation():
    """A mixture helped by a softmax model, and the other way round: what it generates alone."""
    mixture, softmax = replace_head(make("llama"), 3, noise=0.5).eval(), make("llama", seed=1).eval()
    for model, assistant in ((mixture, softmax), (softmax, mixture)):
        assert torch.equal(generate(model, assistant_model=assistant), generate(model))


@pytest.fixture(scope="module")
def mixture():
    return replace_head(make("gpt2"), 3, noise=0.8).eval()


def test_logits_are_log_probabilities_and_the_mean_normaliser(mixture):
    hidden = mixture.transformer(tokens()).last_hidden_state
    head = mixture.lm_head.double()
    latent, prior = head.mixture(hidden.double())
    expert = latent @ head.decoder.weight.t()
    log_prior, lse = prior.log_softmax(-1), expert.logsumexp(-1)
    log_p = (log_prior.unsqueeze(-1) + expert - lse.unsqueeze(-1)).logsumexp(-2)
    expected = log_p + (log_prior.exp() * lse).sum(-1, keepdim=True)
    logits = head(hidden.double())
    mixture.float()
    assert (logits - expected).abs().max() < 1e-12
    assert (mixture(tokens()).logits - expected).abs().max() < 1e-5
    # it is a mixture: no single softmax of these weights
    assert (expert[..., 0, :].log_softmax(-1) - log_p).abs().max() > 0.1


def test_greedy_is_the_mixtures_most_probable_class(mixture):
    sequence = generate(mixture)
    hidden = mixture.transformer(sequence[:, :-1]).last_hidden_state
    assert torch.equal(mixture.lm_head.predict(hidden)[:, 5:], sequence[:, 6:])


def test_samples_follow_the_mixtures_distribution(mixture):
    torch.manual_seed(0)
    x = tokens(1, 4)
    drawn = mixture.generate(
        x.expand(4000, -1),
        do_sample=True,
        top_k=0,
        max_new_tokens=1,
        pad_token_id=0,
        attention_mask=torch.ones(4000, 4),
    )[:, -1]
    expected = mixture.lm_head.log_prob(mixture.transformer(x).last_hidden_state[0, -1]).exp()
    frequency = torch.bincount(drawn, minlength=V) / 4000
    assert (frequency - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()


def test_a_pipeline(mixture, caplog):
    generator = pipeline("text-generation", model=mixture, tokenizer=tokenizer())
    (result,) = generator("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("w5 w6 w7") and result["generated_text"].count("w") == 7
    assert "is not supported" not in caplog.text
