"""The LSTM layer: torch's own without weight drop, and its weights in cuDNN's one buffer, whose logic any device can
run."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fused_mos.lm import AWDLSTM, WeightDropLSTM, lstm

T, B, D, H = 6, 3, 5, 7


def test_is_torchs_without_weight_drop():
    ours, theirs = WeightDropLSTM(D, H), nn.LSTM(D, H)
    theirs.load_state_dict(ours.state_dict())
    x, h, c = torch.randn(T, B, D), torch.randn(1, B, H), torch.randn(1, B, H)
    output, (last_h, last_c) = ours(x, (h, c))
    expected, (expected_h, expected_c) = theirs(x, (h, c))
    assert torch.equal(output, expected) and torch.equal(last_h, expected_h) and torch.equal(last_c, expected_c)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_single_step_does_not_copy_the_weights(drop, monkeypatch):
    """torch.lstm_cell takes it, with torch.lstm's results and first and second derivatives."""
    layer = WeightDropLSTM(D, H, drop).double()
    inputs = [torch.randn(1, B, size, dtype=torch.float64, requires_grad=True) for size in (D, H, H)]

    def results():
        torch.manual_seed(5)
        output, (h, c) = layer(inputs[0], tuple(inputs[1:]))
        first = torch.autograd.grad(output.sin().sum() + h.sum() + c.cos().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, *layer.parameters()])
        return output, h, c, *first, *second

    def by_torch_lstm(x, state, *weights):
        _, h, c = torch.lstm(x[None], [part[None] for part in state], weights, True, 1, 0.0, True, False, False)
        return h[0], c[0]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "lstm", lambda *_: pytest.fail("it was called"))
        ours = results()
    monkeypatch.setattr(torch, "lstm_cell", by_torch_lstm)
    for mine, theirs in zip(ours, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_computes_in_the_parameters_dtype_under_autocast():
    layer, hidden = WeightDropLSTM(D, H), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    x = torch.randn(T, B, D)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = layer(x.bfloat16(), hidden)
    assert output.dtype == c.dtype == torch.float32
    assert torch.equal(output, layer(x.bfloat16().float(), hidden)[0])


@pytest.mark.parametrize(
    ("x", "h", "c", "message"),
    [
        # torch.lstm itself reads beyond the end of these
        ((T, 200, D), (1, 1, H), (1, 1, H), r"\(1, B, hidden_size\) = \(1, 200, 7\), got \[\(1, 1, 7\), \(1, 1, 7\)\]"),
        ((T, B, D), (1, B, H), (1, B, H - 1), r"= \(1, 3, 7\), got \[\(1, 3, 7\), \(1, 3, 6\)\]"),
        ((T, B, D), (2, B, H), (2, B, H), r"= \(1, 3, 7\), got \[\(2, 3, 7\), \(2, 3, 7\)\]"),
        ((T, B, D - 1), (1, B, H), (1, B, H), r"x must be \(T, B, input_size = 5\), got \(6, 3, 4\)"),
        ((B, D), (1, B, H), (1, B, H), r"x must be \(T, B, input_size = 5\), got \(3, 5\)"),
    ],
)
def test_wrong_shapes_are_refused(x, h, c, message, monkeypatch):
    monkeypatch.setattr(torch, "lstm", lambda *_: pytest.fail("it was called"))
    with pytest.raises(ValueError, match=message):
        WeightDropLSTM(D, H)(torch.randn(x), (torch.randn(h), torch.randn(c)))


def test_a_model_wants_a_hidden_state_for_each_layer():
    model, tokens = AWDLSTM(20, 4, (6, 5), n_experts=2), torch.zeros(T, B, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden must have an \(h, c\) for each of 2 layers, got 1"):
        model(tokens, tokens, model.initial_hidden(B)[:1])
    with pytest.raises(ValueError, match=r"= \(1, 3, 6\), got \[\(1, 1, 6\), \(1, 1, 6\)\]"):
        model(tokens, tokens, model.initial_hidden(1))


@pytest.fixture
def pair(monkeypatch):
    """A plain layer and a copy of it with flat weights."""
    plain = WeightDropLSTM(D, H, weight_dropout=0.4)
    flat = copy.deepcopy(plain)
    monkeypatch.setattr(lstm, "_uses_cudnn", lambda weight: weight is flat.weight_hh_l0)
    return plain, flat


def forward(layer, seed):
    torch.manual_seed(seed)
    return layer(torch.randn(T, B, D), (torch.randn(1, B, H), torch.randn(1, B, H)))[0].square().sum()


def assert_same(plain, flat):
    for (name, p), q in zip(plain.named_parameters(), flat.parameters()):
        assert torch.equal(p, q) and (p.grad is q.grad is None or torch.equal(p.grad, q.grad)), name


def test_flat_weights_change_nothing(pair):
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in pair]
    buffers = set()
    for seed in range(3):
        for layer, optimizer in zip(pair, optimizers):
            optimizer.zero_grad()
            forward(layer, seed).backward()
            optimizer.step()
        assert_same(*pair)
        buffers.add(pair[1]._flat.buffer.data_ptr())
    assert len(buffers) == 1, "one buffer for all steps"
    assert torch.equal(forward(pair[0].eval(), 9), forward(pair[1].eval(), 9))


def test_the_weights_are_consecutive_in_one_buffer(pair):
    _, flat = pair
    forward(flat, 0)
    weights = [flat.weight_ih_l0, flat._flat.recurrent, flat.bias_ih_l0, flat.bias_hh_l0]
    start = flat._flat.buffer.data_ptr()
    for weight in weights:
        assert weight.data_ptr() == start and weight.is_contiguous()
        start += weight.numel() * 4


def test_a_second_forward_pass_before_the_first_backward_pass(pair):
    for layer in pair:
        first = forward(layer, 1)
        with torch.no_grad():
            forward(layer, 2)
        (first + forward(layer, 3)).backward()
    assert_same(*pair)
    for layer in pair:
        layer.zero_grad()
        abandoned = forward(layer, 4)
        del abandoned
        forward(layer, 5).backward()
    assert_same(*pair)


def test_flat_weights_move_copy_and_save(pair, tmp_path):
    plain, flat = pair
    forward(flat, 0).backward()
    save_file(dict(flat.state_dict()), tmp_path / "x")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in load_file(tmp_path / "x").items())
    twin = pickle.loads(pickle.dumps(flat))
    assert torch.equal(forward(twin, 0), forward(plain, 0)) and twin.bias_hh_l0.data_ptr() != flat.bias_hh_l0.data_ptr()
    moved = [layer.double().float() for layer in pair]
    for layer in moved:
        layer.zero_grad()
        forward(layer, 1).backward()
    assert_same(*moved)
    flat.load_state_dict({name: tensor + 1 for name, tensor in plain.state_dict().items()})
    plain.load_state_dict({name: tensor + 1 for name, tensor in plain.state_dict().items()})
    assert torch.equal(forward(plain, 2), forward(flat, 2))
