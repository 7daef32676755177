"""Several processes of a run end together: at one step after a signal, and with one message after an error.

Collectives cannot do this. A process that waits in one hears nothing, and with NCCL it waits for hours after another has
died. So a thread of each process looks at a few keys of the process group's store, twice a second.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import distributed_c10d

from trainer.distributed import gathered, is_main, on_cpus, several, told
from trainer.mistakes import Mistake, Said, message_of, say
from trainer.training.stopping import Stop, Stopped, launched, stopping

PERIOD = 0.5  # seconds between two looks at the store
SILENCE = 40.0  # seconds without a sign of a process on another machine until it counts as dead
FOLDER_SECONDS = 5.0  # until another process must see a file that the main process has written
GRACE = 8.0  # seconds that a process has to end by itself after another has failed
GOES_ON = "; the same command goes on where this stopped"
HOURS = 12  # of a collective's timeout: the main process works alone for long
_entered = 0  # runs of this process, which is one number on all processes


@contextlib.contextmanager
def together() -> Iterator[Stop]:
    """Joins the processes of a launch and yields a Stop for the run inside the context.

    Raises:
        Stopped: After SIGTERM or SIGHUP, at the same step on all processes.
        Said: With several processes in place of a user's mistake, and when another process has failed or has been killed:
            one process has printed the words.
    """
    global _entered
    _refuse_plugins()
    state = PartialState(cpu=on_cpus(), timeout=timedelta(hours=HOURS))
    _entered += 1
    with stopping() as stop:
        if state.num_processes == 1 and not launched():
            yield stop
            return
        watch = Watch(stop, state.process_index, state.num_processes)
        try:
            if state.num_processes > 1 and dist.get_backend() == "nccl":
                _refuse_shared_gpu(distributed_c10d._get_default_store(), state)
            yield stop
        except BaseException as error:
            failure = watch.failed(error)
            if failure is not None:
                raise failure from error
            raise
        finally:
            watch.end()


def _refuse_plugins() -> None:
    """Raises Mistake for a launch with a plugin that splits the network's weights over processes."""
    for name, word in {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1", "yes", "on"):
            raise Mistake(
                f"the launch asks for {word}, which is not supported: each process holds the whole network here. This works: "
                "accelerate launch --multi_gpu --num_processes N -m trainer run RECIPE"
            )


def _refuse_shared_gpu(store: Any, state: Any) -> None:
    """Raises Mistake if two processes have one GPU, of which NCCL says no more than that it is used twice.

    By the store: a collective would fail. Each process may see GPUs of its own alone, so their numbers say nothing.
    """
    own = torch.cuda.get_device_properties(state.device)
    store = dist.PrefixStore(f"gpus/{_entered}", store)
    store.set(f"gpu/{state.process_index}", f"{platform.node()} {getattr(own, 'uuid', state.device)}")
    gpus = [store.get(f"gpu/{rank}").decode() for rank in range(state.num_processes)]
    twice = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if twice is not None:
        raise Mistake(
            f"{gpus.count(twice)} processes share one GPU on {twice.partition(' ')[0]}, which NCCL cannot do: start as many as "
            "there are GPUs, or on CPUs (accelerate launch --cpu --num_processes N -m trainer run RECIPE)"
        )


def check_same(value: Any, what: str) -> None:
    """Raises Mistake on all processes if one of them has another value than the main process. what: names the value."""
    everyone = gathered((socket.gethostname(), value))
    for rank, (host, other) in enumerate(everyone):
        if other != everyone[0][1]:
            raise Mistake(
                f"process {rank} (on {host}) has {what} other than process 0 (on {everyone[0][0]}): "
                "all processes of a run need the same"
            )


def check_shared(folder: Path) -> None:
    """Raises Mistake on all processes if one of them does not see the main process's folder."""
    if not several():
        return
    probe = folder / told(f".seen-{secrets.token_hex(8)}")
    if is_main():
        probe.touch()
    told(None)  # then it is there
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = gathered((socket.gethostname(), seen))
    if is_main():
        probe.unlink()
    for rank, (host, seen) in enumerate(everyone):
        if not seen:
            raise Mistake(
                f"process {rank} (on {host}) does not see the folder of process 0 (on {everyone[0][0]}), {folder}: "
                "--folder must be on a disk that all machines share"
            )


class Watch:
    """The thread of one process that watches the others, and the launcher.

    Keys of the store: who/R (host, pid), beat/R (a count), left/R, failed (the first failure), said, stop (a signal's
    number), passed/R (see `Stop.due`).

    Args:
        stop: The run's.
        rank: The number of this process.
        size: The number of processes.
    """

    def __init__(self, stop: Stop, rank: int, size: int) -> None:
        self.stop, self.rank, self.size = stop, rank, size
        self.parent = os.getppid() if launched() else None
        self.failure: dict[str, Any] | None = None
        self.peers: dict[int, dict[str, Any]] = {}
        self.beats: dict[int, tuple[bytes | None, float]] = {}
        self.own = {"host": _host(), "pid": os.getpid(), "since": psutil.Process().create_time()}
        self._ended, self._lock, self._has_said = threading.Event(), threading.Lock(), False
        self._store_lost_at: float | None = None
        self._next_beat = 0.0
        if size > 1:
            store = distributed_c10d._get_default_store()
            # A connection of its own: calls of one connection wait for each other.
            store = store.clone() if hasattr(store, "clone") else store
            self.store = dist.PrefixStore(f"together/{_entered}", store)
            self.store.set(f"who/{rank}", json.dumps(self.own))
            stop.several = True
        self._thread = threading.Thread(target=self._run, name="together", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the thread, when this process leaves the run."""
        self._ended.set()
        self.stop.noticed.set()
        self._thread.join()
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # the process with the store may have left
                self.store.set(f"left/{self.rank}", "")

    def failed(self, error: BaseException) -> Exception | None:
        """Tells the other processes of an error of this one; returns what is raised in its place, or None for the error itself."""
        self.stop.is_ending = True  # no signal comes between
        if self.size == 1:
            return None
        message = message_of(error) if isinstance(error, Exception) else None
        if isinstance(error, Stopped):
            own = {"status": 128 + error.signal, "words": f"{error}{GOES_ON}", "said": "at the end"}
        elif isinstance(error, KeyboardInterrupt):
            own = {"status": 130, "words": f"interrupted{GOES_ON}", "said": "at the end"}
        elif message is not None:
            own = {
                "status": 1 if isinstance(error, FloatingPointError) else 2,
                "words": message,
                "said": "no",
            }
        else:  # a traceback, on this process's console
            text = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            own = {
                "status": 1,
                "words": f"process {self.rank} on {self.own['host'][0]}: {text}",
                "said": "yes",
            }
        if message is None:
            self._wait_for_a_cause(error)
        if self.failure is None:
            self._post(own | {"rank": self.rank, "died": False, "host": self.own["host"]})
        assert self.failure is not None
        first = self.failure
        if first["said"] == "yes" and first["rank"] == self.rank:
            return None
        if first["said"] == "at the end" and self.rank == 0 and own["said"] == "at the end":
            return None  # each process was told to end, and the command line says so
        self._say(first)
        if first["said"] == "no" and first["rank"] == self.rank and not self._is_said(seconds=5):
            say(first["words"])
        return Said(first["words"], first["status"])

    def _wait_for_a_cause(self, error: BaseException) -> None:
        """Waits until it is known whether an error comes from another process's end, which breaks a connection."""
        text = str(error)
        is_broken = isinstance(error, RuntimeError) and any(
            word in text for word in ("gloo", "NCCL", "onnection", "peer", "store")
        )
        has_remote = any(peer["host"] != self.own["host"] for peer in self.peers.values())
        seconds = (SILENCE + 5 if has_remote else 4.0) if is_broken else 0.0
        deadline = time.monotonic() + seconds
        while self.failure is None:
            self._look_for_failures()
            if time.monotonic() >= deadline:
                return
            time.sleep(0.1)

    def _run(self) -> None:
        while True:
            self.stop.noticed.wait(PERIOD)
            self.stop.noticed.clear()
            if self._ended.is_set():
                return
            if self.parent is not None and os.getppid() != self.parent:
                self.parent = None
                if self.size == 1 or self._has_store():
                    os.kill(os.getpid(), signal.SIGTERM)  # the launcher has died, and nobody else can tell
                else:  # it had the store, and the processes cannot agree on a step
                    self.failure = self._loss()
                    return self._leave(grace=1.0)
            if self.size > 1:
                self._look_for_failures()
                if self.failure is not None:
                    return self._leave()
                self._stop_at_one_step()

    def _look_for_failures(self) -> None:
        """Sets `failure` when a process has failed or died."""
        with self._lock:
            try:
                self._beat()
                if self.failure is None and self.store.check(["failed"]):
                    self.failure = json.loads(self.store.get("failed"))
                if self.failure is None:
                    for rank in range(self.size):
                        if rank != self.rank and self._is_dead(rank):
                            self._post_death(rank)
                            break
                self._store_lost_at = None
            except RuntimeError:  # the process with the store has left, or has died
                now = time.monotonic()
                self._store_lost_at = self._store_lost_at or now
                host = 0
                if self.rank != host and (now - self._store_lost_at > SILENCE or self._is_gone(host)):
                    self.failure = self._death(host)

    def _beat(self) -> None:
        if time.monotonic() >= self._next_beat:
            self.store.set(f"beat/{self.rank}", str(time.time()))
            self._next_beat = time.monotonic() + SILENCE / 8

    def _is_dead(self, rank: int) -> bool:
        """Returns whether a process has ended without leaving the run. Raises RuntimeError without a store."""
        if rank not in self.peers:
            if not self.store.check([f"who/{rank}"]):
                return False
            self.peers[rank] = json.loads(self.store.get(f"who/{rank}"))
        if self.peers[rank]["host"] == self.own["host"]:
            silent = self._is_gone(rank)
        else:
            now = time.monotonic()
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else None
            last, since = self.beats.get(rank, (None, now))
            self.beats[rank] = (beat, now if beat != last else since)
            silent = now - self.beats[rank][1] > SILENCE
        return silent and not self.store.check([f"left/{rank}"])

    def _is_gone(self, rank: int) -> bool:
        """Returns whether a process of this machine has ended."""
        peer = self.peers.get(rank)
        if peer is None or peer["host"] != self.own["host"]:
            return False
        try:
            process = psutil.Process(peer["pid"])
            return process.create_time() != peer["since"] or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _death(self, rank: int) -> dict[str, Any]:
        peer = self.peers.get(rank, {"pid": "?", "host": ["?"]})
        words = (
            f"process {rank} (pid {peer['pid']} on {peer['host'][0]}) has ended without a word: it was killed, or its machine "
            f"ran out of memory{GOES_ON}"
        )
        return {
            "rank": rank, "died": True, "status": 1, "words": words, "said": "no", "by": self.rank,
            "host": peer["host"],
        }  # fmt: skip

    def _loss(self) -> dict[str, Any]:
        words = f"the launcher has ended: what was done since the last checkpoint is lost{GOES_ON}"
        return {
            "rank": -1, "died": False, "status": 128 + signal.SIGTERM, "words": words, "said": "no",
            "host": self.own["host"],
        }  # fmt: skip

    def _has_store(self) -> bool:
        try:
            self.store.check(["stop"])
        except RuntimeError:
            return False
        return True

    def _post_death(self, rank: int) -> None:
        self._post(self._death(rank))

    def _post(self, failure: dict[str, Any]) -> None:
        """Makes a failure the run's, unless another one is already."""
        try:
            self.store.compare_set("failed", "", json.dumps(failure))
            self.failure = json.loads(self.store.get("failed"))
        except RuntimeError:
            self.failure = failure

    def _is_said(self, seconds: float) -> bool:
        """Waits until the main process has said the words of a failure; returns whether it has."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self.store.check(["said"]):
                    return True
                time.sleep(0.05)
        return False

    def _say(self, failure: dict[str, Any]) -> None:
        """Prints the words of a failure once: on the main process, or if that has died on the one that found it.

        Tracebacks are on their own process's console, which is this one's on the same machine.
        """
        with self._lock:
            speaks = self.rank == (failure["by"] if failure["died"] and failure["rank"] == 0 else 0)
            if self._has_said or not speaks:
                return
            self._has_said = True
            if failure["said"] != "yes" or failure["host"] != self.own["host"]:
                say(failure["words"])
            with contextlib.suppress(RuntimeError):
                self.store.set("said", "")

    def _leave(self, grace: float = GRACE) -> None:
        """Ends this process after another one has failed, unless it ends by itself."""
        failure = self.failure
        assert failure is not None
        if failure["said"] != "at the end":
            self._say(failure)
        if not self._ended.wait(grace) and not self.stop.is_ending:
            self._say(failure)
            sys.stdout.flush()
            # It waits in a collective for ever. What it writes exists whole or not at all.
            os._exit(failure["status"])

    def _stop_at_one_step(self) -> None:
        """After a signal to any process, agrees with the others on the step at which all stop (`Stop.due`)."""
        with contextlib.suppress(RuntimeError):  # of a store that is gone: `_look_for_failures` finds why
            if self.stop.requested is not None:
                self.store.compare_set("stop", "", str(self.stop.requested))
            if self.stop.at is not None or not self.store.check(["stop"]):
                return
            passed = self.stop.hold(int(self.store.get("stop")))
            self.store.set(f"passed/{self.rank}", str(passed))
            keys = [f"passed/{rank}" for rank in range(self.size)]
            if self.store.check(keys):
                self.stop.agree(max(int(self.store.get(key)) for key in keys))


def _host() -> list[str]:
    """Returns what tells machines, and containers on one machine, apart; the name comes first."""
    with contextlib.suppress(OSError):
        return [platform.node(), os.readlink("/proc/self/ns/pid")]
    return [platform.node(), ""]
