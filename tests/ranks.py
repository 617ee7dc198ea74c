"""Runs a function in several processes that form a gloo group, as if started by torchrun."""

import datetime
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(n_ranks: int, function, *arguments, init: bool = True) -> None:
    """Call function(*arguments) on each rank, and raise an exception of any rank here. Without `init` the function
    makes the group itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # fork from a server that has imported torch, since importing it takes longer than the tests
    mp.set_forkserver_preload(["fused_mos"])
    mp.start_processes(_rank, (n_ranks, port, init, function, arguments), n_ranks, start_method="forkserver")


def _rank(rank: int, n_ranks: int, port: int, init: bool, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if init:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    try:
        torch.manual_seed(0)
        function(*arguments)
    finally:
        dist.destroy_process_group()
