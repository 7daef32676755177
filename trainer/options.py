"""Options of the command line that several commands share, and what they mean."""

import argparse
import os
from pathlib import Path
from typing import Any

from trainer.mistakes import Mistake, say
from trainer.recipe.words import changes_of, count, number, path_of


def recipe_options(parser: argparse.ArgumentParser, of_a_run: bool) -> None:
    """Adds a recipe, --set and --allow-python; --seed and --name too for a command that makes or reads a run."""
    parser.add_argument("recipe", type=path_of)
    recipe_changes(parser, of_a_run)


def recipe_changes(parser: argparse.ArgumentParser, of_a_run: bool) -> None:
    """Adds the options that change a recipe, without the recipe itself."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="changes",
        help="change a value, such as stages.1.training.epochs=2; may be given several times",
    )
    allow_python(parser, "the recipe name python:module:name, whose code then runs")
    parser.set_defaults(seed=None, name=None)
    if of_a_run:
        parser.add_argument(
            "--seed",
            type=number(int),
            help="another seed; without --name the run is then called NAME-seedN",
        )
        parser.add_argument("--name", help="another name of the run")


def allow_python(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --allow-python, which lets `what` happen."""
    parser.add_argument("--allow-python", action="store_true", help=f"let {what}")


def model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --model for a file that does not name its network, and --allow-python, which lets `what` happen."""
    parser.add_argument(
        "--model", help="builds the network of a file that may not name it: python:module:function"
    )
    allow_python(parser, what)


def folder_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=path_of, default=Path("runs"), help="where runs are kept (runs)")


def options_of_several(parser: argparse.ArgumentParser, seeds: int, named: bool = True) -> None:
    """Adds what a command has that runs a recipe with several seeds; `seeds` is how many by itself, `named` adds --name."""
    recipe_options(parser, of_a_run=False)
    folder_option(parser)
    parser.add_argument("--seeds", type=count, default=seeds, help=f"how many seeds, from 0 ({seeds})")
    parser.add_argument("--processes", type=count, help="how many run at once (one for each core)")
    if named:
        parser.add_argument("--name", help="another name of the runs, NAME-seedN")


def several_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what `options_of_several` says, but for --name, as the arguments of `runs.trials.trials` and its like."""
    return {
        "path": options.recipe,
        "num_seeds": options.seeds,
        "changes": recipe_changes_of(options),
        "folder": options.folder,
        "allow_python": options.allow_python,
        "processes": options.processes,
    }


def recipe_changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the changes of the recipe that --set, --seed and --name ask for, by dotted path.

    Raises:
        Mistake: --set gives a key that --seed or --name gives too.
    """
    changes = changes_of(options.changes)
    for key in ("seed", "name"):
        if key in changes and getattr(options, key) is not None:
            raise Mistake(f"--set {key}: --{key} gives it too")
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.name is not None:
        changes["name"] = options.name
    elif options.seed is not None:
        from trainer.recipe.recipe import read

        changes["name"] = f"{read(options.recipe, changes, options.allow_python)[0].name}-seed{options.seed}"
    return changes


def say_once(message: str) -> None:
    """Prints a message once for each machine. Once the processes of a run know of each other, `runs.together` does that."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        say(message)
