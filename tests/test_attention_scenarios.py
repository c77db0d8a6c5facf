"""Attention as others test theirs: JAX's own scenarios, and masks and scores of FlexAttention.

Each is compared with its definition in float64, in values and in all gradients; the errors are
measured against those of the definition in the narrow dtype itself. After `nn_test.py` of JAX
and `test_flex_attention.py` of PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from tests.helpers import eps

B, T, S, N, K, H = 2, 21, 27, 4, 2, 8


def draw(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s).astype(jnp.dtype(dtype))) for s in shapes]


class At:
    """The index of all scores at once."""

    def __init__(self, shape):
        batch, heads, num_queries, num_keys = shape
        self.batch = jnp.arange(batch, dtype="int32").reshape(-1, 1, 1, 1)
        self.head = jnp.arange(heads, dtype="int32").reshape(1, -1, 1, 1)
        self.query = jnp.arange(num_queries, dtype="int32").reshape(1, 1, -1, 1)
        self.key = jnp.arange(num_keys, dtype="int32").reshape(1, 1, 1, -1)


def definition(keep, score, queries, keys, values, captured, bias=None):
    """Plain, in the dtype of the arguments; a query that sees nothing gets 0."""
    dtype = queries.dtype
    keys, values = (jnp.repeat(x, queries.shape[2] // x.shape[2], 2) for x in (keys, values))
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) / jnp.sqrt(
        jnp.asarray(keys.shape[-1], dtype)
    )
    if bias is not None:
        scores += jnp.broadcast_to(bias, scores.shape)
    at = At(scores.shape)
    if score is not None:
        scores = score(captured, scores, at).astype(dtype)
    keep = jnp.broadcast_to(True if keep is None else keep(at), scores.shape)
    keep &= scores != -jnp.inf
    scores = jnp.where(keep, scores, -1e4)
    weights = jnp.where(keep, jnp.exp(scores - jnp.max(scores, -1, keepdims=True)), 0)
    total = jnp.sum(weights, -1, keepdims=True)
    return jnp.einsum("bnts,bsnw->btnw", weights / jnp.where(total == 0, 1, total), values)


def with_gradients(call, args, bar):
    out, pullback = jax.vjp(call, *args)
    return jax.tree.leaves((out, pullback(bar.astype(out.dtype))))


def check(ours, theirs, args, *, factor, draws=4):
    """The errors of ours, at most so many times those of theirs in the same dtype.

    The derivative of a number has one error only, which can be small by luck. So the largest
    errors of several cotangents are compared.
    """
    dtype = args[0].dtype
    bars = draw(dtype, *[jax.eval_shape(ours, *args).shape] * draws, seed=1)
    wide = jax.tree.map(lambda x: x.astype("float64"), args)
    mine = jax.jit(functools.partial(with_gradients, ours))
    errors = []
    for bar in bars:
        found, naive = mine(args, bar), with_gradients(theirs, args, bar)
        exact = with_gradients(theirs, wide, bar.astype("float64"))
        assert all(x.dtype == dtype for x in found)
        error = lambda x, truth: float(jnp.abs(x.astype("float64") - truth).max())
        size = [float(jnp.abs(truth).max()) for truth in exact]
        errors.append([[*map(error, found, exact)], [*map(error, naive, exact)], size])
    for largest, other, size in np.max(errors, 0).T:
        assert size > 1e-3  # A flat point would prove nothing.
        assert largest <= factor * other + eps(dtype) * size, (largest, other)


# FlexAttention: masks and scores as functions of places.

IDS = jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 4, (B, S)), -1))
NO_SCORE = ((), None)
EVERYWHERE = (None, None)


def gap(at, dtype="int32"):
    return (at.query - at.key).astype(dtype)


def by_head(x):
    return x[None, :, None, None]


def grid_neighbours(at, width=5, reach=1):
    """Tokens of a picture, row by row, and what lies around them."""
    row, column = jnp.divmod(at.query, width)
    key_row, key_column = jnp.divmod(at.key, width)
    return (jnp.abs(row - key_row) <= reach) & (jnp.abs(column - key_column) <= reach)


# A mask of ours, and the definition of what it keeps.
MASKS = {
    "causal": (masks.Causal(), lambda at: at.key <= at.query),
    "causal, last aligned": (masks.Causal(S - T), lambda at: at.key <= at.query + S - T),
    "sliding window": (masks.Window(4), lambda at: (gap(at) >= 0) & (gap(at) <= 4)),
    "prefix": (
        masks.Causal() | masks.Prefix(jnp.array([5, 9], "int32")),
        lambda at: (gap(at) >= 0) | (at.key < jnp.array([5, 9], "int32")[at.batch]),
    ),
    "documents": (
        masks.Segments(IDS[:, :T], IDS) & masks.Causal(),
        lambda at: (IDS[at.batch, at.query] == IDS[at.batch, at.key]) & (gap(at) >= 0),
    ),
    "padding": (
        masks.Lengths(jnp.array([T, 8], "int32"), jnp.array([10, S], "int32")),
        lambda at: (
            (at.query < jnp.array([T, 8], "int32")[at.batch])
            & (at.key < jnp.array([10, S], "int32")[at.batch])
        ),
    ),
    "not the others' past": (~masks.Causal(), lambda at: at.key > at.query),
    **{
        name: (masks.Function(keep), keep)
        for name, keep in {
            "neighbours in a picture": grid_neighbours,
            "checkerboard": lambda at: (at.query + at.key) % 2 == 0,
            "dilated window": lambda at: (gap(at) >= 0) & (gap(at) <= 12) & (gap(at) % 3 == 0),
            "a window a head": lambda at: jnp.abs(gap(at)) <= 2 * at.head + 1,
            "global tokens": lambda at: (jnp.abs(gap(at)) <= 2) | (at.key < 2) | (at.query < 2),
            "blocks": lambda at: at.query // 6 == at.key // 6,
        }.items()
    },
}


# Arrays that are captured, by their shapes, and the function of (them, scores, index).
SCORES = {
    # With a steep slope, the error is that of rounding the scores, which the derivative forms
    # again and XLA does not always round alike.
    "relative": ([()], lambda p, z, at: z + p[0] / 8 * gap(at, z.dtype)),
    "alibi": ([(N,)], lambda p, z, at: z - by_head(p[0] ** 2) * jnp.abs(gap(at, z.dtype))),
    "table of distances": (
        [(N, 9)],
        lambda p, z, at: z + p[0][at.head, jnp.clip(gap(at), -4, 4) + 4],
    ),
    "soft cap": ([()], lambda p, z, at: (1 + p[0] ** 2) * jnp.tanh(z / (1 + p[0] ** 2))),
    "scale a head": ([(N,)], lambda p, z, at: z * by_head(p[0])),
    "squares": ([()], lambda p, z, at: p[0] * z**2),
    "rows of a bias": (
        [(N, T)],
        # (A number of a query alone would change nothing.)
        lambda p, z, at: (
            z + p[0][at.head, jnp.minimum(at.query, T - 1)] * (at.key % 2).astype(z.dtype)
        ),
    ),
    "columns of a bias": (
        [(B, S)],
        lambda p, z, at: z + p[0][at.batch, jnp.minimum(at.key, S - 1)],
    ),
    "waves": ([(N,)], lambda p, z, at: z + jnp.cos(by_head(p[0]) * gap(at, z.dtype))),
    "every other head": ([()], lambda p, z, at: jnp.where(at.head % 2 == 0, z, p[0] * z)),
    "every other key": ([()], lambda p, z, at: jnp.where(gap(at) % 2 == 0, z, p[0] * z)),
    "logarithm of the distance": (
        [()],
        lambda p, z, at: z - p[0] * jnp.log1p(jnp.abs(gap(at, z.dtype))),
    ),
    "causal by -inf": ([()], lambda p, z, at: jnp.where(gap(at) >= 0, p[0] * z, -jnp.inf)),
    "documents by -inf": (
        [(N,)],
        lambda p, z, at: jnp.where(
            IDS[at.batch, jnp.minimum(at.query, S - 1)]
            == IDS[at.batch, jnp.minimum(at.key, S - 1)],
            by_head(p[0]) * z,
            -jnp.inf,
        ),
    ),
}


def flex(mask, keep, shapes, score):
    args = (
        *draw("float32", (B, T, N, H), (B, S, K, H), (B, S, K, H)),
        tuple(draw("float32", *shapes, seed=3)),
    )

    def ours(queries, keys, values, captured):
        bound = None if score is None else functools.partial(score, captured)
        return sj.attention(queries, keys, values, mask=mask, score=bound, block_size=8)

    check(ours, functools.partial(definition, keep, score), args, factor=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    flex(*MASKS[name], *NO_SCORE)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    flex(*EVERYWHERE, *SCORES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "score"),
    [("documents", "alibi"), ("sliding window", "soft cap"), ("prefix", "table of distances")],
)
def test_masks_and_scores_together(mask, score):
    flex(*MASKS[mask], *SCORES[score])


# JAX: bfloat16 and float16, grouped heads, vmap, masks put together, gradients of a bias.

DENSE, STREAMED = {"implementation": "dense"}, {"block_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "groups", "over_batch", "way"),
    [
        *(("bfloat16", g, b, STREAMED) for g in (1, 2, 4) for b in (False, True)),
        ("float16", 2, False, STREAMED),
        ("bfloat16", 2, False, DENSE),
    ],
)
def test_shared_heads(dtype, groups, over_batch, way):
    keys = (B, 32, N // groups, 16)
    args = tuple(draw(dtype, (B, 32, N, 16), keys, keys))
    ours = functools.partial(sj.attention, **way)
    if over_batch:
        ours = jax.vmap(ours)
    check(ours, lambda *a: definition(None, None, *a, ()), args, factor=1)


LENGTHS = {
    "query_lengths": jnp.array([16, 8], "int32"),
    "key_lengths": jnp.array([8, 16], "int32"),
}
TRIANGLE = jnp.asarray(np.tri(32, dtype=bool))
PARTS = {
    "causal": (masks.Causal(), lambda at: at.key <= at.query),
    "padding": (
        masks.Lengths(**LENGTHS),
        lambda at: (
            (at.query < LENGTHS["query_lengths"][at.batch])
            & (at.key < LENGTHS["key_lengths"][at.batch])
        ),
    ),
    "custom": (masks.Dense(TRIANGLE[None, None]), lambda at: TRIANGLE[at.query, at.key]),
    "sliding window": (masks.Window(3, 2), lambda at: (gap(at) <= 3) & (gap(at) >= -2)),
    "left window": (masks.Window(3, 0), lambda at: (gap(at) <= 3) & (gap(at) >= 0)),
}
MODES = [
    ("bias",),
    ("causal",),
    ("padding",),
    ("custom",),
    ("left window",),
    ("causal", "padding"),
    ("custom", "padding"),
    ("bias", "causal"),
    ("causal", "sliding window"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "way"), [*((m, STREAMED) for m in MODES), (("causal", "padding"), DENSE)]
)
def test_masks_put_together(mode, way):
    parts = [PARTS[name] for name in mode if name != "bias"]
    mask = functools.reduce(lambda a, b: a & b, [m for m, _ in parts]) if parts else None
    keep = lambda at: functools.reduce(lambda a, b: a & b, [k(at) for _, k in parts], True)
    tokens = (B, 32, N, 16)
    args = draw("bfloat16", tokens, tokens, tokens, (1, N, 32, 32))
    args = tuple(args if "bias" in mode else args[:3])

    def ours(queries, keys, values, bias=None):
        return sj.attention(queries, keys, values, mask=mask, bias=bias, **way)

    def theirs(queries, keys, values, bias=None):
        return definition(keep, None, queries, keys, values, (), bias)

    check(ours, theirs, args, factor=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", [DENSE, STREAMED])
@pytest.mark.parametrize(("batch", "over_batch"), [(1, False), (5, True)])
def test_gradients_of_a_bias_a_sequence(batch, over_batch, way):
    """One array is queries, keys and values at once."""
    args = tuple(draw("bfloat16", (batch, 32, N, 16), (batch, N, 32, 32)))
    seen = jnp.ones((1, 1, 32), bool)
    ours = lambda x, bias: sj.attention(x, x, x, bias=bias, mask=seen, **way)
    if over_batch:
        ours = jax.vmap(ours)
    check(ours, lambda x, bias: definition(None, None, x, x, x, (), bias), args, factor=1)
