"""Kills one process of two, or sends it SIGTERM, at random moments; the same command must then end in the same bits.

    python scripts/chaos_ranks.py --kills 25 --signals 20

The processes are forked with torch imported, and meet through a file; no launcher cleans up after them. After each SIGKILL the
other process must end within 60 s, with one line of words; after SIGTERM to one or both, both with status 143 and one line.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """
name: ranks
data: {dataset: digits, subset: 200, views: 3, augment: {shift: 1}}
teacher: {model: lenet300, hidden: [24, 16]}
student: {model: lenet300, hidden: [8, 6]}
stages:
  - {stage: train, who: teacher, training: {epochs: 5, batch_size: 32, lr: 1e-2}}
  - {stage: distill, training: {epochs: 6, batch_size: 32, lr: 1e-2, ema: 0.5, keep: best}, losses: &taught [{loss: kl}, {loss: contrastive}]}
  - {stage: prune, method: magnitude, sparsity: 0.6, schedule: cubic, every: 1, training: {epochs: 3, batch_size: 32}, losses: *taught}
  - {stage: share, bits: 3, training: {epochs: 2, batch_size: 32}, losses: *taught}
"""
SECONDS = 60  # in which the processes must end
PRELOAD = [
    "accelerate",
    "torch._dynamo",
    "trainer.cli",
    "trainer.runs.runner",
    "trainer.stages.share",
    "sklearn.datasets",
]


def process(rank: int, folder: Path, meet: str) -> None:
    """One of two processes of `trainer run`, as a launcher starts it; it ends with the command's status."""
    import torch
    import torch.distributed as dist

    from trainer.cli import main
    from trainer.reporting import drawing

    with open(folder / f"{meet}-{rank}.txt", "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    drawing.png = lambda figure: b""  # a report's plots take longer than the run
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{meet}.meet", rank=rank, world_size=2)
    (folder / f"{meet}-{rank}.joined").touch()
    status = main(["run", str(folder / "recipe.yaml"), "--folder", str(folder)])
    sys.stdout.flush()
    os._exit(status)


def start(context: Any, folder: Path, meet: str) -> list[Any]:
    """Starts both processes; returns when they have joined."""
    both = [context.Process(target=process, args=(rank, folder, meet)) for rank in range(2)]
    for one in both:
        one.start()
    while not all((folder / f"{meet}-{rank}.joined").exists() for rank in range(2)):
        assert all(one.is_alive() for one in both), f"{folder}: did not begin"
        time.sleep(0.002)
    return both


def end(both: list[Any], seconds: float) -> list[int | None]:
    """Waits for both; returns their statuses, None for one that had to be killed after `seconds`."""
    deadline = time.monotonic() + seconds
    for one in both:
        one.join(max(0.0, deadline - time.monotonic()))
    statuses = [one.exitcode for one in both]
    for one in both:
        one.kill()
        one.join()
    return statuses


def bits(folder: Path) -> str:
    """A digest of all tensors of each stage's checkpoint."""
    from trainer.storage.weights_file import digest, read_file

    found = sorted((folder / "ranks" / "checkpoints").glob("*/*/*.safetensors"))
    assert len(found) >= 8, found
    return hashlib.sha256("".join(digest(read_file(file)[0]) for file in found).encode()).hexdigest()


def disturbed(
    context: Any, top: Path, name: str, number: int, ranks: list[int], after: float
) -> tuple[str, list]:
    """Signals some processes of a run after a time, and runs it again to its end.

    Returns what went wrong, '' for nothing and 'early' if the run was over before; and the first run's statuses.
    """
    folder = top / name
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    both = start(context, folder, "first")
    time.sleep(after)
    if not all(one.is_alive() for one in both):
        end(both, SECONDS)
        return "early", []
    began = time.monotonic()
    for rank in ranks:
        os.kill(both[rank].pid, number)
    statuses = end(both, SECONDS)
    took = time.monotonic() - began
    said = "".join((folder / f"first-{rank}.txt").read_text() for rank in range(2))
    words = [line for line in said.splitlines() if line.startswith("trainer: ")]
    if None in statuses:
        return f"not ended after {SECONDS} s", statuses
    if number == signal.SIGKILL:
        if statuses[1 - ranks[0]] != 0 and (
            "Traceback" in said or len(words) != 1 or "has ended without a word" not in words[0]
        ):
            return f"words: {words}", statuses
    elif statuses != [143, 143] and statuses != [0, 0]:
        return f"statuses {statuses}: {words}", statuses
    elif statuses[0] == 143 and (len(words) != 1 or "Traceback" in said):
        return f"words: {words}", statuses
    again = end(start(context, folder, "again"), 600)
    if again != [0, 0]:
        return f"the same command: statuses {again}", statuses
    return "", [*statuses, round(took, 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    draw = random.Random(options.seed)
    top = Path(tempfile.mkdtemp(prefix="chaos-ranks-"))
    whole = top / "whole"
    whole.mkdir()
    (whole / "recipe.yaml").write_text(RECIPE)
    both = start(context, whole, "first")
    began = time.monotonic()
    assert end(both, 600) == [0, 0], (whole / "first-0.txt").read_text()
    seconds = time.monotonic() - began
    expected = bits(whole)
    print(f"undisturbed: {seconds:.1f} s, {expected[:12]}", flush=True)
    num_wrong = 0
    for kind, count in (("kill", options.kills), ("signal", options.signals)):
        good = turn = 0
        while good < count and turn < 4 * count:
            turn += 1
            name, after = f"{kind}-{turn}", draw.uniform(0, seconds)
            ranks = [draw.randrange(2)] if kind == "kill" or draw.random() < 0.7 else [0, 1]
            number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
            wrong, found = disturbed(context, top, name, number, ranks, after)
            if wrong == "early":
                continue
            if not wrong and bits(top / name) != expected:
                wrong = "other bits"
            print(
                f"{name}: {number.name} to {ranks} after {after:.2f} s: {found} {wrong or 'the same bits'}",
                flush=True,
            )
            num_wrong += bool(wrong)
            good += 1
            if not wrong:
                shutil.rmtree(top / name)
        print(f"{kind}: {good} at random moments, {num_wrong} wrong so far", flush=True)
    if not num_wrong:
        shutil.rmtree(top)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
