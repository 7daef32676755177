"""Scan and ladder: one layer at a time, many sizes from one student, and both from the command line."""

import copy
import json

import pytest
import torch

from tests.runs.several_here import without_test_labels
from trainer.cli import main
from trainer.compression.weights import weights_of
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError, value
from trainer.reporting.front import on_front
from trainer.reporting.report import read as read_report
from trainer.runs import ladder, runner, scan

RECIPE = """name: few
data: {dataset: digits, subset: 300, validation: 200}
student: {model: lenet5, width: 3}
stages:
  - {stage: train, training: {epochs: 3, batch_size: 20, lr: 1e-2}}
"""
LAMP = """  - {stage: prune, method: lamp, sparsity: 0.5, schedule: cubic, every: 3, training: {epochs: 1, batch_size: 50}}
"""
SHARE = "  - {stage: share, values: 6}\n"
STD = "  - {stage: prune, sensitivity: 1.0, exclude: [last]}\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the first stage has run already."""
    folder = tmp_path_factory.mktemp("trained")
    path = write(folder, LAMP + SHARE)
    with runner.begun(path, 1, folder=folder / "runs") as run:
        assert [row["stage"] for row in run.rows] == ["trained"]
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """Its own copy of that folder for each test."""
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def write(folder, stages, name="given.yaml"):
    path = folder / name
    path.write_text(RECIPE + stages)
    return path


def one_layer_zeroed(run, name, sparsity):
    """Percent of the validation images right, with the smallest weights of one layer set to zero by hand."""
    net = copy.deepcopy(run.student).eval()
    weight = net.get_submodule(name).weight
    with torch.no_grad():
        weight.view(-1)[weight.abs().flatten().argsort(stable=True)[: round(sparsity * weight.numel())]] = 0
        images, labels, _ = run.data.validation.__getitems__(torch.arange(len(run.data.validation)))
        answers = net((images.float() / 255 - run.data.mean[0]) / run.data.std[0]).argmax(1)
    return (answers == labels).double().mean().item() * 100


# scan


def test_scan_measures_one_layer_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(scan, "SPARSITIES", (0.3, 0.6, 0.9, 0.97))
    found = scan.scan(folder / "given.yaml", folder=folder / "runs", cost=4.0)
    assert found["setting"] == "sparsity" and found["stage"] == 1
    assert [layer["layer"] for layer in found["layers"]] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    with runner.begun(folder / "given.yaml", 1, folder=folder / "runs") as run:
        assert (
            found["top1_validation"] == one_layer_zeroed(run, "fc1", 0.0) == run.rows[-1]["top1_validation"]
        )
        for layer in found["layers"]:
            assert [point["setting"] for point in layer["points"]] == [0.3, 0.6, 0.9, 0.97]
            assert layer["num_weights"] == run.student.get_submodule(layer["layer"]).weight.numel()
            for point in layer["points"]:
                assert point["sparsity"] == pytest.approx(
                    round(point["setting"] * layer["num_weights"]) / layer["num_weights"]
                )
                assert point["top1_validation"] == pytest.approx(
                    one_layer_zeroed(run, layer["layer"], point["setting"]), abs=0.51
                )


def test_scan_suggests_the_most_that_costs_no_more(folder, monkeypatch):
    monkeypatch.setattr(scan, "SPARSITIES", (0.3, 0.6, 0.9, 0.97))
    found = scan.scan(folder / "given.yaml", folder=folder / "runs", cost=4.0)
    least = found["top1_validation"] - 4.0
    for layer in found["layers"]:
        good = [point["top1_validation"] >= least for point in layer["points"]]
        reach = good.index(False) if False in good else len(good)
        assert layer["suggestion"] == (layer["points"][reach - 1]["setting"] if reach else None)
    chosen = {layer["layer"]: layer["suggestion"] for layer in found["layers"] if layer["suggestion"]}
    spared = [layer["layer"] for layer in found["layers"] if not layer["suggestion"]]
    assert len({*chosen.values(), None if spared else 0}) > 1, "the layers differ"
    assert found["suggestion"] == {"method": "lamp", "scope": "layer", "sparsity": chosen} | (
        {"exclude": spared} if spared else {}
    )
    assert found["together"]["sparsity"] == pytest.approx(
        sum(round(chosen.get(layer["layer"], 0) * layer["num_weights"]) for layer in found["layers"])
        / sum(layer["num_weights"] for layer in found["layers"])
    )
    told = scan._yaml(found["suggestion"])
    path = write(folder, f"  - {{stage: prune, {told}, training: {{epochs: 1}}}}\n", "suggested.yaml")
    assert read(path)[0].stages[1].sparsity == pytest.approx(chosen)
    here = folder / "runs" / "few"
    assert json.loads((here / "scan.json").read_text()) == found
    assert told in (here / "scan.md").read_text() and "| conv1 " in (here / "scan.md").read_text()
    assert (here / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_scan_leaves_the_run_where_it_was_and_the_run_goes_on_from_there(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, STD)
    monkeypatch.setattr(scan, "SENSITIVITIES", (0.5, 1.0, 9.0))
    found = scan.scan(path, folder=tmp_path / "runs")
    assert "[1/1] train" in capsys.readouterr().out
    assert found["setting"] == "sensitivity" and found["suggestion"]["exclude"][0] == "last"
    assert [layer["layer"] for layer in found["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    assert all([p["setting"] for p in layer["points"]] == [0.5, 1.0] for layer in found["layers"]), (
        "9 would leave nothing"
    )
    again = scan.scan(path, folder=tmp_path / "runs")
    assert again == found
    result = runner.run(path, folder=tmp_path / "runs")
    assert "going on after stage 1 of 2 (train)" in capsys.readouterr().out
    sparsity = {layer["layer"]: layer["sparsity"] for layer in result["layers"]}
    assert all(
        sparsity[layer["layer"]] == pytest.approx(layer["points"][1]["sparsity"]) for layer in found["layers"]
    )
    assert scan.scan(path, folder=tmp_path / "runs") == found, "a run that is over can be scanned too"


def test_scan_before_a_second_pruning_starts_from_its_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "SPARSITIES", (0.3, 0.5, 0.8))
    path = write(
        tmp_path,
        "  - {stage: prune, method: magnitude, sparsity: 0.5}\n  - {stage: prune, method: magnitude, sparsity: 0.9}\n",
    )
    found = scan.scan(path, folder=tmp_path / "runs", stage=2)
    assert all(
        [point["setting"] for point in layer["points"]] in ([0.5, 0.8], [0.8]) for layer in found["layers"]
    )
    assert found["together"]["sparsity"] >= 0.49


def test_weights_come_back_when_measuring_fails():
    place = weights_of(torch.nn.Sequential(torch.nn.Linear(4, 4)))["0"]
    before = place.value.detach().clone()
    with (
        pytest.raises(KeyError),
        torch.no_grad(),
        scan._pruned({"0": (place, torch.zeros(4, 4, dtype=torch.bool))}),
    ):
        assert not place.value.any()
        raise KeyError
    assert torch.equal(place.value, before)


@pytest.mark.parametrize(
    ("stages", "given", "told"),
    [
        ("", {}, "stages: there is no stage prune in this recipe"),
        (LAMP, {"stage": 0}, r"stage 0 is no stage prune; allowed: 1"),
        (LAMP, {"cost": 0}, "cost: got 0; points of accuracy above 0"),
        (LAMP, {"cost": float("nan")}, "cost: got nan; points of accuracy above 0"),
        (
            "  - {stage: prune, method: n_m, pattern: '1:2'}\n",
            {},
            r"stages\[1\].method: 'n_m' has no sparsity of single weights",
        ),
    ],
)
def test_what_cannot_be_scanned(tmp_path, stages, given, told):
    with pytest.raises(ValueError, match=told):
        scan.scan(write(tmp_path, stages), folder=tmp_path / "runs", **given)
    assert not (tmp_path / "runs").exists()


# ladder


def counted(monkeypatch):
    from trainer import stages

    calls = []
    for name in ("train", "prune", "share"):
        __import__(f"trainer.stages.{name}")
        module = getattr(stages, name)
        real = getattr(module, name)

        def call(run, *, _real=real, _name=name, **settings):
            calls.append(_name)
            return _real(run, **settings)

        call.__signature__ = __import__("inspect").signature(real)
        call.__module__, call.__name__, call.__doc__ = real.__module__, real.__name__, real.__doc__
        monkeypatch.setattr(module, name, call)
    return calls


def test_ladder_runs_every_point_from_one_student(folder, monkeypatch, taken_over):
    calls = counted(monkeypatch)
    path = folder / "given.yaml"
    found = ladder.ladder(path, [0.6, 0.9], [1, 3], folder=folder / "runs")
    assert calls == ["prune", "share", "share"] * 2, (
        "one training is done, and points of one sparsity prune once"
    )
    points = found["points"]
    assert [(p["name"], p["sparsity"], p["bits"]) for p in points] == [
        ("sparsity-0.6-bits-1", 0.6, 1),
        ("sparsity-0.6-bits-3", 0.6, 3),
        ("sparsity-0.9-bits-1", 0.9, 1),
        ("sparsity-0.9-bits-3", 0.9, 3),
    ]
    here = folder / "runs" / "few"
    for point in points:
        other = {o["name"]: o for o in points if o is not point}
        beaten = any(
            o["file_bytes"] <= point["file_bytes"]
            and o["error"] <= point["error"]
            and (o["file_bytes"], o["error"]) != (point["file_bytes"], point["error"])
            for o in other.values()
        )
        assert point["front"] != beaten
    assert points[1]["file_bytes"] > points[0]["file_bytes"] > points[2]["file_bytes"]
    assert json.loads((here / "ladder.json").read_text()) == found
    assert " error % |" in (here / "ladder.md").read_text()
    assert (here / "ladder.png").read_bytes().startswith(b"\x89PNG")

    calls.clear()
    assert ladder.ladder(path, [0.6, 0.9], [1, 3], folder=folder / "runs") == found
    assert not calls, "what is done is not done again"

    # The same point as a run of its own, from the same checkpoint.
    changes = {"name": "alone", "stages.1.sparsity": 0.9, "stages.2.bits": 3, "stages.2.values": None}
    alone = runner.run(path, changes, folder / "runs", more=[here])["rows"][-1]
    assert calls == ["prune", "share"]
    assert (alone["file_bytes"], 100 - alone["top1"]) == (points[3]["file_bytes"], points[3]["error"])


TAUGHT = """
name: taught
data: {dataset: digits, subset: 120, validation: 40, views: 2, augment: {shift: 1}}
teacher: {model: lenet300, hidden: [30]}
student: {model: lenet300, hidden: [8]}
stages:
  - {stage: train, who: teacher, training: {epochs: 4, batch_size: 20, lr: 1e-2}}
  - {stage: distill, training: {epochs: 1, batch_size: 40}, losses: &taught [{loss: kl}]}
  - {stage: prune, method: magnitude, sparsity: 0.5, training: {epochs: 2, batch_size: 40}, losses: *taught}
  - {stage: pack}
"""


def test_without_test_labels_a_ladders_front_is_by_agreement(tmp_path, monkeypatch, capsys, taken_over):
    path = without_test_labels(tmp_path, monkeypatch)
    found = ladder.ladder(path, [0.3, 0.6], allow_python=True)
    here = tmp_path / "runs" / "unlabelled"
    assert json.loads((here / "ladder.json").read_text(), parse_constant=pytest.fail) == found
    for point in found["points"]:
        assert point["error"] is None and 0 <= point["error_validation"] <= 100
        agreement = read_report(here / "ladder" / point["name"])["rows"][-1]["agreement"]
        assert point["disagreement"] == 100 - agreement
    points = [(point["file_bytes"], point["disagreement"]) for point in found["points"]]
    assert [point["front"] for point in found["points"]] == on_front(points)
    told = (here / "ladder.md").read_text()
    assert " disagreement % |" in told and "No test image has a label." in told and "nan" not in told
    assert (here / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_a_ladder_share_the_teachers_answers(tmp_path, capsys, taken_over):
    path = tmp_path / "taught.yaml"
    path.write_text(TAUGHT)
    ladder.ladder(path, [0.5, 0.8], folder=tmp_path)
    here = tmp_path / "taught"
    asked = []
    for folder in (here, here / "ladder" / "sparsity-0.5", here / "ladder" / "sparsity-0.8"):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        asked.append([line["teacher_images"] for line in lines if "teacher_images" in line])
        assert (folder / "views").exists() == (folder == here), "the points give back what was lent"
    assert asked == [[120], [0, 120], [0, 0]]
    runner.run(path, folder=tmp_path)
    assert not (here / "views").exists()
    # A point that was interrupted, and whose lender has ended since, keeps answers of its own.
    point = here / "ladder" / "sparsity-0.9"
    point.mkdir()
    (point / "views").symlink_to("../../views")
    capsys.readouterr()
    ladder.ladder(path, [0.9], folder=tmp_path)
    assert f"logits each, float32, 0.1 MiB, in {point / 'views'}" in capsys.readouterr().out
    assert not (point / "views").is_symlink() and not (point / "views").exists()


@pytest.mark.parametrize("given", ["bits: 5", "values: 6", "bits: auto, budget_bytes: 2600"])
def test_ladder_over_the_bits_alone(tmp_path, given):
    path = write(tmp_path, STD + f"  - {{stage: share, {given}}}\n")
    found = ladder.ladder(path, bits=[2, 4], folder=tmp_path / "runs")
    assert [(point["name"], point["sparsity"], point["bits"]) for point in found["points"]] == [
        ("bits-2", None, 2),
        ("bits-4", None, 4),
    ]


def test_ladder_over_the_sparsity_alone(folder, monkeypatch):
    calls = counted(monkeypatch)
    found = ladder.ladder(folder / "given.yaml", [0.7], folder=folder / "runs")
    assert calls == ["prune", "share"]
    assert found["points"][0]["name"] == "sparsity-0.7" and found["points"][0]["bits"] is None


@pytest.mark.parametrize(
    ("stages", "given", "told"),
    [
        (LAMP + SHARE, {}, "needs --sparsity or --bits"),
        (LAMP, {"bits": [3]}, r"stages\[1\]: there is no stage share after it"),
        (STD + SHARE, {"sparsity": [0.5]}, r"stages\[1\].method: 'std' has no sparsity to vary"),
        (LAMP + SHARE, {"sparsity": [0.5, 1.0]}, "less than 1"),
        (LAMP + SHARE, {"bits": [3, 17]}, "17"),
        (LAMP + SHARE, {"bits": [0]}, "0"),
        (LAMP + SHARE, {"bits": [3, 4, 3]}, "bits-3 is given twice"),
        (SHARE, {"bits": [3]}, "there is no stage prune"),
    ],
)
def test_ladders_that_lead_nowhere(tmp_path, stages, given, told):
    with pytest.raises((RecipeError, ValueError), match=told):
        ladder.ladder(write(tmp_path, stages), folder=tmp_path / "runs", **given)
    assert not (tmp_path / "runs").exists(), "nothing was trained"


def test_labels_of_points():
    assert ladder._short({"sparsity": 0.95, "bits": 4}) == "95 % zeros · 4 bits"
    assert ladder._short({"sparsity": None, "bits": 4}) == "4 bits"


# the command line


def test_both_commands(folder, monkeypatch, capsys):
    monkeypatch.setattr(scan, "SPARSITIES", (0.5, 0.9))
    path, runs = str(folder / "given.yaml"), str(folder / "runs")
    assert main(["scan", path, "--folder", runs, "--cost", "2.5"]) == 0
    told = capsys.readouterr().out
    assert (
        "a suggestion costs at most 2.5 points" in told
        and "All suggestions together" in told
        and "scan.md" in told
    )
    assert main(["ladder", path, "--folder", runs, "--sparsity", "0.5,0.9", "--bits", "2"]) == 0
    told = capsys.readouterr().out
    assert "---- sparsity-0.9-bits-2" in told and "ladder.md" in told
    assert main(["scan", path, "--folder", runs, "--stage", "2"]) == 2
    assert "given.yaml:4: stages: stage 2 is no stage prune" in capsys.readouterr().err
    assert main(["ladder", path, "--folder", runs]) == 2
    assert "needs --sparsity or --bits" in capsys.readouterr().err
    for words in (["--sparsity", "0.5,high"], ["--bits", "3.5"]):
        with pytest.raises(SystemExit) as left:
            main(["ladder", path, *words])
        assert left.value.code == 2
        assert "numbers with commas between them are allowed" in capsys.readouterr().err


def test_suggestions_are_read_back_as_they_are_meant():
    suggestion = {"exclude": ["0"], "sparsity": {"1": 0.99, "0.2": 0.5, "fc1": 0.25}}
    assert value("{" + scan._yaml(suggestion) + "}") == suggestion
