"""Digits: the 1,797 handwritten digits of scikit-learn, installed with it."""

import hashlib
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from trainer.data.images import InMemory, Source, mean_and_std

_TEST_PER_CLASS = 36


def digits(*, size: Annotated[int, Field(ge=8)] = 8) -> Source:
    """Reads 1,437 training and 360 test images of 1 x size x size in 10 classes (Alpaydin & Kaynak 1998).

    Nothing is downloaded, because the images come with scikit-learn. The test images, 36 of each class, are
    the same in every run: those whose pixels have the lowest sha256 in their class.

    Args:
        size: Side in pixels. Other sizes than the original 8 are resized bilinearly.
    """
    from sklearn.datasets import load_digits  # imported here because it takes a second

    pixels, classes = load_digits(return_X_y=True)
    pixels = np.rint(pixels * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes)
    if size != 8:
        resized = functional.interpolate(
            images.float(), size=(size, size), mode="bilinear", align_corners=False
        )
        images = resized.round().to(torch.uint8)

    rank = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        of_class = torch.nonzero(labels == label).flatten().tolist()
        is_test[sorted(of_class, key=lambda position: rank[position])[:_TEST_PER_CLASS]] = True
    train = InMemory(images[~is_test], labels[~is_test])
    mean, std = mean_and_std(train.images)
    return Source(
        train=train,
        test=InMemory(images[is_test], labels[is_test]),
        classes=[str(digit) for digit in range(10)],
        mean=mean,
        std=std,
        shape=(1, size, size),
    )
