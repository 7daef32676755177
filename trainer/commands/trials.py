"""Run a recipe with several seeds: mean, spread and worst of every row."""

import argparse

from trainer.options import options_of_several, several_of

RESUMES = True  # the same command goes on where it stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    options_of_several(parser, seeds=3)


def run(options: argparse.Namespace) -> None:
    from trainer.runs.trials import trials

    trials(**several_of(options), name=options.name)
