"""Opens and times a network in a process of its own, whose memory is then the network's and its runtime's alone."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.timing import MOST_SECONDS, forget_peak, latency, memory

#: Opens a file and returns what answers normalised float32 images [N, C, H, W].
Load = Callable[[], Callable[[np.ndarray], Any]]


def measured(
    prepare: Callable[..., Load],
    arguments: Mapping[str, Any],
    shape: Sequence[int],
    threads: int,
    batches: Sequence[int] = (),
    most_seconds: float = MOST_SECONDS,
) -> dict[str, Any]:
    """Measures what a network costs in a fresh process.

    Args:
        prepare: A function of some module: imports the runtime and returns the function that opens the file.
        arguments: Its keyword arguments, of JSON's types.
        shape: (C, H, W) of the images.
        threads: That the process computes with; `prepare` gets it as `threads`.
        batches: The numbers of images at a time that are timed; without any the network answers one image once.
        most_seconds: That each is timed, about.

    Returns:
        "load_seconds" and "load_cpu_seconds" (opening, without the runtime's import), "seconds", {batch: (median, 95th percentile)},
        and, on Linux, "peak_bytes" (the most memory of the process) and "own_bytes" (that minus what it had with the runtime alone).

    Raises:
        RuntimeError: With what the process complains of.
    """
    order = {
        "prepare": f"{prepare.__module__}:{prepare.__qualname__}",
        "arguments": {**arguments, "threads": threads},
        "shape": list(shape),
        "batches": list(batches),
        "most_seconds": most_seconds,
    }
    package = str(Path(__file__).parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), package) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "trainer.exporting.fresh"]
    done = subprocess.run(
        command, input=json.dumps(order), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a fresh process could not run it:\n{done.stderr[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["seconds"] = {batch: tuple(found["seconds"][str(batch)]) for batch in batches}
    return found


def _measure(order: Mapping[str, Any]) -> dict[str, Any]:
    module, _, name = order["prepare"].partition(":")
    load = getattr(importlib.import_module(module), name)(**order["arguments"])
    random = np.random.default_rng(0).standard_normal((max([1, *order["batches"]]), *order["shape"]))
    images = random.astype(np.float32)
    del random
    forget_peak()
    before = memory()
    wall, processor = time.perf_counter(), time.process_time()
    run = load()
    found: dict[str, Any] = {
        "load_seconds": time.perf_counter() - wall,
        "load_cpu_seconds": time.process_time() - processor,
    }
    run(images[:1])
    found["seconds"] = {
        str(batch): latency(run, images[:batch], order["most_seconds"]) for batch in order["batches"]
    }
    after = memory()
    if before is not None and after is not None:
        found |= {"peak_bytes": after[1], "own_bytes": max(0, after[1] - before[0])}
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
