from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggedge.data.folder import open_folder
from vggedge_runtime.errors import DataError
from vggedge_runtime.preprocess import ImageSpec, fit_image

SPEC = ImageSpec(height=8, width=12)


def write_image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image(tmp_path / "dog" / "b.png", (200, 0, 0))
    write_image(tmp_path / "dog" / "a.bmp", (100, 0, 0), size=(5, 50))
    write_image(tmp_path / "cat" / "deep" / "c.PNG", (0, 0, 250))
    write_image(tmp_path / "Ant" / "z.png", (0, 90, 0))
    return tmp_path


def test_labels_are_sorted_folder_names_and_targets_follow(folder: Path) -> None:
    images = open_folder(folder, SPEC)
    assert images.labels == ("Ant", "cat", "dog")
    assert images.targets.tolist() == [0, 1, 2, 2]
    assert images.targets.dtype == np.int64
    batch = images.read()
    assert batch.shape == (4, 8, 12, 3)
    assert batch[:, 0, 0].tolist() == [[0, 90, 0], [0, 0, 250], [100, 0, 0], [200, 0, 0]]


def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    Image.new("L", (9, 9), 77).save(folder / "Ant" / "a.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "Ant" / "b.png")
    batch = open_folder(folder, SPEC).read([0, 1])
    assert batch[:, 3, 3].tolist() == [[77, 77, 77], [1, 2, 3]]


def test_hidden_folders_and_files_do_not_count(folder: Path) -> None:
    write_image(folder / ".thumbnails" / "x.png")
    write_image(folder / "dog" / ".hidden.png")
    write_image(folder / "cat" / ".cache" / "x.png")
    (folder / "notes.txt").write_text("of no class")
    images = open_folder(folder, SPEC)
    assert images.labels == ("Ant", "cat", "dog")
    assert images.targets.tolist() == [0, 1, 2, 2]


def test_hidden_parents_of_the_folder_do_not_matter(tmp_path: Path) -> None:
    for label in ("a", "b"):
        write_image(tmp_path / ".data" / label / "1.png")
    assert len(open_folder(tmp_path / ".data", SPEC)) == 2


def test_subset_and_split_keep_images_with_their_targets(folder: Path) -> None:
    for place in range(5):
        write_image(folder / "cat" / f"{place}.png", (0, 0, 250))
        write_image(folder / "Ant" / f"{place}.png", (0, 90, 0))
    images = open_folder(folder, SPEC)
    rest, held = images.split(0.3, seed=0)
    assert len(rest) + len(held) == len(images)
    assert np.bincount(held.targets).tolist() == [2, 2, 1]
    channel = {0: 1, 1: 2, 2: 0}
    for part in (rest, held):
        colours = part.read()[:, 0, 0]
        assert [int(np.argmax(colour)) for colour in colours] == [channel[int(t)] for t in part.targets]


def test_split_needs_two_images_a_class(folder: Path) -> None:
    with pytest.raises(DataError, match=r"class 'Ant' has 1 image\(s\); .* needs at least 2"):
        open_folder(folder, SPEC).split(0.5, seed=0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder\. Needed is one sub-folder a class"):
        open_folder(tmp_path / "nowhere", SPEC)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"one\.png: a file, not a folder"):
        open_folder(tmp_path / "one.png", SPEC)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sub-folder and no image.*Check the path"):
        open_folder(tmp_path, SPEC)


def test_images_without_class_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    write_image(tmp_path / "2.png")
    (tmp_path / ".git").mkdir()
    with pytest.raises(DataError, match=r"2 image\(s\) directly in it and no sub-folder.*Sort the images into"):
        open_folder(tmp_path, SPEC)


def test_one_class_is_too_few(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match="one class, 'cat'; a classifier needs at least 2"):
        open_folder(tmp_path, SPEC)


def test_class_without_images_is_named(folder: Path) -> None:
    (folder / "bee").mkdir()
    (folder / "bee" / "readme.txt").write_text("to come")
    (folder / "elk").mkdir()
    with pytest.raises(DataError, match=r"bee, .*elk: no image in this class folder .*add images or remove"):
        open_folder(folder, SPEC)


def test_unreadable_image_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "Ant" / "broken.png").write_bytes(b"not an image")
    images = open_folder(folder, SPEC)
    assert len(images) == 5
    with pytest.raises(DataError, match=r"broken\.png: not an image that Pillow can read"):
        images.read()


def test_name_is_what_the_user_typed(folder: Path) -> None:
    assert open_folder(folder, SPEC, name="photos").name == "photos"
    assert open_folder(folder, SPEC).name == str(folder)


def test_files_of_no_image_format_are_named(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.heic", "cat/notes.txt", "dog/c.jpg", "dog/d.HEIC"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = open_folder(tmp_path, ImageSpec(height=8, width=8))

    assert len(images) == 2
    assert [path.name for path in images.skipped] == ["b.heic", "d.HEIC"]


def write_halves(path: Path, size: tuple[int, int], **options: object) -> None:
    """Left half black, right half white."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (size[0] // 2, 0, *size))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_scaled_images_are_whole_and_their_shorter_side_is_exact(tmp_path: Path) -> None:
    write_halves(tmp_path / "a" / "landscape.png", (90, 40))
    write_halves(tmp_path / "a" / "portrait.png", (40, 90))
    write_halves(tmp_path / "b" / "square.png", (40, 40))
    images = open_folder(tmp_path, ImageSpec(height=8, width=8, kernel="nearest"))
    for side in (1, 13, 40, 64):
        longer = round(side * 2.25)
        shapes = [images.read_scaled(index, side).shape for index in range(3)]
        assert shapes == [(side, longer, 3), (longer, side, 3), (side, side, 3)]
    for index in range(3):
        got = images.read_scaled(index, 20)
        middle = got.shape[1] // 2
        assert got.dtype == np.uint8
        assert (got[:, : middle - 1] == 0).all()
        assert (got[:, middle + 1 :] == 255).all()


def test_scaled_images_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: the left edge is the upper one
    write_halves(tmp_path / "a" / "turned.png", (90, 40), exif=exif)
    write_image(tmp_path / "b" / "1.png")
    got = open_folder(tmp_path, SPEC).read_scaled(0, 20)
    assert got.shape == (45, 20, 3)
    assert (got[:20] == 0).all()
    assert (got[25:] == 255).all()


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
def test_scaled_images_honour_the_kernel(tmp_path: Path, kernel: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "noise.png")
    Image.fromarray(noise).save(tmp_path / "b" / "noise.png")
    images = open_folder(tmp_path, ImageSpec(height=5, width=5, kernel=kernel))  # type: ignore[arg-type]
    want = fit_image(Image.fromarray(noise), ImageSpec(height=17, width=17, kernel=kernel))  # type: ignore[arg-type]
    np.testing.assert_array_equal(images.read_scaled(1, 17), want)


def test_scaled_image_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "Ant" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png: not an image"):
        open_folder(folder, SPEC).read_scaled(0, 10)
