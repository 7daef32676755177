"""Several students together: the mean of their probabilities, their accuracy, bytes and time."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.runs.several_here import run_here, without_test_labels
from trainer import load
from trainer.cli import main
from trainer.data.batches import make_data
from trainer.data.reading import reading_of
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.runs.answering import Student
from trainer.runs.ensemble import together

RECIPE = """
name: many
data: {dataset: digits, subset: 300, validation: 60}
student: {model: lenet5, width: 2}
allow_untrained: true
stages:
  - {stage: train, training: {epochs: 3, batch_size: 20, lr: 1e-2}}
  - {stage: pack, file: my.digits.tiny}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def a_student(weight, mean, std, classes=("a", "b", "c"), shape=(1, 2, 2)):
    def answer(images):
        return images.flatten(1) @ weight

    return Student(list(classes), reading_of(shape, {}), mean, std, answer)


def test_the_mean_is_of_probabilities_each_of_a_students_own_input():
    torch.manual_seed(0)
    weights, images = 3 * torch.randn(2, 4, 3), torch.rand(5, 1, 2, 2)
    one, other = a_student(weights[0], [0.5], [0.2]), a_student(weights[1], [0.1], [0.9])
    both = together({"one": one, "other": other})
    inputs = (images - torch.tensor(both.mean)) / torch.tensor(both.std)
    expected = (
        (((images - 0.5) / 0.2).flatten(1) @ weights[0]).softmax(1)
        + (((images - 0.1) / 0.9).flatten(1) @ weights[1]).softmax(1)
    ) / 2
    torch.testing.assert_close(both.answer(inputs).softmax(1), expected)
    for changed, wanted in (
        (a_student(weights[0], [0.5], [0.2], "acb"), "b.tiny: knows other classes than a.tiny"),
        (a_student(weights[0], [0.5], [0.2], shape=(1, 4, 1)), "b.tiny: takes other images than a.tiny"),
    ):
        with pytest.raises(Mistake, match=wanted):
            together({"a.tiny": one, "b.tiny": changed})


def test_students_are_measured_alone_and_together(recipe, monkeypatch, capsys):
    run_here(monkeypatch)
    assert main(["ensemble", str(recipe), "--seeds", "3"]) == 0
    told = capsys.readouterr().out
    packed = [Path(f"runs/many-seed{seed}/my.digits.tiny") for seed in range(3)]
    networks = [load(file) for file in packed]
    data = make_data(read(recipe)[0].data, torch.device("cpu"))
    images, labels = data.test.images.images, data.test.labels
    with torch.inference_mode():
        shares = torch.stack([net(net.preprocess(images)).softmax(1) for net in networks])

    def right(mean):
        return (mean.argmax(1) == labels).double().mean().item() * 100

    rows = {row["name"]: row for row in json.loads(Path("runs/many-ensemble.json").read_text())["rows"]}
    assert list(rows)[:5] == ["seed 0", "seed 1", "seed 2", "2 together", "3 together"]
    for seed in range(3):
        assert rows[f"seed {seed}"]["top1"] == pytest.approx(right(shares[seed]))
    assert rows["3 together"]["top1"] == pytest.approx(right(shares.mean(0)))
    assert rows["2 together"]["file_bytes"] == sum(file.stat().st_size for file in packed[:2])
    assert rows["3 together"]["latency_seconds"] > rows["seed 0"]["latency_seconds"] > 0
    before = rows["student before it was made smaller"]
    assert before["file_bytes"] > rows["seed 0"]["file_bytes"] and before["latency_seconds"] is None
    assert (
        Path("runs/many-ensemble.md").read_text().strip() in told
        and f"{rows['3 together']['top1']:.2f}" in told
    )

    Image.fromarray(images[7, 0].numpy()).save("digit.png")
    files = [str(packed[0]), "digit.png", "--with", str(packed[1]), "--with", str(packed[2]), "--json"]
    assert main(["predict", *files]) == 0
    [answer] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    likeliest = shares[:, 7].mean(0).topk(3)
    assert [one["class"] for one in answer["classes"]] == [data.classes[k] for k in likeliest.indices]
    found = [one["probability"] for one in answer["classes"]]
    assert found == pytest.approx(likeliest.values.tolist(), abs=1e-5)
    assert main(["predict", *files, "--precision", "bf16"]) == 0
    halves = [one["probability"] for one in json.loads(capsys.readouterr().out)["classes"]]
    assert halves != found and halves == pytest.approx(found, abs=0.02)


def test_without_test_labels_accuracies_have_a_dash(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch)
    recipe = without_test_labels(tmp_path, monkeypatch)
    assert main(["ensemble", str(recipe), "--seeds", "2", "--allow-python"]) == 0
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[2].strip() for line in lines] == ["–"] * 5 and "nan" not in told
    rows = json.loads(Path("runs/unlabelled-ensemble.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert [row["top1"] for row in rows] == [None] * 5 and rows[-1]["name"] == "teacher"
    assert all(0 <= row["top1_validation"] <= 100 for row in rows)


def test_what_cannot_be_an_ensemble_is_refused(recipe, capsys):
    recipe.write_text(RECIPE.replace("  - {stage: pack, file: my.digits.tiny}\n", ""))
    assert main(["ensemble", str(recipe)]) == 2
    assert "packs no student" in capsys.readouterr().err
    recipe.write_text(RECIPE)
    assert main(["ensemble", str(recipe), "--set", "seed=3"]) == 2
    assert "the runs have the seeds 0, 1, 2" in capsys.readouterr().err
    assert not Path("runs").exists()
