"""MNIST: 70,000 handwritten digits."""

import torch

from trainer.data.fetch import fetch
from trainer.data.images import InMemory, Source
from trainer.data.readers import read_mnist


def mnist() -> Source:
    """Reads 60,000 training and 10,000 test images of 1 x 28 x 28 in 10 classes (LeCun et al. 1998).

    The files are downloaded into the cache folder if missing.

    Raises:
        FetchError: When no source answers.
    """
    images, labels, test_images, test_labels = map(torch.from_numpy, read_mnist(fetch("mnist")))
    return Source(
        train=InMemory(images, labels),
        test=InMemory(test_images, test_labels),
        classes=[str(digit) for digit in range(10)],
        mean=(0.130660,),
        std=(0.308108,),
        shape=(1, 28, 28),
    )
