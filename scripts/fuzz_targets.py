"""What `fuzz.py` tries: for each kind a function of a folder that returns the attempt of one input.

An attempt takes a random generator and the input's number, and returns what happened in a few words. It raises Mistake
for what the program refuses, and AssertionError for a result that it must not give.
"""

import contextlib
import io
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import hostile
from mutations import damaged, reshaped, respelled

from trainer.data import examined, fetch
from trainer.networks.build import build
from trainer.networks.sizes import sizes_of
from trainer.packing import container
from trainer.packing import network as packed
from trainer.recipe import recipe, shipped
from trainer.recipe.text import RecipeError
from trainer.storage import checkpoint, weights_file

Attempt = Callable[[random.Random, int], str]

EXTRA_RECIPE = """
name: everything
seed: 3
precision: bf16
data: &data {dataset: image_folder, folder: photos, size: 32, crop: 0.9, validation: 0.1, views: 4, augment: {shift: 2, flip: true}, mixup: 0.2}
cache: {where: disk, top: 5, limit: 2}
teachers:
  - {model: timm/resnet18, checkpoint: a.pth, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], weight: 2}
  - {model: lenet300, hidden: [30, 20]}
student: {model: separable, widths: [8, 12], strides: [2, 1], from_teacher: false}
stages:
  - {stage: train, who: student, training: &t {epochs: 2, lr: 1e-3, optimizer: adamw, schedule: cosine, ema: 0.99}}
  - {stage: distill, training: {<<: *t, epochs: 3}, losses: [{loss: kl, temperature: 4}, {loss: hint, at: {block2: layer1}}]}
  - {stage: prune, method: magnitude, sparsity: 0.5, exclude: [first, last], training: *t}
  - {stage: share, bits: {fc: 4}, training: *t}
  - {stage: fold}
  - {stage: pack}
"""


def recipes(folder: Path) -> Attempt:
    """Respelled recipes, and reshaped ones written as JSON, which is YAML too."""
    texts = [path.read_text() for path in sorted(shipped.folder().glob("*.yaml"))] + [EXTRA_RECIPE]
    from trainer.recipe.text import parse

    plains = [parse(path).plain for path in sorted(shipped.folder().glob("*.yaml"))]
    file = folder / "recipe.yaml"
    for text in texts:  # imports what reading a recipe needs
        file.write_text(text)
        with contextlib.suppress(RecipeError):
            recipe.read(file)

    def attempt(chance: random.Random, number: int) -> str:
        if number % 4:
            file.write_text(respelled(chance.choice(texts), chance), errors="surrogatepass")
        else:
            file.write_text(json.dumps(reshaped(chance.choice(plains), chance)))
        if number % 16 == 1:
            file.write_bytes(damaged(file.read_bytes(), chance))
        try:
            recipe.read(file)
        except RecipeError as error:
            for line in str(error).split("\n"):
                where = rf"{re.escape(str(file))}(:\d+: |: (is longer|is nested|cannot be read))"
                assert re.match(rf"{where}|and \d+ more faults$", line), line
            raise
        return "read"

    return attempt


times: dict[bytes, float] = {}
usual = 0.0  # processor time that the last attempt's input takes undamaged
began = 0.0  # processor time at which the last attempt had made its input


def _begin() -> None:
    global began
    began = time.process_time()


def packed_files(folder: Path) -> Attempt:
    """Packed files of all kinds of networks, damaged, under a stale checksum or a right one, or with another header."""
    kept = folder / "originals"
    if not kept.exists():
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        for i, data in enumerate(_packed_originals()):
            (making / f"{i}.tiny").write_bytes(data)
        making.rename(kept)
    originals = []
    for path in sorted(kept.iterdir()):
        data, started = path.read_bytes(), time.process_time()
        originals.append((data, *packed.tensors(data)))
        packed.account(data)
        times[data] = 2 * (time.process_time() - started)  # an attempt opens it up to four times

    def attempt(chance: random.Random, number: int) -> str:
        global usual
        data, state, header = chance.choice(originals)
        usual = times[data]
        kind = number % 4
        if kind == 3 and len(data) < 100_000:  # writing a large one takes long
            raw = container.read_header(data)
            arrays = {name: tensor.numpy() for name, tensor in state.items()}
            layout = packed.layout(raw) if packed.rebuilds(raw) else None
            data = container.encode(reshaped(raw, chance), arrays, layout=layout)
            _begin()
        else:
            data = damaged(data, chance)
            if kind:
                data = data[:-4] + container._checksum(data[:-4])
        network, found = (
            packed.decode(data, "x.tiny") if "net" in header else (None, packed.tensors(data, "x.tiny")[1])
        )
        packed.account(data, "x.tiny")
        if kind == 0:
            now = packed.tensors(data, "x.tiny")[0]
            same = list(now) == list(state) and all(map(torch.equal, now.values(), state.values()))
            assert same and found == header, "accepted with other values"
            return "read, unchanged"
        return "read"

    return attempt


def _packed_originals() -> list[bytes]:
    torch.manual_seed(0)
    facts = {
        "shape": [3, 32, 32],
        "mean": [0.1] * 3,
        "std": [0.3] * 3,
        "classes": ["a", "b", "c"],
        "reading": {},
    }
    made = []
    specs: list[dict[str, Any]] = [
        *(
            {"model": "lenet5", "width": 2},
            {"model": "lenet300", "hidden": [20, 10]},
            {"model": "lstm", "hidden": 8},
        ),
        *(
            {"model": "cifar_resnet", "depth": 8, "channels": [4, 4, 8, 8]},
            {"model": "separable"},
            {"model": "gru"},
        ),
        *(
            {"model": "wide_resnet", "depth": 10, "widen": 1},
            {"model": "timm/test_resnet"},
            {"model": "timm/test_vit"},
        ),
    ]
    for spec in specs:
        for zeros in (0.0, 0.8, 0.99):
            with contextlib.suppress(ValueError):
                model = build(spec, (3, 32, 32), 3)
                for tensor in model.state_dict().values():
                    if tensor.is_floating_point() and zeros:
                        kept = torch.rand(tensor.shape) >= zeros
                        tensor.copy_(torch.where(kept, (tensor * 16).round() / 16, 0.0))
                made.append(packed.encode(model, spec, facts))
    cut: dict[str, Any] = {"model": "lenet5", "width": 4}
    whole = sizes_of(build(cut, (3, 32, 32), 3))
    cut["resized"] = {"conv1": [3, 3], "conv2": [whole["conv2"][0], 3]}
    made.append(packed.encode(build(cut, (3, 32, 32), 3), cut, facts))
    made.append(
        packed.encode(
            torch.nn.Linear(9, 3), None, facts | {"shape": [], "mean": [], "std": [], "classes": []}
        )
    )
    large = build({"model": "lenet300", "hidden": [1000]}, (3, 32, 32), 3)
    made.append(packed.encode(large, {"model": "lenet300", "hidden": [1000]}, facts))
    named = facts | {"classes": [f"a class with the number {i}" for i in range(300)]}
    made.append(packed.encode(build(specs[0], (3, 32, 32), 300), specs[0], named))
    return made


def checkpoints(folder: Path) -> Attempt:
    """A folder of two checkpoints with damaged, missing and strange files, some under a repaired manifest."""
    chance = torch.Generator().manual_seed(0)
    content = {
        step: {"student": {"w": torch.randn(30, 7, generator=chance), "b": torch.tensor(step)}}
        for step in (1, 2)
    }
    origin, here = folder / "origin", folder / "here"
    shutil.rmtree(origin, ignore_errors=True)
    for step, tensors in content.items():
        states = {
            "optimizer": {
                "state": {0: {"step": step, "average": torch.ones(3)}},
                "param_groups": [{"lr": 0.1}],
            }
        }
        checkpoint.save(origin, tensors, {"step": step}, states=states)

    def attempt(chance: random.Random, number: int) -> str:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(origin, here)
        files = sorted(path for path in here.rglob("*") if path.is_file())
        repaired = False
        for path in chance.sample(files, chance.choice((1, 1, 2))):
            if path.suffix == ".json" and chance.random() < 0.5:
                path.write_text(json.dumps(reshaped(json.loads(path.read_text()), chance)))
            else:
                path.write_bytes(damaged(path.read_bytes(), chance))
            if number % 3 == 0 and path.name != "manifest.json":
                repaired |= _repair(path.parent)
        logged = io.StringIO()
        with contextlib.redirect_stderr(logged):
            found = checkpoint.load(here)
        if found is None or repaired:
            return "none taken" if found is None else "taken, with a repaired manifest"
        tensors, facts = found
        same = content[facts["step"]]["student"]
        assert all(torch.equal(tensors["student"][key], same[key]) for key in same), (
            "accepted with other values"
        )
        return f"checkpoint {facts['step']} taken"

    return attempt


def _repair(folder: Path) -> bool:
    import hashlib

    manifest = folder / "manifest.json"
    try:
        listed = json.loads(manifest.read_text())["files"]
        for name in listed:
            data = (folder / name).read_bytes()
            listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps({"files": listed}))
    except (ValueError, OSError, TypeError, KeyError):
        return False
    return True


def weights(folder: Path) -> Attempt:
    """Checkpoints of other programs and of ours (safetensors, pickles), damaged, as a recipe's student."""
    from trainer.recipe.keys import StudentKeys
    from trainer.recipe.shelves import checker, find
    from trainer.training.weights import create

    model = build({"model": "lenet5", "width": 1}, (1, 28, 28), 4)
    facts = {"shape": [1, 28, 28], "mean": [0.1], "std": [0.3], "classes": list("abcd")}
    facts["net"] = {"model": "lenet5", "width": 1}
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "args": {"lr": 0.1}}, folder / "zip.pth")
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    weights_file.save_file(folder / "plain.safetensors", model.state_dict())
    weights_file.save_file(folder / "ours.safetensors", model.state_dict(), {"facts": json.dumps(facts)})
    originals = {name: (folder / name).read_bytes() for name in ("zip.pth", "old.pth", "plain.safetensors")}
    keys = checker(find("model", "lenet5"), StudentKeys)

    def attempt(chance: random.Random, number: int) -> str:
        if number % 3:
            name = chance.choice(list(originals))
            path = folder / f"mutated{Path(name).suffix}"
            path.write_bytes(damaged(originals[name], chance))
        else:
            path = folder / "mutated.safetensors"
            text = json.dumps(reshaped(facts, chance))
            text = text if number % 2 else text[: chance.randrange(len(text))]
            weights_file.save_file(path, model.state_dict(), {"facts": text})
        create(keys.model_validate({"model": "lenet5", "width": 1, "checkpoint": path}), (1, 28, 28), 4)
        return "read"

    return attempt


def examinations(folder: Path) -> Attempt:
    """The kept list of examined photos, of another shape or damaged: the photos are then opened again."""
    from PIL import Image

    files = []
    for i in range(3):
        Image.fromarray(np.full((9, 9), 20 * i, np.uint8)).save(folder / f"{i}.png")
        files.append(str(folder / f"{i}.png"))
    fetch_folder = folder / "cache"
    examined.cache_folder = lambda: fetch_folder  # type: ignore[attr-defined]
    assert fetch.cache_folder
    right = examined.examine(files, "photos")
    [record] = (fetch_folder / "examined").glob("*.json")
    kept = record.read_bytes()

    def attempt(chance: random.Random, number: int) -> str:
        if number % 2:
            record.write_text(json.dumps(reshaped(json.loads(kept), chance)))
        else:
            record.write_bytes(damaged(kept, chance))
        found = examined.examine(files, "photos")
        return "right" if found == right else "other"

    return attempt


def run_files(folder: Path) -> Attempt:
    """The JSON files of a run's folder: begun, report, log, the holder of the lock, the facts of kept answers."""
    from trainer.distillation import answer_file
    from trainer.reporting import page, report
    from trainer.runs import resuming
    from trainer.storage import lock

    (folder / "checkpoints").mkdir(exist_ok=True)
    row = {
        "stage": "teacher",
        "top1": 98.5,
        "agreement": None,
        "num_nonzero": 3,
        "sparsity": 0.5,
        "file_bytes": 99,
    }
    line = {"time": 1.5, "kind": "numbers", "stage": "train", "step": 5, "lr": 0.1, "loss": 2.5, "kl": "nan"}
    originals: dict[str, Any] = {
        "begun.json": {"images": ["ab12", 300], "teacher": "cd34", "threads": 2},
        "report.json": {"name": "x", "rows": [row, row | {"stage": "pruned"}], "layers": [], "seconds": 3.0},
        ".holder": {"pid": 3, "host": "h", "since": "now"},
        "facts.json": {"dataset": "digits", "views": 3},
        "log.jsonl": [line, line | {"step": 6, "validation": 50.0}, {"time": 2.0, "kind": "row", **row}],
    }

    def attempt(chance: random.Random, number: int) -> str:
        name = list(originals)[number % len(originals)]
        value = originals[name]
        changed = reshaped(value, chance) if number % 2 else value
        if name == "log.jsonl":
            lines = changed if isinstance(changed, list) else [changed]
            data = "".join(json.dumps(one) + "\n" for one in lines).encode()
        else:
            data = json.dumps(changed).encode()
        path = folder / name
        path.write_bytes(data if number % 2 else damaged(data, chance))
        if name == "begun.json":
            resuming.facts_of_beginning(folder).get("threads")
        elif name == "report.json":
            from trainer.reporting.tables import table

            table(report.read(folder)["rows"])
        elif name == ".holder":
            lock._holder(path)
        elif name == "facts.json":
            answer_file._read_facts(folder)
        else:
            page._trainings(page.read_log(path))
        return f"{name} read"

    return attempt


TARGETS: dict[str, Callable[[Path], Attempt]] = {
    "recipes": recipes,
    "packed": packed_files,
    "checkpoints": checkpoints,
    "weights": weights,
    "examinations": examinations,
    "run_files": run_files,
    "hostile": hostile,
}
