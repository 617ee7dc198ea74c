"""The processes of a run: a single one, or those started by torchrun, in a mesh of data × vocabulary."""

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
"""Time after which a rank stops waiting for one that hangs, so that torchrun can restart them. (A rank that dies is
noticed at once.)"""


class Ranks:
    """This process and its place among all ranks.

    Ranks that differ in `data` read different columns of text. Ranks that differ in `vocab` hold different rows of the
    decoder, and are otherwise copies of each other. A single process is a group of one, so all code is the same.

    Raises ConfigError if vocab_parallel does not divide the number of ranks, or this machine has fewer GPUs than ranks;
    RanksNotMet if torchrun or a rank cannot be reached.
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
                self._shared, store, rank = _stores()  # kept alive, since rank 0 may be the one that hosts it
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
        """True for the main rank, which writes logs and prints messages."""
        return self.rank == 0

    def columns(self, n: int) -> range:
        """This rank's share of n columns."""
        return range(self.data * n // self.n_data, (self.data + 1) * n // self.n_data)

    def sums(self, *numbers: float | Tensor) -> Tensor:
        """Returns the sums of scalars over all ranks, in float64, by one all-reduce. Python numbers go to the device in
        one copy."""
        of_host = [0.0 if isinstance(n, Tensor) else float(n) for n in numbers]
        total = on_device(torch.tensor(of_host, dtype=torch.float64), self.device)
        for place, number in zip(total.unbind(), numbers):
            if isinstance(number, Tensor):
                place.copy_(number)
        dist.all_reduce(total)
        return total

    def add_up(self, counts: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over all ranks, on the device."""
        total = counts.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank if any rank has an error: `error` itself on the ranks that have one, OtherRankFailed on
        the others."""
        failed = self.sums(0.0 if error is None else 1.0)[0].item()
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed

    def have_the_same(self, digest) -> bool:
        """Returns True if a hashlib digest is the same on all ranks."""
        number = int.from_bytes(digest.digest()[:7], "big")
        extremes = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def least(self, number: int) -> int:
        """Returns the smallest of all ranks' numbers."""
        # float64, since a number that comes from a flag may exceed int64
        least = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def close(self) -> None:
        dist.destroy_process_group()


def _stores() -> tuple[dist.Store, dist.Store, int]:
    """Returns torchrun's store, a fresh store for this start, and this process's rank.

    torchrun keeps one store through all restarts, in which gloo may find addresses of ranks that are dead. So rank 0
    opens a fresh store for each start, and publishes its port in torchrun's.
    """
    shared, rank, n_ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    host, key = os.environ["MASTER_ADDR"], f"fused_mos/port/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        own = dist.TCPStore(host, 0, n_ranks, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
        shared.set(key, str(own.port))
        return shared, own, rank
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    # a restart because machines joined or left keeps the old count: ask until the port is no longer the old store's
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
    """Another rank has failed; that rank reports the error."""
