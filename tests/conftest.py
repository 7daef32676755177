"""What several rooms' tests share: a taught teacher, reports without plots, runs whose logs are closed, quick packing, short trainings."""

import os
from pathlib import Path

import pytest

from tests import making
from trainer.data import store
from trainer.reporting import report
from trainer.runs import earlier, guards, resuming
from trainer.stages import pack
from trainer.storage import checkpoint
from trainer.storage.weights_file import save_file


@pytest.fixture(autouse=True)
def closed():
    """Closes the logs of `making.make_run`."""
    yield
    making.close()


@pytest.fixture(scope="session", autouse=True)
def stores_aside(tmp_path_factory):
    """Stores of the tests' pictures lie in a folder of the tests, unless one names a cache folder."""
    aside, real = tmp_path_factory.mktemp("stores"), store.cache_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "cache_folder", lambda: real() if os.environ.get("TRAINER_DATA") else aside)
        yield


@pytest.fixture(scope="session", autouse=True)
def plots_left_out():
    """Reports are without their plots and the student inside, which take seconds. The tests of these ask for them by `plots`."""
    with pytest.MonkeyPatch.context() as patch:
        making.leave_plots_out(patch)
        yield


@pytest.fixture
def plots(monkeypatch):
    """Reports have their plots, as a user's have."""
    making.put_plots_in(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def decoded_here():
    """Packed files are decoded in this process: a fresh Python with its imports takes seconds each time.

    The tests of what the fresh process is for ask for it by `fresh_process`.
    """
    from trainer.runs.evaluate_file import evaluate_file

    def here(run, path):
        return evaluate_file(path, run.recipe_path, allow_python=run.allow_python)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_in_fresh_process", here)
        yield


@pytest.fixture
def fresh_process(monkeypatch):
    """Packed files are decoded by a fresh process, as a user's are."""
    monkeypatch.setattr(pack, "_in_fresh_process", making.FRESH_PROCESS)


@pytest.fixture(scope="session", autouse=True)
def untrained_allowed():
    """Networks that have learnt nothing are pruned, shared and packed: the trainings of most tests are that short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "_found_untrained", lambda *_: iter(()))
        yield


@pytest.fixture
def untrained_refused(monkeypatch):
    """They are refused, as a user's are."""
    monkeypatch.setattr(guards, "_found_untrained", making.FOUND_UNTRAINED)


@pytest.fixture(scope="session", autouse=True)
def nothing_taken_over():
    """Equal stages of finished runs beside a run are not taken over: most tests compare runs that did the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "sources_of", lambda _, more=(): list(more))
        yield


@pytest.fixture
def taken_over(monkeypatch):
    """They are taken over, as a user's are."""
    monkeypatch.setattr(resuming, "sources_of", earlier.sources_of)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    """Weights of a LeNet-5 of width 2 that knows the digits: trained by a recipe of its own."""
    from trainer.runs import runner

    folder = tmp_path_factory.mktemp("teacher")
    (folder / "t.yaml").write_text("""
name: t
data: {dataset: digits, subset: 300, validation: 60}
student: {model: lenet5, width: 2}
stages: [{stage: train, training: {epochs: 6, batch_size: 20, lr: 1e-2}}]
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        result = runner.run(folder / "t.yaml", folder=folder)
    assert result["rows"][0]["top1"] > 40
    tensors, _ = checkpoint.load(folder / "t" / "checkpoints" / "00-train")
    save_file(folder / "t.safetensors", tensors["student"])
    return folder / "t.safetensors"
