"""Networks written as a chain of named blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.mistakes import Mistake


def as_map(tensor: Tensor) -> Tensor:
    """Returns any layer's output as a map: [N, D] becomes [N, D, 1, 1], a sequence [N, T, D] becomes [N, D, T, 1].

    Raises Mistake for what is no tensor, and for other numbers of dimensions (4 stay as they are).
    """
    if not isinstance(tensor, Tensor):
        raise Mistake(f"a layer's output of type {type(tensor).__name__} is no feature map: a tensor is")
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).unsqueeze(-1)
    raise Mistake(f"a layer's output of {tensor.dim()} dimensions is no feature map: 2, 3 or 4 are")


def kept(tensor: Tensor) -> Tensor:
    """Returns the tensor as it is now: operations that later change it in place do not change what is returned.

    The gradient flows through. On a CPU nothing is copied until one of the two is written to; compiled, the compiler
    leaves the copy out where nothing writes.
    """
    lazily = tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not tensor.is_inference()
    return torch._lazy_clone(tensor) if lazily else tensor.clone()


def max_pool(x: Tensor) -> Tensor:
    """Returns the maximum of each 2 x 2 window, [N, C, H, W] to [N, C, H // 2, W // 2]: `max_pool2d(x, 2)`, bit for bit.

    Without a gradient on a CPU, elementwise maxima replace the pooling: they take a tenth of the time. A network
    that is traced (compiled or exported) keeps the pooling operator.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or x.device.type != "cpu" or torch.is_grad_enabled() and x.requires_grad:
        return functional.max_pool2d(x, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def largest(x: Tensor) -> Tensor:
    """Returns the maximum over all positions, [N, C, H, W] to [N, C].

    Its gradient goes to the position that pooling remembers. That of `amax` goes to all positions that equal the maximum, of
    which a compiled network in bfloat16 may find none, because it compares numbers before and after rounding: 0 / 0.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return functional.max_pool2d(x, x.shape[2:]).flatten(1)
    return x.amax((2, 3))


class Mean(nn.Module):
    """The mean over all positions, [N, C, H, W] to [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Blocks(nn.Module):
    """A network written as a chain of named blocks. It has the same feature calls as timm's models.

    A subclass defines `blocks()`, a list of (name, function), where each function gets the output of the one before, and
    `forward_head(x, pre_logits=False)`, which turns the last block's output into logits [N, K], or with `pre_logits`
    into the pooled embedding [N, D].
    """

    def blocks(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Returns (name, function) of each block, in order."""
        raise NotImplementedError(f"{type(self).__name__} does not list its blocks")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits [N, K] for the last block's output, or the embedding [N, D] with `pre_logits`."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def chain(self) -> list[str]:
        """Returns the names of all learned layers if each feeds only the next, through ReLU and pooling; else [].

        Only a depthwise convolution without bias may feed the next layer directly. The units between two layers of a
        chain can be reordered, and dead ones dropped: see `compression.units.tidy`.
        """
        return []

    def norms(self) -> list[tuple[str, str]]:
        """Returns the pairs (layer, BatchNorm directly after it). Folding them gives the network of `batch_norm: false`."""
        return []

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last block's output."""
        for _, block in self.blocks():
            x = block(x)
        return x

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the last block's output, and the maps of the blocks in `indices` (of all blocks for None)."""
        maps = []
        for number, (_, block) in enumerate(self.blocks()):
            x = block(x)
            if indices is None or number in indices:
                maps.append(kept(as_map(x)))
        return x, maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
