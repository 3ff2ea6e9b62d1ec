"""Images in an HDF5 file, in the layout of the public hand-sign files.

==================  ==================================================================================
``train_set_x``     images: uint8 (n, height, width, 3) RGB, or grey (n, height, width[, 1])
``train_set_y``     their class numbers: integers (n,), (1, n) or (n, 1)
``list_classes``    optional; the name of class 0, 1, ...: text or integers (classes,)
==================  ==================================================================================

Test files have ``test_set_x`` and ``test_set_y`` instead; a file may hold both parts. Without ``list_classes``
the names are the numbers, which then have to be 0 to the highest with none left out: a gap nearly always means
labels that count from 1, or that are something else than class numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggedge.data.arrays import PARTS, Part, build_array_set
from vggedge.data.base import ImageSet
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import DataError
from vggedge_runtime.preprocess import ImageSpec

_NAMES = "list_classes"
_LAYOUT = (_NAMES, *(f"{part}_set_{what}" for part in PARTS for what in "xy"))
_SHOWN = 10  # data sets that a message lists

_CACHE_BYTES = 64 * 2**20
"""Of decompressed chunks. A chunk of a compressed file holds parts of many images; the library's own 1 MiB made it
decompress them again for every image, up to 200 times slower."""


@dataclass(frozen=True)
class _Source:
    """An open file: the names of all it holds, and those of the layout's data sets that are there."""

    path: Path
    held: tuple[str, ...]
    datasets: dict[str, Any]


def open_hdf5(path: Path, part: Part | None, spec: ImageSpec) -> ImageSet:
    """Open an HDF5 file of the layout above; images are read one at a time, when asked for.

    Any thread may read, one at a time (the library has a lock); a forked process must open the file again.

    Args:
        path: the file; it stays open for as long as the image set lives.
        part: which images; if None, train where the file has it, else test.
        spec: the size that images are read at.

    Raises:
        DataError: no such file, not HDF5, damaged, or another layout; the message says which data set is wrong.
        MissingDependency: h5py is not installed.
    """
    source = _open_source(path)
    present = [each for each in PARTS if f"{each}_set_x" in source.datasets]
    chosen = part or (present or PARTS)[0]
    images = _find_images(source, chosen)
    numbers = _read_numbers(source, chosen)
    if len(numbers) != len(images):
        raise DataError(
            f"{path}: {chosen}_set_x holds {len(images)} images and {chosen}_set_y {len(numbers)} labels; "
            "needed is one label for each image. Write the file again."
        )
    labels = _read_labels(source, chosen, numbers)

    def read_pixels(index: int) -> NDArray[np.uint8]:
        try:
            return np.asarray(images[index], dtype=np.uint8)
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, f"image {index} of {chosen}_set_x", error) from error

    return build_array_set(f"{path}:{chosen}", labels, numbers.astype(np.int64), read_pixels, spec)


def _open_source(path: Path) -> _Source:
    h5py = require("h5py", "train")
    if not path.exists():
        raise DataError(f"{path}: no such file.")
    if path.is_dir():
        raise DataError(f"{path}: a folder, and :train or :test choose a part of an HDF5 file. Leave them out.")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES)
        held = tuple(map(str, file))
        found = {name: file[name] for name in _LAYOUT if name in held}
    # h5py raises nearly anything on a damaged file: which of HDF5's structures is hit decides.
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as HDF5 ({error}). The file is damaged, truncated, being written, or no "
            "HDF5 file: get it again, or write it again."
        ) from error
    for name, dataset in found.items():
        if not isinstance(dataset, h5py.Dataset):
            raise DataError(
                f"{path}: {name} is a {type(dataset).__name__.lower()}; needed is a data set. Choose another file."
            )
    return _Source(path, held, found)


def _find_images(source: _Source, part: Part) -> Any:
    """The data set of images, of a shape and type that can be read."""
    name = f"{part}_set_x"
    images = source.datasets.get(name)
    if images is None:
        raise _missing(source, part, name)
    shape: tuple[int, ...] = images.shape or ()
    is_picture = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if not is_picture or 0 in shape:
        raise DataError(
            f"{source.path}: {name} has the shape {shape}; needed is (n, height, width, 3) for RGB, or "
            "(n, height, width) or (n, height, width, 1) for grey, with at least 1 image. Write the images "
            "again in that order."
        )
    if images.dtype != np.uint8:
        raise DataError(
            f"{source.path}: {name} is {images.dtype}; needed are uint8 pixels from 0 to 255, because floats may "
            "have been scaled already and nothing says how. Undo the scaling and write the images as uint8."
        )
    return images


def _read_numbers(source: _Source, part: Part) -> NDArray[np.integer[Any]]:
    """Class numbers (n,) of a part, none of them negative."""
    name = f"{part}_set_y"
    dataset = source.datasets.get(name)
    if dataset is None:
        raise _missing(source, part, name)
    numbers = _read_vector(source, name, dataset)
    if numbers.dtype.kind not in "iu":
        raise DataError(
            f"{source.path}: {name} is {numbers.dtype}; needed are class numbers of an integer type, 0 for the first "
            "class. Write them as int64."
        )
    if numbers.size and int(numbers.min()) < 0:
        raise DataError(
            f"{source.path}: {name} holds {numbers.min()} (image {int(numbers.argmin())}); class numbers start at 0. "
            "Correct the label or leave the image out."
        )
    return numbers


def _read_labels(source: _Source, part: Part, numbers: NDArray[np.integer[Any]]) -> tuple[str, ...]:
    """Class names: from list_classes, else the numbers themselves."""
    if _NAMES in source.datasets:
        labels = _read_names(source, numbers)
        highest = int(numbers.max())
        if highest >= len(labels):
            raise DataError(
                f"{source.path}: {part}_set_y holds {highest} (image {int(numbers.argmax())}), and {_NAMES} has "
                f"{len(labels)} names, for the numbers 0 to {len(labels) - 1}. Correct the label or add the name."
            )
    else:
        # Of both parts, so that both have the same classes.
        other = [_read_numbers(source, each) for each in PARTS if each != part and f"{each}_set_y" in source.datasets]
        labels = _number_labels(source, np.concatenate([numbers, *other]))
    if len(labels) < 2:
        raise DataError(f"{source.path}: one class, {labels[0]!r}; a classifier needs at least 2. Add another class.")
    return labels


def _number_labels(source: _Source, numbers: NDArray[np.integer[Any]]) -> tuple[str, ...]:
    found = np.unique(numbers).tolist()
    missing = next((place for place, number in enumerate(found) if place != number), None)
    if missing is not None:
        raise DataError(
            f"{source.path}: no image of class {missing}, and the labels go up to {found[-1]}; without {_NAMES} they "
            f"have to be 0, 1, 2, ... with none left out. Add {_NAMES} with a name for each number, or renumber."
        )
    return tuple(map(str, range(len(found))))


def _read_names(source: _Source, numbers: NDArray[np.integer[Any]]) -> tuple[str, ...]:
    values = _read_vector(source, _NAMES, source.datasets[_NAMES])
    _check_places(source, values, numbers)
    names = tuple(_decode_name(source, place, each) for place, each in enumerate(values.tolist()))
    if not names:
        raise DataError(f"{source.path}: {_NAMES} is empty; needed is a name for every class, or no {_NAMES}.")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(f"{source.path}: {_NAMES} holds {twice!r} twice; every class needs a name of its own.")
    return names


def _check_places(source: _Source, values: NDArray[Any], numbers: NDArray[np.integer[Any]]) -> None:
    """Refuse integer names such as 1 to 6 where the labels could mean their values as well as their places."""
    is_doubtful = values.dtype.kind in "iu" and not np.array_equal(values, np.arange(len(values)))
    if is_doubtful and np.isin(numbers, values).all():
        raise DataError(
            f"{source.path}: {_NAMES} is {values.tolist()} and every label is one of these, so a label may be a place "
            f"in that list, counted from 0, or a value of it. Number the labels by place and write {_NAMES} as text."
        )


def _decode_name(source: _Source, place: int, value: object) -> str:
    try:
        name = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: {_NAMES} is no UTF-8 text ({error}). Write the names as UTF-8.") from error
    if not isinstance(value, (bytes, str, int)) or not name.strip() or not name.isprintable():
        raise DataError(
            f"{source.path}: name {place} of {_NAMES} is {name!r}; needed is one line of printable text, or an "
            "integer. Correct the name."
        )
    # Such a name leads out of the folder that somebody writes images into by class.
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise DataError(f"{source.path}: {_NAMES} holds {name!r}, which is a path; needed are plain names. Rename it.")
    return name


def _read_vector(source: _Source, name: str, dataset: Any) -> NDArray[Any]:
    """A data set of shape (n,), (1, n) or (n, 1), as (n,)."""
    shape: tuple[int, ...] = dataset.shape or ()
    if len(shape) != 1 and not (len(shape) == 2 and 1 in shape):
        raise DataError(
            f"{source.path}: {name} has the shape {shape}; needed is (n,), (1, n) or (n, 1): one value for each, "
            "no one-hot rows. Write it again in that shape."
        )
    try:
        return np.asarray(dataset[()]).reshape(-1)
    except Exception as error:  # as in _open_source
        raise _unreadable(source.path, name, error) from error


def _missing(source: _Source, part: Part, name: str) -> DataError:
    listed = ", ".join(source.held[:_SHOWN]) + (", ..." if len(source.held) > _SHOWN else "")
    return DataError(
        f"{source.path}: no data set {name}; the file holds {listed or 'nothing'}. Needed are {part}_set_x with "
        f"uint8 images (n, height, width, 3) and {part}_set_y with their class numbers. Rename the data sets, or "
        "choose another file or part (FILE.h5:train, FILE.h5:test)."
    )


def _unreadable(path: Path, what: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: {what} cannot be read ({error}). The file is damaged, or compressed with a filter that is not "
        "installed: get it again, or write it again with gzip."
    )
