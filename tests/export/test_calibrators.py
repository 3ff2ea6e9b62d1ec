from __future__ import annotations

import math
import time

import numpy as np
import pytest

from vggedge_export.calibrators import BINS, CALIBRATORS, Histogram
from vggedge_runtime.errors import ConversionError


def histogram_of(samples: np.ndarray) -> Histogram:
    magnitudes = np.abs(samples[samples != 0]).astype(np.float64)
    largest = magnitudes.max()
    bins = np.clip(np.ceil(magnitudes / largest * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return Histogram(np.bincount(bins, minlength=BINS), float(largest))


def histogram_with(places: dict[int, int], largest: float = 1.0) -> Histogram:
    """``places``: how many magnitudes are in which bins."""
    counts = np.zeros(BINS, np.int64)
    for place, count in places.items():
        counts[place] = count
    return Histogram(counts, largest)


def squared_error(samples: np.ndarray, magnitude: float) -> float:
    """As INT8 quantises: symmetric, rounded half to even, clipped at 127 steps."""
    scale = magnitude / 127
    return float(np.mean((samples - np.clip(np.rint(samples / scale), -127, 127) * scale) ** 2))


def bins_of(name: str, histogram: Histogram) -> float:
    """The calibrator's answer in bins."""
    return CALIBRATORS[name](histogram) / histogram.largest * BINS


RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=300_000)
SAMPLES = {
    "normal": NORMAL,
    "relu of normal": np.maximum(NORMAL, 0),
    "laplace": RNG.laplace(size=300_000),
    "exponential": RNG.exponential(size=300_000),
    "uniform": RNG.uniform(-1, 1, 300_000),
    "an outlier": np.append(NORMAL, 100 * np.abs(NORMAL).max()),
    "a near outlier": np.append(NORMAL, 60.0),
    "long tail": RNG.standard_t(3, size=300_000),
    "lognormal": RNG.lognormal(size=300_000),
    "few": NORMAL[:200],
}
HISTOGRAMS = {name: histogram_of(samples) for name, samples in SAMPLES.items()}

ROBUST = {
    "the first bin": {0: 1},
    "a middle bin": {700: 3},
    "the last bin": {BINS - 1: 1_000_000},
    "both ends": {0: 1_000_000, BINS - 1: 1},
    "both ends, evenly": {0: 5, BINS - 1: 5},
    "sparse": dict.fromkeys(range(150, BINS, 97), 7),
    "huge counts": dict.fromkeys(range(BINS), 2**62),
    "huge and tiny": {3: 2**62, 1000: 1, 2000: 2**61},
}


def test_the_calibrators_and_their_order() -> None:
    assert list(CALIBRATORS) == ["max", "percentile", "entropy", "mse"]
    assert BINS == 2048


@pytest.mark.parametrize("name", CALIBRATORS)
class TestEveryCalibrator:
    @pytest.mark.parametrize("places", ROBUST.values(), ids=ROBUST)
    def test_odd_histograms_get_a_magnitude_within_range(self, name: str, places: dict[int, int]) -> None:
        found = CALIBRATORS[name](histogram_with(places, 3.0))
        assert type(found) is float
        assert 0 < found <= 3.0

    @pytest.mark.parametrize("place", [20, 127, 128, 700, BINS - 1])
    def test_the_only_occupied_bin_is_not_clipped(self, name: str, place: int) -> None:
        # mse may set the grid's last step at either edge of the bin.
        assert bins_of(name, histogram_with({place: 9})) >= place

    @pytest.mark.parametrize("samples", ["normal", "an outlier", "lognormal"])
    @pytest.mark.parametrize("factor", [2.0**-20, 1 / 3, 1e-9, 1e12])
    def test_scaled_activations_get_a_scaled_answer(self, name: str, samples: str, factor: float) -> None:
        histogram = HISTOGRAMS[samples]
        scaled = Histogram(histogram.counts, histogram.largest * factor)
        assert CALIBRATORS[name](scaled) == pytest.approx(CALIBRATORS[name](histogram) * factor, rel=1e-14)

    def test_more_of_the_same_gets_nearly_the_same_answer(self, name: str) -> None:
        histogram = HISTOGRAMS["exponential"]
        many = Histogram(histogram.counts * 10**12, histogram.largest)
        # An empty bin counts as half a magnitude in entropy, which then is the smaller share.
        assert CALIBRATORS[name](many) == pytest.approx(CALIBRATORS[name](histogram), rel=0.1)

    def test_the_histogram_is_not_changed_and_the_answer_repeats(self, name: str) -> None:
        histogram = HISTOGRAMS["laplace"]
        before = histogram.counts.copy()
        assert CALIBRATORS[name](histogram) == CALIBRATORS[name](histogram)
        np.testing.assert_array_equal(histogram.counts, before)

    def test_it_takes_a_fraction_of_a_second(self, name: str) -> None:
        """A network has dozens of tensors. The limits are five times what two shared cores needed, and more."""
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            CALIBRATORS[name](HISTOGRAMS["normal"])
            best = min(best, time.perf_counter() - started)
        assert best < {"max": 0.01, "percentile": 0.01, "entropy": 0.3, "mse": 0.1}[name]


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
def test_an_outlier_is_cut_by_all_but_the_maximum(name: str) -> None:
    normal = np.random.default_rng(1).normal(size=1_000_000)
    largest = 100 * np.abs(normal).max()
    histogram = histogram_of(np.append(normal, largest))
    assert CALIBRATORS["max"](histogram) == largest
    assert CALIBRATORS[name](histogram) < 0.2 * largest


class TestPercentile:
    def test_one_magnitude_in_ten_thousand_is_cut(self) -> None:
        for above, bins in ((0, 10), (99, 10), (100, 10), (101, 2000)):
            places = {9: 1_000_000 - above, 1999: above}
            assert bins_of("percentile", histogram_with(places)) == bins, above

    def test_the_limit_is_exact_where_doubles_are_not(self) -> None:
        total = 10**17 + 9999  # as a double, it is a multiple of 10,000
        for above, bins in ((10**13, 10), (10**13 + 1, 2000)):
            places = {9: total - above, 1999: above}
            assert bins_of("percentile", histogram_with(places)) == bins

    def test_sums_do_not_overflow(self) -> None:
        wanted = math.ceil(0.9999 * BINS)  # 2048 * 2**62 are 2**73
        assert bins_of("percentile", histogram_with(ROBUST["huge counts"])) == wanted == 2048

    def test_few_magnitudes_are_all_kept(self) -> None:
        assert bins_of("percentile", histogram_with({0: 9998, 1000: 1})) == 1001

    @pytest.mark.parametrize("samples", ["normal", "laplace", "lognormal"])
    def test_as_numpys_percentile_to_a_bin(self, samples: str) -> None:
        histogram = HISTOGRAMS[samples]
        wanted = np.percentile(np.abs(SAMPLES[samples]), 99.99)
        assert wanted - 1e-9 <= CALIBRATORS["percentile"](histogram) <= wanted + 2 * histogram.largest / BINS


def divergences(histogram: Histogram, as_published: bool) -> np.ndarray:
    """Of every threshold from 128 bins on, one at a time; ``as_published``: Q normalised, its empty bins empty."""
    counts, found = histogram.counts.astype(np.float64), []
    for kept in range(128, BINS + 1):
        p, occupied = counts[:kept].copy(), counts[:kept] > 0
        p[-1] += counts[kept:].sum()
        levels = np.arange(kept) * 128 // kept
        share = np.bincount(levels, counts[:kept]) / np.maximum(np.bincount(levels, occupied), 1)
        q = np.where(occupied, share[levels], 0.0)
        if not as_published and not occupied[-1]:
            q[-1] = 0.5
        p, q = p / p.sum(), q / (max(q.sum(), 1e-300) if as_published else counts.sum())
        with np.errstate(divide="ignore"):
            found.append(float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()))
    return np.array(found)


class TestEntropy:
    @pytest.mark.parametrize("samples", SAMPLES)
    def test_the_divergence_is_least_there(self, samples: str) -> None:
        found = divergences(HISTOGRAMS[samples], as_published=False)
        bins = round(bins_of("entropy", HISTOGRAMS[samples]))
        assert found[bins - 128] == pytest.approx(found.min(), abs=1e-12)

    @pytest.mark.parametrize("samples", ["normal", "relu of normal", "laplace", "exponential"])
    def test_ordinary_activations_get_the_published_threshold(self, samples: str) -> None:
        published = 128 + int(divergences(HISTOGRAMS[samples], as_published=True).argmin())
        # The divergence is flat there: what separates the two rules is worth a few bins of an empty tail.
        assert bins_of("entropy", HISTOGRAMS[samples]) == pytest.approx(published, rel=0.06)

    def test_where_the_published_rule_would_clip_everything(self) -> None:
        histogram = histogram_with(ROBUST["sparse"])
        assert 128 + int(divergences(histogram, as_published=True).argmin()) == 151
        assert bins_of("entropy", histogram) > 1900

    def test_an_even_distribution_is_not_clipped(self) -> None:
        assert bins_of("entropy", histogram_with(dict.fromkeys(range(BINS), 100))) == BINS

    def test_of_thresholds_that_lose_nothing_the_lowest_is_taken(self) -> None:
        assert bins_of("entropy", histogram_with({42: 714, 43: 890, 50: 227, 97: 264})) == 128

    def test_it_keeps_128_bins_however_rare_the_rest(self) -> None:
        assert bins_of("entropy", histogram_with({0: 10**9, 5: 10**8, BINS - 1: 1})) == 128


class TestMse:
    @pytest.mark.parametrize("samples", SAMPLES)
    def test_none_of_the_four_has_a_smaller_error(self, samples: str) -> None:
        errors = {name: squared_error(SAMPLES[samples], f(HISTOGRAMS[samples])) for name, f in CALIBRATORS.items()}
        assert min(errors, key=errors.__getitem__) == "mse", errors

    @pytest.mark.parametrize("samples", ["normal", "laplace", "a near outlier", "lognormal"])
    def test_the_error_is_that_of_the_best_threshold_by_trial(self, samples: str) -> None:
        histogram, values = HISTOGRAMS[samples], SAMPLES[samples]
        tried = [squared_error(values, histogram.largest * part) for part in np.linspace(0.02, 1, 150)]
        assert squared_error(values, CALIBRATORS["mse"](histogram)) <= 1.005 * min(tried)

    def test_an_even_distribution_is_clipped_by_half_a_step(self) -> None:
        """127.5 steps over (0, 1]: t / 127 is 1 / 127.5."""
        assert bins_of("mse", histogram_with(dict.fromkeys(range(BINS), 100))) == pytest.approx(
            BINS * 127 / 127.5, abs=1
        )

    def test_a_normal_distribution_is_clipped_where_theory_says(self) -> None:
        """The density's own error, rounding and clipping, integrated finely and minimised: 3.9 sigma or so."""
        x = np.linspace(0, 7, 70_001)
        density = np.exp(-(x**2) / 2)
        grid = np.linspace(3, 5, 401)

        def error(threshold: float) -> float:
            scale = threshold / 127
            return float((density * (x - np.minimum(np.rint(x / scale), 127) * scale) ** 2).sum())

        wanted = grid[np.argmin([error(threshold) for threshold in grid])]
        assert 3.8 < wanted < 4.1
        shares = np.diff([math.erf(edge / math.sqrt(2)) for edge in np.linspace(0, 6, BINS + 1)])
        exact = Histogram(np.rint(1e15 * shares).astype(np.int64), 6.0)
        assert CALIBRATORS["mse"](exact) == pytest.approx(wanted, abs=0.015)

    @pytest.mark.parametrize("sigma", [10, 20, 70])
    def test_the_error_inside_a_bin_counts(self, sigma: int) -> None:
        """Steps and bins are of one size here, and the bins' centres alone would mislead by 7 % or more."""
        values = np.abs(NORMAL[:50_000]) * sigma / BINS
        counts = np.bincount(np.floor(values * BINS).astype(np.int64), minlength=BINS)
        tried = [squared_error(values, bins / BINS) for bins in range(21, 301)]
        assert squared_error(values, CALIBRATORS["mse"](Histogram(counts, 1.0))) <= 1.02 * min(tried)

    def test_thresholds_below_a_hundredth_are_not_tried(self) -> None:
        assert bins_of("mse", histogram_with({0: 10**18, 1: 1})) == 21


@pytest.mark.parametrize(
    "counts", [np.ones(BINS - 1, np.int64), np.ones((BINS, 1), np.int64), np.ones(BINS), -np.ones(BINS, np.int64)]
)
def test_what_is_no_histogram_is_refused(counts: np.ndarray) -> None:
    with pytest.raises(ConversionError, match=r"^a histogram of shape .* needed are 2048 counts of 0 or more"):
        Histogram(counts, 1.0)


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan, math.inf])
def test_a_largest_magnitude_without_a_scale_is_refused(largest: float) -> None:
    with pytest.raises(ConversionError, match=r"^a histogram of 2048 occupied bins up to a magnitude of"):
        Histogram(np.ones(BINS, np.int64), largest)


def test_an_empty_histogram_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"^a histogram of 0 occupied bins .* Look whether the layer is dead"):
        Histogram(np.zeros(BINS, np.int64), 1.0)
