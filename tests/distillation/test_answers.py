import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from tests import making
from tests.processes import in_two
from trainer.data.batches import batches, epoch_order, make_data
from trainer.data.views import Views
from trainer.distillation import answer_file, answer_space, answers
from trainer.distillation.answer_file import AnswerFile
from trainer.distillation.answers import Answers
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.recipe.keys import CacheKeys, DataEntry, TeacherKeys
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.runs import runner
from trainer.storage import checkpoint

VIEWS = {"views": 3, "augment": {"shift": 1, "rotate": 8}}
TOP = Path(__file__).parents[2]


def some_data(**settings):
    settings = {"dataset": "digits", "subset": 150, "validation": 20} | VIEWS | settings
    return make_data(TypeAdapter(DataEntry).validate_python(settings), torch.device("cpu"))


class Counted(Teacher):
    """A teacher that counts the images it is shown."""

    shown = 0

    def see(self, images, layers=(), embedding=False):
        self.shown += len(images)
        return super().see(images, layers, embedding)


def a_teacher(data, seed=0):
    torch.manual_seed(seed)
    network = lenet5(data.shape, len(data.classes), width=6)
    network.fc3.weight.data.mul_(20)  # logits of a size that a trained network's have
    return Counted([network], [TeacherKeys(model="lenet5")], data.mean, data.std)


def epochs(cache, data, numbers, layers=(), embedding=False, rank=0, num_processes=1):
    """The cache's answers over some epochs: (view, index, images, seen) of each batch."""
    views, found = Views(data), []
    for epoch in numbers:
        view = views.number(epoch, 0)
        order = epoch_order(len(data.train), 32, 0, epoch, rank, num_processes)
        for images, _, index in batches(data.train, order, 0, torch.device("cpu")):
            images = views.augmented(images, index, view)
            found.append((view, index, images, cache.see(images, index, view, layers, embedding)))
    return found


def opened(data, guide, folder, keys=None, **settings):
    """A cache whose teacher has not been asked yet."""
    cache = Answers(guide, data, folder, keys, **settings)
    guide.shown = 0
    return cache


# Answers


def test_kept_answers_are_the_live_ones_and_asked_for_once(tmp_path):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path)
    first = epochs(cache, data, range(3))
    assert guide.shown == cache.num_computed == 3 * len(data.train)
    again = epochs(cache, data, range(3, 9))
    assert guide.shown == 3 * len(data.train)
    kept = {
        (view, i): logits
        for view, index, _, seen in first
        for i, logits in zip(index.tolist(), seen.logits, strict=True)
    }
    for _, _, images, seen in first:
        assert torch.equal(seen.logits, guide.see(images).logits)
    for view, index, images, seen in again:
        assert torch.equal(seen.logits, torch.stack([kept[view, i] for i in index.tolist()]))
        assert seen.embedding is None and seen.maps == {}
        torch.testing.assert_close(seen.logits, guide.see(images).logits, rtol=1e-5, atol=1e-5)


def test_without_augmentation_there_is_one_view(tmp_path):
    data = some_data(views=None, augment={})
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path)
    epochs(cache, data, range(4))
    assert guide.shown == len(data.train)


def test_another_run_asks_nothing(tmp_path):
    data = some_data()
    guide = a_teacher(data)
    first = epochs(opened(data, guide, tmp_path), data, range(3))
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path)
    assert "450 there already" in cache.describe()
    assert cache.check() == 8 and guide.shown == 8
    again = epochs(cache, data, range(3))
    assert cache.num_computed == 0 and guide.shown == 8
    assert all(torch.equal(a[3].logits, b[3].logits) for a, b in zip(first, again, strict=True))


def test_a_smaller_subset_and_other_batches_share_records(tmp_path):
    data = some_data(subset=100)
    epochs(opened(data, a_teacher(data), tmp_path), data, [0])
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    epochs(cache, data, [0])
    assert cache.num_computed == 50


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_embeddings_and_maps(tmp_path, kind):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(
        data, guide, tmp_path, CacheKeys(type=kind, embeddings=True, maps=True), layers=["conv1", "conv2"]
    )
    assert cache.keeps(["conv2"], True) and cache.keeps([], False) and not cache.keeps(["fc1"], False)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "float32" else {"rtol": 2e-3, "atol": 2e-3}
    epochs(cache, data, range(3))
    for _, _, images, seen in epochs(cache, data, range(3), ["conv2"], True):
        live = guide.see(images, ["conv2"], True)
        assert list(seen.maps) == ["conv2"]
        torch.testing.assert_close(seen.maps["conv2"], live.maps["conv2"], **tolerance)
        torch.testing.assert_close(seen.embedding, live.embedding, **tolerance)
        torch.testing.assert_close(seen.logits, live.logits, **tolerance)
    assert cache.num_computed == 3 * len(data.train)


def test_what_was_asked_online_is_kept_if_it_is_a_whole_record(tmp_path):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path)
    images = Views(data).augmented(data.train.images.images[data.train.ids], data.train.ids, 0)
    cache.keep(guide.see(images, ["conv1"]), data.train.ids, 0)
    epochs(cache, data, [0])
    assert cache.num_computed == 0
    wide = opened(data, guide, tmp_path, CacheKeys(embeddings=True))
    wide.keep(guide.see(images), data.train.ids, 0)
    epochs(wide, data, [0])
    assert wide.num_computed == len(data.train)


def test_a_teacher_that_learned_meanwhile_is_refused(tmp_path):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path)
    guide.version += 1
    with pytest.raises(AssertionError, match="trained"):
        epochs(cache, data, [0])


# Less than all of the logits


def divergence(full, kept, temperature):
    p = torch.softmax(full.double() / temperature, 1)
    q = torch.softmax(kept.double() / temperature, 1)
    return (p * (p.log() - q.log())).sum(1).mean().item()


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_top_keeps_the_highest_and_the_mass_of_the_rest(tmp_path, kind):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path, CacheKeys(top=3, type=kind))
    for _, _, images, seen in epochs(cache, data, range(3)):
        full = guide.see(images).logits
        values, classes = full.topk(3)
        tolerance = 1e-5 if kind == "float32" else 1e-2
        torch.testing.assert_close(seen.logits.gather(1, classes), values, rtol=tolerance, atol=tolerance)
        left = torch.ones_like(full, dtype=torch.bool).scatter(1, classes, False)
        others = seen.logits[left].view(-1, 7)
        torch.testing.assert_close(others, others[:, :1].expand(-1, 7))  # spread evenly
        torch.testing.assert_close(
            others.logsumexp(1), full[left].view(-1, 7).logsumexp(1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "keys", [CacheKeys(top=3), CacheKeys(top=8), CacheKeys(type="float16"), CacheKeys(top=2, type="float16")]
)
def test_what_is_lost_is_measured(tmp_path, keys):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path, keys)
    lost = cache.measure(64)
    index = data.train.ids[:64]
    images = Views(data).augmented(data.train.images.images[index], index, 0)
    full, kept = guide.see(images).logits, cache.see(images, index, 0).logits
    assert cache.num_computed == 0  # what was measured is kept
    for name, temperature in (("kl_1", 1), ("kl_4", 4)):
        assert lost[name] == pytest.approx(divergence(full, kept, temperature), rel=1e-4, abs=1e-9)
    assert lost["agreement"] == pytest.approx((full.argmax(1) == kept.argmax(1)).double().mean().item() * 100)
    assert lost["largest"] < (1e-5 if keys.type == "float32" else 0.05)
    assert 0 < lost["kl_1"] < (1e-5 if keys.top is None else 1)
    assert cache.facts()["error"] == lost
    assert opened(data, guide, tmp_path).measure() == {}


def test_top_of_few_classes_is_refused(tmp_path):
    data = some_data()
    with pytest.raises(ValueError, match="top 9 of 10"):
        Answers(a_teacher(data), data, tmp_path, CacheKeys(top=9))


# Fingerprints


def test_whatever_the_answers_depend_on_has_its_own_folder(tmp_path):
    data = some_data()
    here = opened(data, a_teacher(data), tmp_path).file.folder
    assert opened(some_data(), a_teacher(data), tmp_path).file.folder == here
    assert opened(some_data(subset=50), a_teacher(data), tmp_path).file.folder == here
    others = {
        "teacher": opened(data, a_teacher(data, seed=1), tmp_path),
        "augment": opened(some_data(augment={"shift": 1, "rotate": 9}), a_teacher(data), tmp_path),
        "seed": opened(some_data(seed=1), a_teacher(data), tmp_path),
        "views": opened(some_data(views=4), a_teacher(data), tmp_path),
        "record": opened(data, a_teacher(data), tmp_path, CacheKeys(type="float16")),
        "precision": opened(data, a_teacher(data), tmp_path, precision="bf16"),
    }
    assert len({here, *(cache.file.folder for cache in others.values())}) == 7
    for name, cache in others.items():
        facts = json.loads((cache.file.folder / "facts.json").read_text())
        first = json.loads((here / "facts.json").read_text())
        assert [key for key in facts if facts[key] != first[key]] == [name]
    changed = some_data()
    changed.train.images.images[data.train.ids[7], 0, 3, 3] ^= 1
    made = TypeAdapter(DataEntry).validate_python(
        {"dataset": "digits", "subset": 150, "validation": 20} | VIEWS
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.datasets.digits.digits", lambda *, size=8: fake(changed))
        other = make_data(made, torch.device("cpu"))
    assert other.fingerprint != data.fingerprint
    assert opened(other, a_teacher(data), tmp_path).file.folder != here


def fake(data):
    from trainer.data.images import Source

    return Source(data.train.images, data.test.images, data.classes, data.mean, data.std, data.shape)


@pytest.mark.parametrize(
    ("changes", "seed", "told"),
    [
        ({}, 1, "teacher"),
        ({"augment": {"shift": 1, "rotate": 9}}, 0, "augment"),
        ({"seed": 4}, 1, "teacher, seed"),
    ],
)
def test_it_is_told_why_kept_answers_are_not_taken(tmp_path, changes, seed, told):
    data = some_data()
    first = opened(data, a_teacher(data), tmp_path)
    data = some_data(**changes)
    cache = opened(data, a_teacher(data, seed), tmp_path)
    assert cache.describe().endswith(
        f"(0 there already; those in {first.file.folder.name} are of another {told})"
    )


def test_facts_of_another_run_are_refused(tmp_path):
    data = some_data()
    facts = opened(data, a_teacher(data), tmp_path).file.folder / "facts.json"
    facts.write_text(facts.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(ValueError, match=f"{re.escape(str(facts.parent))}.*another seed; remove that folder"):
        Answers(a_teacher(data), data, tmp_path)
    facts.write_text("{")  # a description that was cut off is written again
    Answers(a_teacher(data), data, tmp_path)
    assert json.loads(facts.read_text())["seed"] == 0


def test_endless_views_cannot_be_kept(tmp_path):
    data = some_data(views=None)
    with pytest.raises(ValueError, match="endless views"):
        Answers(a_teacher(data), data, tmp_path)


def test_code_that_changed_is_found_out_by_live_answers(tmp_path, monkeypatch):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    assert cache.check() == 0  # nothing is kept yet
    epochs(cache, data, range(3))
    monkeypatch.setattr(torch, "relu", torch.tanh)  # the weights are the same
    with pytest.raises(ValueError, match=f"{re.escape(str(cache.file.folder))}.*remove that folder"):
        opened(data, a_teacher(data), tmp_path).check()


@pytest.mark.parametrize("keys", [CacheKeys(type="float16"), CacheKeys(top=3)])
def test_live_answers_agree_with_reduced_records(tmp_path, keys):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path, keys)
    epochs(cache, data, range(3))
    assert opened(data, a_teacher(data), tmp_path, keys).check(100) == 100


# The file, which knows nothing of teachers and images


def test_records_are_read_as_they_were_written_and_count_once_they_are(tmp_path):
    layout = {"values": ((3,), torch.float16), "count": ((), torch.int32)}
    facts, index = {"dataset": "any"}, torch.tensor([4, 0])
    parts = {"values": torch.arange(6).view(2, 3).half(), "count": torch.tensor([7, 8], dtype=torch.int32)}
    file = AnswerFile(tmp_path, facts, layout, num_views=2, num_samples=5)
    file.write(1, index, parts)
    again = AnswerFile(tmp_path, facts, layout, num_views=2, num_samples=5)
    assert again.folder == file.folder and again.num_written == 2 and again.hint == ""
    assert all(torch.equal(again.read(1, index)[name], part) for name, part in parts.items())
    assert again.verify(1, torch.arange(5)).tolist() == [True, False, False, False, True]
    assert not again.has_any(0, torch.arange(5)) and again.has_any(1, torch.arange(5))
    other = AnswerFile(tmp_path, facts | {"seed": 1}, layout, num_views=2, num_samples=5)
    assert other.folder != file.folder and other.num_written == 0
    assert other.hint == f"; those in {file.folder.name} are of another seed"


# Damage


def flip(file, start, mask=1):
    content = bytearray(file.read_bytes())
    content[start] ^= mask
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("keys", [CacheKeys(), CacheKeys(type="float16", embeddings=True), CacheKeys(top=2)])
@pytest.mark.parametrize("damage", ["value", "checksum", "moved"])
def test_a_damaged_record_is_computed_again(tmp_path, caplog, damage, keys):
    data = some_data()
    guide = a_teacher(data)
    cache = opened(data, guide, tmp_path, keys)
    before = epochs(cache, data, range(3))
    records, regions = cache.file.folder / "records", cache.file.regions
    del cache
    ids = data.train.ids[[3, 70]].tolist()
    sample = 2 * data.num_samples + ids[0]  # in view 2
    last = list(regions)[-1]
    start, total, _, _ = regions["" if damage == "checksum" else last]
    size = total // (3 * data.num_samples)
    if damage == "moved":  # another sample's whole record, with its checksum
        content = bytearray(records.read_bytes())
        for start, total, _, _ in regions.values():
            size = total // (3 * data.num_samples)
            there = start + size * (2 * data.num_samples + ids[1])
            content[start + size * sample : start + size * (sample + 1)] = content[there : there + size]
        records.write_bytes(bytes(content))
    else:
        flip(records, start + size * sample + size - 1, 1 << 6)
    again = opened(data, guide, tmp_path, keys)
    after = epochs(again, data, range(3))
    assert again.num_computed == 1
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "1 damaged records in view 2" in warnings[0]
    for (_, _, _, a), (_, _, _, b) in zip(before, after, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)


def test_what_is_computed_again_has_the_bits_that_it_had(tmp_path):
    """A tenth of the records are lost, and asked for again in batches of other images."""
    data = some_data()
    torch.manual_seed(0)
    network = lenet300(data.shape, len(data.classes))
    guide = Teacher([network], [TeacherKeys(model="lenet300")], data.mean, data.std)
    guide.at_once = 32
    cache = Answers(guide, data, tmp_path)
    epochs(cache, data, range(3))
    before = cache.file.fields["logits"].clone()
    records, (start, total, _, _) = cache.file.folder / "records", cache.file.regions["logits"]
    del cache
    content = bytearray(records.read_bytes())
    lost = data.train.ids[::10].tolist()
    for view in range(3):
        for sample in lost:
            content[start + total // (3 * data.num_samples) * (view * data.num_samples + sample)] ^= 1
    records.write_bytes(bytes(content))
    cache = Answers(guide, data, tmp_path)
    assert not torch.equal(cache.file.fields["logits"], before)
    epochs(cache, data, range(3, 6))
    assert cache.num_computed == 3 * len(lost)
    assert torch.equal(cache.file.fields["logits"], before)


def test_a_new_file_is_synced_with_its_folders_and_its_records_when_asked(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.path.realpath(f"/proc/self/fd/{handle}")), real(handle))
    )
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to name what was synced")
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    folder = cache.file.folder
    assert {str(folder), *map(str, folder.resolve().parents[:3])} <= set(synced)
    synced.clear()
    opened(
        data, a_teacher(data), tmp_path
    )  # a process that was killed may have made the file, and not synced it
    assert {str(folder), *map(str, folder.resolve().parents[:3])} <= set(synced)
    epochs(cache, data, [0])
    cache.file.sync()
    written = (folder / "records").read_bytes()
    assert torch.equal(
        torch.frombuffer(bytearray(written), dtype=torch.uint8),
        torch.frombuffer(cache.file._map, dtype=torch.uint8),
    )


def test_every_single_bit_counts(tmp_path):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    epochs(cache, data, [0])
    index = data.train.ids[:1]
    word = cache.file.fields["logits"][0, index].view(torch.int32)
    right = cache.file._sums[0, index]
    for position in range(10):
        for bit in range(32):
            wrong = word.clone()
            wrong[0, position] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            assert cache.file.checksums(0, index, {"logits": wrong.view(torch.float32)}) != right


def test_checksums_are_those_of_plain_integers(tmp_path):
    data = some_data()
    cache = Answers(a_teacher(data), data, tmp_path, CacheKeys(embeddings=True))
    torch.manual_seed(0)
    index, prime = torch.tensor([3, 0, 149]), 2**31 - 1
    parts = {
        "logits": torch.randn(10, 3).T,
        "embedding": torch.randn(3, cache.record.layout["embedding"][0][0]),
    }
    found = cache.file.checksums(2, index, parts)
    factors = [int(factor) for factor in cache.file._factors]
    for number, sample in enumerate(index.tolist()):
        words = b"".join(part[number].contiguous().numpy().tobytes() for part in parts.values())
        total = (2 * data.num_samples + sample) * factors[-1]
        total += sum(
            int.from_bytes(words[2 * i : 2 * i + 2], sys.byteorder) * factors[i]
            for i in range(len(words) // 2)
        )
        assert found[number] == total % prime + 1


def test_answers_that_lie_otherwise_in_memory_are_kept(tmp_path):
    data = some_data()
    guide = a_teacher(data)
    plain = guide.network.fc3
    guide.network.fc3 = torch.nn.Module()  # its answers are a transposed matrix
    guide.network.fc3.forward = lambda x: (plain.weight @ x.T + plain.bias[:, None]).T
    cache = Answers(guide, data, tmp_path)
    assert not cache.teacher.see(torch.rand(4, *data.shape)).logits.is_contiguous()
    for _, _, images, seen in epochs(cache, data, range(6)):
        torch.testing.assert_close(seen.logits, guide.see(images).logits, rtol=1e-5, atol=1e-5)
    assert cache.num_computed == 3 * len(data.train)


def test_a_checksum_is_never_that_of_an_empty_record(tmp_path):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    index = torch.arange(data.num_samples)
    nothing = {"logits": torch.zeros(len(index), 10)}
    assert all((cache.file.checksums(view, index, nothing) > 0).all() for view in range(3))
    assert not cache.file.verify(0, index).any()


def test_checksums_of_long_records_do_not_overflow(tmp_path, monkeypatch):
    data = some_data()
    keys, layers = CacheKeys(maps=True), ["conv1"]
    cache = opened(data, a_teacher(data), tmp_path, keys, layers=layers)
    index = torch.arange(4)
    parts = {
        name: torch.full((4, *shape), -1, dtype=torch.int32)
        for name, (shape, _) in cache.record.layout.items()
    }
    positions = index % 2147483647 * cache.file._factors[-1].item()
    words = sum(2 * t[0].numel() for t in parts.values())
    expected = [
        (int(position) + 0xFFFF * sum(cache.file._factors[:words].tolist())) % 2147483647 + 1
        for position in positions
    ]
    assert cache.file.checksums(0, index, parts).tolist() == expected
    monkeypatch.setattr(answer_file, "_BLOCK", 50)
    assert cache.file.checksums(0, index, parts).tolist() == expected


def test_a_file_of_another_size_is_made_anew(tmp_path, caplog):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)
    epochs(cache, data, [0])
    records = cache.file.folder / "records"
    del cache
    os.truncate(records, 1000)
    again = opened(data, a_teacher(data), tmp_path)
    assert "is damaged (1000 bytes" in caplog.text
    epochs(again, data, [0])
    assert again.num_computed == len(data.train)


def test_data_without_checksum_is_not_read(tmp_path, monkeypatch):
    data = some_data()
    cache = opened(data, a_teacher(data), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.file, "checksums", killed)
        with pytest.raises(KeyboardInterrupt):
            epochs(cache, data, [0])
    assert (cache.file.fields["logits"] != 0).any()
    again = opened(data, a_teacher(data), tmp_path)
    epochs(again, data, [0])
    assert again.num_computed == len(data.train)


# Room


def test_too_large_for_the_limit(tmp_path):
    data = some_data()
    with pytest.raises(ValueError, match=r"take 0\.2 MiB, and 1e-05 GiB are allowed"):
        Answers(a_teacher(data), data, tmp_path, CacheKeys(limit_gib=1e-5))
    assert not any(tmp_path.rglob("records"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_only_memory_has_a_limit_of_its_own(tmp_path, monkeypatch, where):
    data = some_data()
    monkeypatch.setattr(answers, "LIMIT_GIB", 1e-5)
    if where == "memory":
        with pytest.raises(ValueError, match="are allowed"):
            Answers(a_teacher(data), data, tmp_path, CacheKeys(where=where))
    else:
        Answers(a_teacher(data), data, tmp_path, CacheKeys(where=where))


def test_a_full_disk_is_told_at_the_start(tmp_path, monkeypatch):
    data = some_data()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**16))
    with pytest.raises(ValueError, match=r"take 0\.2 MiB, and .* has 0\.1 MiB free.*TRAINER_DATA"):
        Answers(a_teacher(data), data, tmp_path)


def test_a_disk_that_fills_up_while_space_is_taken(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    data = some_data()
    monkeypatch.setattr(answer_space, "_take_space", full)
    with pytest.raises(ValueError, match="free"):
        Answers(a_teacher(data), data, tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


def test_space_is_really_taken(tmp_path, monkeypatch):
    data = some_data()
    file = opened(data, a_teacher(data), tmp_path).file.folder / "records"
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    other = opened(data, a_teacher(data), tmp_path / "other").file.folder / "records"
    assert other.read_bytes() == bytes(file.stat().st_size)


def test_a_folder_that_cannot_be_written(tmp_path):
    data = some_data()
    (tmp_path / "views").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be kept in .*views/.*: .*TRAINER_DATA"):
        Answers(a_teacher(data), data, tmp_path / "views")


# Several processes, and kills. Forked by a process of its own, in which nothing else runs.

DRIVER = """
import json, os, random, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tests.distillation.test_answers as tests
import torch
from multiprocessing import get_context
torch.set_num_threads(1)
context, top = get_context("fork"), Path(sys.argv[2])
data = tests.some_data(subset=1000, views=2)
guide = tests.a_teacher(data)

def child(function, *arguments):
    started = context.Process(target=function, args=arguments)
    started.start()
    return started

# Two processes of a run: each epoch both see their own half, another one in the second pass.
counts, barrier = context.SimpleQueue(), context.Barrier(2)
def rank(number):
    cache = tests.Answers(guide, data, top / "ranks")
    for epoch in range(4):
        tests.epochs(cache, data, [epoch], rank=number, num_processes=2)
        barrier.wait()
    counts.put(cache.num_computed)
children = [child(rank, 0), child(rank, 1)]
for one in children:
    one.join()
    assert one.exitcode == 0
assert counts.get() + counts.get() == 2 * len(data.train)
def right(cache):
    "Every record that counts is the live answer; returns how many there are."
    total = 0
    for view in range(2):
        index = cache.file.verify(view, torch.arange(data.num_samples)).nonzero().flatten()
        if len(index):
            live = guide.see(cache._images(index, view)).logits
            torch.testing.assert_close(cache.file.fields["logits"][view][index], live, rtol=1e-5, atol=1e-5)
        total += len(index)
    return total
assert right(tests.Answers(guide, data, top / "ranks")) == 2 * len(data.train)

# Two runs that start at the same moment and share a folder that is not there yet.
def run():
    cache = tests.Answers(guide, data, top / "runs")
    tests.epochs(cache, data, [0])
children = [child(run), child(run)]
for one in children:
    one.join()
    assert one.exitcode == 0
assert right(tests.Answers(guide, data, top / "runs")) == len(data.train)

# Killed again and again while it fills.
def fill():
    cache = tests.Answers(guide, data, top / "killed")
    tests.epochs(cache, data, range(2))
random.seed(0)
kills, filled, patience = 0, [0], 0.02
while True:
    started = child(fill)
    started.join(random.uniform(0.2, 1.0) * patience)
    if started.exitcode == 0:
        break
    os.kill(started.pid, signal.SIGKILL)
    started.join()
    kills += 1
    cache = tests.Answers(guide, data, top / "killed")
    filled.append(right(cache))
    del cache
    if filled[-1] == filled[-2]:  # on a busy machine even a start takes its time
        patience *= 1.3
    if kills == 20:
        child(fill).join()
        break
assert right(tests.Answers(guide, data, top / "killed")) == 2 * len(data.train)
assert filled == sorted(filled)
print(json.dumps([kills, filled]))
"""


def test_several_processes_and_kills(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER, str(TOP), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    kills, filled = json.loads(done.stdout.splitlines()[-1])
    assert kills >= 3 and any(0 < count < 2000 for count in filled)
    assert "damaged" not in done.stderr  # a record counts only when it is whole: nothing was half there


# In a recipe

RECIPE = """
name: NAME
seed: 3
allow_untrained: true
cache: CACHE
data: {dataset: digits, subset: 160, validation: 60, views: 2, augment: {shift: 1, rotate: 5}}
teacher: {model: lenet5, width: 6}
student: {model: lenet300, hidden: [20]}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 32, lr: 1e-2}}
  - stage: distill
    training: {epochs: 4, batch_size: 32, lr: 1e-2}
    losses: &taught
      - {loss: cross_entropy, weight: 0.2}
      - {loss: kl, weight: 0.8}
  - {stage: prune, sensitivity: 0.5, training: {epochs: 2, batch_size: 32, lr: 1e-2}, losses: *taught}
"""


def recipe(folder, cache, name="x", change=lambda text: text):
    path = folder / f"{name}.yaml"
    path.write_text(change(RECIPE.replace("NAME", name).replace("CACHE", cache)))
    return path


def run_of(folder, cache, name, monkeypatch, **changes):
    monkeypatch.setenv("TRAINER_DATA", str(folder / "data"))
    result = runner.run(recipe(folder, cache, name), changes, folder=folder)
    student = checkpoint.load(folder / name / "checkpoints" / "02-prune")[0]["student"]
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return result, student, [line["teacher_images"] for line in lines if "teacher_images" in line]


def test_a_recipe_ends_in_the_same_weights_whatever_is_kept(tmp_path, monkeypatch, capsys):
    _, off, images = run_of(tmp_path, "off", "off", monkeypatch)
    assert images == [192, 160, 160, 160, 192, 160]  # where terms are weighed, it answers a batch of 32 again
    for cache in ("memory", "disk"):
        result, student, images = run_of(tmp_path, cache, cache, monkeypatch)
        assert images == [160, 160, 0, 0, 0, 0]
        assert student.keys() == off.keys() and all(torch.equal(student[name], off[name]) for name in off)
        assert result["cache"]["views"] == 2 and result["cache"]["where"] == cache
    assert not (tmp_path / "memory" / "views").exists()
    assert len(list((tmp_path / "data" / "views").iterdir())) == 1
    # Another student by another loss: the kept answers serve it.
    *_, images = run_of(
        tmp_path,
        "disk",
        "again",
        monkeypatch,
        **{
            "student": {"model": "lenet300", "hidden": [30]},
            "stages.1.losses.1": {"loss": "decoupled"},
        },
    )
    assert images == [0] * 6
    told = capsys.readouterr().out
    assert "320 there already" in told and "(0 there already)" in told


def run_twice(rank, path, folder):
    """One of two processes: the teacher's images in each epoch of a run, and of a second one that finds the answers."""
    os.environ["TRAINER_DATA"] = str(folder / "data")
    making.leave_plots_out(pytest.MonkeyPatch())  # for as long as the process lives
    images = []
    for name in ("first", "second"):
        runner.run(path, {"allow_untrained": True}, folder / name)
        lines = [json.loads(line) for line in (folder / name / "x" / "log.jsonl").read_text().splitlines()]
        images.append([line["teacher_images"] for line in lines if "teacher_images" in line])
    return images


def test_two_processes_of_a_run_compute_no_answer_twice(tmp_path):
    path = recipe(tmp_path, "disk")
    for images in in_two(run_twice, tmp_path, path, tmp_path):
        assert images == [[160, 160, 0, 0, 0, 0], [0] * 6]


def test_by_itself_a_run_keeps_what_its_losses_ask_for(tmp_path, monkeypatch, capsys):
    changes = {
        "student": {"model": "lenet5", "width": 2},
        "stages.1.losses": [{"loss": "kl"}, {"loss": "hint", "at": "last"}],
    }
    *_, images = run_of(tmp_path, "null", "maps", monkeypatch, **changes)
    assert images == [160, 160, 0, 0, 0, 0]
    assert "maps of fc2" in capsys.readouterr().out
    monkeypatch.setattr(answers, "LIMIT_GIB", 2**-20)  # 1 KiB
    *_, images = run_of(tmp_path, "null", "small", monkeypatch)
    # The terms are weighed at the first step and every hundred steps, which asks the teacher again for a batch of 32.
    assert images == [192, 160, 160, 160, 192, 160]
    assert "not kept: the teacher's answers take" in capsys.readouterr().out
    monkeypatch.setattr(answers, "LIMIT_GIB", 2.0)
    *_, images = run_of(tmp_path, "null", "endless", monkeypatch, **{"data.views": None})
    assert images == [192, 160, 160, 160, 192, 160]
    assert "data.views does not limit the views" in capsys.readouterr().out


def test_a_cache_that_cannot_be_is_told_with_its_line(tmp_path, monkeypatch):
    path = recipe(tmp_path, "{where: disk, limit_gib: 1e-5}")
    with pytest.raises(RecipeError, match=r"x\.yaml:5: cache: the teacher's answers take"):
        runner.run(path, folder=tmp_path)
    monkeypatch.setenv("TRAINER_DATA", str(path))
    with pytest.raises(RecipeError, match="cannot be kept"):
        runner.run(recipe(tmp_path, "disk", "y"), folder=tmp_path)


@pytest.mark.parametrize(
    ("cache", "old", "new", "message"),
    [
        ("memory", "rotate: 5}}", "rotate: 5}, mixup: 0.2}", "cache: has no effect with mixup or cutmix"),
        ("disk", "views: 2, ", "", "cache: has no effect on endless views: give data.views"),
        (
            "{embeddings: true}",
            "",
            "",
            "cache.embeddings: has no effect: no loss asks for the teacher's embeddings",
        ),
        ("{maps: true}", "", "", "cache.maps: has no effect: no loss asks for the teacher's maps"),
        (
            "memory",
            "{loss: kl, weight: 0.8}",
            "{loss: hint}",
            "cache: has no effect: every stage asks for the teacher's embedding or",
        ),
        ("{where: tape}", "", "", "'memory' or 'disk'"),
        ("{tpo: 3}", "", "", "did you mean 'top'"),
        ("sometimes", "", "", "'off', 'memory' or 'disk'"),
    ],
)
def test_a_cache_without_effect_is_a_fault(tmp_path, cache, old, new, message):
    path = recipe(tmp_path, cache, change=lambda text: text.replace(old, new) if old else text)
    with pytest.raises(RecipeError) as told:
        read(path)
    assert message in str(told.value)
    assert all(re.match(r".*x\.yaml:\d+: ", line) for line in str(told.value).splitlines())


def test_a_cache_needs_a_teacher(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ncache: disk\ndata: {dataset: digits}\nstudent: {model: lenet5}\n"
        "stages: [{stage: train, training: {epochs: 1}}]\n"
    )
    with pytest.raises(RecipeError, match="x.yaml:2: cache: has no effect without a teacher"):
        read(path)
