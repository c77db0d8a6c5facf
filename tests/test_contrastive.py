"""Contrastive losses against the similarities written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from softjax import contrastive
from tests import oracles
from tests.helpers import INF, NAN, eps

PAIRS, WIDTH = 7, 3


def draw(seed=0, pairs=PAIRS, width=WIDTH, dtype="float64"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((pairs, width)).astype(dtype)) for _ in "qk")


def plain_info_nce(queries, keys, temperature, symmetric=True):
    scores = queries @ keys.T / temperature
    own = jnp.arange(len(queries))
    sides = (scores, scores.T) if symmetric else (scores,)
    return sum(-jnp.mean(jax.nn.log_softmax(s)[own, own]) for s in sides) / len(sides)


def plain_siglip(queries, keys, temperature, bias):
    signs = 2 * jnp.eye(len(queries)) - 1
    scores = queries @ keys.T / temperature + bias
    return jnp.sum(jnp.logaddexp(0.0, -signs * scores)) / len(queries)


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce(symmetric):
    ours = lambda q, k, t: sj.info_nce(q, k, temperature=t, symmetric=symmetric)
    theirs = lambda q, k, t: plain_info_nce(q, k, t, symmetric)
    args = (*draw(), jnp.asarray(0.7))
    np.testing.assert_allclose(ours(*args), theirs(*args), rtol=1e-13)
    grads = zip(
        jax.grad(ours, (0, 1, 2))(*args), jax.grad(theirs, (0, 1, 2))(*args), strict=True
    )
    for got, wanted in grads:
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [2**20, 1, 3 * PAIRS])
def test_siglip_loss(entries, monkeypatch):
    """All keys at once, three at a time with one left over, and one by one."""
    monkeypatch.setattr(contrastive, "ENTRIES", entries)
    jax.clear_caches()
    ours = lambda q, k, t, b: sj.siglip_loss(q, k, temperature=t, bias=b)
    args = (*draw(), jnp.asarray(0.7), jnp.asarray(-0.3))
    np.testing.assert_allclose(ours(*args), plain_siglip(*args), rtol=1e-13)
    every = (0, 1, 2, 3)
    grads = zip(jax.grad(ours, every)(*args), jax.grad(plain_siglip, every)(*args), strict=True)
    for got, wanted in grads:
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)
    check_grads(ours, args, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)
    jax.clear_caches()


def test_a_certain_match_keeps_its_digits():
    """Two orthogonal pairs at temperature 0.05: log(1 + exp(-20))."""
    eye = jnp.eye(2, dtype=jnp.float32)
    np.testing.assert_allclose(
        sj.info_nce(eye, eye, temperature=0.05), np.log1p(np.exp(-20)), 1e-6
    )


def test_no_pairs_have_no_loss():
    none = jnp.zeros((0, 3))
    assert float(sj.info_nce(none, none, temperature=1.0)) == 0
    assert float(sj.siglip_loss(none, none, temperature=1.0, bias=0.0)) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_accumulated_in_float32(dtype):
    queries, keys = draw(pairs=16, width=8, dtype=dtype)
    wide = queries.astype("float64"), keys.astype("float64")
    one = sj.info_nce(queries, keys, temperature=0.5)
    two = sj.siglip_loss(queries, keys, temperature=0.5, bias=-1.0)
    assert one.dtype == two.dtype == jnp.float32
    np.testing.assert_allclose(one, plain_info_nce(*wide, 0.5), rtol=1e-5)
    np.testing.assert_allclose(two, plain_siglip(*wide, 0.5, -1.0), rtol=1e-5)


@pytest.mark.optimized
@pytest.mark.slow
def test_memory_grows_with_the_number_of_pairs_only():
    """The temporaries of the gradient, in value and JVP too, beside those of stored logits."""

    def temporaries(function, pairs):
        shape = jax.ShapeDtypeStruct((pairs, 64), jnp.float32)
        compiled = jax.jit(function).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for loss in (
        lambda q, k: sj.info_nce(q, k, temperature=0.1),
        lambda q, k: sj.siglip_loss(q, k, temperature=0.1, bias=-1.0),
    ):
        gradient = jax.grad(loss, (0, 1))
        moved = lambda q, k, loss=loss: jax.jvp(loss, (q, k), (q, k))
        for function in (loss, gradient, moved):
            assert temporaries(function, 4096) <= 4 * 4096**2 / 2
            assert temporaries(function, 16384) <= 3 * temporaries(function, 8192)


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"keys": jnp.ones((3, 3))}, ValueError, "must be \\[N, D\\] alike"),
        ({"keys": jnp.ones((2, 3), complex)}, TypeError, "`keys` must be real"),
        ({"temperature": jnp.ones(2)}, ValueError, "`temperature` must be one number"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be positive"),
    ],
)
def test_errors(change, error, problem):
    call = {"queries": jnp.ones((2, 3)), "keys": jnp.ones((2, 3)), "temperature": 1.0} | change
    with pytest.raises(error, match=problem):
        sj.info_nce(**call)
    with pytest.raises(error, match=problem):
        sj.siglip_loss(**call, bias=0.0)


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_mixed_dtypes(kinds):
    """Both directions see the same similarities, and each argument its own dtype."""
    queries, keys = (x.astype(kind) for x, kind in zip(draw(width=8), kinds, strict=True))
    wide = queries.astype("float64"), keys.astype("float64")
    if kinds[1] == "float32":
        wide = wide[0], keys.astype("bfloat16").astype("float64")
    for ours, theirs, rest in (
        (sj.info_nce, plain_info_nce, {"temperature": 0.5}),
        (sj.siglip_loss, plain_siglip, {"temperature": 0.5, "bias": -1.0}),
    ):
        call = lambda q, k, ours=ours, rest=rest: ours(q, k, **rest)
        value, slopes = jax.jit(jax.value_and_grad(call, (0, 1)))(queries, keys)
        exact = jax.value_and_grad(lambda q, k, f=theirs, rest=rest: f(q, k, **rest), (0, 1))
        desired, wanted = exact(*wide)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, desired, rtol=1e-5)
        for slope, want, kind in zip(slopes, wanted, kinds, strict=True):
            assert slope.dtype == kind
            tolerance = 4 * eps(kind) * float(jnp.abs(want).max())
            np.testing.assert_allclose(slope.astype("float64"), want, atol=tolerance)


def test_no_option_widens_the_loss():
    queries, keys = draw(dtype="float32")
    for value in (0.5, jnp.float32(0.5), jnp.float64(0.5)):
        found = jax.eval_shape(
            lambda x: (
                sj.info_nce(queries, keys, temperature=x),
                sj.siglip_loss(queries, keys, temperature=x, bias=x),
            ),
            value,
        )
        assert {x.dtype.name for x in found} == {"float32"}


def test_a_bool_is_no_bias():
    queries, keys = draw()
    with pytest.raises(TypeError, match="`bias` must hold numbers"):
        sj.siglip_loss(queries, keys, temperature=1.0, bias=jnp.array(True))


LOSSES = {
    "info_nce": (
        sj.info_nce,
        lambda q, k, temperature: oracles.info_nce(q, k, temperature=temperature),
        {"temperature": 0.7},
    ),
    "info_nce of one side": (
        functools.partial(sj.info_nce, symmetric=False),
        lambda q, k, temperature: oracles.info_nce(
            q, k, temperature=temperature, symmetric=False
        ),
        {"temperature": 0.7},
    ),
    "siglip_loss": (
        sj.siglip_loss,
        lambda q, k, temperature, bias: oracles.siglip_loss(
            q, k, temperature=temperature, bias=bias
        ),
        {"temperature": 0.7, "bias": -0.3},
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_pair_that_is_left_out_reaches_nothing(kind, poison):
    """The loss is that of the other pairs alone, and so are all gradients."""
    loss, oracle, options = LOSSES[kind]
    keep = np.array([True, False, True, True, False, True, True])
    queries, keys = (x.at[~keep].set(poison) for x in draw())
    options = {name: jnp.asarray(x) for name, x in options.items()}
    run = jax.value_and_grad(lambda q, k, options: loss(q, k, **options), (0, 1, 2))
    masked = lambda q, k, options: loss(q, k, where=jnp.asarray(keep), **options)
    value, slopes = jax.value_and_grad(masked, (0, 1, 2))(queries, keys, options)
    few = [np.asarray(x[keep]) for x in (queries, keys)]
    np.testing.assert_allclose(value, oracle(*few, **options), rtol=1e-13)
    _, wanted = run(*map(jnp.asarray, few), options)
    for slope, want in zip(slopes[:2], wanted[:2], strict=True):
        assert (slope[~keep] == 0).all()
        np.testing.assert_allclose(slope[keep], want, rtol=1e-11, atol=1e-14)
    for name, slope in slopes[2].items():
        np.testing.assert_allclose(slope, wanted[2][name], rtol=1e-11)
    nothing = jnp.zeros(len(queries), bool)
    value, slopes = jax.value_and_grad(
        lambda *args: loss(*args[:2], where=nothing, **args[2]), (0, 1, 2)
    )(queries, keys, options)
    assert value == 0
    assert all((x == 0).all() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mask_of_pairs_is_checked(kind):
    loss, _, options = LOSSES[kind]
    with pytest.raises(TypeError, match="`where` must be bool"):
        loss(*draw(), where=jnp.ones(PAIRS), **options)
    with pytest.raises(ValueError, match="`where` of shape"):
        loss(*draw(), where=jnp.ones((PAIRS, 1), bool), **options)
