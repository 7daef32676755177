"""Send the log of a run to Weights & Biases: what is not there yet."""

import argparse

from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path_of, metavar="RUN", help="the run's folder")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)  # for `tracking`


def run(options: argparse.Namespace) -> None:
    from trainer.recipe.text import parse
    from trainer.reporting.sync import command

    sent = command(options.folder, parse(options.folder / "recipe.yaml").plain, options.follow)
    print(f"{options.folder}: {sent:,} lines of the log sent")
