"""The cache of the teacher's answers: it runs once for each (view, index); later epochs, stages, losses and runs reuse it.

A view is a number (see `data.views`), so its number and the sample's index define an augmented image, and the teacher's
answer to it never changes. Raw logits are kept, which serve any loss at any temperature. A record is computed when it is
first needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.images import Data, InMemory, digest_of
from trainer.data.views import Views
from trainer.distillation.answer_file import FORMAT, AnswerFile
from trainer.distillation.answer_record import Record, differences, logit_fields, pack, record_of, restore
from trainer.distillation.answer_space import size_text
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.features import Seen
from trainer.recipe.keys import Augment, CacheKeys

LIMIT_GIB = 2.0  # of a cache in memory, if the recipe has no limit
TOLERANCE = 1e-2  # between kept and live logits, relative to 1 + the largest logit: devices round differently
HALF_TOLERANCE = 5e-2  # the same if the teacher computes in half precision


class Answers:
    """A teacher's kept answers to the views of a run's training images: [views, num_samples] records, empty at first.

    A record holds the logits [K], or the `top` highest of them and the log of the rest's mass; if the keys ask for them,
    also the embedding [D] and the maps of `layers`. Without augmentation there is one view. A GPU holds the records of
    the current view in its own memory.

    Where the teacher is asked for the same number of images each time (`Teacher.at_once`), on a CPU a kept answer has
    the bits of a live one, and one that is computed again those that it had. An interrupted run finds its answers again,
    and ends in the same weights.

    Args:
        teacher: Computes the answers that are not kept yet.
        data: The images, and the number of their views.
        folder: The folder of all such files, each in a folder named after everything that its answers depend on.
        keys: What is kept, and in which type.
        layers: The layers whose maps are kept, if `keys` asks for maps.
        device: The device of the answers.
        precision: The run's, which the answers depend on.

    Raises:
        Mistake: For endless views, and as `AnswerFile` does.
    """

    def __init__(
        self,
        teacher: Teacher,
        data: Data,
        folder: Path,
        keys: CacheKeys | None = None,
        *,
        layers: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: str = "no",
    ) -> None:
        keys = keys or CacheKeys()
        num_views = data.views if data.augment != Augment() else 1
        if num_views is None:
            raise Mistake(
                "the teacher's answers to endless views cannot be kept: data needs views, their number"
            )
        self.teacher, self.data, self.keys = teacher, data, keys
        self.layers = list(layers) if keys.maps else []
        self.num_computed = 0  # images that the teacher saw for the cache, in this process
        self.error: dict[str, float] = {}
        self._version = teacher.version
        # Accelerate's processes on a CPU use cpu:0, and .to("cpu:0") copies a tensor on "cpu".
        self._device = torch.device("cpu") if torch.device(device).type == "cpu" else torch.device(device)
        self._tolerance = TOLERANCE if precision == "no" else HALF_TOLERANCE
        self._num_views = num_views
        # A teacher of larger images sees them as read from their pictures.
        self._views = Views(teacher.images_of(data))
        with torch.no_grad():
            seen = self._ask(torch.zeros(1, *data.shape, device=self._device))
        self.record = record_of(seen, getattr(torch, keys.type), keys.top)
        self.file = AnswerFile(
            folder,
            _depends_on(teacher, data, self._num_views, self.record, precision),
            self.record.layout,
            self._num_views,
            data.num_samples,
            keys.limit_gib or (LIMIT_GIB if keys.where == "memory" else None),
        )
        self._known = torch.zeros(self._num_views, data.num_samples, dtype=torch.bool, device=self._device)
        self._ids = data.train.ids.to(self._device)
        self._view: int | None = None
        self._table: dict[str, Tensor] = {}
        self._num_missing = 0

    def describe(self) -> str:
        """Returns a line for the user: what is kept, where, and how many records there are."""
        num_classes, views = self.record.num_classes, f"view{'s' * (self._num_views > 1)}"
        what = f"{num_classes} logits"
        if self.keys.top is not None:
            what = f"the {self.keys.top} highest of {what}"
        if self.keys.embeddings:
            what += " and embedding"
        if self.layers:
            what += f" and maps of {', '.join(self.layers)}"
        return (
            f"{self._num_views} {views} x {self.data.num_samples:,} samples, {what} each, {self.keys.type}, "
            f"{size_text(self.file.num_bytes)}, in {self.file.folder} "
            f"({self.file.num_written:,} there already{self.file.hint})"
        )

    def facts(self) -> dict[str, Any]:
        """Returns the report's facts of the cache: settings, size, folder, and the error of its records (see `measure`)."""
        return {
            **self.keys.model_dump(),
            "views": self._num_views,
            "num_bytes": self.file.num_bytes,
            "error": self.error,
            "folder": str(self.file.folder) if self.keys.where == "disk" else None,
        }

    def keeps(self, layers: Sequence[str], embedding: bool) -> bool:
        """Returns whether the cache holds the maps of all `layers`, and the embedding if asked."""
        return (not embedding or self.keys.embeddings) and set(layers) <= set(self.layers)

    def see(
        self, images: Tensor, index: Tensor, view: int, layers: Sequence[str] = (), embedding: bool = False
    ) -> Seen:
        """Returns the teacher's answers to a batch; those that are not kept yet are computed and kept.

        Args:
            images: [N, C, H, W] in [0, 1], augmented as in the view. (A teacher of larger images is shown the pictures.)
            index: [N] sample ids.
            view: The number of the view.
            layers: The layers whose maps are returned.
            embedding: Whether the embedding is returned.
        """
        assert self.teacher.version == self._version, "the teacher was trained on after its answers were kept"
        self._turn_to(view)
        new = self._new(index)
        if new is not None:
            own = self._views.data is self.data
            seen = self._ask(images[new] if own else self._images(index[new], view))
            self.num_computed += len(seen.logits)
            self._write(seen, index[new])
        return self._recall(index, layers, embedding)

    def keep(self, seen: Seen, index: Tensor, view: int) -> None:
        """Keeps answers that were computed anyway, if they have everything that a record holds."""
        if (self.keys.embeddings and seen.embedding is None) or not set(self.layers) <= set(seen.maps):
            return
        self._turn_to(view)
        new = self._new(index)
        if new is not None:
            maps = {name: seen.maps[name][new] for name in self.layers}
            embedding = seen.embedding[new] if self.keys.embeddings and seen.embedding is not None else None
            self._write(Seen(seen.logits[new], embedding, maps), index[new])

    @torch.no_grad()
    def check(self, count: int = 8) -> int:
        """Compares some random kept records with the teacher's live answers; returns how many.

        Raises Mistake, which says what to remove, if they differ by more than rounding: the network's code or the images
        have then changed, although the fingerprint has not.
        """
        random = np.random.default_rng()
        for view in random.permutation(self._num_views).tolist():
            known = self.file.verify(view, torch.arange(self.data.num_samples)).nonzero().flatten()
            if len(known):
                break
        else:
            return 0
        index = known[torch.from_numpy(random.permutation(len(known))[:count])]
        live = self._ask(self._images(index, view))
        kept = {name: part.to(self._device) for name, part in self.file.read(view, index).items()}
        for sample, difference, scale in zip(
            index.tolist(), *differences(self.record, kept, live), strict=True
        ):
            if not difference <= self._tolerance * (1 + scale):
                raise Mistake(
                    f"{self.file.folder}: the answer kept for view {view}, sample {sample} differs from the teacher's own "
                    f"by {difference:.3g} (logits up to {scale:.3g}): the network's code or the images have changed; "
                    "remove that folder, and the answers are computed anew"
                )
        return len(index)

    @torch.no_grad()
    def measure(self, count: int = 256) -> dict[str, float]:
        """Measures the error of the records against full float32 logits, on some training images in view 0, and keeps these.

        Returns kl_1 and kl_4, the mean KL(full || kept) at temperatures 1 and 4, in nats; agreement, the percentage with
        the same prediction; largest, the largest difference of a kept logit. Returns {} for float32 without `top`,
        which has no error.
        """
        if self.keys.type == "float32" and self.keys.top is None:
            return {}
        index = self._ids[:count]
        live = self._ask(self._images(index, 0))
        packed = pack(self.record, live)
        full, kept = live.logits.double(), restore(self.record, packed).double()
        self.error = {
            "kl_1": _divergence(full, kept, 1.0),
            "kl_4": _divergence(full, kept, 4.0),
            "largest": max(differences(self.record, packed, live)[0]),
            "agreement": (full.argmax(1) == kept.argmax(1)).double().mean().item() * 100,
        }
        self.keep(live, index, 0)
        return self.error

    @torch.no_grad()
    def example(self, count: int = 64) -> tuple[Tensor, Tensor, Seen, Seen]:
        """Returns some training images in view 0, their ids, the teacher's live answers, and these as a record keeps them.

        The images are those that the student sees.
        """
        index = self._ids[:count]
        images = Views(self.data).of(index, 0)
        live = self._ask(self._images(index, 0))
        packed = pack(self.record, live)
        embedding = packed["embedding"].float() if "embedding" in packed else None
        maps = {name: packed[f"map/{name}"].float() for name in self.layers}
        return images, index, live, Seen(restore(self.record, packed), embedding, maps)

    def _ask(self, images: Tensor) -> Seen:
        """Returns the teacher's live answers, with everything that a record holds."""
        return self.teacher.see(images, self.layers, self.keys.embeddings)

    def _images(self, index: Tensor, view: int) -> Tensor:
        return self._views.of(index.to(self._device), view)

    def _turn_to(self, view: int) -> None:
        """Makes `view` the current one: loads its valid records to the device, those of other processes included."""
        if view == self._view:
            return
        assert 0 <= view < self._num_views, f"there is no view {view}"
        self._view = view
        unknown = (~self._known[view]).nonzero().flatten()
        self._known[view, unknown] = self.file.verify(view, unknown.cpu()).to(self._device)
        # On a CPU this is the file's own memory.
        self._table = {name: field[view].to(self._device) for name, field in self.file.fields.items()}
        self._count_missing()

    def _count_missing(self) -> None:
        self._num_missing = len(self._ids) - int(self._known[self._view][self._ids].sum())

    def _new(self, index: Tensor) -> Tensor | slice | None:
        """Returns the positions in the batch of records that no process has kept yet; None if there are none."""
        if not self._num_missing:
            return None
        assert self._view is not None
        known = self._known[self._view].index_select(0, index)
        new = (~known).nonzero().flatten() if known.any() else slice(None)
        samples = index[new]
        if self.file.has_any(self._view, samples.cpu()):  # another process has kept some of them meanwhile
            valid = self.file.verify(self._view, samples.cpu()).to(self._device)
            self._take_up(samples[valid])
            new, samples = torch.arange(len(index), device=self._device)[new][~valid], samples[~valid]
        return new if len(samples) else None

    def _take_up(self, samples: Tensor) -> None:
        """Loads records of the current view that another process has kept."""
        if self._device.type != "cpu":
            assert self._view is not None
            for name, part in self.file.read(self._view, samples.cpu()).items():
                self._table[name][samples] = part.to(self._device)
        self._mark(samples)

    def _write(self, seen: Seen, index: Tensor) -> None:
        packed = pack(self.record, seen)
        if self._device.type != "cpu":
            for name, table in self._table.items():
                table.index_copy_(0, index, packed[name])
        assert self._view is not None
        self.file.write(self._view, index.cpu(), {name: part.cpu() for name, part in packed.items()})
        self._mark(index)

    def _mark(self, index: Tensor) -> None:
        self._known[self._view].index_fill_(0, index, True)
        self._num_missing -= len(index)
        if self._num_missing <= 0:
            self._count_missing()

    def _recall(self, index: Tensor, layers: Sequence[str], embedding: bool) -> Seen:
        def of(name: str) -> Tensor:
            return self._table[name].index_select(0, index)

        logits = restore(self.record, {name: of(name) for name in logit_fields(self.record)})
        maps = {name: of(f"map/{name}").float() for name in layers}
        return Seen(logits, of("embedding").float() if embedding else None, maps)


def _depends_on(
    teacher: Teacher, data: Data, num_views: int, record: Record, precision: str
) -> dict[str, Any]:
    """Returns everything that the answers depend on. Without augmentation the seed is None: it has no effect."""
    augmented = data.augment != Augment()
    pictures = teacher.images_of(data)  # if they are the data the facts are those of earlier versions
    return {
        "format": FORMAT,
        "teacher": teacher.fingerprint(),
        "model": [member.spec for member in teacher.members],
        "precision": precision,
        "dataset": data.name,
        "images": data.fingerprint,
        "num_samples": data.num_samples,
        **_contents_of(data),
        "shape": list(data.shape),
        **({} if teacher.at_once is None else {"at_once": teacher.at_once}),
        **({} if pictures is data else {"pictures": [list(pictures.shape), teacher.filter]}),
        "augment": data.augment.facts() if augmented else None,
        "seed": data.seed if augmented else None,
        "views": num_views,
        "record": {
            name: [list(shape), str(kind).removeprefix("torch.")]
            for name, (shape, kind) in record.layout.items()
        },
    }


def _contents_of(data: Data) -> dict[str, Any]:
    """Returns what tells images apart that were changed in place; nothing for images in memory, of which the fingerprint has all.

    All images of the source count, so that every subset of them has the same answers.
    """
    images = data.train.images
    if isinstance(images, InMemory):
        return {}
    changes = images.states().changes if hasattr(images, "states") else None  # of files
    return {"contents": [changes, digest_of(images, torch.arange(len(images)))]}


def _divergence(full: Tensor, kept: Tensor, temperature: float) -> float:
    """Returns the mean KL(full || kept) of logits [N, K] at a temperature, in nats, at least 0."""
    p, q = (full / temperature).log_softmax(1), (kept / temperature).log_softmax(1)
    return max(0.0, (p.exp() * (p - q)).sum(1).mean().item())
