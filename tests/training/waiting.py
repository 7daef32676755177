"""Counts what a step of a training waits for on the stand-in device: a program of its own, since torch then has that device."""

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.standin import Watched, install
from trainer.compression.codebooks import cluster, open_codebook, open_even_codebook, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.rounding import nearest
from trainer.compression.weights import weights_of
from trainer.data.images import Data, InMemory, Part
from trainer.data.views import KeptViews
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, TeacherKeys, TermKeys
from trainer.recipe.training import Training
from trainer.reporting.log import Log
from trainer.training import fit as fitting
from trainer.training.fit import fit
from trainer.training.run import Run

BATCHES = 3  # of an epoch

MOVED = {
    "flip": True,
    "shift": 1,
    "rotate": 5,
    "erase": 0.5,
    "contrast": 0.2,
    "brightness": 0.1,
    "elastic": 1,
}
# {case: settings of `waits`}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss": name} for name in shelves.names("loss")},
    "from disk": {"disk": True},
    "grey": {"channels": 1},
    "augmented": {"augment": MOVED},
    "mixed": {"mixup": 0.2, "cutmix": 1.0},
    "several teachers": {"teachers": 2},
    "kept answers": {"cached": True, "epochs": 2},
    "kept views": {"epochs": 2, "views": 1, "keeps_views": True, "augment": {"shift": 1}},
    "averaged, clipped": {"training": {"ema": 0.9, "clip": 1.0}},
    "accumulated": {"training": {"accumulate": 2}, "num_images": 48},
    "accumulated, weighed": {
        "loss": "cross_entropy",
        "training": {"accumulate": 2, "class_weights": "balanced"},
        "num_images": 48,
    },
    "masks": {"compressed": "masks"},
    "codebooks": {"compressed": "codebooks"},
    "open codebooks": {"compressed": "open codebooks"},
    "even codebooks": {"compressed": "even"},
}


class OnDisk:
    """Images that a loader reads."""

    def __init__(self, images: InMemory) -> None:
        self.images, self.labels = images, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        return self.images.__getitems__(positions)


def waits(
    watched: Watched, device: torch.device, folder: Path, *, loss: str = "kl", epochs: int = 1, num_images: int = 8 * BATCHES, disk: bool = False, channels: int = 3,
    teachers: int = 1, cached: bool = False, views: int | None = None, keeps_views: bool = False,
    augment: dict[str, Any] = {}, compressed: str = "", training: dict[str, Any] = {},
    **data_settings: Any,
) -> dict[str, int]:  # fmt: skip
    """Returns {what is waited for: how often} of one step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    assert accelerator.device == device
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, channels, 16, 16), dtype=torch.uint8, generator=draw)
    images: Any = InMemory(pixels, torch.arange(num_images) % 10)
    images = OnDisk(images) if disk else InMemory(images.images.to(device), images.labels.to(device))
    ids = torch.arange(num_images, device=None if disk else device)
    shape = (channels, 16, 16)
    data = Data(
        name="x", train=Part(images, ids), validation=Part(images, ids[:8]), test=Part(images, ids[:8]),
        classes=[str(i) for i in range(10)], mean=(0.5,) * channels, std=(0.25,) * channels, shape=shape, num_samples=num_images,
        augment=Augment(**augment), views=views, **data_settings,
    )  # fmt: skip
    if keeps_views:
        data.kept = KeptViews(1, num_images, ids, shape, device)
    teacher = Teacher(
        [lenet5(shape, 10, width=4) for _ in range(teachers)],
        [TeacherKeys(model="lenet5")] * teachers,
        data.mean,
        data.std,
    ).to(device)
    student = lenet5(shape, 10, width=3)
    for layer in weights_of(student).values():
        if compressed:
            set_mask(layer, layer.value.abs() > layer.value.abs().mean())
        if "codebooks" in compressed:
            codes, centroids = cluster(layer, 4)[:2]
            (open_codebook if "open" in compressed else set_codebook)(
                layer, codes.to(device), centroids.to(device)
            )
        if compressed == "even":
            open_even_codebook(layer, 6, partial(nearest, kind="float16"))
    student.to(device)  # now: a wrapper cannot take another shape, as registration makes a parameter do
    run = Run(
        name="x", folder=folder, seed=3, accelerator=accelerator, data=data, student=student, student_spec={},
        teacher=teacher, log=Log(folder / "log.jsonl"), stage_name="train",
    )  # fmt: skip
    cache = Answers(teacher, data, folder / "views", device=device) if cached else None
    term = shelves.checker(shelves.find("loss", loss), TermKeys)(loss=loss)
    objective = Objective(student, [term], data, teacher, device=device, cache=cache)

    # Terms are weighed at most every hundred steps, which reads their norms back and needs a device with a generator.
    fitting.weigh_if_due = lambda *_: None  # type: ignore[assignment]

    def before_step(step: int, _: int) -> bool:
        watched.counting = step == (epochs - 1) * BATCHES + 1  # the second step of the last epoch
        steps.append(watched.counting)
        return False

    steps: list[bool] = []
    watched.counts.clear()
    watched.counting = False
    fit(run, objective, Training(epochs=epochs, batch_size=8, **training), before_step)
    run.log.close()
    assert steps.count(True) == 1 and not steps[-1], steps
    return dict(watched.counts)


def main() -> None:
    """Prints {case: what is waited for} as JSON."""
    device = install()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    found = {}
    # In one thread: the threads that torch has for a device of Python sometimes wait for ever.
    with Watched() as watched, torch.autograd.set_multithreading_enabled(False):
        for name, case in CASES.items():
            print(name, flush=True)
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                found[name] = waits(watched, device, Path(folder), **case)
        with watched.counted() as counts:
            x = torch.ones(3).to(device) + torch.tensor([1.0, 2.0, 3.0], device=device)
            x[x > 2].sum().item()
            torch.bincount(x.long()).cpu()
            x.nonzero()
            torch.ones(3).to(device, non_blocking=True)
        found["a step that waits"] = dict(counts)
    print(json.dumps(found), flush=True)
    os._exit(0)  # torch's threads for a device of Python's do not end


if __name__ == "__main__":
    main()
