from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import (
    ImageSpec,
    Normalization,
    check_batch,
    find_images,
    find_other_files,
    fit_image,
    read_image,
    read_scaled_image,
    scale_image,
)

EXIF_ORIENTATION = 0x0112


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def spec_of(image: Image.Image) -> ImageSpec:
    return ImageSpec(height=image.height, width=image.width)


@pytest.fixture
def pattern() -> np.ndarray:
    """(5, 7, 3), every pixel different, no symmetry."""
    return np.random.default_rng(0).permutation(255)[:105].reshape(5, 7, 3).astype(np.uint8)


class TestModes:
    def test_rgb_passes_unchanged(self, pattern: np.ndarray) -> None:
        image = Image.fromarray(pattern)
        got = read_image(encode(image), spec_of(image))
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, pattern)

    def test_path_string_and_bytes_agree(self, pattern: np.ndarray, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encode(Image.fromarray(pattern)))
        spec = ImageSpec(height=3, width=4)
        want = read_image(path.read_bytes(), spec)
        np.testing.assert_array_equal(read_image(path, spec), want)
        np.testing.assert_array_equal(read_image(str(path), spec), want)

    def test_result_can_be_written_to(self, pattern: np.ndarray) -> None:
        image = Image.fromarray(pattern)
        read_image(encode(image), spec_of(image))[0, 0, 0] = 1
        fit_image(image, spec_of(image))[0, 0, 0] = 1

    def test_grey_fills_three_channels(self, pattern: np.ndarray) -> None:
        image = Image.fromarray(pattern[:, :, 0])
        got = read_image(encode(image), spec_of(image))
        np.testing.assert_array_equal(got, np.repeat(pattern[:, :, :1], 3, axis=2))

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_alpha_is_dropped_and_not_blended(self, mode: str, pattern: np.ndarray) -> None:
        image = Image.fromarray(pattern).convert(mode)
        image.putalpha(Image.fromarray(pattern[:, :, 0]))
        want = np.asarray(Image.fromarray(pattern).convert("L" if mode == "LA" else "RGB").convert("RGB"))
        np.testing.assert_array_equal(read_image(encode(image), spec_of(image)), want)

    @pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
    def test_palette_gives_its_colours(self, transparency: int | bytes | None) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2])
        options = {} if transparency is None else {"transparency": transparency}
        got = read_image(encode(image, **options), spec_of(image))
        assert got.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]

    def test_rgb_with_a_transparent_colour_keeps_it(self) -> None:
        image = Image.new("RGB", (2, 2), (9, 8, 7))
        got = read_image(encode(image, transparency=(9, 8, 7)), spec_of(image))
        assert got[0, 0].tolist() == [9, 8, 7]

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (2, 1), (255, 0, 0, 0))
        assert read_image(encode(image, "TIFF"), spec_of(image))[0, 0].tolist() == [0, 255, 255]

    def test_black_and_white(self) -> None:
        image = Image.new("1", (2, 1))
        image.putpixel((1, 0), 1)
        assert read_image(encode(image), spec_of(image)).tolist() == [[[0] * 3, [255] * 3]]

    @pytest.mark.parametrize("form", ["PNG", "TIFF"])
    def test_sixteen_bit_grey_is_scaled_and_not_clipped(self, form: str) -> None:
        deep = np.array([[0, 256, 257, 0x7FFF, 0xFF00, 0xFFFF]], dtype=np.uint16)
        image = Image.fromarray(deep)
        assert image.mode == "I;16"
        got = read_image(encode(image, form), spec_of(image))
        assert got[0, :, 0].tolist() == [0, 0, 1, 127, 254, 255]

    def test_sixteen_bit_grey_of_either_byte_order(self) -> None:
        deep = np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)
        little = encode(Image.fromarray(deep), "TIFF")
        big = b"P5 3 1 65535\n" + deep.astype(">u2").tobytes()
        spec = ImageSpec(height=1, width=3)
        assert read_image(little, spec)[0, :, 0].tolist() == [0, 18, 255]
        np.testing.assert_array_equal(read_image(big, spec), read_image(little, spec))

    def test_thirty_two_bit_grey_within_sixteen(self) -> None:
        image = Image.fromarray(np.array([[0, 0xFFFF]], dtype=np.int32))
        assert image.mode == "I"
        assert read_image(encode(image, "TIFF"), spec_of(image))[0, :, 0].tolist() == [0, 255]

    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (np.array([[0, 70000]], dtype=np.int32), "values outside 0..65535"),
            (np.array([[-1, 5]], dtype=np.int32), "values outside 0..65535"),
            (np.array([[0.5, 1.0]], dtype=np.float32), "no fixed range"),
        ],
    )
    def test_pixels_without_a_known_range_are_refused(self, pixels: np.ndarray, message: str) -> None:
        image = Image.fromarray(pixels)
        with pytest.raises(DataError, match=message):
            read_image(encode(image, "TIFF"), spec_of(image))

    def test_first_frame_of_an_animation(self) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
        data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
        got = read_image(data, ImageSpec(height=4, width=4))
        assert got[0, 0].tolist() == [200, 0, 0]


# What a viewer has to do for each EXIF orientation, in NumPy; from the EXIF specification's table.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


class TestOrientation:
    @pytest.mark.parametrize("orientation", sorted(UPRIGHT))
    @pytest.mark.parametrize("form", ["PNG", "TIFF"])
    def test_exif_orientation_is_obeyed(self, orientation: int, form: str, pattern: np.ndarray) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        want = UPRIGHT[orientation](pattern)
        data = encode(Image.fromarray(pattern), form, exif=exif)
        got = read_image(data, ImageSpec(height=want.shape[0], width=want.shape[1]))
        np.testing.assert_array_equal(got, want)

    def test_jpeg_of_a_turned_camera(self) -> None:
        stored = np.zeros((16, 32, 3), dtype=np.uint8)
        stored[:, :16] = 255
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        data = encode(Image.fromarray(stored), "JPEG", exif=exif, quality=95)
        got = read_image(data, ImageSpec(height=32, width=16))
        assert got[:12].min() > 240
        assert got[20:].max() < 15

    def test_malformed_entries_beside_the_orientation_do_not_matter(self) -> None:
        """An image width of type FLOAT cannot be written back, and nobody asks for it."""
        exif = Image.Exif()
        exif[0x0100] = 32
        exif[EXIF_ORIENTATION] = 6
        data = encode(Image.new("RGB", (32, 16), (90, 90, 90)), "JPEG", exif=exif)
        entry = data.index(b"MM\x00*\x00\x00\x00\x08") + 10
        assert data[entry : entry + 4] in (b"\x01\x00\x00\x03", b"\x01\x00\x00\x04")
        broken = data[: entry + 3] + b"\x0b" + data[entry + 4 :]
        got = read_image(broken, ImageSpec(height=32, width=16))
        assert np.abs(got.astype(int) - 90).max() < 3

    @pytest.mark.parametrize("orientation", [0, 9])
    def test_orientations_that_do_not_exist_change_nothing(self, orientation: int, pattern: np.ndarray) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        data = encode(Image.fromarray(pattern), exif=exif)
        np.testing.assert_array_equal(read_image(data, ImageSpec(height=5, width=7)), pattern)


class TestUnreadable:
    SPEC = ImageSpec(height=8, width=8)

    def write(self, folder: Path, content: bytes) -> Path:
        path = folder / "photo.png"
        path.write_bytes(content)
        return path

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
    def test_truncated_file_is_named(self, form: str, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        whole = encode(Image.fromarray(noise), form)
        with pytest.raises(DataError, match=r"photo\.png: "):
            read_image(self.write(tmp_path, whole[: len(whole) // 2]), self.SPEC)

    @pytest.mark.parametrize("content", [b"", b"hello, this is text\n" * 50, b"\x89PNG\r\n\x1a\n"])
    def test_file_that_is_no_image_is_named(self, content: bytes, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"photo\.png: not an image that Pillow can read"):
            read_image(self.write(tmp_path, content), self.SPEC)

    def test_bytes_are_named_by_their_length(self) -> None:
        with pytest.raises(DataError, match=r"<3 bytes>: not an image"):
            read_image(b"abc", self.SPEC)

    def test_damaged_bytes_in_the_middle(self, tmp_path: Path) -> None:
        data = bytearray(encode(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))))
        place = data.index(b"IDAT")
        data[place + 8 : place + 16] = b"\xff" * 8
        with pytest.raises(DataError, match=r"photo\.png: "):
            read_image(self.write(tmp_path, bytes(data)), self.SPEC)

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.png: no such file"):
            read_image(tmp_path / "gone.png", self.SPEC)

    def test_folder_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            read_image(tmp_path, self.SPEC)

    @pytest.mark.parametrize("side", [14_000, 60_000])
    def test_huge_declared_size_is_refused_before_it_is_decoded(self, side: int, tmp_path: Path) -> None:
        """Both are past twice Pillow's MAX_IMAGE_PIXELS; the file holds one pixel."""
        header = bytearray(encode(Image.new("L", (1, 1)), "BMP"))
        header[18:22] = header[22:26] = side.to_bytes(4, "little")
        with pytest.raises(DataError, match=r"photo\.png: .*exceeds limit of \d+ pixels"):
            read_image(self.write(tmp_path, bytes(header)), self.SPEC)

    @pytest.mark.parametrize("pixels", [15, 16, 30])
    def test_large_but_not_too_large_is_read_without_a_warning(
        self, pixels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pillow warns above its limit and refuses above twice that; there is one limit, the upper one."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
        image = Image.new("RGB", (pixels, 1), (1, 2, 3))
        assert (read_image(encode(image), spec_of(image)) == (1, 2, 3)).all()

    def test_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
        image = Image.new("RGB", (31, 1))
        with pytest.raises(DataError, match="31 pixels"):
            read_image(encode(image), spec_of(image))


class TestFit:
    def test_stretch_ignores_the_aspect_ratio(self) -> None:
        wide = np.zeros((10, 40, 3), dtype=np.uint8)
        wide[:, 20:] = 200
        got = fit_image(Image.fromarray(wide), ImageSpec(height=8, width=8, kernel="nearest"))
        assert (got[:, :4] == 0).all()
        assert (got[:, 4:] == 200).all()

    def test_crop_keeps_the_aspect_ratio_and_the_centre(self) -> None:
        wide = np.zeros((10, 40, 3), dtype=np.uint8)
        wide[:, 15:25] = 200
        spec = ImageSpec(height=5, width=5, resize="crop", kernel="nearest")
        assert (fit_image(Image.fromarray(wide), spec) == 200).all()
        tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
        assert (fit_image(Image.fromarray(tall), spec) == 200).all()

    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (40, 40), (400, 300)])
    def test_crop_at_a_scale_is_the_centre_of_the_scaled_image(self, size: tuple[int, int]) -> None:
        noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        spec = ImageSpec(height=16, width=24, resize="crop", scale=30, kernel="bicubic")
        whole = scale_image(image, 30, "bicubic")
        top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 24) // 2
        np.testing.assert_array_equal(fit_image(image, spec), whole[top : top + 16, left : left + 24])
        assert fit_image(image, spec).flags.c_contiguous

    def test_height_and_width_are_not_swapped(self, pattern: np.ndarray) -> None:
        for resize in ("stretch", "crop"):
            spec = ImageSpec(height=4, width=9, resize=resize)  # type: ignore[arg-type]
            assert fit_image(Image.fromarray(pattern), spec).shape == (4, 9, 3) == spec.shape

    def test_shrinking_averages_and_so_does_not_alias(self) -> None:
        stripes = np.zeros((64, 64, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        got = fit_image(Image.fromarray(stripes), ImageSpec(height=8, width=8)).astype(int)
        assert np.abs(got - 127.5)[:, 1:-1].max() < 1
        assert np.abs(got - 127.5).max() < 5  # the border sees half a kernel

    @pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
    def test_flat_colour_stays_at_every_kernel(self, kernel: str) -> None:
        image = Image.new("RGB", (33, 17), (12, 200, 99))
        got = fit_image(image, ImageSpec(height=8, width=24, kernel=kernel))  # type: ignore[arg-type]
        assert (got == (12, 200, 99)).all()


class TestScale:
    @pytest.mark.parametrize(
        ("size", "side", "shape"),
        [
            ((40, 30), 15, (15, 20, 3)),
            ((30, 40), 15, (20, 15, 3)),
            ((7, 5), 3, (3, 4, 3)),  # 4.2
            ((5, 7), 4, (6, 4, 3)),  # 5.6
            ((640, 480), 256, (256, 341, 3)),  # 341.33
            ((500, 333), 224, (224, 336, 3)),  # 336.34
            ((1000, 3), 2, (2, 667, 3)),
            ((9, 9), 1, (1, 1, 3)),
            ((10, 4), 400, (400, 1000, 3)),
        ],
    )
    def test_shorter_side_is_exact_and_the_other_rounded(
        self, size: tuple[int, int], side: int, shape: tuple[int, int, int]
    ) -> None:
        got = scale_image(Image.new("RGB", size, (12, 200, 99)), side)
        assert (got.shape, got.dtype) == (shape, np.uint8)
        assert (got == (12, 200, 99)).all()

    def test_every_size_has_the_shorter_side_asked_for(self) -> None:
        for short in range(1, 40):
            for side in (1, 7, 32):
                image = Image.new("RGB", (short, short + 3))
                assert scale_image(image, side).shape[1] == side == min(scale_image(image, side).shape[:2])

    @pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
    def test_equal_size_changes_nothing(self, kernel: str, pattern: np.ndarray) -> None:
        got = scale_image(Image.fromarray(pattern), 5, kernel)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, pattern)
        got[0, 0, 0] = 1  # a copy, not Pillow's own memory

    def test_enlarging_keeps_every_pixel_at_whole_factors_and_nearest(self, pattern: np.ndarray) -> None:
        got = scale_image(Image.fromarray(pattern), 15, "nearest")
        np.testing.assert_array_equal(got, pattern.repeat(3, axis=0).repeat(3, axis=1))

    @pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
    def test_same_kernel_as_fit_image(self, kernel: str, pattern: np.ndarray) -> None:
        image = Image.fromarray(pattern)
        spec = ImageSpec(height=10, width=14, kernel=kernel)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scale_image(image, 10, kernel), fit_image(image, spec))  # type: ignore[arg-type]

    def test_file_is_upright_before_it_is_scaled(self, pattern: np.ndarray, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        path = tmp_path / "turned.png"
        path.write_bytes(encode(Image.fromarray(pattern), exif=exif))
        np.testing.assert_array_equal(read_scaled_image(path, 5), np.rot90(pattern, -1))
        want = scale_image(Image.fromarray(np.ascontiguousarray(np.rot90(pattern, -1))), 3, "bicubic")
        for source in (path, str(path), path.read_bytes()):
            np.testing.assert_array_equal(read_scaled_image(source, 3, "bicubic"), want)

    def test_grey_file_becomes_rgb(self, pattern: np.ndarray) -> None:
        got = read_scaled_image(encode(Image.fromarray(pattern[:, :, 0])), 5)
        np.testing.assert_array_equal(got, np.repeat(pattern[:, :, :1], 3, axis=2))

    def test_unreadable_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.png: no such file"):
            read_scaled_image(tmp_path / "gone.png", 8)
        with pytest.raises(DataError, match=r"<3 bytes>: not an image"):
            read_scaled_image(b"abc", 8)


class TestCheckBatch:
    SPEC = ImageSpec(height=4, width=6)

    def test_one_image_gains_the_batch_axis_without_a_copy(self) -> None:
        image = np.zeros((4, 6, 3), dtype=np.uint8)
        batch = check_batch(image, self.SPEC)
        assert batch.shape == (1, 4, 6, 3)
        assert np.shares_memory(batch, image)

    def test_strided_batch_becomes_contiguous(self) -> None:
        images = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)[:, ::-1, :, ::-1]
        batch = check_batch(images, self.SPEC)
        assert batch.flags.c_contiguous
        np.testing.assert_array_equal(batch, images)

    @pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8, bool])
    def test_other_types_are_refused(self, dtype: type) -> None:
        with pytest.raises(DataError, match=f"dtype is {np.dtype(dtype)}; the graph takes uint8"):
            check_batch(np.zeros((4, 6, 3), dtype=dtype), self.SPEC)

    @pytest.mark.parametrize(
        "shape",
        [(6, 4, 3), (3, 4, 6), (4, 6), (4, 6, 1), (4, 6, 4), (2, 3, 4, 6), (0, 4, 6, 3), (1, 1, 4, 6, 3), ()],
    )
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        found = re.escape(f"shape is {shape}; needed is (4, 6, 3) or (n, 4, 6, 3)")
        with pytest.raises(DataError, match=found):
            check_batch(np.zeros(shape, dtype=np.uint8), self.SPEC)


class TestSpecs:
    @pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
    def test_sizes_below_one_are_refused(self, height: int, width: int) -> None:
        with pytest.raises(UsageError, match=f"{height}x{width} is no image size"):
            ImageSpec(height=height, width=width)

    @pytest.mark.parametrize(
        ("resize", "scale", "message"),
        [("stretch", 64, "only with resize crop"), ("crop", 63, "at least 64"), ("crop", 0, "at least 64")],
    )
    def test_a_scale_that_cannot_be_cut_from_is_refused(self, resize: Any, scale: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            ImageSpec(height=32, width=64, resize=resize, scale=scale)

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (ImageSpec(height=32, width=64), "stretched to 32x64"),
            (ImageSpec(height=32, width=64, resize="crop"), "centre of 32x64 at the size that covers it"),
            (ImageSpec(height=32, width=64, resize="crop", scale=72), "centre of 32x64 at a shorter side of 72"),
        ],
    )
    def test_words(self, spec: ImageSpec, words: str) -> None:
        assert spec.describe() == words

    def test_std_of_zero_is_refused(self) -> None:
        with pytest.raises(UsageError, match="every channel needs a value above 0"):
            Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 0.0, 1.0))


class TestFind:
    NAMES = (
        *("b.JPG", "a.png", "sub/c.tiff", "d.jfif", "e.gif", ".hidden.png", ".cache/d.png"),
        *("notes.txt", "labels.CSV", "noext", "f.HEIC", "sub/g.avif", "h.jpg.part", ".hidden.heic", ".cache/i.heic"),
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("sub", "folder.png", "folder.heic", ".cache"):
            (tmp_path / name).mkdir()
        for name in self.NAMES:
            (tmp_path / name).touch()
        return tmp_path

    def test_images_have_suffixes_of_either_case_sorted_and_nothing_hidden(self, folder: Path) -> None:
        assert find_images(folder) == [folder / name for name in ("a.png", "b.JPG", "d.jfif", "e.gif", "sub/c.tiff")]

    def test_other_files_are_those_that_may_have_been_meant_as_images(self, folder: Path) -> None:
        assert find_other_files(folder) == [folder / name for name in ("f.HEIC", "h.jpg.part", "noext", "sub/g.avif")]

    @pytest.mark.parametrize(("suffix", "form"), [(".jfif", "JPEG"), (".gif", "GIF")])
    def test_every_suffix_is_one_that_pillow_reads(self, suffix: str, form: str, tmp_path: Path) -> None:
        image = Image.new("RGB", (4, 3), (255, 0, 0))
        path = tmp_path / f"a{suffix}"
        path.write_bytes(encode(image, form))
        assert (np.abs(read_image(path, spec_of(image)).astype(int) - (255, 0, 0)) < 4).all()
