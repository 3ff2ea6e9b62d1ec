from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export import calibration as module
from vggedge_export.calibration import METHODS, OUTPUT_ERROR, Activations, Calibration, cache_folder
from vggedge_export.calibrators import BINS, CALIBRATORS
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.verification import batch_for, spread_rows
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.progress import ignore_progress

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)
KERNEL = RNG.normal(size=(6, 3, 1, 1)).astype(np.float32)
TENSORS = ["t", "relu"]


def graph(kernel: np.ndarray = KERNEL, after: str = "Relu") -> Graph:
    """``images`` -> Cast -> Transpose ``t`` -> convolution -> ``after`` ``relu`` -> convolution -> 2x2 maxima."""
    nodes = [
        make_node("Cast", ["images"], "pixels", to=onnx.TensorProto.FLOAT),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
        make_node("Conv", ["t", "k"], "conv"),
        make_node(after, ["conv"], "relu"),
        make_node("Conv", ["relu", "k2"], "conv2"),
        make_node("MaxPool", ["conv2"], "probabilities", kernel_shape=[2, 2]),
    ]
    inputs = [value_info("images", np.uint8, ["N", 4, 5, 3])]
    weights = {"k": kernel, "k2": np.ones((2, 6, 1, 1), np.float32) / 6}
    return Graph(nodes, weights, inputs, [value_info("probabilities", np.float32, ["N", "c", "h", "w"])])


def numpy_tensors(images: np.ndarray, kernel: np.ndarray = KERNEL) -> dict[str, np.ndarray]:
    conv = images.astype(np.float64) @ kernel[:, :, 0, 0].T.astype(np.float64)
    relu = np.maximum(conv, 0)
    conv2 = np.repeat(relu.mean(axis=-1, keepdims=True), 2, axis=-1)
    pooled = np.lib.stride_tricks.sliding_window_view(conv2, (2, 2), axis=(1, 2)).max(axis=(-2, -1))
    found = {"pixels": images.astype(np.float64), "t": images.astype(np.float64), "conv": conv, "relu": relu}
    return found | {"conv2": conv2, "probabilities": pooled}


def numpy_maxima(images: np.ndarray, kernel: np.ndarray = KERNEL) -> dict[str, float]:
    return {name: float(np.abs(values).max()) for name, values in numpy_tensors(images, kernel).items()}


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Activations]:
    """``measure(...)``: by default all three streams over all images, and no cache."""

    def run(**options: Any) -> Activations:
        settings: dict[str, Any] = {
            "images": IMAGES,
            "batch": 4,
            "scratch": tmp_path / "probe.onnx",
            "progress": ignore_progress,
            "graph": graph(),
            "tensors": TENSORS,
            "with_histograms": True,
        } | options
        asked = [settings.pop(name) for name in ("graph", "tensors", "with_histograms")]
        return Calibration(**settings).measure(asked[0], asked[1], with_histograms=asked[2])

    return run


def same(first: Activations, second: Activations) -> bool:
    """Whether two measurements are the same to the last bit and in the same order."""
    return (
        list(first.largest.items()) == list(second.largest.items())
        and list(first.by_output.items()) == list(second.by_output.items())
        and list(first.histograms) == list(second.histograms)
        and all(
            first.histograms[name].largest == second.histograms[name].largest
            and np.array_equal(first.histograms[name].counts, second.histograms[name].counts)
            for name in first.histograms
        )
    )


# --- the largest magnitudes


@pytest.mark.parametrize("batch", [1, 4, 23, 100])
def test_ranges_are_numpys_maxima_of_every_float_tensor_in_order(
    batch: int, measure: Callable[..., Activations]
) -> None:
    found = measure(batch=batch).largest
    assert list(found) == ["pixels", "t", "conv", "relu", "conv2", "probabilities"]
    assert found == pytest.approx(numpy_maxima(IMAGES), rel=1e-5)
    assert all(type(value) is float for value in found.values())


def test_nothing_depends_on_the_batch_to_the_last_bit(measure: Callable[..., Activations]) -> None:
    found = [measure(batch=batch) for batch in (1, 5, 22, 23, 100)]
    assert all(same(found[0], other) for other in found[1:])


def test_nothing_depends_on_the_order_of_the_images(measure: Callable[..., Activations]) -> None:
    assert same(measure(), measure(images=IMAGES[::-1]))


@pytest.mark.parametrize("row", [0, 11, 22])
def test_one_extreme_image_sets_the_range_wherever_it_stands(row: int, measure: Callable[..., Activations]) -> None:
    images = np.minimum(IMAGES, 100)
    images[row] = 250
    assert measure(images=images).largest == pytest.approx(numpy_maxima(images), rel=1e-5)


def test_the_magnitude_of_negative_values_counts(measure: Callable[..., Activations]) -> None:
    kernel = -np.abs(KERNEL)
    found = measure(graph=graph(kernel), tensors=["t"]).largest
    assert found["conv"] == pytest.approx(numpy_maxima(IMAGES, kernel)["conv"], rel=1e-5)
    assert found["relu"] == 0


def test_integers_are_not_measured(measure: Callable[..., Activations]) -> None:
    plain = graph()
    plain.nodes.append(make_node("Shape", ["conv"], "shape"))
    plain.nodes.append(make_node("Cast", ["conv"], "half", to=onnx.TensorProto.FLOAT16))
    assert list(measure(graph=plain).largest) == list(measure().largest)


# --- histograms


def test_histograms_are_numpys_own_counts_of_what_is_not_zero(measure: Callable[..., Activations]) -> None:
    found = measure()
    assert list(found.histograms) == TENSORS
    for name, histogram in found.histograms.items():
        values = numpy_tensors(IMAGES)[name]
        magnitudes = np.abs(values[values != 0])
        assert histogram.counts.sum() == magnitudes.size
        assert histogram.largest == found.largest[name]
        edges = np.arange(1, BINS + 1) * (histogram.largest / BINS)
        wanted = np.bincount(np.searchsorted(edges, magnitudes * (1 - 1e-6)), minlength=BINS)
        # The probe computes in float32: a value may lie on the other side of an edge, and then in the next bin.
        assert np.abs(np.cumsum(histogram.counts) - np.cumsum(wanted)).max() <= 2
    assert found.histograms["t"].counts[-1] == (IMAGES == 255).sum()
    assert found.histograms["relu"].counts.sum() < numpy_tensors(IMAGES)["relu"].size / 1.2  # the zeros are left out


def test_pixels_fall_into_their_bins(measure: Callable[..., Activations]) -> None:
    """Of exact values the counts are exact: value v of at most 255 ends in bin ceil(2048 v / 255)."""
    wanted = np.zeros(BINS, np.int64)
    for value, count in enumerate(np.bincount(IMAGES.ravel(), minlength=256)[1:], start=1):
        wanted[-(-BINS * value // 255) - 1] += count
    assert IMAGES.max() == 255
    np.testing.assert_array_equal(measure().histograms["t"].counts, wanted)


def test_without_histograms_the_images_are_gone_through_once(measure: Callable[..., Activations]) -> None:
    seen: list[str] = []
    found = measure(with_histograms=False, progress=lambda done, total, what: seen.append(what))
    assert (found.histograms, found.by_output) == ({}, {})
    assert set(seen) == {"calibrating"}
    assert found.largest == measure().largest


def test_two_layers_may_read_one_tensor(measure: Callable[..., Activations]) -> None:
    assert same(measure(tensors=["t", "relu", "relu"]), measure())


def test_nothing_to_quantise_has_no_histograms(measure: Callable[..., Activations], tmp_path: Path) -> None:
    for _ in range(2):  # measured, then read
        found = measure(tensors=[], cache=tmp_path / "cache")
        assert (found.histograms, found.by_output) == ({}, {})
        assert found.largest == measure().largest


def test_a_tensor_may_be_read_by_a_layer_that_computes_its_kernel(measure: Callable[..., Activations]) -> None:
    """Its kernel tells no number of axes; that of the next reader does."""
    plain = graph()
    plain.weights["one"] = np.float32(1)
    plain.nodes[4:4] = [
        make_node("Mul", ["k2", "one"], "computed"),
        make_node("Conv", ["relu", "computed"], "other"),
    ]
    plain.check()
    assert np.array_equal(measure(graph=plain).histograms["relu"].counts, measure().histograms["relu"].counts)


@pytest.mark.parametrize("method", list(CALIBRATORS))
def test_a_magnitude_is_what_the_calibrator_says_of_the_histogram(
    method: str, measure: Callable[..., Activations]
) -> None:
    found = measure()
    for tensor in TENSORS:
        assert found.magnitude(tensor, method) == CALIBRATORS[method](found.histograms[tensor])
        assert 0 < found.magnitude(tensor, method) <= found.largest[tensor]


def test_the_largest_magnitude_needs_no_histogram(measure: Callable[..., Activations]) -> None:
    found = measure(with_histograms=False)
    assert found.magnitude("relu", "max") == found.largest["relu"] == measure().magnitude("relu", "max")


def test_percentile_clips_one_outlier_among_many(measure: Callable[..., Activations]) -> None:
    images = np.full((300, 4, 5, 3), 10, np.uint8)
    images[150, 2, 2, 0] = 250
    found = measure(images=images, batch=64)
    assert found.largest["t"] == 250
    assert found.magnitude("t", "percentile") == pytest.approx(10, abs=250 / BINS)


# --- the errors behind the layers


def test_the_method_of_outputs_is_the_last_of_all() -> None:
    assert METHODS == (*CALIBRATORS, OUTPUT_ERROR) == ("max", "percentile", "entropy", "mse", "output")


def test_a_magnitude_by_output_leaves_the_layer_behind_least_off(measure: Callable[..., Activations]) -> None:
    """Kernels of 1x1: the sums of squares are those of a matrix product; test_output_error.py has all the others."""
    found = measure()
    assert list(found.by_output) == TENSORS
    for tensor, kernel in (("t", KERNEL[:, :, 0, 0]), ("relu", np.full((2, 6), 1 / 6))):
        values, harm = numpy_tensors(IMAGES)[tensor], {}
        for step in range(11):
            magnitude = found.largest[tensor] * 2 ** (-step / 2)
            rounded = np.clip(np.rint(values / magnitude * 127), -128, 127) * magnitude / 127
            harm[magnitude] = float(np.square((rounded - values) @ kernel.T).sum())
        assert found.magnitude(tensor, OUTPUT_ERROR) == pytest.approx(min(harm, key=harm.__getitem__))


def test_of_many_images_some_are_taken_evenly_spread_whatever_the_batch(
    measure: Callable[..., Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are not taken are bright: they would ask for the whole range."""
    monkeypatch.setattr(module, "_OUTPUT_BATCHES", 1)
    images = np.full((600, 4, 5, 3), 250, np.uint8)
    rows = spread_rows(len(images), batch_for(images))
    images[rows] = RNG.integers(0, 9, (len(rows), 4, 5, 3))
    told: list[tuple] = []
    found = [measure(images=images, batch=batch, progress=lambda *what: told.append(what)) for batch in (7, 128, 600)]
    assert found[0].largest["t"] == 250
    assert found[0].by_output["t"] < 250 / 16
    assert all(same(found[0], other) for other in found[1:])
    assert {total for _, total, what in told if what == "comparing INT8 ranges"} == {128}
    monkeypatch.undo()
    assert measure(images=images, batch=128).by_output["t"] > 125


# --- what goes on around it


def test_the_graph_is_not_changed_and_the_scratch_file_is_removed(
    measure: Callable[..., Activations], tmp_path: Path
) -> None:
    original = graph()
    before = original.to_bytes()
    measure(graph=original)
    assert original.to_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_images_to_the_last_in_every_stream(measure: Callable[..., Activations]) -> None:
    seen: list[tuple] = []
    measure(batch=10, progress=lambda *told: seen.append(told))
    plain = [(done, 23, what) for what in ("calibrating", "counting activations") for done in (10, 20, 23)]
    assert seen[:6] == plain
    last = seen[6:]  # in smaller batches: it holds every layer's input eleven times
    assert {(total, what) for _, total, what in last} == {(23, "comparing INT8 ranges")}
    steps = [done for done, *_ in last]
    assert (steps, steps[-1]) == (sorted(set(steps)), 23)


# --- what cannot be measured


def test_a_layer_that_is_zero_on_every_image_is_named(measure: Callable[..., Activations], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"^relu: zero on all 23 calibration images"):
        measure(graph=graph(-np.abs(KERNEL)), cache=tmp_path / "cache")
    assert list(tmp_path.rglob("*.*")) == []


def test_a_layer_that_is_alive_on_one_image_only_is_not_dead(measure: Callable[..., Activations]) -> None:
    images = np.zeros_like(IMAGES)
    images[-1, 0, 0] = 1
    found = measure(images=images)
    assert found.largest["relu"] > 0
    assert found.histograms["t"].counts.tolist() == [0] * (BINS - 1) + [3]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_layer_that_is_not_finite_is_named(bad: float, measure: Callable[..., Activations], tmp_path: Path) -> None:
    kernel = KERNEL.copy()
    kernel[3] = bad
    with pytest.raises(ConversionError, match=r"^conv: not finite on a calibration image"):
        measure(graph=graph(kernel), cache=tmp_path / "cache")
    assert list(tmp_path.rglob("*.*")) == []


def test_one_value_that_is_no_number_is_found_among_many_that_are(measure: Callable[..., Activations]) -> None:
    """sqrt of what is negative at some places only: a maximum that skips NaN would hide it."""
    with pytest.raises(ConversionError, match=r"^relu: not finite"):
        measure(graph=graph(after="Sqrt"))


def test_what_is_not_finite_on_the_last_image_only_is_found(measure: Callable[..., Activations]) -> None:
    images = np.zeros_like(IMAGES)
    images[-1, -1, -1] = (0, 0, 1)
    kernel = np.float32([[1, 1, 1], [1, 1, -1]] * 3)[:, :, None, None]
    with pytest.raises(ConversionError, match=r"^relu: not finite"):
        measure(images=images, graph=graph(kernel, after="Sqrt"))


def test_finite_values_whose_sum_is_not_are_measured(measure: Callable[..., Activations]) -> None:
    """As the -3.4e38 that masks attention: in FP32 there is nothing wrong with it."""
    found = measure(graph=graph(np.full((6, 3, 1, 1), 4e35, np.float32)), with_histograms=False)
    assert found.largest["conv"] == pytest.approx(4e35 * IMAGES.sum(axis=-1, dtype=np.int64).max(), rel=1e-5)


# --- the cache


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on no graph can be run."""

    def refuse(source: object, **options: object) -> None:
        raise AssertionError("the graph was run")

    return lambda: monkeypatch.setattr(module, "open_ort_session", refuse)


@pytest.mark.parametrize("with_histograms", [True, False])
def test_what_was_measured_once_is_read_and_equal(
    with_histograms: bool, measure: Callable[..., Activations], no_run: Callable[[], None], tmp_path: Path
) -> None:
    cache = tmp_path / "some" / "cache"
    first = measure(cache=cache, with_histograms=with_histograms)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    no_run()
    for batch in (4, 7):
        second = measure(cache=cache, with_histograms=with_histograms, batch=batch)
        assert same(first, second)
        assert all(type(value) is float for value in second.largest.values())
    for method in METHODS if with_histograms else ["max"]:
        assert first.magnitude("relu", method) == second.magnitude("relu", method)


def other_weight() -> dict[str, Any]:
    kernel = KERNEL.copy()
    kernel[5, 2] = np.nextafter(kernel[5, 2], np.float32(9))
    return {"graph": graph(kernel)}


def other_pixel() -> dict[str, Any]:
    images = IMAGES.copy()
    images[22, 3, 4, 2] ^= 1
    return {"images": images}


@pytest.mark.parametrize(
    "change",
    [
        other_weight(),
        {"graph": graph(after="LeakyRelu")},
        other_pixel(),
        {"images": IMAGES[:22]},
        {"images": IMAGES[::-1]},
        {"tensors": ["relu"]},
        {"tensors": ["t"]},
        {"with_histograms": False},
    ],
    ids=["weight", "node", "pixel", "fewer images", "order", "tensors", "other tensors", "no histograms"],
)
def test_anything_else_is_measured(
    change: dict[str, Any], measure: Callable[..., Activations], no_run: Callable[[], None], tmp_path: Path
) -> None:
    measure(cache=tmp_path / "cache")
    wanted = measure(**change)
    assert same(measure(**change, cache=tmp_path / "cache"), wanted)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    no_run()
    assert same(measure(**change, cache=tmp_path / "cache"), wanted)


def test_the_same_bytes_in_another_shape_are_measured(measure: Callable[..., Activations], tmp_path: Path) -> None:
    plain = graph()
    plain.inputs = [value_info("images", np.uint8, ["N", "height", "width", 3])]
    for images in (IMAGES, IMAGES.reshape(23, 5, 4, 3)):
        measure(graph=plain, images=images, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_another_onnx_runtime_measured_is_not_read(
    measure: Callable[..., Activations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(cache=tmp_path / "cache")
    monkeypatch.setattr(module, "version_of", lambda *distributions: "0.0.1")
    measure(cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_older_code_measured_is_not_read(
    measure: Callable[..., Activations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format 2 had nothing of the outputs."""
    assert module._CACHE_FORMAT == "3"
    with monkeypatch.context() as older:
        older.setattr(module, "_CACHE_FORMAT", "2")
        measure(cache=tmp_path / "cache")
    assert same(measure(cache=tmp_path / "cache"), measure())
    assert len(list((tmp_path / "cache").iterdir())) == 2


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def flip(place: int, bits: int) -> Callable[[bytes], bytes]:
    """Flip bits of the byte ``place`` places behind the start, or before the end, of the zip's directory."""

    def damage(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[content.index(b"PK\x01\x02") + place] ^= bits
        return bytes(damaged)

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "half": cut(0.5),
    "all but the end": lambda content: content[:-1],
    "no zip": lambda content: b"\0" * len(content),
    "an array": lambda content: b"\x93NUMPY\x01\x00" + content[8:],
    "a count": lambda content: content.replace(b"\x01" + bytes(7), b"\x02" + bytes(7), 1),
    "a byte more": lambda content: content + b"\0",
    "encrypted": flip(8, 1),
    "patched": flip(8, 32),
    "compressed otherwise": flip(10, 9),
    "of a later zip": flip(6, 64),
    "a member's name": flip(46, 1),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_file_is_measured_anew_and_replaced(
    damage: str, measure: Callable[..., Activations], no_run: Callable[[], None], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    wanted = measure(cache=cache)
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    entry.write_bytes(damaged)
    assert same(measure(cache=cache), wanted)
    assert entry.read_bytes() == content
    assert list(cache.iterdir()) == [entry]
    no_run()
    assert same(measure(cache=cache), wanted)


def test_any_other_byte_is_noticed(
    measure: Callable[..., Activations], no_run: Callable[[], None], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    measure(cache=cache)
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    no_run()
    for place in np.random.default_rng(0).choice(len(content), 200, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(place) % 8
        entry.write_bytes(damaged)
        with pytest.raises(AssertionError, match="the graph was run"):
            measure(cache=cache)


@pytest.mark.parametrize("obstacle", ["file", "below a file", "folder in the place of the entry"])
def test_a_cache_that_cannot_be_written_is_no_error(
    obstacle: str, measure: Callable[..., Activations], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    if obstacle.startswith("folder"):
        measure(cache=cache)
        (entry,) = cache.iterdir()
        entry.unlink()
        entry.mkdir()
        (entry / "other").touch()
    else:
        cache.touch()
        cache = cache / "deeper" if obstacle.startswith("below") else cache
    before = sorted(tmp_path.rglob("*"))
    assert same(measure(cache=cache), measure())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_file_system_is_no_error(
    measure: Callable[..., Activations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There every call that would write fails, that on a file which is not there as well."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    wanted = measure()
    for name in ("mkdir", "unlink", "write_bytes", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(Calibration, "_measure", lambda self, *asked: wanted)
    assert same(measure(cache=tmp_path / "cache"), wanted)


def test_a_write_that_ends_half_way_leaves_no_entry(
    measure: Callable[..., Activations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(measure(cache=tmp_path / "cache"), measure())
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_cache_nothing_is_kept(measure: Callable[..., Activations], tmp_path: Path) -> None:
    measure(cache=None)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vggedge" / "calibration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vggedge" / "calibration"
