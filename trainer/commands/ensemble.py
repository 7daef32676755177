"""Run a recipe with several seeds, and measure the packed students together."""

import argparse

from trainer.options import folder_option, recipe_changes_of, recipe_options
from trainer.recipe.words import count

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=False)
    folder_option(parser)
    parser.add_argument("--seeds", type=count, default=10, help="how many students, seeds from 0 (10)")
    parser.add_argument("--name", help="another name of the runs, NAME-seedN")
    parser.add_argument("--processes", type=count, help="how many run at once (one for each core)")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.ensemble import ensemble

    ensemble(
        options.recipe,
        options.seeds,
        recipe_changes_of(options),
        options.folder,
        options.name,
        options.allow_python,
        options.processes,
    )
