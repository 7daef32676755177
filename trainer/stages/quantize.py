"""Makes the student one that integers compute: maps and weights on 8 bits, in steps that are trained."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from trainer.compression import folding, units
from trainer.compression.integers import close_integers, open_integers, to_integers
from trainer.compression.weights import choose, weights_of
from trainer.data.batches import batches
from trainer.data.images import normalize
from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.recipe.keys import Term, TermKeys
from trainer.recipe.training import Training
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

# exporting is imported where it is used: a recipe is read without torch.export.

BATCH = 128  # images at a time that the first steps are found from


def check(settings) -> None:
    if settings.training is None and settings.losses:
        raise Mistake("losses have no effect without training")


def order(_settings, before) -> Iterator[str]:
    if any(stage.stage == "quantize" for stage in before):
        yield "has no effect: the student is quantized already"


def settles(_settings) -> bool:
    return True


def needs_trained(_settings) -> bool:
    return True


def check_student_after(_settings, student: nn.Module, before) -> None:
    layers = weights_of(student)
    shared = {name for stage in before if stage.stage == "share" for name in choose(layers, stage.exclude)}
    for layer, norm in folding.norms(student):
        if layer in shared:
            raise Mistake(
                f"layer {layer!r} shares its weights by then, so {norm!r} cannot be folded into it: add fold before share"
            )


def becomes(
    _settings, student: nn.Module, spec: dict[str, Any], images: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    from trainer.exporting.quantizing import quantized

    channels = images.shape[1]
    return quantized(student, spec, images.shape[1:], [0.0] * channels, [1.0] * channels)


def quantize(
    run: Run,
    *,
    bits: Annotated[int, Field(ge=3, le=8)] = 8,
    biases: Annotated[int, Field(ge=3, le=16)] = 8,
    images: PositiveInt = 512,
    training: Training | None = None,
    losses: list[Term] | None = None,
) -> None:
    """Makes the student compute in integers: it reads bytes, and every layer sums products of small integers.

    The map that each layer reads is rounded to 8 bits, weights and biases to so many bits; all steps are powers of two, so
    that rounding is a shift and float32 computes the same numbers (Jain et al. 2020). BatchNorm is folded away first;
    where a stage shares the weights, a stage `fold` must come before that one. Zeros stay zero, shared weights stay shared.
    The training learns the steps of the maps beside weights and shared values. It comes after prune and share; only pack and
    export follow. The export `c` then writes integer code.

    Args:
        bits: Of a weight; fewer in a layer whose sums could exceed 24 bits.
        biases: Bits of a bias.
        images: Number of training images from which the first steps are found.
        training: How to train; without it the student stays as rounded.
        losses: Of the training; by default cross-entropy.
    """
    from trainer.exporting.integer_steps import exponents_read
    from trainer.exporting.quantizing import calibrate, fit_first_layers, quantized, with_maps
    from trainer.exporting.tracing import trace

    device, data = run.accelerator.device, run.data
    run.student.to(device).eval()
    if units.is_chain(run.student):
        units.drop_dead(run.student)
    run.student, run.student_spec = quantized(run.student, run.student_spec, data.shape, data.mean, data.std)
    fit_first_layers(run.student, trace(run.student, data.shape))
    order = list(torch.arange(len(data.train))[:images].split(BATCH))
    some = (found.float() / 255 for found, _, _ in batches(data.train, order, data.train.workers, device))
    calibrate(run.student, (normalize(one, data.mean, data.std) for one in some), run.student)

    def settle() -> None:
        exponents = exponents_read(trace(run.student, data.shape))
        to_integers(run.student, exponents, bits, biases)
        if units.is_chain(run.student) and units.drop_dead(run.student):  # by rounding
            to_integers(run.student, exponents, bits, biases)
        run.student_spec = with_maps(run.student, run.student_spec)

    if training is not None:
        before = {key: tensor.clone() for key, tensor in run.student.state_dict().items()}
    settle()
    record(run, "rounded")
    if training is None:
        return
    run.student.load_state_dict(before)
    opened = open_integers(run.student, bits, biases)
    run.student.to(device)
    objective = Objective(
        run.student,
        losses or [TermKeys(loss="cross_entropy")],
        data,
        run.teacher,
        num_epochs=training.epochs,
        device=device,
        cache=run.cache,
    )
    numbers = fit(run, objective, training)
    objective.finish()
    close_integers(run.student, opened)
    settle()
    record(run, "quantized", numbers["train_seconds"], **numbers)
    keep_histogram(run, "quantized")
