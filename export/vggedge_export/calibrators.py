"""From a histogram of an activation's magnitudes to the largest one that INT8 represents.

The grid is symmetric: scale = magnitude / 127, values are rounded to a multiple of it, half to even, and clipped at
127 steps. A larger magnitude clips less and rounds more; the four calibrators weigh the two differently. All are
deterministic and know a histogram only: what lies inside a bin is taken as spread evenly. Thresholds are multiples of
``largest / BINS``, so that answers scale with ``largest``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vggedge_runtime.errors import ConversionError

BINS = 2048
"""As many as TensorRT's entropy calibrator takes; 16 for every step of the grid when nothing is clipped."""

_STEPS = 127  # of the grid on either side of 0
_LEVELS = 128  # of the entropy calibrator: the magnitudes 0 to 127, and so the fewest bins that it can keep
_CUT_PER = 10_000  # percentile: one magnitude of so many may be clipped
_UNSEEN = 0.5  # magnitudes that an empty bin of a finite sample counts as (Krichevsky & Trofimov 1981)
_SMALLEST_BINS = math.ceil(BINS / 100)  # mse: thresholds below 1 % of the largest magnitude are not tried
_BLOCK = 64  # mse: thresholds at a time; with their 2049 edges 1 MB, which stays in the cache


@dataclass(frozen=True)
class Histogram:
    """How often each magnitude occurs in a tensor, over all calibration images.

    Attributes:
        counts: int64 (BINS,): magnitudes in equal bins over (0, largest]. Zeros are left out: every scale represents
            them exactly, and after a relu they are half of all values and would drown the rest.
        largest: the largest magnitude.
    """

    counts: NDArray[np.int64]
    largest: float

    def __post_init__(self) -> None:
        if self.counts.shape != (BINS,) or not np.issubdtype(self.counts.dtype, np.integer) or self.counts.min() < 0:
            raise ConversionError(
                f"a histogram of shape {self.counts.shape} and type {self.counts.dtype}; needed are {BINS} counts of 0 "
                "or more."
            )
        if not (math.isfinite(self.largest) and self.largest > 0 and self.counts.any()):
            raise ConversionError(
                f"a histogram of {np.count_nonzero(self.counts)} occupied bins up to a magnitude of {self.largest}; "
                "needed is at least one bin, and a finite magnitude above 0, or no INT8 scale can be found. Look "
                "whether the layer is dead or not finite."
            )


def max_magnitude(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped.

    Good where every value counts and none is far above the rest, as after a softmax or for normalised images, and as
    the one to start from. A single outlier coarsens the steps of all others.
    """
    return histogram.largest


def percentile_magnitude(histogram: Histogram) -> float:
    """The magnitude that 99.99 % of the others do not exceed, to the upper edge of its bin.

    Source: McKinstry et al. 2018, "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient
    Embedded Inference" (arXiv 1809.04191); Wu et al. 2020 (arXiv 2004.09602) compare several percentiles. Good against
    rare outliers, however far away; blind to what clipping costs. Of fewer than 10,000 magnitudes it clips none.
    """
    counts = histogram.counts.tolist()  # Python's integers: no sum overflows, and the limit is exact
    total = sum(counts)
    kept = total - total // _CUT_PER
    bins = next(index for index, below in enumerate(itertools.accumulate(counts), start=1) if below >= kept)
    return _magnitude(bins, histogram)


def entropy_magnitude(histogram: Histogram) -> float:
    """The threshold whose quantised distribution diverges least, by Kullback & Leibler, from the clipped one.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017: for every threshold from 128 bins on, P
    holds the bins below it, and what is clipped in the last of them; Q holds the same bins without the clipped, merged
    into 128 levels, each level spread evenly over those of its bins that are not empty.

    Two things differ, and only where the slides' rule breaks down. Q is a share of all magnitudes, not of those below
    the threshold: renormalised, a threshold just above the lowest bin that is occupied would have divergence 0 and
    clip everything. And a last bin that is empty, as between the bulk and an outlier, counts as half a magnitude in Q,
    or every such threshold would diverge infinitely.

    Good for bell-shaped and long-tailed activations of convolutions, for which it was made. It works on 128 bins at
    least, and so keeps 1/16 of the largest magnitude, however rare the outlier.
    """
    counts = histogram.counts.astype(np.float64)
    below = _sums_to(counts)
    total = below[-1]
    kept = np.arange(_LEVELS, BINS + 1)  # bins below each threshold
    edges = -(-kept[:, None] * np.arange(_LEVELS + 1) // _LEVELS)  # bins of each level: bin j is in level 128 j // kept
    inside = below[edges]
    occupied = _sums_to((counts > 0).astype(np.float64))[edges]
    in_level, bins_of_level = np.diff(inside, axis=1), np.diff(occupied, axis=1)
    last, clipped = counts[kept - 1], total - inside[:, -1]
    # Of P log P and P log Q the sums over whole levels; the last bin, which P has more in, is counted singly.
    own = _sums_to(_times_log(counts, counts))[kept - 1]
    spread = _times_log(in_level, in_level / np.maximum(bins_of_level, 1))
    of_last = in_level[:, -1] / np.maximum(bins_of_level[:, -1], 1)
    crossed = spread.sum(axis=1) - _times_log(last, of_last)
    with_clipped = last + clipped
    at_last = np.where(last > 0, of_last, _UNSEEN)
    divergence = (own - crossed + _times_log(with_clipped, with_clipped) - _times_log(with_clipped, at_last)) / total
    divergence[divergence < 1e-12] = 0  # rounding, which must not choose among thresholds that lose nothing
    return _magnitude(int(kept[divergence.argmin()]), histogram)


def mse_magnitude(histogram: Histogram) -> float:
    """The threshold of least mean squared error, from rounding and clipping together, over a grid of thresholds.

    Source of the criterion: Max 1960, "Quantizing for Minimum Distortion"; for networks, Choukroun et al. 2019,
    "Low-bit Quantization of Neural Networks for Efficient Inference" (arXiv 1902.06822). Good where the values
    themselves matter and any shape may come: it weighs an outlier by its square, and so clips a few large ones less
    than percentile and entropy do. Which values decide the answer it does not know.

    The error is integrated over each bin and not taken at its centre: where the grid's step is near the bins' width,
    as for thresholds of some 127 bins, centres fall onto the same places of every step and their error is off by up
    to a factor of three: a normal distribution with sigma 70 bins would get a threshold with 14 % more error. With
    y = x / scale and n the step that y is quantised to, the integral from 0 to x is
    scale^3 (n / 12 + (y - n)^3 / 3), clipped or not.
    """
    shares = histogram.counts / histogram.counts.sum(dtype=np.float64)
    weights = -np.diff(shares, prepend=0, append=0)  # of the integral up to each edge: below it minus above it
    edges = np.flatnonzero(weights)  # most of a sparse histogram's have none
    weights, positions = weights[edges], edges.astype(np.float64)
    candidates = np.arange(_SMALLEST_BINS, BINS + 1)
    errors = [
        _squared_errors(candidates[start : start + _BLOCK] / _STEPS, positions, weights)
        for start in range(0, len(candidates), _BLOCK)
    ]
    return _magnitude(int(candidates[np.concatenate(errors).argmin()]), histogram)


CALIBRATORS: dict[str, Callable[[Histogram], float]] = {
    "max": max_magnitude,
    "percentile": percentile_magnitude,
    "entropy": entropy_magnitude,
    "mse": mse_magnitude,
}
"""By name; each returns a magnitude above 0 and up to ``largest``."""


def _magnitude(bins: int, histogram: Histogram) -> float:
    return bins / BINS * histogram.largest


def _sums_to(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the first k values, for k from 0 to all."""
    return np.concatenate(([0.0], np.cumsum(values)))


def _times_log(factor: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    """``factor * log(of)``; 0 where ``of`` is, where ``factor`` is, too."""
    return factor * np.log(np.where(of > 0, of, 1.0))


def _squared_errors(
    scales: NDArray[np.float64], positions: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean squared error at each scale, (scales,); everything in bins."""
    y = positions / scales[:, None]
    steps = np.minimum(np.rint(y), _STEPS)
    y -= steps
    return scales**3 * ((steps @ weights) / 12 + ((y * y * y) @ weights) / 3)
