"""The losses of tokens under a linear layer, and their sum with its gradient in one pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from softjax._autodiff import constant_where_infinite
from softjax._inputs import Classes, computing_dtype
from softjax._mesh import vary
from softjax._scan import scan_blocks
from softjax.losses._reduction import sum_of_counted
from softjax.losses._terms import cross_entropy_terms
from softjax.output_layers._layer import Head, Tokens, common_dtype, leaves_of, replaced
from softjax.output_layers._stream import ENTRIES, Plan, statistics


def token_losses(plan: Plan, tokens: Tokens, head: Head, rows: Classes) -> tuple[Array, Array]:
    """The loss of each token, `[N]`, without its share, and the z-loss in it."""
    smoothing, weights = tokens.label_smoothing, head.class_weights
    plan = plan._replace(uniform=smoothing is not None)
    found = statistics(plan, tokens, head, rows.labels)
    loss, *z_terms = cross_entropy_terms(
        found.nll,
        found.logsumexp,
        found.uniform_nll,
        label_weight=None
        if weights is None
        else plan.slices.pick_per_class(weights, rows.labels),
        smoothing=smoothing,
        z_loss=tokens.z_loss,
    )
    total = functools.reduce(jnp.add, z_terms, loss)
    z_term = z_terms[0] if z_terms else jnp.zeros_like(loss)
    return rows.finish(constant_where_infinite(total)), rows.finish(z_term)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total_with_gradient(
    block_size: int | None, arrays: tuple[Tokens, Head], rows: Classes
) -> Array:
    """The sum of the losses times their shares, whose gradient is found along with it."""
    return _over_tokens(block_size, arrays, rows, [])[0]


def _total_fwd(block_size: int | None, arrays: Any, rows: Any) -> tuple[Array, Any]:
    # This is a rule to save time: logits that are formed for the value serve the gradient too.
    is_primal = lambda x: hasattr(x, "perturbed")
    read = lambda f, tree: jax.tree.map(f, tree, is_leaf=is_primal)
    moving = leaves_of(read(lambda x: x.perturbed, arrays))
    arrays, rows = read(lambda x: x.value, (arrays, rows))
    return _over_tokens(
        block_size, arrays, rows, [i for i, moves in enumerate(moving) if moves]
    )


def _total_bwd(block_size: int | None, slopes: Any, bar: Array) -> tuple[Any, None]:
    def pulled(slope: Array) -> Array | None:
        return slope * bar.astype(slope.dtype) if slope.ndim else None

    is_zero = isinstance(bar, SymbolicZero)
    return jax.tree.map(lambda x: None if is_zero else pulled(x), slopes), None


total_with_gradient.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


def _over_tokens(
    block_size: int | None,
    arrays: tuple[Tokens, Head],
    rows: Classes,
    moving: list[int],
) -> tuple[Array, tuple[Tokens, Head]]:
    """The total, some tokens at a time, and its derivatives in the leaves that move.

    In place of the derivatives in the other leaves stands a number, because under
    `jax.checkpoint` the tree must not depend on what moves.
    """
    tokens, head = arrays
    num_classes, width = head.weights.shape
    dtype = computing_dtype(common_dtype(tokens.features, head.weights))
    leaves = leaves_of(arrays)
    # A block of logits is of the size of the gradient in the weights, or of `ENTRIES`.
    size = max(1, width, ENTRIES // num_classes) if block_size is None else block_size
    shared = [i for i in moving if i >= len(tokens)]

    def visit(state: Any, first: Array, block: Any) -> tuple[Any, dict[int, Array]]:
        some, rows = block
        at = (some, head)

        def total_of(moved: dict[int, Array]) -> Array:
            tokens, head = replaced(at, moved)
            loss, _ = token_losses(Plan(num_classes, dense=True), tokens, head, rows)
            return sum_of_counted(loss, tokens.shares)

        parts = leaves_of(at)
        here, slopes = jax.value_and_grad(total_of)({i: parts[i] for i in moving})
        total, sums = state
        sums = {i: x + slopes.pop(i).astype(x.dtype) for i, x in sums.items()}
        return (total + here, sums), slopes

    zero = jnp.zeros((), dtype)
    sums = {i: jnp.zeros(leaves[i].shape, dtype) for i in shared}
    state = vary((zero, sums), arrays)
    (total, sums), slopes = scan_blocks(visit, state, (tokens, rows), size)
    slopes = (slopes or {i: leaves[i] for i in moving}) | sums
    slopes = {
        i: slopes.get(i, zero).astype(x.dtype) for i, x in enumerate(leaves) if x is not None
    }
    return total, replaced(arrays, slopes)
