"""What every data set promises, over every file of the shelf: the contract of Source."""

import inspect

import pytest
import torch

from tests.datasets import files
from tests.dropped import lacks
from trainer.recipe import shelves

NAMES = shelves.names("dataset")


@pytest.fixture
def source_of(cache, tmp_path):
    """Reads a data set: from made-up files where there is `small_NAME`, else as it comes."""

    def read(name):
        dataset = shelves.find("dataset", name)
        small = getattr(files, f"small_{name}", None)
        if small is None and [key for key, (_, default) in shelves.fields(dataset).items() if default is ...]:
            sentence = f"write small_{name}(put, folder) into tests/datasets/files.py: it gives the keys that it needs"
            lacks("datasets", name, sentence)
        if name not in settings:
            settings[name] = {} if small is None else small(cache, tmp_path / "images")
        return dataset(**settings[name])

    settings = {}
    return read


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """What is not made up here is not fetched either."""

    def refused(*_, **__):
        pytest.fail("it would download: write small_NAME(put, folder) into tests/datasets/files.py")

    monkeypatch.setattr("urllib.request.urlopen", refused)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_keyword_only_with_a_type(name):
    dataset = shelves.find("dataset", name)
    for parameter in inspect.signature(dataset).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.annotation is not parameter.empty
    assert dataset.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_source(source_of, name):
    source = source_of(name)
    files.assert_is_a_source(source, len(source.train), len(source.test))
    assert len(source.train) and len(source.test) and source.train is not source.test
    assert all(isinstance(one, str) for one in source.classes)
    assert all(0 <= value <= 1 for value in source.mean) and all(0 < value <= 1 for value in source.std)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_fetched_by_the_batch_in_any_order_and_again(source_of, name):
    source = source_of(name)
    for part in (source.train, source.test):
        last = len(part) - 1
        images, labels = part.__getitems__([last, 0, last])
        assert images.dtype == torch.uint8 and images.shape == (3, *source.shape)
        assert torch.equal(images[0], images[2]) and torch.equal(labels, part.labels[[last, 0, last]])
        for number, position in enumerate((last, 0)):
            one, label = part.__getitems__([position])
            assert torch.equal(one[0], images[number]) and label.item() == labels[number]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_in_every_run(source_of, name):
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    first = source_of(name)
    torch.manual_seed(1)
    torch.set_num_threads(1 if threads > 1 else 2)  # another number adds in another order
    second = source_of(name)
    torch.set_num_threads(threads)
    for key in ("classes", "mean", "std", "shape"):
        assert getattr(first, key) == getattr(second, key)
    for one, other in ((first.train, second.train), (first.test, second.test)):
        everything = list(range(min(len(one), 50)))
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.__getitems__(everything)[0], other.__getitems__(everything)[0])


def test_made_up_files_are_of_the_shelf():
    assert {name.removeprefix("small_") for name in vars(files) if name.startswith("small_")} <= set(NAMES)
