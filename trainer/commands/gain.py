"""Show what a recipe's teacher is worth, beside labels alone."""

import argparse

from trainer.options import options_of_several, several_of
from trainer.recipe.words import numbers

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    options_of_several(parser, seeds=3, named=False)
    parser.add_argument(
        "--rates",
        type=numbers(float),
        default=[],
        help="learning rates to choose from by validation, for each of the two by itself: 1e-3,2e-3,5e-3",
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs.gain import gain

    gain(**several_of(options), rates=options.rates)
