from __future__ import annotations

import numpy as np
import pytest

from vggedge_runtime.statistics import PERCENTILES, build_proportion, percentiles, samples_needed


class TestProportion:
    @pytest.mark.parametrize(
        ("count", "n", "low", "high"),
        [
            # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: four digits as published.
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
            # Agresti & Coull's special case n = count: 1 / (1 + z2 / n).
            (10, 10, 0.7225, 1.0),
        ],
    )
    def test_published_intervals(self, count: int, n: int, low: float, high: float) -> None:
        found = build_proportion(count, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5.1e-5)

    @pytest.mark.parametrize(("count", "n"), [(1, 2), (3, 7), (95, 100), (1990, 2000), (1, 100_000)])
    def test_the_ends_solve_the_score_equation(self, count: int, n: int) -> None:
        """By definition |count/n - p| is 1.96 standard errors *at p*."""
        found = build_proportion(count, n)
        for end in (found.low, found.high):
            assert abs(count / n - end) / np.sqrt(end * (1 - end) / n) == pytest.approx(1.959963984540054)
        assert found.low < found.share < found.high

    @pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 10**9), (10**9, 10**9)])
    def test_the_ends_stay_between_0_and_1(self, count: int, n: int) -> None:
        found = build_proportion(count, n)
        assert 0 <= found.low < found.high <= 1
        assert found.low - 1e-15 <= found.share <= found.high + 1e-15

    @pytest.mark.parametrize(("count", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
    def test_what_is_no_proportion(self, count: int, n: int) -> None:
        with pytest.raises(ValueError, match=f"{count} of {n} is no proportion"):
            build_proportion(count, n)

    def test_in_words(self) -> None:
        assert str(build_proportion(81, 263)) == "30.80 % [25.5, 36.6]"


class TestPercentiles:
    @pytest.mark.parametrize(("percentile", "count"), [(50, 20), (90, 100), (95, 200), (99, 1000), (99.9, 10_000)])
    def test_ten_samples_lie_above(self, percentile: float, count: int) -> None:
        assert samples_needed(percentile) == count

    def test_as_numpy(self) -> None:
        samples = np.random.default_rng(0).lognormal(size=10_000)
        wanted = {f"p{p:g}": float(np.percentile(samples, p)) for p in PERCENTILES}
        assert percentiles(samples) == wanted
        assert list(wanted) == ["p50", "p90", "p95", "p99", "p99.9"]

    def test_by_hand(self) -> None:
        # Type 7 of 0..20: p50 lies at index 10, p25 at index 5.
        assert percentiles(list(range(21)), [25, 50]) == {"p25": 5.0, "p50": 10.0}
        assert percentiles([0.0] * 11 + [1.0] * 11, [50]) == {"p50": 0.5}

    @pytest.mark.parametrize("count", [19, 20, 99, 100, 999, 1000, 9999, 10_000])
    def test_too_few_samples_give_none(self, count: int) -> None:
        found = percentiles(np.arange(float(count)))
        enough = {p: count >= needed for p, needed in zip(PERCENTILES, (20, 100, 200, 1000, 10_000), strict=True)}
        assert {name: value is not None for name, value in found.items()} == {
            f"p{p:g}": there for p, there in enough.items()
        }

    def test_no_samples(self) -> None:
        assert percentiles([]) == {f"p{p:g}": None for p in PERCENTILES}
