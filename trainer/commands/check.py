"""Check a recipe in seconds: no data is touched, no network built."""

import argparse

from trainer.options import recipe_changes_of, recipe_options, say_once


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=True)
    parser.add_argument(
        "--data", action="store_true", help="also open every image, and count those of each class"
    )
    parser.add_argument(
        "--build", action="store_true", help="also open the data, build the networks and rehearse every stage"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.recipe.recipe import read

    changes = recipe_changes_of(options)
    recipe, _ = read(options.recipe, changes, options.allow_python)
    for note in recipe.written.notes:
        say_once(note)
    if options.data or options.build:
        from trainer.runs.check import check

        print(check(options.recipe, changes, options.allow_python, options.data, options.build))
    print(f"{options.recipe}: fine: {', '.join(stage.stage for stage in recipe.stages)}")
