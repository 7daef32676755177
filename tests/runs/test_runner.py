"""From a recipe to a report: what is refused, what is skipped, what is taken up again, and what the teacher must be."""

import contextlib
import json
import os
import shutil
import threading

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from trainer.compression import codebooks
from trainer.data.batches import make_data
from trainer.distillation import onednn
from trainer.models.lenet5 import lenet5
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.reporting import report
from trainer.runs import evaluate_file as evaluate_module
from trainer.runs import opening, runner, threads
from trainer.runs.checks import without_effect
from trainer.runs.evaluate_file import evaluate_file, images_of
from trainer.runs.opening import make_accelerator
from trainer.runs.threads import available_threads
from trainer.stages import distill, pack, train
from trainer.storage import checkpoint
from trainer.storage.lock import lock
from trainer.storage.weights_file import read_file, save_file
from trainer.training import fit
from trainer.training.progress import Progress

ALONE = """
name: alone
data: {dataset: digits, subset: 100, validation: 60}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, training: {epochs: 1, batch_size: 50}}
  - {stage: share, bits: 2}
"""
TAUGHT = """
name: taught
data: {dataset: digits, subset: 100, validation: 60}
teacher: {model: lenet5, width: 2, checkpoint: CHECKPOINT}
student: {model: lenet5, width: 2}
stages:
  - {stage: distill, training: {epochs: 1, batch_size: 50}, losses: [{loss: kl}, {loss: hint}]}
  - {stage: prune, sensitivity: 1, training: {epochs: 1, batch_size: 50}, losses: [{loss: kl}]}
"""


def write(folder, text, name="given.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def rows_of(result):
    return [
        {k: v for k, v in row.items() if "second" not in k and k != "teacher_images"}
        for row in result["rows"]
    ]


# the folder of a run


def test_a_run_that_is_done_only_prints(tmp_path, capsys, monkeypatch):
    path = write(tmp_path, ALONE)
    first = runner.run(path, folder=tmp_path)
    here = tmp_path / "alone"
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*") if file.name != ".lock"}
    capsys.readouterr()
    monkeypatch.setattr(opening, "make_data", None)  # nothing is opened
    again = runner.run(path, folder=tmp_path)
    assert again["rows"] == json.loads(json.dumps(first["rows"]))
    assert "this recipe has run already" in (out := capsys.readouterr().out) and "| trained " in out
    assert before == {file: file.stat().st_mtime_ns for file in here.rglob("*") if file.name != ".lock"}


def test_damage_of_a_run_that_is_done_is_told(tmp_path, capsys):
    path = write(tmp_path, ALONE + "  - {stage: pack}\n")
    runner.run(path, folder=tmp_path)
    stage = sorted((tmp_path / "alone" / "checkpoints").iterdir())[1]
    [weights] = stage.glob("*/student.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    [packed] = (tmp_path / "alone").glob("*.tiny")
    packed.unlink()
    capsys.readouterr()
    runner.run(path, folder=tmp_path)
    [first, second] = capsys.readouterr().err.splitlines()
    assert stage.name in first and first.endswith("--from 1 makes it anew")
    assert second.endswith(f"{packed}: is gone or damaged, and --from 2 makes it anew")


def test_the_same_recipe_in_other_words_is_the_same(tmp_path):
    runner.run(write(tmp_path, ALONE), folder=tmp_path)
    kept = (tmp_path / "alone" / "report.json").read_bytes()
    words = "# a comment\n" + yaml.safe_dump(yaml.safe_load(ALONE))
    assert runner.run(write(tmp_path, words), folder=tmp_path)["rows"]
    assert (tmp_path / "alone" / "report.json").read_bytes() == kept
    assert not (tmp_path / "alone" / "earlier").exists()


def test_the_recipe_is_kept_as_it_was_run(tmp_path):
    text = "# mine\n" + ALONE
    runner.run(write(tmp_path, text), folder=tmp_path)
    assert (tmp_path / "alone" / "recipe.yaml").read_text() == text
    changes = {"name": "other", "stages.1.bits": 1}
    result = runner.run(write(tmp_path, text), changes, folder=tmp_path)
    kept = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    assert (
        kept == yaml.safe_load(ALONE) | {"name": "other"} | {"stages": kept["stages"]}
        and kept["stages"][1]["bits"] == 1
    )
    assert result["recipe"] == kept


def test_two_runs_do_not_share_a_folder(tmp_path):
    path = write(tmp_path, ALONE)
    with (
        lock(tmp_path / "alone"),
        pytest.raises(ValueError, match="another run is working in this folder"),
    ):
        runner.run(path, folder=tmp_path)


def test_a_faulty_recipe_writes_nothing(tmp_path):
    path = write(tmp_path, ALONE.replace("bits: 2", "bitz: 2"))
    with pytest.raises(RecipeError, match="bitz"):
        runner.run(path, folder=tmp_path)
    assert not (tmp_path / "alone").exists()


def test_seeds_give_other_runs_and_one_seed_the_same(tmp_path):
    results = [
        rows_of(runner.run(write(tmp_path, ALONE), {"name": name, "seed": seed}, folder=tmp_path))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert results[0] == results[1] != results[2]


# going on


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, ALONE)
    expected = runner.run(path, {"name": "whole"}, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(codebooks, "cluster", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(path, folder=tmp_path)
    assert not (tmp_path / "alone" / "report.json").exists()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", None)  # it would fail
        got = runner.run(path, folder=tmp_path)
    assert "going on after stage 1 of 2 (train)" in capsys.readouterr().out
    assert rows_of(got) == rows_of(expected)
    assert got["layers"] == expected["layers"]
    facts = checkpoint.load(tmp_path / "alone" / "checkpoints" / "00-train")[1]
    assert got["seconds"] > facts["seconds"] > got["rows"][0]["seconds"] > 0  # both sessions count


def test_a_damaged_stage_is_run_again(tmp_path, caplog):
    path = write(tmp_path, ALONE)
    expected = runner.run(path, folder=tmp_path)
    here = tmp_path / "alone"
    (here / "done").unlink()
    last = here / "checkpoints" / "01-share" / "00000000" / "student.safetensors"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    got = runner.run(path, folder=tmp_path)
    assert "skipped a damaged checkpoint" in caplog.text and "student.safetensors" in caplog.text
    assert rows_of(got) == rows_of(expected)
    assert checkpoint.load(last.parents[1]) is not None


def test_a_damaged_stage_that_nothing_needs_any_more_is_named(tmp_path, capsys):
    path = write(tmp_path, ALONE)
    expected = runner.run(path, folder=tmp_path)
    here = tmp_path / "alone"
    first = next((here / "checkpoints").glob("00-*/0*/student.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    (here / "done").unlink()
    capsys.readouterr()
    got = runner.run(path, folder=tmp_path)
    told = capsys.readouterr().err
    assert f"{first.parent}: student.safetensors is not what was written" in told and "--from 0" in told
    assert rows_of(got) == rows_of(expected)
    (here / "done").unlink()
    runner.run(path, folder=tmp_path, from_stage="0")
    (here / "done").unlink()
    capsys.readouterr()
    runner.run(path, folder=tmp_path)
    assert "not what was written" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "a byte", "cut"])
def test_a_packed_file_that_is_gone_or_damaged_is_made_anew(tmp_path, capsys, damage):
    path = write(tmp_path, ALONE.rstrip() + "\n  - {stage: pack}\n")
    runner.run(path, folder=tmp_path)
    file = tmp_path / "alone" / "student.tiny"
    data = file.read_bytes()
    (tmp_path / "alone" / "done").unlink()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-9] if damage == "cut" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    capsys.readouterr()
    runner.run(path, folder=tmp_path)
    assert f"{file}: is gone or damaged; stage 3 (pack) makes it anew" in capsys.readouterr().err
    assert file.read_bytes() == data


# the teacher


def test_a_teacher_of_a_checkpoint_is_examined_told_and_left_as_it_is(tmp_path, teacher_file):
    result = runner.run(write(tmp_path, TAUGHT.replace("CHECKPOINT", str(teacher_file))), folder=tmp_path)
    assert [row["stage"] for row in result["rows"]] == ["teacher", "distilled", "pruned", "recovered"]
    assert result["rows"][0]["top1"] > 40


def test_a_teacher_that_only_guesses_is_refused(tmp_path):
    torch.manual_seed(0)
    save_file(tmp_path / "x.safetensors", lenet5((1, 8, 8), 10, width=2).state_dict())
    path = write(tmp_path, TAUGHT.replace("CHECKPOINT", str(tmp_path / "x.safetensors")))
    with pytest.raises(
        ValueError,
        match=r"the teacher has \d+\.\d\d % of the 60 validation images right, and guessing 14.50 %",
    ):
        runner.run(path, folder=tmp_path)


def test_a_stage_that_changes_the_teacher_stops_the_run(tmp_path, teacher_file, monkeypatch):
    real = distill.fit

    def meddling(run, *args):
        numbers = real(run, *args)
        with torch.no_grad():
            run.teacher.network.fc1.bias[0] += 1e-6
        return numbers

    monkeypatch.setattr(distill, "fit", meddling)
    with pytest.raises(RuntimeError, match="stage 'distill' changed the teacher's weights or statistics"):
        runner.run(write(tmp_path, TAUGHT.replace("CHECKPOINT", str(teacher_file))), folder=tmp_path)


def test_a_teacher_that_was_exchanged_meanwhile_is_refused(tmp_path, teacher_file, monkeypatch):
    mine = tmp_path / "mine.safetensors"
    state, _ = read_file(teacher_file)
    save_file(mine, state)
    path = write(tmp_path, TAUGHT.replace("CHECKPOINT", str(mine)))
    runner.run(path, folder=tmp_path)
    (tmp_path / "taught" / "done").unlink()
    state["fc1.bias"][0] += 1
    save_file(mine, state)
    with pytest.raises(ValueError, match="the teacher is not the one that this run began with"):
        runner.run(path, folder=tmp_path)


class Killed(Exception):
    pass


def killed_in_the_first_stage(patch, path, folder):
    """Runs a recipe up to the first checkpoint in the middle of its first training."""
    real = Progress.save

    def save(self, step, tally):
        real(self, step, tally)
        raise Killed

    with patch.context() as inner:
        inner.setattr(fit, "CHECKPOINT_SECONDS", -1.0)
        inner.setattr(fit, "LOG_STEPS", 1)
        inner.setattr(Progress, "save", save)
        with pytest.raises(Killed):
            runner.run(path, folder=folder)


def test_a_teacher_that_was_exchanged_in_the_middle_of_the_first_stage_is_refused(
    tmp_path, teacher_file, monkeypatch
):
    mine = tmp_path / "mine.safetensors"
    state, _ = read_file(teacher_file)
    save_file(mine, state)
    path = write(tmp_path, TAUGHT.replace("CHECKPOINT", str(mine)))
    killed_in_the_first_stage(monkeypatch, path, tmp_path)
    bias = state["fc1.bias"].clone()
    state["fc1.bias"][0] += 1e-3
    save_file(mine, state)
    with pytest.raises(ValueError, match="taught: the teacher is not the one that this run began with"):
        runner.run(path, folder=tmp_path)
    state["fc1.bias"][:] = bias
    save_file(mine, state)
    assert runner.run(path, folder=tmp_path)["rows"][-1]["stage"] == "recovered"


def test_images_that_changed_meanwhile_are_refused(tmp_path, monkeypatch):
    for part, count in (("train", 20), ("test", 2)):
        for number in range(count):
            place = tmp_path / "images" / part / "ab"[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number * 10).save(place)
    path = write(
        tmp_path,
        f"""
name: pictures
data: {{dataset: image_folder, folder: {tmp_path / "images"}, size: 8, workers: 0}}
student: {{model: lenet300, hidden: [4]}}
stages: [{{stage: train, training: {{epochs: 2, batch_size: 8}}}}]
""",
    )
    killed_in_the_first_stage(monkeypatch, path, tmp_path)
    for number in range(20, 30):
        Image.new("L", (8, 8), 200).save(tmp_path / "images" / "train" / "a" / f"{number}.png")
    with pytest.raises(
        ValueError, match="pictures: the images or their labels are not those that this run began with"
    ):
        runner.run(path, folder=tmp_path)


def test_a_finished_run_without_its_checkpoints_answers_for_its_own_recipe_and_is_kept_aside_for_another(
    tmp_path,
):
    path = write(tmp_path, ALONE)
    expected = runner.run(path, folder=tmp_path)
    shutil.rmtree(tmp_path / "alone" / "checkpoints")
    assert runner.run(path, folder=tmp_path)["rows"] == expected["rows"]
    kept = (tmp_path / "alone" / "report.json").read_bytes()
    assert runner.run(path, {"stages.1.bits": 3}, folder=tmp_path)["rows"] != expected["rows"]
    assert (tmp_path / "alone" / "earlier" / "1" / "report.json").read_bytes() == kept


def test_runs_of_two_precisions_in_one_process(tmp_path):
    for precision in ("no", "bf16", "no"):
        runner.run(
            write(tmp_path, ALONE + f"precision: '{precision}'\n"),
            {"name": precision},
            folder=tmp_path / str(precision),
        )


def test_a_recipe_that_can_be_read_only_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(ALONE,))
    writer.start()
    runner.run(pipe, folder=tmp_path)
    writer.join()
    assert (tmp_path / "alone" / "recipe.yaml").read_text() == ALONE


def test_a_file_is_evaluated_where_a_trainer_of_another_kind_lies(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    rows = runner.run(write(tmp_path, ALONE + "  - {stage: pack}\n"), folder=tmp_path)["rows"]
    assert rows[-1]["stage"] == "decoded"


def test_several_teachers_are_each_taught_and_counted_together(tmp_path):
    result = runner.run(
        write(
            tmp_path,
            """
name: several
data: {dataset: digits, subset: 60, validation: 60}
teachers: [{model: lenet5, width: 2}, {model: lenet5, width: 3}]
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 20}}
  - {stage: distill, training: {epochs: 1, batch_size: 20}, losses: [{loss: kl}]}
""",
        ),
        folder=tmp_path,
    )
    row = result["rows"][0]
    nets = [lenet5((1, 8, 8), 10, width=width) for width in (2, 3)]
    assert (row["epochs"], row["steps"]) == (1, 6)
    assert row["num_weights"] == sum(p.numel() for net in nets for p in net.parameters() if p.dim() > 1)
    assert row["file_bytes"] == 4 * sum(p.numel() for net in nets for p in net.parameters())


# the launch


@pytest.mark.parametrize(
    ("environment", "got", "more"),
    [
        ({}, 1, False),  # python -m trainer
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 2, False),  # torchrun
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 1, True),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"},
            2,
            False,
        ),  # accelerate --multi_gpu
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, False),  # accelerate, one process
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            1,
            True,
        ),  # accelerate --cpu --num_processes 2
        ({"MASTER_ADDR": "127.0.0.1"}, 1, False),  # some cluster's habit
    ],
)
def test_a_launch_that_requested_more(monkeypatch, environment, got, more):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert opening._more_requested(got) is more


def test_the_launch_divides_no_losses(tmp_path, monkeypatch, capsys):
    """84 % were 20 % where `--gradient_accumulation_steps 4` divided every loss."""
    text = "name: NAME\ndata: {dataset: digits}\nstudent: {model: lenet5, width: 2}\nstages:\n"
    text += (
        "  - {stage: train, training: {epochs: 1, batch_size: 64, lr: 0.05, optimizer: sgd, momentum: 0.9}}\n"
    )
    plain = runner.run(write(tmp_path, text.replace("NAME", "plain")), folder=tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    capsys.readouterr()
    launched = runner.run(write(tmp_path, text.replace("NAME", "launched")), folder=tmp_path)
    told = capsys.readouterr().out
    assert "--gradient_accumulation_steps 4 has no effect: accumulate: 4 in the recipe" in told
    assert "--mixed_precision bf16 has no effect: the recipe's precision is 'no'" in told
    first, second = (
        read_file(next((tmp_path / name / "checkpoints" / "00-train").glob("*/student.safetensors")))[0]
        for name in ("plain", "launched")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert plain["rows"][0]["top1"] == launched["rows"][0]["top1"]


def test_more_processes_than_started_is_an_error_that_names_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(
        RecipeError, match="requested more processes than the 1 it got; .*torchrun --nproc_per_node N"
    ):
        runner.run(write(tmp_path, ALONE), folder=tmp_path)
    assert not (tmp_path / "alone").exists()


# a packed file by itself


def test_evaluating_a_file_that_is_not_there_or_of_other_images(tmp_path):
    path = write(tmp_path, ALONE)
    with pytest.raises(ValueError, match="nothing.tiny: cannot be read"):
        evaluate_file(tmp_path / "nothing.tiny", path)
    from trainer.data.batches import make_data
    from trainer.packing import network as packed
    from trainer.recipe.recipe import read

    data = make_data(read(path, {"data.size": 16})[0].data, torch.device("cpu"))
    content = packed.encode(lenet5((1, 16, 16), 10), {"model": "lenet5"}, packed.facts_of(data))
    (tmp_path / "other.tiny").write_bytes(content)
    with pytest.raises(ValueError, match="other.tiny: was made for other images"):
        evaluate_file(tmp_path / "other.tiny", path)


def test_the_last_bits_of_mean_and_std_make_no_other_images(tmp_path):
    """They are sums, which another number of threads adds up in another order: those of the file are taken."""
    from trainer.data.batches import make_data
    from trainer.packing import network as packed
    from trainer.recipe.recipe import read

    path, file = write(tmp_path, ALONE), tmp_path / "student.tiny"
    recipe, _ = read(path)
    facts = packed.facts_of(make_data(recipe.data, torch.device("cpu")))
    for nudge, told in ((1 + 1e-12, None), (1 + 1e-4, r"\(std differ\)")):
        other = facts | {"std": [facts["std"][0] * nudge]}
        file.write_bytes(packed.encode(lenet5((1, 8, 8), 10), {"model": "lenet5"}, other))
        header = packed.header(file.read_bytes())
        if told is None:
            assert images_of(file, header, recipe, path, torch.device("cpu")).std == tuple(other["std"])
        else:
            with pytest.raises(ValueError, match=told):
                images_of(file, header, recipe, path, torch.device("cpu"))


def test_evaluating_a_file_keeps_no_views_and_leaves_the_checked_recipe_as_it_is(tmp_path, monkeypatch):
    text = ALONE.replace("validation: 60", "validation: 60, views: 2, augment: {shift: 1}, keep_views: true")
    path = write(tmp_path, text + "  - {stage: pack}\n")
    runner.run(path, folder=tmp_path)
    recipes, opened = [], []
    real_read, real_data = evaluate_module.read, evaluate_module.make_data
    monkeypatch.setattr(
        evaluate_module, "read", lambda *given: recipes.append(real_read(*given)) or recipes[-1]
    )
    monkeypatch.setattr(
        evaluate_module, "make_data", lambda *given: opened.append(real_data(*given)) or opened[-1]
    )
    [packed_file] = (tmp_path / "alone").glob("*.tiny")
    evaluate_file(packed_file, path)
    assert opened[0].kept is None
    assert recipes[0][0] == real_read(path)[0] and recipes[0][0].data.keep_views


def test_the_accelerator_has_the_recipes_precision(tmp_path):
    from trainer.recipe.recipe import read

    assert isinstance(accelerator := make_accelerator(read(write(tmp_path, ALONE))[0]), Accelerator)
    assert accelerator.mixed_precision == "no" and accelerator.num_processes == 1


class FourCores:
    """Makes a machine of four physical cores, each of two logical ones, of which `allowed` may be used."""

    def __init__(self, monkeypatch, allowed=8):
        monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eight_threads(monkeypatch):
    """As torch would begin where nobody has set OMP_NUM_THREADS, on a machine that `FourCores` makes.

    It is only told the number: on fewer cores so many threads would wait for each other.
    """
    told = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)


@pytest.mark.parametrize(
    ("allowed", "num_processes", "local", "threads"),
    [
        (8, 1, None, 4),
        (3, 1, None, 3),
        (8, 2, None, 2),
        (8, 4, "2", 2),
        (8, 3, "3", 1),
        (8, 16, "16", 1),
        (8, 1, "2", 4),
    ],
)
def test_physical_cores_are_divided_among_the_processes_of_a_machine(
    monkeypatch, allowed, num_processes, local, threads
):
    FourCores(monkeypatch, allowed)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert available_threads(num_processes) == threads


@pytest.mark.parametrize(
    ("key", "argument", "before", "threads"),
    [("", None, 8, 4), ("", None, 2, 2), ("threads: 3", None, 8, 3), ("threads: 3", 5, 1, 5), ("", 6, 8, 6)],
    ids=["all", "as the user set", "recipe", "command line", "more than there are"],
)
def test_a_run_computes_with_the_threads_that_are_asked_for(
    tmp_path, monkeypatch, capsys, eight_threads, key, argument, before, threads
):
    FourCores(monkeypatch)
    torch.set_num_threads(before)
    found = runner.run(write(tmp_path, f"{key}\n{ALONE}"), folder=tmp_path, threads=argument)
    assert found["hardware"]["torch_threads"] == threads
    assert json.loads((tmp_path / "alone" / "begun.json").read_text())["threads"] == threads
    assert torch.get_num_threads() == before
    assert "threads" not in capsys.readouterr().out


def test_a_run_goes_on_with_the_threads_it_began_with(tmp_path, monkeypatch, capsys, eight_threads):
    FourCores(monkeypatch)
    path = write(tmp_path, ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(path, folder=tmp_path, threads=3)
    assert torch.get_num_threads() == 8
    assert "goes on with" not in capsys.readouterr().out
    assert runner.run(path, folder=tmp_path)["hardware"]["torch_threads"] == 3
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'alone'}: goes on with 3 threads, as it began (4 threads would be used now): rounding depends on the number\n"
    )


@pytest.mark.parametrize("launcher", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_one_line_tells_how_a_launch_uses_all_cores(tmp_path, monkeypatch, capsys, eight_threads, launcher):
    FourCores(monkeypatch)
    monkeypatch.setenv(launcher, "no")
    torch.set_num_threads(1)  # as a launcher leaves it
    runner.run(write(tmp_path, ALONE), folder=tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
    assert len(told) == 1 and told[0].startswith("computing with 1 thread, ")
    assert "accelerate launch --num_cpu_threads_per_process 4" in told[0]
    runner.run(write(tmp_path, ALONE.replace("alone", "other")), folder=tmp_path, threads=1)
    assert "threads" not in capsys.readouterr().out


def test_the_fresh_process_computes_with_as_many_threads(tmp_path, fresh_process, monkeypatch):
    asked, start = [], pack.subprocess.run
    monkeypatch.setattr(
        pack.subprocess, "run", lambda command, **rest: [asked.append(command), start(command, **rest)][1]
    )
    text = ALONE.replace("{stage: share, bits: 2}", "{stage: pack}")
    runner.run(write(tmp_path, text), folder=tmp_path, threads=2)
    assert asked[0][-2:] == ["--threads", "2"]


def test_layers_that_a_processor_has_in_float32_only_are_told_once_and_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onednn, "_missing_types", lambda kind: frozenset([torch.bfloat16, torch.float16]))
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = []
    real = onednn._recurrent
    monkeypatch.setattr(
        onednn, "_recurrent", lambda *given: [real(*given), seen.append(torch.is_autocast_enabled("cpu"))][0]
    )
    text = ALONE.replace("{model: lenet5, width: 2}", "{model: lstm, hidden: 4}") + "precision: bf16\n"
    try:
        runner.run(write(tmp_path, text), folder=tmp_path)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    told = "precision bf16: this processor does not have LSTM in it: these layers compute in float32\n"
    assert capsys.readouterr().out.count(told) == 1
    assert any(seen)


def test_a_precision_that_a_cpu_has_not_got_is_told_and_trained(tmp_path, capsys):
    runner.run(write(tmp_path, f"{ALONE}precision: fp16\n"), folder=tmp_path)
    told = "precision fp16: Accelerate has it on GPUs only: all is computed in float32 here\n"
    assert capsys.readouterr().out.count(told) == 1


def test_what_has_no_effect_on_these_images_is_told(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ndata: {dataset: digits, size: 16, subset: 40, workers: 2}\nstudent: {model: lenet5, width: 2}\n"
        "stages:\n"
        "  - {stage: train, training: {epochs: 1, batch_size: 8, accumulate: 6}}\n"
        "  - {stage: train, training: {epochs: 1, batch_size: 41}}\n"
        "  - {stage: train, training: {epochs: 1, batch_size: 8, accumulate: 5}}\n"
        "  - {stage: train, training: {epochs: 1}}\n"
    )
    recipe, _ = read(path)
    data = make_data(recipe.data, torch.device("cpu"))
    assert list(without_effect(recipe, data, 1)) == [
        f"{path}:2: data.workers: has no effect: the images are in memory",
        f"{path}:5: stages[0].training.accumulate: got 6, and an epoch has 5 batches: a step ends with the epoch",
        f"{path}:6: stages[1].training.batch_size: got 41, and there are 40 training images: all are one batch",
    ]


def test_how_many_mixed_images_have_a_label_is_told(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ndata: {dataset: digits, subset: 200, labelled: 40, cutmix: 1}\nstudent: {model: lenet5, width: 2}\n"
        "stages: [{stage: train, training: {epochs: 1}}]\n"
    )
    recipe, _ = read(path)
    assert list(without_effect(recipe, make_data(recipe.data, torch.device("cpu")), 1)) == [
        f"{path}:2: data.cutmix: mixes images with and without a label: 20% have one, and a mixed image only if both had, about 4.0%"
    ]


def test_tracking_starts_after_the_data_was_opened_and_only_if_asked(tmp_path, monkeypatch):
    began = []

    @contextlib.contextmanager
    def tracked(folder, wanted):
        began.append((folder.name, wanted, sorted(path.name for path in folder.iterdir())))
        yield
        began.append((folder / "report.json").is_file())

    monkeypatch.setattr(runner, "tracked", tracked)
    missing = "{dataset: image_folder, folder: NONE, size: 16}"
    path = write(
        tmp_path, ALONE.replace("{dataset: digits, subset: 100, validation: 60}", missing) + "track: wandb\n"
    )
    with pytest.raises(ValueError, match="NONE"):
        runner.run(path, folder=tmp_path)
    assert began == []
    runner.run(write(tmp_path, ALONE + "track: wandb\n"), folder=tmp_path)
    assert began == [("alone", True, [".holder", ".lock", "log.jsonl", "recipe.yaml"]), True]
    runner.run(write(tmp_path, ALONE.replace("name: alone", "name: untracked")), folder=tmp_path)
    assert began[2][:2] == ("untracked", False)
