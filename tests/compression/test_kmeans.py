"""k-means on a line: against every partition tried by hand, against scikit-learn, and at the edges."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from trainer.compression import intervals, kmeans
from trainer.compression.intervals import points_of
from trainer.compression.kmeans import assign, code_lengths, inertia, kmeans_linear, kmeans_optimal


def partitions(size, k):
    """Every way to cut 0 .. size - 1 into k runs, as lists of slices."""
    for cuts in itertools.combinations(range(1, size), k - 1):
        ends = [0, *cuts, size]
        yield [slice(a, b) for a, b in zip(ends, ends[1:])]


def partition_cost(values, weights, runs, code_cost=0.0):
    cost = 0.0
    for run in runs:
        mean = sum(values[run] * weights[run]) / sum(weights[run])
        cost += sum(weights[run] * (values[run] - mean) ** 2)
        cost += code_cost * len(values[run]) * math.log2(len(values) / len(values[run]))
    return cost


def brute_force(values, weights, most, code_cost=0.0):
    """Least cost and centroids over all partitions into at most `most` runs of the sorted values."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order].astype(float), weights[order].astype(float)
    runs = (runs for k in range(1, most + 1) for runs in partitions(len(values), k))
    best = min(runs, key=lambda runs: partition_cost(values, weights, runs, code_cost))
    centroids = [np.average(values[run], weights=weights[run]) for run in best]
    return partition_cost(values, weights, best, code_cost), np.array(centroids)


def exact_inertia(values, k):
    """The optimum by the quadratic dynamic programme over sorted values."""
    values = np.sort(values.astype(float))
    size = len(values)
    sums, squares = (np.concatenate([[0], np.cumsum(values**power)]) for power in (1, 2))
    i, j = np.arange(size + 1)[None, :], np.arange(size + 1)[:, None]
    spread = squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / np.maximum(j - i, 1)
    spread = np.where(j > i, spread, np.inf)
    cost = spread[:, 0]
    for _ in range(k - 1):
        cost = (spread + cost).min(axis=1)
    return cost[-1]


def mixture(size, seed=0):
    random = np.random.default_rng(seed)
    parts = [random.normal(0, 0.02, size // 2), random.laplace(0, 0.03, size // 4)]
    parts.append(random.normal(0, 0.1, size - sum(map(len, parts))))
    return random.permutation(np.concatenate(parts)).astype(np.float32)


def cauchy(size):
    return np.random.default_rng(1).standard_cauchy(size).astype(np.float32)


def coded_cost(values, centroids, code_cost, rounds):
    """Squared error plus code_cost times ideal bits, codes and lengths found in turn."""
    codes = assign(values, centroids)
    for _ in range(rounds):
        codes = assign(values, centroids, code_bits=code_lengths(codes, len(centroids)), code_cost=code_cost)
    bits = code_lengths(codes, len(centroids))
    return ((values - centroids[codes].astype(float)) ** 2).sum() + code_cost * bits[codes].sum()


# -------------------------------------------------------------------------------------------------- optimal


@pytest.mark.parametrize("seed", range(12))
def test_optimal_is_the_best_of_all_partitions(seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=random.integers(4, 12)).astype(np.float32)
    if seed % 3 == 0:
        values = np.round(values, 1)  # ties
    weights = random.uniform(0.1, 3, len(values)) if seed % 2 else np.ones(len(values))
    for k in range(1, 5):
        best, centroids = brute_force(values, weights, k)
        found = kmeans_optimal(values, k, weights=weights)
        assert inertia(values, found, weights) == pytest.approx(best, rel=1e-5, abs=1e-12)
        if seed % 3:
            np.testing.assert_allclose(found, centroids, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("code_cost", [0.01, 0.1, 1.0])
def test_code_cost_gives_the_best_of_all_partitions(seed, code_cost):
    random = np.random.default_rng(seed)
    values = random.normal(size=10).astype(np.float32)
    weights = random.uniform(0.1, 3, 10) if seed % 2 else np.ones(10)
    _, centroids = brute_force(values, weights, 4, code_cost)
    found = kmeans_optimal(values, 4, weights=weights, code_cost=code_cost)
    np.testing.assert_allclose(found, centroids, rtol=1e-5, atol=1e-6)


SIZES = [(300, 1), (300, 2), (200, 9), (301, 16), (700, 63), (300, 150), (300, 299), (256, 255)]


@pytest.mark.parametrize("size, k", SIZES)
def test_optimal_reaches_the_quadratic_programme(size, k):
    values = mixture(size)
    found = kmeans_optimal(values, k)
    assert len(found) == k
    assert inertia(values, found) == pytest.approx(exact_inertia(values, k), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("make", [mixture, cauchy])
@pytest.mark.parametrize("k", [2, 16, 64])
def test_binned_programme_is_close_to_the_exact_one(make, k):
    values = make(20_000)
    exact = inertia(values, kmeans_optimal(values, k, bins=20_000))
    assert inertia(values, kmeans_optimal(values, k)) <= exact * 1.0001
    assert inertia(values, kmeans_optimal(values, k, bins=1024)) <= exact * 1.001


@pytest.mark.parametrize("k", [3, 16, 50])
def test_chunks_summed_into_points_stay_close_to_the_exact_programme(monkeypatch, k):
    values = mixture(20_000)
    exact = inertia(values, kmeans_optimal(values, k, bins=20_000))
    sizes = {"CHUNK": 3000, "CHUNK_BINS": 1500, "NUM_POINTS": 3000, "MAX_POINTS": 4000, "DP_BINS": 512}
    for name, size in sizes.items():
        for module in (kmeans, intervals):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    points = points_of(values, None, 1500)
    assert len(points[0]) <= sizes["MAX_POINTS"] and points[2].sum() == 20_000
    assert inertia(values, kmeans_optimal(values, k)) <= exact * 1.005


def test_million_values_reach_the_exact_optimum_of_their_distinct_values():
    values = (np.random.default_rng(0).normal(0, 300, 1_000_000).round() / 1024).astype(np.float32)
    distinct, counts = np.unique(values, return_counts=True)
    assert len(distinct) < 4096
    np.testing.assert_array_equal(kmeans_optimal(values, 32), kmeans_optimal(distinct, 32, weights=counts))


@pytest.mark.parametrize("k", [2, 16, 32, 256])
def test_optimal_is_never_worse_than_scikit_learn(k):
    values = mixture(10_000)
    optimal, linear = inertia(values, kmeans_optimal(values, k)), inertia(values, kmeans_linear(values, k))
    assert optimal <= linear * (1 + 1e-6)


def test_far_outlier_takes_one_centroid_and_no_resolution():
    values = mixture(10_000)
    with_outlier = np.append(values, np.float32(1e4))
    found = kmeans_optimal(with_outlier, 17)
    assert found[-1] == np.float32(1e4)
    assert inertia(values, found) <= inertia(values, kmeans_optimal(values, 16)) * 1.0001


def test_weights_equal_repetition():
    random = np.random.default_rng(0)
    values, times = mixture(500), random.integers(0, 5, 500)
    for k in (2, 7, 40):
        repeated = kmeans_optimal(np.repeat(values, times), k)
        np.testing.assert_allclose(kmeans_optimal(values, k, weights=times), repeated, rtol=1e-6, atol=1e-8)
    assert inertia(values, repeated, times) == pytest.approx(inertia(np.repeat(values, times), repeated))


def test_weights_pull_the_centroids():
    values = mixture(20_000)
    weights = np.where(values > 0, 1.0, 1e-3)
    plain, weighted = kmeans_optimal(values, 16), kmeans_optimal(values, 16, weights=weights)
    assert (weighted > 0).sum() > (plain > 0).sum()
    assert inertia(values, weighted, weights) < inertia(values, plain, weights)


def test_weights_of_very_different_sizes_are_harmless():
    values = mixture(3000)
    weights = 10.0 ** np.random.default_rng(0).uniform(-30, 30, 3000)
    found = kmeans_optimal(values, 8, weights=weights)
    assert np.isfinite(found).all() and found.min() >= values.min() and found.max() <= values.max()


def test_result_depends_on_the_values_alone():
    values = mixture(50_000)
    for k in (16, 100):
        first = kmeans_optimal(values, k)
        np.testing.assert_array_equal(first, kmeans_optimal(values.copy(), k))
        np.testing.assert_array_equal(first, kmeans_optimal(values[::-1].reshape(50, 1000), k))
    np.testing.assert_array_equal(kmeans_linear(values, 16), kmeans_linear(values.copy(), 16))


def test_scale_and_shift_carry_over():
    values = mixture(2000).astype(float)
    found = kmeans_optimal(values, 12)
    np.testing.assert_allclose(kmeans_optimal(values * 1e-12, 12), found * 1e-12, rtol=1e-5)
    np.testing.assert_allclose(kmeans_optimal(values * 1e30 + 5e28, 12), found * 1e30 + 5e28, rtol=1e-5)


@pytest.mark.parametrize("size", [900, 20_000])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3])
def test_code_cost_lowers_the_cost_it_is_about(size, share):
    values = mixture(size)
    code_cost = share * values.var()
    plain, coded = kmeans_optimal(values, 16), kmeans_optimal(values, 16, code_cost=code_cost)
    assert len(coded) <= len(plain)
    found = coded_cost(values, coded, code_cost, rounds=8)
    assert found <= coded_cost(values, plain, code_cost, rounds=0)
    assert found <= coded_cost(values, plain, code_cost, rounds=8) * (1 + 1e-6)


def test_dear_codes_leave_one_value():
    values = mixture(1000)
    found = kmeans_optimal(values, 16, code_cost=1e6)
    np.testing.assert_allclose(found, [values.mean(dtype=float)], rtol=1e-5)


def test_memory_beside_the_input_is_small():
    values = np.random.default_rng(0).standard_normal(3_000_000, dtype=np.float32)
    tracemalloc.start()
    kmeans_optimal(values, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


@pytest.mark.parametrize("size, k", [(6000, 1500), (5000, 4999)])
def test_more_clusters_than_the_bins_serve(size, k):
    values = mixture(size)
    found = kmeans_optimal(values, k)
    assert 0.99 * k <= len(found) <= k
    spacing = np.percentile(values, np.linspace(0, 100, k))
    assert inertia(values, found) < inertia(values, spacing)


# --------------------------------------------------------------------------------------------------- linear


def test_linear_is_lloyd_from_even_spacing():
    values = mixture(3000)
    centroids = np.linspace(values.min(), values.max(), 8)
    for _ in range(1000):
        codes = np.abs(values[:, None] - centroids).argmin(axis=1)
        centroids = np.array([values[codes == code].mean(dtype=float) for code in range(8)])
    found = kmeans_linear(values, 8)
    assert found.dtype == np.float32 and (np.diff(found) > 0).all()
    assert inertia(values, found) == pytest.approx(inertia(values, centroids), rel=1e-3)


# ---------------------------------------------------------------------------------------------- both, edges


@pytest.mark.parametrize("cluster", [kmeans_linear, kmeans_optimal])
class TestEdges:
    def test_few_distinct_values_are_returned_as_they_are(self, cluster):
        values = np.array([3, -1, 3, 0.5, -1], np.float32)
        for k in (3, 4, 100):
            np.testing.assert_array_equal(cluster(values, k), np.array([-1, 0.5, 3], np.float32))

    def test_constant_values_give_one_centroid(self, cluster):
        np.testing.assert_array_equal(cluster(np.full(1000, 0.1, np.float32), 4), [np.float32(0.1)])

    def test_one_cluster_is_the_mean(self, cluster):
        values = mixture(1000)
        np.testing.assert_allclose(cluster(values, 1), [values.mean(dtype=float)], rtol=1e-4)

    def test_other_number_types(self, cluster):
        for kind in (np.float16, np.float64, np.int32, np.int8):
            values = np.array([-4, -3, 0, 1, 7, 8]).astype(kind)
            found = cluster(values, 3)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, [-3.5, 0.5, 7.5])

    @pytest.mark.parametrize(
        "values, k, words",
        [
            ([1.0, 2.0], 0, "k must be at least 1, got 0"),
            ([], 2, "no values"),
            ([1.0, np.nan], 2, "finite"),
            ([1.0, -np.inf], 2, "finite"),
            ([1.0, 1e300], 2, "float32"),
            ([1.0, 2j], 2, "real numbers"),
        ],
    )
    def test_bad_input(self, cluster, values, k, words):
        with pytest.raises(ValueError, match=words):
            cluster(np.array(values), k)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"weights": [1, 1]}, "as many"),
        ({"weights": [1, -1, 1]}, "none negative"),
        ({"weights": [0, 0, 0]}, "not all zero"),
        ({"weights": [1, np.nan, 1]}, "finite"),
        ({"weights": [1, np.inf, 1]}, "finite"),
        ({"bins": 0}, "bins"),
        ({"code_cost": -1.0}, "code_cost"),
        ({"code_cost": np.nan}, "code_cost"),
        ({"code_cost": np.inf}, "code_cost"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        kmeans_optimal(np.array([1.0, 2.0, 3.0]), 2, **settings)


# --------------------------------------------------------------------------------------------------- assign


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("k", [1, 2, 3, 32, 300])
def test_assign_is_nearest(kind, k):
    random = np.random.default_rng(k)
    values = random.normal(size=(100, 51)).astype(kind)
    for centroids in (random.normal(size=k), random.normal(size=k) * 1e-4, random.normal(size=k) ** 9):
        centroids = centroids.astype(np.float32)  # in any order
        codes = assign(values, centroids)
        assert codes.shape == values.shape
        distance = np.abs(values.astype(float)[..., None] - centroids.astype(float))
        chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)
        np.testing.assert_array_equal(chosen[..., 0], distance.min(-1))


def test_assign_gives_ties_to_the_smaller_centroid_and_the_first_of_equals():
    values = np.array([-2, -1, 0, 1, 1.5, 2, 9], np.float32)
    np.testing.assert_array_equal(assign(values, np.array([-1, 1, 2], np.float32)), [0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(assign(values, np.array([2, 1, -1], np.float32)), [2, 2, 2, 1, 1, 0, 0])
    np.testing.assert_array_equal(assign(values, np.array([1, -1, 1, -1], np.float32)), [1, 1, 1, 0, 0, 0, 0])


def test_assign_at_neighbouring_floats():
    centroids = np.float32(1) + np.float32(2**-23) * np.arange(0, 40, 3, dtype=np.float32)
    values = np.float32(1) + np.float32(2**-23) * np.arange(-5, 50, dtype=np.float32)
    distance = np.abs(values.astype(float)[:, None] - centroids.astype(float))
    np.testing.assert_array_equal(assign(values, centroids), distance.argmin(axis=1))


def test_assign_over_the_whole_range_of_floats():
    values = np.array([-3.4e38, -1, -1e-45, 0, 1e-45, 1, 3.4e38], np.float32)
    np.testing.assert_array_equal(assign(values, values), np.arange(7))
    np.testing.assert_array_equal(assign(values, np.array([0, 1e-45], np.float32)), [0, 0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    "num_codes, kind", [(256, np.uint8), (257, np.int16), (32_768, np.int16), (32_769, np.int32)]
)
def test_assign_type_fits(num_codes, kind):
    codes = assign(np.arange(num_codes, dtype=np.float32), np.arange(num_codes, dtype=np.float32))
    assert codes.dtype == kind
    np.testing.assert_array_equal(codes, np.arange(num_codes))


@pytest.mark.parametrize("seed", range(10))
def test_assign_with_code_bits_is_cheapest(seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=5000).astype(np.float32 if seed % 2 else np.float64)
    centroids, bits = random.normal(size=40), random.uniform(0, 12, 40)
    bits[random.integers(0, 40, 5)] = np.inf
    code_cost = float(10 ** random.uniform(-4, 2))
    codes = assign(values, centroids, code_bits=bits, code_cost=code_cost)
    cost = (values.astype(float)[:, None] - centroids) ** 2 + code_cost * bits
    np.testing.assert_allclose(cost[np.arange(5000), codes], cost.min(axis=1), rtol=1e-6, atol=1e-9)
    free = assign(values, centroids, code_bits=bits)  # costs nothing, yet the barred codes stay barred
    assert np.isfinite(bits[free]).all()


def test_assign_takes_the_cheaper_of_equal_centroids():
    assert assign(np.array([0.0]), np.array([1.0, 1.0]), code_bits=np.array([3.0, 2.0]), code_cost=0.1) == [1]


def test_code_lengths():
    np.testing.assert_array_equal(code_lengths(np.array([0, 0, 2, 3]), 5), [1, np.inf, 2, 2, np.inf])
    with pytest.raises(ValueError, match="0 to 1"):
        code_lengths(np.array([2]), 2)
    with pytest.raises(ValueError, match="0 to 1"):
        code_lengths(np.array([], int), 2)


@pytest.mark.parametrize(
    "values, centroids, settings, words",
    [
        ([np.nan], [1.0], {}, "finite"),
        ([np.inf], [1.0], {}, "finite"),
        ([1.0], [], {}, "at least one"),
        ([1.0], [[1.0]], {}, "at least one"),
        ([1.0], [np.nan], {}, "finite"),
        ([1.0], [1.0], {"code_cost": 1.0}, "code_bits"),
        ([1.0], [1.0], {"code_cost": -1.0, "code_bits": [1.0]}, "at least 0"),
        ([1.0], [1.0], {"code_bits": [1.0, 2.0]}, "1 numbers"),
        ([1.0], [1.0], {"code_bits": [np.inf]}, "1 numbers"),
        ([1.0], [1.0], {"code_bits": [-1.0]}, "1 numbers"),
    ],
)
def test_assign_bad_input(values, centroids, settings, words):
    with pytest.raises(ValueError, match=words):
        assign(np.array(values), np.array(centroids), **settings)


def test_assign_of_nothing_is_nothing():
    assert assign(np.zeros((0, 3), np.float32), np.array([1.0, 2.0])).shape == (0, 3)


def test_inertia_is_the_squared_distance():
    random = np.random.default_rng(0)
    values = random.normal(size=70_000).astype(np.float32)
    centroids = random.normal(size=9).astype(np.float32)
    weights = random.uniform(size=70_000)
    square = ((values.astype(float)[:, None] - centroids) ** 2).min(axis=1)
    assert inertia(values, centroids) == pytest.approx(square.sum(), rel=1e-12)
    assert inertia(values, centroids, weights) == pytest.approx((square * weights).sum(), rel=1e-12)
