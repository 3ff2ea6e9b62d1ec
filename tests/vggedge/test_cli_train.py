from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from vggedge.cli import train
from vggedge.model import read_model
from vggedge.training import History, get_config
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
    names = ["hand.keras", "hand.labels.txt", "hand.image.json", "hand.history.json", "hand.curves.png"]
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
    assert found["optimizer"].strip() == "adam, rate 0.002, cosine"
    assert "augmentation" not in found
    assert "begins with" not in found
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
        (("-o", "{folder}/m.keras", "--head", "mlp"), "known are dense, gap"),
        (("-o", "{folder}/m.keras", "--recipe", "classic"), "Known are: modern, paper"),
        (("-o", "{folder}/m.keras", "--optimizer", "lion"), "needed is adam or sgd"),
        (("-o", "{folder}/m.keras", "--momentum", "0.5"), "momentum is 0.5 and has no effect"),
        (("-o", "{folder}/m.keras", "--scale", "63"), "the network takes 64x64"),
        (("-o", "{folder}/m.keras", "--scale", "big"), "write S or SMIN,SMAX"),
        (("-o", "{folder}/m.keras", "--freeze", "2"), "name it with --transfer"),
        (("-o", "{folder}/m.keras", "--transfer", "b.keras", "--model", "vgg16"), "the base decides"),
        (("-o", "{folder}/m.keras", "--transfer", "b.keras", "--optimizer", "lion"), "needed is adam or sgd"),
        (("-o", "{folder}/m.keras", "--resume"), "no checkpoint to resume from"),
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


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.checkpoint.npz").write_bytes(b"hours of work")
    with pytest.raises(UsageError, match="--resume, or delete the file"):
        run("fingers:12", "-o", str(tmp_path / "m.keras"), *SMALL)
    assert (tmp_path / "m.checkpoint.npz").read_bytes() == b"hours of work"


def test_the_paper_recipe_with_changes(tmp_path: Path) -> None:
    output = tmp_path / "paper.keras"
    changes = ("--recipe", "paper", "--scale", "34,40", "--no-flip", "--plateau-patience", "4")
    result = run("fingers:48", "-o", str(output), *SMALL, *changes)
    assert result.exit_code == 0
    history = msgspec.json.decode((tmp_path / "paper.history.json").read_bytes(), type=History)
    assert history.config == get_config(
        "paper", (32, 32, 3), scale="34,40", flip=False, plateau_patience=4, epochs=1, batch_size=16
    )
    _, card = read_model(output)
    assert card is not None
    assert card.image == ImageSpec(height=32, width=32, resize="crop", scale=37)
    assert "scale 34 to 40, colour shift" in result.stdout
    assert "sgd, rate 0.01, plateau" in result.stdout
    assert "rate 0.01" in result.stderr


def test_a_new_head_for_other_classes(tmp_path: Path) -> None:
    base, output = tmp_path / "base.keras", tmp_path / "new.keras"
    run("fingers:48", "-o", str(base), *SMALL, "--json")
    two = tmp_path / "two"
    for index in range(16):
        (two / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (index, 200 * (index % 2), 0)).save(two / "ab"[index % 2] / f"{index}.png")
    options = ("--transfer", str(base), "--head", "gap", "--freeze", "3", "--size", "48x48", "--epochs", "1")
    result = run(str(two), "-o", str(output), *options)
    assert result.exit_code == 0
    assert "base.keras: 8 layers, block1_conv1 to block5_conv2; 3 of 5 stages frozen" in result.stdout
    model, card = read_model(output)
    assert (model.input_shape, model.output_shape) == ((None, 48, 48, 3), (None, 2))
    assert card is not None
    assert card.labels == ("a", "b")
    result = run(
        "fingers:24", "-o", str(tmp_path / "deep.keras"), "--initial", str(base), "--size", "32x32", "--epochs", "1"
    )
    assert "base.keras: 11 layers, block1_conv1 to predictions" in result.stdout


def test_without_matplotlib_the_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("fingers:24", "-o", str(tmp_path / "m.keras"), *SMALL)
    assert result.exit_code == 0
    assert "no learning curves: matplotlib.figure" in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "m.history.json", "m.image.json", "m.keras", "m.labels.txt",
    ]  # fmt: skip


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Any) -> None:
    real = train.train

    def stop(*arguments: Any, on_epoch: Any, **options: Any) -> Any:
        def interrupt(figures: Any) -> None:
            raise KeyboardInterrupt

        return real(*arguments, on_epoch=interrupt, **options)

    monkeypatch.setattr(train, "train", stop)
    output = tmp_path / "m.keras"
    code, _, shown = command_line("train", "fingers:24", "-o", output, *SMALL)
    assert code == 130
    assert f"{tmp_path / 'm.checkpoint.npz'} has all epochs that were finished" in shown
    assert "--resume" in shown
    assert "nothing half-written" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["m.checkpoint.npz"]
    monkeypatch.setattr(train, "train", real)
    assert command_line("train", "fingers:24", "-o", output, *SMALL, "--resume")[0] == 0
    assert output.exists()
    assert not (tmp_path / "m.checkpoint.npz").exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    result = run("fingers:12", "-o", str(tmp_path / "m.keras"), *SMALL)
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())


def test_a_width_multiplies_the_variants_own(tmp_path: Path) -> None:
    result = run("fingers:24", "-o", str(tmp_path / "m.keras"), *SMALL, "--width", "0.5", "--json")
    spec = msgspec.json.decode(result.stdout, type=train.TrainAnswer).history.spec
    assert (spec.widths, spec.dense) == ((2, 4, 8, 16, 16), (128, 128))
    with pytest.raises(UsageError, match=r"--width 2\.0: with --transfer the base decides that"):
        run("fingers:24", "-o", str(tmp_path / "n.keras"), "--transfer", str(tmp_path / "m.keras"), "--width", "2")


@pytest.mark.parametrize("option", ["--transfer", "--initial"])
def test_what_it_begins_with_is_not_replaced(option: str, tmp_path: Path) -> None:
    base = tmp_path / "base.keras"
    base.write_bytes(b"weeks of work")
    with pytest.raises(UsageError, match=rf"{option}.*would be replaced"):
        run("fingers:12", "-o", str(tmp_path / "." / "base.keras"), option, str(base))
    assert base.read_bytes() == b"weeks of work"
