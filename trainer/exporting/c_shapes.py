"""How a line of C walks through arrays: sizes and steps along axes, as few of them as say the same."""

from collections.abc import Sequence

import numpy as np

AXES = 4  # that a function of student_kernels.c walks through


def sides(shape: list[int], axes: list[int]) -> str:
    """Returns the numbers before, along and after neighbouring axes."""
    first, last = axes[0], axes[-1] + 1
    return ", ".join(str(int(np.prod(part))) for part in (shape[:first], shape[first:last], shape[last:]))


def plain_steps(shape: Sequence[int]) -> list[int]:
    """Returns how far apart neighbours along each axis lie in an array."""
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def steps_to(shape: list[int], out: list[int]) -> list[int]:
    """Returns how far apart neighbours along each axis of `out` lie in an array that is broadcast to it."""
    wide = [1] * (len(out) - len(shape)) + shape
    return [0 if wide[a] == 1 else step for a, step in enumerate(plain_steps(wide))]


def fewest(out: list[int], *steps: list[int]) -> tuple[list[int], list[list[int]]]:
    """Returns a shape with the fewest axes, at least `AXES`, and steps along them that go through the same numbers in the same order."""
    axes: list[list[int]] = []  # size and steps
    for size, *along in zip(out, *steps, strict=True):
        if size == 1:
            continue
        if axes and all(before == size * here for before, here in zip(axes[-1][1:], along, strict=True)):
            axes[-1] = [axes[-1][0] * size, *along]
        else:
            axes.append([size, *along])
    axes = [[1] + [0] * len(steps)] * (AXES - len(axes)) + axes
    return [axis[0] for axis in axes], [[axis[n + 1] for axis in axes] for n in range(len(steps))]


def loops(sizes: Sequence[int], arrays: Sequence[tuple[str, Sequence[int]]]) -> tuple[str, list[str]]:
    """Returns the loops of C through axes that a function does not walk through, and where each array then begins.

    arrays: the expression of each array, and its steps along these axes and further ones.
    """
    names = {axis: f"n{axis}" for axis, size in enumerate(sizes) if size != 1}
    head = "".join(f"for (int32_t {n} = 0; {n} < {sizes[axis]}; {n}++) " for axis, n in names.items())
    begins = [
        array + "".join(f" + {steps[axis]} * {n}" for axis, n in names.items() if steps[axis])
        for array, steps in arrays
    ]
    return head, begins
