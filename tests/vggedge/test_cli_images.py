from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggedge.cli import images
from vggedge.data import ImageSet, open_images
from vggedge_runtime.preprocess import ImageSpec

CommandLine = Callable[..., tuple[object, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with two photographs each."""
    generator = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_the_files_are_what_training_and_inference_see(photos: Path, tmp_path: Path, command_line: CommandLine) -> None:
    folder = tmp_path / "deep/out"
    code, out, err = command_line("images", photos, "-o", folder, "--size", "32x48", "--json")
    assert (code, err) == (0, "")
    written = json.loads(out)
    assert [str(Path(each).relative_to(folder)) for each in written] == [
        "cat/000000.png",
        "cat/000001.png",
        "dog/000002.png",
        "dog/000003.png",
    ]
    source = open_images(str(photos), ImageSpec(height=32, width=48))
    for index, path in enumerate(written):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), source.read_one(index))


def test_they_can_be_read_as_data_again(tmp_path: Path, command_line: CommandLine) -> None:
    code, out, err = command_line("images", "fingers:12@3", "-o", tmp_path / "out")
    assert (code, out) == (0, f"12 images of 6 classes in {tmp_path / 'out'}\n")
    assert err == "writing ...\n"
    spec = ImageSpec(height=64, width=64)
    drawn, read = open_images("fingers:12@3", spec), open_images(str(tmp_path / "out"), spec)
    assert read.labels == drawn.labels
    np.testing.assert_array_equal(np.bincount(read.targets), np.bincount(drawn.targets))


def test_a_class_name_is_no_path(tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("T-shirt/top", "T-shirt_top", "..", ".hidden", "/absolute")
    pixels = np.zeros((64, 64, 3), np.uint8)
    source = ImageSet("clothes", labels, np.arange(5), lambda index: pixels, lambda index, side: pixels)
    monkeypatch.setattr(images, "open_images", lambda data, spec: source)
    assert command_line("images", "clothes", "-o", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "T-shirt_top", "T-shirt_top_2", "_.", "_absolute", "_hidden"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    read = open_images(str(tmp_path / "out"), ImageSpec(height=64, width=64))
    assert len(read.labels) == len(read) == 5


def test_others_may_read_the_folder(photos: Path, tmp_path: Path, command_line: CommandLine) -> None:
    assert command_line("images", photos, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == (photos / "cat").stat().st_mode & 0o777


def test_an_empty_folder_is_filled(photos: Path, tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "out").mkdir()
    assert command_line("images", photos, "-o", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{photos}", "-o", "{photos}"], 2, "exists and is not empty"),
        (["{photos}", "-o", "{photos}/cat/1.png"], 2, "exists and is not empty"),
        (["{photos}", "-o", "{photos}/cat/1.png/out"], 2, "cannot be made"),
        (["{photos}", "-o", "{new}", "--size", "big"], 2, "HEIGHTxWIDTH"),
        (["fingers:0", "-o", "{new}"], 2, "needed is a whole number from 1"),
        (["{photos}/cat", "-o", "{new}"], 1, "one sub-folder a class"),
        (["nowhere", "-o", "{new}"], 1, "no such folder"),
        (["{photos}"], 2, "Missing option"),
    ],
)
def test_errors_leave_things_alone(
    arguments: list[str], code: int, message: str, photos: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    before = sorted(tmp_path.rglob("*"))
    filled = [each.format(photos=photos, new=tmp_path / "new") for each in arguments]
    found, out, err = command_line("images", *filled, "--json")
    assert (found, out) == (code, "")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_image_leaves_nothing_half_written(photos: Path, tmp_path: Path, command_line: CommandLine) -> None:
    (photos / "dog/2.png").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = command_line("images", photos, "-o", tmp_path / "out")
    assert code == 1
    assert "dog/2.png: not an image" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_leaves_nothing_half_written(
    photos: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fromarray = Image.fromarray
    seen = []

    def stop(pixels: np.ndarray) -> Image.Image:
        seen.append(pixels)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return fromarray(pixels)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(images.Image, "fromarray", stop)
    assert command_line("images", photos, "-o", tmp_path / "out")[0] == 130
    assert sorted(tmp_path.rglob("*")) == before
