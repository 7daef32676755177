"""Limits the work of building a network that a file names, because anyone may have made the file."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from trainer.mistakes import Mistake

# torch pushes and pops its modes here, in pairs that an exception between would break.
_IN_PAIRS = ("torch.overrides", "torch.utils._device", "torch.utils._python_dispatch", "contextlib")
_IMPORT: Any = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]


@contextlib.contextmanager
def bounded(num_calls: int, num_numbers: int) -> Iterator[None]:
    """Ends the building of networks in this block once it exceeds a limit. Meant for the meta device.

    The count of function calls is the same on every machine, unlike the time. It covers loops that build nothing. Those of
    imports do not count: a model's function may import a large library.

    Args:
        num_calls: The most function calls.
        num_numbers: The most numbers in all parameters and buffers together.

    Raises:
        Mistake: As soon as a limit is exceeded, with the limit.
    """
    thread, calls, numbers, imports = threading.get_ident(), 0, 0, 0
    before = sys.getprofile()

    def count_call(frame: Any, event: str, _function: Any) -> None:
        nonlocal calls, imports
        if frame.f_code is _IMPORT and event in ("call", "return"):
            imports += 1 if event == "call" else -1
        calls += imports == 0 and event in ("call", "c_call")
        if calls > num_calls and frame.f_globals.get("__name__") not in _IN_PAIRS:
            raise Mistake(
                f"its header names a network of more parts than the file can hold ({num_calls:,} calls do not build it)"
            )

    def count_numbers(_module: Any, _name: str, tensor: Any) -> None:
        nonlocal numbers
        if threading.get_ident() == thread and tensor is not None:
            numbers += tensor.numel()
            if numbers > num_numbers:
                raise Mistake(
                    f"its header names a network of more numbers than the file can hold ({num_numbers:,})"
                )

    # Without torch a layout is found that holds no numbers.
    hooks: Any = sys.modules.get("torch.nn.modules.module")
    handles = (
        [
            hooks.register_module_parameter_registration_hook(count_numbers),
            hooks.register_module_buffer_registration_hook(count_numbers),
        ]
        if hooks
        else []
    )
    sys.setprofile(count_call)
    try:
        yield
    finally:
        sys.setprofile(before if callable(before) else None)
        profiler: Any = before
        if hasattr(profiler, "enable"):  # cProfile's is an object that only it can set
            profiler.enable()
        for handle in handles:
            handle.remove()
