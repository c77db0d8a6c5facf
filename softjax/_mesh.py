"""Over which axes of a mesh values vary, inside of `shard_map`.

There what goes around a loop, or leaves the branches of a condition, must vary over the same
axes before and after, and what meets in an operation is made alike: for each operation anew,
with a sum over the devices in its transpose. Arguments are made alike once, when they come in.
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
    """Whether an array's type says that it is spread over devices (on a mesh of explicit axes).

    Such an array is not cut into blocks: these would be spread over the devices again.
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
