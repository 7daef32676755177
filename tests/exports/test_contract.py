"""What every target of an export promises, over every file of the shelf: its keys, its files, and the student's answers."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.exporting.export import export
from trainer.exporting.graph import OPS
from trainer.exporting.subject import Exported, NotInstalled
from trainer.mistakes import Mistake
from trainer.recipe import shelves

NAMES = shelves.names("to")
RECIPE = """
name: x
data: {dataset: digits, subset: 100, validation: 60, size: 8}
student: {model: lenet300, hidden: [6]}
stages: [{stage: train, training: {epochs: 1}}]
"""


def network():
    """Every target can write these: a convolution, a pooling, ReLU and a linear layer."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 16, 10)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_a_documented_function_of_subject_and_folder(name):
    function = shelves.find("to", name)
    assert shelves.fed(function) == ["subject", "folder"]
    assert inspect.signature(function).return_annotation is Exported
    text = inspect.cleandoc(function.__doc__)
    assert text.splitlines()[0].endswith(".")
    for key in shelves.fields(function):
        assert f"{key}:" in text, f"{key} is not explained"
    assert set(shelves.beside(function, "OPS") or OPS) <= OPS


@pytest.mark.parametrize("name", NAMES)
def test_a_file_never_imports_the_library_whose_name_it_bears(name):
    path = Path(inspect.getfile(shelves.find("to", name)))
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert name not in {module.split(".")[0] for module in imported}


@pytest.mark.parametrize("name", NAMES)
def test_its_files_answer_as_the_network(name, tmp_path):
    needs_data = bool(shelves.beside(shelves.find("to", name), "NEEDS_DATA"))
    (tmp_path / "x.yaml").write_text(RECIPE)
    recipe = tmp_path / "x.yaml" if needs_data else None
    net = network()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    try:
        [row] = export(net, tmp_path / "out", name, shape=(1, 8, 8), recipe=recipe, mean=[0.3], std=[0.5])
    except NotInstalled as error:
        pytest.skip(str(error))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {name}
    files = [tmp_path / "out" / name / file for file in row["files"]]
    assert files and all(file.is_file() for file in files)
    assert row["file_bytes"] > 0
    median, late = row["latency_seconds"], row["latency_p95_seconds"]
    assert (median is None and "not run by" in row["notes"][0]) or late >= median > 0
    assert row["target"] == name and row["num_images"] >= 100
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    with pytest.raises(Mistake, match="is there already"):
        export(net, tmp_path / "out", name, shape=(1, 8, 8), recipe=recipe, mean=[0.3], std=[0.5])
