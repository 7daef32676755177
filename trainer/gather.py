"""The batches of all processes as one batch, so that a loss on pairs of samples sees every pair."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_batch(tensor: Tensor) -> Tensor:
    """The processes' tensors [N_rank, ...] joined along the first dimension, in order of rank.

    Differentiable: a process gets the sum, over all processes, of the gradients of its own rows. So where
    every process computes the same mean loss of the joined batch, and gradients are then averaged over
    processes (as DDP does), the network's gradient is that of one process holding the whole batch.
    Processes may hold batches of different length. The tensor itself where torch.distributed is not
    initialised or has one process; otherwise every process must call this the same number of times, in the
    same order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        own = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, own)
        ctx.lengths = [int(length) for length in lengths]
        # all_gather wants equal shapes: shorter batches are filled up, and the filling is cut off again.
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
