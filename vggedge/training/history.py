"""How a model came about: the figures of each epoch, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from vggedge.architecture import VggSpec
from vggedge.model import HISTORY_SUFFIX
from vggedge.training.config import TrainConfig
from vggedge_runtime.errors import ModelError


class EpochFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch. Losses are mean cross-entropies in nats, accuracies shares.

    ``loss`` and ``accuracy`` are means over the epoch, with dropout and augmentation and while the weights changed;
    ``val_loss`` and ``val_accuracy`` are of the weights at its end. ``learning_rate`` is that of its last step.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a network's first weights came from, if they were not drawn.

    Attributes:
        kind: ``transfer`` or ``initial``, see ``vggedge.training.transfer.Start``.
        model: name of the file.
        weights_sha256: of the copied weights.
        layers: those whose weights were copied.
        frozen_stages: so many stages, counted from the images, kept them.
    """

    kind: Literal["transfer", "initial"]
    model: str
    weights_sha256: str
    layers: tuple[str, ...]
    frozen_stages: int


class History(msgspec.Struct, frozen=True, kw_only=True):
    """How a model came about: what ``MODEL.history.json`` holds.

    Attributes:
        spec: the network.
        config: how it was trained.
        data: name of the image set.
        training_images: images it learnt from.
        validation_images: images that judged it, of the same set.
        epochs: figures of every epoch that was run.
        best_epoch: the epoch, counted from 1, whose weights the model has: least validation loss.
        seconds: in all, with reading the images and loading TensorFlow; of a training that was stopped, without
            what went on after its last checkpoint.
        versions: of vggedge, keras and tensorflow.
        origin: where its first weights came from; None if they were drawn.
    """

    spec: VggSpec
    config: TrainConfig
    data: str
    training_images: int
    validation_images: int
    epochs: tuple[EpochFigures, ...]
    best_epoch: int
    seconds: float
    versions: dict[str, str | None]
    origin: Origin | None = None

    @property
    def best(self) -> EpochFigures:
        """The epoch whose weights the model has."""
        return self.epochs[self.best_epoch - 1]


def write_history(history: History, model_path: Path) -> Path:
    """Write ``MODEL.history.json`` beside ``MODEL.keras``, complete or not at all; returns its path.

    Raises:
        ModelError: the disk refused.
    """
    content = msgspec.json.format(msgspec.json.encode(history), indent=2) + b"\n"
    return write_whole(model_path.with_suffix(HISTORY_SUFFIX), content)


def write_whole(path: Path, content: bytes) -> Path:
    """Write a small file, complete or not at all; returns its path.

    Raises:
        ModelError: the disk refused.
    """
    partial = path.with_name(f".{path.name}.partial")  # one name: a killed writing leaves one at most
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error}). Check space and permissions.") from error
