"""Stand-in runtimes for a fresh process, in a file of their own that imports neither pytest nor torch."""

import time

import numpy as np

HELD = 40_000_000


def prepare(seconds: float, threads: int):
    """A runtime that is held by memory of its own, and a network that needs more."""
    runtime = np.ones(HELD, np.uint8)

    def load():
        weights = np.ones(HELD, np.uint8)

        def run(images):
            assert runtime[0] == weights[0]
            time.sleep(seconds * len(images))
            return np.zeros((len(images), 2))

        return run

    return load


def fails(threads: int):
    raise OSError("no such runtime")
