"""The command line: `accelerate launch -m trainer run recipe.yaml`, or `python -m trainer`, or `trainer`.

A user's mistake prints one message and exits with 2. A fault of the program prints a traceback and a request to
report it.
"""

import argparse
import importlib.util
import os
import pkgutil
import sys
from types import ModuleType
from typing import NoReturn

from trainer import commands
from trainer.mistakes import Mistake, Said, brief, message_of
from trainer.options import say_once
from trainer.recipe.words import path_of
from trainer.reporting.facts import own_version
from trainer.training.stopping import Stopped

REPORT = "trainer: this is a fault of the program, not of your recipe: please report it with the lines above"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 for a user's mistake, 1 for a loss that is not finite.

    arguments: those of the command line; None for `sys.argv`.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the console cannot print must not end a run
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        options.command.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        say_once(f"interrupted{_goes_on(options)}")
        return 130
    except Stopped as stopped:
        say_once(f"{stopped}{_goes_on(options)}")
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
        say_once(message)
        return 1 if isinstance(error, FloatingPointError) else 2


def _open_closed_streams() -> None:
    """Opens the null device for standard streams that were closed before the start, which Python has as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)


def _goes_on(options: argparse.Namespace) -> str:
    if not getattr(options.command, "RESUMES", False):
        return ""
    anew = getattr(options, "fresh", False) or getattr(options, "from_stage", None) is not None
    return (
        "; the same command goes on where this stopped"
        + (", without --from and --fresh" if anew else "")
        + (" (with --allow-python)" if options.allow_python else "")
    )


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose messages are as short as all others."""

    def error(self, message: str) -> NoReturn:
        super().error(brief(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trainer", description="Distil, prune, weight-share and pack image classifiers.")
    parser.add_argument("--version", action="version", version=f"trainer {own_version()}")
    # An environment without torch (scripts/runtime) has no completion either.
    shtab = importlib.import_module("shtab") if importlib.util.find_spec("shtab") else None
    if shtab:
        shtab.add_argument_to(
            parser, help='print this shell\'s completion: eval "$(trainer --print-completion bash)"'
        )
    made = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _commands().items():
        help = (command.__doc__ or "").partition("\n")[0]
        own = made.add_parser(name, help=help, description=help)
        own.set_defaults(command=command)
        command.arguments(own)
        for action in own._actions:
            if shtab and action.type is path_of:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks
    return parser


def _commands() -> dict[str, ModuleType]:
    """Returns the files of `trainer/commands/`, by their names; `dry_run.py` would be the command dry-run."""
    names = sorted(found.name for found in pkgutil.iter_modules(commands.__path__))
    return {name.replace("_", "-"): importlib.import_module(f"trainer.commands.{name}") for name in names}
