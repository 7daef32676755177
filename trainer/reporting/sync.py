"""Sends the log of a run to Weights & Biases, while the run goes on or later.

wandb runs in a process of its own (`tracking`, `trainer sync`). A line of the log is a step of the wandb run, whose id stays in
the run's folder: the service itself knows which lines it has, so none is sent twice.
"""

import hashlib
import json
import netrc
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from trainer.mistakes import Mistake, brief, say
from trainer.reporting.tracked_files import media, send_artifacts, tags
from trainer.storage import files

PROJECT = "tiny-student"
LOCK_SECONDS = 60.0  # how long a sender waits for another one of the same run
REST_SECONDS = 60.0  # how long a sender outlives its run, if that was killed
LOOK_SECONDS = 1.0  # time between two looks at a log that grows
INIT_SECONDS = 30  # how long wandb may take to start, and to log in


def sync(folder: Path, config: Mapping[str, Any], ended: Callable[[float], bool] = lambda _: True) -> int:
    """Sends the lines of a run's log that the service does not have; returns their number.

    Of a finished run also plots, page, packed student and exports (`tracked_files`).
    With WANDB_MODE=offline wandb writes all of them into the run's folder instead.

    Args:
        folder: The run's folder, with log.jsonl.
        config: The recipe as plain values: the run's settings in wandb, with its name there and its group.
        ended: Waits for the end of the run, so many seconds at most, and returns whether it has come. Until then lines
            are sent as they are written.

    Raises:
        Mistake: Without a log, without wandb or a login, and while another process sends this log.
        Exception: Whatever wandb raises.
    """
    path, name = folder / "log.jsonl", str(config.get("name", folder.name))
    if not path.is_file():
        raise Mistake(f"{path}: there is no such file, so there is nothing to send")
    try:
        import wandb
    except ImportError as error:
        raise Mistake(f"wandb cannot be imported ({error}): pip install wandb") from error
    settings = wandb.setup().settings
    if settings.mode == "online" and not _has_key(settings):
        raise Mistake("wandb has no login: run wandb login, or set WANDB_API_KEY")
    try:
        with FileLock(folder / ".sync.lock", timeout=LOCK_SECONDS):
            run = wandb.init(
                project=PROJECT,
                name=name,
                group=name,
                id=_id_of(folder, path),
                resume="allow",
                dir=str(folder),
                config=files.plain(config),
                tags=tags(config),
                settings=_settings(wandb),
            )
            finished = lambda: (folder / "done").is_file() and (folder / "report.json").is_file()
            more = lambda: media(wandb, folder, config) if finished() else {}
            sent = _send(wandb, run, lines_of(path, ended), more)
            unsent = send_artifacts(wandb, run, folder, config) if finished() else []
            run.finish()
            for sentence in unsent:
                say(sentence)
            return sent
    except Timeout:
        raise Mistake(f"{folder}: another process is sending this log") from None


def command(folder: Path, config: Mapping[str, Any], follows: bool) -> int:
    """Does the work of `trainer sync`. Raises Mistake for any failure; with `follows` it does not return (`follow`)."""
    if follows:
        follow(folder, config)
    try:
        return sync(folder, config)
    except Mistake:
        raise
    except Exception as error:  # anything that wandb raises
        if isinstance(error, OSError) and error.filename is not None:  # a file of the run's
            raise
        raise Mistake(
            f"wandb failed: {_first_line(error)}; the same command goes on where it stopped"
        ) from error


def follow(folder: Path, config: Mapping[str, Any]) -> NoReturn:
    """Sends the log of a run that goes on, until the standard input ends, and ends this process.

    A failure is one line on the console. Sending ends `REST_SECONDS` after the run at the latest.
    """
    ended = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()
        ended.set()
        time.sleep(REST_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    status = 0
    try:
        sync(folder, config, ended.wait)
    except BaseException as error:  # whatever it is, it is not the run's
        status = 1
        reason = str(error) if isinstance(error, Mistake) else _first_line(error)
        told = f"trainer: the run is not tracked any more (its log goes on): {reason}; `trainer sync {folder}` sends the log later"
        print(brief(told), file=sys.stderr, flush=True)
    os._exit(status)  # wandb may wait for its service when Python ends


def _first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def lines_of(path: Path, ended: Callable[[float], bool]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log as they are written, until the run has ended. A line that is no JSON object is empty."""
    with open(path, "rb") as file:
        rest = b""
        while True:
            last = ended(LOOK_SECONDS)  # before reading: what was written until then is read
            *whole, rest = (rest + file.read()).split(b"\n")
            for line in whole:
                try:
                    found = json.loads(line)
                except ValueError:
                    found = None
                yield found if isinstance(found, dict) else {}
            if last:
                return


def _send(wandb: Any, run: Any, lines: Iterator[dict[str, Any]], more: Callable[[], dict[str, Any]]) -> int:
    """Sends each line with its number as the step, from the first that the service does not have; returns how many.

    more: what is sent beside the summary.
    """
    charts: set[str] = set()
    rows: dict[Any, dict[str, Any]] = {}
    trainings: dict[str, list[tuple]] = {}
    sent = num_begun = 0
    for step, line in enumerate(lines):
        kind = line.pop("kind", None)
        values = {key: value for key, value in line.items() if key != "time"}
        if kind == "row":
            # A stage may have several rows, one for each name; a resumed run may have written one twice.
            rows[values.get("index", len(rows)), values.get("stage")] = values
        if kind == "begun":
            num_begun += 1
            rows = {key: row for key, row in rows.items() if row.get("index", -1) < values.get("index", 0)}
        chart, along = ("report", "index") if kind == "row" else (str(values.get("stage")), "step")
        if kind == "numbers" and "fit" in values:
            which = (num_begun, values.pop("index", None), values.pop("fit"))
            chart = _chart_of(which, chart, trainings.setdefault(chart, []))
        if step < run.starting_step:
            continue
        sent += 1
        numbers = {key: number for key, value in values.items() if (number := _number(value)) is not None}
        if kind == "summary":
            run.summary.update(values)
            columns, cells = _columns_and_cells(list(rows.values()))
            run.log({"stages": wandb.Table(columns=columns, data=cells), **more()}, step=step)
        elif kind in ("row", "numbers"):
            if chart not in charts:
                charts.add(chart)
                run.define_metric(f"{chart}/*", step_metric=f"{chart}/{along}")
            run.log({f"{chart}/{key}": number for key, number in numbers.items()}, step=step)
    return sent


def _chart_of(training: tuple, stage: str, known: list[tuple]) -> str:
    """Returns the name of a training's charts, its stage's: "prune 2" for the second training of that name.

    training: the number of times that stages began anew before, the stage's number, the training's number within the stage.
    known: the trainings of that name so far, to which this one is added.
    """
    if training not in known:
        known.append(training)
    number = 1 + known.index(training)
    return stage if number == 1 else f"{stage} {number}"


def _id_of(folder: Path, log: Path) -> str:
    """Returns the id of the run in wandb: that of the first call for this log, kept in tracking.json."""
    kept = folder / "tracking.json"
    with open(log, "rb") as file:
        begins = hashlib.sha256(file.readline()).hexdigest()[:16]
    try:
        found = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("begins") == begins and isinstance(found.get("id"), str):
        return found["id"]
    made = secrets.token_hex(4)
    files.write_bytes(kept, files.json_bytes({"id": made, "begins": begins}))
    return made


def _settings(wandb: Any) -> Any:
    """Returns the settings that keep wandb from waiting long, as far as the installed version has them."""
    wanted = {"init_timeout": INIT_SECONDS, "login_timeout": INIT_SECONDS, "console": "off"}
    return wandb.Settings(
        **{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    )


def _has_key(settings: Any) -> bool:
    """Returns whether wandb can log in without a prompt: by its settings and environment, or by the netrc file."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return False
    return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None


def _columns_and_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the rows in the form of wandb.Table, where a column holds numbers only, or text only."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        if not all(row.get(column) is None or _number(row[column]) is not None for row in rows):
            rows = [{**row, column: None if row.get(column) is None else str(row[column])} for row in rows]
    return columns, [[row.get(column) for column in columns] for row in rows]


def _number(value: Any) -> int | float | None:
    """Returns a number of the log, where infinite ones and NaN are texts; None for what is no number."""
    if value in ("nan", "inf", "-inf") and isinstance(value, str):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
