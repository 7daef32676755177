"""Classify images with a .tiny or .onnx file."""

import argparse
import os
import sys

from trainer.mistakes import Said
from trainer.options import say_once
from trainer.recipe.words import count, path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_of)
    parser.add_argument(
        "images",
        type=path_of,
        nargs="+",
        metavar="IMAGE",
        help="files, folders, patterns such as 'a/*.png', or - for paths on stdin",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON object a line")
    forms.add_argument("--csv", action="store_true", help="rows of file, class, probability")
    parser.add_argument("--top", type=count, default=3, help="how many classes to print (3)")


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from trainer.runs.predicting import answers, files_of, open_student, write_answers

    student = open_student(options.file)
    if student.note:
        say_once(student.note)
    form = "json" if options.json else "csv" if options.csv else "text"
    found = answers(student, files_of(map(str, options.images)), options.top, os.cpu_count() or 1)
    shown = tqdm(found, unit=" images", disable=not sys.stderr.isatty() or sys.stdout.isatty())
    if failed := write_answers(shown, form, sys.stdout, sys.stderr):
        raise Said(f"{failed} images could not be read", 1)
