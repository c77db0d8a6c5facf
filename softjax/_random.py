"""Random bits and noise: 64 bits per number, so that rare events have their right rate.

A float32 of 24 random bits has no event rarer than 6e-8, and the largest of many such numbers
is often shared. Noise is float32 or wider, whatever the dtype of the logits.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._uint64 import WORD, Wide

ABOVE = 200.0  # An infinite logit lies so far above all others; exp(-200) is 1e-87.


def check_key(key: Array, *, name: str = "key") -> None:
    """Refuses what is not one random key."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"`{name}` must be a key of jax.random, got {type(key).__name__}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != WORD:
        raise TypeError(f"`{name}` must be a key of jax.random, got an array of {key.dtype}.")
    if key.ndim != (0 if typed else 1):
        raise ValueError(f"`{name}` must be one key, got an array of shape {key.shape}.")
    if not typed:
        try:
            jax.eval_shape(jax.random.wrap_key_data, key)
        except (TypeError, ValueError):
            raise ValueError(
                f"`{name}` must be a key of jax.random, got {key.dtype} of shape {key.shape}."
            ) from None


def bits(key: Array, shape: tuple[int, ...]) -> Wide:
    """64 random bits per number.

    They are drawn as a vector, because XLA takes seconds to compile counters of three or more
    axes.
    """
    high, low = jax.random.bits(key, (2 * math.prod(shape),), WORD).reshape(2, *shape)
    return Wide(high, low)


def exponential(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Exponential noise, positive, to full relative precision in both tails.

    It is -log of a uniform number. The distance of that number to the nearer end, 0 or 1, is
    drawn, because it keeps its digits there.
    """
    high, low = bits(key, shape)
    near_zero = (high >> 31) == 0
    leading = (high & jnp.array(0x7FFFFFFF, WORD)).astype(dtype)
    # The distance lies in (0, 1/2], in steps of 2^-64 next to 0.
    distance = leading * 2.0**-32 + (low.astype(dtype) + 0.5) * 2.0**-64
    return jnp.where(near_zero, -jnp.log(distance), -jnp.log1p(-distance))


def gumbel(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Standard Gumbel noise, from -3.8 to 44."""
    return -jnp.log(exponential(key, shape, dtype))


def centred(x: Array, axis: int) -> Array:
    """Logits below the largest finite one along an axis; infinite ones far above it.

    Noise is thus added to small numbers, and infinite entries come first, in any order.
    """
    finite, lowest = jnp.isfinite(x), jnp.finfo(x.dtype).min
    inside = jnp.where(finite, x, lowest)
    peak = jnp.max(lax.stop_gradient(inside), axis, initial=lowest, keepdims=True)
    below = jnp.maximum(inside - peak, lowest)
    return jnp.where(x == jnp.inf, ABOVE, jnp.where(finite, below, x))
