"""Kills, damages and starves small runs, and compares what they end with, bit for bit, with undisturbed runs.

    python scripts/chaos.py kills --count 1000 --folder chaos     # goes on where it stopped
    python scripts/chaos.py damage --count 500 --folder chaos     # after each kill, a file of the run is altered or cut
    python scripts/chaos.py saves --count 100 --folder chaos      # writing, syncing or renaming fails once
    python scripts/chaos.py signals --count 20 --folder chaos     # SIGTERM, SIGHUP, SIGINT

Half of the kills come at a random time, half inside an operation on the disk; half of them lose what was not synced,
as a power failure does. The program is imported once, and each start is a fork. The same command is started again
until the run has ended; then the packed file, the weights of every stage and the rows of the report are compared. If a
start refuses a damaged file by name, the file is removed, as the message says, and that is counted. Where a line says
that `--from N` makes a damaged checkpoint anew, that is done before the comparison, and counted too.
"""

import argparse
import collections
import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from chaos_disk import Disk, lose_unsynced
from mutations import damaged

from trainer.cli import main as command_line
from trainer.reporting import report
from trainer.stages import pack
from trainer.storage.weights_file import digest, read_file
from trainer.training import fit

RECIPES = {
    "whole": """
name: run
data: {dataset: digits, subset: 240, validation: 60, views: 2, augment: {shift: 1}}
teacher: {model: lenet300, hidden: [40]}
student: {model: separable, widths: [12, 24], strides: [2, 1], first_kernel: 3}
stages:
  - {stage: train, who: teacher, training: {epochs: 4, batch_size: 20, lr: 1e-2, keep: best}}
  - stage: distill
    training: {epochs: 6, batch_size: 10, lr: 3e-2, ema: 0.8, optimizer: adamw}
    losses: &taught [{loss: kl, weight: 0.5, temperature: 2}, {loss: cross_entropy, weight: 0.5}, {loss: hint, weight: 0.1}]
  - {stage: fold}
  - {stage: prune, method: magnitude, sparsity: 0.3, training: {epochs: 1, batch_size: 20, lr: 2e-3}, losses: *taught}
  - {stage: share, bits: 4, training: {epochs: 1, batch_size: 20, lr: 5e-4}, losses: *taught}
  - {stage: pack}
""",
    "alone": """
name: run
data: {dataset: digits, subset: 240, validation: 60}
student: {model: lenet300, hidden: [20]}
stages:
  - {stage: train, training: {epochs: 5, batch_size: 20, lr: 5e-2, schedule: one_cycle, optimizer: sgd, accumulate: 2}}
  - {stage: prune, method: magnitude, sparsity: 0.5, schedule: cubic, training: {epochs: 2, batch_size: 20, lr: 1e-2}}
  - {stage: share, bits: 3, training: {epochs: 1, batch_size: 20}}
  - {stage: pack}
""",
    "kept answers": """
name: run
data: {dataset: digits, subset: 240, validation: 60, views: 2, augment: {shift: 1}}
cache: {where: disk}
teacher: {model: lenet300, hidden: [40]}
student: {model: lenet300, hidden: [10]}
stages:
  - {stage: train, who: teacher, training: {epochs: 4, batch_size: 20, lr: 1e-2}}
  - {stage: distill, training: {epochs: 5, batch_size: 20, lr: 2e-2}, losses: [{loss: kl}]}
  - {stage: pack}
""",
}
FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
MOST_STARTS = 40


def main() -> int:
    """Runs trials until so many kills (or saves, signals) are recorded; returns 1 if one ended otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["kills", "damage", "saves", "signals", "small_disk"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("chaos"))
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop after so long; the same command goes on"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    record = work / f"{options.what}.jsonl"
    kept = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    started = time.monotonic()
    expected: dict[str, Any] = {}
    while (
        sum(trial["strikes"] for trial in kept) < options.count
        and time.monotonic() - started < options.seconds
    ):
        number = len(kept)
        name = list(RECIPES)[number % len(RECIPES)]
        if name not in expected:
            expected[name] = undisturbed(name, work / f"undisturbed-{name.replace(' ', '-')}")
        begun = time.monotonic()
        made = trial(options.what, name, number, expected[name], work / f"{options.what}-{number}")
        kept.append(made | {"recipe": name, "seconds": round(time.monotonic() - begun, 1)})
        with open(record, "a") as file:
            file.write(json.dumps(kept[-1]) + "\n")
    return print_table(options.what, kept)


def trial(what: str, name: str, number: int, expected: dict[str, Any], here: Path) -> dict[str, Any]:
    """Strikes a run several times, lets it end, and compares it. Its folder stays if that is not as expected."""
    chance = random.Random(f"{what} {number}")
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    if what == "small_disk":
        (here / "runs").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(here / "runs")], check=True)
    try:
        (here / "recipe.yaml").write_text(RECIPES[name])
        strikes, hands, told, said = 0, 0, [], ""
        differences: list[str] = []
        planned = chance.randint(2, 8) if what in ("kills", "damage") else 1
        for _ in range(MOST_STARTS):
            plan = a_plan(what, chance, expected) if strikes < planned else {}
            status, output = start(here, plan, chance)
            said += output
            struck = status in (
                -signal.SIGKILL,
                "failed save",
                *(SIGNALS.values() if "signal" in plan else ()),
            )
            if "fails" in plan or "fill" in plan:
                struck = status == 2
            strikes += struck
            if struck and status != -signal.SIGKILL:
                lines = [line for line in output.splitlines() if line.startswith("trainer: ")]
                wrong = "Traceback" in output or len(lines) != 1 or len(lines[0]) > 300 + len(str(here))
                wrong |= ("fails" in plan or "fill" in plan) and str(here) not in output
                wrong |= "signal" in plan and status != SIGNALS[plan["signal"]]
                if wrong:
                    told.append(f"{plan}: {status}: {output[-600:]}")
            if struck and plan.get("power"):
                lose_unsynced(here / "runs", here / "synced.log", chance)
            if struck and what == "damage":
                damage_a_file(here / "runs" / "run", chance)
            if status == 0 and (here / "runs" / "run" / "done").exists():
                break
            if not struck and status != 0:
                named = re.findall(r"(/[^\s:;,()]+)", output.split("trainer: ")[-1])
                files = [
                    Path(word)
                    for word in named
                    if word.startswith(str(here / "runs")) and Path(word).is_file()
                ]
                if what != "damage" or not files or "Traceback" in output:
                    told.append(f"status {status}: {output[-1500:]}")
                    break
                files[0].unlink()
                hands += 1
        else:
            told.append("it never ended")
        named = re.findall(r"--from (\d)", said)
        if named and not told and ending(here) != expected["ending"]:
            anew = min(named)
            status, output = start(here, {}, chance, ["--from", anew])
            told += [f"--from {anew}: status {status}: {output[-1500:]}"] if status else []
            hands += 1
        found = ending(here) if not told else {}
        same = found == expected["ending"]
        if not same and not told:
            differing = [key for key in expected["ending"] if found.get(key) != expected["ending"][key]]
            unnamed = [key for key in differing if not is_named(key, said)]
            told = [f"{key} differs" for key in unnamed]
            differences = sorted({one for one in said.splitlines() if "--from" in one})
        if not told:
            shutil.rmtree(here / "runs", ignore_errors=True)
        return {
            "number": number,
            "strikes": strikes,
            "hands": hands,
            "lines": differences,
            "same": same and not told,
            "told": told,
        }
    finally:
        if what == "small_disk":
            subprocess.run(["umount", "-l", str(here / "runs")], check=True)
        if not any(here.iterdir()) or not (here / "runs").exists():
            shutil.rmtree(here, ignore_errors=True)


def a_plan(what: str, chance: random.Random, expected: dict[str, Any]) -> dict[str, Any]:
    """Draws what happens to the next start of a run."""
    if what == "signals":
        return {
            "signal": chance.choice(list(SIGNALS)),
            "after": chance.uniform(0.2, 0.9) * expected["seconds"],
        }
    if what == "saves":
        return {"at": chance.randrange(expected["operations"]), "fails": chance.choice(FAILURES)}
    if what == "small_disk":
        return {"fill": chance.randrange(0, 300_000)}
    plan: dict[str, Any] = {"power": chance.random() < 0.5}
    if chance.random() < 0.5:
        return plan | {"after": chance.uniform(0, expected["seconds"]), "signal_kill": True}
    return plan | {"at": chance.randrange(max(1, expected["operations"] // 2))}


def start(
    here: Path, plan: dict[str, Any], chance: random.Random, more: list[str] | None = None
) -> tuple[int, str]:
    """Starts the command in a fork, strikes as planned, and returns its status (minus a signal) and its output."""
    output = here / "output.txt"
    moment = chance.random()
    filler = here / "runs" / "filler"
    filler.unlink(missing_ok=True)
    if "fill" in plan:
        free = shutil.disk_usage(filler.parent).free
        filler.write_bytes(bytes(max(0, free - plan["fill"])))
    child = os.fork()
    if child == 0:
        status = 99
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(here)
            os.environ["TRAINER_DATA"] = str(here / "runs" / "cache")
            Disk(here / "synced.log", plan.get("at"), moment, plan.get("fails")).watch()
            status = run_here(more or [])
            (here / "modules.json").write_text(json.dumps(sorted(sys.modules)))
            print(f"{time.process_time():.2f} s of processor time", flush=True)
        except BaseException as error:
            with contextlib.suppress(OSError):
                print(f"Traceback: {type(error).__name__}: {error}", flush=True)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    if "after" in plan:
        time.sleep(plan["after"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if plan.get("signal_kill") else plan["signal"])
    _, status = os.waitpid(child, 0)
    filler.unlink(missing_ok=True)
    text = output.read_text(errors="replace") if output.exists() else ""
    return os.waitstatus_to_exitcode(status), text


def run_here(more: list[str]) -> int:
    """Runs the command in this process, with a checkpoint every other step, without plots and a fresh process."""
    from trainer.runs.evaluate_file import evaluate_file

    fit.CHECKPOINT_SECONDS, fit.LOG_STEPS = 0, 4  # type: ignore[attr-defined]
    report.accuracy_against_bytes = None  # type: ignore[assignment]
    report.position_of = lambda row: None  # type: ignore[assignment]
    report.histograms = lambda name, weights: []  # type: ignore[assignment]
    pack._in_fresh_process = lambda run, path: evaluate_file(
        path, run.recipe_path, allow_python=run.allow_python
    )
    return command_line(["run", "recipe.yaml", "--folder", str(Path("runs").resolve()), *more])


def undisturbed(name: str, here: Path) -> dict[str, Any]:
    """Returns how a run ends that nothing happens to, its seconds, and its operations on the disk.

    It is kept in the folder: another version of the program or another machine needs another folder.
    """
    kept = here / "expected.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["recipe"] == RECIPES[name]:
        _import_all(here / "modules.json")
        return found
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    (here / "again").mkdir()
    for folder in (here, here / "again"):
        (folder / "recipe.yaml").write_text(RECIPES[name])
    status, output = start(here, {}, random.Random(0))
    assert status == 0, output
    _import_all(here / "modules.json")
    begun = time.monotonic()
    status, output = start(here / "again", {}, random.Random(0))
    seconds = time.monotonic() - begun
    operations = (here / "synced.log").read_text().splitlines().count("{}")
    expected = {"recipe": RECIPES[name], "ending": ending(here), "seconds": seconds, "operations": operations}
    kept.write_text(json.dumps(expected))
    return json.loads(kept.read_text())


def _import_all(modules: Path) -> None:
    """Imports what a run imports, so that the later forks need not."""
    for module in json.loads(modules.read_text()):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def ending(here: Path) -> dict[str, Any]:
    """Returns digests of the packed file and of each stage's weights, and the rows without their times."""
    run = here / "runs" / "run"
    rows = json.loads((run / "report.json").read_text())["rows"]
    found: dict[str, Any] = {
        "rows": [
            {k: v for k, v in row.items() if "second" not in k and k != "teacher_images"} for row in rows
        ],
        "packed": hashlib.sha256((run / "student.tiny").read_bytes()).hexdigest(),
    }
    for stage in sorted((run / "checkpoints").iterdir()):
        newest = max(path for path in stage.iterdir() if path.name.isdigit())
        for file in sorted(newest.glob("*.safetensors")):
            with contextlib.suppress(ValueError):
                found[f"{stage.name}/{file.stem}"] = digest(read_file(file)[0])
    return found


def is_named(key: str, said: str) -> bool:
    """Returns whether a difference was told by a line of the run.

    A damaged checkpoint of a finished stage is named at the next start. Answers that were damaged or lost are computed
    anew, to the same bits.
    """
    return "/" in key and bool(re.search(rf"{re.escape(key.split('/')[0])}/\d+: .*--from \d", said))


def damage_a_file(run: Path, chance: random.Random) -> None:
    """Alters or cuts one of the run's files."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    if files:
        path = chance.choice(files)
        path.write_bytes(damaged(path.read_bytes(), chance))


def print_table(what: str, kept: list[dict[str, Any]]) -> int:
    """Prints the figures; returns 1 if a run ended otherwise than the undisturbed one."""
    strikes = sum(one["strikes"] for one in kept)
    named = [one for one in kept if not one["same"] and not one["told"]]
    bad = [one for one in kept if one["told"]]
    good = strikes - sum(one["strikes"] for one in bad + named)
    counts = collections.Counter(one["recipe"] for one in kept)
    hands, hours = sum(one["hands"] for one in kept), sum(one["seconds"] for one in kept) / 3600
    print(
        f"{what}: {good} of {strikes} in {len(kept)} runs end identical; {hands} files removed as told; {hours:.2f} h"
    )
    if named:
        print(
            f"  {len(named)} runs differ in what a line of theirs named: a damaged checkpoint, or lost answers"
        )
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for one in bad:
        print(f"  run {one['number']} ({one['recipe']}): {' | '.join(one['told'])}")
    sys.stdout.flush()
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
