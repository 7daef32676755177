"""Check a recipe in seconds: no data is touched, no network built."""

import argparse
from pathlib import Path

from trainer.mistakes import Mistake
from trainer.options import recipe_changes_of, recipe_options, say_once
from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=True)
    parser.add_argument(
        "--data", action="store_true", help="also open every image, and count those of each class"
    )
    parser.add_argument(
        "--build", action="store_true", help="also open the data, build the networks and rehearse every stage"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also measure on one batch what each loss weighs, and the weight that balances it",
    )
    parser.add_argument("--folder", type=path_of, help="where --measure looks for the taught teacher (runs)")


def run(options: argparse.Namespace) -> None:
    from trainer.recipe.recipe import read

    if options.folder is not None and not options.measure:
        raise Mistake("--folder has no effect without --measure")
    changes = recipe_changes_of(options)
    recipe, _ = read(options.recipe, changes, options.allow_python)
    for note in recipe.written.notes:
        say_once(note)
    if options.data or options.build or options.measure:
        from trainer.runs.check import check

        measure = options.folder or Path("runs") if options.measure else None
        print(check(options.recipe, changes, options.allow_python, options.data, options.build, measure))
    print(f"{options.recipe}: fine: {', '.join(stage.stage for stage in recipe.stages)}")
