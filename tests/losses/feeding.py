"""Losses and what they are fed: made-up tensors for every word of the vocabulary, so that any file of the shelf can be run."""

import copy
import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from trainer.recipe import shelves
from trainer.recipe.terms import MAP_LISTS, MAPS

NUM_CLASSES, NUM_SAMPLES, STUDENT_WIDTH, TEACHER_WIDTH = 5, 23, 7, 11
SHAPES = {
    "student_logits": (NUM_CLASSES,),
    "teacher_logits": (NUM_CLASSES,),
    "student_map": (3, 6, 5),
    "teacher_map": (5, 4, 7),
    "projected_map": (5, 4, 7),
    "student_maps": [(3, 9, 8), (4, 6, 6), (6, 2, 3)],
    "teacher_maps": [(5, 7, 8), (4, 6, 3), (7, 3, 2)],
    "student_embedding": (STUDENT_WIDTH,),
    "teacher_embedding": (TEACHER_WIDTH,),
    "projected_embedding": (TEACHER_WIDTH,),
}
WEIGHT_SHAPES = {"student_weight": (4, 3, 3, 3), "teacher_weight": (40, 9)}
OF_STUDENT = {word for word in SHAPES | WEIGHT_SHAPES if not word.startswith("teacher")}
OF_TEACHER = {word for word in SHAPES | WEIGHT_SHAPES if word.startswith("teacher")}
PER_SAMPLE = {*SHAPES, "labels", "index"}
KEYS = (1, 0.5, True)  # one of these fits a key that must be given
REFERENCES = [
    importlib.import_module(f"tests.losses.{file.stem}")
    for file in sorted(Path(__file__).parent.glob("references_*.py"))
]


class Case(NamedTuple):
    """A loss, settings that are not its defaults, and shapes that are not those above."""

    name: str
    settings: dict = {}
    shapes: dict = {}


def cases() -> list[Case]:
    """Every file of the shelf as it is, and once more for each of the MORE settings beside its reference."""
    more = {name: tried for file in REFERENCES for name, tried in file.MORE.items()}
    return [Case(name, *given) for name in shelves.names("loss") for given in [({},), *more.get(name, [])]]


def reference(name: str):
    """`naive_NAME` of a file references_*.py, if there is one."""
    return next((found for file in REFERENCES if (found := getattr(file, f"naive_{name}", None))), None)


def words(name: str) -> list[str]:
    return shelves.fed(shelves.find("loss", name))


def students(name: str) -> list[str]:
    """The words whose tensors teach the student."""
    return [word for word in words(name) if word in OF_STUDENT]


def fed_maps(name: str) -> bool:
    return bool((MAPS | MAP_LISTS) & set(words(name)))


def feed(case: Case | None = None, batch: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Something for every word: maps of deviation 1, the rest of deviation 2."""
    draw = torch.Generator().manual_seed(seed)

    def made(shape):
        if isinstance(shape, list):
            return [made(one) for one in shape]
        deviation = 1 if len(shape) == 4 else 2
        return (deviation * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    shapes = SHAPES | (case.shapes if case else {})
    x = {
        word: made([(batch, *one) for one in shape] if isinstance(shape, list) else (batch, *shape))
        for word, shape in shapes.items()
    }
    x |= {word: made(shape) for word, shape in WEIGHT_SHAPES.items()}
    teacher_head = nn.Linear(TEACHER_WIDTH, NUM_CLASSES).to(dtype).requires_grad_(False)
    for parameter in teacher_head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return x | {
        "labels": torch.randint(NUM_CLASSES, (batch,), generator=draw),
        "index": torch.randperm(NUM_SAMPLES, generator=draw)[:batch],
        "class_weights": None,
        "teacher_head": teacher_head,
        "epoch": 4.0,
    }


def mapped(function, value):
    """`function` of a tensor, or of each tensor of a list."""
    return [function(tensor) for tensor in value] if isinstance(value, list) else function(value)


def changed(x: dict, function, among=OF_STUDENT | OF_TEACHER) -> dict:
    return {word: mapped(function, value) if word in among else value for word, value in x.items()}


def build(case: Case | str, dtype: torch.dtype = torch.float32, x: dict | None = None, **settings):
    """The loss as a function of what it is fed; a module has its own seed and parameters away from ones and zeros."""
    case = Case(case) if isinstance(case, str) else case
    function = shelves.find("loss", case.name)
    settings = required(function) | case.settings | settings
    if not inspect.isclass(function):
        return lambda *fed: function(*fed, **settings)
    x = x or feed(case)
    given = changed(x, lambda tensor: tensor.shape) | {"num_samples": NUM_SAMPLES, "num_classes": NUM_CLASSES}
    torch.manual_seed(1)
    loss = function(*(given[word] for word in shelves.built_with(function)), **settings)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return loss.to(dtype)


def required(function) -> dict:
    """The first of KEYS that its type allows, for each key that has no default."""
    found = {}
    for key, (kind, default) in shelves.fields(function).items():
        for value in KEYS if default is ... else ():
            try:
                found[key] = TypeAdapter(kind).validate_python(value)
                break
            except ValidationError:
                continue
        else:
            assert default is not ..., f"give KEYS a value for {function.__name__}'s {key}"
    return found


def call(case: Case | str, loss, x: dict) -> Tensor:
    torch.manual_seed(3)  # for what a loss draws
    return loss(*(x[word] for word in words(case if isinstance(case, str) else case.name)))


def parameters(loss) -> list[nn.Parameter]:
    return list(loss.parameters()) if isinstance(loss, nn.Module) else []


def tensors(name: str, x: dict, among=OF_STUDENT) -> list[Tensor]:
    """Every tensor that the loss is fed under one of the words."""
    values = [x[word] for word in words(name) if word in among]
    return [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]


def backward(case: Case, loss, x: dict, autocast: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """The value, and the gradients of the student's tensors and then of the loss's own parameters."""
    x = changed(x, lambda tensor: tensor.detach().requires_grad_(), OF_STUDENT)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = call(case, loss, x)
    assert value.shape == (), "a loss is one number"
    wanted = tensors(case.name, x) + parameters(loss)
    scale = (
        2**10 if autocast == torch.float16 else 1
    )  # small gradients vanish in float16, so trainings scale them
    return value.detach(), [gradient / scale for gradient in torch.autograd.grad(scale * value, wanted)]


def naive(case: Case, loss, x: dict) -> float:
    """The reference's value. It is given maps in float64, all else as nested lists of floats; what is drawn is drawn again."""
    loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else None
    given = changed(x, Tensor.double, MAPS | MAP_LISTS)
    given = changed(given, Tensor.tolist, {*OF_STUDENT, *OF_TEACHER, "labels", "index"} - MAPS - MAP_LISTS)
    torch.manual_seed(3)
    with torch.no_grad():
        return float(reference(case.name)(given, loss, **case.settings))
