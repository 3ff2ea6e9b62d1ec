from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from vggedge.cli import import_weights
from vggedge.model import read_model
from vggedge_runtime.errors import ModelError, UsageError

pytest.importorskip("keras")
pytest.importorskip("safetensors")

GOLDEN = Path(__file__).parent / "golden_torchvision"
VGG11 = str(GOLDEN / "vgg11_bn.safetensors")

app = typer.Typer()
app.command(import_weights.NAME)(import_weights.command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def rows(result: Result) -> dict[str, str]:
    pairs = (line.strip().split("  ", 1) for line in result.stdout.splitlines() if "  " in line.strip())
    return {name: value.strip() for name, value in pairs}


def test_it_writes_a_model_with_its_card(tmp_path: Path) -> None:
    output = tmp_path / "new" / "vgg.keras"
    result = run(VGG11, "-o", output, "--json")
    assert result.exit_code == 0
    answer = msgspec.json.decode(result.stdout, type=import_weights.ImportAnswer)
    assert [Path(file).name for file in answer.files] == ["vgg.keras", "vgg.labels.txt", "vgg.image.json"]
    assert (answer.variant, answer.input, answer.classes, answer.pixels) == ("vgg11", (224, 224, 3), 5, "imagenet")
    assert answer.normalization == "every"
    assert (answer.format, answer.head, answer.is_head_trained) == ("torchvision state dict", "dense", True)
    model, card = read_model(output)
    assert model.count_params() == answer.parameters
    assert card is not None
    assert card.labels == answer.labels == ("0", "1", "2", "3", "4")
    assert card.image.resize == "crop"
    assert "labels are the numbers 0 to 4" in result.stderr
    assert "untrained" not in result.stderr
    for step in ("reading weights", "loading TensorFlow", "setting weights", "writing"):
        assert step in result.stderr


def test_the_table_of_a_new_head(tmp_path: Path) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("cat\ndog\n")
    output = tmp_path / "pets.keras"
    result = run(VGG11, "-o", output, "--no-top", "--labels", labels, "--input", "64x96")
    assert result.exit_code == 0
    found = rows(result)
    assert (found["variant"], found["input"], found["classes"]) == ("vgg11", "64x96x3", "2")
    assert found["head"] == "gap, UNTRAINED"
    assert found["pixels"] == "ImageNet mean and deviation (imagenet)"
    assert f"vggedge train DATA --transfer {output}" in result.stderr
    assert "numbers" not in result.stderr
    assert (tmp_path / "pets.labels.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((VGG11, "-o", "{folder}"), UsageError, "is a folder"),
        ((VGG11, "-o", "{folder}/m.h5"), UsageError, r"name it m\.keras"),
        ((VGG11, "-o", "{folder}/m.keras", "--input", "big"), UsageError, "HEIGHTxWIDTH"),
        ((VGG11, "-o", "{folder}/m.keras", "--input", "64x64"), UsageError, "made for 224x224"),
        ((VGG11, "-o", "{folder}/m.keras", "--labels", "{folder}/none.txt"), UsageError, "cannot be read as labels"),
        ((VGG11, "-o", "{folder}/m.keras", "--no-top"), UsageError, "--classes N or --labels FILE"),
        (("imagenet", "-o", "{folder}/m.keras", "--no-top"), UsageError, "--classes N or --labels FILE"),
        (("imagenet", "-o", "{folder}/m.keras", "--model", "vgg11"), UsageError, "known are vgg16, vgg19"),
        (("{folder}/none.h5", "-o", "{folder}/m.keras"), ModelError, "no such file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    arguments: tuple[str, ...], error: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_an_old_model_outlives_a_failed_import(tmp_path: Path) -> None:
    output = tmp_path / "m.keras"
    assert run(VGG11, "-o", output).exit_code == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UsageError):
        run(VGG11, "-o", output, "--input", "64x64")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_it_is_a_command(command_line: Any, tmp_path: Path) -> None:
    code, out, err = command_line("import-weights", tmp_path / "vgg.pth", "-o", tmp_path / "m.keras")
    assert (code, out) == (1, "")
    assert "no such file" in err


def test_the_source_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "vgg.keras"
    source.write_bytes(b"weeks of work")
    with pytest.raises(UsageError, match="would be replaced by its own import"):
        run(source, "-o", tmp_path / "." / "vgg.keras")
    assert source.read_bytes() == b"weeks of work"


def test_the_table_says_what_is_done_to_images(tmp_path: Path) -> None:
    result = run(VGG11, "-o", tmp_path / "vgg.keras")
    assert rows(result)["images"] == "centre of 224x224 at the size that covers it"
