"""Steps as CUDA graphs: recorded once for each segment length, then launched by a single call.

A graph repeats its kernels at the recorded addresses. A replayed function must therefore read its inputs from permanent
buffers, write results to permanent tensors, and not depend on host values that change. Its random numbers come from
torch's default generator, which every graph registers: a replay draws the numbers that an ordinary call would have
drawn, and advances the generator by as many.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .config import RunConfig
from .errors import CaptureFailed

MAX_GRAPHS = 64
"""Maximum number of graphs of one function; further lengths run without a graph. About thirty lengths are frequent, and
evicting a graph for a rare length costs more than replaying saves."""


class Recorder(Protocol):
    """Records work once, to be repeated. `CudaRecorder` does so on a GPU; tests without a GPU have their own."""

    def run(self, function: Callable[[], None]) -> None:
        """Runs the function once, as a warm-up that libraries need before recording."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records the function without changing any tensor. Returns a function that repeats the work."""


class CudaRecorder:
    """Records CUDA graphs in one shared memory pool. This is safe because they run one after another, and none reads
    what another has left in the pool."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            # one stream for warm-up and capture: cuBLAS allocates its workspace of a stream before the capture
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        # torch refuses a pool without living graphs, as after an evaluation before training begins
        self._keeps_pool: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], None]) -> None:
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            function()
        present.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        self._keeps_pool = self._keeps_pool or graph
        return graph.replay


def recorder_for(config: RunConfig, device: torch.device) -> Recorder | None:
    """Returns a recorder for the steps of a run. Returns None without a GPU, with cuda_graphs=False, and with
    grad_filter_eps, for which the host must read how many rows are left."""
    if device.type != "cuda" or not config.cuda_graphs or config.model.grad_filter_eps:
        return None
    return CudaRecorder(device)


class Replayed:
    """A function of a segment that is recorded and replayed. The first call with a length runs without recording, to
    compile and select kernels; the second call records.

    Args:
        function: takes tensors (T, …) and returns nothing. The module's docstring says what it must not do.
        recorder: records the function.
        longest: largest T.
    """

    def __init__(self, function: Callable[..., None], recorder: Recorder, longest: int):
        self._function, self._recorder, self._longest = function, recorder, longest
        self._buffers: list[Tensor] = []  # (longest, …) each
        self._seen: set[int] = set()
        self._replays: dict[int, Callable[[], None]] = {}

    @property
    def n_graphs(self) -> int:
        return len(self._replays)

    def __call__(self, *tensors: Tensor) -> None:
        """Raises CaptureFailed."""
        length = len(tensors[0])
        if not self._buffers:
            self._buffers = [tensor.new_empty(self._longest, *tensor.shape[1:]) for tensor in tensors]
        segment = [buffer[:length] for buffer in self._buffers]
        for own, tensor in zip(segment, tensors, strict=True):
            own.copy_(tensor)
        if length in self._replays:
            self._replays[length]()
        elif length in self._seen and self.n_graphs < MAX_GRAPHS:
            self._replays[length] = self._recorded(segment)
            self._replays[length]()
        else:
            self._seen.add(length)
            self._recorder.run(lambda: self._function(*segment))

    def _recorded(self, segment: list[Tensor]) -> Callable[[], None]:
        try:
            return self._recorder.record(lambda: self._function(*segment))
        except Exception as error:
            reason = error
            while isinstance(reason.__context__, Exception):  # ending a failed capture raises on top of the cause
                reason = reason.__context__
            text = (str(reason) or type(reason).__name__).splitlines()[0]
            raise CaptureFailed(
                f"cuda_graphs: a step of {len(segment[0])} rows cannot be recorded as a CUDA graph: {text}; "
                "train with --no-cuda-graphs"
            ) from error


def allocate_gradients(parameters: Iterable[Tensor]) -> None:
    """Gives each parameter a gradient of zeros, as the permanent tensor that graphs write to."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
