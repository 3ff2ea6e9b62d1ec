from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from vggedge_export.conversion import graph_from_keras
from vggedge_export.graph import Graph
from vggedge_export.passes import apply_passes
from vggedge_runtime.backends.ort import open_ort_session


class Converted(NamedTuple):
    """A Keras model whose every weight matters, its graph before and after the passes, and what it answers."""

    model: Any
    raw: Graph
    clean: Graph
    logits: np.ndarray  # of the first eight pictures


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., list[np.ndarray]]:
    """``run_graph(graph, x=array)`` -> the outputs."""

    def run(graph: Graph, **feeds: np.ndarray) -> list[np.ndarray]:
        return open_ort_session(graph.to_bytes(), threads=1).run(None, feeds)

    return run


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """Eight pictures, uint8 (8, 32, 32, 3): noise over a gradient, with black, white and a half-black one."""
    rng = np.random.default_rng(7)
    ramp = np.linspace(0, 200, 32)[None, :, None, None] * rng.random((8, 1, 1, 3))
    found = (ramp + rng.integers(0, 56, (8, 32, 32, 3))).astype(np.uint8)
    found[0], found[1], found[2, :16] = 0, 255, 0
    return found


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """``randomise(model, seed)``: no bias, statistic or offset is left at a value that hides a mistake."""

    def run(model: Any, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        for variable in model.variables:
            role = variable.path.rpartition("/")[2]
            if role in {"bias", "beta", "moving_mean"}:
                variable.assign(rng.normal(0, 0.3, variable.shape))
            elif role in {"gamma", "moving_variance"}:
                variable.assign(rng.uniform(0.5, 2, variable.shape))

    return run


@pytest.fixture(scope="session")
def convert_vgg(randomise: Callable[..., None], pictures: np.ndarray) -> Callable[..., Converted]:
    """``convert_vgg("vgg16-compact", "every")``: converted once a test run; copy the graphs before changing them."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("tf2onnx")
    from vggedge.architecture import get_spec
    from vggedge.model import build_vgg, import_keras

    keras = import_keras()

    @functools.cache
    def convert(name: str, normalization: str | None = None) -> Converted:
        model = build_vgg(get_spec(name, input=(32, 32, 3), classes=5, normalization=normalization), seed=3)
        randomise(model)
        features = keras.Model(model.inputs[0], model.layers[-2].output)
        found = np.asarray(features(pictures.astype(np.float32), training=False))
        kernel, bias = model.layers[-1].get_weights()
        kernel *= 1.5 / (found @ kernel).std()  # else the softmax is 0 or 1, whatever comes before it
        model.layers[-1].set_weights([kernel, bias])
        raw = graph_from_keras(model)
        clean = raw.copy()
        apply_passes(clean)
        return Converted(model, raw, clean, found @ kernel + bias)

    return convert
