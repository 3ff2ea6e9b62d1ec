"""Is a candidate as accurate as its reference? Both answered the same images: pairs tell more than two accuracies.

Images that both sides get right, or both wrong, say nothing of a difference. What counts are the discordant ones:
*lost*, which only the reference gets right, and *gained*, which only the candidate does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.errors import DataError, UsageError

_Z_ONE_SIDED_95 = 1.6448536269514722  # 95 % quantile of the normal distribution
_RESAMPLES = 10_000  # an end then moves by about 1.4 % of the interval's half width from one seed to the next
_SEED = 0
_MOST_IMAGES = 10_000_000  # nobody labels more to decide one export
_HALVINGS = 64  # of an interval of length 2: to the last bit of a double


class PairedChange(msgspec.Struct, frozen=True, kw_only=True):
    """Change of accuracy from a reference to a candidate, on the same images.

    Attributes:
        n: images.
        lost: images that only the reference gets right.
        gained: images that only the candidate gets right.
        p_value: exact two-sided McNemar test (McNemar 1947): how often a fair coin, thrown once for every discordant
            image, would fall at least as unevenly; 1 where there is none, 0 below the smallest double.
        low: lower end of the 95 % bootstrap interval of ``points``.
        high: upper end.
    """

    n: int
    lost: int
    gained: int
    p_value: float
    low: float
    high: float

    @property
    def points(self) -> float:
        """Accuracy of the candidate minus that of the reference, in points (percent of the images)."""
        return 100 * (self.gained - self.lost) / self.n

    def __str__(self) -> str:
        return f"{_decimals(self.points, '+')} points [{_decimals(self.low, '+')}, {_decimals(self.high, '+')}]"


def build_paired_change(reference_right: NDArray[np.bool_], candidate_right: NDArray[np.bool_]) -> PairedChange:
    """Compare which images both sides get right; (n,) each, row by row the same images.

    The bootstrap (Efron 1979) resamples images. An image is lost, gained or neither, so a resample is a draw from
    the multinomial distribution with the shares observed, and is drawn as one, whatever n is: 10,000 draws of a
    fixed seed, percentiles 2.5 and 97.5. It describes, and must not decide: see judge_drop.

    Raises:
        DataError: no images, or not the same number on both sides.
    """
    if reference_right.ndim != 1 or reference_right.shape != candidate_right.shape or not reference_right.size:
        raise DataError(
            f"marks of shape {reference_right.shape} for the reference and {candidate_right.shape} for the candidate; "
            "needed is one right or wrong for every image on both sides, and at least one image."
        )
    n = len(reference_right)
    lost = int(np.count_nonzero(reference_right & ~candidate_right))
    gained = int(np.count_nonzero(candidate_right & ~reference_right))
    shares = [lost / n, gained / n, (n - lost - gained) / n]
    draws = np.random.default_rng(_SEED).multinomial(n, shares, size=_RESAMPLES)
    low, high = np.percentile(100 * (draws[:, 1] - draws[:, 0]) / n, (2.5, 97.5))
    p_value = _mcnemar_p_value(lost, gained)
    return PairedChange(n=n, lost=lost, gained=gained, p_value=p_value, low=float(low), high=float(high))


def _mcnemar_p_value(lost: int, gained: int) -> float:
    """Exact two-sided binomial test with p = 1/2: twice the smaller tail, at most 1.

    The tail is summed from its largest term down, each from the one before by their ratio. Logarithms keep that
    first term in range; their rounding costs a relative 1e-8 at a million discordant images.
    """
    discordant, rank = lost + gained, min(lost, gained)
    logarithm = math.lgamma(discordant + 1) - math.lgamma(rank + 1) - math.lgamma(discordant - rank + 1)
    term, tail = math.exp(logarithm - discordant * math.log(2)), 0.0
    while term > 1e-18 * tail:  # also ends at a term of 0: below rank 0, or out of range
        tail += term
        term *= rank / (discordant - rank + 1)
        rank -= 1
    return min(1.0, 2 * tail)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a candidate loses no more accuracy than it may. Points are percent of the images.

    Attributes:
        decision: the answer; "undecided" where the images allow either.
        max_drop: points that the candidate may lose.
        drop: points that it lost on these images; negative: it gained.
        drop_low: lower end of the 90 % score interval of the true drop: with 95 % confidence it is no smaller.
        drop_high: upper end: with 95 % confidence it is no larger.
        images_needed: about how many images would decide if the shares of lost and gained stay as seen. The shares of
            a new set will differ: where these are the true ones, that number decides about every other time. None
            where it is decided, and where more than ten million would be needed, as at a drop that is just the limit.
    """

    decision: Literal["pass", "fail", "undecided"]
    max_drop: float
    drop: float
    drop_low: float
    drop_high: float
    images_needed: int | None

    def describe(self) -> str:
        """The verdict in half a sentence, for the user."""
        allowed = f"allowed are {_decimals(self.max_drop)}"
        if self.decision == "undecided":
            needed = (
                "the loss is so near the limit that no practicable number of images would decide"
                if self.images_needed is None
                else f"about {_two_digits(self.images_needed):,} images would decide"
            )
            between = f"between {_decimals(self.drop_low)} and {_decimals(self.drop_high)} points"
            return f"not enough images to decide: the loss is {between}, {allowed}; {needed}"
        if self.decision == "fail":
            bound = f"at least {_decimals(self.drop_low)}"
        elif self.drop < 0 <= self.drop_high:
            bound = f"loses at most {_decimals(self.drop_high)}"
        elif self.drop_high < 0:
            bound = f"at least {_decimals(-self.drop_high)}"
        else:
            bound = f"at most {_decimals(self.drop_high)}"
        seen = f"{'gains' if self.drop < 0 else 'loses'} {_decimals(abs(self.drop))} points"
        return f"{seen}, {bound} with 95 % confidence; {allowed}"


def check_limit(max_drop: float) -> None:
    """Raise UsageError unless ``max_drop`` is a limit that a user can mean: above 0 to 100 points."""
    if not 0 < max_drop <= 100:  # false for NaN, too
        raise UsageError(
            f"the limit (--max-drop) is {max_drop:g}; needed are above 0 to 100 points of accuracy. No number of "
            "images shows a loss of nothing at all."
        )


def judge_drop(change: PairedChange, max_drop: float) -> Verdict:
    """Decide whether the candidate's accuracy drops by no more than ``max_drop`` points.

    It passes if even the upper end of the interval of the true drop is within the limit, fails if even the lower end
    is above it, and is undecided in between. Where the true drop is just the limit, either answer is wrong about once
    in twenty times; further away, less often. That is nominal: in 40,000 simulated sets of 500 images
    with three lost ones to be expected and none gained, "fail" was wrong once in twelve times; "pass" kept its twenty.

    Two intervals, since they answer two questions. The bootstrap of PairedChange describes the change seen, and is
    [0, 0] where no image is discordant: ten images that agree would then prove that all do. What decides is Tango's
    score interval (Tango 1998, Statistics in Medicine 17:891-908): it asks which true drops the images do not
    contradict, and without discordant images still reaches z^2 / (n + z^2), 21 points for ten images.

    With ``max_drop`` 0 only a candidate that is demonstrably better passes. That is no defect: that nothing at all is
    lost cannot be shown on any number of images.

    Raises:
        UsageError: ``max_drop`` is not from 0 to 100.
    """
    if not 0 <= max_drop <= 100:  # false for NaN, too
        raise UsageError(f"the largest drop of accuracy is {max_drop}; needed are 0 to 100 points, as 0.5.")
    lost, gained = change.lost / change.n, change.gained / change.n
    low, high = (100 * end for end in score_interval(change.lost, change.gained, change.n, _Z_ONE_SIDED_95))
    decision: Literal["pass", "fail", "undecided"]
    decision = "pass" if high <= max_drop else "fail" if low > max_drop else "undecided"
    return Verdict(
        decision=decision,
        max_drop=max_drop,
        drop=100 * (change.lost - change.gained) / change.n,
        drop_low=low,
        drop_high=high,
        images_needed=_images_needed(lost, gained, max_drop / 100) if decision == "undecided" else None,
    )


def score_interval(lost: int, gained: int, n: int, z: float) -> tuple[float, float]:
    """Tango's score interval of the true share of lost minus that of gained, -1 to 1.

    Args:
        lost: images that only the reference gets right.
        gained: images that only the candidate gets right.
        n: all images, at least 1.
        z: normal quantile of each side: 1.645 for a two-sided interval of 90 %.
    """
    # Who loses what the other gains: the lower end is the upper one of the sides exchanged.
    return -_upper_end(gained / n, lost / n, n, z), _upper_end(lost / n, gained / n, n, z)


def _upper_end(lost: float, gained: float, n: int, z: float) -> float:
    """Largest difference that lies no more than z standard errors, *at that difference*, above the observed one."""
    observed = lost - gained
    inside, outside = observed, 1.0
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if middle - observed < z * math.sqrt(_restricted_variance(lost, gained, middle) / n):
            inside = middle
        else:
            outside = middle
    return outside


def _restricted_variance(lost: float, gained: float, difference: float) -> float:
    """Variance of one image's loss (+1, -1 or 0) at the likeliest shares whose difference is ``difference``.

    The likeliest share of gained, q, solves 2 q^2 + b q + c = 0; that of lost is q + difference (Tango 1998).
    """
    b = (2 - lost + gained) * difference - lost - gained
    c = -gained * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
    return max(0.0, 2 * share + difference * (1 - difference))


def _images_needed(lost: float, gained: float, limit: float) -> int | None:
    """Images at which ``limit`` is an end of the interval, for fixed shares; the statistic grows as sqrt(n)."""
    distance = lost - gained - limit
    # Compared without a division: the distance may be 0, or rounding's idea of it.
    spread = _Z_ONE_SIDED_95**2 * _restricted_variance(lost, gained, limit)
    return math.ceil(spread / distance**2) if spread <= _MOST_IMAGES * distance**2 and distance else None


def _decimals(value: float, sign: str = "") -> str:
    return f"{round(value, 2) + 0.0:{sign}.2f}"  # + 0.0 makes -0.0 into 0.0


def _two_digits(count: int) -> int:
    """``count`` rounded up to two significant digits: it is an estimate."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit


class ClassChange(msgspec.Struct, frozen=True, kw_only=True):
    """How the images of one true class changed.

    Attributes:
        label: the class's name.
        images: how many are of this class.
        reference_right: of these, those that the reference gets right,
        candidate_right: those that the candidate does,
        lost: only the reference,
        gained: and only the candidate.
    """

    label: str
    images: int
    reference_right: int
    candidate_right: int
    lost: int
    gained: int


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """An image to which the two sides answer different classes.

    Attributes:
        image: its row in the set.
        true: its class, by index, as the two answers:
        reference: what the reference says,
        candidate: and the candidate.
        reference_margin: how far the reference's first class is above its second, probability from 0 to 1.
        candidate_margin: the same of the candidate.
    """

    image: int
    true: int
    reference: int
    candidate: int
    reference_margin: float
    candidate_margin: float


def build_class_changes(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], targets: NDArray[np.int64], labels: Sequence[str]
) -> tuple[ClassChange, ...]:
    """Changes class by class, in the order of ``labels``; classes without images, too.

    Args:
        reference: probabilities (n, classes).
        candidate: the same of the same images.
        targets: true classes (n,).
        labels: class names.

    Raises:
        DataError: the arrays do not belong together, or are not finite.
    """
    _check_answers(reference, candidate, targets, len(labels))
    of_reference, of_candidate = (answers.argmax(axis=1) == targets for answers in (reference, candidate))

    def count(marks: NDArray[np.bool_]) -> list[int]:
        return [int(number) for number in np.bincount(targets[marks], minlength=len(labels))]

    columns = zip(
        labels,
        count(np.ones(len(targets), np.bool_)),
        count(of_reference),
        count(of_candidate),
        count(of_reference & ~of_candidate),
        count(of_candidate & ~of_reference),
        strict=True,
    )
    return tuple(
        ClassChange(label=label, images=images, reference_right=before, candidate_right=after, lost=lost, gained=gained)
        for label, images, before, after, lost, gained in columns
    )


def find_flips(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], targets: NDArray[np.int64], limit: int
) -> tuple[Flip, ...]:
    """Images whose answer changed, the one of which the reference was surest first; at most ``limit``.

    A flip at a margin near 0 is rounding; one at a large margin shows what the candidate broke. Arrays as in
    build_class_changes; equal margins in the order of the images.

    Raises:
        UsageError: ``limit`` is negative.
        DataError: the arrays do not belong together, or are not finite.
    """
    if limit < 0:
        raise UsageError(f"at most {limit} flips are asked for; needed is 0 or more.")
    _check_answers(reference, candidate, targets, reference.shape[-1])
    before, after = reference.argmax(axis=1), candidate.argmax(axis=1)
    rows = np.flatnonzero(before != after)
    if not rows.size:  # as with one class, which has no second to take a margin from
        return ()
    reference_margins, candidate_margins = _margins(reference[rows]), _margins(candidate[rows])
    return tuple(
        Flip(
            image=int(rows[place]),
            true=int(targets[rows[place]]),
            reference=int(before[rows[place]]),
            candidate=int(after[rows[place]]),
            reference_margin=float(reference_margins[place]),
            candidate_margin=float(candidate_margins[place]),
        )
        for place in np.argsort(-reference_margins, kind="stable")[:limit]
    )


def _margins(answers: NDArray[np.float32]) -> NDArray[np.float64]:
    top = np.partition(answers.astype(np.float64), -2, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


def _check_answers(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], targets: NDArray[np.int64], classes: int
) -> None:
    """Raise DataError unless both sides answer the same images with finite numbers for ``classes`` classes."""
    wanted = (len(targets), classes)
    if reference.shape != wanted or candidate.shape != wanted:
        raise DataError(
            f"answers of shape {reference.shape} of the reference and {candidate.shape} of the candidate; needed is "
            f"{wanted} of both: {len(targets)} images, {classes} classes."
        )
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):  # argmax would take NaN for the answer
        raise DataError("answers hold NaN or infinity; needed are probabilities. Look for weights that are not finite.")
    if targets.size and not (targets.min() >= 0 and targets.max() < classes):
        raise DataError(
            f"true classes run from {targets.min()} to {targets.max()}; needed are 0 to {classes - 1}. Use data with "
            "the network's classes."
        )
