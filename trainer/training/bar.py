"""The one progress bar of a recipe, with the time that is left: learning, measuring, packing and drawing counted."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

DRAWING_SECONDS = 5.0  # of the report, a guess
REST_SECONDS = 3.0  # of a stage beside its learning, a guess that holds until one is over
STEADY_SECONDS = 10.0  # a speed is that of whole epochs, of at least so long a time
TICK_SECONDS = 1.0  # the clock of the bar goes on while a stage measures or packs
FORMAT = "{desc}{percentage:3.0f}%|{bar}| "
NARROW = 60  # columns; the loss is left out below that


class Due(NamedTuple):
    """What a stage has to do.

    who: is taught, 'teacher' or 'student': their images take other times. images: that it learns, 0 without a training.
    """

    name: str
    who: str
    images: int


def seconds_left(due: Sequence[Due], speeds: dict[str, float], rest: float) -> float | None:
    """Returns how long stages that have not begun will take; None as long as nothing is known.

    speeds: images learnt in a second, by `Due.who`; for one that has not learnt yet the other's. rest: seconds that a stage takes
    beside its learning.
    """
    known = list(speeds.values())
    if not known and any(stage.images for stage in due):
        return None
    learning = [stage.images / speeds.get(stage.who, known[0]) for stage in due if stage.images]
    return sum(learning) + len(due) * rest


class Bar:
    """Shows how far a recipe is, on a terminal; elsewhere it shows nothing, and `hidden` says so.

    Its unit is a second: those that have passed, of those and the ones that are left. What is left follows from what the run has
    taken so far: images learnt in a second, and the seconds of a stage beside its learning. A thread moves its clock.

    Args:
        stages: All that are to run, in order.
        wanted: Whether this process shows it.
    """

    def __init__(self, stages: Sequence[Due] = (), wanted: bool = False) -> None:
        self._stages, self._before = list(stages), 0.0
        self._bar = tqdm(
            bar_format=FORMAT,
            miniters=0,
            mininterval=0.2,
            delay=1e-9,  # not before it has something to say
            leave=False,
            dynamic_ncols=True,
            # Lines that go elsewhere while the bar is on the terminal would be missed there, or break it where they come back by a pipe.
            disable=not (wanted and stages and sys.stdout.isatty() and sys.stderr.isatty()),
        )
        self._lock = threading.RLock()
        self._speeds: dict[str, float] = {}
        self._rest: float | None = None
        self._number = len(self._stages)  # of the stage that runs
        self._began = self._last = self._clock()
        self._started, self._loss, self._learnt_seconds = self._began, "", 0.0
        self._images = self._done = 0
        self._marks = [(self._began, 0)]  # when so many images had been learnt, at the ends of epochs

    _clock = staticmethod(time.monotonic)

    @property
    def hidden(self) -> bool:
        """Whether nothing is shown, as without a terminal."""
        return bool(self._bar.disable)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Lets what is printed stand above the bar inside the context, and removes the bar at its end."""
        if self.hidden:
            yield
            return
        out, err, over = _Above(self, sys.stdout), _Above(self, sys.stderr), threading.Event()
        ticking = threading.Thread(target=self._tick, args=(over,), name="bar", daemon=True)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                ticking.start()
                yield
        finally:
            over.set()
            ticking.join()
            self._bar.clear()
            self._bar.close()
            out.end()
            err.end()

    def went_on(self, seconds: float) -> None:
        """Notes how many seconds earlier sessions of the run took."""
        self._before = self._bar.initial = self._bar.n = seconds

    def stage(self, number: int) -> None:
        """Begins a stage, by its number; the ones before it are over."""
        with self._lock:
            now = self._clock()
            if self._number < len(self._stages):
                self._rest = max(0.0, now - self._began - self._learnt_seconds)
            self._number, self._began, self._learnt_seconds = number, now, 0.0
            self._images = self._stages[number].images if number < len(self._stages) else 0
            self._done = 0
            name = self._stages[number].name if number < len(self._stages) else "report"
            place = f"[{number + 1}/{len(self._stages)}] " if number < len(self._stages) else ""
            self._bar.set_description_str(f"{place}{name} ", refresh=False)
            self._loss = ""
            self._show()

    def learns(self, images: int, done: int) -> None:
        """Begins a training of so many images, of which `done` were learnt before this process."""
        with self._lock:
            self._last = self._clock()
            self._images, self._done = images, done
            self._marks = [(self._last, done)]

    def learnt(self, done: int, loss: float, ends_epoch: bool = False) -> None:
        """Notes that a training has learnt so many images, and its loss."""
        with self._lock:
            now = self._clock()
            while len(self._marks) > 1 and now - self._marks[1][0] >= STEADY_SECONDS:
                self._marks.pop(0)
            since, images = self._marks[0]
            if done > images and now > since:
                self._speeds[self._who] = (done - images) / (now - since)
            self._learnt_seconds += now - self._last
            self._last = now
            if ends_epoch:
                self._marks.append((now, done))
            self._done = done
            self._loss = f"  loss {loss:.4f}"
            self._show()

    @property
    def _who(self) -> str:
        return self._stages[self._number].who if self._number < len(self._stages) else ""

    @property
    def left(self) -> float | None:
        """Seconds that are left; None as long as they are not known."""
        guessed = REST_SECONDS if self._rest is None else self._rest
        after = seconds_left(self._stages[self._number + 1 :], self._speeds, guessed)
        to_learn = self._images - self._done
        speed = self._speeds.get(self._who, next(iter(self._speeds.values()), None))
        if after is None or (to_learn > 0 and speed is None):
            return None
        if self._number >= len(self._stages):
            return max(0.0, DRAWING_SECONDS - (self._clock() - self._began))
        beside = self._clock() - self._began - self._learnt_seconds
        learning = 0.0
        if to_learn > 0 and speed:
            learning = to_learn / speed
            if self._last > self._began:  # a part of it has been learnt since the last call
                since = min(learning, self._clock() - self._last)
                learning, beside = learning - since, beside - since
        return learning + max(0.0, guessed - beside) + after + DRAWING_SECONDS

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(TICK_SECONDS):
            with self._lock:
                self._show()

    def _show(self) -> None:
        if self.hidden or not self._bar.desc:
            return
        left, passed = self.left, self._before + self._clock() - self._started
        shown = "?" if left is None else tqdm.format_interval(left)
        loss = self._loss if (self._bar.format_dict["ncols"] or NARROW) >= NARROW else ""
        self._bar.bar_format = f"{FORMAT}{tqdm.format_interval(passed)}<{shown}{loss}"
        self._bar.total = None if left is None else passed + left
        self._bar.update(max(0.0, passed - self._bar.n))

    def _print(self, lines: str, stream: TextIO) -> None:
        """Prints whole lines where the bar was, and the bar below them."""
        with self._lock:
            self._bar.clear(nolock=True)
            stream.write(lines)
            stream.flush()
            if self._bar.desc:
                self._bar.refresh(nolock=True)


class _Above:
    """A stream whose whole lines are printed above a bar. In a process that was forked off it is the stream itself."""

    def __init__(self, bar: Bar, stream: TextIO) -> None:
        self._bar, self._stream, self._line, self._process = bar, stream, "", os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() != self._process:  # its bar is a copy, whose lock another thread may have held
            return self._stream.write(text)
        with self._bar._lock:
            whole, end, rest = (self._line + text).rpartition("\n")
            self._line = rest
            if end:
                self._bar._print(whole + end, self._stream)
        return len(text)

    def end(self) -> None:
        """Prints what has no end of line yet."""
        self._stream.write(self._line)
        self._stream.flush()
        self._line = ""

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
