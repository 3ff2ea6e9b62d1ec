"""From an image file to the bytes a graph takes: decoded, upright, RGB, resized. Once, for everybody.

Training, calibration, evaluation and inference all read images through this file. A second resize
kernel or colour order cannot creep in between them, which is the commonest silent bug of the field.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vggedge_runtime.errors import DataError, UsageError

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8, (height, width, 3) RGB; a batch is (n, height, width, 3)."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

LARGEST_SCALE = 8192
"""Longest shorter side, pixels, to which an image is scaled: 200 MB and more of RGB; more is a slip of the keyboard."""

_SIDECAR_SUFFIXES = frozenset(
    {".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".ini", ".db", ".log"}
)
"""What lies beside images and is not meant as one: notes, labels, annotations, Windows' Thumbs.db."""

Kernel: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

_KERNELS: dict[Kernel, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; 1 and unknown values need nothing."""

_warnings_lock = threading.Lock()  # warnings.catch_warnings changes the whole process

# Pillow reports truncated and malformed files through all of these.
_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


class Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``(pixel - mean) / std`` for each channel, in pixel units (0 to 255).

    Attributes:
        mean: in RGB order, whatever ``order`` is.
        std: likewise.
        order: of the channels that the network takes; ``bgr`` turns them round after normalising. Left out of
            JSON where it is ``rgb``, so that readers which do not know it refuse a BGR spec and no other.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise UsageError(f"Normalization: std is {self.std}; every channel needs a value above 0.")


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an image becomes the graph's input: uint8 RGB of (height, width, 3).

    Attributes:
        height: rows of the network's input, pixels.
        width: columns of the network's input, pixels.
        resize: ``stretch`` ignores the aspect ratio; ``crop`` scales until the image covers the input
            and cuts the centre out.
        scale: with ``crop``: length of the image's shorter side, pixels, at which the centre is cut out; the common
            256 of networks with an input of 224. None covers the input just so.
        kernel: resampling kernel; Pillow's, which widens with the scale and so does not alias.
        normalization: what export adds to the graph's head. None where the model normalises itself,
            as every model trained here does; never both.
    """

    height: int
    width: int
    resize: Literal["stretch", "crop"] = "stretch"
    scale: int | None = None
    kernel: Kernel = "bilinear"
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"ImageSpec: {self.height}x{self.width} is no image size; both must be at least 1.")
        if self.scale is not None and self.resize != "crop":
            raise UsageError(
                f"ImageSpec: scale {self.scale} with resize {self.resize}; it is used only with resize crop."
            )
        if self.scale is not None and self.scale < max(self.height, self.width):
            raise UsageError(
                f"ImageSpec: scale {self.scale} is below the input of {self.height}x{self.width}, which could not be "
                f"cut out; needed is at least {max(self.height, self.width)}."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3)."""
        return (self.height, self.width, 3)

    def describe(self) -> str:
        """What is done to an image, in words."""
        size = f"{self.height}x{self.width}"
        if self.resize == "stretch":
            return f"stretched to {size}"
        return f"centre of {size} at {f'a shorter side of {self.scale}' if self.scale else 'the size that covers it'}"


def read_image(source: str | PathLike[str] | bytes, spec: ImageSpec) -> Pixels:
    """Decode one image file (or its bytes) and fit it to ``spec``.

    EXIF rotation is obeyed. Grey becomes RGB, 16-bit grey is scaled to 8 bits, an alpha channel is
    dropped without blending, as keras.utils.load_img and torchvision's ImageFolder do. Of several frames
    (GIF, TIFF, WebP) the first is read. Above 2 * PIL.Image.MAX_IMAGE_PIXELS, 179 megapixels, a file is refused.

    Raises:
        DataError: the file is missing, empty, truncated, too large or no image; the message names it.
    """
    return fit_image(_decode(source), spec)


def read_scaled_image(source: str | PathLike[str] | bytes, side: int, kernel: Kernel = "bilinear") -> Pixels:
    """Decode one image file (or its bytes) as read_image does, whole: its shorter side becomes ``side`` pixels.

    Raises:
        DataError: as read_image.
    """
    return scale_image(_decode(source), side, kernel)


def _decode(source: str | PathLike[str] | bytes) -> Image.Image:
    """The file's first frame, upright RGB at its own size."""
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    try:
        with _open_image(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            return _upright_rgb(image)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image that Pillow can read. Remove it or convert it to PNG.") from error
    except _PILLOW_ERRORS as error:
        raise DataError(f"{name}: the image cannot be decoded ({error}). Replace or remove the file.") from error


def fit_image(image: Image.Image, spec: ImageSpec) -> Pixels:
    """Resize an upright RGB image to ``spec``; returns (height, width, 3) uint8."""
    if spec.scale is not None:
        whole = scale_image(image, spec.scale, spec.kernel)
        top, left = (whole.shape[0] - spec.height) // 2, (whole.shape[1] - spec.width) // 2
        return np.ascontiguousarray(whole[top : top + spec.height, left : left + spec.width])
    size = (spec.width, spec.height)
    if image.size != size:
        kernel = _KERNELS[spec.kernel]
        image = ImageOps.fit(image, size, kernel) if spec.resize == "crop" else image.resize(size, kernel)
    return np.array(image, dtype=np.uint8)


def scale_image(image: Image.Image, side: int, kernel: Kernel = "bilinear") -> Pixels:
    """Resize an upright RGB image, whole and with its aspect ratio, until its shorter side has ``side`` pixels.

    The other side is rounded. Returns (height, width, 3) uint8.
    """
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    if image.size != size:
        image = image.resize(size, _KERNELS[kernel])
    return np.array(image, dtype=np.uint8)


def check_batch(images: NDArray[np.generic], spec: ImageSpec) -> Pixels:
    """Return ``images`` as an (n, height, width, 3) uint8 batch; one image gains the batch axis.

    Raises:
        DataError: wrong type, rank or size. Nothing is converted: a float array here is nearly always
            an image that somebody has normalised already.
    """
    if images.dtype != np.uint8:
        raise DataError(
            f"images: dtype is {images.dtype}; the graph takes uint8 RGB pixels from 0 to 255 and normalises "
            "them itself. Pass the pixels as they were decoded."
        )
    batch = images[np.newaxis] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1:] != spec.shape or batch.shape[0] == 0:
        raise DataError(
            f"images: shape is {images.shape}; needed is {spec.shape} or (n, {spec.height}, {spec.width}, 3) "
            "with n at least 1. vggedge_runtime.read_image(path, spec) decodes and resizes."
        )
    return np.ascontiguousarray(batch, dtype=np.uint8)


def find_images(folder: Path) -> list[Path]:
    """Image files below ``folder`` by suffix, sorted by path so that the order is the same everywhere.

    Hidden files and folders do not count: tools keep thumbnails and second copies there.
    """
    return [path for path in _visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def find_other_files(folder: Path) -> list[Path]:
    """What ``find_images`` leaves out and the user may have meant as images: .heic, .avif, no suffix, unknown ones.

    Sorted by path; hidden files, notes and annotations (.txt, .csv, .json, .xml, ...) do not count.
    """
    known = IMAGE_SUFFIXES | _SIDECAR_SUFFIXES
    return [path for path in _visible_files(folder) if path.suffix.lower() not in known]


def _visible_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    )


def _open_image(source: Path | io.BytesIO) -> Image.Image:
    """Read the header. Pillow's warning between one and two times its pixel limit is left out: the error decides."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # a truncated file fails here, with its name known
    # Not ImageOps.exif_transpose: it writes the other EXIF entries back and fails where one is malformed.
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own convert() would clip everything above 255 to white.
        deep = np.asarray(image)
        if int(deep.min()) < 0 or int(deep.max()) > 0xFFFF:
            raise ValueError(f"mode {image.mode} with values outside 0..65535")
        image = Image.fromarray((deep // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    image.info.pop("transparency", None)  # dropped as alpha is; convert() would warn about a palette's
    return image if image.mode == "RGB" else image.convert("RGB")
