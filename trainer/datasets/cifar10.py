"""CIFAR-10: 60,000 small colour photographs."""

import torch

from trainer.data.fetch import fetch
from trainer.data.images import InMemory, Source
from trainer.data.readers import read_cifar, read_lines


def cifar10() -> Source:
    """50,000 training and 10,000 test images of 3 x 32 x 32 (RGB) in 10 classes (Krizhevsky 2009).

    Reads the binary archive, where nothing is unpickled. Fetched into the cache folder if missing; raises
    FetchError when no source answers.
    """
    archive = fetch("cifar10") / "cifar-10-binary.tar.gz"
    inside = "cifar-10-batches-bin"
    images, labels = read_cifar(archive, [f"{inside}/data_batch_{part}.bin" for part in range(1, 6)])
    test_images, test_labels = read_cifar(archive, [f"{inside}/test_batch.bin"])
    return Source(
        train=InMemory(torch.from_numpy(images), torch.from_numpy(labels)),
        test=InMemory(torch.from_numpy(test_images), torch.from_numpy(test_labels)),
        classes=read_lines(archive, f"{inside}/batches.meta.txt"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        shape=(3, 32, 32),
    )
