"""logsumexp, logmeanexp and mellowmax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps


@pytest.mark.parametrize("axis", [0, -1, (0, 2), None])
@pytest.mark.parametrize("keepdims", [False, True])
def test_logsumexp(axis, keepdims):
    logits, keep = draw(0, (2, 3, 4), scale=3.0)
    weights = np.random.default_rng(1).uniform(0, 2, logits.shape)
    for options in (
        {},
        {"where": keep},
        {"weights": weights},
        {"where": keep, "weights": weights},
    ):
        options |= {"axis": axis, "keepdims": keepdims}
        actual = sj.logsumexp(jnp.asarray(logits), **options)
        assert_close(actual, oracles.logsumexp(logits, **options), rtol=8 * eps("float64"))
    options = {"axis": axis, "where": keep, "keepdims": keepdims}
    actual = sj.logmeanexp(jnp.asarray(logits), **options)
    expected = oracles.logmeanexp(logits, **options)
    assert_close(actual, expected, rtol=8 * eps("float64"), atol=8 * eps("float64"))


def test_means_leave_out_what_is_dropped():
    logits = jnp.array([[1.0, -INF, 3.0], [-INF, -INF, 2.0]])
    assert_close(
        sj.logmeanexp(logits, axis=-1), oracles.logmeanexp(logits, axis=-1), rtol=1e-15
    )
    assert_close(sj.logmeanexp(logits, axis=-1)[1], 2.0, rtol=0)
    for omega in (-1.0, 0.0, 1e-3, 2.0, INF, -INF):
        expected = oracles.mellowmax(np.asarray(logits), omega=omega)
        assert_close(sj.mellowmax(logits, omega=omega), expected, rtol=1e-14)


def test_axis_is_none_by_default():
    logits = jnp.asarray(draw(2, (2, 3))[0])
    assert_same(sj.logsumexp(logits), sj.logsumexp(logits.reshape(-1), axis=0))
    assert sj.logmeanexp(logits).shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_seventy_thousand_zeros(dtype):
    """In float16 the sum overflows at 65504 unless it is kept elsewhere."""
    zeros = jnp.zeros(70000, dtype)
    exact = np.log(70000.0)
    assert_close(
        sj.logsumexp(zeros), np.array(exact).astype(jnp.dtype(dtype)), rtol=eps(dtype) / 2
    )
    grad = jax.grad(sj.logsumexp)(zeros)
    assert_close(grad, np.full(70000, 1 / 70000).astype(jnp.dtype(dtype)), rtol=2 * eps(dtype))


def test_weights_are_those_of_scipy():
    logits = jnp.array([1.0, 2.0, 3.0])
    for weights in ([1.0, 0.0, 2.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        expected = oracles.logsumexp(np.asarray(logits), weights=np.array(weights))
        assert_close(sj.logsumexp(logits, weights=jnp.array(weights)), expected, rtol=1e-15)
    assert jnp.isnan(sj.logsumexp(logits, weights=jnp.array([1.0, 1.0, -2.0])))
    assert sj.logsumexp(logits, weights=jnp.array([1.0, 0.0, 0.0])) == 1.0


SIGNED = [
    ([INF, 0.0], [-1.0, 1.0]),
    ([INF, 0.0], [1.0, -2.0]),
    ([INF, 0.0], [1.0, 1.0]),
    ([INF, INF], [1.0, -1.0]),
    ([INF, INF], [2.0, -1.0]),
    ([INF, INF], [-2.0, -1.0]),
    ([INF, 0.0], [0.0, 1.0]),
    ([NAN, 0.0], [0.0, 1.0]),
    ([INF, NAN], [1.0, 1.0]),
    ([0.0, NAN], [-1.0, 1.0]),
    ([-INF, -INF], [1.0, -1.0]),
    ([0.0, 0.0], [1.0, -1.0]),
    ([0.0, -20.0], [1.0, 1.0]),
    ([0.0, -20.0], [-1.0, -1.0]),
    ([0.0, -20.0], [1.0, -1.0]),
    ([0.0, 1.0], [0.0, 0.0]),
    ([5.0, 3.0], [1.0, -2.0]),
    ([5.0, 3.0], [-1.0, 2.0]),
    ([0.0, -1e-5], [0.75, -0.25]),
    ([-40.0, -80.0], [1e-20, -3.0]),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_both_signs(dtype):
    """As in SciPy, infinite logits and zeros too, with the sign and without."""
    logits, weights = (np.array(column) for column in zip(*SIGNED, strict=True))
    with np.errstate(all="ignore"):
        size, sign = scipy.special.logsumexp(logits, 1, b=weights, return_sign=True)
        plain = scipy.special.logsumexp(logits, 1, b=weights)
    args = jnp.asarray(logits, dtype), jnp.asarray(weights, dtype)
    with jax.debug_nans(False):
        got = sj.logsumexp(args[0], axis=1, weights=args[1], return_sign=True)
        alone = sj.logsumexp(args[0], axis=1, weights=args[1])
    assert got[0].dtype == got[1].dtype == alone.dtype == dtype
    assert_close(got[0], size, rtol=8 * eps(dtype))
    assert_close(got[1], sign, rtol=0)
    assert_close(alone, plain, rtol=8 * eps(dtype))


def test_signs_of_sums_without_weights():
    logits = jnp.array([[0.0, 1.0], [-INF, -INF], [INF, 0.0], [NAN, 0.0]], "bfloat16")
    with jax.debug_nans(False):
        row, sign = sj.logsumexp(logits, axis=-1, keepdims=True, return_sign=True)
        assert_same(row, sj.logsumexp(logits, axis=-1, keepdims=True))
    assert row.dtype == sign.dtype == logits.dtype
    assert_close(sign, [[1.0], [0.0], [1.0], [NAN]], rtol=0)
    with pytest.raises(TypeError, match="`return_sign` must be True or False"):
        sj.logsumexp(logits, return_sign=1)


def test_derivatives_of_a_negative_sum():
    """Those of log |sum|: b e^z / sum, and e^z / sum; no derivative goes through the sign."""
    logits, weights = jnp.array([1.0, -0.5, 2.0]), jnp.array([0.5, 1.0, -2.0])
    fn = lambda z, b: sj.logsumexp(z, weights=b, return_sign=True)
    total = jnp.sum(weights * jnp.exp(logits))
    assert total < 0
    for mode in (jax.jacfwd, jax.jacrev):
        sizes, signs = mode(fn, argnums=(0, 1))(logits, weights)
        assert_close(sizes[0], weights * jnp.exp(logits) / total, rtol=1e-14)
        assert_close(sizes[1], jnp.exp(logits) / total, rtol=1e-14)
        assert all((slope == 0).all() for slope in signs)


def test_derivatives_beside_infinite_and_weightless_entries():
    fn = lambda z, b: sj.logsumexp(z, weights=b)
    logits, weights = jnp.array([INF, 1.0, INF, NAN]), jnp.array([1.0, 5.0, 3.0, 0.0])
    with jax.debug_nans(True):
        in_logits, in_weights = jax.grad(fn, argnums=(0, 1))(logits, weights)
        assert_close(in_logits, [0.25, 0.0, 0.75, 0.0], rtol=1e-15)
        assert_close(in_weights, [0.25, 0.0, 0.25, 0.0], rtol=1e-15)
        logits, weights = jnp.array([INF, 1.0, 0.0]), jnp.array([0.0, 1.0, 1.0])
        in_logits, in_weights = jax.grad(fn, argnums=(0, 1))(logits, weights)
        assert_close(in_logits[1:], jax.nn.softmax(jnp.array([1.0, 0.0])), rtol=1e-14)
        assert jnp.isfinite(in_weights).all()
        assert in_logits[0] == 0


def test_weights_broadcast():
    logits = jnp.asarray(draw(3, (2, 3))[0])
    for weights in (jnp.asarray(2.0), jnp.array([1.0, 2.0, 3.0]), jnp.array([[1.0], [2.0]])):
        expected = oracles.logsumexp(logits, axis=-1, weights=np.asarray(weights))
        actual = sj.logsumexp(logits, axis=-1, weights=weights)
        assert_close(actual, expected, rtol=4 * eps("float64"))


def test_the_derivative_in_a_zero_weight():
    """d/db_i log sum b e^z = e^(z_i - lse), at b_i = 0 as elsewhere."""
    logits, weights = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 0.5, 0.0])
    total = sj.logsumexp(logits, weights=weights)
    fn = lambda b: sj.logsumexp(logits, weights=b)
    for mode in (jax.jacfwd, jax.jacrev):
        assert_close(mode(fn)(weights), jnp.exp(logits - total), rtol=1e-14)
    hessian = jax.hessian(fn)(weights)
    expected = -jnp.outer(*2 * [jnp.exp(logits - total)])
    assert_close(hessian, expected, rtol=1e-13)


def test_a_zero_weight_at_the_peak_costs_no_digits():
    """The largest logit has no weight: the sum must be scaled by the largest that has."""
    logits, weights = jnp.array([800.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 1.0])
    expected = oracles.logsumexp(logits, weights=weights)
    assert_close(sj.logsumexp(logits, weights=weights), expected, rtol=1e-15)


def test_negative_weights_may_cancel():
    logits = jnp.array([3.0, 1.0, 0.5])
    weights = jnp.array([1.0, -1.0, 0.25])
    fn = lambda z, b: sj.logsumexp(z, weights=b)
    total = fn(logits, weights)
    assert_close(total, oracles.logsumexp(logits, weights=weights), rtol=1e-15)
    for grad, expected in zip(
        jax.grad(fn, argnums=(0, 1))(logits, weights),
        (weights * jnp.exp(logits - total), jnp.exp(logits - total)),
        strict=True,
    ):
        assert_close(grad, expected, rtol=1e-14)


def test_gradient_is_the_softmax():
    logits, keep = draw(4, (3, 6), scale=4.0)
    fn = lambda z: jnp.sum(sj.logsumexp(z, axis=-1, where=keep))
    expected = oracles.softmax(logits, where=keep)
    assert_close(jax.grad(fn)(jnp.asarray(logits)), expected, rtol=32 * eps("float64"))
    fn = lambda z: jnp.sum(sj.logmeanexp(z, axis=-1, where=keep))
    assert_close(jax.grad(fn)(jnp.asarray(logits)), expected, rtol=32 * eps("float64"))


def test_logmeanexp_of_equal_entries_is_that_entry():
    """Exactly: the mean of equal numbers, in logarithms."""
    for value in (0.0, 3.0, -1e4, 700.0):
        for n in (1, 3, 1000):
            assert_close(
                sj.logmeanexp(jnp.full(n, value)), value, rtol=eps("float64"), atol=1e-15
            )


@pytest.mark.parametrize(
    "omega", [-50.0, -2.0, -1e-3, -1e-12, 0.0, 1e-12, 1e-3, 0.5, 5.0, 50.0]
)
def test_mellowmax(omega):
    for seed, (scale, offset) in enumerate([(1.0, 0.0), (3.0, 100.0), (0.01, -5.0)]):
        values, keep = draw(seed, (3, 6), scale=scale, offset=offset)
        actual = sj.mellowmax(jnp.asarray(values), omega=omega, where=keep)
        expected = oracles.mellowmax(values, omega=omega, where=keep)
        # It lies among the values; a few roundings of the largest of them.
        assert_close(actual, expected, rtol=0, atol=8 * eps("float64") * np.abs(values).max())


def test_mellowmax_at_its_ends():
    values = jnp.array([[1.0, 4.0, 2.5], [-1.0, 7.0, 7.0]])
    assert_close(sj.mellowmax(values, omega=0.0), [2.5, 13 / 3], rtol=1e-15)
    assert_close(sj.mellowmax(values, omega=INF), [4.0, 7.0], rtol=0)
    assert_close(sj.mellowmax(values, omega=-INF), [1.0, -1.0], rtol=0)
    with jax.debug_nans(True):
        for omega in (0.0, INF, -INF):
            grad = jax.grad(lambda v, w=omega: jnp.sum(sj.mellowmax(v, omega=w)))(values)
            assert_close(grad.sum(-1), [1.0, 1.0], rtol=1e-14)


def test_mellowmax_in_omega():
    """At 0 the derivative is half the variance; elsewhere by differences of the oracle."""
    values = jnp.array([1.0, 4.0, 2.5, -0.5])
    fn = lambda omega: sj.mellowmax(values, omega=omega)
    for mode in (jax.jacfwd, jax.jacrev):
        assert_close(mode(fn)(0.0), jnp.var(values) / 2, rtol=1e-12)
        for omega in (-3.0, -1e-3, 1e-6, 0.1, 2.0):
            ends = [oracles.mellowmax(values, omega=omega + s * 2.0**-14) for s in (1, -1)]
            expected = (ends[0] - ends[1]) * 2.0**13
            assert_close(mode(fn)(omega), expected, rtol=1e-6)
    for omega in (INF, -INF):
        assert jax.grad(fn)(omega) == 0


@pytest.mark.parametrize("name", ["logsumexp", "logmeanexp"])
def test_edges(name):
    fn = getattr(sj, name)
    assert fn(jnp.array([])) == -INF
    assert_close(fn(jnp.zeros((2, 0)), axis=-1), [-INF, -INF], rtol=0)
    assert fn(jnp.zeros((0, 3)), axis=-1).shape == (0,)
    assert fn(jnp.zeros((0, 3)), axis=-1, keepdims=True).shape == (0, 1)
    assert fn(jnp.array([-INF, -INF])) == -INF
    assert fn(jnp.array([INF, 0.0])) == INF
    assert fn(jnp.array([INF, -INF])) == INF
    assert jnp.isnan(fn(jnp.array([NAN, 0.0])))
    assert jnp.isnan(fn(jnp.array([NAN, INF])))
    assert fn(jnp.array([NAN, 2.0]), where=jnp.array([False, True])) == 2.0
    assert fn(jnp.array([INF, 2.0]), where=jnp.array([False, True])) == 2.0
    assert fn(jnp.array([1.0, 2.0]), where=jnp.array([False, False])) == -INF
    assert fn(jnp.asarray(3.0)) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logsumexp", "logmeanexp", "mellowmax"])
@pytest.mark.parametrize(
    ("logits", "keep"),
    [
        ([1.0, 2.0], [False, False]),
        ([-INF, -INF], [True, True]),
        ([NAN, 2.0], [False, True]),
        ([INF, 2.0], [False, True]),
        ([-INF, 2.0], [True, True]),
    ],
)
def test_derivatives_at_the_edges(name, logits, keep):
    logits, keep = jnp.array(logits), jnp.array(keep)
    call = {"omega": 1.0} if name == "mellowmax" else {}
    fn = lambda z: getattr(sj, name)(z, where=keep, **call)
    live = keep & (logits != -INF)
    with jax.debug_nans(True):
        for grad in (jax.grad(fn)(logits), jax.jacfwd(fn)(logits)):
            assert_close(grad, jnp.where(live, 1.0, 0.0), rtol=0)
        assert_close(jax.hessian(fn)(logits), np.zeros((2, 2)), rtol=0)
    # What stands in a dropped place does not leak from its tangent either.
    tangent = jnp.where(live, 1.0, NAN)
    out_dot = jax.jvp(fn, (logits,), (tangent,))[1]
    assert_close(out_dot, float(live.any()), rtol=0)


def test_derivatives_of_weights_where_nothing_is_kept():
    fn = lambda z, b: sj.logsumexp(z, where=jnp.array([False, False]), weights=b)
    with jax.debug_nans(True):
        for grad in jax.grad(fn, argnums=(0, 1))(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])):
            assert_close(grad, [0.0, 0.0], rtol=0)


def test_logits_that_are_rounded_anew_for_the_maximum():
    """As a compiler may do that forms them in two loops: then no entry equals the peak."""
    z = jnp.array(
        [
            [
                [0.345703125, -jnp.inf, 0.330078125, -1.3046875, 0.90625],
                [0.447265625, -0.53515625, 0.58203125, 0.365234375, 0.294921875],
            ],
            [
                [0.0284423828125, -jnp.inf, -0.73828125, -0.1630859375, -0.482421875],
                [0.59765625, 0.039794921875, -0.29296875, -0.78125, -0.2578125],
            ],
        ],
        jnp.float32,
    )
    total = jax.jit(lambda z: sj.logsumexp(sj.log_softmax(z), axis=0))
    wanted = oracles.logsumexp(oracles.log_softmax(z), axis=0)
    assert_close(total(z), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["logsumexp", "logmeanexp", "mellowmax"])
def test_a_dropped_entry_has_no_second_derivative(name):
    """This holds also where its tangent is infinite, as that of log(0) is."""
    options = {"mellowmax": {"omega": 1.0}}.get(name, {})
    total = lambda p: getattr(sj, name)(jnp.log(p), **options)
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        hessian = outer(inner(total))(jnp.array([0.2, 0.8, 0.0]))
        assert_close(hessian[:2, :2], -np.ones((2, 2)), rtol=1e-12)


@pytest.mark.parametrize("row", [[2e38, 2e38, 0.0], [-2e38, -2e38, -INF], [INF, INF, 2.0]])
def test_hessians_of_extreme_logits(row):
    """The two that are equal share the mass, so the curvature is p (1 - p) = 1 / 4."""
    hessian = jax.hessian(sj.logsumexp)(jnp.array(row, "float32"))
    expected = np.zeros((3, 3))
    expected[:2, :2] = [[0.25, -0.25], [-0.25, 0.25]]
    assert_close(hessian, expected, rtol=1e-6)
