"""Every function inside of `shard_map`, with its default checks: on each device, its part."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import softjax as sj
from softjax import masks
from tests.catalogue import CATALOGUE
from tests.helpers import assert_close, assert_same, eps
from tests.test_transforms import finite, stacked

ROUNDINGS = {"rtol": 64 * eps("float64"), "atol": 64 * eps("float64")}
_DEFAULT = {"sparsemax"}
every_entry = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, marks=[] if e.title in _DEFAULT else [pytest.mark.slow], id=e.title)
        for e in CATALOGUE
    ],
)


def mesh(**axes):
    return cpu_mesh(jax.sharding.AxisType.Auto, **axes)


def cpu_mesh(kind, **axes):
    devices = jax.devices("cpu")[: math.prod(axes.values())]
    kinds = (kind,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def results(call, num_floats, *args):
    """The value, and the derivative of one number made of it."""

    def total(*args):
        out = call(*args)
        return jnp.sum(jnp.sin(finite(out))), out

    grad = jax.value_and_grad(total, argnums=tuple(range(num_floats)), has_aux=True)
    (_, out), bars = jax.jit(grad)(*args)
    return out, *bars


@every_entry
def test_one_row_a_device(entry):
    """With every other argument in parts, and the rest on all devices alike."""
    lists, stacks = stacked(entry, 2)
    num_floats = len(entry.arguments()[0])
    places = range(len(stacks))
    args = [lists[0][i] if i % 2 else stacks[i] for i in places]
    sharded = jax.shard_map(
        lambda *parts: entry.call(*(x if i % 2 else x[0] for i, x in enumerate(parts)))[None],
        mesh=mesh(rows=2),
        in_specs=tuple(PartitionSpec() if i % 2 else PartitionSpec("rows") for i in places),
        out_specs=PartitionSpec("rows"),
    )
    whole = jax.vmap(entry.call, [None if i % 2 else 0 for i in places])
    got, wanted = (results(call, num_floats, *args) for call in (sharded, whole))
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, **ROUNDINGS)


WAYS = {
    "streamed": {"block_size": (4, 3)},
    "dense": {"implementation": "dense"},
    "sparsemax": {"block_size": (4, 3), "normalizer": "sparsemax"},
    "own map": {
        "block_size": (4, 3),
        "normalizer": (lambda x: jnp.maximum(x, 0) * jnp.ones(()), 1.0),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
@pytest.mark.parametrize("axes", [("rows", "heads"), ("rows", None), (None, "heads")], ids=str)
def test_sequences_and_heads_of_attention(way, axes):
    """Devices see other tiles than their neighbours, and share what the score captures."""
    rows, heads = axes
    rng = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(rng.standard_normal((2, 9, n, 3))) for n in (4, 2, 2))
    ids = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0] * 9])
    slopes, rate = jnp.asarray([0.1, 0.2, 0.3, 0.4]), jnp.asarray(0.5)

    def call(queries, keys, values, slopes, rate, ids):
        def score(scores, at):
            gap = jnp.abs(at.query - at.key).astype(scores.dtype)
            return scores - rate * slopes[None, :, None, None] * gap

        mask = masks.Segments(ids) & masks.Causal()
        return sj.attention(queries, keys, values, mask=mask, score=score, **way)

    tokens, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    sharded = jax.shard_map(
        call,
        mesh=mesh(rows=2, heads=2),
        in_specs=(tokens, tokens, tokens, PartitionSpec(heads), PartitionSpec(), by_row),
        out_specs=tokens,
    )
    args = (queries, keys, values, slopes, rate, ids)
    for got, wanted in zip(results(sharded, 5, *args), results(call, 5, *args), strict=True):
        assert_close(got, wanted, **ROUNDINGS)


@pytest.mark.slow
def test_products_of_hessians_of_attention():
    """Forward over reverse, of queries in parts and keys that all devices share."""
    rng = np.random.default_rng(1)
    queries, keys, dot = (jnp.asarray(rng.standard_normal((n, 7, 2, 3))) for n in (2, 1, 2))

    def call(queries, keys):
        return sj.attention(queries, keys, keys, mask=masks.Causal(), block_size=3)

    parts, shared = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(call, mesh=mesh(rows=2), in_specs=(parts, shared), out_specs=parts)
    whole = lambda q, k: call(q, jnp.broadcast_to(k, q.shape))

    def product(call):
        grad = jax.grad(lambda *args: jnp.sum(jnp.sin(call(*args))), argnums=(0, 1))
        return jax.jit(lambda *args: jax.jvp(grad, args, (dot, dot[:1]))[1])(queries, keys)

    for got, wanted in zip(product(sharded), product(whole), strict=True):
        assert_close(got, wanted, **ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [sj.sample, sj.gumbel_softmax], ids=["sample", "gumbel"])
def test_draws(draw):
    """One key a row gives on its device what it gives elsewhere."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40)))
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"temperature": 0.5} if draw is sj.gumbel_softmax else {}
    one = functools.partial(draw, **options)
    rows = PartitionSpec("rows")
    sharded = jax.shard_map(
        lambda keys, logits: one(keys[0], logits[0])[None],
        mesh=mesh(rows=2),
        in_specs=(rows, rows),
        out_specs=rows,
    )
    assert_same(jax.jit(sharded)(keys, logits), jax.vmap(one)(keys, logits))


@pytest.mark.slow
def test_cross_entropy_of_rows_that_are_spread_over_an_explicit_mesh():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 70000)))
    labels = jnp.arange(8)
    explicit = (jax.sharding.AxisType.Explicit,)
    with jax.sharding.set_mesh(jax.make_mesh((2,), ("rows",), axis_types=explicit)):
        spread = [jax.device_put(x, PartitionSpec("rows")) for x in (logits, labels)]
        for call in (sj.cross_entropy, sj.log_prob):
            got = jax.grad(lambda z, y, call=call: jnp.sum(call(z, y)))(*spread)
            assert jax.typeof(got).sharding.spec[0] == "rows"
            wanted = jax.grad(lambda z, y, call=call: jnp.sum(call(z, y)))(logits, labels)
            assert_close(got, wanted, **ROUNDINGS)
