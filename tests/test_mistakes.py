"""What a user reads: short lines that name the path, the key or the nearest name."""

import ast
import errno
import itertools
import os
from pathlib import Path

import pytest

from trainer.distillation import answer_space
from trainer.mistakes import MOST_CHARACTERS, Mistake, brief, message_of, nearest
from trainer.storage import checkpoint, files

SOURCES = sorted((Path(__file__).parents[1] / "trainer").rglob("*.py"))


def test_a_long_line_loses_its_middle():
    told = str(Mistake("begin " + "x" * 1000 + " end\nshort\n" + "y" * 301)).split("\n")
    assert [len(line) for line in told] == [300, 5, 300]
    assert told[0].startswith("begin xxx") and told[0].endswith("xxx end") and "x...x" in told[0]
    assert brief("z" * 300) == "z" * 300


def test_names_fit_in_a_message():
    names = [f"layer{n}.conv" for n in range(30)]
    assert nearest("q", ["a", "b"]) == "; there are: a, b"
    told = nearest("q", names)
    assert told.startswith("; there are: layer0.conv, layer1.conv, ") and told.endswith(", ... (30 in all)")
    assert len(told) < 150
    assert nearest("q", map(str, range(41))) == ""
    assert nearest("q", ["x" * 500, "y"]).endswith("x, ... (2 in all)")


def words(node: ast.AST) -> int:
    return sum(
        len(part.value)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def test_the_words_of_a_mistake_leave_room_for_its_values():
    """A longer message would lose its middle."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Mistake", "RecipeError")
            ):
                lines = max(1, ast.unparse(node).count("\\n"))
                found.append((words(node) // lines, f"{path.name}:{node.lineno}"))
    assert len(found) > 100
    assert [each for each in found if each[0] > MOST_CHARACTERS - 80] == []


def fails_at(call, number: int, error: int):
    """A stand-in for a call of the system that fails the time `number`, as a full disk does: without a path."""
    calls = itertools.count()

    def stand_in(*given):
        if next(calls) == number:
            raise OSError(error, os.strerror(error))
        return call(*given)

    return stand_in


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(("name", "number"), [("fsync", 0), ("fsync", 1), ("replace", 0)])
def test_a_write_that_fails_names_its_path(tmp_path, monkeypatch, name, number, error):
    path = tmp_path / "report.json"
    monkeypatch.setattr(os, name, fails_at(getattr(os, name), number, error))
    with pytest.raises(OSError) as caught:
        files.write_bytes(path, b"{}")
    named = path if (name, number) != ("fsync", 1) else tmp_path  # the folder's own sync
    assert message_of(caught.value) == f"{named}: {os.strerror(error)}"
    assert caught.value.errno == error


@pytest.mark.parametrize(("name", "number"), [("fsync", 0), ("fsync", 2), ("rename", 0)])
def test_a_checkpoint_that_fails_names_its_path(tmp_path, monkeypatch, name, number):
    monkeypatch.setattr(os, name, fails_at(getattr(os, name), number, errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path / "fit-0", {}, {"step": 3})
    target = tmp_path / "fit-0" / "00000003"  # or a folder above, whose new entries are synced too
    named = message_of(caught.value).partition(": No space left")[0]
    assert named.startswith(str(target)) or Path(named) in target.parents


def test_answers_that_cannot_be_kept_name_their_path(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails_at(os.fsync, 0, errno.EROFS))
    with pytest.raises(OSError) as caught:
        answer_space.make_file(tmp_path / "records", 100)
    assert message_of(caught.value) == f"{tmp_path / 'records'}: {os.strerror(errno.EROFS)}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_itself(tmp_path):
    with pytest.raises(OSError) as caught:
        files.write_through(Path("/dev/full"), b"x" * 2**16)
    assert message_of(caught.value) == "/dev/full: No space left on device"


def test_an_error_that_has_no_path():
    assert message_of(OSError("gone")) == "gone"
    assert message_of(Mistake("x: is wrong")) == "x: is wrong"
    with pytest.raises(OSError, match=r"^gone$"), files.naming("x"):
        raise OSError("gone")
