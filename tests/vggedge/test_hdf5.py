from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggedge.data import ImageSet, open_images
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import ImageSpec, Pixels, fit_image, scale_image

h5py = pytest.importorskip("h5py")

SPEC = ImageSpec(height=8, width=12)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 10, 20, 3), dtype=np.uint8)
NUMBERS = np.array([2, 0, 1, 1, 0, 2])


def write(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "signs.h5"


def read(path: Path, **datasets: Any) -> ImageSet:
    """Write a file of a train part, of which ``datasets`` replace or add some and None leaves one out; open it."""
    held = {"train_set_x": IMAGES, "train_set_y": NUMBERS, **datasets}
    write(path, **{name: values for name, values in held.items() if values is not None})
    return open_images(str(path), SPEC)


class TestRead:
    def test_images_are_fitted_and_scaled_as_files_are(self, path: Path) -> None:
        images = read(path)
        assert images.name == f"{path}:train"
        assert images.read().shape == (6, 8, 12, 3)
        for index in range(6):
            picture = Image.fromarray(IMAGES[index])
            np.testing.assert_array_equal(images.read_one(index), fit_image(picture, SPEC))
            np.testing.assert_array_equal(images.read_scaled(index, 7), scale_image(picture, 7, SPEC.kernel))
        assert images.read_scaled(0, 7).shape == (7, 14, 3)
        np.testing.assert_array_equal(images.read_scaled(3, 10), IMAGES[3])

    def test_kernel_and_crop_of_the_spec_are_honoured(self, path: Path) -> None:
        read(path)
        spec = ImageSpec(height=5, width=5, resize="crop", kernel="nearest")
        images = open_images(str(path), spec)
        picture = Image.fromarray(IMAGES[1])
        np.testing.assert_array_equal(images.read_one(1), fit_image(picture, spec))
        np.testing.assert_array_equal(images.read_scaled(1, 5), scale_image(picture, 5, "nearest"))

    @pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1)])
    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.uint64])
    def test_labels_of_every_public_shape_and_integer_type(self, path: Path, shape: Any, dtype: type) -> None:
        images = read(path, train_set_y=NUMBERS.reshape(shape).astype(dtype))
        assert images.targets.tolist() == NUMBERS.tolist()
        assert images.targets.dtype == np.int64
        assert images.labels == ("0", "1", "2")

    @pytest.mark.parametrize("shape", [(6, 10, 60), (6, 10, 60, 1)])
    def test_grey_becomes_rgb(self, path: Path, shape: tuple[int, ...]) -> None:
        got = read(path, train_set_x=IMAGES.reshape(shape)).read_scaled(2, 10)
        assert got.shape == (10, 60, 3)
        for channel in range(3):
            np.testing.assert_array_equal(got[:, :, channel], IMAGES[2].reshape(10, 60))

    def test_compressed_in_chunks_of_many_images(self, path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("train_set_x", data=IMAGES, compression="gzip", chunks=(4, 5, 5, 1))
            file["train_set_y"] = NUMBERS
        np.testing.assert_array_equal(open_images(str(path), SPEC).read_scaled(5, 10), IMAGES[5])

    def test_suffix_is_taken_in_any_case(self, tmp_path: Path) -> None:
        assert len(read(tmp_path / "A.HDF5")) == 6

    def test_other_threads_may_read_and_nobody_need_hold_the_file(self, path: Path) -> None:
        images = read(path)
        gc.collect()
        want = images.read()
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(images.read_one, list(range(6)) * 50))
        np.testing.assert_array_equal(np.stack(got), np.concatenate([want] * 50))

    def test_the_file_is_closed_with_the_set(self, path: Path) -> None:
        images = read(path)
        images.read_one(0)
        del images
        gc.collect()
        write(path, train_set_x=IMAGES[:2], train_set_y=[0, 1])  # refused while anybody has it open
        assert len(open_images(str(path), SPEC)) == 2

    def test_training_reads_it_batch_by_batch(self, path: Path) -> None:
        """Keras reads from a thread of its own choice; memory_bytes=0 makes it read the file in every epoch."""
        pytest.importorskip("tensorflow")
        from vggedge.architecture import get_spec
        from vggedge.training import TrainConfig, train

        readers: set[int] = set()
        write(path, train_set_x=np.repeat(IMAGES, 2, axis=0), train_set_y=np.repeat(NUMBERS, 2))
        images = open_images(str(path), ImageSpec(height=32, width=32))

        def read_one(index: int) -> Pixels:
            readers.add(threading.get_ident())
            return images.read_one(index)

        watched = replace(images, read_one=read_one)
        spec = get_spec("vgg9-compact", classes=3, input=(32, 32, 3))
        result = train(spec, watched, TrainConfig(epochs=1, batch_size=4, memory_bytes=0))
        assert result.history.training_images == 9
        assert readers - {threading.get_ident()}, "read by the thread that opened it alone: this proves nothing"


class TestParts:
    @pytest.fixture
    def both(self, path: Path) -> Path:
        return write(
            path, train_set_x=IMAGES, train_set_y=NUMBERS, test_set_x=IMAGES[:2, ::-1], test_set_y=np.array([0, 1])
        )

    def test_train_is_meant_where_a_file_has_both(self, both: Path) -> None:
        for data in (f"{both}", f"{both}:train"):
            assert (len(open_images(data, SPEC)), open_images(data, SPEC).name) == (6, f"{both}:train")
        test = open_images(f"{both}:test", SPEC)
        assert (len(test), test.name) == (2, f"{both}:test")
        np.testing.assert_array_equal(test.read_scaled(0, 10), IMAGES[0, ::-1])

    def test_both_parts_have_the_classes_of_both(self, both: Path) -> None:
        assert open_images(f"{both}:test", SPEC).labels == open_images(f"{both}:train", SPEC).labels == ("0", "1", "2")

    def test_test_file_alone(self, path: Path) -> None:
        write(path, test_set_x=IMAGES, test_set_y=NUMBERS)
        assert open_images(f"{path}", SPEC).name == f"{path}:test"
        with pytest.raises(DataError, match=r"no data set train_set_x; the file holds test_set_x, test_set_y\. Needed"):
            open_images(f"{path}:train", SPEC)

    @pytest.mark.parametrize("part", ["", "val", "Test", "train:test"])
    def test_other_parts_are_refused(self, both: Path, part: str) -> None:
        with pytest.raises(UsageError, match=r"needed is train or test, such as .*signs\.h5:test\.") as caught:
            open_images(f"{both}:{part}", SPEC)
        assert f"the part is {part!r}" in str(caught.value)

    def test_part_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "set.h5").mkdir()
        with pytest.raises(DataError, match=r"set\.h5: a folder"):
            open_images(f"{tmp_path / 'set.h5'}:test", SPEC)


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [
            np.array([b"cat", b"dog", b"f\xc3\xa9e"]),
            np.array(["cat", "dog", "fée"], dtype=object),
            np.array([["cat", "dog", "fée"]], dtype=object),
        ],
    )
    def test_text_is_decoded(self, path: Path, names: Any) -> None:
        assert read(path, list_classes=names).labels == ("cat", "dog", "fée")

    def test_dots_and_slashes_within_a_name_stay(self, path: Path) -> None:
        names = np.array([b"T-shirt/top", b"a..b", b".c"])
        assert read(path, list_classes=names).labels == ("T-shirt/top", "a..b", ".c")

    def test_integers_become_text(self, path: Path) -> None:
        assert read(path, list_classes=np.arange(4)).labels == ("0", "1", "2", "3")
        assert read(path, list_classes=np.array([10, 20, 30])).labels == ("10", "20", "30")
        assert read(path, list_classes=np.array([1, 2, 3])).labels == ("1", "2", "3")  # label 0 can only be a place

    def test_integers_that_labels_may_mean_by_value_are_refused(self, path: Path) -> None:
        with pytest.raises(DataError, match=r"list_classes is \[1, 2, 3\] and every label is one of these.*by place"):
            read(path, list_classes=np.array([1, 2, 3]), train_set_y=NUMBERS.clip(1))

    def test_named_class_may_lack_images(self, path: Path) -> None:
        images = read(path, list_classes=np.array([b"a", b"b", b"c", b"d"]), train_set_y=NUMBERS.clip(1))
        assert images.labels == ("a", "b", "c", "d")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (np.array([b"a", b"b"]), r"train_set_y holds 2 \(image 0\), and list_classes has 2 names.*0 to 1"),
            (np.array([b"a", b"b", b"a"]), "list_classes holds 'a' twice"),
            (np.array([b"a", b" ", b"c"]), "name 1 of list_classes is ' '; needed is one line"),
            (np.array([b"a", b"b\nc", b"c"]), r"name 1 of list_classes is 'b\\nc'"),
            (np.array([b"\xff", b"b", b"c"]), "list_classes is no UTF-8 text"),
            (np.array([b"../../a", b"b", b"c"]), "holds '../../a', which is a path"),
            (np.array([b"a", b"/b", b"c"]), "holds '/b', which is a path"),
            (np.array([b"a", b"b", b"c\\..\\.."]), "which is a path"),
            (np.array([0.5, 1.5, 2.5]), "name 0 of list_classes is '0.5'; needed .* or an integer"),
            (np.zeros(0, dtype="S1"), None),
            (np.array(b"a"), r"list_classes has the shape \(\); needed is \(n,\)"),
        ],
    )
    def test_bad_names(self, path: Path, names: Any, message: str | None) -> None:
        with pytest.raises(DataError, match=message or "list_classes is empty; needed is a name for every class"):
            read(path, list_classes=names)


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train_set_x": None}, "no data set train_set_x; the file holds train_set_y"),
            ({"train_set_y": None}, "no data set train_set_y; the file holds train_set_x"),
            ({"train_set_x": None, "train_set_y": None}, "the file holds nothing"),
            ({"train_set_x": IMAGES / 255.0}, r"train_set_x is float64; needed are uint8 pixels.*Undo the scaling"),
            ({"train_set_x": IMAGES.astype(np.int32)}, "train_set_x is int32; needed are uint8"),
            ({"train_set_x": IMAGES[0, 0]}, r"shape \(20, 3\); needed is \(n, height, width, 3\)"),
            ({"train_set_x": IMAGES.transpose(0, 3, 1, 2)}, r"shape \(6, 3, 10, 20\); needed is"),
            ({"train_set_x": IMAGES[:0]}, r"shape \(0, 10, 20, 3\); .* at least 1 image"),
            ({"train_set_x": h5py.Empty("u1")}, r"shape \(\); needed"),
            ({"train_set_y": NUMBERS[:5]}, "holds 6 images and train_set_y 5 labels"),
            ({"train_set_y": np.eye(3, dtype=int)[NUMBERS]}, r"shape \(6, 3\); .*no one-hot rows"),
            ({"train_set_y": NUMBERS / 1.0}, "train_set_y is float64; needed are class numbers of an integer type"),
            ({"train_set_y": NUMBERS - 1}, r"train_set_y holds -1 \(image 1\); class numbers start at 0"),
            ({"train_set_y": NUMBERS + 1}, "no image of class 0, and the labels go up to 3; without list_classes"),
            ({"train_set_y": NUMBERS * 2}, "no image of class 1, and the labels go up to 4"),
            ({"train_set_y": np.full(6, 2**64 - 1, dtype=np.uint64)}, "no image of class 0"),
            ({"train_set_y": NUMBERS * 0}, "one class, '0'; a classifier needs at least 2"),
        ],
    )
    def test_layout(self, path: Path, change: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            read(path, **change)
        assert str(caught.value).startswith(f"{path}: ")

    def test_group_in_place_of_a_data_set(self, path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_group("train_set_x")
        with pytest.raises(DataError, match="train_set_x is a group; needed is a data set"):
            open_images(str(path), SPEC)

    def test_long_listings_are_cut(self, path: Path) -> None:
        write(path, **{f"layer{place:02}": 0 for place in range(30)})
        with pytest.raises(DataError, match=r"holds layer00, .*layer09, \.\.\.\. Needed"):
            open_images(str(path), SPEC)

    def test_missing_file(self, path: Path) -> None:
        for data in (f"{path}", f"{path}:test"):
            with pytest.raises(DataError, match=r"signs\.h5: no such file"):
                open_images(data, SPEC)

    @pytest.mark.parametrize("content", [b"", b"hello\n" * 1000])
    def test_file_that_is_no_hdf5(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"signs\.h5: cannot be read as HDF5 .*or no HDF5 file: get it again"):
            open_images(str(path), SPEC)

    def test_truncated_file(self, path: Path) -> None:
        read(path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(DataError, match=r"signs\.h5: cannot be read as HDF5 \(.*truncated"):
            open_images(str(path), SPEC)

    def test_damaged_pixels_are_named_when_they_are_read(self, path: Path) -> None:
        with h5py.File(path, "w") as file:
            images = file.create_dataset("train_set_x", data=IMAGES, compression="gzip", chunks=(1, 10, 20, 3))
            file["train_set_y"] = NUMBERS
            place = images.id.get_chunk_info(4).byte_offset
        content = bytearray(path.read_bytes())
        content[place : place + 40] = b"\xff" * 40
        path.write_bytes(content)
        opened = open_images(str(path), SPEC)
        opened.read([0, 1, 2, 3, 5])
        with pytest.raises(DataError, match=r"image 4 of train_set_x cannot be read .*is damaged, or compressed"):
            opened.read_one(4)

    def test_no_damage_shows_a_traceback(self, path: Path) -> None:
        """Bytes all over the file, one at a time: it can be read all the same, or the error is ours."""
        write(path, train_set_x=IMAGES[:, :2, :2], train_set_y=NUMBERS, list_classes=np.array([b"a", b"b", b"c"]))
        whole = path.read_bytes()
        refused = 0
        for place in range(0, len(whole), 17):
            changed = bytearray(whole)
            changed[place] ^= 0x55
            damaged = path.with_name(f"{place}.h5")
            damaged.write_bytes(changed)
            try:
                open_images(str(damaged), SPEC).read()
            except DataError:
                refused += 1
        assert refused > 10
