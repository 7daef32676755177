"""Makes the weights of a layer share few values, then trains the values."""

import copy
import functools
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from trainer.compression import codebooks, units
from trainer.compression.codebooks import (
    centroid_parameters,
    close_codebook,
    code_entropy,
    open_codebook,
    open_even_codebook,
    set_codebook,
)
from trainer.compression.parametrizations import EvenCodebook, Mask
from trainer.compression.rounding import (
    close_biases,
    nearest,
    open_biases,
    round_codebook,
    round_evenly,
    round_unshared,
)
from trainer.compression.states import dense_state
from trainer.compression.weights import Weight, choose, per_layer, weights_of
from trainer.data.batches import batches, epoch_order, seed_of
from trainer.data.images import Part
from trainer.data.views import Views
from trainer.distillation.objective import Objective
from trainer.distillation.ratios import has_auto, ratios
from trainer.distributed import broadcast
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.recipe.keys import PER_LAYER, Exclude, Term, TermKeys
from trainer.recipe.training import Training
from trainer.training.evaluate import measured_order, normalized, sparing, truth
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

Bits = Annotated[int, Field(ge=1, le=16)]
NumValues = Annotated[int, Field(ge=1, le=65536)]
FractionBits = Annotated[int, Field(ge=1, le=10)]
BiasBits = Annotated[int, Field(ge=2, le=16)]

MOST_WITH_ENTROPY = 1024
AUTO_BITS = range(1, 7)  # `bits: auto` chooses among these
FISHER_BATCHES, FISHER_BATCH_SIZE = 64, 16


def check(settings) -> None:
    if (settings.bits is None) == (settings.values is None):
        raise Mistake("exactly one of bits and values is needed (bits: b is values: 2^b)")
    if (settings.bits == "auto") != (settings.budget_bytes is not None):
        raise Mistake("bits 'auto' needs budget_bytes, the size that the file may have; nothing else does")
    if settings.per != "group" and settings.groups is not None:
        raise Mistake(f"groups has no effect with per {settings.per!r}; 'group' has it")
    if settings.per == "group" and settings.groups is None:
        raise Mistake("per 'group' needs groups, the number of codebooks a layer")
    if settings.init == "linear" and (settings.weighting or settings.code_cost):
        raise Mistake("weighting and code_cost have no effect with init 'linear'; 'optimal' has them")
    if settings.training is None and settings.losses and settings.weighting is None:
        raise Mistake("losses have no effect without training")
    if settings.training is None and settings.assign == "trained":
        raise Mistake("assign 'trained' has no effect without training")
    if settings.assign == "fixed" and settings.entropy:
        raise Mistake(
            "entropy has no effect with assign 'fixed': only assignments that are trained can follow it"
        )
    if settings.entropy and _most_values(settings) > MOST_WITH_ENTROPY:
        raise Mistake(
            f"entropy compares every weight with every value, so {MOST_WITH_ENTROPY:,} values (10 bits) are the most"
        )
    if settings.spacing == "even":
        _check_even(settings)


def _check_even(settings) -> None:
    if settings.assign != "trained":
        raise Mistake(
            "spacing 'even' needs assign 'trained': its step is trained, and each weight follows it"
        )
    if settings.bits == "auto" or settings.per != "layer":
        raise Mistake("spacing 'even' has no effect with bits 'auto' or codebooks for parts of a layer")
    for name, value in (
        ("init 'linear'", settings.init == "linear"),
        ("weighting", settings.weighting),
        ("code_cost", settings.code_cost),
    ):
        if value:
            raise Mistake(f"{name} has no effect with spacing 'even', whose values are not clustered")
    numbers = settings.values if isinstance(settings.values, dict) else {"": settings.values}
    for value in numbers.values():
        if value is not None and value % 2:
            raise Mistake(
                f"values: got {value}; spacing 'even' has as many below zero as above: an even number"
            )


def needs_trained(_settings) -> bool:
    return True


def _most_values(settings) -> int:
    """Returns the largest number of values that the settings give a layer."""
    given = settings.values if settings.bits is None else settings.bits
    numbers = given.values() if isinstance(given, dict) else [0 if given == "auto" else given]
    return max(number if settings.bits is None else 2**number for number in numbers)


def check_student(settings, student: nn.Module) -> None:
    for name, layer in choose(weights_of(student), settings.exclude).items() if settings.groups else ():
        if len(layer.value) % settings.groups:
            raise Mistake(
                f"groups: got {settings.groups}; the {len(layer.value)} rows of layer {name!r} do not split into so many"
            )


def share(
    run: Run,
    *,
    bits: Annotated[Bits | dict[str, Bits] | Literal["auto"] | None, PER_LAYER] = None,
    values: Annotated[NumValues | dict[str, NumValues] | None, PER_LAYER] = None,
    budget_bytes: PositiveInt | None = None,
    init: Literal["linear", "optimal"] = "optimal",
    per: Literal["layer", "channel", "group"] = "layer",
    groups: PositiveInt | None = None,
    weighting: Literal["fisher"] | None = None,
    code_cost: NonNegativeFloat = 0.0,
    assign: Literal["fixed", "trained"] = "fixed",
    spacing: Literal["free", "even"] = "free",
    entropy: NonNegativeFloat = 0.0,
    codebook: Literal["float16", "float32"] | FractionBits = "float16",
    biases: BiasBits | None = None,
    rest: Literal["float16", "float32"] = "float32",
    exclude: Exclude = [],
    training: Training | None = None,
    losses: list[Term] | None = None,
) -> None:
    """Clusters the surviving weights of each layer into 2^bits (or `values`) shared values, and trains these values.

    Zeros stay zero and need no value.

    Args:
        bits: For all layers, {layer: bits}, or `auto` with budget_bytes. `auto` starts from 6 bits in every layer, and
            lowers step by step the layer that loses the least validation loss per saved byte, until the clustered file
            is within the budget. Each layer's loss and bytes at 1 to 6 bits are measured once, with the other layers
            unchanged, and assumed to add up.
        values: Number of values instead of bits: for all layers, or {layer: number}.
        budget_bytes: Largest size of the file, for `bits: auto`.
        init: `optimal` is exact one-dimensional k-means; `linear` is scikit-learn's k-means from evenly spaced values
            (Han et al. 2016).
        per: One codebook for each `layer`, each output `channel`, or each `group` of channels.
        groups: Number of equal blocks of channels, for `per: group`.
        weighting: `fisher` weights each weight's error by its mean squared gradient over 1,024 training images (Choi
            et al. 2017).
        code_cost: Cost of a code's bit, in mean squares of a layer's weights (entropy-constrained clustering, Chou et al.
            1989; 0.01 to 0.1).
        assign: `fixed` keeps the codes; `trained` chooses at every step which value each weight shares, with a
            straight-through gradient (Bengio et al. 2013).
        spacing: `even` makes the values multiples of a trained step, zero among them (Esser et al. 2020). The file then
            holds one number for each layer instead of a codebook. Biases are rounded in training too.
        entropy: Weight in the loss of the codes' entropy, in bits per surviving weight.
        codebook: The type to which shared values are rounded at the end, or a number of fraction bits.
        biases: Bits to which biases are rounded, on a grid of a power of two. Dead units are dropped first if the network
            is a chain of layers.
        rest: The type to which everything else that is not shared is rounded.
        exclude: Layers to leave alone.
        training: How to train the values; without it they stay as clustered.
        losses: Of the training and of weighting; by default cross-entropy.
    """
    from trainer.compression import kmeans  # here: a recipe is read without it

    layers = choose(weights_of(run.student), exclude)
    if not layers:
        raise Mistake("exclude leaves no layer to share")
    device = run.accelerator.device
    run.student.to(device)
    losses = losses or [TermKeys(loss="cross_entropy")]
    importance = _fisher(run, layers, losses) if weighting == "fisher" else {}

    def cluster(name: str, layer: Weight, num_values: int) -> tuple[Tensor, Tensor]:
        method = kmeans.kmeans_linear if init == "linear" else kmeans.kmeans_optimal
        num_groups = groups if per == "group" else {"layer": 1, "channel": len(layer.value)}[per]
        assert num_groups is not None
        return codebooks.cluster(layer, num_values, method, num_groups, importance.get(name), code_cost)

    if bits == "auto":
        assert budget_bytes is not None
        bits = _choose_bits(run, layers, cluster, codebook, biases, rest, budget_bytes)
    wanted = per_layer(layers, bits if values is None else values, "bits" if values is None else "values")
    rounded_biases: list[tuple[nn.Module, str]] = []
    fewer = []
    for name, layer in layers.items():  # the main process decides
        asked = wanted[name] if values is not None else 2 ** wanted[name]
        if spacing == "even":
            open_even_codebook(layer, asked, functools.partial(nearest, kind=codebook))
            _expect_step(layer, codebook)  # before the training, and after it
            continue
        codes, centroids = cluster(name, layer, asked)
        if centroids.shape[-1] < asked:
            fewer.append(f"{name} {centroids.shape[-1]:,} of {asked:,}")
        codes, centroids = broadcast(codes.to(device)), broadcast(centroids.to(device))
        rounded = round_codebook(centroids, codebook)  # raises before the training, not after it
        if training is None:
            centroids = rounded
        if assign == "trained":
            open_codebook(layer, codes, centroids, code_cost)
        else:
            set_codebook(layer, codes, centroids)
    if fewer and run.accelerator.is_main_process:
        print(f"share: no layer gets more values than it has weights: {', '.join(fewer)}", flush=True)
    if training is None:
        _round(run.student, biases, rest)
        _note_values(run, layers)
    if spacing == "even" and biases is not None:
        rounded_biases = open_biases(run.student, biases)
    how = {"spacing": spacing} if spacing == "even" else {"init": init}
    record(run, "clustered", **how)
    keep_histogram(run, "clustered")
    if training is None:
        return
    objective = Objective(
        run.student,
        losses,
        run.data,
        run.teacher,
        num_epochs=training.epochs,
        device=device,
        penalties={"entropy": (entropy, lambda: code_entropy(layers.values()))} if entropy else {},
        cache=run.cache,
    )
    numbers = fit(run, objective, training)
    objective.finish()
    for layer in layers.values():
        if spacing == "even":
            _expect_step(layer, codebook)
        if assign == "trained":
            codes, centroids = (broadcast(tensor.to(device)) for tensor in close_codebook(layer))
            set_codebook(layer, codes, centroids)
    with torch.no_grad():
        for parameter in centroid_parameters(run.student):
            parameter.copy_((round_evenly if spacing == "even" else round_codebook)(parameter, codebook))
    close_biases(rounded_biases)
    _round(run.student, biases, rest)
    _note_values(run, layers)
    record(run, "shared", numbers["train_seconds"], **how, **numbers)
    keep_histogram(run, "shared")


def _expect_step(layer: Weight, kind: str | int) -> None:
    """Raises Mistake for a trained step that has no such rounding."""
    trained = layer.parametrization
    assert isinstance(trained, EvenCodebook)
    round_codebook(trained.log_step.detach().exp(), kind)


def _note_values(run: Run, layers: dict[str, Weight]) -> None:
    """Adds to the report how many values the weights of each layer share, as they end: training may leave some unused."""
    for name, layer in layers.items():
        groups = len(torch.atleast_2d(layer.parameter))
        blocks = (block[block != 0] for block in layer.value.detach().chunk(groups))
        used = max(len(block.unique()) for block in blocks)
        run.layers.setdefault(name, {}).update(
            clusters=used, groups=groups, bits=max(1, (used - 1).bit_length())
        )


def _round(student: nn.Module, biases: int | None, rest: str) -> None:
    """Rounds what is not shared. Dead units are dropped first, because that changes the next layer's biases."""
    if biases is not None and units.is_chain(student):
        units.drop_dead(student)
    round_unshared(student, biases, rest)


def _fisher(run: Run, layers: dict[str, Weight], losses: list[TermKeys]) -> dict[str, Tensor]:
    """Returns the mean squared gradient of the losses for each weight, over small batches of training images.

    All processes use the same images, so the result is the same.
    """
    device = run.accelerator.device
    objective = Objective(run.student, losses, run.data, run.teacher, device=device).eval()
    seed = seed_of(run.seed, run.stage, "fisher")
    order = epoch_order(len(run.data.train), FISHER_BATCH_SIZE, seed, 0, 0, 1)[:FISHER_BATCHES]
    views = Views(run.data)
    tensors = {name: _trained(layer) for name, layer in layers.items()}
    sums = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read = batches(run.data.train, order, run.data.train.workers, device, views.cuts(0))
    for number, (images, labels, index) in enumerate(read):
        seen = views.augmented(images, index, 0)
        if has_auto(objective) and number == 0:
            ratios(objective, seen, labels, index, find=True)
        loss = objective(seen, labels, index)["loss"]
        # A layer that no loss reaches has none: its codebook is refused in words.
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        for name, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.detach() ** 2
    return {name: total / len(order) for name, total in sums.items()}


def _trained(layer: Weight) -> Tensor:
    """Returns the parameter behind a plain or pruned weight. Raises Mistake for a shared one."""
    module, attribute = layer.holders[0]
    if layer.parametrization is None:
        return getattr(module, attribute)
    if not isinstance(layer.parametrization, Mask):
        raise Mistake(
            f"layer {layer.name!r} shares its weights already: weighting 'fisher' wants them as they were"
        )
    return layer.parameter


def _choose_bits(run: Run, layers, cluster, codebook, biases, rest, budget_bytes: int) -> dict[str, int]:
    """Returns the bits of each layer for a file of at most `budget_bytes`, by rate-distortion (see `share`)."""
    found = [0] * len(layers)
    if run.accelerator.is_main_process:
        found = list(_rate_distortion(run, layers, cluster, codebook, biases, rest, budget_bytes).values())
    bits = broadcast(torch.tensor(found, device=run.accelerator.device)).tolist()
    if not all(bits):
        raise Mistake(
            f"budget_bytes: {budget_bytes:,} are too few even with {AUTO_BITS[0]} bit in every layer"
        )
    return dict(zip(layers, bits, strict=True))


@torch.no_grad()
def _rate_distortion(run: Run, layers, cluster, codebook, biases, rest, budget_bytes: int) -> dict[str, int]:
    """Does the work of `_choose_bits` on one process; returns zeros if no choice is within the budget."""
    from trainer.packing import network as packed

    facts = packed.facts_of(run.data)
    # Not a deep copy: copies of a parametrized module have one class, so removing one's mask would remove all.
    plain = build(run.student_spec, run.data.shape, len(run.data.classes)).to(run.accelerator.device)
    plain.load_state_dict(dense_state(run.student))
    _round(plain, biases, rest)
    shared = {
        (name, bits): cluster(name, layer, 2**bits) for name, layer in layers.items() for bits in AUTO_BITS
    }

    def clustered(choice: dict[str, int]) -> nn.Module:
        student = copy.deepcopy(plain)
        copies = weights_of(student)
        for name, bits in choice.items():
            codes, centroids = shared[name, bits]
            table = torch.cat([torch.zeros(1), round_codebook(centroids, codebook).reshape(-1)])
            copies[name].value.copy_(table[codes.long()])
        return student.eval()

    def encoded(choice: dict[str, int]) -> bytes:
        return packed.encode(clustered(choice), run.student_spec, facts)

    base = _loss(run, plain.eval())
    loss: dict[tuple[str, int], float] = {}
    size: dict[tuple[str, int], float] = {}
    for bits in AUTO_BITS:
        for part in packed.account(encoded(dict.fromkeys(layers, bits)))[0]:
            tensor = part["tensor"]
            name = tensor if tensor in layers else tensor.removesuffix(".weight")
            if name in layers:
                size[name, bits] = size.get((name, bits), 0.0) + part["bytes"]
        for name in layers:
            loss[name, bits] = _loss(run, clustered({name: bits})) - base
    choice = dict.fromkeys(layers, AUTO_BITS[-1])
    while len(encoded(choice)) > budget_bytes:
        steps = {}
        for name, bits in choice.items():
            for lower in AUTO_BITS[: AUTO_BITS.index(bits)]:
                saved = max(size[name, bits] - size[name, lower], 1e-3)
                steps[name, lower] = (loss[name, lower] - loss[name, bits]) / saved
        if not steps:
            return dict.fromkeys(layers, 0)
        name, lower = min(steps, key=steps.__getitem__)
        choice[name] = lower
    return choice


def _loss(run: Run, student: nn.Module) -> float:
    """Returns the mean cross-entropy on the validation images, against labels or, without labels, the teacher's classes."""
    part: Part = run.data.validation
    labels, network = truth(run, part), sparing(normalized(student, run.data))
    total, number = 0.0, 0
    order = measured_order(part)
    for positions, (images, _, _) in zip(
        order, batches(part, order, part.workers, run.accelerator.device), strict=True
    ):
        target = labels[positions.to(labels.device)].to(run.accelerator.device)
        known = target >= 0
        logits = network(images.float() / 255).float()
        total += functional.cross_entropy(logits[known], target[known], reduction="sum").item()
        number += int(known.sum())
    return total / max(1, number)
