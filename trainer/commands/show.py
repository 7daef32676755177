"""Write a picture of some training images as the networks see them, with the teacher's answers."""

import argparse
from pathlib import Path

from trainer.options import recipe_changes_of, recipe_options
from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=False)
    parser.add_argument(
        "--output", type=path_of, default=Path("views.png"), help="the picture's file (views.png)"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs.showing import show
    from trainer.storage import files

    picture, reason = show(options.recipe, recipe_changes_of(options), options.allow_python)
    files.write_bytes(options.output, picture)
    print(f"{options.output}" + (f" (without a teacher's answers: {reason})" if reason else ""))
