from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vggedge_runtime.dependencies import is_installed, require, version_of
from vggedge_runtime.errors import MissingDependency
from vggedge_runtime.tensorrt_api import PRODUCTS


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of a module ``flaky_library`` that can be imported; write into it what its import does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flaky_library", raising=False)
    return tmp_path / "flaky_library.py"


def test_gives_the_module() -> None:
    assert require("json", "ort") is json
    assert require("os.path", "ort").__name__ in {"posixpath", "ntpath"}


@pytest.mark.parametrize("extra", ["ort", "rtx", "train"])
def test_missing(extra: str) -> None:
    with pytest.raises(MissingDependency) as caught:
        require("surely_not_there", extra)
    assert str(caught.value) == (
        f"surely_not_there is not installed, and this step needs it. Install it with: pip install 'vggedge[{extra}]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_missing_part_of_what_is_there() -> None:
    with pytest.raises(MissingDependency, match=r"json\.surely_not_there is installed but does not import \(No module"):
        require("json.surely_not_there", "ort")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import surely_not_there", "No module named 'surely_not_there'"),
        ("raise ImportError('libcublas.so.12: cannot open shared object file')", "libcublas.so.12: cannot open"),
        # ctypes.CDLL, NumPy's ABI check and protobuf's version check raise these:
        ("raise OSError('libnvinfer.so.10: cannot open')", "libnvinfer.so.10: cannot open"),
        ("raise AttributeError('_ARRAY_API not found')", "_ARRAY_API not found"),
        ("raise TypeError('Descriptors cannot be created directly')", "Descriptors cannot be"),
    ],
)
def test_there_but_broken(text: str, message: str, library: Path) -> None:
    library.write_text(text)
    with pytest.raises(MissingDependency, match=r"flaky_library is installed but does not import") as caught:
        require("flaky_library", "rtx")
    assert message in str(caught.value)
    assert "vggedge[rtx]" in str(caught.value)


def test_ctrl_c_during_a_slow_import_is_no_missing_library(library: Path) -> None:
    library.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        require("flaky_library", "train")


def test_is_installed_does_not_import(library: Path) -> None:
    assert not is_installed("flaky_library")
    library.write_text("raise RuntimeError('imported')")
    assert is_installed("flaky_library")
    assert "flaky_library" not in sys.modules


def test_version_of() -> None:
    assert version_of("numpy") == np.__version__
    assert version_of("surely-not-there", "numpy") == np.__version__
    assert version_of("surely-not-there") is None
    assert version_of() is None


@pytest.mark.parametrize("extra", ["ort", *PRODUCTS.values()])
def test_every_extra_that_is_advised_exists(extra: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
