from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge.data import open_images
from vggedge.data.keras_data import LABELS
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import ImageSpec

pytest.importorskip("tensorflow")

SPEC = ImageSpec(height=14, width=14)
SHAPES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "fashion_mnist": (28, 28), "mnist": (28, 28)}


@pytest.fixture
def replace_loader(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    from vggedge.model import import_keras

    datasets = import_keras().datasets
    return lambda name, load: monkeypatch.setattr(getattr(datasets, name), "load_data", load)


def draw(name: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What a loader gives, in its shapes and types: five images to train, two to test."""
    generator = np.random.default_rng(0)
    column = (-1, 1) if name.startswith("cifar") else (-1,)
    return tuple(
        (
            generator.integers(0, 256, (count, *SHAPES[name]), dtype=np.uint8),
            (np.arange(count) + 1).astype(np.uint8).reshape(column),
        )
        for count in (5, 2)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parts_have_their_images_labels_and_names(name: str, replace_loader: Any) -> None:
    (images, _), (test_images, _) = draw(name)
    replace_loader(name, lambda: draw(name))
    for data, want, part in (
        (f"keras:{name}", images, "train"),
        (f"keras:{name}:train", images, "train"),
        (f"keras:{name}:test", test_images, "test"),
    ):
        got = open_images(data, SPEC)
        assert got.name == f"keras:{name}:{part}"
        assert got.labels == LABELS[name]
        assert got.targets.tolist() == list(range(1, len(want) + 1))
        assert got.targets.dtype == np.int64
        assert got.read().shape == (len(want), 14, 14, 3)
        side = SHAPES[name][0]
        rgb = want if want.ndim == 4 else np.repeat(want[..., np.newaxis], 3, axis=3)
        np.testing.assert_array_equal(got.read_scaled(1, side), rgb[1])


def test_labels_are_the_published_ones() -> None:
    assert {name: len(labels) for name, labels in LABELS.items()} == {
        "cifar10": 10,
        "cifar100": 100,
        "fashion_mnist": 10,
        "mnist": 10,
    }
    assert (LABELS["cifar10"][0], LABELS["cifar10"][9]) == ("airplane", "truck")
    assert (LABELS["fashion_mnist"][0], LABELS["fashion_mnist"][9]) == ("T-shirt/top", "Ankle boot")
    assert LABELS["mnist"][7] == "7"
    assert LABELS["cifar100"][99] == "99"
    assert all(len(set(labels)) == len(labels) for labels in LABELS.values())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnits", " Did you mean keras:mnist?"),
        ("CIFAR10", " Did you mean keras:cifar10?"),
        ("fashion-mnist", " Did you mean keras:fashion_mnist?"),
        ("imdb", ""),
        ("", ""),
    ],
)
def test_unknown_names_list_the_known(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_images(f"keras:{name}", SPEC)
    known = "cifar10, cifar100, fashion_mnist, mnist"
    assert str(caught.value) == f"no data set of Keras is called {name!r}.{hint} Known are: {known}."


@pytest.mark.parametrize("part", ["", "validation", "test:1"])
def test_unknown_parts(part: str) -> None:
    with pytest.raises(UsageError, match=r"needed is train or test, such as keras:mnist:test\.") as caught:
        open_images(f"keras:mnist:{part}", SPEC)
    assert f"the part is {part!r}" in str(caught.value)


@pytest.mark.parametrize(
    "error", [Exception("URL fetch failure on https://example.org: None -- refused"), OSError("no space"), EOFError()]
)
def test_failed_download_names_the_data_set_and_what_to_do(error: Exception, replace_loader: Any) -> None:
    def fail() -> None:
        raise error

    replace_loader("cifar10", fail)
    with pytest.raises(DataError, match=r"keras:cifar10: could not be downloaded or read") as caught:
        open_images("keras:cifar10:test", SPEC)
    assert f"({str(error) or type(error).__name__})" in str(caught.value)
    assert "Try again with a connection" in str(caught.value)


def test_progress_of_a_download_leaves_stdout_to_results(
    replace_loader: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Any:
        sys.stdout.write("Downloading data from https://example.org\n")
        return draw("mnist")

    replace_loader("mnist", load)
    open_images("keras:mnist", SPEC)
    assert capsys.readouterr() == ("", "Downloading data from https://example.org\n")
