"""What a training that was stopped needs to go on as if it had not been: one file, written after each epoch.

It holds the weights, those of the best epoch, the optimizer's variables, the state of every random generator in the
network, and what the training is: going on with other data or choices is refused. Order, augmentation, learning rate
and the end of training follow from the epoch and the figures alone, so nothing of theirs is kept.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge.architecture import VggSpec
from vggedge.data.base import ImageSet
from vggedge.training.config import TrainConfig
from vggedge.training.history import EpochFigures, Origin
from vggedge.training.optimization import best_epoch
from vggedge_runtime.errors import ModelError, UsageError

CHECKPOINT_SUFFIX = ".checkpoint.npz"
_FORMAT_VERSION = 1
_FINGERPRINTED = 16  # images whose pixels are looked at: finds another size, resize or folder, and costs no time
_IN_WORDS = {
    "data.name": "DATA",
    "data.count": "the number of images",
    "data.targets_sha256": "the sha256 of the images' classes",
    "data.pixels_sha256": "the sha256 of the pixels of some images",
    "origin.model": "the network to begin with",
    "origin.weights_sha256": "the sha256 of the weights to begin with",
}
"""Parts of a Run that have no option of their own name."""

_DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, msgspec.DecodeError)


class DataFingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Which images a training learns from: all their classes, and the pixels of some, as the network is shown them."""

    name: str
    labels: tuple[str, ...]
    count: int
    targets_sha256: str
    pixels_sha256: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be the same for a training to go on."""

    spec: VggSpec
    config: TrainConfig
    data: DataFingerprint
    origin: Origin | None


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    run: Run
    epochs: tuple[EpochFigures, ...]
    seconds: float


def checkpoint_path(model_path: Path) -> Path:
    """``MODEL.checkpoint.npz`` beside ``MODEL.keras``."""
    return model_path.with_suffix(CHECKPOINT_SUFFIX)


def check_checkpoint(path: Path, *, resume: bool) -> None:
    """Refuse to lose a checkpoint, and to go on without one.

    Raises:
        UsageError: one is there and ``resume`` is False, or none is there and ``resume`` is True.
    """
    if resume and not path.is_file():
        raise UsageError(f"{path}: no checkpoint to resume from. Leave --resume out to start from the first epoch.")
    if path.exists() and not resume:
        raise UsageError(
            f"{path}: a training that was stopped left this checkpoint. Go on with the same command and --resume, or "
            "delete the file to start again."
        )


def fingerprint(data: ImageSet) -> DataFingerprint:
    """Name, labels and targets of ``data``, and the pixels of 16 images spread over it."""
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), _FINGERPRINTED)).round().astype(int))
    pixels = hashlib.sha256()
    for index in chosen:
        pixels.update(data.read_one(int(index)).tobytes())
    return DataFingerprint(
        name=data.name,
        labels=data.labels,
        count=len(data),
        targets_sha256=hashlib.sha256(data.targets.astype("<i8").tobytes()).hexdigest(),
        pixels_sha256=pixels.hexdigest(),
    )


class Checkpoint:
    """The checkpoint file of one training.

    Args:
        path: of the file.
        run: what is trained.

    Attributes:
        path: of the file.
        epochs: what read_figures found: the epochs that were finished.
        earlier_seconds: what they took.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.epochs: tuple[EpochFigures, ...] = ()
        self.path, self._run = path, run
        self.earlier_seconds = 0.0
        self._started = time.perf_counter()

    def read_figures(self) -> None:
        """Read what was done so far, and check that it was of the same training.

        Raises:
            UsageError: there is none, or it is of another training; the message names the first difference.
            ModelError: damaged, or of another version.
        """
        check_checkpoint(self.path, resume=True)
        header = self._read_header()
        was, now = (dict(_flatten(msgspec.to_builtins(each))) for each in (header.run, self._run))
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                what = _IN_WORDS.get(name, name.rpartition(".")[2].replace("_", "-"))
                raise UsageError(
                    f"{self.path}: {what} was {was.get(name)}, now it is {now.get(name)}. Resume with what the "
                    "training began with, or delete the file to start again."
                )
        self.epochs = header.epochs
        self.earlier_seconds = header.seconds

    def restore(self, learner: Any) -> list[NDArray[Any]]:
        """Bring the network and its optimizer into the state of the file; gives the weights of the best epoch.

        Raises:
            ModelError: damaged.
        """
        with self._open() as arrays:
            for part, variables in _variables(learner).items():
                for number, variable in enumerate(variables):
                    variable.assign(arrays[f"{part}/{number}"])
            if best_epoch(self.epochs) == len(self.epochs):
                return list(learner.get_weights())
            return [arrays[f"best/{number}"] for number in range(len(learner.weights))]

    def write(self, learner: Any, epochs: Sequence[EpochFigures], best_weights: Sequence[NDArray[Any]]) -> None:
        """Write the file, complete or not at all.

        Raises:
            ModelError: the disk refused; the last epoch's checkpoint is still there.
        """
        seconds = self.earlier_seconds + time.perf_counter() - self._started
        header = _Header(format_version=_FORMAT_VERSION, run=self._run, epochs=tuple(epochs), seconds=seconds)
        arrays: dict[str, Any] = {"header": np.frombuffer(msgspec.json.encode(header), np.uint8)}
        for part, variables in _variables(learner).items():
            arrays |= {f"{part}/{number}": np.asarray(variable) for number, variable in enumerate(variables)}
        if best_epoch(epochs) != len(epochs):  # else they are the weights, and for a VGG-16 half a gigabyte
            arrays |= {f"best/{number}": weight for number, weight in enumerate(best_weights)}
        partial = self.path.with_name(f".{self.path.name}.partial")  # one name: a killed writing leaves one at most
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be written ({error}). Check space and permissions.") from error
        finally:
            partial.unlink(missing_ok=True)

    def _read_header(self) -> _Header:
        with self._open() as arrays:
            header = msgspec.json.decode(arrays["header"].tobytes(), type=_Header)
        if header.format_version != _FORMAT_VERSION:
            raise ModelError(
                f"{self.path}: format {header.format_version}, this vggedge reads {_FORMAT_VERSION}. Resume with the "
                "version that wrote it, or delete the file to start again."
            )
        return header

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                yield arrays
        except _DAMAGED as error:
            # Without NumPy's own text, which advises to load what looks like a pickle unsafely.
            raise ModelError(f"{self.path}: damaged, or no checkpoint. Delete it to start again.") from error


def _variables(learner: Any) -> dict[str, list[Any]]:
    """All that training changes. A layer's variables are its weights and its random generator."""
    return {
        "network": [variable for layer in learner.layers for variable in layer.variables],
        "optimizer": list(learner.optimizer.variables),
    }


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``{"config": {"seed": 1}}`` as ``("config.seed", 1)``."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flatten(each, f"{name}.{key}" if name else key)
    else:
        yield name, value
