"""Communication between the processes of a run. With one process, or without torch.distributed, every call is a no-op.

With several, every process must make the same calls in the same order.
"""

import secrets
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.mistakes import Mistake

FOLDER_SECONDS = 5.0  # until another process must see a file that the main process has written


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrites the tensor with the main process's, in place, and returns it."""
    if _several():
        dist.broadcast(tensor, src=0)
    return tensor


def agreed(wish: bool, device: torch.device) -> bool:
    """Returns the main process's decision on all processes."""
    return bool(broadcast(torch.tensor(int(wish), device=device))) if _several() else wish


def is_main() -> bool:
    """Returns whether this is the main process, which writes the run's files and decides how far the run is."""
    return not _several() or dist.get_rank() == 0


def told(value: Any) -> Any:
    """Returns the main process's value, of any type that pickle takes, on all processes."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_same(value: Any, what: str) -> None:
    """Raises Mistake on all processes if one of them has another value than the main process. what: names the value."""
    if not _several():
        return
    everyone = _gathered((socket.gethostname(), value))
    for rank, (host, other) in enumerate(everyone):
        if other != everyone[0][1]:
            raise Mistake(
                f"process {rank} (on {host}) has {what} other than process 0 (on {everyone[0][0]}): "
                "all processes of a run need the same"
            )


def check_shared(folder: Path) -> None:
    """Raises Mistake on all processes if one of them does not see the main process's folder."""
    if not _several():
        return
    probe = folder / told(f".seen-{secrets.token_hex(8)}")
    if is_main():
        probe.touch()
    dist.barrier()
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = _gathered((socket.gethostname(), seen))
    if is_main():
        probe.unlink()
    for rank, (host, seen) in enumerate(everyone):
        if not seen:
            raise Mistake(
                f"process {rank} (on {host}) does not see the folder of process 0 (on {everyone[0][0]}), {folder}: "
                "--folder must be on a disk that all machines share"
            )


def _gathered(value: Any) -> list[Any]:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def summed(tensor: Tensor) -> Tensor:
    """Overwrites the tensor with the sum over all processes, in place, and returns it."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_batch(tensor: Tensor) -> Tensor:
    """Returns the tensors [N_rank, ...] of all processes joined along the first dimension, in order of rank.

    A loss on pairs of samples then sees every pair. The call is differentiable: each process gets the sum over all
    processes of the gradients of its own rows. If every process computes the same mean loss of the joined batch and
    gradients are then averaged over processes (as DDP does), the network's gradient equals that of one process with the
    whole batch. Batches may differ in length.
    """
    return _Gather.apply(tensor) if _several() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        own = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, own)
        ctx.lengths = [int(length) for length in lengths]
        # all_gather needs equal shapes: shorter batches are padded, and the padding is cut off again.
        longest = max(ctx.lengths)
        filled = tensor.new_zeros(longest, *tensor.shape[1:])
        filled[: len(tensor)] = tensor
        parts = [torch.empty_like(filled) for _ in ctx.lengths]
        dist.all_gather(parts, filled)
        return torch.cat([part[:length] for part, length in zip(parts, ctx.lengths, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.lengths)[dist.get_rank()]
