"""Ranks as processes that gloo joins, for laws of training on several workers."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from components.training.parallel import Worker


def run_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(worker, *args)` on ranks of one CPU thread each; what one raises is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(run_rank, args=(ranks, port, function, args), nprocs=ranks, start_method="forkserver")


def run_rank(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    function(Worker(rank, ranks, torch.device("cpu")), *args)
    dist.barrier()  # a rank that leaves while gloo still answers the other one may abort at exit
    dist.destroy_process_group()
