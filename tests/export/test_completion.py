"""What the end of a model is taken for, what is added to it, and that nothing is softened twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge_export.completion import Completion, complete_graph, complete_scores
from vggedge_export.conversion import class_count, graph_from_keras
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.passes import apply_passes
from vggedge_export.verification import keras_scores
from vggedge_runtime.errors import ModelError
from vggedge_runtime.progress import ignore_progress

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

layers = keras.layers
SIDE = 6
IMAGES = np.random.default_rng(3).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)

Run = Callable[..., list[np.ndarray]]


def model(*end: Any, spread: float = 0.02) -> Any:
    """Image -> conv -> flatten -> ``end``; a Dense gets weights that make its scores differ by some units."""
    inputs = keras.Input((SIDE, SIDE, 3))
    outputs = layers.Conv2D(4, 3, name="conv", kernel_initializer=keras.initializers.HeNormal(seed=1))(inputs)
    outputs = layers.Flatten(name="flat")(outputs)
    for layer in end:
        outputs = layer(outputs)
    made = keras.Model(inputs, outputs)
    rng = np.random.default_rng(2)
    for layer in made.layers:
        if isinstance(layer, layers.Dense):
            layer.set_weights([rng.normal(0, spread / 4, layer.kernel.shape), rng.normal(0, 1, layer.bias.shape)])
    return made


def dense(units: int, activation: Any = None, name: str = "top") -> Any:
    return layers.Dense(units, activation, name=name)


def converted(made: Any) -> tuple[Graph, np.ndarray]:
    graph = graph_from_keras(made)
    apply_passes(graph)
    return graph, keras_scores(made, None, IMAGES, ignore_progress)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def logits_of(made: Any) -> np.ndarray:
    """What the last dense layer gives before its activation, in float64."""
    top = made.get_layer("top")
    inside = np.asarray(keras.Model(made.inputs[0], top.input)(IMAGES.astype(np.float32)), dtype=np.float64)
    return inside @ np.asarray(top.kernel, np.float64) + np.asarray(top.bias, np.float64)


ENDS: dict[str, tuple[Callable[[], tuple[Any, ...]], str, str]] = {
    "softmax": (lambda: (dense(4, "softmax"),), "softmax", "softmax"),
    "softmax layer": (lambda: (dense(4), layers.Softmax(name="last")), "softmax", "softmax"),
    "softmax, reshaped": (
        lambda: (dense(4), layers.Reshape((1, 1, 4)), layers.Softmax(), layers.Reshape((4,))),
        "softmax",
        "softmax",
    ),
    "logits": (lambda: (dense(4),), "logits", "softmax"),
    "logits, dropped out": (lambda: (dense(4), layers.Dropout(0.5)), "logits", "softmax"),
    "log-softmax": (lambda: (dense(4, "log_softmax"),), "log-softmax", "softmax"),
    "sigmoids": (lambda: (dense(4, "sigmoid"),), "sigmoid", "sigmoids"),
    "sigmoids, reshaped": (
        lambda: (dense(4, "sigmoid"), layers.Reshape((2, 2)), layers.Reshape((4,))),
        "sigmoid",
        "sigmoids",
    ),
    "two sigmoids": (lambda: (dense(2, "sigmoid"),), "sigmoid", "sigmoids"),
    "one sigmoid": (lambda: (dense(1, "sigmoid"),), "sigmoid", "pair"),
    "one sigmoid layer": (lambda: (dense(1), layers.Activation("sigmoid", name="last")), "sigmoid", "pair"),
    "one logit": (lambda: (dense(1),), "logits", "pair"),
}


@pytest.mark.parametrize(("end", "scores", "what"), ENDS.values(), ids=ENDS)
def test_graph_and_keras_scores_are_completed_to_the_same_probabilities(
    end: Callable[[], tuple[Any, ...]], scores: str, what: str, run_graph: Run
) -> None:
    made = model(*end())
    graph, raw = converted(made)
    logits = logits_of(made)
    if what == "pair":
        wanted = np.concatenate([1 - sigmoid(logits), sigmoid(logits)], axis=1)
    elif what == "sigmoids":
        wanted = sigmoid(logits) / sigmoid(logits).sum(axis=1, keepdims=True)
    else:
        wanted = softmax(logits)
    assert wanted.std() > 0.05  # or all answers would be much the same
    found = complete_graph(graph, raw)
    assert found == Completion(scores, raw.shape[1])
    assert (found.words is None) == (scores == "softmax")
    np.testing.assert_allclose(complete_scores(raw, found), wanted, rtol=0, atol=1e-6)
    graph.check()
    assert graph.outputs == [value_info("probabilities", np.float32, ["N", class_count(made)])]
    (answers,) = run_graph(graph, images=IMAGES)
    np.testing.assert_allclose(answers, wanted, rtol=0, atol=1e-6)
    (half,) = run_graph(rounding_twin(float16_graph(graph)), images=IMAGES)
    np.testing.assert_allclose(half, wanted, rtol=0, atol=0.02)
    if scores != "softmax":
        assert graph.nodes[-1].op_type == "Softmax"
        assert "Sigmoid" not in graph.op_counts()


def test_only_the_logits_of_sigmoids_are_float16() -> None:
    graph, raw = converted(model(dense(4, "sigmoid")))
    complete_graph(graph, raw)
    tail = float16_graph(graph).nodes[-6:]
    assert [node.op_type for node in tail] == ["Gemm", "Cast", "Neg", "Softplus", "Neg", "Softmax"]
    assert [node.name for node in tail[2:]] == ["top/neg", "top/softplus", "top/log_sigmoid", "top/softmax"]


def test_a_pair_of_classes_keeps_the_digits_that_the_sigmoid_loses(run_graph: Run) -> None:
    made = model(dense(1, "sigmoid"), spread=0)
    made.get_layer("top").set_weights([np.zeros((64, 1)), np.array([-30.0])])
    graph, raw = converted(made)
    complete_graph(graph, raw)
    (answers,) = run_graph(graph, images=IMAGES[:1])
    np.testing.assert_allclose(answers, [[1.0, np.exp(-30.0)]], rtol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_sigmoids_near_0_and_1_are_normalised_without_overflow(half: bool, run_graph: Run) -> None:
    made = model(dense(4, "sigmoid"), spread=0)
    for bias in ((-60.0, -61.0, -80.0, -80.0), (80.0, 80.0, -80.0, 60.0), (0.0, -12.0, -15.0, -20.0)):
        made.get_layer("top").set_weights([np.zeros((64, 4)), np.array(bias)])
        graph, raw = converted(made)
        completion = complete_graph(graph, raw)
        graph = rounding_twin(float16_graph(graph)) if half else graph
        wanted = sigmoid(np.array([bias])) / sigmoid(np.array([bias])).sum()
        np.testing.assert_allclose(run_graph(graph, images=IMAGES[:1])[0], wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(complete_scores(raw, completion)[:1], wanted, rtol=0, atol=1e-6)


def test_a_logit_far_from_0_is_completed_without_overflow() -> None:
    found = complete_scores(np.array([[-2000.0], [2000.0], [0.0]], np.float32), Completion("logits", 1))
    np.testing.assert_array_equal(found, [[1, 0], [0, 1], [0.5, 0.5]])


def test_sigmoids_that_are_all_0_cannot_be_normalised_and_that_is_said() -> None:
    raw = np.zeros((5, 3), np.float32)
    raw[:3] = 0.5
    with pytest.raises(ModelError, match=r"on 2 of 5 evaluation images every one of the 3 sigmoids is 0"):
        complete_scores(raw, Completion("sigmoid", 3))


def ensemble() -> Any:
    made = model(dense(4))
    features = made.get_layer("flat").output
    parts = [layers.Dense(4, "softmax", name=f"part{n}", kernel_initializer="zeros")(features) for n in range(2)]
    return keras.Model(made.inputs[0], layers.Average(name="mean")(parts))


class Scaled(layers.Layer):
    """x / sum(x) of positive numbers: probabilities without a softmax."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.divide(inputs, keras.ops.sum(inputs, axis=-1, keepdims=True))


PROBABILITIES = {
    "mean of two softmaxes": ensemble,
    "divided by their sum": lambda: model(dense(4, "softplus"), Scaled(name="scaled")),
}


@pytest.mark.parametrize("make", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_without_a_softmax_are_taken_as_they_are(make: Callable[[], Any], run_graph: Run) -> None:
    made = make()
    graph, raw = converted(made)
    before = [node.SerializeToString() for node in graph.nodes]
    found = complete_graph(graph, raw)
    assert found == Completion("probabilities", 4)
    assert "taken as it is" in str(found.words)
    assert [node.SerializeToString() for node in graph.nodes] == before
    np.testing.assert_array_equal(complete_scores(raw, found), raw)
    np.testing.assert_allclose(run_graph(graph, images=IMAGES)[0], raw, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: (dense(4, "relu"),), "ends in the layer 'top', whose Relu leaves scores"),
        (lambda: (dense(4, "tanh"),), "'top', whose Tanh"),
        (lambda: (dense(4, "softplus"),), "'top', whose Softplus"),
        (lambda: (dense(4, "silu"),), "'top', whose Mul"),
        (lambda: (dense(4, "hard_sigmoid"),), "'top', whose Clip"),
        (lambda: (dense(1, "tanh"),), "'top', whose Tanh"),
        (lambda: (dense(4), layers.LeakyReLU(name="leaky")), "'leaky', whose LeakyRelu"),
        (lambda: (dense(4, "relu"), layers.Rescaling(0.5, name="half")), "'top', whose Relu"),
        (lambda: (dense(4, "sigmoid"), layers.Rescaling(0.5, name="half")), "'top', whose Sigmoid"),
        (lambda: (dense(1, "softmax"),), "'top' is a softmax over one unit, which is 1"),
        (lambda: (dense(4), layers.Softmax(axis=0, name="last")), "softmax of the layer .top. runs over another axis"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
def test_other_ends_are_refused_by_the_name_of_their_layer(end: Callable[[], tuple[Any, ...]], message: str) -> None:
    graph, raw = converted(model(*end()))
    with pytest.raises(ModelError, match=message):
        complete_graph(graph, raw)


def test_scores_that_are_no_numbers_are_left_to_the_comparison() -> None:
    graph = Graph(
        [make_node("Softmax", ["images"], "probabilities")],
        {},
        [value_info("images", np.float32, ["N", 3])],
        [value_info("probabilities", np.float32, ["N", 3])],
    )
    raw = np.full((4, 3), np.nan, np.float32)
    assert complete_graph(graph, raw) == Completion("softmax", 3)
