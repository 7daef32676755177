"""Workers that read images: as many as shared memory has room for, and words when one dies or hangs."""

import os
import signal
import time

import pytest
import torch

from trainer.data import workers
from trainer.data.batches import batches
from trainer.data.images import Part
from trainer.mistakes import Mistake

CPU = torch.device("cpu")
MIB = 2**20


class OnDisk:
    """Images that workers read; act(positions) comes before."""

    labels = torch.zeros(64, dtype=torch.long)

    def __init__(self, act=lambda positions: None):
        self.act = act

    def __len__(self):
        return 64

    def __getitems__(self, positions):
        self.act(positions)
        images = torch.zeros(len(positions), 1, 1, 4, dtype=torch.uint8)
        return images, self.labels[torch.as_tensor(positions)]


def read(images, num_workers, image_bytes=4):
    part = Part(images, torch.arange(64), num_workers, image_bytes)
    return list(batches(part, list(torch.arange(64).split(16)), num_workers, CPU))


@pytest.mark.parametrize(
    "free, image_bytes, processes, affordable",
    [
        # 16 images a batch; each worker has 2 batches waiting, and 2 more are on their way.
        (None, MIB, 1, 3),  # not a limit that can be seen
        (8 * 16 * MIB, MIB, 1, 3),
        (8 * 16 * MIB - 1, MIB, 1, 2),
        (6 * 16 * MIB - 1, MIB, 1, 1),
        (4 * 16 * MIB - 1, MIB, 1, 0),
        (2 * 8 * 16 * MIB, MIB, 2, 3),  # the processes of a machine share it
        (2 * 8 * 16 * MIB - 2, MIB, 2, 2),
    ],
)
def test_as_many_workers_as_shared_memory_has_room_for(
    monkeypatch, capsys, free, image_bytes, processes, affordable
):
    used = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *given, **settings):
            used.append(settings["num_workers"])
            assert settings["timeout"] == (120 + 2 * 16 if affordable else 0)
            super().__init__(*given, **settings | {"num_workers": 0, "prefetch_factor": None, "timeout": 0})

    monkeypatch.setattr(workers, "DataLoader", Loader)
    monkeypatch.setattr(workers, "free_shared_bytes", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    workers._printed.clear()
    for _ in range(2):
        got = read(OnDisk(), 3, image_bytes)
    assert used == [affordable] * 2 and [len(images) for images, _, _ in got] == [16] * 4
    said = capsys.readouterr().out
    assert said.count("3 workers need 128: images are read by") == (affordable < 3)
    assert said.count(f"read by {affordable or 'no'} workers") == (affordable < 3)


def test_the_shared_memory_of_this_machine():
    free = workers.free_shared_bytes()
    assert free is None or 0 <= free == pytest.approx(os.statvfs("/dev/shm").f_bavail * 4096, abs=2**30)


def die(positions):
    if 32 in positions:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(positions):
    if 32 in positions:
        time.sleep(60)


@pytest.mark.parametrize("act, words", [(die, "killed"), (hang, "timed out")])
def test_a_worker_that_dies_or_hangs_is_said(monkeypatch, act, words):
    monkeypatch.setattr(workers, "SECONDS", 1)
    monkeypatch.setattr(workers, "SECONDS_PER_IMAGE", 0.01)
    started = time.monotonic()
    with pytest.raises(
        Mistake, match=rf"a worker that reads images has died or hangs.*{words}.*workers: 0"
    ) as found:
        read(OnDisk(act), 2)
    assert time.monotonic() - started < 20 and len(str(found.value)) < 300


def test_other_errors_of_a_worker_stay_what_they_are():
    def fail(positions):
        raise RuntimeError("of the dataset")

    with pytest.raises(RuntimeError, match="of the dataset"):
        read(OnDisk(fail), 1)
