"""What a network is trained for: the one module that is wrapped, optimised and saved.

The Objective owns the student, the projectors and every loss with learned parameters; the teacher is held beside it,
out of reach of DDP, optimizers, `state_dict` and `.train()`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from trainer import bind, compress, features
from trainer.context import Data
from trainer.features import Layer
from trainer.projectors import EmbeddingProjector, MapProjector, same_size
from trainer.teacher import Teacher, normalize

# What a loss may ask for, by what has to be computed for it.
MAPS = {"student_map", "teacher_map", "projected_map"}
MAP_LISTS = {"student_maps", "teacher_maps"}
EMBEDDINGS = {"student_embedding", "teacher_embedding", "projected_embedding"}
WEIGHTS = {"student_weight", "teacher_weight"}
OTHERS = {"student_logits", "teacher_logits", "labels", "index", "teacher_head", "epoch"}
VOCABULARY = MAPS | MAP_LISTS | EMBEDDINGS | WEIGHTS | OTHERS
TEACHER_WORDS = {w for w in VOCABULARY if w.startswith("teacher")} | {"projected_map", "projected_embedding"}

Names = Annotated[list[str | int], Field(min_length=1)]
At = Literal["auto", "last"] | Names | dict[str, str | int]


class WeightSchedule(bind.Entry):
    """A term's weight over the epochs of its stage: from `value` to `to`, over `epochs` (of the whole stage for None)."""

    value: NonNegativeFloat
    schedule: Literal["warm_up", "linear", "cosine"]
    epochs: PositiveFloat | None = None
    to: NonNegativeFloat | None = None

    def at(self, epoch: float, num_epochs: float) -> float:
        fraction = min(1.0, epoch / (self.epochs or num_epochs))
        if self.schedule == "warm_up":
            return self.value * fraction
        end = 0.0 if self.to is None else self.to
        if self.schedule == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return self.value + (end - self.value) * fraction


class TermKeys(bind.Entry):
    """One term of an objective. weight: a number or a schedule. at: which layers look at which, for losses on layers."""

    loss: str
    weight: NonNegativeFloat | WeightSchedule = 1.0
    at: At | None = None


Term = bind.from_shelf("loss", TermKeys)


def wants(term: TermKeys) -> list[str]:
    """The names that the term's loss asks to be fed."""
    return bind.fed(bind.find("loss", term.loss))


def needs_teacher(term: TermKeys) -> bool:
    return bool(TEACHER_WORDS & set(wants(term)))


class _Bound(nn.Module):
    """One loss at one pair of layers (or at none): its function and projector, and what it asks for."""

    def __init__(self, name: str, function, asks: list[str], pairs: list[tuple[Layer, Layer]], weight) -> None:
        super().__init__()
        self.name, self.function, self.asks, self.pairs, self.weight = name, function, asks, pairs, weight
        self.projector: nn.Module | None = None


class Objective(nn.Module):
    """The student with everything that is trained beside it; its forward gives the losses of one batch.

    terms: what is asked of the student. Without a teacher only losses on labels are possible. A loss on layers has one
    term a pair, and they add up. Raises ValueError for a layer that does not exist, pairs that cannot be made, a
    teacher that is missing or that knows another number of classes.
    prepare: what turns images in [0, 1] into what the student sees; the data's normalisation when not given.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Sequence[TermKeys],
        data: Data,
        teacher: Teacher | None = None,
        num_epochs: float = 1.0,
        device: torch.device | str = "cpu",
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        object.__setattr__(self, "teacher", teacher)  # not a submodule: see the module's docstring
        self.num_epochs = num_epochs
        self.prepare = prepare or (lambda images: normalize(images, data.mean, data.std))
        self._layers: tuple[list[str], list[str]] = ([], [])
        self._embedding = (False, False)
        self.bound = nn.ModuleList()
        if teacher is None:
            for term in terms:
                if needs_teacher(term):
                    raise ValueError(f"loss {term.loss!r} needs a teacher, and there is none")
        self._build(terms, data, device)
        self.to(device)

    def _build(self, terms: Sequence[TermKeys], data: Data, device) -> None:
        asked = set().union(*(wants(term) for term in terms))
        images = torch.rand(2, *data.shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.student.to(device)
        mine, theirs, example = [], [], {}
        if (MAPS | MAP_LISTS) & asked:
            mine = features.look(self.student, self.prepare(images))
            if self.teacher is not None:
                theirs = features.look(self.teacher.network, self.teacher.prepare(images))
        was_training = self.student.training
        self.student.eval()
        with torch.no_grad():
            seen = features.see(self.student, self.prepare(images), embedding=bool(EMBEDDINGS & asked))
            example = {"student_logits": seen.logits, "student_embedding": seen.embedding}
            if self.teacher is not None:
                taught = self.teacher.see(images, embedding=bool(EMBEDDINGS & asked))
                example |= {"teacher_logits": taught.logits, "teacher_embedding": taught.embedding}
                if taught.logits.shape != seen.logits.shape:
                    raise ValueError(
                        f"the teacher knows {taught.logits.shape[1]} classes and the student {seen.logits.shape[1]}"
                    )
        self.student.train(was_training)
        counts: dict[str, int] = {}
        for term in terms:
            counts[term.loss] = counts.get(term.loss, 0) + 1
            name = term.loss if counts[term.loss] == 1 else f"{term.loss}_{counts[term.loss]}"
            self._bind(term, name, mine, theirs, example, data)
        student_layers = list(dict.fromkeys(a.name for b in self.bound for a, _ in b.pairs if not WEIGHTS & set(b.asks)))
        teacher_layers = list(dict.fromkeys(t.name for b in self.bound for _, t in b.pairs if not WEIGHTS & set(b.asks)))
        asks = {word for b in self.bound for word in b.asks}
        self._layers = (student_layers, teacher_layers if (TEACHER_WORDS & asks) else [])
        self._embedding = (
            bool({"student_embedding", "projected_embedding"} & asks),
            bool({"teacher_embedding"} & asks),
        )
        self._asks = asks

    def _bind(self, term: TermKeys, name: str, mine: list[Layer], theirs: list[Layer], example: dict, data: Data) -> None:
        function, asks = bind.find("loss", term.loss), wants(term)
        settings = bind.own_settings(term, TermKeys)
        if WEIGHTS & set(asks):
            pairs = weight_pairs(self.student, self.teacher.network, term.at)
        elif (MAPS | MAP_LISTS) & set(asks):
            pairs = choose_pairs(mine, theirs, term.at, data, self.student, self.teacher, self.prepare)
        else:
            pairs = []
        groups = [pairs] if MAP_LISTS & set(asks) or not pairs else [[pair] for pair in pairs]
        for group in groups:
            one_layer = len(group) == 1 and not MAP_LISTS & set(asks)
            full_name = f"{name}/{group[0][0].name}" if one_layer else name
            shapes = {k: v.shape for k, v in example.items() if v is not None} | _map_shapes(group, asks)
            loss = function
            if inspect.isclass(function):
                shapes |= {"num_samples": data.num_samples, "num_classes": len(data.classes)}
                loss = function(*(shapes[word] for word in bind.built_with(function)), **settings)
            else:
                loss = _With(function, settings)
            bound = _Bound(full_name, loss, asks, group, term.weight)
            if "projected_map" in asks:
                bound.projector = MapProjector(group[0][0].shape[0], group[0][1].shape[0])
            if "projected_embedding" in asks:
                bound.projector = EmbeddingProjector(shapes["student_embedding"][1], shapes["teacher_embedding"][1])
            self.bound.append(bound)

    def forward(
        self, images: Tensor, labels: Tensor, index: Tensor, view: int | None = None, epoch: float = 0.0
    ) -> dict[str, Tensor]:
        """Losses of a batch: {"loss": the weighted sum, and each term by name, unweighted}.

        images: [N, C, H, W] in [0, 1], augmented. labels: [N], or [N, K] for mixed images. index: [N] sample ids.
        view: the number of the augmented view, None when the images were mixed and no record of them can be kept.
        """
        student = features.see(self.student, self.prepare(images), self._layers[0], self._embedding[0])
        teacher = None
        if TEACHER_WORDS & self._asks - WEIGHTS:
            teacher = self._see_teacher(images, index, view)
        if student.logits.dtype == torch.float16 or student.logits.dtype == torch.bfloat16:
            student = student._replace(logits=student.logits.float())
        terms: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for bound in self.bound:
            value = bound.function(*self._feed(bound, student, teacher, labels, index, epoch))
            terms[bound.name] = value
            weight = bound.weight if isinstance(bound.weight, float) else bound.weight.at(epoch, self.num_epochs)
            total = total + weight * value
        return {"loss": total, **terms}

    def _see_teacher(self, images: Tensor, index: Tensor, view: int | None) -> features.Seen:
        cache = self.teacher.cache
        if cache is None or view is None or self._layers[1] or self._embedding[1] and not cache.embeddings:
            return self.teacher.see(images, self._layers[1], self._embedding[1])
        return cache.see(self.teacher, images, index, view)

    def _feed(self, bound: _Bound, student, teacher, labels: Tensor, index: Tensor, epoch: float) -> list[Any]:
        available: dict[str, Any] = {"labels": labels, "index": index, "epoch": epoch}
        available["student_logits"], available["student_embedding"] = student.logits, student.embedding
        if teacher is not None:
            available["teacher_logits"], available["teacher_embedding"] = teacher.logits, teacher.embedding
        if "teacher_head" in bound.asks:
            available["teacher_head"] = features.head(self.teacher.network)
        if WEIGHTS & set(bound.asks):
            (mine, theirs), = bound.pairs
            available["student_weight"] = compress.weights(self.student)[mine.name].value
            available["teacher_weight"] = compress.weights(self.teacher.network)[theirs.name].value
        elif bound.pairs:
            student_maps = [student.maps[mine.name] for mine, _ in bound.pairs]
            available |= {"student_maps": student_maps, "student_map": student_maps[0]}
            if teacher is not None and self._layers[1]:
                teacher_maps = [teacher.maps[theirs.name] for _, theirs in bound.pairs]
                available |= {"teacher_maps": teacher_maps, "teacher_map": teacher_maps[0]}
                if "projected_map" in bound.asks:
                    # Pooling first: the 1x1 convolution commutes with it and is then the smaller work.
                    student_map, available["teacher_map"] = same_size(student_maps[0], teacher_maps[0])
                    available["projected_map"] = bound.projector(student_map)
        if "projected_embedding" in bound.asks:
            available["projected_embedding"] = bound.projector(student.embedding)
        return [available[word] for word in bound.asks]

    def pairs(self) -> list[dict[str, Any]]:
        """The table of paired layers: term, student layer and shape, teacher layer and shape, projector."""
        return [
            {"term": b.name, "student": mine.name, "student_shape": mine.shape, "teacher": theirs.name,
             "teacher_shape": theirs.shape, "projector": type(b.projector).__name__ if b.projector else "-"}
            for b in self.bound for mine, theirs in b.pairs
        ]

    def learned(self) -> dict[str, Tensor]:
        """What was learned beside the student: projectors and the losses' own parameters and buffers, by term."""
        return {
            f"{bound.name}.{key}": tensor.detach().clone()
            for bound in self.bound for key, tensor in bound.state_dict().items()
        }

    def recall(self, learned: Mapping[str, Tensor]) -> None:
        """Takes up what an earlier stage's terms of the same names and sizes had learned; others start afresh.

        A projector that starts at random would first drag the student's maps after it.
        """
        for bound in self.bound:
            state = bound.state_dict()
            known = {key: learned.get(f"{bound.name}.{key}") for key in state}
            if all(t is not None and t.shape == state[key].shape for key, t in known.items()):
                bound.load_state_dict(known)

    def finish(self) -> None:
        """After training: a loss that leaves something in the student (a folded classifier) does it now."""
        for bound in self.bound:
            if hasattr(bound.function, "finish"):
                bound.function.finish(self.student, features.head(self.teacher.network))


class _With(nn.Module):
    """A loss function with its settings; a module only so that all terms are held alike."""

    def __init__(self, function, settings: dict) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *fed: Any) -> Tensor:
        return self.function(*fed, **self.settings)


def _map_shapes(group: list[tuple[Layer, Layer]], asks: list[str]) -> dict[str, Any]:
    if not group or WEIGHTS & set(asks):
        return {}
    student_maps = [torch.Size((2, *mine.shape)) for mine, _ in group]
    teacher_maps = [torch.Size((2, *theirs.shape)) for _, theirs in group]
    return {"student_maps": student_maps, "teacher_maps": teacher_maps,
            "student_map": student_maps[0], "teacher_map": teacher_maps[0]}


def choose_pairs(
    mine: list[Layer], theirs: list[Layer], at: At | None, data: Data,
    student: nn.Module, teacher: Teacher | None, prepare: Callable[[Tensor], Tensor],
) -> list[tuple[Layer, Layer]]:
    """The pairs of layers that `at` means. Names are stages, dotted module names, or numbers of stages (from 0)."""
    if teacher is None:
        raise ValueError("there are no layers to pair: the recipe has no teacher")
    at = "auto" if at is None else at
    image_size = data.shape[1]
    automatic = features.pair(mine, theirs, image_size)
    if at in ("auto", "last"):
        if not automatic:
            raise ValueError("no layers can be paired by themselves: name them with at: {student layer: teacher layer}")
        return automatic if at == "auto" else automatic[-1:]
    device = next(student.parameters()).device
    images = torch.rand(2, *data.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def layer(net: nn.Module, who: str, known: list[Layer], name: str | int, prepared) -> Layer:
        if isinstance(name, int) or name.lstrip("-").isdigit():
            number = int(name)
            if not -len(known) <= number < len(known):
                raise ValueError(f"at: {who} has no stage {number}; it has {len(known)}")
            return known[number]
        found = {candidate.name: candidate for candidate in known}
        if name in found:
            return found[name]
        if name not in dict(net.named_modules()):
            raise ValueError(f"at: {who} has no layer {name!r}{bind.nearest(name, found)}")
        return features.look(net, prepared(images), [name])[0]

    def of_student(name: str | int) -> Layer:
        return layer(student, "student", mine, name, prepare)

    def of_teacher(name: str | int) -> Layer:
        return layer(teacher.network, "teacher", theirs, name, teacher.prepare)

    if isinstance(at, dict):
        return [(of_student(a), of_teacher(b)) for a, b in at.items()]
    pairs = []
    for name in at:
        chosen = of_student(name)
        if chosen.name in {t.name for t in theirs} and not isinstance(name, int):
            pairs.append((chosen, of_teacher(chosen.name)))
        else:
            candidates = dict((a.name, b) for a, b in features.pair([*mine], theirs, image_size))
            partner = candidates.get(chosen.name) or features.pair([chosen, *mine[-1:]], theirs, image_size)[0][1]
            pairs.append((chosen, partner))
    return pairs


def weight_pairs(student: nn.Module, teacher: nn.Module, at: At | None) -> list[tuple[Layer, Layer]]:
    """Pairs of layers whose weights are compared: by name where `at` names them, else by fraction of the depth."""
    mine, theirs = list(compress.weights(student)), list(compress.weights(teacher))

    def layer(name: str | int, known: list[str], who: str) -> Layer:
        if isinstance(name, int):
            if not -len(known) <= name < len(known):
                raise ValueError(f"at: {who} has no weight number {name}; it has {len(known)}")
            name = known[name]
        if name not in known:
            raise ValueError(f"at: {who} has no layer {name!r}{bind.nearest(name, known)}")
        return Layer(name, ())

    def partner(name: str) -> str:
        place = mine.index(name) / max(1, len(mine) - 1)
        return name if name in theirs else theirs[round(place * (len(theirs) - 1))]

    if isinstance(at, dict):
        return [(layer(a, mine, "student"), layer(b, theirs, "teacher")) for a, b in at.items()]
    if at in (None, "auto"):
        count = min(len(mine), len(theirs))
        spread = [round(i * (len(theirs) - 1) / max(1, count - 1)) for i in range(count)]
        spread_mine = [round(i * (len(mine) - 1) / max(1, count - 1)) for i in range(count)]
        return [(Layer(mine[a], ()), Layer(theirs[b], ())) for a, b in zip(spread_mine, spread, strict=True)]
    chosen = [mine[-1]] if at == "last" else [layer(name, mine, "student").name for name in at]
    return [(Layer(name, ()), Layer(partner(name), ())) for name in chosen]
