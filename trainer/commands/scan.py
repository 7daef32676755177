"""Measure how much each layer can lose, and suggest prune settings."""

import argparse

from trainer.options import folder_option, recipe_changes_of, recipe_options
from trainer.recipe.words import number


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=True)
    folder_option(parser)
    parser.add_argument(
        "--stage", type=number(int), help="number of the prune stage, counted from 0 (the first one)"
    )
    parser.add_argument(
        "--cost",
        type=number(float),
        default=1.0,
        help="points of validation accuracy a setting may cost (1)",
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs.scan import scan

    scan(
        options.recipe,
        recipe_changes_of(options),
        options.folder,
        options.stage,
        options.cost,
        options.allow_python,
    )
