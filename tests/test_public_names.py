"""The public interface: names, parameters and defaults. A change here is a change for users, so it needs a new version
and a line in their notes."""

import inspect

import fused_mos
from fused_mos import functional, vocab_parallel

TENSORS = "latent, prior_logits, weight, bias=None, *"
SAMPLE = f"({TENSORS}, temperature=1.0, generator=None, backend='auto')"
LOSS = "*, ignore_index=-100, reduction='mean', backend='auto', grad_filter_eps=0.0"

FUNCTIONS = {
    "mos_log_prob": f"({TENSORS}, backend='auto')",
    "mos_logsumexp": "(latent, weight, bias=None, *, backend='auto')",
    "mos_nll_loss": f"(latent, prior_logits, weight, target, bias=None, {LOSS})",
    "mos_predict": f"({TENSORS}, backend='auto')",
    "mos_sample": SAMPLE,
    "mos_topk": f"({TENSORS}, k, backend='auto')",
}
SHARD = {
    "as_dtensor": "(self, rows, mesh)",
    "embedding": "(self, tokens, weight, padding_idx=None)",
    "nll_and_loss": f"(self, latent, prior_logits, weight, target, bias, {LOSS})",
    "rows": "(self, whole)",
} | {
    name: FUNCTIONS[name].replace("(", "(self, ") for name in ("mos_log_prob", "mos_predict", "mos_sample", "mos_topk")
}
MIXTURE = (
    "(in_features, n_classes, n_experts=10, latent_features=None, bias=True, latent_dropout=0.0, weight=None, "
    "backend='auto', device=None, dtype=None)"
)
HEADS = {
    "MoC": MIXTURE,
    "MoS": MIXTURE,
    "Softmax": "(in_features, n_classes, bias=True, weight=None, backend='auto', device=None, dtype=None)",
}
METHODS = {
    "forward": "(self, input, target, *, ignore_index=-100, reduction='mean', grad_filter_eps=0.0)",
    "log_prob": "(self, input)",
    "mixture": "(self, input)",
    "predict": "(self, input)",
    "reset_parameters": "(self)",
    "sample": "(self, input, temperature=1.0, generator=None)",
    "tie": "(self, weight)",
    "topk": "(self, input, k)",
}


def signature(function) -> str:
    """Without annotations."""
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def signatures(owner, names) -> dict[str, str]:
    return {name: signature(getattr(owner, name)) for name in names}


def test_the_package():
    assert fused_mos.__all__ == ["MoC", "MoS", "Softmax", "backends", "functional"]
    assert signature(fused_mos.backends) == "()"
    assert list(fused_mos.backends()) == ["reference", "tiled", "cpu", "triton", "cuda"]


def test_functional():
    assert functional.__all__ == ["REDUCTIONS", "TopK", *FUNCTIONS]
    assert signatures(functional, FUNCTIONS) == FUNCTIONS
    assert functional.REDUCTIONS == ("mean", "sum", "none") and functional.TopK._fields == ("values", "indices")


def test_heads():
    assert signatures(fused_mos, HEADS) == HEADS
    for name in HEADS:
        head = getattr(fused_mos, name)
        own = {n for c in head.__mro__ if c.__module__.startswith("fused_mos") for n in vars(c) if n[0] != "_"}
        assert {n for n in own if inspect.isfunction(getattr(head, n))} - {"extra_repr"} == set(METHODS)
        assert signatures(head, METHODS) == METHODS


def test_vocab_parallel():
    assert signature(vocab_parallel.parallelize) == "(model, group=None)"
    assert signature(vocab_parallel.VocabShard) == "(n_classes, group=None)"
    assert signatures(vocab_parallel.VocabShard, SHARD) == SHARD
    assert signature(vocab_parallel.VocabParallelEmbedding) == "(shard, weight, padding_idx=None)"
