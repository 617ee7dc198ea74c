"""Time the LSTM layers of the paper's models on a GPU, as CUDA graphs, in 20 seconds:

    python -m benchmarks.gpu_lstm

For each layer, shows median milliseconds of our kernels with bfloat16 products and of cuDNN's LSTM on the same weights,
in TF32 and entirely in bfloat16. `forward` and `backward` include the products over all steps and the casts to
bfloat16; `kernel` is only the recurrence. No weights are dropped.
"""

import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_mos.lm.recurrent_kernel import kernel_for

LAYERS = {"ptb": (12, (280, 960, 960, 620)), "wikitext2": (15, (300, 1150, 1150, 650))}
"""By model: batch columns, and the sizes of the input and of each layer."""
STEPS = 70
REPEATS = 20

Call = Callable[[], object]


def measure() -> list[dict]:
    """A row for each layer, and one for the sum over each model's layers."""
    rows = []
    for model, (columns, sizes) in LAYERS.items():
        layers = [_layer(columns, *pair) for pair in zip(sizes, sizes[1:])]
        names = [f"{model} {n} -> {h}" for n, h in zip(sizes, sizes[1:])]
        total = {key: round(sum(layer[key] for layer in layers), 3) for key in layers[0]}
        rows += [{"layer": name} | layer for name, layer in zip(names, layers)] + [{"layer": f"{model}, all"} | total]
    return rows


def _layer(columns: int, n_features: int, width: int) -> dict[str, float]:
    layer = nn.LSTM(n_features, width).cuda()
    x = torch.randn(STEPS, columns, n_features, device="cuda", requires_grad=True)
    h, c = (torch.zeros(1, columns, width, device="cuda") for _ in range(2))
    weights = [p for _, p in layer.named_parameters()]
    grad = torch.randn(STEPS, columns, width, device="cuda")
    kernel = kernel_for(x.device)
    if kernel is None or (plan := kernel.plan(x, weights[1])) is None:
        raise RuntimeError("there is no kernel for this layer on this GPU")
    torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    found = _both("ours", lambda: kernel(plan, x, (h, c), *weights)[0], [x, *weights], grad)
    found |= {f"ours {name} kernel": time for name, time in _kernels(kernel, plan, x, weights).items()}
    found |= _both("cudnn tf32", lambda: layer(x, (h, c))[0], [x, *weights], grad)
    half, x16 = nn.LSTM(n_features, width).cuda().bfloat16(), x.detach().bfloat16().requires_grad_()
    leaves = [x16, *half.parameters()]
    return found | _both("cudnn bf16", lambda: half(x16, (h.bfloat16(), c.bfloat16()))[0], leaves, grad.bfloat16())


def _both(name: str, forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> dict[str, float]:
    """Time of the forward pass, and the time that the backward pass adds."""
    once = _milliseconds(forward)
    both = _milliseconds(lambda: torch.autograd.grad(forward(), leaves, grad))
    return {f"{name} forward ms": round(once, 3), f"{name} backward ms": round(both - once, 3)}


def _kernels(kernel, plan, x: Tensor, weights: list[Tensor]) -> dict[str, float]:
    """Times of the recurrence alone, forward and backward."""
    (n_steps, columns, _), width = x.shape, weights[1].shape[1]
    bfloat16 = {"dtype": torch.bfloat16, "device": "cuda"}
    gates = torch.randn(n_steps, columns, 4 * width, device="cuda")
    cells, output = (torch.randn(n_steps, columns, width, device="cuda") for _ in range(2))
    h, c, last = (torch.zeros(columns, width, device="cuda") for _ in range(3))
    states = torch.empty(n_steps, columns, plan.padded_width, **bfloat16)
    grad_gates = torch.empty(n_steps, columns, 4 * width, **bfloat16)
    recurrent = torch.zeros(4 * width, plan.padded_width, **bfloat16)
    transposed = torch.zeros(width, 4 * width, **bfloat16)
    forward = (recurrent, *weights[2:], h, c, gates, states, cells, output, last)
    backward = (transposed, gates, cells, c, output, None, grad_gates, None, last)
    return {
        "forward": round(_milliseconds(lambda: kernel.launch(plan.forward, *forward)), 3),
        "backward": round(_milliseconds(lambda: kernel.launch(plan.backward, *backward)), 3),
    }


def _milliseconds(call: Call) -> float:
    """Median time of replaying the call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))


if __name__ == "__main__":
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "layers": measure()}, indent=1))
