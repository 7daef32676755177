"""Run a recipe with several seeds: mean, spread and worst of every row."""

import argparse

from trainer.options import options_of_several, recipe_changes_of

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    options_of_several(parser, seeds=3)
    parser.add_argument("--name", help="another name of the runs, NAME-seedN")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.trials import trials

    trials(
        options.recipe,
        options.seeds,
        recipe_changes_of(options),
        options.folder,
        options.name,
        options.allow_python,
        options.processes,
    )
