"""Compares time, inertia and memory of the codebook search with other installed tools.

Run:    python scripts/bench_kmeans.py     (all cases; an hour or two, most of it in the slow rivals)
        python scripts/bench_kmeans.py --sizes 1e6 --clusters 16 32 --limit 60
Rivals: pip install ckwrap kmeans1d coremltools     (each is left out if it cannot be imported)

Every method first runs once in a fresh process, under a limit of CPU time and of memory: that gives its
memory, and whether it finishes at all. Those that took less than `--quick` CPU seconds then run in turns in
this process, and the medians are printed; for the slower ones the single run is printed. All use one thread,
so CPU seconds are comparable even on a busy machine.

Memory is the highest resident size during the call less that before it, input and imports not counted (Linux
only). The optimum is the least inertia of all methods here (ckwrap and kmeans1d are exact where they finish)
and of the dynamic programme on 2^16 bins followed by Lloyd's algorithm on the sorted values until it converges.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import contextlib
import importlib.util
import json
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.compression.kmeans import assign, inertia, kmeans_linear, kmeans_optimal


def make_values(kind: str, size: int) -> np.ndarray:
    """Returns float32 values: a Gaussian, or a mixture like a layer's weights (narrow, heavy-tailed and wide)."""
    random = np.random.default_rng(0)
    values = random.standard_normal(size, dtype=np.float32)
    if kind == "mixture":
        values *= np.float32(0.02)
        values[: size // 3] = random.laplace(0, 0.03, size // 3)
        values[-(size // 20) :] *= 5
        random.shuffle(values)
    return values


def scikit_learn(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the centroids of scikit-learn's KMeans, started by k-means++."""
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=1, random_state=0).fit(values[:, None]).cluster_centers_[:, 0]


def ckwrap(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the centroids of ckwrap."""
    import ckwrap

    return ckwrap.ckmeans(values, k).centers


def kmeans1d(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the centroids of kmeans1d."""
    import kmeans1d

    return np.array(kmeans1d.cluster(values, k).centroids)


def coremltools(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the centroids of coremltools' palettizer."""
    import torch
    from coremltools.optimize.torch import palettization

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    bits = k.bit_length() - 1
    model = torch.nn.Sequential(torch.nn.Linear(100, len(values) // 100, bias=False, device="meta"))
    weight = torch.from_numpy(values[: len(values) // 100 * 100]).view(-1, 100)
    model[0].weight = torch.nn.Parameter(weight)
    settings = {"global_config": {"n_bits": bits, "granularity": "per_tensor"}}
    config = palettization.PostTrainingPalettizerConfig.from_dict(settings)
    palettizer = palettization.PostTrainingPalettizer(model, config)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        shared = palettizer.compress(num_kmeans_workers=1)
    return np.unique(shared[0].weight.detach().numpy()).astype(np.float32)


METHODS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "kmeans_optimal": kmeans_optimal,
    "scikit-learn, linear (kmeans_linear)": kmeans_linear,
    "scikit-learn, k-means++": scikit_learn,
    "ckwrap": ckwrap,
    "kmeans1d": kmeans1d,
    "coremltools palettizer": coremltools,
}


def installed() -> list[str]:
    """Returns the names of the methods that can be imported."""
    return [name for name in METHODS if _importable(name.split()[0])]


def _importable(name: str) -> bool:
    return name not in ("ckwrap", "kmeans1d", "coremltools") or importlib.util.find_spec(name) is not None


def timed(call: Callable, *arguments: object) -> tuple[object, float, float]:
    """Returns the result of a call, its wall seconds and its CPU seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = call(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - processor


def memory_bytes(field: str) -> int | None:
    """Returns VmRSS (now) or VmHWM (highest since the last reset) of this process; None outside Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_alone(
    method: str, kind: str, size: int, k: int, folder: str, limit: float, memory_limit: float
) -> None:
    """Runs a method once, within limits, in a fresh process; writes centroids and figures to files in the folder."""
    values = make_values(kind, size)
    METHODS[method](values[:2000], k)  # imports
    if sys.platform == "linux":
        import resource

        seconds = int(time.process_time() + limit) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_limit * 1e9),) * 2)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the highest resident size
    before = memory_bytes("VmRSS")
    centroids, wall, processor = timed(METHODS[method], values, k)
    memory = None if before is None else memory_bytes("VmHWM") - before
    np.save(Path(folder) / "centroids.npy", np.asarray(centroids, np.float64))
    figures = {"wall": [wall], "processor": [processor], "memory": memory}
    (Path(folder) / "figures.json").write_text(json.dumps(figures))


def run_fresh(method: str, kind: str, size: int, k: int, limit: float, memory_limit: float) -> dict:
    """Calls `run_alone` in a subprocess and returns its figures; the reason it stopped is under "failure"."""
    with tempfile.TemporaryDirectory() as folder:
        case = [method, kind, str(size), str(k), folder, str(limit), str(memory_limit)]
        command = [sys.executable, __file__, "--alone", *case]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"failure": f"not within {limit:g} CPU s"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            return {"failure": "out of memory" if "alloc" in last or "Memory" in last else last[:60]}
        figures = json.loads((Path(folder) / "figures.json").read_text())
        return {**figures, "centroids": np.load(Path(folder) / "centroids.npy")}


def settled(values: np.ndarray, k: int) -> np.ndarray:
    """Returns near-optimal centroids: many bins, then Lloyd's algorithm on the sorted values until it converges."""
    centroids = kmeans_optimal(values, k, bins=1 << 16).astype(np.float64)
    values = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    for _ in range(20_000):
        middles = (centroids[1:] + centroids[:-1]) / 2
        bounds = np.concatenate([[0], np.searchsorted(values, middles.astype(np.float32)), [len(values)]])
        moved = np.diff(sums[bounds]) / np.diff(bounds)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def bench_case(kind: str, size: int, k: int, settings: argparse.Namespace) -> list[str]:
    """Measures all methods on one set of values; returns the lines of its table."""
    results = {
        name: run_fresh(name, kind, size, k, settings.limit, settings.memory_limit)
        for name in settings.methods
    }
    values = make_values(kind, size)
    fast = [name for name, result in results.items() if result.get("processor", [1e9])[0] < settings.quick]
    for name in fast:
        results[name].update(wall=[], processor=[])
    codebook = kmeans_optimal(values, k)
    assigned = []
    for _ in range(settings.repeats):
        for name in fast:
            _, wall, processor = timed(METHODS[name], values, k)
            results[name]["wall"].append(wall)
            results[name]["processor"].append(processor)
        assigned.append(timed(assign, values, codebook)[1:])
    for result in results.values():
        if "centroids" in result:
            result["inertia"] = inertia(values, result["centroids"])
    reached = [result["inertia"] for result in results.values() if "inertia" in result]
    optimum = min(inertia(values, settled(values, k)), *reached)

    rows, case = [], f"| {size:.0e} | {kind} | {k} "
    ours = statistics.median(results["kmeans_optimal"]["processor"])
    for name, result in results.items():
        row = f"{case}| {name} "
        if "failure" in result:
            rows.append(f"{row}| {result['failure']} | | | | | |")
            continue
        wall, processor = statistics.median(result["wall"]), statistics.median(result["processor"])
        memory = "" if result["memory"] is None else f"{result['memory'] / 1e6:.0f}"
        rows.append(
            f"{row}| {wall:.3f} | {processor:.3f} | {processor / ours:.1f}x "
            f"| {result['inertia'] / optimum:.6f} | {memory} | {len(result['wall'])} |"
        )
    wall, processor = (statistics.median(column) for column in zip(*assigned, strict=False))
    rows.append(f"{case}| assign | {wall:.3f} | {processor:.3f} | | | | {len(assigned)} |")
    return rows


def main() -> None:
    """Measures all cases and prints the table; with --alone, runs one method once."""
    if sys.argv[1:2] == ["--alone"]:
        method, kind, size, k, folder, limit, memory_limit = sys.argv[2:]
        return run_alone(method, kind, int(size), int(k), folder, float(limit), float(memory_limit))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["gaussian", "mixture"]
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--clusters", nargs="+", type=int, default=[16, 32, 256])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=installed())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", type=float, default=15, help="CPU seconds below which runs repeat")
    parser.add_argument("--limit", type=float, default=300, help="CPU seconds for a single run")
    parser.add_argument("--memory-limit", type=float, default=12, help="address space of a single run, in GB")
    settings = parser.parse_args()
    if "kmeans_optimal" not in settings.methods:
        parser.error("--methods must include kmeans_optimal, to which the others are compared")
    print("| values | kind | k | method | seconds | CPU s | CPU / ours | inertia / optimum | MB | runs |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in settings.sizes:
        for kind in settings.kinds:
            for k in settings.clusters:
                print("\n".join(bench_case(kind, int(size), k, settings)), flush=True)


if __name__ == "__main__":
    main()
