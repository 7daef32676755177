"""Write a recipe for a folder of photographs: trainer init FOLDER > recipe.yaml."""

import argparse

from trainer.recipe.words import path_of, seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_of,
        help="of class folders, with train and test or without; or a .csv of path,label",
    )
    parser.add_argument(
        "--teacher", help="timm/NAME, or a model of ours (EfficientNet-Lite0 with ImageNet's weights)"
    )
    parser.add_argument(
        "--student", help="timm/NAME, or a model of ours (the teacher's network, or a small one)"
    )
    parser.add_argument(
        "--budget", type=seconds, default=1800.0, help="how long the run may take: 90s, 30m, 2h (30m)"
    )


def run(options: argparse.Namespace) -> None:
    from trainer.runs.initial import initial_recipe

    print(initial_recipe(options.folder, options.teacher, options.student, options.budget), end="")
