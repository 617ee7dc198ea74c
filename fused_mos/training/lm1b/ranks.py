"""The processes of a run: one, or those that torchrun started, in a mesh of data × vocabulary."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from ...runtime import UserError
from ..device import device_named, on_device
from ..errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""After which a rank that waits for one that hangs gives up, so that torchrun can start anew. (A rank that dies is
noticed at once.)"""


class Ranks:
    """This process among the others.

    Ranks that differ in `data` read different columns of text; those that differ in `vocab` hold different rows of the
    decoder, and are otherwise copies of each other. A single process is a group of one, so that all code is the same.

    Raises ConfigError where vocab_parallel does not divide the number of ranks, or this machine has fewer GPUs than
    ranks; RanksNotMet where torchrun or a rank is gone.
    """

    def __init__(self, device: str, vocab_parallel: int):
        self.device = device_named(device)
        self.local_rank = local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"nproc-per-node must be at most the number of GPUs, {torch.cuda.device_count()}, got a local "
                    f"rank {local_rank}"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        n_ranks = int(os.environ.get("WORLD_SIZE", 1))
        if n_ranks % vocab_parallel:
            raise ConfigError(f"vocab_parallel must divide the number of ranks, {n_ranks}, got {vocab_parallel}")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            try:
                self._shared, store, rank = _stores()  # the first outlives its maker: rank 0 may be the one that has it
                dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=COLLECTIVE_TIMEOUT)
            except dist.DistError:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                minutes = COLLECTIVE_TIMEOUT.total_seconds() / 60
                raise RanksNotMet(
                    f"torchrun at {where}, or a rank, is gone or silent for {minutes:g} minutes; start torchrun again"
                ) from None
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()
        self.n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.n_data, self.n_vocab = self.n_ranks // vocab_parallel, vocab_parallel
        self.mesh = init_device_mesh(self.device.type, (self.n_data, self.n_vocab), mesh_dim_names=("data", "vocab"))
        self.data = self.mesh.get_local_rank("data")

    @property
    def is_main(self) -> bool:
        """True for the rank that writes logs and talks to the user."""
        return self.rank == 0

    def columns(self, n: int) -> range:
        """This rank's share of n columns."""
        return range(self.data * n // self.n_data, (self.data + 1) * n // self.n_data)

    def sums(self, *numbers: float | Tensor) -> Tensor:
        """The sums of scalars over all ranks, float64, in one exchange. Those of the host go to the device in one
        copy."""
        of_host = [0.0 if isinstance(n, Tensor) else float(n) for n in numbers]
        total = on_device(torch.tensor(of_host, dtype=torch.float64), self.device)
        for place, number in zip(total.unbind(), numbers):
            if isinstance(number, Tensor):
                place.copy_(number)
        dist.all_reduce(total)
        return total

    def add_up(self, counts: Tensor) -> Tensor:
        """The sum of a tensor of the host over all ranks, on the device."""
        total = counts.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank if there is an error on any: this rank's own, or one that says that another rank has
        it."""
        failed = self.sums(0.0 if error is None else 1.0)[0].item()
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed

    def have_the_same(self, digest) -> bool:
        """True if a hashlib digest is the same on all ranks."""
        number = int.from_bytes(digest.digest()[:7], "big")
        extremes = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        # float64: the flag that it comes from may be any number, also one that no int64 can be
        least = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def close(self) -> None:
        dist.destroy_process_group()


def _stores() -> tuple[dist.Store, dist.Store, int]:
    """torchrun's store, one that no earlier start has written to, and this process's rank.

    torchrun keeps one store through all its restarts, and gloo, asking it for the other ranks' addresses, may be told
    those of ranks that are dead. So the first rank opens a store of its own, and says in torchrun's where it is.
    """
    shared, rank, n_ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    host, key = os.environ["MASTER_ADDR"], f"fused_mos/port/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        own = dist.TCPStore(host, 0, n_ranks, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
        shared.set(key, str(own.port))
        return shared, own, rank
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    # a start for which machines came or went has the count of the one before: ask until the answer is no longer the
    # store of that one
    while True:
        port = int(shared.get(key))
        try:
            own = dist.TCPStore(host, port, n_ranks, is_master=False, timeout=timedelta(seconds=2))
            own.set_timeout(COLLECTIVE_TIMEOUT)
            return shared, own, rank
        except dist.DistNetworkError:
            if time.monotonic() > deadline:
                raise


class RanksNotMet(UserError, RuntimeError):
    """The processes of a run cannot reach each other."""


class OtherRankFailed(RuntimeError):
    """Another rank has met an error, of which it tells itself."""
