from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from vggedge.architecture import get_spec
from vggedge.cli import finetune
from vggedge.data import open_images
from vggedge.model import ModelCard, build_vgg, read_model, read_ranges, write_model
from vggedge.training import TrainConfig, train
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization

keras: Any = pytest.importorskip("keras")

app = typer.Typer()
app.command(finetune.NAME)(finetune.command)

IMAGE = ImageSpec(height=32, width=32)
SMALL = ("--epochs", "1", "--batch-size", "16", "--calibration-images", "20")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = get_spec("vgg9-compact", input=(32, 32, 3), normalization="first")
    images = open_images("fingers:96", IMAGE)
    path = tmp_path_factory.mktemp("trained") / "base.keras"
    write_model(train(spec, images, TrainConfig(epochs=1)).model, path, ModelCard(labels=images.labels, image=IMAGE))
    return path


def test_it_writes_a_plain_model_its_card_its_ranges_and_how_it_came_about(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "tuned.keras"
    result = run(trained, "fingers:96", "-o", output, *SMALL, "--seed", "4", "--json")
    assert result.exit_code == 0
    answer = msgspec.json.decode(result.stdout, type=finetune.FinetuneAnswer)
    names = [f"tuned{suffix}" for suffix in (".keras", ".labels.txt", ".image.json", ".ranges.json", ".history.json")]
    assert [Path(file).name for file in answer.files] == names
    assert sorted(file.name for file in output.parent.iterdir()) == sorted(names)
    history = answer.history
    assert (history.base, history.data, history.calibration_images) == ("base.keras", "fingers:96@0", 20)
    assert (history.config.seed, history.config.epochs, history.config.batch_size) == (4, 1, 16)
    assert history.training_images + history.validation_images == 96
    assert history.best_epoch == 1

    model, card = read_model(output)
    base, base_card = read_model(trained)
    assert card == base_card
    assert [type(layer) for layer in model.layers] == [type(layer) for layer in base.layers]
    assert not np.array_equal(model.get_layer("fc1").get_weights()[0], base.get_layer("fc1").get_weights()[0])
    ranges = read_ranges(output)
    assert ranges == history.ranges
    assert list(ranges) == [*(f"block{stage}_conv1" for stage in range(1, 6)), "block5_conv2", "fc1", "fc2"]
    with zipfile.ZipFile(output) as archive:
        assert b"FakeQuantized" not in archive.read("config.json")
    for step in ("loading the model", "calibrating", "reading training images", "epoch 1/1", "val_accuracy"):
        assert step in result.stderr


def test_the_table_and_a_tuning_that_did_not_help(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.keras"
    result = run(trained, "fingers:96", "-o", output, *SMALL, "--learning-rate", "1")
    assert result.exit_code == 0
    found = dict(line.strip().split("  ", 1) for line in result.stdout.splitlines() if "  " in line.strip())
    assert found["base"].strip() == "base.keras"
    assert found["quantised layers"].strip() == "8"
    assert found["ranges from"].strip() == "20 images"
    assert found["weights of epoch"].strip() == "none: the base's"
    assert found["validation, tuned in INT8 (chose the epoch)"].strip() == found["validation, base in INT8"].strip()
    assert "no epoch had a lower validation loss" in result.stderr
    tuned, base = read_model(output)[0], read_model(trained)[0]
    for mine, other in zip(tuned.get_weights(), base.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "{folder}"), "is a folder"),
        (("-o", "{folder}/m.h5"), r"name it m\.keras"),
        (("-o", "{base}"), "would be replaced by its own result"),
        (("-o", "{folder}/m.keras", "--epochs", "0"), "epochs is 0"),
        (("-o", "{folder}/m.keras", "--learning-rate", "nan"), "learning_rate is nan"),
        (("-o", "{folder}/m.keras", "--calibration-images", "0"), "--calibration-images is 0"),
        (("-o", "{folder}/m.keras", "--validation", "1"), "validation_share is 1"),
    ],
)
def test_wrong_usage_is_found_before_an_image_is_opened(
    arguments: tuple[str, ...], message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_images(data: str, spec: ImageSpec) -> Any:
        raise AssertionError("opened")

    monkeypatch.setattr(finetune, "open_labelled", open_images)
    before = trained.read_bytes()
    with pytest.raises(UsageError, match=message):
        run(trained, "fingers", *(argument.format(folder=tmp_path, base=trained) for argument in arguments))
    assert not list(tmp_path.iterdir())
    assert trained.read_bytes() == before


def test_a_base_without_card_or_of_other_classes_or_that_export_refuses(trained: Path, tmp_path: Path) -> None:
    bare, output = tmp_path / "bare.keras", tmp_path / "out" / "m.keras"
    bare.write_bytes(trained.read_bytes())
    with pytest.raises(ModelError, match=r"needed are bare\.labels\.txt, a class a line, and bare\.image\.json"):
        run(bare, "fingers:24", "-o", output, *SMALL)
    other = tmp_path / "other.keras"
    spec = get_spec("vgg9-compact", input=(32, 32, 3), classes=2)
    write_model(build_vgg(spec, 0), other, ModelCard(labels=("cat", "dog"), image=IMAGE))
    with pytest.raises(UsageError, match="trained on the classes cat, dog, the data has 0, 1, 2, 3, 4, 5"):
        run(other, "fingers:24", "-o", output, *SMALL)
    twice = tmp_path / "twice.keras"
    image = msgspec.structs.replace(IMAGE, normalization=Normalization(mean=(0, 0, 0), std=(255, 255, 255)))
    write_model(read_model(trained)[0], twice, ModelCard(labels=tuple("012345"), image=image))
    with pytest.raises(ModelError, match="normalises the image, and so would the image spec"):
        run(twice, "fingers:24", "-o", output, *SMALL)
    assert not list(output.parent.iterdir())


def test_ctrl_c_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Any
) -> None:
    real = finetune.finetune

    def stop(*arguments: Any, on_epoch: Any, **options: Any) -> Any:
        def interrupt(figures: Any) -> None:
            raise KeyboardInterrupt

        return real(*arguments, on_epoch=interrupt, **options)

    monkeypatch.setattr(finetune, "finetune", stop)
    code, _, shown = command_line("finetune", trained, "fingers:48", "-o", tmp_path / "m.keras", *SMALL)
    assert code == 130
    assert "nothing half-written" in shown
    assert not list(tmp_path.iterdir())
