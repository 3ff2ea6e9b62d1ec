"""Real Keras models through tf2onnx and all passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge.architecture import NORMALIZATIONS, SPECS
from vggedge_export.conversion import check_exportable, check_probabilities, graph_from_keras, normalizing_layer
from vggedge_export.graph import Graph, value_info
from vggedge_export.passes import apply_passes
from vggedge_runtime.errors import ConversionError, ModelError
from vggedge_runtime.preprocess import Normalization

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

layers = keras.layers
IMAGENET = Normalization(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
COMPACT = [name for name in SPECS if name.endswith("-compact")]
VARIANTS = [(name, None) for name in COMPACT] + [("vgg16-compact", normalization) for normalization in NORMALIZATIONS]
every_variant = pytest.mark.parametrize(("name", "normalization"), VARIANTS, ids=str)

# What ONNX Runtime and TensorRT would have to compute on every inference, and what a VGG does not need.
UNWANTED = {"Shape", "Gather", "Slice", "Reshape", "Concat", "MatMul", "Squeeze", "Unsqueeze", "Identity", "Pad"}


@pytest.fixture(scope="session")
def clean(randomise: Callable[..., None]) -> Callable[..., Graph]:
    """``clean(model, normalization)``: randomised, converted, and through all passes."""

    def run(model: Any, normalization: Normalization | None = None) -> Graph:
        randomise(model)
        graph = graph_from_keras(model, normalization)
        apply_passes(graph)
        return graph

    return run


def small(*body: Any, head: tuple = (), size: tuple = (12, 10, 3)) -> Any:
    """Input -> head -> body -> Flatten -> Dense(3, softmax); the pixels 0 to 255 do not saturate the softmax."""
    inputs = keras.Input(size, name="photo")
    outputs = inputs
    for layer in (*head, *body, layers.Flatten(name="flatten")):
        outputs = layer(outputs)
    near_zero = keras.initializers.RandomNormal(stddev=1e-3, seed=1)
    return keras.Model(inputs, layers.Dense(3, "softmax", kernel_initializer=near_zero, name="top")(outputs))


def conv(name: str = "conv1", filters: int = 4, **options: Any) -> Any:
    return layers.Conv2D(filters, 3, kernel_initializer=keras.initializers.HeNormal(seed=2), name=name, **options)


def images_for(model: Any, n: int = 5) -> np.ndarray:
    size = model.inputs[0].shape[1:]
    return np.random.default_rng(5).integers(0, 256, (n, *size), dtype=np.uint8)


@every_variant
def test_the_graph_answers_what_keras_answers(
    name: str,
    normalization: str | None,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    found = convert_vgg(name, normalization)
    wanted = np.asarray(found.model(pictures.astype(np.float32), training=False))
    assert 0.02 < wanted.std() < 0.4  # neither uniform nor saturated, or the next lines say little
    (answers,) = run_graph(found.clean, images=pictures)
    np.testing.assert_allclose(answers, wanted, rtol=0, atol=1e-5)
    logits = found.clean.copy()
    logits.outputs = [value_info("predictions", np.float32, ["N", 5])]
    logits.drop_unused()
    (raw,) = run_graph(logits, images=pictures)
    assert np.abs(raw - found.logits).max() < 1e-4 * np.abs(found.logits).max()


@pytest.mark.parametrize("normalization", ["first-of-two-stages", "every", "lrn"])
def test_the_answer_to_an_image_does_not_depend_on_its_batch(
    normalization: str,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    graph = convert_vgg("vgg16-compact", normalization).clean
    (eight,) = run_graph(graph, images=pictures)
    assert eight.shape == (8, 5)
    for n in (1, 3):
        (few,) = run_graph(graph, images=pictures[:n])
        np.testing.assert_allclose(few, eight[:n], rtol=0, atol=1e-6)


@every_variant
def test_one_transpose_is_left_behind_the_cast_and_no_shape_arithmetic(
    name: str, normalization: str | None, convert_vgg: Callable[..., Any]
) -> None:
    graph = convert_vgg(name, normalization).clean
    ops = [node.op_type for node in graph.nodes]
    assert ops[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert ops.count("Transpose") == 1
    assert ops.count("Cast") == 1
    assert not UNWANTED.intersection(ops)
    assert ops[-1] == "Softmax"
    assert graph.opset == 20


@every_variant
def test_nodes_and_weights_carry_keras_layer_names(
    name: str, normalization: str | None, convert_vgg: Callable[..., Any]
) -> None:
    found = convert_vgg(name, normalization)
    kinds = {layer.name: type(layer).__name__ for layer in found.model.layers}
    is_folded = normalization == "every"
    expected: list[tuple[str, str]] = []
    for layer, kind in kinds.items():
        following = {"Conv2D": "Conv", "Dense": "Gemm", "MaxPooling2D": "MaxPool", "Flatten": "Flatten"}
        following |= {"LocalResponseNorm": "LRN"} | ({} if is_folded else {"BatchNormalization": "BatchNormalization"})
        if kind in following:
            expected.append((layer, following[kind]))
    named = [(node.name, node.op_type) for node in found.clean.nodes]
    assert [pair for pair in named if "/" not in pair[0]] == expected
    relus = [node for node in found.clean.nodes if node.op_type == "Relu"]
    convs = [node for node in found.clean.nodes if node.op_type in {"Conv", "Gemm"}][:-1]
    assert [relu.name for relu in relus] == [f"{layer.name}/relu" for layer in convs]
    for layer in (*convs, found.clean.nodes[-2]):
        assert list(layer.input)[1:] == [f"{layer.name}/kernel", f"{layer.name}/bias"]
        assert layer.output[0] == layer.name


BEFORE = {
    "Transpose": 18, "Relu": 15, "Reshape": 14, "Squeeze": 13, "Conv": 13, "Add": 8, "Mul": 7, "MaxPool": 5,
    "MatMul": 3, "Sqrt": 2, "Reciprocal": 2, "Sub": 2, "Cast": 1, "Softmax": 1,
}  # fmt: skip
AFTER = {
    "Relu": 15, "Conv": 13, "MaxPool": 5, "Gemm": 3, "BatchNormalization": 2, "Cast": 1, "Transpose": 1, "Mul": 1,
    "Add": 1, "Flatten": 1, "Softmax": 1,
}  # fmt: skip


def test_the_op_counts_of_the_compact_vgg16_before_and_after_the_passes(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    assert found.raw.op_counts() == BEFORE
    assert found.clean.op_counts() == AFTER


def test_batchnorm_before_the_relu_disappears_and_after_it_stays(convert_vgg: Callable[..., Any]) -> None:
    counts = {n: convert_vgg("vgg16-compact", n).clean.op_counts() for n in NORMALIZATIONS}
    norms = {name: count.get("BatchNormalization", 0) for name, count in counts.items()}
    assert norms == {"none": 0, "first": 1, "first-of-two-stages": 2, "two-stages": 4, "every": 0, "lrn": 0}
    assert counts["lrn"]["LRN"] == 1


def test_input_and_output_are_the_contract(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    for graph in (found.raw, found.clean):
        assert graph.inputs == [value_info("images", np.uint8, ["N", 32, 32, 3])]
        assert graph.outputs == [value_info("probabilities", np.float32, ["N", 5])]
    assert {array.dtype for array in found.clean.weights.values()} == {np.dtype(np.float32)}


def test_weights_are_the_models_own_in_onnx_order(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    kernel, bias = found.model.get_layer("block3_conv2").get_weights()
    np.testing.assert_array_equal(found.clean.weights["block3_conv2/kernel"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(found.clean.weights["block3_conv2/bias"], bias)
    np.testing.assert_array_equal(found.clean.weights["fc2/kernel"], found.model.get_layer("fc2").get_weights()[0].T)


# --- normalisation


def test_the_image_specs_normalisation_in_the_head_is_numpys(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(conv(activation="relu", padding="same"), layers.MaxPooling2D(name="pool1"))
    graph = clean(model, IMAGENET)
    images = images_for(model)
    pixels = (images.astype(np.float32) - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)
    wanted = np.asarray(model(pixels, training=False))
    assert np.abs(wanted - np.asarray(model(images.astype(np.float32), training=False))).max() > 1e-2
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-6)
    assert [node.name for node in graph.nodes][:4] == ["head/cast", "head/transpose", "head/offset", "head/scale"]
    assert "BatchNormalization" not in graph.op_counts()


HEADS = {
    "Rescaling(1/128, -1)": lambda: layers.Rescaling(1 / 128, offset=-1),
    "Rescaling(1/255)": lambda: layers.Rescaling(1 / 255),
    "Rescaling a channel": lambda: layers.Rescaling([0.01, 0.02, 0.03], offset=[-1.0, -2.0, -3.0]),
    "Normalization": lambda: layers.Normalization(mean=IMAGENET.mean, variance=[s * s for s in IMAGENET.std]),
    "BatchNormalization": lambda: layers.BatchNormalization(name="bn0"),
    "nothing": None,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_a_model_may_have_keeps_its_numbers(
    head: Any, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(conv(activation="relu"), head=() if head is None else (head(),))
    graph = clean(model)
    images = images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert [node.op_type for node in graph.nodes][:2] == ["Cast", "Transpose"]


def test_a_normalization_layer_that_was_adapted_keeps_its_numbers(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    head = layers.Normalization()
    rng = np.random.default_rng(1)
    head.adapt(rng.integers(0, 200, (4, 12, 10, 3)).astype(np.float32))
    model = small(conv(activation="relu"), head=(head,))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["Rescaling(1/255)", "Normalization"])
def test_normalising_twice_is_refused(head: str) -> None:
    model = small(conv(), head=(HEADS[head](),))
    name = model.layers[1].name
    with pytest.raises(ModelError, match=f"its layer '{name}' normalises the image, and so would the image spec"):
        graph_from_keras(model, IMAGENET)
    check_exportable(model, None)


def rescaling() -> Any:
    return layers.Rescaling(1 / 255, name="scaled")


def augmented() -> tuple[Any, ...]:
    return layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.1), rescaling()


NORMALISING: dict[str, tuple[Callable[[], Any], str | None]] = {
    "first": (lambda: small(conv(), head=(rescaling(),)), "scaled"),
    "after augmentation": (lambda: small(conv(), head=augmented()), "scaled"),
    "in a nested model": (lambda: small(conv(), head=(keras.Sequential([rescaling()]),)), "scaled"),
    "two models deep": (
        lambda: small(conv(), head=(keras.Sequential([keras.Sequential(augmented())]),)),
        "scaled",
    ),
    "in a pipeline": (lambda: small(conv(), head=(layers.Pipeline([rescaling()]),)), "scaled"),
    "sequential": (
        lambda: keras.Sequential([keras.Input((8, 8, 3)), *augmented(), layers.Flatten(), layers.Dense(3)]),
        "scaled",
    ),
    "before a separable convolution": (lambda: small(layers.SeparableConv2D(4, 3), head=(rescaling(),)), "scaled"),
    "behind a convolution": (lambda: small(conv(), rescaling()), None),
    "behind a depthwise convolution": (lambda: small(layers.DepthwiseConv2D(3), rescaling()), None),
    "behind a nested convolution": (lambda: small(keras.Sequential([conv()]), rescaling()), None),
    "nowhere": (lambda: small(conv()), None),
}


@pytest.mark.parametrize(("make", "name"), NORMALISING.values(), ids=NORMALISING)
def test_the_normalising_layer_is_found_wherever_it_is(make: Callable[[], Any], name: str | None) -> None:
    model = make()
    assert normalizing_layer(model) == name
    if name is None:
        check_exportable(model, IMAGENET)
    else:
        with pytest.raises(ModelError, match=f"its layer '{name}' normalises"):
            check_exportable(model, IMAGENET)


# --- models that are not of this project

MODELS = {
    "leaky relu and a softmax layer": lambda: small(conv(), layers.LeakyReLU(), conv("conv2")),
    "average pooling": lambda: small(conv(activation="relu"), layers.AveragePooling2D(2)),
    "depthwise": lambda: small(layers.DepthwiseConv2D(3, activation="relu"), conv()),
    "strides": lambda: small(conv(strides=2, padding="same", activation="relu")),
    "global pooling": lambda: small(conv(activation="relu"), layers.GlobalAveragePooling2D()),
    "dense for each pixel": lambda: small(conv(activation="relu"), layers.Dense(5, "relu")),
    "batchnorm on features": lambda: small(conv(), layers.Flatten(name="first"), layers.BatchNormalization()),
    "dropout": lambda: small(conv(), layers.Dropout(0.5), layers.SpatialDropout2D(0.5)),
    "an inner model": lambda: small(keras.Sequential([keras.Input((12, 10, 3)), conv(), layers.MaxPooling2D()])),
    "sigmoid and tanh": lambda: small(conv(activation="sigmoid"), conv("conv2", activation="tanh")),
    "no bias": lambda: small(conv(use_bias=False), layers.BatchNormalization(), layers.ReLU()),
    "batchnorm without scale": lambda: small(conv(), layers.BatchNormalization(scale=False, center=False)),
    "one filter": lambda: small(conv(filters=1), layers.BatchNormalization(), layers.ReLU(), conv("conv2")),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_other_models_keep_their_numbers_too(
    make: Callable[[], Any], clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = make()
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    assert wanted.std(axis=0).max() > 1e-4
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("kind", ["Average", "Max"])
def test_global_pooling_leaves_one_transpose(
    kind: str, keepdims: bool, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    pool = getattr(layers, f"Global{kind}Pooling2D")(keepdims=keepdims)
    model = small(conv(activation="relu"), conv("conv2", 5, activation="relu"), pool)
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-6)
    assert graph.op_counts()["Transpose"] == 1


def test_layers_that_are_used_twice_keep_their_numbers(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    """With as many inputs as outputs, weights read the wrong way round would not even be invalid."""
    inputs = keras.Input((8, 8, 3))
    twice = conv("twice", 3, padding="same", activation="relu")
    square = layers.Dense(6, "relu", name="square", kernel_initializer=keras.initializers.HeNormal(seed=3))
    outputs = layers.Rescaling(1 / 128, offset=-1)(inputs)
    outputs = layers.Flatten()(twice(twice(outputs)))
    outputs = square(square(layers.Dense(6, kernel_initializer=keras.initializers.HeNormal(seed=4))(outputs)))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="top")(outputs))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert graph.op_counts()["Gemm"] == 4
    assert {"twice", "twice_2", "square", "square_2"} <= {node.name for node in graph.nodes}


@pytest.mark.parametrize("name", ["images", "probabilities", "head"])
def test_a_layer_may_have_a_name_of_the_graph(
    name: str, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Flatten()(conv(name)(layers.Rescaling(1 / 128, offset=-1)(inputs)))
    model = keras.Model(
        inputs, layers.Dense(3, "softmax", name="probabilities" if name == "images" else "top")(outputs)
    )
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


# --- names


def block(name: str) -> Any:
    inside = [conv("conv", activation="relu"), layers.MaxPooling2D(name=f"{name}_pool"), layers.LeakyReLU(name="leaky")]
    return keras.Sequential(inside, name=name)


def test_a_sequential_models_own_name_is_in_no_node(clean: Callable[..., Graph]) -> None:
    body = [rescaling(), conv(activation="relu"), layers.MaxPooling2D(name="pool1"), layers.Flatten(name="flat")]
    graph = clean(keras.Sequential([keras.Input((12, 12, 3)), *body, layers.Dense(3, "softmax", name="top")]))
    behind_head = [node.name for node in graph.nodes if not node.name.startswith("head/")]
    assert behind_head == ["conv1", "conv1/relu", "pool1", "flat", "top", "top/softmax"]
    assert {"conv1/kernel", "conv1/bias", "top/kernel"} <= set(graph.weights)


def test_nested_layers_are_named_by_their_own_name_unless_two_share_it(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(block("first"), block("second"), conv("alone", padding="same"), size=(20, 20, 3))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    names = [node.name for node in graph.nodes if node.op_type != "Relu" and not node.name.startswith("head/")]
    assert names == [
        *("first/conv", "first_pool", "leaky", "second/conv", "second_pool", "leaky_2"),
        *("alone", "flatten", "top", "top/softmax"),
    ]


def test_numbered_layers_keep_their_numbers(clean: Callable[..., Graph]) -> None:
    """Keras and TensorFlow both number by ``_1``."""
    pools = [layers.MaxPooling2D(name=name) for name in ("pool", "pool_1", "pool_2")]
    graph = clean(small(*pools, size=(16, 16, 3)))
    assert [node.name for node in graph.nodes if node.op_type == "MaxPool"] == ["pool", "pool_1", "pool_2"]


# --- what cannot be exported


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_a_model_that_does_not_compute_in_float32_is_refused_with_its_cure(policy: str) -> None:
    def body() -> tuple[Any, ...]:
        return conv(), keras.Sequential([layers.Conv2D(2, 1, name="inner", dtype=policy)])

    with pytest.raises(ModelError, match=r"'inner' computes in b?float16.*set_dtype_policy\(\"float32\"\)"):
        check_exportable(small(*body()), None)
    keras.config.set_dtype_policy(policy)
    try:
        whole = small(conv())
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ModelError, match="needed is float32"):
        check_exportable(whole, None)
    again = small(conv())
    again.set_weights(whole.get_weights())
    check_exportable(again, None)


def two_inputs() -> Any:
    a, b = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    return keras.Model([a, b], layers.Dense(3)(layers.Flatten()(layers.Add()([a, b]))))


def two_outputs() -> Any:
    inputs = keras.Input((8, 8, 3))
    flat = layers.Flatten()(inputs)
    return keras.Model(inputs, [layers.Dense(3)(flat), layers.Dense(2)(flat)])


def of_size(*size: int | None) -> Any:
    inputs = keras.Input(size)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(layers.Conv2D(2, 1)(inputs))))


def segmenter() -> Any:
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Conv2D(3, 1)(inputs))


def of_features() -> Any:
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(3)(inputs))


def one_class() -> Any:
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.Flatten()(inputs)))


def unbuilt() -> Any:
    return keras.Sequential([layers.Flatten(), layers.Dense(3)], name="unbuilt")


class Subclassed(keras.Model):
    def call(self, inputs: Any) -> Any:
        return inputs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_inputs, "2 inputs and 1 outputs"),
        (two_outputs, "1 inputs and 2 outputs"),
        (lambda: of_size(None, None, 3), r"its input is \(None, None, None, 3\)"),
        (lambda: of_size(8, None, 3), r"its input is \(None, 8, None, 3\).*of fixed size"),
        (lambda: of_size(8, 8, 1), r"its input is \(None, 8, 8, 1\)"),
        (lambda: of_size(8, 8, 4), r"its input is \(None, 8, 8, 4\)"),
        (of_features, r"its input is \(None, 8\)"),
        (segmenter, r"its output is \(None, 8, 8, 3\)"),
        (one_class, r"its output is \(None, 1\); needed is .* at least 2 classes"),
        (unbuilt, "unbuilt: .*no defined inputs"),
        (Subclassed, "subclassed: .*no defined inputs"),
    ],
)
def test_a_model_that_is_no_image_classifier_is_refused(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=f"(?s){message}"):
        check_exportable(model, None)
    with pytest.raises(ModelError):
        graph_from_keras(model)


@pytest.mark.parametrize("activation", [None, "sigmoid", "relu"])
def test_a_graph_that_does_not_end_in_a_softmax_gives_no_probabilities(
    activation: str | None, clean: Callable[..., Graph]
) -> None:
    inputs = keras.Input((8, 8, 3))
    scores = layers.Dense(3, activation, name="top")(layers.Flatten()(inputs))
    with pytest.raises(ModelError, match=r"ends in top.*, not in a softmax"):
        check_probabilities(clean(keras.Model(inputs, scores)))
    check_probabilities(clean(keras.Model(inputs, layers.Softmax(name="last")(scores))))


def test_what_tf2onnx_cannot_convert_is_told_with_its_reason() -> None:
    class Broken(layers.Layer):
        def call(self, inputs: Any) -> Any:
            if keras.backend.backend() == "tensorflow" and not isinstance(inputs, keras.KerasTensor):
                raise ValueError("this layer has no graph")
            return inputs

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    with pytest.raises(ConversionError, match=r"(?s)could not convert '.*this layer has no graph"):
        graph_from_keras(small(conv(), Broken()))
