"""Runs a function in several processes that form a gloo group, as torchrun would start them."""

import datetime
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(n_ranks: int, function, *arguments, tmp_path) -> None:
    """function(*arguments) on each rank; an exception on any of them is raised here."""
    mp.spawn(_rank, (n_ranks, str(tmp_path / "rendezvous"), function, arguments), nprocs=n_ranks)


def _rank(rank: int, n_ranks: int, rendezvous: str, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=n_ranks, timeout=datetime.timedelta(seconds=120))
    try:
        torch.manual_seed(0)
        function(*arguments)
    finally:
        dist.destroy_process_group()
