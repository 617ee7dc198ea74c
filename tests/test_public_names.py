"""The public interface: names, parameters and defaults. A change here affects users, so it needs a new version and a
line in the changelog."""

import inspect

import fused_mos
from fused_mos import functional, vocab_parallel

TENSORS = "latent, prior_logits, weight, bias=None, *"
TARGETS = "latent, prior_logits, weight, target, bias=None, *, ignore_index=-100"
OPTIONS = (
    "class_weight=None, token_weight=None, label_smoothing=0.0, z_loss=0.0, target_prob=None, extra_log_prob=None, "
    "return_lse=False"
)
LOSS = f"ignore_index=-100, reduction='mean', backend='auto', grad_filter_eps=0.0, softcap=None, {OPTIONS}"

FUNCTIONS = {
    "linear_cross_entropy": "(input, linear_weight, target, *, linear_bias=None, weight=None, reduction='mean', "
    "ignore_index=None, label_smoothing=0.0, options=None, softcap=None, z_loss=0.0, return_lse=False, backend='auto')",
    "mos_expert_log_prob": "(latent, weight, target, bias=None, *, ignore_index=-100, softcap=None, backend='auto')",
    "mos_log_prob": f"({TENSORS}, softcap=None, backend='auto')",
    "mos_log_prob_at": "(latent, prior_logits, weight, index, bias=None, *, ignore_index=-100, temperature=1.0, "
    "mixture_temperature=1.0, softcap=None, backend='auto')",
    "mos_logsumexp": "(latent, weight, bias=None, *, softcap=None, backend='auto')",
    "mos_nll_loss": f"(latent, prior_logits, weight, target, bias=None, *, {LOSS})",
    "mos_predict": f"({TENSORS}, softcap=None, backend='auto')",
    "mos_sample": f"({TENSORS}, temperature=1.0, mixture_temperature=1.0, top_k=None, top_p=None, softcap=None, "
    "generator=None, backend='auto')",
    "mos_score": f"({TARGETS}, softcap=None, backend='auto')",
    "mos_topk": f"({TENSORS}, k, softcap=None, backend='auto')",
}
SHARD = {
    "as_dtensor": "(self, rows, mesh)",
    "embedding": "(self, tokens, weight, padding_idx=None)",
    "nll_and_loss": f"(self, latent, prior_logits, weight, target, bias, *, {LOSS})",
    "rows": "(self, whole)",
} | {
    name: FUNCTIONS[name].replace("(", "(self, ")
    for name in FUNCTIONS
    if name.startswith("mos_") and name not in ("mos_nll_loss", "mos_logsumexp")
}
MIXTURE = (
    "(in_features, n_classes, n_experts=10, latent_features=None, bias=True, latent_dropout=0.0, weight=None, "
    "backend='auto', device=None, dtype=None, softcap=None, n_external=0, latent='tanh', "
    "latent_norm=False, rank=None)"
)
HEADS = {
    "MoC": MIXTURE,
    "MoS": MIXTURE,
    "Softmax": "(in_features, n_classes, bias=True, weight=None, backend='auto', device=None, dtype=None, "
    "softcap=None)",
}
METHODS = {
    "forward": "(self, input, target, *, ignore_index=-100, reduction='mean', grad_filter_eps=0.0, " + OPTIONS + ")",
    "init_bias": "(self, counts)",
    "log_prob": "(self, input)",
    "log_prob_at": "(self, input, index, *, ignore_index=-100, temperature=1.0, mixture_temperature=1.0)",
    "mixture": "(self, input)",
    "predict": "(self, input)",
    "reset_parameters": "(self)",
    "sample": "(self, input, temperature=1.0, generator=None, *, mixture_temperature=1.0, top_k=None, top_p=None)",
    "score": "(self, input, target, *, ignore_index=-100)",
    "tie": "(self, weight)",
    "topk": "(self, input, k)",
}
OF_MIXTURES = {
    "from_linear": "(linear, n_experts, *, rank=None, noise=0.0, input_rms=1.0, backend='auto', softcap=None)",
    "grow": "(self, m, *, noise=0.0, input_rms=1.0)",
}
LINEAR = (
    "(in_features, num_classes, *, bias=False, device=None, dtype=None, reduction='mean', weight=None, "
    "ignore_index=None, label_smoothing=0.0, options=None, softcap=None, z_loss=0.0, backend='auto')"
)


def signature(function) -> str:
    """The signature without annotations."""
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def signatures(owner, names) -> dict[str, str]:
    return {name: signature(getattr(owner, name)) for name in names}


def test_the_package():
    assert fused_mos.__all__ == ["LinearCrossEntropyLoss", "MoC", "MoS", "Softmax", "backends", "functional"]
    assert signature(fused_mos.LinearCrossEntropyLoss) == LINEAR
    assert signature(fused_mos.backends) == "()"
    assert list(fused_mos.backends()) == ["reference", "tiled", "cpu", "triton", "cuda"]


def test_functional():
    assert functional.__all__ == ["REDUCTIONS", "ExpertLogProb", "Score", "TopK", *FUNCTIONS]
    assert signatures(functional, FUNCTIONS) == FUNCTIONS
    assert functional.REDUCTIONS == ("mean", "sum", "none") and functional.TopK._fields == ("values", "indices")
    assert functional.Score._fields == ("log_prob", "entropy", "is_top1")
    assert functional.ExpertLogProb._fields == ("log_prob", "lse")


def test_heads():
    assert signatures(fused_mos, HEADS) == HEADS
    for name in HEADS:
        head = getattr(fused_mos, name)
        methods = METHODS if name == "Softmax" else METHODS | OF_MIXTURES
        own = {n for c in head.__mro__ if c.__module__.startswith("fused_mos") for n in vars(c) if n[0] != "_"}
        assert {n for n in own if inspect.isroutine(getattr(head, n))} - {"extra_repr"} == set(methods)
        assert signatures(head, methods) == methods


def test_vocab_parallel():
    assert signature(vocab_parallel.parallelize) == "(model, group=None)"
    assert signature(vocab_parallel.VocabShard) == "(n_classes, group=None)"
    assert signatures(vocab_parallel.VocabShard, SHARD) == SHARD
    assert signature(vocab_parallel.VocabParallelEmbedding) == "(shard, weight, padding_idx=None)"
