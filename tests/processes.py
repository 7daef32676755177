"""Two processes of a gloo group, forked from a server that has the imports already: a pair is there in a moment."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What takes seconds to import; the server is started by the first pair, and has used none of it (so it may be forked).
PRELOAD = [
    "accelerate",
    "torch._dynamo",
    "trainer.cli",
    "trainer.runs.runner",
    "trainer.stages.pack",
    "sklearn.datasets",
]


def in_two(function, folder: Path, *arguments, seconds: float = 300, statuses=(0, 0)) -> list[Any]:
    """What function(rank, *arguments) gives in each of two processes, which can reach each other. torch.save must take it.

    statuses: with which they end; one that ends otherwise than with 0 gives None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    (folder / "meet").unlink(missing_ok=True)
    processes = [context.Process(target=_one, args=(function, rank, folder, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(seconds)
            assert process.exitcode == statuses[rank], f"process {rank} ended with {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [None if status else folder / f"{rank}.pt" for rank, status in enumerate(statuses)]
    return [file and torch.load(file, weights_only=True) for file in files]


def _one(function, rank: int, folder: Path, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
