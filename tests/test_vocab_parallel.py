"""The sharded head against the unsharded one, on two and three processes."""

import copy
import io

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from fused_mos import MoC, MoS, Softmax, _inputs, functional, vocab_parallel
from fused_mos.lm import AWDLSTM
from fused_mos.vocab_parallel import VocabParallelEmbedding, VocabShard, parallelize


def problem(n, k, d, v, dtype=torch.float32, scale=0.3, bias=True):
    """latent, prior_logits, weight, bias, target; the same on all ranks."""
    torch.manual_seed(n + v)
    tensors = torch.randn(n, k, d), torch.randn(n, k), scale * torch.randn(v, d), torch.randn(v) if bias else None
    return *(t if t is None else t.to(dtype).requires_grad_() for t in tensors), torch.randint(v, (n,))


def assert_equal(actual, expected, what, tolerance=1e-6):
    """Assert equality within `tolerance`, relative to the largest number."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(largest, 1.0), equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def check_loss(shard, inputs, target, tolerance, **options):
    latent, prior, weight, bias = inputs
    expected = functional.mos_nll_loss(*inputs[:3], target, bias, **options)
    whole = torch.autograd.grad(expected.sum(), [t for t in inputs if t is not None])
    own_weight = shard.rows(weight.detach()).clone().requires_grad_()
    own_bias = None if bias is None else shard.rows(bias.detach()).clone().requires_grad_()
    options = {"ignore_index": -100, "reduction": "mean", "backend": "auto", "grad_filter_eps": 0.0} | options
    loss = shard.nll_and_loss(latent, prior, own_weight, target, own_bias, **options).loss
    gradients = torch.autograd.grad(loss.sum(), [t for t in (latent, prior, own_weight, own_bias) if t is not None])
    assert loss.dtype == expected.dtype
    assert_equal(loss, expected, f"loss {options}", tolerance)
    for name, actual, wanted in zip(("latent", "prior", "weight", "bias"), gradients, whole):
        assert_equal(
            actual,
            wanted if name in ("latent", "prior") else shard.rows(wanted),
            f"gradient of {name}, {options}",
            tolerance,
        )


def losses_and_gradients():
    for v, backend, dtype, tolerance in [
        (507, "tiled", torch.float64, 1e-13),
        (507, "auto", torch.float32, 1e-6),
        (507, "tiled", torch.float32, 1e-6),
        (10, "auto", torch.float32, 1e-6),
        (1000, "auto", torch.bfloat16, 2e-2),
    ]:
        *inputs, target = problem(20, 3, 17, v, dtype)
        shard = VocabShard(v)
        for reduction in functional.REDUCTIONS:
            check_loss(shard, inputs, target, tolerance, reduction=reduction, backend=backend)
        # an ignored class that is 0: on other ranks 0 is the first class of their own
        target[:5] = 0
        check_loss(shard, inputs, target, tolerance, ignore_index=0, backend=backend)
        check_loss(shard, inputs, torch.zeros_like(target), tolerance, ignore_index=0, reduction="sum", backend=backend)
    *inputs, target = problem(20, 3, 17, 64, scale=1e3)  # logits of thousands
    check_loss(VocabShard(64), inputs, target, 1e-5)
    *inputs, target = problem(20, 4, 8, 300, bias=False)
    check_loss(VocabShard(300), inputs, target, 1e-6, grad_filter_eps=0.05)
    for n in (0, 1):
        *inputs, target = problem(n, 2, 5, 31)
        check_loss(VocabShard(31), inputs, target, 1e-6, reduction="sum")
    *inputs, target = problem(6, 2, 5, 31)
    inputs[3].data[3] = -torch.inf  # a masked class
    target[target == 3] = 4
    check_loss(VocabShard(31), inputs, target, 1e-6)


def heads_compute_what_they_did_before():
    torch.manual_seed(1)
    hidden, target = torch.randn(7, 4, 12, requires_grad=True), torch.randint(507, (7, 4))
    for whole in (MoS(12, 507, 5, 9), MoC(12, 507, 5, 9), Softmax(12, 507)):
        head = copy.deepcopy(whole)
        shard = parallelize(head)
        output, loss = head(hidden, target)
        expected_output, expected_loss = whole(hidden, target)
        assert_equal(output, expected_output, "output")
        (gradient,), (expected,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(expected_loss, [hidden])
        assert_equal(gradient, expected, "gradient of the input")
        assert_equal(head.log_prob(hidden), whole.log_prob(hidden), "log_prob")
        for k in (1, 20, 507):
            values, indices = head.topk(hidden, k)
            expected_values, expected_indices = whole.topk(hidden, k)
            assert_equal(values, expected_values, "top-k")
            assert (indices == expected_indices).float().mean() > 0.99  # equal ones may change places
        assert torch.equal(head.predict(hidden), whole.predict(hidden))
        with torch.autocast("cpu", torch.bfloat16):
            loss, expected_loss = head(hidden, target).loss, whole(hidden, target).loss
        assert_equal(loss, expected_loss, "loss under autocast", 1e-3)
        assert f"of {head.n_classes}" in repr(shard) and head.decoder.weight.shape[0] == shard.stop - shard.start


def samples_have_the_mixture_s_distribution():
    torch.manual_seed(2)
    head = MoS(6, 11, 3, 5)
    torch.nn.init.normal_(head.decoder.bias)
    hidden = torch.randn(6).expand(40_000, 6)
    for temperature in (1.0, 0.5):
        with torch.no_grad():
            latent, prior = head.mixture(hidden[:1])
            softmax = torch.softmax((latent @ head.decoder.weight.t() + head.decoder.bias) / temperature, -1)
            expected = (torch.softmax(prior, -1)[..., None] * softmax).sum(1)[0] * len(hidden)
        sharded = copy.deepcopy(head)
        parallelize(sharded)
        torch.manual_seed(torch.distributed.get_rank())  # ranks need not share their random numbers
        drawn = sharded.sample(hidden, temperature)
        everyone = [torch.empty_like(drawn) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, drawn)
        assert all(torch.equal(drawn, other) for other in everyone)
        counts = torch.bincount(drawn, minlength=11).float()
        assert ((counts - expected) ** 2 / expected).sum() < 29.6  # chi-squared, 10 degrees of freedom, p = 0.001
    assert sharded.sample(hidden[:0]).shape == (0,)


def a_tied_language_model_trains_alike():
    torch.manual_seed(3)
    whole = AWDLSTM(29, embedding_size=8, hidden_sizes=(12, 10), n_experts=3, dropoute=0.2, wdrop=0.3)
    model = copy.deepcopy(whole)
    shard = parallelize(model)
    assert isinstance(model.encoder, VocabParallelEmbedding) and model.encoder.weight is model.head.decoder.weight
    tokens = torch.randint(29, (6, 4))
    for m in (whole, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
        torch.manual_seed(4)  # of the dropout
        for _ in range(3):
            optimizer.zero_grad()
            m(tokens[:-1], tokens[1:]).loss.backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        assert_equal(p, shard.rows(q) if p.shape != q.shape else q, name)


def checks():
    """All checks in one group of processes, since starting them takes longer than the checks."""
    losses_and_gradients()
    heads_compute_what_they_did_before()
    samples_have_the_mixture_s_distribution()
    a_tied_language_model_trains_alike()


def refusals():
    *inputs, target = problem(4, 2, 5, 30)
    latent, prior, weight, bias = inputs
    with pytest.raises(ValueError, match="n_classes = 1 in spans of 1 leaves one of 2 ranks"):
        VocabShard(1)
    shard = VocabShard(30)
    options = {"ignore_index": -100, "reduction": "mean", "backend": "auto", "grad_filter_eps": 0.0}
    own = shard.rows(weight), target, shard.rows(bias)
    with pytest.raises(ValueError, match=r"weight must have the 15 rows of classes .* of 30, got \(30, 5\)"):
        shard.nll_and_loss(latent, prior, weight, target, bias, **options)
    with pytest.raises(IndexError, match=r"\[0, V = 30\).*got 30"):
        shard.nll_and_loss(latent, prior, own[0], target + 30 - target, own[2], **options)
    with pytest.raises(ValueError, match="'reference' cannot be sharded"):
        shard.nll_and_loss(latent, prior, *own, **options | {"backend": "reference"})
    with pytest.raises(ValueError, match=r"k must be in \[1, V = 30\], got 31"):
        shard.mos_topk(latent, prior, own[0], own[2], k=31)
    with pytest.raises(ValueError, match="one fused_mos head, got 0"):
        parallelize(torch.nn.Linear(2, 2))
    loss = shard.nll_and_loss(latent, prior, *own, **options).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(torch.autograd.grad(loss, latent, create_graph=True)[0].sum(), latent)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_shards_compute_what_the_whole_does(n_ranks):
    run_on_ranks(n_ranks, checks)


def test_bad_input_is_refused_on_every_rank():
    run_on_ranks(2, refusals)


def test_without_a_process_group_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group, or start with torchrun"):
        VocabShard(10)


def unequal_gpus():
    """Runs on the CPU with made-up GPU models."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    vocab_parallel._gpu_model = lambda device: f"H100 with {132 if rank < 2 else 114} multiprocessors"
    with pytest.raises(RuntimeError, match="rank 0 has H100 with 132 multiprocessors, rank 2 H100 with 114"):
        vocab_parallel._check_equal_gpus(torch.device("cuda"), group)
    vocab_parallel._gpu_model = lambda device: "H100 with 132 multiprocessors"
    vocab_parallel._check_equal_gpus(torch.device("cuda"), group)


class Model(torch.nn.Module):
    """An embedding, a head that is tied to it, and whatever else."""

    def __init__(self, embedding, **others):
        super().__init__()
        self.embedding = embedding
        self.head = MoS(8, 50, 3, weight=embedding.weight)
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, tokens):
        embeddings = [module for module in self._modules.values() if module is not self.head]  # with each name
        return self.head(sum(embedding(tokens) for embedding in embeddings), tokens).loss


class Scaled(torch.nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 8


def hooked(register, *arguments):
    embedding = torch.nn.Embedding(50, 8)
    getattr(embedding, register)(*arguments)
    return embedding


def untied(model):
    """Two parameters that share their memory, as load_state_dict(assign=True) makes them."""
    model.embedding.weight = torch.nn.Parameter(model.head.decoder.weight.detach())
    return model


def aliased():
    embedding = torch.nn.Embedding(50, 8)
    return Model(embedding, second=embedding)


def twins():
    first, second = torch.nn.Embedding(50, 8), torch.nn.Embedding(50, 8, padding_idx=3)
    second.weight = first.weight
    return Model(first, second=second)


def models_that_are_kept():
    for make in (
        lambda: Model(torch.nn.Embedding(50, 8)),
        lambda: Model(torch.nn.Embedding(50, 8, padding_idx=7)),
        lambda: Model(torch.nn.Embedding(50, 8, padding_idx=-1)),
        aliased,
        twins,
    ):
        torch.manual_seed(1)
        whole = make()
        torch.manual_seed(1)
        model = make()
        model.eval()
        shard = parallelize(model)
        assert not any(module.training for module in model.modules())
        tokens = torch.arange(50).repeat(2)
        model(tokens).backward()
        whole(tokens).backward()
        assert_equal(model(tokens), whole(tokens), "loss")
        assert_equal(model.embedding.weight.grad, shard.rows(whole.embedding.weight.grad), "gradient")
        assert set(model.state_dict()) == set(whole.state_dict())
        twin = copy.deepcopy(model)
        assert_equal(twin(tokens), whole(tokens), "loss of a copy")
        assert twin.head.decoder.weight is twin.embedding.weight is not model.embedding.weight
        torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        with pytest.raises(TypeError, match="cannot be pickled, since its process group cannot; save each rank's"):
            torch.save(model, io.BytesIO())
        for token in (-1, 50):
            with pytest.raises(IndexError, match="index out of range"):
                model.embedding(torch.tensor([1, token]))


def models_that_are_refused():
    tied = lambda module: setattr(module, "weight", shared.weight) or module
    for make, message in (
        (lambda: Model(Scaled(50, 8)), "embedding.weight is the decoder's weight, and its module is a Scaled"),
        (lambda: Model(torch.nn.Embedding(50, 8, max_norm=1.0)), "its module has max_norm"),
        (lambda: Model(torch.nn.Embedding(50, 8, scale_grad_by_freq=True)), "its module has scale_grad_by_freq"),
        (lambda: Model(torch.nn.Embedding(50, 8, sparse=True)), "its module has sparse"),
        (lambda: Model(hooked("register_forward_hook", print)), "its module has the hook print"),
        (lambda: Model(hooked("register_forward_pre_hook", print)), "its module has the hook print"),
        (lambda: Model(hooked("register_full_backward_hook", print)), "its module has the hook print"),
        (lambda: Model(hooked("register_buffer", "scale", torch.ones(()))), "its module has scale"),
        (lambda: Model(hooked("__setattr__", "forward", print)), "its module has a forward of its own"),
        (
            lambda: Model(shared, bag=tied(torch.nn.EmbeddingBag(50, 8))),
            "bag.weight is the decoder's weight, and not the weight of an nn.Embedding",
        ),
        (lambda: Model(shared, bare=shared.weight), "bare is the decoder's weight, and not the weight"),
        (lambda: Model(shared, linear=tied(torch.nn.Linear(8, 50))), "linear.weight is the decoder's weight, and not"),
        (lambda: Model(shared, view=shared.weight.detach()), "view is the decoder's weight, and not the weight"),
        (lambda: Model(shared, rows=shared.weight[3:4].detach()), "rows is the decoder's weight, and not the weight"),
        (lambda: untied(Model(shared)), "embedding.weight is the decoder's weight, and not the weight"),
        (lambda: Model(shared).head, "tied to an embedding outside model; pass the model that holds both"),
    ):
        shared = torch.nn.Embedding(50, 8)
        model = make()
        before = dict(model.named_parameters(remove_duplicate=False))
        with pytest.raises(ValueError, match=message):
            parallelize(model)
        after = dict(model.named_parameters(remove_duplicate=False))
        assert before.keys() == after.keys() and all(after[name] is tensor for name, tensor in before.items())
    model = Model(torch.nn.Embedding(50, 8))
    model.head.decoder.weight.register_hook(print)
    with pytest.raises(ValueError, match="the decoder's weight has a hook, which sharding would lose"):
        parallelize(model)
    model = MoS(8, 50, 3)
    model.decoder.register_forward_hook(print)
    with pytest.raises(ValueError, match="decoder must be a plain nn.Linear, and it has the hook print"):
        parallelize(model)


def models():
    models_that_are_kept()
    models_that_are_refused()


def test_a_model_computes_what_it_did_or_is_refused():
    run_on_ranks(2, models)


def test_gpus_of_different_models_are_refused():
    run_on_ranks(3, unequal_gpus)


def sharded_weight():
    torch.manual_seed(0)
    latent, prior_logits, weight, _, target = problem(5, 3, 8, 40, bias=False)
    linear = fully_shard(torch.nn.Linear(8, 40))
    with pytest.raises(TypeError, match="weight is a DTensor, .* shard the head as a whole"):
        functional.mos_nll_loss(latent, prior_logits, linear.weight, target)
    head, x = MoS(8, 40, 3), torch.randn(5, 8)
    expected = head(x, target).loss, head.predict(x)
    fully_shard(head)
    register_fsdp_forward_method(head, "predict")
    assert torch.allclose(head(x, target).loss, expected[0]) and torch.equal(head.predict(x), expected[1])


def test_a_weight_that_is_sharded_alone_is_refused():
    run_on_ranks(2, sharded_weight)


def shards_at_the_edges():
    latent, prior_logits, weight, bias, _ = (t.detach() for t in problem(4, 2, 8, 5))
    shard, bias[3] = VocabShard(5), -torch.inf
    own = [latent, prior_logits, shard.rows(weight), shard.rows(bias)]
    best = shard.mos_topk(*own, k=5)
    assert (best.indices.sort(1).values == torch.arange(5)).all()
    for dtype, temperature in ((torch.float32, 1e-38), (torch.float32, 1e-40), (torch.float16, 1e-5)):
        one = [tensor[:, :1] if i < 2 else tensor for i, tensor in enumerate(own)]  # of one expert, which is drawn
        cold = [tensor.to(dtype) for tensor in one]
        cold[1] = torch.zeros(4, 1)
        expected = shard.mos_topk(*cold, k=1).indices[:, 0]
        for _ in range(10):
            assert torch.equal(shard.mos_sample(*cold, temperature=temperature), expected)
    target = torch.tensor([0, 1, 99, 4])
    _inputs.values_can_be_read = lambda tensor: False  # as on a GPU
    losses = shard.nll_and_loss(*own[:3], target, own[3], reduction="none").loss
    assert losses[2].isnan() and losses[[0, 1, 3]].isfinite().all()


def test_shards_at_the_edges():
    """Masked classes and k beyond a shard's, cold samples, and a target that is no class."""
    run_on_ranks(2, shards_at_the_edges)
