"""CIFAR-100: 60,000 small colour photographs in 100 classes."""

import torch

from trainer.data.fetch import fetch
from trainer.data.images import InMemory, Source
from trainer.data.readers import read_cifar, read_lines


def cifar100() -> Source:
    """Reads 50,000 training and 10,000 test images of 3 x 32 x 32 (RGB) in 100 classes (Krizhevsky 2009).

    The labels are the fine ones. The archive is the binary version, which needs no unpickling. It is
    downloaded into the cache folder if missing.

    Raises:
        FetchError: When no source answers.
    """
    archive = fetch("cifar100") / "cifar-100-binary.tar.gz"
    folder = "cifar-100-binary"
    images, labels = read_cifar(archive, [f"{folder}/train.bin"], num_labels=2)
    test_images, test_labels = read_cifar(archive, [f"{folder}/test.bin"], num_labels=2)
    return Source(
        train=InMemory(torch.from_numpy(images), torch.from_numpy(labels)),
        test=InMemory(torch.from_numpy(test_images), torch.from_numpy(test_labels)),
        classes=read_lines(archive, f"{folder}/fine_label_names.txt"),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        shape=(3, 32, 32),
    )
