"""Compares bytes and seconds of the packed file with its i.i.d. bound, Huffman coding, zlib and nncodec.

Run:    python scripts/bench_codec.py                                 (synthetic nets; a few minutes)
        python scripts/bench_codec.py --checkpoint student.safetensors --no-large
Rival:  pip install nncodec==2.1.3     (the reference implementation of the NNC standard; left out where it
        does not import)

Bytes are those of the weight tensors (two dimensions and more: positions, codes and codebooks), at equal
values for all methods; biases, names and header are counted in "file" only.
iid: the entropy of the mask and of the values. Huffman: relative indexes of 5 bits (8 for convolutions) and
codes, both Huffman-coded, without their tables (Han et al. 2016). dense Huffman: the codes of all weights, zeros
among them. zlib: the array of codes. To these four come 2 bytes for each value of a codebook.
nncodec: the smaller of its lossless coding of the codes, plus 2 bytes for each value of a codebook, and of
its codebook mode at the coarsest step that keeps every weight within 1 % of its layer's largest.
ordered: ours, with the hidden units in `units.unit_order`.
Seconds are CPU seconds of one thread, so that a busy machine does not spoil them.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import contextlib
import importlib.util
import io
import itertools
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trainer.compression import units
from trainer.packing import container

Tensors = dict[str, np.ndarray]


def checkpoint(path: Path) -> Tensors:
    """Reads the tensors of an .npz or .safetensors file."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            found = dict(arrays)
    else:
        from safetensors.numpy import load_file

        found = load_file(path)
    # a masked weight may be -0.0, which the codec does not store as a zero
    return {
        name: array + array.dtype.type(0) if array.dtype.kind == "f" else array
        for name, array in found.items()
    }


def quantised(weight: np.ndarray, density: float, clusters: int) -> np.ndarray:
    """Replaces the largest weights by the middles of `clusters` equal ranges, and the others by zero."""
    kept = np.abs(weight) > np.quantile(np.abs(weight), 1 - density)
    step = np.float16(2 * np.abs(weight).max() / clusters).astype(np.float32)
    middle = (np.floor(weight / step) + 0.5) * step
    return np.where(kept, middle.astype(np.float16), 0).astype(np.float32)


def smooth(random: np.random.Generator, shape: tuple[int, int, int], reach: float) -> np.ndarray:
    """Returns noise [n, height, width] in which neighbours are correlated."""
    n, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(random.normal(size=shape)) * np.exp(-((frequency * reach) ** 2) * 8)
    field = np.fft.ifft2(spectrum).real
    return field / field.std()


def lenet300(random: np.random.Generator, density: float, clusters: int) -> Tensors:
    """Returns LeNet-300-100 like a trained one: a blank border, receptive fields, units of unequal norm."""
    y, x = np.mgrid[:28, :28] - 13.5
    lit = np.exp(-((np.hypot(y, x) / 10.5) ** 6))
    busy = random.lognormal(0, 0.4, (300, 1))
    first = smooth(random, (300, 28, 28), 1.0) * lit * np.exp(0.5 * smooth(random, (300, 28, 28), 3.0))
    second = random.laplace(size=(100, 300)) * busy.T * random.lognormal(0, 0.3, (100, 1))
    third = random.laplace(size=(10, 100))
    return {
        "fc1.weight": quantised(first.reshape(300, 784) * busy, density, clusters),
        "fc1.bias": random.normal(size=300).astype(np.float32),
        "fc2.weight": quantised(second, density * 1.5, clusters),
        "fc2.bias": random.normal(size=100).astype(np.float32),
        "fc3.weight": quantised(third, min(1, density * 5), clusters),
        "fc3.bias": random.normal(size=10).astype(np.float32),
    }


def separable(random: np.random.Generator) -> Tensors:
    """Returns a network of about 1,400 weights: a convolution and three depthwise-separable blocks."""
    tensors = {"conv1.weight": quantised(smooth(random, (8, 5, 5), 1.0)[:, None], 0.7, 8)}
    for i, (inputs, outputs) in enumerate([(8, 12), (12, 16), (16, 16)]):
        tensors[f"block{i}.depthwise.weight"] = quantised(
            smooth(random, (inputs, 3, 3), 0.7)[:, None], 0.7, 8
        )
        tensors[f"block{i}.pointwise.weight"] = quantised(
            random.laplace(size=(outputs, inputs, 1, 1)), 0.6, 8
        )
    tensors["fc.weight"] = quantised(random.laplace(size=(10, 16)), 0.6, 8)
    return tensors


def resnet18(random: np.random.Generator) -> Tensors:
    """Returns 11 M weights with 90 % zeros, 16 values a layer, and columns of different density."""
    shapes = {"conv1": (64, 3, 7, 7), "fc": (1000, 512)}
    inputs = 64
    for layer, outputs in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes[f"layer{layer}.{block}.conv1"] = (outputs, inputs, 3, 3)
            shapes[f"layer{layer}.{block}.conv2"] = (outputs, outputs, 3, 3)
            if inputs != outputs:
                shapes[f"layer{layer}.{block}.downsample"] = (outputs, inputs, 1, 1)
            inputs = outputs
    tensors = {}
    for name, shape in shapes.items():
        columns = math.prod(shape[1:])
        values = np.sort(random.normal(size=16)).astype(np.float16).astype(np.float32)
        kept = random.random((shape[0], columns)) < random.gamma(2, 0.05, columns)
        codes = random.binomial(15, 0.5, (shape[0], columns))
        tensors[f"{name}.weight"] = np.where(kept, values[codes], np.float32(0)).reshape(shape)
    return tensors


def ordered(tensors: Tensors) -> Tensors:
    """Returns the same chain of layers with the units of all but the last in `units.unit_order`."""
    tensors = dict(tensors)
    names = [name for name, array in tensors.items() if array.ndim > 1]
    for name, following in itertools.pairwise(names):
        weight, after = tensors[name], tensors[following]
        order = units.unit_order(weight)
        bias = name.removesuffix("weight") + "bias"
        for own in {name, bias} & set(tensors):
            tensors[own] = tensors[own][order]
        if after.shape[1] % len(order):
            raise ValueError(f"{following} does not follow {name} in a chain of layers")
        split = after.reshape(len(after), len(order), -1)
        tensors[following] = np.ascontiguousarray(split[:, order].reshape(after.shape))
    return tensors


def ranks(weight: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns codes (0 for 0, 1 for the least positive value, -1 for the negative nearest 0); the number of values."""
    values = np.unique(weight)
    values = values[values != 0]
    rank = np.searchsorted(values, weight) - int((values < 0).sum())
    return np.where(weight == 0, 0, rank + (rank >= 0)).astype(np.int32), len(values)


def nncodec_bytes(weights: Tensors) -> int | None:
    """Returns the bytes that nncodec needs, None when it is not installed."""
    if importlib.util.find_spec("nncodec") is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        from nncodec import nn

    def run(tensors: Tensors, **settings) -> tuple[int, Tensors]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            stream = nn.encode(tensors, {"results": folder, "verbose": False, **settings})
            return len(stream), nn.decode(stream)

    codes = {name: ranks(weight) for name, weight in weights.items()}
    size, decoded = run({name: code for name, (code, _) in codes.items()})
    if not all(np.array_equal(decoded[name], code) for name, (code, _) in codes.items()):
        raise ValueError("nncodec did not give the codes back")
    best = size + 2 * sum(clusters for _, clusters in codes.values())
    for qp in (-20, -26, -32, -38):
        size, decoded = run(weights, qp=qp, approx_method="codebook", use_dq=False)
        if all(np.abs(decoded[name] - w).max() <= 0.01 * np.abs(w).max() for name, w in weights.items()):
            return min(best, size)
    return best


def weight_bytes(tensors: Tensors, data: bytes) -> float:
    """Returns the bytes of the weight tensors in a packed file."""
    return sum(
        row["bytes"] for row in container.account(data) if row["tensor"] and tensors[row["tensor"]].ndim > 1
    )


def shared(tensors: Tensors) -> Tensors:
    """Returns the weight tensors that have a codebook: few values for their size."""
    return {
        name: array
        for name, array in tensors.items()
        if array.ndim > 1 and array.dtype == np.float32 and len(np.unique(array)) <= 1 + array.size / 2
    }


def timed(tensors: Tensors) -> tuple[bytes, float, float]:
    """Returns the file, and the CPU seconds of encoding and of decoding it."""
    start = time.process_time()
    data = container.encode({}, tensors)
    middle = time.process_time()
    _, decoded = container.decode(data)
    end = time.process_time()
    if any(decoded[name].tobytes() != array.tobytes() for name, array in tensors.items()):
        raise ValueError("the file did not give the tensors back")
    return data, middle - start, end - middle


def report(name: str, tensors: Tensors, with_order: bool) -> None:
    """Measures one network and prints its table; with_order: also with its units ordered."""
    data, encode_seconds, decode_seconds = timed(tensors)
    ours = weight_bytes(tensors, data)
    rows = [row for row in container.account(data) if "iid_bytes" in row]
    books = 2 * sum(row["clusters"] for row in rows)
    others = {
        kind: sum(row[kind] for row in rows) + books
        for kind in ("iid_bytes", "huffman_bytes", "dense_huffman_bytes", "zlib_bytes")
    }
    positions = sum(row["numel"] for row in rows)
    mask = sum(
        row["bytes"]
        for row in container.account(data)
        if row["part"] == "mask" and tensors[row["tensor"]].ndim > 1
    )
    counts = [
        (row["nonzero"], row["numel"] - row["nonzero"]) for row in rows if row["nonzero"] < row["numel"]
    ]
    mask_iid = sum(n * math.log2(1 / (n / sum(pair))) for pair in counts for n in pair if n) / 8
    print(
        f"\n{name}: {positions:,} weights, {sum(row['nonzero'] for row in rows):,} not zero, "
        f"file {len(data):,} bytes"
    )
    print(f"  {'':22}{'bytes':>11}  ours / it")
    print(f"  {'ours':22}{ours:11,.0f}")
    if with_order:
        print(f"  {'ours, ordered':22}{weight_bytes(tensors, container.encode({}, ordered(tensors))):11,.0f}")
    for label, size in (
        ("iid", others["iid_bytes"]),
        ("Huffman", others["huffman_bytes"]),
        ("dense Huffman", others["dense_huffman_bytes"]),
        ("zlib", others["zlib_bytes"]),
    ):
        print(f"  {label:22}{size:11,.0f}  {ours / size:9.3f}")
    part = shared(tensors)
    rival = nncodec_bytes(part) if part else None
    if rival is not None:
        same = sum(row["bytes"] for row in container.account(data) if row["tensor"] in part)
        print(f"  {'nncodec':22}{rival:11,.0f}  {same / rival:9.3f}")
    if mask_iid:
        print(f"  {'positions':22}{mask:11,.0f}  {mask / mask_iid:9.3f} of their iid bound")
    print(
        f"  encode {encode_seconds:.2f} s, decode {decode_seconds:.2f} s: "
        f"{positions / encode_seconds / 1e6:.2f} and {positions / decode_seconds / 1e6:.2f} M positions/s"
    )


def main() -> None:
    """Measures the networks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, action="append", help=".npz or .safetensors, instead of synthetic nets"
    )
    parser.add_argument(
        "--chain", action="store_true", help="the checkpoint is a chain of layers: order its units too"
    )
    parser.add_argument("--no-large", action="store_true", help="leave out the net of resnet18's size")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    random = np.random.default_rng(chosen.seed)
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}, one thread")
    if importlib.util.find_spec("nncodec") is None:
        print("nncodec is not importable here: left out (pip install nncodec==2.1.3)")
    if chosen.checkpoint:
        for path in chosen.checkpoint:
            report(path.name, checkpoint(path), chosen.chain)
    else:
        report("LeNet-300-100, 94 % zeros, 32 values", lenet300(random, 0.06, 32), True)
        report("LeNet-300-100, 98.5 % zeros, 8 values", lenet300(random, 0.012, 8), True)
        report("separable, 8 values", separable(random), False)
    if not chosen.no_large:
        report("resnet18, 90 % zeros, 16 values", resnet18(random), False)


if __name__ == "__main__":
    main()
