"""What a target of an export is given, and what it gives back."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from trainer.data.batches import batches
from trainer.data.images import Data, Part, normalize
from trainer.data.reading import Reading
from trainer.exporting.graph import Graph
from trainer.exporting.installed import NotInstalled as NotInstalled
from trainer.exporting.installed import needed as needed

NO_DATA = "without a recipe there is no data: name one (--recipe R)"
SHOWN = 5  # logits of the test vector that an export's file tells
NUM_RANDOM = 256  # inputs that an export without data is compared on


@dataclass
class Subject:
    """A network to be exported, and what is known of its images.

    Attributes:
        network: The decoded student, in evaluation mode, on the CPU, with plain weights.
        graph: The same network in the plain form of `graph`.
        shape: (C, H, W) of the images.
        classes: Names of the classes, in the order of the logits; [] if they are not known.
        mean, std: Of the normalisation, for each channel; [] if they are not known.
        packed: The packed file that the network came from; None without one.
        data: The recipe's images; None without a recipe.
        teacher_classes: The teacher's class for each test image, int64; None without a teacher.
        reading: How an image file becomes the network's input; None for the default of the shape.
    """

    network: nn.Module
    graph: Graph
    shape: tuple[int, int, int]
    classes: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    packed: bytes | None = None
    data: Data | None = None
    teacher_classes: np.ndarray | None = None
    reading: Reading | None = None

    def normalized(self, images: np.ndarray) -> np.ndarray:
        """Returns uint8 images [N, C, H, W] as the network's float32 input, the same bits as in evaluation."""
        scaled = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
        return (normalize(scaled, self.mean, self.std) if len(self.mean) else scaled).numpy()

    @property
    def scale(self) -> np.ndarray:
        """What `normalized` multiplies each channel by, float32 [C], to the last bit."""
        if len(self.std) == 1:
            return np.array([1 / self.std[0]], np.float32)  # divided in double precision, as `normalize` does
        return np.float32(1) / np.array(self.std or [1.0] * self.shape[0], np.float32)

    def batches(
        self, part: Part, size: int, most: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields uint8 images [N, C, H, W] and labels [N] of a part of the data, in order; of its first `most` images."""
        order = list(torch.arange(len(part))[:most].split(size))
        for images, labels, _ in batches(part, order, part.workers, torch.device("cpu")):
            yield images.cpu().numpy(), labels.cpu().numpy()

    def proof_batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the images that an export is proven on: all test images; without data `NUM_RANDOM` random ones.

        The labels of random images are -1.
        """
        if self.data is not None:
            yield from self.batches(self.data.test, size)
            return
        random = np.random.default_rng(0).integers(0, 256, (NUM_RANDOM, *self.shape), np.uint8)
        for start in range(0, NUM_RANDOM, size):
            part = random[start : start + size]
            yield part, np.full(len(part), -1)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the network's logits for normalised float32 images."""
        with torch.inference_mode():
            return self.network(torch.from_numpy(images)).numpy()

    def test_vector(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns a uint8 image [C, H, W] that every target can make by itself, and the network's logits for it.

        Pixel i, counted through channels, rows and columns, is (i x 37 + i // 101 x 11) mod 256. A file that was written by
        an export is checked on its machine with it.
        """
        i = np.arange(int(np.prod(self.shape)))
        image = ((i * 37 + i // 101 * 11) % 256).astype(np.uint8).reshape(self.shape)
        return image, self.logits(self.normalized(image[None]))[0]

    def facts(self) -> dict[str, Any]:
        """Returns what a user of an exported file must know, as far as it is known: values of JSON.

        "classes", "mean", "std", "shape", "reading" (what differs from the default), "sha256" (of the packed file), and "test": [class, logit] of the
        highest of the normalised test vector.
        """
        _, logits = self.test_vector()
        found = {
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "shape": list(self.shape),
            "reading": self.reading.settings() if self.reading else None,
            "sha256": None if self.packed is None else hashlib.sha256(self.packed).hexdigest(),
            "test": [[int(c), float(f"{logits[c]:.6g}")] for c in np.argsort(-logits)[:SHOWN]],
        }
        return {key: value for key, value in found.items() if value}


@dataclass
class Exported:
    """What a target gives back: its files, and how its runtime answers.

    Attributes:
        files: What was written, below the folder given; the first ones are what a machine needs to run it.
        run: Images [N, C, H, W] to logits [N, K], computed by the real runtime from these files.
        takes: What `run` takes: 'normalized' float32, or 'uint8' images as they are.
        compared: How the answers are held against `reference`: 'float' (a class may differ only where the two highest
            logits are within 1e-4 of the largest, and no logit by more than 1e-2 of the largest of all images), 'integer' (all logits are equal) or 'measured' (reported alone).
        reference: What is compared with, from the same images; None for the subject's own network.
        num_bytes: What the target takes on its machine.
        numbers: Further entries of the report's row: peak_bytes, flash_bytes, ram_bytes, instructions ...
        notes: Sentences for the user.
        verdict: Makes one more of the row of numbers, see `proof.prove`; None for no more.
        batch: How many images `run` is given at a time.
        shows_images: Whether the files show images of the data, which then are not tracked unasked.
    """

    files: list[Path]
    run: Callable[[np.ndarray], np.ndarray]
    num_bytes: int
    takes: Literal["normalized", "uint8"] = "normalized"
    compared: Literal["float", "integer", "measured"] = "float"
    reference: Callable[[np.ndarray], np.ndarray] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verdict: Callable[[dict[str, Any]], str] | None = None
    batch: int = 200
    shows_images: bool = False
