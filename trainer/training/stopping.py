"""SIGTERM and SIGHUP (preemption, a closed terminal): the step is finished and kept, then the program ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """The program was told to end, and what it has done is kept. signal: the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """Whether the program was told to end.

    During a training the signal only sets `requested`, and `fit` ends at the next step that can be kept. At all other
    times it raises Stopped at once: a stage begins anew, and files are written whole or not at all. A second signal has
    its usual effect.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._training = False

    @contextlib.contextmanager
    def kept_until_the_step_ends(self) -> Iterator[None]:
        """During this a signal waits for `raise_if_requested`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def raise_if_requested(self) -> None:
        if self.requested is not None:
            raise Stopped(self.requested)

    def receive(self, number: int, _frame: object) -> None:
        """Handles a signal."""
        signal.signal(number, signal.SIG_DFL)
        self.requested = number
        if not self._training:
            raise Stopped(number)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Handles SIGTERM and SIGHUP while it lasts. What the caller handles or ignores itself (nohup) stays the caller's."""
    stop = Stop()
    taken = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, stop.receive)
                taken.append(number)
    try:
        yield stop
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
