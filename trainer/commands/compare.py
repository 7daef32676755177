"""Write one page about several finished runs: Pareto plot, table, what differs."""

import argparse
from pathlib import Path

from trainer.recipe.words import path_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path_of, nargs="+", metavar="RUN", help="the folders of finished runs")
    parser.add_argument(
        "--output", type=path_of, default=Path("comparison.html"), help="the page (comparison.html)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier page")


def run(options: argparse.Namespace) -> None:
    from trainer.runs.compare import compare

    print(compare(options.runs, options.output, options.force), options.output, sep="\n\n")
