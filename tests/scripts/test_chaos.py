"""scripts/chaos.py: what it kills, fails and loses, on files small enough to follow; whole trials are slow."""

import errno
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

import trainer
from trainer.storage import files

sys.path.insert(0, str(Path(trainer.__file__).parents[1] / "scripts"))
import chaos
import chaos_disk

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="needs Linux"
)


def in_fork(folder, *disk) -> int:
    """Saves old and new content of a file in a fork whose disk is watched; returns its status (minus a signal)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            chaos_disk.Disk(folder / "synced.log", *disk).watch()
            files.write_bytes(folder / "runs" / "a", b"old")
            files.write_bytes(folder / "runs" / "a", b"newer")
            status = 0
        except OSError as error:
            status = error.errno
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_each_operation_can_be_struck_and_the_file_is_whole(tmp_path):
    """A write is: write, sync, rename, removal of what is left, sync of the folder; the same again for the new content."""
    assert in_fork(tmp_path, None, 0.0, None) == 0
    operations = (tmp_path / "synced.log").read_text().splitlines().count("{}")
    found = set()
    for at in range(operations):
        for moment in (0.0, 0.5, 0.9):
            here = tmp_path / f"{at}-{moment}"
            (here / "runs").mkdir(parents=True)
            assert in_fork(here, at, moment, None) == -signal.SIGKILL
            path = here / "runs" / "a"
            found.add(path.read_bytes() if path.exists() else None)
    assert found == {None, b"old", b"newer"}


@pytest.mark.parametrize("number", chaos.FAILURES)
def test_a_failed_operation_leaves_the_old_file(tmp_path, number):
    assert in_fork(tmp_path, None, 0.0, None) == 0
    half = (tmp_path / "synced.log").read_text().splitlines().count("{}") // 2
    (tmp_path / "synced.log").unlink()
    assert in_fork(tmp_path, half, 0.0, number) == number
    assert (tmp_path / "runs" / "a").read_bytes() == b"old"
    assert errno.ENOSPC in chaos.FAILURES


def test_what_was_synced_survives_a_power_failure_and_what_was_not_may_not(tmp_path):
    kept, lost = set(), set()
    for seed in range(30):
        here = tmp_path / str(seed)
        (here / "runs").mkdir(parents=True)
        assert in_fork(here, None, 0.0, None) == 0
        (here / "runs" / "a").with_name("unsynced").write_bytes(b"12345678")
        chaos_disk.lose_unsynced(here / "runs", here / "synced.log", random.Random(seed))
        kept.add((here / "runs" / "a").read_bytes())
        path = here / "runs" / "unsynced"
        lost.add(len(path.read_bytes()) if path.exists() else None)
    assert kept == {b"newer"}
    assert None in lost and 8 in lost and len(lost) > 3


def test_a_rename_that_was_not_synced_may_be_undone(tmp_path, monkeypatch):
    """Without the sync of the folder the old content may come back: what the simulation is there to find."""
    monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    found = set()
    for seed in range(30):
        here = tmp_path / str(seed)
        (here / "runs").mkdir(parents=True)
        (here / "runs" / "a").write_bytes(b"oldest")
        (here / "synced.log").write_text(json.dumps(chaos_disk._told(here / "runs")) + "\n")
        assert in_fork(here, None, 0.0, None) == 0
        chaos_disk.lose_unsynced(here / "runs", here / "synced.log", random.Random(seed))
        path = here / "runs" / "a"
        found.add(path.read_bytes() if path.exists() else None)
    assert found >= {b"newer", b"oldest"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kills", "damage", "saves", "signals"])
def test_one_trial_of_each_kind_ends_as_the_undisturbed_run(tmp_path, what):
    expected = chaos.undisturbed("alone", tmp_path / "undisturbed")
    trial = chaos.trial(what, "alone", 1, expected, tmp_path / what)
    assert trial["same"], trial["told"]
    assert trial["strikes"] > 0
