"""entropy, kl_divergence and log_prob."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, draw, eps, finfo, wide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, -1, (0, 2), None])
def test_entropy(axis, dtype):
    for seed, scale in enumerate((1e-3, 1.0, 10.0)):
        logits, keep = draw(seed, (2, 3, 4), scale=scale, dtype=dtype)
        actual = sj.entropy(jnp.asarray(logits), axis=axis, where=keep)
        expected = oracles.entropy(logits, axis=axis, where=keep)
        assert actual.dtype == jnp.dtype(dtype)
        tiny = float(jnp.finfo(dtype).tiny)
        assert_close(actual, expected, rtol=16 * eps(dtype), atol=tiny)


def test_entropy_of_a_confident_choice_keeps_its_digits():
    """-p log p near p = 1 must not be a difference of ones."""
    for margin in (5.0, 20.0, 40.0, 80.0):
        logits = jnp.array([margin, 0.0, -1.0])
        assert_close(sj.entropy(logits), oracles.entropy(logits), rtol=16 * eps("float64"))


@pytest.mark.slow
def test_entropy_at_the_edges():
    cases = [
        ([0.0, 0.0, -INF], [True] * 3, np.log(2)),
        ([INF, 0.0, INF], [True] * 3, np.log(2)),
        ([NAN, 0.0, 0.0], [False, True, True], np.log(2)),
        ([1.0, 2.0, 3.0], [False] * 3, 0.0),
        ([-INF, -INF, -INF], [True] * 3, 0.0),
        ([4.0, 0.0, 0.0], [True, False, False], 0.0),
        ([1e4, 0.0, -1e4], [True] * 3, 0.0),
    ]
    logits, keep, expected = (jnp.array(column) for column in zip(*cases, strict=True))
    fn = lambda z, w: sj.entropy(z, where=w)
    many = lambda f: jax.jit(jax.vmap(f))(logits, keep)
    with jax.debug_nans(True):
        assert_close(many(fn), expected, rtol=1e-15)
        for mode in (jax.grad, jax.jacfwd, jax.hessian):
            derivative = many(mode(fn))
            assert jnp.isfinite(derivative).all()
            assert (derivative[~keep | (logits == -INF)] == 0).all()
    assert jnp.isnan(sj.entropy(jnp.array([NAN, 0.0])))
    assert sj.entropy(jnp.zeros((0, 3))).shape == (0,)
    assert_close(sj.entropy(jnp.zeros((2, 0))), [0.0, 0.0], rtol=0)


def test_entropy_gradient():
    """dH/dz = -p (log p + H)."""
    logits = jnp.asarray(draw(3, (6,), scale=2.0)[0])
    p, logs = sj.softmax(logits), sj.log_softmax(logits)
    expected = -p * (logs + sj.entropy(logits))
    assert_close(jax.grad(sj.entropy)(logits), expected, rtol=0, atol=4 * eps("float64"))
    assert_close(jax.grad(sj.entropy)(jnp.zeros(4)), np.zeros(4), rtol=0, atol=1e-16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_divergence(dtype):
    for seed, scale in enumerate((0.5, 2.0, 10.0)):
        p_logits, keep = draw(seed, (3, 6), scale=scale, dtype=dtype)
        q_logits, _ = draw(seed + 9, (3, 6), scale=scale, dtype=dtype)
        for axis in (0, -1, None):
            keep[0] = True
            args = jnp.asarray(p_logits), jnp.asarray(q_logits)
            actual = sj.kl_divergence(*args, axis=axis, where=keep)
            expected = oracles.kl_divergence(p_logits, q_logits, axis=axis, where=keep)
            # The terms cancel; their sizes are at most that of the largest |log p - log q|.
            size = 2 * scale * 6
            computed = "float32" if dtype in ("bfloat16", "float16") else dtype
            assert_close(actual, expected, rtol=eps(dtype), atol=eps(computed) * size)
            assert (actual >= 0).all()


@pytest.mark.slow
def test_kl_divergence_of_equals_is_zero():
    logits = jnp.asarray(draw(4, (3, 6), scale=5.0)[0])
    assert_close(sj.kl_divergence(logits, logits), np.zeros(3), rtol=0, atol=1e-16)
    shifted = jnp.round(logits * 64) / 64
    assert_close(sj.kl_divergence(shifted, shifted + 8.0), np.zeros(3), rtol=0, atol=1e-15)
    for argument in (0, 1):
        grad = jax.grad(lambda p, q: jnp.sum(sj.kl_divergence(p, q)), argnums=argument)
        assert_close(grad(logits, logits), np.zeros((3, 6)), rtol=0, atol=1e-15)


def test_kl_divergence_of_close_distributions_keeps_its_digits():
    """KL is about |d|^2 / 2, far below the rounding of one term."""
    logits = draw(5, (6,))[0]
    moved = logits + 1e-6 * draw(6, (6,))[0]
    actual = sj.kl_divergence(jnp.asarray(logits), jnp.asarray(moved))
    expected = oracles.kl_divergence(logits, moved)
    # A sum of signed terms of size 1e-6 each is good to 1e-6 eps.
    assert_close(actual, expected, rtol=0, atol=64e-6 * eps("float64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_kl_divergence_is_relatively_exact(offset, dtype):
    """Whatever the size of the divergence, and of a shift, which is free."""
    rng = np.random.default_rng(12)
    for n, scale, step in [(3, 1.0, 1e-3), (50, 1e-2, 1e-4), (50, 10.0, 0.1), (300, 3.0, 5.0)]:
        z = rng.standard_normal((4, n)) * scale
        moved = z + rng.standard_normal((4, n)) * step + offset
        z, moved = (x.astype(dtype) for x in (z, moved))
        z[0, 0] = moved[0, 0] = -INF
        actual = sj.kl_divergence(jnp.asarray(z), jnp.asarray(moved))
        expected = oracles.kl_divergence(z, moved)
        assert_close(actual, expected, rtol=16 * eps(dtype))


def test_kl_divergence_gradient_of_close_distributions():
    """In q it is q - p, with the digits of the difference."""
    p_logits = draw(13, (2, 40), scale=3.0)[0]
    q_logits = p_logits + 1e-6 * draw(14, (2, 40))[0]
    p, q = map(oracles.fast_softmax, (p_logits, q_logits))
    loss = lambda q: jnp.sum(sj.kl_divergence(jnp.asarray(p_logits), q))
    got = jax.grad(loss)(jnp.asarray(q_logits))
    # The reference has 64 bits: the rounded p and q would be off by up to 1e-16.
    assert_close(got, q - p, rtol=0, atol=1e-19)
    # A weight that is 0 beside p counts for nothing; its logit's derivative does not.
    far = jnp.array([0.0, -800.0])
    grad = jax.grad(lambda q: sj.kl_divergence(jnp.zeros(2), q))(far)
    assert_close(grad, [0.5, -0.5], rtol=1e-15)


@pytest.mark.slow
def test_kl_divergence_at_the_edges():
    cases = [
        ([0.0, 0.0], [0.0, -INF], [True, True], INF),
        ([0.0, -INF], [0.0, 0.0], [True, True], np.log(2)),
        ([0.0, -INF], [0.0, -INF], [True, True], 0.0),
        ([0.0, NAN], [0.0, INF], [True, False], 0.0),
        ([1.0, 2.0], [2.0, 1.0], [False, False], 0.0),
        ([-INF, -INF], [0.0, 0.0], [True, True], 0.0),
        ([INF, INF], [INF, INF], [True, True], 0.0),
        ([INF, 1.0], [0.0, 0.0], [True, True], np.log(2)),
        ([INF, -INF], [INF, INF], [True, True], np.log(2)),
    ]
    p, q, keep, expected = (jnp.array(column) for column in zip(*cases, strict=True))
    fn = lambda p, q, w: sj.kl_divergence(p, q, where=w)
    with jax.debug_nans(True):
        assert_close(fn(p, q, keep), expected, rtol=1e-15)
    p, q, keep = p[1:], q[1:], keep[1:]  # An infinite divergence has no derivative.
    with jax.debug_nans(True):
        for mode in (jax.grad, jax.jacfwd, jax.hessian):
            for argument in (0, 1):
                derivative = jax.jit(jax.vmap(mode(fn, argnums=argument)))(p, q, keep)
                assert jnp.isfinite(derivative).all()
    assert jnp.isnan(sj.kl_divergence(jnp.array([NAN, 0.0]), jnp.zeros(2)))
    assert jnp.isnan(sj.kl_divergence(jnp.zeros(2), jnp.array([NAN, 0.0])))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kl_divergence_where_q_has_no_weight(dtype):
    """The distance to an entry that p keeps counts in full, however far q is below its peak."""
    rng = np.random.default_rng(0)
    peaks = (50 * rng.standard_normal(200)).astype(dtype)
    for gap in (980, 999, 1000, 1001, 5000):
        q = jnp.asarray(np.stack([peaks, peaks - np.asarray(gap, dtype)], -1))
        apart = wide(q[:, 0]) - wide(q[:, 1])
        exact = apart / 2 - np.log(2)
        nats, slope = jax.vmap(jax.value_and_grad(sj.kl_divergence))(jnp.zeros_like(q), q)
        assert_close(nats, exact, rtol=4 * eps(dtype))
        assert_close(slope[:, 1], apart / 4, rtol=8 * eps(dtype))


def test_an_infinite_divergence_is_constant_to_every_derivative():
    p, q = jnp.array([0.3, 0.2, 0.0]), jnp.array([1.0, -INF, 0.0])
    fn = lambda p: sj.kl_divergence(p, q)
    assert_same(jax.hessian(lambda p: jnp.exp(-fn(p)))(p), jnp.zeros((3, 3)))
    primal = lambda p: jax.jvp(fn, (p,), (p,))[0]
    assert_same(jax.grad(primal)(p), jnp.zeros(3))


def test_kl_divergence_gradients():
    """In q it is q - p; in p it is p (log p - log q - KL)."""
    p_logits, q_logits = (jnp.asarray(draw(s, (6,))[0]) for s in (7, 8))
    p, q = sj.softmax(p_logits), sj.softmax(q_logits)
    grads = jax.grad(sj.kl_divergence, argnums=(0, 1))(p_logits, q_logits)
    ratio = jnp.log(p) - jnp.log(q)
    expected = p * (ratio - sj.kl_divergence(p_logits, q_logits))
    assert_close(grads[0], expected, rtol=0, atol=8 * eps("float64"))
    assert_close(grads[1], q - p, rtol=0, atol=4 * eps("float64"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_is_an_entry_of_log_softmax(dtype):
    logits, keep = draw(9, (3, 4, 5), scale=3.0, dtype=dtype)
    for axis in (0, 1, -1):
        rest = tuple(np.delete(logits.shape, axis))
        labels = np.random.default_rng(10).integers(0, logits.shape[axis], rest)
        actual = sj.log_prob(jnp.asarray(logits), labels, axis=axis, where=keep)
        expected = oracles.log_prob(logits, labels, axis=axis, where=keep)
        assert actual.dtype == jnp.dtype(dtype)
        assert_close(actual, expected, rtol=4 * eps(dtype))


def test_log_prob_labels():
    logits = jnp.array([0.0, 1.0, -INF, 2.0])
    keep = jnp.array([True, False, True, True])
    fn = lambda label: sj.log_prob(logits, jnp.asarray(label), where=keep)
    assert fn(1) == -INF
    assert fn(2) == -INF
    for label in (-1, 4, 100):
        assert jnp.isnan(fn(label)), label  # Never silently another class.
    assert_same(fn(3), sj.log_softmax(logits, where=keep)[3])
    assert sj.log_prob(jnp.zeros((0, 3)), jnp.zeros(0, int)).shape == (0,)
    small = sj.log_prob(jnp.zeros((2, 3)), jnp.array([0, 2], "uint8"))
    assert_close(small, [-np.log(3)] * 2, rtol=1e-15)
    assert jnp.isnan(sj.log_prob(jnp.zeros((2, 300)), jnp.array([-1, 0], "int8")))[0]


def test_log_prob_of_a_dropped_label_is_constant():
    logits = jnp.array([0.0, 1.0, -INF])
    for call in (sj.log_prob, sj.cross_entropy):
        for label in (2, 3):
            slope = jax.grad(lambda z, c=call, y=label: c(z, y) ** 2)(logits)
            np.testing.assert_array_equal(slope, np.zeros(3))
    assert not np.signbit(sj.log_prob(jnp.array([2e3, 0.0]), 0))  # It is 0, not -0.


@pytest.mark.parametrize("call", [sj.log_prob, sj.cross_entropy])
def test_a_dropped_entry_has_no_second_derivative(call):
    """This holds also where its tangent is infinite, as that of log(0) is."""
    total = lambda p: call(jnp.log(p), 0)
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        hessian = outer(inner(total))(jnp.array([0.2, 0.8, 0.0]))
        sign = 1 if call is sj.log_prob else -1
        assert_close(sign * hessian[:2, :2], np.array([[-24, 1], [1, 1.0]]), rtol=1e-12)


@pytest.mark.parametrize("call", [sj.log_prob, sj.cross_entropy])
def test_losses_of_labels_are_exported_for_any_number_of_classes(call):
    rows, classes = jax.export.symbolic_shape("rows, classes")
    shapes = [((rows, classes), jnp.float64), ((rows,), jnp.int32)]
    grad = jax.jit(jax.value_and_grad(lambda z, y: call(z, y).sum()))
    exported = jax.export.export(grad)(*(jax.ShapeDtypeStruct(*x) for x in shapes))
    args = jnp.asarray(draw(0, (3, 5))[0]), jnp.array([0, 4, 2], jnp.int32)
    for got, wanted in zip(exported.call(*args), grad(*args), strict=True):
        assert_close(got, wanted, rtol=1e-14, atol=1e-15)


def test_log_prob_derivatives():
    logits = jnp.asarray(draw(11, (6,), scale=3.0)[0])
    p = sj.softmax(logits)
    fn = lambda z: sj.log_prob(z, jnp.asarray(2))
    for mode in (jax.grad, jax.jacfwd):
        expected = jnp.eye(6)[2] - p
        assert_close(mode(fn)(logits), expected, rtol=0, atol=4 * eps("float64"))
    hessian = -(jnp.diag(p) - jnp.outer(p, p))
    assert_close(jax.hessian(fn)(logits), hessian, rtol=0, atol=8 * eps("float64"))
    dropped = jnp.array([0.0, -INF])
    with jax.debug_nans(True):
        grad = jax.grad(lambda z: sj.log_prob(z, jnp.asarray(1)))(dropped)
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["entropy", "policy_entropy"])
def test_gradient_where_the_entropy_is_nearly_constant(name, dtype):
    """Confident rows and nearly even ones: -p (z - <p, z>), to the last digits."""
    rows = [
        [20, 0, 1],
        [0, 1e-4, 0],
        [-60, 3, -1e4],
        [5, 5 + 1e-3, 5 - 1e-3],
        [1e4, 1e4 - 8, 0],
    ]
    z = np.asarray(rows, dtype)
    p = oracles.fast_softmax(z)
    scores = wide(z) - wide(z).max(-1, keepdims=True)
    wanted = -p * (scores - np.sum(p * scores, -1, keepdims=True))
    # Each component within a few roundings of what it is a sum of, or flushed.
    spread = p * np.sum(p[:, None] * np.abs(scores[:, None] - scores[..., None]), -1)
    got = jax.grad(lambda z: jnp.sum(getattr(sj, name)(z)))(jnp.asarray(z))
    assert np.all(np.abs(wide(got) - wanted) <= 4 * eps(dtype) * spread + finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jensen_shannon_divergence(dtype):
    """Two sums of terms that are never negative, each known to a few eps."""
    rng = np.random.default_rng(0)
    for apart, offset in itertools.product((1e-6, 1e-2, 3.0, 30.0), (0.0, 1000.0)):
        x = (3 * rng.standard_normal((8, 10))).astype(dtype)
        y = (x + apart * rng.standard_normal((8, 10)) + offset).astype(dtype)
        for weight in (0.5, 0.1, np.full((8, 1), 1e-3)):
            weight = np.asarray(weight, dtype)
            actual = sj.jensen_shannon_divergence(jnp.asarray(x), jnp.asarray(y), weight=weight)
            expected = oracles.jensen_shannon_divergence(x, y, weight=weight)
            assert_close(actual, expected, rtol=32 * eps(dtype))


def test_jensen_shannon_divergence_at_the_edges():
    """Finite where the two share little or nothing; 0 where either keeps nothing."""
    x = [[0.0, -INF, 1.0], [0.0, -INF, 1.0], [-INF] * 3, [INF, 0.0, 0.0], [800.0, 0.0, -800.0]]
    y = [
        [0.0, 0.0, -INF],
        [-INF, 3.0, -INF],
        [0.0, 1.0, 2.0],
        [INF, INF, 0],
        [-800.0, 0.0, 800.0],
    ]
    x, y = jnp.array(x), jnp.array(y)
    call = jax.jit(lambda x, y, w: sj.jensen_shannon_divergence(x, y, weight=w))
    total = lambda *args: jnp.sum(sj.jensen_shannon_divergence(*args[:2], weight=args[2]))
    grad = jax.jit(jax.grad(total, (0, 1)))
    for weight in (0.0, 0.25, 1.0):
        expected = oracles.jensen_shannon_divergence(x, y, weight=weight)
        assert_close(call(x, y, weight), expected, rtol=1e-14, atol=1e-15)
        for logits, slope in zip((x, y), grad(x, y, weight), strict=True):
            assert jnp.isfinite(slope).all()
            assert (slope[logits == -INF] == 0).all()
    for place in range(3):
        bad = jnp.zeros((1, 3)).at[0, place].set(NAN)
        assert jnp.isnan(call(bad, jnp.zeros((1, 3)), 0.5)).all()
        assert jnp.isnan(call(jnp.zeros((1, 3)), bad, 0.5)).all()
    for weight in (-0.1, 1.5, jnp.ones(5)):
        with pytest.raises(ValueError, match="`weight`"):
            sj.jensen_shannon_divergence(x, y, weight=weight)
    with pytest.raises(ValueError, match="`q_logits` of shape"):
        sj.jensen_shannon_divergence(x, y[0])
