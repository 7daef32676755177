"""Numbers too small for a full mantissa count as zero while networks are trained."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Counts denormal numbers as zero inside the context: floats below 1.2e-38 in magnitude.

    Weight decay drives a pruned weight, and Adam's two means of its gradient, towards zero for ever: soon half of a
    layer holds denormal numbers, and an Intel core needs a hundred cycles and more for each operation on one.

    The setting is a thread's own, and a thread takes it from the thread that starts it. A run therefore opens this
    before torch starts its threads. Where the processor has no such setting, nothing changes.
    """
    for kind in (np.float16, np.float32, np.float64, np.longdouble):
        np.finfo(kind)  # NumPy 2.0 warns if it first looks at how small numbers can be under this setting
    before = bool((torch.full((1,), 1e-30) * 1e-9 == 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
