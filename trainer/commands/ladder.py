"""Prune, share and pack at several sizes, from one distilled student."""

import argparse

from trainer.options import folder_option, recipe_changes_of, recipe_options
from trainer.recipe.words import number, numbers

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=True)
    folder_option(parser)
    parser.add_argument(
        "--stage", type=number(int), help="number of the prune stage, counted from 0 (the first one)"
    )
    parser.add_argument(
        "--sparsity", type=numbers(float), default=[], help="fractions of zeros: 0.9,0.95,0.98"
    )
    parser.add_argument("--bits", type=numbers(int), default=[], help="bits of the shared values: 3,4,5")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.ladder import ladder

    ladder(
        options.recipe,
        options.sparsity,
        options.bits,
        recipe_changes_of(options),
        options.folder,
        options.stage,
        options.allow_python,
    )
