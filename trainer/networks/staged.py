"""Networks written as a chain of named blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.mistakes import Mistake


def as_map(tensor: Tensor) -> Tensor:
    """Any layer's output as a map: [N, D] becomes [N, D, 1, 1], a sequence [N, T, D] becomes [N, D, T, 1]."""
    if not isinstance(tensor, Tensor):
        raise Mistake(f"a layer's output of type {type(tensor).__name__} is no feature map: a tensor is")
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).unsqueeze(-1)
    raise Mistake(f"a layer's output of {tensor.dim()} dimensions is no feature map: 2, 3 or 4 are")


def max_pool(x: Tensor) -> Tensor:
    """Max pooling of 2 x 2 windows, [N, C, H, W] to [N, C, H // 2, W // 2]: `max_pool2d(x, 2)` to the bit.

    Where no gradient is wanted on a CPU it is made of plain maxima, which take a tenth of the time. A network that is
    traced, to be compiled or exported, keeps its pooling.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or x.device.type != "cpu" or torch.is_grad_enabled() and x.requires_grad:
        return functional.max_pool2d(x, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


class Staged(nn.Module):
    """A network written as a chain of named stages; answers the calls that timm's models answer.

    A subclass defines `stages()`, a list of (name, function), each fed the one before's output, and
    `forward_head(x, pre_logits=False)`, which turns the last stage's output into logits [N, K], or with `pre_logits`
    into the pooled embedding [N, D].
    """

    def stages(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        raise NotImplementedError(f"{type(self).__name__} does not list its stages")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def chain(self) -> list[str]:
        """Names of the learned layers where each feeds the next one only, by way of ReLU and pooling; [] elsewhere.

        A depthwise convolution without bias feeds the next directly. The order of the units between two such layers is
        free, and those that are dead can be dropped: see `compression.units.tidy`.
        """
        return []

    def norms(self) -> list[tuple[str, str]]:
        """(layer, BatchNorm that directly follows it) where the network of `batch_norm: false` is what folding gives."""
        return []

    def forward_features(self, x: Tensor) -> Tensor:
        for _, stage in self.stages():
            x = stage(x)
        return x

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last stage's output, and the maps of the stages in `indices` (all of them for None)."""
        maps = []
        for number, (_, stage) in enumerate(self.stages()):
            x = stage(x)
            if indices is None or number in indices:
                maps.append(as_map(x))
        return x, maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
