"""Classify images with a .tiny, .onnx or .pt2 file."""

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
    parser.add_argument(
        "--model", help="builds the network of a file that may not name it: python:module:function"
    )
    parser.add_argument(
        "--allow-python", action="store_true", help="let --model name python:, open .pt2: both can run code"
    )


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from trainer.runs.answering import open_student
    from trainer.runs.predicting import answers, files_of, write_answers

    student = open_student(options.file, options.model, options.allow_python)
    if student.note:
        say_once(student.note)
    form = "json" if options.json else "csv" if options.csv else "text"
    found = answers(student, files_of(map(str, options.images)), options.top, os.cpu_count() or 1)
    shown = tqdm(found, unit=" images", disable=not sys.stderr.isatty() or sys.stdout.isatty())
    if failed := write_answers(shown, form, sys.stdout, sys.stderr):
        raise Said(f"{failed} images could not be read", 1)
