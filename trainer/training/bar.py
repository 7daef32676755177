"""The one progress bar of a recipe, with the time that is left: learning, measuring, packing and drawing counted."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

DRAWING_SECONDS = 5.0  # of the report, a guess
FORMAT = "{desc} {percentage:3.0f}%|{bar}| "


class Due(NamedTuple):
    """What a stage has to do.

    who: is taught, 'teacher' or 'student': their images take other times. images: that it learns, 0 without a training.
    """

    name: str
    who: str
    images: int


def seconds_left(due: Sequence[Due], speeds: dict[str, float], rest: float | None) -> float | None:
    """Returns how long stages that have not begun will take; None as long as nothing is known.

    speeds: images learnt in a second, by `Due.who`; for one that has not learnt yet the other's. rest: seconds that a stage takes
    beside its learning.
    """
    known = list(speeds.values())
    if due and not known and any(stage.images for stage in due):
        return None
    if due and rest is None:
        return None
    learning = [stage.images / speeds.get(stage.who, known[0]) for stage in due if stage.images]
    return sum(learning) + len(due) * (rest or 0.0)


class Bar:
    """Shows how far a recipe is, on a terminal; elsewhere it shows nothing, and `hidden` says so.

    Its unit is a second: those that have passed, of those and the ones that are left. What is left follows from what the run has
    taken so far: images learnt in a second, and the seconds of a stage beside its learning.

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
            leave=False,
            dynamic_ncols=True,
            disable=None if wanted and stages else True,
        )
        self._speeds: dict[str, float] = {}
        self._rest: float | None = None
        self._number = len(self._stages)  # of the stage that runs
        self._began = self._mark = self._last = self._clock()
        self._started, self._loss, self._learnt_seconds = self._began, "", 0.0
        self._images = self._done = self._marked = 0

    _clock = staticmethod(time.monotonic)

    @property
    def hidden(self) -> bool:
        """Whether nothing is shown, as without a terminal."""
        return bool(self._bar.disable)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Lets what is printed stand above the bar inside the context, and removes the bar at its end."""
        try:
            if self.hidden:
                yield
            else:
                with contextlib.redirect_stdout(DummyTqdmFile(sys.stdout)):
                    yield
        finally:
            self._bar.close()

    def went_on(self, seconds: float) -> None:
        """Notes how many seconds earlier sessions of the run took."""
        self._before = self._bar.initial = self._bar.n = seconds

    def stage(self, number: int) -> None:
        """Begins a stage, by its number; the ones before it are over."""
        now = self._clock()
        if self._number < len(self._stages):
            self._rest = max(0.0, now - self._began - self._learnt_seconds)
        self._number, self._began, self._learnt_seconds = number, now, 0.0
        self._images = self._stages[number].images if number < len(self._stages) else 0
        self._done = 0
        name = self._stages[number].name if number < len(self._stages) else "report"
        place = f"[{number + 1}/{len(self._stages)}] " if number < len(self._stages) else ""
        self._bar.set_description(f"{place}{name}", refresh=False)
        self._loss = ""
        self._show()

    def learns(self, images: int, done: int) -> None:
        """Begins a training of so many images, of which `done` were learnt before this process."""
        self._last = self._mark = self._clock()
        self._images, self._done, self._marked = images, done, done

    def learnt(self, done: int, loss: float, ends_epoch: bool = False) -> None:
        """Notes that a training has learnt so many images, and its loss. The speed is that of the present epoch."""
        now = self._clock()
        if done > self._marked and now > self._mark:
            self._speeds[self._who] = (done - self._marked) / (now - self._mark)
        self._learnt_seconds += now - self._last
        self._last = now
        if ends_epoch:
            self._mark, self._marked = now, done
        self._done = done
        self._loss = f"  loss {loss:.4f}"
        self._show()

    @property
    def _who(self) -> str:
        return self._stages[self._number].who if self._number < len(self._stages) else ""

    @property
    def left(self) -> float | None:
        """Seconds that are left; None as long as they are not known."""
        after = seconds_left(self._stages[self._number + 1 :], self._speeds, self._rest)
        speed = self._speeds.get(self._who)
        if after is None or (self._images > self._done and speed is None):
            return None
        learning = (self._images - self._done) / speed if speed else 0.0
        beside = self._clock() - self._began - self._learnt_seconds
        rest = max(0.0, (self._rest or 0.0) - beside) if self._number < len(self._stages) else 0.0
        return learning + rest + after + DRAWING_SECONDS

    def _show(self) -> None:
        if self.hidden:
            return
        left, passed = self.left, self._before + self._clock() - self._started
        shown = "?" if left is None else tqdm.format_interval(left)
        self._bar.bar_format = f"{FORMAT}{tqdm.format_interval(passed)}<{shown}{self._loss}"
        self._bar.total = None if left is None else passed + left
        self._bar.update(passed - self._bar.n)
