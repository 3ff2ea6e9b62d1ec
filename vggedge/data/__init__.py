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
==========================  =========================================================================

The names come first: a folder that is called ``fingers`` is reached as ``./fingers``.
"""

from __future__ import annotations

import re
from pathlib import Path

from vggedge.data.base import ImageSet
from vggedge.data.fingers import SEED_LIMIT, open_fingers
from vggedge.data.folder import open_folder
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

__all__ = ["DEFAULT_COUNT", "ImageSet", "open_images"]

DEFAULT_COUNT = 6000
_COUNT_LIMIT = 10_000_000
_GRAMMAR = "fingers[:COUNT][@SEED] or fingers-hard[:COUNT][@SEED], such as fingers:5000@1"
_FINGERS = re.compile(r"(fingers(?:-hard)?)(?::([^@]*))?(?:@(.*))?")


def open_images(data: str, spec: ImageSpec) -> ImageSet:
    """Open what the user named; nothing is decoded or drawn yet.

    Args:
        data: one of the forms above.
        spec: the size that images are read at.

    Raises:
        UsageError: ``data`` is empty, has a bad count or seed, or is a form that does not exist yet.
        DataError: the folder is missing or does not hold one sub-folder a class.
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
    _check_supported(data)
    return open_folder(Path(data), spec, name=data)


def _parse(data: str, what: str, text: str, least: int, most: int) -> int:
    # ASCII digits only: int() would also take 1_000, " 5" and other scripts' digits.
    if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise UsageError(
            f"{data}: the {what} is {text!r}; needed is a whole number from {least} to {most}. The form is {_GRAMMAR}."
        )
    return int(text)


def _check_supported(data: str) -> None:
    if not data.strip():
        raise UsageError(f"DATA is {data!r}; needed is {_GRAMMAR}, or a folder with one sub-folder a class.")
    if data.startswith("keras:"):
        form = "a data set of Keras by name"
    elif data.lower().endswith((".h5", ".hdf5")) and not Path(data).is_dir():
        form = "an HDF5 file"
    else:
        return
    raise UsageError(
        f"{data}: {form} cannot be read yet. Write its images as PNG files into one sub-folder a class "
        f"and give that folder, or use {_GRAMMAR}."
    )
