"""A GPU walks the paths that a CPU does: losses, criteria, stages, kept answers, what is resumed, half precision, and packed files."""

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.making import make_run
from trainer.cli import main
from trainer.compression import folding
from trainer.compression.codebooks import cluster, open_codebook, open_even_codebook, set_codebook
from trainer.compression.masks import ask, score_masks, set_mask
from trainer.compression.rounding import nearest, round_to
from trainer.compression.weights import weights_of
from trainer.data.images import Data, InMemory, Part, normalize
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.distributed import environment_alone
from trainer.models.cifar_resnet import cifar_resnet
from trainer.models.lenet5 import lenet5
from trainer.packing import network as packed
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, CacheKeys, TeacherKeys, TermKeys
from trainer.recipe.training import Training
from trainer.reporting.log import Log
from trainer.runs import runner
from trainer.runs.evaluate_file import evaluate_file
from trainer.storage import checkpoint
from trainer.storage.weights_file import digest
from trainer.training import fit as fitting
from trainer.training.fit import fit
from trainer.training.optimizer import c_compiler
from trainer.training.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # they are shown: a GPU's libraries have others than a CPU's
]
PLACE = "cuda"
BATCH, BATCHES = 8, 2
DRAW_THERE = {
    "contrastive",
    "masked_generative",
    "vit_features",
}  # numbers that a GPU and a CPU draw differently
AMOUNTS: dict[str, dict[str, Any]] = {"std": {"sensitivity": 0.7}, "n_m": {"pattern": "2:4"}}


@pytest.fixture(autouse=True)
def as_before():
    """Each test has the kernels and the Accelerate of a program that has just begun."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    cudnn.deterministic = True  # as `runs.opening` has it
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def accelerator(precision: str = "no", place: str = PLACE) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    found = Accelerator(cpu=place == "cpu", mixed_precision=precision)
    assert found.device.type == place
    return found


def lesson(
    folder: Path, losses: list[dict[str, Any]], precision: str = "no", place: str = PLACE, *,
    student: Any = None, change: Any = None, before_step: Any = None, cache: CacheKeys | None = None, training: dict[str, Any] = {},
    num_images: int = BATCH * BATCHES, augment: dict[str, Any] = {}, views: int | None = None, labels: Any = None, **data_settings: Any,
) -> Run:  # fmt: skip
    """Trains a LeNet-5 by a wider one on random images, as SGD does, whose steps show how large a gradient is."""
    used = accelerator(precision, place)
    device, shape = used.device, (3, 16, 16)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, *shape), dtype=torch.uint8, generator=draw)
    known = torch.arange(num_images) % 10 if labels is None else labels
    images = InMemory(pixels.to(device), known.to(device))
    ids = torch.arange(num_images, device=device)
    data = Data(
        name="x", train=Part(images, ids), validation=Part(images, ids[:8]), test=Part(images, ids[:8]),
        classes=[str(i) for i in range(10)], mean=(0.5,) * 3, std=(0.25,) * 3, shape=shape, num_samples=num_images,
        augment=Augment(**augment), views=views, **data_settings,
    )  # fmt: skip
    torch.manual_seed(3)
    network = lenet5(shape, 10, width=4)
    teacher = Teacher([network], [TeacherKeys(model="lenet5")], data.mean, data.std).to(device)
    net = (student or (lambda: lenet5(shape, 10, width=3)))().to(device)
    if change is not None:
        change(net)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        name="x", folder=folder, seed=3, accelerator=used, data=data, student=net, student_spec={}, teacher=teacher,
        log=Log(folder / "log.jsonl"), stage_name="distill",
    )  # fmt: skip
    terms = [
        shelves.checker(shelves.find("loss", one["loss"]), TermKeys).model_validate(one) for one in losses
    ]
    if cache is not None:
        run.cache = Answers(
            teacher, data, folder / "views", cache, layers=["conv1", "conv2", "fc1", "fc2"], device=device, precision=precision
        )  # fmt: skip
    settings = Training(**{"epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "lr": 0.01} | training)
    torch.manual_seed(4)
    objective = Objective(net, terms, data, teacher, settings.epochs, device, cache=run.cache)
    try:
        fit(run, objective, settings, before_step)
    finally:
        run.log.close()
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in run.student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# losses


@pytest.mark.parametrize("loss", shelves.names("loss"))
def test_a_loss_teaches_as_on_a_cpu_and_the_same_bits_again(tmp_path, loss):
    torch.backends.cudnn.allow_tf32 = False
    here = weights(lesson(tmp_path / "a", [{"loss": loss}]))
    assert all(torch.isfinite(tensor).all() for tensor in here.values())
    if loss not in DRAW_THERE:
        assert_near(here, weights(lesson(tmp_path / "cpu", [{"loss": loss}], place="cpu")), 2e-3)
    assert same(here, weights(lesson(tmp_path / "b", [{"loss": loss}]))), "a seed gives other bits each time"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", shelves.names("loss"))
def test_a_loss_is_finite_in_half_precision(tmp_path, loss, precision):
    run = lesson(tmp_path, [{"loss": loss}], precision)
    assert all(
        torch.isfinite(tensor).all() and tensor.dtype != torch.float16 for tensor in weights(run).values()
    )


def test_weights_that_are_found_and_schedules(tmp_path):
    losses = [
        {"loss": "cross_entropy"},
        {"loss": "kl", "weight": "auto"},
        {"loss": "hint", "weight": {"ratio": 0.3}, "at": "auto"},
    ]
    for precision in ("no", "bf16", "fp16"):
        run = lesson(tmp_path / precision, losses, precision, training={"epochs": 2})
        told = [json.loads(line) for line in (tmp_path / precision / "log.jsonl").read_text().splitlines()]
        assert any(key.startswith("ratio/kl") for line in told for key in line), told
        assert len(run.learned) >= 2


# criteria and codebooks


@pytest.mark.parametrize(
    "method", [name for name in shelves.names("method") if name not in ("channels", "movement")]
)
def test_a_criterion_decides_as_on_a_cpu(method):
    criterion, keys = shelves.find("method", method), AMOUNTS.get(method, {})
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Linear(64, 32), torch.nn.LSTM(16, 8))
    found = {}
    for place in ("cpu", PLACE):
        for name, layer in weights_of(network.to(place)).items():
            set_mask(layer, layer.value.abs() > 0.01)
            answer = ask(criterion, layer, **keys)
            if keys:
                mask = answer[0]
            else:
                both = ({name: answer}, {name: layer.mask}, {name: 0.6}, False, {name: layer.parts})
                mask = score_masks(*both)[name][0]
            found[place, name] = mask.cpu()
    for name in weights_of(network):
        assert torch.equal(found["cpu", name], found[PLACE, name]), name


@pytest.mark.parametrize("kind", [1, 3, 6, 10, "float16", "float32"])
def test_values_are_rounded_to_the_same_bits(kind):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.exp2(
        torch.arange(10_000) % 20 - 10
    )
    assert torch.equal(round_to(values.to(PLACE), kind).cpu(), round_to(values, kind))
    exponents = torch.arange(-60, 61, dtype=torch.int32)
    powers = torch.ldexp(torch.ones(121, device=PLACE), exponents.to(PLACE)).cpu()
    assert powers.tolist() == [2.0**exponent for exponent in range(-60, 61)]


def change_of(kind: str):
    """What a compression makes of a network before it is trained."""

    def change(network: torch.nn.Module) -> None:
        for layer in weights_of(network).values():
            set_mask(layer, layer.value.abs() > layer.value.abs().mean())
            if kind == "codebooks":
                set_codebook(layer, *cluster(layer, 4))
            if kind == "open codebooks":
                open_codebook(layer, *cluster(layer, 4), code_cost=0.05)
            if kind == "many values":
                open_codebook(layer, *cluster(layer, 300))
            if kind == "even codebooks":
                open_even_codebook(layer, 6, functools.partial(nearest, kind="float16"))

    return change


@pytest.mark.parametrize("kind", ["masks", "codebooks", "open codebooks", "many values", "even codebooks"])
def test_a_compressed_network_learns_as_on_a_cpu_and_the_same_bits_again(tmp_path, kind):
    torch.backends.cudnn.allow_tf32 = False
    losses, change = [{"loss": "cross_entropy"}], change_of(kind)
    here = weights(lesson(tmp_path / "a", losses, change=change))
    assert same(here, weights(lesson(tmp_path / "b", losses, change=change)))
    assert_near(here, weights(lesson(tmp_path / "cpu", losses, place="cpu", change=change)), 2e-3)


# what a step waits for


@pytest.mark.parametrize(
    "kind", ["plain", "shared labels", "masks", "codebooks", "open codebooks", "even codebooks"]
)
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fitting, "weigh_if_due", lambda *_: None)

    def watch(step: int, _: int) -> bool:
        torch.cuda.set_sync_debug_mode("error" if step == 5 else "default")
        return False

    training: dict[str, Any] = {"epochs": 2, "ema": 0.9, "clip": 1.0}
    if kind == "shared labels":
        training |= {"accumulate": 2, "class_weights": "balanced"}
    change = change_of(kind) if "books" in kind or kind == "masks" else None
    try:
        # The second epoch: all answers are kept by then.
        cache = None if kind == "shared labels" else CacheKeys()
        losses = [{"loss": "cross_entropy"}, {"loss": "kl"}]
        lesson(
            tmp_path,
            losses,
            change=change,
            before_step=watch,
            cache=cache,
            num_images=8 * BATCH if kind == "shared labels" else 4 * BATCH,
            training=training,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# kinds of training


@pytest.mark.parametrize("settings", [
    {"training": {"ema": 0.8, "keep": "best", "epochs": 3, "optimizer": "adam"}},
    {"mixup": 0.3, "cutmix": 0.5}, {"training": {"class_weights": "balanced", "accumulate": 2}},
    {"training": {"sampler": "balanced"}}, {"labels": torch.tensor([-1, 1, 2, 3] * 4), "training": {"accumulate": 2}},
    {"training": {"freeze_epochs": 1, "epochs": 2, "layer_decay": 0.7}}, {"training": {"clip": 0.1, "optimizer": "adamw"}},
    {"augment": {"flip": True, "rotate": 5, "erase": 0.5, "hue": 0.1, "blur": 1.0, "random_resized_crop": {}, "trivial_augment": True}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_training_of_each_kind(tmp_path, settings, precision):
    losses = [{"loss": "cross_entropy"}, {"loss": "kl"}]
    runs = [lesson(tmp_path / name, losses, precision, **settings) for name in "ab"]
    found = [weights(run) for run in runs]
    assert all(torch.isfinite(tensor).all() for tensor in found[0].values()) and same(*found)


def test_channels_last_is_the_same_training_for_thin_kernels_too(tmp_path):
    from trainer.models.separable import separable

    torch.backends.cudnn.allow_tf32 = False
    losses = [{"loss": "cross_entropy"}, {"loss": "hint"}]
    both = [
        lesson(
            tmp_path / str(layout),
            losses,
            student=lambda: separable((3, 16, 16), 10),
            training={"channels_last": layout, "optimizer": "adam", "lr": 1e-4, "epochs": 2, "ema": 0.5},
        )  # fmt: skip
        for layout in (False, True)
    ]
    assert_near(*map(weights, both), 1e-3)
    assert all(p.is_contiguous() for p in both[1].student.parameters())


@pytest.mark.skipif(c_compiler() is None, reason="Triton needs a C compiler")
def test_a_masked_network_is_compiled_in_bfloat16_with_the_channels_last_and_kept_answers(tmp_path):
    losses = [{"loss": "cross_entropy"}, {"loss": "kl"}, {"loss": "hint"}]
    more = {"change": change_of("masks"), "cache": CacheKeys(maps=True)}
    plain = lesson(tmp_path / "a", losses, "bf16", training={"epochs": 3}, **more)
    other = lesson(
        tmp_path / "b", losses, "bf16", training={"epochs": 3, "compile": True, "channels_last": True}, **more
    )
    assert other.cache is not None and other.cache.num_computed == BATCH * BATCHES
    assert_near(weights(plain), weights(other), 2e-2)


# kept answers


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("keys", [{}, {"maps": True, "embeddings": True}, {"top": 3}], ids=str)
def test_kept_answers_teach_as_live_ones_and_are_found_again(tmp_path, keys, precision):
    losses = (
        [{"loss": "kl"}, {"loss": "hint"}]
        if keys.get("maps")
        else [{"loss": "hard_label" if "top" in keys else "kl"}]
    )
    more = {"augment": {"shift": 1}, "views": 2, "training": {"epochs": 3}}
    live = lesson(tmp_path / "live", losses, precision, **more)
    kept = lesson(tmp_path / "kept", losses, precision, cache=CacheKeys(**keys), **more)
    assert kept.cache is not None and kept.cache.num_computed == 2 * BATCH * BATCHES
    assert_near(weights(live), weights(kept), 1e-2)
    again = lesson(tmp_path / "kept", losses, precision, cache=CacheKeys(**keys), **more)
    assert again.cache is not None and again.cache.num_computed == 0 and again.cache.check() == 8
    assert same(weights(kept), weights(again))
    on_cpu = Answers(
        Teacher([kept.teacher.network.cpu()], [TeacherKeys(model="lenet5")], kept.data.mean, kept.data.std), kept.data,
        tmp_path / "kept" / "views", CacheKeys(**keys), layers=["conv1", "conv2", "fc1", "fc2"], precision=precision,
    )  # fmt: skip
    assert on_cpu.file.num_written == 2 * BATCH * BATCHES
    # A GPU's convolutions round to TF32: what is kept stays within the tolerance of another device.
    views, pictures = on_cpu._views, kept.data.train.images
    views.data = kept.data = Data(
        **{
            **vars(kept.data),
            "train": Part(InMemory(pictures.images.cpu(), pictures.labels.cpu()), kept.data.train.ids.cpu()),
        }
    )
    assert on_cpu.check() == 8


# whole runs

HEAD = """
name: n
allow_untrained: true
seed: 1
data: {dataset: digits, subset: 160, validation: 60, views: 2, augment: {shift: 1}}
"""
TAUGHT = """
teacher: {model: lenet5, width: 3, batch_norm: true}
student: {model: lenet5, width: 4, batch_norm: true}
stages:
  - {stage: train, who: teacher, training: {epochs: 2, batch_size: 32, lr: 1e-2}}
  - stage: distill
    training: {epochs: 2, batch_size: 32, lr: 1e-2, ema: 0.5, keep: best}
    losses: &taught [{loss: cross_entropy}, {loss: kl, weight: auto}, {loss: hint, at: last}]
"""
ONE = {"epochs": 1, "batch_size": 32}
RUNS = {
    "all": HEAD.replace("views: 2", "views: 2, keep_views: true") + TAUGHT + """
  - {stage: prune, method: channels, sparsity: 0.3, training: {epochs: 1, batch_size: 32}, losses: *taught}
  - {stage: fold}
  - {stage: prune, method: lamp, sparsity: 0.5, schedule: cubic, every: 1, powerpropagation: 2, training: {epochs: 2, batch_size: 32}}
  - {stage: prune, method: rate, sparsity: 0.6, schedule: iterative, rounds: 2, rewind: true, training: {epochs: 1, batch_size: 32}}
  - {stage: share, bits: 3, assign: trained, entropy: 0.05, code_cost: 0.02, weighting: fisher, biases: 6, training: {epochs: 1, batch_size: 32}, losses: *taught}
  - {stage: pack, tidy: true}
""",
    "promoted": HEAD + """
cache: {where: disk, embeddings: true}
student: {model: separable, widths: [8, 8, 8], strides: [2, 1, 1], first_kernel: 3, residual: true}
stages:
  - {stage: train, training: {epochs: 2, batch_size: 32, lr: 1e-2, channels_last: true}}
  - {stage: promote, student: {model: separable, widths: [4, 8, 8], strides: [2, 1, 1], first_kernel: 3}}
  - {stage: distill, training: {epochs: 3, batch_size: 32, lr: 1e-2, channels_last: true}, losses: [{loss: kl}, {loss: contrastive}]}
  - {stage: fold}
  - {stage: prune, sensitivity: 0.3, exclude: [first], training: {epochs: 1, batch_size: 32}}
  - {stage: share, bits: auto, budget_bytes: 900, training: {epochs: 1, batch_size: 32}}
  - {stage: pack}
""",
    "even": HEAD + """
student: {model: lenet300, hidden: [24, 16]}
stages:
  - {stage: train, training: {epochs: 3, batch_size: 32, lr: 1e-2}}
  - {stage: prune, method: movement, sparsity: 0.5, schedule: cubic, every: 1, training: {epochs: 2, batch_size: 32}}
  - {stage: prune, method: n_m, pattern: "2:4", exclude: [last]}
  - {stage: share, values: 14, spacing: even, assign: trained, entropy: 0.05, biases: 6, training: {epochs: 1, batch_size: 32}}
  - {stage: pack}
""",
    "quantized": HEAD + """
student: {model: lenet5, width: 3, batch_norm: true}
stages:
  - {stage: train, training: {epochs: 2, batch_size: 32, lr: 1e-2}}
  - {stage: quantize, training: {epochs: 1, batch_size: 32}}
  - {stage: pack}
  - {stage: export, to: [onnx]}
""",
    "recurrent": HEAD + """
teacher: {model: gru, hidden: 12}
student: {model: lstm, hidden: 12}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 32, lr: 1e-2}}
  - {stage: distill, training: {epochs: 1, batch_size: 32, lr: 1e-2}, losses: [{loss: kl}]}
  - {stage: prune, sensitivity: 0.3, training: {epochs: 1, batch_size: 32}}
  - {stage: share, bits: 3, per: group, groups: 2, assign: trained, entropy: 0.05, exclude: [last], training: {epochs: 1, batch_size: 32}}
  - {stage: pack}
""",
}  # fmt: skip


RUNS["interrupted"] = RUNS["all"].partition("  - {stage: pack")[0]
RUNS["short"] = (
    HEAD
    + """
student: {model: lenet5, width: 3}
stages: [{stage: train, training: {epochs: 1, batch_size: 32}}, {stage: pack}]
"""
)


def written(folder: Path, kind: str, precision: str = "no", more: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(RUNS[kind] + more + f"precision: {precision!r}\n")
    return folder / "r.yaml"


def on(monkeypatch, place: str) -> None:
    """The next run of this process computes there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(int(place == "cpu")))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("kind", "precision"), [
    ("all", "no"), ("all", "fp16"), ("promoted", "no"), ("promoted", "bf16"), ("even", "no"), ("even", "bf16"), ("quantized", "no"),
    ("recurrent", "no"), ("recurrent", "fp16"),
])  # fmt: skip
def test_a_whole_run_and_its_packed_file_on_a_cpu(tmp_path, monkeypatch, kind, precision):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    on(monkeypatch, PLACE)
    recipe = written(tmp_path, kind, precision)
    report = runner.run(recipe, folder=tmp_path)
    rows = [row for row in report["rows"] if row.get("digest")]
    assert rows and all(row["top1"] == row["top1"] for row in report["rows"])
    file = tmp_path / "n" / rows[-1]["file"]
    assert evaluate_file(file, recipe)["top1"] == rows[-1]["top1"]
    on(monkeypatch, "cpu")
    there = evaluate_file(file, recipe)
    assert there["digest"] == rows[-1]["digest"] and abs(there["top1"] - rows[-1]["top1"]) < 2
    tensors, _ = checkpoint.load(sorted((tmp_path / "n" / "checkpoints").glob("*-pack"))[0])
    network, _ = packed.decode(file.read_bytes())
    assert digest(network.state_dict()) == rows[-1]["digest"] and all(
        t.device.type == "cpu" for t in tensors["student"].values()
    )


class Killed(BaseException):
    pass


def killed_at(patch: pytest.MonkeyPatch, stage: int, step: int) -> None:
    """Ends a run after a step of a stage, which is kept."""
    original, looks = fitting._take_step, fitting._save_is_due

    def watched(state: Any) -> None:
        if state.run.stage == stage and state.step == step:
            raise Killed
        original(state)

    patch.setattr(fitting, "LOG_STEPS", 1)
    patch.setattr(fitting, "CHECKPOINT_SECONDS", -1.0)
    patch.setattr(fitting, "_take_step", watched)
    assert looks is fitting._save_is_due


def ended(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(sorted((folder / "n" / "checkpoints").glob("*-share"))[0])
    return tensors["student"]


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, precision):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    on(monkeypatch, PLACE)
    for name in ("whole", "killed"):
        recipe = written(tmp_path / name, "interrupted", precision)
        for stage, step in ((0, 3), (1, 4), (4, 5), (6, 3)) if name == "killed" else ():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                killed_at(patch, stage, step)
                runner.run(recipe, folder=tmp_path / name)
            AcceleratorState._reset_state(reset_partial_state=True)
        runner.run(recipe, folder=tmp_path / name)
    assert same(ended(tmp_path / "whole"), ended(tmp_path / "killed"))


@pytest.mark.parametrize(
    ("places", "precision"), [((PLACE, "cpu"), "no"), (("cpu", PLACE), "fp16")], ids=["to a CPU", "to a GPU"]
)
def test_a_run_goes_on_on_another_device_and_says_so(tmp_path, monkeypatch, capsys, places, precision):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    recipe = written(tmp_path, "interrupted", precision)
    on(monkeypatch, places[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 1, 4)
        runner.run(recipe, folder=tmp_path)
    on(monkeypatch, places[1])
    report = runner.run(recipe, folder=tmp_path)
    assert f"began on 1 x {places[0]} and goes on on 1 x {places[1]}" in capsys.readouterr().err
    assert report["rows"][-1]["top1"] == report["rows"][-1]["top1"]


@pytest.mark.parametrize("setting", ["tf32: true\n", "cudnn_benchmark: true\n"])
def test_a_fresh_process_measures_a_packed_file_as_the_run_did(tmp_path, monkeypatch, fresh_process, setting):
    on(monkeypatch, PLACE)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    runner.run(written(tmp_path, "short", more=setting), folder=tmp_path)


def test_commands_on_a_gpu(tmp_path, monkeypatch, capsys):
    on(monkeypatch, PLACE)
    recipe = str(written(tmp_path, "even"))
    monkeypatch.chdir(tmp_path)
    for line in (
        f"check {recipe} --build --data",
        f"run {recipe} --dry-run",
        f"run {recipe}",
        f"scan {recipe}",
        f"show {recipe} --output shown.png",
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        status = main(line.split())
        said = capsys.readouterr()
        assert status == 0, (line, said.err)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["evaluate", "runs/n/student.tiny", recipe, "--json"]) == 0


def test_norms_of_a_deep_network_are_folded_although_convolutions_round(tmp_path):
    torch.manual_seed(0)
    network = cifar_resnet((3, 32, 32), 10, depth=56).to(PLACE).eval()
    folding.refuse_unfoldable(network, torch.randn(2, 3, 32, 32, device=PLACE))
    run = make_run(
        tmp_path, {"model": "lenet5", "width": 4, "batch_norm": True}, accelerator=accelerator(), subset=60
    )
    images = normalize(torch.rand(4, 1, 8, 8, device=PLACE), run.data.mean, run.data.std)
    student = run.student.to(PLACE).eval()
    before = student(images)
    folded, _ = folding.fold(student, run.student_spec)
    torch.testing.assert_close(folded(images), before, rtol=1e-2, atol=1e-2)


def test_two_processes_on_one_gpu_are_told_so(tmp_path):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "trainer",
        "run",
    ]
    done = subprocess.run(
        [*command, written(tmp_path, "even"), "--folder", tmp_path], env=environment_alone(),
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode and done.stderr.count("2 processes share one GPU") == 1, done.stderr[-3000:]


def test_nothing_of_these_tests_warns_a_user_at_each_step(tmp_path):
    """A recurrent layer whose weights are computed anew at each step is one that cuDNN warns of."""
    from trainer.models.lstm import lstm

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lesson(
            tmp_path,
            [{"loss": "cross_entropy"}],
            student=lambda: lstm((3, 16, 16), 10, hidden=8),
            change=change_of("masks"),
        )
    assert not [str(one.message) for one in caught if "contiguous chunk" in str(one.message)]
