from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.data.base import ImageSet
from vggedge.model import read_model
from vggedge.training import AugmentationConfig, EpochFigures, TrainConfig, TrainResult, train
from vggedge.training.checkpoint import check_checkpoint, checkpoint_path, fingerprint
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import scale_image

keras = pytest.importorskip("keras")

SPEC = get_spec("vgg9-compact", input=(32, 32, 3), classes=2, dropout=0.4)
ADAM = TrainConfig(
    epochs=4,
    batch_size=8,
    validation_share=0.25,
    learning_rate=3e-3,
    patience=0,
    augmentation=AugmentationConfig(scale=(36, 64), flip=True, colour_shift=0.1),
)
SGD = msgspec.structs.replace(
    ADAM, optimizer="sgd", weight_decay=5e-4, schedule="plateau", plateau_patience=1, learning_rate=1e-3
)


class Stopped(Exception):
    pass


def image_set(count: int = 40, name: str = "noise") -> ImageSet:
    targets = np.arange(count, dtype=np.int64) % 2

    def read_one(index: int) -> Any:
        image = np.random.default_rng(index).integers(0, 200, (32, 32, 3), dtype=np.uint8)
        image[..., 2 * targets[index]] += 20  # little enough to be learnt slowly
        return image

    def read_scaled(index: int, side: int) -> Any:
        return scale_image(Image.fromarray(read_one(index)), side)

    return ImageSet(name, ("warm", "cold"), targets, read_one, read_scaled)


def darker(data: ImageSet) -> ImageSet:
    """Other pictures under the same name, as in a folder whose files were exchanged."""
    return ImageSet(data.name, data.labels, data.targets, lambda index: data.read_one(index) // 2, data.read_scaled)


def stop_after(count: int) -> Any:
    def on_epoch(figures: EpochFigures) -> None:
        if figures.epoch == count:
            raise Stopped

    return on_epoch


def assert_same(found: TrainResult, wanted: TrainResult) -> None:
    def figures(epochs: Sequence[EpochFigures]) -> list[list[float]]:
        names = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
        return [[getattr(each, name) for name in names] for each in epochs]

    np.testing.assert_allclose(figures(found.history.epochs), figures(wanted.history.epochs), rtol=1e-5)
    assert found.history.best_epoch == wanted.history.best_epoch
    for mine, other in zip(found.model.get_weights(), wanted.model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam cosine", "sgd plateau"])
def test_a_resumed_training_ends_as_one_that_was_never_stopped(config: TrainConfig, tmp_path: Path) -> None:
    wanted = train(SPEC, image_set(), config)
    path = tmp_path / "m.checkpoint.npz"
    for stop, resume in ((1, False), (3, True)):
        with pytest.raises(Stopped):
            train(SPEC, image_set(), config, checkpoint=path, resume=resume, on_epoch=stop_after(stop))
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
    told: list[int] = []
    found = train(
        SPEC, image_set(), config, checkpoint=path, resume=True, on_epoch=lambda each: told.append(each.epoch)
    )
    assert told == [4]
    assert_same(found, wanted)
    assert found.history.seconds > sum(each.seconds for each in found.history.epochs)
    # Killed between the last epoch and the writing of the model: nothing is left to train.
    again = train(SPEC, image_set(), config, checkpoint=path, resume=True, on_epoch=lambda each: pytest.fail("trained"))
    assert_same(again, wanted)


SCRIPT = """
    import sys
    from pathlib import Path
    from vggedge.cli import main
    sys.argv = ["vggedge", "train", *sys.argv[1:]]
    main()
"""


@pytest.mark.slow  # loads TensorFlow three times
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    options = ["--model", "vgg9-compact", "--size", "32x32", "--batch-size", "4", "--epochs", "12", "--patience", "0"]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), "fingers:96", *options, "-o"]
    killed, whole = tmp_path / "killed.keras", tmp_path / "whole.keras"
    with subprocess.Popen([*command, str(killed)], stderr=subprocess.PIPE, text=True) as victim:
        assert victim.stderr is not None
        for line in victim.stderr:
            if line.startswith("epoch 2/"):
                os.kill(victim.pid, signal.SIGKILL)
                break
    assert victim.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert checkpoint_path(killed).exists()

    resumed = subprocess.run([*command, str(killed), "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 2/" not in resumed.stderr
    assert not checkpoint_path(killed).exists()
    subprocess.run([*command, str(whole)], capture_output=True, check=True)
    for mine, other in zip(*(read_model(path)[0].get_weights() for path in (killed, whole)), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a training that was stopped after its second epoch."""
    path = tmp_path_factory.mktemp("stopped") / "m.checkpoint.npz"
    with pytest.raises(Stopped):
        train(SPEC, image_set(), ADAM, checkpoint=path, on_epoch=stop_after(2))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": msgspec.structs.replace(ADAM, learning_rate=1e-3)},
            r"learning-rate was 0.003, now it is 0.001",
        ),
        ({"config": SGD}, "learning-rate was"),
        (
            {"config": msgspec.structs.replace(ADAM, augmentation=AugmentationConfig(scale=(36, 64), flip=True))},
            r"colour-shift was 0.1, now it is 0.0",
        ),
        ({"spec": msgspec.structs.replace(SPEC, dropout=0.5)}, r"dropout was 0.4, now it is 0.5"),
        ({"data": image_set(42)}, "number of images was 40, now it is 42"),
        ({"data": darker(image_set())}, "sha256 of the pixels of some images was"),
        ({"data": image_set(name="other")}, "DATA was noise, now it is other"),
    ],
)
def test_another_training_is_refused(change: dict[str, Any], message: str, stopped: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    path.write_bytes(stopped)
    given: dict[str, Any] = {"spec": SPEC, "data": image_set(), "config": ADAM, **change}
    with pytest.raises(UsageError, match=message):
        train(**given, checkpoint=path, resume=True)
    assert path.read_bytes() == stopped


def test_other_targets_are_another_training() -> None:
    data = image_set()
    swapped = ImageSet(data.name, data.labels, 1 - data.targets, data.read_one, data.read_scaled)
    assert fingerprint(data) != fingerprint(swapped)
    assert fingerprint(data) == fingerprint(image_set())


@pytest.mark.parametrize("damage", [lambda each: each[:1000], lambda each: b"", lambda each: b"x" * 99])
def test_a_damaged_checkpoint_is_named(damage: Any, stopped: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    path.write_bytes(damage(stopped))
    with pytest.raises(ModelError, match=r"m\.checkpoint\.npz: damaged, or no checkpoint\. Delete it"):
        train(SPEC, image_set(), ADAM, checkpoint=path, resume=True)


def test_a_changed_byte_is_found(stopped: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    place = len(stopped) // 2
    path.write_bytes(stopped[:place] + bytes([stopped[place] ^ 255]) + stopped[place + 1 :])
    with pytest.raises(ModelError, match="damaged, or no checkpoint"):
        train(SPEC, image_set(), ADAM, checkpoint=path, resume=True)


def test_nothing_is_lost_and_nothing_is_made_up(tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    check_checkpoint(path, resume=False)
    with pytest.raises(UsageError, match=r"no checkpoint to resume from. Leave --resume out"):
        check_checkpoint(path, resume=True)
    path.write_bytes(b"hours of work")
    with pytest.raises(UsageError, match=r"left this checkpoint. Go on .* --resume, or delete the file"):
        train(SPEC, image_set(), ADAM, checkpoint=path)
    assert path.read_bytes() == b"hours of work"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.checkpoint.npz"
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ModelError, match=r"cannot be written \(.*No space left"):
        train(SPEC, image_set(), ADAM, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    started = time.perf_counter()
    found = train(SPEC, image_set(), ADAM, checkpoint=path, resume=True)
    assert len(found.history.epochs) == 4
    assert found.history.seconds > 0
    assert time.perf_counter() - started < 60


def test_the_best_weights_are_kept_only_where_they_are_not_the_last(tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    losses: list[float] = []

    def on_epoch(figures: EpochFigures) -> None:
        losses.append(figures.val_loss)
        sizes[figures.val_loss == min(losses)].add(round(path.stat().st_size / 1e5))

    train(
        SPEC,
        image_set(),
        msgspec.structs.replace(ADAM, epochs=8, learning_rate=3e-2),
        checkpoint=path,
        on_epoch=on_epoch,
    )
    assert sizes[True]
    assert sizes[False]
    assert max(sizes[True]) < 0.85 * min(sizes[False])


def test_a_diverged_training_keeps_what_it_had(tmp_path: Path) -> None:
    class Poison(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.model.set_weights([weight * np.nan for weight in self.model.get_weights()])

    path = tmp_path / "m.checkpoint.npz"
    with pytest.raises(ModelError, match=r"diverged: .* epoch 2, batch 1.*m\.checkpoint\.npz has the epochs before"):
        train(SPEC, image_set(), SGD, checkpoint=path, callbacks=[Poison()])
    assert path.exists()
    path.unlink()
    wild = msgspec.structs.replace(SGD, learning_rate=1e30)
    with pytest.raises(ModelError, match=r"diverged: .* epoch 1, .*other than none\.$"):
        train(SPEC, image_set(), wild, checkpoint=path)
