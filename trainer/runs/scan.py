"""Measures the sensitivity of each layer to pruning, and suggests settings for a prune stage."""

import contextlib
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tabulate import tabulate
from torch import Tensor

from trainer.compression.masks import ask, score_masks
from trainer.compression.weights import Weight, choose, weights_of
from trainer.criteria.magnitude import magnitude
from trainer.mistakes import Mistake
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.recipe import read
from trainer.recipe.shelves import beside, fed, find
from trainer.recipe.text import RecipeError
from trainer.reporting import drawing
from trainer.runs.runner import begun
from trainer.storage import files
from trainer.training.evaluate import normalized, percent_right, predict, truth
from trainer.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
SENSITIVITIES = tuple(step / 4 for step in range(1, 13))
SHOWN = 20  # times the cost: how far below the unpruned accuracy the plot goes
OTHERS, LIMIT = "#dfe3e6", "#c8743a"


def scan(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    folder: str | Path = "runs",
    stage: int | None = None,
    cost: float = 1.0,
    allow_python: bool = False,
) -> dict[str, Any]:
    """Measures each layer's sensitivity to pruning, without recovery; writes scan.md, .png and .json.

    The files are in runs/NAME. The student is that after the stages before the prune stage: from the run's
    checkpoint, or they run now. Each layer is pruned alone, by magnitude: to several sparsities, or, if the stage's
    method takes a sensitivity, with several sensitivities.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder in which the run's own folder NAME is made.
        stage: Number of the prune stage, counted from 0; None for the first one.
        cost: The points of validation accuracy that a suggested setting, and every smaller one of that layer, may
            cost.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Returns:
        The content of scan.json: "name", "cost", "stage", "setting" ('sparsity' or 'sensitivity'), "top1_validation"
        of the student, "layers" [{"layer", "num_weights", "points", "suggestion" (None: do not prune it),
        "sparsity"}], "together" (all suggestions at once), "suggestion" (keys for the recipe).

    Raises:
        RecipeError: For a recipe without such a stage.
        Mistake: For a cost that is not above 0, or a layer without weights to prune.
        Everything that `runner.run` raises.
    """
    recipe, _ = read(path, dict(changes or {}), allow_python)
    number = prune_stage(recipe, stage)
    keys = recipe.stages[number]
    criterion = find("method", keys.method)
    if beside(criterion, "AMOUNT") not in (None, "sensitivity") or "student" in fed(criterion):
        raise RecipeError(
            recipe.fault(
                ("stages", number, "method"), f"{keys.method!r} has no sparsity of single weights to scan"
            )
        )
    if not 0 < cost < math.inf:
        raise Mistake(f"cost: got {cost}; points of accuracy above 0 are allowed")
    with begun(path, number, dict(changes or {}), folder, allow_python) as run:
        found = {"name": run.name, "stage": number, "cost": cost, **measure(run, keys, cost)}
        if run.accelerator.is_main_process:
            table = _table(found)
            files.write_bytes(run.folder / "scan.json", json.dumps(found, indent=1).encode())
            files.write_bytes(run.folder / "scan.png", drawing.png(_figure(found)))
            files.write_bytes(
                run.folder / "scan.md",
                f"# {run.name}: scan of the layers\n\n{table}\n\n![scan](scan.png)\n".encode(),
            )
            print(f"\n{table}\n\n{run.folder / 'scan.md'}", flush=True)
    return found


def prune_stage(recipe: Recipe, number: int | None) -> int:
    """Returns the number of the prune stage: `number`, or for None the first. RecipeError when there is none."""
    known = [n for n, keys in enumerate(recipe.stages) if keys.stage == "prune"]
    if not known:
        raise RecipeError(recipe.fault(("stages",), "there is no stage prune in this recipe"))
    if number is not None and number not in known:
        allowed = ", ".join(map(str, known))
        raise RecipeError(
            recipe.fault(
                ("stages",), f"stage {number} is no stage prune; allowed: {allowed} (counted from 0)"
            )
        )
    return known[0] if number is None else number


@torch.no_grad()
def measure(run: Run, keys: StageKeys, cost: float) -> dict[str, Any]:
    """Measures the run's present student; returns the content of scan.json without name, stage and cost.

    Args:
        run: The run.
        keys: The prune stage of its recipe.
        cost: The points of validation accuracy that a suggested setting may cost.
    """
    weights = choose(weights_of(run.student), keys.exclude)
    criterion = find("method", keys.method)
    by_std = beside(criterion, "AMOUNT") == "sensitivity"
    run.student.to(run.accelerator.device).eval()
    network = normalized(run.student, run.data)
    labels = truth(run, run.data.validation)

    def accuracy() -> float:
        return percent_right(predict(network, run.data.validation, run.accelerator), labels)

    dense = accuracy()
    layers, masks = [], {}
    for name, weight in weights.items():
        if not weight.value.any():
            raise Mistake(
                f"layer {name!r} has no weights left to prune: all are zero (name it in the stage's exclude)"
            )
        points, good, cheap = [], None, True
        for setting, mask in _masks(weight, criterion if by_std else None):
            with _pruned({name: (weight, mask)}):
                point = {
                    "setting": setting,
                    "sparsity": 1 - mask.double().mean().item(),
                    "top1_validation": accuracy(),
                }
            points.append(point)
            # `not >`, so that an unknown accuracy (no labels) counts as no loss
            cheap = cheap and not dense - point["top1_validation"] > cost
            if cheap:
                good, masks[name] = point, (weight, mask)
        layers.append(
            {
                "layer": name,
                "num_weights": weight.value.numel(),
                "points": points,
                "suggestion": good and good["setting"],
                "sparsity": good and good["sparsity"],
            }
        )
        if run.accelerator.is_main_process:
            message = f"up to {good['setting']:g}" if good else "leave it alone"
            print(f"scan: {name}: {message}", flush=True)
    chosen = {layer["layer"]: layer["suggestion"] for layer in layers if layer["suggestion"] is not None}
    with _pruned(masks):
        left = sum(int(torch.count_nonzero(weight.value)) for weight in weights.values())
        together = {
            "top1_validation": accuracy(),
            "sparsity": 1 - left / sum(p.value.numel() for p in weights.values()),
        }
    what = "sensitivity" if by_std else "sparsity"
    spared = [layer["layer"] for layer in layers if layer["suggestion"] is None]
    suggestion: dict[str, Any] = {"method": keys.method}
    if not by_std and keys.scope == "global":
        suggestion["scope"] = "layer"
    suggestion[what] = chosen
    if keys.exclude or spared:
        suggestion["exclude"] = [*keys.exclude, *spared]
    return {
        "setting": what,
        "top1_validation": dense,
        "layers": layers,
        "together": together,
        "suggestion": suggestion,
    }


def _masks(weight: Weight, criterion: Callable | None) -> Iterator[tuple[float, Tensor]]:
    """Yields (setting, mask) with rising settings, as long as some weights of the layer remain.

    criterion: one that takes a sensitivity; None for magnitude, with sparsities.
    """
    alive = {weight.name: weight.mask}
    if criterion is not None:
        for sensitivity in SENSITIVITIES:
            try:
                mask = ask(criterion, weight, sensitivity=sensitivity)[0]
            except Mistake:
                if sensitivity == SENSITIVITIES[0]:
                    raise
                return  # this setting would prune every weight
            yield sensitivity, mask
        return
    dead = 0.0 if weight.mask is None else 1 - weight.mask.double().mean().item()
    score, parts = {weight.name: ask(magnitude, weight)}, {weight.name: weight.parts}
    for sparsity in SPARSITIES:
        if dead <= sparsity and round(sparsity * weight.value.numel()) < weight.value.numel():
            yield (
                sparsity,
                score_masks(score, alive, {weight.name: sparsity}, False, parts)[weight.name][0],
            )


@contextlib.contextmanager
def _pruned(masks: Mapping[str, tuple[Weight, Tensor]]) -> Iterator[None]:
    """Sets the masked weights to zero inside the context, and restores them on exit."""
    kept = {name: weight.parameter.detach().clone() for name, (weight, _) in masks.items()}
    for weight, mask in masks.values():
        weight.parameter.masked_fill_(~mask, 0.0)
    try:
        yield
    finally:
        for name, (weight, _) in masks.items():
            weight.parameter.copy_(kept[name])


def _table(found: Mapping[str, Any]) -> str:
    settings = sorted({point["setting"] for layer in found["layers"] for point in layer["points"]})
    rows = []
    for layer in found["layers"]:
        lost = {
            p["setting"]: f"{found['top1_validation'] - p['top1_validation']:.1f}" for p in layer["points"]
        }
        row = {"layer": layer["layer"], "weights": f"{layer['num_weights']:,}"}
        row |= {f"{setting:g}": lost.get(setting, "") for setting in settings}
        none = layer["suggestion"] is None
        row |= {
            "suggestion": "exclude" if none else f"{layer['suggestion']:g}",
            "zeros %": "" if none else f"{100 * layer['sparsity']:.1f}",
        }
        rows.append(row)
    together = found["together"]
    return (
        f"Points of validation accuracy that {found['setting']} costs, one layer at a time, without recovery "
        f"(the student has {found['top1_validation']:.2f} %; a suggestion costs at most "
        f"{_points(found['cost'])}):\n\n"
        + tabulate(
            rows,
            headers="keys",
            tablefmt="pipe",
            disable_numparse=True,
            colalign=("left", *["right"] * (len(rows[0]) - 1)),
        )
        + f"\n\nAll suggestions together: {together['top1_validation']:.2f} % at "
        f"{100 * together['sparsity']:.2f} % zeros, before any recovery. "
        f"For stages[{found['stage']}]:\n\n    {_yaml(found['suggestion'])}"
    )


def _points(cost: float) -> str:
    return f"{cost:g} point{'' if cost == 1 else 's'}"


def _yaml(suggestion: Mapping[str, Any]) -> str:
    """Returns the keys in one line of YAML, without braces."""
    return yaml.safe_dump(dict(suggestion), default_flow_style=True, sort_keys=False, width=math.inf).strip()[
        1:-1
    ]


def _figure(found: Mapping[str, Any]) -> "Figure":
    """Draws a panel for each layer: its curve before those of the others, the limit, the suggested point."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    layers, dense = found["layers"], found["top1_validation"]
    num_rows = -(-len(layers) // 4)
    num_columns = -(-len(layers) // num_rows)
    top = 0.85 if num_columns > 2 else 1.05  # the caption takes two lines in a narrow figure
    axes_grid = drawing.grid(num_rows, num_columns, (2.1, 1.5), (0.3, 0.55), top)
    curves = [
        (
            [0.0, *(p["sparsity"] for p in layer["points"])],
            [dense, *(p["top1_validation"] for p in layer["points"])],
        )
        for layer in layers
    ]
    # Values far below the limit are in the table only: they would compress the scale of the others.
    lowest = max(min(min(heights) for _, heights in curves), dense - SHOWN * found["cost"])
    highest = max(max(heights) for _, heights in curves)
    least_left = 1.0
    for reach, heights in curves:  # each is drawn until it leaves the plot
        fallen = next((n for n, height in enumerate(heights) if height < lowest), -1)
        least_left = min(least_left, 1 - reach[fallen])
    flat = axes_grid.reshape(-1)
    for axes in flat[len(layers) :]:
        axes.set_visible(False)
    for number, (axes, layer) in enumerate(zip(flat, layers, strict=False)):
        drawing.calm(axes)
        # A logarithmic scale of the remaining fraction, so that 1/2, 1/10 and 1/100 are all visible.
        axes.set_xscale(
            "function", functions=(lambda x: -np.log10(np.maximum(1 - x, 1e-9)), lambda z: 1 - 10.0**-z)
        )
        axes.set_xlim(0, 1 - least_left * 0.8)
        axes.xaxis.set_major_locator(
            FixedLocator(
                [t for t in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999) if t <= 1 - least_left * 0.8]
            )
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
        axes.tick_params(axis="x", labelsize=7)
        room = 0.05 * (highest - lowest) + 0.1
        axes.set_ylim(lowest - room, highest + room)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(color=drawing.GRID, linewidth=0.6)
        for other, (reach, heights) in enumerate(curves):
            if other != number:
                axes.plot(reach, heights, color=OTHERS, linewidth=1, zorder=1)
        axes.axhline(dense - found["cost"], color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        reach, heights = curves[number]
        axes.plot(reach, heights, color=drawing.BLUE, linewidth=1.6, zorder=3)
        short = layer["layer"] if len(layer["layer"]) <= 14 else f"…{layer['layer'][-13:]}"
        setting = "leave it alone"
        if layer["suggestion"] is not None:
            point = next(p for p in layer["points"] if p["setting"] == layer["suggestion"])
            axes.plot(
                point["sparsity"],
                point["top1_validation"],
                "o",
                color=drawing.BLUE,
                markersize=6,
                markeredgecolor="white",
                zorder=4,
            )
            setting = f"{found['setting']} {layer['suggestion']:g}"
        axes.set_title(short, loc="left", fontsize=9, color=drawing.INK)
        axes.set_title(setting, loc="right", fontsize=7.5, color=drawing.BLUE)
        if number % num_columns == 0:
            axes.set_ylabel("validation %", fontsize=8, color=drawing.INK)
        else:
            axes.tick_params(labelleft=False)
        if number + num_columns >= len(layers):
            axes.set_xlabel("zeros in this layer (%)", fontsize=8, color=drawing.INK)
    drawing.title(flat[0].figure, f"{found['name']}: accuracy against sparsity, one layer at a time\n")
    width, height = flat[0].figure.get_size_inches()
    caption = (
        f"over each panel the {found['setting']} suggested (the dot): it costs at most "
        f"{_points(found['cost'])} of validation accuracy (dashed); grey: the other layers"
    )
    caption = textwrap.fill(caption, int(17 * width))
    position = (0.1 / width, 1 - 0.34 / height)
    flat[0].figure.text(*position, caption, va="top", fontsize=8, color=drawing.INK)
    return flat[0].figure
