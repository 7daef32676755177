"""The teacher runs once: what it says about (view, index) is kept, and used by every later epoch, stage, loss and run.

A view is a number (see `views`), so an augmented image is known by its view and its sample's index, and the teacher's
answer to it never changes. Raw logits are kept, which serve any loss at any temperature. They are filled in the first
time that they are needed, hence never slower than a teacher asked each time.
"""

import hashlib
import json
import logging
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from trainer.data.images import Data, InMemory
from trainer.data.views import Views
from trainer.distillation.answer_file import (
    FORMAT,
    make_file,
    other_facts,
    refuse_above,
    same_facts,
    size_text,
)
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.build import spec
from trainer.networks.features import Seen
from trainer.recipe.keys import Augment, CacheKeys
from trainer.storage import files

LIMIT_GIB = 2.0  # of a cache in memory, where the recipe names no limit
TOLERANCE = (
    1e-2  # between a kept and a live answer, relative to 1 + the greatest logit: devices round differently
)
HALF_TOLERANCE = 5e-2  # the same where the teacher computes in half precision
_PRIME = 2**31 - 1
_BLOCK = 2**15  # 16-bit words summed at once: below 2^16 * 2^31 * 2^15, so that int64 does not overflow
_CHUNK = 2**16  # records verified at once
logger = logging.getLogger(__name__)


class ViewCache:
    """A teacher's answers to the views of a run's training images: [views, num_samples] records, empty at first.

    A record is the logits [K], or of these the `top` highest with the log of the rest's mass (then spread evenly over
    the rest), and where asked the embedding [D] and the maps of `layers`. Without augmentation there is one view.

    They are in a file that any number of processes and runs may share at once, below `folder` in a folder named after
    the fingerprint of everything that the answers depend on: the teacher, the images, the augmentation, the layout. The
    file is mapped, so its records are memory as long as there is some. Each record has a checksum of its data and place,
    which no half-written, damaged or empty record has: those are computed again (damaged ones are told of, once). The
    file's space is taken at the start, so a disk that fills up later does no harm. On a GPU the records of the current
    view are held there.

    A kept answer may differ from a live one in its last bits, since how a library sums depends on the batch. A run
    that was interrupted finds its answers where it left them, and ends in the same weights.

    Raises Mistake for endless views, too little room (naming sizes), a folder that cannot be written, or one whose
    facts are not this run's.
    """

    def __init__(
        self,
        guide: Teacher,
        data: Data,
        folder: Path,
        keys: CacheKeys | None = None,
        *,
        layers: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: str = "no",
    ) -> None:
        keys = keys or CacheKeys()
        augmented = data.augment != Augment()
        if augmented and data.views is None:
            raise Mistake(
                "the teacher's answers to endless views cannot be kept: data needs views, their number"
            )
        self.teacher, self.data, self.keys = guide, data, keys
        self.layers = list(layers) if keys.maps else []
        self.embeddings = keys.embeddings
        self.computed = 0  # images that the teacher was shown for the cache's sake, by this process
        self.error: dict[str, float] = {}
        self.told = ""
        self._version = guide.version
        # Accelerate's processes on a CPU work on cpu:0, and .to("cpu:0") copies what lies on "cpu".
        self._device = torch.device("cpu") if torch.device(device).type == "cpu" else torch.device(device)
        self._tolerance = TOLERANCE if precision == "no" else HALF_TOLERANCE
        self._num_views = data.views if augmented else 1
        self._shapes = self._look(guide)
        self.num_classes = self._shapes["logits"][0]
        self._layout = self._lay_out()
        self._told_of_damage = False
        self.path = self._open(folder, precision)
        self._known = torch.zeros(self._num_views, data.num_samples, dtype=torch.bool, device=self._device)
        self._ids = data.train.ids.to(self._device)
        self._view: int | None = None
        self._table: dict[str, Tensor] = {}
        self._missing = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all records when they are filled."""
        return self._regions()[1]

    def describe(self) -> str:
        """What is kept, where, and how much of it is there, for the user."""
        what = (
            f"{self.num_classes} logits"
            if self.keys.top is None
            else f"the {self.keys.top} highest of {self.num_classes} logits"
        )
        what += " and embedding" * self.embeddings + f" and maps of {', '.join(self.layers)}" * bool(
            self.layers
        )
        text = (
            f"{self._num_views} view{'s' * (self._num_views > 1)} x {self.data.num_samples:,} samples, {what} each, "
            f"{self.keys.type}, {size_text(self.num_bytes)}"
        )
        return f"{text}, in {self.path} ({int((self._sums != 0).sum()):,} there already{self.told})"

    def facts(self) -> dict[str, Any]:
        """What the report says of the cache: its settings, size, place, and what its records lose (see `measure`)."""
        return {
            **self.keys.model_dump(),
            "views": self._num_views,
            "num_bytes": self.num_bytes,
            "error": self.error,
            "folder": str(self.path) if self.keys.where == "disk" else None,
        }

    def keeps(self, layers: Sequence[str], embedding: bool) -> bool:
        """Whether the cache can answer what is asked."""
        return (not embedding or self.embeddings) and set(layers) <= set(self.layers)

    def see(
        self, images: Tensor, index: Tensor, view: int, layers: Sequence[str] = (), embedding: bool = False
    ) -> Seen:
        """What the teacher sees in images [N, C, H, W] in [0, 1]: those of `index` [N], of the training part, in `view`."""
        assert self.teacher.version == self._version, "the teacher was trained on after its answers were kept"
        if view != self._view:
            self._turn_to(view)
        if self._missing:
            new = self._new(index)
            if new is not None:
                seen = self.teacher.see(images[new], self.layers, self.embeddings)
                self.computed += len(seen.logits)
                self._write(seen, index[new])
        return self._recall(index, layers, embedding)

    def keep(self, seen: Seen, index: Tensor, view: int) -> None:
        """Keeps what the teacher was asked for anyway, if it is all that a record holds."""
        if (self.embeddings and seen.embedding is None) or not set(self.layers) <= set(seen.maps):
            return
        if view != self._view:
            self._turn_to(view)
        if self._missing:
            new = self._new(index)
            if new is not None:
                maps = {name: map_[new] for name, map_ in seen.maps.items() if name in self.layers}
                embedding = seen.embedding[new] if self.embeddings else None
                self._write(Seen(seen.logits[new], embedding, maps), index[new])

    @torch.no_grad()
    def check(self, count: int = 8) -> int:
        """Compares some of the kept records, taken at random, with the teacher's live answers; returns how many.

        Raises Mistake, which says what to remove, where they differ by more than rounding: the network's code or
        the images are then not what they were, whatever the fingerprint says.
        """
        random = np.random.default_rng()
        for view in random.permutation(self._num_views).tolist():
            known = self._verify(view, torch.arange(self.data.num_samples)).nonzero().flatten()
            if len(known):
                break
        else:
            return 0
        index = known[torch.from_numpy(random.permutation(len(known))[:count])]
        live = self.teacher.see(self._images(index, view), self.layers, self.embeddings)
        kept = {name: field[view][index].to(self._device) for name, field in self._fields.items()}
        for record, (difference, scale) in enumerate(zip(*self._differences(kept, live), strict=True)):
            if not difference <= self._tolerance * (1 + scale):
                raise Mistake(
                    f"{self.path}: the answer kept for view {view}, sample {index[record].item()} differs from the teacher's own "
                    f"by {difference:.3g} (logits up to {scale:.3g}): the network's code or the images have changed; "
                    "remove that folder, and the answers are computed anew"
                )
        return len(index)

    @torch.no_grad()
    def measure(self, count: int = 256) -> dict[str, float]:
        """What the records lose against full float32 logits, on some of the run's own images in view 0; these are kept.

        kl_1, kl_4: mean KL(full || kept) at temperatures 1 and 4, in nats. agreement: percent with the same first
        class. largest: greatest difference of a kept logit. Nothing is lost by float32 without `top`: then {}.
        """
        if self.keys.type == "float32" and self.keys.top is None:
            return {}
        index = self._ids[:count]
        live = self.teacher.see(self._images(index, 0), self.layers, self.embeddings)
        packed = self._pack(live)
        full, kept = (
            live.logits.double(),
            self._restore({n: packed[n] for n in self._logit_fields()}).double(),
        )

        def divergence(temperature: float) -> float:
            p, q = (full / temperature).log_softmax(1), (kept / temperature).log_softmax(1)
            return max(0.0, (p.exp() * (p - q)).sum(1).mean().item())

        differences, _ = self._differences(packed, live)
        self.error = {
            "kl_1": divergence(1.0),
            "kl_4": divergence(4.0),
            "largest": max(differences),
            "agreement": (full.argmax(1) == kept.argmax(1)).double().mean().item() * 100,
        }
        self.keep(live, index, 0)
        return self.error

    # What a record is made of.

    @torch.no_grad()
    def _look(self, guide: Teacher) -> dict[str, tuple[int, ...]]:
        seen = guide.see(torch.zeros(1, *self.data.shape, device=self._device), self.layers, self.embeddings)
        shapes = {"logits": tuple(seen.logits.shape[1:])}
        if self.embeddings:
            shapes["embedding"] = tuple(seen.embedding.shape[1:])
        return shapes | {f"map/{name}": tuple(seen.maps[name].shape[1:]) for name in self.layers}

    def _lay_out(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        kind = getattr(torch, self.keys.type)
        layout = {name: (shape, kind) for name, shape in self._shapes.items()}
        if self.keys.top is not None:
            if self.keys.top > self.num_classes - 2:
                raise Mistake(
                    f"top {self.keys.top} of {self.num_classes} classes saves nothing; leave top out"
                )
            del layout["logits"]
            small = torch.int16 if self.num_classes <= 2**15 else torch.int32
            layout |= {
                "values": ((self.keys.top,), kind),
                "classes": ((self.keys.top,), small),
                "rest": ((1,), torch.float32),
            }
        return layout

    def _logit_fields(self) -> list[str]:
        return ["logits"] if self.keys.top is None else ["values", "classes", "rest"]

    def _pack(self, seen: Seen) -> dict[str, Tensor]:
        """What is written for a batch of answers: {field: [N, ...]}."""
        found = {"logits": seen.logits, "embedding": seen.embedding} | {
            f"map/{n}": m for n, m in seen.maps.items()
        }
        if self.keys.top is not None:
            logits = found.pop("logits").float()
            values, classes = logits.topk(self.keys.top, dim=1)
            rest = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
            found |= {"values": values, "classes": classes, "rest": rest}
        return {name: found[name].to(dtype) for name, (_, dtype) in self._layout.items()}

    def _restore(self, kept: dict[str, Tensor]) -> Tensor:
        """Logits [N, K] in float32 out of a record's fields."""
        if self.keys.top is None:
            return kept["logits"].float()
        others = self.num_classes - self.keys.top
        logits = (kept["rest"] - math.log(others)).repeat(1, self.num_classes)
        return logits.scatter_(1, kept["classes"].long(), kept["values"].float())

    def _differences(self, kept: dict[str, Tensor], live: Seen) -> tuple[list[float], list[float]]:
        """Greatest difference of each kept record's logits (of the kept ones, where there is `top`), and their size."""
        full = live.logits.float()
        if self.keys.top is None:
            difference = (kept["logits"].float() - full).abs().amax(1)
        else:
            classes = kept["classes"].long()
            difference = (kept["values"].float() - full.gather(1, classes)).abs().amax(1)
        return difference.tolist(), full.abs().amax(1).tolist()

    def _images(self, index: Tensor, view: int) -> Tensor:
        images = self.data.train.images
        where = index.to(images.images.device) if isinstance(images, InMemory) else index.tolist()
        stored = images.__getitems__(where)[0].to(self._device)
        return Views(self.data).augmented(stored, index.to(self._device), view)

    # Reading and writing.

    def _turn_to(self, view: int) -> None:
        """Opens a view: from now on its records are at hand on the device, those that others kept among them."""
        assert 0 <= view < self._num_views, f"there is no view {view}"
        self._view = view
        unknown = (~self._known[view]).nonzero().flatten()
        self._known[view, unknown] = self._verify(view, unknown.cpu()).to(self._device)
        # The same memory where the records are on the device already.
        self._table = {name: field[view].to(self._device) for name, field in self._fields.items()}
        self._count_missing()

    def _count_missing(self) -> None:
        self._missing = len(self._ids) - int(self._known[self._view][self._ids].sum())

    def _new(self, index: Tensor) -> Tensor | slice | None:
        """Where in the batch the records are that nobody has kept yet; None where there are none."""
        known = self._known[self._view].index_select(0, index)
        new = (~known).nonzero().flatten() if known.any() else slice(None)
        where = index[new]
        if self._written(self._view, where.cpu()):  # another process has kept some of them meanwhile
            valid = self._verify(self._view, where.cpu()).to(self._device)
            found = where[valid]
            for name, table in self._table.items():
                if self._device.type != "cpu":
                    table[found] = self._fields[name][self._view][found.cpu()].to(self._device)
            self._mark(found)
            new, where = torch.arange(len(index), device=self._device)[new][~valid], where[~valid]
        return new if len(where) else None

    def _write(self, seen: Seen, index: Tensor) -> None:
        packed = self._pack(seen)
        for name, table in self._table.items():
            table.index_copy_(0, index, packed[name])
        where = index.cpu()
        host = {name: part.cpu() for name, part in packed.items()}
        if self._device.type != "cpu":
            for name, part in host.items():
                self._fields[name][self._view][where] = part
        # The checksum comes last: only then does the record count.
        self._sums[self._view].index_copy_(0, where, self._checksums(self._view, where, host))
        self._mark(index)

    def _mark(self, index: Tensor) -> None:
        self._known[self._view].index_fill_(0, index, True)
        self._missing -= len(index)
        if self._missing <= 0:
            self._count_missing()

    def _recall(self, index: Tensor, layers: Sequence[str], embedding: bool) -> Seen:
        def of(name: str) -> Tensor:
            return self._table[name].index_select(0, index)

        logits = self._restore({name: of(name) for name in self._logit_fields()})
        return Seen(
            logits,
            of("embedding").float() if embedding else None,
            {n: of(f"map/{n}").float() for n in layers},
        )

    # Checksums.

    def _written(self, view: int, index: Tensor) -> bool:
        """Whether the file says that it has any of the records [N]."""
        return bool(self._sums[view].numpy()[index.numpy()].any())

    def _verify(self, view: int, index: Tensor) -> Tensor:
        """Which of the records [N] in the file are whole."""
        parts = [torch.empty(0, dtype=torch.bool)]
        damaged = 0
        for where in index.split(_CHUNK):
            sums = self._sums[view][where]
            written = sums != 0
            valid = torch.zeros_like(written)
            if written.any():
                some = where[written]
                right = (
                    self._checksums(view, some, {n: f[view][some] for n, f in self._fields.items()})
                    == sums[written]
                )
                valid[written] = right
                damaged += int((~right).sum())
            parts.append(valid)
        if damaged and not self._told_of_damage:
            self._told_of_damage = True
            logger.warning(
                "%s: %d damaged records in view %d; damaged records are computed again",
                self.path,
                damaged,
                view,
            )
        return torch.cat(parts)

    def _checksums(self, view: int, index: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """int32 [N], never 0: a universal hash, modulo a prime, of the records' place and their 16-bit words."""
        # numpy: of so few numbers the calls are what takes the time, and torch's take four times as long.
        total = (view * self.data.num_samples + index.numpy()) % _PRIME * self._multipliers[-1] % _PRIME
        start = 0
        for name in self._layout:
            words = parts[name].reshape(len(index), -1).contiguous().numpy().view(np.uint16)
            for first in range(0, words.shape[1], _BLOCK):
                block = words[:, first : first + _BLOCK].astype(np.int64)
                total += block @ self._multipliers[start : start + block.shape[1]] % _PRIME
                start += block.shape[1]
        return torch.from_numpy((total % _PRIME + 1).astype(np.int32))

    # The file.

    def _facts(self, precision: str) -> dict[str, Any]:
        """Everything that the answers depend on. What is the same by construction is left out: one view needs no seed."""
        augmented = self.data.augment != Augment()
        return {
            "format": FORMAT,
            "teacher": self.teacher.fingerprint(),
            "model": [spec(keys) for keys in self.teacher.keys],
            "precision": precision,
            "dataset": self.data.name,
            "images": self.data.fingerprint,
            "num_samples": self.data.num_samples,
            "shape": list(self.data.shape),
            "augment": self.data.augment.model_dump() if augmented else None,
            "seed": self.data.seed if augmented else None,
            "views": self._num_views,
            "record": {
                name: [list(shape), str(kind).removeprefix("torch.")]
                for name, (shape, kind) in self._layout.items()
            },
        }

    def _open(self, parent: Path, precision: str) -> Path:
        """Maps the file of records, made first where there is none; returns its folder."""
        facts = json.loads(json.dumps(self._facts(precision), default=str))  # as they are read back
        folder = parent / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        regions, size = self._regions()
        limit = self.keys.limit_gib or (LIMIT_GIB if self.keys.where == "memory" else None)
        if limit is not None:
            refuse_above(size, limit)
        path = folder / "records"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if path.is_file():
                    same_facts(folder, facts)
                if not path.is_file() or path.stat().st_size != size:
                    if path.is_file():
                        logger.warning(
                            "%s: is damaged (%d bytes where %d belong); it is made anew",
                            path,
                            path.stat().st_size,
                            size,
                        )
                    self.told = other_facts(parent, folder, facts)
                    make_file(path, size)
                    files.write_bytes(folder / "facts.json", json.dumps(facts, indent=1).encode())
                with open(path, "r+b") as file:
                    mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise Mistake(
                f"the teacher's answers cannot be kept in {folder}: {error.strerror or error}; "
                "name another folder in the environment variable TRAINER_DATA, or keep them in memory (cache: memory)"
            ) from None
        content = torch.frombuffer(mapped, dtype=torch.uint8)
        shape = (self._num_views, self.data.num_samples)
        self._fields = {}
        for name, (start, count, extent, kind) in regions.items():
            self._fields[name] = content[start : start + count].view(kind).view(*shape, *extent)
        self._sums = self._fields.pop("")
        raw = np.random.PCG64(0x7EAC4E12).random_raw(
            sum(math.prod(s) * k.itemsize // 2 for s, k in self._layout.values()) + 1
        )
        self._multipliers = (raw % (_PRIME - 1) + 1).astype(np.int64)
        return folder

    def _regions(self) -> tuple[dict[str, tuple[int, int, tuple[int, ...], torch.dtype]], int]:
        """Where each field lies in the file: {name: (start, bytes, shape of one, type)}, the checksums under ''; and its size."""
        regions, start = {}, 0
        for name, (shape, kind) in {"": ((), torch.int32), **self._layout}.items():
            count = self._num_views * self.data.num_samples * math.prod(shape) * kind.itemsize
            regions[name] = (start, count, shape, kind)
            start += count + -count % 64
        return regions, start
