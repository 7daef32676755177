"""Reads the file formats of MNIST and CIFAR."""

import math
import tarfile
from pathlib import Path

import numpy as np

from trainer.mistakes import Mistake


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes as a uint8 array. Raises Mistake if it is not one."""
    data = np.fromfile(path, np.uint8)
    if len(data) < 4 or bytes(data[:3]) != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise Mistake(f"{path}: not an idx file of unsigned bytes")
    start = 4 + 4 * int(data[3])
    shape = tuple(int(size) for size in data[4:start].view(">u4"))
    if len(data) - start != math.prod(shape):
        raise Mistake(f"{path}: got {len(data) - start} values; the header has shape {shape}")
    return data[start:].reshape(shape)


def read_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads MNIST's four files: training images uint8 [N, 1, 28, 28] and labels [N], then the test set's."""
    train, test = (read_idx(folder / f"{part}-images-idx3-ubyte")[:, None] for part in ("train", "t10k"))
    train_labels, test_labels = (read_idx(folder / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    return train, train_labels, test, test_labels


def read_cifar(archive: Path, members: list[str], num_labels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Reads members of a CIFAR archive, one after another.

    Args:
        archive: The tar file.
        members: Names of the files in it.
        num_labels: The number of label bytes before each image. The last is used: CIFAR-100 has a coarse
            label before the fine one.

    Returns:
        Images uint8 [N, 3, 32, 32] and labels uint8 [N].
    """
    with tarfile.open(archive) as opened:
        data = bytearray().join(member_of(opened, member) for member in members)
    records = np.frombuffer(data, np.uint8).reshape(-1, num_labels + 3 * 32 * 32)
    return records[:, num_labels:].reshape(-1, 3, 32, 32), records[:, num_labels - 1].copy()


def read_lines(archive: Path, member: str) -> list[str]:
    """Reads the lines of a text file in an archive, without empty lines."""
    with tarfile.open(archive) as opened:
        return [line for line in member_of(opened, member).decode().splitlines() if line.strip()]


def member_of(archive: tarfile.TarFile, member: str) -> bytes:
    """Reads one file of an archive by its name, without extracting anything to disk."""
    try:
        stream = archive.extractfile(member)
    except KeyError:
        stream = None
    if stream is None:
        raise FetchError(f"the archive has no file {member}")
    return stream.read()


class FetchError(Mistake):
    """The raw files of a data set are not in the cache folder and could not be put there."""
