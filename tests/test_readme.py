"""The README says what is so: its commands and code run, its files, variables and figures are there.

Commands run in a folder of their own, on tiny recipes of the same names.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

import trainer
from trainer.cli import main
from trainer.recipe.recipe import read

TOP = Path(__file__).resolve().parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
EXTENDING = (TOP / "recipes/EXTENDING.md").read_text(encoding="utf-8")
RESULTS = (TOP / "recipes/RESULTS.md").read_text(encoding="utf-8")

# Commands that no test runs, and why.
NOT_RUN = {
    "scripts/run": "installs a few GB, then is `accelerate launch -m trainer run`, which is run here",
    "pip install .": "tests/recipe/test_shipped.py does, in an environment of its own",
    "trainer sync": "asks a service; tests/reporting/test_tracking.py has its parts",
    **{
        f"trainer {words}": "needs a folder of photographs and weights; tests/runs/test_initial.py runs the section's lines"
        for words in ("init", "check photographs", "run photographs", "predict runs/photographs")
    },
    "trainer fetch": "downloads; tests/data/test_fetch.py and tests/test_cli.py have its parts",
}
SLOW = (
    "trainer ladder",
    "trainer trials",
    "trainer gain",
    "trainer bench",
    "accelerate launch",
    "torchrun",
)  # several runs or processes


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks(README, "console") for line in block.splitlines()]
    assert lines and all(line.startswith("$ ") for line in lines)
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]


def reason(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def tiny(text: str) -> str:
    """A recipe that takes seconds: one epoch, a few small images, little to augment."""
    recipe = yaml.safe_load(text)
    size = {"size": recipe["data"].get("size", 28)}
    recipe["data"] = recipe["data"] | {"dataset": "digits", "subset": 200, "views": 2} | size
    for stage in recipe["stages"]:
        if "training" in stage:
            stage["training"] = {"epochs": 1, "lr": 5e-3, "batch_size": 32}
    recipe["teacher"] = recipe["teacher"] | {"width": 6}
    return json.dumps(recipe)  # JSON is YAML; it has no anchors


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with what the commands name: a tiny recipe, the scripts, an image, one finished run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").mkdir()
    text = tiny((TOP / "recipes/quickstart.yaml").read_text())
    (folder / "recipes/quickstart.yaml").write_text(text)
    (folder / "quickstart").write_text(text)  # a file of that name wins over the shipped recipe
    shutil.copytree(TOP / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "image.png")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["run", "quickstart"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def there(house, monkeypatch) -> Path:
    monkeypatch.chdir(house)
    return house


# ---- commands


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if command.startswith(SLOW) else ())
        for command in commands()
        if reason(command) is None
    ],
)
def test_a_command_runs(command, there, capfd, tmp_path):
    if "--to onnx" in command:
        pytest.importorskip("onnxruntime")
    command, _, output = (part.strip() for part in command.partition(">"))
    program, *words = shlex.split(command)
    if program == "trainer":
        assert main(words) == 0, capfd.readouterr().err
        said = capfd.readouterr().out
    else:  # where nothing has run yet: a finished run would only show its report
        folder = shutil.copytree(there, tmp_path / "fresh", ignore=shutil.ignore_patterns("runs"))
        modules = {
            "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
            "torchrun": ["-m", "torch.distributed.run"],
            "python": [],
        }
        done = subprocess.run(
            [sys.executable, *modules[program], *words],
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            cwd=folder,
            env=os.environ
            | {
                "PYTHONPATH": str(TOP),
                "ACCELERATE_USE_CPU": "1",
                "HF_HOME": str(folder),
                "OMP_NUM_THREADS": "1",
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout
        assert "has run already" not in said and "decoded" in said
    assert said
    if output:
        json.loads(said)


def test_what_is_not_run_is_there_and_named_with_a_reason():
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands()), (
            f"{start} stands in no block of the README"
        )
    for command in commands():
        script = TOP / command.split()[0]
        if command.startswith("scripts/"):
            assert script.is_file() and os.access(script, os.X_OK), command
    fetched = next(command for command in commands() if command.startswith("trainer fetch")).split()[2:]
    assert fetched and all((TOP / f"trainer/datasets/{name}.py").is_file() for name in fetched)


def test_commands_in_running_text_name_files_that_are_there():
    for text in (README, RESULTS, EXTENDING):
        for name in re.findall(r"`((?:scripts|recipes|tests)/[\w/.]+)", text):
            assert (TOP / name).exists(), name


# ---- code


def test_the_python_of_the_readme_runs(there, monkeypatch):
    small = functools.partial(
        torchvision.models.mobilenet_v2, width_mult=0.25, num_classes=10
    )  # a tenth of the weights
    monkeypatch.setattr(torchvision.models, "mobilenet_v2", small)
    python = next(block for block in blocks(README, "python") if "trainer.run(" in block)
    known: dict = {}
    torch.manual_seed(0)
    exec(compile(python, "README.md", "exec"), known)
    assert known["report"]["rows"][-1]["stage"] == "decoded"
    here, there_ = (known[name].state_dict() for name in ("net", "same"))
    weight = there_["features.18.0.weight"]
    assert (weight == 0).any() and len(weight.unique()) <= 33 and len(here) >= len(there_)


def test_the_loss_of_the_readme_is_a_loss():
    known: dict = {}
    exec(
        compile(
            next(block for block in blocks(README, "python") if "def cosine" in block), "README.md", "exec"
        ),
        known,
    )
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    loss = known["cosine"](student, teacher)
    wanted = sum(1 - (s @ t) / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True)) / 4
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert student.grad.any() and known["cosine"](teacher, teacher, margin=0.1) == 0


def test_the_code_of_extending_runs(tmp_path):
    known: dict = {}
    for block in blocks(EXTENDING, "python"):
        exec(compile(block, "EXTENDING.md", "exec"), known)
    loss = known["regressed_map"](torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 4, 4)))
    student = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss(student, torch.randn(2, 5, 4, 4)).backward()
    assert student.grad.any()
    images, labels = np.arange(2 * 48, dtype=np.uint8).reshape(2, 3, 4, 4), np.array([0, 1])
    np.savez(
        tmp_path / "x.npz",
        train_images=images,
        test_images=images,
        train_labels=labels,
        test_labels=labels,
        classes=["a", "b"],
    )
    source = known["arrays"](file=tmp_path / "x.npz")
    assert (source.shape, source.classes, len(source.mean)) == ((3, 4, 4), ["a", "b"], 3)
    got, classes = source.train.__getitems__([1])
    assert got.equal(torch.from_numpy(images[1:])) and classes.tolist() == [1]
    network = known["two_convs"]((3, 16, 16), 4, width=2)
    final, maps = network.forward_intermediates(torch.randn(2, 3, 16, 16))
    assert network.forward_head(final).shape == (2, 4) and [m.shape[1] for m in maps] == [2, 4]


def test_the_criterion_and_the_stage_of_extending_run(tmp_path, monkeypatch):
    """As files of one's own; the two blocks are one module each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("random", "clip"):
        [block] = [block for block in blocks(EXTENDING, "python") if f"\ndef {name}(" in block]
        (tmp_path / f"extending_{name}.py").write_text(block)
    recipe = {
        "name": "x",
        "data": {"dataset": "digits", "subset": 60, "validation": 60},
        "student": {"model": "lenet5", "width": 2},
        "stages": [
            {"stage": "train", "training": {"epochs": 1}},
            {"stage": "python:extending_clip:clip", "limit": 1, "exclude": ["last"]},
            {"stage": "prune", "method": "python:extending_random:random", "seed": 3, "sparsity": 0.5},
        ],
    }
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    rows = trainer.run("x.yaml", folder=tmp_path, allow_python=True)["rows"]
    assert [row["stage"] for row in rows] == ["trained", "clipped", "pruned"] and rows[1]["limit"] == 1
    assert rows[2]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_the_target_of_extending_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    [block] = [block for block in blocks(EXTENDING, "python") if "\ndef program(" in block]
    (tmp_path / "extending_program.py").write_text(block)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    to = [{"to": "python:extending_program:program", "most": 300}]
    [row] = trainer.export(net, tmp_path / "out", to, shape=(3, 2, 2), allow_python=True)
    assert row["agreement_student"] == 100 and (tmp_path / "out/program/student.pt2").is_file()


# ---- recipes


def test_the_recipe_of_the_readme_is_one(tmp_path):
    whole = [block for block in blocks(README, "yaml") if "stages:" in block]
    assert len(whole) == 1
    (tmp_path / "x.yaml").write_text(whole[0])
    assert [stage.stage for stage in read(tmp_path / "x.yaml")[0].stages] == [
        "train",
        "distill",
        "prune",
        "share",
        "pack",
        "export",
    ]


def test_parts_of_a_recipe_are_sound(tmp_path):
    """What is no whole recipe takes the place of the same keys of the quickstart."""
    parts = [block for block in blocks(README, "yaml") if "stages:" not in block]  # there may be none
    for part in parts:
        recipe = yaml.safe_load((TOP / "recipes/quickstart.yaml").read_text()) | yaml.safe_load(part)
        (tmp_path / "x.yaml").write_text(json.dumps(recipe))
        read(tmp_path / "x.yaml")


# ---- what the text says


def test_it_is_short():
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("name", ["README.md", "recipes/RESULTS.md", "recipes/EXTENDING.md"])
def test_links_lead_somewhere(name):
    page = TOP / name
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target == "" or (page.parent / target).exists(), target
    for target, heading in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        titles = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], (
            heading
        )


def test_every_variable_of_ours_is_in_the_table():
    table = README.partition("## Environment variables")[2].partition("\n## ")[0]
    told = set(
        re.findall(
            r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
        )
    )
    files = [path for top in ("trainer", "scripts") for path in (TOP / top).rglob("*")]
    code = "".join(
        path.read_text(encoding="utf-8") for path in files if path.is_file() and path.suffix in (".py", "")
    )
    ours = set(re.findall(r"\bTRAINER_[A-Z_]+\b", code))
    assert ours and ours <= told
    elsewhere = {"OMP_NUM_THREADS", "WANDB_API_KEY", "HF_HOME"}  # read by torch, wandb and accelerate
    assert all(name in code for name in told - elsewhere)


def test_the_figures_of_the_summary_are_those_of_the_tables():
    summary = README.partition("## Results")[2].partition("\n## ")[0]
    known = set(re.findall(r"\d[\d.,]*\d|\d", RESULTS))
    for figure in re.findall(r"\d[\d.,]*\d|\d", re.sub(r"LeNet-[\d-]+", "", summary)):
        assert figure in known, figure


@pytest.mark.skipif(not (TOP / "trainer/recipe").is_dir(), reason="the rooms are being built")
def test_the_map_names_the_rooms_that_there_are():
    drawn = README.partition("## The map")[2].partition("```text\n")[2].partition("```")[0]
    rooms = {
        path.name for path in (TOP / "trainer").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert set(re.findall(r"\b([a-z]+)/(?=\s)", drawn)) - {"trainer"} == rooms
    files = {path.name for path in (TOP / "trainer").glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\b[a-z_]+\.py\b", drawn)) == files
    for file, function in re.findall(r"`(?:(\w+/?\w*)\.(\w+)(?:\.\w+)?)` →", README):
        assert re.search(
            rf"^(def|class) {function}\b", (TOP / f"trainer/{file}.py").read_text(), re.MULTILINE
        ), file
