"""Steps as CUDA graphs: recorded once for each length of a segment, and from then on enqueued by a single call.

A graph repeats kernels at the addresses that they were recorded with. So a function that is replayed takes its segments
from buffers that stay, writes what outlives it into tensors that stay, and depends on no number of the host that
changes. Its random numbers come from torch's default generator, which every graph registers by itself: a replay draws
what an ordinary call would have drawn, and advances the generator as far.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .config import RunConfig
from .errors import CaptureFailed

MAX_GRAPHS = 64
"""Graphs of one function. Lengths beyond them run without: some thirty lengths come often, and a graph that is thrown
away to make room costs more than the steps that it saves."""


class Recorder(Protocol):
    """Records work once, to be repeated. `CudaRecorder` is the real one; tests without a GPU have another."""

    def run(self, function: Callable[[], None]) -> None:
        """Runs the function as a GPU's libraries have to have run it before it is recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Calls the function without effect on any tensor; what is returned repeats the work."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they run one after another, and what one leaves in the pool is
    read by no other."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            # the same for warm-up and capture, so that what cuBLAS keeps for a stream exists before the capture
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        # torch refuses a pool whose graphs are all gone, as those of an evaluation are before training begins
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
    """A recorder for the steps of a run; None without a GPU, where the run wants none, and with `grad_filter_eps`, for
    which the host reads how many rows are left."""
    if device.type != "cuda" or not config.cuda_graphs or config.model.grad_filter_eps:
        return None
    return CudaRecorder(device)


class Replayed:
    """A function of a segment, replayed: its first call with a length runs as it is, which compiles kernels and lets
    libraries choose theirs; the second records it.

    Args:
        function: takes tensors (T, …) and returns nothing; see the module for what it may do.
        recorder: records it.
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
            while isinstance(reason.__context__, Exception):  # the end of a capture complains of what went before
                reason = reason.__context__
            text = (str(reason) or type(reason).__name__).splitlines()[0]
            raise CaptureFailed(
                f"cuda_graphs: a step of {len(segment[0])} rows cannot be recorded as a CUDA graph: {text}; "
                "--no-cuda-graphs trains without"
            ) from error


def allocate_gradients(parameters: Iterable[Tensor]) -> None:
    """Gives each parameter a gradient of zeros, for graphs to write to and an optimizer to find there."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
