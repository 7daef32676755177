"""Checkpoints: whole or not there, the newest valid one wins, no pickles, and one run in a folder."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from trainer.storage import checkpoint
from trainer.storage.files import write_bytes
from trainer.storage.lock import lock
from trainer.storage.weights_file import digest, read_file, save_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", [".", "folder"])
def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as told:
        write_bytes(Path(place), b"data")
    assert told.value.filename == place and sorted(os.listdir()) == ["folder"]


def tensors(value: float) -> dict:
    return {
        "student": {"fc.weight": torch.full((3, 4), value), "fc.bias": torch.tensor(value)},
        "optimizer": {"state/0/exp_avg": torch.full((12,), value / 2)},
    }


def equal(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- save and load


def test_round_trip_keeps_bits_types_order_and_facts(tmp_path):
    weight = torch.randn(4, 6)
    given = {
        "student": {
            "z": weight.t(), "a": weight, "tied": weight, "view": weight[1:, ::2], "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 2), "mask": weight > 0, "half": weight.half(), "brain": weight.bfloat16(),
            "parameter": nn.Parameter(weight.double()),
        },
        "average.best-1": {},
    }  # fmt: skip
    facts = {"step": 7, "best": float("-inf"), "loss": 0.1 + 0.2, "names": ["é", None, True]}
    path = checkpoint.save(tmp_path / "new" / "folder", given, facts)
    assert path == tmp_path / "new" / "folder" / "00000007"
    found, found_facts = checkpoint.load(tmp_path / "new" / "folder")
    assert found_facts == facts
    assert list(found) == ["student", "average.best-1"]
    assert equal(found["student"], given["student"])


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "missing") is None


def test_same_content_same_bytes(tmp_path):
    first = checkpoint.save(tmp_path / "a", tensors(1.0), {"step": 1})
    second = checkpoint.save(tmp_path / "b", tensors(1.0), {"step": 1})
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_older_ones_are_removed(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, tensors(step), {"step": step})
    assert names(tmp_path) == ["00000020", "00000030"]
    checkpoint.save(tmp_path, tensors(40), {"step": 40}, keep=1)
    assert names(tmp_path) == ["00000040"]


def test_what_was_saved_last_is_loaded_whatever_its_step(tmp_path):
    checkpoint.save(tmp_path, tensors(50), {"step": 50})
    checkpoint.save(tmp_path, tensors(50.5), {"step": 50})
    path = checkpoint.save(tmp_path, tensors(20), {"step": 20})
    assert path.name == "00000052"
    assert checkpoint.load(tmp_path)[1] == {"step": 20}
    checkpoint.save(tmp_path, tensors(0), {})
    assert checkpoint.load(tmp_path)[1] == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b"])
def test_entry_names_are_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="file name"):
        checkpoint.save(tmp_path, {name: {}}, {})
    assert names(tmp_path) == []


def test_only_tensors_of_known_types(tmp_path):
    with pytest.raises(ValueError, match="'lr' is a float"):
        checkpoint.save(tmp_path, {"optimizer": {"lr": 0.1}}, {})
    with pytest.raises(ValueError, match="complex128"):
        checkpoint.save(tmp_path, {"a": {"b": torch.zeros(1, dtype=torch.complex128)}}, {})
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, {}, {}, keep=0)


# -- damage


@pytest.mark.parametrize(
    "file", ["student.safetensors", "optimizer.safetensors", "facts.json", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, file, harm):
    checkpoint.save(tmp_path, tensors(1), {"step": 1})
    newest = checkpoint.save(tmp_path, tensors(2), {"step": 2})
    path = newest / file
    data = path.read_bytes()
    if harm == "flip":
        damage(path, data.index(b'"sha256"') + 12 if file == "manifest.json" else len(data) // 2)
    elif harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "truncate" else b"")
    with caplog.at_level(logging.WARNING):
        found, facts = checkpoint.load(tmp_path)
    assert facts == {"step": 1}
    assert equal(found["student"], tensors(1)["student"])
    [record] = caplog.records
    assert str(newest) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_every_single_flip_in_a_file_is_seen(tmp_path):
    path = checkpoint.save(tmp_path, tensors(1), {"step": 1}) / "optimizer.safetensors"
    for place in range(path.stat().st_size):
        damage(path, place)
        assert checkpoint.load(tmp_path) is None
        damage(path, place)
    assert checkpoint.load(tmp_path) is not None


def test_a_damaged_one_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, tensors(step), {"step": step})
    damage(tmp_path / "00000002" / "student.safetensors", -1)
    checkpoint.save(tmp_path, tensors(3), {"step": 3})
    assert names(tmp_path) == ["00000001", "00000002", "00000003"]
    damage(tmp_path / "00000003" / "facts.json", 0)
    assert checkpoint.load(tmp_path)[1] == {"step": 1}


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path, monkeypatch, caplog):
    checkpoint.save(tmp_path, tensors(1), {"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, tensors(2), {"step": 2})
    assert len(names(tmp_path)) == 2
    assert checkpoint.load(tmp_path)[1] == {"step": 1}
    assert not caplog.records
    checkpoint.save(tmp_path, tensors(3), {"step": 3})
    assert names(tmp_path) == ["00000001", "00000003"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.path.realpath(f"/proc/self/fd/{handle}")), sync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda *ends: (events.append("rename"), rename(*ends)))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what was synced")
    checkpoint.save(tmp_path, {"a": {}}, {"step": 1})
    parents = [str(parent) for parent in [*tmp_path.resolve().parents][:3]]
    assert events[:3] == parents  # else the folder itself may be gone after a power failure
    before = [Path(event).name for event in events[3 : events.index("rename")]]
    assert before == ["a.safetensors", "facts.json", "manifest.json", ".partial-00000001"]
    assert events[events.index("rename") + 1 :] == [str(tmp_path.resolve())]


def test_what_a_run_goes_on_from_is_on_the_disk(tmp_path, monkeypatch):
    checkpoint.save(
        tmp_path, tensors(1), {"step": 1}
    )  # as if its writer was killed before it synced the folder
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), sync(handle)))
    assert checkpoint.load(tmp_path)[1] == {"step": 1}
    assert tmp_path.stat().st_ino in synced
    assert checkpoint.load(tmp_path / "none") is None


WRITER = """
import sys, torch
from pathlib import Path
from trainer.storage import checkpoint
from trainer.storage.files import write_bytes
step = 0
while True:
    step += 1
    checkpoint.save(Path(sys.argv[1]), {"a": {"w": torch.full((100_000,), float(step))}}, {"step": step})
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_what_it_had_saved(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with writer:
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(0.003)
        writer.kill()
        saved = [3, *map(int, writer.stdout.read().split())][-1]
    found, facts = checkpoint.load(tmp_path)
    assert facts["step"] in (saved, saved + 1)
    assert bool((found["a"]["w"] == facts["step"]).all())


# -- single files


def test_file_round_trip_and_replacement(tmp_path):
    path = tmp_path / "new" / "net.safetensors"
    state = {"module.b": torch.randn(2), "module.a": torch.randn(3)}
    save_file(path, {"old": torch.zeros(1)})
    save_file(path, state, {"header": "{}"})
    content, metadata = read_file(path)
    assert equal(content, state) and metadata == {"header": "{}"}
    assert equal(dict(sorted(safetensors.torch.load_file(path).items())), dict(sorted(state.items())))
    assert names(path.parent) == ["net.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_file(path, {"a": torch.ones(1)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_file(path, {"a": torch.zeros(1)})
    assert names(tmp_path) == ["net.safetensors"]
    assert equal(read_file(path)[0], {"a": torch.ones(1)})


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "old", "protocol 2", "protocol 4"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, how):
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    thing = {"state_dict": Evil(trace)}
    if how.startswith("protocol"):
        file.write_bytes(pickle.dumps(thing, protocol=int(how[-1])))
    else:
        torch.save(thing, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth: refused.*run code") as caught:
        read_file(file)
    assert "torch.save(" in str(caught.value)  # how it is converted
    assert not trace.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_file(tmp_path / "net.pt")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_file(tmp_path / "missing.pth")
    (tmp_path / "e.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"allowed: \.safetensors"):
        read_file(tmp_path / "e.onnx")


def test_a_header_that_names_other_keys_is_a_damaged_file(tmp_path):
    for order in ('["a", "b"]', "3", '["a"', "[[1]]"):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"key_order": order})
        with pytest.raises(ValueError, match=r"x\.safetensors: this is no whole safetensors file"):
            read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "harm", [lambda data: data[:-20], lambda data: data[:30], lambda _: b"", lambda _: b"hello there"]
)
def test_damaged_files_are_named(tmp_path, suffix, harm):
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save({"a": torch.ones(100)}, path)
    else:
        save_file(path, {"a": torch.ones(100)})
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"net\{suffix}: "):
        read_file(path)


# -- optimizers

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, betas=(0.8, 0.95)),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "adam with a tensor for a rate": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(1e-2)),
    "lbfgs": lambda groups: torch.optim.LBFGS(groups[0]["params"] + groups[1]["params"], max_iter=3),
}


def learner(make):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    groups = [{"params": list(network[0].parameters())}, {"params": list(network[2].parameters())}]
    return network, make(groups)


def learn(network, optimizer, steps) -> None:
    for step in steps:
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))

        def loss(batch=batch):
            optimizer.zero_grad()
            value = (network(batch) ** 2).mean() + network(batch)[:, 0].mean()
            value.backward()
            return value

        optimizer.step(loss)


# torch 2.8's own LBFGS does that
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, name):
    network, optimizer = learner(OPTIMIZERS[name])
    learn(network, optimizer, range(5))
    checkpoint.save(
        tmp_path, {"student": network.state_dict()}, {"step": 5}, states={"optimizer": optimizer.state_dict()}
    )
    learn(network, optimizer, range(5, 10))

    assert {path.name for path in (tmp_path / "00000005").iterdir()} == {
        "student.safetensors", "optimizer.pt", "facts.json", "manifest.json"
    }  # fmt: skip
    found, _ = checkpoint.load(tmp_path)
    other, other_optimizer = learner(OPTIMIZERS[name])
    other.load_state_dict(found["student"])
    other_optimizer.load_state_dict(found["optimizer"])
    learn(other, other_optimizer, range(5, 10))
    assert equal(network.state_dict(), other.state_dict())


def test_an_optimizer_state_comes_back_exactly_and_a_damaged_one_is_skipped(tmp_path):
    state = {
        "state": {0: {"step": 3, "average": torch.ones(2, 3).T, "best": float("inf"), "none": None}, 5: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "fused": True, "params": [0, 5]}],
    }
    for step in (1, 2):
        checkpoint.save(tmp_path, {}, {"step": step}, states={"optimizer": state})
    found = checkpoint.load(tmp_path)[0]["optimizer"]
    assert found["state"][0]["average"].stride() == (
        1,
        3,
    )  # fused optimizers walk it and its parameter as flat memory
    assert repr(found) == repr(state)
    damage(tmp_path / "00000002" / "optimizer.pt", -30)
    assert checkpoint.load(tmp_path)[1] == {"step": 1}


# -- the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from trainer.storage.lock import lock
with lock(Path(sys.argv[1])):
    worker = os.fork()
    if worker == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder_until_the_holder_is_dead(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        worker = int(holder.stdout.readline())
        try:
            told = rf"process {holder.pid} on .*, since \d{{4}}-"
            with pytest.raises(ValueError, match=told), lock(tmp_path):
                pass
            holder.kill()
            holder.wait()
            with lock(tmp_path):
                assert json.loads((tmp_path / ".holder").read_text())["pid"] == os.getpid()
            os.kill(worker, 0)  # its forked worker lives on, without the lock
        finally:
            os.kill(worker, 9)


def test_a_lock_holds_within_one_process_and_ends_with_its_block(tmp_path):
    pytest.importorskip("fcntl")
    for _ in range(2):
        with lock(tmp_path / "run"):
            with pytest.raises(ValueError, match=f"process {os.getpid()}"), lock(tmp_path / "run"):
                pass
            with lock(tmp_path / "other"):
                pass


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock(tmp_path):
        assert "not locked" in caplog.text


def test_removing_a_checkpoint_by_hand_is_no_matter(tmp_path):
    checkpoint.save(tmp_path, tensors(1), {"step": 1})
    checkpoint.save(tmp_path, tensors(2), {"step": 2})
    shutil.rmtree(tmp_path / "00000002")
    assert checkpoint.load(tmp_path)[1] == {"step": 1}


def test_the_digest_stays_what_it_was():
    """It stands in kept runs and in reports."""
    state = {
        "b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "m": torch.tensor([True, False]),
        "h": torch.ones(2, 2, dtype=torch.float16).T, "e": torch.zeros(0),
    }  # fmt: skip
    known = "f173c99d727a5044cf958b6b4f19fb8414993055f769cce19831f3f18f7c0165"
    assert digest(state) == digest(dict(reversed(state.items()))) == known
