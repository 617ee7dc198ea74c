"""The kernel of an LSTM layer with bfloat16 products: on a GPU where there is one, and everywhere thread by thread on
the CPU (csrc/cuda/emulation.h).

Results are compared with an LSTM in float64, whose tolerance leaves room for roundings to bfloat16 and for nothing
else: a unit, a column or a step that is left out or taken for another is far beyond it.
"""

import shutil
from contextlib import nullcontext

import pytest
import torch
from backends import ON_GPU
from emulation import SHARED_BYTES, SOURCES, broken_emulation, emulation

from fused_mos.lm import WeightDropLSTM, lstm
from fused_mos.lm.recurrent_kernel import RecurrentKernel, kernel_for

if shutil.which("g++") is None:
    pytest.skip("g++ is not there", allow_module_level=True)

pytestmark = pytest.mark.compiles

TOLERANCE = 1e-2  # of a tensor's norm: a rounding to bfloat16 is off by up to 4e-3, and sums of them by less


def emulated(module, multiprocessors=132, order=1, shared_bytes=SHARED_BYTES) -> RecurrentKernel:
    """On so many multiprocessors; `order` seeds the turns of the threads."""
    return RecurrentKernel(module, lambda _: (multiprocessors, shared_bytes), lambda _: nullcontext(order))


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    return emulation(SOURCES, tmp_path_factory.mktemp("emulation"))


@pytest.fixture(
    params=["emulated", pytest.param("gpu", marks=pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU"))]
)
def kernel(request):
    if request.param == "gpu":
        torch.set_default_device("cuda")
        return kernel_for(torch.device("cuda", 0))
    return emulated(request.getfixturevalue("module"))


NAMES = "x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def problem(n_steps, batch_size, n_features, width):
    """Inputs under NAMES, and the gradients of the output and of the last h and c."""
    torch.manual_seed(0)
    bound = width**-0.5
    shapes = [(4 * width, n_features), (4 * width, width), (4 * width,), (4 * width,)]
    inputs = [
        torch.randn(n_steps, batch_size, n_features),
        torch.randn(1, batch_size, width).tanh(),
        torch.randn(1, batch_size, width),
        *(torch.empty(shape).uniform_(-bound, bound) for shape in shapes),
    ]
    grads = [torch.randn(n_steps, batch_size, width), *(torch.randn(1, batch_size, width) for _ in range(2))]
    return inputs, grads


def run(function, inputs, grads):
    """Output, last h, last c, and the gradients of all inputs, of function(x, (h0, c0), *weights)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output, (h, c) = function(leaves[0], (leaves[1], leaves[2]), *leaves[3:])
    results = [output, h, c]
    torch.autograd.backward(results, grads)
    return [r.detach() for r in results] + [leaf.grad for leaf in leaves]


def by_kernel(kernel):
    def function(x, hidden, weight_ih, weight_hh, bias_ih, bias_hh):
        return kernel(kernel.plan(x, weight_hh), x, hidden, weight_ih, weight_hh, bias_ih, bias_hh)

    return function


def by_torch(x, hidden, *weights):
    output, h, c = torch.lstm(x, hidden, weights, True, 1, 0.0, True, False, False)
    return output, (h, c)


def in_float64(inputs, grads):
    return run(by_torch, [t.double().cpu() for t in inputs], [g.double().cpu() for g in grads])


def check(kernel, *shape):
    inputs, grads = problem(*shape)
    results = run(by_kernel(kernel), inputs, grads)
    for name, result, expected in zip(
        ("output", "last h", "last c", *NAMES), results, in_float64(inputs, grads), strict=True
    ):
        error = (result.double().cpu() - expected).norm() / expected.norm()
        assert result.shape == expected.shape and result.dtype == torch.float32
        assert error < TOLERANCE, f"{name}: {error:.4f}"


# one row and sixteen; widths of one block and of several, in part of a block and of a word of eight; one step and many;
# chunks of features beyond those that are on their way at once
SHAPES = [
    (1, 1, 3, 4),
    (2, 1, 8, 8),
    (3, 5, 7, 10),
    (5, 16, 24, 34),
    (4, 9, 30, 62),
    (3, 12, 16, 100),
    (2, 8, 5, 130),
    (2, 3, 5, 420),
]
LARGE = [(70, 12, 280, 960), (70, 12, 960, 960), (70, 12, 960, 620), (110, 15, 300, 1_150), (33, 16, 40, 1_152)]


def is_of_gpu(kernel):
    return ON_GPU and kernel is kernel_for(torch.device("cuda", 0))


@pytest.mark.parametrize("shape", SHAPES + (LARGE if ON_GPU else []), ids=str)
def test_results_and_gradients(shape, kernel):
    if shape in LARGE and not is_of_gpu(kernel):
        pytest.skip("too large to emulate")
    check(kernel, *shape)


@pytest.mark.parametrize("shape", [(3, 12, 16, 100), (2, 2, 5, 420)], ids=str)
def test_fewer_multiprocessors(shape, module):
    """Blocks of twelve units, where there are not enough multiprocessors for blocks of eight."""
    kernel = emulated(module, multiprocessors=40 if shape[-1] == 420 else 10)
    assert kernel.plan(torch.empty(shape[:3]), torch.empty(0, shape[-1])).forward_units == 12
    check(kernel, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [132, 144])
def test_the_widest(multiprocessors, module):
    check(emulated(module, multiprocessors), 2, 2, 5, 1_150)


def test_only_some_gradients_are_wanted(kernel):
    """Of some results, with respect to some inputs: what is left out changes nothing else."""
    inputs, _ = problem(4, 3, 6, 20)
    for of_results, of_inputs in ([0], [0, 3, 4, 5, 6]), ([2], [2, 4]), ([1, 2], [1]), ([0, 1], [0, 6]):
        found = []
        for function, tensors in (by_kernel(kernel), inputs), (by_torch, [t.double().cpu() for t in inputs]):
            leaves = [t.detach().clone().requires_grad_(i in of_inputs) for i, t in enumerate(tensors)]
            output, (h, c) = function(leaves[0], (leaves[1], leaves[2]), *leaves[3:])
            loss = sum([output, h, c][i].square().sum() for i in of_results)
            found.append(torch.autograd.grad(loss, [leaves[i] for i in of_inputs]))
        for ours, expected in zip(*found):
            assert (ours.double().cpu() - expected).norm() < 2 * TOLERANCE * expected.norm()


def test_gradients_cannot_be_differentiated_again(kernel):
    inputs, _ = problem(2, 2, 6, 8)
    x = inputs[0].requires_grad_()
    output, _ = by_kernel(kernel)(x, (inputs[1], inputs[2]), *inputs[3:])
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_order_of_threads_changes_no_bit(module):
    inputs, grads = problem(3, 5, 7, 34)
    first = run(by_kernel(emulated(module)), inputs, grads)
    for order in range(2, 6):
        again = run(by_kernel(emulated(module, order=order)), inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_nan_arrives(kernel):
    """A state that is no number is exchanged as any other; nobody waits for it forever."""
    inputs, grads = problem(3, 2, 6, 20)
    inputs[0][1, 1, 2] = torch.nan
    output, *_ = run(by_kernel(kernel), inputs, grads)
    assert output[:, 0].isfinite().all() and output[0].isfinite().all() and output[1:, 1].isnan().all()
    inputs[1][0, 0, 3] = -torch.nan
    assert run(by_kernel(kernel), inputs, grads)[0].isnan().all(dim=2)[:, 0].all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 17}, "from 1 to 16 rows"),
        ({"batch_size": 0}, "from 1 to 16 rows"),
        ({"width": 9}, "even, from 2 to 1152"),
        ({"width": 1_154}, "even, from 2 to 1152"),
        ({"n_steps": 0}, "from 1 step"),
        ({"n_steps": 2**26}, "to 2\\*\\*31 gates"),
        ({"multiprocessors": 8}, "more blocks than there are multiprocessors"),
        ({"shared_bytes": 48 * 1024}, "do not fit in shared memory"),
    ],
)
def test_what_the_kernel_leaves_to_others(changed, message, module):
    sizes = {"n_steps": 3, "batch_size": 4, "width": 100, "multiprocessors": 132, "shared_bytes": SHARED_BYTES}
    with pytest.raises(ValueError, match=message):
        module.Lstm(*(sizes | changed).values())


def test_plans_of_the_papers_layers(module):
    def blocks(width, multiprocessors):
        plan = module.Lstm(70, 12, width, multiprocessors, 163 * 1024)  # what a block may use on an A100
        return plan.forward_units, plan.forward_blocks, plan.backward_blocks

    assert blocks(960, 132) == (8, 120, 60) and blocks(960, 108) == (12, 80, 60)
    assert blocks(620, 132) == (8, 78, 39) and blocks(1_150, 132) == blocks(1_150, 108) == (12, 96, 72)


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.fixture
def layers(module, monkeypatch):
    """A layer that rounds, of which the emulated kernel computes, and one with the same weights that does not."""
    monkeypatch.setattr(lstm, "kernel_for", lambda device: emulated(module))
    plain, rounded = WeightDropLSTM(6, 20, 0.5), WeightDropLSTM(6, 20, 0.5, products=torch.bfloat16)
    rounded.load_state_dict(plain.state_dict())
    return plain, rounded


def forward(layer, batch_size=3):
    torch.manual_seed(1)
    x, h, c = torch.randn(4, batch_size, 6), torch.randn(1, batch_size, 20), torch.randn(1, batch_size, 20)
    output, (h, c) = layer(x, (h, c))
    return torch.cat([output, h, c])


def test_the_layer_takes_it_in_training_alone(layers):
    plain, rounded = layers
    expected, found = forward(plain), forward(rounded)
    assert not torch.equal(found, expected) and (found - expected).norm() < TOLERANCE * expected.norm()
    for layer in layers:
        forward(layer).square().sum().backward()
    for p, q in zip(*(layer.parameters() for layer in layers)):
        assert (p.grad - q.grad).norm() < 2 * TOLERANCE * p.grad.norm()
    assert (rounded.weight_hh_l0.grad == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(forward(plain, 17), forward(rounded, 17)), "more columns than the kernel has"
    assert torch.equal(forward(plain.double().float().eval()), forward(rounded.eval())), "evaluation"
    half = WeightDropLSTM(6, 20, dtype=torch.float64, products=torch.bfloat16)
    with pytest.raises(ValueError, match="products must be None or torch.bfloat16, got torch.float16"):
        WeightDropLSTM(6, 20, products=torch.float16)
    assert half(torch.randn(4, 3, 6), (torch.zeros(1, 3, 20).double(),) * 2)[0].dtype == torch.float64


def test_the_layer_is_torchs_without_a_kernel():
    """On a CPU, and where it is not asked for."""
    assert kernel_for(torch.device("cpu")) is None
    plain, asked = WeightDropLSTM(6, 20), WeightDropLSTM(6, 20, products=torch.bfloat16)
    asked.load_state_dict(plain.state_dict())
    assert torch.equal(forward(plain), forward(asked))


def test_dropped_weights_are_those_of_the_same_seed_each_time(layers):
    _, rounded = layers
    assert torch.equal(forward(rounded), forward(rounded))


# --------------------------------------------------------------------------------------------------------------- a GPU

only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="torch finds no CUDA GPU")


@only_on_gpu
@pytest.mark.parametrize("shape", [(70, 12, 960, 960), (35, 15, 1_150, 650)], ids=str)
def test_gpu_repeats_give_equal_bits_also_from_a_graph(shape):
    torch.set_default_device("cuda")
    kernel, (inputs, grads) = kernel_for(torch.device("cuda", 0)), problem(*shape)
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def step():
        output, (h, c) = by_kernel(kernel)(leaves[0], (leaves[1], leaves[2]), *leaves[3:])
        return [output, h, c, *torch.autograd.grad([output, h, c], leaves, grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = [t.detach().clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        graph.replay()
        again = step()
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert all(torch.equal(a, b) for a, b in zip(first, captured))


@only_on_gpu
def test_gpu_layer_takes_it():
    layer = WeightDropLSTM(64, 48, 0.5, device="cuda", products=torch.bfloat16)
    x, zeros = torch.randn(9, 4, 64, device="cuda"), torch.zeros(1, 4, 48, device="cuda")
    output, _ = layer(x, (zeros, zeros))
    assert "_Lstm" in output.grad_fn.name()
    assert "_Lstm" not in layer.eval()(x, (zeros, zeros))[0].grad_fn.name()


# ---------------------------------------------------------------------------------------------- what the emulation sees


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("device::sync_block();  // one barrier per step is enough: the next step uses the other sums\n    if", "if"),
        ("shared + step % 2 * SUMS<COLUMNS>", "shared"),
        ("while (!arrived(present))", "while (false)"),
        ("device::wait_for_copies<0>();\n    auto gates", "auto gates"),
    ],
)
def test_the_emulation_sees_a_wait_too_few(right, wrong, tmp_path):
    broken, (inputs, grads) = broken_emulation("lstm.cuh", right, wrong, tmp_path), problem(5, 6, 8, 100)
    expected = in_float64(inputs, grads)[0]

    def wrong_somewhere():
        for order in range(5):
            output = run(by_kernel(emulated(broken, order=order)), inputs, grads)[0]
            yield not (output.double() - expected).norm() < TOLERANCE * expected.norm()

    assert any(wrong_somewhere())
