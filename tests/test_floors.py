"""The house: imports go down, rooms are small, nothing private is borrowed, and a recipe is read lightly."""

import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from trainer.cli import main
from trainer.losses import kl

TOP = Path(trainer.__file__).parent
# From the ground up. A place imports only from the floors below its own; a room may import within itself.
FLOORS = [
    ["mistakes", "distributed", "tensors"],
    ["storage"],
    ["recipe", "reporting"],
    ["networks", "data", "projectors"],
    ["compression", "losses", "models", "datasets"],
    ["packing", "criteria", "distillation"],
    ["training", "functional"],
    ["exporting"],
    ["stages", "exports", "runtime"],
    ["runs", "options"],
    ["commands"],
    ["cli", "__init__"],
    ["__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SHELVES = {"losses", "models", "datasets", "stages", "criteria", "exports", "commands"}
FILES = sorted(TOP.rglob("*.py"))


def place(path: Path) -> str:
    """The room, shelf or single file that a file belongs to."""
    return path.relative_to(TOP).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, dotted below trainer."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
            inside = node.module.partition(".")[2]
            found |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("trainer.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TOP)))
def test_imports_go_down(path):
    own = place(path)
    assert own in FLOOR, f"{own} stands on no floor: name it in FLOORS and in the README's map"
    for module in imported(path):
        other = module.split(".")[0]
        if other != own:
            assert FLOOR[other] < FLOOR[own], f"{own} imports {module}, which is not below it"
        elif own in SHELVES:
            pytest.fail(f"{path.name}: a shelf file never imports one of its own shelf ({module})")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TOP)))
def test_files_are_small_and_borrow_nothing_private(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for module in imported(path):
        assert not re.search(r"(^|\.)_[a-z]", module), f"{path.name} imports {module}, which is private there"


def test_no_room_is_empty_and_none_is_unnamed():
    places = {place(path) for path in FILES}
    assert places == set(FLOOR)


def test_general_code_names_no_stage_loss_or_criterion():
    """Only scan and ladder look for prune and share, as they say; the Python door names what its arguments mean."""
    shelves = {shelf: {p.stem for p in (TOP / shelf).glob("[a-z]*.py")} for shelf in ("stages", "criteria")}
    allowed = {"runs/scan.py", "runs/ladder.py", "functional.py"}
    for path in FILES:
        if place(path) in SHELVES or str(path.relative_to(TOP)) in allowed:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = {attribute_or_name(side) for side in sides}
                words = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
                for shelf, asked in (("stages", {"stage", "name"}), ("criteria", {"method"})):
                    assert not (names & asked and words & shelves[shelf]), (
                        f"{path.name}:{node.lineno} knows a file of {shelf} by its name"
                    )


def attribute_or_name(node: ast.AST) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")


@pytest.mark.parametrize("room", ["compression", "packing"])
def test_rooms_that_could_leave_as_a_package(room):
    """They know nothing of distillation, training and runs, at any number of steps."""
    code = f"import pkgutil, importlib, sys, trainer.{room} as room\n"
    code += "[importlib.import_module(m.name) for m in pkgutil.iter_modules(room.__path__, room.__name__ + '.')]\n"
    code += "print(*{name.split('.')[1] for name in sys.modules if name.startswith('trainer.')})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"distillation", "training", "runs", "stages", "cli"} == set()


def test_the_readme_tells_the_floors():
    told = (
        (TOP.parent / "README.md")
        .read_text(encoding="utf-8")
        .partition("Floors, top down: ")[2]
        .partition(".")[0]
    )
    floors = [sorted(re.split(r",\s+", floor)) for floor in re.split(r"\s+/\s+", told)]
    files = {"__init__", "__main__"}
    assert floors == [sorted(set(names) - files) for names in reversed(FLOORS) if set(names) - files]


WALK = [
    "cli.py",
    "commands/run.py",
    "runs/runner.py",
    "stages/distill.py",
    "training/fit.py",
    "distillation/objective.py",
    "losses/kl.py",
]


def test_the_walk_of_a_run_is_seven_files(tmp_path, monkeypatch):
    """The stack inside a loss, while training and not while terms are weighed: at most eight frames of ours, from these files in this order."""
    stacks = []
    real = kl.full_precision

    def watched(tensor):
        files = [Path(frame.filename) for frame in reversed(inspect.stack(context=0))]
        own = [str(file.relative_to(TOP)) for file in files if file.is_relative_to(TOP)]
        if "training/fit.py" in own and "training/weighing.py" not in own:
            stacks.append(own)
        return real(tensor)

    monkeypatch.setattr(kl, "full_precision", watched)
    recipe = {
        "name": "walk",
        "data": {"dataset": "digits", "subset": 60, "validation": 60},
        "teacher": {"model": "lenet5", "width": 2},
        "student": {"model": "lenet5", "width": 2},
        "stages": [
            {"stage": "train", "who": "teacher", "training": {"epochs": 1}},
            {"stage": "distill", "training": {"epochs": 1}, "losses": [{"loss": "kl"}]},
        ],
    }
    (tmp_path / "walk.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "walk.yaml"), "--folder", str(tmp_path)]) == 0
    assert stacks
    for stack in stacks:
        assert len(stack) <= 8, stack
        assert [file for file, _ in itertools.groupby(stack)] == WALK
