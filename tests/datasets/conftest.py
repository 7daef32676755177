"""Made-up files of the data sets."""

import hashlib

import pytest

from tests.datasets.files import save
from trainer.data import fetch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What was found out about pictures is remembered apart from the user's."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts files into the cache folder that pass for a data set's raw files."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))

    def put(name, contents):
        (tmp_path / name).mkdir()
        for file, data in contents.items():
            (tmp_path / name / file).write_bytes(data)
        digests = {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()}
        monkeypatch.setitem(fetch.FILES, name, digests)

    return put


@pytest.fixture
def animals(tmp_path):
    """Two classes for training, the same two for testing; the colour tells the file."""
    for number in range(3):
        save(tmp_path / "train" / "cat" / f"{number}.png", (10 + number, 0, 0))
    save(tmp_path / "train" / "dog" / "0.png", (0, 100, 200))
    save(tmp_path / "test" / "dog" / "a.png", (1, 2, 3))
    save(tmp_path / "test" / "cat" / "b.jpg", (50, 50, 50))
    return tmp_path
