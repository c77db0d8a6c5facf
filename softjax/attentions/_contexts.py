"""How to attend over a sequence whose tokens are spread over devices.

Beside the ring there are two ways that need no more than collectives around an attention of one
device: to gather the keys, and to exchange tokens for heads. If types tell that the tokens
are spread over explicit axes, the library opens the `shard_map` of the ring itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from softjax._mesh import Layout, as_function_of_arrays, num_devices, spec_of, vary
from softjax._tiles import grid_of, per_score
from softjax.attentions._inputs import pair_of_positions
from softjax.attentions._sources import change, users_parts, with_key_ids
from softjax.masks import Dense, Function, Lengths, Segments

CONTEXTS = ("ring", "allgather", "ulysses")
MeshAxes = tuple[str, ...]
Attention = Callable[..., Any]


def check_context(given: dict[str, Any]) -> None:
    """Refuses what cannot be had over devices, before `jit`."""
    context, axis_name = given.get("context", "ring"), given.get("axis_name")
    if context not in CONTEXTS:
        raise ValueError(
            f'`context` must be "ring", "allgather" or "ulysses", got {context!r}.'
        )
    if axis_name is None:
        if context != "ring":
            raise ValueError(
                f"`context={context!r}` needs an `axis_name`, over which the tokens are spread."
            )
        return
    if given.get("dropout_key") is not None:
        raise ValueError(
            "`dropout_key` must be None with `axis_name`, because the order of all tokens in"
            " the memory of one device decides which weights are dropped."
        )
    if context == "ring" and given.get("normalizer", "softmax") != "softmax":
        raise ValueError(
            '`normalizer` must be "softmax" in a ring, because each step of the search for the'
            " thresholds of another map would send all keys around it:"
            ' `context="allgather"` or "ulysses" serves.'
        )


def layout_of_tokens(arguments: dict[str, Any]) -> Layout | None:
    """How types say that tokens are spread, and the result; None if they are not.

    It names no axes for the tokens if a ring cannot serve the call.
    """
    arrays = [arguments.get(name) for name in ("queries", "keys", "values")]
    if not all(isinstance(x, Array) and x.ndim >= 3 for x in arrays):
        return None
    queries, keys, values = map(spec_of, arrays)
    if num_devices(queries[-3], jax.typeof(arrays[0]).sharding.mesh) == 1:
        return None
    serves = (
        queries[:-2] == keys[:-2] == values[:-2]
        and not values[-1]
        and arguments.get("normalizer", "softmax") == "softmax"
        and arguments.get("dropout_key") is None
        and arguments.get("implementation") in (None, "streamed")
        and not users_parts(arguments.get("mask"))
    )
    # The last axis is left out, so that one spec serves the averages and the log-sum-exp.
    spec = PartitionSpec(*queries[:-1])
    result = (spec, spec) if arguments.get("return_lse") else spec
    return Layout(queries[-3] if serves else (), result=result)


def ring_on_explicit_axes(
    attention: Attention,
    mesh_axes: MeshAxes,
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    options: dict[str, Any],
) -> Any:
    """Attention by a ring in a `shard_map` over the axes of the tokens.

    The compiler spreads all other axes, such as those of the batch, as it chooses.
    """
    # Wrong shapes raise their errors here, because a device sees its part of them alone.
    jax.eval_shape(lambda: attention(queries, keys, values, **options))
    lengths = jnp.shape(queries)[-3], jnp.shape(keys)[-3]
    # NumPy arrays become JAX arrays, because no device would cut an array that is a constant.
    as_array = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    args, options = (queries, keys, values), jax.tree.map(as_array, options)

    def along(axis: int, x: Any) -> PartitionSpec:
        """The spec of an array: cut along an axis if it has one entry per token there."""
        if jnp.ndim(x) < -axis or jnp.shape(x)[axis] not in lengths:
            return PartitionSpec()
        return PartitionSpec(*[None] * (jnp.ndim(x) + axis), mesh_axes)

    per_query, per_token = (
        functools.partial(jax.tree.map, functools.partial(along, axis)) for axis in (-2, -1)
    )
    specs = options | {
        "mask": change(change(options["mask"], Dense, per_query), Segments, per_token),
        "bias": per_query(options["bias"]),
        "positions": per_token(options["positions"]),
    }
    whole = lambda x: x if isinstance(x, PartitionSpec) else PartitionSpec()
    of_leaves = jax.tree.leaves(([along(-3, x) for x in args], jax.tree.map(whole, specs)))
    is_array = [isinstance(x, Array) for x in jax.tree.leaves((args, options))]
    call, arrays = as_function_of_arrays(
        functools.partial(attention, axis_name=mesh_axes), args, options
    )
    return jax.shard_map(
        call,
        in_specs=tuple(itertools.compress(of_leaves, is_array)),
        out_specs=along(-3, queries),
        axis_names={*mesh_axes},
    )(*arrays)


def places(
    mesh_axes: MeshAxes, positions: Any, queries: ArrayLike, keys: ArrayLike
) -> tuple[Any, Any]:
    """The positions of queries and keys; by default one device follows another."""
    of_queries, of_keys = pair_of_positions(positions)

    def contiguous(x: ArrayLike) -> Array:
        size = jnp.shape(x)[-3]
        return lax.axis_index(mesh_axes) * size + jnp.arange(size, dtype=jnp.int32)

    return (
        contiguous(queries) if of_queries is None else of_queries,
        contiguous(keys) if of_keys is None else of_keys,
    )


def with_all_keys(
    attention: Attention,
    mesh_axes: MeshAxes,
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    options: dict[str, Any],
) -> Any:
    """Attention of the queries of this device to the keys of all devices."""
    queries, keys, values, options = vary((queries, keys, values, options))

    whole = functools.partial(_gather_parts, mesh_axes)

    def explicit(mask: Lengths) -> Lengths:
        """The same lengths, where there are more keys than queries."""
        is_short = mask.key_lengths is None and jnp.shape(queries)[-3] == jnp.shape(keys)[-3]
        return Lengths(mask.query_lengths, mask.query_lengths) if is_short else mask

    gathered = lambda m: Segments(m.query_ids, whole(with_key_ids(m).key_ids, -1))
    changed = {"mask": change(change(options["mask"], Lengths, explicit), Segments, gathered)}
    if options["positions"] is not None:
        query_places, key_places = options["positions"]
        changed["positions"] = query_places, whole(key_places, -1)
    return attention(queries, whole(keys, -3), whole(values, -3), **options | changed)


def with_all_tokens(
    attention: Attention,
    mesh_axes: MeshAxes,
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    options: dict[str, Any],
) -> Any:
    """Attention of all tokens in some of the heads, which are exchanged before and after."""
    queries, keys, values, options = vary((queries, keys, values, options))
    size, num_queries = num_devices(mesh_axes), jnp.shape(queries)[-3]
    heads, key_heads = jnp.shape(queries)[-2], jnp.shape(keys)[-2]
    if heads % size or key_heads % size:
        raise ValueError(
            f'`context="ulysses"` gives each of {size} devices as many heads, got {heads} heads'
            f" of `queries` and {key_heads} of `keys`."
        )
    first = lax.axis_index(mesh_axes) * (heads // size)
    whole = functools.partial(_gather_parts, mesh_axes)

    def exchange(x: ArrayLike, split: int, joined: int) -> Array:
        x = jnp.asarray(x)
        axes = x.ndim + split, x.ndim + joined
        return lax.all_to_all(x, mesh_axes, *axes, tiled=True)

    def own_heads(x: ArrayLike, axis: int) -> Array:
        x = jnp.asarray(x)
        if x.ndim < -axis or x.shape[axis] != heads:
            return x
        return lax.dynamic_slice_in_dim(x, first, heads // size, x.ndim + axis)

    *batch, _, _, _ = jnp.shape(queries)
    grid = grid_of(tuple(batch), heads, num_queries, size * jnp.shape(keys)[-3])

    def of_own_heads(x: ArrayLike, name: str) -> Array:
        """A bias or a mask for all queries, from one for those of this device."""
        x = per_score(jnp.asarray(x), grid, name)
        x = x.reshape(*(batch if x.shape[0] > 1 else [1] * len(batch)), *x.shape[1:])
        if x.shape[-2] != num_queries:
            return own_heads(x, -3)
        return exchange(x, -3, -2) if x.shape[-3] == heads else whole(x, -2)

    def whole_ids(mask: Segments) -> Segments:
        mask = with_key_ids(mask)
        return Segments(whole(mask.query_ids, -1), whole(mask.key_ids, -1))

    def at_own_heads(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args: function(*args[:-1], args[-1]._replace(head=args[-1].head + first))

    mask = change(options["mask"], Segments, whole_ids)
    mask = change(mask, Dense, lambda m: Dense(of_own_heads(m.keep, "mask")))
    mask = change(mask, Function, lambda m: Function(at_own_heads(m.keep)))
    changed = {"mask": mask}
    if options["positions"] is not None:
        changed["positions"] = tuple(whole(x, -1) for x in options["positions"])
    if options["bias"] is not None:
        changed["bias"] = of_own_heads(options["bias"], "bias")
    if options["score"] is not None:
        changed["score"] = at_own_heads(options["score"])
    for name in ("scale", "soft_cap", "sink"):
        if options[name] is not None:
            changed[name] = own_heads(options[name], -1)
    arrays = (exchange(x, -2, -3) for x in (queries, keys, values))
    found = attention(*arrays, **options | changed)
    if options["return_lse"]:
        return exchange(found[0], -3, -2), exchange(found[1], -2, -1)
    return exchange(found, -3, -2)


def _gather_parts(mesh_axes: MeshAxes, x: ArrayLike, axis: int) -> Array:
    """The parts of all devices along an axis, which is counted from the last."""
    x = jnp.asarray(x)
    return lax.all_gather(x, mesh_axes, axis=x.ndim + axis, tiled=True)
