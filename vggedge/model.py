"""From a spec to a Keras model, and from a model to files and back.

Keras is imported inside the functions: a machine that only reads specs or runs bundles has none.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from vggedge.architecture import PIXELS, LayerSpec, VggSpec
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec

if TYPE_CHECKING:
    import keras

Initialization: TypeAlias = Literal["auto", "he", "glorot", "paper"]

SUFFIX = ".keras"
LABELS_SUFFIX = ".labels.txt"
IMAGE_SUFFIX = ".image.json"
HISTORY_SUFFIX = ".history.json"
CURVES_SUFFIX = ".curves.png"
RANGES_SUFFIX = ".ranges.json"

_Ranges: TypeAlias = Annotated[dict[str, Annotated[float, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's weights do not say.

    Attributes:
        labels: class names in the order of the outputs.
        image: how images become its input.
    """

    labels: tuple[str, ...]
    image: ImageSpec

    def __post_init__(self) -> None:
        for number, label in enumerate(self.labels, start=1):
            if not label.strip() or len(label.splitlines()) != 1:
                raise ModelError(f"label {number} is {label!r}; needed is one line of text that is not blank.")
            if not label.isprintable() and any("\ud800" <= each <= "\udfff" for each in label):
                raise ModelError(
                    f"label {number} is {label!r}, which is no text: a folder's name was written in another encoding "
                    "than UTF-8. Rename the folder."
                )


def import_keras() -> Any:
    """Import Keras on its TensorFlow backend, without TensorFlow's banners.

    Setting ``TF_CPP_MIN_LOG_LEVEL`` brings the banners back.

    Raises:
        MissingDependency: TensorFlow or Keras is not installed.
        ModelError: Keras is set to another backend.
    """
    if sys.modules.get("keras") and sys.modules.get("tensorflow"):
        found = sys.modules["keras"]
    elif "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        found = _import_keras()
    else:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        with _silent_stderr():
            found = _import_keras()
    backend = found.backend.backend()
    if backend != "tensorflow":
        raise ModelError(
            f"Keras runs on {backend}; vggedge trains and converts with its tensorflow backend. "
            "Set KERAS_BACKEND=tensorflow before Python starts."
        )
    return found


def build_vgg(spec: VggSpec, seed: int | None = None, initialization: Initialization = "auto") -> keras.Model:
    """Build the network of ``spec`` with fresh weights.

    It takes RGB pixels from 0 to 255, (n, height, width, 3), and gives probabilities, (n, classes).
    The ``symmetric`` first layer, ``Rescaling(1/128, offset=-1)``, maps the 256 pixel
    values onto the steps of an int8 exactly, so quantising the first activation loses nothing.

    Args:
        spec: the network.
        seed: of the weights and of the dropout; None draws another network each time.
        initialization: of the kernels; biases are 0. ``he``: He-normal before a relu (He et al. 2015, arXiv
            1502.01852). ``glorot``: Glorot-uniform, Keras's default (Glorot & Bengio 2010). ``paper``: normal
            with variance 0.01, as the VGG paper's section 3.1 has it. ``auto``: Glorot where there is BatchNorm,
            else He; the other way round training is slow or stalls (benchmarks/claims, a).

    Raises:
        MissingDependency: TensorFlow or Keras is not installed.
    """
    keras = import_keras()
    inputs = keras.Input(shape=spec.input, name="images")
    outputs = inputs
    for number, layer in enumerate(spec.layers()):
        # One seed for all would give equally shaped layers equal weights; seed + number would do so between seeds.
        own_seed = None if seed is None else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        outputs = _build_layer(keras, spec, layer, initialization, own_seed)(outputs)
    return keras.Model(inputs, outputs, name=spec.name.replace("-", "_"))


def _build_layer(keras: Any, spec: VggSpec, layer: LayerSpec, initialization: Initialization, seed: int | None) -> Any:
    layers, name = keras.layers, layer.name
    if layer.kind in ("conv", "dense"):
        draw = _build_initializer(keras, spec, layer, initialization, seed)
        options = {"activation": layer.activation, "kernel_initializer": draw, "name": name}
        if layer.kind == "dense":
            return layers.Dense(layer.units, **options)
        return layers.Conv2D(layer.units, layer.kernel, padding="same", **options)
    if layer.kind == "lrn":
        return lrn_layer()(name=name)
    simple = {
        "rescaling": lambda: _build_rescaling(keras, spec, name),
        "average_pool": lambda: layers.GlobalAveragePooling2D(name=name),
        # Keras's 0.99 wants 500 steps before its averages can be trusted; ten epochs of 600 images have 90.
        "batch_norm": lambda: layers.BatchNormalization(momentum=0.9, name=name),
        "relu": lambda: layers.Activation("relu", name=name),
        "pool": lambda: layers.MaxPooling2D(layer.kernel, name=name),
        "flatten": lambda: layers.Flatten(name=name),
        "dropout": lambda: layers.Dropout(spec.dropout, seed=seed, name=name),
    }
    return simple[layer.kind]()


def _build_initializer(
    keras: Any, spec: VggSpec, layer: LayerSpec, initialization: Initialization, seed: int | None
) -> Any:
    initializers = keras.initializers
    if initialization == "auto":
        initialization = "he" if spec.normalization in ("none", "lrn") else "glorot"
    if initialization == "paper":
        return initializers.RandomNormal(stddev=0.1, seed=seed)
    if initialization == "glorot" or layer.activation == "softmax":
        return initializers.GlorotUniform(seed=seed)
    return initializers.HeNormal(seed=seed)


def _build_rescaling(keras: Any, spec: VggSpec, name: str) -> Any:
    """``(pixel - mean) / std``, written as Keras wants it; with one number where the channels agree."""
    mean, std = PIXELS[spec.pixels].mean, PIXELS[spec.pixels].std
    scale = [1 / each for each in std]
    offset = [-center / each for center, each in zip(mean, std, strict=True)]
    if len(set(scale)) == len(set(offset)) == 1:
        return keras.layers.Rescaling(scale[0], offset=offset[0], name=name)
    return keras.layers.Rescaling(scale, offset=offset, name=name)


@functools.cache
def lrn_layer() -> Any:
    """The Keras layer class of local response normalisation, registered as ``vggedge>LocalResponseNorm``.

    Reading a saved vgg11-lrn needs it registered; ``read_model`` sees to that. The constants are
    those that the paper took over from Krizhevsky, Sutskever & Hinton 2012, section 3.3 (n = 5 channels,
    k = 2, alpha = 1e-4, beta = 0.75), made for pixels without scaling; on the range of this
    network they come close to a division by 2 ** 0.75.
    """
    keras = import_keras()
    normalise = require("tensorflow", "train").nn.local_response_normalization

    class LocalResponseNorm(keras.layers.Layer):  # type: ignore[misc,name-defined]
        """Divides each channel by a power of its neighbours' squares; keeps the shape, has no weights."""

        def call(self, inputs: Any) -> Any:
            return normalise(inputs, depth_radius=2, bias=2.0, alpha=1e-4, beta=0.75)

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

    return keras.saving.register_keras_serializable(package="vggedge")(LocalResponseNorm)


def check_output(path: Path) -> Path:
    """Prepare the place of a model that is going to be written; returns ``path``.

    Called before training: nobody should learn after an hour that the result has nowhere to go.
    Creates the folder.

    Raises:
        UsageError: not a ``.keras`` name, a folder, or in a place where nothing can be written.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name the file too, for example {path / ('model' + SUFFIX)}.")
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: a model is written as {SUFFIX}; name it {path.with_suffix(SUFFIX).name}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent}: the folder cannot be made ({error.strerror}). Choose another.") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent}: no permission to write there. Choose another folder.")
    return path


def write_model(
    model: keras.Model, path: Path, card: ModelCard, *, ranges: dict[str, float] | None = None
) -> list[Path]:
    """Write ``MODEL.keras``, ``MODEL.labels.txt`` and ``MODEL.image.json``, with ranges ``MODEL.ranges.json``, too.

    Each is complete or not there at all: all are written to a temporary folder beside, then renamed; returns their
    paths. The history, curves and ranges of a model that was there before go with it.

    Raises:
        UsageError: ``path`` is no place for a model (see check_output).
        ModelError: the card does not fit the model, or the disk refused.
    """
    check_output(path)
    _check_card(model, card, path)
    names = [path.name, path.with_suffix(LABELS_SUFFIX).name, path.with_suffix(IMAGE_SUFFIX).name]
    try:
        with _staging_folder(path) as folder:
            written = [folder / name for name in names]
            model.save(written[0])
            written[1].write_bytes("".join(f"{label}\n" for label in card.labels).encode())
            written[2].write_bytes(msgspec.json.format(msgspec.json.encode(card.image), indent=2) + b"\n")
            if ranges is not None:
                written.append(folder / path.with_suffix(RANGES_SUFFIX).name)
                written[3].write_bytes(msgspec.json.format(msgspec.json.encode(ranges), indent=2) + b"\n")
            path.with_suffix(RANGES_SUFFIX).unlink(missing_ok=True)  # first: export would take them for the new model's
            placed = [file.replace(path.parent / file.name) for file in written]
        for suffix in (HISTORY_SUFFIX, CURVES_SUFFIX):
            path.with_suffix(suffix).unlink(missing_ok=True)
        return placed
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error}). Check space and permissions.") from error


@contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path``, removed in the end. Always the same: what a killed writing left goes with the next."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_model(path: Path) -> tuple[keras.Model, ModelCard | None]:
    """Read a model and its card; the card is None for a ``.keras`` that came without both its files.

    The model comes without optimizer. No Python code from the file is run.

    Raises:
        ModelError: missing, not a ``.keras`` file, damaged, or with a card that does not fit.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    card = read_card(path)  # before TensorFlow, whose loading takes seconds
    keras = import_keras()
    lrn_layer()
    try:
        with warnings.catch_warnings():
            # Keras only warns where weights are missing in the file, and leaves fresh random ones in their place.
            warnings.filterwarnings("error", message=".*(freshly-initialized|Skipping)", category=UserWarning)
            model = keras.models.load_model(path, compile=False, safe_mode=True)
    # Keras, h5py and zipfile raise all of these on damaged files and on unknown layers.
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError,
        zipfile.BadZipFile, zlib.error, UserWarning,
    ) as error:  # fmt: skip
        raise ModelError(
            f"{path}: Keras cannot read it ({_first_line(error)}). It is damaged, made by a newer Keras, or "
            "has layers of its own. Write it again with model.save(), from built-in layers."
        ) from error
    if card is not None:
        _check_card(model, card, path)
    return model, card


def read_card(path: Path) -> ModelCard | None:
    """Read the labels and image spec beside the model at ``path`` without TensorFlow; None if both are missing.

    Raises:
        ModelError: no ``.keras`` file there, or a card that cannot be read.
    """
    _check_archive(path)
    return _read_card(path)


def read_ranges(path: Path) -> dict[str, float] | None:
    """Read ``MODEL.ranges.json`` beside the model at ``path``; None if there is none.

    By the name of each layer whose input training quantised: the magnitude that became 127 INT8 steps.

    Raises:
        ModelError: it cannot be read, or holds anything else than one number above 0 a layer.
    """
    file = path.with_suffix(RANGES_SUFFIX)
    try:
        found: dict[str, float] = msgspec.json.decode(file.read_bytes(), type=_Ranges)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(
            f"{file}: no INT8 ranges ({error}); needed is one number above 0 a layer. Run vggedge finetune again, or "
            "remove the file: export then finds the ranges on its calibration images."
        ) from error
    return found


def _check_archive(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; needed is a {SUFFIX} file.")
    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    if path.suffix != SUFFIX:
        raise ModelError(
            f"{path}: not a {SUFFIX} file. Read it with the program that made it and write it again with "
            f"model.save('{path.stem}{SUFFIX}')."
        )
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path}: {path.stat().st_size} bytes that are no {SUFFIX} archive: cut short, or another format "
            "under this name. Copy or write it again."
        )


def _read_card(path: Path) -> ModelCard | None:
    labels, image = path.with_suffix(LABELS_SUFFIX), path.with_suffix(IMAGE_SUFFIX)
    present = [file for file in (labels, image) if file.exists()]
    if not present:
        return None
    if len(present) == 1:
        missing = image if present[0] == labels else labels
        raise ModelError(
            f"{path}: {present[0].name} is beside it, {missing.name} is not; they belong together. "
            f"Bring {missing.name} back, or remove {present[0].name} to read the model without either."
        )
    try:
        # Editors on Windows add a byte-order mark and carriage returns; neither is part of a label.
        names = tuple(labels.read_text("utf-8-sig").splitlines())
        return ModelCard(labels=names, image=msgspec.json.decode(image.read_bytes(), type=ImageSpec))
    except UnicodeDecodeError as error:
        raise ModelError(f"{labels}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except (OSError, msgspec.DecodeError, UsageError, ModelError) as error:
        raise ModelError(
            f"{path}: {labels.name} and {image.name} beside it make no card: {error} Write them again."
        ) from error


def _check_card(model: keras.Model, card: ModelCard, path: Path) -> None:
    """Raise ModelError unless there is a label for every output and the image size is the input's."""
    # Several inputs make a list or dict of shapes; a subclassed model has none before its first call.
    inputs, outputs = (getattr(model, name, None) for name in ("input_shape", "output_shape"))
    if not (isinstance(inputs, tuple) and len(inputs) == 4 and isinstance(outputs, tuple) and len(outputs) == 2):
        raise ModelError(
            f"{path}: the model goes from {inputs} to {outputs}; a classifier goes from "
            "(n, height, width, 3) to (n, classes). Cut it down to one such input and output."
        )
    classes = 2 if outputs[-1] == 1 else outputs[-1]  # one unit is the score of the second of two classes
    if len(card.labels) != classes:
        raise ModelError(
            f"{path}: {len(card.labels)} labels for {outputs[-1]} outputs, which tell {classes} classes apart. Give "
            f"one label for each class, in the outputs' order, in {path.with_suffix(LABELS_SUFFIX).name}."
        )
    takes = (*card.image.shape[:2], 1) if inputs[3] == 1 else card.image.shape  # export makes grey of RGB
    # None is a size that the model leaves open.
    if any(has not in (None, wants) for has, wants in zip(inputs[1:], takes, strict=True)):
        raise ModelError(
            f"{path}: the model takes {inputs[1:]}, the image spec gives {card.image.shape}. "
            f"Correct height and width in {path.with_suffix(IMAGE_SUFFIX).name}."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _import_keras() -> Any:
    tensorflow = require("tensorflow", "train")
    found = require("keras", "train")
    tensorflow.config.list_physical_devices("GPU")  # without a GPU this complains, once
    return found


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, and show it after all if the block fails.

    TensorFlow writes its first lines before its log level counts, so the variable alone is not enough.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError):  # no stderr at all, as under pythonw or a daemon
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
