"""Bare names of recipes: which file they stand for, in a checkout and once installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from trainer.networks.build import build, spec
from trainer.recipe import shipped as shipped_recipes
from trainer.recipe.recipe import read
from trainer.recipe.shipped import find_recipe
from trainer.recipe.stages import hook
from trainer.recipe.text import RecipeError

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_names_are_those_of_the_files():
    files = {
        path.relative_to(TOP / "recipes").with_suffix("").as_posix() for path in TOP.glob("recipes/**/*.yaml")
    }
    assert set(shipped_recipes.names()) == files and {"quickstart", "records/teacher_mnist"} <= files


def test_a_bare_name_is_found():
    assert find_recipe("quickstart") == TOP / "recipes/quickstart.yaml"
    assert find_recipe(Path("records/teacher_mnist")) == TOP / "recipes/records/teacher_mnist.yaml"
    assert read("quickstart")[0].name == "quickstart"


def test_a_file_that_exists_wins_and_a_folder_does_not(tmp_path):
    (tmp_path / "quickstart").mkdir()  # such as the run's own folder
    assert find_recipe("quickstart") == TOP / "recipes/quickstart.yaml"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("name: mine")
    assert find_recipe("quickstart") == Path("quickstart")


@pytest.mark.parametrize(
    "given", ["quickstart.yaml", "./none/quickstart", "recipes/quickstart", "/none", "other/x.yml"]
)
def test_a_path_is_left_alone(given):
    assert find_recipe(given) == Path(given)


@pytest.mark.parametrize(
    ("file", "made"),
    [
        ("runs/teacher_mnist/no.pth", "; trainer run records/teacher_mnist makes it"),
        ("runs/fashion_teacher/no.pth", "; trainer run fashion_teacher makes it"),
        ("runs/mine/no.pth", ""),
        ("runs/teacher_mnist", ""),
        ("teacher_mnist/no.pth", ""),
    ],
)
def test_a_missing_file_of_a_shipped_run_says_which_recipe_makes_it(tmp_path, file, made):
    path = tmp_path / "x.yaml"
    path.write_text(
        f"name: x\ndata: {{dataset: digits}}\nstudent: {{model: lenet5, checkpoint: {file}}}\nstages: [{{stage: pack}}]\n"
    )
    with pytest.raises(RecipeError) as told:
        read(path)
    assert (
        f"there is no file '{file}' in {Path.cwd()}, the folder this was started in{made}\n"
        in f"{told.value}\n"
    )


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("quikstart", "quickstart"),
        ("smallest_error158", "records/smallest_error158"),
        ("lenet5", "lenet5_mnist"),
        ("records/teacher_minst", "records/teacher_mnist"),
    ],
)
def test_an_unknown_bare_name_says_which_there_are_nearest_first(given, nearest):
    with pytest.raises(RecipeError) as told:
        read(given)
    words, _, listed = str(told.value).partition("there are: ")
    assert words.startswith(f"{given}: cannot be read: there is no such file, and no shipped recipe")
    listed, _, number = listed.partition(", ... (")
    assert listed.split(", ")[0] == nearest and set(listed.split(", ")) < set(shipped_recipes.names())
    assert number == f"{len(shipped_recipes.names())} in all)" and len(str(told.value)) <= 300


def test_finding_one_imports_nothing_heavy():
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, trainer.recipe.shipped as s; s.find_recipe('quickstart')\n"
            "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(TOP)},
    )
    assert told.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["."], ["-e", "."]], ids=["installed", "editable"])
def test_a_bare_name_is_found_outside_a_checkout(kind, tmp_path):
    """`pip install .` and `-e .` of a copy, in an environment that borrows the packages of this one."""
    copy, environment = tmp_path / "copy", tmp_path / "environment"
    for name in ("trainer", "recipes"):
        shutil.copytree(TOP / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        (copy / name).write_bytes((TOP / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    site = next(environment.glob("lib/python3*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--ignore-installed",
            *kind,
        ],
        cwd=copy,
        check=True,
    )
    told = subprocess.run(
        [str(environment / "bin/trainer"), "check", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={},
    )
    assert told.stdout.startswith("quickstart: fine: train")
    where = subprocess.run(
        [
            str(python),
            "-c",
            "import trainer, trainer.recipe.shipped as s, importlib.resources as r\n"
            "print(trainer.__file__, s.folder(), r.files('trainer').joinpath('py.typed').is_file())",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={},
    ).stdout.split()
    inside = (copy if "-e" in kind else site).resolve()
    assert all(Path(path).resolve().is_relative_to(inside) for path in where[:2]) and where[2] == "True"


SHAPES = {"digits": (1, 28, 28), "cifar100": (3, 32, 32), "cifar10": (3, 32, 32)}


@pytest.mark.parametrize("name", shipped_recipes.names())
def test_every_stage_takes_the_untrained_student(name):
    """What is refused before the first training must not refuse what a training would make right."""
    for teacher in re.findall(r"checkpoint: (runs/\S+?)}", find_recipe(name).read_text(encoding="utf-8")):
        Path(teacher).parent.mkdir(parents=True)  # that another recipe teaches
        Path(teacher).touch()
    recipe, _ = read(name)
    shape = SHAPES.get(recipe.data.dataset, (1, 28, 28))
    given = spec(recipe.student)
    student = build(given, shape, 10)
    for stage in recipe.stages:
        if (check := hook(stage, "check_student")) is not None:
            check(stage, student)
        if (becomes := hook(stage, "becomes")) is not None:
            student, given = becomes(stage, student, given, torch.zeros(2, *shape))
