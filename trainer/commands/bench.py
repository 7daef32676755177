"""Measure files of networks side by side: accuracy, latency, memory, bytes."""

import argparse
import json
from pathlib import Path

from trainer.mistakes import Mistake, Said, say
from trainer.options import model_options
from trainer.recipe.words import number, path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        type=path_of,
        nargs="+",
        metavar="FILE",
        help=".tiny (by torch, as C, and by sparse products), .onnx, .pt2, .safetensors, student.c",
    )
    parser.add_argument("--recipe", type=path_of, help="on whose test images accuracy is measured")
    parser.add_argument("--json", action="store_true", help="for programs: one line")
    parser.add_argument("--plot", type=path_of, metavar="PNG", help="draw accuracy against latency")
    parser.add_argument("--force", action="store_true", help="replace an earlier plot")
    parser.add_argument(
        "--seconds", type=number(float), default=1.0, help="that each latency is measured, about (1)"
    )
    model_options(parser, "--model and the recipe name python:, open .pt2")


def run(options: argparse.Namespace) -> None:
    _check(options)
    from trainer.reporting.drawing import png
    from trainer.reporting.plots import accuracy_against_latency
    from trainer.reporting.tables import bench_table
    from trainer.runs.bench import bench, verdicts
    from trainer.storage.files import write_bytes

    found = bench(options.files, options.recipe, options.model, options.allow_python, options.seconds)
    if options.plot is not None:
        if all(row["top1"] is None for row in found["rows"]):
            raise Mistake("--plot: no test image has a label, so there is no accuracy to draw")
        write_bytes(options.plot, png(accuracy_against_latency(found["rows"])))
    said = verdicts(found)
    if options.json:
        print(json.dumps({**found, "said": said}))
    else:
        print(bench_table(found["rows"]), *said, sep="\n\n")
    for sentence in found["missing"]:
        say(sentence)
    if found["missing"]:
        raise Said("some could not be measured", 1)


def _check(options: argparse.Namespace) -> None:
    """Raises Mistake for a plot that cannot be drawn, or would replace a file."""
    if options.seconds <= 0:
        raise Mistake(f"--seconds: got {options.seconds:g}; more than 0 is allowed")
    plot: Path | None = options.plot
    if plot is None:
        if options.force:
            raise Mistake("--force has no effect without --plot")
        return
    if options.recipe is None:
        raise Mistake("--plot needs --recipe: without images there is no accuracy")
    if plot.suffix.lower() != ".png":
        raise Mistake(f"--plot: got {plot}; a file ending in .png is allowed")
    if plot.exists() and not options.force:
        raise Mistake(f"{plot}: is there already; --force replaces it")
