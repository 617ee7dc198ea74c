"""Tiny causal language models of many architectures, made of their configurations."""

import warnings

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

V = 97
COMMON = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGURATIONS = {
    "gpt2": ("GPT2Config", {**COMMON, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", LLAMA),
    "llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA),
    "gemma2": ("Gemma2Config", {**LLAMA, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "final_logit_softcapping": None, "query_pre_attn_scalar": 8}),
    "opt": (
        "OPTConfig",
        {**COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 16},
    ),
    "cohere": ("CohereConfig", {**LLAMA, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**LLAMA, "logits_scaling": 4.0}),
    "mixtral": ("MixtralConfig", MOE),
    "qwen3_moe": ("Qwen3MoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "mamba": (
        "MambaConfig",
        {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_mambapy": False},
    ),
}


def make(name: str, seed: int = 0, **changes):
    """A model with weights large enough that distributions are not flat, without dropout, in training mode."""
    kind, options = CONFIGURATIONS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**options, **changes})
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.2)
    return model.train()


def tokens(*shape: int, seed: int = 0):
    return torch.randint(3, V, shape or (2, 9), generator=torch.Generator().manual_seed(seed))


def float64_loss(logits, labels, ignore_index: int = -100, **options):
    """The loss of the next token by the definition."""
    labels = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].double().reshape(labels.numel(), -1)
    return torch.nn.functional.cross_entropy(flat, labels, ignore_index=ignore_index, **options)


def tokenizer():
    """Of the words w0, w1, …"""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
