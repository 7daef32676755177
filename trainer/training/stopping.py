"""SIGTERM and SIGHUP (preemption, a closed terminal): the step is finished and kept, then the program ends."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

REPEATED_SECONDS = 5.0  # a launcher passes on a signal that its processes have got too


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

    Several processes stop after the same step, although only one of them may get the signal, and none waits for the others
    before. Each counts how often `due` has let it go on. After a signal a thread of each (`runs.together`) holds it there,
    tells the others its count, and all go on to the greatest count.

    Attributes:
        requested: The number of the signal.
        several: Whether other processes must stop too.
        at: The count at which all processes stop, None until it is agreed.
        is_ending: Whether the run is ending anyway, so that a signal changes nothing.
        noticed: Is set by a signal, for the thread.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.several = False
        self.at: int | None = None
        self.is_ending = False
        self.noticed = threading.Event()
        self._passed = 0
        self._is_held = False
        self._changed = threading.Condition()
        self._training = False
        self._since: float | None = None

    @contextlib.contextmanager
    def kept_until_the_step_ends(self) -> Iterator[None]:
        """During this a signal waits for `raise_if_requested`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def due(self) -> int | None:
        """Returns the number of the signal if the run stops here, else None. All processes call it at the same places."""
        if not self.several:
            return self.requested
        with self._changed:
            while self._is_held and self.at is None:
                self._changed.wait(0.1)
            if self.at is not None and self._passed >= self.at:
                return self.requested
            self._passed += 1
        return None

    def raise_if_requested(self) -> None:
        number = self.due()
        if number is not None:
            raise Stopped(number)

    def hold(self, number: int) -> int:
        """Makes `due` wait, because one of the processes got a signal; returns how often `due` has let this one go on."""
        with self._changed:
            self.requested, self._is_held = number, True
            return self._passed

    def agree(self, at: int) -> None:
        """Sets the count at which all processes stop."""
        with self._changed:
            self.at = at
            self._changed.notify_all()

    def receive(self, number: int, _frame: object) -> None:
        """Handles a signal."""
        if self.is_ending:
            return
        if self._since is None:
            self._since = time.monotonic()
            if not launched():
                signal.signal(number, signal.SIG_DFL)
        else:
            if time.monotonic() - self._since > REPEATED_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested, self._is_held = number, True
        self.noticed.set()
        if not self._training:
            raise Stopped(number)


def launched() -> bool:
    """Returns whether this process was started by torchrun or `accelerate launch`."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


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
