from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.paired import (
    Flip,
    PairedChange,
    Verdict,
    build_class_changes,
    build_paired_change,
    find_flips,
    judge_drop,
    score_interval,
)

Z95, Z90 = 1.959963984540054, 1.6448536269514722


def change(lost: int, gained: int, n: int) -> PairedChange:
    """As the two sides' marks would give it."""
    reference, candidate = np.ones(n, np.bool_), np.ones(n, np.bool_)
    candidate[:lost] = False
    reference[lost : lost + gained] = False
    return build_paired_change(reference, candidate)


def uncertain(lost: int, gained: int, n: int) -> PairedChange:
    """Only the counts, for numbers of images of which no marks need be made."""
    return PairedChange(n=n, lost=lost, gained=gained, p_value=math.nan, low=math.nan, high=math.nan)


class TestPairedChange:
    def test_counts_what_only_one_side_gets_right(self) -> None:
        reference = np.array([True, True, True, False, False, False, True, True])
        candidate = np.array([True, False, False, True, False, False, True, False])
        found = build_paired_change(reference, candidate)
        assert (found.n, found.lost, found.gained) == (8, 3, 1)
        assert found.points == -25.0

    def test_the_exchange_of_the_sides_changes_signs_only(self) -> None:
        there, back = change(7, 2, 100), change(2, 7, 100)
        assert (back.lost, back.gained, back.points) == (there.gained, there.lost, -there.points)
        assert back.p_value == there.p_value
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.51)  # another draw

    def test_the_published_example(self) -> None:
        """Cavo et al. 2012 in Fagerland, Lydersen & Laake, "Statistical Analysis of Contingency Tables", chapter 8."""
        assert change(6, 16, 161).p_value == pytest.approx(0.052479, abs=5e-7)

    @pytest.mark.parametrize(
        ("lost", "gained"), [(0, 0), (1, 0), (0, 5), (1, 9), (3, 3), (4, 5), (30, 60), (500, 420), (0, 1000)]
    )
    def test_the_p_value_is_the_exact_binomial_tail(self, lost: int, gained: int) -> None:
        m, k = lost + gained, min(lost, gained)
        tail = Fraction(sum(math.comb(m, rank) for rank in range(k + 1)), 2**m)
        wanted = float(min(Fraction(1), 2 * tail))
        assert change(lost, gained, 1000).p_value == pytest.approx(wanted, rel=1e-10)
        assert wanted > 0

    @pytest.mark.parametrize(
        ("lost", "gained", "low", "high"),
        [
            (1_000_000, 1_000_000, 1.0, 1.0),
            (1_000_000, 1_003_000, 0.0338, 0.0342),  # normal approximation: z = 2.1202 with continuity correction
            (2_000_000, 0, 0.0, 0.0),  # 2 ** -1,999,999 is below any double
        ],
    )
    def test_millions_of_discordant_images(self, lost: int, gained: int, low: float, high: float) -> None:
        found = change(lost, gained, 3_000_000)
        assert low <= found.p_value <= high
        assert found.low < found.points < found.high

    def test_the_bootstrap_interval_is_that_of_resampled_images(self) -> None:
        n = 400
        marks = np.repeat([-1, 1, 0], [20, 8, n - 28])
        rng = np.random.default_rng(5)
        changes = [100 * rng.choice(marks, n).mean() for _ in range(10_000)]
        found = change(20, 8, n)
        # One image is 0.25 points, and one of them either way is chance.
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(changes, (2.5, 97.5))), abs=0.26)

    def test_the_bootstrap_interval_has_the_width_of_theory_for_many_images(self) -> None:
        n, lost, gained = 1_000_000, 5000, 4000
        found = change(lost, gained, n)
        sigma = 100 * math.sqrt(((lost + gained) / n - ((lost - gained) / n) ** 2) / n)
        assert (found.low, found.high) == pytest.approx((-0.1 - Z95 * sigma, -0.1 + Z95 * sigma), abs=0.1 * sigma)

    def test_the_same_answers_give_the_same_figures(self) -> None:
        assert change(5000, 4000, 1_000_000) == change(5000, 4000, 1_000_000)

    def test_without_discordant_images_nothing_changed(self) -> None:
        found = change(0, 0, 10)
        assert (found.points, found.p_value, found.low, found.high) == (0.0, 1.0, 0.0, 0.0)

    def test_in_words(self) -> None:
        words = PairedChange(n=2000, lost=4, gained=3, p_value=1.0, low=-0.35, high=0.25)
        assert str(words) == "-0.05 points [-0.35, +0.25]"
        tiny = PairedChange(n=100_000, lost=1, gained=0, p_value=1.0, low=-0.004, high=0.0)
        assert str(tiny) == "+0.00 points [+0.00, +0.00]"

    def test_it_travels_as_json(self) -> None:
        found = change(7, 2, 100)
        assert msgspec.json.decode(msgspec.json.encode(found), type=PairedChange) == found

    @pytest.mark.parametrize(("reference", "candidate"), [((0,), (0,)), ((3,), (4,)), ((3, 1), (3, 1)), ((3,), (3, 1))])
    def test_marks_of_other_images_are_refused(self, reference: tuple[int, ...], candidate: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match=r"needed is one right or wrong for every image on both sides"):
            build_paired_change(np.ones(reference, np.bool_), np.ones(candidate, np.bool_))


def score_statistic(lost: int, gained: int, n: int, difference: float) -> float:
    """Tango's statistic with the restricted likelihood maximised by search, not by its closed form."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def log_likelihood(share: float) -> float:
        counts = (gained, lost, n - lost - gained)
        shares = (share, share + difference, 1 - 2 * share - difference)
        return sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

    for _ in range(200):  # thirds: the logarithm of the likelihood is concave
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if log_likelihood(left) < log_likelihood(right):
            low = left
        else:
            high = right
    variance = low + high + difference - difference**2
    return (lost - gained - n * difference) / math.sqrt(n * variance)


class TestScoreInterval:
    def test_the_published_example(self) -> None:
        """Cavo et al. 2012, as above: Tango's interval is given as -0.1240 to -0.0054."""
        assert score_interval(6, 16, 161, Z95) == pytest.approx((-0.1240, -0.0054), abs=5.1e-5)

    @pytest.mark.parametrize("n", [1, 10, 500, 10**7])
    @pytest.mark.parametrize("z", [Z90, Z95])
    def test_without_discordant_images_the_ends_have_a_closed_form(self, n: int, z: float) -> None:
        end = z**2 / (n + z**2)
        assert score_interval(0, 0, n, z) == pytest.approx((-end, end), rel=1e-9)

    @pytest.mark.parametrize(
        ("lost", "gained", "n"),
        [(3, 0, 20), (0, 3, 20), (12, 2, 50), (2, 12, 50), (5, 5, 500), (40, 1, 60), (30, 30, 60), (900, 1000, 10_000)],
    )
    def test_the_ends_solve_the_score_equation(self, lost: int, gained: int, n: int) -> None:
        low, high = score_interval(lost, gained, n, Z90)
        assert score_statistic(lost, gained, n, low) == pytest.approx(Z90, rel=1e-5)
        assert score_statistic(lost, gained, n, high) == pytest.approx(-Z90, rel=1e-5)
        assert -1 < low < (lost - gained) / n < high < 1

    @pytest.mark.parametrize(("lost", "gained", "n"), [(1, 0, 1), (0, 1, 1), (50, 0, 50), (0, 50, 50), (25, 25, 50)])
    def test_the_ends_stay_between_minus_1_and_1(self, lost: int, gained: int, n: int) -> None:
        low, high = score_interval(lost, gained, n, Z95)
        assert -1 <= low <= (lost - gained) / n <= high <= 1
        assert high - low > 0.05

    def test_many_images_give_the_normal_interval(self) -> None:
        n, lost, gained = 10_000_000, 50_000, 40_000
        sigma = math.sqrt((0.009 - 0.001**2) / n)
        assert score_interval(lost, gained, n, Z90) == pytest.approx(
            (0.001 - Z90 * sigma, 0.001 + Z90 * sigma), abs=1e-3 * sigma
        )

    @pytest.mark.parametrize("shares", [(0.02, 0.02), (0.03, 0.01), (0.01, 0.03), (0.1, 0.05), (0.02, 0.0)])
    def test_the_upper_end_covers_in_95_percent_of_sets(self, shares: tuple[float, float]) -> None:
        draws = np.random.default_rng(1).multinomial(500, [*shares, 1 - sum(shares)], size=4000)
        pairs, times = np.unique(draws[:, :2], axis=0, return_counts=True)
        truth = shares[0] - shares[1]
        covers = [score_interval(int(lost), int(gained), 500, Z90)[1] >= truth for lost, gained in pairs]
        # Three standard errors of 4000 sets are 1 %; the rest is that counts are whole numbers, some ten lost here.
        assert 0.93 <= np.average(covers, weights=times) <= 0.98


class TestVerdict:
    @pytest.mark.parametrize(
        ("lost", "gained", "n", "max_drop", "decision"),
        [
            (10, 8, 10_000, 0.5, "pass"),
            (200, 50, 10_000, 0.5, "fail"),
            (10, 8, 1000, 0.5, "undecided"),
            (0, 0, 10, 1.0, "undecided"),  # ten images prove little, though none is discordant
            (0, 0, 1000, 1.0, "pass"),
            (0, 50, 1000, 0.0, "pass"),  # demonstrably better: the only way to pass a limit of 0
            (0, 0, 1_000_000, 0.0, "undecided"),
            (1, 0, 1, 100.0, "pass"),
        ],
    )
    def test_decisions(self, lost: int, gained: int, n: int, max_drop: float, decision: str) -> None:
        found = judge_drop(uncertain(lost, gained, n), max_drop)
        assert found.decision == decision
        assert found.drop_low <= found.drop <= found.drop_high
        assert found.drop == pytest.approx(100 * (lost - gained) / n)
        assert (found.decision == "undecided") or found.images_needed is None

    def test_the_ends_are_those_of_the_90_percent_score_interval_in_points(self) -> None:
        found = judge_drop(change(12, 2, 50), 5)
        wanted = score_interval(12, 2, 50, Z90)
        assert (found.drop_low, found.drop_high) == pytest.approx(tuple(100 * end for end in wanted))
        assert (found.drop, found.max_drop) == (20.0, 5)

    def test_it_decides_at_the_ends_themselves(self) -> None:
        loose = judge_drop(uncertain(30, 20, 5000), 50)
        high, low = loose.drop_high, loose.drop_low
        assert loose.decision == "pass"
        assert judge_drop(uncertain(30, 20, 5000), high).decision == "pass"
        assert judge_drop(uncertain(30, 20, 5000), math.nextafter(high, 0)).decision == "undecided"
        few_gains = judge_drop(uncertain(30, 2, 5000), 50)
        assert low < 0 < few_gains.drop_low
        assert judge_drop(uncertain(30, 2, 5000), few_gains.drop_low).decision == "undecided"
        assert judge_drop(uncertain(30, 2, 5000), math.nextafter(few_gains.drop_low, 0)).decision == "fail"

    @pytest.mark.parametrize(
        ("lost", "gained", "n", "max_drop"),
        [(2, 1, 1000, 0.5), (4, 3, 500, 1.0), (12, 1, 1000, 0.7), (1, 5, 200, 0.0), (3, 0, 100, 2.0)],
    )
    def test_the_images_needed_decide_and_fewer_do_not(self, lost: int, gained: int, n: int, max_drop: float) -> None:
        needed = judge_drop(uncertain(lost, gained, n), max_drop).images_needed
        assert needed is not None
        assert needed > n
        for images, is_decided in ((needed, True), (needed - 1, False)):
            ends = score_interval(lost * images / n, gained * images / n, images, Z90)  # the shares stay as seen
            assert (100 * ends[1] <= max_drop or 100 * ends[0] > max_drop) == is_decided

    @pytest.mark.parametrize("max_drop", [0.5, 1.0, 5.0])
    def test_the_images_needed_without_discordant_ones(self, max_drop: float) -> None:
        """z^2 / (n + z^2) = limit, solved for n."""
        wanted = math.ceil(Z90**2 * (1 - max_drop / 100) / (max_drop / 100))
        assert judge_drop(uncertain(0, 0, 10), max_drop).images_needed == wanted
        assert judge_drop(uncertain(0, 0, wanted), max_drop).decision == "pass"
        assert judge_drop(uncertain(0, 0, wanted - 1), max_drop).decision == "undecided"

    @pytest.mark.parametrize(
        ("lost", "gained", "n", "max_drop"),
        [
            (15, 10, 1000, 0.5),  # at the limit
            (0, 0, 1000, 0.0),
            (7, 7, 1000, 0.0),
            (9, 2, 1000, 0.7),  # at the limit, but for rounding
            (1505, 1000, 100_000, 0.5),  # beside it: some 27 million
        ],
    )
    def test_where_no_number_of_images_would_do(self, lost: int, gained: int, n: int, max_drop: float) -> None:
        found = judge_drop(uncertain(lost, gained, n), max_drop)
        assert (found.decision, found.images_needed) == ("undecided", None)

    @pytest.mark.parametrize("max_drop", [-0.1, 100.1, math.nan, math.inf, -math.inf])
    def test_limits_that_make_no_sense_are_refused(self, max_drop: float) -> None:
        with pytest.raises(UsageError, match=r"^the largest drop of accuracy is .*; needed are 0 to 100 points"):
            judge_drop(change(1, 0, 10), max_drop)

    @pytest.mark.parametrize(
        ("figures", "wanted"),
        [
            (("pass", 0.5, 0.1, -0.2, 0.42, None), "loses 0.10 points, at most 0.42 with 95 % confidence; "),
            (("pass", 0.5, -0.1, -0.4, 0.2, None), "gains 0.10 points, loses at most 0.20 with 95 % confidence; "),
            (("pass", 0.5, -1.0, -1.5, -0.5, None), "gains 1.00 points, at least 0.50 with 95 % confidence; "),
            (("fail", 0.5, 1.2, 0.8, 1.6, None), "loses 1.20 points, at least 0.80 with 95 % confidence; "),
        ],
    )
    def test_a_decision_in_words(self, figures: tuple[Any, ...], wanted: str) -> None:
        names = ("decision", "max_drop", "drop", "drop_low", "drop_high", "images_needed")
        assert Verdict(**dict(zip(names, figures, strict=True))).describe() == wanted + "allowed are 0.50"

    @pytest.mark.parametrize(
        ("needed", "words"),
        [
            (6137, "about 6,200 images would decide"),
            (6200, "about 6,200 images would decide"),
            (99_001, "about 100,000 images would decide"),
            (37, "about 37 images would decide"),
            (None, "the loss is so near the limit that no practicable number of images would decide"),
        ],
    )
    def test_no_decision_in_words(self, needed: int | None, words: str) -> None:
        verdict = Verdict(
            decision="undecided", max_drop=0.5, drop=0.45, drop_low=-0.3, drop_high=1.2, images_needed=needed
        )
        assert verdict.describe() == (
            f"not enough images to decide: the loss is between -0.30 and 1.20 points, allowed are 0.50; {words}"
        )

    def test_it_travels_as_json(self) -> None:
        found = judge_drop(change(10, 8, 1000), 0.5)
        assert msgspec.json.decode(msgspec.json.encode(found), type=Verdict) == found


REFERENCE = np.float32([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.2, 0.5], [0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])
CANDIDATE = np.float32([[0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
TARGETS = np.array([0, 1, 0, 1, 1])
LABELS = ("cat", "dog", "owl")


class TestClassChanges:
    def test_class_by_class(self) -> None:
        found = build_class_changes(REFERENCE, CANDIDATE, TARGETS, LABELS)
        assert [msgspec.structs.astuple(each) for each in found] == [
            ("cat", 2, 1, 1, 1, 1),  # the first is lost, the third gained
            ("dog", 3, 2, 1, 1, 0),
            ("owl", 0, 0, 0, 0, 0),
        ]

    def test_they_add_up_to_the_change_of_all(self) -> None:
        rng = np.random.default_rng(0)
        reference, candidate = rng.random((2, 300, 4), np.float32)
        targets = rng.integers(0, 4, 300)
        found = build_class_changes(reference, candidate, targets, "abcd")
        whole = build_paired_change(reference.argmax(1) == targets, candidate.argmax(1) == targets)
        assert sum(each.lost for each in found) == whole.lost > 0
        assert sum(each.gained for each in found) == whole.gained > 0
        assert all(each.candidate_right - each.reference_right == each.gained - each.lost for each in found)


class TestFlips:
    def test_the_surest_of_the_reference_comes_first(self) -> None:
        found = find_flips(REFERENCE, CANDIDATE, TARGETS, 10)
        # Image 4 flips as surely as image 0, but stands behind it: 0.7 - 0.2 in both.
        assert [(each.image, each.true, each.reference, each.candidate) for each in found] == [
            (0, 0, 0, 1),
            (4, 1, 1, 2),
            (2, 0, 2, 0),
        ]
        assert [each.reference_margin for each in found] == pytest.approx([0.5, 0.5, 0.2])
        assert [each.candidate_margin for each in found] == pytest.approx([0.1, 0.7, 0.4])
        assert all(type(value) in (int, float) for value in msgspec.structs.astuple(found[0]))

    @pytest.mark.parametrize("limit", [0, 1, 2, 3])
    def test_no_more_than_asked_for(self, limit: int) -> None:
        assert find_flips(REFERENCE, CANDIDATE, TARGETS, limit) == find_flips(REFERENCE, CANDIDATE, TARGETS, 9)[:limit]

    def test_no_flips(self) -> None:
        assert find_flips(REFERENCE, REFERENCE, TARGETS, 10) == ()
        assert find_flips(np.ones((3, 1), np.float32), np.ones((3, 1), np.float32), np.zeros(3, np.int64), 10) == ()

    def test_a_negative_limit_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"^at most -1 flips"):
            find_flips(REFERENCE, CANDIDATE, TARGETS, -1)

    def test_they_travel_as_json(self) -> None:
        found = find_flips(REFERENCE, CANDIDATE, TARGETS, 10)
        assert msgspec.json.decode(msgspec.json.encode(found), type=tuple[Flip, ...]) == found


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"candidate": CANDIDATE[:4]}, r"\(5, 3\) of the reference and \(4, 3\) of the candidate; needed is \(5, 3\)"),
        ({"candidate": CANDIDATE[:, :2]}, r"\(5, 2\) of the candidate"),
        ({"targets": TARGETS[:4]}, r"needed is \(4, 3\) of both: 4 images, 3 classes"),
        ({"targets": TARGETS + 2}, r"true classes run from 2 to 3; needed are 0 to 2"),
        ({"targets": TARGETS - 1}, r"true classes run from -1 to 0"),
        ({"reference": np.where(REFERENCE > 0.7, np.float32(np.nan), REFERENCE)}, r"NaN or infinity"),
        ({"candidate": np.where(CANDIDATE > 0.7, np.float32(np.inf), CANDIDATE)}, r"NaN or infinity"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(broken: dict[str, np.ndarray], message: str) -> None:
    arrays = {"reference": REFERENCE, "candidate": CANDIDATE, "targets": TARGETS} | broken
    with pytest.raises(DataError, match=message):
        build_class_changes(**arrays, labels=LABELS)
    with pytest.raises(DataError, match=message):
        find_flips(**arrays, limit=3)
