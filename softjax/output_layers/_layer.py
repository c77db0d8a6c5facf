"""A linear output layer: what its logits are made of, and how they are formed."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._elementary import capped
from softjax._inputs import (
    Classes,
    broadcast,
    computing_dtype,
    is_one,
    known_labels,
    labels_of,
    nan_unless_positive,
    one_number,
    per_class,
    to_float,
)


class Layer(NamedTuple):
    """The arrays that logits are made of; those that are None play no part."""

    features: Array  # [N, D]
    weights: Array  # [V, D]
    bias: Array | None  # [V]
    temperature: Array | None  # [N]
    soft_cap: Array | None  # []
    classes: Array | None = None  # [V], the weights of the even sum


class Tokens(NamedTuple):
    layer: Layer
    shape: tuple[int, ...]  # of the tokens
    dtype: jnp.dtype

    def row(self, option: ArrayLike, name: str) -> Array:
        """An option as one number a token, [N]."""
        value, _ = to_float(option, name=name)
        value = broadcast(value.astype(self.dtype), self.shape, name=name, target="labels")
        return value.reshape(-1)


def prepare_layer(
    features: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike | None,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
    *,
    prefix: str = "",
    features_name: str = "features",
) -> Tokens:
    """Checks the arguments of a linear layer; `prefix` tells their names from another's."""
    given = to_float(features, name=features_name)[1]
    dtype = computing_dtype(given)
    if to_float(weights, name=f"{prefix}weights")[1] != given:
        raise TypeError(
            f"`{prefix}weights` must have the dtype {jnp.asarray(features).dtype} of"
            f" `{features_name}`, got {jnp.asarray(weights).dtype}."
        )
    features, weights = jnp.asarray(features), jnp.asarray(weights)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        features, weights = features.astype(dtype), weights.astype(dtype)
    if features.ndim < 1 or weights.ndim != 2 or features.shape[-1] != weights.shape[1]:
        raise ValueError(
            f"`{features_name}` must be [..., D] and `{prefix}weights` [V, D], got"
            f" {features.shape} and {weights.shape}."
        )
    if weights.shape[0] == 0:
        raise ValueError(f"`{prefix}weights` must hold at least one class, got 0.")
    shape, width = features.shape[:-1], features.shape[-1]
    tokens = Tokens(
        Layer(features.reshape(math.prod(shape), width), weights, None, None, None),
        shape,
        dtype,
    )
    if bias is not None:
        bias = per_class(bias, weights.shape[0], dtype, name=f"{prefix}bias")
    if soft_cap is not None:
        soft_cap = one_number(soft_cap, name=f"{prefix}soft_cap")
        soft_cap = nan_unless_positive(soft_cap.astype(dtype))
    layer = tokens.layer._replace(
        bias=bias,
        soft_cap=soft_cap,
        temperature=None
        if is_one(temperature)
        else nan_unless_positive(tokens.row(temperature, "temperature")),
    )
    return tokens._replace(layer=layer)


def token_labels(tokens: Tokens, labels: ArrayLike, ignore_index: int | None) -> Classes:
    labels = labels_of(labels, (*tokens.shape, 1), len(tokens.shape)).reshape(-1)
    return known_labels(labels, tokens.layer.weights.shape[0], ignore_index)


def idle_tokens(shares: Array, *options: Array | None, rows: Classes | None = None) -> Array:
    """Tokens that do not count: ignored ones, and those of share 0 that hold a NaN or inf.

    (Of share 0, and sound, a token's loss is the derivative in its share.) `options` hold one
    number a token, or several.
    """
    by_token = (x for x in options if x is not None)
    sound = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in by_token]
    if rows is not None:
        sound.append(rows.known)
    idle = (shares == 0) & ~functools.reduce(jnp.logical_and, sound)
    return idle if rows is None or rows.ignored is None else idle | rows.ignored


def without(layer: Layer, idle: Array | None) -> Layer:
    """What tokens that do not count hold reaches no gradient."""
    if idle is None:
        return layer
    heat = layer.temperature
    return layer._replace(
        features=jnp.where(idle[:, None], 0, layer.features),
        temperature=None if heat is None else jnp.where(idle, 1, heat),
    )


def shown(weights: Array, bias: Array | None) -> Array:
    """The weights, with 0 for a class that its bias drops: it may hold anything."""
    return weights if bias is None else jnp.where(bias[:, None] == -jnp.inf, 0, weights)


def cooled(scores: Array, heat: Array) -> Array:
    """Scores over the temperature, in which infinite ones are constant."""
    infinite = jnp.isinf(scores)
    finite = jnp.where(infinite, 0, scores)
    return jnp.where(infinite, scores / lax.stop_gradient(heat), finite / heat)


def layer_scores(block: Layer) -> Array:
    """The logits of a block of classes, [N, B], capped and divided by the temperature."""
    dtype = computing_dtype(block.features.dtype)
    scores = lax.dot_general(
        block.features,
        shown(block.weights, block.bias),
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )
    if block.bias is not None:
        scores += jnp.where(block.bias == -jnp.inf, 0, block.bias)[None]
    if block.soft_cap is not None:
        scores = capped(scores, block.soft_cap)
    if block.temperature is not None:
        heat = block.temperature[:, None]
        scores = scores / heat if block.bias is None else cooled(scores, heat)
    if block.bias is not None:
        scores = jnp.where(block.bias[None] == -jnp.inf, -jnp.inf, scores)
    return scores
