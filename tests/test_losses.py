"""Losses: their digits, derivatives, labels, edges, and parity with PyTorch.

A cross-entropy is one number of relative error 3.4 eps (4e-7 in float32), of any size, and
the derivative in its label's logit, minus the sum of the other weights, one of 8.4 eps
(1e-6). Below the smallest normal number XLA flushes weights to 0 on CPUs, so that n of them
may lack n of that number.
"""

import functools
import itertools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.test_util import check_grads
from mpmath import mp

import softjax as sj
from tests import oracles
from tests.helpers import DTYPES, INF, NAN, assert_close, assert_same, eps, finfo, wide

MARGINS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 16.0, 17.0, 20.0, 36.0, 40.0, 60.0, 80.0, 85.0)
# Where sparse losses end: at margins of 1, 2 and more, and just below those.
EDGES = (
    0.25,
    0.5,
    0.9,
    0.99,
    1 - 1e-3,
    1 - 1e-5,
    1.0,
    1.5,
    1.99,
    2 - 1e-5,
    2.0,
    3.0,
    9.9,
    20.0,
)

# Losses of logits and labels alone.
LOSSES = {
    "cross_entropy": sj.cross_entropy,
    "cross_entropy options": functools.partial(
        sj.cross_entropy, label_smoothing=0.1, z_loss=0.1
    ),
    "focal_loss": functools.partial(sj.focal_loss, gamma=2.0),
    "sparsemax_loss": sj.sparsemax_loss,
    "entmax_loss 1": functools.partial(sj.entmax_loss, alpha=1.0),
    "entmax_loss 1.5": sj.entmax_loss,
    "entmax_loss 3": functools.partial(sj.entmax_loss, alpha=3.0),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
SLOW_ALPHAS = [pytest.param(alpha, marks=pytest.mark.slow) for alpha in (1.1, 2.0, 3.0)]
every_alpha = pytest.mark.parametrize("alpha", [1.0, 1.5, *SLOW_ALPHAS])
# What takes long to compile, by default for one loss of each kind.
some_losses = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i not in (0, 5)))
        for i, name in enumerate(LOSSES)
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_wide_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


SPANS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: SPANS.append(event)
)


def computed(dtype):
    return "float64" if dtype == "float64" else "float32"


def rows(n, dtype, *, seed=0, margins=MARGINS):
    """Logits `[rows, n]`, rounded to the dtype, with labels: any, or ahead by a margin."""
    rng = np.random.default_rng(seed)
    logits, labels = [], []
    for scale, offset in itertools.product((1e-3, 0.1, 1.0, 10.0), (0.0, 1e2, -1e4)):
        logits.append(offset + scale * rng.standard_normal(n))
        labels.append(rng.integers(n))
    for margin, scale in itertools.product(margins, (0.0, 0.1, 1.0)):
        row, label = scale * rng.standard_normal(n), rng.integers(n)
        row[label] = np.delete(row, label).max() + margin
        logits.append(row)
        labels.append(label)
    return np.stack(logits).astype(jnp.dtype(dtype)), np.array(labels)


def others(probs, labels):
    """The weights of all but the label."""
    rest = np.array(probs)
    np.put_along_axis(rest, labels[..., None], 0, -1)
    return rest


def within(actual, expected, *, rtol, atol):
    """|actual - expected| <= atol + rtol |expected|, for an atol a row."""
    error = np.abs(wide(actual) - expected) - atol - rtol * np.abs(expected)
    assert (error <= 0).all(), (np.argmax(error), error.max())


# Accuracy.


@every_dtype
@pytest.mark.parametrize("n", [2, 10, 1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_cross_entropy_has_all_its_digits(n, dtype):
    logits, labels = rows(n, dtype)
    unit = eps(computed(dtype))
    flushed = n * float(finfo(computed(dtype)).tiny)
    expected, slope = oracles.fast_cross_entropy(logits, labels)
    assert expected.min() < 1e-30
    assert expected.max() > 5.0
    loss = sj.cross_entropy(jnp.asarray(logits), labels)
    assert loss.dtype == jnp.dtype(computed(dtype))
    assert_close(loss, expected, rtol=3.35 * unit, atol=flushed)
    # Read the gradient before it is rounded to half precision.
    fn = lambda z: jnp.sum(sj.cross_entropy(z, labels))
    grad = jax.grad(fn)(jnp.asarray(logits).astype(computed(dtype)))
    at_label = -np.take_along_axis(np.asarray(grad), labels[:, None], -1)[:, 0]
    assert_close(at_label, slope, rtol=8.35 * unit, atol=flushed)


def test_cross_entropy_from_the_smallest_losses_to_large_ones():
    """From 1e-37 to 1e2 in float32, by two logits, against 60 digits."""
    margins = np.concatenate([np.linspace(-100, 85, 371), np.geomspace(1e-6, 1, 20)])
    logits = np.stack([margins, 0 * margins], -1).astype("float32")
    labels = np.zeros(len(logits), int)
    expected = oracles.cross_entropy(logits, labels)
    assert expected.min() < 2e-37
    assert expected.max() >= 100
    loss = sj.cross_entropy(jnp.asarray(logits), labels)
    assert_close(loss, expected, rtol=4e-7)


@every_wide_dtype
@pytest.mark.parametrize("n", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_focal_loss(n, dtype):
    """Of gamma + 1 factors, each known to 4 eps."""
    logits, labels = rows(n, dtype, margins=MARGINS[:-2])
    tiny = float(finfo(dtype).tiny)
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        loss = sj.focal_loss(jnp.asarray(logits), labels, gamma=gamma)
        expected = oracles.focal_loss(logits, labels, gamma=gamma)
        assert_close(loss, expected, rtol=4 * (1 + gamma) * eps(dtype), atol=tiny)


def sparse_slack(probs, labels, alpha, dtype):
    """What the loss may lack above alpha = 2, as `entmax` knows p^(alpha - 1) to 8 eps.

    Another entry adds p^alpha / alpha to the loss, and d(loss) is at most
    p^(3 - alpha) d(p^(alpha - 1)) / (alpha - 1); entries of p^(alpha - 1) below eps may be
    missed altogether.
    """
    if alpha <= 2:
        return 0.0
    rest, bend, unit = others(probs, labels), alpha - 1, 8 * eps(dtype)
    size = np.where(rest > 0, np.maximum(rest, 1e-300) ** (3.0 - alpha), 0).sum(-1)
    return unit * size / bend + unit ** (2.0 / bend)


@every_wide_dtype
@pytest.mark.parametrize("n", [2, 10])
def test_sparsemax_loss(n, dtype):
    """A sum of positive terms, each known to a few eps."""
    logits, labels = rows(n, dtype, margins=EDGES)
    loss = sj.sparsemax_loss(jnp.asarray(logits), labels)
    expected = oracles.sparsemax_loss(logits, labels)
    assert_close(loss, expected, rtol=8.35 * eps(dtype))
    assert ((loss == 0) == (expected == 0)).all()
    assert (expected == 0).any()
    assert ((expected > 0) & (expected < 1e-4)).any()


@pytest.mark.optimized
@every_wide_dtype
@pytest.mark.parametrize(
    "alpha", [1.5, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (1.1, 1.9, 2.0))]
)
def test_sparse_losses_that_are_about_to_end(alpha, dtype):
    """Down to the smallest losses, where the label's weight rounds to 1 long before.

    (In float64 to 1e-30 alone: the oracle is a difference of numbers of 60 digits, and two
    logits in two parts hold 32.)
    """
    lead = 1 / (alpha - 1)
    rng = np.random.default_rng(5)
    logits, labels = [], []
    for offset, digits, scale in itertools.product((0.0, -37.3), range(8), (0.0, 1.0)):
        row = (offset + scale * rng.standard_normal(4)).astype(dtype)
        labels.append(rng.integers(4))
        row[labels[-1]] = np.delete(row, labels[-1]).max() + lead * (1 - 10.0**-digits)
        logits.append(row)
    for tiny in (1e-3, 1e-8, 1e-12, 1e-15):  # Not seen beside the label's logit.
        logits.append(np.array([lead, tiny, tiny / 3, -1.0], dtype))
        labels.append(0)
    logits, labels, index = np.stack(logits), np.array(labels), np.asarray(alpha, dtype)
    expected = oracles.entmax_loss(logits, labels, float(index))
    seen = expected > (1e-30 if dtype == "float64" else float(finfo(dtype).tiny))
    assert expected[seen].min() < 1e-16
    losses = [sj.entmax_loss(jnp.asarray(logits), labels, index)]
    if alpha == 2:
        losses.append(sj.sparsemax_loss(jnp.asarray(logits), labels))
    for loss in losses:
        assert_close(loss[seen], expected[seen], rtol=8.35 * eps(dtype))
        assert (loss >= 0).all()
    # The gradient at the label is what the other weights sum to, as exactly.
    rest = oracles.entmax(logits, float(index))
    rest[np.arange(len(labels)), labels] = 0
    grad = jax.grad(lambda z: jnp.sum(sj.entmax_loss(z, labels, index)))(jnp.asarray(logits))
    own = grad[np.arange(len(labels)), labels]
    assert_close(own[seen], -rest.sum(1)[seen], rtol=16 * eps(dtype))


def test_sparsemax_loss_where_it_ends():
    """Two logits whose margin lacks d: the loss is d^2 / 4, to a few eps."""
    for dtype in ("float32", "float64"):
        lacking = 2.0 ** -np.arange(1, finfo(dtype).nmant)
        logits = np.stack([1 - lacking, 0 * lacking], -1).astype(dtype)
        loss = sj.sparsemax_loss(jnp.asarray(logits), np.zeros(len(lacking), int))
        assert_close(loss, lacking**2 / 4, rtol=8 * eps(dtype))


@every_wide_dtype
@every_alpha
def test_entmax_loss(alpha, dtype):
    # (Above 2 the bound of `entmax` itself sets that of the loss where it ends, and at a label
    # of small weight p terms as large as -log p cancel to 1/2.)
    rtol = (8.35 if alpha <= 2 else -2 * np.log(eps(dtype))) * eps(dtype)
    tiny, index = float(finfo(dtype).tiny), np.asarray(alpha, dtype)
    for n in (2, 10):
        logits, labels = rows(n, dtype, margins=EDGES)
        loss = sj.entmax_loss(jnp.asarray(logits), labels, index)
        expected = oracles.entmax_loss(logits, labels, float(index))
        slack = sparse_slack(oracles.entmax(logits, alpha), labels, alpha, dtype)
        within(loss, expected, rtol=rtol, atol=slack + tiny)
        assert (loss >= 0).all()


@pytest.mark.slow
def test_labels_outside_of_the_support():
    """There the loss is linear in the label's logit."""
    for dtype in ("float32", "float64"):
        logits = np.array([[3.0, 0.0, -7.0], [1.0, -4.0, 0.75]], dtype)
        labels = np.array([2, 1])
        for alpha in (1.5, 2.0, 3.0):
            loss = sj.entmax_loss(jnp.asarray(logits), labels, alpha)
            expected = oracles.entmax_loss(logits, labels, alpha)
            assert_close(loss, expected, rtol=8 * eps(dtype))
        loss = sj.sparsemax_loss(jnp.asarray(logits), labels)
        assert_close(loss, oracles.sparsemax_loss(logits, labels), rtol=8 * eps(dtype))
    grad = jax.grad(lambda z: sj.sparsemax_loss(z, jnp.asarray(2)))(jnp.array([3.0, 0.0, -7.0]))
    assert_close(grad, [1.0, 0.0, -1.0], rtol=0)


@every_dtype
def test_soft_cross_entropy(dtype):
    """A sum of products that are not negative, each known to 4 eps and 2 roundings."""
    for n in (2, 10):
        logits, _ = rows(n, dtype, margins=MARGINS[:-2])
        rng = np.random.default_rng(n)
        targets = rng.dirichlet(np.ones(n), len(logits)).astype(logits.dtype)
        targets[::3, 0] = 0
        keep = rng.random(logits.shape) < 0.7
        for where in (None, keep):
            loss = sj.soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), where=where)
            expected = oracles.soft_cross_entropy(logits, targets, where=where)
            assert loss.dtype == jnp.dtype(computed(dtype))
            assert_close(loss, expected, rtol=8 * eps(loss.dtype))
    logits = np.linspace(-2, 2, 24).reshape(2, 3, 4)
    targets = np.array([0.25, 0.0, 3.0, 1.0])
    for axis in (0, 1, (0, 2), None):
        loss = sj.soft_cross_entropy(logits, targets, axis=axis)
        expected = oracles.soft_cross_entropy(logits, targets, axis=axis)
        assert_close(loss, expected, rtol=16 * eps("float64"))


@every_wide_dtype
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_loss(temperature, dtype):
    """To 16 eps where student and teacher are close (|log p/q| < 1), however close.

    Further apart, log p/q is a difference of log-probabilities, each rounded, of which the
    divergence has the derivative p - q.
    """
    rng, unit = np.random.default_rng(0), eps(dtype)
    for n, apart in itertools.product((2, 10), (1e-6, 1e-4, 1e-2, 0.3, 3.0)):
        student = (3 * rng.standard_normal((8, n))).astype(dtype)
        teacher = (student + apart * rng.standard_normal((8, n))).astype(dtype)
        args = jnp.asarray(student), jnp.asarray(teacher)
        loss = sj.distillation_loss(*args, temperature=temperature)
        expected = oracles.distillation_loss(student, teacher, temperature=temperature)
        log_p, log_q = (
            oracles.log_softmax(z, temperature=temperature) for z in (teacher, student)
        )
        far = np.abs(log_p - log_q).max(-1) > 0.5
        weight = np.abs(np.exp(log_p) - np.exp(log_q)) * (np.abs(log_p) + np.abs(log_q))
        slack = np.where(far, unit * temperature**2 * weight.sum(-1), 0)
        within(loss, expected, rtol=16 * unit, atol=slack)


def test_logit_adjustment():
    """Logarithms of quotients; added to logits they multiply the odds by the frequencies."""
    for dtype in DTYPES:
        counts = np.array([1, 3, 0, 100, 5000]).astype(jnp.dtype(dtype))
        for scale in (1.0, 0.5):
            shifts = sj.logit_adjustment(jnp.asarray(counts), scale=scale)
            assert shifts.dtype == jnp.dtype(dtype)
            expected = oracles.logit_adjustment(counts, scale=scale)
            assert_close(shifts, expected, rtol=4 * eps(dtype), atol=2 * eps(dtype))
            assert shifts[2] == -INF
    assert (sj.logit_adjustment(jnp.zeros(3)) == -INF).all()
    grad = jax.grad(lambda n: jnp.sum(sj.logit_adjustment(n)[:2]))(jnp.array([1.0, 3.0, 0.0]))
    assert_close(grad, [0.5, -1 / 6, 0.0], rtol=1e-15, atol=1e-16)
    for bad in (1.0, jnp.ones((2, 2))):
        with pytest.raises(ValueError, match="`counts` must be"):
            sj.logit_adjustment(bad)
    with pytest.raises(ValueError, match="`scale` must be"):
        sj.logit_adjustment(jnp.ones(2), scale=jnp.ones(2))


@pytest.mark.slow
def test_an_adjusted_loss_is_fisher_consistent_for_the_balanced_error():
    """Its minimum is where the logits are those of equally frequent classes (Menon et al.)."""
    frequencies = np.array([0.9, 0.09, 0.01])
    given_class = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])  # p(x | y)
    joint = jnp.asarray(frequencies[:, None] * given_class)
    adjustment = sj.logit_adjustment(jnp.asarray(frequencies))
    balanced = jnp.log(jnp.asarray(given_class)).T  # [x, y]

    def loss(logits):
        scores = sj.adjusted_scores(logits, adjustment)
        every = [sj.cross_entropy(scores, jnp.full(3, y)) for y in range(3)]
        return jnp.sum(joint * jnp.stack(every))

    assert_close(jax.grad(loss)(balanced), np.zeros((3, 3)), rtol=0, atol=1e-15)
    assert jnp.abs(jax.grad(loss)(balanced + adjustment[None])).max() > 0.01


@pytest.mark.slow
def test_class_balanced_weights_move_with_beta_from_0_on():
    """The effective number of n > 1 examples is 1 + beta + ..., of one example 1."""
    counts, step = jnp.array([1.0, 3.0, 100.0]), 2.0**-20
    weigh = lambda beta: sj.class_balanced_weights(counts, beta=beta)
    expected = (oracles.class_balanced_weights(counts, beta=step) - 1) / step
    assert_close(jax.jacfwd(weigh)(0.0), expected, rtol=8 * step)
    assert_close(jax.jacrev(weigh)(0.0), expected, rtol=8 * step)
    ends = weigh(np.nextafter(0.5, 0)), weigh(0.5)
    assert_close(ends[0], ends[1], rtol=8 * eps("float64"))


def test_class_balanced_weights():
    """Exponentials of n log(beta), of relative error n log(beta) eps; no cancellation."""
    for dtype in DTYPES:
        counts = np.array([1, 3, 0, 100, 5000]).astype(jnp.dtype(dtype))
        for beta in (0.0, 0.5, 0.9, 0.99, 1.0):
            beta = np.asarray(beta).astype(jnp.dtype(dtype))
            weights = sj.class_balanced_weights(jnp.asarray(counts), beta=beta)
            assert weights.dtype == jnp.dtype(dtype)
            expected = oracles.class_balanced_weights(counts, beta=beta)
            assert_close(weights, expected, rtol=32 * eps(dtype))
            assert weights[2] == 0
    assert_close(sj.class_balanced_weights(jnp.zeros(3), beta=0.5), np.zeros(3), rtol=0)
    for beta in (0.4, 0.9):  # The limit of endless examples, where beta^n is 0.
        weigh = lambda n, b: sj.class_balanced_weights(jnp.array([n, 1.0]), beta=b)[0]
        assert_close(weigh(jnp.inf, beta), 2 * (1 - beta) / (2 - beta), rtol=4 * eps("float32"))
        assert_close(jax.grad(weigh, 1)(jnp.inf, beta), -2 / (2 - beta) ** 2, rtol=1e-6)
    assert jnp.isnan(sj.class_balanced_weights(jnp.array([jnp.nan, 1.0]), beta=0.5)).all()
    for counts, beta, error in (
        (jnp.ones((1, 2)), 0.5, "`counts` must be a vector"),
        (1.0, 0.5, "`counts` must be a vector"),
        (jnp.ones(2), jnp.ones(2), "`beta` must be one number"),
        (jnp.ones(2), 1j, "`beta` must be real"),
        (jnp.ones(2), None, "`beta` must be a number"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            sj.class_balanced_weights(counts, beta=beta)


def test_focal_loss_at_the_ends_of_gamma():
    logits = jnp.array([[0.0, 0.0], [-200.0, 0.0], [200.0, 0.0], [-jnp.inf, 0.0]])
    fn = lambda z, gamma: sj.focal_loss(z, jnp.zeros(4, int), gamma=gamma)
    assert jnp.isnan(fn(logits, jnp.array(jnp.nan))).all()
    assert_close(fn(logits, jnp.array(jnp.inf)), [0, 200, 0, jnp.inf], rtol=1e-6)
    grads = jax.grad(lambda *args: jnp.sum(fn(*args)), (0, 1))(logits, jnp.array(jnp.inf))
    assert jnp.isfinite(grads[0]).all()
    assert jnp.isfinite(grads[1])
    with pytest.raises(ValueError, match="`gamma` must be in"):
        fn(logits, jnp.inf)


# Derivatives.


@every_alpha
def test_the_gradient_is_p_minus_the_label(alpha):
    logits, labels = rows(7, "float64", margins=(0.5, 1.5, 3.0))
    grad = jax.grad(lambda z: jnp.sum(sj.entmax_loss(z, labels, alpha)))(jnp.asarray(logits))
    expected = oracles.entmax(logits, alpha) - np.eye(7)[labels]
    # The weights are known to 8 eps of the largest (in p^(alpha - 1), where that is more).
    unit = 8 * eps("float64")
    assert_close(grad, expected, rtol=unit, atol=unit ** (1 / max(1.0, alpha - 1)))
    if alpha in (1.0, 2.0):
        other = sj.cross_entropy if alpha == 1 else sj.sparsemax_loss
        same = jax.grad(lambda z: jnp.sum(other(z, labels)))(jnp.asarray(logits))
        assert_close(same, expected, rtol=unit, atol=unit)


Z = jnp.array(
    [[0.6, -0.3, 1.1, 0.1, -0.9], [2.0, 1.4, -1.0, 0.3, 0.9], [0.1, 4.0, 1.0, 0.0, -2.0]]
)
Y = jnp.array([2, 3, 4])
T3 = jnp.array([0.7, 1.2, 1.6])
WEIGHTS = jnp.array([0.5, 1.5, 1.0, 0.7, 2.0])
DIFFERENTIABLE = {
    "cross_entropy": (lambda z: sj.cross_entropy(z, Y), (Z,)),
    "cross_entropy options": (
        lambda z, e, c, w: sj.cross_entropy(
            z, Y, label_smoothing=e, z_loss=c, class_weights=w, ignore_index=3
        ),
        (Z, T3 / 4, T3 / 10, WEIGHTS),
    ),
    "soft_cross_entropy": (sj.soft_cross_entropy, (Z, jnp.abs(jnp.sin(Z)))),
    "distillation_loss": (
        lambda s, t, temperature: sj.distillation_loss(s, t, temperature=temperature),
        (Z, Z[::-1], T3[:, None]),
    ),
    "focal_loss": (lambda z, g: sj.focal_loss(z, Y, gamma=g), (Z, T3)),
    "sparsemax_loss": (lambda z: sj.sparsemax_loss(z, Y), (Z,)),
    "entmax_loss": (lambda z, a: sj.entmax_loss(z, Y, a), (Z, 1 + T3[:, None] / 2)),
    "mean_loss": (
        lambda losses, w, a: sj.mean_loss(
            losses, Y, class_weights=w, example_weights=a, ignore_index=2
        ),
        (T3, WEIGHTS, T3[::-1]),
    ),
    "class_balanced_weights": (
        lambda n, b: sj.class_balanced_weights(n, beta=b),
        (WEIGHTS * 4, jnp.asarray(0.8)),
    ),
}


# (The catalogue's Hessians hold for all of them by default.)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "cross_entropy"))
        for name in DIFFERENTIABLE
    ],
)
def test_derivatives(name):
    fn, args = DIFFERENTIABLE[name]
    # Third derivatives times the square of the step (1e-5 ^ 2), and eps over the step.
    check_grads(jax.jit(fn), args, order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)
    for jacobian in jax.jit(jax.jacobian(fn, argnums=tuple(range(len(args)))))(*args):
        assert jnp.abs(jacobian).max() > 1e-2  # A flat point would prove nothing.


@pytest.mark.slow
def test_entmax_loss_derivative_in_alpha_at_its_ends():
    """At 1 and 2 the derivative is that of both sides, against differences of the oracle."""
    for alpha in (1.0, 2.0):
        fn = lambda a: jnp.sum(sj.entmax_loss(Z, Y, a))
        grad = jax.grad(fn)(alpha)
        step = 2.0**-12
        points = alpha + step * np.array([0, 1, 2])  # Alpha is at least 1.
        values = [oracles.entmax_loss(Z, Y, a).sum() for a in points]
        expected = (-3 * values[0] + 4 * values[1] - values[2]) / (2 * step)
        assert_close(grad, expected, rtol=1e-6)


# Options.


@pytest.mark.slow
def test_options_together():
    rng = np.random.default_rng(3)
    for axis, shape in ((-1, (4, 6)), (1, (2, 5, 3)), (0, (5, 4))):
        logits = 3 * rng.standard_normal(shape)
        lead = tuple(np.delete(shape, axis))
        labels = rng.integers(0, 5, lead)
        labels.flat[0] = -7
        weights = rng.uniform(0.5, 1.5, shape[axis])
        keep = rng.random(shape) < 0.8
        epsilon, factor = rng.uniform(0.05, 0.4, lead), rng.uniform(0.01, 0.1, lead)
        for ignored, smoothing, z in ((-7, epsilon, factor), (-7, 0.1, 0.0), (2, 1.0, 1e-3)):
            options = {
                "axis": axis,
                "where": keep,
                "ignore_index": ignored,
                "label_smoothing": smoothing,
                "z_loss": z,
                "class_weights": weights,
            }
            loss = sj.cross_entropy(jnp.asarray(logits), labels, **options)
            expected = oracles.cross_entropy(logits, labels, **options)
            if np.ndim(smoothing) == 0 and smoothing == 1.0:
                # 0 inf: how a dropped label counts for nothing is left open.
                kept = np.isfinite(expected)
                loss, expected = np.asarray(loss)[kept], expected[kept]
            assert_close(loss, expected, rtol=16 * eps("float64"))
            assert np.isfinite(wide(loss)).any()


@every_dtype
def test_options_keep_the_digits(dtype):
    """Positive terms: 4 eps for each, and 4 for the products and the sum.

    The logarithm of the total may cancel with the peak, and is known to eps of the larger.
    """
    logits, labels = rows(10, dtype, margins=MARGINS[:-2])
    unit = eps(computed(dtype))
    make = lambda *values: np.asarray(*values).astype(logits.dtype)
    smoothing, factor, weights = make(0.125), make(0.25), make(np.linspace(0.5, 1.5, 10))
    options = {"label_smoothing": smoothing, "class_weights": weights}
    loss = sj.cross_entropy(jnp.asarray(logits), labels, **options)
    assert loss.dtype == jnp.dtype(computed(dtype))
    assert_close(loss, oracles.cross_entropy(logits, labels, **options), rtol=8 * unit)
    loss = sj.cross_entropy(jnp.asarray(logits), labels, z_loss=factor)
    expected = oracles.cross_entropy(logits, labels, z_loss=factor)
    peak = np.abs(np.float64(logits)).max(-1)
    total = np.abs(oracles.logsumexp(logits, axis=-1))
    slack = 2 * 0.25 * total * 2 * unit * (peak + 1)
    within(loss, expected, rtol=8 * unit, atol=slack)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_parity_with_pytorch(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    tolerance = {"rtol": 32 * eps(dtype), "atol": 32 * eps(dtype)}
    for shape in ((6, 5), (3, 5, 4)):
        logits = (3 * rng.standard_normal(shape)).astype(dtype)
        labels = rng.integers(0, 5, (shape[0], *shape[2:]))
        labels.flat[1] = -100
        weights = rng.uniform(0.5, 1.5, 5).astype(dtype)
        for weight, smoothing, ignored in (
            (None, 0.0, -100),
            (weights, 0.0, -100),
            (None, 0.1, 2),
            (weights, 0.1, 2),
        ):
            if ignored == 2:
                labels.flat[1] = 0
            options = {"label_smoothing": smoothing, "ignore_index": ignored}
            theirs = functools.partial(
                torch.nn.functional.cross_entropy,
                target=torch.tensor(labels),
                weight=None if weight is None else torch.tensor(weight),
                **options,
            )
            z = torch.tensor(logits, requires_grad=True)
            mean = theirs(z, reduction="mean")
            mean.backward()

            def ours(z, labels=labels, weight=weight, options=options):
                losses = sj.cross_entropy(z, labels, axis=1, class_weights=weight, **options)
                index = options["ignore_index"]
                total = sj.mean_loss(losses, labels, ignore_index=index, class_weights=weight)
                return total, losses

            call = jax.jit(jax.value_and_grad(ours, has_aux=True))
            (total, losses), grad = call(jnp.asarray(logits))
            assert_close(losses, theirs(z, reduction="none").detach().numpy(), **tolerance)
            assert_close(total, mean.detach().numpy(), **tolerance)
            assert_close(grad, z.grad.numpy(), **tolerance)
            labels.flat[1] = -100


@pytest.mark.slow
def test_python_numbers_are_not_static():
    calls = {
        "label_smoothing": lambda x: sj.cross_entropy(Z, Y, label_smoothing=x),
        "z_loss": lambda x: sj.cross_entropy(Z, Y, z_loss=x),
        "gamma": lambda x: sj.focal_loss(Z, Y, gamma=x),
        "alpha": lambda x: sj.entmax_loss(Z, Y, 1 + x),
        "temperature": lambda x: sj.distillation_loss(Z, 2 * Z, temperature=x),
        "beta": lambda x: sj.class_balanced_weights(WEIGHTS, beta=x),
    }
    for name, call in calls.items():
        first = call(0.5)
        SPANS.clear()
        second = call(0.75)
        assert not [event for event in SPANS if "trace" in event or "compile" in event], name
        assert (np.asarray(first) != np.asarray(second)).any(), name


@pytest.mark.slow
def test_special_cases_agree():
    logits, labels = rows(6, "float64", margins=(0.5, 3.0))
    z = jnp.asarray(logits)
    close = {"rtol": 16 * eps("float64")}
    cross = sj.cross_entropy(z, labels)
    assert_close(sj.focal_loss(z, labels, gamma=0), cross, **close)
    assert_close(-sj.log_prob(z, labels), cross, **close)
    assert_close(sj.cross_entropy(z, labels, label_smoothing=0.0, z_loss=0.0), cross, **close)
    one_hot = jnp.eye(6)[labels]
    assert_close(sj.soft_cross_entropy(z, one_hot), cross, **close)
    smoothed = sj.cross_entropy(z, labels, label_smoothing=0.3)
    assert_close(sj.soft_cross_entropy(z, 0.7 * one_hot + 0.05), smoothed, **close)
    divergence = sj.kl_divergence(z, z[::-1])
    assert_close(sj.distillation_loss(z[::-1], z, temperature=1.0), divergence, rtol=0)
    assert_close(sj.distillation_loss(z[::-1], z, temperature=1), divergence, **close)


# The mean.


def test_mean_loss():
    losses, labels = jnp.array([1.0, 3.0, INF, 5.0]), jnp.array([0, 2, -1, 2])
    weights, shares = jnp.array([0.5, 9.0, 2.0]), jnp.array([1.0, 2.0, 1.0, 0.0])
    for ignored, w, a in itertools.product((None, -1, 0), (None, weights), (None, shares)):
        if ignored is None and w is not None:
            continue  # The label -1 has no weight.
        options = {"ignore_index": ignored, "class_weights": w, "example_weights": a}
        if ignored != -1 and w is not None:
            continue
        expected = oracles.mean_loss(losses, labels, **options)
        given = None if ignored is None else labels  # Labels that nothing uses are refused.
        assert_close(sj.mean_loss(losses, given, **options), expected, rtol=1e-15)
    assert sj.mean_loss(losses, labels - labels, ignore_index=0) == 0
    assert sj.mean_loss(jnp.zeros((0,))) == 0
    assert sj.mean_loss(jnp.ones((2, 3)), example_weights=jnp.zeros(3)) == 0
    assert sj.mean_loss(jnp.array([1, 2])) == 1.5
    assert sj.mean_loss(jnp.ones(3, "bfloat16")).dtype == jnp.float32


def test_what_has_no_weight_does_not_count():
    """Whatever its loss. If that is a number, the weight of 0 has its derivative."""
    fn = lambda losses, a: sj.mean_loss(losses, example_weights=a)
    shares = jnp.array([0.0, 1.0, 1.0])
    for bad in (NAN, INF, -INF):
        value, grads = jax.value_and_grad(fn, argnums=(0, 1))(
            jnp.array([bad, 1.0, 2.0]), shares
        )
        assert value == 1.5
        assert_close(grads[0], [0.0, 0.5, 0.5], rtol=0)
        assert jnp.isfinite(grads[1]).all()
    grad = jax.grad(fn, argnums=1)(jnp.array([5.0, 1.0, 2.0]), shares)
    assert_close(grad, [1.75, -0.25, 0.25], rtol=1e-15)
    for mode in (jax.grad, jax.jacfwd):
        ignored = lambda x: sj.mean_loss(x, jnp.array([1, 0, 0]), ignore_index=1)
        assert_close(mode(ignored)(jnp.array([NAN, 1.0, 2.0])), [0.0, 0.5, 0.5], rtol=0)


# Labels.


@some_losses
def test_labels_out_of_range_make_their_rows_nan(name):
    fn = LOSSES[name]
    logits = jnp.asarray(np.linspace(-0.4, 0.5, 20).reshape(5, 4)[:, [2, 0, 3, 1]])
    total = lambda z, y: (jnp.sum(fn(z, y)), fn(z, y))
    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    for dtype, huge in (("int64", 2**60), ("int8", 127)):
        labels = jnp.array([-1, 2, 4, huge, 0], dtype)
        known = np.array([False, True, False, False, True])
        (_, loss), grad = both(logits, labels)
        assert (np.isnan(loss) == ~known).all()
        (_, clean), clean_grad = both(logits, jnp.where(known, labels, 0))
        assert_same(loss[known], clean[known])
        assert_same(grad[known], clean_grad[known])
        assert (grad[~known] == 0).all()  # The NaN is a constant.
    unsigned = fn(logits, jnp.array([0, 1, 2, 3, 255], "uint8"))
    assert (np.isnan(unsigned) == [False, False, False, False, True]).all()
    for dtype in ("int8", "uint8", "uint32", "uint64"):
        same = fn(logits, jnp.array([0, 1, 2, 3, 1], dtype))
        assert_same(same, fn(logits, jnp.array([0, 1, 2, 3, 1])))
    wide_logits = jnp.zeros((2, 300))
    assert jnp.isfinite(fn(wide_logits, jnp.array([200, 255], "uint8"))).all()
    assert (
        jnp.isnan(fn(wide_logits, jnp.array([-1, 5], "int8"))) == jnp.array([True, False])
    ).all()


def test_unknown_labels_in_a_mean():
    """They stay NaN, unless they are ignored."""
    labels = jnp.array([0, 7])
    losses = sj.cross_entropy(jnp.zeros((2, 3)), labels)
    weights = jnp.ones(3)
    assert jnp.isnan(sj.mean_loss(losses, labels, class_weights=weights))
    assert_close(
        sj.mean_loss(losses, labels, ignore_index=7, class_weights=weights),
        np.log(3),
        rtol=1e-15,
    )


ONLY_ONE = jnp.array([NAN, 0.1, INF, NAN])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": ONLY_ONE, "z_loss": ONLY_ONE}])
@pytest.mark.parametrize("index", [-100, pytest.param(1, marks=pytest.mark.slow)])
def test_ignored_rows_are_zero_whatever_they_hold(index, options):
    logits = jnp.array([[NAN, 0.0, 1.0], [0.5, 0.0, 1.0], [INF, -INF, INF], [-INF, -INF, NAN]])
    labels = jnp.array([index, 0, index, index])
    weights = jnp.array([1.0, 2.0, 0.5])
    fn = lambda z: sj.cross_entropy(
        z, labels, ignore_index=index, class_weights=weights, **options
    )
    with jax.debug_nans(False):  # The logits hold some already.
        loss = fn(logits)
        grad = jax.grad(lambda z: jnp.sum(fn(z)))(logits)
        forward = jax.jacfwd(fn)(logits)
    assert (loss[jnp.array([0, 2, 3])] == 0).all()
    assert (grad[jnp.array([0, 2, 3])] == 0).all()
    assert jnp.isfinite(forward).all()
    assert_close(
        loss[1],
        oracles.cross_entropy(
            logits[1], 0, class_weights=weights, **{name: x[1] for name, x in options.items()}
        ),
        rtol=1e-15,
    )
    assert (grad[1] != 0).all()


def test_an_ignore_index_that_the_labels_cannot_hold():
    """It is refused, because no label can equal it."""
    for dtype, indices in {
        "int32": (2**40, -(2**63), 2**32, 2**32 + 1),
        "int8": (200, -129),
        "uint8": (-100, 256),
        "uint32": (-100,),
    }.items():
        labels = jnp.array([0, 1], dtype)
        for index in indices:
            match = f"`ignore_index` must be .* {dtype}, got {index}"
            with pytest.raises(ValueError, match=match):
                sj.cross_entropy(jnp.zeros((2, 3)), labels, ignore_index=index)
            with pytest.raises(ValueError, match="`ignore_index` must be"):
                sj.mean_loss(jnp.ones(2), labels, ignore_index=index)
    loss = sj.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1], "int8"), ignore_index=-100)
    assert (loss > 1).all()


@pytest.mark.slow
def test_a_dropped_label_has_an_infinite_loss():
    logits, labels = jnp.array([[0.0, 1.0, -INF], [0.0, 1.0, 2.0]]), jnp.array([2, 1])
    keep = jnp.array([[True, True, True], [True, False, True]])
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": jnp.ones(3)}):
        fn = lambda z, o=options: sj.cross_entropy(z, labels, where=keep, **o)
        assert (fn(logits) == INF).all()
        with jax.debug_nans(True):
            grad = jax.grad(lambda z, fn=fn: jnp.sum(fn(z)))(logits)
            hessian = jax.hessian(lambda z, fn=fn: jnp.sum(fn(z)))(logits)
        assert jnp.isfinite(grad).all()
        assert jnp.isfinite(hessian).all()
        assert grad[0, 2] == grad[1, 1] == 0


@pytest.mark.slow
def test_a_dropped_label_is_constant_in_every_variant():
    """Nothing moves an infinite loss; what has no weight costs nothing."""
    logits, label = jnp.array([0.3, -INF, 0.1]), jnp.asarray(1)
    light = jnp.array([1.0, 0.0, 1.0])
    for name, fn in LOSSES.items():
        assert fn(logits, label) == INF, name
        assert (jax.grad(fn)(logits, label) == 0).all(), name
        slope = jax.jvp(lambda z, fn=fn: fn(z, label), (logits,), (jnp.ones(3),))[1]
        assert slope == 0, name
    with jax.debug_nans(True):
        for options in ({"class_weights": light}, {"label_smoothing": 1.0}):
            fn = lambda z, options=options: sj.cross_entropy(z, label, **options)
            value, grad = jax.value_and_grad(fn)(logits)
            assert jnp.isfinite(value)
            assert jnp.isfinite(grad).all()
        assert sj.cross_entropy(logits, label, class_weights=light) == 0


@some_losses
def test_a_label_on_minus_infinity(name):
    """Loss inf; the dropped entry has no derivative, and no other is NaN."""
    logits, label = jnp.array([0.3, -INF, 0.1]), jnp.asarray(1)
    fn = lambda z: LOSSES[name](z, label)
    with jax.debug_nans(True):
        value, grad = jax.value_and_grad(fn)(logits)
        slope = jax.jvp(fn, (logits,), (jnp.array([1.0, 5.0, 1.0]),))[1]
    assert value == INF
    assert grad[1] == 0
    assert jnp.isfinite(grad).all()
    assert jnp.isfinite(slope)
    dirty = jax.jvp(fn, (logits,), (jnp.array([1.0, NAN, 1.0]),))[1]
    assert dirty == slope


def test_a_check_of_labels_names_the_label_and_its_row():
    labels = jnp.array([[0, 1], [-1, 7]], jnp.int8)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 4\), got -1 in row 2"):
        sj.check_labels(labels, 4)
    with pytest.raises(ValueError, match="got 7 in row 3"):
        sj.check_labels(labels, 4, ignore_index=-1)
    assert_same(sj.check_labels(labels, 8, ignore_index=-1), labels)
    sj.check_labels(jnp.array([0, 1], jnp.int32), 2**40)
    assert sj.check_labels(jnp.zeros((0,), int), 4).shape == (0,)
    with pytest.raises(TypeError, match="`labels` must be integers, got float64"):
        sj.check_labels(jnp.zeros(3), 4)


def test_a_check_of_labels_under_transformations():
    def loss(logits, labels):
        return sj.cross_entropy(logits, sj.check_labels(labels, 4, ignore_index=-1))

    checked = checkify.checkify(jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).sum())))
    error, _ = checked(jnp.zeros((3, 4)), jnp.array([0, -1, 7]))
    assert "got 7 in row 2" in error.get()
    error, (value, _) = checked(jnp.zeros((3, 4)), jnp.array([0, 1, 3]))
    assert error.get() is None
    assert jnp.isfinite(value)
    # Where nothing is checked, nothing happens.
    got = jax.jit(jax.vmap(loss))(jnp.zeros((3, 1, 4)), jnp.array([[0], [-1], [7]]))
    assert np.isnan(got).ravel().tolist() == [False, True, True]


# What is left out.

LOGITS = jnp.asarray(np.random.default_rng(8).standard_normal((3, 4)))
OTHERS = {
    "labels": jnp.array([2, 0, 1]),
    "label_smoothing": jnp.array([0.1, 0.2, 0.3]),
    "z_loss": jnp.array([0.3, 0.2, 0.1]),
    "class_weights": jnp.array([0.5, 1.5, 1.0, 2.0]),
    "gamma": jnp.array([1.5, 2.0, 0.5]),
    "alpha": jnp.array([[1.25], [1.5], [2.5]]),
    "temperature": jnp.array([[0.5], [1.0], [2.0]]),
    "teacher_logits": jnp.asarray(np.random.default_rng(9).standard_normal((3, 4))),
    "targets": jnp.asarray(np.random.default_rng(10).dirichlet(np.ones(4), 3)),
}
LABEL_LOSSES = {
    "cross_entropy": (sj.cross_entropy, "labels class_weights"),
    "cross_entropy options": (
        sj.cross_entropy,
        "labels label_smoothing z_loss class_weights",
    ),
    "focal_loss": (sj.focal_loss, "labels gamma class_weights"),
    "sparsemax_loss": (sj.sparsemax_loss, "labels class_weights"),
    "entmax_loss": (sj.entmax_loss, "labels alpha class_weights"),
}
SLICE_LOSSES = {
    "soft_cross_entropy": (sj.soft_cross_entropy, "targets class_weights"),
    "distillation_loss": (sj.distillation_loss, "teacher_logits temperature"),
    "distillation_loss at 1": (
        functools.partial(sj.distillation_loss, temperature=1.0),
        "teacher_logits",
    ),
}


def ways_out(name, fn, labels):
    """Sums and means of (logits, other arguments) that leave the example 1 out."""
    keep = jnp.array([True, False, True])
    if labels is None:
        unused = {"example_where": keep}
        means = [
            lambda z, o: fn(z, **o, **unused, reduction="mean"),
            lambda z, o: jnp.sum(fn(z, **o, **unused) ** 2),
        ]
    else:
        ignore = {"ignore_index": -100}
        means = [
            lambda z, o: fn(z, labels, **o, **ignore, reduction="mean"),
            lambda z, o: jnp.sum(fn(z, labels, **o, **ignore) ** 2),
        ]
    return means


@pytest.mark.parametrize("name", [*LABEL_LOSSES, *SLICE_LOSSES])
def test_what_is_left_out_reaches_nothing(name):
    """Whatever stands in each of its arguments: not the value, nor any derivative."""
    fn, names = (LABEL_LOSSES | SLICE_LOSSES)[name]
    others = {n: OTHERS[n] for n in names.split()}
    labels = others.pop("labels", None)
    if labels is not None:
        labels = labels.at[1].set(-100)
    for call in ways_out(name, fn, labels):
        grad = jax.jit(jax.value_and_grad(call, (0, 1)))
        push = jax.jit(lambda *args, call=call: jax.jvp(call, args, args)[1])
        clean = grad(LOGITS, others)
        assert jnp.isfinite(clean[0])
        assert jnp.abs(clean[1][0][0]).max() > 1e-3
        pushed = push(LOGITS, others)
        for bad in (NAN, INF, -INF):
            dirty = (
                LOGITS.at[1, 2].set(bad),
                {n: x if n == "class_weights" else x.at[1].set(bad) for n, x in others.items()},
            )
            for args in (dirty, (LOGITS.at[1].set(bad), others)):
                value, grads = grad(*args)
                assert_same(value, clean[0])
                assert (grads[0][1] == 0).all()
                for n, x in grads[1].items():
                    assert n == "class_weights" or (x[1] == 0).all(), n
                jax.tree.map(lambda x, y: assert_close(x, y, rtol=1e-13), grads, clean[1])
            assert_close(push(LOGITS.at[1, 2].set(bad), others), pushed, rtol=1e-13)


def test_what_is_left_out_reaches_no_parameter():
    x, w = jnp.ones((2, 3)), jnp.zeros((3, 4))
    for bad in (-100, 7):
        y = jnp.array([1, bad])
        means = [
            lambda w, y=y: sj.mean_loss(
                sj.focal_loss(x @ w, y, gamma=2.0), y, ignore_index=int(y[1])
            ),
            lambda w, y=y: sj.mean_loss(
                sj.cross_entropy(x @ w, y), example_weights=jnp.array([1.0, 0.0])
            ),
        ]
        for mean in means:
            value, grad = jax.value_and_grad(mean)(w)
            assert jnp.isfinite(value)
            assert jnp.isfinite(grad).all()
            assert (grad != 0).all()
            assert jnp.isfinite(jax.hessian(mean)(w)).all()
            assert jnp.isfinite(jax.jacfwd(mean)(w)).all()


def test_a_weight_of_0_keeps_its_mixed_derivative():
    """The gradient at weight 0 moves with the weight, as methods that learn weights need."""
    labels = OTHERS["labels"]
    mean = lambda z, a: sj.mean_loss(sj.cross_entropy(z, labels), example_weights=a)
    shares = jnp.array([1.0, 0.0, 1.0])
    expected = (np.asarray(jax.nn.softmax(LOGITS)) - np.eye(4)[labels])[1] / 2
    for mode in (jax.jacfwd, jax.jacrev):
        mixed = mode(jax.grad(mean), argnums=1)(LOGITS, shares)
        assert_close(mixed[1, :, 1], expected, rtol=1e-14)


def test_left_out_entries_of_a_sigmoid_focal_loss():
    targets = jnp.where(LOGITS > 0.3, 1.0, 0.0)
    keep = jnp.ones((3, 4), bool).at[1, 2].set(False)
    ways = [
        lambda z, t, g, a: sj.sigmoid_focal_loss(
            z, t, gamma=g, alpha=a, where=keep, reduction="mean"
        ),
    ]
    full = lambda x: jnp.full((3, 4), x)
    args = LOGITS, targets, full(2.0), full(0.25)
    for call in ways:
        value, grads = jax.value_and_grad(call, (0, 1, 2, 3))(*args)
        expected = oracles.sigmoid_focal_loss(*args[:2], gamma=2.0, alpha=0.25)
        assert_close(value, expected[keep].mean(), rtol=1e-14)
        for bad in (NAN, INF, -INF):
            dirty = [x.at[1, 2].set(bad) for x in args]
            got, dirty_grads = jax.value_and_grad(call, (0, 1, 2, 3))(*dirty)
            assert_close(got, value, rtol=1e-15)
            for x, y in zip(dirty_grads, grads, strict=True):
                assert x[1, 2] == 0
                assert_close(x[keep], y[keep], rtol=1e-13)


# Reductions and the z-loss.


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_reductions_of_label_losses(name):
    fn, names = LABEL_LOSSES[name]
    others = {n: OTHERS[n] for n in names.split()}
    labels = others.pop("labels").at[1].set(-1)
    where = jnp.array([True, True, True, False])
    for weights in (None, others["class_weights"]):
        options = others | {"class_weights": weights, "where": where, "ignore_index": -1}
        losses = fn(LOGITS, labels, **options)
        plain = fn(jnp.where(where, LOGITS, -INF), labels, **options | {"where": None})
        assert_close(losses, plain, rtol=1e-15)
        assert losses[1] == 0
        assert_close(fn(LOGITS, labels, **options, reduction="sum"), losses.sum(), rtol=1e-15)
        divisor = 2.0 if weights is None else weights[2] + weights[1]
        mean = fn(LOGITS, labels, **options, reduction="mean")
        assert_close(mean, losses.sum() / divisor, rtol=1e-15)
        if name != "cross_entropy options":
            light = fn(LOGITS, labels, **options | {"class_weights": None})
            weigh = jnp.ones(3) if weights is None else weights[jnp.array([2, 0, 1])]
            assert_close(losses, light * weigh, rtol=1e-15)
    for bad in ("none", "average", 1):
        with pytest.raises(ValueError, match='`reduction` must be "mean", "sum" or None'):
            fn(LOGITS, labels, **others, reduction=bad)


@pytest.mark.parametrize("name", SLICE_LOSSES)
def test_reductions_of_slice_losses(name):
    fn, names = SLICE_LOSSES[name]
    others = {n: OTHERS[n] for n in names.split()}
    losses = fn(LOGITS, **others)
    assert_close(fn(LOGITS, **others, reduction="mean"), losses.mean(), rtol=1e-15)
    assert_close(fn(LOGITS, **others, reduction="sum"), losses.sum(), rtol=1e-15)
    keep = jnp.array([True, False, True])
    mean = fn(LOGITS, **others, reduction="mean", example_where=keep)
    assert_close(mean, losses[np.array([0, 2])].mean(), rtol=1e-15)
    assert fn(LOGITS, **others, reduction="mean", example_where=np.array(False)) == 0
    with pytest.raises(ValueError, match="`example_where`"):
        fn(LOGITS, **others, example_where=jnp.ones(4, bool))
    with pytest.raises(TypeError, match="`example_where` must be bool"):
        fn(LOGITS, **others, example_where=jnp.ones(3))
    with pytest.raises(ValueError, match="`reduction` must be"):
        fn(LOGITS, **others, reduction="none")


def test_dropped_entries_of_a_distillation_loss():
    keep, teacher = jnp.array([True, False, True, True]), OTHERS["teacher_logits"]
    loss = sj.distillation_loss(LOGITS, teacher, temperature=2.0, where=keep)
    expected = sj.distillation_loss(LOGITS[:, keep], teacher[:, keep], temperature=2.0)
    assert_close(loss, expected, rtol=1e-14)


def test_class_weights_with_soft_targets():
    weights, targets = OTHERS["class_weights"], OTHERS["targets"]
    loss = sj.soft_cross_entropy(LOGITS, targets, class_weights=weights)
    expected = oracles.soft_cross_entropy(LOGITS, np.asarray(targets) * np.asarray(weights))
    assert_close(loss, expected, rtol=1e-15)
    along_0 = sj.soft_cross_entropy(LOGITS.T, targets.T, class_weights=weights, axis=0)
    assert_close(along_0, expected, rtol=1e-15)
    check_grads(
        lambda z, t, w: sj.soft_cross_entropy(z, t, class_weights=w),
        (LOGITS, targets, weights),
        order=2,
        modes=["fwd", "rev"],
        rtol=1e-6,
        atol=1e-6,
    )
    light = jnp.array([1.0, 0.0, 1.0, 1.0])
    dropped = sj.soft_cross_entropy(LOGITS.at[:, 1].set(-INF), targets, class_weights=light)
    assert jnp.isfinite(dropped).all()
    with pytest.raises(TypeError, match="`axis` must be one int"):
        sj.soft_cross_entropy(LOGITS, targets, class_weights=weights, axis=None)
    with pytest.raises(ValueError, match="`class_weights`"):
        sj.soft_cross_entropy(LOGITS, targets, class_weights=jnp.ones(3))


def test_the_z_loss_apart():
    labels, factor = jnp.array([2, -1, 1]), OTHERS["z_loss"]
    call = functools.partial(sj.cross_entropy, LOGITS, labels, ignore_index=-1)
    z_term = np.asarray(factor) * np.float64(oracles.logsumexp(LOGITS, axis=-1)) ** 2
    z_term[1] = 0
    loss, z_loss = call(z_loss=factor, return_z_loss=True)
    assert_close(z_loss, z_term, rtol=1e-14)
    assert_close(loss, call() + z_term, rtol=1e-14)
    assert_same(loss, call(z_loss=factor))
    mean, z_mean = call(z_loss=factor, return_z_loss=True, reduction="mean")
    assert_close(z_mean, z_term.sum() / 2, rtol=1e-14)
    assert_close(mean, loss.sum() / 2, rtol=1e-14)
    loss, z_loss = call(return_z_loss=True)
    assert_same(loss, call())
    assert (z_loss == 0).all()
    # The two have their own derivatives, and one cancels in their difference.
    apart = lambda z: sj.cross_entropy(z, labels % 4, z_loss=0.1, return_z_loss=True)
    grad = jax.grad(lambda z: jnp.sum(apart(z)[0] - apart(z)[1]))(LOGITS)
    plain = jax.grad(lambda z: jnp.sum(sj.cross_entropy(z, labels % 4)))(LOGITS)
    assert_close(grad, plain, rtol=1e-13, atol=1e-15)
    with pytest.raises(TypeError, match="`return_z_loss` must be True or False"):
        call(return_z_loss=1)


@every_wide_dtype
def test_sigmoid_focal_loss(dtype):
    """Gamma + 2 factors, each known to 4 eps."""
    logits = np.concatenate([np.linspace(-60, 60, 25), [1e-6, -3e-4]])[:, None].repeat(3, 1)
    logits = logits.astype(dtype)
    targets = np.array([0.0, 1.0, 0.25], dtype)
    tiny = float(finfo(dtype).tiny)
    for gamma, alpha in itertools.product((0.0, 0.5, 1.0, 2.0), (None, 0.25)):
        loss = sj.sigmoid_focal_loss(jnp.asarray(logits), targets, gamma=gamma, alpha=alpha)
        expected = oracles.sigmoid_focal_loss(logits, targets, gamma=gamma, alpha=alpha)
        assert loss.dtype == jnp.dtype(dtype)
        assert_close(loss, expected, rtol=4 * (2 + gamma) * eps(dtype), atol=tiny)


def test_sigmoid_focal_loss_at_the_edges():
    logits, targets = jnp.array([INF, -INF, INF, -INF]), jnp.array([1.0, 0.0, 0.0, 1.0])
    for gamma in (0.0, 0.5, 2.0):
        fn = lambda z, gamma=gamma: sj.sigmoid_focal_loss(z, targets, gamma=gamma)
        assert_same(fn(logits), jnp.array([0.0, 0.0, INF, INF]))
        assert (jax.grad(lambda z, fn=fn: jnp.sum(fn(z)))(logits) == 0).all()
    for args in ((NAN, 0.0, 2.0), (0.0, NAN, 2.0), (0.0, 1.0, NAN)):
        z, t, gamma = map(jnp.asarray, args)
        assert jnp.isnan(sj.sigmoid_focal_loss(z, t, gamma=gamma))
    for options, error in (
        ({"gamma": -1.0}, "`gamma` must be in"),
        ({"alpha": 1.5}, "`alpha` must be in"),
        ({"gamma": jnp.ones(3)}, "`gamma` of shape"),
        ({"where": jnp.ones(3, bool)}, "`where` of shape"),
        ({"reduction": "none"}, "`reduction` must be"),
    ):
        with pytest.raises(ValueError, match=error):
            sj.sigmoid_focal_loss(logits, targets, **options)


# Edges.


@some_losses
def test_empty_and_single(name):
    fn = LOSSES[name]
    with jax.debug_nans(True):
        for shape in ((0, 5), (2, 0, 5)):
            logits, labels = jnp.zeros(shape), jnp.zeros(shape[:-1], int)
            assert fn(logits, labels).shape == shape[:-1]
            grad = jax.grad(lambda z, y=labels: jnp.sum(fn(z, y)))(logits)
            assert grad.shape == shape
        logits, labels = jnp.array([[3.0], [-2.0]]), jnp.zeros(2, int)
        loss = fn(logits, labels)
        grad = jax.grad(lambda z: jnp.sum(fn(z, labels)))(logits)
    expected = 0.1 * logits[:, 0] ** 2 if "options" in name else np.zeros(2)  # The z-loss.
    assert_close(loss, expected, rtol=1e-15)
    assert_close(grad, 0.2 * logits if "options" in name else np.zeros((2, 1)), rtol=1e-15)
    assert jnp.isnan(fn(jnp.zeros((2, 0)), labels)).all()
    assert fn(jnp.array([1.0, 2.0]), 1).shape == ()


def edges():
    """Logits, mask and label, so that the loss is finite; NaN and inf stand where dropped."""
    cases = [
        ([0.0, 0.25, -INF, 0.5], [True] * 4, 1),
        ([0.0, NAN, 0.5, INF], [True, False, True, False], 0),
        ([NAN, 3.0, INF, -INF], [False, True, False, True], 1),
        ([1e4, 0.0, -1e4, 0.0], [True] * 4, 0),
        ([1e4, 0.0, -1e4, 0.0], [True] * 4, 1),
        ([90.0, 0.0, 1.0, 2.0], [True] * 4, 0),
        ([INF, 0.0, -INF, 1.0], [True] * 4, 0),
    ]
    return [jnp.array(column) for column in zip(*cases, strict=True)]


@some_losses
def test_edges(name):
    """Finite, and without derivatives where dropped, in both modes and two orders."""
    logits, keep, labels = edges()
    live = keep & (logits != -INF)
    # Only cross_entropy has `where`; for the others -inf stands there, by a select.
    if name.startswith("cross"):
        one = lambda z, w, y: LOSSES[name](z, y, where=w)
    else:
        one = lambda z, w, y: LOSSES[name](jnp.where(w, z, -INF), y)
    many = lambda f: jax.jit(jax.vmap(f))(logits, keep, labels)
    # The smoothed loss of a row with an infinite logit is infinite, and so is its z-loss.
    usual = np.ones(7, bool)
    if "options" in name:
        usual[-1] = False
    with jax.debug_nans(True):
        loss = many(one)
        grads = [many(mode(one)) for mode in (jax.grad, jax.jacfwd)]
        hessians = many(jax.hessian(one))
    assert jnp.isfinite(loss[usual]).all()
    assert (loss[usual] >= 0).all()
    assert jnp.isfinite(grads[0]).all()
    assert_close(grads[0], grads[1], rtol=1e-14, atol=1e-15)
    assert jnp.isfinite(hessians).all()
    for grad, hessian, kept in zip(grads[0], hessians, live, strict=True):
        assert (grad[~kept] == 0).all()
        assert (hessian[~kept] == 0).all()
        assert (hessian[:, ~kept] == 0).all()


@some_losses
def test_a_kept_nan_makes_its_own_row_nan(name):
    logits = jnp.array([[0.0, NAN, 1.0], [0.5, 0.0, 1.0], [NAN, -INF, INF]])
    for label in range(3):
        labels = jnp.full(3, label)
        loss = LOSSES[name](logits, labels)
        assert jnp.isnan(loss[0])
        assert jnp.isfinite(loss[1])
        assert jnp.isnan(loss[2])  # Also where the label is dropped.
        grad = jax.grad(lambda z, y=labels: jnp.sum(LOSSES[name](z, y)))(logits)
        assert jnp.isnan(grad[0]).any()
        assert jnp.isfinite(grad[1]).all()
        assert jnp.isnan(grad[2]).any()
        assert grad[2, 1] == 0


@pytest.mark.parametrize("block_size", [None, 2])
def test_a_nan_shows_in_losses_of_layers_that_drop_the_label(block_size):
    features, weights = jnp.ones((2, 1)), jnp.array([[1.0], [NAN], [1.0]])
    bias, labels = jnp.array([-INF, 0.0, 0.0]), jnp.array([0, 2])
    options = {"bias": bias, "block_size": block_size, "reduction": None}
    label = sj.linear_cross_entropy(features, weights, labels, **options)
    twice = features, weights, features, jnp.ones((3, 1))
    distilled = sj.linear_distillation_loss(*twice, temperature=1.0, **options)
    for losses in (label, distilled, sj.linear_jensen_shannon_divergence(*twice, **options)):
        assert jnp.isnan(losses).all()


@pytest.mark.parametrize("n", [7, 1000])
def test_a_nan_among_many_is_seen(n):
    """Reductions of XLA's CPU backend may pass over a NaN: wherever it stands, it must show."""
    call = jax.jit(lambda z, y: sj.cross_entropy(z, y))
    grad = jax.jit(jax.grad(lambda z, y: jnp.sum(sj.cross_entropy(z, y))))
    for place, label in itertools.product((0, 1, n // 2, n - 1), (0, 1)):
        logits = jnp.zeros((300, n), "float32").at[17, place].set(NAN)
        labels = jnp.full(300, label)
        assert np.flatnonzero(np.isnan(call(logits, labels))).tolist() == [17]
        assert np.flatnonzero(np.isnan(grad(logits, labels)).any(1)).tolist() == [17]


@pytest.mark.slow
def test_soft_cross_entropy_at_the_edges():
    cases = [
        ([0.0, 0.0, -INF], [0.5, 0.5, 0.0], [True] * 3, np.log(2)),
        ([0.0, 0.0, -INF], [0.5, 0.25, 0.25], [True] * 3, INF),
        ([0.0, 0.0, NAN], [0.5, 0.5, NAN], [True, True, False], np.log(2)),
        ([0.0, 0.0, INF], [0.5, 0.5, 0.75], [True, True, False], np.log(2)),
        ([-INF, -INF, -INF], [0.0, 0.0, 0.0], [True] * 3, 0.0),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [False] * 3, 0.0),
        ([INF, 0.0, 0.0], [1.0, 0.0, 0.0], [True] * 3, 0.0),
        ([0.0, 0.0, 50.0], [0.0, 0.0, 0.0], [True] * 3, 0.0),
    ]
    logits, targets, keep, expected = (jnp.array(c) for c in zip(*cases, strict=True))
    fn = lambda z, t, w: sj.soft_cross_entropy(z, t, where=w)
    many = lambda f: jax.jit(jax.vmap(f))(logits, targets, keep)
    with jax.debug_nans(True):
        assert_close(many(fn), expected, rtol=1e-15)
        for argument, mode in itertools.product((0, 1), (jax.grad, jax.jacfwd, jax.hessian)):
            derivative = many(mode(fn, argnums=argument))
            assert jnp.isfinite(derivative).all()
            assert (derivative[~keep | (logits == -INF)] == 0).all()
    assert jnp.isnan(sj.soft_cross_entropy(jnp.array([NAN, 0.0]), jnp.array([0.0, 1.0])))
    # What is infinite is constant.
    endless = jnp.array([-jnp.inf, 0.0, 0.0]), jnp.array([0.5, 0.5, 0.0])
    assert sj.soft_cross_entropy(*endless) == jnp.inf
    assert not jnp.any(jnp.stack(jax.grad(sj.soft_cross_entropy, (0, 1))(*endless)))
    # A mask of lower rank, and one that broadcasts.
    where = jnp.array([True, False, True])
    loss = sj.soft_cross_entropy(jnp.zeros((2, 3)), jnp.ones((2, 3)), where=where)
    assert_close(loss, [2 * np.log(2)] * 2, rtol=1e-15)
    assert sj.soft_cross_entropy(jnp.zeros((0, 3)), jnp.ones(3)).shape == (0,)
    assert_close(sj.soft_cross_entropy(jnp.zeros((2, 0)), jnp.ones((2, 0))), [0, 0], rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivative_of_a_distillation_loss_in_its_temperature(dtype):
    """2 T D + T^2 D' cancels: at T = 1e6 to a millionth."""
    s, t = np.array([1.0, 2.0, -0.5], dtype), np.array([0.0, 0.7, 3.0], dtype)

    def loss(heat):
        p, q = ([mp.exp(mp.mpf(float(z)) / heat) for z in row] for row in (t, s))
        p, q = ([w / mp.fsum(row) for w in row] for row in (p, q))
        return heat**2 * mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))

    slope = jax.grad(lambda heat: sj.distillation_loss(s, t, temperature=heat))
    for heat in (0.3, 1.0, 100.0, 1e6):
        with mp.workdps(80):
            wanted = float(mp.diff(loss, mp.mpf(heat), h=mp.mpf(heat) * mp.mpf(10) ** -25))
        assert_close(slope(jnp.asarray(heat, dtype)), wanted, rtol=32 * eps(dtype))


@pytest.mark.slow
def test_distillation_loss_at_the_ends_of_the_temperature():
    """0 at 0; at inf half the variance of the difference of the logits."""
    student = jnp.array([[0.3, 1.0, -2.0], [0.1, -INF, 0.4], [0.0, 1.0, 2.0]])
    teacher = jnp.array([[1.0, 0.0, 0.5], [0.2, -INF, 0.3], [-INF, 1.0, 2.0]])
    apart = np.asarray(teacher - student)[0], np.array([0.1, -0.1])
    limit = [np.var(apart[0]) / 2, np.var(apart[1]) / 2, INF]
    fn = lambda s, t, temperature: sj.distillation_loss(s, t, temperature=temperature)
    with jax.debug_nans(True):
        for temperature, expected in ((0.0, [0.0] * 3), (INF, limit), (1e300, limit)):
            given = jnp.asarray(temperature)
            assert_close(fn(student, teacher, given), expected, rtol=4e-15, atol=1e-16)
            total = lambda s, t, h: jnp.sum(fn(s, t, h)[:2])
            grads = jax.grad(total, (0, 1, 2))(student, teacher, given)
            assert all(jnp.isfinite(g).all() for g in grads)
            assert grads[2] == 0
            assert (jnp.abs(grads[0][0]).max() > 0.1) == (temperature > 0)
    # The limit continues what comes before it.
    assert_close(fn(student, teacher, 9e14)[:2], limit[:2], rtol=1e-14)
    reversed_roles = fn(teacher, student, jnp.asarray(0.0))
    assert_close(reversed_roles, [0.0, 0.0, INF], rtol=0)


def test_distillation_loss_of_infinite_logits_at_an_infinite_temperature():
    """What is infinite in both is their only choice; a hot slice leaves the others alone."""
    student = jnp.array([[INF, 0.0, 1.0], [INF, 0.0, INF], [INF, 0.0, NAN], [0.0, 1.0, 2.0]])
    teacher = jnp.array([[INF, 3.0, 2.0], [INF, 0.0, 1.0], [INF, 0.0, 1.0], [NAN, 1.0, -INF]])
    fn = lambda s, t, heat: sj.distillation_loss(s, t, temperature=heat)
    assert_close(fn(student, teacher, INF), [0.0, INF, NAN, NAN], rtol=0)
    student = jnp.array([[INF, 0.0, 1.0], [1.0, 2.0, 3.0]])
    teacher = jnp.array([[INF, 3.0, 2.0], [0.0, 1.0, 0.5]])
    for heats in ([[2.0], [INF]], [[0.0], [INF]], [[INF], [2.0]]):
        total = lambda s, heats=heats: fn(s, teacher, jnp.array(heats)).sum()
        slope = jax.grad(total)(student)
        assert (slope[0] == 0).all()
        assert (slope[1] != 0).all()


@pytest.mark.slow
def test_distillation_loss_at_the_edges():
    student = jnp.array([[0.0, -INF, 1.0], [0.0, -INF, 1.0], [0.0, 0.0, 0.0], [-INF] * 3])
    teacher = jnp.array([[0.0, -INF, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, -INF], [-INF] * 3])
    expected = [0.0, INF, 4 * np.log(1.5), 0.0]
    fn = lambda s, t: sj.distillation_loss(s, t, temperature=2.0)
    with jax.debug_nans(True):
        assert_close(fn(student, teacher), expected, rtol=4e-15, atol=1e-16)
        rows = jnp.array([0, 2, 3])  # An infinite divergence has no derivative.
        for argument, mode in itertools.product((0, 1), (jax.grad, jax.hessian)):
            derivative = jax.jit(jax.vmap(mode(fn, argnums=argument)))
            assert jnp.isfinite(derivative(student[rows], teacher[rows])).all()
    assert jnp.isnan(fn(jnp.array([NAN, 0.0]), jnp.zeros(2)))
    assert fn(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)


@some_losses
def test_a_certain_label_has_no_loss_and_no_gradient(name):
    if "options" in name:
        return  # The smoothed loss never ends.
    with jax.debug_nans(True):
        for logits in ([2000.0, 0.0, -3.0], [0.0, -INF, -INF]):
            fn = lambda z: LOSSES[name](z, jnp.asarray(0))
            value, grad = jax.value_and_grad(fn)(jnp.array(logits))
            assert value == 0
            assert (grad == 0).all()
            assert (jax.hessian(fn)(jnp.array(logits)) == 0).all()


# Errors.


@some_losses
def test_what_does_not_fit_is_refused(name):
    fn = LOSSES[name]
    for shape in ((), (1,), (4,), (3, 1), (1, 3), (3, 5), (2, 3)):  # None broadcasts.
        with pytest.raises(ValueError, match="`labels` must have the shape"):
            fn(Z, jnp.zeros(shape, int))
    for labels in (jnp.zeros(3), jnp.zeros(3, bool), jnp.zeros((3, 5)), 0.0):
        with pytest.raises(TypeError, match="labels"):
            fn(Z, labels)
    for axis in ((0, 1), (1,), None, 1.0):
        with pytest.raises(TypeError, match="axis"):
            fn(Z, Y, axis=axis)
    with pytest.raises(TypeError, match="axis"):
        fn(Z, Y, axis=[1])
    for axis in (2, -3):
        with pytest.raises(ValueError, match="axis"):
            fn(Z, Y, axis=axis)
    with pytest.raises(TypeError, match="logits"):
        fn(Z.astype(complex), Y)


def test_options_that_do_not_fit_are_refused():
    for weights in (2.0, 2, True):
        for call in (
            lambda w: sj.cross_entropy(Z, Y, class_weights=w),
            lambda w: sj.cross_entropy(Z, Y, class_weights=w, label_smoothing=0.1),
            lambda w: sj.mean_loss(T3, Y, class_weights=w),
        ):
            with pytest.raises(ValueError, match="class_weights"):
                call(weights)
    for shape in ((4,), (6,), (1,), (), (5, 1), (3, 5)):
        with pytest.raises(ValueError, match="class_weights"):
            sj.cross_entropy(Z, Y, class_weights=jnp.ones(shape))
    for name, call in {
        "class_weights": lambda x: sj.cross_entropy(Z, Y, class_weights=x),
        "label_smoothing": lambda x: sj.cross_entropy(Z, Y, label_smoothing=x),
        "z_loss": lambda x: sj.cross_entropy(Z, Y, z_loss=x),
        "gamma": lambda x: sj.focal_loss(Z, Y, gamma=x),
        "targets": lambda x: sj.soft_cross_entropy(Z, x),
        "teacher_logits": lambda x: sj.distillation_loss(Z, x, temperature=1.0),
        "student_logits": lambda x: sj.distillation_loss(x, Z, temperature=1.0),
        "losses": lambda x: sj.mean_loss(x),
        "example_weights": lambda x: sj.mean_loss(T3, example_weights=x),
        "counts": lambda x: sj.class_balanced_weights(x, beta=0.5),
    }.items():
        with pytest.raises(TypeError, match=name):
            call(Z.astype(complex))
    for name, value in (("label_smoothing", 1.5), ("label_smoothing", -0.1)):
        with pytest.raises(ValueError, match=name):
            sj.cross_entropy(Z, Y, **{name: value})
    for name in ("label_smoothing", "z_loss"):
        for shape in ((3, 1), (5,), (1, 3)):
            with pytest.raises(ValueError, match=name):
                sj.cross_entropy(Z, Y, **{name: jnp.ones(shape)})
    for gamma in (-1, -0.5, jnp.ones((3, 1))):
        with pytest.raises(ValueError, match="gamma"):
            sj.focal_loss(Z, Y, gamma=gamma)
    for alpha in (0.5, 1e5, jnp.ones(3), jnp.ones((3, 5))):
        with pytest.raises(ValueError, match="alpha"):
            sj.entmax_loss(Z, Y, alpha)
    for temperature in (-1.0, jnp.ones(3), jnp.ones((3, 5))):
        with pytest.raises(ValueError, match="temperature"):
            sj.distillation_loss(Z, Z, temperature=temperature)
    with pytest.raises(ValueError, match="student_logits"):
        sj.distillation_loss(Z[:, :4], Z, temperature=1.0)
    with pytest.raises(ValueError, match="targets"):
        sj.soft_cross_entropy(Z, jnp.ones((3, 4)))
    for fn in (sj.cross_entropy, sj.soft_cross_entropy):
        second = Y if fn is sj.cross_entropy else Z
        with pytest.raises(ValueError, match="where"):
            fn(Z, second, where=jnp.ones(3, bool))
        with pytest.raises(TypeError, match="where"):
            fn(Z, second, where=jnp.ones((3, 5)))
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            sj.class_balanced_weights(WEIGHTS, beta=beta)


def test_mean_loss_refuses_what_does_not_fit():
    for options in ({"ignore_index": 1}, {"class_weights": WEIGHTS}):
        with pytest.raises(ValueError, match="labels"):
            sj.mean_loss(T3, **options)
    with pytest.raises(ValueError, match="`labels` must come with `ignore_index`"):
        sj.mean_loss(T3, Y)
    for shape in ((), (1,), (4,), (1, 3)):
        with pytest.raises(ValueError, match="`labels` must have the shape"):
            sj.mean_loss(T3, jnp.zeros(shape, int), ignore_index=-1)
        with pytest.raises(ValueError, match="`labels` must have the shape"):
            sj.log_prob(Z, jnp.zeros(shape, int))
    with pytest.raises(TypeError, match="labels"):
        sj.mean_loss(T3, jnp.zeros(3), ignore_index=-1)
    with pytest.raises(ValueError, match="example_weights"):
        sj.mean_loss(T3, example_weights=jnp.ones(4))
    for weights in (jnp.asarray(1.0), jnp.ones((1, 5))):
        with pytest.raises(ValueError, match="class_weights"):
            sj.mean_loss(T3, Y, class_weights=weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_label_far_below_the_peak_is_pulled_up(dtype):
    """Its weight underflows, and its derivative is -1 still."""
    losses = {
        "cross_entropy": lambda z: sj.cross_entropy(z, jnp.array(0)),
        "focal_loss": lambda z: sj.focal_loss(z, jnp.array(0), gamma=2.0),
        "log_prob": lambda z: -sj.log_prob(z, jnp.array(0)),
        "linear_cross_entropy": lambda z: sj.linear_cross_entropy(
            z[None], jnp.eye(3, dtype=z.dtype), jnp.array([0]), reduction="sum"
        ),
    }
    dot = jnp.array([1.0, 0.0, 0.0]).astype(dtype)
    for name, loss in losses.items():
        for margin in (80.0, 88.0, 104.0, 120.0, 800.0, 1e9):
            z = jnp.array([-margin, 1.0, -200.0]).astype(dtype)
            gradient = np.asarray(jax.grad(loss)(z), np.float64)
            assert_close(gradient, [-1.0, 1.0, 0.0], rtol=0, atol=1e-30)
            assert abs(float(jax.jvp(loss, (z,), (dot,))[1]) + 1) < 1e-6, (name, margin)


# Memory.


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.optimized
@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy",
        "cross_entropy options",
        "sparsemax_loss",
        "entmax_loss 1.5",
        "focal_loss",
    ],
)
def test_the_gradient_holds_one_array(name):
    """The probabilities, and no one-hot array beside them."""
    searched = name.startswith(("sparsemax", "entmax"))
    shape = (8192 if searched else 1024, 4096)  # Blocks of a megabyte do not count then.
    logits = jax.ShapeDtypeStruct(shape, "float32")
    labels = jax.ShapeDtypeStruct(shape[:1], "int32")
    mean = lambda z, y: sj.mean_loss(LOSSES[name](z, y))
    if name == "cross_entropy":  # The value alone holds a quarter.
        compiled = jax.jit(mean).lower(logits, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.26 * 4 * shape[0] * shape[1]
    compiled = jax.jit(jax.grad(mean)).lower(logits, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * 4 * shape[0] * shape[1]


def test_an_unknown_count_is_not_a_class_without_examples():
    adjustment = sj.logit_adjustment(jnp.array([0.0, NAN, 1.0]))
    assert adjustment[0] == -INF
    assert jnp.isnan(adjustment[1:]).all()


@pytest.mark.parametrize("bad", ["a", [0, 1, 2], 1.5, True, jnp.arange(3)])
def test_errors_name_what_is_no_array_or_no_int(bad):
    """Strings and lists in the place of arrays; anything but an int in that of one."""
    features, weights, key = Z[:, :2], jnp.ones((5, 2)), jax.random.key(0)
    layer = functools.partial(sj.linear_cross_entropy, features, weights)
    distill = functools.partial(sj.linear_distillation_loss, *(features, weights) * 2)
    sampled = functools.partial(sj.sampled_cross_entropy, key, features, weights, Y)
    ints = {
        "ignore_index": (
            lambda x: sj.cross_entropy(Z, Y, ignore_index=x),
            lambda x: sj.mean_loss(T3, Y, ignore_index=x),
            lambda x: layer(Y, ignore_index=x),
            lambda x: sampled(num_samples=2, ignore_index=x),
        ),
        "block_size": (
            lambda x: layer(Y, block_size=x),
            lambda x: distill(temperature=1.0, block_size=x),
        ),
        "num_samples": (lambda x: sampled(num_samples=x),),
    }
    arrays = {
        "logits": (lambda x: sj.cross_entropy(x, Y),),
        "labels": (lambda x: sj.cross_entropy(Z, x), layer),
        "alpha": (lambda x: sj.entmax_loss(Z, Y, x),),
        "class_weights": (lambda x: sj.cross_entropy(Z, Y, class_weights=x),),
        "features": (lambda x: sj.linear_cross_entropy(x, weights, Y),),
        "bias": (lambda x: layer(Y, bias=x),),
        "temperature": (
            lambda x: distill(temperature=x),
            lambda x: sj.info_nce(Z, Z, temperature=x),
        ),
        "tails": (
            lambda x: sj.adaptive_log_softmax(features, weights, x, Y),
            lambda x: sj.adaptive_log_softmax(features, weights, [x], Y),
        ),
    }
    flags = {
        "forward_gradient": (lambda x: layer(Y, forward_gradient=x),),
        "symmetric": (lambda x: sj.info_nce(Z, Z, temperature=1.0, symmetric=x),),
    }
    wrong = dict(ints)
    if bad is not True:
        wrong |= flags
    if isinstance(bad, (str, list)):
        wrong |= arrays
    for name, calls in wrong.items():
        for call in calls:
            with pytest.raises(TypeError, match=f"`{name}` must"):
                call(bad)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [1.0, 20.0, 40.0])
def test_second_derivatives_of_a_confident_label(distance):
    """Of L = log(1 + e^-d) by s = 1 / (1 + e^d): L' = -s, L'' = s (1 - s)."""
    s = 1 / (1 + np.exp(distance))
    loss = np.log1p(np.exp(-distance))
    logits = jnp.array([distance, 0], "float32")
    signs = np.array([[1, -1], [-1, 1]])
    square = lambda z: sj.cross_entropy(z, 0) ** 2
    expected = 2 * (s * s + loss * s * (1 - s)) * signs
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        assert_close(jax.jit(outer(inner(square)))(logits), expected, rtol=1e-5, atol=0)
    weighted = lambda z, w: sj.cross_entropy(z, 0, class_weights=w)
    mixed = jax.hessian(weighted, (0, 1))(logits, jnp.ones(2, "float32"))
    assert_close(mixed[0][1][:, 0], [-s, s], rtol=1e-5, atol=0)
    assert_close(mixed[1][0][0], [-s, s], rtol=1e-5, atol=0)
