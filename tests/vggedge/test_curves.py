from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.training.config import TrainConfig
from vggedge.training.curves import build_curves, write_curves
from vggedge.training.history import EpochFigures, History
from vggedge_runtime.errors import MissingDependency, ModelError

LOSSES = (1.5, 0.9, 0.4, 0.6)


def history(count: int = 4) -> History:
    return History(
        spec=get_spec("vgg16-compact"),
        config=TrainConfig(epochs=9),
        data="pets",
        training_images=90,
        validation_images=10,
        epochs=tuple(
            EpochFigures(
                epoch=number,
                loss=2 / number,
                accuracy=0.2 * number,
                val_loss=loss,
                val_accuracy=0.1 + 0.2 * number,
                learning_rate=10.0**-number,
                seconds=1,
            )
            for number, loss in enumerate(LOSSES[:count], start=1)
        ),
        best_epoch=min(3, count),
        seconds=9,
        versions={},
    )


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_the_curves_are_the_figures() -> None:
    pytest.importorskip("matplotlib")
    figure = build_curves(history())
    loss, accuracy, rate = (lines(axes) for axes in figure.axes)
    assert loss["validation"] == ([1, 2, 3, 4], list(LOSSES))
    assert loss["training"][1] == pytest.approx([2, 1, 2 / 3, 0.5])
    assert loss["kept"] == ([3], [0.4])
    assert accuracy["validation"][1] == pytest.approx([30, 50, 70, 90])
    assert accuracy["kept"][1] == pytest.approx([70])
    assert next(iter(rate.values()))[1] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])
    assert "epoch 3 of 4 is kept, validation accuracy 70.00%" in figure.get_suptitle()


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_is_written_beside_the_model(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_curves(history(count), tmp_path / "pets.keras")
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == ["pets.curves.png"]
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800
    with pytest.raises(ModelError, match="cannot be written"):
        write_curves(history(count), tmp_path / "none" / "pets.keras")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"vggedge\[train\]"):
        write_curves(history(), tmp_path / "pets.keras")
    assert not list(tmp_path.iterdir())
