"""The command line, in process where it can be: what each command prints, and what a mistake gets."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.cli import main
from trainer.data import fetch
from trainer.data.readers import FetchError
from trainer.mistakes import Mistake
from trainer.recipe import recipe as reading
from trainer.recipe import shelves, shipped
from trainer.recipe.text import RecipeError
from trainer.runs.predicting import files_of
from trainer.training import fit

RECIPE = """\
name: tiny
data: {dataset: digits, size: 16, subset: 300}
teacher: {model: lenet5, width: 3}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, lr: 5e-3}}
  - stage: distill
    training: {epochs: 1, lr: 5e-3, batch_size: 32}
    losses: &taught
      - {loss: kl, temperature: 2}
      - {loss: hint, weight: 0.1}
  - {stage: prune, method: magnitude, sparsity: 0.5, training: {epochs: 1}, losses: *taught}
  - {stage: share, bits: 4}
  - {stage: pack}
"""


@pytest.fixture
def say(capfd, monkeypatch, tmp_path):
    """Runs a command in an empty folder: its exit status, and what it said on both streams."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of one finished run of a recipe, tiny.yaml, which lies beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(changed(", training: {epochs: 1}, losses: *taught", ""))
    assert main(["run", str(folder / "tiny.yaml"), "--folder", str(folder)]) == 0
    return folder / "tiny"


@pytest.fixture
def student(finished) -> Path:
    return finished / "student.tiny"


def recipe(folder: Path, text: str = RECIPE, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1, old
    return RECIPE.replace(old, new)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def python(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, **options
    )


# ---- what is imported, and how it ends


def test_help_is_quick():
    told = python(
        "-c",
        "import sys\nfrom trainer.cli import main\ntry:\n main(['--help'])\n"
        "finally:\n print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])",
    )
    assert told.returncode == 0 and told.stdout.splitlines()[-1] == "[]"
    assert all(
        f"\n    {name}" in told.stdout
        for name in ("run", "check", "pairs", "fetch", "inspect", "unpack", "predict", "evaluate", "schema")
    )


def test_the_module_its_exit_status_and_what_check_imports(tmp_path):
    path = recipe(tmp_path, changed("bits: 4", "bit: 4"))
    told = python("-X", "importtime", "-m", "trainer", "check", str(path))
    assert (told.returncode, told.stdout) == (2, "")
    lines = told.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "torch" in imported and not imported & {
        "timm",
        "torchvision",
        "accelerate",
        "wandb",
        "sklearn",
        "matplotlib",
        "scipy",
        "pandas",
        "PIL",
        "torch._dynamo",
        "trainer.packing.coder",
        "trainer.compression.kmeans",
    }
    assert [line for line in lines if not line.startswith("import time:")] == [
        f"trainer: {path}:13: stages[3].bit: is no key here (did you mean 'bits'?)"
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_reading_a_recipe_imports_nothing_heavy():
    """Each stage imports what it works with when it runs: the coder, k-means, and what takes seconds."""
    recipes = Path(__file__).parents[1] / "recipes"
    names = ["quickstart", "lenet300_mnist", "distill_default", "cifar100_resnet56_resnet20"]
    code = "import sys, trainer.recipe.recipe\n"
    code += "for file in sys.argv[1:]:\n    trainer.recipe.recipe.read(file); print(file, *sys.modules)"
    told = python("-c", code, *(f"{recipes / name}.yaml" for name in names))
    heavy = {
        "trainer.packing.coder", "trainer.packing.network", "trainer.compression.kmeans", "trainer.runs.runner", "trainer.reporting.report",
        "torch._dynamo", "torch._inductor", "wandb", "accelerate", "scipy", "sklearn", "matplotlib", "timm", "torchvision", "PIL",
    }  # fmt: skip
    assert told.returncode == 0, told.stderr
    for line, name in zip(told.stdout.splitlines(), names, strict=True):  # the first that has it names it
        file, *modules = line.split()
        assert Path(file).stem == name and heavy & set(modules) == set(), name


def test_a_reader_that_goes_away_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["schema"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["runn"], "invalid choice: 'runn'"),
        (["run"], "the following arguments are required: recipe"),
        (["predict", "a", "b", "--top", "0"], "got '0'; a number from 1 up is allowed"),
        (["run", "x", "--seed", "a"], "invalid int value: 'a'"),
        (["pairs", "x", "--seed", "1"], "unrecognized arguments: --seed 1"),
    ],
)
def test_faulty_command_lines(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_what_is_nobodys_mistake_is_not_hidden(say, monkeypatch, tmp_path):

    def broken(*_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(reading, "read", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        say("check", recipe(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    with pytest.raises(RecipeError):
        say("check", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "trainer: interrupted\n"),
        (
            FloatingPointError("stage 'train': kl is not finite"),
            1,
            "trainer: stage 'train': kl is not finite\n",
        ),
        (FetchError("mnist: no source answered"), 2, "trainer: mnist: no source answered\n"),
        (
            OSError(28, "No space left on device", "x"),
            2,
            "trainer: x: No space left on device\n",
        ),
        (RuntimeError("operator torchvision::nms does not exist"), 2, "install a matching pair"),
        (
            OverflowError("int too large"),
            2,
            "trainer: a number is too large, or there is too little memory: int too",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            2,
            "there is too little memory: Default",
        ),
    ],
)
def test_how_errors_end(error, status, told, say, monkeypatch, tmp_path):
    def broken(*_):
        raise error

    monkeypatch.setattr(reading, "read", broken)
    got, _, err = say("check", recipe(tmp_path))
    assert got == status and told in err


def test_a_fault_inside_a_training_is_a_traceback_that_asks_for_a_report(tmp_path):
    """It was once told as a mistake in the recipe: a ValueError of Python's own, in one line."""
    code = """
import sys
import trainer.training.fit
from trainer.cli import main
from trainer.mistakes import Mistake

def broken(*_):
    list(zip([1], [1, 2], strict=True))

trainer.training.fit.epoch_order = broken
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe(tmp_path)), "--folder", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in fit\n" in done.stderr
    *_, error, last = done.stderr.strip().splitlines()
    assert error == "ValueError: zip() argument 2 is longer than argument 1"
    assert last.startswith("trainer: this is a fault of the program") and "report it" in last


def test_a_mistake_inside_a_training_is_one_line(say, monkeypatch, tmp_path):
    def refused(*_):
        raise Mistake("there is nothing to train")

    monkeypatch.setattr("trainer.training.state.make_optimizer", refused)
    status, _, err = say("run", recipe(tmp_path), "--folder", tmp_path / "runs")
    assert status == 2 and err.splitlines()[-1] == "trainer: there is nothing to train"


def test_a_batch_of_one_image_that_cannot_be_normalised():
    error = ValueError(
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 4])"
    )
    assert isinstance(fit.of_a_batch(error, 1), Mistake)
    assert fit.of_a_batch(error, 2) is error


def test_one_process_of_a_machine_speaks(say, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert say("check", tmp_path / "none.yaml") == (2, "", "")


# ---- check


def test_check_tells_every_fault(say, tmp_path):
    path = recipe(tmp_path, changed("bits: 4", "bits: 40").replace("width: 3", "width: 0"))
    status, out, err = say("check", path)
    assert (status, out) == (2, "")
    assert err == (
        f"trainer:\n{path}:3: teacher.width: got 0; it should be greater than 0\n"
        f"{path}:13: stages[3].bits: got 40; it should be less than or equal to 16\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--set", "stages.3.bits=0"],
            "trainer: changes: stages[3].bits: got 0; it should be greater than or equal to 1\n",
        ),
        (["--set", "stages[3].bits=x", "--seed", "-1"], "changes: seed: got -1"),
        (
            ["--set", "bits"],
            "trainer: --set bits: PATH=VALUE is allowed, such as stages.1.training.epochs=2\n",
        ),
        (
            ["--set", "a=[1"],
            "trainer: --set a=[1: is not YAML: the bracket [ is never closed\n",
        ),
        (["--set", "seed=1", "--set", "seed=2"], "trainer: --set seed: is given twice\n"),
        (["--set", "seed=1", "--seed", "2"], "trainer: --set seed: --seed gives it too\n"),
        (["--set", "stages.²=3"], "trainer: changes: stages.²: stages has no entry '²'"),
        (["--name", "a/b"], "trainer: changes: name: got 'a/b'; it should match pattern"),
    ],
)
def test_faulty_changes(words, told, say, tmp_path):
    status, _, err = say("check", recipe(tmp_path), *words)
    assert status == 2 and told in err


# ---- run


def test_run_reports_and_is_not_run_twice(finished, say):
    report = json.loads((finished / "report.json").read_text())
    assert [row["stage"] for row in report["rows"]] == [
        "teacher",
        "distilled",
        "pruned",
        "clustered",
        "decoded",
    ]
    before = contents(finished)
    status, out, _ = say("run", finished.parent / "tiny.yaml", "--folder", finished.parent)
    assert status == 0 and "this recipe has run already" in out and "decoded" in out
    assert contents(finished) == before


@pytest.fixture
def of_another_user(finished, say, monkeypatch):
    """A copy of the finished run and its recipe that this process can read and not write; root becomes `nobody` for it."""
    user = os.geteuid()
    folder = Path(tempfile.mkdtemp())  # pytest's own folders can be entered by their owner only
    shutil.copytree(finished.parent, folder, dirs_exist_ok=True)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.chdir(folder)
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        monkeypatch.undo()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_finished_run_of_another_user_is_shown(of_another_user, say):
    folder = of_another_user
    with pytest.raises(PermissionError):
        (folder / "tiny" / "x").touch()
    status, out, err = say("run", folder / "tiny.yaml", "--folder", folder)
    assert (status, err) == (0, "") and "this recipe has run already" in out and "decoded" in out
    status, out, err = say("inspect", folder / "tiny" / "student.tiny")
    assert (status, err) == (0, "") and "lenet5" in out
    status, out, err = say("evaluate", folder / "tiny" / "student.tiny", folder / "tiny.yaml")
    assert (status, err) == (0, "") and "top-1" in out
    # What must write says which path it cannot write.
    status, _, err = say("run", folder / "tiny.yaml", "--folder", folder, "--name", "new")
    assert (status, err) == (2, f"trainer: {folder / 'new'}: Permission denied\n")
    status, _, err = say("unpack", folder / "tiny" / "student.tiny")
    assert (status, err) == (2, f"trainer: {folder / 'tiny' / 'student.safetensors'}: Permission denied\n")


def test_no_line_of_a_message_is_long(say, tmp_path):
    long = "x" * 100_000
    faulty = (
        changed("bits: 4", f"{long}: 4"),
        changed("bits: 4", f"bits: {long}"),
        changed("model: lenet5, width: 2", f"model: {long}"),
        changed("name: tiny", f"name: [{long}"),
        changed("name: tiny", f"name: *{long}"),
        changed("name: tiny", f"name: !{long} a"),
        changed("name: tiny", f"a: &{long} 1\nb: &{long} 1"),
        RECIPE + "".join(f"key{n}: 3\n" for n in range(3000)),
    )
    recipe(tmp_path)
    for words in (
        *(["check", recipe(tmp_path, text, f"{n}.yaml")] for n, text in enumerate(faulty)),
        ["check", "x.yaml", "--set", f"{long}=3"],
        ["check", "x.yaml", "--set", long],
        ["check", "x.yaml", "--set", f"seed=[{long}"],
        ["check", long],
        ["inspect", long],
        ["run", "x.yaml", "--name", long],
    ):
        status, _, err = say(*words)
        assert status == 2 and err.startswith("trainer:"), str(words)[-200:]
        lines = err.splitlines()
        assert len(lines) < 50 and max(map(len, lines)) <= 300 + len("trainer: "), err[:2000]
    with pytest.raises(SystemExit):
        say("predict", "x", "y", "--top", long)


def test_a_long_value_loses_its_middle(say, tmp_path):
    recipe(tmp_path, changed("bits: 4", f"begin{'x' * 1000}end: 4"))
    status, _, err = say("check", "x.yaml")
    assert status == 2 and re.fullmatch(
        r"trainer: x.yaml:13: stages\[3\]\.beginx{20,}\.\.\.x{20,}end: is no key here; there are: .*\(\d+ in all\)\n",
        err,
    )


def test_the_recipe_in_other_words_is_left_alone(finished, say, tmp_path):
    before = contents(finished)
    # Words and order may differ, what they say may not.
    text = (finished.parent / "tiny.yaml").read_text()
    same = recipe(
        tmp_path,
        "# the same\n"
        + text.replace("5e-3", "0.005").replace("{loss: kl, temperature: 2}", "{temperature: 2, loss: kl}"),
    )
    assert (
        same.read_text().count("\n") == text.count("\n") + 1
        and say("run", same, "--folder", finished.parent)[0] == 0
    )
    assert contents(finished) == before


def test_run_with_changes(say, tmp_path):
    words = [
        "--set",
        "stages=[{stage: train, training: {epochs: 1, lr: 1e-2}}]",
        "--set",
        "teacher=",
        "--set",
        "data.subset=64",
        "--set",
        "data.workers=3",
    ]
    status, out, _ = say("run", recipe(tmp_path), "--seed", "3", *words)
    assert status == 0 and "data.workers: has no effect: the images are in memory\n" in out
    here = tmp_path / "runs" / "tiny-seed3"
    kept = (here / "recipe.yaml").read_text()
    assert kept.startswith("# x.yaml with changes from the command line\nname: tiny-seed3\n")
    assert "\nseed: 3\n" in kept and "lr: 0.01\n" in kept
    assert json.loads((here / "report.json").read_text())["seed"] == 3
    # The recipe as run is itself a recipe, and the same; and the same words mean the same run.
    assert say("run", "runs/tiny-seed3/recipe.yaml")[1].startswith(
        "runs/tiny-seed3: this recipe has run already"
    )
    assert say("run", "x.yaml", "--seed", "3", *words)[1].startswith(
        "runs/tiny-seed3: this recipe has run already"
    )


def test_what_only_the_networks_know_is_told_before_training(say, tmp_path):
    text = RECIPE.replace("{loss: hint, weight: 0.1}", "{loss: hint, at: [conv1, conv9]}").replace(
        "bits: 4", "bits: {conv1: 4, fc9: 4}, exclude: [fc2, x]"
    )
    path = recipe(
        tmp_path, text.replace("sparsity: 0.5", "sparsity: {fc1: 0.5, fc2: 0.5}, exclude: [fc2, first]")
    )
    status, out, err = say("run", path)
    assert status == 2 and "epoch" not in out
    assert err == (
        f"trainer:\n{path}:11: stages[1].losses[1].at: student has no layer 'conv9' (did you mean 'conv2'?)\n"
        f"{path}:12: stages[2].sparsity.fc2: has no effect: the layer is in exclude\n"
        f"{path}:12: stages[2].sparsity: nothing is given for conv2, fc3 (name them here or in exclude)\n"
        f"{path}:13: stages[3].exclude[1]: there is no layer 'x'; there are: conv1, conv2, fc1, fc2, fc3\n"
        f"{path}:13: stages[3].bits.fc9: there is no layer 'fc9' (did you mean 'fc3'?)\n"
    )
    # Nothing has been learned yet, so another recipe, such as the mended one, may have the folder.
    assert say(
        "run", path, "--set", "stages=[{stage: share, bits: 4, exclude: [y]}]", "--set", "teacher="
    ) == (
        2,
        "",
        "trainer: changes: stages[0].exclude[0]: there is no layer 'y'; there are: conv1, conv2, fc1, fc2, fc3\n",
    )


def test_a_loss_that_is_not_finite_stops_the_run(say, tmp_path):
    words = ["--set", "stages=[{stage: train, training: {epochs: 1, lr: 1e30}}]", "--set", "teacher=null"]
    status, _, err = say("run", recipe(tmp_path), *words)
    assert status == 1 and re.search(r"stage 'train', epoch 1, step \d+: cross_entropy is not finite", err)


def test_a_teacher_that_only_guesses_is_refused(say, tmp_path, finished):
    from safetensors.torch import save_file

    from trainer.models.lenet5 import lenet5

    torch.manual_seed(0)
    save_file(lenet5((1, 16, 16), 10, width=3).state_dict(), tmp_path / "fresh.safetensors")
    text = changed("width: 3}", "width: 3, checkpoint: fresh.safetensors}").replace(
        RECIPE.splitlines()[5] + "\n", ""
    )
    status, _, err = say("run", recipe(tmp_path, text))
    assert status == 2 and "of the 144 validation images right, and guessing 11.11 %" in err
    (tmp_path / "fresh.safetensors").write_bytes(b"x" * 50)
    status, _, err = say("run", recipe(tmp_path, text))
    assert status == 2 and "fresh.safetensors" in err


def test_data_that_is_not_there(say, tmp_path):
    status, _, err = say(
        "run",
        recipe(
            tmp_path,
            changed("{dataset: digits, size: 16, subset: 300}", "{dataset: image_folder, folder: none}"),
        ),
    )
    assert status == 2 and "image_folder: there is no folder none" in err
    status, _, err = say("run", recipe(tmp_path, changed("subset: 300", "subset: 3000")))
    assert status == 2 and "digits has 1437 training images" in err


# ---- pairs


def test_pairs(say, tmp_path):
    status, out, _ = say("pairs", recipe(tmp_path))
    assert status == 0
    assert out.splitlines()[0] == "stages[1] distill, stages[2] prune"
    assert out.splitlines()[1].split() == [
        "term",
        "student",
        "student_shape",
        "teacher",
        "teacher_shape",
        "projector",
    ]
    assert out.splitlines()[3].split() == ["hint/conv1", "conv1", "2x8x8", "conv1", "3x8x8", "MapProjector"]
    status, out, _ = say("pairs", tmp_path / "x.yaml", "--set", "stages.1.losses=[{loss: attention}]")
    assert (
        "attention: fc2 and fc2 are left out: on maps of one position the loss is constant"
        in out.splitlines()
    )
    status, out, _ = say(
        "pairs", tmp_path / "x.yaml", "--set", "stages.1.losses=[{loss: kl}]", "--set", "stages.2.losses="
    )
    assert (status, out) == (0, f"{tmp_path / 'x.yaml'}: no loss compares layers\n")
    status, _, err = say("pairs", tmp_path / "x.yaml", "--set", "stages.1.losses.1.at=[conv9]")
    assert (
        status == 2
        and err
        == "trainer: changes: stages[1].losses[1].at: student has no layer 'conv9' (did you mean 'conv2'?)\n"
    )


# ---- fetch


def test_fetch(say, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    status, _, err = say("fetch", "minst")
    assert status == 2 and "'minst'" in err and "mnist" in err
    monkeypatch.setattr(fetch, "fetch", lambda name: tmp_path / name)
    status, out, _ = say("fetch", "mnist", "cifar10")
    assert status == 0 and [line.split(" (")[0] for line in out.splitlines()] == [
        f"mnist: {tmp_path}/mnist",
        f"cifar10: {tmp_path}/cifar10",
    ]


def test_a_dataset_that_no_source_gives(say, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))

    def nobody(*_):
        raise FetchError("silence")

    monkeypatch.setitem(fetch.SOURCES, "mnist", {"nobody": nobody})
    for words in (["fetch", "mnist"], ["run", recipe(tmp_path, changed("digits, size: 16", "mnist"))]):
        status, _, err = say(*words)
        assert status == 2 and "mnist: no source answered. Put these raw files" in err and "silence" in err


# ---- the packed file


def test_inspect(student, say):
    status, out, _ = say("inspect", student)
    size = student.stat().st_size
    assert status == 0
    assert out.startswith(f"{student}: {size:,} bytes: lenet5 width=2 for images 1x16x16, 10 classes\n")
    cells = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    table = [dict(zip(map(str.strip, cells[0]), map(str.strip, line), strict=True)) for line in cells[2:]]
    assert [row["tensor"] for row in table][-1] == "file" and "conv1.weight" in {
        row["tensor"] for row in table
    }
    sizes = [float(row["bytes"].replace(",", "")) for row in table]
    assert sizes[-1] == size and sum(sizes[:-1]) == pytest.approx(size, abs=0.05 * len(table))
    assert out.splitlines()[-1].startswith("Masks and values of the weights: ") and " of Huffman, " in out
    status, out, _ = say("inspect", student, "--json")
    told = json.loads(out)
    assert sum(row["bytes"] for row in told["account"]) == pytest.approx(size, abs=0.5)
    assert told["header"]["net"] == {"model": "lenet5", "width": 2} and len(told["header"]["classes"]) == 10


def test_evaluate_agrees_with_the_report(student, finished, say):
    status, out, _ = say("evaluate", student, finished / "recipe.yaml", "--json")
    row = json.loads((finished / "report.json").read_text())["rows"][-1]
    told = json.loads(out)
    assert status == 0 and (told["top1"], told["digest"], told["images"]) == (row["top1"], row["digest"], 360)
    status, out, _ = say("evaluate", student, finished / "recipe.yaml")
    assert (status, out) == (0, f"{student}: top-1 {row['top1']:.2f} % of 360 test images\n")
    status, _, err = say("evaluate", student, finished / "recipe.yaml", "--set", "data.size=20")
    assert status == 2 and f"{student}: was made for other images" in err


def test_evaluating_keeps_no_views(student, finished, say, monkeypatch):
    from trainer.data import batches

    monkeypatch.setattr(
        batches, "KeptViews", lambda *a: pytest.fail("took memory for images that are not looked at")
    )
    keep = [f"data.{key}" for key in ("keep_views=true", "views=5", "augment.shift=1")]
    status, _, err = say(
        "evaluate", student, finished / "recipe.yaml", *(word for key in keep for word in ("--set", key))
    )
    assert status == 0, err


def test_unpack(student, finished, say, tmp_path):
    status, out, _ = say("unpack", student, "weights.safetensors")
    assert status == 0 and out.startswith("weights.safetensors: 10 tensors, ")
    state = load_file(tmp_path / "weights.safetensors")
    assert {name: tuple(t.shape) for name, t in state.items()}["conv2.weight"] == (5, 2, 5, 5)
    assert len(state["conv2.weight"].unique()) <= 17
    before = (tmp_path / "weights.safetensors").read_bytes()
    status, _, err = say("unpack", student, "weights.safetensors")
    assert (status, err) == (2, "trainer: weights.safetensors: is there already; name another file\n")
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    copy = tmp_path / "other.tiny"
    copy.write_bytes(student.read_bytes())
    assert say("unpack", copy)[0] == 0 and (tmp_path / "other.safetensors").read_bytes() == before


def test_predict(student, finished, say, tmp_path):
    from trainer.data.images import normalize
    from trainer.datasets.digits import digits
    from trainer.packing.loading import load

    source = digits(size=16)
    images, _ = source.test.__getitems__(list(range(8)))
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number}.png")
    status, out, _ = say("predict", student, *(tmp_path / f"{number}.png" for number in range(8)))
    with torch.inference_mode():
        shares = load(student)(normalize(images.float() / 255, source.mean, source.std)).softmax(1)
    wanted = []
    for number, row in enumerate(shares):
        best = row.topk(3)
        wanted.append(
            f"{tmp_path / f'{number}.png'}: "
            + "  ".join(f"{i} {p * 100:.1f} %" for p, i in zip(best.values, best.indices, strict=True))
        )
    assert status == 0 and out.splitlines() == wanted
    # Of any size and colour.
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "large.jpg")
    status, out, _ = say("predict", student, tmp_path / "large.jpg", "--top", "99")
    assert status == 0 and out.count(" %") == 10


def test_predict_from_what_is_no_image(student, say, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name in ("text.png", "none.png", "bomb.png"):
        status, _, err = say("predict", student, tmp_path / name)
        assert status == 1 and f"{tmp_path / name}: is no image that can be read" in err


def test_a_file_that_does_not_tell_what_its_images_are_like(say, tmp_path):
    from trainer.functional import pack
    from trainer.models.lenet300 import lenet300

    torch.manual_seed(0)
    pack(lenet300((1, 8, 8), 4, hidden=(5,)), tmp_path / "bare.tiny")
    status, out, _ = say("inspect", tmp_path / "bare.tiny")
    assert status == 0 and "a network on no shelf" in out
    status, _, err = say("predict", tmp_path / "bare.tiny", tmp_path / "x.png")
    assert status == 2 and "bare.tiny: holds the weights of a network that is on no shelf" in err


def test_damaged_files(student, finished, say, tmp_path):
    """Truncated, altered, or something else: an error that names the file, never a wrong network."""
    data = student.read_bytes()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "x.png")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    path = tmp_path / "damaged.tiny"
    commands = [
        ["inspect", path],
        ["unpack", path],
        ["predict", path, tmp_path / "x.png"],
        ["evaluate", path, finished / "recipe.yaml"],
    ]
    for bad in (
        data[:-1],
        data[: len(data) // 2],
        data[:3],
        b"",
        bytes(flipped),
        data + b"x",
        b"PK\3\4" + data,
        b"name: tiny\n" * 50,
    ):
        path.write_bytes(bad)
        for command in commands if bad in (b"", bytes(flipped)) else commands[:1]:
            status, out, err = say(*command)
            assert status == 2 and out == "" and str(path) in err, (command, err)
    assert not (tmp_path / "damaged.safetensors").exists()
    for command in commands:
        path.unlink(missing_ok=True)
        status, _, err = say(*command)
        assert status == 2 and f"{path}: cannot be read: No such file or directory" in err


# ---- schema


def test_schema(say):
    status, out, _ = say("schema")
    assert (
        status == 0
        and json.loads(out)["$schema"].startswith("https://json-schema.org/")
        and '"TermKeys"' in out
    )


# ---- what comes with the package


def test_recipes_are_listed_with_what_came_out(say):
    status, out, _ = say("recipes")
    names = [line for line in out.splitlines() if not line.startswith(" ")]
    assert status == 0 and names == shipped.names() and "no result is written down" not in out
    assert "shared and decoded 99.2 %" in " ".join(out.split())


def test_a_recipe_is_copied_once(say, tmp_path):
    for words, name in (
        (["quickstart"], "quickstart.yaml"),
        (["records/teacher_mnist", "own.yaml"], "own.yaml"),
    ):
        status, out, _ = say("copy", *words)
        assert status == 0 and out.startswith(f"{name}: a copy of {words[0]}")
        assert (tmp_path / name).read_bytes() == shipped.find(words[0]).read_bytes()
        assert say("check", name)[0] == 0
        (tmp_path / name).write_text("mine")
        status, out, err = say("copy", *words)
        assert status == 2 and out == "" and f"{name}: is there already" in err
        assert (tmp_path / name).read_text() == "mine"
    status, _, err = say("copy", "quickstar")
    assert status == 2 and "did you mean 'quickstart'?" in err


@pytest.mark.parametrize(("key", "shelf"), shelves.SHELVES.items())
def test_a_shelf_is_listed_with_first_lines(say, key, shelf):
    status, out, _ = say("list", shelf)
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert status == 0 and [name for name, _ in lines] == shelves.names(key)
    for name, told in lines:
        manual = " ".join(shelves.find(key, name).__doc__.split())
        assert manual.startswith(told) and len(told) < 200 and told.endswith((".", "Examples:"))


@pytest.mark.parametrize(
    "words", [["--version"], ["--print-completion", "bash"], ["--print-completion", "zsh"]]
)
def test_what_is_said_without_a_command(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "trainer" in out
    if words[0] == "--version":
        assert re.fullmatch(r"trainer (\d+\.\d+\.\d+|source)\n", out)


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_commands_shelves_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    (tmp_path / "mine.yaml").touch()

    def completed(*words):
        asked = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_trainer; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(
            ["bash", "-c", script + asked], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        return done.stdout.split()

    assert {"recipes", "run"} <= set(completed("trainer", "r")) and "predict" not in completed("trainer", "r")
    assert completed("trainer", "list", "lo") == ["losses"]
    assert completed("trainer", "run", "mi") == ["mine.yaml"]


@pytest.mark.skipif(os.name == "nt", reason="needs sh")
@pytest.mark.parametrize(
    ("words", "closed", "status"),
    [
        ("list stages", ">&-", 0),
        ("list stages", "<&- >&- 2>&-", 0),
        ("nosuch", "2>&-", 2),
        ("show none.yaml", "2>&-", 2),
    ],
)
def test_closed_streams_are_null_streams(tmp_path, words, closed, status):
    command = f'"{sys.executable}" -m trainer {words} {closed}'
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == status and "Traceback" not in done.stderr and not (done.stdout and "2>" in closed)
    )


def test_paths_of_a_closed_stdin_are_none(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["list", "stages"]) == 0
    assert list(files_of(["-"])) == []
    sys.stdin.close()
