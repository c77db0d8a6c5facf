"""Two small networks, as pairs of pure functions: `init(key)` and `apply(layers, inputs)`."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["Layer", "Layers", "Network", "cnn", "mlp", "orthogonal"]


class Layer(NamedTuple):
    """An affine map of the last axis: weights `[fan_in, fan_out]`, bias `[fan_out]`."""

    weights: Array
    bias: Array


Layers = list[Layer]


class Network(NamedTuple):
    """From a key to layers, and from layers and inputs `[n, *shape]` to logits `[n, K]`."""

    init: Callable[[Array], Layers]
    apply: Callable[[Layers, Array], Array]


def mlp(sizes: Sequence[int], activation: Callable[[Array], Array] = jax.nn.relu) -> Network:
    """Dense layers of the given sizes, inputs and classes included."""

    def apply(layers: Layers, inputs: Array) -> Array:
        hidden = inputs.reshape(len(inputs), -1)
        for layer in layers[:-1]:
            hidden = activation(_affine(layer, hidden))
        return _affine(layers[-1], hidden)

    return Network(lambda key: _he_uniform(key, list(itertools.pairwise(sizes))), apply)


def cnn(
    image_shape: tuple[int, int, int],
    channels: Sequence[int],
    num_hidden: int,
    num_classes: int,
) -> Network:
    """3 x 3 convolutions, each followed by relu and a 2 x 2 maximum, then two dense layers."""
    height, width, num_colours = image_shape
    num_halvings = len(channels)
    num_features = (height >> num_halvings) * (width >> num_halvings) * channels[-1]
    convolutions = [
        (9 * fan_in, out) for fan_in, out in itertools.pairwise([num_colours, *channels])
    ]
    shapes = [*convolutions, (num_features, num_hidden), (num_hidden, num_classes)]

    def apply(layers: Layers, images: Array) -> Array:
        hidden = images
        for layer in layers[:num_halvings]:
            hidden = _halve(jax.nn.relu(_affine(layer, _patches(hidden))))
        hidden = jax.nn.relu(_affine(layers[-2], hidden.reshape(len(images), -1)))
        return _affine(layers[-1], hidden)

    return Network(lambda key: _he_uniform(key, shapes), apply)


def orthogonal(key: Array, sizes: Sequence[int], *, last_scale: float) -> Layers:
    """Weights that are orthogonal, times sqrt(2), and in the last layer times a scale."""
    shapes = list(itertools.pairwise(sizes))
    scales = [2**0.5] * (len(shapes) - 1) + [last_scale]
    return [
        Layer(jax.nn.initializers.orthogonal(scale)(key, shape, float), jnp.zeros(shape[1]))
        for key, shape, scale in zip(
            jax.random.split(key, len(shapes)), shapes, scales, strict=True
        )
    ]


def _he_uniform(key: Array, shapes: Sequence[tuple[int, int]]) -> Layers:
    # One draw serves all layers, because each draw takes half a second to compile.
    ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in shapes])
    draws = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1, maxval=1), ends[:-1])
    return [
        Layer((6 / fan_in) ** 0.5 * draw.reshape(fan_in, fan_out), jnp.zeros(fan_out))
        for draw, (fan_in, fan_out) in zip(draws, shapes, strict=True)
    ]


def _affine(layer: Layer, inputs: Array) -> Array:
    outputs = inputs @ layer.weights
    return outputs + jnp.broadcast_to(layer.bias, outputs.shape)


def _patches(images: Array) -> Array:
    """The 3 x 3 surroundings of every pixel, `[n, height, width, 9 * channels]`.

    A convolution is an affine map of these. Under a `vmap` over seeds that stays a matrix
    product, where `lax.conv` becomes a grouped convolution, which is slow on a CPU.
    """
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = itertools.product(range(3), repeat=2)
    return jnp.concatenate(
        [padded[:, i : i + height, j : j + width] for i, j in shifts], axis=-1
    )


def _halve(images: Array) -> Array:
    """The maximum of every 2 x 2 square; an odd last row or column is left out."""
    num_images, height, width, num_channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    squares = even.reshape(num_images, height // 2, 2, width // 2, 2, num_channels)
    return jnp.max(squares, axis=(2, 4))
