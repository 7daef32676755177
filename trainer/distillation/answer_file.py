"""The file that the teacher's answers are kept in: records of named fields, mapped, each with its checksum.

It knows nothing of teachers and images: what a record holds is the caller's layout, what it depends on the caller's
facts.
"""

import hashlib
import json
import logging
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from trainer.distillation.answer_space import make_file, refuse_above
from trainer.mistakes import Mistake
from trainer.storage import files

FORMAT = 1
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # {field: (shape in one record, type)}
_PRIME = 2**31 - 1
_BLOCK = 2**15  # 16-bit words summed at once: below 2^16 * 2^31 * 2^15, so that int64 does not overflow
_CHUNK = 2**16  # records verified at once
_SEED = 0x7EAC4E12  # of the checksums' factors: part of the format
logger = logging.getLogger(__name__)


class AnswerFile:
    """Records [num_views, num_samples] in a file that any number of processes and runs may share at once.

    The file is in a folder of its own, named after a hash of the facts. It is mapped, so its records are memory as long
    as there is some. A record counts once its checksum is right: no half-written, damaged, moved or empty one has it.
    Damaged records are reported once and then count as missing. The file's space is taken at the start, so a disk that
    fills up later does no harm.

    Args:
        parent: The folder that holds the folders of all such files.
        facts: Everything that the records depend on, as JSON can hold it.
        layout: The fields of one record.
        num_views, num_samples: How many records there are.
        limit_gib: The largest size that is allowed.

    Attributes:
        folder: Where the file is.
        fields: {field: [num_views, num_samples, *shape]}, the file's own memory.
        hint: Why the kept records most like these were not taken, where the file was made anew; else empty.

    Raises:
        Mistake: Too little room (naming sizes), a folder that cannot be written, or one whose facts are others.
    """

    def __init__(
        self,
        parent: Path,
        facts: dict[str, Any],
        layout: Layout,
        num_views: int,
        num_samples: int,
        limit_gib: float | None = None,
    ) -> None:
        self.layout, self.num_samples, self.hint = layout, num_samples, ""
        facts = json.loads(json.dumps(facts, default=str))  # as they are read back
        self.folder = parent / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        self.regions, self.num_bytes = _regions(layout, num_views * num_samples)
        if limit_gib is not None:
            refuse_above(self.num_bytes, limit_gib)
        try:
            content = torch.frombuffer(self._mapped(facts), dtype=torch.uint8)
        except OSError as error:
            raise Mistake(
                f"the teacher's answers cannot be kept in {self.folder}: {error.strerror or error}; "
                "name another folder in the environment variable TRAINER_DATA, or keep them in memory (cache: memory)"
            ) from None
        self.fields: dict[str, Tensor] = {}
        for name, (start, count, shape, kind) in self.regions.items():
            self.fields[name] = content[start : start + count].view(kind).view(num_views, num_samples, *shape)
        self._sums = self.fields.pop("")
        self._factors = _factors(sum(math.prod(s) * k.itemsize // 2 for s, k in layout.values()) + 1)
        self._warned = False

    def _mapped(self, facts: dict[str, Any]) -> mmap.mmap:
        """The file's bytes; it is made first where there is none of this size."""
        path = self.folder / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            if path.is_file():
                _same_facts(self.folder, facts)
            if not path.is_file() or path.stat().st_size != self.num_bytes:
                if path.is_file():
                    logger.warning(
                        "%s: is damaged (%d bytes where %d belong); it is made anew",
                        path,
                        path.stat().st_size,
                        self.num_bytes,
                    )
                self.hint = _other_facts(self.folder, facts)
                make_file(path, self.num_bytes)
                files.write_bytes(self.folder / "facts.json", json.dumps(facts, indent=1).encode())
            with open(path, "r+b") as file:
                return mmap.mmap(file.fileno(), self.num_bytes)

    @property
    def num_written(self) -> int:
        """How many records the file says that it has."""
        return int((self._sums != 0).sum())

    def has_any(self, view: int, index: Tensor) -> bool:
        """Whether the file says that it has any of the records [N]."""
        return bool(self._sums[view].numpy()[index.numpy()].any())

    def read(self, view: int, index: Tensor) -> dict[str, Tensor]:
        """Copies of the records [N] as they are, right or not: {field: [N, ...]}."""
        return {name: field[view][index] for name, field in self.fields.items()}

    def write(self, view: int, index: Tensor, parts: dict[str, Tensor]) -> None:
        """Writes the records [N]: {field: [N, ...]} of the layout's types, on the CPU."""
        for name, part in parts.items():
            self.fields[name][view].index_copy_(0, index, part)
        # The checksum comes last: only then does the record count.
        self._sums[view].index_copy_(0, index, self.checksums(view, index, parts))

    def verify(self, view: int, index: Tensor) -> Tensor:
        """Which of the records [N] are whole: bool [N]."""
        parts = [torch.empty(0, dtype=torch.bool)]
        num_damaged = 0
        for some in index.split(_CHUNK):
            sums = self._sums[view][some]
            written = sums != 0
            valid = torch.zeros_like(written)
            if written.any():
                there = some[written]
                right = self.checksums(view, there, self.read(view, there)) == sums[written]
                valid[written] = right
                num_damaged += int((~right).sum())
            parts.append(valid)
        if num_damaged and not self._warned:
            self._warned = True
            logger.warning(
                "%s: %d damaged records in view %d; damaged records are computed again",
                self.folder,
                num_damaged,
                view,
            )
        return torch.cat(parts)

    def checksums(self, view: int, index: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """int32 [N], never 0: a universal hash, modulo a prime, of the records' position and their 16-bit words."""
        # numpy: of so few numbers the calls are what takes the time, and torch's take four times as long.
        total = (view * self.num_samples + index.numpy()) % _PRIME * self._factors[-1] % _PRIME
        start = 0
        for name in self.layout:
            words = parts[name].reshape(len(index), -1).contiguous().numpy().view(np.uint16)
            for first in range(0, words.shape[1], _BLOCK):
                block = words[:, first : first + _BLOCK].astype(np.int64)
                total += block @ self._factors[start : start + block.shape[1]] % _PRIME
                start += block.shape[1]
        return torch.from_numpy((total % _PRIME + 1).astype(np.int32))


def _regions(
    layout: Layout, num_records: int
) -> tuple[dict[str, tuple[int, int, tuple[int, ...], torch.dtype]], int]:
    """Where each field lies: {name: (start, bytes, shape of one, type)}, the checksums under ''; and the file's size."""
    regions, start = {}, 0
    for name, (shape, kind) in {"": ((), torch.int32), **layout}.items():
        count = num_records * math.prod(shape) * kind.itemsize
        regions[name] = (start, count, shape, kind)
        start += count + -count % 64
    return regions, start


def _factors(count: int) -> np.ndarray:
    """The checksums' factors: one for each 16-bit word of a record, and the last for its position."""
    raw = np.random.PCG64(_SEED).random_raw(count)
    return (raw % (_PRIME - 1) + 1).astype(np.int64)


def _read_facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _same_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Raises Mistake where a folder's records were kept for other facts."""
    kept = _read_facts(folder)
    if kept is None:
        # Only a description: the folder's name already says that the facts are these.
        files.write_bytes(folder / "facts.json", json.dumps(facts, indent=1).encode())
    elif kept != facts:
        wrong = sorted(key for key in facts.keys() | kept.keys() if facts.get(key) != kept.get(key))
        raise Mistake(f"{folder}: its answers were kept for another {', '.join(wrong)}; remove that folder")


def _other_facts(folder: Path, facts: dict[str, Any]) -> str:
    """Why the records most like these were not taken; nothing where there are none of this dataset."""
    nearest: tuple[int, str] | None = None
    for other in sorted(folder.parent.iterdir()):
        kept = _read_facts(other) if other != folder else None
        if kept is None or kept.get("dataset") != facts["dataset"]:
            continue
        differing = [key for key in facts if facts[key] != kept.get(key)]
        if nearest is None or len(differing) < nearest[0]:
            nearest = (len(differing), f"; those in {other.name} are of another {', '.join(differing)}")
    return nearest[1] if nearest else ""
