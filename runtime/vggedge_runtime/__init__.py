"""What a device needs to run a bundle. Imports NumPy, Pillow and msgspec, nothing heavier."""

from __future__ import annotations

from vggedge_runtime.bundle import Bundle
from vggedge_runtime.errors import VggedgeError
from vggedge_runtime.preprocess import ImageSpec, read_image
from vggedge_runtime.session import Session

__all__ = ["Bundle", "ImageSpec", "Session", "VggedgeError", "read_image"]
