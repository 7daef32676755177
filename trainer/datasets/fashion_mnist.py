"""Fashion-MNIST: 70,000 images of clothing in the format of MNIST."""

import torch

from trainer.data.fetch import fetch
from trainer.data.images import InMemory, Source
from trainer.data.readers import read_mnist

_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def fashion_mnist() -> Source:
    """Reads 60,000 training and 10,000 test images of 1 x 28 x 28 in 10 classes (Xiao et al. 2017).

    The files are downloaded into the cache folder if missing.

    Raises:
        FetchError: When no source answers.
    """
    images, labels, test_images, test_labels = map(torch.from_numpy, read_mnist(fetch("fashion_mnist")))
    return Source(
        train=InMemory(images, labels),
        test=InMemory(test_images, test_labels),
        classes=_CLASSES,
        mean=(0.286041,),
        std=(0.353024,),
        shape=(1, 28, 28),
    )
