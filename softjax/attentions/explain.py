"""Which backend serves a call of attention, and why."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import masks
from softjax._mesh import AxisName, names_of, num_devices
from softjax.attentions._backends import BACKENDS, Backend, Call, call_of, check_name, choose
from softjax.attentions._contexts import layout_of_tokens
from softjax.attentions._cudnn import why_no_kernel
from softjax.attentions.attend import attention

__all__ = ["explain_attention"]


def explain_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    bias: ArrayLike | None = None,
    score: Callable[..., Array] | None = None,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    cap_bias: bool = False,
    sink: ArrayLike | None = None,
    normalizer: str | tuple[Callable[[Array], Array], ArrayLike] = "softmax",
    positions: ArrayLike | tuple[ArrayLike | None, ArrayLike | None] | None = None,
    dropout_rate: ArrayLike = 0.0,
    dropout_key: Array | None = None,
    block_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    context: str = "ring",
    axis_name: AxisName = None,
) -> str:
    r"""Tells which backend `attention` takes for a call, and why it does not take the others.

    The backends differ in how many of the scores :math:`z_{ts}` they keep at once.

    Args:
        queries: as in `attention`, like all that follows; nothing is computed.
        keys: as in `attention`.
        values: as in `attention`.
        mask: as in `attention`.
        bias: as in `attention`.
        score: as in `attention`.
        scale: as in `attention`.
        soft_cap: as in `attention`.
        cap_bias: as in `attention`.
        sink: as in `attention`.
        normalizer: as in `attention`.
        positions: as in `attention`.
        dropout_rate: as in `attention`.
        dropout_key: as in `attention`.
        block_size: as in `attention`.
        implementation: as in `attention`; one that cannot serve the call raises no error here.
        return_lse: as in `attention`.
        context: as in `attention`.
        axis_name: as in `attention`, inside of `jax.shard_map`.

    Returns:
        One line for each backend, in the order in which they are tried: its name, the tiles in
        which it forms the scores of a head on a device, and either "taken" or the reason why it
        is not. In a ring, so many tiles are formed in each hop of the keys.

    Raises:
        TypeError: as `attention`.
        ValueError: as `attention`, but for an implementation that cannot serve the call.

    Example:
        >>> tokens = jnp.zeros((4096, 1, 64))
        >>> print(explain_attention(tokens, tokens, tokens))
        cudnn: one kernel; cannot serve, because the default device is no GPU.
        dense: 1 tile of 4096 x 4096; not taken, because it keeps all scores, and each head of
        each sequence has 16777216 of them, more than 524288.
        streamed: 128 tiles of 512 x 256; taken.

    Note:
        A backend that is not taken by default can be named, unless its line says that it cannot
        serve.
    """
    given = dict(locals())
    check_name(implementation)
    # A bad call raises its errors here. Any implementation may be explained.
    jax.eval_shape(lambda: attention(**given | {"implementation": None}))
    *batch, num_queries, heads, width = jnp.shape(queries)
    num_keys, mesh_axes, num_hops = jnp.shape(keys)[-3], names_of(axis_name), 0
    layout = None if mesh_axes else layout_of_tokens(given)
    if layout is not None and layout.tokens:
        num_hops = num_devices(layout.tokens, jax.typeof(queries).sharding.mesh)
        num_queries, num_keys = num_queries // num_hops, num_keys // num_hops
    elif mesh_axes and context == "ring":
        num_hops = num_devices(mesh_axes)
    elif mesh_axes:
        num_keys *= num_devices(mesh_axes)
        if context == "ulysses":
            num_queries *= num_devices(mesh_axes)
            heads //= num_devices(mesh_axes)
    call = call_of((*batch, num_queries, heads, width), num_keys, block_size, num_hops)
    call = call._replace(why_no_kernel=why_no_kernel(**given | {"mask": masks.as_mask(mask)}))
    is_unable = any(b.name == implementation and b.why_unable(call) for b in BACKENDS)
    taken = None if is_unable else choose(call, implementation)
    return "\n".join(_line(backend, call, taken) for backend in BACKENDS)


def _line(backend: Backend, call: Call, taken: Backend | None) -> str:
    line = f"{backend.name}: {_describe_tiles(backend, call)}; "
    if backend is taken:
        return f"{line}taken."
    if reason := backend.why_unable(call):
        return f"{line}cannot serve, because {reason}."
    reason = backend.why_not_default(call)
    return line + (f"not taken, because {reason}." if reason else "not taken.")


def _describe_tiles(backend: Backend, call: Call) -> str:
    if backend.blocks is None:
        return "one kernel"
    query_block, key_block = backend.blocks(call)
    num_tiles = -(-call.num_queries // query_block) * -(-call.num_keys // key_block)
    plural = "" if num_tiles == 1 else "s"
    hops = f"{call.num_hops} hop{'s' * (call.num_hops > 1)} of " if call.num_hops else ""
    return f"{hops}{num_tiles} tile{plural} of {query_block} x {key_block}"
