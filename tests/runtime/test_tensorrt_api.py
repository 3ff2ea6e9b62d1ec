from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vggedge_runtime import tensorrt_api
from vggedge_runtime.errors import EngineError, MissingDependency, UsageError
from vggedge_runtime.tensorrt_api import choose_product, installed_products, load_tensorrt, shared_logger, target_member


class FakeLogger:
    """As tensorrt.ILogger: refuses to be used where a child forgot to call its __init__."""

    def __init__(self) -> None:
        self.ready = True


class FakeCapability:
    NONE, CURRENT = 0, 1
    SM75, SM80, SM86, SM89, SM100, SM120 = 75, 80, 86, 89, 100, 120
    SMALL = 3


def fake_module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # find_spec asks sys.modules first
    module.__dict__.update(attributes, ILogger=FakeLogger)
    return module


@pytest.fixture
def enterprise(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_module("tensorrt", __version__="10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_module("tensorrt_rtx", __version__="1.4.0.76", ComputeCapability=FakeCapability)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "is_installed", lambda name: isinstance(sys.modules.get(name), ModuleType))
    monkeypatch.setattr(tensorrt_api, "_loggers", {})
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_nothing_installed")
class TestLoad:
    def test_enterprise_builds_for_the_gpu_at_hand_only(self, enterprise: ModuleType) -> None:
        api = load_tensorrt()
        assert (api.product, api.version, api.module) == ("tensorrt", "10.3.0", enterprise)
        assert not api.builds_without_gpu
        assert api.tunes_while_building
        assert api.targets == api.known_targets == ()

    def test_rtx_builds_for_every_target_from_ampere_on(self, rtx: ModuleType) -> None:
        api = load_tensorrt()
        assert (api.product, api.version, api.module) == ("tensorrt_rtx", "1.4.0.76", rtx)
        assert api.builds_without_gpu
        assert not api.tunes_while_building
        assert api.targets == ("8.0", "8.6", "8.9", "10.0", "12.0")
        assert api.known_targets == ("7.5", *api.targets)

    def test_auto_prefers_enterprise(self, enterprise: ModuleType, rtx: ModuleType) -> None:
        assert installed_products() == ("tensorrt", "tensorrt_rtx")
        assert load_tensorrt().module is enterprise
        assert load_tensorrt("tensorrt_rtx").module is rtx

    def test_none_installed(self) -> None:
        assert installed_products() == ()
        with pytest.raises(MissingDependency, match=r"vggedge\[rtx\].*JetPack.*--no-engine"):
            load_tensorrt()

    @pytest.mark.parametrize(("product", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
    def test_the_named_one_is_not_installed(self, product: str, extra: str) -> None:
        with pytest.raises(MissingDependency, match=rf"{product} .*vggedge\[{extra}\]"):
            load_tensorrt(product)

    def test_unknown_product(self) -> None:
        with pytest.raises(UsageError, match="'onnx' is unknown; known: auto, tensorrt, tensorrt_rtx"):
            load_tensorrt("onnx")


class TestChoose:
    def test_without_a_gpu_rtx_which_needs_none_is_taken(self, enterprise: ModuleType, rtx: ModuleType) -> None:
        assert choose_product() == choose_product(has_gpu=True) == "tensorrt"
        assert choose_product(has_gpu=False) == "tensorrt_rtx"
        assert choose_product("tensorrt", has_gpu=False) == "tensorrt"  # as asked; it says itself what it lacks

    def test_the_only_one_is_taken(self, enterprise: ModuleType) -> None:
        assert choose_product(has_gpu=False) == "tensorrt"

    def test_nothing_is_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt_api, "is_installed", lambda name: True)
        assert choose_product() == "tensorrt"  # which is None in sys.modules, so that importing it would fail

    def test_none_installed(self) -> None:
        with pytest.raises(MissingDependency, match=r"vggedge\[rtx\].*JetPack"):
            choose_product()

    def test_unknown(self) -> None:
        with pytest.raises(UsageError, match="'onnx' is unknown"):
            choose_product("onnx")


class TestNetworkFlags:
    @pytest.mark.parametrize(("flags", "expected"), [({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 2), ({}, 0)])
    def test_strong_types_are_asked_for_where_that_can_be(
        self, flags: dict[str, int], expected: int, enterprise: ModuleType
    ) -> None:
        enterprise.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
        assert load_tensorrt().network_flags == expected


class TestTarget:
    @pytest.mark.parametrize(("target", "member"), [("8.6", 86), ("12.0", 120), ("7.5", 75)])
    def test_member(self, target: str, member: int, rtx: ModuleType) -> None:
        assert target_member(load_tensorrt(), target) == member

    @pytest.mark.parametrize("target", ["9.9", "auto", ""])
    def test_unknown(self, target: str, rtx: ModuleType) -> None:
        with pytest.raises(EngineError, match=rf"no target '{target}'; it has: 8\.0, 8\.6"):
            target_member(load_tensorrt(), target)


class TestLogger:
    def test_one_for_each_product(self, enterprise: ModuleType, rtx: ModuleType) -> None:
        first = shared_logger(load_tensorrt("tensorrt"))
        assert shared_logger(load_tensorrt("tensorrt")) is first
        assert shared_logger(load_tensorrt("tensorrt_rtx")) is not first

    def test_keeps_what_it_is_told(self, rtx: ModuleType) -> None:
        logger = shared_logger(load_tensorrt())
        assert logger.ready
        assert isinstance(logger, FakeLogger)
        logger.log(SimpleNamespace(name="ERROR"), "no such layer")
        logger.log(SimpleNamespace(name="INFO"), "done")
        assert logger.lines == [("ERROR", "no such layer"), ("INFO", "done")]

    def test_only_where_the_layers_stand_there_is_the_chatter_kept(
        self, enterprise: ModuleType, rtx: ModuleType
    ) -> None:
        for product, kept in (("tensorrt", []), ("tensorrt_rtx", [("VERBOSE", "Layers:")])):
            logger = shared_logger(load_tensorrt(product))
            logger.log(SimpleNamespace(name="VERBOSE"), "Layers:")
            assert logger.lines == kept
