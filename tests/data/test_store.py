"""The store of decoded pictures: the same bits with and without it, whatever is killed, damaged, full or removed."""

import ctypes
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import cli
from trainer.data import store as stores
from trainer.data.batches import batches, make_data
from trainer.data.pictures import Names, Pictures, stored_side
from trainer.data.store import Store
from trainer.data.views import Views
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys, StoreKeys
from trainer.runs import kept

CPU = torch.device("cpu")
PAGE = 4096


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    root, random = tmp_path / "pictures", np.random.default_rng(0)
    for number in range(24):
        size = [(90, 60), (50, 80), (40, 40), (400, 30)][number % 4]
        pixels = random.integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
        path = root / ("test" if number < 6 else "train") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize(size).save(path)
    return root


def data_of(folder, **more):
    keys = shelves.checker(shelves.find("dataset", "image_folder"), DataKeys)
    settings = {"dataset": "image_folder", "folder": folder, "size": 16, "workers": 0, "validation": 4}
    return make_data(keys.model_validate(settings | more), CPU)


def all_of(data, view=0):
    """Everything that a training and a measurement see, in one process."""
    seen = [Views(data).of(data.train.ids, view).float()]
    return torch.cat(
        [*seen, *(part.read(torch.arange(len(part)))[0] / 255 for part in (data.validation, data.test))]
    )


def count_decoded(monkeypatch):
    from trainer.data import image_file

    opened = []
    real = image_file.Image.open
    monkeypatch.setattr(
        image_file.Image, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest)
    )
    return opened


AUGMENTS = [{}, {"random_resized_crop": {}}]


@pytest.mark.parametrize("augment", AUGMENTS, ids=["whole", "cut"])
def test_what_is_read_is_the_same_with_and_without_room_and_is_decoded_once(folder, monkeypatch, augment):
    small = {"short_side": 32} if augment else {}
    opened = count_decoded(monkeypatch)
    data = data_of(folder, augment=augment, store=small)
    first = all_of(data)
    assert opened
    opened.clear()
    again = all_of(data)
    assert {os.path.basename(path) for path in opened} <= {
        f"{n}.jpg" for n in range(3, 24, 4)
    }  # 400 x 30: no place
    if not augment:
        assert not opened
    other = data_of(folder, augment=augment, store=small)  # another run
    opened.clear()
    assert torch.equal(first, again) and torch.equal(first, all_of(other)) and len(opened) < 6
    monkeypatch.setattr(Store, "_has_room", lambda *_: False)
    shutil.rmtree(stores.cache_folder())
    assert torch.equal(first, all_of(data_of(folder, augment=augment, store=small)))


@pytest.mark.parametrize(
    ("given", "size", "side"),
    [(None, 224, 256), (None, 128, 192), (None, 32, 48), (None, 300, 300), (256, 128, 256), (40, 64, 64)],
)
def test_the_stored_side_suits_the_input(given, size, side):
    assert stored_side(StoreKeys(short_side=given), (3, size // 2, size)) == side


def test_off_keeps_nothing_and_cuts_the_picture_itself(folder, cache):
    plain = data_of(folder, store="off")
    assert torch.equal(all_of(plain), all_of(data_of(folder)))
    shutil.rmtree(cache / "store")
    all_of(data_of(folder, augment={"random_resized_crop": {}}, store="off"))
    assert not (cache / "store").exists()


def test_two_sizes_show_the_same_part_of_a_stored_picture(folder):
    data = data_of(folder, augment={"random_resized_crop": {"scale": [0.2, 0.5]}})
    for _ in range(2):
        small, large = Views(data).of(data.train.ids, 2), Views(data.at_size(64)).of(data.train.ids, 2)
        shown = torch.nn.functional.interpolate(large, size=(16, 16), mode="bilinear", antialias=True)
        assert (shown - small).abs().mean() < 0.05


def test_workers_fill_it_and_other_processes_read_it(folder):
    data = data_of(folder, augment={"random_resized_crop": {}}, workers=2)
    order = list(torch.arange(len(data.train)).split(3))
    for view in range(3):
        views = Views(data)
        got = torch.cat([images for images, _, _ in batches(data.train, order, 2, CPU, views.cuts(view))])
        alone = torch.cat([data.train.read(positions, views.cuts(view))[0] for positions in order])
        assert torch.equal(got, alone)


def some(number, height=20, width=30):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def test_records_are_what_was_put_there():
    store = Store({"what": 1}, 5, 20 * 30 * 3)
    assert store.get(3) is None
    store.put(3, some(3))
    store.put(0, some(0, 7, 9))
    store.put(1, some(1, 21, 70))  # too large for its place
    for reader in (store, Store({"what": 1}, 5, 20 * 30 * 3), pickle.loads(pickle.dumps(store))):
        assert np.array_equal(reader.get(3), some(3)) and np.array_equal(reader.get(0), some(0, 7, 9))
        assert reader.get(1) is None and reader.get(4) is None
    assert Store({"what": 2}, 5, 20 * 30 * 3).get(3) is None


def test_places_take_room_only_when_they_are_filled():
    store = Store({}, 1_000_000, 2**20)  # a tebibyte
    store.put(999_999, some(1))
    assert np.array_equal(store.get(999_999), some(1)) and store.num_bytes() < 2**20


def resident(store):
    """Returns which records the system has in memory, by Linux's mincore."""
    base = np.frombuffer(store._map, np.uint8)
    pages = np.zeros(len(base) // PAGE, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert (
        libc.mincore(
            ctypes.c_void_p(base.ctypes.data),
            ctypes.c_size_t(len(base)),
            pages.ctypes.data_as(ctypes.c_void_p),
        )
        == 0
    )
    records = pages[store._start // PAGE :].reshape(store.num_records, -1) & 1
    return records[:, : -(-PER_RECORD // PAGE)].all(axis=1)


PER_RECORD = 128 * 128 * 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux which pages are in memory")
def test_expected_records_come_into_memory_and_empty_or_damaged_ones_are_left_alone():
    writer = Store({}, 40, PER_RECORD)
    for number in range(32):
        writer.put(number, some(number, 128, 128))
    size = writer.num_bytes()
    os.fsync(writer._file)
    reader = Store({}, 40, PER_RECORD)
    reader.open()
    os.posix_fadvise(reader._file, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(reader)[:32].any():
        pytest.skip("this file system keeps its pages in memory")
    with open(reader.folder / "records", "r+b") as file:  # the head of record 5 says 2^32 - 1 for everything
        file.seek(5 * 16)
        file.write(b"\xff" * 16)
    reader.expect([2, 5, 31, 39])
    deadline = time.monotonic() + 60
    while not resident(reader)[[2, 31]].all() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(reader)[[2, 31]].all() and not resident(reader)[[10, 20, 39]].any()
    assert reader.num_bytes() == size
    assert np.array_equal(reader.get(31), some(31, 128, 128)) and reader.get(39) is None


def test_damage_is_found_said_and_mended(caplog):
    store = Store({}, 4, 20 * 30 * 3)
    for number in range(4):
        store.put(number, some(number))
    with open(store.folder / "records", "r+b") as file:
        file.seek(PAGE + 2 * PAGE + 100)
        file.write(b"damaged")
    reader = Store({}, 4, 20 * 30 * 3)
    with caplog.at_level(logging.WARNING):
        assert [reader.get(number) is None for number in range(4)] == [False, False, True, False]
    assert "record 2 is damaged; such pictures are decoded again" in caplog.text
    reader.put(2, some(2))
    assert np.array_equal(reader.get(2), some(2))


def test_a_cut_file_is_made_anew():
    store = Store({}, 4, 20 * 30 * 3)
    store.put(1, some(1))
    del store
    [path] = stores.cache_folder().glob("store/*/records")
    os.truncate(path, 5000)
    store = Store({}, 4, 20 * 30 * 3)
    assert store.get(1) is None
    store.put(1, some(1))
    assert np.array_equal(store.get(1), some(1))


def fill(numbers):
    store = Store({}, 300, 200 * 300 * 3)
    for number in numbers:
        store.put(number, some(number, 200, 300))


def test_a_kill_leaves_whole_records_or_none():
    context = multiprocessing.get_context("fork")
    for delay in (0.02, 0.1):
        process = context.Process(target=fill, args=(range(300),))
        process.start()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    store = Store({}, 300, 200 * 300 * 3)
    found = [store.get(number) for number in range(300)]
    assert all(one is None or np.array_equal(one, some(n, 200, 300)) for n, one in enumerate(found))


def test_two_processes_fill_it_at_once():
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(order,)) for order in (range(60), range(59, -1, -1))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = Store({}, 300, 200 * 300 * 3)
    assert all(np.array_equal(store.get(number), some(number, 200, 300)) for number in range(60))


def test_a_limit_is_kept_and_said(caplog):
    store = Store({}, 100, 20 * 30 * 3, limit_gib=10 * PAGE / 2**30)
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            store.put(number, some(number))
    assert store.num_bytes() <= 10 * PAGE
    known = [store.get(number) is not None for number in range(100)]
    assert 3 < sum(known) < 10 and "GiB that stores may take are full" in caplog.text


def test_a_store_that_nobody_uses_makes_room_for_a_new_one(caplog):
    limit = 12 * PAGE / 2**30
    old, used = (Store({"name": name}, 100, 20 * 30 * 3, limit) for name in ("old", "used"))
    for number in range(3):
        old.put(number, some(number))
        used.put(number, some(number))
    os.utime(old.folder / "facts.json", (1, 1))
    left = old.folder
    del old
    new = Store({"name": "new"}, 100, 20 * 30 * 3, limit)
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            new.put(number, some(number))
    assert not (left / "records").exists() and f"{left}: removed" in caplog.text
    assert new.get(2) is not None and new.get(19) is None and used.get(2) is not None


def test_a_full_disk_is_said_and_stops_nothing(monkeypatch, caplog):
    store = Store({}, 4, 20 * 30 * 3)
    store.put(0, some(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        store.put(1, some(1))
        store.put(2, some(2))
    assert caplog.text.count("No space left on device: the other pictures are decoded each time") == 1
    assert store.get(0) is not None and store.get(1) is None


def test_a_folder_that_cannot_be_made(folder, cache, caplog):
    cache.mkdir()
    (cache / "store").write_text("a file")
    with pytest.raises(
        Mistake, match="data: store: .* cannot be used: .*TRAINER_DATA.*store: off keeps nothing"
    ):
        data_of(folder, store={"limit_gib": 1})
    with caplog.at_level(logging.WARNING):  # `auto` goes on without
        all_of(data_of(folder))
    assert "cannot be used" in caplog.text and "pictures are decoded each time" in caplog.text


def test_a_changed_picture_is_another_one(folder):
    before = all_of(data_of(folder))
    Image.new("RGB", (30, 30), (255, 0, 0)).save(folder / "test" / "a" / "0.jpg")
    after = all_of(data_of(folder))
    assert not torch.equal(before, after) and len(list(stores.cache_folder().glob("store/*"))) > 2


def test_the_cache_lists_and_removes_it(folder, capsys):
    data = data_of(folder)
    all_of(data)
    assert cli.main(["cache"]) == 0
    told = capsys.readouterr().out
    assert told.count("18 pictures, decoded (3x16x16), from") == 1 and told.count("6 pictures, decoded") == 1
    sizes = [entry.num_bytes for entry in kept.kept() if entry.name.startswith("store/")]
    assert all(0 < size < 300_000 for size in sizes)
    with pytest.raises(Mistake, match="a run is using it; nothing was removed"):
        kept.remove([])
    del data
    assert len(kept.remove([])) == 3 and not list(stores.cache_folder().glob("store/*"))


def test_names_are_what_was_given():
    given = ["a/b.jpg", "ä/ö.png", "", "x" * 300]
    names = Names(given)
    assert list(names) == given and len(names) == 4 and names[1] == given[1] and names[-1] == given[-1]
    assert sorted(names) == sorted(given) and list(Names([])) == []
    with pytest.raises(IndexError):
        names[4]
    assert Pictures(given, torch.zeros(4), None).files[np.int64(3)] == given[3]
