"""A linear output layer: what its logits are made of, and how they are formed."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax._autodiff import with_gradient_of
from softjax._elementary import capped
from softjax._inputs import (
    Classes,
    broadcast,
    computing_dtype,
    is_static_one,
    is_static_zero,
    known_labels,
    labels_of,
    nan_outside,
    nan_unless_positive,
    one_number,
    per_class,
    to_array,
    to_float,
)
from softjax._mesh import Layout, spec_of
from softjax._slices import AlongAxes


class Tokens(NamedTuple):
    """The arrays that have one entry per token; None plays no part."""

    features: Array  # [N, D]
    temperature: Array | None = None  # [N], as are all that follow
    soft_cap: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None
    shares: Array | None = None  # the factors of the losses in their sum


class Head(NamedTuple):
    """The arrays that have one entry per class; None plays no part."""

    weights: Array  # [V, D]
    bias: Array | None = None  # [V]
    class_weights: Array | None = None  # [V]


class Layer(NamedTuple):
    tokens: Tokens
    head: Head
    shape: tuple[int, ...]  # of the tokens
    dtype: jnp.dtype  # of the logits

    def per_token(self, option: ArrayLike, name: str) -> Array:
        """An option as one number per token, [N]."""
        value, _ = to_float(option, name=name)
        value = broadcast(value.astype(self.dtype), self.shape, name=name, target="the tokens")
        return value.reshape(-1)

    def optional(
        self, option: ArrayLike, name: str, highest: float | None = None
    ) -> Array | None:
        """The same, and None for the default 0; NaN outside of [0, highest]."""
        if is_static_zero(option):
            return None
        return nan_outside(self.per_token(option, name), 0, highest)


def prepare_layer(
    features: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike | None,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
    *,
    prefix: str = "",
    features_name: str = "features",
) -> Layer:
    """Checks the arguments of a linear layer; `prefix` begins the names of its parameters."""
    features, weights = match_dtypes(
        real_array(features, name=features_name), real_array(weights, name=f"{prefix}weights")
    )
    if features.ndim < 1 or weights.ndim != 2 or features.shape[-1] != weights.shape[1]:
        raise ValueError(
            f"`{features_name}` must be [..., D] and `{prefix}weights` [V, D], got"
            f" {features.shape} and {weights.shape}."
        )
    num_classes, width = weights.shape
    if num_classes == 0:
        raise ValueError(f"`{prefix}weights` must hold at least one class, got 0.")
    shape = features.shape[:-1]
    dtype = computing_dtype(common_dtype(features, weights))
    tokens = Tokens(features.reshape(math.prod(shape), width))
    layer = Layer(tokens, Head(weights), shape, dtype)
    if bias is not None:
        refuse_bool(bias, name=f"{prefix}bias")
        bias = per_class(bias, num_classes, dtype, name=f"{prefix}bias")
    if soft_cap is not None:
        soft_cap = one_number(soft_cap, name=f"{prefix}soft_cap")
        soft_cap = nan_unless_positive(layer.per_token(soft_cap, "soft_cap"))
    if not is_static_one(temperature):
        temperature = nan_unless_positive(layer.per_token(temperature, "temperature"))
        tokens = tokens._replace(temperature=temperature)
    return layer._replace(tokens=tokens._replace(soft_cap=soft_cap), head=Head(weights, bias))


def layout_of(arguments: dict[str, Any]) -> Layout | None:
    """How types say that the tokens and the classes of a layer are spread, if they do.

    Tokens come first: over an axis that both use, the weights are gathered.
    """
    features, weights = arguments.get("features"), arguments.get("weights")
    if not (isinstance(features, Array) and isinstance(weights, Array)):
        return None  # The call will raise an error.
    tokens = tuple(name for names in spec_of(features)[:-1] for name in names)
    classes = tuple(name for name in [*spec_of(weights), ()][0] if name not in tokens)
    return Layout(tokens, classes) if tokens or classes else None


def real_array(x: ArrayLike, *, name: str) -> Array:
    """A floating-point array in the dtype that it has; integers become floats."""
    return to_array(x, name=name).astype(to_float(x, name=name)[1])


def refuse_bool(bias: ArrayLike, *, name: str) -> None:
    if to_array(bias, name=name).dtype == jnp.bool_:
        raise TypeError(f"`{name}` must hold numbers to add (-inf drops a class), got bool.")


def is_mixed_precision(features: Array, weights: Array) -> bool:
    """Whether bfloat16 features meet float32 weights, the usual set-up of mixed precision."""
    return features.dtype == jnp.bfloat16 and weights.dtype == jnp.float32


def common_dtype(*arrays: Array | DTypeLike) -> jnp.dtype:
    """The dtype that JAX promotes to, under its strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def match_dtypes(features: Array, weights: Array) -> tuple[Array, Array]:
    """Both in the dtype that JAX promotes them to, unless `products` takes them as they are."""
    if is_mixed_precision(features, weights):
        return features, weights
    dtype = common_dtype(features, weights)
    return features.astype(dtype), weights.astype(dtype)


def products(features: Array, weights: Array, narrow: DTypeLike | None = None) -> Array:
    """Products features weights^T, summed in float32 or wider.

    The products are formed in the dtype of the features, or in `narrow`. Their derivative is
    that of products in the dtypes that are given, so that sums of gradients are not rounded
    term by term.
    """

    def product(features: Array, weights: Array) -> Array:
        dtype = computing_dtype(common_dtype(features, weights))
        dims = (((1,), (1,)), ((), ()))
        return lax.dot_general(features, weights, dims, preferred_element_type=dtype)

    narrow = features.dtype if narrow is None else narrow
    if features.dtype == weights.dtype == narrow:
        return product(features, weights)
    # XLA drops the wide product, because only its derivative is used.
    return with_gradient_of(
        product(features, weights), product(features.astype(narrow), weights.astype(narrow))
    )


def layer_scores(
    tokens: Tokens, head: Head, narrow: DTypeLike | None = None
) -> tuple[Array, Array]:
    """The logits [N, B] of some classes, capped and over the temperature; and before both."""
    raw = products(tokens.features, without_dropped(head.weights, head.bias), narrow)
    if head.bias is not None:
        raw += head.bias[None]
    scores = raw
    if tokens.soft_cap is not None:
        scores = capped(scores, tokens.soft_cap[:, None])
        if head.bias is not None:
            scores = jnp.where(head.bias[None] == -jnp.inf, -jnp.inf, scores)
    if tokens.temperature is not None:
        temperature = tokens.temperature[:, None]
        is_finite = head.bias is None
        scores = scores / temperature if is_finite else cooled(scores, temperature)
    return scores, raw


def without_dropped(weights: Array, bias: Array | None) -> Array:
    """The weights, with 0 for a class that its bias drops, because it may hold anything."""
    return weights if bias is None else jnp.where(bias[:, None] == -jnp.inf, 0, weights)


def cooled(scores: Array, temperature: Array) -> Array:
    """Scores over the temperature, in which infinite ones are constant."""
    infinite = jnp.isinf(scores)
    finite = jnp.where(infinite, 0, scores)
    return jnp.where(infinite, scores / lax.stop_gradient(temperature), finite / temperature)


def token_labels(
    layer: Layer,
    labels: ArrayLike,
    ignore_index: int | None,
    mesh_axes: tuple[str, ...] = (),
) -> Classes:
    labels = labels_of(labels, (*layer.shape, 1), len(layer.shape)).reshape(-1)
    num_classes = AlongAxes((0,), mesh_axes).length(layer.head.weights)
    return known_labels(labels, num_classes, ignore_index)


def idle_tokens(shares: Array, *tokens: Tokens, known: Array | bool = True) -> Array:
    """Tokens of share 0 that hold an unknown label, a NaN or an inf.

    Sound tokens of share 0 are not idle, because the derivative in the share is their loss.
    """
    for x in jax.tree.leaves([part._replace(soft_cap=None) for part in tokens]):
        known &= jnp.isfinite(x).all(tuple(range(1, x.ndim)))
    return (shares == 0) & ~jnp.asarray(known)


def without_idle(tokens: Tokens, idle: Array | None) -> Tokens:
    """The tokens, with 0 and options of 1 in idle ones, so that nothing reaches a gradient."""
    if idle is None:
        return tokens

    def cleared(x: Array, value: float) -> Array:
        return jnp.where(jnp.expand_dims(idle, tuple(range(1, x.ndim))), value, x)

    given = {name: x for name, x in tokens._asdict().items() if x is not None}
    ones = ("temperature", "soft_cap")
    return Tokens(**{name: cleared(x, float(name in ones)) for name, x in given.items()})


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree, None among them, to align with tangents."""
    leaves: list[Any] = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return leaves


def replaced(tree: Any, leaves: dict[int, Array]) -> Any:
    """The tree, with some of its leaves, told by their places, in place of its own."""
    places = itertools.count()
    choose = lambda x: leaves.get(next(places), x)
    return jax.tree.map(choose, tree, is_leaf=lambda x: x is None)
