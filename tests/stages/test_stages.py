"""The stages, run by recipes: what they leave in the student, in the report and on the disk."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests import making
from trainer import functional
from trainer.compression.states import dense_state, restore
from trainer.compression.weights import weights_of
from trainer.models.lenet5 import lenet5
from trainer.packing import network as packed
from trainer.runs import runner
from trainer.runs.evaluate_file import evaluate_file
from trainer.stages import pack
from trainer.storage import checkpoint
from trainer.storage.weights_file import digest, save_file

DATA = "{dataset: digits, subset: 200, validation: 100}"
LAYERS = ["conv1", "conv2", "fc1", "fc2", "fc3"]

MAIN = f"""
name: main
seed: 1
data: {DATA}
teacher: {{model: lenet5, width: 4}}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, who: teacher, at_least: 50, training: {{epochs: 6, batch_size: 32, lr: 1e-2}}}}
  - stage: distill
    training: {{epochs: 6, batch_size: 16, lr: 2e-2}}
    losses: &taught
      - {{loss: cross_entropy, weight: 0.1}}
      - {{loss: kl, weight: 0.9, temperature: 2}}
      - {{loss: hint, at: [conv1, conv2]}}
  - {{stage: prune, method: magnitude, sparsity: 0.6, training: {{epochs: 1, batch_size: 32, lr: 2e-3}}, losses: *taught}}
  - {{stage: share, bits: 3, training: {{epochs: 1, batch_size: 32, lr: 1e-3}}, losses: *taught}}
  - {{stage: pack}}
"""

ROW_KEYS = {
    "stage",
    "index",
    "top1",
    "top1_validation",
    "agreement",
    "num_weights",
    "num_nonzero",
    "sparsity",
    "file_bytes",
    "ratio_student",
    "ratio_teacher",
    "seconds",
}
LAYER_KEYS = {
    "layer",
    "shape",
    "num_weights",
    "num_nonzero",
    "sparsity",
    "thresholds",
    "clusters",
    "bits",
    "ratio_sharing",
    "file_bytes",
    "csr_bytes",
    "csc_bytes",
}


def net(width=3):
    return lenet5((1, 8, 8), 10, width=width)


def run(folder, text, **changes):
    path = Path(folder) / "given.yaml"
    path.write_text(text)
    return runner.run(path, changes or None, folder=Path(folder) / "runs")


def left_by(folder, name, stage):
    """The student, as the checkpoint of a stage has it, and the facts beside it."""
    [place] = (Path(folder) / "runs" / name / "checkpoints").glob(
        f"*-{stage}" if isinstance(stage, str) else f"{stage:02d}-*"
    )
    tensors, facts = checkpoint.load(place)
    student = net()
    restore(student, tensors["student"])
    return student, facts, tensors


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_in_fresh_process", making.FRESH_PROCESS)
        making.put_plots_in(patch)
        return folder, run(folder, MAIN)


# the main job


def test_every_step_has_its_row(main):
    _, result = main
    assert [(row["stage"], row["index"]) for row in result["rows"]] == [
        ("teacher", 0),
        ("distilled", 1),
        ("pruned", 2),
        ("recovered", 2),
        ("clustered", 3),
        ("shared", 3),
        ("decoded", 4),
    ]


def test_the_report_has_the_structure_that_programs_read(main):
    folder, result = main
    text = (folder / "runs" / "main" / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert {"name", "recipe", "versions", "hardware", "seconds", "rows", "layers"} <= set(found)
    assert (
        found["name"] == "main" and found["recipe"]["stages"][4] == {"stage": "pack"} and found["seed"] == 1
    )
    assert found["rows"] == json.loads(json.dumps(result["rows"]))
    for row in found["rows"]:
        assert set(row) >= ROW_KEYS, row["stage"]
        for key in ("top1", "top1_validation", "agreement"):
            assert 0 <= row[key] <= 100
        assert row["sparsity"] == pytest.approx(1 - row["num_nonzero"] / row["num_weights"])
        assert row["ratio_teacher"] == pytest.approx(found["teacher_bytes"] / row["file_bytes"])
        if row["stage"] != "teacher":
            assert row["ratio_student"] == pytest.approx(found["student_bytes"] / row["file_bytes"])
    student, teacher = net(), net(4)
    assert found["student_bytes"] == 4 * sum(p.numel() for p in student.parameters())
    assert (
        found["teacher_bytes"]
        == found["rows"][0]["file_bytes"]
        == 4 * sum(p.numel() for p in teacher.parameters())
    )
    trained = [
        row for row in found["rows"] if row["stage"] in ("teacher", "distilled", "recovered", "shared")
    ]
    assert [(row["epochs"], row["steps"]) for row in trained] == [(6, 42), (6, 78), (1, 7), (1, 7)]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in trained)
    assert found["seconds"] >= sum(row["seconds"] for row in found["rows"])


def test_the_report_has_the_layers(main):
    folder, result = main
    assert [layer["layer"] for layer in result["layers"]] == LAYERS
    weights = weights_of(net())
    for layer in result["layers"]:
        assert set(layer) == LAYER_KEYS
        size = weights[layer["layer"]].value.numel()
        assert layer["shape"] == list(weights[layer["layer"]].value.shape) and layer["num_weights"] == size
        assert layer["num_nonzero"] == size - round(0.6 * size)
        assert len(layer["thresholds"]) == 1 and layer["thresholds"][0] > 0
        assert (layer["clusters"], layer["bits"]) == (8, 3)
        n = layer["num_nonzero"]
        assert layer["ratio_sharing"] == pytest.approx(n * 32 / (n * 3 + 8 * 32))
        assert 0 < layer["file_bytes"] < layer["csr_bytes"]
    assert sum(layer["file_bytes"] for layer in result["layers"]) < result["rows"][-1]["file_bytes"]


def test_the_report_is_there_for_people_too(main):
    folder, _ = main
    here = folder / "runs" / "main"
    text = (here / "report.md").read_text()
    assert all(
        f"| {stage} " in text
        for stage in ("teacher", "distilled", "pruned", "recovered", "clustered", "shared", "decoded")
    )
    assert all(f"| {layer} " in text for layer in LAYERS)
    plots = sorted(here.glob("*.png"))
    assert "accuracy_bytes.png" in [plot.name for plot in plots] and len(plots) >= 2
    for plot in plots:
        assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and f"({plot.name})" in text


def test_zeros_are_exactly_as_many_as_asked_for_and_stay(main):
    folder, result = main
    _, _, tensors = left_by(folder, "main", "pack")
    pruned, recovered = tensors["weights-pruned"], tensors["weights-recovered"]
    clustered, shared = tensors["weights-clustered"], tensors["weights-shared"]
    assert set(pruned) == set(LAYERS)
    for name in LAYERS:
        zeros = pruned[name] == 0
        assert zeros.sum() == round(0.6 * zeros.numel())
        assert pruned[name].abs()[~zeros].min() >= tensors["weights-dense"][name].abs()[zeros].max()
        for later in (recovered, clustered, shared):
            assert torch.equal(later[name] == 0, zeros)
        assert not torch.equal(pruned[name], recovered[name])
    total = sum(t.numel() for t in pruned.values())
    zeros = sum(round(0.6 * t.numel()) for t in pruned.values())
    sparsities = {row["stage"]: row["sparsity"] for row in result["rows"]}
    assert sparsities["teacher"] == sparsities["distilled"] == 0
    assert all(
        sparsities[stage] == pytest.approx(zeros / total)
        for stage in ("pruned", "recovered", "clustered", "shared", "decoded")
    )


def test_shared_values_are_few_and_fit_float16(main):
    folder, _ = main
    _, _, tensors = left_by(folder, "main", "pack")
    for name in LAYERS:
        clustered, shared = tensors["weights-clustered"][name], tensors["weights-shared"][name]
        assert len(clustered[clustered != 0].unique()) <= 8 and len(shared[shared != 0].unique()) <= 8
        assert torch.equal(shared, shared.half().float())
        for value in clustered.unique():  # who shared a value before the training shares one after it
            assert len(shared[clustered == value].unique()) == 1


def test_the_decoded_file_is_the_network_that_was_measured(main):
    folder, result = main
    here = folder / "runs" / "main"
    shared, decoded = result["rows"][-2:]
    for key in ("top1", "top1_validation", "agreement", "num_nonzero", "file_bytes"):
        assert decoded[key] == shared[key]
    student, _, _ = left_by(folder, "main", "share")
    model, header = packed.decode((here / "student.tiny").read_bytes())
    expected = dense_state(student)
    assert set(expected) == set(model.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert decoded["digest"] == digest(expected)
    assert decoded["file_bytes"] == (here / "student.tiny").stat().st_size
    found = evaluate_file(here / "student.tiny", here / "recipe.yaml")
    assert found == {
        "top1": decoded["top1"],
        "images": 360,
        "digest": decoded["digest"],
        "file_bytes": decoded["file_bytes"],
    }


def test_each_stage_leaves_a_checkpoint_without_pickles(main):
    folder, _ = main
    here = folder / "runs" / "main" / "checkpoints"
    stages = sorted(path.name for path in here.iterdir())
    assert stages == ["00-train", "01-distill", "02-prune", "03-share", "04-pack"]
    for stage in stages:
        files = [path for path in (here / stage).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".safetensors", ".json"}
        assert any(path.name == "student.safetensors" for path in files)
        assert not list((here / stage).glob("fit-*"))  # what a training needed to go on is no longer there


def test_the_log_has_every_loss_and_every_row(main):
    folder, result = main
    lines = [json.loads(line) for line in (folder / "runs" / "main" / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} - {"warning"} == {"numbers", "row", "summary"}
    assert [line["stage"] for line in lines if line["kind"] == "row"] == [
        row["stage"] for row in result["rows"]
    ]
    terms = {"loss", "cross_entropy", "kl", "hint/conv1", "hint/conv2", "lr"}
    for stage, steps in (("distill", [13, 26, 39, 50, 52, 65, 78]), ("prune", [7]), ("share", [7])):
        told = [line for line in lines if line.get("stage") == stage and "loss" in line]
        assert [line["step"] for line in told] == steps
        for line in told:
            assert terms <= set(line)
            total = 0.1 * line["cross_entropy"] + 0.9 * line["kl"] + line["hint/conv1"] + line["hint/conv2"]
            assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert lines[-1]["kind"] == "summary" and lines[-1]["top1"] == result["rows"][-1]["top1"]
    validations = [line for line in lines if "validation" in line]
    assert len(validations) == 6 + 6 + 1 + 1


def test_learning_happens(main):
    _, result = main
    rows = {row["stage"]: row for row in result["rows"]}
    assert rows["teacher"]["top1"] > 60 and rows["distilled"]["top1"] > 20  # chance is 10
    assert rows["teacher"]["agreement"] == 100


# prune


def pruned_by(folder, stage, before=""):
    text = f"""
name: pruned
data: {DATA}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 32, lr: 1e-2}}}}
{before}  - {{stage: prune, {stage}}}
"""
    result = run(folder, text)
    before = left_by(folder, "pruned", 0 if not before else 1)[0]
    after = left_by(folder, "pruned", 1 if not text.count("prune,") > 1 else 2)[0]
    return result, {n: p.value.detach() for n, p in weights_of(before).items()}, weights_of(after)


def rounded_share(weights, share):
    return {name: round(share * weight.numel()) for name, weight in weights.items()}


def test_prune_by_standard_deviation(tmp_path):
    result, before, after = pruned_by(tmp_path, "sensitivity: 0.8")
    assert [row["stage"] for row in result["rows"]] == ["trained", "pruned"]
    for layer in result["layers"]:
        weight = before[layer["layer"]]
        threshold = 0.8 * weight.double().std(correction=0).item()
        assert layer["thresholds"] == [pytest.approx(threshold)]
        expected = torch.where(weight.abs() > threshold, weight, 0.0)
        assert torch.equal(after[layer["layer"]].value, expected)


def test_prune_each_layer_by_its_own_sensitivity(tmp_path):
    own = {"conv1": 0.2, "conv2": 0.4, "fc1": 0.9, "fc2": 0.8}
    result, before, after = pruned_by(tmp_path, f"sensitivity: {json.dumps(own)}, exclude: [last]")
    for name, place in after.items():
        if name == "fc3":
            assert torch.equal(place.value, before[name])
        else:
            assert torch.equal(
                place.value != 0, before[name].abs() > own[name] * before[name].double().std(correction=0)
            )
    assert [layer["thresholds"] is None for layer in result["layers"]] == [False] * 4 + [True]


def test_prune_magnitude_leaves_alone_what_is_kept(tmp_path):
    _, before, after = pruned_by(tmp_path, "method: magnitude, sparsity: 0.7, exclude: [first, fc2]")
    for name, place in after.items():
        zeros = int((place.value == 0).sum())
        assert zeros == (0 if name in ("conv1", "fc2") else round(0.7 * before[name].numel()))


@pytest.mark.parametrize("settings", ["method: lamp", "method: magnitude, scope: global"])
def test_prune_over_all_layers_together(tmp_path, settings):
    result, before, after = pruned_by(tmp_path, f"{settings}, sparsity: 0.8")
    total = sum(weight.numel() for weight in before.values())
    zeros = {name: int((place.value == 0).sum()) for name, place in after.items()}
    assert sum(zeros.values()) == round(0.8 * total)
    assert zeros != rounded_share(before, 0.8)  # it was not the same in each layer
    scores = {name: compress_scores(weight, settings) for name, weight in before.items()}
    kept = torch.cat([scores[name][(after[name].value != 0).flatten()] for name in after])
    gone = torch.cat([scores[name][(after[name].value == 0).flatten()] for name in after])
    assert kept.min() >= gone.max()


def compress_scores(weight, settings):
    """A naive LAMP score, or the magnitude."""
    square = weight.double().flatten() ** 2
    if "lamp" not in settings:
        return square.sqrt()
    return torch.stack([value / square[square >= value].sum() for value in square])


def test_prune_gradually_ends_at_its_target_and_recovers(tmp_path):
    result, before, after = pruned_by(
        tmp_path,
        "method: magnitude, sparsity: 0.9, schedule: cubic, every: 2, training: {epochs: 3, batch_size: 32, keep: best}",
    )
    assert [row["stage"] for row in result["rows"]] == ["trained", "recovered"]
    for name, place in after.items():
        assert int((place.value == 0).sum()) == round(0.9 * before[name].numel())
        assert int((~place.mask).sum()) == round(0.9 * before[name].numel())
    assert all(len(layer["thresholds"]) == 1 and layer["thresholds"][0] > 0 for layer in result["layers"])


def test_the_shortest_gradual_pruning_reaches_its_target(tmp_path):
    _, before, after = pruned_by(
        tmp_path, "method: magnitude, sparsity: 0.5, schedule: cubic, training: {epochs: 1, batch_size: 200}"
    )
    assert {n: int((p.value == 0).sum()) for n, p in after.items()} == rounded_share(before, 0.5)


def test_pruning_twice_keeps_the_first_zeros(tmp_path):
    before = "  - {stage: prune, method: magnitude, sparsity: 0.5, training: {epochs: 1, batch_size: 32}}\n"
    _, first, after = pruned_by(
        tmp_path, "method: magnitude, sparsity: 0.7, training: {epochs: 1, batch_size: 32}", before
    )
    for name, place in after.items():
        assert int((place.value == 0).sum()) == round(0.7 * first[name].numel())
        assert not place.value[first[name] == 0].any()


# share


def shared_by(folder, stage, prune="  - {stage: prune, sensitivity: 0.5}\n"):
    text = f"""
name: shared
data: {DATA}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 32, lr: 1e-2}}}}
{prune}  - {{stage: share, {stage}}}
"""
    result = run(folder, text)
    before = weights_of(left_by(folder, "shared", 1 if prune else 0)[0])
    after = weights_of(left_by(folder, "shared", 2 if prune else 1)[0])
    for name, place in after.items():
        assert torch.equal(place.value == 0, before[name].value == 0)
    return result, {n: p.value.detach() for n, p in before.items()}, after


def num_values(weight):
    return len(weight[weight != 0].unique())


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ("bits: 2", [4] * 5),
        ("bits: {conv1: 1, conv2: 2, fc1: 3, fc2: 3, fc3: 4}, init: linear", [2, 4, 8, 8, 16]),
        ("values: 5, training: {epochs: 1, batch_size: 32}", [5] * 5),
        ("values: {conv: 3, fc: 6}", None),
    ],
)
def test_share_by_layer(tmp_path, settings, limits):
    if limits is None:
        with pytest.raises(ValueError, match="conv"):
            shared_by(tmp_path, settings)
        return
    result, before, after = shared_by(tmp_path, settings)
    trained = "training" in settings
    assert [row["stage"] for row in result["rows"]] == ["trained", "pruned", "clustered"] + [
        "shared"
    ] * trained
    for limit, layer, place in zip(limits, result["layers"], after.values(), strict=True):
        assert num_values(place.value) == limit  # there are more different weights than that
        assert (layer["clusters"], layer["bits"]) == (limit, math.ceil(math.log2(limit)))
        assert torch.equal(place.value, place.value.half().float())


def test_share_by_channel(tmp_path):
    result, before, after = shared_by(tmp_path, "bits: 1, per: channel, exclude: [conv1], codebook: float32")
    assert torch.equal(after["conv1"].value, before["conv1"])
    for name, place in after.items():
        if name != "conv1":
            assert all(num_values(row) <= 2 for row in place.value)
            assert num_values(place.value) > 2
    assert not all(torch.equal(p.value, p.value.half().float()) for p in after.values())


def test_share_by_groups(tmp_path):
    _, _, after = shared_by(
        tmp_path,
        "bits: 2, per: group, groups: 2, exclude: [conv1, fc3], training: {epochs: 1, batch_size: 32}",
    )
    for name in ("conv2", "fc1", "fc2"):
        halves = after[name].value.chunk(2)
        assert [num_values(half) for half in halves] == [4, 4]
        assert num_values(after[name].value) == 8


def test_share_without_pruning(tmp_path):
    result, _, after = shared_by(tmp_path, "bits: 4, init: linear", prune="")
    assert all(num_values(place.value) <= 16 for place in after.values())
    assert result["rows"][-1]["sparsity"] == 0
    assert all(layer["thresholds"] is None for layer in result["layers"])


# recipes of other shapes


def test_a_recipe_without_a_teacher_packs_what_it_trains(tmp_path):
    result = run(
        tmp_path,
        f"""
name: alone
data: {DATA}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 32}}}}
  - {{stage: pack, file: dense.tiny}}
""",
    )
    trained, decoded = result["rows"]
    assert (trained["stage"], decoded["stage"]) == ("trained", "decoded")
    for row in result["rows"]:
        assert row["agreement"] is None and row["ratio_teacher"] is None
    assert decoded["top1"] == trained["top1"] and (tmp_path / "runs" / "alone" / "dense.tiny").is_file()
    assert result["teacher_bytes"] is None and result["layers"][0]["clusters"] is None


def test_training_from_a_checkpoint(tmp_path, main):
    kept, _, tensors = left_by(main[0], "main", "distill")
    save_file(tmp_path / "student.safetensors", tensors["student"])
    text = f"""
name: loaded
data: {DATA}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, checkpoint: {tmp_path / "student.safetensors"}, at_least: AT_LEAST}}
"""
    row = run(tmp_path, text.replace("AT_LEAST", "10"))["rows"][0]
    distilled = main[1]["rows"][1]
    assert (row["top1"], row["top1_validation"]) == (distilled["top1"], distilled["top1_validation"])
    with pytest.raises(
        ValueError, match=r"the student has \d+\.\d+ % of the validation images right; at_least asks for 99.9"
    ):
        run(tmp_path, text.replace("AT_LEAST", "99.9").replace("loaded", "strict"))


def test_pack_removes_a_file_that_decodes_to_another_network(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pack, "_in_fresh_process", lambda run, path: {"digest": "0" * 64, "top1": 0.0, "seconds": 1.0}
    )
    with pytest.raises(RuntimeError, match="decoded to another network"):
        run(
            tmp_path,
            f"""
name: wrong
data: {DATA}
student: {{model: lenet5, width: 3}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 32}}}}
  - {{stage: pack}}
""",
        )
    assert not (tmp_path / "runs" / "wrong" / "student.tiny").exists()


def test_the_python_calls_prune_and_share_as_the_stages_do(tmp_path):
    _, before, after = pruned_by(tmp_path, "sensitivity: 0.8")
    model = net()
    model.load_state_dict({**model.state_dict(), **{f"{n}.weight": w for n, w in before.items()}})
    functional.prune(model, sensitivity=0.8)
    assert all(torch.equal(place.value, after[name].value) for name, place in weights_of(model).items())
