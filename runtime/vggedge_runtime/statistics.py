"""Numbers about numbers: intervals and percentiles as pure functions over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


class Proportion(msgspec.Struct, frozen=True):
    """``count`` successes of ``n``, with the 95 % interval that belongs to them.

    Attributes:
        count: successes.
        n: trials.
        low: lower end of the Wilson score interval (Wilson 1927), 0 to 1.
        high: upper end, 0 to 1.
    """

    count: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """``count / n``, 0 to 1."""
        return self.count / self.n

    def __str__(self) -> str:
        return f"{100 * self.share:.2f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def build_proportion(count: int, n: int) -> Proportion:
    """Proportion with its 95 % Wilson interval; right near 0 and 1, where count/n +- 2 sigma is not."""
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is no proportion")
    share, z2 = count / n, _Z95 * _Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    spread = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Proportion(count, n, max(0.0, centre - spread), min(1.0, centre + spread))


def samples_needed(percentile: float) -> int:
    """Fewest samples for which at least ten lie above the percentile: 20 for p50, 1000 for p99."""
    return math.ceil(round(10 / (1 - percentile / 100), 6))


def percentiles(
    samples: Sequence[float] | NDArray[np.float64], wanted: Sequence[float] = PERCENTILES
) -> dict[str, float | None]:
    """Percentiles by linear interpolation (Hyndman & Fan type 7), as ``{"p50": ...}``.

    One that the samples are too few for (see samples_needed) is None: an unsupported tail figure is worse
    than none.
    """
    values = np.asarray(samples, dtype=np.float64)
    enough = {p: values.size >= samples_needed(p) for p in wanted}
    return {f"p{p:g}": float(np.percentile(values, p)) if enough[p] else None for p in wanted}


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How one class fared. Shares from 0 to 1; None where there is nothing to divide by.

    Attributes:
        label: its name.
        images: how many are of this class.
        answered: how many were said to be.
        recall: right answers among ``images``.
        precision: right answers among ``answered``.
        f1: harmonic mean of both: 2 * right / (images + answered).
    """

    label: str
    images: int
    answered: int
    recall: float | None
    precision: float | None
    f1: float | None


def build_class_figures(confusion: NDArray[np.int64], labels: Sequence[str]) -> tuple[ClassFigures, ...]:
    """Figures of each class from a confusion matrix, (classes, classes): rows true, columns answered."""
    right, images, answered = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        ClassFigures(
            label=label,
            images=int(images[index]),
            answered=int(answered[index]),
            recall=_share(right[index], images[index]),
            precision=_share(right[index], answered[index]),
            f1=_share(2 * right[index], images[index] + answered[index]),
        )
        for index, label in enumerate(labels)
    )


def _share(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
