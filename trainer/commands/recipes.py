"""List the recipes that come with the package, with what each is for and what came out."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    import shutil
    import textwrap

    from trainer.recipe import shipped

    width = min(shutil.get_terminal_size().columns, 120)
    for name in shipped.names():
        about, result = shipped.told(name)
        print(name)
        for line in (about, result):
            print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    "))
