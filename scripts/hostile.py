"""A hundred inputs that try to run code, to write outside, to take all memory, or to fool a terminal; see `fuzz.py`.

Each is a command line and its files. Whatever happens: the command ends with 0 or 2 and at most a few lines, no marker
file appears, nothing outside the input's own folder changes, and no control character is printed.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.cli import main
from trainer.packing import container
from trainer.packing import network as packed
from trainer.storage.weights_file import save_file

Make = Callable[[Path], list[str]]  # makes the files in a folder; returns the command line
FACTS: dict[str, Any] = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": ["a", "b"]}
RECIPE: dict[str, Any] = {
    "name": "x",
    "data": {"dataset": "digits", "subset": 60, "validation": 30},
    "student": {"model": "lenet5", "width": 1},
    "stages": [{"stage": "train", "training": {"epochs": 1, "batch_size": 30}}],
}
ESCAPES = (
    "\x1b[2J\x1b[31mred",
    "a\nb: 99.9 %",
    "\x07bell",
    "\x9b31m",
    "\u202etxt.exe",
    "../../x",
    "/etc/passwd",
    "\0",
)


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def hostile(folder: Path) -> Callable[[random.Random, int], str]:
    """Returns the attempt of the inputs, which has the number of one of them."""
    inputs = dict(_inputs())

    def attempt(_: random.Random, number: int) -> str:
        if number >= len(inputs):
            return "there is no such input"
        name, make = list(inputs.items())[number]
        inside = folder / str(number) / "inside"
        shutil.rmtree(inside.parent, ignore_errors=True)
        inside.mkdir(parents=True)
        marker = inside.parent / "marker"
        os.environ["MARKER"], os.environ["TRAINER_DATA"] = str(marker), str(inside / "data")
        os.chdir(inside)
        arguments = make(inside)
        before = sorted(path for path in inside.parent.rglob("*") if not path.is_relative_to(inside))
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(arguments)
        text = out.getvalue()
        assert not marker.exists(), f"{name}: code ran"
        after = sorted(path for path in inside.parent.rglob("*") if not path.is_relative_to(inside))
        assert after == before, f"{name}: wrote outside: {set(after) - set(before)}"
        assert status in (0, 1, 2), f"{name}: ended with {status}"
        odd = [letter for letter in text if not letter.isprintable() and letter not in "\n\r"]
        assert not odd, f"{name}: printed {odd[:5]!r}"
        return f"{'accepted' if status == 0 else 'refused'}: {name.partition(':')[0]}"

    return attempt


def _inputs() -> Iterator[tuple[str, Make]]:
    yield from _pickles()
    yield from _recipes()
    yield from _packed()
    yield from _bombs()
    yield from _paths()


def _recipe(folder: Path, text: str | None = None, **changes: Any) -> Path:
    (folder / "r.yaml").write_text(json.dumps(RECIPE | changes) if text is None else text)
    return folder / "r.yaml"


def _with_weights(folder: Path, file: str) -> list[str]:
    student = RECIPE["student"] | {"checkpoint": file}
    return ["run", str(_recipe(folder, student=student)), "--folder", "runs"]


def _pickles() -> Iterator[tuple[str, Make]]:
    calls = {
        "os.system": (os.system, "touch $MARKER"),
        "eval": (eval, "open(__import__('os').environ['MARKER'], 'w')"),
        "exec": (exec, "open(__import__('os').environ['MARKER'], 'w')"),
        "open": (open, "../marker", "w"),
        "compile": (compile, "open(__import__('os').environ['MARKER'], 'w')", "x", "exec"),
        "Path.touch": (Path.touch, Path("../marker")),
    }
    for name, call in calls.items():
        for how in ("zip", "old", "raw 0", "raw 4"):

            def make(folder: Path, call=call, how=how) -> list[str]:
                thing = {"state_dict": _Calls(*call)}
                if how.startswith("raw"):
                    (folder / "w.pth").write_bytes(pickle.dumps(thing, protocol=int(how[-1])))
                else:
                    torch.save(thing, folder / "w.pth", _use_new_zipfile_serialization=how == "zip")
                return _with_weights(folder, "w.pth")

            yield f"pickle: {name}, {how}", make

    def itself(folder: Path) -> list[str]:
        holder: dict[str, Any] = {"w": torch.ones(2)}
        holder["self"] = holder
        torch.save(holder, folder / "w.pth")
        return _with_weights(folder, "w.pth")

    def deep(folder: Path) -> list[str]:
        (folder / "w.pth").write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
        return _with_weights(folder, "w.pth")

    def vast(folder: Path) -> list[str]:
        torch.save({"fc3.weight": torch.ones(1).expand(10**6, 10**6)}, folder / "w.pth")
        return _with_weights(folder, "w.pth")

    yield "pickle: a dict that holds itself", itself
    yield "pickle: nested without end", deep
    yield "pickle: a tensor of 10^12 numbers in 4 bytes", vast


def _recipes() -> Iterator[tuple[str, Make]]:
    tags = [
        '!!python/object/apply:os.system ["touch $MARKER"]',
        "!!python/object/apply:subprocess.Popen [[touch, x]]",
        "!!python/object/new:os.system [x]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!binary aGVsbG8=",
    ]
    for tag in tags:
        yield f"yaml: {tag}", lambda f, tag=tag: ["check", str(_recipe(f, f"name: {tag}\nseed: 3\n"))]
    code = "python:os:system"
    for change in (
        {"student": {"model": code}},
        {"data": {"dataset": code}},
        {"stages": [{"stage": code}]},
        {"stages": [{"stage": "train", "training": {"epochs": 1}, "losses": [{"loss": code}]}]},
        {"student": {"model": "python"}},
    ):
        yield f"recipe: {code}", lambda f, change=change: ["check", str(_recipe(f, **change))]
    for name in ("../x", "/tmp/x", "a/b", "..", ".", "", "a\nb", "\x1b[2Jx", "x" * 300, "CON", "~/x"):
        yield f"recipe: name {name!r}", lambda f, name=name: ["check", str(_recipe(f, name=name))]
    lol = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    yield "yaml: a billion laughs", lambda f: ["check", str(_recipe(f, lol))]
    yield "yaml: an anchor in itself", lambda f: ["check", str(_recipe(f, "name: &a [*a]\n"))]
    yield "yaml: nested deeply", lambda f: ["check", str(_recipe(f, "name: " + "[" * 50_000))]


def _file(folder: Path, header: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> str:
    (folder / "x.tiny").write_bytes(container.encode(header, tensors or {"a": np.ones(3, np.float32)}))
    return str(folder / "x.tiny")


def _packed() -> Iterator[tuple[str, Make]]:
    models = [
        "python:os:system",
        "hf-hub:a/b",
        "timm/hf-hub:a/b",
        "timm/local-dir:/tmp",
        "../x",
        "__init__",
        "_x",
        "a.b",
    ]
    for model in models:
        header = FACTS | {"net": {"model": model}}
        yield f"packed: model {model}", lambda f, header=header: ["unpack", _file(f, header)]
    for options in (
        {"checkpoint_path": "../x"},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"cache_dir": "../x"},
    ):
        header = FACTS | {"net": {"model": "timm/test_resnet", "options": options}}
        yield f"packed: options {options}", lambda f, header=header: ["inspect", _file(f, header)]
    for name in ESCAPES:
        yield f"packed: class {name!r}", lambda f, name=name: _predicted(f, name)
    for name in ESCAPES[:-1]:
        tensors = {name: np.ones((2, 2), np.float32)}
        yield f"packed: tensor {name!r}", lambda f, tensors=tensors: ["inspect", _file(f, FACTS, tensors)]
        yield f"packed: unpacked {name!r}", lambda f, tensors=tensors: ["unpack", _file(f, FACTS, tensors)]
    for name in ESCAPES[:3]:
        header = FACTS | {"net": {"model": name}}
        yield f"packed: net {name!r}", lambda f, header=header: ["inspect", _file(f, header)]


def _predicted(folder: Path, name: str) -> list[str]:
    from trainer.networks.build import build

    spec = {"model": "lenet300", "hidden": [2]}
    data = packed.encode(build(spec, (1, 8, 8), 2), spec, FACTS | {"classes": [name, f"{name} 2"]})
    (folder / "x.tiny").write_bytes(data)
    Image.new("L", (9, 9)).save(folder / "i.png")
    return ["predict", "x.tiny", "i.png"]


def _png(folder: Path, width: int, height: int) -> str:
    """Writes a PNG of zeros of any size in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(width // 8 + 2)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 20_000))) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    (folder / "i.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    return "i.png"


def _bombs() -> Iterator[tuple[str, Make]]:
    for width, height in ((100_000, 1), (1, 100_000), (20_000, 20_000), (2**31 - 1, 1), (60_000, 60_000)):

        def photo(folder: Path, width=width, height=height) -> list[str]:
            _predicted(folder, "a")
            return ["predict", "x.tiny", _png(folder, width, height)]

        yield f"bomb: a PNG of {width:,} x {height:,}", photo

    def archive(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "w.pth", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("w/data.pkl", bytes(200_000_000))
            file.writestr("../../marker", "x")
        return _with_weights(folder, "w.pth")

    yield "bomb: a zip of 200 MB of zeros, and a name with ../", archive
    for size, header in (
        (2**60, b"{}"),
        (2, b"{}"),
        (None, b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}'),
        (None, b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000000]}}'),
        (None, b"[" * 90_000),
    ):

        def safe(folder: Path, size=size, header=header) -> list[str]:
            data = struct.pack("<Q", len(header) if size is None else size) + header + bytes(4)
            (folder / "w.safetensors").write_bytes(data)
            return _with_weights(folder, "w.safetensors")

        yield f"bomb: safetensors {header[:40]!r}", safe
    for net in ({"model": "cifar_resnet", "depth": 6 * 10**8 + 2}, {"model": "lstm", "num_layers": 10**9}):
        header = FACTS | {"net": net}
        yield f"bomb: {net}", lambda f, header=header: ["inspect", _file(f, header)]


def _paths() -> Iterator[tuple[str, Make]]:
    def special(folder: Path, kind: str) -> str:
        path = folder / "special"
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind("special")
        return "special"

    for kind in ("device", "pipe", "socket", "folder", "loop"):
        yield f"path: a {kind} for a packed file", lambda f, kind=kind: ["inspect", special(f, kind)]

        def photo(folder: Path, kind=kind) -> list[str]:
            return [*_predicted(folder, "a")[:2], special(folder, kind)]

        def weights(folder: Path, kind=kind) -> list[str]:
            (folder / special(folder, kind)).rename(folder / "w.pth")
            return _with_weights(folder, "w.pth")

        yield f"path: a {kind} for a photo", photo
        yield f"path: a {kind} for weights", weights

    def facts(folder: Path) -> list[str]:
        save_file(
            folder / "w.safetensors",
            {"a": torch.ones(1)},
            {"facts": '{"net": {"model": "python:os:system"}}'},
        )
        return _with_weights(folder, "w.safetensors")

    yield "path: facts that name code", facts
