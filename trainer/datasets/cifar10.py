"""CIFAR-10: 60,000 small colour photographs in 10 classes."""

import torch

from trainer.data.fetch import fetch
from trainer.data.images import InMemory, Source
from trainer.data.readers import read_cifar, read_lines


def cifar10() -> Source:
    """Reads 50,000 training and 10,000 test images of 3 x 32 x 32 (RGB) in 10 classes (Krizhevsky 2009).

    The archive is the binary version, which needs no unpickling. It is downloaded into the cache folder if
    missing.

    Raises:
        FetchError: When no source answers.
    """
    archive = fetch("cifar10") / "cifar-10-binary.tar.gz"
    folder = "cifar-10-batches-bin"
    images, labels = read_cifar(archive, [f"{folder}/data_batch_{part}.bin" for part in range(1, 6)])
    test_images, test_labels = read_cifar(archive, [f"{folder}/test_batch.bin"])
    return Source(
        train=InMemory(torch.from_numpy(images), torch.from_numpy(labels)),
        test=InMemory(torch.from_numpy(test_images), torch.from_numpy(test_labels)),
        classes=read_lines(archive, f"{folder}/batches.meta.txt"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        shape=(3, 32, 32),
    )
