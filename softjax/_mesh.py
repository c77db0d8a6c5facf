"""Over which axes of a mesh values vary, inside of `shard_map`.

There the state of a loop, and the results of the branches of a condition, must vary over the
same axes before and after. JAX makes the operands of each operation vary alike, and sums over
the devices in its transpose. The library makes its arguments vary alike once, at the door.
"""

from typing import Any, TypeVar

import jax
from jax import lax

Tree = TypeVar("Tree")


def vary(tree: Tree, *others: Any) -> Tree:
    """The tree, with all arrays as varying as all of them and `others` are together."""
    axes: frozenset[str] = frozenset().union(*map(_axes, jax.tree.leaves((tree, others))))
    if not axes:
        return tree

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - _axes(x)))
        if not missing or not isinstance(x, jax.Array):
            return x
        return lax.pcast(x, missing, to="varying")

    return jax.tree.map(cast, tree)


def is_sharded(tree: Any) -> bool:
    """Whether an array's type says that it is spread over devices.

    Only types on a mesh of explicit axes do. Such an array is not cut into blocks, because the
    blocks would be spread over the devices again.
    """
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return any(axis is not None for x in arrays for axis in jax.typeof(x).sharding.spec)


def replicated_axes(x: Any, *others: Any) -> tuple[str, ...]:
    """The axes over which `x` varies and an array among `others` does not."""
    by_all = _axes(x).intersection(*map(_axes, jax.tree.leaves(others)))
    return tuple(sorted(_axes(x) - by_all))


def _axes(x: Any) -> frozenset[str]:
    if not isinstance(x, jax.Array):
        return frozenset()
    kind = jax.typeof(x).manual_axis_type
    return frozenset() if kind is None else kind.varying
