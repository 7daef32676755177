"""The command line: `accelerate launch -m trainer run recipe.yaml`, or `python -m trainer`, or `trainer`.

A user's mistake is one clear message and exit 2, never a traceback.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a user's mistake, 1 for what went wrong in a run."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where this stopped")
        return 130
    except FloatingPointError as error:
        _say(str(error))
        return 1
    except BrokenPipeError:
        # Whoever read the output (head, say) has seen enough. Python would complain while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("TRAINER_TRACEBACK"):
            raise
        _say(str(error))
        return 2
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _say(f"torch and torchvision do not fit together ({error}): install a matching pair, "
             "such as pip install torch==2.15.0 torchvision==0.29.2")
        return 2


def _say(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trainer: {message}" if "\n" not in message else f"trainer:\n{message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer", description="Distil, prune, weight-share and pack image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(command=function)
        return made

    def recipe_options(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", type=Path)
        made.add_argument("--seed", type=int, help="another seed; the run is then called NAME-seedN")
        made.add_argument("--name", help="another name of the run")
        made.add_argument("--set", action="append", default=[], metavar="PLACE=VALUE", dest="changes",
                          help="change a value, such as stages.1.training.epochs=2")

    run = command(_run, "run", "Run a recipe; an interrupted one goes on where it stopped.")
    recipe_options(run)
    run.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    check = command(_check, "check", "Check a recipe in seconds: no data is touched, no network built.")
    recipe_options(check)
    pairs = command(_pairs, "pairs", "Print which student layer looks at which teacher layer.")
    recipe_options(pairs)
    fetch = command(_fetch, "fetch", "Fetch a dataset ahead of time.")
    fetch.add_argument("dataset", nargs="+")
    inspect = command(_inspect, "inspect", "Say where each byte of a packed file goes.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    unpack = command(_unpack, "unpack", "Write the weights of a packed file as safetensors.")
    unpack.add_argument("file", type=Path)
    unpack.add_argument("output", type=Path, nargs="?", help="FILE with the ending .safetensors, when not given")
    predict = command(_predict, "predict", "Classify images with a packed file.")
    predict.add_argument("file", type=Path)
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    predict.add_argument("--top", type=int, default=3, help="how many classes to tell (3)")
    evaluate = command(_evaluate, "evaluate", "Measure a packed file on the test split of a recipe's data.")
    evaluate.add_argument("file", type=Path)
    recipe_options(evaluate)
    evaluate.add_argument("--json", action="store_true")
    schema = command(_schema, "schema", "Print the JSON Schema of recipes, for editors.")
    schema.set_defaults()
    return parser


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for change in options.changes:
        place, found, value = change.partition("=")
        if not found:
            raise ValueError(f"--set {change}: PLACE=VALUE is allowed, such as stages.1.training.epochs=2")
        try:
            changes[place] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change}: the value is not YAML: {error}") from None
    if options.seed is not None:
        changes["seed"] = options.seed
        if options.name is None:
            from trainer.recipe import read

            changes["name"] = f"{read(options.recipe, changes)[0].name}-seed{options.seed}"
    if options.name is not None:
        changes["name"] = options.name
    return changes


def _run(options: argparse.Namespace) -> None:
    from trainer.runner import run

    run(options.recipe, _changes(options), options.folder)


def _check(options: argparse.Namespace) -> None:
    from trainer.recipe import read

    recipe, _ = read(options.recipe, _changes(options))
    print(f"{options.recipe}: fine: {', '.join(stage.stage for stage in recipe.stages)}")


def _pairs(options: argparse.Namespace) -> None:
    import torch
    from tabulate import tabulate

    from trainer import teacher
    from trainer.data import make_data
    from trainer.objective import Objective
    from trainer.recipe import read
    from trainer.runner import _make_teacher

    recipe, _ = read(options.recipe, _changes(options))
    data = make_data(recipe.data, torch.device("cpu"))
    guide = _make_teacher(recipe, data)
    student = teacher.create(recipe.student, data.shape, len(data.classes))
    for number, stage in enumerate(recipe.stages):
        terms = getattr(stage, "losses", None)
        rows = Objective(student, terms, data, guide).pairs() if terms else []
        if rows:
            print(f"stages[{number}] {stage.stage}")
            print(tabulate([{k: "x".join(map(str, v)) if isinstance(v, tuple) else v for k, v in row.items()} for row in rows],
                           headers="keys"))


def _fetch(options: argparse.Namespace) -> None:
    from trainer.fetch import fetch

    for name in options.dataset:
        started = time.monotonic()
        print(f"{name}: {fetch(name)} ({time.monotonic() - started:.1f} s)", flush=True)


def _inspect(options: argparse.Namespace) -> None:
    from trainer import packed

    account, header = packed.account(_read(options.file), str(options.file))
    if options.json:
        print(json.dumps({"header": header, "account": account}))
        return
    from tabulate import tabulate

    total = options.file.stat().st_size
    net = header.get("net") or {"model": "(brought by the reader)"}
    print(f"{options.file}: {total:,} bytes: {net['model']} "
          f"{ {k: v for k, v in net.items() if k != 'model'} or ''} for images {'x'.join(map(str, header['shape']))}, "
          f"{len(header['classes'])} classes\n")
    rows = [{key: (f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value)
             for key, value in row.items()} for row in account]
    print(tabulate(rows, headers="keys", colalign=("left", "left")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _unpack(options: argparse.Namespace) -> None:
    from trainer import checkpoint, packed

    output = options.output or options.file.with_suffix(".safetensors")
    if output.exists():
        raise ValueError(f"{output}: is there already; name another file")
    state, _ = packed.tensors(_read(options.file), str(options.file))
    checkpoint.save_file(output, state)
    print(f"{output}: {len(state)} tensors, {output.stat().st_size:,} bytes")


def _predict(options: argparse.Namespace) -> None:
    import torch

    from trainer import packed
    from trainer.images import read_image

    model, header = packed.decode(_read(options.file), str(options.file))
    from trainer.teacher import normalize

    for path in options.images:
        image = read_image(path, tuple(header["shape"]))
        with torch.inference_mode():
            shares = model(normalize(image[None].float() / 255, header["mean"], header["std"])).softmax(-1)[0]
        best = shares.topk(min(options.top, len(shares)))
        told = "  ".join(f"{header['classes'][i]} {p * 100:.1f} %" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))
        print(f"{path}: {told}")


def _evaluate(options: argparse.Namespace) -> None:
    started = time.monotonic()
    from trainer.runner import evaluate_file

    result = evaluate_file(options.file, options.recipe, _changes(options))
    result["seconds"] = time.monotonic() - started
    print(json.dumps(result) if options.json else f"{options.file}: top-1 {result['top1']:.2f} % of {result['images']:,} test images")


def _schema(options: argparse.Namespace) -> None:
    from trainer.recipe import schema

    print(json.dumps(schema(), indent=1))


if __name__ == "__main__":
    sys.exit(main())
