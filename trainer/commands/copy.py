"""Copy a recipe that comes with the package, to change it."""

import argparse
from pathlib import Path

from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="as `trainer recipes` lists it")
    parser.add_argument("file", type=path_of, nargs="?", help="where to (NAME.yaml)")


def run(options: argparse.Namespace) -> None:
    from trainer.mistakes import Mistake, nearest
    from trainer.recipe import shipped
    from trainer.storage.files import read_bytes, write_bytes

    name = options.name.removesuffix(".yaml")
    if name not in shipped.names():
        raise Mistake(
            f"{options.name}: no recipe of that name comes with the package{nearest(name, shipped.names())}"
        )
    source = shipped.find(name)
    target = options.file or Path(source.name)
    if target.is_dir():
        target /= source.name
    if target.exists():
        raise Mistake(f"{target}: is there already; name another file")
    write_bytes(target, read_bytes(source))
    print(f"{target}: a copy of {name}; trainer run {target}")
