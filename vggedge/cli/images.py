"""vggedge images: what the network is shown, as files."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vggedge.architecture import parse_input
from vggedge.cli import output
from vggedge.data import ImageSet, open_images
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.progress import Advance

NAME = "images"


def command(
    data: Annotated[
        str, typer.Argument(help="DATA: a folder with a sub-folder a class, fingers:24@7, FILE.h5 or keras:NAME.")
    ],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    size: Annotated[str, typer.Option(help="Size of the network's input, HEIGHTxWIDTH.")] = "64x64",
    json: output.JsonFlag = False,
) -> None:
    """Write DATA as PNG files, a sub-folder a class, decoded and resized as training and inference see it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty. Name a new folder.")
    height, width, _ = parse_input(size)
    images = open_images(data, ImageSpec(height=height, width=width))
    output.print_skipped(images.skipped)
    with output.progress(quiet=json) as advance:
        names = _write(images, folder.resolve(), advance)
    if json:
        output.print_json([str(folder / name) for name in names])
    else:
        output.print_line(f"{len(names)} images of {len(images.labels)} classes in {folder}")


def _write(images: ImageSet, folder: Path, advance: Advance) -> list[str]:
    """Names of the files in ``folder``; it is complete or not there, because it is written beside and renamed."""
    folders = _folder_names(images.labels)
    names = [f"{folders[target]}/{index:06d}.png" for index, target in enumerate(images.targets)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder.parent}: the folder cannot be made ({error.strerror}). Choose another.") from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        content = Path(staging) / "content"  # a folder of its own: the staging folder is not for others to read
        for each in folders:
            (content / each).mkdir(parents=True)
        for index, name in enumerate(names):
            Image.fromarray(images.read_one(index)).save(content / name)
            advance(index + 1, len(names), "writing")
        content.rename(folder)
    return names


def _folder_names(labels: tuple[str, ...]) -> list[str]:
    """A folder for each label, none of them a path, hidden or twice: Fashion-MNIST has a class T-shirt/top."""
    names: list[str] = []
    for label in labels:
        name = plain = re.sub(r"^\.|[/\\\0]", "_", label)
        number = 1
        while name in names:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return names
