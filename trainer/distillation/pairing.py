"""What a network sees: logits, pooled embedding and feature maps of one forward pass.

timm's networks are read through `forward_intermediates` and `forward_head`, our own small nets answer the same two
calls (`Staged`), and forward hooks on dotted module names serve any other `nn.Module` and any layer that is no stage.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from trainer.compression.weights import weights_of
from trainer.distillation import pairing
from trainer.mistakes import Mistake, closest, nearest
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.recipe.keys import At, Name


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


def each_once(pairs: list[tuple[Layer, Layer]]) -> list[tuple[Layer, Layer]]:
    names = [mine.name for mine, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise Mistake(f"at: names the student's layer {name!r} more than once")
    return pairs


def choose_layer(
    network: nn.Module, who: str, known: Sequence[Layer], name: Name, prepared: Callable[[], Tensor]
) -> Layer:
    """The layer that a name means: a stage's name or number, or a module of the forward pass."""
    if isinstance(name, int):
        if not -len(known) <= name < len(known):
            raise Mistake(f"at: {who} has no stage {name}; it has {len(known)}, counted from 0")
        return known[name]
    for layer in known:
        if layer.name == name:
            return layer
    modules = [path for path, _ in network.named_modules() if path]
    if name not in modules:
        stages = [layer.name for layer in known]
        near = closest(name, stages + modules)
        raise Mistake(f"at: {who} has no layer {name!r}{nearest(name, [near] if near else stages)}")
    try:
        return features.look(network, prepared(), [name])[0]
    except Mistake as error:
        raise Mistake(f"at: {who}: {error}") from None


def partner(
    layer: Layer, mine: Sequence[Layer], theirs: Sequence[Layer], student: nn.Module, image_size: int
) -> Layer:
    """The teacher's stage for a student's layer that is named alone: of the same stride, or depth."""
    if all(len({other.shape[1] for other in layers}) > 1 for layers in (mine, theirs)):  # both shrink
        others = [other for other in mine if other.shape[1] != layer.shape[1]]
        return {a.name: b for a, b in pairing.pair([*others, layer], theirs, image_size)}[layer.name]
    names = [other.name for other in mine]
    if layer.name not in names:
        names = [path for path, _ in student.named_modules() if path]
    depth = (names.index(layer.name) + 1) / len(names)
    return theirs[max(0, round(depth * len(theirs)) - 1)]


def weight_pairs(student: nn.Module, teacher: nn.Module, at: At | None) -> list[tuple[Layer, Layer]]:
    """Pairs of layers whose weights are compared: as `at` names them, else by fraction of the depth.

    The shapes told are the weights'. Raises Mistake for a layer that does not exist.
    """
    mine, theirs = (
        [Layer(name, tuple(place.value.shape)) for name, place in weights_of(net).items()]
        for net in (student, teacher)
    )
    if not mine or not theirs:
        raise Mistake(f"at: {'student' if not mine else 'teacher'} has no weights of two dimensions or more")

    def choose(name: Name, known: list[Layer], who: str) -> Layer:
        if isinstance(name, int):
            if not -len(known) <= name < len(known):
                raise Mistake(f"at: {who} has no weight number {name}; it has {len(known)}, counted from 0")
            return known[name]
        found = [layer for layer in known if layer.name == name]
        if not found:
            raise Mistake(
                f"at: {who} has no weights in {name!r}{nearest(name, [layer.name for layer in known])}"
            )
        return found[0]

    def at_depth(layer: Layer) -> Layer:
        return theirs[round(mine.index(layer) / max(1, len(mine) - 1) * (len(theirs) - 1))]

    if isinstance(at, dict):
        return each_once([(choose(a, mine, "student"), choose(b, theirs, "teacher")) for a, b in at.items()])
    if at == "last":
        return [(mine[-1], theirs[-1])]
    if at in (None, "auto"):
        count = min(len(mine), len(theirs))
        steps = [i / max(1, count - 1) for i in range(count)]
        return [
            (mine[round(step * (len(mine) - 1))], theirs[round(step * (len(theirs) - 1))]) for step in steps
        ]
    chosen = [choose(name, mine, "student") for name in at]
    by_name = {layer.name: layer for layer in theirs}
    return each_once([(layer, by_name.get(layer.name) or at_depth(layer)) for layer in chosen])
