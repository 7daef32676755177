"""Distils one module into another from anybody's loader, without a recipe, a folder or a report."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.data.images import Data, InMemory, Part
from trainer.distillation.examine import FAILURES
from trainer.distillation.objective import Objective
from trainer.distillation.onednn import attach, detach
from trainer.distillation.ratios import has_auto, ratios
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.recipe.keys import Augment, TeacherKeys, Term, TermKeys
from trainer.recipe.recipe import checked
from trainer.recipe.terms import asks_answers, wants
from trainer.recipe.training import Training
from trainer.training.fit import of_a_batch
from trainer.training.optimizer import Averaged, make_optimizer
from trainer.training.schedule import learning_rate
from trainer.training.weighing import FINDING

#: Settings of a training that need a recipe's data, run or folder.
_OF_A_RUN = (
    *("batch_size", "keep", "patience", "validate_every", "accumulate"),
    *("train_only", "freeze_epochs", "compile", "channels_last"),
    *("class_weights", "sampler"),
)


class _Distilling(Training):
    losses: Annotated[list[Term], Field(min_length=1)]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    losses: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    epochs: int,
    **settings: Any,
) -> list[dict[str, float]]:
    """Trains the student in place by losses that compare it with the teacher; returns the mean losses of each epoch.

    The student learns on its own device, in this process, and is left in evaluation mode. The teacher comes back as it was,
    so no tensor can be in both.

    Args:
        student: The network that learns. It maps images to logits.
        teacher: The network that it learns from, which sees the same images. If its answers are not as wide as the
            student's, losses on embeddings and maps remain; an embedding network answers with its embedding.
        loader: Batches (images, labels), (images, labels, index) or images alone: float32 [N, C, H, W] as the networks take
            them, class numbers [N] from 0 or probabilities [N, K], positions in the set [N]. It is run through once for
            each epoch, and len(loader) is the number of batches.
        losses: As in a recipe: names of trainer/losses/, or mappings with their keys, {"loss": "kl", "temperature": 2}; one
            may stand alone.
        epochs: Times that the loader is run through.
        settings: Further keys of a recipe's `training`: lr, optimizer, weight_decay, schedule, warmup, clip, ema ...

    Raises:
        Mistake: For settings and networks that do not fit, and a batch that lacks what a loss asks for; the student is unchanged
            if it is found before the first step.
        FloatingPointError: At the first loss that is not finite.
    """
    given = [losses] if isinstance(losses, str | Mapping) else losses
    terms = [{"loss": term} if isinstance(term, str) else term for term in given]
    keys = checked(_Distilling, {**settings, "epochs": epochs, "losses": terms}, allow_python=True)
    unfit = [key for key in _OF_A_RUN if key in settings]
    if unfit:
        raise Mistake(f"{', '.join(unfit)}: of recipes only; here the loader makes the batches")
    for who, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise Mistake(f"{who}: got {type(network).__name__}; an nn.Module is allowed")
    if not list(student.parameters()):
        raise Mistake("student: has no parameters, so it cannot learn")
    if any(map(is_lazy, (*teacher.parameters(), *teacher.buffers()))):
        raise Mistake("teacher: some of its layers are lazy and have no weights yet, so it cannot teach")
    if not torch.is_grad_enabled():
        raise Mistake("distill: nothing is learned inside torch.no_grad or inference_mode; call it outside")
    _refuse_shared(student, teacher)
    if not _length(loader):
        raise Mistake("loader: has no batches or no length; the schedule needs the number of its batches")
    device = next(student.parameters()).device
    # The first epoch goes on from here, so that nothing is lost of a loader that cannot begin anew.
    begun = iter(loader)
    first = next(begun, None)
    if first is None:
        raise Mistake(f"loader: gives no batch, and its length is {_length(loader)}")
    images = _tensors(first, "batch 1")[0].to(device)
    with _borrowed(teacher, device):
        data = _facts(images, student, loader)
        keys_of_teacher = TeacherKeys(model="own", head=_classifies(teacher, images, data, keys.losses))
        frozen = Teacher([teacher], [keys_of_teacher], data.mean, data.std, specs=[{}])
        objective = Objective(
            student, keys.losses, data, frozen, float(epochs), device, lambda images: images
        )
        asked = {word for term in keys.losses for word in wants(term)}
        reader = _Reader(asked, len(data.classes), data.num_samples, device)
        reader.read(first, "batch 1")  # before anything is trained
        return _train(objective, reader, itertools.chain([first], begun), loader, keys)


class _Reader(NamedTuple):
    """What the losses ask of a batch, and what its labels and positions can be."""

    asked: set[str]
    num_classes: int
    num_samples: int
    device: torch.device

    def read(self, batch: Any, where: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images, labels (-1 where there are none) and index (0 likewise) of a loader's batch, on the device.

        where: the batch in messages. Raises Mistake for a batch of another form, and for labels and positions that cannot be.
        """
        images, *rest = _tensors(batch, where)
        count = len(images)
        labels = rest[0] if rest else torch.full((count,), -1)
        index = rest[1] if len(rest) > 1 else torch.zeros(count, dtype=torch.int64)
        if "labels" in self.asked:
            if not rest:
                raise Mistake(
                    f"loader: {where}: a loss asks for labels, so the batches must be (images, labels)"
                )
            labels = self._labels(labels, where)
        if "index" in self.asked:
            if len(rest) < 2:
                raise Mistake(
                    f"loader: {where}: a loss asks for index, so the batches must be (images, labels, index)"
                )
            index = _whole_numbers(index, self.num_samples, f"{where}: index", "positions in the set")
        return images.to(self.device), labels.to(self.device), index.to(self.device)

    def _labels(self, labels: Tensor, where: str) -> Tensor:
        if labels.is_floating_point() and labels.shape[1:] == (self.num_classes,):
            return labels.float()
        if labels.is_floating_point() or labels.dim() != 1:
            raise Mistake(
                f"loader: {where}: got labels {labels.dtype} {tuple(labels.shape)}; class ids [N] or probabilities "
                f"[N, {self.num_classes}] are allowed"
            )
        return _whole_numbers(labels, self.num_classes, f"{where}: label", "class ids")


def _whole_numbers(numbers: Tensor, count: int, where: str, what: str) -> Tensor:
    """Returns whole numbers [N] as int64. Raises Mistake unless all are from 0 to count - 1."""
    if numbers.is_floating_point() or numbers.dim() != 1:
        raise Mistake(f"loader: {where}: got {numbers.dtype} {tuple(numbers.shape)}; {what} [N] are allowed")
    numbers = numbers.long()
    least, most = torch.stack(numbers.aminmax()).tolist()
    if least < 0 or most >= count:
        raise Mistake(
            f"loader: {where} {least if least < 0 else most}; {what} from 0 to {count - 1} are allowed"
        )
    return numbers


def _train(
    objective: Objective, reader: _Reader, begun: Iterable[Any], loader: Any, training: Training
) -> list[dict[str, float]]:
    """Trains through all epochs, the first of them in `begun`; returns the mean of each term in each."""
    optimizer = make_optimizer(objective.train(), training)
    averaged = Averaged(objective, training.ema) if training.ema else None
    found, step, per_epoch = [], 0, len(loader)
    attach(objective, learning=True)
    try:
        for epoch in range(training.epochs):
            kept: list[dict[str, Tensor]] = []
            for number, batch in enumerate(loader if epoch else begun, start=1):
                rate = learning_rate(training, step, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                images, labels, index = reader.read(batch, f"batch {number} of epoch {epoch + 1}")
                if step in FINDING and has_auto(objective):
                    ratios(objective, images, labels, index, None, step / per_epoch, find=True)
                try:
                    terms = objective(images, labels, index, epoch=step / per_epoch)
                except ValueError as error:
                    raise of_a_batch(error, len(images), "loader: gives") from error
                terms["loss"].backward()
                if training.clip:
                    nn.utils.clip_grad_norm_(objective.parameters(), training.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if averaged is not None:
                    averaged.update(step)
                kept.append({name: value.detach() for name, value in terms.items()})
            if not kept:
                raise Mistake(
                    f"loader: gives no batch in epoch {epoch + 1} of {training.epochs}: it must begin anew each time, as a "
                    "list and a DataLoader do"
                )
            found.append({name: torch.stack([one[name] for one in kept]).mean().item() for name in kept[0]})
            broken = [name for name, value in found[-1].items() if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(f"epoch {epoch + 1}: {', '.join(broken)} is not finite")
    finally:
        detach(objective)
    if averaged is not None:
        averaged.swap()
    objective.eval().finish()
    return found


def _length(loader: Any) -> int:
    """Returns the number of a loader's batches or of a set's samples, 0 for one that does not know it."""
    try:
        return len(loader)
    except TypeError:  # a DataLoader has a length, which fails if its set has none
        return 0


def _tensors(batch: Any, where: str) -> list[Tensor]:
    """Returns the one to three tensors of a loader's batch, of as many samples each. Raises Mistake for other batches."""
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, tuple | list) else []
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
        raise Mistake(
            f"loader: {where}: got a batch of {type(batch).__name__}; (images, labels) or images are allowed"
        )
    images, *rest = parts
    if images.dim() != 4 or images.dtype != torch.float32 or not len(images):
        raise Mistake(
            f"loader: {where}: got images {images.dtype} {tuple(images.shape)}; torch.float32 [N, C, H, W] are needed"
        )
    if any(part.shape[:1] != images.shape[:1] for part in rest):
        shapes = ", ".join(str(tuple(part.shape)) for part in rest)
        raise Mistake(
            f"loader: {where}: got {len(images)} images and beside them {shapes}; as many are needed"
        )
    return parts


@torch.no_grad()
def _facts(images: Tensor, student: nn.Module, loader: Any) -> Data:
    """Returns what the objective must know of the images: their shape, the number of classes and of samples."""
    with evaluating(student):
        answers = _answers(student, images, "student")
    num_classes = (
        answers.shape[-1] if isinstance(answers, Tensor) else 0
    )  # what is wrong with it, the objective says
    num_samples = _length(getattr(loader, "dataset", ())) or len(loader) * len(images)
    nothing = torch.zeros(num_samples, 0, 0, 0, dtype=torch.uint8)
    part = Part(InMemory(nothing, torch.full((num_samples,), -1)), torch.arange(num_samples))
    channels, height, width = images.shape[1:]
    return Data(
        name="loader",
        train=part,
        validation=part,
        test=part,
        classes=[str(number) for number in range(num_classes)],
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        shape=(channels, height, width),
        num_samples=num_samples,
        augment=Augment(),
    )


def _answers(network: nn.Module, images: Tensor, who: str) -> Any:
    """Returns what a network makes of the first two images. Raises Mistake if it fails."""
    try:
        return network(images[:2])
    except FAILURES as error:
        size = "x".join(map(str, images.shape[1:]))
        raise Mistake(f"{who}: cannot take images of {size} in {images.dtype}: {error}") from error


@torch.no_grad()
def _classifies(teacher: nn.Module, images: Tensor, data: Data, terms: Sequence[TermKeys]) -> bool:
    """Returns whether the teacher's answers are as wide as the student's, or a loss takes them for logits."""
    if any(map(asks_answers, terms)):
        return True
    answers = _answers(teacher, images, "teacher")
    return isinstance(answers, Tensor) and answers.shape[1:] == (len(data.classes),)


@contextlib.contextmanager
def _borrowed(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """Has the teacher on the device inside the `with` block; afterwards its tensors, layers and modes are those of before."""
    learned = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    before = next((tensor.device for tensor in (*teacher.parameters(), *teacher.buffers())), device)
    # The tensors themselves are kept: in between they are on another device, or their layout is that of fast convolutions.
    gradients = [parameter.grad for parameter in teacher.parameters() if parameter.grad is not None]
    held = [(one, one.data) for one in (*teacher.parameters(), *gradients)]
    buffers = [(module, dict(module._buffers)) for module in teacher.modules()]
    try:
        with evaluating(teacher.to(device)):
            yield
    finally:
        detach(teacher)
        for tensor, data in held:
            tensor.data = data
        for module, own in buffers:
            module._buffers.update(own)
        teacher.to(before)
        for parameter in learned:
            parameter.requires_grad_(True)


def _refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises Mistake if a tensor is in both networks: the teacher's do not change, so the student's could not learn."""
    taken = {_place(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    shared = [
        name
        for name, tensor in (*student.named_parameters(), *student.named_buffers())
        if _place(tensor) in taken
    ]
    if shared:
        named = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
        raise Mistake(
            f"student: shares {named} with the teacher, which does not change; copy.deepcopy gives it its own"
        )


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Returns what is the same of two tensors that start at the same number in memory."""
    return tensor.device, id(tensor) if is_lazy(tensor) else tensor.data_ptr() or id(tensor)
