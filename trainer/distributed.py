"""Communication between the processes of a run. With one process, or without torch.distributed, every call is a no-op.

With several, every process must make the same calls in the same order.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Environment variables of launchers.
_LAUNCH = (
    "ACCELERATE_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "OMPI_",
    "PMI_",
)


def on_cpus() -> bool:
    """Returns whether this program computes on CPUs: there is no accelerator, or it is told so (`accelerate launch --cpu`)."""
    told_so = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")
    return told_so or not torch.accelerator.is_available()


def environment_alone() -> dict[str, str]:
    """Returns the environment for a Python process of its own, which is no part of this launch and finds this package.

    It is to be started with `-P`: whatever the current folder has by the package's name is not meant.
    """
    environment = {
        k: v for k, v in os.environ.items() if k == "ACCELERATE_USE_CPU" or not k.startswith(_LAUNCH)
    }
    path = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(path)}


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrites the tensor with the main process's, in place, and returns it."""
    if several():
        dist.broadcast(tensor, src=0)
    return tensor


def agreed(wish: bool, device: torch.device) -> bool:
    """Returns the main process's decision on all processes."""
    return bool(broadcast(torch.tensor(int(wish), device=device))) if several() else wish


def is_main() -> bool:
    """Returns whether this is the main process, which writes the run's files and decides how far the run is."""
    return not several() or dist.get_rank() == 0


def told(value: Any) -> Any:
    """Returns the main process's value, of any type that pickle takes, on all processes."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, in order of rank, on all processes."""
    if not several():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def summed(tensor: Tensor) -> Tensor:
    """Overwrites the tensor with the sum over all processes, in place, and returns it."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def usable_cores() -> int:
    """Returns the number of logical cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def several() -> bool:
    """Returns whether the run has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_batch(tensor: Tensor) -> Tensor:
    """Returns the tensors [N_rank, ...] of all processes joined along the first dimension, in order of rank.

    A loss on pairs of samples then sees every pair. The call is differentiable: each process gets the sum over all
    processes of the gradients of its own rows. If every process computes the same mean loss of the joined batch and
    gradients are then averaged over processes (as DDP does), the network's gradient equals that of one process with the
    whole batch. Batches may differ in length.
    """
    return _Gather.apply(tensor) if several() else tensor


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
