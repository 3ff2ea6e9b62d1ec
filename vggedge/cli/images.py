"""vggedge images: what the network is shown, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vggedge.architecture import parse_input
from vggedge.cli import output
from vggedge.data import open_images
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

NAME = "images"


def command(
    data: Annotated[str, typer.Argument(help="DATA: a folder with a sub-folder a class, or fingers:24@7.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    size: Annotated[str, typer.Option(help="Size of the network's input, HEIGHTxWIDTH.")] = "64x64",
    json: output.JsonFlag = False,
) -> None:
    """Write DATA as PNG files, a sub-folder a class, decoded and resized as training and inference see it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty. Name a new folder.")
    height, width, _ = parse_input(size)
    images = open_images(data, ImageSpec(height=height, width=width))
    written = []
    with output.progress(quiet=json) as advance:
        for index, target in enumerate(images.targets):
            path = folder / images.labels[target] / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.read_one(index)).save(path)
            written.append(str(path))
            advance(index + 1, len(images), "writing")
    if json:
        output.print_json(written)
    else:
        output.print_line(f"{len(written)} images of {len(images.labels)} classes in {folder}")
