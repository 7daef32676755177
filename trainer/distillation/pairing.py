"""What a network sees: logits, pooled embedding and feature maps of one forward pass.

timm's networks are read through `forward_intermediates` and `forward_head`, our own small nets answer the same two
calls (`Staged`), and forward hooks on dotted module names serve any other `nn.Module` and any layer that is no stage.
"""

import math
from collections.abc import Sequence

from trainer.networks.features import Layer


def pair(student: Sequence[Layer], teacher: Sequence[Layer], image_size: int) -> list[tuple[Layer, Layer]]:
    """Which student layer looks at which teacher layer, without anybody typing it.

    Layers whose maps shrink (convolutional nets) are known by their stride: of each stride the deepest layer is
    taken, and pairs have the same stride, or the nearest one in octaves. Where either net keeps one size
    throughout (ViT, MLP, fully connected), layers are matched by their fraction of the depth.
    Each student layer appears once, shallow first, and teacher layers never go backwards.
    """
    if not student or not teacher:
        return []
    if _shrinks(student) and _shrinks(teacher):
        by_stride = {
            _octave(layer, image_size): layer for layer in teacher
        }  # a later layer replaces an earlier
        students = {_octave(layer, image_size): layer for layer in student}
        pairs = []
        for octave, layer in sorted(students.items()):
            nearest = min(by_stride, key=lambda o: (abs(o - octave), -o))
            pairs.append((layer, by_stride[nearest]))
        return pairs
    count = min(len(student), len(teacher), 4)
    return [(_at_depth(student, (i + 1) / count), _at_depth(teacher, (i + 1) / count)) for i in range(count)]


def _shrinks(layers: Sequence[Layer]) -> bool:
    return len({layer.shape[1] for layer in layers}) > 1


def _octave(layer: Layer, image_size: int) -> float:
    return round(math.log2(image_size / max(1, layer.shape[1])) * 2) / 2


def _at_depth(layers: Sequence[Layer], fraction: float) -> Layer:
    return layers[max(0, round(fraction * len(layers)) - 1)]
