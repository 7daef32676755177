"""Two processes end together: one message after an error, a kill or a wrong launch, and one step after a signal."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.making import leave_plots_out
from tests.processes import in_two
from trainer.cli import main
from trainer.distributed import environment_alone, on_cpus
from trainer.mistakes import Mistake
from trainer.runs import runner, together
from trainer.storage.weights_file import read_file
from trainer.training import fit
from trainer.training.stopping import stopping

ROOT = Path(__file__).parents[2]
RECIPE = """
name: two
data: {dataset: digits, subset: 160}
teacher: {model: lenet300, hidden: [6, 5]}
student: {model: lenet5, width: 2, batch_norm: true, dropout: 0.1}  # statistics of its own on each process
stages:
  - {stage: train, who: teacher, training: {epochs: 2, batch_size: 16, lr: 1e-2}}
  - {stage: distill, training: {epochs: 3, batch_size: 16, keep: best}, losses: [{loss: kl}, {loss: contrastive}]}  # a bank
"""


def command(folder, *more):
    """(status, what it printed to stderr, seconds) of `trainer run` in this process."""
    error, started = io.StringIO(), time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        leave_plots_out(patch)
        status = main(["run", str(folder / "recipe.yaml"), "--folder", *more])
    return [status, error.getvalue(), time.monotonic() - started]


def at_step(number, act, stage=1):
    """Has the stage call act(state) after its optimizer step `number`."""
    original = fit._take_step

    def watched(state):
        original(state)
        if state.step == number and state.run.stage == stage:
            act(state)

    fit._take_step = watched


def refuse(*_):
    raise Mistake("photos/7.jpg: is damaged")


def in_folders_of_their_own(rank, top):
    together.FOLDER_SECONDS = 0.3
    return command(top, str(top / f"disk{rank}"))


def with_recipes_of_their_own(rank, top):
    return command(top, str(top / "runs"), "--set", f"stages.0.training.epochs={2 + rank}")


def refused(rank, top, place):
    if rank == 1 and place == "recipe":
        top = top / "not-there"
    if rank == 1 and place == "data":
        runner.make_run = refuse
    if rank == 1 and place == "step":
        at_step(4, refuse)
    if rank == 1 and place == "end":
        runner.finish_stage = refuse
    return command(top, str(top / f"runs-{place}"))


def killed(rank, top):
    at_step(14, lambda _: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)
    return command(top, str(top / "killed"))


def told_to_end(rank, top):
    at_step(14, lambda _: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
    return command(top, str(top / "stopped"))


def to_the_end(rank, top):
    sends = []
    at_step(5, lambda state: sends.append(state.wrapped.will_sync_module_buffers()))
    statuses = [command(top, str(top / name))[0] for name in ("whole", "killed", "stopped")]
    return [statuses, sends]


@pytest.fixture
def top(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    "launch, words",
    [
        (in_folders_of_their_own, "does not see the folder of process 0"),
        (with_recipes_of_their_own, "has a recipe other than process 0"),
    ],
)
def test_processes_that_do_not_share_what_they_must_are_told_so(top, launch, words):
    (status, said, seconds), (other, silent, _) = in_two(launch, top, top, seconds=60)
    assert (status, other) == (2, 2) and seconds < 20
    assert said.count(words) == 1 and silent == ""
    assert len(said) < 320  # with a folder of pytest's


@pytest.mark.parametrize("place", ["recipe", "data", "step", "end"])
def test_an_error_of_the_second_process_is_said_once(top, place):
    (status, said, seconds), (other, silent, _) = in_two(refused, top, top, place, seconds=60)
    assert (status, other) == (2, 2) and seconds < 20 and silent == ""
    assert said.count("not-there" if place == "recipe" else "trainer: photos/7.jpg: is damaged") == 1
    assert "Traceback" not in said


def test_one_killed_or_told_to_end_ends_both_and_the_same_command_goes_on(top):
    (status, said, seconds), _ = in_two(killed, top, top, seconds=60, statuses=(0, -signal.SIGKILL))
    assert status == 1 and seconds < 60
    assert said.count("process 1 (pid ") == 1 and "has ended without a word: it was killed" in said
    assert "the same command goes on" in said and "Traceback" not in said

    (status, said, _), (other, silent, _) = in_two(told_to_end, top, top, seconds=60)
    assert (status, other) == (143, 143) and silent == ""
    assert said == "trainer: stopped by SIGTERM; the same command goes on where this stopped\n"
    [kept] = (top / "stopped" / "two" / "checkpoints" / "01-distill" / "fit-0").glob("0*")
    assert kept.name in ("00000014", "00000015")  # the other process may have begun the next step

    assert (
        in_two(to_the_end, top, top, seconds=120) == [[[0, 0, 0], [False, False]]] * 2
    )  # a step sends no buffers
    whole, after_the_kill, after_the_signal = (
        read_file(next((top / name / "two" / "checkpoints" / "01-distill").glob("*/student.safetensors")))[0]
        for name in ("whole", "killed", "stopped")
    )
    for resumed in (after_the_kill, after_the_signal):
        assert whole.keys() == resumed.keys() and all((whole[key] == resumed[key]).all() for key in whole)


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
LAUNCHED = """
import sys, time
from trainer.runs.together import together
from trainer.training.stopping import Stopped
with together() as stop, stop.kept_until_the_step_ends():
    print("ready", flush=True)
    while stop.due() is None:
        time.sleep(0.01)
print("told by", stop.requested, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_launcher_is_a_signal_to_what_it_launched(number, tmp_path):
    """Accelerate's launcher of one process passes no signal on; the process went on alone."""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, LAUNCHED],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout.readline().strip().isdigit() and launcher.stdout.readline() == "ready\n"
        launcher.send_signal(number)
        assert (
            launcher.stdout.read() == f"told by {signal.SIGTERM.value}\n"
        )  # ends with the last process that writes


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_plugins_that_split_a_network_are_refused(top, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    status, said, _ = command(top, str(top / "runs"))
    assert status == 2 and "which is not supported" in said and "accelerate launch --multi_gpu" in said
    assert not (top / "runs").exists()


def test_a_launcher_passes_on_what_its_processes_have_got(monkeypatch):
    """A signal to all processes of a job reaches each of them twice: the second one is no wish to end at once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stopping() as stop, stop.kept_until_the_step_ends():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM == stop.due()


def test_a_launch_on_cpus_is_one_also_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for said, expected in (("1", True), ("True", True), ("False", False), ("", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
        assert on_cpus() is expected
        assert environment_alone()["ACCELERATE_USE_CPU"] == said
    asked = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        together, "PartialState", lambda **given: asked.append(given) or SimpleNamespace(num_processes=1)
    )
    with together.together():
        assert asked[0]["cpu"] is True


def test_two_processes_on_one_gpu_are_refused_in_words(monkeypatch):
    gpus = {0: SimpleNamespace(uuid="a"), 1: SimpleNamespace(uuid="b"), 2: SimpleNamespace(uuid="a")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)

    def start(*devices):
        store = dist.HashStore()
        states = [
            SimpleNamespace(process_index=rank, num_processes=len(devices), device=device)
            for rank, device in enumerate(devices)
        ]
        with ThreadPoolExecutor(len(devices)) as processes:
            return [
                each.exception()
                for each in [processes.submit(together._refuse_shared_gpu, store, state) for state in states]
            ]

    assert start(0, 1) == [None, None]
    errors = start(0, 1, 2)
    assert all(isinstance(error, Mistake) for error in errors) and len(errors) == 3
    assert "2 processes share one GPU" in str(errors[1]) and "accelerate launch --cpu" in str(errors[1])
