"""Run a recipe; an interrupted one goes on where it stopped."""

import argparse

from trainer.mistakes import Mistake
from trainer.options import folder_option, recipe_changes_of, recipe_options
from trainer.recipe.words import count

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, of_a_run=True)
    folder_option(parser)
    parser.add_argument(
        "--threads", type=count, help="threads of each process (those of the recipe, or all physical cores)"
    )
    parser.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="run this stage (its name, or its number from 0) and all after it anew",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run all stages anew, and take none over from other runs"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="time a few steps of every stage, and say what the whole will take",
    )
    parser.add_argument(
        "--no-images", action="store_true", help="leave images of the data out of report.html"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs import runner

    if options.fresh and options.from_stage is not None:
        raise Mistake("--from has no effect with --fresh, which runs all stages anew")
    if options.dry_run:
        if options.fresh or options.from_stage is not None:
            raise Mistake("--from and --fresh have no effect with --dry-run, which keeps nothing")
        if options.no_images:
            raise Mistake("--no-images has no effect with --dry-run, which writes no report")
        from trainer.runs.dry_run import dry_run

        print(dry_run(options.recipe, recipe_changes_of(options), options.threads, options.allow_python))
        return
    changes = recipe_changes_of(options)
    if options.no_images:
        if changes.setdefault("report_images", False) is not False:
            raise Mistake("--set report_images: --no-images gives it too")
    runner.run(
        options.recipe,
        changes,
        options.folder,
        options.threads,
        options.allow_python,
        options.from_stage,
        options.fresh,
    )
