"""Weights that others trained, as a network of ours: from keras.applications and torchvision."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vggedge.architecture import HEADS, VggSpec
from vggedge.model import ModelCard, build_vgg, import_keras
from vggedge.weights.checkpoint import Checkpoint
from vggedge.weights.imagenet import MODELS, NAME, download_imagenet
from vggedge.weights.keras_files import read_hdf5, read_keras_archive
from vggedge.weights.matching import FreshHead, match_spec, name_layers
from vggedge.weights.torchvision import read_torchvision
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras

__all__ = ["ImportConfig", "ImportedModel", "import_weights", "read_checkpoint", "read_labels"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt")
_IMAGENET_CLASSES = 1000
_SEED = 0  # of the untrained head, so that one import is like the next


class ImportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Choices of an import; None leaves a choice to the weights.

    Attributes:
        model: which network ``imagenet`` means, vgg16 or vgg19; None is vgg16.
        input: (height, width, 3), pixels; None is what the weights were made for, or 224x224.
        top: keep the trained dense layers, where there are any.
        classes: outputs of an untrained head.
        labels: class names in the order of the outputs; None takes ImageNet's or numbers.
        head: of an untrained head, ``gap`` or ``dense``; None is ``gap``.
    """

    model: str | None = None
    input: tuple[int, int, int] | None = None
    top: bool = True
    classes: int | None = None
    labels: tuple[str, ...] | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise UsageError(f"head {self.head!r}; known are {', '.join(HEADS)}.")
        if self.model is not None and self.model not in MODELS:
            raise UsageError(f"model {self.model!r}; known are {', '.join(MODELS)}.")
        if self.input is not None and self.input[2] != 3:
            raise UsageError(f"input with {self.input[2]} channels; the weights take RGB: give it as HEIGHTxWIDTHx3.")
        if self.classes is not None and self.classes < 2:
            raise UsageError(f"{self.classes} class(es); a classifier needs at least 2.")
        if self.labels is not None and self.classes not in (None, len(self.labels)):
            raise UsageError(
                f"{len(self.labels)} labels for {self.classes} classes. Give a label for each, or only one."
            )


class ImportedModel(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What an import gives.

    Attributes:
        model: takes RGB pixels from 0 to 255, (n, height, width, 3), gives probabilities, (n, classes).
        spec: what it was built from.
        card: labels and image spec.
        format: kind of the file that the weights came from.
        is_head_trained: False where the dense layers are fresh and random.
        has_names: False where the labels are only the numbers of the classes.
    """

    model: keras.Model
    spec: VggSpec
    card: ModelCard
    format: str
    is_head_trained: bool
    has_names: bool


def import_weights(
    source: str, config: ImportConfig | None = None, *, advance: Advance = ignore_progress
) -> ImportedModel:
    """Build the network of ours that computes what the weights at ``source`` were trained to compute.

    Its first layer normalises: RGB pixels go in. For weights from Keras, which take BGR, the channels of the first
    kernel are turned round. Nothing is written.

    Args:
        source: a ``.keras``, ``.weights.h5``, ``.h5`` or ``.safetensors`` file, or ``imagenet`` to download.
        config: choices.
        advance: told of each step.

    Raises:
        UsageError: the choices contradict each other or the weights.
        ModelError: the weights cannot be read or are those of another network; the message names the layer.
        MissingDependency: TensorFlow, Keras, h5py or safetensors is not installed.
    """
    config = config or ImportConfig()
    is_download = source == NAME
    if config.model is not None and not is_download:
        raise UsageError(f"--model {config.model} is for '{NAME}'; {source} says itself what it is. Leave it out.")
    if not config.top:
        _choose_head(config, source)  # before a download that would be for nothing
    names: tuple[str, ...] | None = None
    if is_download:
        checkpoint, names = download_imagenet(config.model or MODELS[0], top=config.top, advance=advance)
    else:
        checkpoint = read_checkpoint(Path(source), top=config.top, advance=advance)
    fresh = None if checkpoint.has_top else _choose_head(config, source)
    if fresh is None and (config.classes or config.head):
        raise UsageError(f"{source}: it has a trained head, and --classes and --head are for a new one. Add --no-top.")
    spec = match_spec(checkpoint, size=config.input and config.input[:2], fresh=fresh)
    names = config.labels or names
    if names is not None and len(names) != spec.classes:
        raise UsageError(f"{source}: {len(names)} labels for {spec.classes} classes. Give one label for each class.")
    labels = names or tuple(map(str, range(spec.classes)))
    # ImageNet's networks are shown the centre of images of 256 pixels; of others nothing is known.
    scale = 256 if (spec.input[:2], spec.classes) == ((224, 224), _IMAGENET_CLASSES) else None
    image = ImageSpec(height=spec.input[0], width=spec.input[1], resize="crop", scale=scale)
    return ImportedModel(
        card=ModelCard(labels=labels, image=image),
        model=_build_model(spec, checkpoint, advance),
        spec=spec,
        format=checkpoint.format,
        is_head_trained=fresh is None,
        has_names=names is not None,
    )


def read_checkpoint(path: Path, *, top: bool = True, advance: Advance = ignore_progress) -> Checkpoint:
    """Read a file of weights, whatever its format; without ``top`` its convolutions alone.

    The content decides what a file is, not its name. Nothing in it is run.

    Raises:
        ModelError: missing, damaged, of an unknown format, a pickle, or the weights of another network.
        MissingDependency: h5py or safetensors is not installed.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; needed is a file of weights.")
    with path.open("rb") as file:
        start = file.read(len(_HDF5))
    if start == _HDF5:
        return read_hdf5(path, top=top, advance=advance)
    parts = _zip_parts(path)
    if "config.json" in parts:
        return read_keras_archive(path, top=top, advance=advance)
    if path.suffix == ".safetensors":
        return read_torchvision(path, top=top, advance=advance)
    if path.suffix in _PICKLES or start[:1] == b"\x80" or any(part.endswith("data.pkl") for part in parts):
        raise ModelError(
            f"{path}: a pickle, which can run any program when it is read. Convert it where torch is installed:\n"
            "import torch, safetensors.torch\n"
            f"safetensors.torch.save_file(torch.load({str(path)!r}, weights_only=True), "
            f"{str(path.with_suffix('.safetensors'))!r})"
        )
    raise ModelError(
        f"{path}: {path.stat().st_size} bytes of no known format, or cut short; needed is a .keras, .weights.h5, .h5 "
        f"or .safetensors file, or the name {NAME}."
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line.

    Raises:
        UsageError: missing, empty, not UTF-8, or with a name twice.
    """
    try:
        labels = tuple(path.read_text("utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read as labels ({error}). Needed is UTF-8 text, a class a line."
        ) from error
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not labels or twice:
        found = f"{twice[0]!r} stands there more than once" if twice else "it is empty"
        raise UsageError(f"{path}: {found}; needed is a name of its own for each class, one a line.")
    return labels


def _zip_parts(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return []


def _choose_head(config: ImportConfig, source: str) -> FreshHead:
    classes = config.classes or len(config.labels or ())
    if not classes:
        raise UsageError(
            f"{source}: without trained dense layers a new head is put on, and it needs to know its classes: "
            "add --classes N or --labels FILE."
        )
    return FreshHead(classes=classes, head="dense" if config.head == "dense" else "gap")


def _build_model(spec: VggSpec, checkpoint: Checkpoint, advance: Advance) -> keras.Model:
    advance(0, 1, "loading TensorFlow")
    import_keras()
    advance(1, 1, "loading TensorFlow")
    named = name_layers(spec, checkpoint, has_head=checkpoint.has_top)
    model = build_vgg(spec, _SEED)
    for done, (name, layer) in enumerate(named.items(), start=1):
        model.get_layer(name).set_weights(list(layer.arrays))
        advance(done, len(named), "setting weights")
    return model
