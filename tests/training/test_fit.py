"""The loop: schedules, optimizers, accumulation, averages, what is kept, and going on after a kill bit for bit."""

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import TypeAdapter
from torch import nn

from tests import making
from trainer.compression.codebooks import cluster, set_codebook
from trainer.compression.weights import weights_of
from trainer.distillation import onednn
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.recipe import shelves
from trainer.recipe.keys import CacheKeys, TeacherKeys, Term, TermKeys
from trainer.recipe.training import Training
from trainer.runs import runner
from trainer.storage import checkpoint
from trainer.training import fit as fitting
from trainer.training.fit import fit
from trainer.training.optimizer import Averaged, cpp_compiler, freeze_unused, make_optimizer
from trainer.training.progress import Window
from trainer.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]


class Tiny(nn.Module):
    def __init__(self, batch_norm=False):
        super().__init__()
        self.fc1 = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x.flatten(1)))))


class Alone(nn.Module):
    """Stands for an objective that has nothing to learn beside its student."""

    def __init__(self, student):
        super().__init__()
        self.student = student


def make_run(folder, student=None, **more):
    return making.make_run(folder, student=student or Tiny, **{"subset": 60, "validation": 40} | more)


def train(run, before_step=None, terms=None, **training):
    terms = terms or [TermKeys(loss="cross_entropy")]
    settings = Training(**({"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.1} | training))
    device = run.accelerator.device
    objective = Objective(
        run.student,
        terms,
        run.data,
        run.teacher,
        num_epochs=settings.epochs,
        device=device,
        cache=run.cache,
    )
    return fit(run, objective, settings, before_step)


def weights(run):
    return {name: tensor.clone() for name, tensor in run.student.state_dict().items()}


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


# schedules


def rates(epochs=4, steps=10, **settings):
    training = Training(epochs=epochs, lr=2.0, **settings)
    return [learning_rate(training, step, steps) for step in range(epochs * steps)]


def test_constant_rate_with_and_without_warmup():
    assert set(rates()) == {2.0}
    warm = rates(warmup=1)
    assert warm[:10] == pytest.approx([2 * (i + 1) / 11 for i in range(10)])
    assert set(warm[10:]) == {2.0}
    assert rates(warmup=0.5)[:6] == pytest.approx([2 / 6, 4 / 6, 1, 8 / 6, 10 / 6, 2])


def test_cosine_rate_falls_from_the_end_of_the_warmup_to_zero():
    plain = rates(schedule="cosine")
    assert (
        plain[0] == 2
        and plain[20] == pytest.approx(1)
        and plain[10] == pytest.approx(1 + math.cos(math.pi / 4))
    )
    assert 0 < plain[-1] < 0.01 and plain == sorted(plain, reverse=True)
    warm = rates(schedule="cosine", warmup=2)
    assert warm[19] < warm[20] == 2 and warm[30] == pytest.approx(1)


def test_step_rate_falls_at_its_milestones():
    assert rates(schedule="step", milestones=[1, 3], gamma=0.5) == [2.0] * 10 + [1.0] * 20 + [0.5] * 10
    assert rates(schedule="step", milestones=[2])[20] == pytest.approx(0.2)


def test_one_cycle_rises_for_three_tenths_and_falls_to_a_ten_thousandth():
    cycle = rates(schedule="one_cycle")
    assert (
        cycle[0] == pytest.approx(2 / 25)
        and cycle[12] == 2 == max(cycle)
        and cycle[-1] == pytest.approx(2e-4)
    )
    assert cycle[6] == pytest.approx((2 + 2 / 25) / 2)  # half way up the cosine
    assert cycle[:13] == sorted(cycle[:13]) and cycle[12:] == sorted(cycle[12:], reverse=True)
    assert all(
        math.isfinite(rate) and rate > 0 for n in (1, 2, 3) for rate in rates(1, n, schedule="one_cycle")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"nesterov": True},
        {"optimizer": "sgd", "nesterov": True},
        {"gamma": 0.1},
        {"milestones": [1]},
        {"schedule": "step"},
        {"schedule": "one_cycle", "warmup": 1},
        {"warmup": 3},
        {"epochs": 0},
        {"lr": 0},
        {"ema": 1.0},
        {"decay_all": True},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValueError):
        Training(**({"epochs": 3} | settings))


def test_the_rate_of_each_step_reaches_the_optimizer(tmp_path):
    seen = []
    real = torch.optim.SGD.step

    class Watched(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Watched)
        train(make_run(tmp_path), schedule="cosine")
    training = Training(epochs=2, lr=0.1, schedule="cosine")
    assert seen == [learning_rate(training, step, 3) for step in range(6)]


def test_with_layer_decay_each_layer_gets_its_own_rate(tmp_path):
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Watched)
        train(make_run(tmp_path), schedule="cosine", layer_decay=0.5)
    training = Training(epochs=2, lr=0.1, schedule="cosine")
    rates = [learning_rate(training, step, 3) for step in range(6)]
    assert seen == [[rate / 2, rate] for rate in rates]


# optimizers


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.5, "nesterov": True}),
    ],
)
def test_centroids_take_no_weight_decay_and_frozen_parameters_are_left_out(name, kind, settings):
    model = Tiny()
    place = weights_of(model)["fc1"]
    set_codebook(place, *cluster(place, 4))
    model.fc2.bias.requires_grad_(False)
    training = Training(epochs=1, optimizer=name, weight_decay=0.1, decay_all=True, **settings)
    optimizer = make_optimizer(Alone(model), training)
    assert type(optimizer) is kind
    plain, free = optimizer.param_groups
    assert (plain["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in free["params"]] == [(4,)]
    assert {p.shape for p in plain["params"]} == {(12,), (10, 12)}
    if name == "sgd":
        assert plain["momentum"] == free["momentum"] == 0.5 and plain["nesterov"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="all parameters are frozen"):
        make_optimizer(Alone(Tiny().requires_grad_(False)), Training(epochs=1))


def test_weight_decay_spares_the_centroids_in_training(tmp_path):
    run = make_run(tmp_path)
    place = weights_of(run.student)["fc1"]
    set_codebook(place, *cluster(place, 4))
    run.student.fc1.bias.requires_grad_(False)
    nn.init.zeros_(run.student.fc2.weight)  # then no gradient reaches fc1, and decay alone would move it
    run.student.fc2.weight.requires_grad_(False)
    before = weights(run)
    train(run, weight_decay=0.5, decay_all=True)
    after = weights(run)
    assert torch.equal(
        before["fc1.parametrizations.weight.original"], after["fc1.parametrizations.weight.original"]
    )
    assert not torch.equal(before["fc2.bias"], after["fc2.bias"])


# what a step is


@pytest.mark.parametrize(
    "subset", [64, 60, 56, 50, 4]
)  # even; short last batch; lone last batch; both; less than one group
def test_accumulated_batches_are_one_larger_batch(tmp_path, subset):
    large = make_run(tmp_path / "a", subset=subset)
    numbers = train(large, batch_size=16, epochs=3)
    small = make_run(tmp_path / "b", subset=subset)
    assert (
        train(small, batch_size=8, accumulate=2, epochs=3)["steps"]
        == numbers["steps"]
        == 3 * math.ceil(subset / 16)
    )
    assert_same(weights(large), weights(small), 1e-6)


def test_clipping_bounds_the_norm_of_the_gradient(tmp_path):
    def moved(folder, **settings):
        run = make_run(folder)
        before = weights(run)
        train(run, epochs=1, batch_size=60, lr=1.0, **settings)
        return torch.cat([(after - before[name]).flatten() for name, after in weights(run).items()])

    free, clipped, loose = (
        moved(tmp_path / "a"),
        moved(tmp_path / "b", clip=0.01),
        moved(tmp_path / "c", clip=1e3),
    )
    assert free.norm() > 0.1 and clipped.norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(free, loose)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_before_step_is_called_before_every_step(tmp_path, accumulate):
    run = make_run(tmp_path)
    calls, states = [], []

    def before_step(step, num_steps):
        calls.append((step, num_steps))
        states.append(weights(run)["fc1.weight"])

    numbers = train(run, before_step, epochs=3, batch_size=8, accumulate=accumulate)
    per_epoch = 8 // accumulate
    assert calls == [(step, 3 * per_epoch) for step in range(3 * per_epoch)]
    assert numbers["steps"] == len(calls) and numbers["epochs"] == 3
    assert all(
        not torch.equal(a, b) for a, b in zip(states, [*states[1:], weights(run)["fc1.weight"]], strict=True)
    )


def test_numbers_and_log(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "LOG_STEPS", 2)
    run = make_run(tmp_path)
    numbers = train(run, epochs=2)
    assert numbers["images_per_second"] == pytest.approx(120 / numbers["train_seconds"])
    assert set(numbers) == {"epochs", "steps", "train_seconds", "images_per_second"}
    told = lines(tmp_path)
    losses = [line for line in told if "cross_entropy" in line]
    assert [line["step"] for line in losses] == [2, 3, 4, 6]  # an epoch ends after 3
    assert all(
        line["loss"] == line["cross_entropy"] and line["lr"] == 0.1 and line["stage"] == "train"
        for line in losses
    )
    epochs = [line for line in told if "epoch" in line]
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 3), (2, 6)]
    assert all(0 <= line["validation"] <= 100 and line["images_per_second"] > 0 for line in epochs)


def test_two_frames_of_the_loop_lie_between_a_stage_and_the_objective(tmp_path, monkeypatch):
    """Whoever debugs a loss sees fit, its epoch and the objective: torch's own frames between them aside."""
    found, forward = [], Objective.forward

    def watched(self, *given):
        if self.training:
            ours = [
                f
                for f in traceback.extract_stack()
                if Path(f.filename).is_relative_to(Path(fitting.__file__).parents[1])
            ]
            found.append([(Path(frame.filename).stem, frame.name) for frame in ours])
        return forward(self, *given)

    monkeypatch.setattr(Objective, "forward", watched)
    train(make_run(tmp_path), epochs=1)
    assert found == [[("fit", "fit"), ("fit", "_epoch")]] * 3


def test_a_batch_that_does_not_split_over_the_processes_is_refused(tmp_path):
    run = make_run(tmp_path)

    class Three:
        process_index, num_processes, device = 0, 3, torch.device("cpu")

    run.accelerator = Three()
    with pytest.raises(ValueError, match="batch_size 20 does not split over 3 processes"):
        train(run)


def test_bfloat16_trains_with_losses_in_float32(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = make_run(
            tmp_path,
            lambda: lenet5((1, 8, 8), 10, width=2),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        )
        kinds, inside = [], []
        run.student.fc1.register_forward_hook(lambda _m, _i, out: inside.append(out.dtype))
        real = Window.add
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Window,
                "add",
                lambda self, terms, *at: (
                    kinds.extend(t.dtype for t in terms.values()),
                    real(self, terms, *at),
                )[1],
            )
            train(run, epochs=20, batch_size=10, optimizer="adam", lr=0.01)
        assert set(kinds) == {torch.float32} and torch.bfloat16 in inside
        assert {p.dtype for p in run.student.parameters()} == {torch.float32}
        losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
        assert losses[-1] < 0.5 * losses[0]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_channels_last_trains_the_same_and_leaves_no_trace(tmp_path):
    def net():
        return lenet5((1, 8, 8), 10, width=4, batch_norm=True)

    plain, other = make_run(tmp_path / "a", net), make_run(tmp_path / "b", net)
    seen = []
    other.student.conv2.register_forward_hook(
        lambda module, _i, _o: seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    train(plain)
    train(other, channels_last=True)
    assert_same(weights(plain), weights(other), 1e-4)
    assert seen[1:-1] and all(seen[1:-1])  # the first and last look are not the training's
    assert all(tensor.is_contiguous() for tensor in other.student.state_dict().values())


LESSONS = [{"loss": "cross_entropy"}, {"loss": "kl"}, {"loss": "hint"}]


def taught(folder, kept=False, accelerator=None, **training):
    """A LeNet-5 that a wider one teaches by soft labels and maps, its answers kept or not."""
    run = make_run(
        folder, lambda: lenet5((1, 8, 8), 10, width=3), accelerator=accelerator, augment={"shift": 1}, views=2
    )
    device = run.accelerator.device
    torch.manual_seed(1)
    network = lenet5((1, 8, 8), 10, width=4)
    run.teacher = Teacher([network], [TeacherKeys(model="lenet5")], run.data.mean, run.data.std).to(device)
    if kept:
        layers = ["conv1", "conv2", "fc1", "fc2"]
        run.cache = Answers(
            run.teacher, run.data, Path(folder), CacheKeys(maps=True), layers=layers, device=device
        )
    terms = [TypeAdapter(Term).validate_python(loss) for loss in LESSONS]
    # Not Adam, whose steps are as large for a gradient that is all rounding.
    train(run, terms=terms, **({"epochs": 4, "lr": 0.05} | training))
    return run


@contextlib.contextmanager
def accelerated(**settings):
    """An Accelerator of other settings than the other tests have: there is one state for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(**settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def assert_bfloat16_teaches_alike(folder, full, **settings):
    with accelerated(mixed_precision="bf16", **settings) as accelerator:
        half = taught(folder / "half", accelerator=accelerator)
    losses = [[line["loss"] for line in lines(path) if "loss" in line] for path in (full.folder, half.folder)]
    assert len(losses[0]) == 4 and losses[0] != losses[1]  # it did compute otherwise
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert_same(weights(full), weights(half), 0.01)


def test_bfloat16_teaches_what_float32_does(tmp_path):
    assert_bfloat16_teaches_alike(tmp_path, taught(tmp_path / "full"), cpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:TensorFloat32",
    "ignore:The .grad attribute",
)  # the compiler's
def test_on_a_gpu_it_is_the_same_training_however_it_is_run(tmp_path):
    with accelerated() as accelerator:
        full = taught(tmp_path / "full", accelerator=accelerator)
        for name, kept, settings in [
            ("kept", True, {}),
            ("layout", False, {"channels_last": True}),
            ("compiled", False, {"compile": True}),
        ]:
            other = taught(tmp_path / name, kept, accelerator, **settings)
            assert_same(weights(full), weights(other), 1e-3)
    assert_bfloat16_teaches_alike(tmp_path, full)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(cpp_compiler()) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own compiler's
@pytest.mark.parametrize("kept", [False, True])
def test_compiling_changes_nothing_but_the_speed(tmp_path, kept):
    plain, other = taught(tmp_path / "a", kept), taught(tmp_path / "b", kept, compile=True)
    assert_same(weights(plain), weights(other), 1e-4)
    if kept:
        assert plain.cache.num_computed == other.cache.num_computed == 2 * 60


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="without AVX-512 torch multiplies"
)
def test_fully_connected_layers_learn_by_onednn_and_learn_the_same(tmp_path, monkeypatch):
    def trained(folder):
        run = make_run(folder, lambda: lenet300((1, 8, 8), 10, hidden=(20, 12)))
        train(run)
        assert not any("forward" in vars(module) for module in run.student.modules())
        return weights(run)

    torchs = trained(tmp_path / "torch")  # such small products are left to it
    made, forward = [], onednn._Product.forward
    monkeypatch.setattr(onednn, "_least", lambda: 0)
    monkeypatch.setattr(
        onednn._Product, "forward", staticmethod(lambda ctx, *given: made.append(1) or forward(ctx, *given))
    )
    assert_same(trained(tmp_path / "onednn"), torchs, 1e-4)
    assert made
    assert_same(trained(tmp_path / "again"), trained(tmp_path / "once more"))


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="training.compile needs a C.. compiler on a CPU: there is no 'no-such-compiler'"
    ):
        train(make_run(tmp_path), compile=True)


# what is kept


def test_average_is_the_naive_one(tmp_path):
    def net():
        return Tiny(batch_norm=True)

    run = make_run(tmp_path / "a", net)
    states = []
    train(run, lambda step, _: states.append(weights(run)), epochs=2)
    states.append(weights(run))
    kept = make_run(tmp_path / "b", net)
    train(kept, epochs=2, ema=0.7)
    for name, got in weights(kept).items():
        average = states[0][name].double()
        for step, state in enumerate(states[1:], 1):
            decay = min(0.7, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * state[name]
        expected = average if got.is_floating_point() else states[-1][name]
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_short_training_forgets_the_first_weights(tmp_path):
    """A decay of 0.9998 alone would leave 97 % of them after 150 steps, and the accuracy at chance."""
    run = make_run(tmp_path, Tiny)
    first = weights(run)
    train(run, epochs=8, lr=0.05, ema=0.9998)
    steps = 8 * -(-len(run.data.train) // 32)
    left = 1.0
    for step in range(1, steps + 1):
        left *= min(0.9998, (1 + step) / (10 + step))
    assert left < 1e-5
    moved = weights(run)["fc1.weight"] - first["fc1.weight"]
    assert moved.abs().max() > 0.01


def test_swapping_twice_changes_nothing():
    model = Tiny(batch_norm=True)
    averaged = Averaged(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    averaged.update(1000)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averaged.swap()
    torch.testing.assert_close(model.fc1.weight, before["fc1.weight"] - 0.5)
    averaged.swap()
    assert_same(before, dict(model.state_dict()))


def scripted(monkeypatch, run, values):
    """Validation gives these values; returns the weights that each of them was of."""
    states, left = [], list(values)

    def validate(state):
        if state.averaged is not None:
            state.averaged.swap()
        states.append(weights(run))
        if state.averaged is not None:
            state.averaged.swap()
        return {"validation": left.pop(0)}

    monkeypatch.setattr(fitting, "_validate", validate)
    return states


@pytest.mark.parametrize("ema", [None, 0.8])
@pytest.mark.parametrize(("values", "best"), [([1, 3, 2, 3], 2), ([4, 3, 2, 1], 1), ([1, 2, 3, 4], 4)])
def test_keep_best_keeps_the_first_best(tmp_path, monkeypatch, values, best, ema):
    run = make_run(tmp_path, lambda: Tiny(batch_norm=True))
    states = scripted(monkeypatch, run, values)
    numbers = train(run, epochs=4, keep="best", ema=ema)
    assert (numbers["best_epoch"], numbers["best_validation"]) == (best, max(values))
    assert_same(weights(run), states[best - 1])


@pytest.mark.parametrize("how", [{"class_weights": "balanced"}, {"sampler": "balanced"}, {}])
def test_keep_best_goes_by_balanced_accuracy_where_the_classes_are_balanced(tmp_path, monkeypatch, how):
    """After the first epoch only the frequent class is answered, 92 %; after the second a rare one too, of fewer right."""
    run = make_run(tmp_path)
    labels = torch.where(torch.arange(40) % 13 > 0, 0, 1)
    answers = [torch.zeros_like(labels), torch.where(torch.arange(len(labels)) % 3 > 0, labels, 1)]
    expected = []
    for answer in answers:
        right = (answer == labels).double()
        expected.append(
            (right.mean().item(), (right[labels == 0].mean() + right[labels == 1].mean()).item() / 2)
        )
    assert expected[0][0] > expected[1][0] and expected[0][1] < expected[1][1]
    monkeypatch.setattr(fitting, "predict", lambda *_: answers.pop(0))
    monkeypatch.setattr(fitting, "truth", lambda *_: labels)
    numbers = train(run, epochs=2, keep="best", **how)
    by = 1 if how else 0
    assert numbers["best_epoch"] == (2 if how else 1)
    assert numbers["best_validation"] == pytest.approx(100 * max(pair[by] for pair in expected))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "validation" in line]
    assert [line["validation"] for line in lines] == pytest.approx([100 * pair[0] for pair in expected])
    assert [line.get("balanced") for line in lines] == (
        pytest.approx([100 * pair[1] for pair in expected]) if how else [None, None]
    )


def test_keep_last_keeps_the_last(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    states = scripted(monkeypatch, run, [5, 4, 3])
    numbers = train(run, epochs=3)
    assert "best_epoch" not in numbers
    assert_same(weights(run), states[-1])


def test_patience(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    scripted(monkeypatch, run, [1, 5, 4, 5, 3, 9])
    assert train(run, epochs=6, patience=3)["epochs"] == 5
    run = make_run(tmp_path / "b")
    scripted(monkeypatch, run, [5, 4, 6, 0, 0])
    assert (
        train(run, epochs=10, patience=3, validate_every=2)["epochs"] == 10
    )  # after epochs 2, 4, 6 (the best), 8, 10
    run = make_run(tmp_path / "c")
    scripted(monkeypatch, run, [5, 4, 9])
    assert train(run, epochs=10, patience=1, validate_every=3)["epochs"] == 6  # it is not known before


def test_validation_before_the_last_change_does_not_count(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    states = scripted(monkeypatch, run, [9, 8, 1, 3, 2])

    def before_step(step, num_steps):
        return step < 6  # two epochs of 3 steps

    numbers = train(run, before_step, epochs=5, keep="best", patience=2)
    assert (numbers["epochs"], numbers["best_epoch"], numbers["best_validation"]) == (5, 4, 3)
    assert_same(weights(run), states[3])


def test_freeze_unused_freezes_what_the_losses_do_not_reach(tmp_path):
    keys = TeacherKeys(model="lenet5")
    run = make_run(tmp_path, lambda: lenet5((1, 8, 8), 10, width=2, batch_norm=True))
    run.teacher = Teacher([lenet5((1, 8, 8), 10, width=4)], [keys], run.data.mean, run.data.std)
    objective = Objective(run.student, [TermKeys(loss="hint", at=["conv1"])], run.data, run.teacher)
    images, labels, index = run.data.train.__getitems__([0, 1])
    before = weights(run)
    objective.train()
    unused = freeze_unused(objective, (images.float() / 255, labels, index))
    names = [name for name, p in run.student.named_parameters() if any(p is u for u in unused)]
    assert {name.split(".")[0] for name in names} == {"conv2", "norm2", "fc1", "fc2", "fc3"}
    assert not any(p.requires_grad for p in unused) and run.student.conv1.weight.requires_grad
    assert objective.training and all(p.grad is None for p in objective.parameters())
    assert_same(before, weights(run))


# a loss that is not finite


class Breaks(Tiny):
    """Gives NaN from its n-th training batch on."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, x):
        self.left -= self.training
        return super().forward(x) * (math.nan if self.left <= 0 and self.training else 1)


@pytest.mark.parametrize(("at", "epoch", "step"), [(1, 1, 1), (3, 1, 3), (5, 2, 5)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path, at, epoch, step):
    run = make_run(tmp_path, lambda: Breaks(at))
    with pytest.raises(
        FloatingPointError, match=f"stage 'train', epoch {epoch}, step {step}: cross_entropy is not finite"
    ):
        train(run)


def test_only_the_broken_terms_are_named(tmp_path):
    run = make_run(tmp_path)

    class Mute(Tiny):
        def forward(self, x):
            return super().forward(x) * math.nan

    run.teacher = Teacher([Mute()], [TeacherKeys(model="x")], run.data.mean, run.data.std)
    terms = [TermKeys(loss="cross_entropy"), shelves.checker(shelves.find("loss", "kl"), TermKeys)(loss="kl")]
    with pytest.raises(FloatingPointError, match="step 1: kl is not finite"):
        train(run, terms=terms)


# going on after a kill


class Killed(BaseException):
    """Not an Exception: nothing on the way out may catch it."""


def kill_after(patch, events):
    """The run dies at the given event: a step, the writing of a checkpoint's file, its rename, a row of the report."""
    left = [events]

    def watched(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    from trainer.storage import files
    from trainer.training import rows as rows_module
    from trainer.training.rows import add_row

    patch.setattr(fitting, "learning_rate", watched(fitting.learning_rate))
    patch.setattr(files, "write_through", watched(files.write_through))
    patch.setattr(checkpoint.os, "rename", watched(checkpoint.os.rename))
    patch.setattr(rows_module, "add_row", watched(add_row))


@pytest.fixture
def often(monkeypatch):
    """Looks and checkpoints as often as can be."""
    monkeypatch.setattr(fitting, "LOG_STEPS", 1)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1.0)


def attempt(folder, events=None, **training):
    """One start of a training with everything random in it; None when it was killed."""
    run = make_run(
        folder,
        lambda: lenet5((1, 8, 8), 10, width=2, batch_norm=True, dropout=0.3),
        stage=2,
        augment={"shift": 1, "rotate": 5},
        mixup=0.3,
    )

    def before_step(step, num_steps):  # thresholds, as pruning leaves them
        run.layers.setdefault("fc1", {})["thresholds"] = [step * 0.5]
        return step < 4

    with pytest.MonkeyPatch.context() as patch:
        if events is not None:
            kill_after(patch, events)
        try:
            numbers = train(run, before_step, **training)
        except Killed:
            return None
    numbers = {k: v for k, v in numbers.items() if "second" not in k}
    return weights(run), numbers, run.layers


SETTINGS = [
    {"optimizer": "adam", "lr": 0.01, "ema": 0.8, "keep": "best", "epochs": 4, "schedule": "one_cycle"},
    {"momentum": 0.9, "accumulate": 2, "clip": 0.5, "batch_size": 8, "epochs": 3, "weight_decay": 1e-3},
    {
        "optimizer": "adamw",
        "channels_last": True,
        "keep": "best",
        "patience": 2,
        "epochs": 6,
        "validate_every": 2,
        "lr": 0.01,
    },
    {"momentum": 0.9, "ema": 0.8, "epochs": 4, "freeze_epochs": 2, "layer_decay": 0.75, "weight_decay": 1e-3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["average", "accumulate", "channels_last", "freeze"])
@pytest.mark.parametrize(
    "every", [pytest.param(3, marks=pytest.mark.slow), 8, pytest.param(13, marks=pytest.mark.slow)]
)
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, often, settings, every):
    expected = attempt(tmp_path / "whole", **settings)
    assert expected is not None
    kills = 0
    # Each attempt lives a little longer than the last, so that all moments are hit and the end is reached.
    while (got := attempt(tmp_path / "killed", every + kills, **settings)) is None:
        kills += 1
        assert kills < 60
    assert kills >= 3
    assert_same(expected[0], got[0])
    assert expected[1:] == got[1:]


def test_kept_views_change_nothing(tmp_path):
    moved = {"augment": {"shift": 1, "rotate": 5}, "views": 2}
    found = []
    for keep in (False, True):
        run = make_run(tmp_path / str(keep), keep_views=keep, **moved)
        train(run, epochs=5)
        found.append(weights(run))
    assert_same(*found)


def newest_first(folder):
    found = [path for path in Path(folder).rglob("*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_or_to_a_fresh_start(
    tmp_path, often, caplog, num_damaged
):
    expected = attempt(tmp_path / "whole", **SETTINGS[0])
    assert attempt(tmp_path / "killed", 60, **SETTINGS[0]) is None
    kept = newest_first(tmp_path / "killed")
    assert len(kept) == 2
    for path in kept[:num_damaged]:
        file = path / "objective.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    got = attempt(tmp_path / "killed", **SETTINGS[0])
    assert caplog.text.count("skipped a damaged checkpoint") == num_damaged
    resumed = [line["step"] for line in lines(tmp_path / "killed") if "resumed" in line]
    assert resumed == ([] if num_damaged == 2 else [int(kept[1].name)])
    assert_same(expected[0], got[0])
    assert expected[1:] == got[1:]


def test_a_finished_training_is_not_trained_again(tmp_path):
    expected = attempt(tmp_path, **SETTINGS[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", None)  # a step would fail
        got = attempt(tmp_path, **SETTINGS[0])
    assert_same(expected[0], got[0])
    assert expected[1:] == got[1:]


def test_what_is_drawn_after_a_training_is_the_same_when_it_was_found_finished(tmp_path):
    drawn = []
    for _ in range(2):
        attempt(tmp_path, **SETTINGS[1])
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_a_training_of_an_older_version_is_not_gone_on_with(tmp_path, often):
    """Its optimizer's state was kept otherwise."""
    assert attempt(tmp_path, 20, **SETTINGS[0]) is None
    (newest, *_) = newest_first(tmp_path)
    tensors, facts = checkpoint.load(newest.parent)
    tensors.pop("optimizer")
    checkpoint.save(newest.parent, tensors, facts | {"optimizer": {"dict": []}, "step": facts["step"] + 1})
    with pytest.raises(
        Mistake, match="an older version of the program was interrupted .* remove that folder"
    ):
        attempt(tmp_path, **SETTINGS[0])


def test_a_training_with_other_groups_of_parameters_is_not_gone_on_with(tmp_path, often):
    """Under the older rule weight decay was on all parameters, which were one group."""
    settings = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.01, "epochs": 4}
    assert attempt(tmp_path, 20, decay_all=True, **settings) is None
    with pytest.raises(Mistake, match="an older version of the program was interrupted"):
        attempt(tmp_path, **settings)
    assert attempt(tmp_path, decay_all=True, **settings) is not None


def test_another_number_of_processes_is_said_and_refused_where_epochs_differ(tmp_path, often, capsys):
    assert attempt(tmp_path, 20, **SETTINGS[0]) is None
    (newest, *_) = newest_first(tmp_path)
    tensors, facts = checkpoint.load(newest.parent)
    assert (facts["processes"], facts["steps_per_epoch"]) == (1, 3)
    states = {"optimizer": tensors.pop("optimizer")}

    def kept(**changed):
        checkpoint.save(newest.parent, tensors, facts | changed, states=states)

    kept(processes=2, steps_per_epoch=2)
    with pytest.raises(Mistake, match="began with 2 processes and 2 steps an epoch; with 1 process .* has 3"):
        attempt(tmp_path, **SETTINGS[0])
    kept(processes=2)
    capsys.readouterr()
    assert attempt(tmp_path, **SETTINGS[0]) is not None
    assert "began with 2 processes and goes on with 1 process" in capsys.readouterr().err


# a whole run, killed

RECIPE = """
name: killed
seed: 5
data: {dataset: digits, subset: 96, validation: 60, views: 2, augment: {shift: 1, rotate: 5}}
teachers:
  - {model: lenet5, width: 3, batch_norm: true, dropout: 0.1}
  - {model: lenet5, width: 2}
student: {model: lenet5, width: 2, dropout: 0.2, batch_norm: true}
stages:
  - {stage: train, who: teacher, training: {epochs: 2, batch_size: 32, lr: 1e-2}}
  - stage: distill
    training: {epochs: 2, batch_size: 32, lr: 1e-2, schedule: one_cycle, ema: 0.8, keep: best}
    losses: &taught
      - {loss: cross_entropy, weight: 0.2}
      - {loss: kl, weight: 0.8}
      - {loss: hint}
  - stage: prune
    method: magnitude
    sparsity: 0.8
    schedule: cubic
    every: 1
    training: {epochs: 3, batch_size: 32, lr: 5e-3, optimizer: sgd, momentum: 0.9, keep: best}
    losses: *taught
  - {stage: prune, sensitivity: 0.5, training: {epochs: 1, batch_size: 32, optimizer: adamw, weight_decay: 1e-2}}
  - {stage: share, bits: 3, training: {epochs: 2, batch_size: 32, lr: 1e-3, ema: 0.5}, losses: *taught}
"""


def result(folder, events=None):
    """One start of the recipe; None when it was killed, else what must be the same in all runs."""
    recipe = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    recipe.write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        if events is not None:
            kill_after(patch, events)
        try:
            report = runner.run(recipe, folder=folder)
        except Killed:
            return None
    return comparable(folder, report)


def comparable(folder, report):
    from trainer.storage import checkpoint

    # Seconds, and how often the teacher was asked, tell what was spent: an interrupted run spends more.
    rows = [
        {k: v for k, v in row.items() if "second" not in k and k != "teacher_images"}
        for row in report["rows"]
    ]
    tensors, _ = checkpoint.load(folder / "killed" / "checkpoints" / "04-share")
    return rows, report["layers"], {f"{a}.{b}": t for a, group in tensors.items() for b, t in group.items()}


def test_a_run_killed_again_and_again_reports_the_same(tmp_path, often):
    rows, layers, tensors = result(tmp_path / "whole")
    assert [row["stage"] for row in rows] == [
        "teacher",
        "distilled",
        "recovered",
        "pruned",
        "recovered",
        "clustered",
        "shared",
    ]
    assert all(layer["thresholds"] for layer in layers)
    assert rows[2]["sparsity"] == pytest.approx(0.8, abs=0.002)
    kills, events = 0, [7, 31, 55, 18, 83, 46, 120, 64, 29, 150]
    while (got := result(tmp_path / "killed", events[kills % len(events)])) is None:
        kills += 1
        assert kills < 40
    assert kills >= 5
    assert got[0] == rows
    assert got[1] == layers
    assert_same(tensors, got[2])


DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tests.training.test_fit as tests
from trainer.runs import runner
from trainer.training import fit
fit.LOG_STEPS, fit.CHECKPOINT_SECONDS = 1, -1.0

def start(folder):
    child = os.fork()  # torch has not been used here yet, so the child may
    if child == 0:
        try:
            sys.stdout = open(os.devnull, "w")
            runner.run(folder / "recipe.yaml", folder=folder)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

top = Path(sys.argv[2])
for name in ("whole", "killed"):
    (top / name).mkdir()
    (top / name / "recipe.yaml").write_text(tests.RECIPE)
started = time.monotonic()
assert os.waitpid(start(top / "whole"), 0)[1] == 0
whole = time.monotonic() - started
random.seed(0)
kills = 0
while True:
    child = start(top / "killed")
    time.sleep(random.uniform(0.2, 0.6) * whole)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    kills += 1
    assert kills < 50
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL and fork")
def test_a_run_killed_by_the_system_reports_the_same(tmp_path):
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 1
    found = []
    for name in ("whole", "killed"):
        report = json.loads((tmp_path / name / "killed" / "report.json").read_text())
        found.append(comparable(tmp_path / name, report))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])
