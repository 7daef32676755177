"""The log is the record: valid, appended, never silently lost. wandb is a mirror that cannot hurt the run."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from trainer.reporting import log
from trainer.reporting import log as log_module
from trainer.reporting.log import Log

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- the file


def test_lines(tmp_path):
    path = tmp_path / "runs" / "x" / "log.jsonl"
    with Log(path) as log:
        log.numbers("distill", 3, loss=0.5, **{"hint/layer3": torch.tensor(2.0)})
        assert lines(path)[0]["loss"] == 0.5  # on the disk at once
        log.row({"stage": "pruned", "index": 1, "top1": 98.25, "agreement": None})
        log.table([{"stage": "pruned"}])
        log.summary({"top1": 98.25, "recipe": Path("x.yaml")})
    numbers, row, summary = lines(path)
    assert all(abs(line.pop("time") - os.stat(path).st_mtime) < 60 for line in (numbers, row, summary))
    assert numbers == {"kind": "numbers", "stage": "distill", "step": 3, "loss": 0.5, "hint/layer3": 2.0}
    assert row == {"kind": "row", "stage": "pruned", "index": 1, "top1": 98.25, "agreement": None}
    assert summary == {"kind": "summary", "top1": 98.25, "recipe": "x.yaml"}


def test_numbers_of_all_kinds_become_valid_json(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.numbers(
            "train", 1, a=float("nan"), b=float("inf"), c=torch.tensor(-math.inf), d=np.float32("nan"),
            e=np.int64(4), f=np.float64(0.1), g=[1.0, (float("nan"), True)], h={1: None},
            i=torch.tensor([1.0, math.inf]), j=np.bool_(False),
        )  # fmt: skip
    [line] = lines(tmp_path / "log.jsonl")
    for key in ("time", "kind", "stage", "step"):
        del line[key]
    assert line == {
        "a": "nan", "b": "inf", "c": "-inf", "d": "nan", "e": 4, "f": 0.1, "g": [1.0, ["nan", True]],
        "h": {"1": None}, "i": [1.0, "inf"], "j": False,
    }  # fmt: skip
    assert math.isnan(float(line["a"]))


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        with Log(tmp_path / "log.jsonl") as log:
            log.numbers("train", step)
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"time": 3, "st', b"\n\n{", b'{"time": 3}'])
def test_a_line_cut_off_by_a_kill_is_removed(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        log.numbers("train", 1)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Log(path) as log:
        log.numbers("train", 2)
    assert path.read_bytes().startswith(whole)
    found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert [line["step"] for line in found] == [1, 2]


def test_a_log_of_one_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"ti')
    with Log(tmp_path / "log.jsonl") as log:
        log.numbers("train", 1)
    assert len(lines(tmp_path / "log.jsonl")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_not_swallowed(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with (
        Log(tmp_path / "log.jsonl") as log,
        pytest.raises(OSError, match=r"log cannot be written.*No space left") as caught,
    ):
        log.numbers("train", 1)
    assert caught.value.filename == str(tmp_path / "log.jsonl")


def test_other_processes_write_nothing(tmp_path):
    class Second:
        is_main_process = False

        def __init__(self):
            self.trackers = []

        def init_trackers(self, *_):
            raise AssertionError("only the main process tracks")

    with Log(tmp_path / "log.jsonl", Second(), track="wandb") as log:
        log.numbers("train", 1)
        log.row({"stage": "trained"})
        log.table([])
        log.summary({})
    assert list(tmp_path.iterdir()) == []


def test_track_is_checked(tmp_path):
    with pytest.raises(ValueError, match="'tensorboard'; allowed: wandb"):
        Log(tmp_path / "log.jsonl", track="tensorboard")
    with pytest.raises(ValueError, match="Accelerator"):
        Log(tmp_path / "log.jsonl", track="wandb")
    assert list(tmp_path.iterdir()) == []


# -- the mirror


class Tracker(GeneralTracker):
    """Stands in for Accelerate's wandb tracker: keeps what it is told, and fails where it is told to."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, *fails: str, error: Exception | None = None) -> None:
        super().__init__()
        self.fails, self.error, self.calls, self.summary = (
            fails,
            error or RuntimeError("lost\nmore"),
            [],
            self,
        )

    @property
    def tracker(self):
        return self

    def _note(self, what: str, *told) -> None:
        self.calls.append((what, *told))
        if what in self.fails:
            raise self.error

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("config", values)

    def define_metric(self, name, step_metric):
        self._note("define", name, step_metric)

    def log(self, values, step=None):
        self._note("log", values)

    def log_table(self, name, columns, data):
        self._note("table", name, columns, data)

    def update(self, values):
        self._note("summary", values)

    def finish(self):
        self._note("finish")


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(log_module, "_modes", lambda: [None, "offline"])


def a_run(path: Path, tracker: Tracker) -> Accelerator:
    accelerator = Accelerator(log_with=tracker)
    with Log(path, accelerator, track="wandb", name="x", config={"lr": 1e-3}) as log:
        for step in range(3):
            log.numbers("distill", step, loss=1.0, note="text")
        log.row({"stage": "distilled", "index": 0, "top1": 98.0, "agreement": None})
        log.table([{"stage": "distilled", "top1": 98.0}, {"stage": "pruned", "top1": None, "shape": (1, 2)}])
        log.summary({"top1": 98.0})
    accelerator.end_training()
    return accelerator


def test_the_mirror_is_told_everything(tmp_path, offline, caplog):
    tracker = Tracker()
    accelerator = a_run(tmp_path / "log.jsonl", tracker)
    assert tracker.calls == [
        ("start",),
        ("config", {"lr": 1e-3}),
        ("define", "distill/*", "distill/step"),
        *(("log", {"distill/step": step, "distill/loss": 1.0}) for step in range(3)),
        ("define", "report/*", "report/index"),
        ("log", {"report/index": 0, "report/top1": 98.0}),
        (
            "table",
            "stages",
            ["stage", "top1", "shape"],
            [["distilled", 98.0, None], ["pruned", None, "[1, 2]"]],
        ),
        ("summary", {"top1": 98.0}),
        ("finish",),
    ]
    assert accelerator.trackers == []
    assert not caplog.records


@pytest.mark.parametrize("fails", ["config", "define", "log", "table", "summary", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("lost\nmore"), ConnectionResetError("lost"), ValueError()])
def test_a_failing_tracker_costs_one_warning(tmp_path, offline, caplog, monkeypatch, fails, error):
    torn_down = []
    monkeypatch.setattr(log_module, "_tear_down", lambda: torn_down.append(True))
    tracker = Tracker(fails, error=error)
    a_run(tmp_path / "log.jsonl", tracker)
    assert [line["kind"] for line in lines(tmp_path / "log.jsonl")] == ["numbers"] * 3 + ["row", "summary"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"switched off (the log file goes on): {type(error).__name__}" in record.getMessage()
    assert "\n" not in record.getMessage()
    # Nothing is asked of it after its failure; a failed start is tried once more, offline.
    assert sum(call[0] == fails for call in tracker.calls) == (2 if fails == "config" else 1)
    assert tracker.calls[-1][0] == fails
    assert torn_down == [True] * isinstance(error, ConnectionError)


def test_offline_when_going_online_fails(tmp_path, offline, caplog):
    class Once(Tracker):
        def start(self):
            self._note("start")
            if len(self.calls) == 1:
                raise TimeoutError("no network")

    tracker = Once()
    a_run(tmp_path / "log.jsonl", tracker)
    assert [call[0] for call in tracker.calls[:3]] == ["start", "start", "config"]
    assert tracker.calls[-1] == ("finish",)
    [record] = caplog.records
    assert record.getMessage() == "wandb is offline, as going online failed: TimeoutError: no network"


def test_an_interrupt_is_not_a_tracking_failure(tmp_path, offline):
    with pytest.raises(KeyboardInterrupt):
        a_run(tmp_path / "log.jsonl", Tracker("log", error=KeyboardInterrupt()))


def test_without_wandb_installed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    a_run(tmp_path / "log.jsonl", Tracker())
    assert len(lines(tmp_path / "log.jsonl")) == 5
    [record] = caplog.records
    assert "wandb" in record.getMessage()


@pytest.mark.parametrize(
    ("mode", "environment", "key", "netrc", "expected"),
    [
        ("online", {}, None, None, ["offline"]),
        ("online", {}, "k" * 40, None, [None, "offline"]),
        ("online", {}, None, "machine api.wandb.ai login user password k", [None, "offline"]),
        ("online", {}, None, "machine example.org login user password k", ["offline"]),
        ("online", {"WANDB_MODE": "online"}, None, None, [None, "offline"]),
        ("offline", {"WANDB_MODE": "offline"}, "k" * 40, None, [None]),
        ("disabled", {"WANDB_MODE": "disabled"}, None, None, [None]),
    ],
)
def test_modes(tmp_path, monkeypatch, mode, environment, key, netrc, expected):
    wandb = pytest.importorskip("wandb")

    class Setup:
        class settings:
            api_key, identity_token_file, base_url = key, None, "https://api.wandb.ai"

    Setup.settings.mode = mode
    monkeypatch.setattr(wandb, "setup", Setup)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc + "\n")
        (tmp_path / "netrc").chmod(0o600)
    assert log._modes() == expected


RUN = """
import os, signal, sys, time
from pathlib import Path
from accelerate import Accelerator
from trainer.reporting.log import Log

accelerator = Accelerator(log_with="wandb")
config = {"training": {"lr": 1e-3}}
log = Log(Path(sys.argv[1]) / "log.jsonl", accelerator, track="wandb", name="x", config=config)
log.numbers("distill", 1, loss=1.0, bad=float("nan"))
if sys.argv[2] == "kill":
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        words = (process / "cmdline").read_bytes().decode().split("\\0")
        if "wandb-core" in words[0] and str(os.getpid()) in words:
            os.kill(int(process.name), signal.SIGKILL)
            found.append(process)
    assert found, "wandb has no helper process any more: rewrite this test"
    time.sleep(0.3)
for step in range(2, 5):
    log.numbers("distill", step, loss=1.0)
log.row({"stage": "distilled", "index": 0, "top1": 98.0})
log.table([{"stage": "distilled", "index": 0, "shape": [1]}, {"stage": "pruned", "index": 1}])
log.summary({"top1": 98.0})
log.close()
accelerator.end_training()
print("the run goes on")
"""


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory) -> dict[str, tuple[Path, subprocess.Popen, str, str]]:
    """Two real runs side by side, in homes without a login: one goes well, in the other wandb is killed."""
    pytest.importorskip("wandb")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC", "XDG"))}
    started = {}
    for how in ("plain", "kill"):
        folder = tmp_path_factory.mktemp(how)
        started[how] = folder, subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder / "run"), how],
            cwd=ROOT, env={**kept, "HOME": str(folder)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    return {how: (folder, run, *run.communicate(timeout=120)) for how, (folder, run) in started.items()}


def test_wandb_without_a_key_goes_offline_by_itself(wandb_runs):
    folder, run, output, errors = wandb_runs["plain"]
    assert run.returncode == 0, errors
    assert output == "the run goes on\n"
    assert "Traceback" not in errors
    assert "switched off" not in errors
    assert len(lines(folder / "run" / "log.jsonl")) == 6
    [wandb] = (folder / "run" / "wandb").glob("offline-run-*")
    [data] = wandb.glob("*.wandb")
    assert data.stat().st_size > 500


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to find the helper process")
def test_a_killed_wandb_does_not_end_the_run(wandb_runs):
    folder, run, output, errors = wandb_runs["kill"]
    assert run.returncode == 0, errors
    assert output == "the run goes on\n"
    assert "Traceback" not in errors
    assert errors.count("switched off (the log file goes on)") == 1
    assert len(lines(folder / "run" / "log.jsonl")) == 6
