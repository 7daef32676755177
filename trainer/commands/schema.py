"""Print the JSON Schema of recipes, for editors."""

import argparse
import json


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    from trainer.recipe.recipe import schema

    print(json.dumps(schema(), indent=1))
