"""A pseudo-terminal for tests: what a program writes to it, and what a person would then see."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
import threading
import unicodedata
from collections.abc import Iterator
from unittest import mock


class Shown:
    """What was written to a terminal so far. columns: its width."""

    def __init__(self, columns: int) -> None:
        self.columns, self.written = columns, b""

    @property
    def text(self) -> str:
        return self.written.decode()

    def screen(self) -> list[str]:
        """Returns the lines that stand there, the first line first, without blanks at their ends."""
        lines, row, column = [[]], 0, 0
        for character in self.text:
            if character == "\r":
                column = 0
            elif character == "\n":
                row, lines = row + 1, lines + [[]] * (row + 1 == len(lines))
            else:
                assert not unicodedata.category(character).startswith("C"), "this screen knows no other codes"
                if (
                    column == self.columns
                ):  # a terminal goes on in the next line when the next character comes
                    row, column, lines = row + 1, 0, lines + [[]] * (row + 1 == len(lines))
                line = lines[row] = lines[row] + [" "] * (column - len(lines[row]))
                line[column : column + 1] = [character]
                column += 1
        found = ["".join(line).rstrip() for line in lines]
        while found and not found[-1]:
            found.pop()
        return found


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[Shown]:
    """Makes stdout and stderr a terminal of so many columns inside the context. All was read when it ends."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = Shown(columns)

    def read() -> None:
        with contextlib.suppress(OSError):  # nobody writes any more
            while data := os.read(ours, 4096):
                shown.written += data

    reading = threading.Thread(target=read)
    reading.start()
    try:
        with (
            open(theirs, "w", encoding="utf-8", closefd=False) as out,
            open(theirs, "w", encoding="utf-8", closefd=False) as err,
            mock.patch.object(sys, "stdout", out),
            mock.patch.object(sys, "stderr", err),
        ):
            yield shown
    finally:
        os.close(theirs)
        reading.join()
        os.close(ours)
