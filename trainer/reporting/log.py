"""The log of a run, a file of JSON lines. It is the record: a failure to write it is raised."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.storage.files import plain


class Log:
    """The numbers of a run, one JSON object a line, appended to a file and flushed at once.

    Every line has "time" (seconds since 1970) and "kind": "numbers" (with "stage", "step" and the values; those of a training
    also with "index", the stage's number, and "fit", the training's number within the stage, both from 0), "begun" (with "index":
    what was logged of the stages from there on is of an earlier recipe, or is run anew), "row" (with "stage" and the row's entries), "warning" (with "stage" and "text") or "summary". Non-finite floats are written as the strings
    "nan", "inf" and "-inf", which Python's float() reads back. A resumed run appends; a last line cut off
    by a kill is removed. Only the main process writes; on the others every call does nothing.

    Args:
        path: The file.
        accelerator: Accelerate's; without one this is the main process.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path | str, accelerator: Any = None) -> None:
        self.path = Path(path)
        self._file = None
        if accelerator is not None and not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def numbers(self, stage: str, step: int, **values: Any) -> None:
        """Writes the values of one step of a stage (losses, learning rate, images per second)."""
        self._write({"kind": "numbers", "stage": stage, "step": step, **values})

    def begun(self, index: int) -> None:
        """Writes that the stages from this number on begin anew: what the log has of them no longer counts."""
        self._write({"kind": "begun", "index": index})

    def row(self, row: Mapping[str, Any]) -> None:
        """Writes one row of the report."""
        self._write({"kind": "row", **row})

    def warning(self, stage: str, text: str) -> None:
        """Writes a warning about the result of a stage."""
        self._write({"kind": "warning", "stage": stage, "text": text})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes the figures of the whole run."""
        self._write({"kind": "summary", **values})

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        record = plain({"time": round(time.time(), 3), **line}, not_finite=str)
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while data:  # an unbuffered write may take only a part
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OSError(
                error.errno, f"the log cannot be written: {error.strerror}", str(self.path)
            ) from error


def _drop_torn_line(path: Path) -> None:
    """Cuts the file after its last whole line, because a kill may have stopped a write half way."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
