"""Values that carry the derivative of another expression, or none; tangents that vanish."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero


@jax.custom_jvp
def with_gradient_of(soft: Array, hard: Array) -> Array:
    """Hard values with the derivative of soft ones."""
    # This needs a rule, because h + (s - s) is NaN where a soft value is infinite.
    del soft
    return hard


@with_gradient_of.defjvp
def _with_gradient_of_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return with_gradient_of(*primals), tangents[0]


def constant_where_infinite(x: Array) -> Array:
    """The values, without a derivative where they are infinite."""
    return jnp.where(jnp.isinf(x), jax.lax.stop_gradient(x), x)


def nonzero(tangents: Any) -> Any:
    """The tangents, with None for those that are zero."""
    is_zero = lambda dot: isinstance(dot, SymbolicZero)
    return jax.tree.map(lambda dot: None if is_zero(dot) else dot, tangents, is_leaf=is_zero)
