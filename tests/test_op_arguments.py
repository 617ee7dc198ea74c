"""The custom ops called directly, with arguments that no function of the package would give them."""

import itertools

import pytest
import torch
from backends import CPU, TRITON
from problem import problem

from fused_mos import ops

N, K, D, V = 6, 3, 8, 90
ERRORS = (TypeError, ValueError, RuntimeError)


def calls(backend: str) -> dict:
    """Each op with valid arguments, by name."""
    z, a, w, b = problem(N, K, D, V, ignored=False).to(torch.float32, ()).inputs()
    operands = {"latent": z, "prior_logits": a, "weight": w, "bias": b}
    unmixed = {"latent": z, "weight": w, "bias": b}
    maximum, log_total, target_logit, log_prior = (torch.randn(N, K).log_softmax(-1) for _ in range(4))
    statistics = {"maximum": maximum, "log_total": log_total}
    given = unmixed | {"log_prior": log_prior} | statistics
    target, seed, one = torch.arange(N), torch.tensor([5]), torch.ones(())
    loss = {"target": target, "ignore_index": -100, "filter_eps": 0.0}
    needs, index = [True] * 4, torch.arange(4 * N).view(N, 4)
    of_sum = {"kind": "classes", "class_weight": torch.rand(V), "mixture_temperature": 1.0}
    of_experts = unmixed | {"index": index}
    of_op = {
        ops.nll: operands | loss | {"softcap": 3.0, "with_lse": True},
        ops.nll_backward: {"grad": torch.ones(N), "grad_lse": torch.ones(N, K)}
        | operands
        | loss
        | statistics
        | {"target_logit": target_logit, "needs": needs},
        ops.nll_with_gradients: operands | loss | {"mean": False, "needs": needs, "loss_weights": torch.rand(3, N)},
        ops.expert_log_prob: of_experts,
        ops.expert_log_prob_backward: {"grad": torch.ones(N, K, 4), "grad_lse": torch.ones(N, K)}
        | of_experts
        | statistics
        | {"logits": torch.randn(N, K, 4), "needs": needs[:3]},
        ops.likelihood_and_sum: operands | {"target": target} | of_sum,
        ops.mixture_sum: given | of_sum,
        ops.mixture_sum_backward: {"grad": torch.ones(N), "grad_target": torch.ones(N), "grad_lse": torch.ones(N, K)}
        | operands
        | {"target": target}
        | statistics
        | {"target_logit": target_logit, "s": torch.randn(N, K), "value": torch.randn(N), "needs": needs}
        | of_sum,
        ops.logsumexp: unmixed,
        ops.logsumexp_backward: {"grad": torch.ones(N, K)} | unmixed | statistics | {"needs": needs[:3]},
        ops.normalisers: operands,
        ops.log_prob: operands,
        ops.log_prob_backward: {"grad": torch.ones(N, V)} | operands | statistics | {"needs": needs},
        ops.mixture_log_prob: given,
        ops.mixture_topk: given | {"k": 3},
        ops.predict: operands,
        ops.topk: operands | {"k": 3},
        ops.sample: operands | {"temperature": 1.0, "seed": seed},
        ops.row_statistics: unmixed | {"target": target},
    }
    if backend == "triton":
        of_op[ops.scaled] = {"gradients": [z, a, w, b], "factor": one, "divisor": one}
    return {op: arguments | {"backend": backend} for op, arguments in of_op.items()}


def bad_tensors(tensor: torch.Tensor):
    """Invalid versions of a tensor: other shapes and dtypes, and freed memory."""
    for dim in range(tensor.dim()):
        yield tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        yield tensor.narrow(dim, 0, 0)
        yield torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    yield tensor[None]
    if tensor.dim():
        yield tensor[0]
    yield tensor.to(torch.int32 if not tensor.is_floating_point() else torch.float16)
    yield tensor.to(torch.float64)
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    yield freed


@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
def test_wrong_tensors_are_refused(backend):
    """Each tensor of each op in each wrong way."""
    refused, accepted = 0, []
    for op, arguments in calls(backend).items():
        for name, tensor in arguments.items():
            for bad in bad_tensors(tensor) if isinstance(tensor, torch.Tensor) else ():
                try:
                    op(**arguments | {name: bad})
                except ERRORS as error:
                    assert str(error), f"{op} says nothing of {name}"
                    refused += 1
                else:
                    accepted.append((op._name, name, tuple(bad.shape), bad.dtype))
    # of single rows, more and fewer are another right call
    right = {("logsumexp", "latent"), ("row_statistics", "latent")}
    right |= {("expert_log_prob", "latent"), ("expert_log_prob", "index")}  # and of experts and classes
    assert {call[:2] for call in accepted} <= right, accepted
    assert refused > 400


@pytest.mark.parametrize("backend", ["tiled", CPU])
def test_tensors_of_several_devices_are_refused(backend):
    """If one is on the meta device, torch calls only the fake kernel."""
    for op, arguments in calls(backend).items():
        tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
        for name in tensors if len(tensors) > 1 else ():
            with pytest.raises(ERRORS, match="meta|device"):
                op(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
def test_wrong_numbers_are_refused(backend):
    wrong = {
        "k": [0, -1],
        "temperature": [0.0, -1.0, float("nan")],
        "mixture_temperature": [0.0, -1.0, float("nan")],
        "softcap": [-1.0, float("nan"), float("inf")],
        "kind": ["", "mean"],
        "mean": [True],
        "needs": [[], [True] * 3, [True] * 5],
        "backend": ["auto", "none"],
    }
    for op, arguments in calls(backend).items():
        for name, values in wrong.items():
            for value in values if name in arguments and op is not ops.scaled else ():
                if name == "needs" and len(value) == len(arguments[name]):
                    continue
                with pytest.raises(ERRORS):
                    op(**arguments | {name: value})
        if "needs" in arguments:
            with pytest.raises(ValueError, match="needs asks for the gradient of bias"):
                op(**arguments | {"bias": None})


@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
def test_any_layout_gives_the_same(backend):
    """Strided tensors, with padding in between, and expanded ones."""
    for op, arguments in calls(backend).items():
        expected = op(**arguments)
        for name, tensor in arguments.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.numel() == 1:
                continue
            strided = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)
            turned = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
            for other in (strided, turned):
                actual = op(**arguments | {name: other})
                pairs = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (actual, expected)), strict=True)
                assert all(torch.allclose(a, b, equal_nan=True) for a, b in pairs), (op._name, name)
            same = tensor[:1].expand_as(tensor)
            actual, wanted = op(**arguments | {name: same}), op(**arguments | {name: same.contiguous()})
            pairs = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (actual, wanted)), strict=True)
            assert all(torch.allclose(a, b, equal_nan=True) for a, b in pairs), (op._name, name)


@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
@pytest.mark.parametrize("wrong", [-(2**63), 2**63 - 1, V, -1])
def test_a_target_that_is_no_class_is_a_nan(backend, wrong):
    """It is not used as an address: nothing is read or written there."""
    for op, arguments in calls(backend).items():
        if "target" not in arguments:
            continue
        target = arguments["target"].clone()
        target[2] = wrong
        results = op(**arguments | {"target": target})
        if op in (ops.nll, ops.row_statistics):
            losses = results[0] if op is ops.nll else results[2]
            assert losses[2].isnan().all() and losses[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ["tiled", CPU, TRITON])
def test_no_tokens_and_one_class(backend):
    for n, v in itertools.product((0, 1), (1, 2)):
        case = problem(n, K, D, v, ignored=False).to(torch.float32, ())
        log_p, *_ = ops.log_prob(*case.inputs(), backend)
        assert log_p.shape == (n, v)
        assert ops.sample(*case.inputs(), 1.0, torch.tensor([1]), backend).shape == (n,)
        assert ops.nll(*case.inputs(), case.target, -100, 0.0, backend)[0].shape == (n,)
