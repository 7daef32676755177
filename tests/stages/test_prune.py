"""The stage prune: every method and schedule ends at exactly what was asked for, also in two processes and
after a kill.
"""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tests import making
from tests.compression import test_compression
from tests.processes import in_two
from trainer.compression import channels
from trainer.compression.codebooks import cluster, set_codebook
from trainer.compression.masks import position_bits, score_masks
from trainer.compression.states import dense_state
from trainer.compression.weights import counts, weights_of
from trainer.criteria.magnitude import magnitude
from trainer.networks.build import build
from trainer.networks.sizes import resize, sizes_of
from trainer.packing import network as packed
from trainer.recipe.keys import Stage
from trainer.recipe.text import RecipeError
from trainer.recipe.training import Training
from trainer.reporting.log import Log
from trainer.runs import runner
from trainer.stages import prune as stage
from trainer.stages.prune import prune
from trainer.storage.weights_file import digest
from trainer.training import fit

TRAINING = Training(epochs=2, batch_size=20, lr=5e-3)


def make_run(folder, spec=None, **more):
    """A run of a freshly built student on a few digits."""
    spec = spec or {"model": "lenet5", "width": 4}
    return making.make_run(
        folder, spec, stage=1, stage_name="prune", **{"subset": 100, "validation": 50} | more
    )


@pytest.fixture
def quick(monkeypatch):
    """Rows without accuracy and bytes, whose measuring takes longer than the training."""
    monkeypatch.setattr(
        stage,
        "record",
        lambda run, label, seconds=0.0, **numbers: run.rows.append(
            {"stage": label, **counts(run.student), **numbers}
        ),
    )


def weights(run):
    return {name: place.value.detach().clone() for name, place in weights_of(run.student).items()}


def zeros(run):
    return {name: int((weight == 0).sum()) for name, weight in weights(run).items()}


def assert_exactly(run, sparsity, together=False):
    """So many zeros, in each layer or in all, and to within one in each gate."""
    places = weights_of(run.student)
    if together:
        assert sum(zeros(run).values()) == round(sparsity * sum(p.value.numel() for p in places.values()))
        return
    for name, place in places.items():
        assert int((place.value == 0).sum()) == round(sparsity * place.value.numel()), name
        assert all(
            abs(int((part == 0).sum()) - sparsity * part.numel()) < 1
            for part in place.value.chunk(place.parts)
        )


def labels(run):
    return [row["stage"] for row in run.rows]


CUBIC = {"schedule": "cubic", "every": 2}
ROUNDS = {"schedule": "iterative", "rounds": 2}


@pytest.mark.parametrize(
    ("model", "settings", "together"),
    [
        ("lenet5", {"method": "magnitude", **CUBIC}, False),
        ("lenet5", {"method": "magnitude", "scope": "global"}, True),
        ("lenet5", {"method": "lamp"}, True),
        ("lenet5", {"method": "movement", **CUBIC}, False),
        ("lenet5", {"method": "movement", "scope": "global", **CUBIC}, True),
        ("lenet5", {"method": "rate", **CUBIC}, True),
        ("lenet5", {"method": "rate", "rewind": True, **ROUNDS}, True),
        ("lstm", {"method": "magnitude", **CUBIC}, False),
        ("lstm", {"method": "movement", **CUBIC}, False),
        ("lstm", {"method": "rate", **CUBIC}, True),
        ("gru", {"method": "lamp", "scope": "layer", **ROUNDS}, False),
        ("gru", {"method": "lamp", **CUBIC}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_method_ends_at_exactly_the_sparsity_asked_for(tmp_path, quick, model, settings, together):
    run = make_run(tmp_path, {"model": model} | ({"width": 4} if model == "lenet5" else {"hidden": 10}))
    before = weights(run)
    prune(run, sparsity=0.63, training=TRAINING, **settings)
    assert_exactly(run, 0.63, together)
    assert run.rows[-1]["stage"] == "recovered"
    for name, place in weights_of(run.student).items():
        assert torch.equal(place.value != 0, place.mask)
        assert not torch.equal(place.value[place.mask], before[name][place.mask]), "the survivors are trained"
        assert set(place.parametrization.state_dict()) == {"mask"}, "no scores are left behind"
        assert len(run.layers[name]["thresholds"]) == (1 if together else place.parts)


def test_rounds_prune_the_same_share_of_what_is_left(tmp_path, quick):
    run = make_run(tmp_path)
    prune(run, method="magnitude", sparsity=0.875, schedule="iterative", rounds=3, training=TRAINING)
    assert labels(run) == [
        "pruned 1/3",
        "recovered 1/3",
        "pruned 2/3",
        "recovered 2/3",
        "pruned",
        "recovered",
    ]
    assert [row["sparsity"] for row in run.rows] == pytest.approx(
        [0.5, 0.5, 0.75, 0.75, 0.875, 0.875], abs=0.003
    )
    assert [row.get("epochs") for row in run.rows] == [None, 2] * 3
    assert set(run.histograms) == {"pruned", "recovered"}


def test_rewinding_takes_the_survivors_back_to_the_start_of_the_stage(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    began = {key: tensor.clone() for key, tensor in run.student.state_dict().items()}
    at = {}
    monkeypatch.setattr(
        stage,
        "record",
        lambda run, label, *rest, **more: at.update(
            {label: {key: tensor.clone() for key, tensor in dense_state(run.student).items()}}
        ),
    )
    prune(
        run, method="magnitude", sparsity=0.8, schedule="iterative", rounds=2, rewind=True, training=TRAINING
    )
    for key, tensor in at["pruned"].items():
        assert torch.equal(tensor, torch.where(tensor == 0, tensor, began[key])), key
    last = at["recovered 1/2"]
    chosen = magnitude(last["fc1.weight"]).flatten().argsort()[: int((at["pruned"]["fc1.weight"] == 0).sum())]
    assert not at["pruned"]["fc1.weight"].flatten()[chosen].any(), (
        "what goes is decided by the trained weights"
    )


def test_movement_lets_weights_come_back(tmp_path, quick):
    run = make_run(tmp_path)
    start = weights(run)
    seen = []
    decided = stage.score_masks

    def watch(*arguments):
        masks = decided(*arguments)
        seen.append(torch.cat([mask.flatten() for mask, _ in masks.values()]))
        return masks

    stage.score_masks = watch
    try:
        prune(run, method="movement", sparsity=0.6, schedule="cubic", ramp=0.9, every=1, training=TRAINING)
    finally:
        stage.score_masks = decided
    assert any((later & ~earlier).any() for earlier, later in zip(seen, seen[1:], strict=False))
    kept = {name: place.mask for name, place in weights_of(run.student).items()}
    largest = {
        name: start[name].abs() >= start[name].abs().flatten().kthvalue(int(0.6 * start[name].numel())).values
        for name in kept
    }
    assert any(not torch.equal(kept[name], largest[name]) for name in kept), "it is not magnitude's choice"


def test_with_powerpropagation_the_stage_trains_another_tensor_and_leaves_the_weights_themselves(
    tmp_path, quick
):
    left = {}
    for power in (None, 2):
        run = make_run(tmp_path / str(power))
        prune(
            run,
            method="lamp",
            sparsity=0.6,
            schedule="cubic",
            every=2,
            powerpropagation=power,
            training=TRAINING,
        )
        assert_exactly(run, 0.6, together=True)
        for name, place in weights_of(run.student).items():
            assert place.parametrization.power == 1
            assert torch.equal(torch.where(place.mask, place.parameter, 0.0), place.value), name
        left[power] = weights(run)
    assert not any(torch.equal(left[2][name], weight) for name, weight in left[None].items())


def test_powers_below_two_have_a_gradient_of_zero_at_zero(tmp_path, quick):
    """|t|^(p - 1) alone has an infinite one there: times 0 it would be NaN, and with clip all of the network."""
    run = make_run(tmp_path)
    prune(run, sensitivity=0.5, training=TRAINING)
    clipped = Training(epochs=2, batch_size=20, lr=5e-3, clip=1.0)
    prune(
        run,
        method="magnitude",
        sparsity=0.8,
        schedule="cubic",
        every=2,
        powerpropagation=1.5,
        training=clipped,
    )
    for place in weights_of(run.student).values():
        assert torch.isfinite(place.parameter).all()
        assert (place.value == 0).double().mean().item() == pytest.approx(0.8, abs=0.02)


def test_how_often_a_gradual_threshold_is_set_does_not_move_it(tmp_path, quick):
    """Of what each mask leaves the deviation would rise, and the next threshold with it, up to the last weight."""
    zeros = {}
    for every in (1, 4, 50):
        run = make_run(tmp_path / str(every), {"model": "lenet300", "hidden": [40, 30]})
        before = weights(run)
        prune(
            run,
            sensitivity=1.0,
            schedule="cubic",
            every=every,
            training=Training(epochs=6, batch_size=10, lr=1e-5),
        )
        zeros[every] = {n: (w == 0).double().mean().item() for n, w in weights(run).items()}
        for name, weight in before.items():
            at_once = (weight.abs() <= weight.double().std(correction=0)).double().mean().item()
            assert zeros[every][name] == pytest.approx(at_once, abs=0.12), (every, name)
    assert zeros[1] == pytest.approx(zeros[50], abs=0.12)


def test_rate_gathers_the_survivors_where_positions_are_cheap(tmp_path, quick):
    bits = {}
    for method in ("lamp", "rate"):
        run = make_run(tmp_path / method, {"model": "lenet300", "hidden": [60, 30]})
        prune(
            run,
            method=method,
            sparsity=0.9,
            schedule="cubic",
            every=1,
            training=Training(epochs=3, batch_size=20),
        )
        bits[method] = sum(
            position_bits(p.mask)[p.mask].sum().item() for p in weights_of(run.student).values()
        )
    assert bits["rate"] < 0.99 * bits["lamp"]


@pytest.mark.parametrize("model", ["lenet300", "lstm"])
def test_n_of_every_m(tmp_path, quick, model):
    run = make_run(
        tmp_path, {"model": model} | ({"hidden": [24, 12]} if model == "lenet300" else {"hidden": 16})
    )
    before = weights(run)
    prune(run, method="n_m", pattern="1:4", training=TRAINING)
    assert labels(run) == ["pruned", "recovered"]
    for name, weight in weights(run).items():
        groups = weight.reshape(len(weight), -1, 4)
        assert ((groups != 0).sum(-1) == 1).all(), name
        assert torch.equal(
            (groups != 0).float().argmax(-1), before[name].reshape(groups.shape).abs().argmax(-1)
        )


def test_n_of_every_m_in_a_convolution_counts_input_channels(tmp_path, quick):
    run = make_run(tmp_path, {"model": "lenet5", "width": 6})
    prune(run, method="n_m", pattern="1:2", exclude=["conv1"])
    weight = weights(run)["conv2"]
    assert ((weight.unflatten(1, (-1, 2)) != 0).sum(2) == 1).all()
    assert zeros(run)["conv1"] == 0


def test_what_does_not_split_into_groups_is_named_before_the_first_training(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(
        ValueError, match="layer 'conv1': 1 inputs do not split into groups of 4: name the layer in exclude"
    ):
        prune(run, method="n_m", pattern="2:4")
    (tmp_path / "given.yaml").write_text(
        recipe("{stage: prune, method: n_m, pattern: '2:4', exclude: [last]}")
    )
    with pytest.raises(
        RecipeError, match=r"given.yaml:7: stages\[1\]: layer 'conv1': 1 inputs do not split into groups of 4"
    ):
        runner.run(tmp_path / "given.yaml", folder=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def recipe(*stages):
    lines = "\n".join(f"  - {line}" for line in stages)
    return f"""name: pruned
data: {{dataset: digits, subset: 200, validation: 100}}
student: {{model: lenet5, width: 4, batch_norm: true}}
stages:
  # a short training
  - {{stage: train, training: {{epochs: 2, batch_size: 32, lr: 1e-2}}}}
{lines}
"""


# a stage after a stage


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_a_later_stage_starts_from_the_zeros_of_an_earlier_one(tmp_path, quick, method):
    run = make_run(tmp_path)
    prune(run, method="magnitude", sparsity=0.5)
    dead = {name: weight == 0 for name, weight in weights(run).items()}
    least = []
    decided = stage.score_masks
    stage.score_masks = lambda *a: (least.append(min(a[2].values())), decided(*a))[1]
    try:
        prune(run, method=method, sparsity=0.75, schedule="cubic", every=2, training=TRAINING)
    finally:
        stage.score_masks = decided
    assert min(least) == pytest.approx(0.5, abs=0.01)
    assert_exactly(run, 0.75)
    assert all(not weight[dead[name]].any() for name, weight in weights(run).items())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_later_stage_that_asks_for_fewer_zeros(tmp_path, quick, scope):
    run = make_run(tmp_path)
    prune(run, method="magnitude", sparsity=0.8)
    who = "layer 'conv1' has" if scope == "layer" else "the layers have"
    with pytest.raises(ValueError, match=f"{who} (80|79).* % zeros already: sparsity 0.6 asks for fewer"):
        prune(run, method="magnitude", sparsity=0.6, scope=scope)


def test_fewer_zeros_than_an_earlier_stage_leaves_are_refused_before_anything_is_trained():
    keys = TypeAdapter(Stage)

    def faults(earlier, later):
        common = {"stage": "prune", "method": "magnitude"}
        stages = [keys.validate_python({**common, **one}) for one in (earlier, later)]
        return list(stage.order(stages[1], stages[:1]))

    assert faults({"sparsity": 0.9}, {"sparsity": 0.5}) == [
        "sparsity: got 0.5; an earlier stage leaves 0.9, and zeros stay zero: more is allowed"
    ]
    assert not faults({"sparsity": 0.5}, {"sparsity": 0.9})
    assert not faults({"sparsity": 0.9}, {"sparsity": 0.9, "scope": "global"})
    assert not faults({"sparsity": 0.9, "exclude": ["fc1"]}, {"sparsity": 0.5})
    assert not faults({"sparsity": {"fc1": 0.9}}, {"sparsity": 0.5})


# bad input


def settings(**given):
    return TypeAdapter(Stage).validate_python({"stage": "prune"} | given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sparsity": 1.0, "method": "magnitude"}, "less than 1"),
        ({"sparsity": {"conv1": 1.0}, "method": "magnitude"}, "less than 1"),
        ({"sparsity": 0.0, "method": "magnitude"}, "greater than 0"),
        ({"sensitivity": 0}, "greater than 0"),
        ({"sensitivity": {"conv1": {"conv2": 1}}}, "should be a valid number"),
        ({}, "sensitivity\n  Field required"),
        ({"sensitivity": 1, "sparsity": 0.5}, "sparsity\n  is no key with method 'std'; with channels, lamp"),
        ({"sensitivity": 1, "scope": "global"}, "scope\n  is no key with method 'std'; with channels, lamp"),
        (
            {"sensitivity": 1, "pattern": "2:4"},
            "pattern\n  is no key with method 'std'; with n_m 'pattern' is one",
        ),
        ({"method": "magnitude"}, "sparsity\n  Field required"),
        ({"method": "channels"}, "sparsity\n  Field required"),
        (
            {"method": "lamp", "sparsity": 0.5, "sensitivity": 1},
            "sensitivity\n  is no key with method 'lamp'; with std 'sensitivity' is one",
        ),
        ({"method": "lamp", "sparsity": {"conv1": 0.5}}, "'global' has one sparsity for all layers"),
        (
            {"method": "magnitude", "sparsity": {"conv1": 0.5}, "scope": "global"},
            "'global' has one sparsity for all layers",
        ),
        ({"method": "n_m"}, "pattern\n  Field required"),
        ({"method": "n_m", "pattern": "4:2"}, "pattern: got '4:2'; N of every M .* less than M"),
        ({"method": "n_m", "pattern": "4:4"}, "less than M"),
        ({"method": "n_m", "pattern": {"conv1": "2:4", "conv2": "4:2"}}, "pattern: got '4:2'"),
        ({"method": "n_m", "pattern": "0:4"}, "at least 1"),
        ({"method": "n_m", "pattern": "half"}, "should match pattern"),
        ({"method": "n_m", "pattern": "2:4", "sparsity": 0.5}, "sparsity\n  is no key with method 'n_m'"),
        ({"method": "n_m", "pattern": "2:4", "scope": "layer"}, "scope\n  is no key with method 'n_m'"),
        ({"method": "movement", "sparsity": 0.5}, "'movement' has no schedule 'once'; it has cubic"),
        ({"method": "rate", "sparsity": 0.5}, "'rate' has no schedule 'once'; it has cubic, iterative"),
        (
            {"method": "channels", "sparsity": 0.5, "schedule": "cubic", "training": {"epochs": 1}},
            "'channels' has no schedule",
        ),
        (
            {"method": "lamp", "sparsity": 0.5, "schedule": "cubic"},
            "'cubic' prunes during a training: training is needed",
        ),
        ({"method": "lamp", "sparsity": 0.5, "schedule": "iterative"}, "training is needed"),
        (
            {"method": "lamp", "sparsity": 0.5, "rounds": 3},
            "rounds has no effect with schedule 'once'; 'iterative' has it",
        ),
        ({"method": "lamp", "sparsity": 0.5, "rewind": True}, "rewind has no effect with schedule 'once'"),
        (
            {"method": "lamp", "sparsity": 0.5, "every": 3},
            "every has no effect with schedule 'once'; 'cubic' has it",
        ),
        (
            {"method": "lamp", "sparsity": 0.5, "powerpropagation": 2},
            "powerpropagation has no effect with schedule 'once'; 'cubic' has it",
        ),
        (
            {
                "method": "lamp",
                "sparsity": 0.5,
                "schedule": "cubic",
                "powerpropagation": 1,
                "training": {"epochs": 1},
            },
            "greater than 1",
        ),
        (
            {
                "method": "lamp",
                "sparsity": 0.5,
                "schedule": "iterative",
                "rounds": 1,
                "training": {"epochs": 1},
            },
            "equal to 2",
        ),
        ({"sensitivity": 1, "losses": [{"loss": "cross_entropy"}]}, "losses have no effect without training"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(given, told):
    with pytest.raises(ValidationError, match=told):
        settings(**given)


def test_channels_without_torch_pruning_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValidationError, match=r"needs the package torch-pruning: pip install 'tiny-student\[channels\]'"
    ):
        settings(method="channels", sparsity=0.5)
    with pytest.raises(ValueError, match="needs the package torch-pruning"):
        prune(make_run(tmp_path), method="channels", sparsity=0.5)


def spoil(run, what):
    layer = run.student.fc1
    with torch.no_grad():
        if what == "frozen":
            layer.weight.requires_grad_(False)
        elif what == "nan":
            layer.weight[0, 0] = float("nan")
        else:
            layer.weight.fill_(0.0 if what == "zero" else 0.25)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("frozen", "layer 'fc1' is frozen .*name it in exclude"),
        ("nan", "layer 'fc1' has weights that are not finite"),
        ("zero", "layer 'fc1' has no weights left to prune: all are zero .*exclude"),
    ],
)
@pytest.mark.parametrize(
    "given", [{"sensitivity": 1.0}, {"method": "magnitude", "sparsity": 0.5}], ids=["std", "magnitude"]
)
def test_layers_that_cannot_be_pruned(tmp_path, quick, what, told, given):
    run = make_run(tmp_path)
    spoil(run, what)
    with pytest.raises(ValueError, match=told):
        prune(run, **given)
    run = make_run(tmp_path)
    spoil(run, what)
    before = run.student.fc1.weight.detach().clone()
    if what != "nan":  # a network of such weights cannot be measured
        prune(run, exclude=["fc1"], **given)
        assert torch.equal(run.student.fc1.weight, before)
        assert zeros(run)["fc2"] > 0


def test_a_constant_layer(tmp_path, quick):
    run = make_run(tmp_path)
    spoil(run, "constant")
    with pytest.raises(
        ValueError, match="layer 'fc1': all weights left are 0.25, so their standard deviation parts none"
    ):
        prune(run, sensitivity=1.0)
    prune(run, method="magnitude", sparsity=0.5)
    assert_exactly(run, 0.5)


def test_untrained_weights_do_not_decide_what_a_sensitivity_may_be():
    """Uniform weights reach 1.7 standard deviations, so that any larger sensitivity would prune all of them."""
    student = build({"model": "lenet300"}, (1, 28, 28), 10)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    keys = TypeAdapter(Stage)
    stage.check_student(
        keys.validate_python({"stage": "prune", "sensitivity": 10, "training": {"epochs": 1}}), student
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    # The smallest layer has 1,000 weights: none can be further than 32 deviations from their mean.
    hopeless = keys.validate_python({"stage": "prune", "sensitivity": 40, "training": {"epochs": 1}})
    with pytest.raises(ValueError, match="layer 'fc3': sensitivity 40.0 prunes every weight"):
        stage.check_student(hopeless, student)


def test_a_layer_that_would_lose_all_its_weights(tmp_path, quick):
    run = make_run(tmp_path)
    with torch.no_grad():
        run.student.fc2.weight.mul_(1e-6)
    with pytest.raises(
        ValueError, match="layer 'fc2' would lose all its weights: ask for less, or name it in exclude"
    ):
        prune(run, method="magnitude", sparsity=0.5, scope="global")


def test_exclude(tmp_path, quick):
    run = make_run(tmp_path)
    prune(run, method="magnitude", sparsity=0.5, exclude=["first", "last", "fc1"])
    found = zeros(run)
    assert found["conv1"] == found["fc1"] == found["fc3"] == 0 < found["conv2"]
    with pytest.raises(ValueError, match="no layer 'conv3'.*did you mean"):
        prune(run, method="magnitude", sparsity=0.5, exclude=["conv3"])
    with pytest.raises(ValueError, match="exclude leaves no layer to prune"):
        prune(run, method="magnitude", sparsity=0.5, exclude=["conv1", "conv2", "fc1", "fc2", "fc3"])


def test_pruning_after_sharing(tmp_path, quick):
    run = make_run(tmp_path)
    place = weights_of(run.student)["conv2"]
    set_codebook(place, *cluster(place, 4))
    for given in ({"schedule": "cubic", "training": TRAINING}, {}):
        with pytest.raises(
            ValueError, match="layer 'conv2' shares its weights already: prune before sharing"
        ):
            prune(run, method="magnitude", sparsity=0.5, **given)


def test_movement_in_half_precision_with_a_scaler(tmp_path):
    (tmp_path / "given.yaml").write_text(
        recipe("{stage: prune, method: movement, sparsity: 0.5, schedule: cubic, training: {epochs: 1}}")
        + "precision: fp16\n"
    )
    with pytest.raises(
        RecipeError, match=r"stages\[1\].method: 'movement' adds up gradients, and precision fp16 scales them"
    ):
        runner.run(tmp_path / "given.yaml", folder=tmp_path / "runs")


# channels


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (
            {"model": "lenet5", "width": 6, "batch_norm": True},
            {
                "conv1": [3, 1],
                "norm1": [3],
                "conv2": [8, 3],
                "norm2": [8],
                "fc1": [60, 32],
                "fc2": [42, 60],
                "fc3": [10, 42],
            },
        ),
        ({"model": "lenet300", "hidden": [20, 11]}, {"fc1": [10, 64], "fc2": [5, 10], "fc3": [10, 5]}),
        (
            {"model": "separable", "widths": [4, 6], "strides": [1, 2], "kernel": 3},
            {
                "conv1": [2, 1],
                "norm1": [2],
                "block2.depthwise": [2, 2],
                "block2.pointwise": [3, 2],
                "block2.norm": [3],
                "fc": [10, 3],
            },
        ),
    ],
    ids=lambda value: value.get("model", ""),
)
def test_channels_are_really_gone_and_the_file_still_loads(tmp_path, spec, sizes):
    run = make_run(tmp_path, spec)
    run.student_bytes = 40_000
    prune(run, method="channels", sparsity=0.5, training=TRAINING)
    assert run.student_spec == {**spec, "resized": sizes}
    assert sizes_of(run.student) | sizes == sizes_of(run.student)
    assert labels(run) == ["pruned", "recovered"]
    data = packed.encode(run.student, run.student_spec, packed.facts_of(run.data))
    decoded, header = packed.decode(data)
    assert header["net"] == run.student_spec
    assert digest(decoded.state_dict()) == digest(run.student.state_dict())
    assert run.rows[-1]["ratio_student"] == pytest.approx(40_000 / len(data))
    images = torch.rand(3, *run.data.shape)
    assert torch.equal(decoded(images), run.student.eval()(images))


def test_channels_of_the_least_norm_go(tmp_path, quick):
    run = make_run(tmp_path, {"model": "lenet300", "hidden": [12, 8]})
    with torch.no_grad():
        run.student.fc1.weight[[2, 7, 9]] *= 1e-3
        run.student.fc2.weight[:, [2, 7, 9]] *= 1e-3
    expected = run.student.fc1.weight[[0, 1, 3, 4, 5, 6, 8, 10, 11]].detach()
    prune(run, method="channels", sparsity={"fc1": 0.25, "fc2": 0.5}, exclude=["last"])
    assert torch.equal(run.student.fc1.weight, expected)
    assert run.student.fc2.weight.shape == (4, 9)


def test_the_channels_that_stay_are_a_multiple(tmp_path, quick):
    run = make_run(tmp_path, {"model": "lenet300", "hidden": [36, 20]})
    prune(run, method="channels", sparsity={"fc1": 0.4, "fc2": 0.01}, multiple=8, exclude=["last"])
    # 36 less 14 are 22, to the nearest multiple 24; 20 less none stays 20, no multiple though it is
    assert run.student_spec["resized"] == {"fc1": [24, 64], "fc2": [20, 24]}
    run = make_run(tmp_path / "few", {"model": "lenet300", "hidden": [36, 6]})
    prune(run, method="channels", sparsity=0.4, multiple=8)
    assert run.student_spec["resized"] == {"fc1": [24, 64], "fc2": [6, 24]}  # six are fewer than a multiple


def test_channels_in_one_ranking_and_what_is_kept(tmp_path, quick):
    run = make_run(tmp_path, {"model": "lenet300", "hidden": [30, 20]})
    with torch.no_grad():
        run.student.fc1.weight[:20] *= 1e-3
        run.student.fc1.bias[:20] = 0
        run.student.fc2.weight[:, :20] *= 1e-3
    prune(run, method="channels", sparsity=0.4, scope="global")
    assert sizes_of(run.student)["fc1"][0] + sizes_of(run.student)["fc2"][0] == 30
    assert sizes_of(run.student)["fc1"][0] <= 12
    run = make_run(tmp_path, {"model": "lenet5", "width": 4})
    prune(run, method="channels", sparsity=0.5, exclude=["first", "fc2"])
    assert sizes_of(run.student) == {
        "conv1": [4, 1],
        "conv2": [5, 4],
        "fc1": [40, 20],
        "fc2": [56, 40],
        "fc3": [10, 56],
    }


def test_channels_that_hang_together_go_together(tmp_path, quick):
    run = make_run(tmp_path, {"model": "cifar_resnet", "depth": 8, "channels": [4, 4, 8, 8]})
    prune(run, method="channels", sparsity=0.5)
    sizes = sizes_of(run.student)
    assert sizes["conv1"] == [2, 1] and sizes["layer1.0.conv2"] == [2, 2] and sizes["fc"] == [10, 4]
    run = make_run(tmp_path, {"model": "cifar_resnet", "depth": 8, "channels": [4, 4, 8, 8]})
    uneven = dict.fromkeys(weights_of(run.student), 0.25) | {"conv1": 0.5}
    with pytest.raises(
        ValueError, match="channels of conv1, layer1.0.conv2 hang together, so theirs must be one number"
    ):
        prune(run, method="channels", sparsity=uneven)


def test_channels_keep_the_zeros_of_an_earlier_stage_and_frozen_layers_frozen(tmp_path, quick):
    run = make_run(tmp_path, {"model": "lenet300", "hidden": [24, 12]})
    run.student.fc3.weight.requires_grad_(False)
    prune(run, method="magnitude", sparsity=0.5, exclude=["last"])
    alive = int(torch.count_nonzero(run.student.fc1.weight))
    prune(run, method="channels", sparsity=0.25, exclude=["last"], training=TRAINING)
    assert run.student.fc1.weight.shape == (18, 64)
    assert 0.6 * alive < torch.count_nonzero(run.student.fc1.weight) < alive
    assert weights_of(run.student)["fc1"].mask is not None
    assert not run.student.fc3.weight.requires_grad


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (
            lambda: nn.Sequential(nn.LSTM(4, 4)),
            "knows convolutions, linear layers.*; 0 .LSTM. has weights of another kind",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)),
            "knows dense and depthwise convolutions; '0' has 2 groups",
        ),
        (lambda: tied(), "cannot make layers smaller that share one weight"),
    ],
    ids=["lstm", "grouped", "tied"],
)
def test_channels_of_layers_that_cannot_be_made_smaller(network, told):
    with pytest.raises(ValueError, match=told):
        channels.remove(network(), torch.rand(1, 4), 0.5)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def test_a_removed_classifier_is_noticed():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(
        ValueError, match=r"outputs of the network were removed \(\(4,\) became \(2,\)\): name its classifier"
    ):
        channels.remove(net, torch.rand(1, 4), 0.5)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"fc9": [1, 1]}, "no convolution, linear or normalization layer 'fc9'"),
        ({"fc1": [190, 4]}, r"layer 'fc1': got \[190, 4\]; at most"),
        ({"fc1": [0, 4]}, "at most"),
        ({"fc1": [4]}, "at most"),
        ({"fc1": 4}, "at most"),
        ({"fc1": [4.0, 4]}, "at most"),
        ([1], "is allowed"),
    ],
)
def test_sizes_that_do_not_fit(wanted, told):
    with pytest.raises(ValueError, match=told):
        build({"model": "lenet5", "resized": wanted}, (1, 8, 8), 10)


def test_resizing_every_kind_of_layer():
    net = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv1d(8, 4, 1, bias=False),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )
    net.eval()
    plain = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    resize(net, {"0": [5, 2], "1": [5], "2": [5, 5], "3": [2, 5], "4": [5], "5": [3, 5]})
    assert net[0].weight.shape == (2, 5, 3, 3) and net[2].weight.shape == (5, 1, 3, 3) and net[2].groups == 5
    assert net[:3](torch.rand(1, 2, 4, 4)).shape == (1, 5, 4, 4)
    assert net[5](net[4](torch.rand(2, 5))).shape == (2, 3)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, plain[key][tuple(slice(0, n) for n in tensor.shape)]), (
            "the leading channels stay"
        )


def test_a_run_goes_on_after_channels_were_removed_and_a_fresh_process_decodes_the_file(
    tmp_path, fresh_process, capsys
):
    path = tmp_path / "given.yaml"
    path.write_text(
        recipe(
            "{stage: prune, method: channels, sparsity: 0.5, training: {epochs: 1, batch_size: 32}}",
            "{stage: prune, method: magnitude, sparsity: 0.5}",
            "{stage: fold}",
            "{stage: share, bits: 3}",
            "{stage: pack}",
        )
    )
    with runner.begun(path, 2, folder=tmp_path / "runs") as run:
        left, spec = (
            {key: tensor.clone() for key, tensor in run.student.state_dict().items()},
            run.student_spec,
        )
    with runner.begun(path, 2, folder=tmp_path / "runs") as run:
        assert all(torch.equal(tensor, left[key]) for key, tensor in run.student.state_dict().items())
        assert run.student_spec == spec and spec["resized"]["conv1"] == [2, 1]
    result = runner.run(path, folder=tmp_path / "runs")
    assert capsys.readouterr().out.count("going on after stage 2 of") == 2
    assert labels_of(result) == ["trained", "pruned", "recovered", "pruned", "folded", "clustered", "decoded"]
    dense = sum(
        tensor.numel() * 4
        for tensor in build({"model": "lenet5", "width": 4}, (1, 8, 8), 10).state_dict().values()
    )
    assert result["student_bytes"] > dense, "the student as it was built, with its BatchNorm"
    assert result["rows"][-1]["ratio_student"] == pytest.approx(
        result["student_bytes"] / result["rows"][-1]["file_bytes"]
    )


def labels_of(result):
    return [row["stage"] for row in result["rows"]]


# after a kill, and in two processes


@pytest.mark.parametrize(
    "given",
    [
        {"method": "movement", "schedule": "cubic", "every": 2},
        {"method": "rate", "schedule": "cubic", "every": 2},
        {"method": "lamp", "schedule": "cubic", "every": 2, "powerpropagation": 2},
        {"method": "magnitude", "schedule": "iterative", "rounds": 2, "rewind": True},
    ],
    ids=["movement", "rate", "power", "rewind"],
)
def test_an_interrupted_stage_ends_at_the_same_bits(tmp_path, quick, monkeypatch, given):
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0.0)
    given = given | {"sparsity": 0.7, "training": Training(epochs=4, batch_size=20, ema=0.9)}
    whole = make_run(tmp_path / "whole")
    prune(whole, **given)

    class Killed(Exception):
        pass

    broken = make_run(tmp_path / "broken")
    told, seen = Log.numbers, []

    def numbers(log, *arguments, **values):
        told(log, *arguments, **values)
        seen.extend(key for key in values if key == "validation")
        if len(seen) == (3 if given["schedule"] == "cubic" else 6):  # in the middle of the (second) training
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "numbers", numbers)
        with pytest.raises(Killed):
            prune(broken, **given)
    again = make_run(tmp_path / "broken")
    prune(again, **given)
    assert any("resumed" in line for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines())
    one, other = whole.student.state_dict(), again.student.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


TOGETHER = [
    {"method": "movement", "schedule": "cubic", "every": 2, "sparsity": 0.8},
    {"method": "rate", "schedule": "iterative", "rounds": 2, "sparsity": 0.8},
    {"sensitivity": 1.0},
    {"method": "channels", "sparsity": 0.5},
]


def trained_together(accelerator, kind, rank):
    """Masks and weights of one kind of layer, pruned and trained on other data on each process."""
    model, x = test_compression.make(kind)
    if rank == 1:  # would choose otherwise, were it asked
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
    places = weights_of(model)
    score = {name: magnitude(place.value) for name, place in places.items()}
    parts = {name: place.parts for name, place in places.items()}
    masks = score_masks(score, dict.fromkeys(places), dict.fromkeys(places, 0.7), False, parts)
    for name, place in places.items():
        stage._set_mask(SimpleNamespace(accelerator=accelerator), place, masks[name][0])
    wrapped = accelerator.prepare(model)
    test_compression.train(wrapped, x.roll(rank, 0), "adamw", steps=3)
    told = {}
    for name, place in weights_of(model).items():
        assert int((place.value == 0).sum()) == round(0.7 * place.value.numel()), (kind, name)
        assert torch.equal(place.value != 0, place.mask)
        told[name] = {"mask": place.mask, "value": place.value.detach()}
    return told


def one_of_two(rank, folder):
    """One of two processes: prunes in every way, then every kind of layer, which trains; what it has."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return {
        "methods": every_method(rank, accelerator, folder),
        "kinds": {kind: trained_together(accelerator, kind, rank) for kind in test_compression.LAYERS},
    }


def every_method(rank, accelerator, folder):
    found = []
    for number, given in enumerate(TOGETHER):
        run = make_run(folder / str(number) / str(rank), accelerator=accelerator)
        stage.record = lambda *_, **__: None
        if number == 2 and rank == 1:  # an unequal weight on a process that is not asked
            with torch.no_grad():
                run.student.fc1.weight[0] *= 1.5
        prune(run, training=None if number == 2 else Training(epochs=2, batch_size=20), **given)
        masks = {name: place.mask for name, place in weights_of(run.student).items()}
        found.append((run.student.state_dict(), masks))
    making.close()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What both of two processes have."""
    folder = tmp_path_factory.mktemp("both")
    return in_two(one_of_two, folder, folder)


def test_two_processes_have_the_same_masks_and_weights(both):
    one, other = (found["methods"] for found in both)
    for number, ((state, masks), (other_state, other_masks)) in enumerate(zip(one, other, strict=True)):
        assert all((mask is None) == (number == 3) for mask in masks.values())
        assert all(m is None or torch.equal(m, other_masks[name]) for name, m in masks.items())
        if number != 2:
            assert all(torch.equal(tensor, other_state[key]) for key, tensor in state.items())


def test_every_kind_of_layer_has_the_same_masks_and_weights_on_two_processes(both):
    one, other = (found["kinds"] for found in both)
    assert one.keys() == other.keys() == test_compression.LAYERS.keys()
    for kind, layers in one.items():
        for name, told in layers.items():
            theirs = other[kind][name]
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in told.items()), (kind, name)
