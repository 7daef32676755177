"""The file of the teacher's answers: memory-mapped records of named fields, each with a checksum.

It knows nothing of teachers and images: the caller's layout says what a record holds, the caller's facts what it
depends on.
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
from trainer.storage import files, records
from trainer.storage.lock import share

FORMAT = 1
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # {field: (shape in one record, type)}
_PRIME = 2**31 - 1
_BLOCK = 2**15  # 16-bit words summed at once: the sum is below 2^16 * 2^31 * 2^15, so int64 does not overflow
_CHUNK = 2**16  # records verified at once
_SEED = 0x7EAC4E12  # of the checksums' factors; part of the format
logger = logging.getLogger(__name__)


class AnswerFile:
    """Records [num_views, num_samples] in a file that any number of processes and runs may use at once.

    The file is in a folder of its own, named after a hash of the facts. It is memory-mapped, so its records stay in
    memory while there is room. A record is valid if its checksum is right; half-written, damaged, moved or empty
    records are not. Damaged records are reported once and then count as missing. The file's space is allocated at the
    start, so a disk that fills up later does no harm.

    Args:
        parent: The folder that holds the folders of all such files.
        facts: Everything that the records depend on, in JSON's types.
        layout: The fields of one record.
        num_views: Number of views.
        num_samples: Number of records of each view.
        limit_gib: The largest allowed size in GiB, None for any.

    Attributes:
        folder: The file's folder.
        fields: {field: [num_views, num_samples, *shape]}, views of the file's memory.
        hint: If the file is new, how the facts of the most similar file differ; else empty.

    Raises:
        Mistake: If there is too little room (with the sizes), if the folder cannot be written, or if its facts differ.
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
            self._map = self._mapped(facts)
            content = torch.frombuffer(self._map, dtype=torch.uint8)
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
        """Maps the file into memory; it is made first if there is none of this size."""
        path = self.folder / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            if path.is_file():
                _same_facts(self.folder, facts)
            if not path.is_file() or path.stat().st_size != self.num_bytes:
                if path.is_file():
                    logger.warning(
                        "%s: is damaged (%d bytes where %d belong); it is made anew; on a GPU last bits may differ",
                        path,
                        path.stat().st_size,
                        self.num_bytes,
                    )
                self.hint = _other_facts(self.folder, facts)
                make_file(path, self.num_bytes)
                files.write_bytes(self.folder / "facts.json", json.dumps(facts, indent=1).encode())
            # Up to the folder of the cache folder. An earlier process may have made the file and been killed before this.
            for folder in [self.folder, *self.folder.resolve().parents][:4]:
                files.sync_folder(folder)
            with open(path, "r+b") as file:
                share(file)  # the map keeps the mark, so that `trainer cache --remove` leaves the file alone
                return mmap.mmap(file.fileno(), self.num_bytes)

    def sync(self) -> None:
        """Waits until what was written is on the disk.

        A checkpoint stands on the answers that its training has used: computed anew on a GPU or by another processor,
        they may differ in their last bits.
        """
        self._map.flush()

    @property
    def num_written(self) -> int:
        """Number of records with a checksum, right or wrong."""
        return int((self._sums != 0).sum())

    def has_any(self, view: int, index: Tensor) -> bool:
        """Returns whether any of the records [N] has a checksum, right or wrong."""
        return bool(self._sums[view].numpy()[index.numpy()].any())

    def read(self, view: int, index: Tensor) -> dict[str, Tensor]:
        """Returns copies of the records [N] without checking them: {field: [N, ...]}."""
        return {name: field[view][index] for name, field in self.fields.items()}

    def write(self, view: int, index: Tensor, parts: dict[str, Tensor]) -> None:
        """Writes the records [N]: {field: [N, ...]} of the layout's types, on the CPU."""
        for name, part in parts.items():
            self.fields[name][view].index_copy_(0, index, part)
        # The checksum is written last: it makes the record valid.
        self._sums[view].index_copy_(0, index, self.checksums(view, index, parts))

    def verify(self, view: int, index: Tensor) -> Tensor:
        """Returns which of the records [N] are valid: bool [N]. Logs a warning at the first damaged ones."""
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
                "%s: %d damaged records in view %d; damaged records are computed again; on a GPU last bits may differ",
                self.folder,
                num_damaged,
                view,
            )
        return torch.cat(parts)

    def checksums(self, view: int, index: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Returns int32 [N], never 0: a universal hash, modulo a prime, of each record's position and 16-bit words."""
        # numpy, because with so few numbers the calls take the time, and torch's take four times as long.
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
    """Returns where each field lies, {name: (start, bytes, shape in one record, type)}, and the file's size in bytes.

    The checksums are the field ''.
    """
    regions, start = {}, 0
    for name, (shape, kind) in {"": ((), torch.int32), **layout}.items():
        count = num_records * math.prod(shape) * kind.itemsize
        regions[name] = (start, count, shape, kind)
        start += count + -count % 64
    return regions, start


def _factors(count: int) -> np.ndarray:
    """Returns the checksums' factors: one for each 16-bit word of a record, the last for its position."""
    raw = np.random.PCG64(_SEED).random_raw(count)
    return (raw % (_PRIME - 1) + 1).astype(np.int64)


def _read_facts(folder: Path) -> dict[str, Any] | None:
    try:
        return records.read(folder / "facts.json", dict[str, Any])
    except Mistake:
        return None


def _same_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Raises Mistake if a folder's records were kept for other facts."""
    kept = _read_facts(folder)
    if kept is None:
        # The file of facts is only a description: the folder's name is already their hash.
        files.write_bytes(folder / "facts.json", json.dumps(facts, indent=1).encode())
    elif kept != facts:
        wrong = sorted(key for key in facts.keys() | kept.keys() if facts.get(key) != kept.get(key))
        raise Mistake(f"{folder}: its answers were kept for another {', '.join(wrong)}; remove that folder")


def _other_facts(folder: Path, facts: dict[str, Any]) -> str:
    """Returns how the facts of the most similar file differ; '' if there is none of this dataset."""
    nearest: tuple[int, str] | None = None
    for other in sorted(folder.parent.iterdir()):
        kept = _read_facts(other) if other != folder else None
        if kept is None or kept.get("dataset") != facts["dataset"]:
            continue
        differing = [key for key in facts if facts[key] != kept.get(key)]
        if nearest is None or len(differing) < nearest[0]:
            nearest = (len(differing), f"; those in {other.name} are of another {', '.join(differing)}")
    return nearest[1] if nearest else ""
