"""Prunes, shares and packs one distilled student at several sparsities and numbers of bits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from tabulate import tabulate

from trainer.mistakes import Mistake
from trainer.recipe.keys import Recipe
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.reporting import drawing
from trainer.reporting.front import on_front
from trainer.reporting.tables import decimals, missing
from trainer.runs.answers import share_answers
from trainer.runs.runner import begun, run
from trainer.runs.scan import prune_stage
from trainer.storage import files

#: What the front is found by: the first that all points have. Without labels that is the disagreement with the teacher.
MEASURES = {"error": "test error", "disagreement": "disagreement with the teacher"}

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ladder(
    path: str | Path,
    sparsity: Sequence[float] = (),
    bits: Sequence[int] = (),
    changes: Mapping[str, Any] | None = None,
    folder: str | Path = "runs",
    stage: int | None = None,
    allow_python: bool = False,
) -> dict[str, Any]:
    """Runs a recipe at every sparsity and number of bits, and writes runs/NAME/ladder.md, .png and .json.

    The stages before the prune stage run once, in the run's own folder. Each point continues from there as a run in
    runs/NAME/ladder/POINT, with a report there; an interrupted one resumes. Points of one sparsity prune once, and
    all points use the same cache of the teacher's answers.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        sparsity: Sparsities of the prune stage; empty for the recipe's own.
        bits: Numbers of bits of the share stage after it; empty for the recipe's own.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder in which the run's own folder NAME is made.
        stage: Number of the prune stage, counted from 0; None for the first one.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Returns:
        The content of ladder.json: "points" [{"name", "sparsity", "bits", "file_bytes", "error",
        "error_validation" and "disagreement" with the teacher (percent; None where there is no label, no teacher), "front"}]; the
        front is the points that no smaller file beats on the test split, by the first of `MEASURES` that is known.

    Raises:
        RecipeError: For a recipe without such stages.
        Mistake: Without sparsities and bits, or for a point given twice.
        Everything that `runner.run` raises.
    """
    changes = dict(changes or {})
    recipe, _ = read(path, changes, allow_python)
    number = prune_stage(recipe, stage)
    share_stage = _check(recipe, number, sparsity, bits)
    sparsities: Sequence[float | None] = sparsity or [None]
    widths: Sequence[int | None] = bits or [None]
    points = [_point(recipe, number, share_stage, s, b) for s in sparsities for b in widths]
    names = [name for name, _ in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise Mistake(f"ladder: {', '.join(twice)} is given twice")
    for name, varied in points:
        read(path, {**changes, **varied, "name": name}, allow_python)  # all faults before anything is trained
    with begun(path, number, changes, folder, allow_python) as base:
        here = base.folder
    rows = []
    for name, varied in points:
        target = here / "ladder" / name
        key = varied.get(f"stages.{number}.sparsity")
        if PartialState().is_main_process:
            share_answers(here / "views", target)
            print(f"\n---- {name}", flush=True)
        point = {**changes, **varied, "name": name}
        # Its first stages are taken over from here, or from a finished point of the same sparsity.
        last = run(path, point, here / "ladder", allow_python=allow_python, more=[here])["rows"][-1]
        rows.append(
            {
                "name": name,
                "sparsity": key,
                "bits": varied.get(f"stages.{share_stage}.bits"),
                "file_bytes": last["file_bytes"],
                "error": _rest(last["top1"]),
                "error_validation": _rest(last["top1_validation"]),
                "disagreement": _rest(last["agreement"]),
            }
        )
    key = next((key for key in MEASURES if all(row[key] is not None for row in rows)), None)
    best = [False] * len(rows) if key is None else on_front([(row["file_bytes"], row[key]) for row in rows])
    for row, is_best in zip(rows, best, strict=True):
        row["front"] = is_best
    found = {"name": recipe.name, "stage": number, "points": rows}
    if PartialState().is_main_process:
        table = _table(rows, key)
        files.write_bytes(here / "ladder.json", json.dumps(found, indent=1, allow_nan=False).encode())
        text = f"# {recipe.name}: error against bytes\n\n{table}\n"
        if key is not None:
            files.write_bytes(here / "ladder.png", drawing.png(_figure(found, key)))
            text += "\n![ladder](ladder.png)\n"
        files.write_bytes(here / "ladder.md", text.encode())
        print(f"\n{table}\n\n{here / 'ladder.md'}", flush=True)
    return found


def _rest(right: float | None) -> float | None:
    """Returns what a percentage leaves of 100; None for a missing one."""
    return None if right is None or missing(right) else 100 - right


def _check(recipe: Recipe, number: int, sparsity: Sequence[float], bits: Sequence[int]) -> int | None:
    """Returns the number of the share stage after the prune stage, or None.

    Raises Mistake without sparsities and bits, RecipeError when the stages cannot be varied by them.
    """
    if not sparsity and not bits:
        raise Mistake("a ladder needs --sparsity or --bits, such as --sparsity 0.9,0.95 --bits 3,4")
    method = recipe.stages[number].method
    if sparsity and getattr(recipe.stages[number], "sparsity", None) is None:
        raise RecipeError(
            recipe.fault(
                ("stages", number, "method"),
                f"{method!r} has no sparsity to vary; magnitude, lamp and rate have",
            )
        )
    later = [n for n, keys in enumerate(recipe.stages) if keys.stage == "share" and n > number]
    if bits and not later:
        raise RecipeError(
            recipe.fault(("stages", number), "there is no stage share after it whose bits could be varied")
        )
    return later[0] if later else None


def _point(
    recipe: Recipe, number: int, share_stage: int | None, sparsity: float | None, bits: int | None
) -> tuple[str, dict[str, Any]]:
    """Returns the name of a point and its changes of the recipe."""
    words: list[str] = []
    varied: dict[str, Any] = {}
    if sparsity is not None:
        words.append(f"sparsity-{sparsity}")
        varied[f"stages.{number}.sparsity"] = sparsity
    if bits is not None:
        assert share_stage is not None
        words.append(f"bits-{bits}")
        varied[f"stages.{share_stage}.bits"] = bits
        for other in ("values", "budget_bytes"):  # what the recipe says instead of a number of bits
            if getattr(recipe.stages[share_stage], other) is not None:
                varied[f"stages.{share_stage}.{other}"] = None
    return "-".join(words), varied


def _table(rows: Sequence[Mapping[str, Any]], key: str | None) -> str:
    """Returns the points as a table. key: of `MEASURES`, by which the front was found."""
    apart = key == "disagreement"
    lines = [
        {
            "sparsity": "–" if row["sparsity"] is None else f"{row['sparsity']:g}",
            "bits": "–" if row["bits"] is None else str(row["bits"]),
            "bytes": f"{row['file_bytes']:,}",
            "error %": decimals(row["error"], 2),
            "validation error %": decimals(row["error_validation"], 2),
            **({"disagreement %": decimals(row["disagreement"], 2)} if apart else {}),
            "front": "*" if row["front"] else "",
        }
        for row in sorted(rows, key=lambda row: row["file_bytes"])
    ]
    drawn = tabulate(
        lines,
        headers="keys",
        tablefmt="pipe",
        disable_numparse=True,
        colalign=("right",) * (5 + apart) + ("left",),
    )
    unlabelled = "" if key == "error" else "No test image has a label. "
    if apart:
        unlabelled += "Disagreement is the share of them that the file answers otherwise than the teacher. "
    return (
        f"{drawn}\n\n{unlabelled}Bytes and test error of the file; * marks the points that no smaller file beats. "
        "Choose by the validation error: the test split is only reported."
    )


def _figure(found: Mapping[str, Any], key: str) -> "Figure":
    """Draws a measure of the points over the bytes of the file; the front has a line and labels."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    [[axes]] = drawing.grid(1, 1, (6.8, 3.9), (0, 0), top=0.5)
    drawing.calm(axes)
    rows = found["points"]
    front = sorted((row["file_bytes"], row[key]) for row in rows if row["front"])
    axes.plot(
        [x for x, _ in front], [y for _, y in front], color=drawing.BLUE, linewidth=1.2, alpha=0.5, zorder=2
    )
    for row in rows:
        style = (
            {"color": drawing.BLUE, "markersize": 7, "zorder": 4}
            if row["front"]
            else {"color": drawing.GREY, "markersize": 6, "zorder": 3}
        )
        axes.plot(row["file_bytes"], row[key], "o", markeredgecolor="white", **style)
    drawing.byte_axis(axes, [row["file_bytes"] for row in rows])
    low, high = min(row[key] for row in rows), max(row[key] for row in rows)
    if high > 5 * low > 0:  # else one very bad point would compress the scale of all others
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 90) if low / 1.3 <= t <= high * 1.3]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = max(0.15 * (high - low), 0.1)
        axes.set_ylim(max(0.0, low - room), high + room)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"{MEASURES[key]} (%)", fontsize=9, color=drawing.INK)
    axes.grid(color=drawing.GRID, linewidth=0.7)
    drawing.title(axes.figure, f"{found['name']}: {key} against size, and the front")
    names = [((row["file_bytes"], row[key]), _short(row), drawing.BLUE) for row in rows if row["front"]]
    drawing.label(axes, names, front, [(row["file_bytes"], row[key]) for row in rows if not row["front"]])
    return axes.figure


def _short(row: Mapping[str, Any]) -> str:
    zeros = [] if row["sparsity"] is None else [f"{100 * row['sparsity']:g} % zeros"]
    return " · ".join(zeros + ([] if row["bits"] is None else [f"{row['bits']} bits"]))
