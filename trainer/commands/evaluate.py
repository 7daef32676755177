"""Measure a packed file on the test split of a recipe's data."""

import argparse
import json
import time

from trainer.options import recipe_changes_of, recipe_options
from trainer.recipe.words import count, path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_of)
    recipe_options(parser, of_a_run=False)
    parser.add_argument("--json", action="store_true", help="for programs: one line")
    parser.add_argument("--threads", type=count, help="threads to compute with")


def run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    import torch

    from trainer.reporting.tables import missing, percent
    from trainer.runs.evaluate_file import evaluate_file
    from trainer.storage.files import plain

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = evaluate_file(options.file, options.recipe, recipe_changes_of(options), options.allow_python)
    result["seconds"] = time.monotonic() - started
    if options.json:
        print(json.dumps(plain(result, not_finite=lambda _: None), allow_nan=False))
    elif missing(result["top1"]):
        print(f"{options.file}: none of {result['images']:,} test images has a label")
    else:
        print(f"{options.file}: top-1 {percent(result['top1'])} of {result['images']:,} test images")
