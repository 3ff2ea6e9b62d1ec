from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggedge.data import DEFAULT_COUNT, ImageSet, open_images
from vggedge_runtime.errors import DataError, MissingDependency, UsageError
from vggedge_runtime.preprocess import ImageSpec

SPEC = ImageSpec(height=64, width=64)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("fingers", f"fingers:{DEFAULT_COUNT}@0"),
        ("fingers:100", "fingers:100@0"),
        ("fingers:100@7", "fingers:100@7"),
        ("fingers@7", f"fingers:{DEFAULT_COUNT}@7"),
        ("fingers-hard", f"fingers-hard:{DEFAULT_COUNT}@0"),
        ("fingers-hard:12@3", "fingers-hard:12@3"),
        ("fingers:007@00", "fingers:7@0"),
    ],
)
def test_fingers_forms(data: str, name: str) -> None:
    images = open_images(data, SPEC)
    assert isinstance(images, ImageSet)
    assert images.name == name
    assert images.labels == ("0", "1", "2", "3", "4", "5")
    assert len(images) == int(name.split(":")[1].split("@")[0])


def test_forms_differ_in_seed_and_level() -> None:
    drawn = [open_images(data, SPEC).read_one(0) for data in ("fingers", "fingers@1", "fingers-hard")]
    assert len({image.tobytes() for image in drawn}) == 3
    np.testing.assert_array_equal(drawn[0], open_images("fingers:1@0", SPEC).read_one(0))


@pytest.mark.parametrize("count", ["0", "-5", "many", "", "1.5", "1_000", " 5", "+5", "٣", "10000001", "9" * 40])
@pytest.mark.parametrize("level", ["fingers", "fingers-hard"])
def test_bad_counts_name_what_was_found_and_the_grammar(level: str, count: str) -> None:
    with pytest.raises(
        UsageError, match=r"needed is a whole number from 1 to 10000000.*fingers\[:COUNT\]\[@SEED\]"
    ) as caught:
        open_images(f"{level}:{count}@1", SPEC)
    assert f"the count is {count!r}" in str(caught.value)


@pytest.mark.parametrize("seed", ["", "-1", "x", "4294967296", "1@2"])
def test_bad_seeds_name_what_was_found(seed: str) -> None:
    with pytest.raises(UsageError, match="needed is a whole number from 0 to 4294967295") as caught:
        open_images(f"fingers:5@{seed}", SPEC)
    assert f"the seed is {seed!r}" in str(caught.value)


def write_classes(folder: Path) -> None:
    for place, label in enumerate(("left", "right")):
        (folder / label).mkdir(parents=True)
        Image.new("RGB", (9, 9), (place, 0, 0)).save(folder / label / "1.png")


def test_any_other_text_is_a_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "fingers-photos")
    images = open_images(str(tmp_path / "fingers-photos"), SPEC)
    assert images.labels == ("left", "right")
    assert images.read().shape == (2, 64, 64, 3)


def test_names_win_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "fingers")
    write_classes(tmp_path / "fingers-photos")
    monkeypatch.chdir(tmp_path)
    assert open_images("fingers", SPEC).labels == ("0", "1", "2", "3", "4", "5")
    assert open_images("./fingers", SPEC).labels == ("left", "right")
    assert open_images("fingers-photos", SPEC).name == "fingers-photos"


def test_misspelt_name_is_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"finger: no such folder"):
        open_images("finger", SPEC)


@pytest.mark.parametrize("name", ["set.h5", "set.h5:test"])
def test_folder_that_ends_as_a_file_would_is_a_folder(name: str, tmp_path: Path) -> None:
    write_classes(tmp_path / name)
    assert len(open_images(str(tmp_path / name), SPEC)) == 2


def test_folder_beneath_one_that_ends_as_a_file_would(tmp_path: Path) -> None:
    write_classes(tmp_path / "set.h5:2" / "photos")
    assert len(open_images(str(tmp_path / "set.h5:2" / "photos"), SPEC)) == 2


@pytest.mark.parametrize("data", ["", "  "])
def test_empty_data(data: str) -> None:
    with pytest.raises(UsageError, match=r"DATA is .*needed is fingers.*FILE\.h5 or keras:NAME"):
        open_images(data, SPEC)


@pytest.mark.parametrize("data", ["signs.h5", "keras:mnist"])
def test_missing_library_is_named_with_its_extra(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signs.h5").touch()
    monkeypatch.chdir(tmp_path)
    for module in ("h5py", "keras", "tensorflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=r"pip install 'vggedge\[train\]'"):
        open_images(data, SPEC)


@pytest.fixture
def pictures() -> ImageSet:
    """Forty images of two classes; image i is read as (i, 0, 0) pixels, and scaled as a square of (i, 1, 1)."""
    return ImageSet(
        name="forty",
        labels=("even", "odd"),
        targets=np.arange(40, dtype=np.int64) % 2,
        read_one=lambda index: np.full((2, 2, 3), (index, 0, 0), dtype=np.uint8),
        read_scaled=lambda index, side: np.full((side, side, 3), (index, 1, 1), dtype=np.uint8),
    )


def check_same_images(images: ImageSet, indices: list[int]) -> None:
    """Both readers and the targets of ``images`` are those of ``indices`` in the fixture's set."""
    assert [int(images.read_one(place)[0, 0, 0]) for place in range(len(images))] == indices
    for place, index in enumerate(indices):
        scaled = images.read_scaled(place, 3 + place % 2)
        assert scaled.shape == (3 + place % 2,) * 2 + (3,)
        assert (scaled == (index, 1, 1)).all()
    assert images.targets.tolist() == [index % 2 for index in indices]


def test_subsets_read_the_same_images_scaled(pictures: ImageSet) -> None:
    subset = pictures.subset(np.array([7, 0, 39, 7]))
    check_same_images(subset, [7, 0, 39, 7])
    check_same_images(subset.subset(np.array([2, 1])), [39, 0])


def test_taken_and_split_images_are_the_same_scaled(pictures: ImageSet) -> None:
    taken = pictures.take(10, seed=1)
    chosen = taken.read()[:, 0, 0, 0].tolist()
    assert chosen != list(range(10))
    check_same_images(taken, chosen)

    rest, held = pictures.split(0.2, seed=3)
    parts = [part.read()[:, 0, 0, 0].tolist() for part in (rest, held)]
    assert sorted(parts[0] + parts[1]) == list(range(40))
    check_same_images(rest, parts[0])
    check_same_images(held, parts[1])


def test_needs_no_tensorflow() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('tensorflow', 'keras', 'onnx', 'h5py')));"
        "from vggedge.data import open_images; from vggedge_runtime.preprocess import ImageSpec;"
        "open_images('fingers:6', ImageSpec(height=64, width=64)).read()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
