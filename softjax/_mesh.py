"""How arrays are spread over the axes of a mesh.

Inside of `shard_map`, the state of a loop, and the results of the branches of a condition, must
vary over the same axes before and after. JAX makes the operands of each operation vary alike,
and sums over the devices in its transpose. The library makes its arguments vary alike once,
before the function runs.

The mesh axes that `axis_name` names are different. Each device along them holds a part of every
slice, so entries vary over these axes and numbers per slice do not. A sum over a slice is then
the sum of the devices' sums, and nothing else in the mathematics changes. `check_axes` refuses
what would give a wrong result.

Outside of `shard_map`, the types of arrays tell how they are spread over the explicit axes of a
mesh. `on_explicit_axes` calls every public function so that its result is spread likewise.
Types tell nothing about automatic axes, over which the compiler spreads arrays as it chooses.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


class Layout(NamedTuple):
    """The explicit axes over which tokens, and the classes of a linear layer, are spread.

    If the types of the arguments tell the layout, the function receives it as its `axis_name`.
    """

    tokens: tuple[str, ...]
    classes: tuple[str, ...] = ()
    result: Any = None  # how the result is spread: specs, or None if they must be found


AxisName = str | tuple[str, ...] | None


def names_of(axis_name: AxisName | Layout) -> tuple[str, ...]:
    """The names of the mesh axes over which slices are spread; an empty tuple for None."""
    if axis_name is None or isinstance(axis_name, Layout):
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
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


def num_devices(mesh_axes: tuple[str, ...], mesh: Any = None) -> int:
    """How many devices there are along axes of a mesh, by default that of a `shard_map`."""
    return math.prod(lax.axis_size(n) if mesh is None else mesh.shape[n] for n in mesh_axes)


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


def may_be_sharded(tree: Any) -> bool:
    """Whether arrays may be spread over devices by the compiler.

    Such arrays are not cut into blocks, because the blocks would be spread over the devices
    again.
    """
    meshes = [
        jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)
    ]
    return any(
        mesh.shape[name] > 1
        for mesh in meshes
        for name in (*mesh.auto_axes, *mesh.explicit_axes)
    )


def call_on_mesh(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    spread: tuple[str, ...] = (),
    layout: Callable[[dict[str, Any]], Layout | None] | None = None,
    captures: bool = False,
) -> Any:
    """Calls a public function, whose arguments may be spread over the axes of a mesh.

    The last three are those of `api` and of `on_explicit_axes`.
    """
    signature, mesh_axes = inspect.signature(function), names_of(kwargs.get("axis_name"))
    if mesh_axes:
        parameters = signature.parameters.values()
        optional = tuple(p.name for p in parameters if p.default is not p.empty)
        arguments = signature.bind_partial(*args, **kwargs).arguments
        check_axes(mesh_axes, arguments, spread, optional)
    args, kwargs = vary((args, kwargs), but=mesh_axes)
    found = None
    if layout is not None and not mesh_axes:
        found = layout(signature.bind_partial(*args, **kwargs).arguments)
        kwargs["axis_name"] = found
    specs = None if found is None else found.result
    return on_explicit_axes(function, args, kwargs, captures=captures, specs=specs)


def on_explicit_axes(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    captures: bool = False,
    specs: Any = None,
) -> Any:
    """Calls a function. Its result is spread as `specs` say or, without them, as its arguments.

    JAX refuses an operation whose result it could spread in several ways. So the compiler
    chooses inside of the function, and the type of the result is stated at the end. Inside,
    JAX refuses arrays on explicit axes that a user's function captures. So with `captures` the
    function is called plainly unless an argument is spread. A pytree that is a function, such
    as `jax.tree_util.Partial`, may hold such arrays, because they are arguments then.
    """
    call, arrays = as_function_of_arrays(function, args, kwargs)
    # The mesh decides, because `vmap` hides the axis that it maps from the spec of a type.
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    is_spread = mesh is not None and any(names for x in arrays for names in spec_of(x))
    if mesh is None or (captures and not is_spread):
        return function(*args, **kwargs)
    automatic = functools.partial(jax.sharding.auto_axes, axes=mesh.explicit_axes)

    whole = NamedSharding(mesh, PartitionSpec())
    if not is_spread:
        return automatic(call, out_sharding=whole)(*arrays)

    def shapes(axes: list[set[int]]) -> Any:
        """The shapes of the result for arrays that are twice as long along these axes."""
        longer = lambda *arrays: call(*map(_doubled, arrays, axes))
        return jax.eval_shape(automatic(longer, out_sharding=whole), *arrays)

    specs = _result_specs(shapes, arrays) if specs is None else specs
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return automatic(call, out_sharding=shardings)(*arrays)


def as_function_of_arrays(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """The call as a function of its arrays alone, and these arrays."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def call(*arrays: Any) -> Any:
        given = leaves.copy()
        for i, x in zip(places, arrays, strict=True):
            given[i] = x
        args, kwargs = jax.tree.unflatten(structure, given)
        return function(*args, **kwargs)

    return call, [leaves[i] for i in places]


def _result_specs(shapes: Callable[[list[set[int]]], Any], arrays: list[Any]) -> Any:
    """How a result is spread: each axis as the axes of the arguments with which it grows.

    Labels that are the same on all devices must still grow with the rows of logits that are
    spread. So a second try lets the other arguments grow too, along axes of the same place and
    size. An axis that does not grow is the same on all devices.
    """
    results, structure = jax.tree.flatten(shapes([set() for _ in arrays]))
    specs: list[list[tuple[str, ...]]] = [[()] * x.ndim for x in results]
    for name in dict.fromkeys(name for x in arrays for names in spec_of(x) for name in names):
        spread = [{i for i, names in enumerate(spec_of(x)) if name in names} for x in arrays]
        sizes = {(i, x.shape[i]) for x, axes in zip(arrays, spread, strict=True) for i in axes}
        alike = [
            axes or {i for i, _ in sizes & {*enumerate(x.shape)}}
            for x, axes in zip(arrays, spread, strict=True)
        ]
        for axes in (spread, alike):
            try:
                grown = jax.tree.leaves(shapes(axes))
            except (TypeError, ValueError):  # The shapes do not fit.
                continue
            for spec, x, longer in zip(specs, results, grown, strict=True):
                axis = next((i for i, n in enumerate(x.shape) if longer.shape[i] > n), None)
                if axis is not None:
                    spec[axis] += (name,)
            break
    return jax.tree.unflatten(structure, [PartitionSpec(*spec) for spec in specs])


def spec_of(x: Any) -> list[tuple[str, ...]]:
    """The explicit mesh axes over which each axis of an array is spread."""
    spec = jax.typeof(x).sharding.spec
    return [(names,) if isinstance(names, str) else names or () for names in spec]


def _doubled(x: Any, axes: set[int]) -> Any:
    for axis in axes:
        x = jnp.concatenate([x, x], axis)
    return x


def replicated_axes(x: Any, *others: Any) -> tuple[str, ...]:
    """The axes over which `x` varies and an array among `others` does not."""
    by_all = _axes(x).intersection(*map(_axes, jax.tree.leaves(others)))
    return tuple(sorted(_axes(x) - by_all))


def _axes(x: Any) -> frozenset[str]:
    if not isinstance(x, jax.Array):
        return frozenset()
    kind = jax.typeof(x).manual_axis_type
    return frozenset() if kind is None else kind.varying
