"""Measures images a second of distillation: with the teacher online, with its answers cached, and by torchdistill.

Run: python scripts/bench_distill.py [--threads 1 2] [--images 20000] [--rounds 5] [--clock cpu]. torchdistill
1.1.5 comes with the `bench` extra; without it the other loops are measured. On a busy machine use one thread and
`--clock cpu`, which counts the processor seconds of this program.

MNIST, a LeNet-300-100 taught by a LeNet-5 of width 20 with BatchNorm, batches of 128, Adam, 0.1 cross-entropy +
0.9 KL at temperature 4; once with the images as they are and once shifted and turned, there also with the augmented
images themselves kept (`keep_views`). torchdistill gets torchvision's MNIST and transforms and its own data loader and
training box, as in its examples, and the same weights in networks of plain torch.nn layers; other rows give it our
own network, whose max pooling is faster without gradients, and images that need no decoding. The script first checks
that the losses are the same.

The loops take turns, so that a busy machine slows all of them; medians are compared. Of our loops the whole call of
`fit` is timed: with its log, its checks, a validation of 100 images and its checkpoint; of torchdistill's the epoch
alone. With two threads torchdistill's loader has a process of its own.

The last table is the fraction of a training's time outside the networks' own forward and backward passes: timm's
resnet18 teaches LeNet-5 on Fashion-MNIST. Weights have no influence on speed, so no teacher is trained here.
"""

import argparse
import contextlib
import gc
import io
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from bench_fit import BATCH, RATE, seconds_of_fit
from pydantic import TypeAdapter
from tabulate import tabulate
from torch import nn
from torch.utils.data import Dataset, RandomSampler, Subset

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.data import fetch
from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.models.timm import timm
from trainer.recipe.keys import DataEntry, TeacherKeys, Term
from trainer.recipe.training import Training

TEMPERATURE, HARD = 4.0, 0.1
VIEWS = 3  # of each image
LONG = 2 * VIEWS  # epochs of the faster loops, so that all take seconds
SHIFT, ROTATE = 2, 8  # largest shift in pixels and rotation in degrees

LABELS = [{"loss": "cross_entropy"}]
TAUGHT = [
    {"loss": "cross_entropy", "weight": HARD},
    {"loss": "kl", "weight": 1 - HARD, "temperature": TEMPERATURE},
]


def now(kind: str) -> float:
    """Returns seconds of the wall clock, or processor seconds of this program and of its ended child processes."""
    if kind == "wall":
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def some_data(dataset: str, images: int, augmented: bool, keep_views: bool = False) -> Data:
    """Returns the first `images` images of a data set, shifted and rotated if augmented."""
    keys = {"dataset": dataset, "subset": images, "validation": 100}
    if augmented:
        keys |= {"views": VIEWS, "keep_views": keep_views, "augment": {"shift": SHIFT, "rotate": ROTATE}}
    return make_data(TypeAdapter(DataEntry).validate_python(keys), torch.device("cpu"))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns a network built from seed 0."""
    torch.manual_seed(0)
    return build()


def small_teacher(data: Data) -> Teacher:
    """Returns a LeNet-5 of width 20 as the teacher."""
    network = seeded(lambda: lenet5(data.shape, 10, width=20, batch_norm=True))
    return Teacher([network], [TeacherKeys(model="lenet5")], data.mean, data.std)


def ours(
    data: Data,
    student: nn.Module,
    teacher: Teacher | None,
    losses: list[dict],
    epochs: int,
    accelerator: Accelerator,
    clock: str,
    cache: Answers | None = None,
) -> float:
    """Returns the seconds of a whole call of `fit`."""
    terms = [TypeAdapter(Term).validate_python(loss) for loss in losses]
    objective = Objective(student, terms, data, teacher, num_epochs=epochs, cache=cache)
    training = Training(epochs=epochs, lr=RATE, batch_size=BATCH)
    with contextlib.redirect_stdout(io.StringIO()):
        return seconds_of_fit(data, objective, training, accelerator, teacher, partial(now, clock))


class AsTensors(Dataset):
    """The same images, decoded and normalised beforehand: the least work for a loader of single samples."""

    def __init__(self, data: Data) -> None:
        images, self.labels, _ = data.train.__getitems__(torch.arange(len(data.train)))
        self.images = (images / 255 - data.mean[0]) / data.std[0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return self.images[position], self.labels[position].item()


def as_files(data: Data, augmented: bool, folder: Path) -> Dataset:
    """Returns torchvision's MNIST with its transforms: the same training images, by position."""
    from torchvision import datasets, transforms

    raw = folder / "MNIST" / "raw"  # where torchvision expects the files
    raw.parent.mkdir(exist_ok=True)
    if not raw.exists():
        raw.symlink_to(fetch.cache_folder() / "mnist")
    moved = transforms.RandomAffine(
        ROTATE, translate=(SHIFT / 28, SHIFT / 28), interpolation=transforms.InterpolationMode.BILINEAR
    )
    steps = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    images = datasets.MNIST(
        str(folder), train=True, transform=transforms.Compose([moved] * augmented + steps)
    )
    return Subset(images, data.train.ids.tolist())


def plain_teacher(network: nn.Module) -> nn.Module:
    """Returns the teacher's layers in a chain of torch.nn's own, in evaluation mode."""
    n, relu, pool = network, nn.ReLU(), nn.MaxPool2d(2)
    maps = [n.conv1, n.norm1, pool, relu, n.conv2, n.norm2, pool, relu]
    return nn.Sequential(*maps, nn.Flatten(), n.fc1, relu, n.fc2, relu, n.fc3).eval()


def plain_student(network: nn.Module) -> nn.Module:
    """Returns the student's layers in a chain of torch.nn's own."""
    return nn.Sequential(nn.Flatten(), network.fc1, nn.ReLU(), network.fc2, nn.ReLU(), network.fc3)


def training_box(train: Dataset, student: nn.Module, teacher: nn.Module, workers: int):
    """Returns torchdistill's training box, configured like its examples."""
    from torchdistill.core.distillation import get_distillation_box

    loss = {"temperature": TEMPERATURE, "alpha": HARD, "reduction": "batchmean"}
    for who in ("student", "teacher"):
        loss |= {f"{who}_module_path": ".", f"{who}_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
    loader = {"batch_size": BATCH, "num_workers": workers}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": loader,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "Adam", "kwargs": {"lr": RATE}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    return get_distillation_box(
        teacher, student, {"train": train}, config, torch.device("cpu"), None, False, 1
    )


def torchdistills(train: Dataset, student: nn.Module, teacher: nn.Module, workers: int, clock: str) -> float:
    """Returns the seconds of an epoch of torchdistill's training box, run as in its image classification example."""
    from torchdistill.misc.log import MetricLogger, SmoothedValue

    box = training_box(train, student, teacher, workers)
    meters = MetricLogger(delimiter="  ")
    meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    meters.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
    started = now(clock)
    box.pre_epoch_process(epoch=0)
    for images, labels, more in meters.log_every(box.train_data_loader, 1000, "Epoch: [0]"):
        since = time.perf_counter()
        box.pre_forward_process()
        loss = box.forward_process(images, labels, more)
        box.post_forward_process(loss=loss)
        meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        meters.meters["img/s"].update(len(images) / (time.perf_counter() - since))
    box.post_epoch_process()
    return now(clock) - started


def check_same_loss(data: Data, teacher: Teacher, files: Dataset) -> None:
    """Raises ValueError unless torchdistill computes the same loss of a batch as `Objective`."""
    student = seeded(lambda: lenet300(data.shape, 10))
    stored, labels, index = data.train.__getitems__(torch.arange(BATCH))
    terms = [TypeAdapter(Term).validate_python(loss) for loss in TAUGHT]
    our_loss = Objective(student, terms, data, teacher)(stored / 255, labels, index)["loss"].item()
    samples = [files[position] for position in range(BATCH)]
    images = torch.stack([image for image, _ in samples])
    targets = torch.tensor([label for _, label in samples])
    box = training_box(files, plain_student(student), plain_teacher(teacher.network), 0)
    other_loss = box.forward_process(images, targets, {}).item()
    if not torch.equal(labels, targets) or abs(our_loss - other_loss) > 1e-5 * abs(our_loss):
        raise ValueError(
            f"the loss of one batch is {our_loss} here and {other_loss} in torchdistill: not the same work"
        )


def compare(
    threads: int, options: argparse.Namespace, accelerator: Accelerator, with_torchdistill: bool
) -> None:
    """Measures all loops, without and with augmentation, and prints their tables."""
    clock, count = options.clock, options.images
    for augmented in (False, True):
        data = some_data("mnist", count, augmented)
        teacher = small_teacher(data)

        def student() -> nn.Module:
            return seeded(lambda: lenet300(data.shape, 10))

        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            numbers = iter(range(10**6))
            warm = Answers(teacher, data, folder / "warm")

            def fitted(cache: Answers | None, losses: list[dict], epochs: int, data: Data = data) -> float:
                used = teacher if losses is TAUGHT else None
                return ours(data, student(), used, losses, epochs, accelerator, clock, cache)

            def cold() -> float:
                started = now(clock)  # making the file is part of it
                cache = Answers(teacher, data, folder / f"cold-{next(numbers)}")
                return now(clock) - started + fitted(cache, TAUGHT, 1)

            loops: dict[str, tuple[int, Callable[[], float]]] = {
                "teacher online": (count, lambda: fitted(None, TAUGHT, 1)),
                "cache cold": (count, cold),
                "cache warm": (count * LONG, lambda: fitted(warm, TAUGHT, LONG)),
                "cross-entropy only": (count * LONG, lambda: fitted(None, LABELS, LONG)),
            }
            if augmented:
                keeping = some_data("mnist", count, augmented, keep_views=True)
                loops["cache warm, views kept"] = (count * LONG, lambda: fitted(warm, TAUGHT, LONG, keeping))
            if with_torchdistill:
                check_same_loss(data, teacher, as_files(data, False, folder))
                files = as_files(data, augmented, folder)
                other_network = small_teacher(data).network  # its own copy: ours is made ready in place
                rows = {
                    "torchdistill": (files, plain_student, plain_teacher(other_network)),
                    "torchdistill, our network": (files, lambda network: network, other_network),
                }
                if not augmented:
                    decoded = (AsTensors(data), lambda network: network, other_network)
                    rows["torchdistill, our network, decoded images"] = decoded
                for name, (images, in_layers, teaching) in rows.items():
                    arguments = images, in_layers(student()), teaching, threads - 1, clock
                    loops[name] = (len(images), lambda arguments=arguments: torchdistills(*arguments))
            seconds: dict[str, list[float]] = {name: [] for name in loops}
            for _, loop in loops.values():
                loop()  # warming up; fills the warm cache
            computed = warm.num_computed
            for _ in range(options.rounds):
                for name, (_, loop) in loops.items():
                    seconds[name].append(loop())
            assert warm.num_computed == computed, "the warm cache was not warm"
        speeds = {name: [loops[name][0] / taken for taken in seconds[name]] for name in loops}
        report(speeds, threads, augmented, options)


def report(
    speeds: dict[str, list[float]], threads: int, augmented: bool, options: argparse.Namespace
) -> None:
    """Prints the medians of all loops, and ratios of loops: of their medians, and the range over the rounds."""
    images = f"shifted and turned, {VIEWS} views" if augmented else "as they are"
    print(f"\nMNIST {images}, {options.images:,} images, {conditions(threads, options)}\n")
    rows = [[name, statistics.median(s), min(s), max(s)] for name, s in speeds.items()]
    print(tabulate(rows, ["loop", "images/s", "least", "most"], tablefmt="github", floatfmt=",.0f"), "\n")
    others = [name for name in speeds if name.startswith("torchdistill")]
    ratios = [("cache warm", "cross-entropy only"), ("cache cold", "teacher online")]
    our_loops = [
        name for name in ("teacher online", "cache warm", "cache warm, views kept") if name in speeds
    ]
    ratios += [(one, other) for other in others for one in our_loops]
    rows = []
    for one, other in ratios:
        each = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        ratio = statistics.median(speeds[one]) / statistics.median(speeds[other])
        rows.append([f"{one} / {other}", ratio, min(each), max(each)])
    heads = ["ratio", "of medians", "least", "most"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".2f"), flush=True)


def conditions(threads: int, options: argparse.Namespace) -> str:
    """Returns the threads, rounds and clock of a table as text."""
    plural = "s" * (threads > 1)
    return f"{threads} thread{plural}, median of {options.rounds} rounds, {options.clock} time"


def timed(function: Callable, spent: list[float], clock: str) -> Callable:
    """Returns a function that also adds the seconds of each call to spent[0]."""

    def call(*args, **kwargs):
        started = now(clock)
        result = function(*args, **kwargs)
        spent[0] += now(clock) - started
        return result

    return call


def outside(threads: int, options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Prints the fraction of the time of `fit` outside the networks' forward and backward passes, in percent."""
    count = options.images // 4
    data = some_data("fashion_mnist", count, augmented=True)
    network = seeded(lambda: timm(data.shape, 10, "resnet18"))
    teacher = Teacher([network], [TeacherKeys(model="timm/resnet18")], data.mean, data.std)
    spent = [0.0]
    network.forward = timed(network.forward, spent, options.clock)

    def percent_outside(cache: Answers | None, epochs: int) -> tuple[float, float]:
        student = seeded(lambda: lenet5(data.shape, 10))
        student.forward = timed(student.forward, spent, options.clock)
        backward, accelerator.backward = (
            accelerator.backward,
            timed(accelerator.backward, spent, options.clock),
        )
        try:
            spent[0] = 0.0
            seconds = ours(data, student, teacher, TAUGHT, epochs, accelerator, options.clock, cache)
        finally:
            accelerator.backward = backward
        return 100 * (1 - spent[0] / seconds), count * epochs / seconds

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        warm = Answers(teacher, data, Path(folder))
        percent_outside(warm, VIEWS)
        for name, cache, epochs in [("teacher online", None, 1), ("cache warm", warm, LONG)]:
            found = [percent_outside(cache, epochs) for _ in range(options.rounds)]
            percents, speeds = zip(*found, strict=True)
            rows.append(
                [name, statistics.median(percents), min(percents), max(percents), statistics.median(speeds)]
            )
    print(
        f"\nFashion-MNIST, resnet18 to LeNet-5, shifted and turned, {count:,} images, {conditions(threads, options)}\n"
    )
    heads = ["loop", "outside the passes, %", "least", "most", "images/s"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=("", ".1f", ".1f", ".1f", ",.0f")), flush=True)


def main() -> None:
    """Measures and prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", choices=["compare", "outside"], help="one of the two parts")
    options = parser.parse_args()
    try:
        import torchdistill
    except ImportError as error:
        print(
            f"torchdistill is left out, since it cannot be imported ({error}): pip install torchdistill==1.1.5"
        )
        with_torchdistill = False
    else:
        print(f"torchdistill from {Path(torchdistill.__file__).parent.name}, torch {torch.__version__}")
        with_torchdistill = True
    accelerator = Accelerator(cpu=True)
    # Accelerate collects garbage at the end of a training. Over all imported objects that takes a fifth of a second,
    # which is negligible for real trainings but not for these, of a few seconds.
    gc.freeze()
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.only != "outside":
            compare(threads, options, accelerator, with_torchdistill)
        if options.only != "compare":
            outside(threads, options, accelerator)


if __name__ == "__main__":
    main()
