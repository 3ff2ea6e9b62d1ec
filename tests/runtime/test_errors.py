from __future__ import annotations

import inspect
import re

import pytest

from vggedge_runtime import errors
from vggedge_runtime.errors import GateError, UsageError, VggedgeError

CLASSES = {name: each for name, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, Exception)}


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^(?:[├└]── )?([A-Z]\w+)  +", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(CLASSES)
    assert drawn[0] == "VggedgeError"
    assert {each.__bases__ for name, each in CLASSES.items() if name != "VggedgeError"} == {(VggedgeError,)}


def test_exit_codes() -> None:
    codes = {name: each.exit_code for name, each in CLASSES.items()}
    assert codes.pop("UsageError") == UsageError.exit_code == 2
    assert codes.pop("GateError") == GateError.exit_code == 3
    assert set(codes.values()) == {1}


def test_the_drawn_exit_codes_are_the_real_ones() -> None:
    drawn = re.findall(r"([A-Z]\w+)  +exit code (\d)", errors.__doc__ or "")
    assert drawn == [("VggedgeError", "1"), ("UsageError", "2"), ("GateError", "3")]


@pytest.mark.parametrize("name", CLASSES)
def test_each_says_what_it_is_for(name: str) -> None:
    assert (CLASSES[name].__doc__ or "").endswith(".")
    assert str(CLASSES[name]("found this")) == "found this"
