"""Compares images a second of `fit` and of a bare PyTorch loop: LeNet-300-100, cross-entropy, batches of 128.

Run: python scripts/bench_fit.py [--rounds 5] [--epochs 1]. MNIST if it has been fetched, else random images of its
size. The loops take turns, so that a busy machine slows all of them; medians are compared. The options --precision,
--channels-last and --compile, alone or together, apply to `fit` only and show what they gain, mostly on a GPU with
--network lenet5.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.data import fetch
from trainer.data.images import Data, InMemory, Part
from trainer.datasets.mnist import mnist
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.recipe.keys import Augment, TermKeys
from trainer.recipe.training import Training
from trainer.reporting.log import Log
from trainer.training.fit import fit
from trainer.training.run import Run

BATCH, RATE = 128, 1e-3


def images_and_labels() -> tuple[str, InMemory]:
    """Returns MNIST's training images if they have been fetched, else random ones, and what they are."""
    if (fetch.cache_folder() / "mnist" / "train-images-idx3-ubyte").is_file():
        return "MNIST", mnist().train
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return "random images", InMemory(images, torch.randint(0, 10, (60_000,), generator=generator))


def network(name: str, device: torch.device) -> nn.Module:
    """Returns a network on the device, built from seed 0."""
    torch.manual_seed(0)
    build = {"lenet300": lenet300, "lenet5": partial(lenet5, width=20, batch_norm=True)}[name]
    return build((1, 28, 28), 10).to(device)


def bare(train: InMemory, epochs: int, name: str, device: torch.device, fused: bool | None) -> float:
    """Returns the seconds of a training loop written by hand."""
    model = network(name, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=fused)
    started = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(train), device=device)
        for index in order.split(BATCH):
            images = (train.images[index].float() / 255 - 0.130660) / 0.308108
            loss = nn.functional.cross_entropy(model(images), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    loss.item()
    return time.perf_counter() - started


def seconds_of_fit(
    data: Data,
    objective: Objective,
    training: Training,
    accelerator: Accelerator,
    teacher: Teacher | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the seconds of the whole call of `fit`: with its log, its checks, a validation and its checkpoint."""
    with tempfile.TemporaryDirectory() as folder, Log(Path(folder) / "log.jsonl", accelerator) as log:
        run = Run(
            name="bench",
            folder=Path(folder),
            seed=0,
            accelerator=accelerator,
            data=data,
            student=objective.student,
            student_spec={},
            teacher=teacher,
            log=log,
            stage_name="train",
        )
        started = clock()
        fit(run, objective, training)
        return clock() - started


def fitted(train: InMemory, epochs: int, name: str, accelerator: Accelerator, **settings: bool) -> float:
    """Returns the seconds of `fit` with a validation of 100 images."""
    few = torch.arange(100, device=train.images.device)
    data = Data(
        name="bench",
        train=Part(train, torch.arange(len(train), device=few.device)),
        validation=Part(train, few),
        test=Part(train, few),
        classes=[str(i) for i in range(10)],
        mean=(0.130660,),
        std=(0.308108,),
        shape=(1, 28, 28),
        num_samples=len(train),
        augment=Augment(),
    )
    student = network(name, accelerator.device)
    objective = Objective(student, [TermKeys(loss="cross_entropy")], data, device=accelerator.device)
    return seconds_of_fit(
        data, objective, Training(epochs=epochs, lr=RATE, batch_size=BATCH, **settings), accelerator
    )


def main() -> None:
    """Measures all loops and prints their speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--network", choices=["lenet300", "lenet5"], default="lenet300")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision=options.precision)
    device, kind = accelerator.device, options.network
    settings = {"channels_last": options.channels_last, "compile": options.compile}
    what, train = images_and_labels()
    train = InMemory(train.images.to(accelerator.device), train.labels.to(accelerator.device))
    loops = {
        "bare loop": lambda epochs: bare(train, epochs, kind, device, None),
        "bare loop, fused Adam": lambda epochs: bare(train, epochs, kind, device, True),
        "fit": lambda epochs: fitted(train, epochs, kind, accelerator, **settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(1)  # warming up
    for _ in range(options.rounds):
        for name, loop in loops.items():
            seconds[name].append(loop(options.epochs))
    speed = {name: len(train) * options.epochs / statistics.median(taken) for name, taken in seconds.items()}
    chosen = [f"precision {options.precision}"] + [key for key, on in settings.items() if on]
    print(
        f"{what}, {kind}, {device}, {torch.get_num_threads()} threads, fit with {', '.join(chosen)}, "
        f"medians of {options.rounds} rounds of {options.epochs} epochs"
    )
    for loop, value in speed.items():
        print(f"{loop:22} {value:10,.0f} images/s   fit is {speed['fit'] / value:.2f} of it")


if __name__ == "__main__":
    main()
