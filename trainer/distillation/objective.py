"""What a network is trained for: the one module that is wrapped, optimised and saved.

The Objective owns the student, the projectors and every loss with learned parameters; the teacher is held
beside it, out of reach of DDP, optimizers, `state_dict` and `.train()`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression.weights import weights_of
from trainer.data.images import Data, normalize
from trainer.distillation import pairing
from trainer.distillation.answers import Answers
from trainer.distillation.bound import Bound, WithSettings, map_shapes
from trainer.distillation.pairing import choose_layer, each_once, partner, weight_pairs
from trainer.distillation.teacher import Teacher
from trainer.distributed import summed
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.projectors import EmbeddingProjector, MapProjector
from trainer.recipe import shelves
from trainer.recipe.keys import At, Name, TermKeys
from trainer.recipe.terms import EMBEDDINGS, MAP_LISTS, MAPS, TEACHER_WORDS, WEIGHTS, needs_teacher, wants
from trainer.tensors import same_size


class Objective(nn.Module):
    """The student with everything that is trained beside it; its forward gives the losses of one batch.

    terms: what is asked of the student. Without a teacher only losses on labels are possible. A loss on
    layers has one term a pair, and they add up; a loss on lists of maps has one for all its pairs. Raises
    Mistake for a layer that does not exist, pairs that cannot be made, a teacher that is missing, and
    networks that do not give one logit for each class of the data. penalties: terms on the student's weights
    alone, {name: (weight, function of nothing)}. num_epochs: of the stage, for the weights' schedules.
    cache: the teacher's kept answers; without them it is asked each time.
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
        penalties: Mapping[str, tuple[float, Callable[[], Tensor]]] = {},
        cache: Answers | None = None,
    ) -> None:
        super().__init__()
        if not terms:
            raise Mistake("losses: there are none; at least one is needed")
        for term in terms:
            if teacher is None and needs_teacher(term):
                raise Mistake(f"loss {term.loss!r} needs a teacher, and there is none")
        self.student = student
        self.teacher = (
            teacher  # no nn.Module, so nothing of it is registered here: see the module's docstring
        )
        self.cache = cache
        self.num_epochs = num_epochs
        self.penalties = dict(penalties)
        self.prepare = prepare or (lambda images: normalize(images, data.mean, data.std))
        self.bound = nn.ModuleList()
        self._build(terms, data, torch.device(device))
        asks = {word for bound in self.bound for word in bound.asks}
        mine = [mine.name for mine, _ in self._looks({"student_map", "student_maps", "projected_map"})]
        theirs = [theirs.name for _, theirs in self._looks({"teacher_map", "teacher_maps", "projected_map"})]
        self._see_student = (
            list(dict.fromkeys(mine)),
            bool({"student_embedding", "projected_embedding"} & asks),
        )
        self._see_teacher = list(dict.fromkeys(theirs)), "teacher_embedding" in asks
        self._asks_teacher = bool(TEACHER_WORDS & asks - WEIGHTS)
        if self._asks_teacher:
            teacher.make_ready()  # now, not in the first step, which torch.compile would compile with it
        self._teacher_images = 0
        self._ids = data.train.ids.to(device) if "index" in asks else None
        self.to(device)

    def _looks(self, words: set[str]) -> list[tuple[Layer, Layer]]:
        """The pairs of the losses that ask for one of the words."""
        return [pair for bound in self.bound if words & set(bound.asks) for pair in bound.pairs]

    def _build(self, terms: Sequence[TermKeys], data: Data, device: torch.device) -> None:
        asked = set().union(*(wants(term) for term in terms))
        images = example_images(data, device)
        self.student.to(device)
        embedding = bool(EMBEDDINGS & asked)
        seen = _look(self.student, self.prepare(images), embedding, len(data.classes), "the student")
        example = {"student_logits": seen.logits, "student_embedding": seen.embedding}
        if self.teacher is not None:
            for number, network in enumerate(self.teacher.networks):
                who = "the teacher" if len(self.teacher.networks) == 1 else f"teachers[{number}]"
                taught = _look(
                    network,
                    self.teacher.prepare(images, number),
                    embedding and number == 0,
                    len(data.classes),
                    who,
                )
                if number == 0:
                    example |= {"teacher_logits": taught.logits, "teacher_embedding": taught.embedding}
        finishes = any(hasattr(shelves.find("loss", term.loss), "finish") for term in terms)
        if "teacher_head" in asked or finishes:
            _check_head(self.teacher.network, self.teacher.prepare(images), "the teacher")
        if finishes:
            _check_head(self.student, self.prepare(images), "the student")
        known: tuple[list[Layer], list[Layer]] = ([], [])
        if (MAPS | MAP_LISTS) & asked:
            known = (
                features.look(self.student, self.prepare(images)),
                features.look(self.teacher.network, self.teacher.prepare(images)),
            )
        counts: dict[str, int] = {}
        for term in terms:
            counts[term.loss] = counts.get(term.loss, 0) + 1
            name = term.loss if counts[term.loss] == 1 else f"{term.loss}_{counts[term.loss]}"
            self._bind(
                term,
                name,
                known,
                {word: t.shape for word, t in example.items() if t is not None},
                images,
                data,
            )

    def _bind(
        self,
        term: TermKeys,
        name: str,
        known: tuple[list[Layer], list[Layer]],
        shapes: dict[str, Any],
        images: Tensor,
        data: Data,
    ) -> None:
        function, asks = shelves.find("loss", term.loss), wants(term)
        settings = shelves.own_settings(term, TermKeys)
        pairs: list[tuple[Layer, Layer]] = []
        if WEIGHTS & set(asks):
            pairs = weight_pairs(self.student, self.teacher.network, term.at)
        elif (MAPS | MAP_LISTS) & set(asks):
            pairs = self._map_pairs(*known, term.at, images)
        elif term.at is not None:
            raise Mistake(f"at: loss {term.loss!r} looks at no layers (it wants {', '.join(asks)})")
        alone = not MAP_LISTS & set(asks)
        for group in [[pair] for pair in pairs] if pairs and alone else [pairs]:
            if group and not WEIGHTS & set(asks):
                shapes = shapes | map_shapes(group)
            if inspect.isclass(function):
                given = shapes | {"num_samples": len(data.train), "num_classes": len(data.classes)}
                loss = function(*(given[word] for word in shelves.built_with(function)), **settings)
            else:
                loss = WithSettings(function, settings)
            bound = Bound(
                f"{name}/{group[0][0].name}" if group and alone else name, loss, asks, group, term.weight
            )
            if "projected_map" in asks:
                bound.projector = MapProjector(group[0][0].shape[0], group[0][1].shape[0])
            if "projected_embedding" in asks:
                bound.projector = EmbeddingProjector(
                    shapes["student_embedding"][1], shapes["teacher_embedding"][1]
                )
            if WEIGHTS & set(asks):
                ((mine, theirs),) = group
                bound.places = (
                    weights_of(self.student)[mine.name],
                    weights_of(self.teacher.network)[theirs.name],
                )
            if hasattr(loss, "finish"):
                # What it will refuse after the training it should refuse now.
                loss.to(images.device).finish(
                    copy.deepcopy(self.student), features.head(self.teacher.network)
                )
            self.bound.append(bound)

    def _map_pairs(
        self, mine: list[Layer], theirs: list[Layer], at: At | None, images: Tensor
    ) -> list[tuple[Layer, Layer]]:
        if at is None or isinstance(at, str):
            pairs = pairing.pair(mine, theirs, images.shape[2])
            if not pairs:
                raise Mistake(
                    "at: no layers can be paired by themselves; name them, at: {student layer: teacher layer}"
                )
            return pairs[-1:] if at == "last" else pairs

        def of_student(name: Name) -> Layer:
            return choose_layer(self.student, "student", mine, name, lambda: self.prepare(images))

        def of_teacher(name: Name) -> Layer:
            return choose_layer(
                self.teacher.network, "teacher", theirs, name, lambda: self.teacher.prepare(images)
            )

        if isinstance(at, dict):
            return each_once([(of_student(a), of_teacher(b)) for a, b in at.items()])
        pairs = []
        for name in at:
            layer = of_student(name)
            same_name = isinstance(name, str) and name in {other.name for other in theirs}
            theirs_then = (
                of_teacher(name) if same_name else partner(layer, mine, theirs, self.student, images.shape[2])
            )
            pairs.append((layer, theirs_then))
        return each_once(pairs)

    def forward(
        self, images: Tensor, labels: Tensor, index: Tensor, view: int | None = None, epoch: float = 0.0
    ) -> dict[str, Tensor]:
        """Losses of a batch: {"loss": the weighted sum, and each term by name, unweighted}.

        images: [N, C, H, W] in [0, 1], augmented. labels: [N], or [N, K] for mixed images. index: [N] sample
        ids. view: the number of the augmented view, None when the images were mixed and no record of them can
        be kept. epoch: epochs of the stage that are done.
        """
        # The teacher first: torch.compile breaks off where its answers are looked up, and no gradient crosses that.
        teacher = self._taught(images, index, view) if self._asks_teacher else None
        student = features.see(self.student, self.prepare(images), *self._see_student)
        if student.logits.dtype in (torch.float16, torch.bfloat16):
            student = student._replace(logits=student.logits.float())
        terms: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for bound in self.bound:
            value = bound.function(*self._feed(bound, student, teacher, labels, index, epoch))
            terms[bound.name] = value
            total = total + bound.weight_at(epoch, self.num_epochs) * value
        for name, (weight, penalty) in self.penalties.items():
            terms[name] = penalty()
            total = total + weight * terms[name]
        return {"loss": total, **terms}

    def _taught(self, images: Tensor, index: Tensor, view: int | None) -> features.Seen:
        cache = None if view is None else self.cache
        if cache is not None and cache.keeps(*self._see_teacher):
            return self._recalled(images, index, view)
        seen = self.teacher.see(images, *self._see_teacher)
        self._count(len(images))
        if cache is not None:
            self._kept(seen, index, view)  # for stages whose losses ask for less
        return seen

    def leave_out_of_compile(self) -> None:
        """Leaves out of torch.compile what it would compile anew for each number that has changed.

        No decorators: they import torch._dynamo where the class is defined, which takes seconds.
        """
        for name in ("_recalled", "_kept", "_count"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def _recalled(self, images: Tensor, index: Tensor, view: int) -> features.Seen:
        cache = self.cache
        before = cache.num_computed
        seen = cache.see(images, index, view, *self._see_teacher)
        self._count(cache.num_computed - before)
        return seen

    def _kept(self, seen: features.Seen, index: Tensor, view: int) -> None:
        self.cache.keep(seen, index, view)

    def _count(self, num_images: int) -> None:
        self._teacher_images += num_images

    @property
    def teacher_layers(self) -> list[str]:
        """The teacher's layers whose maps the losses look at."""
        return list(self._see_teacher[0])

    def counted(self) -> dict[str, int]:
        """Numbers since the last call: teacher_images, how many images the teacher was really shown.

        By all processes together, which must all call this. Nothing where the losses do not ask the teacher.
        """
        if not self._asks_teacher:
            return {}
        shown = torch.tensor(self._teacher_images, device=next(self.student.parameters()).device)
        self._teacher_images = 0
        return {"teacher_images": int(summed(shown))}

    def _feed(
        self,
        bound: Bound,
        student: features.Seen,
        teacher: features.Seen | None,
        labels: Tensor,
        index: Tensor,
        epoch: float,
    ) -> list[Any]:
        available: dict[str, Any] = {"labels": labels, "epoch": epoch}
        # Losses count what they are trained on: of a validation sample or one outside the subset they see nothing.
        available["index"] = index if self._ids is None else torch.searchsorted(self._ids, index)
        available["student_logits"], available["student_embedding"] = student.logits, student.embedding
        if teacher is not None:
            available["teacher_logits"], available["teacher_embedding"] = teacher.logits, teacher.embedding
        if "teacher_head" in bound.asks:
            available["teacher_head"] = features.head(self.teacher.network)
        if bound.places is not None:
            available["student_weight"], available["teacher_weight"] = (place.value for place in bound.places)
        elif bound.pairs:
            # A loss may look at one side of its pairs alone: what nobody asked for was not computed.
            student_maps = [student.maps.get(mine.name) for mine, _ in bound.pairs]
            teacher_maps = (
                [teacher.maps.get(theirs.name) for _, theirs in bound.pairs]
                if teacher is not None
                else [None]
            )
            available |= {"student_maps": student_maps, "student_map": student_maps[0]}
            available |= {"teacher_maps": teacher_maps, "teacher_map": teacher_maps[0]}
            if "projected_map" in bound.asks:
                # Pooling first: the 1x1 convolution commutes with it and is then the smaller work.
                student_map, available["teacher_map"] = same_size(student_maps[0], teacher_maps[0])
                available["projected_map"] = bound.projector(student_map)
        if "projected_embedding" in bound.asks:
            available["projected_embedding"] = bound.projector(student.embedding)
        return [available[word] for word in bound.asks]

    @torch.no_grad()
    def rehearse(self, data: Data) -> None:
        """Computes the losses of two made-up images, labelled as the data's; Mistake if that fails."""
        images = example_images(data, next(self.student.parameters()).device)
        index = data.train.ids[:2].to(images.device)
        labels = data.train.labels[:2].to(images.device)
        labelled = bool((labels >= 0).all())
        if (data.mixup or data.cutmix) and labelled:
            labels = images.new_full((len(labels), len(data.classes)), 1 / len(data.classes))
        try:
            with features.evaluating(self):
                self(images[: len(labels)], labels, index)
        except (IndexError, RuntimeError, ValueError) as error:
            if not labelled and any("labels" in bound.asks for bound in self.bound):
                raise Mistake("the loss asks for labels, and the training images have none") from error
            raise Mistake(f"cannot be computed for this student and data: {error}") from error

    def pairs(self) -> list[dict[str, Any]]:
        """The table of paired layers: term, student layer and shape, teacher layer and shape, projector."""
        return [
            {
                "term": b.name,
                "student": mine.name,
                "student_shape": mine.shape,
                "teacher": theirs.name,
                "teacher_shape": theirs.shape,
                "projector": type(b.projector).__name__ if b.projector else "-",
            }
            for b in self.bound
            for mine, theirs in b.pairs
        ]

    def learned(self) -> dict[str, Tensor]:
        """What was learned beside the student, by term: projectors, the losses' parameters and buffers."""
        return {
            f"{bound.name}.{key}": tensor.detach().clone()
            for bound in self.bound
            for key, tensor in bound.state_dict().items()
        }

    def recall(self, learned: Mapping[str, Tensor]) -> None:
        """Takes up what an earlier stage's terms of the same names and sizes had learned.

        The other terms start afresh. A projector that starts at random would first drag the student's maps
        after it.
        """
        for bound in self.bound:
            state = bound.state_dict()
            known = {key: learned.get(f"{bound.name}.{key}") for key in state}
            if all(t is not None and t.shape == state[key].shape for key, t in known.items()):
                bound.load_state_dict(known)

    def finish(self) -> None:
        """After training: a loss that leaves something in the student (a folded classifier) does it now."""
        self._finish(self.student)

    def finished(self) -> nn.Module:
        """The student as `finish` would leave it: itself where no loss leaves anything in it, else a copy."""
        if not any(hasattr(bound.function, "finish") for bound in self.bound):
            return self.student
        student = copy.deepcopy(self.student)
        self._finish(student)
        return student

    def _finish(self, student: nn.Module) -> None:
        for bound in self.bound:
            if hasattr(bound.function, "finish"):
                bound.function.finish(student, features.head(self.teacher.network))


def example_images(data: Data, device: torch.device | str) -> Tensor:
    """Two made-up images [2, C, H, W] in [0, 1], always the same."""
    return torch.rand(2, *data.shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def _look(network: nn.Module, images: Tensor, embedding: bool, num_classes: int, who: str) -> features.Seen:
    """What a network says to images, in evaluation mode; Mistake unless one logit for each class."""
    try:
        with features.evaluating(network):
            seen = features.see(network, images, embedding=embedding)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        size = "x".join(map(str, images.shape[1:]))
        cure = "; resize gives it larger ones" if who != "the student" else ""
        raise Mistake(f"{who} cannot look at images of {size}{cure}: {error}") from error
    if not isinstance(seen.logits, Tensor) or seen.logits.dim() != 2:
        got = f"{tuple(seen.logits.shape)}" if isinstance(seen.logits, Tensor) else type(seen.logits).__name__
        raise Mistake(f"{who} gives {got}; logits [N, {num_classes}] are needed")
    if seen.logits.shape[1] != num_classes:
        raise Mistake(f"{who} knows {seen.logits.shape[1]} classes and the data has {num_classes}")
    if embedding and seen.embedding is None:
        raise Mistake(f"{who} does not call the classifier its embedding would be looked for in front of")
    return seen


@torch.no_grad()
def _check_head(network: nn.Module, images: Tensor, who: str) -> None:
    """Raises Mistake unless the classifier alone turns the embedding into the logits (VOLO adds a second one's)."""
    try:
        with features.evaluating(network):
            seen = features.see(network, images, embedding=True)
            given = features.head(network)(seen.embedding)
    except Mistake as error:
        raise Mistake(f"{who}: {error}") from None
    if given.shape != seen.logits.shape or not torch.allclose(given, seen.logits, rtol=1e-3, atol=1e-3):
        raise Mistake(
            f"{who}'s logits are not what its classifier makes of its embedding alone: a second classifier, a scale or "
            "a layer after it comes in, so no loss that uses the classifier by itself can be had with it"
        )
