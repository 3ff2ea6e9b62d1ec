from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from vggedge.cli import train
from vggedge.model import read_model
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

pytest.importorskip("keras")

app = typer.Typer()
app.command(train.NAME)(train.command)

SMALL = ("--model", "vgg9-compact", "--size", "32x32", "--epochs", "1", "--batch-size", "16")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_it_writes_the_model_and_what_belongs_to_it(tmp_path: Path) -> None:
    output = tmp_path / "new" / "hand.keras"
    result = run("fingers:48", "-o", str(output), *SMALL, "--normalization", "first", "--seed", "7", "--json")
    assert result.exit_code == 0
    answer = msgspec.json.decode(result.stdout, type=train.TrainAnswer)
    names = ["hand.keras", "hand.labels.txt", "hand.image.json", "hand.history.json"]
    assert [Path(file).name for file in answer.files] == names
    assert sorted(file.name for file in output.parent.iterdir()) == sorted(names)
    history = answer.history
    assert history.training_images + history.validation_images == 48
    assert (history.spec.normalization, history.config.seed, history.config.epochs) == ("first", 7, 1)

    model, card = read_model(output)
    assert card is not None
    assert card.labels == answer.labels == ("0", "1", "2", "3", "4", "5")
    assert card.image == ImageSpec(height=32, width=32)
    assert model.output_shape == (None, 6)
    for step in ("reading training images", "loading TensorFlow", "epoch 1/1", "val_accuracy"):
        assert step in result.stderr


def test_the_table(tmp_path: Path) -> None:
    output = tmp_path / "hand.keras"
    result = run("fingers:36", "--output", str(output), *SMALL)
    assert result.exit_code == 0
    found = dict(line.strip().split("  ", 1) for line in result.stdout.splitlines() if "  " in line.strip())
    assert found["variant"].strip() == "vgg9-compact"
    assert found["epochs run"].strip() == "1 of 1"
    assert found["its validation accuracy"].strip().endswith("%")
    assert str(output) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "{folder}"), "is a folder"),
        (("-o", "{folder}/m.h5"), r"name it m\.keras"),
        (("-o", "{folder}/m.keras", "--epochs", "0"), "epochs is 0"),
        (("-o", "{folder}/m.keras", "--model", "vgg61"), "Did you mean"),
        (("-o", "{folder}/m.keras", "--size", "16x16"), "at least 32x32"),
        (("-o", "{folder}/m.keras", "--normalization", "batch"), "known are none"),
    ],
)
def test_wrong_usage_is_found_before_an_image_is_opened(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_images(data: str, spec: ImageSpec) -> Any:
        raise AssertionError("opened")

    monkeypatch.setattr(train, "open_images", open_images)
    with pytest.raises(UsageError, match=message):
        run("fingers", *(argument.format(folder=tmp_path) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    result = run("fingers:12", "-o", str(tmp_path / "m.keras"), *SMALL)
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())
