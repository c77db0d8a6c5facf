"""Estimators: their mean against the gradient by enumeration, and the order of their bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from tests.helpers import DTYPES, INF, NAN, assert_close, draw, g_test

KEY = jax.random.key(0)
LOGITS = jnp.array([0.5, -1.0, 2.0, 0.3])
PROBS = jax.nn.softmax(LOGITS)
RNG = np.random.default_rng(0)
LINEAR, SQUARE = jnp.asarray(RNG.standard_normal(4)), jnp.asarray(RNG.standard_normal((4, 4)))
CLASSES = jnp.eye(4)

OBJECTIVES = {
    "linear": lambda y: LINEAR @ y,
    "quadratic": lambda y: LINEAR @ y + y @ SQUARE @ y,
    "cubic": lambda y: LINEAR @ y + (y @ SQUARE @ y) * (y @ LINEAR),
}
SAMPLERS = {
    "soft": lambda key, z: sj.gumbel_softmax(key, z, temperature=0.6),
    "hard": lambda key, z: sj.gumbel_softmax(key, z, temperature=0.6, hard=True),
    "averaged": lambda key, z: sj.rao_blackwell_gumbel_softmax(key, z, temperature=0.6),
    "reinmax": lambda key, z: sj.reinmax(key, z),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def exact_gradient(objective, logits=LOGITS):
    values = jax.vmap(objective)(jnp.eye(len(logits)))
    return np.asarray(jax.grad(lambda z: jax.nn.softmax(z) @ values)(logits))


def gradients(sampler, objective, num, logits=LOGITS, seed=1):
    """`[num, n]`, one gradient a key."""
    of_key = lambda key: jax.grad(lambda z: objective(sampler(key, z)))(logits)
    return np.asarray(jax.jit(jax.vmap(of_key))(jax.random.split(jax.random.key(seed), num)))


def z_scores(samples, expected):
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    return np.abs(samples.mean(axis=0) - expected) / error


def by_class(sampler, objective):
    """The mean gradient, exactly, of a sampler whose gradient depends on its class alone."""
    keys = jax.random.split(KEY, 200)
    labels = np.asarray(jax.jit(jax.vmap(lambda k: jnp.argmax(sampler(k, LOGITS))))(keys))
    keys = keys[jnp.array([np.flatnonzero(labels == label)[0] for label in range(4)])]
    of_key = lambda key: jax.grad(lambda z: objective(sampler(key, z)))(LOGITS)
    return np.asarray(PROBS @ jax.jit(jax.vmap(of_key))(keys))


def plain_straight_through(key, logits):
    hard = jax.nn.one_hot(sj.sample(key, logits), 4, dtype=logits.dtype)
    return sj.straight_through(sj.softmax(logits), hard)


def orders_of_bias(sampler):
    """Of f(h y) for h = 1/16 and 1/32: how often the bias halves."""
    biases = []
    for h in (1 / 16, 1 / 32):
        objective = lambda y, h=h: (
            jnp.sum(jnp.exp(jnp.array([1.0, -2.0, 3.0, 0.5]) * h * y)) ** 2
        )
        bias = by_class(sampler, objective) - exact_gradient(objective)
        biases.append(np.abs(bias).max())
    return np.log2(biases[0] / biases[1])


@pytest.mark.slow
def test_reinmax_is_of_second_order():
    for name in ("linear", "quadratic"):
        objective = OBJECTIVES[name]
        assert_close(
            by_class(SAMPLERS["reinmax"], objective),
            exact_gradient(objective),
            rtol=1e-12,
            atol=1e-14,
        )
    assert 2.7 < orders_of_bias(SAMPLERS["reinmax"]) < 3.3


@pytest.mark.slow
def test_straight_through_is_of_first_order():
    objective = OBJECTIVES["linear"]
    got = by_class(plain_straight_through, objective)
    assert_close(got, exact_gradient(objective), rtol=1e-12, atol=1e-14)
    assert 1.7 < orders_of_bias(plain_straight_through) < 2.3


def test_reinmax_in_the_mean():
    samples = gradients(SAMPLERS["reinmax"], OBJECTIVES["quadratic"], 2**14)
    assert (z_scores(samples, exact_gradient(OBJECTIVES["quadratic"])) < 5).all()


def relaxed_gradient(objective, gap, temperature):
    """d/da E f(s, 1 - s) for s = sigmoid((a + L) / T) of logistic L, by the trapezium rule."""
    scaled = np.linspace(-40, 40, 40001)  # (a + L) / T
    s = 1 / (1 + np.exp(-scaled))
    weights = np.exp(-np.abs(temperature * scaled - gap))
    density = weights / (1 + weights) ** 2
    slope = np.asarray(jax.vmap(jax.grad(lambda s: objective(jnp.array([s, 1 - s]))))(s))
    return np.sum(slope * s * (1 - s) * density) * (scaled[1] - scaled[0])


@pytest.mark.slow
def test_gumbel_softmax_of_two_classes():
    """The mean is the gradient of the relaxed expectation, whose bias is of order T."""
    objective = lambda y: jnp.array([1.0, -2.0]) @ y + 3 * y[0] ** 3
    logits = jnp.array([0.4, -0.2])
    for temperature in (0.2, 0.7):
        sampler = lambda key, z, t=temperature: sj.gumbel_softmax(key, z, temperature=t)
        samples = gradients(sampler, objective, 2**15, logits)
        expected = relaxed_gradient(objective, 0.6, temperature) * np.array([1, -1])
        assert (z_scores(samples, expected) < 5).all()
    exact = exact_gradient(objective, logits)[0]
    biases = [relaxed_gradient(objective, 0.6, t) - exact for t in (0.02, 0.01)]
    assert 1.8 < biases[0] / biases[1] < 2.2


@pytest.mark.slow
def test_averaging_over_the_noise():
    """The same mean as one draw of the noise, at a fraction of the variance."""
    one, many = (
        gradients(SAMPLERS[name], OBJECTIVES["quadratic"], 2**14, seed=seed)
        for seed, name in enumerate(("hard", "averaged"))
    )
    error = np.sqrt((one.var(axis=0) + many.var(axis=0)) / 2**14)
    assert (np.abs(one.mean(axis=0) - many.mean(axis=0)) < 5 * error).all()
    assert many.var(axis=0).sum() < 0.7 * one.var(axis=0).sum()


@pytest.mark.parametrize("name", ["hard", "averaged", "reinmax"])
def test_hard_samples_are_one_hot_with_the_right_rates(name):
    rows = jnp.broadcast_to(LOGITS.astype("float32"), (2**15, 4))
    out = np.asarray(SAMPLERS[name](KEY, rows))
    assert set(np.unique(out)) == {0, 1}
    assert (out.sum(-1) == 1).all()
    assert g_test(out.sum(0), np.asarray(PROBS)) > 1e-4


@every_sampler
def test_edges(name):
    logits = jnp.array(
        [[0.0, -INF, 1.0], [-INF, -INF, -INF], [NAN, 0.0, 0.0], [INF, 0.0, -INF], [1e30, 0, 0]]
    )
    sampler = SAMPLERS[name]
    out = sampler(KEY, logits)
    assert out[0, 1] == 0
    assert_close(jnp.sum(out, -1)[jnp.array([0, 3, 4])], [1, 1, 1], rtol=1e-14)
    assert not out[1].any()
    assert jnp.isnan(out[2]).all()
    assert_close(out[3:], [[1, 0, 0], [1, 0, 0]], rtol=0, atol=1e-80)
    clean = logits[jnp.array([0, 1, 3, 4])]
    with jax.debug_nans(True):
        loss = lambda z: jnp.sum(sampler(KEY, z) * jnp.arange(3.0)[None])
        for grad in (jax.grad(loss)(clean), jax.jacfwd(loss)(clean)):
            assert jnp.isfinite(grad).all()
            assert (grad[clean == -INF] == 0).all()
            assert grad[0].any()


@every_sampler
def test_dtypes_axes_and_transformations(name):
    sampler = SAMPLERS[name]
    for dtype in DTYPES:
        logits = jnp.asarray(draw(2, (3, 4), dtype=dtype)[0])
        assert sampler(KEY, logits).dtype == logits.dtype
    keys = jax.random.split(KEY, 3)
    logits = jnp.asarray(draw(2, (3, 4))[0])
    expected = jnp.stack(list(map(sampler, keys, logits)))
    assert_close(jax.vmap(sampler)(keys, logits), expected, rtol=1e-12, atol=1e-15)
    loss = lambda key, z: jnp.sum(sampler(key, z) ** 2 * jnp.arange(4.0))
    total = lambda z: jax.lax.scan(
        jax.checkpoint(lambda c, args: (c + loss(*args), None)), 0.0, (keys, z)
    )[0]
    expected = jax.vmap(jax.grad(loss, argnums=1))(keys, logits)
    assert_close(jax.jit(jax.grad(total))(logits), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_axis_and_mask():
    where = jnp.array([[True, False, True, True]])
    for fn in (sj.gumbel_softmax, sj.rao_blackwell_gumbel_softmax, sj.reinmax):
        out = fn(KEY, jnp.zeros((4, 50)), axis=0, where=where.T)
        assert out.shape == (4, 50)
        assert_close(out.sum(0), np.ones(50), rtol=1e-14)
        assert not out[1].any()


def test_limits_of_the_temperature():
    logits = jnp.broadcast_to(LOGITS, (500, 4))
    with jax.debug_nans(True):
        cold = sj.gumbel_softmax(KEY, logits, temperature=0.0)
        assert set(np.unique(cold)) == {0, 1}
        assert_close(cold, sj.gumbel_softmax(KEY, logits, temperature=0.7, hard=True), rtol=0)
        hot = sj.gumbel_softmax(KEY, logits, temperature=INF)
        assert_close(hot, np.full((500, 4), 0.25), rtol=1e-15)
        loss = lambda t: jnp.sum(sj.gumbel_softmax(KEY, logits[0], temperature=t)[0])
        assert jax.grad(loss)(0.0) == 0


@pytest.mark.slow
def test_gumbel_softmax_has_its_true_derivative():
    fn = lambda z, t: sj.gumbel_softmax(KEY, z, temperature=t)
    check_grads(fn, (LOGITS, 0.7), order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_relaxed_density_integrates_to_one(size, temperature):
    """Over the simplex, in logits of y, where the density has no poles."""
    logits = jnp.array([0.3, -0.4, 0.8])[:size]
    line = np.linspace(-50, 50, 1001)
    grids = np.meshgrid(*[line] * (size - 1), indexing="ij")
    scores = np.stack([*grids, np.zeros_like(grids[0])], -1)
    log_y = jnp.asarray(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    rows = jnp.broadcast_to(logits, log_y.shape)
    log_density = sj.relaxed_log_density(rows, log_y, temperature=temperature)
    # The volume of y next to that of its logits is the product of all entries.
    weights = np.exp(np.asarray(log_density + jnp.sum(log_y, -1)))
    assert_close(weights.sum() * 0.1 ** (size - 1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_logarithms_of_relaxed_samples(hard):
    logits = jnp.array([[0.0, -INF, 1.0, -2.0], [-INF] * 4, [3.0, 0.0, 0.5, 0.0]])
    options = {"temperature": 0.4, "hard": hard}
    samples, logs = sj.gumbel_softmax(KEY, logits, return_log=True, **options)
    np.testing.assert_array_equal(samples, sj.gumbel_softmax(KEY, logits, **options))
    relaxed = sj.gumbel_softmax(KEY, logits, temperature=0.4)
    assert_close(jnp.exp(logs), relaxed, rtol=1e-13)
    assert sj.gumbel_softmax(KEY, logits.astype("bfloat16"), return_log=True)[1].dtype == "f4"
    total = lambda z: jnp.sum(jnp.where(z == -INF, 0, call(z)) * jnp.arange(4.0)[None])
    call = lambda z: sj.gumbel_softmax(KEY, z, return_log=True, **options)[1]
    by_logs = jax.grad(total)(logits)
    call = lambda z: jnp.log(
        jnp.where(z == -INF, 1, sj.gumbel_softmax(KEY, z, temperature=0.4))
    )
    assert_close(by_logs, jax.grad(total)(logits), rtol=1e-12, atol=1e-14)


def test_relaxed_density_of_own_samples():
    """At a low temperature samples round to 0, but their logarithms do not."""
    noisy = jnp.stack([LOGITS] * 100) + sj.gumbel(KEY, (100, 4))
    log_y = sj.log_softmax(noisy, temperature=0.01)
    out = sj.relaxed_log_density(jnp.stack([LOGITS] * 100), log_y, temperature=0.01)
    assert jnp.isfinite(out).all()
    assert (out > 0).all()
    one = sj.relaxed_log_density(jnp.array([1.0, -INF]), jnp.array([0.0, NAN]), temperature=0.5)
    assert one == 0
    _, drawn = sj.gumbel_softmax(
        KEY, jnp.stack([LOGITS] * 100), temperature=0.01, return_log=True
    )
    assert_close(drawn, log_y, rtol=1e-13)
    narrow = sj.relaxed_log_density(LOGITS.astype("bfloat16"), log_y[0], temperature=0.5)
    assert narrow.dtype == jnp.float32


def test_wrong_arguments():
    z = jnp.zeros((2, 3))
    for error, match, call in [
        (TypeError, "`key` must be a key", lambda: sj.gumbel_softmax(z, z)),
        (TypeError, "`axis` must be one int", lambda: sj.reinmax(KEY, z, axis=None)),
        (ValueError, "`temperature` must be", lambda: sj.reinmax(KEY, z, temperature=-1.0)),
        (ValueError, "`temperature` of", lambda: sj.gumbel_softmax(KEY, z, temperature=z)),
        (TypeError, "`return_log` must be", lambda: sj.gumbel_softmax(KEY, z, return_log=1)),
        (
            ValueError,
            "`num_samples` must be at least 1",
            lambda: sj.rao_blackwell_gumbel_softmax(KEY, z, num_samples=0),
        ),
        (
            ValueError,
            "`log_samples` of shape",
            lambda: sj.relaxed_log_density(z, z[0], temperature=1.0),
        ),
    ]:
        with pytest.raises(error, match=match):
            call()
