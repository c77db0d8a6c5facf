"""Attention over a sequence that is spread over devices: a ring, and the two other contexts."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import softjax as sj
from experiments.benchmarks import ring
from softjax import masks
from tests.helpers import INF, NAN, assert_close, eps
from tests.test_axis_name import (
    Case,
    arguments,
    collectives_of,
    first_order,
    normal,
    second_order,
)
from tests.test_sharding import ROUNDINGS, mesh

TOKENS, HEADS, KEY_HEADS = 24, 4, 2
SEQUENCE = PartitionSpec(None, "ring")  # [batch, tokens, ...]
ROWS = PartitionSpec(None, "ring")  # of a bias or mask [heads, queries, keys]
ONE = PartitionSpec()
Q = (normal(0, 2, TOKENS, HEADS, 4), SEQUENCE)
K = (normal(1, 2, TOKENS, KEY_HEADS, 4), SEQUENCE)
V = (normal(2, 2, TOKENS, KEY_HEADS, 3), SEQUENCE)
BIAS = (normal(3, HEADS, TOKENS, TOKENS), ROWS)
BIAS[0][:, 5, ::3] = -INF
PER_HEAD = (0.5 * normal(4, HEADS), ONE)
NUMBER = (np.array(0.3), ONE)
KEEP = (normal(5, HEADS, TOKENS, TOKENS) > -0.5, ROWS)
IDS = (np.sort(np.random.default_rng(6).integers(-1, 4, (2, TOKENS))), SEQUENCE)
OFFSETS = (np.array([0, 2]), ONE)


def places(num_devices):
    return np.asarray(sj.zigzag_permutation(TOKENS, num_devices)), PartitionSpec("ring")


def attend(q, k, v, **options):
    """The averages, and the log-sum-exp beside them."""
    out, lse = sj.attention(q, k, v, return_lse=True, **options)
    return jnp.concatenate([out, jnp.where(lse == -INF, 0, lse)[..., None]], -1)


def every_option(q, k, v, bias, scale, sink, decay, keep, ids, at, offset, **on):
    """All at once."""
    seen = masks.Segments(ids) | masks.Dense(keep) & masks.Prefix(3)
    return attend(
        *(q, k, v),
        mask=masks.Causal(offset) & seen,
        bias=bias,
        score=lambda s, at: s - jnp.exp(decay) * jnp.abs(at.query - at.key).astype(s.dtype),
        scale=jnp.exp(scale),
        soft_cap=jnp.exp(sink) + 2,
        sink=sink,
        positions=at,
        **on,
    )


CASES = {
    "plain": Case(
        lambda q, k, v, at, **on: attend(q, k, v, positions=at, **on),
        (Q, K, V),
        (places(2),),
        out=SEQUENCE,
    ),
    "causal": Case(functools.partial(attend, mask=masks.Causal()), (Q, K, V), out=SEQUENCE),
    "every option": Case(
        every_option,
        (Q, K, V, BIAS, PER_HEAD, PER_HEAD, NUMBER),
        (KEEP, IDS, places(3), OFFSETS),
        out=SEQUENCE,
    ),
    "window": Case(
        lambda q, k, v, b, at, **on: attend(
            q, k, v, mask=masks.Window(4) & masks.Lengths(20), bias=b, positions=at, **on
        ),
        (Q, K, V, (BIAS[0][:1, :, :1], ROWS)),
        (places(2),),
        out=SEQUENCE,
    ),
    "function": Case(
        lambda q, k, v, b, **on: attend(
            *(q, k, v),
            mask=masks.Function(lambda at: (at.query + at.head) % 3 != at.key % 3),
            bias=b,
            cap_bias=True,
            soft_cap=5.0,
            **on,
        ),
        (Q, K, V, (BIAS[0][0, :1], ONE)),
        out=SEQUENCE,
    ),
    "segments of keys": Case(
        lambda q, k, v, ids, others, **on: attend(
            q, k, v, mask=~masks.Segments(ids, others) & masks.Dense(jnp.array(True)), **on
        ),
        (Q, K, V),
        (IDS, (IDS[0][:, ::-1].copy(), SEQUENCE)),
        out=SEQUENCE,
    ),
}


def sharded(name, num_devices, **options):
    """The call, with the tokens in parts on so many devices."""
    case = CASES[name]
    specs = tuple(spec for _, spec in case.floats + case.others)
    call = functools.partial(case.call, axis_name="ring", **options)
    on = mesh(ring=num_devices)
    return jax.shard_map(call, mesh=on, in_specs=specs, out_specs=case.out)


@functools.cache
def compiled(name, order, num_devices=None, **options):
    """A report on a case, on some devices or on one."""
    call = functools.partial(CASES[name].call, **options)
    if num_devices is not None:
        # Tiles are smaller than the part of a device, and do not divide it.
        call = sharded(name, num_devices, **{"block_size": (2, 5)} | options)
    return jax.jit(functools.partial(order, call)).lower(*arguments(CASES[name])).compile()


def assert_equal_reports(got, wanted):
    """To a few units in the last place of the largest entry, whose terms others share."""
    for kind, there in wanted.items():
        for one, other in zip(*map(jax.tree.leaves, (got[kind], there)), strict=True):
            largest = np.max(np.abs(other), initial=1, where=np.isfinite(other))
            rounding = ROUNDINGS | {"atol": ROUNDINGS["atol"] * largest}
            np.testing.assert_allclose(one, other, **rounding, err_msg=kind)


def assert_reports_agree(name, order, num_devices, **options):
    """Compares the report with that of one device, and returns the kinds of collectives."""
    args = arguments(CASES[name])
    program = compiled(name, order, num_devices, **options)
    assert_equal_reports(program(*args), compiled(name, order)(*args))
    return {kind for kind, _ in collectives_of(program)}


def rings(defaults):
    """A parameter for each case, and all sizes of a ring for two; most of them are slow."""
    sizes = {"causal": (2, 3, 8), "every option": (2, 3, 8)}
    pairs = [(name, size) for name in CASES for size in sizes.get(name, (3,))]
    marks = lambda pair: [] if pair in defaults else [pytest.mark.slow]
    return pytest.mark.parametrize(
        ("name", "size"), [pytest.param(*pair, marks=marks(pair)) for pair in pairs]
    )


def test_infinite_scores():
    """They share the average equally, on whatever devices they are."""
    bias = np.zeros((1, TOKENS, TOKENS))
    bias[:, 3:, 2] = bias[:, 3:, 20] = INF
    spread = jax.shard_map(
        lambda q, k, v, bias: sj.attention(q, k, v, bias=bias, axis_name="ring", block_size=5),
        mesh=mesh(ring=3),
        in_specs=(SEQUENCE, SEQUENCE, SEQUENCE, ROWS),
        out_specs=SEQUENCE,
    )
    loss = lambda v: spread(Q[0], K[0], v, bias)[:, 3:].sum()
    slope = jax.jit(jax.grad(loss))(jnp.asarray(V[0]))
    wanted = np.zeros(V[0].shape)
    wanted[:, [2, 20]] = (TOKENS - 3) * HEADS / KEY_HEADS / 2
    assert_close(slope, wanted, rtol=0, atol=100 * eps("float64"))


@rings({("every option", 3)})
def test_values_and_derivatives(name, size):
    kinds = assert_reports_agree(name, first_order, size)
    # Sums over devices are those of cotangents of what all devices share.
    assert kinds - {"all-reduce"} == {"collective-permute"}
    assert ("all-reduce" in kinds) == (name in ("every option", "function"))


@rings({("causal", 3)})
def test_products_with_hessians(name, size):
    kinds = assert_reports_agree(name, second_order, size)
    assert kinds - {"all-reduce"} == {"collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order"),
    [*((name, first_order) for name in CASES), ("every option", second_order)],
)
@pytest.mark.parametrize("context", ["allgather", "ulysses"])
def test_other_contexts(name, context, order):
    assert_reports_agree(name, order, 2, context=context)


@pytest.mark.parametrize("context", ["allgather", "ulysses"])
def test_values_in_other_contexts(context):
    floats, others = arguments(CASES["every option"])
    got = jax.jit(sharded("every option", 2, context=context))(*floats, *others)
    wanted = compiled("every option", first_order)(floats, others)
    np.testing.assert_allclose(got, wanted["value"], **ROUNDINGS)


# What the devices do.


def test_hops_that_a_mask_empties_do_no_work():
    """Counts the tiles of 3 queries and 3 keys that each of four devices forms."""
    seen = collections.Counter()

    def score(scores, at):
        jax.debug.callback(lambda i: seen.update([int(i)]), jax.lax.axis_index("ring"))
        return scores

    call = lambda x, at: sj.attention(
        *(x, x, x),
        mask=masks.Causal(),
        score=score,
        positions=at,
        block_size=3,
        axis_name="ring",
    )
    spec = PartitionSpec("ring")
    whole = jax.shard_map(call, mesh=mesh(ring=4), in_specs=(spec, spec), out_specs=spec)
    whole, tokens, found = jax.jit(whole), jnp.asarray(normal(0, TOKENS, 1, 2)), {}
    zigzag = sj.zigzag_permutation(TOKENS, 4)
    for order, counts in ((jnp.arange(TOKENS), [3, 7, 11, 15]), (zigzag, [9, 9, 9, 9])):
        seen.clear()
        out = whole(tokens[order], order)
        jax.effects_barrier()
        assert [seen[i] for i in range(4)] == counts
        found[counts[0]] = np.asarray(out)
    back = sj.inverse_zigzag_permutation(TOKENS, 4)
    np.testing.assert_allclose(found[9][back], found[3], **ROUNDINGS)


def test_bytes_that_cross_between_devices():
    for record in ring.run(ring.QUICK)["records"]:
        assert record["bytes"] == record["formula_bytes"] > 0


@pytest.mark.slow
@pytest.mark.optimized
def test_memory_falls_as_the_ring_grows():
    """The temporary memory of a device, of 8 devices beside 2."""
    tokens = jax.ShapeDtypeStruct((32768, 2, 64), jnp.float32)

    def temporary(num_devices):
        on, spec = mesh(ring=num_devices), PartitionSpec("ring")
        call = functools.partial(sj.attention, mask=masks.Causal(), axis_name="ring")
        value = jax.shard_map(call, mesh=on, in_specs=(spec,) * 3, out_specs=spec)
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(value(*args))), argnums=(0, 1, 2))
        product = lambda *args: jax.jvp(gradient, args, args)[1]
        places = (jax.sharding.NamedSharding(on, spec),) * 3
        return [
            jax.jit(function, in_shardings=places)
            .lower(tokens, tokens, tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for function in (value, gradient, product)
        ]

    ratios = np.divide(temporary(8), temporary(2))
    assert np.all(ratios <= [0.35, 0.35, 0.4]), ratios


@pytest.mark.slow
def test_errors_do_not_grow_with_the_ring():
    case = CASES["causal"]
    floats, _ = arguments(case, "float32")
    exact = case.call(*(x.astype(jnp.float64) for x in floats))
    errors = []
    for size in (1, 2, 3, 8):
        got = jax.jit(sharded("causal", size, block_size=2))(*floats)
        assert got.dtype == jnp.float32
        errors.append(np.abs(got.astype(jnp.float64) - exact).max() / eps("float32"))
    assert max(errors) <= 8
    assert max(errors) <= 2 * errors[0]


def test_half_precision_is_rounded_once():
    args = arguments(CASES["causal"], "bfloat16")[0]
    call = functools.partial(sj.attention, mask=masks.Causal())
    split = jax.shard_map(
        functools.partial(call, axis_name="ring"),
        mesh=mesh(ring=3),
        in_specs=(SEQUENCE,) * 3,
        out_specs=SEQUENCE,
    )
    wanted = jax.jit(call)(*(x.astype(jnp.float32) for x in args))
    got = jax.jit(split)(*args)
    assert got.dtype == jnp.bfloat16
    assert_close(got, wanted, rtol=eps("bfloat16"), atol=0)


# Edges.


def with_bad_tokens():
    q, k, v = arguments(CASES["causal"])[0]
    k, v = k.at[0, 15, 0].set(NAN), v.at[1, 20, 1].set(INF)
    return [q.at[1, 3].set(INF), k, v], []


def test_a_nan_on_one_device_reaches_the_queries_that_see_it():
    got = jax.jit(sharded("causal", 2, block_size=5))(*with_bad_tokens()[0])
    reached = np.zeros((2, TOKENS, HEADS), bool)
    reached[0, 15:, :2] = reached[1, 20:, 2:] = reached[1, 3] = True
    np.testing.assert_array_equal(np.isnan(got).all(-1), reached)
    np.testing.assert_array_equal(np.isnan(got).any(-1), reached)


@pytest.mark.slow
def test_bad_tokens_reach_no_others_in_any_derivative():
    for order in (first_order, second_order):
        got = compiled("causal", order, 3, block_size=4)(*with_bad_tokens())
        one_device = compiled("causal", order, block_size=4)  # with the same tiles
        assert_equal_reports(got, one_device(*with_bad_tokens()))


# Other meshes.


@pytest.mark.slow
@pytest.mark.parametrize("context", ["ring", "allgather", "ulysses"])
def test_two_axes_in_a_ring_beside_an_axis_of_sequences(context):
    axes = ("a", "b") if context == "ring" else ("b",)
    spec = PartitionSpec("data", axes)
    call = lambda q, k, v, scale: attend(
        *(q, k, v), mask=masks.Causal(), scale=scale, axis_name=axes, context=context
    )
    on = mesh(data=2, a=2, b=2)
    split = jax.shard_map(call, mesh=on, in_specs=(spec,) * 3 + (ONE,), out_specs=spec)
    whole = lambda q, k, v, scale: attend(q, k, v, mask=masks.Causal(), scale=scale)
    args = [*arguments(CASES["causal"])[0], jnp.array([0.1, 0.2, 0.3, 0.4])], []
    got, there = (jax.jit(functools.partial(first_order, f))(*args) for f in (split, whole))
    assert_equal_reports(got, there)


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("context", ["allgather", "ulysses"])
def test_sparse_maps_in_other_contexts(context, normalizer):
    call = functools.partial(sj.attention, mask=masks.Causal(), normalizer=normalizer)
    split = jax.shard_map(
        functools.partial(call, axis_name="ring", context=context),
        mesh=mesh(ring=2),
        in_specs=(SEQUENCE,) * 3,
        out_specs=SEQUENCE,
    )
    args = arguments(CASES["causal"])
    got, there = (jax.jit(functools.partial(first_order, f))(*args) for f in (split, call))
    assert_equal_reports(got, there)


# Refusals.


def refused(spec=None, check_vma=True, **options):
    """Traces attention with these options on two devices."""
    tokens, spec = jnp.zeros((8, 3, 2)), PartitionSpec("ring") if spec is None else spec
    call = lambda x: sj.attention(x, x, x, **{"axis_name": "ring"} | options)
    whole = jax.shard_map(
        call, mesh=mesh(ring=2), in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    jax.eval_shape(whole, tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own(masks.Mask):
    keep: jax.Array


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"context": "torus"}, ValueError, "`context` must be .*, got 'torus'"),
        (
            {"axis_name": None, "context": "ulysses"},
            ValueError,
            "`context='ulysses'` needs an `axis_name`",
        ),
        ({"axis_name": "other"}, ValueError, "must name mesh axes .* ring, got 'other'"),
        ({"axis_name": ("ring", "ring")}, ValueError, "names an axis twice"),
        ({"check_vma": False}, ValueError, "`check_vma=False` turns off"),
        ({"spec": ONE}, ValueError, "`queries` must vary over the mesh axes ring"),
        ({"positions": jnp.arange(4)}, ValueError, "`positions` must vary over the mesh axes"),
        (
            {"positions": (None, None, None), "context": "allgather", "mask": masks.Causal()},
            ValueError,
            "`positions` must be those of queries and keys, got 3",
        ),
        ({"normalizer": "sparsemax"}, ValueError, "`normalizer` must be .* in a ring, because"),
        (
            {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
            ValueError,
            "`dropout_key` must be None with `axis_name`, because",
        ),
        ({"implementation": "dense"}, ValueError, "cannot serve this call, because the keys"),
        (
            {"mask": masks.Causal() & Own(jnp.ones(4, bool))},
            ValueError,
            "because nothing tells which .* Own",
        ),
        ({"context": "ulysses"}, ValueError, "each of 2 devices as many heads, got 3 heads"),
        ({"bias": jnp.zeros((4, 4))}, ValueError, r"`bias` .* \[..., N, T, S\], \(3, 4, 8\)"),
        ({"mask": jnp.ones((4, 4), bool)}, ValueError, r"`mask` .* \(3, 4, 8\)"),
    ],
)
def test_what_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        refused(**options)


def test_outside_of_a_mesh():
    tokens = jnp.zeros((8, 2, 2))
    with pytest.raises(ValueError, match="which are none here"):
        sj.attention(tokens, tokens, tokens, axis_name="ring")


def test_an_option_that_differs_between_devices():
    call = lambda x, scale: sj.attention(x, x, x, scale=scale[0], axis_name="ring")
    spec = PartitionSpec("ring")
    whole = jax.shard_map(call, mesh=mesh(ring=2), in_specs=(spec, spec), out_specs=spec)
    with pytest.raises(ValueError, match="`scale` must be the same along the mesh axes ring"):
        jax.eval_shape(whole, jnp.zeros((8, 1, 2)), jnp.ones(2))


def test_pages_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis_name'"):
        sj.paged_attention(axis_name="ring")


@pytest.mark.parametrize(
    ("context", "line"),
    [
        ("ring", "streamed: 2 hops of 2 tiles of 12 x 6; taken."),
        ("allgather", "dense: 1 tile of 12 x 24; taken."),
        ("ulysses", "dense: 1 tile of 24 x 24; taken."),
    ],
)
def test_explanations(context, line):
    told = []

    def call(x):
        told.append(sj.explain_attention(x, x, x, axis_name="ring", context=context))
        return x

    spec = PartitionSpec("ring")
    whole = jax.shard_map(call, mesh=mesh(ring=2), in_specs=spec, out_specs=spec)
    jax.eval_shape(whole, jnp.zeros((TOKENS, 2, 4)))
    assert line in told[0].split("\n")


# Orders of tokens.


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_zigzag(num_devices):
    order = np.asarray(sj.zigzag_permutation(48, num_devices))
    assert order.dtype == np.int32
    chunk = 24 // num_devices
    for i, part in enumerate(np.split(order, num_devices)):
        ends = (i, 2 * num_devices - 1 - i)
        wanted = np.concatenate([np.arange(chunk * n, chunk * (n + 1)) for n in ends])
        np.testing.assert_array_equal(part, wanted)
    back = sj.inverse_zigzag_permutation(48, num_devices)
    np.testing.assert_array_equal(order[back], np.arange(48))
    np.testing.assert_array_equal(np.asarray(back)[order], np.arange(48))


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((9, 2), ValueError, "`num_tokens` must be a multiple of 4, twice the devices, got 9"),
        ((8, 0), ValueError, "`num_devices` must be at least 1"),
        ((8.0, 2), TypeError, "`num_tokens` must be an int"),
    ],
)
def test_zigzags_that_are_refused(args, error, words):
    for function in (sj.zigzag_permutation, sj.inverse_zigzag_permutation):
        with pytest.raises(error, match=words):
            function(*args)
