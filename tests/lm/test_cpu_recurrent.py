"""The LSTM layer's kernels for CPUs, on every instruction set, against torch.lstm in float64."""

import pytest
import torch

from fused_mos import lm
from fused_mos.lm import WeightDropLSTM, cpu_recurrent

pytestmark = pytest.mark.skipif(cpu_recurrent._cpu is None, reason="the CPU kernels are not built")

NAMES = "output", "c", "x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def problem(n_steps, batch_size, n_features, width):
    torch.manual_seed(0)
    bound = width**-0.5
    shapes = [(4 * width, n_features), (4 * width, width), (4 * width,), (4 * width,)]
    return [
        torch.randn(n_steps, batch_size, n_features),
        torch.randn(1, batch_size, width).tanh(),
        torch.randn(1, batch_size, width),
        *(torch.empty(shape).uniform_(-bound, bound) for shape in shapes),
    ]


def torch_lstm(x, h0, c0, *weights):
    output, _, last_cell = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, True, False, False)
    return output, last_cell


def kernel(products):
    def run(x, h0, c0, *weights):
        output, (last, last_cell) = cpu_recurrent.lstm(x, (h0, c0), *weights, products)
        assert torch.equal(last.nan_to_num(), output[-1:].nan_to_num())
        return output, last_cell

    return run


def results(function, inputs, uses=("output", "c")):
    """Outputs and the gradients of their weighted sum, by name."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output, last_cell = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for name, tensor in (("output", output), ("c", last_cell)):
        weight = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if name in uses:
            loss = loss + (weight * tensor).sum() + tensor.square().sum()  # used twice, as by TAR
    loss.backward()
    return dict(zip(NAMES, [output.detach(), last_cell.detach(), *(tensor.grad for tensor in inputs)]))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("n_steps", "batch_size", "n_features", "width"),
    [
        (1, 1, 1, 1),
        (3, 2, 5, 7),
        (4, 3, 8, 20),
        (4, 6, 8, 20),
        (3, 7, 6, 19),
        (5, 12, 9, 33),
        (4, 13, 17, 48),
        (9, 17, 20, 100),
        (6, 33, 11, 70),
    ],
)
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_results_are_those_of_float64(instruction_set, n_steps, batch_size, n_features, width, products):
    inputs = problem(n_steps, batch_size, n_features, width)
    expected = results(torch_lstm, [tensor.double() for tensor in inputs])
    found = results(kernel(products), inputs)
    of_torch = results(torch_lstm, inputs)
    for name in NAMES:
        assert found[name].shape == expected[name].shape
        if products is None:
            assert error(found[name], expected[name]) <= 2 * error(of_torch[name], expected[name]) + 1e-6, name
        else:
            assert error(found[name], expected[name]) < 1e-2, name  # a rounding to bfloat16 is off by up to 4e-3


@pytest.mark.parametrize("uses", [("output",), ("c",)])
def test_what_is_not_used_has_no_gradient_to_give(uses):
    inputs = problem(5, 3, 4, 20)
    expected = results(torch_lstm, [tensor.double() for tensor in inputs], uses)
    for name, found in results(kernel(None), inputs, uses).items():
        assert error(found, expected[name]) < 1e-5, name


@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(instruction_set, products):
    inputs, before = problem(7, 14, 10, 90), torch.get_num_threads()
    runs = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            x, h0, c0, _, weight_hh, *_ = inputs
            gates = torch.randn(7, 14, 4 * 90, generator=torch.Generator().manual_seed(2))
            cells, output = torch.empty(7, 14, 90), torch.empty(7, 14, 90)
            shared = products == torch.bfloat16, weight_hh, h0, c0, gates, cells
            cpu_recurrent._cpu.lstm_forward(cpu_recurrent._arguments(*shared, output=output.data_ptr()))
            grad_gates, grad_h0, grad_c0 = torch.empty_like(gates), torch.empty_like(h0), torch.ones_like(c0)
            addresses = {"grad_gates": grad_gates, "grad_h0": grad_h0, "grad_c0": grad_c0, "grad_output": output}
            addresses = {name: tensor.data_ptr() for name, tensor in addresses.items()}
            cpu_recurrent._cpu.lstm_backward(cpu_recurrent._arguments(*shared, **addresses))
            runs.append([gates, cells, output, grad_gates, grad_h0, grad_c0])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))


@pytest.fixture
def native_products(instruction_set, monkeypatch):
    """The products over all steps by the native kernels, on every instruction set."""
    monkeypatch.setattr(cpu_recurrent, "NATIVE_PRODUCTS", (instruction_set,))


def transposed(matrix):
    """The same matrix, with contiguous columns."""
    return matrix.t().contiguous().t()


def between_others(matrix):
    """The same matrix, with no contiguous dimension."""
    return matrix.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (7, 3, 50), (8, 16, 48), (9, 33, 47), (203, 37, 340), (30, 1100, 49), (20, 1025, 16), (0, 5, 4)],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_products_over_all_steps(native_products, rows, depth, columns, bf16):
    left, right, bias = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    rounds = bf16 and cpu_recurrent._cpu.bf16_products()
    exact = [matrix.bfloat16().double() if rounds else matrix.double() for matrix in (left, right)]
    layouts, expected, terms = (transposed, between_others, torch.Tensor.clone), exact[0] @ exact[1], depth**0.5
    found = [cpu_recurrent._product(of_left(left), right, bf16) for of_left in layouts]
    found += [cpu_recurrent._product(left, of_right(right), bf16) for of_right in layouts]
    assert all(torch.equal(product, found[0]) for product in found), "a layout changes a bit"
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-6 * terms * 4)
    with_bias = cpu_recurrent._product(left, right, bf16, bias)
    torch.testing.assert_close(with_bias.double(), expected + bias, rtol=0, atol=1e-6 * terms * 4)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_number_of_threads_changes_no_bit_of_a_product(native_products, bf16):
    left, right, before = torch.randn(250, 600), torch.randn(600, 500), torch.get_num_threads()
    products = []
    try:
        for n_threads in (1, 2, 3, 16):
            torch.set_num_threads(n_threads)
            products.append(cpu_recurrent._product(left, right, bf16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(product, products[0]) for product in products)


def test_a_layer_by_native_products_alone(native_products):
    inputs = problem(9, 15, 20, 100)
    expected = results(torch_lstm, [tensor.double() for tensor in inputs])
    for products, most in ((None, 1e-6), (torch.bfloat16, 1e-2)):
        for name, found in results(kernel(products), inputs).items():
            assert error(found, expected[name]) < most, name


def test_extreme_gates_stay_finite(instruction_set):
    x, h0, c0, *weights = problem(4, 3, 5, 20)
    inputs = [1e4 * x, h0, 1e3 * c0, *weights]
    expected = results(torch_lstm, [tensor.double() for tensor in inputs])
    of_torch = results(torch_lstm, inputs)
    for name, found in results(kernel(None), inputs).items():
        assert found.isfinite().all(), name
        assert error(found, expected[name]) <= 4 * error(of_torch[name], expected[name]) + 1e-6, name


def test_nan_is_handed_on():
    inputs = problem(4, 3, 5, 20)
    inputs[0][1, 2, 3] = torch.nan
    output, _ = kernel(None)(*inputs)
    assert output[1:, 2].isnan().all() and output[0].isfinite().all() and output[:, :2].isfinite().all()


def test_gradients_can_be_differentiated_again():
    """By torch.lstm, whose second derivatives these are."""
    inputs = [tensor.clone().requires_grad_() for tensor in problem(3, 2, 4, 6)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    seconds = []
    for function, given in ((kernel(None), inputs), (torch_lstm, doubles)):
        output, last_cell = function(*given)
        first = torch.autograd.grad(output.square().sum() + last_cell.sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given))
    for found, expected in zip(*seconds):
        assert error(found, expected) < 1e-4


def test_many_gradients_at_once():
    inputs = [tensor.clone().requires_grad_() for tensor in problem(3, 2, 4, 6)]
    rows = []
    for function in (kernel(None), torch_lstm):
        output, _ = function(*inputs)
        many = torch.eye(output.numel()).view(-1, *output.shape)
        rows.append(torch.autograd.grad(output, inputs, many, is_grads_batched=True))
    for found, expected in zip(*rows):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_returned_can_be_written_to():
    """The last state apart from the output, and the gradients of the two biases."""
    inputs = [tensor.clone().requires_grad_() for tensor in problem(4, 3, 5, 20)]
    output, (h, _) = cpu_recurrent.lstm(inputs[0], tuple(inputs[1:3]), *inputs[3:], None)
    before = output.detach().clone()
    h.detach().zero_()
    assert torch.equal(output, before)
    *_, of_ih, of_hh = torch.autograd.grad(output.sum(), inputs)
    assert torch.equal(of_ih, of_hh) and of_ih.data_ptr() != of_hh.data_ptr()


def test_states_that_are_not_contiguous_have_second_derivatives():
    x, h0, c0, *weights = problem(3, 2, 4, 6)
    both = torch.cat([h0, c0], -1).requires_grad_()
    output, _ = kernel(None)(x, *both.chunk(2, -1), *weights)
    (first,) = torch.autograd.grad(output.square().sum(), both, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), both)
    assert second.isfinite().all() and second.any()


def test_threads_leave_the_precision_of_other_products_alone():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    one, other = cpu_recurrent._products(True), cpu_recurrent._products(True)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert matmul.fp32_precision == before


def calls(monkeypatch):
    seen, original = [], cpu_recurrent.lstm
    monkeypatch.setattr(lm.lstm.cpu_recurrent, "lstm", lambda *given: seen.append(given[-1]) or original(*given))
    return seen


def test_a_layer_takes_the_kernels_where_they_pay(monkeypatch):
    seen = calls(monkeypatch)
    layer = WeightDropLSTM(10, 64, 0.5, products=torch.bfloat16)
    state = torch.zeros(1, 4, 64), torch.zeros(1, 4, 64)
    x = torch.randn(8, 4, 10)
    layer(x, state)
    assert seen == [torch.bfloat16]
    layer.eval()(x, state)
    assert seen == [torch.bfloat16, None]  # rounded in training alone
    layer(x[:7], state)  # too few steps
    layer(x.repeat(1, 9, 1), (torch.zeros(1, 36, 64), torch.zeros(1, 36, 64)))  # too large a batch
    WeightDropLSTM(10, 63)(x, (torch.zeros(1, 4, 63), torch.zeros(1, 4, 63)))
    WeightDropLSTM(10, 64, dtype=torch.float64)(x, tuple(s.double() for s in state))
    torch.func.grad(lambda given: layer(given, state)[0].sum())(x)
    assert len(seen) == 2


def test_a_layer_is_that_of_torch():
    torch.manual_seed(0)
    layer = WeightDropLSTM(10, 64, 0.3)
    reference = torch.nn.LSTM(10, 64)
    reference.load_state_dict(layer.state_dict())
    x, state = torch.randn(9, 4, 10), (torch.randn(1, 4, 64), torch.randn(1, 4, 64))
    layer.eval()
    output, (h, c) = layer(x, state)
    expected, (expected_h, expected_c) = reference(x, state)
    for found, wanted in ((output, expected), (h, expected_h), (c, expected_c)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_precision_of_other_products_is_left_alone():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    results(kernel(torch.bfloat16), problem(3, 2, 4, 6))
    assert matmul.fp32_precision == before
