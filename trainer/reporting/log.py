"""The log of a run, a file of JSON lines, and its mirror in Weights & Biases.

The file is the record: a failure to write it is raised. wandb is a mirror: at any failure there a warning is
logged, the mirror is switched off, and the run continues.
"""

import json
import logging
import netrc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.storage.files import plain

logger = logging.getLogger(__name__)
INIT_SECONDS = 30  # how long wandb may take to start, and to log in
FINISH_SECONDS = 60  # how long wandb may upload at the end; the rest stays on disk for `wandb sync`


class Log:
    """The numbers of a run, one JSON object a line, appended to a file and flushed at once.

    Every line has "time" (seconds since 1970) and "kind": "numbers" (with "stage", "step" and the values),
    "row" (with "stage" and the row's entries), "warning" (with "stage" and "text") or "summary". Non-finite floats are written as the strings
    "nan", "inf" and "-inf", which Python's float() reads back. A resumed run appends; a last line cut off
    by a kill is removed. Only the main process writes; on the others every call does nothing.

    Args:
        path: The file.
        accelerator: Accelerate's; for wandb an Accelerator(log_with="wandb"), as the mirror is its tracker.
        track: None or "wandb". Without a key or a network wandb works offline, in the folder wandb/ beside the
            log. A resumed run is a new wandb run in the group `name`.
        project: The project in wandb.
        name: The run's name in wandb; by default the folder's.
        config: The run's settings in wandb, a mapping of plain values.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        accelerator: Any = None,
        track: str | None = None,
        project: str = "tiny-student",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if track not in (None, "wandb"):
            raise ValueError(f"track: got {track!r}; allowed: wandb, or nothing")
        if track and accelerator is None:
            raise ValueError(
                "track: wandb is reached through Accelerate; give an Accelerator(log_with='wandb')"
            )
        self.path = Path(path)
        self._file = None
        self._tracker: Any = None
        self._accelerator = accelerator
        self._charts: set[str] = set()
        if accelerator is not None and not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        if track:
            self._start(project, name or self.path.parent.name, dict(config or {}))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def numbers(self, stage: str, step: int, **values: Any) -> None:
        """Writes the values of one step of a stage (losses, learning rate, images per second)."""
        self._write({"kind": "numbers", "stage": stage, "step": step, **values})
        self._mirror(lambda: self._chart(stage, "step", {"step": step, **values}))

    def row(self, row: Mapping[str, Any]) -> None:
        """Writes one row of the report."""
        self._write({"kind": "row", **row})
        self._mirror(lambda: self._chart("report", "index", row))

    def warning(self, stage: str, text: str) -> None:
        """Writes a warning about the result of a stage."""
        self._write({"kind": "warning", "stage": stage, "text": text})

    def table(self, rows: list[dict[str, Any]]) -> None:
        """Shows the rows so far as a wandb.Table. The file already has each row."""
        self._mirror(lambda: self._tracker.log_table("stages", *_columns_and_cells(rows)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes the figures of the whole run."""
        self._write({"kind": "summary", **values})
        self._mirror(lambda: self._tracker.tracker.summary.update(plain(values)))

    def close(self) -> None:
        """Closes the file and finishes the mirror; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._mirror(lambda: self._tracker.finish())
        self._forget()

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

    def _start(self, project: str, name: str, config: dict[str, Any]) -> None:
        """Opens the mirror: online if there is a key, offline otherwise and if going online fails."""
        try:
            modes = _modes()
        except Exception as error:  # wandb is missing, or its own settings are broken
            return self._fail(error)
        trouble = None
        for mode in modes:
            options = {"name": name, "group": name, "dir": str(self.path.parent), "settings": _settings()}
            options.update({"mode": mode} if mode else {})
            try:
                self._accelerator.init_trackers(project, plain(config), {"wandb": options})
                self._tracker = self._accelerator.get_tracker("wandb")
            except Exception as error:
                self._forget()
                trouble = error
                continue
            if trouble is not None:
                logger.warning("wandb is offline, as going online failed: %s", _first_line(trouble))
            return
        self._fail(trouble)

    def _chart(self, chart: str, along: str, values: Mapping[str, Any]) -> None:
        """Sends the numbers among the values as CHART/KEY, with CHART/`along` as the x axis."""
        if chart not in self._charts:
            self._charts.add(chart)
            self._tracker.tracker.define_metric(f"{chart}/*", step_metric=f"{chart}/{along}")
        numbers = plain(values)
        self._tracker.log({f"{chart}/{key}": value for key, value in numbers.items() if _is_number(value)})

    def _mirror(self, call: Callable[[], object]) -> None:
        if self._tracker is None:
            return
        try:
            call()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception | None) -> None:
        """Switches the mirror off for the rest of the run, and logs a warning."""
        self._forget()
        logger.warning("wandb failed and is switched off (the log file goes on): %s", _first_line(error))
        if isinstance(error, ConnectionError):
            _tear_down()

    def _forget(self) -> None:
        """Drops the tracker, from Accelerate's list too, so that accelerator.end_training() does not use it."""
        self._tracker = None
        if self._accelerator is not None:
            kept = [tracker for tracker in self._accelerator.trackers if tracker.name != "wandb"]
            self._accelerator.trackers[:] = kept


def _modes() -> list[str | None]:
    """Returns the modes to try in turn; None leaves the choice to wandb and the user's settings."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online":
        return [None]
    if os.environ.get("WANDB_MODE") or _has_key(settings):
        return [None, "offline"]
    return ["offline"]


def _settings() -> dict[str, Any]:
    """Returns settings that keep wandb from delaying the run, as far as the installed version has them."""
    import wandb

    wanted = {
        "init_timeout": INIT_SECONDS,
        "login_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "console": "off",  # a captured stdout would break together with wandb's helper process
    }
    return {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}


def _has_key(settings: Any) -> bool:
    """Returns whether wandb can log in without a prompt: by its settings and environment, or by the netrc file."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return False
    return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None


def _tear_down() -> None:
    """Makes wandb give up its lost helper process now; otherwise it prints a traceback when Python exits."""
    import wandb

    try:
        wandb.teardown()
    except ConnectionError as error:
        logger.debug("wandb.teardown: %s", error)


def _drop_torn_line(path: Path) -> None:
    """Cuts the file after its last whole line, because a kill may have stopped a write half way."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _columns_and_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the rows in the form of wandb.Table, where a column holds numbers only, or text only."""
    rows = [plain(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        if not all(row.get(column) is None or _is_number(row[column]) for row in rows):
            rows = [{**row, column: None if row.get(column) is None else str(row[column])} for row in rows]
    return columns, [[row.get(column) for column in columns] for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
