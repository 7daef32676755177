"""Makes the weights of a layer share few values, then trains the values."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt

from trainer import compress, kmeans
from trainer.context import Run
from trainer.evaluate import keep_histogram, record
from trainer.fit import Training, fit
from trainer.objective import Objective, Term, TermKeys

Bits = Annotated[int, Field(ge=1, le=16)]
NumValues = Annotated[int, Field(ge=1, le=65536)]


def check(settings) -> None:
    if (settings.bits is None) == (settings.values is None):
        raise ValueError("exactly one of bits and values is needed (bits: b is values: 2^b)")
    if settings.per != "group" and settings.groups is not None:
        raise ValueError(f"groups has no effect with per {settings.per!r}; 'group' has it")
    if settings.per == "group" and settings.groups is None:
        raise ValueError("per 'group' needs groups, the number of codebooks a layer")
    if settings.training is None and settings.losses:
        raise ValueError("losses have no effect without training")


def share(
    run: Run,
    *,
    bits: Bits | dict[str, Bits] | None = None,
    values: NumValues | dict[str, NumValues] | None = None,
    init: Literal["linear", "optimal"] = "optimal",
    per: Literal["layer", "channel", "group"] = "layer",
    groups: PositiveInt | None = None,
    codebook: Literal["float16", "float32"] = "float16",
    keep: list[str] = [],
    training: Training | None = None,
    losses: list[Term] | None = None,
) -> dict:
    """Clusters the surviving weights of each layer into 2^bits (or `values`) shared values and trains those.

    init: `optimal` is exact one-dimensional k-means, `linear` is scikit-learn's k-means from evenly spaced values (Han et al.
    2016). per: one codebook a `layer`, an output `channel`, or `groups` equal blocks of channels. codebook: the type
    in which the shared values are finally kept. keep: layers left alone. Zeros stay zero and cost no value.
    """
    places = compress.choose(compress.weights(run.student), keep)
    if not places:
        raise ValueError("keep leaves no layer to share")
    wanted = compress.per_layer(places, bits if values is None else values, "bits" if values is None else "values")
    method = kmeans.kmeans_linear if init == "linear" else kmeans.kmeans_optimal
    run.student.to(run.accelerator.device)
    for name, place in places.items():
        k = wanted[name] if values is not None else 2 ** wanted[name]
        num_groups = {"layer": 1, "channel": len(place.value), "group": groups}[per]
        codes, centroids = compress.cluster(place, k, method, num_groups)
        if run.accelerator.num_processes > 1:  # decided on the main process
            told = [codes.to(run.accelerator.device), centroids.to(run.accelerator.device)]
            for tensor in told:
                torch.distributed.broadcast(tensor, src=0)
            codes, centroids = told
        if training is None:
            centroids = compress.round_to(centroids, codebook)
        compress.set_codebook(place, codes, centroids)
        run.layers.setdefault(name, {}).update(clusters=k, groups=num_groups, bits=(k - 1).bit_length())
    record(run, "clustered", init=init)
    keep_histogram(run, "clustered")
    numbers: dict = {}
    if training is not None:
        objective = Objective(
            run.student, losses or [TermKeys(loss="cross_entropy")], run.data, run.teacher,
            num_epochs=training.epochs, device=run.accelerator.device,
        )
        numbers = fit(run, objective, training)
        objective.finish()
        with torch.no_grad():
            for parameter in compress.centroid_parameters(run.student):
                parameter.copy_(compress.round_to(parameter, codebook))
        record(run, "shared", numbers["train_seconds"], init=init, **numbers)
        keep_histogram(run, "shared")
    return numbers
