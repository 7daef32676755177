"""Pairs layers of the student with layers of the teacher."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from trainer.compression.weights import weights_of
from trainer.distillation.examine import Networks
from trainer.mistakes import Mistake, closest, nearest
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.recipe.keys import At, Name


def pair(student: Sequence[Layer], teacher: Sequence[Layer], image_size: int) -> list[tuple[Layer, Layer]]:
    """Pairs the layers of two networks automatically, by stride or by depth.

    If the maps of both networks shrink (convolutional networks), the deepest layer of each of the student's strides is
    paired with the teacher's deepest layer of that stride, or of the nearest one in octaves. If a network has one size
    throughout (ViT, MLP, fully connected), up to 4 layers are matched by their fraction of the depth. Each student layer
    appears once, shallow first, and teacher layers never go backwards. image_size: height of the images.
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


def map_pairs(networks: Networks, at: At | None) -> list[tuple[Layer, Layer]]:
    """Returns the pairs of layers whose maps are compared: as `at` names them, else by stride or depth.

    Raises Mistake for a layer that does not exist, one that is named twice, and networks that cannot be paired.
    """
    known, of_teacher = networks.student_layers, networks.teacher_layers
    image_size = networks.images.shape[2]
    if at is None or isinstance(at, str):
        pairs = pair(known, of_teacher, image_size)
        if not pairs:
            raise Mistake(
                "at: no layers can be paired by themselves; name them, at: {student layer: teacher layer}"
            )
        return pairs[-1:] if at == "last" else pairs

    def student_layer(name: Name) -> Layer:
        return _choose(networks.student, "student", known, name, lambda: networks.prepare(networks.images))

    def teacher_layer(name: Name) -> Layer:
        teacher = networks.teacher
        assert teacher is not None
        return _choose(teacher.network, "teacher", of_teacher, name, lambda: teacher.prepare(networks.images))

    if isinstance(at, dict):
        return _each_once([(student_layer(a), teacher_layer(b)) for a, b in at.items()])
    pairs = []
    for name in at:
        layer = student_layer(name)
        if isinstance(name, str) and name in {other.name for other in of_teacher}:
            pairs.append((layer, teacher_layer(name)))
        else:
            pairs.append((layer, _partner(layer, known, of_teacher, networks.student, image_size)))
    return _each_once(pairs)


def _each_once(pairs: list[tuple[Layer, Layer]]) -> list[tuple[Layer, Layer]]:
    names = [layer.name for layer, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise Mistake(f"at: names the student's layer {name!r} more than once")
    return pairs


def _choose(
    network: nn.Module, who: str, known: Sequence[Layer], name: Name, prepared: Callable[[], Tensor]
) -> Layer:
    """Returns the layer that a name means: a block's name or number, a module's dotted name, or NAME:input."""
    if isinstance(name, int):
        if not -len(known) <= name < len(known):
            raise Mistake(f"at: {who} has no block {name}; it has {len(known)}, counted from 0")
        return known[name]
    for layer in known:
        if layer.name == name:
            return layer
    modules = [path for path, _ in network.named_modules() if path]
    if features.module_of(name) not in modules:
        blocks = [layer.name for layer in known]
        near = closest(name, blocks + modules)
        raise Mistake(f"at: {who} has no layer {name!r}{nearest(name, [near] if near else blocks)}")
    try:
        return features.look(network, prepared(), [name])[0]
    except Mistake as error:
        raise Mistake(f"at: {who}: {error}") from None


def _partner(
    layer: Layer,
    student_layers: Sequence[Layer],
    teacher_layers: Sequence[Layer],
    student: nn.Module,
    image_size: int,
) -> Layer:
    """Returns the teacher's layer for a student's layer that is named alone: of the same stride, or depth."""
    if _shrinks(student_layers) and _shrinks(teacher_layers):
        others = [other for other in student_layers if other.shape[1] != layer.shape[1]]
        return {a.name: b for a, b in pair([*others, layer], teacher_layers, image_size)}[layer.name]
    names = [other.name for other in student_layers]
    if layer.name not in names:
        names = [path for path, _ in student.named_modules() if path]
    place = names.index(features.module_of(layer.name) if layer.name not in names else layer.name)
    return _at_depth(teacher_layers, (place + 1) / len(names))


def weight_pairs(student: nn.Module, teacher: nn.Module, at: At | None) -> list[tuple[Layer, Layer]]:
    """Returns the pairs of layers whose weights are compared: as `at` names them, else by fraction of the depth.

    The layers' shapes are those of their weights. Raises Mistake for a layer that does not exist.
    """
    of_student, of_teacher = _weight_layers(student, "student"), _weight_layers(teacher, "teacher")

    def at_depth(layer: Layer) -> Layer:
        return of_teacher[
            round(of_student.index(layer) / max(1, len(of_student) - 1) * (len(of_teacher) - 1))
        ]

    if isinstance(at, dict):
        return _each_once(
            [
                (_choose_weight(a, of_student, "student"), _choose_weight(b, of_teacher, "teacher"))
                for a, b in at.items()
            ]
        )
    if at == "last":
        return [(of_student[-1], of_teacher[-1])]
    if at in (None, "auto"):
        count = min(len(of_student), len(of_teacher))
        steps = [i / max(1, count - 1) for i in range(count)]
        return [
            (of_student[round(step * (len(of_student) - 1))], of_teacher[round(step * (len(of_teacher) - 1))])
            for step in steps
        ]
    chosen = [_choose_weight(name, of_student, "student") for name in at]
    by_name = {layer.name: layer for layer in of_teacher}
    return _each_once([(layer, by_name.get(layer.name) or at_depth(layer)) for layer in chosen])


def _weight_layers(network: nn.Module, who: str) -> list[Layer]:
    layers = [Layer(name, tuple(weight.value.shape)) for name, weight in weights_of(network).items()]
    if not layers:
        raise Mistake(f"at: {who} has no weights of two dimensions or more")
    return layers


def _choose_weight(name: Name, known: list[Layer], who: str) -> Layer:
    if isinstance(name, int):
        if not -len(known) <= name < len(known):
            raise Mistake(f"at: {who} has no weight number {name}; it has {len(known)}, counted from 0")
        return known[name]
    for layer in known:
        if layer.name == name:
            return layer
    raise Mistake(f"at: {who} has no weights in {name!r}{nearest(name, [layer.name for layer in known])}")
