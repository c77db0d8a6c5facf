"""The losses of tokens under a linear layer, and their sum with its gradient in one pass.

What a loss is made of comes as one dictionary: the arrays of the layer, and of the options
that have been given; one number a token, or shared by all tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from softjax._inputs import Classes, computing_dtype
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax.losses._labels import constant_where_infinite, times_nats
from softjax.losses.means import sum_of_counted
from softjax.output_layers._layer import Layer
from softjax.output_layers._stream import ENTRIES, Plan, statistics

Parts = dict[str, Array]
BY_TOKEN = ("features", "temperature", "label_smoothing", "z_loss", "shares")


def token_losses(plan: Plan, parts: Parts, rows: Classes) -> Array:
    """One loss a token, `[N]`, without its share."""
    layer = Layer(*(parts.get(name) for name in Layer._fields))  # type: ignore[arg-type]
    smoothing, z_loss = parts.get("label_smoothing"), parts.get("z_loss")
    found = statistics(plan._replace(even=smoothing is not None), layer, rows.labels)
    factor = jnp.ones_like(found.surprise)
    if layer.classes is not None:
        factor = layer.classes[rows.labels]
    if smoothing is not None:
        factor *= 1 - smoothing
    loss = times_nats(factor, found.surprise)
    if smoothing is not None and found.even is not None:
        loss += times_nats(smoothing, found.even)
    if z_loss is not None:
        finite = jnp.where(jnp.isfinite(found.logsumexp), found.logsumexp, 0)
        loss += z_loss * finite**2
    return rows.finish(constant_where_infinite(loss))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total_with_gradient(block_size: int | None, parts: Parts, rows: Classes) -> Array:
    """The sum of the losses times their shares, whose gradient is found along with it."""
    return _over_tokens(block_size, parts, rows, frozenset())[0]


def _total_fwd(block_size: int | None, parts: Any, rows: Any) -> tuple[Array, Any]:
    # A rule, for time: logits that are formed for the value serve the gradient too.
    moving = frozenset(name for name, part in parts.items() if part.perturbed)
    value_of = lambda tree: jax.tree.map(
        lambda x: x.value, tree, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    total, slopes = _over_tokens(block_size, value_of(parts), value_of(rows), moving)
    # (Under `jax.checkpoint` the tree may not depend on what moves: one 0 for what does not.)
    still = {name: jnp.zeros((), part.value.dtype) for name, part in parts.items()}
    return total, still | slopes


def _total_bwd(block_size: int | None, slopes: Any, bar: Array) -> tuple[Any, None]:
    def pulled(name: str, slope: Array) -> Array | None:
        still = slope.ndim == 0 and name != "soft_cap"  # Of the parts, it alone is a number.
        return None if still else slope * bar.astype(slope.dtype)

    if isinstance(bar, SymbolicZero):
        return dict.fromkeys(slopes), None
    return {name: pulled(name, slope) for name, slope in slopes.items()}, None


total_with_gradient.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


def _over_tokens(
    block_size: int | None, parts: Parts, rows: Classes, moving: frozenset[str]
) -> tuple[Array, Parts]:
    """The total, some tokens at a time, and its derivatives in the parts that move."""
    num_classes, width = parts["weights"].shape
    dtype = computing_dtype(parts["features"].dtype)
    # A block of logits is of the size of the gradient in the weights, or of `ENTRIES`.
    size = max(1, width, ENTRIES // num_classes) if block_size is None else block_size
    plan = Plan(num_classes, dense=True)
    by_token = {name: parts[name] for name in BY_TOKEN if name in parts}
    shared = {name: part for name, part in parts.items() if name not in by_token}

    def visit(state: Any, first: Array, block: Any) -> tuple[Any, Parts]:
        some, rows = block
        at = shared | some

        def total_of(moved: Parts) -> Array:
            here = at | moved
            return sum_of_counted(token_losses(plan, here, rows), here["shares"])

        here, slopes = jax.value_and_grad(total_of)({name: at[name] for name in moving})
        total, sums = state
        sums = {name: x + slopes[name].astype(x.dtype) for name, x in sums.items()}
        return (total + here, sums), {name: slopes[name] for name in moving & set(some)}

    sums = {name: jnp.zeros(shared[name].shape, dtype) for name in moving & set(shared)}
    state = jnp.zeros((), dtype), sums
    (total, sums), slopes = scan_blocks(visit, vary(state, parts), (by_token, rows), size)
    slopes = {**(slopes or {}), **sums}
    return total, {name: slope.astype(parts[name].dtype) for name, slope in slopes.items()}
