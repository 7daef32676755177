"""What a network is trained for: the one module that is wrapped, optimised and saved.

The Objective owns the student, the projectors and every loss with learned parameters; the teacher is held
beside it, out of reach of DDP, optimizers, `state_dict` and `.train()`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.images import Data, normalize
from trainer.distillation.answers import Answers
from trainer.distillation.bound import Bound, bind_all, pair_table
from trainer.distillation.examine import examine, example_images
from trainer.distillation.teacher import Teacher
from trainer.distributed import summed
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.recipe.keys import TermKeys
from trainer.recipe.terms import TEACHER_WORDS, WEIGHTS, needs_teacher
from trainer.tensors import same_size


class Objective(nn.Module):
    """The student with everything that is trained beside it; its forward gives the losses of one batch.

    A loss on layers has one term for each pair, and they add up; a loss on lists of maps has one for all its pairs.

    Args:
        student: What is trained.
        terms: The losses. Without a teacher only losses on labels are possible.
        data: The images that it is trained on.
        teacher: What the student learns from.
        num_epochs: Epochs of the stage, for the weights' schedules.
        device: Where it is trained.
        prepare: Turns images in [0, 1] into what the student sees; by default the data's normalisation.
        penalties: Terms on the student's weights alone, {name: (weight, function of nothing)}.
        cache: The teacher's kept answers; without them the teacher is asked each time.

    Raises:
        Mistake: A layer that does not exist, pairs that cannot be made, a teacher that is missing, and networks that
            do not give one logit for each class of the data.
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
        # No nn.Module, so nothing of it is registered here: see the module's docstring.
        self.teacher, self.cache = teacher, cache
        self.num_epochs = num_epochs
        self.penalties = dict(penalties)
        self.prepare = prepare or (lambda images: normalize(images, data.mean, data.std))
        networks = examine(student, self.prepare, teacher, terms, data, torch.device(device))
        self.bound = nn.ModuleList(bind_all(terms, networks, data))  # type: ignore[assignment]  # torch does not say of what
        asks = {word for bound in self.bound for word in bound.asks}
        # What is asked of each network in a forward pass: the layers whose maps are wanted, and whether the embedding.
        self._see_student = (
            self._layers({"student_map", "student_maps", "projected_map"}, 0),
            bool({"student_embedding", "projected_embedding"} & asks),
        )
        self._see_teacher = (
            self._layers({"teacher_map", "teacher_maps", "projected_map"}, 1),
            "teacher_embedding" in asks,
        )
        self._asks_teacher = bool(TEACHER_WORDS & asks - WEIGHTS)
        if self._asks_teacher:
            assert teacher is not None
            teacher.make_ready()  # now, not in the first step, which torch.compile would compile with it
        self._teacher_images = 0
        self._ids = data.train.ids.to(device) if "index" in asks else None
        self.to(device)

    def _layers(self, words: set[str], side: int) -> list[str]:
        """Names of the layers that losses asking for one of the words look at; side: 0 the student's, 1 the teacher's."""
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
            view: The number of the augmented view, None when the images were mixed and no record of them can be kept.
            epoch: Epochs of the stage that are done.

        Returns:
            {"loss": the weighted sum, and each term by name, unweighted}.
        """
        # The teacher first: torch.compile breaks off where its answers are looked up, and no gradient crosses that.
        teacher = self._ask_teacher(images, index, view) if self._asks_teacher else None
        student = features.see(self.student, self.prepare(images), *self._see_student)
        if student.logits.dtype in (torch.float16, torch.bfloat16):
            student = student._replace(logits=student.logits.float())
        terms: dict[str, Tensor] = {}
        total: Any = 0.0
        for bound in self.bound:
            value = bound.function(*self._feed(bound, student, teacher, labels, index, epoch))
            terms[bound.name] = value
            total = total + bound.weight_at(epoch, self.num_epochs) * value
        for name, (weight, penalty) in self.penalties.items():
            terms[name] = penalty()
            total = total + weight * terms[name]
        return {"loss": total, **terms}

    def _ask_teacher(self, images: Tensor, index: Tensor, view: int | None) -> features.Seen:
        assert self.teacher is not None
        cache = self.cache
        if cache is not None and view is not None and cache.keeps(*self._see_teacher):
            return self._recalled(images, index, view)
        seen = self.teacher.see(images, *self._see_teacher)
        self._count(len(images))
        if cache is not None and view is not None:
            self._keep(seen, index, view)  # for stages whose losses ask for less
        return seen

    def leave_out_of_compile(self) -> None:
        """Leaves out of torch.compile what it would compile anew for each number that has changed.

        No decorators: they import torch._dynamo where the class is defined, which takes seconds.
        """
        for name in ("_recalled", "_keep", "_count"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def _recalled(self, images: Tensor, index: Tensor, view: int) -> features.Seen:
        assert self.cache is not None
        before = self.cache.num_computed
        seen = self.cache.see(images, index, view, *self._see_teacher)
        self._count(self.cache.num_computed - before)
        return seen

    def _keep(self, seen: features.Seen, index: Tensor, view: int) -> None:
        assert self.cache is not None
        self.cache.keep(seen, index, view)

    def _count(self, num_images: int) -> None:
        self._teacher_images += num_images

    @property
    def teacher_layers(self) -> list[str]:
        """The teacher's layers whose maps the losses look at."""
        return list(self._see_teacher[0])

    def counted(self) -> dict[str, int]:
        """Counts since the last call: teacher_images, how many images the teacher was really shown.

        Summed over all processes, which must all call this. Empty where the losses do not ask the teacher.
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
        """What the loss asks for, in its order."""
        available: dict[str, Any] = {"labels": labels, "epoch": epoch}
        # Losses count what they are trained on: of a validation sample or one outside the subset they see nothing.
        available["index"] = index if self._ids is None else torch.searchsorted(self._ids, index)
        available["student_logits"], available["student_embedding"] = student.logits, student.embedding
        if teacher is not None:
            available["teacher_logits"], available["teacher_embedding"] = teacher.logits, teacher.embedding
        if "teacher_head" in bound.asks:
            assert self.teacher is not None
            available["teacher_head"] = features.head(self.teacher.network)
        if bound.weights is not None:
            available["student_weight"], available["teacher_weight"] = (w.value for w in bound.weights)
        elif bound.pairs:
            # A loss may look at one side of its pairs alone: what nobody asked for was not computed.
            student_maps = [student.maps.get(layer.name) for layer, _ in bound.pairs]
            maps = {} if teacher is None else teacher.maps
            teacher_maps = [maps.get(layer.name) for _, layer in bound.pairs]
            available |= {"student_maps": student_maps, "student_map": student_maps[0]}
            available |= {"teacher_maps": teacher_maps, "teacher_map": teacher_maps[0]}
            if "projected_map" in bound.asks:
                # Pooling first: the 1x1 convolution commutes with it and is then the smaller work.
                student_map, teacher_map = student_maps[0], teacher_maps[0]
                assert student_map is not None and teacher_map is not None and bound.projector is not None
                student_map, available["teacher_map"] = same_size(student_map, teacher_map)
                available["projected_map"] = bound.projector(student_map)
        if "projected_embedding" in bound.asks:
            assert bound.projector is not None
            available["projected_embedding"] = bound.projector(student.embedding)
        return [available[word] for word in bound.asks]

    @torch.no_grad()
    def rehearse(self, data: Data) -> None:
        """Computes the losses of two made-up images, labelled as the data's. Raises Mistake if that fails."""
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
        return pair_table(self.bound)

    def learned(self) -> dict[str, Tensor]:
        """What was learned beside the student, by term: projectors, the losses' parameters and buffers."""
        return {
            f"{bound.name}.{key}": tensor.detach().clone()
            for bound in self.bound
            for key, tensor in bound.state_dict().items()
        }

    def recall(self, learned: Mapping[str, Tensor]) -> None:
        """Loads what an earlier stage's terms of the same names and sizes had learned; other terms start afresh.

        A projector that starts at random would first drag the student's maps after it.
        """
        for bound in self.bound:
            state = bound.state_dict()
            known = {key: learned.get(f"{bound.name}.{key}") for key in state}
            if all(t is not None and t.shape == state[key].shape for key, t in known.items()):
                bound.load_state_dict(known)

    def finish(self) -> None:
        """Has the losses leave in the student, after training, what they leave there (a folded classifier)."""
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
                assert self.teacher is not None
                bound.function.finish(student, features.head(self.teacher.network))
