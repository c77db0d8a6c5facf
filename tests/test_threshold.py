"""The algebra that all maps share: J = diag(w) - w w^T / W, with w from p alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.helpers import assert_close, draw, eps

# Each map with its w = f' and its w2 = f'' at p.
MAPS = {
    "softmax": (sj.softmax, lambda p: p, lambda p: p),
    "sparsemax": (sj.sparsemax, lambda p: (p > 0).astype(p.dtype), lambda p: 0 * p),
    "entmax15": (sj.entmax15, jnp.sqrt, lambda p: jnp.where(p > 0, 0.5, 0.0)),
    "entmax 1.25": (
        functools.partial(sj.entmax, alpha=1.25),
        lambda p: p**0.75,
        lambda p: 0.75 * p**0.5,
    ),
    "entmax 1": (functools.partial(sj.entmax, alpha=1.0), lambda p: p, lambda p: p),
    "capped": (
        functools.partial(sj.soft_top_k, k=2.5, kind="capped"),
        lambda p: ((p > 0) & (p < 1)).astype(p.dtype),
        lambda p: 0 * p,
    ),
    "sigmoid": (
        functools.partial(sj.soft_top_k, k=2.5, kind="sigmoid"),
        lambda p: p * (1 - p),
        lambda p: p * (1 - p) * (1 - 2 * p),
    ),
    "laplace": (
        functools.partial(sj.soft_top_k, k=2.5, kind="laplace"),
        lambda p: jnp.minimum(p, 1 - p),
        lambda p: jnp.where(p < 0.5, p, -(1 - p)),
    ),
}
every_map = pytest.mark.parametrize("name", MAPS)


@every_map
def test_jacobian(name):
    fn, slope, _ = MAPS[name]
    for seed in range(4):
        logits = jnp.asarray(draw(seed, (7,), scale=0.3)[0])
        w = slope(fn(logits))
        expected = jnp.diag(w) - jnp.outer(w, w) / w.sum()
        for mode in (jax.jacfwd, jax.jacrev):
            # w is a power of p, so it carries the error of a small p.
            assert_close(mode(fn)(logits), expected, rtol=0, atol=64 * eps("float64"))
        assert jnp.abs(expected).max() > 1e-2


@every_map
def test_second_derivative(name):
    """p'' = w2 (x' - tau')^2 - w tau'', tau'' = <w2, (x' - tau')^2> / W."""
    fn, slope, curvature = MAPS[name]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logits = jnp.asarray(draw(seed, (7,), scale=0.3)[0])
        x_dot = jnp.asarray(rng.standard_normal(7))
        p = fn(logits)
        w, w2 = slope(p), curvature(p)
        tau_dot = (w @ x_dot) / w.sum()
        square = (x_dot - tau_dot) ** 2
        expected = w2 * square - w * (w2 @ square) / w.sum()
        first = lambda z, t=x_dot: jax.jvp(fn, (z,), (t,))[1]
        actual = jax.jvp(first, (logits,), (x_dot,))[1]
        assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gap", [20, 50, 60, 70, 80])
def test_second_derivatives_of_small_weights(gap):
    """Whichever mode comes last, every component has its digits, however small it is."""
    z = np.array([0, -1, -gap, -3], np.float32)
    d, c = (draw(seed, (4,), dtype="float32")[0] for seed in (1, 2))
    p = np.exp(z.astype(float))
    p /= p.sum()
    p_dot = p * (d - p @ d)
    expected = p_dot * (c - p @ c) - p * (p_dot @ c)
    loss = lambda z: jnp.vdot(sj.softmax(z), c)
    grad, slope = jax.grad(loss), lambda z: jax.jvp(loss, (z,), (jnp.asarray(d),))[1]
    for product in (
        lambda z: jax.jvp(grad, (z,), (jnp.asarray(d),))[1],
        jax.grad(slope),
        jax.grad(lambda z: jnp.vdot(grad(z), d)),
        lambda z: jax.jacfwd(jax.jacfwd(loss))(z) @ d,
        lambda z: jax.jacrev(jax.jacrev(loss))(z) @ d,
    ):
        assert_close(product(jnp.asarray(z)), expected, rtol=3e-6, atol=1e-38)


@pytest.mark.slow
@every_map
def test_jacobian_is_symmetric_and_has_no_negative_direction(name):
    """It is the Hessian of a convex function, and a shift changes nothing."""
    fn, _, _ = MAPS[name]
    logits = jnp.asarray(draw(9, (3, 6), scale=2.0)[0])
    for row in logits:
        jacobian = jax.jacrev(fn)(row)
        assert_close(jacobian, jacobian.T, rtol=0, atol=8 * eps("float64"))
        assert_close(jacobian.sum(-1), np.zeros(6), rtol=0, atol=16 * eps("float64"))
        assert jnp.linalg.eigvalsh(jacobian).min() > -1e-14


@every_map
def test_jacobian_in_float32_keeps_its_digits(name):
    fn, _, _ = MAPS[name]
    logits, keep = draw(10, (8,), scale=1.0, dtype="float32")
    keep[:4] = True
    call = functools.partial(fn, where=keep)
    exact = jax.jacfwd(call)(jnp.asarray(logits.astype("float64")))
    for mode in (jax.jacfwd, jax.jacrev):
        actual = mode(call)(jnp.asarray(logits))
        assert actual.dtype == jnp.float32
        assert_close(actual, exact, rtol=0, atol=16 * eps("float32"))


def rows_of(seed, shape, peak=None, offset=0.0):
    """float32 logits and tangents u; p, and the gaps u_i - u_j, in float64."""
    logits, tangents = draw(seed, shape, dropped=0.0)[0], draw(seed + 1, shape)[0]
    if peak is not None:
        logits[:, 2] = peak
    logits, tangents = logits.astype(np.float32), (offset + tangents).astype(np.float32)
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    gaps = tangents[:, :, None].astype(np.float64) - tangents[:, None, :]
    return logits, tangents, p / p.sum(-1, keepdims=True), gaps


def pushed(p, gaps):
    """p_i (u_i - <p, u>), as p_i times the sum of p_j (u_i - u_j), in which nothing cancels."""
    return p * np.einsum("rij,rj->ri", gaps, p)


@pytest.mark.optimized
@pytest.mark.parametrize("peak", [3.0, 10.0, 16.0, 20.0, 30.0])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_the_derivative_at_a_confident_peak_keeps_its_digits(peak, mode):
    logits, weights, p, gaps = rows_of(12, (200, 7), peak)
    missing = p @ (1 - np.eye(7))  # 1 - p
    unit = eps("float32") * p * missing * np.abs(weights).max(-1, keepdims=True)
    fn = mode(lambda z, u: jnp.vdot(u, sj.softmax(z)))
    for got in (jax.vmap(fn)(logits, weights), jax.jit(jax.vmap(fn))(logits, weights)):
        assert got.dtype == jnp.float32
        assert (np.abs(np.asarray(got) - pushed(p, gaps)) <= 8 * unit).all()


@pytest.mark.optimized
@pytest.mark.parametrize("mode", [jax.jvp, jax.vjp], ids=lambda mode: mode.__name__)
def test_derivatives_of_weights_forget_an_offset(mode):
    """Rewards near 10000 that differ by 1: what is the same in all does not count."""
    logits, weights, p, gaps = rows_of(14, (200, 5), offset=1e4)
    if mode is jax.jvp:
        got = jax.jvp(sj.softmax, (logits,), (weights,))[1]
    else:
        (got,) = jax.vjp(sj.softmax, logits)[1](weights)
    unit = eps("float32") * pushed(p, np.abs(gaps))
    assert (np.abs(np.asarray(got) - pushed(p, gaps)) <= 8 * unit).all()


@pytest.mark.slow
@every_map
def test_a_long_slice_has_a_jacobian_that_annihilates_shifts(name):
    """n = 10000, where a careless mean of tangents would drift."""
    fn, _, _ = MAPS[name]
    logits = jnp.asarray(draw(11, (10_000,), scale=1.0)[0])
    tangent = jnp.ones(10_000)
    out_dot = jax.jvp(fn, (logits,), (tangent,))[1]
    assert jnp.abs(out_dot).max() < 1e-12
    assert abs(jnp.sum(jax.jvp(fn, (logits,), (jnp.sin(logits),))[1])) < 1e-11
