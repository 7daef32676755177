"""The objective of a training: the one module that is wrapped, optimised and saved.

It owns the student, the projectors and every loss with learned parameters. The teacher is not a submodule, so
DDP, optimizers, `state_dict` and `.train()` do not reach it.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.images import Data, normalize
from trainer.data.views import Views
from trainer.distillation.answers import Answers
from trainer.distillation.bound import Bound, bind_all, pair_table
from trainer.distillation.examine import examine, example_images
from trainer.distillation.teacher import Teacher
from trainer.distributed import summed
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.output import needs_logits
from trainer.recipe.keys import TermKeys
from trainer.recipe.terms import EMBEDDINGS, MAP_LISTS, MAPS, TEACHER_WORDS, WEIGHTS, needs_teacher
from trainer.tensors import same_size


class Objective(nn.Module):
    """The student with everything that is trained beside it; the forward pass returns the losses of one batch.

    A loss on layers has one term for each pair, and these add up; a loss on lists of maps has one term for all pairs.

    Args:
        student: The network that is trained.
        terms: The losses. Without a teacher only losses on labels are possible.
        data: The training images.
        teacher: The teacher, None for a training without one.
        num_epochs: Epochs of the stage, for the weights' schedules.
        device: The device of the training.
        prepare: Turns images in [0, 1] into the student's input; by default the data's normalisation.
        penalties: Terms on the student's weights alone, {name: (weight, function without arguments)}.
        cache: The teacher's kept answers. Without a cache the teacher runs on every batch.

    Raises:
        Mistake: For a layer that does not exist, layers that cannot be paired, a missing teacher, and networks that do
            not return one logit for each class of the data.

    Attributes:
        left_out: A line for each pair of layers that is not compared.
    """

    bound: Sequence[Bound]

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
        # Neither is an nn.Module, so nothing of them is registered here: see the module's docstring.
        self.teacher, self.cache = teacher, cache
        self.num_epochs = num_epochs
        self.penalties = dict(penalties)
        self.prepare = prepare or (lambda images: normalize(images, data.mean, data.std))
        networks = examine(student, self.prepare, teacher, terms, data, torch.device(device))
        bounds, self.left_out = bind_all(terms, networks, data)
        self.bound = nn.ModuleList(bounds)  # type: ignore[assignment]  # torch does not say of what
        asks = {word for bound in self.bound for word in bound.asks}
        # What a forward pass asks of each network: the layers whose maps are needed, and whether the embedding is.
        self._see_student = (
            self._layers({"student_map", "student_maps", "projected_map"}, 0),
            bool({"student_embedding", "projected_embedding"} & asks),
            list(dict.fromkeys(bound.output for bound in self.bound if bound.output is not None)),
        )
        self.see_teacher = (
            self._layers({"teacher_map", "teacher_maps", "projected_map"}, 1),
            "teacher_embedding" in asks,
        )
        self._asks_teacher = bool(TEACHER_WORDS & asks - WEIGHTS)
        if self._asks_teacher:
            assert teacher is not None
            teacher.make_ready()  # now, because torch.compile would trace it in the first step
        # Where only some images have labels, losses on labels see those alone.
        self._partly_labelled = data.partly_labelled
        self.class_weights: Tensor | None = None
        # [2], the factors of this batch's losses on labels in its step (`training.label_shares`); None for 1.
        self.label_shares: Tensor | None = None
        self._teacher_images = 0
        # A teacher of larger images sees the same views of them, as read from their pictures.
        larger = data if teacher is None else teacher.images_of(data)
        self._pictures = None if larger is data else Views(larger)
        self.mixed_pictures: Callable[[], Tensor] | None = None  # the present batch, where it is mixed
        self._ids = data.train.ids.to(device) if "index" in asks else None
        self.to(device)

    def _layers(self, words: set[str], side: int) -> list[str]:
        """Returns the layers of all losses that take one of the `words`. side: 0 for the student's, 1 for the teacher's."""
        pairs = [pair for bound in self.bound if words & set(bound.asks) for pair in bound.pairs]
        return list(dict.fromkeys(pair[side].name for pair in pairs))

    def forward(
        self, images: Tensor, labels: Tensor, index: Tensor, view: int | None = None, epoch: float = 0.0
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch.

        Args:
            images: [N, C, H, W] in [0, 1], augmented.
            labels: [N], or [N, K] for mixed images.
            index: [N] sample ids.
            view: The number of the augmented view; None for mixed images, whose answers cannot be kept.
            epoch: Progress of the stage in epochs.

        Returns:
            {"loss": the weighted sum, and each term by name, unweighted}.
        """
        student, teacher = self.see(images, index, view)
        terms: dict[str, Tensor] = {}
        parts = []
        for bound in self.bound:
            arguments = self.feed(bound, student, teacher, labels, index, epoch)
            value = bound.function(*arguments) if arguments else _nothing(student.logits, bound)
            terms[bound.name] = value
            if self.label_shares is not None and "labels" in bound.asks:
                value = value * self.label_shares[int("class_weights" in bound.asks and labels.dim() == 1)]
            parts.append(_weighted(value, bound.weight_at(epoch, self.num_epochs)))
        for name, (weight, penalty) in self.penalties.items():
            terms[name] = penalty()
            parts.append(_weighted(terms[name], weight))
        return {"loss": functools.reduce(operator.add, parts), **terms}

    def see(
        self, images: Tensor, index: Tensor, view: int | None
    ) -> tuple[features.Seen, features.Seen | None]:
        """Returns what student and teacher make of a batch, as far as the losses ask for it; arguments as in `forward`."""
        # The teacher runs first: torch.compile breaks the graph at the cache, and no gradient crosses that break.
        teacher = self._ask_teacher(images, index, view) if self._asks_teacher else None
        student = features.see(self.student, self.prepare(images), *self._see_student)
        if student.logits.dtype in (torch.float16, torch.bfloat16):
            outputs = {output: logits.float() for output, logits in student.outputs.items()}
            # Not by _replace, which torch.compile cannot follow after a break (torch 2.11).
            student = features.Seen(student.logits.float(), student.embedding, student.maps, outputs)
        return student, teacher

    def _ask_teacher(self, images: Tensor, index: Tensor, view: int | None) -> features.Seen:
        assert self.teacher is not None
        cache = self.cache
        if cache is not None and view is not None and cache.keeps(*self.see_teacher):
            return self._recalled(images, index, view)
        seen = self.teacher.see(self._for_teacher(images, index, view), *self.see_teacher)
        self._count(len(images))
        if cache is not None and view is not None:
            self._keep(seen, index, view)  # for later stages, whose losses may take less
        return seen

    @property
    def pictures(self) -> Views | None:
        """The views of the images as the teacher sees them; None if it sees those of the student."""
        return self._pictures

    def _for_teacher(self, images: Tensor, index: Tensor, view: int | None) -> Tensor:
        """Returns the batch as the teacher sees it."""
        if self._pictures is None:
            return images
        if view is not None:
            return self._pictures.of(index, view)
        return images if self.mixed_pictures is None else self.mixed_pictures()

    def weigh_classes(self, weights: Tensor) -> None:
        """Gives the losses that take them weights [K] of the labels' classes. Raises Mistake if none does."""
        if not any("class_weights" in bound.asks for bound in self.bound):
            raise Mistake("class_weights: no loss of this training takes them; cross_entropy does")
        self.class_weights = weights.to(next(self.student.parameters()).device)

    def leave_out_of_compile(self) -> None:
        """Excludes from torch.compile the methods that it would recompile for every changed number.

        Decorators would import torch._dynamo at class definition, which takes seconds.
        """
        for name in ("_recalled", "_keep", "_count", "_for_teacher"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def _recalled(self, images: Tensor, index: Tensor, view: int) -> features.Seen:
        assert self.cache is not None
        before = self.cache.num_computed
        seen = self.cache.see(images, index, view, *self.see_teacher)
        self._count(self.cache.num_computed - before)
        return seen

    def _keep(self, seen: features.Seen, index: Tensor, view: int) -> None:
        assert self.cache is not None
        self.cache.keep(seen, index, view)

    def _count(self, num_images: int) -> None:
        self._teacher_images += num_images

    @property
    def teacher_layers(self) -> list[str]:
        """The teacher's layers whose maps the losses take."""
        return list(self.see_teacher[0])

    def counted(self) -> dict[str, int]:
        """Returns {"teacher_images": images that the teacher really saw since the last call}, summed over all processes.

        All processes must call this. Returns {} if the losses do not use the teacher.
        """
        if not self._asks_teacher:
            return {}
        shown = torch.tensor(self._teacher_images, device=next(self.student.parameters()).device)
        self._teacher_images = 0
        return {"teacher_images": int(summed(shown))}

    def feed(
        self,
        bound: Bound,
        student: features.Seen,
        teacher: features.Seen | None,
        labels: Tensor,
        index: Tensor,
        epoch: float,
    ) -> list[Any]:
        """Returns the arguments of a loss, in its order; student and teacher are what `see` returned.

        A loss on labels gets the images that have one; [] if the batch has none.
        """
        available: dict[str, Any] = {"labels": labels, "epoch": epoch, "class_weights": self.class_weights}
        # Sample ids count the whole training split; losses count only the samples that are trained on.
        available["index"] = index if self._ids is None else torch.searchsorted(self._ids, index)
        available["student_logits"], available["student_embedding"] = student.logits, student.embedding
        if bound.output is not None:
            available["student_logits"] = student.outputs[bound.output]
        if teacher is not None:
            available["teacher_logits"], available["teacher_embedding"] = teacher.logits, teacher.embedding
        if "teacher_head" in bound.asks:
            assert self.teacher is not None
            available["teacher_head"] = features.head(self.teacher.network)
        if bound.weights is not None:
            available["student_weight"], available["teacher_weight"] = (w.value for w in bound.weights)
        elif bound.pairs:
            # A loss may take one side of its pairs alone; the other side's maps were then not computed.
            student_maps = [student.maps.get(layer.name) for layer, _ in bound.pairs]
            maps = {} if teacher is None else teacher.maps
            teacher_maps = [maps.get(layer.name) for _, layer in bound.pairs]
            available |= {"student_maps": student_maps, "student_map": student_maps[0]}
            available |= {"teacher_maps": teacher_maps, "teacher_map": teacher_maps[0]}
            if "projected_map" in bound.asks:
                # Pooling first: the 1x1 convolution commutes with it, and costs less on the smaller map.
                student_map, teacher_map = student_maps[0], teacher_maps[0]
                assert student_map is not None and teacher_map is not None and bound.projector is not None
                student_map, available["teacher_map"] = same_size(student_map, teacher_map)
                available["projected_map"] = bound.projector(student_map)
        if "projected_embedding" in bound.asks:
            assert bound.projector is not None
            available["projected_embedding"] = bound.projector(student.embedding)
        arguments = [available[word] for word in bound.asks]
        if self._partly_labelled and "labels" in bound.asks:
            return of_labelled(bound.asks, arguments, labels)
        return arguments

    @torch.no_grad()
    def rehearse(self, data: Data) -> None:
        """Computes the losses of two random images with labels like the data's. Raises Mistake if that fails."""
        images, labels, index = self.example(data)
        self._expect_outputs(images)
        labelled = labels.dim() == 2 or bool((labels >= 0).all())
        try:
            with features.evaluating(self):
                self(images, labels, index)
        except (IndexError, RuntimeError, ValueError) as error:
            if not labelled and any("labels" in bound.asks for bound in self.bound):
                raise Mistake("the loss asks for labels, and the training images have none") from error
            raise Mistake(f"cannot be computed for this student and data: {error}") from error

    def example(self, data: Data) -> tuple[Tensor, Tensor, Tensor]:
        """Returns two random images with labels like the data's, and their sample ids."""
        images = example_images(data, next(self.student.parameters()).device)
        train = data.labelled_alone().train
        index, labels = (tensor[:2].to(images.device) for tensor in (train.ids, train.labels))
        if (data.mixup or data.cutmix) and bool((labels >= 0).all()):
            labels = images.new_full((len(labels), len(data.classes)), 1 / len(data.classes))
        return images[: len(labels)], labels, index

    def _expect_outputs(self, images: Tensor) -> None:
        """Raises Mistake unless the student, while it trains, returns the further outputs that losses take."""
        outputs = self._see_student[2]
        if not outputs:
            return
        student = copy.deepcopy(self.student).train()
        with torch.random.fork_rng(devices=[]):
            seen = features.see(student, self.prepare(images), outputs=outputs)
        for output, logits in seen.outputs.items():
            if logits is seen.logits:
                raise Mistake(
                    f"output: {output!r} is the student's answer itself: it returns one tensor while it trains, or "
                    "output in its own entry names the same (that entry needs output too)"
                )
            if not isinstance(logits, Tensor) or logits.shape != seen.logits.shape:
                raise Mistake(
                    needs_logits(f"the student's output {output!r} is", logits, seen.logits.shape[1])
                )

    def pairs(self) -> list[dict[str, Any]]:
        """Returns the table of paired layers: term, layer and shape of student and teacher, projector."""
        return pair_table(self.bound)

    def learned(self) -> dict[str, Tensor]:
        """Returns copies of the tensors learned beside the student, by term: projectors, parameters and buffers of losses."""
        return {
            f"{bound.name}.{key}": tensor.detach().clone()
            for bound in self.bound
            for key, tensor in bound.state_dict().items()
        }

    def recall(self, learned: Mapping[str, Tensor]) -> None:
        """Loads what earlier stages' terms of the same names and shapes have `learned`; other terms start from scratch.

        A randomly initialised projector would first pull the student's maps away from what they have learned.
        """
        for bound in self.bound:
            state = bound.state_dict()
            known = {key: learned.get(f"{bound.name}.{key}") for key in state}
            if all(t is not None and t.shape == state[key].shape for key, t in known.items()):
                bound.load_state_dict(known)

    def finish(self) -> None:
        """Applies the losses' changes to the student at the end of a training (a folded classifier), in place."""
        self._finish(self.student)

    def finished(self) -> nn.Module:
        """Returns the student as `finish` would make it: itself if no loss changes it, else a copy."""
        if not any(hasattr(bound.function, "finish") for bound in self.bound):
            return self.student
        student = copy.deepcopy(self.student)
        self._finish(student)
        return student

    def _finish(self, student: nn.Module) -> None:
        for bound in self.bound:
            if hasattr(bound.function, "finish"):
                assert self.teacher is not None
                bound.function.finish(student, features.head(self.teacher.network))


def _nothing(logits: Tensor, bound: nn.Module) -> Tensor:
    """Returns 0, with a gradient of 0 to the student and to the loss's own parameters: several processes wait for one."""
    return 0.0 * (logits.sum() + sum(parameter.sum() for parameter in bound.parameters()))


def _weighted(value: Tensor, weight: float | Tensor) -> Tensor:
    """Returns weight * value. There is no product by 1: with its gradient it would take a hundredth of a small network's step."""
    return value if isinstance(weight, float) and weight == 1 else weight * value


PER_IMAGE = {"labels", "index"} | (MAPS | MAP_LISTS | EMBEDDINGS | {"student_logits", "teacher_logits"})


def labels_known(labels: Tensor) -> Tensor:
    """Returns which images have a label: bool [N]. labels: as for `of_labelled`."""
    return labels >= 0 if labels.dim() == 1 else labels.sum(1) > 1 - 1e-3


def of_labelled(asks: Sequence[str], arguments: Sequence[Any], labels: Tensor) -> list[Any]:
    """Returns a loss's arguments for the images with a label alone; [] if the batch has none.

    asks: their names. labels: int64 [N], -1 for none, or [N, K] of mixed images, whose rows sum to 1 if both had one.
    """
    known = labels_known(labels)
    if not known.any():
        return []

    def chosen(value: Any) -> Any:
        return (
            [chosen(one) for one in value]
            if isinstance(value, list)
            else None
            if value is None
            else value[known]
        )

    return [
        chosen(value) if word in PER_IMAGE else value for word, value in zip(asks, arguments, strict=True)
    ]
