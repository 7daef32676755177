"""Show what a recipe's teacher is worth, beside labels alone."""

import argparse

from trainer.options import folder_option, recipe_changes_of, recipe_options
from trainer.recipe.words import count, numbers

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=False)
    folder_option(parser)
    parser.add_argument("--seeds", type=count, default=3, help="how many seeds, from 0 (3)")
    parser.add_argument(
        "--rates",
        type=numbers(float),
        default=[],
        help="learning rates to choose from by validation, for each of the two by itself: 1e-3,2e-3,5e-3",
    )
    parser.add_argument("--processes", type=count, help="how many run at once (one for each core)")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.gain import gain

    gain(
        options.recipe,
        options.seeds,
        recipe_changes_of(options),
        options.folder,
        options.rates,
        options.allow_python,
        options.processes,
    )
