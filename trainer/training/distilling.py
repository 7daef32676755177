"""Distils one module into another from anybody's loader, without a recipe, a folder or a report."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.data.images import Data, InMemory, Part
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
    losses: Sequence[str | Mapping[str, Any]],
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
        loader: Batches (images, labels), (images, labels, index) or images alone: float [N, C, H, W] as the networks take
            them, class numbers [N] or probabilities [N, K], positions in the set [N]. It is run through once for each
            epoch, and len(loader) is the number of batches.
        losses: As in a recipe: names of trainer/losses/, or mappings with their keys, {"loss": "kl", "temperature": 2}.
        epochs: Times that the loader is run through.
        settings: Further keys of a recipe's `training`: lr, optimizer, weight_decay, schedule, warmup, clip, ema ...

    Raises:
        Mistake: For settings and networks that do not fit, and a batch that lacks what a loss asks for; the student is unchanged
            if it is found before the first step.
        FloatingPointError: At the first loss that is not finite.
    """
    terms = [{"loss": term} if isinstance(term, str) else term for term in losses]
    keys = checked(_Distilling, {**settings, "epochs": epochs, "losses": terms}, allow_python=True)
    unfit = [key for key in _OF_A_RUN if key in settings]
    if unfit:
        raise Mistake(f"{', '.join(unfit)}: of recipes only; here the loader makes the batches")
    if not isinstance(loader, Sized) or not len(loader):
        raise Mistake("loader: has no batches or no length; the schedule needs the number of its batches")
    _refuse_shared(student, teacher)
    device = next(student.parameters()).device
    first = _batch(next(iter(loader)), device)
    with _borrowed(teacher, device):
        data = _facts(first, student, loader)
        keys_of_teacher = TeacherKeys(model="own", head=_classifies(teacher, first[0], data, keys.losses))
        frozen = Teacher([teacher], [keys_of_teacher], data.mean, data.std, specs=[{}])
        objective = Objective(
            student, keys.losses, data, frozen, float(epochs), device, lambda images: images
        )
        if any("index" in wants(term) for term in keys.losses) and first[2] is None:
            raise Mistake("loader: a loss asks for index, so its batches must be (images, labels, index)")
        if any("labels" in wants(term) for term in keys.losses) and bool((first[1] < 0).any()):
            raise Mistake("loader: a loss asks for labels, so its batches must be (images, labels)")
        return _train(objective, loader, keys, device)


def _train(
    objective: Objective, loader: Any, training: Training, device: torch.device
) -> list[dict[str, float]]:
    """Trains through all epochs; returns the mean of each term in each."""
    optimizer = make_optimizer(objective.train(), training)
    averaged = Averaged(objective, training.ema) if training.ema else None
    found, step, per_epoch = [], 0, len(loader)
    attach(objective, learning=True)
    try:
        for epoch in range(training.epochs):
            kept: list[dict[str, Tensor]] = []
            for batch in loader:
                rate = learning_rate(training, step, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                images, labels, index = _batch(batch, device)
                index = torch.zeros(len(images), dtype=torch.int64) if index is None else index
                if step in FINDING and has_auto(objective):
                    ratios(objective, images, labels, index.to(device), None, step / per_epoch, find=True)
                terms = objective(images, labels, index.to(device), epoch=step / per_epoch)
                terms["loss"].backward()
                if training.clip:
                    nn.utils.clip_grad_norm_(objective.parameters(), training.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if averaged is not None:
                    averaged.update(step)
                kept.append({name: value.detach() for name, value in terms.items()})
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


def _batch(batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns images, labels (-1 where there are none) and index (None likewise) of a loader's batch, on the device.

    Raises Mistake for other batches.
    """
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, tuple | list) else []
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
        raise Mistake(
            f"loader: got a batch of {type(batch).__name__}; (images, labels) or images are allowed"
        )
    images, *rest = (part.to(device) for part in parts)
    if images.dim() != 4 or not images.is_floating_point() or any(len(part) != len(images) for part in rest):
        raise Mistake(
            f"loader: got images {images.dtype} {tuple(images.shape)}; float [N, C, H, W] are needed, and as many labels"
        )
    labels = rest[0] if rest else torch.full((len(images),), -1, device=device)
    return images, labels, rest[1] if len(rest) > 1 else None


@torch.no_grad()
def _facts(first: tuple[Tensor, Tensor, Tensor | None], student: nn.Module, loader: Any) -> Data:
    """Returns what the objective must know of the images: their shape, the number of classes and of samples."""
    images = first[0]
    with evaluating(student):
        answers = student(images[:2])
    num_classes = (
        answers.shape[-1] if isinstance(answers, Tensor) else 0
    )  # what is wrong with it, the objective says
    num_samples = len(getattr(loader, "dataset", ())) or len(loader) * len(images)
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


@torch.no_grad()
def _classifies(teacher: nn.Module, images: Tensor, data: Data, terms: Sequence[TermKeys]) -> bool:
    """Returns whether the teacher's answers are as wide as the student's, or a loss takes them for logits."""
    if any(map(asks_answers, terms)):
        return True
    answers = teacher(images[:2])
    return isinstance(answers, Tensor) and answers.shape[1:] == (len(data.classes),)


@contextlib.contextmanager
def _borrowed(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """Has the teacher on the device inside the `with` block; afterwards its tensors, layers and modes are those of before."""
    learned = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    before = next((tensor.device for tensor in (*teacher.parameters(), *teacher.buffers())), device)
    # The tensors themselves are kept: in between they are on another device, or their layout is that of fast convolutions.
    gradients = [parameter.grad for parameter in teacher.parameters() if parameter.grad is not None]
    held = [(one, one.data) for one in (*teacher.parameters(), *gradients) if not is_lazy(one)]
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
