"""The weights that keras.applications offers for download, trained on ImageNet, and the names of its 1000 classes."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from vggedge.model import import_keras
from vggedge.weights.checkpoint import Checkpoint
from vggedge.weights.keras_files import read_keras_model
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.progress import Advance, ignore_progress

NAME = "imagenet"
MODELS = ("vgg16", "vgg19")
_CLASSES = 1000


def download_imagenet(
    model: str = "vgg16", *, top: bool = True, advance: Advance = ignore_progress
) -> tuple[Checkpoint, tuple[str, ...] | None]:
    """Fetch ``vgg16`` or ``vgg19``, from the network or from Keras's cache, and the names of its classes.

    Args:
        model: one of MODELS.
        top: with the dense layers; without them the download is a tenth, and there are no class names.
        advance: told of each step.

    Raises:
        UsageError: no such model.
        ModelError: the download failed.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    if model not in MODELS:
        raise UsageError(f"keras.applications has no model {model!r} here; known are {', '.join(MODELS)}.")
    advance(0, 1, "loading TensorFlow")
    applications = import_keras().applications
    advance(1, 1, "loading TensorFlow")
    build = {"vgg16": applications.VGG16, "vgg19": applications.VGG19}[model]
    advance(0, 1, f"fetching {model}")
    with _fetching(f"the {NAME} weights of {model}"):
        fetched = build(weights="imagenet", include_top=top)
    advance(1, 1, f"fetching {model}")
    checkpoint = read_keras_model(fetched, f"{NAME} {model}", top=top)
    if not top:
        return checkpoint, None
    with _fetching("the names of the ImageNet classes"):
        names = applications.vgg16.decode_predictions(np.eye(_CLASSES, dtype=np.float32), top=1)
    return checkpoint, _unique_labels([best[0][:2] for best in names])


@contextlib.contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Keras's progress goes to stderr, its failures become a ModelError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # Keras wraps what the network answers into a bare Exception
        raise ModelError(
            f"{what} could not be fetched ({error}). Try again with a network, or fetch the .h5 file elsewhere and "
            "give vggedge import-weights its name."
        ) from error


def _unique_labels(names: list[Any]) -> tuple[str, ...]:
    """Labels from pairs of (WordNet id, name); two classes are called crane and two maillot, which get their id."""
    count = Counter(name for _, name in names)
    return tuple(name if count[name] == 1 else f"{name} {synset}" for synset, name in names)
