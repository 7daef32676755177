"""Write a packed file's network for where it must run, and prove it there."""

import argparse

from trainer.options import allow_python
from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_of)
    parser.add_argument(
        "--to",
        action="append",
        required=True,
        help="onnx, ..., or with settings '{to: onnx, compressed: false}'; may be given several times",
    )
    parser.add_argument(
        "--recipe", type=path_of, help="on whose test images it is proven; else random inputs"
    )
    parser.add_argument("--folder", type=path_of, help="where they are written (export/ beside the file)")
    parser.add_argument("--force", action="store_true", help="replace earlier exports")
    allow_python(parser, "--to and the recipe name python:")


def run(options: argparse.Namespace) -> None:
    from trainer.recipe import text
    from trainer.runs.export_file import export_file

    to = [text.value(given) if given.startswith("{") else given for given in options.to]
    folder = options.folder or options.file.parent / "export"
    export_file(options.file, to, folder, options.recipe, options.force, options.allow_python)
