"""Classify images with a .tiny, .onnx or .pt2 file."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import Any

from trainer.mistakes import Mistake, Said
from trainer.options import model_options, say_once
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
        "--with",
        type=path_of,
        action="append",
        default=[],
        dest="others",
        metavar="FILE",
        help="a further file: all answer together, by the mean of their probabilities; may be given several times",
    )
    parser.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="compute in mixed precision: quicker where the processor has it, and no longer the report's answers (no)",
    )
    model_options(parser, "--model name python:, open .pt2: both can run code")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.predicting import Answer, answers, files_of, write_answers

    student = _student(options) if importlib.util.find_spec("torch") else _without_torch(options)
    if student.note:
        say_once(student.note)
    form = "json" if options.json else "csv" if options.csv else "text"
    found: Iterable[Answer] = answers(
        student, files_of(map(str, options.images)), options.top, os.cpu_count() or 1
    )
    if sys.stderr.isatty() and not sys.stdout.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        found = tqdm(found, unit=" images")
    if failed := write_answers(found, form, sys.stdout, sys.stderr):
        raise Said(f"{failed} images could not be read", 1)


def _student(options: argparse.Namespace) -> Any:
    from trainer.runs.answering import in_precision, open_student
    from trainer.runs.ensemble import together

    opened = {
        str(file): in_precision(open_student(file, options.model, options.allow_python), options.precision)
        for file in (options.file, *options.others)
    }
    if len(opened) <= len(options.others):
        raise Mistake("--with: a file is given twice")
    return together(opened) if options.others else opened[str(options.file)]


def _without_torch(options: argparse.Namespace) -> Any:
    from trainer.runtime.student import open_student

    if options.others or options.model or options.allow_python or options.precision != "no":
        raise Mistake(
            "--with, --model, --allow-python and --precision need torch, which is not installed here"
        )
    return open_student(options.file)
