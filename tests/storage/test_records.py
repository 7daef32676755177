"""Our own JSON files, cut short, edited or of another shape: refused with the file's name, or not believed."""

import json
import logging
import os
import socket
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image
from torch import nn
from typing_extensions import TypedDict

from trainer.data import examined, image_file
from trainer.data.reading import Reading
from trainer.mistakes import Mistake
from trainer.packing.loading import load
from trainer.runs import resuming
from trainer.storage import checkpoint, files, records
from trainer.storage.lock import lock
from trainer.storage.weights_file import save_file
from trainer.training.weights import load_weights

NO_JSON = [
    "",
    "{",
    '{"a": 1',
    "[" * 100_000,
    "9" * 5000,
    '"\ud800'.encode("utf-8", "surrogatepass"),
]
OTHER_SHAPES: list[Any] = [None, 3, "x", [], [1], {}, {"images": 3}, {"images": [], "threads": "two"}]


class Kind(TypedDict):
    images: list[str | int]
    seconds: float


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_named(tmp_path, text):
    path = tmp_path / "begun.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Mistake, match=r"begun\.json: is damaged: .*; mend it$") as caught:
        records.read(path, dict, "mend it")
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "the whole: input should be a valid dictionary, got []"),
        ({"images": []}, "seconds: field required"),
        ({"images": [[]], "seconds": 1}, "images.0"),
        ({"images": [], "seconds": "1"}, "seconds: input should be a valid number, got '1'"),
        ({"images": [], "seconds": True}, "seconds: input should be a valid number, got True"),
        ({"images": "x" * 9999, "seconds": 1}, "images: input should be a valid list, got 'xxxx"),
    ],
)
def test_another_shape_is_named(value, told):
    with pytest.raises(Mistake) as caught:
        records.parsed(json.dumps(value), "begun.json", Kind)
    assert str(caught.value).startswith(f"begun.json: is damaged: {told}") and len(str(caught.value)) < 300


def test_further_keys_and_numbers_that_are_not_finite_come_back():
    text = '{"images": ["a", 1], "seconds": Infinity, "more": {"x": [null]}}'
    assert records.parsed(text, "x", Kind) == json.loads(text)


@pytest.mark.parametrize(
    "value", [{"images": ["a", 1], "seconds": float("inf")}, {"images": ["ä", {"b": [1, None]}]}]
)
@pytest.mark.parametrize("written", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_a_file_comes_back_and_no_altered_letter_is_believed(tmp_path, value, written):
    path = tmp_path / "begun.json"
    records.write(path, value, **written)
    text = path.read_text()
    assert records.read(path, dict) == value and json.loads(text) == {**value, "sha256": ANY}
    for position, letter in enumerate(text):
        other = text[:position] + ("1" if letter != "1" else "2") + text[position + 1 :]
        path.write_text(other)
        try:
            found = records.read(path, dict)
        except Mistake as error:
            assert str(error).startswith(f"{path}: is damaged: ")
        else:  # between the values, or in the name of the sum
            assert {key: found[key] for key in value} == value
    path.write_text(json.dumps(value))  # as older versions wrote it
    assert records.read(path, dict) == value


def test_begun_json_with_another_digest_is_damage_not_other_images(tmp_path):
    """Valid JSON of the same shape: it was said that the training images are others."""
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "begun.json"
    records.write(path, {"images": ["1ef5f906", 240], "threads": 1}, indent=1)
    path.write_text(path.read_text().replace("1ef5", "1ef86if5"))
    with pytest.raises(
        Mistake, match=r"begun\.json: is damaged: its checksum differs; remove it: the run then"
    ):
        resuming.facts_of_beginning(tmp_path)


@pytest.mark.parametrize("value", OTHER_SHAPES)
def test_begun_json_of_another_shape(tmp_path, value):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "begun.json").write_text(json.dumps(value))
    with pytest.raises(Mistake, match=r"begun\.json: is damaged: .*; remove it: the run then goes on"):
        resuming.facts_of_beginning(tmp_path)


@pytest.mark.parametrize(
    "facts", [[], {"step": "1"}, {"step": 1, "tally": 3}, {"step": 1, "tally": {"finished": 0}}]
)
def test_facts_of_a_checkpoint_of_another_shape_are_damage(tmp_path, caplog, facts):
    class Tally(TypedDict):
        finished: bool

    class Facts(TypedDict):
        step: int
        tally: Tally

    for step in (1, 2):
        checkpoint.save(tmp_path, {"objective": {}}, {"step": step, "tally": {"finished": False}})
    newest = tmp_path / "00000002"
    sums = json.loads((newest / "manifest.json").read_text())
    data = json.dumps(facts).encode()
    (newest / "facts.json").write_bytes(data)
    sums["files"]["facts.json"]["sha256"] = checkpoint.hashlib.sha256(data).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(sums))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load(tmp_path, Facts, ("objective",))[1]["step"] == 1
    assert "00000002/facts.json: is damaged" in caplog.text
    assert checkpoint.load(tmp_path, Facts, ("optimizer",)) is None


@pytest.mark.parametrize(
    "manifest",
    [
        *([], {}, 3, {"files": []}, {"files": {"facts.json": []}}, {"files": {"facts.json": {"sha256": 3}}}),
        {"files": {"../secret": {"sha256": "x"}}},
        {"files": {"a/b": {"sha256": "x"}}},
    ],
)
def test_manifests_of_another_shape(tmp_path, caplog, manifest):
    path = checkpoint.save(tmp_path, {}, {"step": 1})
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.load(tmp_path) is None
    assert "00000001" in caplog.text


def test_a_manifest_that_lost_an_entry_is_damaged(tmp_path, caplog):
    """Without the entry of the best weights, a resumed training would have gone on without them."""
    path = checkpoint.save(tmp_path, {"objective": {}, "best": {}}, {"step": 1})
    sums = json.loads((path / "manifest.json").read_text())
    del sums["files"]["best.safetensors"]
    (path / "manifest.json").write_text(json.dumps(sums))
    assert checkpoint.load(tmp_path) is None
    assert "the manifest does not name best.safetensors" in caplog.text


@pytest.mark.parametrize("holder", ["", "[1]", "{}", '{"pid": 1}', "[" * 100_000])
def test_a_holder_that_is_not_readable_is_unknown(tmp_path, holder):
    pytest.importorskip("fcntl")
    with lock(tmp_path):
        (tmp_path / ".holder").write_text(holder)
        with pytest.raises(Mistake, match="holder unknown"), lock(tmp_path):
            pass


@pytest.mark.parametrize(
    "facts",
    ["{", "[1]", '{"net": 3}', '{"mean": ["a"]}', '{"mean": [0.5]}', '{"mean": [0.5], "std": [1.0, 2.0]}'],
)
def test_what_a_file_of_weights_records_of_itself(tmp_path, facts):
    net = nn.Linear(2, 2)
    path = tmp_path / "w.safetensors"
    save_file(path, net.state_dict(), {"facts": facts})
    with pytest.raises(Mistake, match=r"w\.safetensors: what it records of itself.* damaged"):
        load_weights(net, {}, (1, 1, 2), 2, path)


@pytest.mark.parametrize("change", ["cut", "shape", "value", "sum"])
def test_a_damaged_list_of_examined_photos_is_not_believed(tmp_path, monkeypatch, change):
    monkeypatch.setattr(examined, "cache_folder", lambda: tmp_path / "cache")
    paths = []
    for i in range(2):
        Image.fromarray(np.full((4, 4), 9 * i, np.uint8)).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    right = examined.examine(paths, "photos")
    [record] = (tmp_path / "cache" / "examined").iterdir()
    kept = json.loads(record.read_text())
    if change == "value":
        kept["files"][paths[0]][1] = "is no image"
    elif change == "shape":
        kept["files"][paths[0]] = [kept["files"][paths[0]][0], 3, "x"]
    elif change == "sum":
        kept["sum"] = 3
    record.write_text(json.dumps(kept)[: 30 if change == "cut" else None])
    assert examined.examine(paths, "photos") == right and not right.damaged


# -- paths that are no files


def test_a_pipe_a_socket_and_a_device_are_refused_at_once(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    pipe, plug = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(plug))  # such a path may not be long
    reading = Reading((1, 4, 4))
    for path, kind in ((pipe, "a pipe"), (plug, "a socket"), ("/dev/zero", "a device")):
        for read in (
            files.read_bytes, load, image_file.brightest, lambda path: image_file.read_image(path, reading),
            lambda path: load_weights(nn.Linear(2, 2), {}, (1, 1, 2), 2, path),
        ):  # fmt: skip
            with pytest.raises(Mistake, match=rf"^{path}: (is {kind}; a file is needed|got a file ending)"):
                read(path)


def test_a_missing_file_is_said_as_before(tmp_path):
    with pytest.raises(Mistake, match="cannot be read: No such file"):
        files.read_bytes(tmp_path / "x")
