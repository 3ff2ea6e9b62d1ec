"""The image of the golden files, without torch: the tests build it too, so it is not stored."""

from __future__ import annotations

import numpy as np


def build_image() -> np.ndarray:
    """224x224 RGB, uint8, by a formula: waves of another length in each channel."""
    rows, columns = np.mgrid[0:224, 0:224]
    waves = [np.sin(rows / (5 + 3 * channel) + columns / (11 - 2 * channel)) for channel in range(3)]
    return np.round(np.stack(waves, axis=-1) * 120 + 128).astype(np.uint8)
