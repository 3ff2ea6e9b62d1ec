from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.data.base import ImageSet
from vggedge.training import (
    AugmentationConfig,
    EpochFigures,
    History,
    TrainConfig,
    TrainResult,
    train,
    write_history,
)
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.preprocess import scale_image

pytest.importorskip("keras")

SPEC = get_spec("vgg9-compact", input=(32, 32, 3), classes=2, dropout=0.2)
CONFIG = TrainConfig(epochs=3, batch_size=8, validation_share=0.25, learning_rate=3e-3, seed=5)


def warm_and_cold(count: int = 64, *, is_noise: bool = False) -> ImageSet:
    """Reddish and bluish noise, in turn; with ``is_noise`` the labels mean nothing."""
    targets = np.arange(count, dtype=np.int64) % 2

    def read_one(index: int) -> Any:
        generator = np.random.default_rng(index)
        image = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        if not is_noise:
            image[..., 0 if targets[index] == 0 else 2] += 120
        return image

    return image_set("warm-and-cold", targets, read_one)


def image_set(name: str, targets: Any, read_one: Callable[[int], Any]) -> ImageSet:
    def read_scaled(index: int, side: int) -> Any:
        return scale_image(Image.fromarray(read_one(index)), side)

    return ImageSet(name, ("warm", "cold"), targets, read_one, read_scaled)


class Recorder:
    def __init__(self) -> None:
        self.progress: list[tuple[int, int, str]] = []
        self.epochs: list[EpochFigures] = []

    def advance(self, done: int, total: int, what: str) -> None:
        self.progress.append((done, total, what))


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def trained(recorder: Recorder) -> TrainResult:
    data = warm_and_cold()
    return train(SPEC, data, CONFIG, advance=recorder.advance, on_epoch=recorder.epochs.append)


def test_it_learns(trained: TrainResult) -> None:
    assert trained.history.best.val_accuracy == 1
    assert trained.history.best.val_loss < 0.3
    fresh = warm_and_cold(100).subset(np.arange(64, 100))
    answers = np.asarray(trained.model(fresh.read(), training=False)).argmax(axis=1)
    assert (answers == fresh.targets).mean() > 0.95


def test_the_history_tells_how_it_came_about(trained: TrainResult, recorder: Recorder) -> None:
    history = trained.history
    assert (history.training_images, history.validation_images) == (48, 16)
    assert (history.spec, history.config, history.data) == (SPEC, CONFIG, "warm-and-cold")
    assert list(history.epochs) == recorder.epochs
    assert [each.epoch for each in history.epochs] == [1, 2, 3]
    assert history.best == min(history.epochs, key=lambda each: each.val_loss)
    assert history.seconds > sum(each.seconds for each in history.epochs) > 0
    assert all(history.versions.values())


def test_progress_is_told_for_reading_loading_and_training(trained: TrainResult, recorder: Recorder) -> None:
    steps = dict.fromkeys(what for _, _, what in recorder.progress)
    assert list(steps) == ["reading training images", "reading validation images", "loading TensorFlow", "training"]
    for what in steps:
        done = [at for at, _, name in recorder.progress if name == what]
        assert done == sorted(done)
        assert done[-1] == next(total for _, total, name in recorder.progress if name == what)


def test_the_model_has_no_optimizer_and_the_weights_of_the_best_epoch(trained: TrainResult) -> None:
    assert getattr(trained.model, "optimizer", None) is None
    _, held = warm_and_cold().split(CONFIG.validation_share, CONFIG.seed)
    found = np.asarray(trained.model(held.read(), training=False))
    loss = -np.log(found[np.arange(len(held)), held.targets]).mean()
    assert loss == pytest.approx(trained.history.best.val_loss, rel=1e-3)


def test_the_seed_makes_the_model_whether_or_not_images_stay_in_memory(trained: TrainResult) -> None:
    again = train(SPEC, warm_and_cold(), msgspec.structs.replace(CONFIG, memory_bytes=0))
    for mine, other in zip(trained.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_every_epoch_reads_every_image_once_in_another_order() -> None:
    data = warm_and_cold(32)
    reads: list[int] = []

    def read_one(index: int) -> Any:
        reads.append(index)
        return data.read_one(index)

    watched = image_set("watched", data.targets, read_one)
    config = msgspec.structs.replace(CONFIG, epochs=2, memory_bytes=0)
    train(SPEC, watched, config, on_epoch=lambda _: reads.append(-1))
    training = {int(i) for i in range(32)} - set(held_indices(data, config))
    first, second = (part for part in split_at(reads, -1) if part)
    # Keras looks at the first batches once more to learn their shapes; the last reading is the epoch's.
    orders = [[i for i in part if i in training][-len(training) :] for part in (first, second)]
    assert set(orders[0]) == set(orders[1]) == training
    assert orders[0] != orders[1]


def held_indices(data: ImageSet, config: TrainConfig) -> list[int]:
    numbered = image_set("numbers", data.targets, lambda i: np.full((1, 1, 3), i, dtype=np.uint8))
    return [int(i) for i in numbered.split(config.validation_share, config.seed)[1].read()[:, 0, 0, 0]]


def split_at(values: list[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for value in values:
        if value == mark:
            parts.append([])
        else:
            parts[-1].append(value)
    return parts


def test_it_stops_early_and_keeps_the_best_weights() -> None:
    # Labels that mean nothing: validation loss gets worse as the network learns the training images by heart.
    config = TrainConfig(
        epochs=40, batch_size=8, patience=2, learning_rate=1e-2, schedule="constant", validation_share=0.25
    )
    data = warm_and_cold(32, is_noise=True)
    found = train(SPEC, data, config)
    history = found.history
    assert len(history.epochs) == history.best_epoch + 2 < 40
    _, held = data.split(config.validation_share, config.seed)
    answers = np.asarray(found.model(held.read(), training=False))
    loss = -np.log(answers[np.arange(len(held)), held.targets]).mean()
    assert loss == pytest.approx(history.best.val_loss, rel=1e-3)


def test_a_loss_that_is_no_number_is_an_error_that_says_what_to_try() -> None:
    config = TrainConfig(epochs=3, batch_size=4, learning_rate=1e30)
    with pytest.raises(ModelError, match=r"diverged: the loss is (nan|inf) .*Lower the learning rate"):
        train(SPEC, warm_and_cold(16), config)


def test_ctrl_c_ends_training() -> None:
    def advance(done: int, total: int, what: str) -> None:
        if what == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SPEC, warm_and_cold(16), CONFIG, advance=advance)


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_an_image_that_cannot_be_read_is_named(memory_bytes: int) -> None:
    data = warm_and_cold(16)
    reads: list[int] = []

    def read_one(index: int) -> Any:
        reads.append(index)
        if len(reads) > 9:  # late enough to happen inside TensorFlow where images are read batch by batch
            raise DataError("ten.png: the image cannot be decoded")
        return data.read_one(index)

    broken = image_set("broken", data.targets, read_one)
    config = msgspec.structs.replace(CONFIG, memory_bytes=memory_bytes, batch_size=2)
    with pytest.raises(DataError, match=r"^ten\.png: the image cannot be decoded$"):
        train(SPEC, broken, config)


def test_a_class_of_one_image_is_refused_before_all_are_read() -> None:
    read: list[int] = []
    targets = np.array([0] * 50 + [1])
    lonely = image_set("lonely", targets, lambda i: read.append(i) or np.zeros((32, 32, 3), np.uint8))

    with pytest.raises(DataError, match="'cold' has 1 image"):
        train(SPEC, lonely, CONFIG)
    assert len(read) <= 1


def test_data_that_does_not_fit_the_spec_is_refused() -> None:
    data = warm_and_cold(8)
    with pytest.raises(UsageError, match=r"2 classes, and the spec has 6\. Use get_spec\('vgg9-compact', classes=2"):
        train(get_spec("vgg9-compact"), data, CONFIG)
    with pytest.raises(DataError, match=r"images of \(32, 32, 3\), and the spec takes \(64, 64, 3\)"):
        train(get_spec("vgg9-compact", classes=2), data, CONFIG)
    with pytest.raises(DataError, match="no images"):
        train(SPEC, data.subset(np.array([], dtype=np.int64)), CONFIG)


def test_augmented_training_does_not_depend_on_memory_and_spares_the_validation_images() -> None:
    config = msgspec.structs.replace(
        CONFIG,
        epochs=2,
        optimizer="sgd",
        weight_decay=5e-4,
        schedule="plateau",
        augmentation=AugmentationConfig(scale=(40, 64), flip=True, colour_shift=0.1),
    )
    data = warm_and_cold()
    held = train(SPEC, data, config)
    read = train(SPEC, data, msgspec.structs.replace(config, memory_bytes=40_000))  # three images and a part of one
    for mine, other in zip(held.model.get_weights(), read.model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    _, judges = data.split(config.validation_share, config.seed)
    answers = np.asarray(held.model(judges.read(), training=False))
    loss = -np.log(answers[np.arange(len(judges)), judges.targets]).mean()
    assert loss == pytest.approx(held.history.best.val_loss, rel=1e-3)


def test_it_learns_from_augmented_images() -> None:
    augmentation = AugmentationConfig(scale=(36, 64), flip=True, colour_shift=0.1)
    found = train(SPEC, warm_and_cold(96), msgspec.structs.replace(CONFIG, epochs=6, augmentation=augmentation))
    assert found.history.best.val_accuracy == 1


def test_a_scale_below_the_networks_size_is_refused_before_reading() -> None:
    config = msgspec.structs.replace(CONFIG, augmentation=AugmentationConfig(scale=(31, 64)))
    with pytest.raises(UsageError, match="scale is 31 pixels at least; the network takes 32x32"):
        train(SPEC, image_set("unread", np.zeros(4, np.int64), lambda _: 1 / 0), config)


def test_plateau_lowers_the_rate_and_ends_training() -> None:
    config = TrainConfig(
        epochs=40, batch_size=16, learning_rate=1e-9, schedule="plateau", plateau_patience=1, validation_share=0.25
    )
    still = msgspec.structs.replace(SPEC, normalization="none")  # BatchNorm's averages move without any learning
    rates = [each.learning_rate for each in train(still, warm_and_cold(32), config).history.epochs]
    assert rates == pytest.approx([1e-9, 1e-9, 1e-10, 1e-11, 1e-12])


def test_the_initialization_and_the_rates_are_those_of_the_config() -> None:
    config = msgspec.structs.replace(CONFIG, epochs=1, learning_rate=1e-12, initialization="paper")
    found = train(SPEC, warm_and_cold(32), config)
    assert found.history.epochs[0].learning_rate == 5e-13  # the third step of three: half way down the cosine
    kernel = next(layer for layer in found.model.layers if layer.name == "fc2").kernel
    assert float(np.asarray(kernel).std()) == pytest.approx(0.1, rel=0.02)


def test_keras_callbacks_see_the_model_while_it_trains() -> None:
    import keras

    seen: list[tuple[int, float]] = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append((batch, float(np.abs(np.asarray(self.model.get_layer("fc1").kernel)).sum())))

    train(SPEC, warm_and_cold(32), msgspec.structs.replace(CONFIG, epochs=1), callbacks=[Watch()])
    assert [batch for batch, _ in seen] == [0, 1, 2]
    assert len({total for _, total in seen}) == 3


def test_a_callback_can_end_training() -> None:
    import keras

    class End(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = epoch == 1

    assert len(train(SPEC, warm_and_cold(16), CONFIG, callbacks=[End()]).history.epochs) == 2


def test_the_history_file(trained: TrainResult, tmp_path: Path) -> None:
    path = write_history(trained.history, tmp_path / "hand.keras")
    assert path == tmp_path / "hand.history.json"
    assert msgspec.json.decode(path.read_bytes(), type=History) == trained.history
    assert [file.name for file in tmp_path.iterdir()] == ["hand.history.json"]
    with pytest.raises(ModelError, match="cannot be written"):
        write_history(trained.history, tmp_path / "none" / "hand.keras")
