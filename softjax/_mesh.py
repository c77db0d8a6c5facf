"""Over which axes of a mesh values vary, inside of `shard_map`.

There the state of a loop, and the results of the branches of a condition, must vary over the
same axes before and after. JAX makes the operands of each operation vary alike, and sums over
the devices in its transpose. The library makes its arguments vary alike once, at the door.

The mesh axes that `axis_name` names are different. Each device along them holds a part of every
slice, so entries vary over these axes and numbers per slice do not. A sum over a slice is then
the sum of the devices' sums, and nothing else in the mathematics changes. `check_axes` refuses
what would give a wrong result.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
from jax import lax

Tree = TypeVar("Tree")
AxisName = str | tuple[str, ...] | None


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    """The names of the mesh axes over which slices are spread; an empty tuple for None."""
    if axis_name is None:
        return ()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`axis_name` must be a name or a tuple of names, got {axis_name!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`axis_name` {axis_name!r} names an axis twice.")
    return names


def check_axes(
    mesh_axes: tuple[str, ...],
    arguments: Mapping[str, Any],
    spread: Iterable[str],
    optional: Iterable[str],
) -> None:
    """Refuses, while tracing, mesh axes and arguments that would give a wrong result.

    The arguments that `spread` names hold a part of each slice, so they must vary over the mesh
    axes. Those that are also `optional` may vary there or not. All other arguments must not
    vary there.
    """
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    for name in mesh_axes:
        if name not in mapped:
            raise ValueError(
                "`axis_name` must name mesh axes of a `jax.shard_map` around the call, which"
                f" are {', '.join(mapped) or 'none here'}, got {name!r}. The axis of a `vmap`"
                " is no mesh axis."
            )
    if not set(mesh_axes) <= _axes(lax.axis_index(mesh_axes)):
        raise ValueError(
            "`axis_name` needs a `shard_map` that checks over which axes values vary, which"
            " `check_vma=False` turns off: derivatives taken inside of it would be silently"
            " wrong."
        )
    required = set(spread).difference(optional)
    for argument, value in arguments.items():
        for x in jax.tree.leaves(value):
            found = f"got one that varies over {', '.join(sorted(_axes(x))) or 'no axis'}."
            if argument in required and not set(mesh_axes) <= _axes(x):
                raise ValueError(
                    f"`{argument}` must vary over the mesh axes {', '.join(mesh_axes)} of"
                    f" `axis_name`, because each device holds a part of it, {found}"
                    " `jax.lax.pcast` makes an array that is the same on all devices vary."
                )
            if argument not in spread and set(mesh_axes) & _axes(x):
                raise ValueError(
                    f"`{argument}` must be the same along the mesh axes {', '.join(mesh_axes)}"
                    f" of `axis_name`, {found}"
                )


def num_devices(mesh_axes: tuple[str, ...]) -> int:
    """How many devices there are along the axes."""
    return math.prod(map(lax.axis_size, mesh_axes))


def vary(tree: Tree, *others: Any, but: tuple[str, ...] = ()) -> Tree:
    """The tree, with arrays that vary over each axis over which any of them or `others` does.

    Nothing changes over the axes in `but`.
    """
    axes: frozenset[str] = frozenset().union(*map(_axes, jax.tree.leaves((tree, others))))
    axes -= set(but)
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
