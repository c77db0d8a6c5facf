"""Arithmetic that keeps what rounding drops, against exact rational arithmetic."""

import fractions

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from softjax import _elementary, _float
from softjax._slices import AlongAxes
from tests.helpers import assert_close, eps, ulp_error

Fraction = fractions.Fraction
WIDE = ("float32", "float64")
every_wide_dtype = pytest.mark.parametrize("dtype", WIDE)


def pairs(dtype, count=2000):
    """Numbers of all sizes and signs, far apart and nearly equal."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(count) * 10.0 ** rng.uniform(-6, 6, count)
    b = rng.standard_normal(count) * 10.0 ** rng.uniform(-6, 6, count)
    b[::3] = a[::3] * (1 + 1e-6 * rng.standard_normal(len(b[::3])))
    return a.astype(dtype), b.astype(dtype)


@every_wide_dtype
@pytest.mark.parametrize("compiled", [False, True])
def test_two_difference_is_exact(dtype, compiled):
    a, b = pairs(dtype)
    fn = jax.jit(_float.two_difference) if compiled else _float.two_difference
    difference, error = fn(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(difference, a - b)
    for x, y, d, e in zip(a, b, np.asarray(difference), np.asarray(error), strict=True):
        assert Fraction(float(d)) + Fraction(float(e)) == Fraction(float(x)) - Fraction(
            float(y)
        )


@every_wide_dtype
@pytest.mark.parametrize("compiled", [False, True])
def test_two_quotient_is_exact_to_first_order(dtype, compiled):
    """What is left after the correction is of second order: eps^2 of the quotient."""
    a, b = pairs(dtype)
    fn = jax.jit(_float.two_quotient) if compiled else _float.two_quotient
    quotient, error = fn(jnp.asarray(a), jnp.asarray(b))
    # A GPU rounds the quotient and the remainder's to 2 ulp, a CPU to the nearest number.
    on_cpu = jax.default_backend() == "cpu"
    assert (ulp_error(quotient, a / b) <= (0 if on_cpu else 2)).all()
    bound = (2 if on_cpu else 6) * Fraction(eps(dtype)) ** 2
    for x, y, q, e in zip(a, b, np.asarray(quotient), np.asarray(error), strict=True):
        exact = Fraction(float(x)) / Fraction(float(y))
        left = abs(Fraction(float(q)) + Fraction(float(e)) - exact)
        assert left <= bound * abs(exact)


@every_wide_dtype
@pytest.mark.parametrize("n", [0, 1, 7, 255, 256, 257, 1000, 65_536, 100_003])
def test_long_sum_does_not_lose_digits_with_length(n, dtype):
    rng = np.random.default_rng(n)
    for values in (rng.random(n), np.full(n, 0.1), np.full(n, 1 / 3)):
        values = values.astype(dtype)
        exact = float(np.sum(values.astype(np.longdouble)))
        for axis, shaped in [(0, values), (1, values[None]), (0, values[:, None])]:
            actual = AlongAxes((axis,)).sum(jnp.asarray(shaped))
            assert actual.shape == tuple(
                1 if i == axis else s for i, s in enumerate(shaped.shape)
            )
            # Equal terms err all alike: the rounding of one running sum is the whole error.
            assert_close(jnp.squeeze(actual), exact, rtol=16 * eps(dtype))


def test_long_sum_over_several_axes():
    x = np.random.default_rng(1).standard_normal((3, 300, 5, 700))
    actual = AlongAxes((1, 3)).sum(jnp.asarray(x))
    assert_close(actual, x.sum((1, 3), keepdims=True), rtol=0, atol=1e-11)


@pytest.mark.slow
@every_wide_dtype
@pytest.mark.parametrize("name", ["expm1_over", "log1p_over", "expm1_over_twice"])
def test_quotients_that_cancel(name, dtype):
    definition = {
        "expm1_over": lambda x: mpmath.expm1(x) / x,
        "log1p_over": lambda x: mpmath.log1p(x) / x,
        "expm1_over_twice": lambda x: (mpmath.expm1(x) - x) / x**2,
    }[name]
    at_zero = {"expm1_over": 1.0, "log1p_over": 1.0, "expm1_over_twice": 0.5}[name]
    fn = getattr(_elementary, name)
    sizes = np.concatenate([10.0 ** np.linspace(-30, 1, 120), np.linspace(0.005, 0.5, 120)])
    lowest = -0.999 if name == "log1p_over" else -50.0
    points = np.concatenate([sizes, -sizes])
    points = points[points > lowest].astype(dtype)
    with mpmath.workdps(60):
        exact = [float(definition(mpmath.mpf(float(x)))) for x in points]
    assert_close(fn(jnp.asarray(points)), exact, rtol=16 * eps(dtype))
    assert fn(jnp.zeros((), dtype)) == at_zero
    if dtype == "float64":
        slope = jax.vmap(jax.grad(fn))
        points = points[::7]
        with mpmath.workdps(60):
            exact = [float(mpmath.diff(definition, mpmath.mpf(float(x)))) for x in points]
        chosen = np.abs(points) > 1e-15  # There the difference quotient is good to 1e-30.
        got = slope(jnp.asarray(points))
        assert_close(got[chosen], np.array(exact)[chosen], rtol=1e-9, atol=0)
        with jax.debug_nans(True):
            for order in (jax.grad(fn), jax.grad(jax.grad(fn))):
                assert jnp.isfinite(order(0.0))


@every_wide_dtype
@pytest.mark.parametrize("compiled", [False, True])
def test_log1p_rounds_little_more_than_once(dtype, compiled):
    rng = np.random.default_rng(4)
    points = np.concatenate(
        [
            rng.uniform(-1, 3, 2000),
            10.0 ** rng.uniform(-30, 30, 1000),
            -(10.0 ** rng.uniform(-30, 0, 1000)),
            1 / np.sqrt(2) - 1 + rng.standard_normal(100) * 1e-6,
            2 * np.sqrt(2) - 1 + rng.standard_normal(100) * 1e-6,
            [0.0, float(np.finfo(dtype).max), -1 + eps(dtype)],
        ]
    ).astype(dtype)
    points = points[points > -1]
    with jax.disable_jit(not compiled):
        rounded = np.asarray(_elementary.log1p(jnp.asarray(points)))
    with mpmath.workdps(40):
        for x, y in zip(points, rounded, strict=True):
            true = mpmath.log1p(mpmath.mpf(float(x)))
            unit = np.spacing(np.abs(y))
            assert abs(mpmath.mpf(float(y)) - true) <= 0.9 * unit


def test_log1p_at_its_ends():
    points = jnp.array([-1.0, -2.0, -jnp.inf, jnp.inf, jnp.nan, 0.0])
    exact = [-np.inf, np.nan, np.nan, np.inf, np.nan, 0.0]
    np.testing.assert_array_equal(_elementary.log1p(points), exact)
    slope = jax.grad(lambda x: jnp.sum(_elementary.log1p(x)))(jnp.array([0.0, 1.0, 1e9, -0.75]))
    assert_close(slope, [1.0, 0.5, 1 / (1 + 1e9), 4.0], rtol=8 * eps("float64"))
