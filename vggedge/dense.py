"""The fully convolutional form of a VGG: one network for images of any size, as the VGG paper tests.

Simonyan & Zisserman 2014, arXiv 1409.1556, section 3.2: the first dense layer becomes a convolution with the
kernel of the last stage's map (7x7 at 224x224), the others become 1x1 convolutions. On a larger image that gives a
map of class scores, one for each place that the network's own input would fit, 32 pixels apart. The scores are
averaged over the map; then comes the softmax. Poolings round down: of an image whose sides are no multiples of 32
the rest at the right and at the bottom is seen only as far as the convolutions reach beyond their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vggedge.architecture import SMALLEST_INPUT, LayerSpec, VggSpec
from vggedge.model import import_keras
from vggedge.recognition import recognize_spec

if TYPE_CHECKING:
    import keras


def dense_model(model: keras.Model) -> keras.Model:
    """The network of ``model`` for images of any size that is not below its own, for inference.

    It takes RGB pixels from 0 to 255, (n, height, width, 3), all n of one size, and gives probabilities,
    (n, classes). On images of the network's own size it answers what ``model`` answers. A network with
    ``head="gap"`` pools over whatever map there is, so it keeps its layers and only its input opens.

    Args:
        model: a VGG of this family; it stays as it is, its weights are copied.

    Raises:
        ModelError: ``model`` is none of the family.
    """
    spec = recognize_spec(model, scores=True)
    keras = import_keras()
    inputs = keras.Input((None, None, 3), name="images")
    outputs = inputs
    for layer in spec.layers():
        if layer.kind not in ("flatten", "dropout"):
            outputs = _build_layer(keras, spec, layer, model.get_layer(layer.name))(outputs)
    if spec.head == "dense":
        outputs = keras.layers.GlobalAveragePooling2D(name="average_scores")(outputs)
        softmax = model.get_layer("predictions").activation
        outputs = keras.layers.Activation(softmax, name="probabilities")(outputs)
    dense = keras.Model(inputs, outputs, name=f"{model.name}_dense")
    _copy_weights(model, dense)
    return dense


def _build_layer(keras: Any, spec: VggSpec, layer: LayerSpec, original: Any) -> Any:
    """The layer that does in the dense form what ``original`` does in the network."""
    if layer.kind != "dense" or spec.head == "gap":
        return type(original).from_config(original.get_config())
    names = [each.name for each in spec.layers() if each.kind == "dense"]
    height, width, _ = spec.input
    window = (height // SMALLEST_INPUT, width // SMALLEST_INPUT) if layer.name == names[0] else (1, 1)
    # Scores are averaged over the map before the softmax, which therefore leaves the last layer.
    activation = None if layer.name == names[-1] else original.activation
    return keras.layers.Conv2D(layer.units, window, activation=activation, use_bias=original.use_bias, name=layer.name)


def _copy_weights(model: Any, dense: Any) -> None:
    """Give every layer of ``dense`` the weights of its namesake.

    A dense layer's kernel, (height * width * channels, units), only changes its shape: Flatten goes through a map row
    by row, channels last, as the kernel of a convolution lies in memory.
    """
    for layer in dense.layers:
        if layer.weights:
            values = model.get_layer(layer.name).get_weights()
            layer.set_weights([value.reshape(own.shape) for value, own in zip(values, layer.weights, strict=True)])
