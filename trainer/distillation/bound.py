"""One loss bound to the layers it looks at."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression.weights import Weight
from trainer.networks.features import Layer
from trainer.recipe.keys import WeightSchedule


class Bound(nn.Module):
    """One loss at one pair of layers, at several together, or at none, with its projector."""

    def __init__(
        self,
        name: str,
        function: nn.Module,
        asks: list[str],
        pairs: list[tuple[Layer, Layer]],
        weight: float | WeightSchedule,
    ) -> None:
        super().__init__()
        self.name, self.function, self.asks, self.pairs, self.weight = name, function, asks, pairs, weight
        self.projector: nn.Module | None = None
        self.holders: tuple[Weight, Weight] | None = None  # of losses on weights

    def weight_at(self, epoch: float, num_epochs: float) -> float:
        return self.weight.at(epoch, num_epochs) if isinstance(self.weight, WeightSchedule) else self.weight


class WithSettings(nn.Module):
    """A loss function with its settings; a module only so that all terms are held alike."""

    def __init__(self, function, settings: dict) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *fed: Any) -> Tensor:
        return self.function(*fed, **self.settings)


def map_shapes(group: list[tuple[Layer, Layer]]) -> dict[str, Any]:
    student_maps = [torch.Size((2, *mine.shape)) for mine, _ in group]
    teacher_maps = [torch.Size((2, *theirs.shape)) for _, theirs in group]
    return {
        "student_maps": student_maps,
        "teacher_maps": teacher_maps,
        "student_map": student_maps[0],
        "teacher_map": teacher_maps[0],
    }
