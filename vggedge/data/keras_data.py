"""The image data sets that Keras downloads by name."""

from __future__ import annotations

import contextlib
import difflib
import sys

import numpy as np

from vggedge.data.arrays import PARTS, Part, build_array_set
from vggedge.data.base import ImageSet
from vggedge.model import import_keras
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import ImageSpec

_DIGITS = tuple("0123456789")

# Names in the order of the class numbers, as the authors publish them: Krizhevsky 2009 (CIFAR), Xiao, Rasul and
# Vollgraf 2017 (arXiv 1708.07747). The 100 fine classes of CIFAR-100 keep their numbers.
LABELS: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(map(str, range(100))),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "mnist": _DIGITS,
}
"""Class names of every data set that can be named."""


def open_keras(name: str, part: Part | None, spec: ImageSpec) -> ImageSet:
    """Load a data set through Keras, which downloads it the first time and keeps it; one part stays in memory.

    Args:
        name: a key of ``LABELS``.
        part: train if None.
        spec: the size that images are read at.

    Raises:
        UsageError: no such data set; the message names the closest and lists all.
        DataError: it could not be downloaded, or the kept copy could not be read.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    if name not in LABELS:
        near = difflib.get_close_matches(name.lower(), LABELS, n=1)
        hint = f" Did you mean keras:{near[0]}?" if near else ""
        raise UsageError(f"no data set of Keras is called {name!r}.{hint} Known are: {', '.join(LABELS)}.")
    module = getattr(import_keras().datasets, name)
    try:
        # Keras writes the progress of a download to stdout, where results belong.
        with contextlib.redirect_stdout(sys.stderr):
            loaded = module.load_data()
    # Keras raises a bare Exception for a failed download, and what its readers raise for a damaged file.
    except Exception as error:
        raise DataError(
            f"keras:{name}: could not be downloaded or read ({str(error) or type(error).__name__}). Needed is a "
            "network connection the first time; Keras then keeps the data in ~/.keras/datasets, or "
            "$KERAS_HOME/datasets. Try again with a connection, copy that folder from a machine that has the data, or "
            "name a folder of images instead."
        ) from error
    chosen = part or PARTS[0]
    images, numbers = loaded[PARTS.index(chosen)]
    return build_array_set(
        f"keras:{name}:{chosen}",
        LABELS[name],
        np.asarray(numbers, dtype=np.int64).reshape(-1),  # (n,) or (n, 1)
        lambda index: np.asarray(images[index], dtype=np.uint8),
        spec,
    )
