"""What travels with keys around a ring of devices, and what each device keeps for them.

The positions of the keys, and the ids of their segments, travel with them. A bias or a mask
that is an array stays: on each device it covers the queries there and the keys of all devices,
and each hop takes the part of the device that the keys come from, which is their source.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax import masks
from softjax._inputs import computing_dtype
from softjax._mesh import replicated_axes, vary
from softjax._tiles import Grid
from softjax.attentions._operands import Constants, DiffOperands
from softjax.masks import Dense, Mask, Segments


class Travelling(NamedTuple):
    """All that travels with the keys of one device."""

    keys: Any
    values: Any
    positions: Array | None = None
    ids: tuple[Array, ...] = ()  # of the keys, in each `Segments`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BySource(Mask):
    """A bool array over the keys of all devices, which is bound as one array per source."""

    keep: Any
    num_devices: int = dataclasses.field(metadata={"static": True})

    def bind(self, grid: Grid) -> "BySource":
        keep = Dense(self.keep).bind(over_all_keys(grid, self.num_devices)).keep
        return dataclasses.replace(self, keep=by_source(keep, self.num_devices))


def check_kinds(mask: Mask | None) -> None:
    """Refuses a user's own kind of mask, because arrays of it may belong to keys."""
    for part in users_parts(mask):
        raise ValueError(
            "`mask` must be made of the kinds in `softjax.masks` with `axis_name`, because"
            f" nothing tells which arrays of a {type(part).__name__} belong to keys."
        )


def users_parts(mask: Mask | None) -> list[Mask]:
    """The parts of a mask whose kinds are a user's own."""
    is_own = lambda part: isinstance(part, Mask) and type(part).__module__ != masks.__name__
    return [part for part in jax.tree.leaves(mask, is_leaf=is_own) if is_own(part)]


def of_source(mask: Mask | None, num_devices: int) -> Mask | None:
    """A mask that is not bound yet, whose arrays over all keys become one per source."""
    mask = change(mask, Segments, with_key_ids)
    return change(mask, Dense, lambda m: BySource(m.keep, num_devices))


def with_key_ids(mask: Segments) -> Segments:
    """The same mask, where the ids of keys are given."""
    return mask if mask.key_ids is not None else Segments(mask.query_ids, mask.query_ids)


def change(mask: Any, kind: type[Mask], by: Callable[[Any], Mask]) -> Any:
    """The mask, with `by` applied to its parts of one kind."""
    is_kind = lambda part: isinstance(part, kind)
    return jax.tree.map(lambda x: by(x) if is_kind(x) else x, mask, is_leaf=is_kind)


def over_all_keys(grid: Grid, num_devices: int) -> Grid:
    """The grid of the queries of one device and the keys of all."""
    size = grid.keys.size * num_devices
    return dataclasses.replace(grid, keys=dataclasses.replace(grid.keys, size=size))


def by_source(x: Array, num_devices: int) -> Array:
    """Scores `[..., keys of all devices or 1]` as `[devices or 1, ..., keys or 1]`."""
    num_sources = num_devices if x.shape[-1] > 1 else 1
    return jnp.moveaxis(x.reshape(*x.shape[:-1], num_sources, -1), -2, 0)


def on_each_device(operands: DiffOperands) -> DiffOperands:
    """The operands, as varying as the queries, so that no loop sums cotangents over devices.

    A function that captures arrays was traced with them, and expects them as they are.
    """
    bias = operands.bias
    if bias is not None and replicated_axes(operands.queries, bias):
        # Cotangents that are added up over devices would be rounded in half precision.
        bias = bias.astype(computing_dtype(bias.dtype))
    varying = vary(operands._replace(bias=bias, captured=None))
    return varying._replace(captured=operands.captured)


def travelling(operands: DiffOperands, constants: Constants) -> Travelling:
    """The keys of this device, with all that travels with them."""
    is_ids = lambda part: isinstance(part, Segments)
    parts = filter(is_ids, jax.tree.leaves(constants.mask, is_leaf=is_ids))
    ids = tuple(part.key_ids for part in parts)
    positions = constants.grid.keys.positions
    return vary(Travelling(operands.keys, operands.values, positions, ids))


def arrived(operands: DiffOperands, held: Travelling, source: Array) -> DiffOperands:
    """The operands with the keys that have arrived, and with the bias of their source."""
    bias = None if operands.bias is None else _part(operands.bias, source)
    return operands._replace(keys=held.keys, values=held.values, bias=bias)


def arrived_constants(constants: Constants, held: Travelling, source: Array) -> Constants:
    """The constants for the keys that have arrived."""
    grid, ids = constants.grid, iter(held.ids)
    keys = dataclasses.replace(grid.keys, positions=held.positions)
    mask = change(constants.mask, BySource, lambda m: Dense(_part(m.keep, source)))
    mask = change(mask, Segments, lambda m: Segments(m.query_ids, next(ids)))
    return dataclasses.replace(constants, grid=dataclasses.replace(grid, keys=keys), mask=mask)


def _part(x: Array, source: Array) -> Array:
    number = source if x.shape[0] > 1 else 0
    return lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
