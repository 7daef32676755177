"""Feeds mutated recipes, files and hostile inputs to the program and counts what it does with them.

    python scripts/fuzz.py --count 10000 --folder fuzz     # all kinds; goes on where it stopped
    python scripts/fuzz.py packed --count 500              # one kind

Expected of each input: it is read, or refused in words of at most 300 characters a line (a recipe's with its line),
with no other exception, within 2 s of processor time (or twice what the undamaged file takes) and 500 MB above a warm
process; no code of it runs and nothing is written outside. Everything is imported once; batches run in forked processes. An input is a function of its kind
and number. What fails is written to FOLDER/KIND-NUMBER.txt, the outcomes to FOLDER/KIND.jsonl.
"""

import argparse
import collections
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_targets
import psutil
import torch

from trainer.mistakes import Mistake

MOST_SECONDS, MOST_BYTES, MOST_CHARACTERS = 2.0, 500e6, 300
HANGING, ASLEEP = 30, 600  # seconds of the processor, and on the clock, after which an input is given up
BATCH = 100


def main() -> int:
    """Runs the kinds that the command line names; returns 1 if an input did something unexpected."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(fuzz_targets.TARGETS)} (all)")
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--folder", type=Path, default=Path("fuzz"))
    parser.add_argument("--only", type=int, help="run this one input here, without catching what it raises")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    options.folder.mkdir(parents=True, exist_ok=True)
    bad = 0
    for kind in options.kinds or fuzz_targets.TARGETS:
        work = (options.folder / f"{kind}.work").resolve()
        work.mkdir(exist_ok=True)
        attempt = fuzz_targets.TARGETS[kind](work)
        if options.only is not None:
            print(attempt(random.Random(f"{kind} {options.only}"), options.only))
            continue
        run(kind, attempt, options.count, options.folder)
        bad += print_table(kind, options.folder)
    return int(bad > 0)


def run(kind: str, attempt: Callable, count: int, folder: Path) -> None:
    """Tries inputs 0 to count - 1 of a kind that have no outcome yet, in forked batches."""
    record = folder / f"{kind}.jsonl"
    done = {outcome["number"] for outcome in outcomes(record)}
    due = [number for number in range(count) if number not in done]
    while due:
        batch, due = due[:BATCH], due[BATCH:]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with open(record, "a", buffering=1) as file:
                    for number in batch:
                        file.write(json.dumps(outcome_of(kind, attempt, number, folder)) + "\n")
                status = 0
            finally:
                os._exit(status)
        if ended_well(child, record, len(batch)):
            continue
        # The batch's process has died or hangs: the input after the last outcome is the cause.
        done = {outcome["number"] for outcome in outcomes(record)}
        left = [number for number in batch if number not in done]
        with open(record, "a") as file:
            file.write(
                json.dumps({"number": left[0], "what": "killed the process, or hung", "bad": True}) + "\n"
            )
        due = left[1:] + due


def ended_well(child: int, record: Path, num: int) -> bool:
    """Waits for a batch's process; kills it if no input ends for long. Returns whether it ended by itself."""
    size, since, worked = -1, time.monotonic(), 0.0
    watched = psutil.Process(child)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        now, busy = record.stat().st_size if record.exists() else 0, watched.cpu_times().user
        if now != size:
            size, since, worked = now, time.monotonic(), busy
        elif busy - worked > HANGING or time.monotonic() - since > ASLEEP:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)


def outcome_of(kind: str, attempt: Callable, number: int, folder: Path) -> dict[str, Any]:
    """Tries one input; returns its number, what happened, and whether that is bad."""
    before, started = peak_bytes(reset=True), time.process_time()
    bad, detail = False, ""
    try:
        what = attempt(random.Random(f"{kind} {number}"), number)
    except (Mistake, OSError) as error:
        what, detail = "refused", str(error)
        unlawful = [line for line in detail.split("\n") if len(line) > MOST_CHARACTERS]
        if unlawful:
            what, bad = "a message that is too long", True
        elif any(ord(letter) < 32 and letter != "\n" for letter in detail):
            what, bad = "a message with control characters", True
    except BaseException as error:
        what, bad = f"traceback: {type(error).__name__}", True
        detail = traceback.format_exc()
    seconds, num_bytes = time.process_time() - max(started, fuzz_targets.began), peak_bytes() - before
    if seconds > max(MOST_SECONDS, 2 * fuzz_targets.usual) or num_bytes > MOST_BYTES:
        what, bad = f"{what}, slow or large", True
        detail += f"\n{seconds:.1f} s, {num_bytes / 1e6:.0f} MB"
    if bad:
        (folder / f"{kind}-{number}.txt").write_text(f"{what}\n{detail}\n", errors="replace")
    return {
        "number": number,
        "what": what,
        "bad": bad,
        "seconds": round(seconds, 3),
        "mb": round(num_bytes / 1e6),
    }


def peak_bytes(reset: bool = False) -> float:
    """Returns the largest memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcomes(record: Path) -> list[dict[str, Any]]:
    """Returns the outcomes so far; a last line that a kill cut off is left out."""
    found = []
    for line in record.read_text().splitlines() if record.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def print_table(kind: str, folder: Path) -> int:
    """Prints how often each thing happened; returns the number of bad outcomes."""
    found = outcomes(folder / f"{kind}.jsonl")
    counts = collections.Counter((one["bad"], one["what"]) for one in found)
    longest = max((one.get("seconds", 0) for one in found), default=0)
    largest = max((one.get("mb", 0) for one in found), default=0)
    print(f"\n{kind}: {len(found):,} inputs, at most {longest:.2f} s and {largest:,} MB")
    for (bad, what), count in sorted(counts.items(), key=lambda item: (-item[0][0], -item[1])):
        print(f"  {count:7,}  {'BAD ' * bad}{what}")
    sys.stdout.flush()
    return sum(count for (bad, _), count in counts.items() if bad)


if __name__ == "__main__":
    sys.exit(main())
