"""Run a recipe with several seeds, and measure the packed students together."""

import argparse

from trainer.options import options_of_several, several_of

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    options_of_several(parser, seeds=10)


def run(options: argparse.Namespace) -> None:
    from trainer.runs.ensemble import ensemble

    ensemble(**several_of(options), name=options.name)
