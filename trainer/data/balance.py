"""Makes classes of different frequency count alike: by weights, or by how often their images are drawn."""

import numpy as np
import torch
from torch import Tensor


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Returns a weight for each class, float32 [K]: the number of images / (number of classes with any x its images).

    labels: int64 [N], -1 for images without a label, which do not count. A class without images has weight 0.
    """
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return weights.where(counts > 0, 0).float()


def balanced_order(labels: Tensor, draw: np.random.Generator) -> np.ndarray:
    """Returns positions of images, int64 [N], in random order, as many of each class as of any other.

    An image of a rare class is drawn again once all of its class were; of frequent classes some are not drawn. Images
    without a label are drawn once each.

    Args:
        labels: int64 [N], -1 for images without a label.
        draw: The random generator.
    """
    known = labels.numpy()
    chosen = [np.flatnonzero(known < 0)]
    classes = draw.permutation(np.unique(known[known >= 0]))  # the first ones get what does not divide
    each, rest = divmod(int((known >= 0).sum()), max(1, len(classes)))
    for number, label in enumerate(classes):
        of_class, wanted = np.flatnonzero(known == label), each + (number < rest)
        rounds = [draw.permutation(of_class) for _ in range(-(-wanted // len(of_class)))]
        chosen.append(np.concatenate([*rounds, of_class[:0]])[:wanted])
    return draw.permutation(np.concatenate(chosen))
