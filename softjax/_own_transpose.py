"""A linear map whose transpose is a program of its own.

A function with a `jax.custom_vjp` has no JVP. A function with a `jax.custom_jvp` has all modes,
but JAX derives its backward pass from its tangent. A vendor's backward kernel cannot be had
that way, and JAX cannot differentiate such a kernel either. The rule of a `custom_jvp` may end
in `linear_map`: then the value, the tangent and the transpose are three programs, and
derivatives of any order remain in both modes.

The map L is written as the solution of a linear system, because `lax.custom_linear_solve` alone
lets a transpose be given, differentiates what it is given only through the matrix, and can be
transposed again. The solution of u = b, y - L u = c is y = c + L b. The transposed system has
the solution b + L' c, c.

Limits:
- `tangent` must be plain JAX, which JAX can differentiate and transpose: derivatives of the
  second order come from it. It is traced three times.
- The transpose gets cotangents of all results, with zeros in place of those that vanish.
- `vmap` needs batching rules of all that the three programs call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def linear_map(
    tangent: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    like: Any,
    residuals: Any,
    dots: Any,
) -> Any:
    """`tangent(residuals, dots)`, whose transpose is `transpose(residuals, bars)`.

    The result is a tree of arrays as `like` is one. `tangent` is linear in `dots`, which must
    hold only what moves.
    """
    # JAX wants each leaf of the right-hand side to move, and the matrix to depend on all
    # residuals, or none. The zeros that are added are constants for XLA.
    floats = [x for x in jax.tree.leaves(residuals) if jnp.issubdtype(x.dtype, jnp.floating)]
    dots = jax.tree.map(lambda x: x + _zero(dots, x.dtype), dots)
    right = dots, jax.tree.map(lambda x: jnp.zeros_like(x) + _zero(dots, x.dtype), like)

    def matrix(solution: Any) -> Any:
        u, y = solution
        same = jax.tree.map(lambda x: x * (1 + _zero(floats, x.dtype)), u)
        return same, jax.tree.map(jnp.subtract, y, tangent(residuals, u))

    def solve(_: Any, right: Any) -> Any:
        b, c = right
        return b, _plus(c, tangent(residuals, b))

    def solve_transposed(_: Any, right: Any) -> Any:
        b, c = right
        return _plus(b, transpose(residuals, c)), c

    return lax.custom_linear_solve(matrix, right, solve, solve_transposed)[1]


def _plus(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), tree, other)


def _zero(tree: Any, dtype: Any) -> Array:
    """The number 0, as a linear function of all arrays."""
    empty = lambda x: lax.slice_in_dim(x if x.ndim else x[None], 0, 0)
    sums = (jnp.sum(empty(x)).astype(dtype) for x in jax.tree.leaves(tree))
    return sum(sums, jnp.zeros((), dtype))
