"""List what a recipe can name: losses, models, datasets, stages, criteria or exports, each with its first line."""

import argparse

from trainer.recipe.folders import SHELVES


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shelf", choices=sorted(SHELVES.values()), metavar="SHELF", help=", ".join(sorted(SHELVES.values()))
    )


def run(options: argparse.Namespace) -> None:
    from trainer.recipe import shelves

    key = next(key for key, folder in SHELVES.items() if folder == options.shelf)
    names = shelves.names(key)
    for name in names:
        print(f"{name:{max(map(len, names))}}  {shelves.first_line(key, name)}")
