"""Workers that read images: as many as shared memory has room for, and words when one dies or hangs."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
            super().__init__(
                *given,
                **settings
                | {"num_workers": 0, "prefetch_factor": None, "timeout": 0}
                | {"persistent_workers": False, "multiprocessing_context": None},
            )

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


def told_to_end(number):
    def act(positions):
        if 32 in positions:
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_run_leaves_it_its_workers(number):
    """As `timeout` and a terminal that closes send it: the run itself ends after its step, which needs batches."""
    got = read(OnDisk(told_to_end(number)), 2)
    assert torch.equal(torch.cat([index for *_, index in got]), torch.arange(64))


def test_a_signal_while_workers_start_leaves_a_run_its_workers(monkeypatch):
    """They are forked with the signals held back, and ignore them from their first step on."""
    told = []

    def tell(worker):
        [process] = Path("/proc/self/task").iterdir()  # no thread that a signal could choose instead
        told.append(worker)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        outlive(worker)
        os.kill(os.getpid(), signal.SIGTERM)

    outlive = workers._outlive
    monkeypatch.setattr(workers, "_outlive", tell)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(read(OnDisk(), 2)) == 4 and not told
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def hang_later(positions):
    if 48 in positions:
        time.sleep(60)


@pytest.mark.parametrize("act", [told_to_end(signal.SIGTERM), hang_later])
def test_its_own_run_ends_a_worker_at_once(act):
    reading = batches(Part(OnDisk(act), torch.arange(64), 1, 4), list(torch.arange(64).split(16)), 1, CPU)
    assert len(next(reading)[0]) == 16
    [worker] = workers._crews[-1].loader._iterator._workers
    started = time.monotonic()
    with contextlib.suppress(RuntimeError):  # torch may say that it was killed
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGKILL and time.monotonic() - started < 10


def test_an_error_of_the_program_ends_workers_that_hang_without_words_of_their_own():
    """The traceback keeps the loader, so that Python itself ends the workers."""
    program = (
        "import time, torch; from trainer.data.batches import batches; from trainer.data.images import Part\n"
        "class Hangs:\n"
        "    labels = torch.zeros(64, dtype=torch.long)\n"
        "    def __len__(self): return 64\n"
        "    def __getitems__(self, positions):\n"
        "        if positions[0]: time.sleep(60)\n"
        "        return torch.zeros(len(positions), 1, 1, 4, dtype=torch.uint8), self.labels[torch.as_tensor(positions)]\n"
        "for _ in batches(Part(Hangs(), torch.arange(64), 2, 4), list(torch.arange(64).split(16)), 2, torch.device('cpu')):\n"
        "    raise LookupError('of the program')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("LookupError: of the program\n")


def test_other_errors_of_a_worker_stay_what_they_are():
    def fail(positions):
        raise RuntimeError("of the dataset")

    with pytest.raises(RuntimeError, match="of the dataset"):
        read(OnDisk(fail), 1)


def pids(num_workers, part, order):
    """The workers that read each batch."""
    return {int(images[0, 0, 0, 0]) * 2**16 + int(images[0, 0, 0, 1]) * 2**8 + int(images[0, 0, 0, 2])
            for images, _, _ in batches(part, order, num_workers, CPU)}  # fmt: skip


class Left:
    """Garbage of the run, whose end is fatal in another process."""

    def __init__(self):
        self.itself, self.run = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.run:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_does_not_collect_the_garbage_of_its_run(monkeypatch):
    """Loaders of other workers among it were ended while a worker imported, whose batch was lost by that."""
    outlive = workers._outlive

    def begin(worker):
        assert not gc.isenabled()
        outlive(worker)
        gc.collect()

    monkeypatch.setattr(workers, "_outlive", begin)
    gc.collect()
    Left()
    assert len(read(OnDisk(lambda positions: gc.collect() and None), 2)) == 4 and gc.isenabled()


class Signed(OnDisk):
    """Images that name the process that read them."""

    def __getitems__(self, positions):
        images, labels = super().__getitems__(positions)
        number = os.getpid()
        images[:, 0, 0, :3] = torch.tensor([number >> 16, number >> 8 & 255, number & 255], dtype=torch.uint8)
        return images, labels


@pytest.fixture
def none_left():
    workers.dismiss_all()
    yield
    workers.dismiss_all()
    assert not workers._crews


def test_workers_stay_from_one_epoch_to_the_next(none_left):
    part = Part(Signed(), torch.arange(64), 2, 4)
    order = list(torch.arange(64).split(16))
    first = pids(2, part, order)
    assert len(first) == 2 and os.getpid() not in first
    assert pids(2, part, order[::-1]) == first
    stopped = batches(part, order, 2, CPU)  # an epoch that is given up
    next(stopped)
    del stopped
    again = list(batches(part, [torch.tensor([5, 3]), *order[1:]], 2, CPU))
    assert [index.tolist() for _, _, index in again][:2] == [[5, 3], list(range(16, 32))] and len(again) == 4
    assert pids(2, part, order) == first
    assert pids(0, part, order) == {os.getpid()}
    workers.dismiss_all()
    assert pids(2, part, order).isdisjoint(first)


def test_two_epochs_of_a_part_at_once(none_left):
    part = Part(OnDisk(), torch.arange(64), 1, 4)
    order = list(torch.arange(64).split(16))
    one, other = (batches(part, order, 1, CPU) for _ in range(2))
    for positions in order:
        assert torch.equal(next(one)[2], positions) and torch.equal(next(other)[2], positions)


def test_no_more_than_two_parts_keep_their_workers(none_left):
    parts = [Part(Signed(), torch.arange(64), 1, 4) for _ in range(3)]
    order = list(torch.arange(64).split(16))
    [first, second, third] = [pids(1, part, order) for part in parts]
    assert len(workers._crews) == 2
    assert pids(1, parts[1], order) == second and pids(1, parts[2], order) == third
    assert pids(1, parts[0], order) != first


def test_workers_by_themselves(monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: 5)
    assert workers.num_workers("auto") == 5 and workers.num_workers(0) == 0 and workers.num_workers(12) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers.num_workers("auto") == 2
    monkeypatch.setattr(workers, "usable_cores", lambda: 1)
    assert workers.num_workers("auto") == 1
    monkeypatch.setattr(workers, "usable_cores", lambda: 128)
    assert workers.num_workers("auto") == 8


class Numbered(OnDisk):
    """Images that hold their position; wider ones than the part says for positions from 48 on."""

    def __getitems__(self, positions):
        width = 9 if min(positions) >= 48 else 4
        images = torch.tensor(positions, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, width)
        return images, self.labels[torch.as_tensor(positions)]


@pytest.mark.parametrize(
    "free, has_places", [(None, True), (5 * 3 * 4 * 4, True), (5 * 3 * 4 * 4 - 1, False)]
)
def test_places_in_shared_memory_are_not_written_before_they_were_read(
    monkeypatch, none_left, free, has_places
):
    monkeypatch.setattr(workers, "free_shared_bytes", lambda: free)
    part = Part(Numbered(), torch.arange(64), 2, 4)
    order = list(torch.randperm(48).split(3)) + [torch.arange(48, 51)]  # 17 batches, 5 places
    got = []
    for _ in range(2):
        for positions, (images, _, index) in zip(order, batches(part, order, 2, CPU), strict=True):
            time.sleep(0.01)  # the workers go on
            got.append((positions, images, index))
    for positions, images, index in got:  # also those that were kept while later ones came
        width = 4 if positions.max() < 48 else 9
        assert torch.equal(images, positions.byte().view(-1, 1, 1, 1).expand(-1, 1, 1, width))
        assert torch.equal(index, positions)
    assert [crew.places is not None for crew in workers._crews] == [has_places]
