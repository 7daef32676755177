"""What every stage promises, over every file of the shelf: checked settings, a row, and the same end after an interruption."""

import inspect
import itertools
import json
import shutil

import pytest
from pydantic import TypeAdapter, ValidationError

import trainer
from trainer.recipe import shelves
from trainer.recipe.keys import Stage, StageKeys
from trainer.recipe.stages import order_faults
from trainer.reporting import report
from trainer.storage import checkpoint

NAMES = shelves.names("stage")
TRAINING = {"epochs": 1, "batch_size": 30}
# One of these fits each key; a stage is tried with as few of them as it allows.
SAMPLES = (1, 0.5, True, "2:4", ["last"], TRAINING, [{"loss": "kl"}], ["onnx"])
TIMES = {"seconds", "measure_seconds", "train_seconds", "images_per_second"}
TIMES |= {"latency_seconds", "latency_p95_seconds", "load_seconds", "peak_bytes"}


def smallest(name: str) -> dict:
    """The settings of a stage with the fewest keys that its check allows."""
    made = TypeAdapter(Stage)
    fields = shelves.fields(shelves.find("stage", name))
    for key in list(fields):
        for argument, shelf in shelves.arguments_on_shelves(shelves.find("stage", name)).items():
            if key == argument:
                default = shelves.find(shelf, fields[argument][1])
                fields |= (shelves.beside(shelves.find("stage", name), f"{argument}_keys") or shelves.fields)(
                    default
                )
    required = [key for key, (_, default) in fields.items() if default is ...]
    for num_more in range(3):
        for more in itertools.combinations([key for key in fields if key not in required], num_more):
            for values in itertools.product(SAMPLES, repeat=len(required) + num_more):
                settings = {"stage": name, **dict(zip([*required, *more], values, strict=True))}
                try:
                    made.validate_python(settings)
                except ValidationError:
                    continue
                return settings
    pytest.fail(f"no settings of {name} were found: give SAMPLES a value that fits its keys")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "teacher.yaml").write_text(
        "name: teacher\ndata: {dataset: digits, subset: 200, validation: 60}\nstudent: {model: lenet5, width: 2, batch_norm: true}\n"
        "stages: [{stage: train, training: {epochs: 4, batch_size: 20, lr: 1e-2}}]\n"
    )
    trainer.run(folder / "teacher.yaml", folder=folder)
    return next((folder / "teacher/checkpoints/00-train").glob("*/student.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_is_a_documented_function_of_the_run(name):
    function = shelves.find("stage", name)
    parameters = list(inspect.signature(function).parameters.values())
    assert shelves.fed(function) == ["run"]
    for parameter in parameters[1:]:
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        assert parameter.annotation is not parameter.empty
    assert inspect.signature(function).return_annotation is None
    first = inspect.cleandoc(function.__doc__).splitlines()[0]
    assert first.endswith((".", ",")) or len(first) > 80


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_has_a_row_and_ends_the_same_after_an_interruption(name, teacher, tmp_path):
    if name == "export":
        pytest.importorskip("onnxruntime")
    settings = smallest(name)
    before = [{"stage": "train", "training": TRAINING}]
    made = TypeAdapter(list[Stage]).validate_python([*before, settings])
    if list(order_faults(made[-1], made[:-1])):
        before.append({"stage": "pack"})
    number = len(before)
    recipe = {
        "name": "x",
        "data": {"dataset": "digits", "subset": 90, "validation": 60},
        "teacher": {"model": "lenet5", "width": 2, "batch_norm": True, "checkpoint": str(teacher)},
        "student": {"model": "lenet5", "width": 2, "batch_norm": True},
        "stages": [*before, settings],
    }
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    once = trainer.run(tmp_path / "x.yaml", folder=tmp_path)
    own = [row for row in once["rows"] if row["index"] == number]
    assert own, "the stage tells nothing of what it did"
    assert all(
        {"stage", "top1", "top1_validation", "sparsity", "file_bytes", "seconds"} <= set(row) for row in own
    )
    stage_folder = tmp_path / f"x/checkpoints/{number:02}-{name}"
    tensors, _ = checkpoint.load(stage_folder)
    shutil.rmtree(stage_folder)
    (tmp_path / "x/done").unlink()
    again = trainer.run(tmp_path / "x.yaml", folder=tmp_path)
    plain = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in told["rows"]] for told in (once, again)
    ]
    assert plain[0] == plain[1]
    ended, _ = checkpoint.load(stage_folder)
    assert tensors["student"].keys() == ended["student"].keys()
    assert all(tensor.equal(ended["student"][key]) for key, tensor in tensors["student"].items())


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_refuses_a_key_that_it_has_not(name):
    with pytest.raises(ValidationError, match="no_such_key\n  is no key"):
        TypeAdapter(Stage).validate_python({**smallest(name), "no_such_key": 1})


def test_common_keys_are_those_of_every_stage():
    assert set(StageKeys.model_fields) == {"stage", "at_least"}
