"""Two processes: equal weights and rows on both, each image counted once; and launches that start only one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.compression.states import restore
from trainer.data.batches import make_data
from trainer.data.images import normalize
from trainer.models.lenet300 import lenet300
from trainer.recipe.recipe import read
from trainer.reporting import report
from trainer.storage import checkpoint
from trainer.training.evaluate import percent_right

ROOT = Path(__file__).parents[2]
SECONDS = 900  # until a launch is given up

RECIPE = """
name: two
allow_untrained: true
data: {dataset: digits, subset: 120, validation: 61, augment: {shift: 1}}
teacher: {model: lenet5, width: 3, batch_norm: true, dropout: 0.1}
student: {model: lenet300, hidden: [24, 16]}
stages:
  - {stage: train, who: teacher, training: {epochs: 5, batch_size: 16, lr: 1e-2}}
  - stage: distill
    training: {epochs: 5, batch_size: 16, lr: 1e-2, ema: 0.5, keep: best}
    losses: &taught [{loss: cross_entropy}, {loss: kl}, {loss: hint}]
  - stage: prune
    method: magnitude
    sparsity: 0.6
    schedule: cubic
    every: 1
    training: {epochs: 2, batch_size: 16, accumulate: 2, clip: 1}
    losses: *taught
  - {stage: share, bits: 3, training: {epochs: 1, batch_size: 16}, losses: [{loss: hint, at: [fc1]}]}
  - {stage: pack}
"""

# Runs the recipe as `trainer run` does, and tells what each process has.
DRIVER = """
import json, sys, traceback
from pathlib import Path

import torch

from trainer.compression.weights import weights_of
from trainer.runs import runner
from trainer.storage.weights_file import digest

kept = []
real = runner._report
runner._report = lambda run, *rest: (kept.append(run), real(run, *rest))[1]
result = runner.run(sys.argv[1], folder=sys.argv[2])
[run] = kept
rank = torch.distributed.get_rank()
told = {
    "rows": result["rows"],
    "layers": result["layers"],
    "student": digest(run.student.state_dict()),
    "learned": digest(run.learned),
    "num_learned": len(run.learned),
    "masks": digest({name: place.mask.to(torch.uint8) for name, place in weights_of(run.student).items()}),
    "teacher": run.teacher.fingerprint(),
}
Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(told))
run.accelerator.end_training()
"""


def environment(folder, **more):
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_"))
    }
    return (
        clean
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "no-configuration")}
        | more
    )


def start(command, environment):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


ACCELERATE = ["accelerate.commands.accelerate_cli", "launch"]
CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
use_cpu: true
main_training_function: main
"""


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "driver.py").write_text(DRIVER)
    configured = folder / "configured" / "accelerate" / "default_config.yaml"
    configured.parent.mkdir(parents=True)
    configured.write_text(CONFIGURATION)
    return folder


def trainer(top, name):
    return ["-m", "trainer", "run", top / "recipe.yaml", "--folder", top / name]


@pytest.fixture(scope="module")
def launched(top):
    settings = (
        "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no".split()
    )
    driver = [f"--main_process_port={free_port()}", top / "driver.py", top / "recipe.yaml", top / "driven"]
    commands = {
        "driven": ([*ACCELERATE, *settings, *driver], {"CUDA_VISIBLE_DEVICES": ""}),
        "flags": ([*ACCELERATE, "--cpu", "--num_processes=2", *trainer(top, "flags")], {}),
    }
    return launch(top, commands)


@pytest.fixture(scope="module")
def further_launches(top):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", *trainer(top, "torchrun")]
    commands = {
        "torchrun": (torchrun, {"CUDA_VISIBLE_DEVICES": ""}),
        "configured": ([*ACCELERATE, *trainer(top, "configured-run")], {"HF_HOME": str(top / "configured")}),
    }
    return launch(top, commands)


def launch(top, commands):
    """Runs all launches at once: {name: (folder, exit status, output, errors)}."""
    running, done = {}, {}
    for name, (command, more) in commands.items():
        (top / name).mkdir(exist_ok=True)
        running[name] = start(command, environment(top, **more))
    deadline = time.monotonic() + SECONDS
    try:
        for name, process in running.items():
            output, errors = process.communicate(timeout=deadline - time.monotonic())
            done[name] = (top / name, process.returncode, output, errors)
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return done


def succeeded(launched, name):
    folder, status, output, errors = launched[name]
    assert status == 0, errors[-4000:]
    assert "Warning" not in errors, errors
    return folder, output


@pytest.fixture(scope="module")
def ranks(launched):
    folder, _ = succeeded(launched, "driven")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def without_time(rows):
    return [{k: v for k, v in row.items() if "second" not in k and k != "teacher_images"} for row in rows]


def test_weights_masks_projectors_and_rows_are_equal_on_both(ranks):
    one, other = ranks
    for key in ("student", "masks", "learned", "teacher"):
        assert one[key] == other[key]
    for mine, theirs in zip(one["layers"], other["layers"], strict=True):
        assert mine == theirs | {"file_bytes": mine["file_bytes"]}  # the main process has written the file
    assert one["num_learned"] > 0
    main = [{k: v for k, v in row.items() if k != "digest"} for row in without_time(one["rows"])]
    side = [{k: v for k, v in row.items() if k != "digest"} for row in without_time(other["rows"])]
    assert main == side
    assert [row["stage"] for row in main] == [
        "teacher",
        "distilled",
        "recovered",
        "clustered",
        "shared",
        "decoded",
    ]
    assert main[2]["sparsity"] == main[-1]["sparsity"] == pytest.approx(0.6, abs=0.01)


def test_each_test_image_is_counted_once(launched, ranks):
    """The accuracies are those of one process that evaluates what was saved."""
    folder, _ = succeeded(launched, "driven")
    recipe, _ = read(folder.parent / "recipe.yaml")
    data = make_data(recipe.data, torch.device("cpu"))
    for stage, label in (("01-distill", "distilled"), ("03-share", "shared")):
        tensors, _ = checkpoint.load(folder / "two" / "checkpoints" / stage)
        student = lenet300((1, 8, 8), 10, hidden=(24, 16))
        restore(student, tensors["student"])
        student.eval()
        [row] = [row for row in ranks[0]["rows"] if row["stage"] == label]
        for part, key in ((data.test, "top1"), (data.validation, "top1_validation")):
            images, labels, _ = part.__getitems__(torch.arange(len(part)))
            with torch.no_grad():
                answers = student(normalize(images.float() / 255, data.mean, data.std)).argmax(1)
            assert row[key] == percent_right(answers, labels)
            assert len(answers.unique()) > 2


def test_only_the_main_process_speaks(launched):
    _, output = succeeded(launched, "driven")
    assert output.count("[1/5] train") == 1 and output.count("== distilled") == 1


@pytest.mark.slow
def test_torchrun_gives_the_same_bits_as_accelerates_launcher(launched, further_launches, ranks):
    folder, _ = succeeded(further_launches, "torchrun")
    found = report.read(folder / "two")
    assert without_time(found["rows"]) == without_time(json.loads(json.dumps(ranks[0]["rows"])))
    assert found["layers"] == ranks[0]["layers"]
    other = launched["driven"][0]
    assert (folder / "two" / "student.tiny").read_bytes() == (other / "two" / "student.tiny").read_bytes()


def names_a_command_that_works(folder, status, output, errors):
    assert status != 0 and "returned non-zero exit status 2" in errors
    assert "trainer: the launch requested more processes than the 1 it got" in errors
    assert "torchrun --nproc_per_node N -m trainer run RECIPE" in errors
    assert "Traceback" not in errors.partition("trainer: ")[0]
    assert not list(folder.glob("two")) and "[1/5]" not in output


def test_a_launch_that_got_one_process_for_two_stops_and_names_a_command_that_works(launched):
    names_a_command_that_works(*launched["flags"])


@pytest.mark.slow
def test_a_configured_launch_that_got_one_process_for_two_does_so_too(further_launches):
    names_a_command_that_works(*further_launches["configured"])
