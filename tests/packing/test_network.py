"""Packed networks: the same network back, few-bit vectors found by their values, clear errors."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from tests.packing.test_container import mutate
from trainer.compression.codebooks import cluster, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.rounding import round_unshared
from trainer.compression.states import dense_state
from trainer.compression.weights import weights_of
from trainer.networks.build import build
from trainer.packing import container
from trainer.packing import network as packed
from trainer.storage.weights_file import digest

SPEC = {"model": "lenet300", "hidden": [12, 8]}
FACTS = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": [str(i) for i in range(10)]}


def network():
    torch.manual_seed(0)
    model = build(SPEC, (1, 8, 8), 10).eval()
    for place in weights_of(model).values():
        set_mask(place, torch.rand_like(place.value) < 0.4)
        set_codebook(place, *cluster(place, 4))
    return model


def test_the_decoded_network_is_the_same_bit_for_bit():
    model = network()
    round_unshared(model, biases=5)
    decoded, header = packed.decode(packed.encode(model, SPEC, FACTS))
    assert digest(decoded.state_dict()) == digest(dense_state(model))
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(decoded(x), model(x))
    assert header["classes"] == FACTS["classes"] and header["net"] == SPEC


def test_a_network_of_no_shelf_needs_to_be_brought():
    model = nn.Sequential(nn.Linear(4, 3))
    data = packed.encode(model, None, FACTS)
    with pytest.raises(ValueError, match="x.tiny: holds the weights of a network that is on no shelf"):
        packed.decode(data, "x.tiny")
    with pytest.raises(ValueError, match="x.tiny: does not fit the network"):
        packed.decode(data, "x.tiny", into=nn.Sequential(nn.Linear(4, 2)))
    decoded, _ = packed.decode(data, into=nn.Sequential(nn.Linear(4, 3)))
    assert torch.equal(decoded[0].weight, model[0].weight)


def test_the_spec_must_be_the_networks():
    with pytest.raises(ValueError, match="are in one of them only"):
        packed.encode(nn.Sequential(nn.Linear(4, 3)), SPEC, FACTS)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0.5, -0.25, 0.0], 0.25),
        ([3.0, 5.0, -7.0], 1.0),
        ([2.0**-130, 3 * 2.0**-130], 2.0**-130),  # float32's subnormal numbers too
        ([255.0, 1.0], 1.0),
        ([256.0, 1.0], None),
        ([0.1, 0.2], np.float32(0.1)),  # not a power of two
        ([-0.75, 0.0, 1.125], 0.375),
        ([0.1, 0.3], None),  # float32(0.3) is not 3 times float32(0.1)
        ([2.0**-40, 1.0], None),
        ([0.0, 0.0], None),
        ([-0.0, 1.0], None),
        ([float("nan"), 1.0], None),
        ([float("inf"), 1.0], None),
    ],
)
def test_grid_steps(values, step):
    array = np.array(values, np.float32)
    found = packed.grid_steps({"a": array})
    assert found == ({} if step is None else {"a": step})
    decoded = container.decode(container.encode({}, {"a": array}, found))[1]["a"]
    assert decoded.tobytes() == array.tobytes()


def test_weights_have_steps_if_they_use_most_of_the_integers():
    even = np.array([[0.5, -1.5], [1.0, 0.0]], np.float32)
    sparse = np.array([[0.5, -20.0], [1.0, 0.0]], np.float32)  # three of the 42 integers between
    found = packed.grid_steps({"a": even, "b": sparse, "c": even.astype(np.float16), "d": even[0, 0]})
    assert found == {"a": 0.5}
    tensors = {"a": even, "b": sparse}
    decoded = container.decode(container.encode({}, tensors, packed.grid_steps(tensors)))[1]
    assert all(decoded[name].tobytes() == array.tobytes() for name, array in tensors.items())


def test_biases_on_a_grid_take_few_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 400))
    before = len(packed.encode(model, None, FACTS))
    round_unshared(model, biases=5)
    rows = packed.account(packed.encode(model, None, FACTS))[0]
    assert sum(row["bytes"] for row in rows if row["tensor"] == "0.bias") < 400 * 5 / 8 + 10
    assert len(packed.encode(model, None, FACTS)) < before - 400 * 2


@pytest.mark.slow
def test_ten_thousand_damaged_files_of_a_real_network():
    """Bit flips, truncations, insertions and deletions: each the program's own error within a second, none a network."""
    data = packed.encode(network(), SPEC, FACTS)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(10_000):
            damaged = mutate(data, rng)
            if damaged == data:
                continue
            started = time.process_time()
            with pytest.raises(ValueError, match="^student.tiny: "):
                packed.decode(damaged, "student.tiny")
            assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
