"""Tracking is a mirror of the log in another process: nothing of it touches the run, and what it lost is sent later."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.mistakes import Mistake
from trainer.reporting import sync as sync_module
from trainer.reporting import tracking
from trainer.reporting.log import Log
from trainer.reporting.sync import lines_of, sync
from trainer.reporting.tracking import tracked

RECIPE = "name: x\ndata: {dataset: digits}\nstudent: {model: lenet5}\nstages: [{stage: pack}]\n"
STAND_IN = Path(__file__).with_name("wandb_stand_in.py")


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Puts the stand-in before wandb for the processes that are started; the calls that it has got."""
    (tmp_path / "modules").mkdir()
    shutil.copy(STAND_IN, tmp_path / "modules" / "wandb.py")
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), root]))
    monkeypatch.setenv("SERVICE", str(tmp_path / "service"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("FAULT", raising=False)

    def calls(*kinds: str) -> list:
        path = tmp_path / "service"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if not kinds or call[0] in kinds]

    return calls


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "x"


def a_run(folder: Path, steps=(0, 1, 2), ends: bool = True) -> float:
    """A run that is tracked; returns the seconds that tracking took of it."""
    with Log(folder / "log.jsonl") as log:
        started = time.monotonic()
        with tracked(folder, True):
            began = time.monotonic()
            for step in steps:
                log.numbers("distill", step, loss=float("nan") if step == 1 else 1.0, note="text")
            if ends:
                log.row({"stage": "distilled", "index": 0, "top1": 98.0, "agreement": None})
                log.row({"stage": "pruned", "index": 1, "top1": None, "shape": [1, 2]})
                log.summary({"top1": 98.0})
            done = time.monotonic()
        return time.monotonic() - done + began - started


def num_lines(folder: Path) -> int:
    return len((folder / "log.jsonl").read_bytes().splitlines())


def test_the_service_is_told_everything(folder, service, caplog, capfd):
    a_run(folder)
    [[_, project, name, group, resume, where, config, settings, tags]] = service("init")
    assert (project, name, group, resume, where) == ("tiny-student", "x", "x", "allow", str(folder))
    assert config["student"] == {"model": "lenet5"} and settings == {"init_timeout": 30, "console": "off"}
    assert tags == ["digits", "lenet5", "pack"]
    own = json.loads((folder / "tracking.json").read_text())["id"]
    assert json.dumps([call for call in service() if call[0] != "init"]) == json.dumps(
        [
            ["define", "distill/*", "distill/step"],
            ["log", {"distill/step": 0, "distill/loss": 1.0}, 0, own],
            ["log", {"distill/step": 1, "distill/loss": float("nan")}, 1, own],
            ["log", {"distill/step": 2, "distill/loss": 1.0}, 2, own],
            ["define", "report/*", "report/index"],
            ["log", {"report/index": 0, "report/top1": 98.0}, 3, own],
            ["log", {"report/index": 1}, 4, own],
            ["summary", {"top1": 98.0}],
            [
                "log",
                {
                    "stages": [
                        ["stage", "index", "top1", "agreement", "shape"],
                        [["distilled", 0, 98.0, None, None], ["pruned", 1, None, None, "[1, 2]"]],
                    ]
                },
                5,
                own,
            ],
            ["finish"],
        ]
    )
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_run_that_goes_on_is_the_same_and_no_line_is_sent_twice(folder, service):
    a_run(folder, steps=range(3), ends=False)
    a_run(folder, steps=range(3, 5))
    steps = [call[2] for call in service("log")]
    assert steps == list(range(num_lines(folder)))  # every line once
    assert len({call[3] for call in service("log")}) == 1
    assert sent_by_command(folder) == f"{folder}: 0 lines of the log sent\n"
    # What follows a loss on the way is sent later, from where the service is.
    with Log(folder / "log.jsonl") as log:
        log.numbers("share", 0, loss=2.0)
        log.numbers("share", 1, loss=2.5)
    assert sent_by_command(folder) == f"{folder}: 2 lines of the log sent\n"
    assert [call[2] for call in service("log")] == list(range(num_lines(folder)))


def test_trainings_of_one_name_and_what_began_anew_are_not_joined(folder, service):
    with Log(folder / "log.jsonl") as log:
        log.numbers("prune", 5, index=1, fit=0, loss=1.0)
        log.numbers("prune", 5, index=2, fit=0, loss=2.0)
        log.row({"stage": "pruned", "index": 2, "top1": 90.0})
        log.numbers("prune", 5, index=2, fit=1, loss=3.0)
    sent_by_command(folder)
    with Log(folder / "log.jsonl") as log:
        log.numbers("prune", 6, index=2, fit=1, loss=4.0)
        log.begun(2)
        log.numbers("prune", 5, index=2, fit=0, loss=5.0)
        log.row({"stage": "packed", "index": 2, "top1": 91.0})
        log.summary({})
    sent_by_command(folder)
    sent = [(list(call[1].items()), call[2]) for call in service("log")]
    assert sent == [
        ([("prune/step", 5), ("prune/loss", 1.0)], 0),
        ([("prune 2/step", 5), ("prune 2/loss", 2.0)], 1),
        ([("report/index", 2), ("report/top1", 90.0)], 2),
        ([("prune 3/step", 5), ("prune 3/loss", 3.0)], 3),
        ([("prune 3/step", 6), ("prune 3/loss", 4.0)], 4),
        ([("prune 4/step", 5), ("prune 4/loss", 5.0)], 6),
        ([("report/index", 2), ("report/top1", 91.0)], 7),
        ([("stages", [["stage", "index", "top1"], [["packed", 2, 91.0]]])], 8),
    ]


def test_every_row_of_a_stage_is_in_the_table_once(folder, service):
    with Log(folder / "log.jsonl") as log:
        for top1 in (80.0, 90.0):  # a resumed run has written both twice
            log.row({"stage": "pruned", "index": 1, "top1": top1})
            log.row({"stage": "recovered", "index": 1, "top1": top1 + 5})
        log.summary({})
    sent_by_command(folder)
    columns, cells = service("log")[-1][1]["stages"]
    assert (columns, cells) == (["stage", "index", "top1"], [["pruned", 1, 90.0], ["recovered", 1, 95.0]])


def sent_by_command(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "sync", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "fault", ["init", "define", "log:connection", "summary", "finish:connection", "log:exit"]
)
def test_a_failure_is_one_line_and_the_rest_is_sent_later(folder, service, monkeypatch, capfd, caplog, fault):
    monkeypatch.setenv("FAULT", fault)
    a_run(folder)
    _, told = capfd.readouterr()
    assert told.count("\n") == 1 and "Traceback" not in told and not caplog.records
    kind = {"connection": "ConnectionResetError", "exit": "SystemExit"}.get(
        fault.partition(":")[2], "RuntimeError"
    )
    assert told == (
        f"trainer: the run is not tracked any more (its log goes on): {kind}: lost; `trainer sync {folder}` "
        "sends the log later\n"
    )
    assert num_lines(folder) == 6
    monkeypatch.delenv("FAULT")
    sent_by_command(folder)
    last = {call[2]: call for call in service("log")}
    assert sorted(last) == list(range(6)) and service()[-1] == ["finish"]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_service_that_hangs_costs_the_seconds_of_the_end_and_no_more(
    folder, service, monkeypatch, caplog, call
):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)
    monkeypatch.setenv("FAULT", f"{call}:slow")
    assert a_run(folder) < 4
    [record] = caplog.records
    assert record.getMessage() == (
        f"wandb took longer than 2 s and is switched off; `trainer sync {folder}` sends the rest of the log"
    )
    assert num_lines(folder) == 6


def test_the_seconds_of_the_end():
    assert tracking.FINISH_SECONDS == 10


def test_nothing_is_started_for_a_run_that_is_not_tracked(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with tracked(folder, False):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml"]


def test_no_process_can_be_started(folder, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    a_run(folder)
    [record] = caplog.records
    assert "wandb is not used: no process can be started" in record.getMessage() and num_lines(folder) == 6


def test_an_error_of_the_run_passes_through(folder, service):
    with pytest.raises(KeyboardInterrupt), tracked(folder, True), Log(folder / "log.jsonl") as log:
        log.numbers("train", 1, loss=3.0)
        raise KeyboardInterrupt
    assert [call[0] for call in service("log", "finish")] == ["log", "finish"]


def test_a_killed_run_leaves_a_sender_that_ends_by_itself(folder, service):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom trainer.reporting.log import Log\n"
        "from trainer.reporting.tracking import tracked\nhere = Path(sys.argv[1])\n"
        "with Log(here / 'log.jsonl') as log, tracked(here, True):\n"
        "    log.numbers('train', 1, loss=3.0)\n    print('on', flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "on\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 30
    while not service("finish") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [call[0] for call in service("log", "finish")] == ["log", "finish"]


# ---- what sync says


def test_what_cannot_be_sent(folder, service, monkeypatch, capsys):
    assert main(["sync", str(folder)]) == 2
    assert "log.jsonl: there is no such file, so there is nothing to send" in capsys.readouterr().err
    Log(folder / "log.jsonl").close()
    monkeypatch.syspath_prepend(folder.parent / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    with pytest.raises(Mistake, match="no login: run wandb login, or set WANDB_API_KEY"):
        sync(folder, {})
    (folder / "netrc").write_text("machine example.org login user password k\n")
    (folder / "netrc").chmod(0o600)
    with pytest.raises(Mistake, match="no login"):
        sync(folder, {})
    (folder / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert sync(folder, {}) == 0
    monkeypatch.setattr(sync_module, "LOCK_SECONDS", 0.2)
    with (
        sync_module.FileLock(folder / ".sync.lock"),
        pytest.raises(Mistake, match="another process is sending"),
    ):
        sync(folder, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Mistake, match="wandb cannot be imported .*: pip install wandb"):
        sync(folder, {})
    assert main(["sync", str(folder)]) == 2


def test_another_log_is_another_run(folder, service, monkeypatch):
    monkeypatch.syspath_prepend(folder.parent / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with Log(folder / "log.jsonl") as log:
        log.numbers("train", 1, loss=3.0)
    assert sync(folder, {"name": "x"}) == 1 and sync(folder, {"name": "x"}) == 0
    (folder / "log.jsonl").unlink()
    with Log(folder / "log.jsonl") as log:
        log.numbers("train", 1, loss=4.0)
    assert sync(folder, {"name": "x"}) == 1
    assert len({call[3] for call in service("log")}) == 2


def test_lines_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\nno json\n[3]\n{"a"')
    more = iter([b"", b': 2}\n{"a": 3}\n', b'{"torn'])

    def ended(_seconds: float) -> bool:
        with open(path, "ab") as file:
            file.write(next(more, b""))
        return not more.__length_hint__()

    assert list(lines_of(path, ended)) == [{"a": 1}, {}, {}, {"a": 2}, {"a": 3}]


def test_wandb_itself_offline(folder, monkeypatch, caplog):
    """The module itself, where its user has chosen that nothing is sent: it writes into the run's folder."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC", "XDG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    a_run(folder)
    assert not caplog.records
    [run] = (folder / "wandb").glob("offline-run-*")
    assert run.name.endswith(json.loads((folder / "tracking.json").read_text())["id"])
    [data] = run.glob("*.wandb")
    assert data.stat().st_size > 500 and b"distill/loss" in data.read_bytes()
