"""Image sources for training, calibration and evaluation.

Every command that takes images takes ``DATA``, in one of these forms:

==========================  =========================================================================
``fingers``                 drawn hands that show 0 to 5 fingers, six classes: 6000 images of seed 0
``fingers:N``               the first N of them
``fingers:N@SEED``          N images of another seed; seeds share no image, so one can test what
                            another has trained
``fingers@SEED``            6000 images of that seed
``fingers-hard...``         the same four forms: any fingers, either hand, strong rotation, clutter
``FOLDER``                  one sub-folder a class, images of any size
``FILE.h5``                 an HDF5 file, also ``.hdf5``, laid out as :mod:`vggedge.data.hdf5` says: its
                            train part, or its test part if it has no other
``FILE.h5:test``            its test part (``:train``: its train part)
``keras:NAME``              the train part of cifar10, cifar100, fashion_mnist or mnist, which Keras
                            downloads the first time
``keras:NAME:test``         its test part (``:train``: its train part)
==========================  =========================================================================

The names come first: a folder that is called ``fingers`` is reached as ``./fingers``. A folder whose name ends
in ``.h5`` is a folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from vggedge.data.arrays import PARTS, Part
from vggedge.data.base import ImageSet
from vggedge.data.fingers import SEED_LIMIT, open_fingers
from vggedge.data.folder import open_folder
from vggedge.data.hdf5 import open_hdf5
from vggedge.data.keras_data import open_keras
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

__all__ = ["DEFAULT_COUNT", "ImageSet", "open_images"]

DEFAULT_COUNT = 6000
_COUNT_LIMIT = 10_000_000
_GRAMMAR = "fingers[:COUNT][@SEED] or fingers-hard[:COUNT][@SEED], such as fingers:5000@1"
_FINGERS = re.compile(r"(fingers(?:-hard)?)(?::([^@]*))?(?:@(.*))?")
_KERAS = re.compile(r"keras:([^:]*)(?::(.*))?")
_HDF5 = re.compile(r"(.*\.(?:h5|hdf5))(?::([^/\\]*))?", re.IGNORECASE)


def open_images(data: str, spec: ImageSpec) -> ImageSet:
    """Open what the user named; nothing is decoded or drawn yet.

    Args:
        data: one of the forms above.
        spec: the size that images are read at.

    Raises:
        UsageError: ``data`` is empty, has a bad count, seed or part, or names no data set of Keras.
        DataError: the folder or file is missing or laid out otherwise, or the data set cannot be downloaded.
        MissingDependency: an HDF5 file without h5py, or ``keras:`` without TensorFlow and Keras.
    """
    match = _FINGERS.fullmatch(data)
    if match:
        level, count, seed = match.groups()
        return open_fingers(
            DEFAULT_COUNT if count is None else _parse(data, "count", count, 1, _COUNT_LIMIT),
            0 if seed is None else _parse(data, "seed", seed, 0, SEED_LIMIT - 1),
            spec,
            hard=level == "fingers-hard",
        )
    match = _KERAS.fullmatch(data)
    if match:
        return open_keras(match[1], _parse_part(data, match[2]), spec)
    if not data.strip():
        raise UsageError(
            f"DATA is {data!r}; needed is {_GRAMMAR}, a folder with one sub-folder a class, FILE.h5 or keras:NAME."
        )
    match = _HDF5.fullmatch(data)
    if match and not Path(data).is_dir():
        return open_hdf5(Path(match[1]), _parse_part(data, match[2]), spec)
    return open_folder(Path(data), spec, name=data)


def _parse(data: str, what: str, text: str, least: int, most: int) -> int:
    # ASCII digits only: int() would also take 1_000, " 5" and other scripts' digits.
    if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise UsageError(
            f"{data}: the {what} is {text!r}; needed is a whole number from {least} to {most}. The form is {_GRAMMAR}."
        )
    return int(text)


def _parse_part(data: str, text: str | None) -> Part | None:
    if text is None:
        return None
    for part in PARTS:
        if text == part:
            return part
    raise UsageError(
        f"{data}: the part is {text!r}; needed is {' or '.join(PARTS)}, such as {data.removesuffix(text)}test."
    )
