from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer.mistakes import Mistake

AMOUNT = "pattern"
SCHEDULES = ("once",)


def check(settings) -> None:
    patterns = settings.pattern
    for pattern in patterns.values() if isinstance(patterns, dict) else [patterns]:
        _n_and_m(pattern)


def n_m(
    weight: Tensor,
    alive: Tensor,
    input_axis: int,
    *,
    pattern: Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")],
) -> tuple[Tensor, list[float]]:
    """Keeps the N largest of every M weights along a layer's inputs, and prunes the rest.

    pattern: N:M, such as "2:4". Of weights of equal magnitude the first stay.
    Raises Mistake if the number of inputs is not a multiple of M.
    2:4 is Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks"; any N:M Zhou et al. 2021, "Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch".
    """
    n, m = _n_and_m(pattern)
    moved = weight.detach().abs().movedim(input_axis, -1)
    if moved.shape[-1] % m:
        raise Mistake(
            f"{moved.shape[-1]} inputs do not split into groups of {m}: name the layer in exclude to leave it alone"
        )
    groups = moved.reshape(-1, m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return alive & mask.reshape(moved.shape).movedim(-1, input_axis), []


def _n_and_m(pattern: str) -> tuple[int, int]:
    n, m = map(int, pattern.split(":"))
    if not 0 < n < m:
        raise Mistake(
            f"pattern: got {pattern!r}; N of every M weights are kept, so N is at least 1 and less than M"
        )
    return n, m
