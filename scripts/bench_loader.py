"""Measures images a second of reading photographs for training: by this program, by timm and by torchvision.

Run: python scripts/bench_loader.py [--images 20000] [--sizes 128 224] [--workers 1 2] [--epochs 3] [--others 2]
[--folder DIR] [--many 200000]. The pictures, generated JPEG files of 500 x 375, are made in the folder if they are not there.

All loaders deliver the same: batches of 32, float32 in [0, 1], of random parts of the pictures (35 to 100 % of the area,
ratio 0.75 to 1.33, bicubic, antialiased), half of them mirrored. timm is its `create_loader` as its train.py calls it,
without colour jitter; torchvision is ImageFolder, transforms.v2 and torch's DataLoader with workers that stay.

Each loader runs in a process of its own, several epochs one after another. This program's first epoch starts with an empty
store. `check` are the seconds in which it once opens every picture, to find damaged ones; the others do not. Images a
second are of the clock on the wall and, in brackets, of the processor seconds of all its processes, which other programs
on the machine change less. Memory is what the processes have allocated (their part of it where they share it), without
pages of mapped files, at the end of the first and of the last epoch. Freed memory stays with the process, as in this
program's trainings and for all three alike.

--many measures this program's memory over so many small files, in one epoch, at five places.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

BATCH, NUM_CLASSES = 32, 10
SCALE, RATIO = (0.35, 1.0), (0.75, 1.33)
LARGE, SMALL = (500, 375), (32, 24)
CPU = torch.device("cpu")
Epoch = Callable[[int], Iterator[Tensor]]


def make_pictures(folder: Path, number: int, size: tuple[int, int]) -> None:
    """Makes train/CLASS/NUMBER.jpg, and one test picture a class, unless they are there."""
    if (folder / "done").exists() and (folder / "done").read_text() == str(number):
        return
    with multiprocessing.Pool(2) as pool:
        numbers = [(folder, size, list(range(start, number, 200))) for start in range(200)]
        for _ in pool.imap_unordered(_make_some, numbers):
            pass
    for name in range(NUM_CLASSES):
        path = folder / "test" / f"{name}" / "0.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    (folder / "done").write_text(str(number))


def _make_some(asked: tuple[Path, tuple[int, int], list[int]]) -> None:
    folder, size, numbers = asked
    random = np.random.default_rng(numbers)
    noise = random.normal(0, 10, (size[1] + 64, size[0] + 64, 3)).astype(np.int16)
    for number in numbers:
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            size, Image.Resampling.BILINEAR
        )
        top, left = random.integers(0, 64, 2)
        pixels = np.asarray(coarse) + noise[top : top + size[1], left : left + size[0]]
        path = folder / "train" / f"{number % NUM_CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def ours(folder: Path, size: int, workers: int) -> Epoch:
    from trainer.data.batches import batches, epoch_order, make_data
    from trainer.data.views import Views
    from trainer.recipe import shelves
    from trainer.recipe.keys import DataKeys

    keys = shelves.checker(shelves.find("dataset", "image_folder"), DataKeys)
    augment = {"flip": True, "random_resized_crop": {"scale": SCALE, "ratio": RATIO}}
    settings = {
        "dataset": "image_folder",
        "folder": folder,
        "size": size,
        "validation": 1,
        "augment": augment,
    }
    data = make_data(keys.model_validate(settings | {"workers": workers}), CPU)
    views = Views(data)

    def epoch(number: int) -> Iterator[Tensor]:
        order = epoch_order(len(data.train), BATCH, 0, number, 0, 1)
        for images, _, index in batches(data.train, order, workers, CPU, views.cuts(number)):
            yield views.augmented(images, index, number)

    return epoch


def with_timm(folder: Path, size: int, workers: int) -> Epoch:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(folder / "train"), is_training=True),
        input_size=(3, size, size),
        batch_size=BATCH,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_workers=workers,
        pin_memory=False,
        device=CPU,
        persistent_workers=True,
    )
    return lambda _: (images for images, _ in loader)


def with_torchvision(folder: Path, size: int, workers: int) -> Epoch:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(
                size, SCALE, RATIO, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder / "train"), transform),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )
    return lambda _: (images for images, _ in loader)


LOADERS = {"ours": ours, "timm": with_timm, "torchvision": with_torchvision}


def tree() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in tree())


def own_mib() -> float:
    """Returns the allocated memory of this process and its workers."""
    kib = 0
    for process in tree():
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return kib / 2**10


def measure(
    name: str, folder: Path, size: int, workers: int, epochs: int, places: int
) -> dict[str, list[float]]:
    """Measures one loader in this process: seconds of each epoch, its processor seconds and memory."""
    from trainer.training.state import _keep_freed_memory

    torch.set_num_threads(1)
    _keep_freed_memory()
    started, busy = time.perf_counter(), processor_seconds()
    epoch = LOADERS[name](folder, size, workers)
    found: dict[str, list[float]] = {"check": [time.perf_counter() - started, processor_seconds() - busy]}
    found |= {"images": [], "seconds": [], "processor": [], "mib": []}
    for number in range(epochs):
        started, busy, count = time.perf_counter(), processor_seconds(), 0
        for step, images in enumerate(epoch(number), 1):
            count += len(images)
            if places and step % places == 0:
                found["mib"].append(own_mib())
        found["images"].append(count)
        found["seconds"].append(time.perf_counter() - started)
        found["processor"].append(processor_seconds() - busy)
        found["mib"].append(own_mib())
    return found


def in_a_process(*arguments: object) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRAINER_DATA": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", *map(str, arguments)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def speeds(found: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Returns images a second of the clock and of the processor, of the first epoch and the best later one each."""
    return tuple(  # type: ignore[return-value]  # of two
        [each[0], max(each[1:], default=each[0])]
        for each in (
            [n / s for n, s in zip(found["images"], found[kind], strict=True)]
            for kind in ("seconds", "processor")
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="of this program")
    parser.add_argument(
        "--others", type=int, default=2, help="epochs of the others; of one it is also the later"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench_loader")
    parser.add_argument("--many", type=int, help="measure memory over so many small files")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, folder, *numbers = options.one
        print(json.dumps(measure(name, Path(folder), *map(int, numbers))))
        return
    if options.many:
        folder = options.folder / f"small{options.many}"
        make_pictures(folder, options.many, SMALL)
        found = in_a_process("ours", folder, 24, 2, 1, options.many // BATCH // 5)
        print(
            f"{options.many:,} files, checked in {found['check'][0]:.0f} s; MiB at five places and at the end:"
        )
        print("  ".join(f"{mib:.0f}" for mib in found["mib"]))
        return
    folder = options.folder / f"large{options.images}"
    make_pictures(folder, options.images, LARGE)
    rows = []
    for size in options.sizes:
        for workers in options.workers:
            of_timm = None
            for name in ("timm", "torchvision", "ours"):
                epochs = options.epochs if name == "ours" else options.others
                found = in_a_process(name, folder, size, workers, epochs, 0)
                (first, later), (first_busy, later_busy) = speeds(found)
                of_timm = of_timm or (first, first_busy, later, later_busy)
                rows.append(
                    {
                        "pixels": size,
                        "workers": workers,
                        "loader": name,
                        "check s": f"{found['check'][0]:.0f} ({found['check'][1]:.0f})",
                        "first epoch": f"{first:,.0f} ({first_busy:,.0f})",
                        "later": f"{later:,.0f} ({later_busy:,.0f})",
                        "first / timm's": f"{first / of_timm[0]:.2f} ({first_busy / of_timm[1]:.2f})",
                        "later / timm's": f"{later / of_timm[2]:.1f} ({later_busy / of_timm[3]:.1f})",
                        "MiB": f"{found['mib'][0]:,.0f} to {found['mib'][-1]:,.0f}",
                    }
                )
                print(
                    tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), "\n", flush=True
                )


if __name__ == "__main__":
    main()
