"""``__all__`` says what there is, no more and no less."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import vggedge
import vggedge_export
import vggedge_runtime

PACKAGES = (vggedge, vggedge_export, vggedge_runtime)
WITH_ALL = [
    name
    for package in PACKAGES
    for name in (package.__name__, *(e.name for e in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")))
    if hasattr(importlib.import_module(name), "__all__")
]


def test_the_runtime_exports_what_it_imports() -> None:
    public = {
        name
        for name, value in vars(vggedge_runtime).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert vggedge_runtime.__all__ == sorted(public)
    assert len(public) >= 5


@pytest.mark.parametrize("name", vggedge_runtime.__all__)
def test_what_it_exports_is_its_own_and_documented(name: str) -> None:
    value = getattr(vggedge_runtime, name)
    assert value.__module__.startswith("vggedge_runtime.")
    assert value.__doc__


@pytest.mark.parametrize("module", WITH_ALL)
def test_every_list_of_exports_is_sorted_and_true(module: str) -> None:
    found = importlib.import_module(module)
    assert list(found.__all__) == sorted(set(found.__all__))
    assert [name for name in found.__all__ if not hasattr(found, name)] == []
