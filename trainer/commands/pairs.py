"""Print which student layer is compared with which teacher layer."""

import argparse

from trainer.options import recipe_changes_of, recipe_options


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=False)


def run(options: argparse.Namespace) -> None:
    from trainer.runs.pairs import pairs

    print(pairs(options.recipe, recipe_changes_of(options), options.allow_python))
