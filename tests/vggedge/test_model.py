from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge.analysis import analyse
from vggedge.architecture import NORMALIZATIONS, SPECS, get_spec
from vggedge.model import ModelCard, build_vgg, check_output, read_model, read_ranges, write_model
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec

keras: Any = pytest.importorskip("keras")

TINY = get_spec("vgg9-compact", input=(32, 32, 3), classes=3)
CARD = ModelCard(labels=("cat", "dog", "Ünïcode 3"), image=ImageSpec(height=32, width=32))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build_vgg(TINY, seed=1)


@pytest.fixture
def written(tiny: Any, tmp_path: Path) -> Path:
    path = tmp_path / "hand.v2.keras"
    write_model(tiny, path, CARD)
    return path


@pytest.fixture
def without_weights() -> Iterator[None]:
    """Models that are built here know the shapes of their weights and allocate none: vgg19 is 575 MB."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()  # else Keras remembers the weights and allocates them at its next chance


def pixels(count: int, height: int = 32, width: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def answer(model: Any, images: Any) -> Any:
    return np.asarray(model(images, training=False))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("without_weights")
def test_keras_counts_what_the_arithmetic_counts(name: str) -> None:
    model = build_vgg(SPECS[name])
    figures = analyse(SPECS[name])
    assert model.count_params() == figures.parameters
    assert [layer.name for layer in model.layers[1:]] == [row.name for row in figures.layers]
    assert [layer.output.shape[1:] for layer in model.layers[1:]] == [row.output for row in figures.layers]
    assert [layer.count_params() for layer in model.layers[1:]] == [row.parameters for row in figures.layers]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.usefixtures("without_weights")
def test_every_normalization_builds_with_the_counted_parameters(normalization: str) -> None:
    spec = get_spec("vgg16-compact", normalization=normalization)
    assert build_vgg(spec).count_params() == analyse(spec).parameters


def test_it_gives_probabilities_from_uint8_pixels(tiny: Any) -> None:
    found = answer(tiny, pixels(5))
    assert found.shape == (5, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_the_first_layer_maps_pixels_onto_steps_of_128ths(tiny: Any) -> None:
    rescaled = tiny.get_layer("rescaling")(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(rescaled) * 128, np.arange(-128, 128))


def test_the_seed_makes_the_weights(tiny: Any) -> None:
    same, other = build_vgg(TINY, seed=1), build_vgg(TINY, seed=2)
    for mine, equal in zip(tiny.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, equal)
    assert not np.array_equal(tiny.get_weights()[0], other.get_weights()[0])


def test_equally_shaped_layers_start_with_different_weights() -> None:
    model = build_vgg(get_spec("vgg16-compact", input=(32, 32, 3)), seed=3, initialization="he")
    first, second = (model.get_layer(f"block5_conv{n}").get_weights()[0] for n in (2, 3))
    assert not np.array_equal(first, second)
    assert first.std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)  # He et al., equation 10


def test_local_response_normalisation_is_krizhevskys(tmp_path: Path) -> None:
    model = build_vgg(get_spec("vgg11-lrn-compact", input=(32, 32, 3), classes=3), seed=0)
    before = np.random.default_rng(1).normal(0, 30, (1, 2, 2, 8)).astype(np.float32)
    squares = np.pad(before**2, [(0, 0)] * 3 + [(2, 2)])
    sums = np.stack([squares[..., c : c + 5].sum(-1) for c in range(8)], axis=-1)
    found = model.get_layer("block1_lrn1")(before)
    np.testing.assert_allclose(np.asarray(found), before / (2 + 1e-4 * sums) ** 0.75, rtol=1e-5)

    path = tmp_path / "lrn.keras"
    write_model(model, path, CARD)
    again, _ = read_model(path)
    np.testing.assert_array_equal(answer(again, pixels(2)), answer(model, pixels(2)))


def test_a_written_lrn_model_is_read_by_a_process_that_never_built_one(tmp_path: Path) -> None:
    path = tmp_path / "lrn.keras"
    write_model(build_vgg(get_spec("vgg11-lrn-compact", input=(32, 32, 3), classes=3)), path, CARD)
    code = "import sys, pathlib, vggedge.model as m; m.read_model(pathlib.Path(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""  # TensorFlow's banners are held back


def test_writing_and_reading_keeps_model_and_card(tiny: Any, written: Path) -> None:
    model, card = read_model(written)
    assert card == CARD
    np.testing.assert_array_equal(answer(model, pixels(2)), answer(tiny, pixels(2)))
    names = {"hand.v2.keras", "hand.v2.labels.txt", "hand.v2.image.json"}
    assert {file.name for file in written.parent.iterdir()} == names


def test_a_model_without_a_card_has_none(written: Path) -> None:
    written.with_suffix(".labels.txt").unlink()
    written.with_suffix(".image.json").unlink()
    assert read_model(written)[1] is None


@pytest.mark.parametrize(("gone", "left"), [(".labels.txt", ".image.json"), (".image.json", ".labels.txt")])
def test_half_a_card_is_an_error(written: Path, gone: str, left: str) -> None:
    written.with_suffix(gone).unlink()
    with pytest.raises(ModelError, match=rf"hand\.v2{left} is beside it, hand\.v2{gone} is not"):
        read_model(written)


def test_labels_written_by_a_windows_editor_are_read(written: Path) -> None:
    written.with_suffix(".labels.txt").write_bytes("\ufeffcat\r\ndog\r\nÜnïcode 3".encode())
    assert read_model(written)[1] == CARD


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".labels.txt", b"cat\ndog\n", "2 labels for 3 outputs"),
        (".labels.txt", b"cat\n\ndog\n", "label 2 is ''"),
        (".labels.txt", b"\xff\xfe\n", "not UTF-8"),
        (".image.json", b"{", "make no card: Input data was truncated"),
        (".image.json", b'{"height": 0, "width": 32}', "0x32 is no image size"),
        (".image.json", b'{"height": 64, "width": 32}', r"takes \(32, 32, 3\), the image spec gives \(64, 32, 3\)"),
    ],
)
def test_a_wrong_card_is_an_error(written: Path, suffix: str, content: bytes, message: str) -> None:
    written.with_suffix(suffix).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_model(written)


@pytest.mark.parametrize("label", ["", "  ", "two\nlines", "two\u2028lines"])
def test_a_label_is_one_line(label: str) -> None:
    with pytest.raises(ModelError, match="label 2"):
        ModelCard(labels=("cat", label), image=CARD.image)


def test_a_card_that_does_not_fit_is_not_written(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 labels for 3 outputs"):
        write_model(tiny, tmp_path / "m.keras", msgspec.structs.replace(CARD, labels=("a", "b")))
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_classifier_of_images_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((7,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    with pytest.raises(ModelError, match=r"a classifier goes from \(n, height, width, 3\)"):
        write_model(model, tmp_path / "m.keras", CARD)


def test_a_write_that_fails_leaves_the_old_files(tiny: Any, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in written.parent.iterdir()}
    for failure, expected in ((OSError(28, "No space left on device"), ModelError), (KeyboardInterrupt(), None)):

        def save(self: Any, path: Path, failure: BaseException = failure) -> None:
            Path(path).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(type(tiny), "save", save)
        with pytest.raises(expected or KeyboardInterrupt):
            write_model(tiny, written, CARD)
        assert {file.name: file.read_bytes() for file in written.parent.iterdir()} == before


def test_missing_foreign_and_damaged_files(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_model(tmp_path / "none.keras")
    with pytest.raises(ModelError, match="is a folder"):
        read_model(tmp_path)
    other = tmp_path / "model.h5"
    other.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a \.keras file"):
        read_model(other)
    whole = written.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x89HDF" + bytes(100)):
        written.write_bytes(damaged)
        with pytest.raises(ModelError, match="archive"):
            read_model(written)
    at = len(whole) // 2
    written.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    with pytest.raises(ModelError, match="Keras cannot read it"):
        read_model(written)


def test_a_file_that_lacks_weights_is_refused(written: Path) -> None:
    """Keras warns for some of these and goes on with fresh random weights."""
    h5py = pytest.importorskip("h5py")
    with zipfile.ZipFile(written) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    stored = io.BytesIO(members["model.weights.h5"])
    with h5py.File(stored, "r+") as weights:
        del weights["layers"]
    members["model.weights.h5"] = stored.getvalue()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ModelError, match="Keras cannot read it"):
        read_model(written)


def test_code_in_a_model_file_is_not_run(tmp_path: Path) -> None:
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, keras.layers.Lambda(lambda x: x)(inputs))
    model.save(tmp_path / "lambda.keras")
    with pytest.raises(ModelError, match="Keras cannot read it"):
        read_model(tmp_path / "lambda.keras")


def test_check_output(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new" / "deep" / "m.keras").parent.is_dir()
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match=r"name it m\.keras"):
        check_output(tmp_path / "m.h5")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be made"):
        check_output(tmp_path / "file" / "m.keras")


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ModelError, match="KERAS_BACKEND=tensorflow"):
        build_vgg(TINY)


def test_a_label_that_is_no_text_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ModelError, match=r"another encoding than UTF-8\. Rename the folder"):
        ModelCard(labels=("caf\udce9", "tea"), image=ImageSpec(height=32, width=32))


def test_statistics_of_batch_norm_follow_within_a_small_training() -> None:
    """600 images make 90 steps in ten epochs; Keras's momentum of 0.99 would leave 40 % of the first averages."""
    model = build_vgg(get_spec("vgg9-compact", input=(32, 32, 3), normalization="every"))
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) == 6
    assert max(layer.momentum for layer in norms) ** 90 < 1e-3


def test_neighbouring_seeds_share_no_kernel() -> None:
    """Runs over several seeds are compared as if they were independent."""
    spec = get_spec("vgg16-compact", input=(32, 32, 3))
    kernels = [
        layer.kernel.numpy()
        for seed in (0, 1, 2)
        for layer in build_vgg(spec, seed).layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))
    ]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels) == 48


def test_what_described_the_model_before_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    for name in ("m.history.json", "m.curves.png", "other.history.json"):
        (tmp_path / name).write_text("of the model before")
    spec = get_spec("vgg9-compact", input=(32, 32, 3), classes=2)
    write_model(build_vgg(spec), path, ModelCard(labels=("a", "b"), image=ImageSpec(height=32, width=32)))
    found = sorted(file.name for file in tmp_path.iterdir())
    assert found == ["m.image.json", "m.keras", "m.labels.txt", "other.history.json"]


RANGES = {"block1_conv1": 127 / 128, "fc1": 3.5e-5}


def test_ranges_go_with_the_model_they_belong_to(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "hand.v2.keras"
    assert read_ranges(path) is None
    written = write_model(tiny, path, CARD, ranges=RANGES)
    assert [file.name for file in written] == [
        "hand.v2.keras", "hand.v2.labels.txt", "hand.v2.image.json", "hand.v2.ranges.json",
    ]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in written)
    assert read_ranges(path) == RANGES
    write_model(tiny, path, CARD)
    assert read_ranges(path) is None


def test_a_new_model_never_stands_beside_the_ranges_of_another(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two renames, the ranges are gone and not wrong: export then measures them."""
    path = tmp_path / "m.keras"
    write_model(tiny, path, CARD, ranges=RANGES)
    replace = Path.replace

    def stop(self: Path, target: Any) -> Path:
        if self.suffix != ".keras":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_model(tiny, path, CARD, ranges={"fc1": 1.0})
    assert read_ranges(path) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b'{"fc1": 0}', b'{"fc1": -1}', b'{"fc1": "1"}', b'{"fc1": 1e999}', b"\xff"]
)
def test_damaged_ranges_are_an_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.ranges.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.ranges\.json: no INT8 ranges .* Run vggedge finetune again, or remove"):
        read_ranges(tmp_path / "m.keras")


def test_what_a_killed_writing_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    (tmp_path / ".m.keras.partial").mkdir()
    (tmp_path / ".m.keras.partial" / "m.keras").write_bytes(b"half a model")
    spec = get_spec("vgg9-compact", input=(32, 32, 3), classes=2)
    write_model(build_vgg(spec), path, ModelCard(labels=("a", "b"), image=ImageSpec(height=32, width=32)))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("normalization", "rule"), [("none", "he"), ("lrn", "he"), ("first", "glorot"), ("every", "glorot")]
)
def test_the_initialization_goes_with_the_normalization(normalization: str, rule: str) -> None:
    spec = get_spec("vgg9-compact", input=(32, 32, 3), normalization=normalization)
    found, wanted = build_vgg(spec, 3), build_vgg(spec, 3, rule)  # type: ignore[arg-type]
    for mine, other in zip(found.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    deviation = float(found.get_layer("fc2").kernel.numpy().std())
    assert deviation == pytest.approx((2 / 256) ** 0.5 if rule == "he" else (2 / 512) ** 0.5, rel=0.02)
