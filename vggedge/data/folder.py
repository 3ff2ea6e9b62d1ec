"""A folder of photographs: one sub-folder a class, images of any size and mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggedge.data.base import ImageSet
from vggedge_runtime.errors import DataError
from vggedge_runtime.preprocess import (
    IMAGE_SUFFIXES,
    ImageSpec,
    Pixels,
    find_images,
    find_other_files,
    read_image,
    read_scaled_image,
)

_WANTED = "Needed is one sub-folder a class, such as cats/1.jpg and dogs/1.jpg."


def open_folder(folder: Path, spec: ImageSpec, *, name: str | None = None) -> ImageSet:
    """List a folder's images; they are decoded when read.

    Labels are the names of the sub-folders in sorted order; hidden ones do not count. Images may lie
    deeper inside a class's folder. Two files with the same content stay two images.

    Args:
        folder: holds the classes' folders.
        spec: the size that images are read at.
        name: what the user typed, for messages; the path if None.

    Raises:
        DataError: no such folder, fewer than two classes, or a class without images. A file that is no
            image is found when it is read, and named then.
    """
    classes = _find_classes(folder)
    files = {path.name: find_images(path) for path in classes}
    _check_classes(folder, files)
    paths = [path for members in files.values() for path in members]
    counts = [len(members) for members in files.values()]

    def read_one(index: int) -> Pixels:
        return read_image(paths[index], spec)

    return ImageSet(
        name=name or str(folder),
        labels=tuple(files),
        targets=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
        read_one=read_one,
        read_scaled=lambda index, side: read_scaled_image(paths[index], side, spec.kernel),
        name_one=lambda index: str(paths[index]),
        skipped=tuple(path for each in classes for path in find_other_files(each)),
    )


def _find_classes(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder. {_WANTED}")
    if not folder.is_dir():
        raise DataError(f"{folder}: a file, not a folder. {_WANTED} Give the folder that holds them.")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_classes(folder: Path, files: dict[str, list[Path]]) -> None:
    if not files:
        loose = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        found = f"{loose} image(s) directly in it and no sub-folder" if loose else "no sub-folder and no image"
        advice = "Sort the images into one sub-folder for each class." if loose else "Check the path."
        raise DataError(f"{folder}: {found}. {_WANTED} {advice}")
    if len(files) == 1:
        raise DataError(
            f"{folder}: one class, {next(iter(files))!r}; a classifier needs at least 2. {_WANTED} "
            "If this is the folder of one class, give the folder above it."
        )
    empty = [label for label, members in files.items() if not members]
    if empty:
        names = ", ".join(str(folder / label) for label in empty)
        raise DataError(
            f"{names}: no image in this class folder (suffixes {', '.join(sorted(IMAGE_SUFFIXES))}). "
            "Every class needs at least 1: add images or remove the folder."
        )
