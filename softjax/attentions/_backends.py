"""The backends of attention: which of them serves a call, and why the others do not.

A call that names no backend takes the first that keeps every promise of `attention`: its
values, its derivatives in all modes, and its memory.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from softjax._inputs import check_int

DENSE_KEYS = 128  # up to so many keys the dense form is taken for any queries
LEAST_KEYS = 32  # keys of a block, at least


class Limits(NamedTuple):
    """The sizes that decide between the forms."""

    dense_scores: int  # up to so many scores the dense form is taken
    dense_scores_per_head: int  # and so many of one head of one sequence
    tile_scores: int  # of a tile, about
    most_queries: int  # of a block


# Up to these sizes the dense form takes no more time than the streamed one, and compiles in a
# third of the time.
ON_CPU = Limits(2**23, 2**19, 2**19, 512)
# Each tile costs an accelerator several launches. 2^27 scores take 0.5 GiB.
ON_ACCELERATOR = Limits(2**27, 2**27, 2**24, 4096)


def limits() -> Limits:
    """The limits for the default device.

    A choice at run time between two programs would double each of them. So a program that is
    exported for another platform keeps the limits of the device on which it was traced.
    """
    return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR


class Call(NamedTuple):
    """What decides which backend serves a call."""

    heads: int  # of all sequences together
    num_queries: int
    num_keys: int
    block_size: tuple[int, int] | None  # the most queries and keys of a tile
    why_no_kernel: str = ""  # the reason why a vendor's kernel cannot serve the call
    num_hops: int = 0  # of keys around a ring, each of them so many; 0 without a ring


class Backend(NamedTuple):
    """A way to compute attention. A reason is a clause that follows "because", or empty."""

    name: str
    why_unable: Callable[[Call], str]  # the reason why it cannot serve a call
    why_not_default: Callable[[Call], str]  # the reason why it must be named
    blocks: Callable[[Call], tuple[int, int]] | None  # the queries and keys of a tile


def call_of(
    queries_shape: tuple[int, ...],
    num_keys: int,
    block_size: int | tuple[int, int] | None,
    num_hops: int = 0,
) -> Call:
    """The call with queries of the shape `[..., T, N, H]`; sizes of 0 count as 1."""
    *batch, num_queries, heads, _ = queries_shape
    if block_size is not None:
        pair = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        if len(pair) != 2:
            raise ValueError(f"`block_size` must be an int or a pair of them, got {pair}.")
        most_queries, most_keys = (check_int(n, name="block_size", least=1) for n in pair)
        block_size = most_queries, most_keys
    heads = max(1, math.prod(batch) * heads)
    return Call(heads, max(1, num_queries), max(1, num_keys), block_size, num_hops=num_hops)


def choose(call: Call, implementation: str | None) -> Backend:
    """The backend of a checked name, or for None the first that keeps every promise."""
    if implementation is None:
        return next(b for b in BACKENDS if not (b.why_unable(call) or b.why_not_default(call)))
    backend = next(b for b in BACKENDS if b.name == implementation)
    if reason := backend.why_unable(call):
        raise ValueError(
            f'`implementation="{implementation}"` cannot serve this call, because {reason}.'
        )
    return backend


def check_name(implementation: str | None) -> None:
    """Raises an error for a name that no backend has."""
    if implementation not in (None, *(b.name for b in BACKENDS)):
        raise ValueError(
            '`implementation` must be None, "cudnn", "dense" or "streamed", got'
            f" {implementation!r}."
        )


def _none(call: Call) -> str:
    del call
    return ""


def _has_no_kernel(call: Call) -> str:
    return call.why_no_kernel


def _is_rounded(call: Call) -> str:
    del call
    return (
        "it rounds the weights to half precision, and JAX before 0.12 cannot batch its gradient"
    )


def _has_parts(call: Call) -> str:
    if call.num_hops:
        return "the keys of a ring come one device after another"
    if call.block_size is None:
        return ""
    return "`block_size` has no meaning where all scores are formed at once"


def _is_large(call: Call) -> str:
    scores = call.num_queries * call.num_keys
    most = min(limits().dense_scores_per_head, limits().dense_scores // call.heads)
    if scores <= most or call.num_keys <= DENSE_KEYS:
        return ""
    return (
        f"it keeps all scores, and each head of each sequence has {scores} of them, more than"
        f" {most}"
    )


def _one_tile(call: Call) -> tuple[int, int]:
    return call.num_queries, call.num_keys


def _tiles(call: Call) -> tuple[int, int]:
    heads, num_queries, num_keys, block_size, *_ = call
    if block_size is not None:
        return min(block_size[0], num_queries), min(block_size[1], num_keys)
    # A tile has twice as many queries as keys, because each block of queries costs a pass over
    # all keys.
    _, _, tile_scores, most_queries = limits()
    side = 1 << int(math.log2(max(1, tile_scores / (2 * heads))) / 2)
    key_block = max(LEAST_KEYS, min(most_queries // 2, side))
    query_block = _even(num_queries, 2 * key_block)
    key_block = _even(num_keys, max(key_block, 2 * key_block**2 // query_block))
    if (query_block, key_block) == (num_queries, num_keys):
        key_block = -(-num_keys // 2)  # The streamed form has at least two tiles.
    return query_block, key_block


def _even(size: int, block: int) -> int:
    """A block of about that size that divides the tokens with little padding."""
    count = -(-size // block)
    return -(-size // count)


BACKENDS = (
    Backend("cudnn", _has_no_kernel, _is_rounded, None),
    Backend("dense", _has_parts, _is_large, _one_tile),
    Backend("streamed", _none, _none, _tiles),
)
