"""One edge policy for every map: what is dropped, what is kept, and all their derivatives.

Dropped entries (-inf, or False in `where`) have weight 0 and derivative 0, whatever stands
there. A slice that keeps nothing has no weight at all. A kept NaN is seen. A kept +inf is
the limit: the infinite entries share the mass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.helpers import INF, NAN, assert_close, assert_same, nan_makers

HUGE = float(np.finfo("float64").max)

MAPS = {
    "softmax": sj.softmax,
    "sparsemax": sj.sparsemax,
    "entmax15": sj.entmax15,
    "entmax 1": functools.partial(sj.entmax, alpha=1.0),
    "entmax 1.25": functools.partial(sj.entmax, alpha=1.25),
    "entmax 3": functools.partial(sj.entmax, alpha=3.0),
    "capped": functools.partial(sj.soft_top_k, k=1.0, kind="capped"),
    "sigmoid": functools.partial(sj.soft_top_k, k=1.0, kind="sigmoid"),
    "laplace": functools.partial(sj.soft_top_k, k=1.0, kind="laplace"),
}
every_map = pytest.mark.parametrize("name", MAPS)

# Scores so far apart that every map answers the same; what is kept; the answer.
DEFINED = [
    ([-INF, -INF], [True, True], [0.0, 0.0]),
    ([1.0, 2.0], [False, False], [0.0, 0.0]),
    ([NAN, INF], [False, False], [0.0, 0.0]),
    ([NAN, 0.0], [False, True], [0.0, 1.0]),
    ([INF, 0.0], [False, True], [0.0, 1.0]),
    ([HUGE, 0.0], [False, True], [0.0, 1.0]),
    ([-INF, 0.0], [True, True], [0.0, 1.0]),
    ([-INF, 0.0, 0.0], [True, True, True], [0.0, 0.5, 0.5]),
    ([INF, 0.0], [True, True], [1.0, 0.0]),
    ([INF, 0.0, INF, -INF], [True, True, True, True], [0.5, 0.0, 0.5, 0.0]),
    ([INF, INF, 1.0], [True, False, True], [1.0, 0.0, 0.0]),
    ([3.0], [True], [1.0]),
    ([INF], [True], [1.0]),
    ([-INF], [True], [0.0]),
    ([3.0], [False], [0.0]),
    ([HUGE, HUGE, -INF], [True, True, True], [0.5, 0.5, 0.0]),
    ([5e-324, 5e-324], [True, True], [0.5, 0.5]),
]
FAR = [([HUGE, -HUGE], [True, True], [1.0, 0.0]), ([1e4, 0.0], [True, True], [1.0, 0.0])]


WIDTH = 4
TOP_K = ("capped", "sigmoid", "laplace")


def cases(name):
    """Logits, mask and answers `[cases, WIDTH]`; dropped entries fill the shorter ones."""
    chosen = DEFINED
    if name not in ("sigmoid", "laplace"):  # Their weights are one at no finite distance.
        chosen = chosen + FAR
    if name in TOP_K:  # No mass of one fits where nothing is kept.
        chosen = [case for case in chosen if any(case[2])]
    pad = lambda values, fill: values + [fill] * (WIDTH - len(values))
    columns = zip(
        *((pad(z, NAN), pad(w, False), pad(p, 0.0)) for z, w, p in chosen), strict=True
    )
    return [jnp.array(column) for column in columns]


def _arrays(*lists):
    return [jnp.array(values) for values in lists]


@every_map
def test_values(name):
    fn = MAPS[name]
    logits, keep, expected = cases(name)
    with jax.debug_nans(True):
        assert_close(fn(logits, where=keep), expected, rtol=1e-15, atol=0)
        for case in [([3.0], [True], [1.0]), ([INF], [True], [1.0]), ([0.0], [True], [1.0])]:
            z, w, p = _arrays(*case)
            assert_close(fn(z, where=w), p, rtol=0)
        if name not in TOP_K:
            assert fn(jnp.array([-INF])) == 0
            assert fn(jnp.array([3.0]), where=jnp.array([False])) == 0


@every_map
def test_derivatives(name):
    """Finite in every mode and order, zero for dropped entries and for certain outcomes."""
    fn = MAPS[name]
    call = lambda z, w: fn(z, where=w)
    logits, keep, expected = cases(name)
    live = keep & (logits != -INF)
    forward, reverse = jax.jacfwd(call), jax.jacrev(call)
    many = lambda f: jax.jit(jax.vmap(f))(logits, keep)
    with jax.debug_nans(True):
        jacobians = many(forward)
        assert_close(many(reverse), jacobians, rtol=0, atol=1e-15)
        hessians = many(jax.jacfwd(reverse))
        assert_close(many(jax.jacrev(reverse)), hessians, rtol=0, atol=1e-15)
    assert jnp.isfinite(jacobians).all()
    assert jnp.isfinite(hessians).all()
    for jacobian, kept, p in zip(jacobians, live, expected, strict=True):
        assert (jacobian[~kept] == 0).all()
        assert (jacobian[:, ~kept] == 0).all()
        # Rows of a Jacobian of a map onto a simplex sum to zero.
        assert_close(jacobian.sum(0), np.zeros(WIDTH), rtol=0, atol=1e-15)
        if (p % 1 == 0).all() and name not in ("sigmoid", "laplace"):
            assert (jacobian == 0).all()


@every_map
def test_dropped_places_do_not_leak(name):
    """A NaN tangent, or cotangent, of a dropped entry goes no further."""
    fn = MAPS[name]
    logits, keep = _arrays([NAN, 0.3, -INF, 0.1, INF], [False, True, True, True, False])
    live = keep & (logits != -INF)
    call = functools.partial(fn, where=keep)
    clean, dirty = jnp.where(live, 1.5, 0.0).at[1].set(-1.0), jnp.where(live, 1.5, NAN)
    dirty = dirty.at[1].set(-1.0)
    out_dot = jax.jvp(call, (logits,), (clean,))[1]
    assert jnp.isfinite(out_dot).all()
    assert_same(jax.jvp(call, (logits,), (dirty,))[1], out_dot)
    pullback = jax.vjp(call, logits)[1]
    (bar,) = pullback(clean)
    assert jnp.isfinite(bar).all()
    assert_same(pullback(dirty)[0], bar)
    # The second derivative in the same way.
    directional = lambda z, t: jax.jvp(call, (z,), (t,))[1]
    second = jax.jvp(lambda z: directional(z, dirty), (logits,), (dirty,))[1]
    assert jnp.isfinite(second).all()


@every_map
def test_a_kept_nan_is_seen(name):
    fn = MAPS[name]
    for logits in ([NAN, 0.0, 1.0], [NAN, INF, 1.0], [NAN, NAN, NAN], [NAN, -1e5, 1e5]):
        assert jnp.isnan(fn(jnp.array(logits))).all(), logits
    # In its own slice only, and not in the dropped places of that slice.
    logits, keep = _arrays([[NAN, 0.0], [0.0, 0.0]], [[True, True], [True, True]])
    assert_close(fn(logits, where=keep), [[NAN, NAN], [0.5, 0.5]], rtol=1e-15)
    out = fn(jnp.array([NAN, -INF, 1.0, 2.0]), where=jnp.array([True, True, False, True]))
    assert_close(out, [NAN, 0.0, 0.0, NAN], rtol=0)


@every_map
def test_empty_shapes(name):
    fn = MAPS[name]
    with jax.debug_nans(True):
        for shape, axis in [((0, 3), -1), ((0, 3), 1), ((2, 0, 3), 2), ((0,), None)][:3]:
            out = fn(jnp.zeros(shape), axis=axis)
            assert out.shape == shape
            grad = jax.grad(lambda z, a=axis: jnp.sum(fn(z, axis=a)))(jnp.zeros(shape))
            assert grad.shape == shape
        if name not in TOP_K:
            for shape, axis in [((3, 0), -1), ((0,), None), ((0, 3), 0), ((0, 3), (0, 1))]:
                assert fn(jnp.zeros(shape), axis=axis).shape == shape
                grad = jax.grad(lambda z, a=axis: jnp.sum(fn(z, axis=a)))(jnp.zeros(shape))
                assert grad.shape == shape


@pytest.mark.parametrize("name", [n for n in MAPS if n not in TOP_K])
def test_ends_of_the_temperature(name):
    """0 shares the mass among the largest kept, inf among all kept; no derivative there."""
    fn = MAPS[name]
    logits, keep = _arrays(
        [[1.0, 3.0, 3.0, 9.0], [-INF, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]],
        [[True, True, True, False], [True, True, True, True], [False] * 4],
    )
    cold = [[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 4]
    hot = [[1 / 3, 1 / 3, 1 / 3, 0.0], [0.0, 1 / 3, 1 / 3, 1 / 3], [0.0] * 4]
    call = lambda z, t: fn(z, where=keep, temperature=t)
    first = [mode(call, argnums=(0, 1)) for mode in (jax.jacfwd, jax.jacrev)]
    second = jax.jacfwd(jax.jacrev(call, argnums=1), argnums=1)
    derivatives = [jax.jit(derivative) for derivative in (*first, second)]
    for temperature, expected in ((0.0, cold), (INF, hot)):
        for options in (temperature, jnp.asarray(temperature), jnp.full((3, 1), temperature)):
            with jax.debug_nans(True):
                assert_close(call(logits, options), expected, rtol=1e-15)
        with jax.debug_nans(True):
            for derivative in derivatives:
                for part in jax.tree.leaves(derivative(logits, jnp.asarray(temperature))):
                    assert (part == 0).all()


@pytest.mark.parametrize("name", [n for n in MAPS if n not in TOP_K])
def test_a_difference_beyond_the_largest_number(name):
    fn = MAPS[name]
    logits = jnp.array([HUGE, -HUGE, -INF])
    assert_close(fn(logits, temperature=INF), [0.5, 0.5, 0.0], rtol=1e-15)
    expected = fn(jnp.array([1.0, 0.0, -INF]))
    assert_close(fn(logits / 2, temperature=HUGE), expected, rtol=1e-15)
    grad = jax.grad(lambda z: fn(z, temperature=HUGE)[0])(logits)
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_probs_of_such_a_difference(dtype):
    huge = float(jnp.finfo(dtype).max)
    logits = jnp.array([huge, -huge, 0.0, -INF], dtype)
    out = sj.log_softmax(logits, temperature=7.0)
    expected = [0.0, -huge / 3.5, -huge / 7, -INF]
    assert_close(out, np.array(expected, dtype), rtol=2 * float(jnp.finfo(dtype).eps))


def test_log_probs_without_weight_move_with_the_temperature():
    """d log p / dT = -(z - <p, z>) / T^2, also where p is 0 as a float."""
    logits = jnp.array([0.0, 1.0, -5000.0])
    _, slope = jax.jvp(lambda t: sj.log_softmax(logits, temperature=t), (2.0,), (1.0,))
    mean = 1 / (1 + np.exp(-0.5))
    assert_close(slope, (mean - np.asarray(logits)) / 4, rtol=1e-14)


def test_soft_top_k_of_close_logits_at_temperature_0():
    """At temperature 0 a difference below 1 separates logits too."""
    out = sj.soft_top_k(jnp.array([0.1, 0.3, 0.3, 0.9]), 2, temperature=0.0)
    assert_close(out, [0.0, 0.5, 0.5, 1.0], rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capped", "sigmoid", "laplace"])
def test_ends_of_the_temperature_of_soft_top_k(kind):
    logits = jnp.array([[1.0, 3.0, 3.0, 9.0], [5.0, 2.0, 1.0, 0.0]])
    call = lambda t: sj.soft_top_k(logits, 2, kind=kind, temperature=t)
    with jax.debug_nans(True):
        assert_close(call(0.0), [[0.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.0, 0.0]], rtol=1e-15)
        assert_close(call(INF), np.full((2, 4), 0.5), rtol=1e-15)
        for temperature in (0.0, INF):
            for mode in (jax.jacfwd, jax.jacrev):
                assert (mode(call)(temperature) == 0).all()


@pytest.mark.slow
@every_map
def test_temperatures_between_slices(name):
    """0, a number and inf side by side: each slice as if alone."""
    fn = MAPS[name]
    logits = jnp.array([[0.6, 0.8, 0.5]] * 3)
    temperature = jnp.array([[0.0], [0.8], [INF]])
    out = fn(logits, temperature=temperature)
    alone = [fn(logits[i], temperature=temperature[i, 0]) for i in range(3)]
    assert_close(out, np.stack(alone), rtol=1e-15)
    grad = jax.grad(lambda z: jnp.sum(jnp.sin(fn(z, temperature=temperature))))(logits)
    assert jnp.isfinite(grad).all()
    assert (grad[jnp.array([0, 2])] == 0).all()
    assert (grad[1] != 0).any()


@every_map
def test_no_nan_is_made_on_the_way(name):
    """Every single operation is checked, not the result alone."""
    fn = MAPS[name]
    logits, keep = _arrays([0.0, -INF, 1.0, 0.25], [True, True, False, True])
    arguments = [(logits, keep, t) for t in (0.0, 0.5, INF)]
    everything, nothing = jnp.ones(4, bool), jnp.zeros(4, bool)
    if name not in TOP_K:
        arguments += [(jnp.full(4, -INF), everything, 1.0), (logits, nothing, 1.0)]
    arguments += [(jnp.array([INF, 0.0, INF, -INF]), everything, 1.0)]
    arguments += [(jnp.array([HUGE, -HUGE, 0.0, 0.0]), everything, 1.0)]
    for z, w, t in arguments:
        call = lambda z, t, w=w: fn(z, where=w, temperature=t)
        bar = jnp.arange(1.0, 1.0 + len(z))
        pull = lambda z, t, bar, call=call: jax.vjp(call, z, t)[1](bar)
        push = lambda z, t, dot, call=call: jax.jvp(call, (z, t), (dot, 1.0))
        for f in (pull, push):
            assert nan_makers(f, z, t, bar) == []


def test_the_look_for_nans_sees_one():
    masked = lambda x: jnp.where(x > 0, jnp.sqrt(x), jnp.nan_to_num(jnp.nan))
    assert nan_makers(jax.jit(masked), jnp.array([1.0, -1.0])) == ["sqrt"]
    assert nan_makers(jax.jit(masked), jnp.array([1.0, 2.0])) == []


LOG_CASES = [
    ([-INF, -INF], [True, True], [-INF, -INF]),
    ([1.0, 2.0], [False, False], [-INF, -INF]),
    ([NAN, 0.0], [False, True], [-INF, 0.0]),
    ([INF, 0.0], [False, True], [-INF, 0.0]),
    ([-INF, 0.0, 0.0], [True, True, True], [-INF, -np.log(2), -np.log(2)]),
    ([INF, 0.0], [True, True], [0.0, -INF]),
    ([INF, 0.0, INF], [True, True, True], [-np.log(2), -INF, -np.log(2)]),
    ([3.0], [True], [0.0]),
    ([1e4, 0.0], [True, True], [0.0, -1e4]),
    ([HUGE / 4, -HUGE / 4], [True, True], [0.0, -HUGE / 2]),
    ([HUGE, -HUGE], [True, True], [0.0, -INF]),
]


@pytest.mark.parametrize("case", LOG_CASES, ids=str)
def test_log_softmax(case):
    logits, keep, expected = _arrays(*case)
    live = keep & (logits != -INF)
    call = functools.partial(sj.log_softmax, where=keep)
    with jax.debug_nans(True):
        assert_close(call(logits), expected, rtol=1e-15)
        jacobian = jax.jacfwd(call)(logits)
        assert_close(jax.jacrev(call)(logits), jacobian, rtol=0, atol=1e-15)
        hessian = jax.jacfwd(jax.jacrev(call))(logits)
    assert jnp.isfinite(jacobian).all()
    assert jnp.isfinite(hessian).all()
    assert (jacobian[~live] == 0).all()
    assert (jacobian[:, ~live] == 0).all()
    dirty = jnp.where(live, 1.0, NAN)
    assert jnp.isfinite(jax.jvp(call, (logits,), (dirty,))[1]).all()
    assert jnp.isfinite(jax.vjp(call, logits)[1](dirty)[0]).all()


def test_log_softmax_sees_a_kept_nan_and_has_ends_of_temperature():
    assert jnp.isnan(sj.log_softmax(jnp.array([NAN, 0.0, INF]))).all()
    logits = jnp.array([1.0, 3.0, 3.0, -INF])
    with jax.debug_nans(True):
        cold = [-INF, -np.log(2), -np.log(2), -INF]
        assert_close(sj.log_softmax(logits, temperature=0.0), cold, rtol=1e-15)
        hot = [-np.log(3)] * 3 + [-INF]
        assert_close(sj.log_softmax(logits, temperature=INF), hot, rtol=1e-15)
        for temperature in (0.0, INF):
            call = lambda z, t: sj.log_softmax(z, temperature=t)
            for argument in (0, 1):
                jacobian = jax.jacrev(call, argnums=argument)(logits, temperature)
                assert jnp.isfinite(jacobian).all()
            assert (jax.jacfwd(call, argnums=1)(logits, temperature) == 0).all()
