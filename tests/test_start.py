"""Initial values of a head: a bias from word frequencies, and a warning if the decoder is far too large."""

import re
import warnings

import numpy
import pytest
import torch
from ranks import run_on_ranks
from torch import nn

from fused_mos import MoC, MoS, Softmax
from fused_mos.lm import AWDLSTM
from fused_mos.vocab_parallel import parallelize

H, V, K = 6, 7, 3
COUNTS = torch.tensor([40, 0, 3, 1, 1, 900, 5])
FREQUENCIES = (COUNTS.double() + 1) / (COUNTS.sum() + V)


@pytest.mark.parametrize("kind", [MoS, MoC, Softmax])
@pytest.mark.parametrize("counts", [COUNTS, COUNTS.double(), COUNTS.to(torch.int16)], ids=lambda c: str(c.dtype))
def test_the_bias_is_that_of_the_frequencies(kind, counts):
    head = kind(H, V, dtype=torch.float64)
    bias = head.decoder.bias
    head.init_bias(counts)
    assert head.decoder.bias is bias and bias.requires_grad and bias.grad_fn is None
    for parameter in head.parameters():
        if parameter is not bias:
            nn.init.zeros_(parameter)
    expected = FREQUENCIES.log().expand(2, V)
    assert torch.allclose(head.log_prob(torch.randn(2, H, dtype=torch.float64)), expected, rtol=0, atol=1e-12)


def test_it_changes_nothing_else_and_can_be_undone():
    head = MoS(H, V, K, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in head.named_parameters()}
    head.init_bias(COUNTS)
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters() if name != "decoder.bias")
    assert head.decoder.bias.dtype == torch.bfloat16
    assert torch.equal(head.decoder.bias, FREQUENCIES.log().bfloat16())
    head.reset_parameters()
    assert not head.decoder.bias.any()
    nn.init.constant_(head.decoder.bias, 5.0)  # equal numbers are no knowledge
    head.init_bias(COUNTS)


def of_every_rank():
    head = MoS(H, V, K)
    shard = parallelize(head)
    head.init_bias(COUNTS)
    assert torch.equal(head.decoder.bias, shard.rows(FREQUENCIES).log().float())
    with pytest.raises(ValueError, match=r"counts must be \(n_classes,\) = \(7,\)"):
        head.init_bias(shard.rows(COUNTS))


def test_a_sharded_head_takes_its_rows():
    run_on_ranks(2, of_every_rank)


def changed(place, number):
    counts = COUNTS.double()
    counts[place] = number
    return counts


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (COUNTS.tolist(), TypeError, "counts must be a Tensor, got list"),
        (COUNTS.numpy(), TypeError, "counts must be a Tensor, got ndarray"),
        (COUNTS[1:], ValueError, "counts must be (n_classes,) = (7,), got (6,)"),
        (COUNTS[:, None], ValueError, "= (7,), got (7, 1)"),
        (changed(2, -1), ValueError, "counts must be finite and at least 0, got -1 for class 2"),
        (changed(3, numpy.nan), ValueError, "at least 0, got nan for class 3"),
        (changed(0, numpy.inf), ValueError, "at least 0, got inf for class 0"),
        (0 * COUNTS, ValueError, "at least 2 in all, got 0"),
        (COUNTS / COUNTS.sum(), ValueError, "(not relative frequencies), at least 2 in all, got 1"),
    ],
)
def test_wrong_counts(counts, error, message):
    head = MoS(H, V, K)
    with pytest.raises(error, match=re.escape(message)):
        head.init_bias(counts)
    assert not head.decoder.bias.any()


def test_heads_that_have_no_bias_to_set():
    with pytest.raises(ValueError, match="init_bias needs a head whose decoder has a bias of its own.*got None"):
        MoS(H, V, K, bias=False).init_bias(COUNTS)
    trained = Softmax(H, V)
    trained.init_bias(COUNTS)
    before = trained.decoder.bias.clone()
    with pytest.raises(ValueError, match="untrained bias.* range from -6.864 to -0.06"):
        trained.init_bias(COUNTS.flip(0))
    assert torch.equal(trained.decoder.bias, before)
    hooked = MoS(H, V, K)
    hooked.decoder.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="decoder must be a plain nn.Linear"):
        hooked.init_bias(COUNTS)


class TestEmbeddingOfAnotherScale:
    def test_it_is_told_once(self):
        embedding = nn.Embedding(1000, H)
        head = Softmax(H, 1000)
        text = "weight has a standard deviation of 1, far too large for an untrained decoder.*nn.init.uniform_"
        for tie in (
            lambda: MoS(H, 1000, weight=embedding.weight),
            lambda: Softmax(H, 1000, weight=embedding.weight),
            lambda: head.tie(embedding.weight),
        ):
            with pytest.warns(UserWarning, match=text) as told:
                tie()
            assert len(told) == 1 and told[0].filename == __file__

    @pytest.mark.filterwarnings("error")
    def test_others_are_not(self):
        for weight in (0.1 * torch.randn(50, H), torch.ones(50, H), torch.zeros(50, H), 0.02 * torch.randn(50, H)):
            Softmax(H, 50, weight=nn.Parameter(weight))
        Softmax(H, 50, weight=nn.Embedding(50, H, device="meta").weight)
        with torch._subclasses.FakeTensorMode():
            Softmax(H, 50, weight=nn.Embedding(50, H).weight)
        AWDLSTM(50, 8, (12, 10), n_experts=3)

    @pytest.mark.filterwarnings("error")
    def test_nor_is_that_of_gpt2(self):
        transformers = pytest.importorskip("transformers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
        MoS(32, model.config.vocab_size, n_experts=2, weight=model.transformer.wte.weight)
