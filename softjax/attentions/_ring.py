"""Softmax attention in a ring of devices, each of which holds a part of the sequence.

Queries stay, and keys travel. For the value, they come from the neighbour, while each query
keeps the online softmax state of what it has seen. The rule for the derivative is that of
`_softmax_tiles`, a sum over the keys whose terms are linear in the tangents. It fetches the
keys of each source from where they lie, not from the neighbour, so that a device remembers its
own part alone. JAX transposes the rule, which sends cotangents back to their keys, and
differentiates it again.

Each hop forms the kinds of its tiles from the positions that have arrived, so that tiles which
the mask empties cost no work.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _online
from softjax._inputs import computing_dtype
from softjax._mesh import num_devices, vary
from softjax._online import OnlineState
from softjax.attentions._operands import (
    Constants,
    DiffOperands,
    in_computing_dtype,
    moving,
    tile_kinds,
)
from softjax.attentions._softmax_tiles import (
    Result,
    Tangents,
    level_and_share,
    merge_tile,
    push_tile,
    results,
    tangents_of,
)
from softjax.attentions._sources import Travelling, arrived, arrived_constants, travelling
from softjax.attentions._tile_loops import map_query_blocks, scan_key_blocks, sum_over_keys

MeshAxes = tuple[str, ...]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def ring_average(mesh_axes: MeshAxes, operands: DiffOperands, constants: Constants) -> Result:
    """`_softmax_tiles.average` over the keys of all devices along the axes."""
    grid, dtype = constants.grid, computing_dtype(operands.queries.dtype)
    rows = (grid.queries.num_blocks, grid.rows, grid.heads, grid.queries.block)
    state = vary(_online.init(rows, operands.values.shape[-1], dtype), operands, constants)
    held = travelling(operands, constants)

    def observe(state: OnlineState, held: Travelling, by: Any) -> OnlineState:
        source = _source(mesh_axes, by)
        return _observe_arrived(
            state, arrived(operands, held, source), arrived_constants(constants, held, source)
        )

    def hop(carry: tuple[OnlineState, Travelling], by: Array) -> tuple[Any, None]:
        state, held = carry
        # Neither needs the other, so that the keys can travel meanwhile.
        return (observe(state, held, by), _shift(mesh_axes, 1, held)), None

    last = num_devices(mesh_axes) - 1
    (state, held), _ = lax.scan(hop, (state, held), jnp.arange(last, dtype=jnp.int32))
    return results(observe(state, held, last))


def _ring_average_jvp(mesh_axes: MeshAxes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    operands, constants = primals
    # Tangents of half precision are widened before they travel, because the cotangents that
    # the devices send back are added up.
    dots = in_computing_dtype(moving(tangents[0]))
    result = ring_average(mesh_axes, operands, constants)
    level, share = level_and_share(result)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def term(by: Array, operands: DiffOperands, dots: DiffOperands, level: Array) -> Tangents:
        source = _source(mesh_axes, by)
        leaving = travelling(operands, constants), Travelling(dots.keys, dots.values)
        held, held_dot = _shift(mesh_axes, by, leaving)
        return _push(
            arrived(operands, held, source),
            arrived(dots, held_dot, source),
            arrived_constants(constants, held, source),
            level,
        )

    def hop(total: Tangents, by: Array) -> tuple[Tangents, None]:
        return jax.tree.map(jnp.add, total, term(by, operands, dots, level)), None

    start = vary(Tangents(jnp.zeros_like(result.lse), jnp.zeros_like(result.out)), primals)
    hops = jnp.arange(num_devices(mesh_axes), dtype=jnp.int32)
    (mean, sums), _ = lax.scan(hop, start, hops)
    return result, tangents_of(result, mean, share[..., None] * sums)


ring_average.defjvp(_ring_average_jvp, symbolic_zeros=True)


def _source(mesh_axes: MeshAxes, by: Any) -> Array:
    """The device whose keys have travelled so far."""
    return (lax.axis_index(mesh_axes) - by) % num_devices(mesh_axes)


def _shift(mesh_axes: MeshAxes, by: Any, tree: Any) -> Any:
    """What the device `by` places behind in the ring holds."""
    # `ppermute` counts devices along the axes in the order of the mesh, and `axis_index` in
    # that of the names.
    sizes = jax.sharding.get_abstract_mesh().shape
    in_order = tuple(name for name in sizes if name in mesh_axes)
    size = num_devices(mesh_axes)
    table = np.arange(size).reshape([sizes[name] for name in in_order])
    numbers = table.transpose([in_order.index(name) for name in mesh_axes]).ravel().tolist()

    def move(by: int, tree: Any) -> Any:
        if by == 0:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        pairs = [(numbers[device], numbers[(device + by) % size]) for device in range(size)]
        return jax.tree.unflatten(structure, lax.ppermute(leaves, in_order, pairs))

    if isinstance(by, int):
        return move(by, tree)
    return lax.switch(by, [functools.partial(move, i) for i in range(size)], tree)


def _observe_arrived(
    state: OnlineState, operands: DiffOperands, constants: Constants
) -> OnlineState:
    """The states of all queries after those keys that have arrived."""
    grid = constants.grid
    visit = functools.partial(merge_tile, constants)

    def block(i: Any, parts: Any, kinds: Array, state: OnlineState) -> OnlineState:
        return OnlineState(*scan_key_blocks(grid, i, visit, state, kinds, *parts))

    rows = tile_kinds(constants), state
    return OnlineState(*map_query_blocks(grid, block, (operands,), *rows))


def _push(
    operands: DiffOperands, dots: DiffOperands, constants: Constants, level: Array
) -> Tangents:
    """The terms of those keys that have arrived."""
    grid = constants.grid
    term = functools.partial(push_tile, constants)

    def block(i: Any, parts: Any, kinds: Array, level: Array) -> Tangents:
        zero = jnp.zeros_like(level)
        sums = jnp.zeros((*level.shape, operands.values.shape[-1]), level.dtype)
        start = vary(Tangents(zero, sums), level)
        return Tangents(*sum_over_keys(grid, i, term, start, kinds, parts, level))

    parts, rows = (operands, dots), (tile_kinds(constants), level)
    return Tangents(*map_query_blocks(grid, block, parts, *rows, remember=False))
