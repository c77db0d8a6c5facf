"""Policies against enumeration and definitions."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from tests import oracles
from tests.helpers import INF, NAN, assert_close, assert_same, draw, nan_makers, ulp_error

# What is drawn.


def counts_of(key, num_draws, values, **options):
    """How often each action was drawn, `[slices, n]`, and the first log-probabilities."""

    def once(key):
        return sj.select_action(key, values, **options)

    actions, log_probs = jax.jit(jax.vmap(once))(jax.random.split(key, num_draws))
    counts = [np.bincount(column + 1, minlength=values.shape[-1] + 1) for column in actions.T]
    return np.stack(counts), np.asarray(actions), np.asarray(log_probs)


def g_statistic(counts, probs):
    """2 sum n log(n / m): chi-squared, with as many degrees of freedom as free cells."""
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    expected = counts.sum() * probs[possible]
    seen = np.maximum(counts[possible], 1)
    return 2 * np.sum(counts[possible] * np.log(seen / expected)), possible.sum() - 1


@pytest.mark.slow
def test_draws_follow_the_mixture():
    """At each temperature, in one call: greedy, ties, cool, warm, uniform, and illegal ones."""
    values = jnp.array(
        [
            [1.0, 2.0, 0.5, 9.0, 1.5],
            [2.0, 2.0, 0.5, -INF, 1.0],
            [1.0, 2.0, 0.5, NAN, 1.5],
            [1.0, 2.0, 0.5, 0.0, 1.5],
            [1.0, 2.0, 0.5, 0.0, 1.5],
        ]
    )
    legal = jnp.ones(values.shape, bool).at[jnp.array([0, 2]), 3].set(False)
    temperature = jnp.array([[0.0], [0.0], [0.5], [1.0], [INF]])
    epsilon = jnp.array([[0.3], [0.0], [0.1], [0.0], [0.2]])
    options = {"temperature": temperature, "epsilon": epsilon, "where": legal}
    num_draws = 2**17
    counts, actions, log_probs = counts_of(jax.random.key(1), num_draws, values, **options)
    assert (counts[:, 0] == 0).all()
    probs = oracles.policy_probs(values, **options).astype(float)
    for row, wanted in zip(counts[:, 1:], probs, strict=True):
        statistic, freedom = g_statistic(row, wanted)
        # Chance beyond six standard deviations above the mean, for a few degrees: 1e-4.
        assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 6
    logs = np.log(np.where(probs > 0, probs, 1))
    expected = np.take_along_axis(
        np.broadcast_to(logs, (num_draws, *logs.shape)), actions[..., None], -1
    )
    assert_close(log_probs, expected[..., 0], rtol=1e-13, atol=1e-15)


def test_the_test_of_draws_sees_a_wrong_rate():
    probs = np.array([0.5, 0.3, 0.2])
    counts = np.round(2**17 * np.array([0.51, 0.3, 0.19])).astype(int)
    assert g_statistic(counts, probs)[0] > 50


@pytest.mark.parametrize(
    "axis", [0, *(pytest.param(axis, marks=pytest.mark.slow) for axis in (1, -1))]
)
def test_axes_and_shapes(axis):
    values, legal = draw(0, (3, 4, 5))
    options = {"temperature": 0.7, "epsilon": 0.2, "where": legal, "axis": axis}
    actions, log_probs = sj.select_action(jax.random.key(0), values, **options)
    shape = tuple(n for i, n in enumerate(values.shape) if i != axis % 3)
    assert actions.shape == log_probs.shape == shape
    assert actions.dtype == jnp.int32
    assert_same(sj.policy_log_prob(values, actions, **options), log_probs)
    allowed = np.take_along_axis(legal, np.expand_dims(np.asarray(actions), axis), axis)
    some = np.asarray(legal.any(axis))
    assert allowed[np.expand_dims(some, axis)].all()
    assert (np.asarray(actions)[~some] == -1).all()
    assert_close(
        sj.policy_probs(values, **options),
        oracles.policy_probs(values, **options),
        rtol=1e-14,
    )
    for name in ("policy_entropy", "expected_value"):
        got, wanted = (getattr(m, name)(values, **options) for m in (sj, oracles))
        assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_a_single_vector_and_no_rows():
    action, log_prob = sj.select_action(jax.random.key(0), jnp.array([3.0]))
    assert (action.shape, int(action), float(log_prob)) == ((), 0, 0.0)
    actions, log_probs = sj.select_action(jax.random.key(0), jnp.zeros((0, 3)))
    assert actions.shape == log_probs.shape == (0,)
    actions, log_probs = sj.select_action(jax.random.key(0), jnp.zeros((2, 0)), epsilon=0.5)
    assert actions.tolist() == [-1, -1]
    assert log_probs.tolist() == [-INF, -INF]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_log_probabilities_are_wide(dtype):
    values = jnp.asarray(draw(3, (4, 6), dtype=dtype)[0])
    actions, log_probs = sj.select_action(jax.random.key(0), values, epsilon=0.1)
    assert log_probs.dtype == jnp.float32
    expected = oracles.policy_log_prob(values, actions, epsilon=np.float32(0.1))
    assert ulp_error(log_probs, expected).max() <= 8


# The mixture.

PAIRS = list(
    itertools.product(
        (0.0, 1e-40, 1e-30, 1e-12, 1e-3, 0.5, 1 - 2.0**-20, 1.0), (0.02, 0.3, 1.0, 50.0, 1e4)
    )
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mixtures_keep_their_digits(dtype):
    """Probabilities from 1e-300 to within an eps of 1, and a single legal action."""
    epsilon, scale = np.array(PAIRS).astype(dtype).T[..., None]
    rows = np.array([[0.0, -1.0, -0.25, -0.9, -INF], [0.0, -1.0, -INF, -INF, -INF]])
    for row in (*rows, [-INF, 0.5, -INF, -INF, -INF]):
        values = (np.array(row) * scale).astype(dtype)
        args = (np.where(np.isnan(values), -INF, values),)
        for action in range(5):
            actions = np.full(len(PAIRS), action)
            got = sj.policy_log_prob(*map(jnp.asarray, args), actions, epsilon=epsilon)
            wanted = oracles.policy_log_prob(*args, actions, epsilon=epsilon)
            tiny = float(np.finfo(dtype).tiny)
            errors = ulp_error(got, wanted, dtype)
            # XLA flushes subnormal numbers: an epsilon of 1e-40 counts as 0 in float32.
            normal = np.abs(np.where(np.isfinite(wanted), wanted, 1)) > 1e7 * tiny
            normal &= (epsilon[:, 0] == 0) | (epsilon[:, 0] > 1e7 * tiny)
            normal |= wanted == 0
            assert errors[normal].max() <= 8, (row, action)
        got = np.asarray(sj.policy_entropy(*map(jnp.asarray, args), epsilon=epsilon))
        wanted = oracles.policy_entropy(*args, epsilon=epsilon)
        usual = np.isfinite(wanted.astype(float)) & (wanted > 1e7 * tiny)
        usual &= (epsilon[:, 0] == 0) | (epsilon[:, 0] > 1e7 * tiny)
        if usual.any():
            assert (np.abs(got - wanted) / wanted)[usual].max() <= 16 * np.finfo(dtype).eps


CORNERS = list(itertools.product((0.0, 0.5, INF), (0.0, 0.4, 1.0)))


def test_an_illegal_action_has_no_probability_and_no_derivative():
    legal = jnp.array([[True, False, True]])

    @jax.jit
    def everything(values, temperature, epsilon):
        options = {"temperature": temperature, "epsilon": epsilon, "where": legal}
        probs = lambda v: sj.policy_probs(v, **options)
        entropy = lambda v: sj.policy_entropy(v, **options)[0]
        return probs(values), jax.jacrev(probs)(values), *jax.value_and_grad(entropy)(values)

    for bad, (temperature, epsilon) in itertools.product((NAN, INF, -INF, 1e300), CORNERS):
        values = jnp.array([[0.3, bad, -0.2]])
        with jax.debug_nans(True):
            probs, jacobian, entropy, grad = everything(values, temperature, epsilon)
        assert probs[0, 1] == 0
        assert_close(probs.sum(), 1.0, rtol=1e-15)
        assert jnp.isfinite(jacobian).all()
        assert (jacobian[0, 1] == 0).all()
        assert (jacobian[..., 1] == 0).all()
        assert jnp.isfinite(grad).all()
        assert grad[0, 1] == 0
        options = {"temperature": temperature, "epsilon": epsilon, "where": legal}
        wanted = oracles.policy_entropy(values, **options)[0]
        assert_close(entropy, wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.slow
def test_epsilon_has_its_derivative_everywhere():
    values, uniform = jnp.array([0.3, 1.2, -0.2, -INF]), np.array([1, 1, 1, 0]) / 3

    @jax.jit
    def everything(temperature, epsilon):
        probs = lambda e: sj.policy_probs(values, temperature=temperature, epsilon=e)
        rows = jnp.broadcast_to(values, (3, 4))
        logs = lambda e: sj.policy_log_prob(
            rows, jnp.arange(3), temperature=temperature, epsilon=e
        )
        first = jax.jacrev(logs)
        return (
            *(jax.jacfwd(probs)(epsilon), jax.jacrev(probs)(epsilon)),
            *(first(epsilon), jax.jacfwd(first)(epsilon)),
        )

    for temperature, epsilon in CORNERS:
        probs = oracles.softmax(np.asarray(values), temperature=temperature)
        mixed = ((1 - epsilon) * probs + epsilon * uniform)[:3]
        forward, reverse, first, second = everything(temperature, epsilon)
        for got in (forward, reverse):
            assert_close(got, uniform - probs, rtol=1e-14, atol=1e-15)
        possible = mixed > 0  # -inf has derivative 0.
        ratio = np.where(possible, (uniform - probs)[:3], 0) / np.where(possible, mixed, 1)
        assert_close(first, ratio, rtol=1e-13, atol=1e-14)
        assert_close(second, -(ratio**2), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_nothing_legal():
    values, legal = jnp.array([[1.0, NAN], [0.0, 1.0]]), jnp.array([[False], [True]])
    with jax.debug_nans(True):
        actions, log_probs = sj.select_action(
            jax.random.key(0), values, where=legal, temperature=0.0, epsilon=jnp.asarray(0.1)
        )
        assert actions[0] == -1
        assert log_probs[0] == -INF
        for epsilon in (0.0, jnp.asarray(0.3)):
            options = {"where": legal, "epsilon": epsilon}
            assert (sj.policy_probs(values, **options)[0] == 0).all()
            assert sj.policy_entropy(values, **options)[0] == 0
            assert sj.expected_value(values, **options)[0] == 0
            logs = sj.policy_log_prob(values, jnp.array([-1, 1]), **options)
            assert logs[0] == -INF
            assert jnp.isfinite(logs[1])
            grad = jax.grad(lambda v, o=options: sj.expected_value(v, **o).sum())(values)
            assert (grad[0] == 0).all()
        assert sj.soft_value(values, where=legal)[0] == -INF
        assert sj.actor_critic_value(values, values, where=legal)[0] == 0
        for temperature in (
            sj.visit_count_temperature(values, 5, where=legal),
            sj.target_entropy_temperature(values, 0.5, where=legal),
            sj.mellowmax_temperature(values, omega=2.0, where=legal),
        ):
            assert temperature.shape == (2, 1)
            assert temperature[0, 0] == 0
    unknown = sj.policy_log_prob(jnp.zeros((3, 2)), jnp.array([-1, 2, 1]))
    assert jnp.isnan(unknown).tolist() == [True, True, False]


@pytest.mark.slow
def test_a_kept_nan_is_seen():
    values = jnp.array([[NAN, 0.0], [1.0, 0.0]])
    assert jnp.isnan(sj.policy_probs(values, epsilon=jnp.asarray(0.2)))[0].all()
    for row in (
        sj.select_action(jax.random.key(0), values, epsilon=0.5)[1],
        sj.policy_entropy(values, epsilon=0.2),
        sj.soft_value(values),
        sj.expected_value(values),
        sj.actor_critic_value(values, jnp.zeros((2, 2))),
        sj.visit_count_temperature(values, 5)[:, 0],
        sj.target_entropy_temperature(values, 0.5)[:, 0],
        sj.mellowmax_temperature(values, omega=2.0)[:, 0],
    ):
        assert jnp.isnan(row).tolist() == [True, False]
    for epsilon in (-0.1, 1.1, NAN):
        assert jnp.isnan(sj.policy_probs(values[1], epsilon=jnp.asarray(epsilon))).all()


@pytest.mark.slow
def test_no_nan_is_made_on_the_way():
    values, legal = jnp.array([0.0, -INF, 1.0, 0.25]), jnp.array([True, True, False, True])

    def everything(z, t, e):
        options = {"temperature": t, "where": legal}
        action = jnp.asarray(0)
        return (
            sj.policy_log_prob(z, action, epsilon=e, **options)
            + sj.policy_entropy(z, epsilon=e, **options)
            + sj.expected_value(z, epsilon=e, **options)
            + sj.policy_gradient_loss(z, action, 1.5, entropy_cost=e, where=legal)
            + sj.clipped_surrogate_loss(z, action, -1.0, 1.5, entropy_cost=e, where=legal)
        )

    for temperature, epsilon in itertools.product((0.0, 0.5, INF), (0.0, 0.5, 1.0)):
        args = (values, jnp.asarray(temperature), jnp.asarray(epsilon))
        assert nan_makers(lambda *a: jax.vjp(everything, *a)[1](1.0), *args) == []
        ones = (jnp.ones(4), 1.0, 1.0)
        assert nan_makers(lambda *a, o=ones: jax.jvp(everything, a, o), *args) == []


# Losses.


def test_the_mean_gradient_is_that_of_the_expected_reward():
    """By enumeration: sum_a pi_a grad loss(a, r_a) = -grad sum_a pi_a r_a."""
    rng = np.random.default_rng(0)
    logits, rewards = rng.standard_normal((2, 6)), rng.standard_normal(6)
    legal = np.array([[True] * 6, [True, False, True, True, False, True]])
    logits[1, 1] = NAN
    actions = jnp.arange(6)
    for z, mask in zip(jnp.asarray(logits), jnp.asarray(legal), strict=True):
        probs = sj.softmax(z, where=mask)
        of_each = jax.vmap(
            lambda a, r, z=z, m=mask: jax.grad(sj.policy_gradient_loss)(z, a, r, where=m)
        )(actions, jnp.asarray(rewards))
        assert (of_each[:, ~mask] == 0).all()
        value = lambda z, m=mask: jnp.sum(sj.softmax(z, where=m) * rewards)
        assert_close(probs @ of_each, -jax.grad(value)(z), rtol=1e-13, atol=1e-15)


def test_policy_gradient_at_the_edges():
    logits = jnp.array([[0.0, 1.0, -INF]] * 6)
    actions = jnp.array([2, 2, 2, 0, 3, -1])
    advantages = jnp.array([0.0, 1.5, -1.5, 0.0, 0.0, 0.0])
    loss = lambda z, b: sj.policy_gradient_loss(z, actions, b)
    value = loss(logits, advantages)
    assert_close(value, [0.0, INF, -INF, 0.0, NAN, NAN], rtol=0)
    grads = jax.grad(lambda z, b: jnp.sum(loss(z, b)[:4]), (0, 1))(logits, advantages)
    assert jnp.isfinite(grads[0]).all()
    assert (grads[0] == 0).all()
    assert_close(grads[1][3], math.log(1 + math.e), rtol=1e-14)  # -log p: A = 0 is no corner.
    whole = jax.grad(lambda z: jnp.sum(loss(z, advantages + 1)))(logits)
    assert (whole[4:] == 0).all()  # An unknown action teaches nothing, and spoils nothing.
    nothing = sj.policy_gradient_loss(jnp.full((1, 3), -INF), jnp.array([-1]), jnp.array([0.0]))
    assert nothing.tolist() == [0.0]


def test_a_confident_policy_keeps_its_gradient():
    logits = jnp.array([40.0, 0.0, 0.0], jnp.float32)
    grad = jax.grad(sj.policy_gradient_loss)(logits, jnp.array(0), 2.0)
    tail = math.exp(-40) / (1 + 2 * math.exp(-40))
    assert_close(grad, 2 * tail * np.array([-2, 1, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "counted"),
    [
        (1.0, 2.0, 1.0),
        (1.1, 2.0, 1.1),
        (1.3, 2.0, None),
        (0.5, 2.0, 0.5),
        (1.0, -2.0, 1.0),
        (0.9, -2.0, 0.9),
        (0.5, -2.0, None),
        (1.3, -2.0, 1.3),
    ],
)
def test_clipped_surrogate(ratio, advantage, counted):
    """By hand, in every region: what counts is the ratio, or a bound without a gradient."""
    logits, action = jnp.array([0.4, -0.3, 0.1]), jnp.array(1)
    log_prob = sj.log_prob(logits, action)
    old = log_prob - math.log(ratio)
    loss = lambda z: sj.clipped_surrogate_loss(z, action, old, advantage)
    bound = 1.2 if advantage > 0 else 0.8
    wanted = -advantage * (bound if counted is None else counted)
    assert_close(loss(logits), wanted, rtol=1e-14)
    slope = 0.0 if counted is None else -advantage * counted
    expected = slope * jax.grad(sj.log_prob)(logits, action)
    assert_close(jax.grad(loss)(logits), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.slow
def test_clipped_surrogate_at_the_edges():
    """At the old policy it is the policy gradient, whatever the clip; nothing is NaN."""
    logits, actions = jnp.array([[0.4, -0.3, -INF]] * 5), jnp.array([0, 1, 2, 2, 0])
    log_probs = sj.policy_log_prob(logits, actions)
    advantages = jnp.array([1.5, -0.5, 2.0, -2.0, 0.0])
    old = log_probs.at[3].set(-2.0)
    with jax.debug_nans(True):
        for clip in (0.0, 0.2, INF):
            surrogate = lambda z, c=clip: sj.clipped_surrogate_loss(
                z, actions, old, advantages, clip=c
            )
            loss = surrogate(logits)
            bounds = [-1.5, 0.5, 0.0, 2 * (1 - clip), 0.0]
            assert_close(
                loss, [max(b, 0) if i == 3 else b for i, b in enumerate(bounds)], rtol=1e-14
            )
            got = jax.grad(lambda z, f=surrogate: jnp.sum(f(z)))(logits)
            plain = lambda z: jnp.sum(sj.policy_gradient_loss(z, actions, advantages)[:2])
            assert_close(got, jax.grad(plain)(logits), rtol=1e-14, atol=1e-16)
    far = sj.clipped_surrogate_loss(logits[0], jnp.array(0), -1e4, jnp.array([0.0, 1.0])[1])
    assert_close(far, -1.2, rtol=1e-14)
    far = functools.partial(sj.clipped_surrogate_loss, logits[0], jnp.array(0), -1e4)
    assert jnp.isfinite(far(-1.0))
    assert jnp.isfinite(jax.grad(far)(-1.0))
    assert jnp.isnan(sj.clipped_surrogate_loss(logits[0], jnp.array(0), NAN, 1.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_losses_are_wide_and_broadcast(dtype):
    logits = jnp.asarray(draw(5, (2, 3, 4), dtype=dtype)[0])
    actions = jnp.array([[0, 1, 2], [3, 2, 1]], jnp.int8)
    advantages = np.array([1.0, -1.0, 0.5])
    kwargs = {"entropy_cost": 0.25}
    got = sj.policy_gradient_loss(logits, actions, advantages, **kwargs)
    assert got.dtype == jnp.float32
    assert got.shape == (2, 3)
    wanted = oracles.policy_gradient_loss(logits, actions, advantages, **kwargs)
    assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    old = np.full((2, 1), -1.25)
    got = sj.clipped_surrogate_loss(logits, actions, old, advantages, clip=0.25, **kwargs)
    assert got.dtype == jnp.float32
    wanted = oracles.clipped_surrogate_loss(
        logits, actions, old, advantages, clip=0.25, **kwargs
    )
    assert_close(got, wanted, rtol=1e-6, atol=1e-6)


RATIOS = [
    # log_prob is about 0, so that the ratio is exp(-old); the other action has e^-gap.
    (20.0, -87.5, -10.0, 0.2),
    (20.0, -87.5, 10.0, INF),
    (60.0, -120.0, -3.0, 0.2),
    (60.0, -120.0, 3.0, INF),
    (20.0, -30.0, -1e30, 0.2),
    (1.0, -3.0, -1e-30, 0.2),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("gap", "old", "advantage", "clip"), RATIOS)
def test_a_ratio_that_overflows_has_its_gradient(dtype, gap, old, advantage, clip):
    """d loss / dz = -A r (1 - pi_a) [1, -1], in which only r leaves the range of float32."""
    logits = jnp.array([gap, 0.0], dtype)
    loss = lambda z: sj.clipped_surrogate_loss(z, jnp.array(0), old, advantage, clip=clip)
    value, grad = jax.value_and_grad(loss)(logits)
    own = -np.log1p(np.exp(-gap))
    exact = -advantage * np.exp(own - old) / (1 + np.exp(gap))
    limits = jnp.finfo(dtype)
    if float(limits.tiny) < abs(exact) < float(limits.max):
        # The logarithm of the ratio errs by about 100 ulp.
        assert_close(grad, [exact, -exact], rtol=float(limits.eps) + 2e-5)
    assert jnp.isfinite(value)
    highest = float(jnp.finfo("float32").max)
    assert_close(
        value,
        np.clip(-advantage * np.exp(own - old), -highest / np.e, highest / np.e),
        rtol=2e-5,
    )


@pytest.mark.parametrize("clip", [0.2, INF])
def test_one_bad_step_spoils_no_gradient(clip):
    """Whatever one step's numbers are, a network's gradient is made of finite numbers."""
    inputs = jnp.array([[0.0, 1.0], [1.0, 0.0]], jnp.float32)
    for advantage, old in itertools.product(
        (-10.0, 10.0, -3e38, INF, -INF), (-200.0, -1e30, -INF)
    ):
        olds, advantages = (jnp.array([x, 1.0], jnp.float32) for x in (old, advantage))

        def loss(weights, olds, advantages):
            actions = jnp.array([0, 1])
            return jnp.mean(
                sj.clipped_surrogate_loss(
                    inputs @ weights, actions, olds, advantages, clip=clip
                )
            )

        weights = jnp.array([[0.3, -0.2], [1.0, 0.5]], jnp.float32)
        value, grads = jax.value_and_grad(loss, (0, 1, 2))(weights, olds, advantages)
        for leaf in (value, *grads):
            assert jnp.isfinite(leaf).all(), (advantage, old)


def test_losses_at_the_temperature_of_the_policy():
    """Acting and learning at T: the ratio is 1, and the gradient the same as of z / T at 1."""
    logits, actions = jnp.asarray(draw(11, (6, 4))[0]), jnp.array([0, 1, 2, 3, 0, 1])
    advantages = jnp.array([1.0, -1.0, 0.5, 2.0, -0.5, 1.5])

    def check(temperature):
        options = {"temperature": temperature}
        old = sj.policy_log_prob(logits, actions, **options)
        surrogate = lambda z: sj.clipped_surrogate_loss(z, actions, old, advantages, **options)
        plain = lambda z: sj.policy_gradient_loss(z, actions, advantages, **options)
        by_hand = lambda z: sj.policy_gradient_loss(z / temperature, actions, advantages)
        assert_close(surrogate(logits), -advantages, rtol=1e-14)
        first, second, wanted = (
            jax.grad(lambda z, f=f: jnp.sum(f(z)))(logits) for f in (surrogate, plain, by_hand)
        )
        assert_close(first, wanted, rtol=1e-12, atol=1e-14)
        assert_close(second, wanted, rtol=1e-12, atol=1e-14)

    for temperature in (0.5, jnp.linspace(0.3, 2.0, 6)[:, None], INF):
        check(temperature)
    values = jnp.asarray(draw(12, (6, 4))[0])
    got = sj.actor_critic_value(values, logits, temperature=0.3, policy_temperature=0.5)
    assert_close(got, sj.actor_critic_value(values, logits / 0.5, temperature=0.3), rtol=1e-13)


def test_losses_of_a_greedy_policy():
    logits, actions = jnp.array([[0.0, 2.0, 2.0]] * 2), jnp.array([1, 0])
    advantages = jnp.array([2.0, 2.0])
    call = lambda z, t: sj.policy_gradient_loss(z, actions, advantages, temperature=t)
    assert_close(call(logits, 0.0), [2 * math.log(2), INF], rtol=1e-15)
    old = jnp.log(jnp.array([0.5, 0.25]))
    clipped = lambda z, t: sj.clipped_surrogate_loss(z, actions, old, advantages, temperature=t)
    assert_close(clipped(logits, 0.0), [-2.0, 0.0], rtol=1e-15)
    with jax.debug_nans(True):
        for loss in (call, clipped):
            for grad in jax.grad(lambda *a, f=loss: jnp.sum(f(*a)[:1]), (0, 1))(logits, 0.0):
                assert (grad == 0).all()


@pytest.mark.slow
def test_second_derivatives_of_the_ratio():
    options = {"clip": 0.5, "entropy_cost": 0.1}
    fn = lambda z, old, a, t: sj.clipped_surrogate_loss(
        z, jnp.array([0, 2]), old, a, temperature=t, **options
    )
    logits = jnp.array([[0.3, -0.4, 0.1, -INF], [0.2, 0.9, -0.3, 0.1]])
    old = sj.policy_log_prob(logits, jnp.array([0, 2]), temperature=0.7) - 0.1
    finite = lambda z, *rest: fn(jnp.where(logits == -INF, -INF, z), *rest)
    args = (jnp.where(logits == -INF, 0, logits), old, jnp.array([1.5, -0.7]), jnp.asarray(0.7))
    check_grads(finite, args, order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


# Steps that are left out.

STEPS = jnp.array([[True, True, False], [False, False, False], [True, True, True]])
LEFT_OUT = {
    "policy_gradient_loss": (
        lambda z, b, t, c, a: sj.policy_gradient_loss(
            z, a, b, temperature=t, entropy_cost=c, where=STEPS
        ),
        (2, 1, 0, 1),
    ),
    "clipped_surrogate_loss": (
        lambda z, old, b, d, t, c, a: sj.clipped_surrogate_loss(
            z, a, old, b, clip=d, temperature=t, entropy_cost=c, where=STEPS
        ),
        (2, 1, 1, 1, 0, 1),
    ),
    "actor_critic_value": (
        lambda q, z, t, u, a: sj.actor_critic_value(
            q, z, temperature=t, policy_temperature=u, where=STEPS
        ),
        (2, 2, 0, 0),
    ),
    "expected_value": (
        lambda q, t, e, a: sj.expected_value(q, temperature=t, epsilon=e, where=STEPS),
        (2, 0, 0),
    ),
    "soft_value": (
        lambda q, t, a: _finite(sj.soft_value(q, temperature=t, where=STEPS)),
        (2, 0),
    ),
    "policy_entropy": (
        lambda q, t, e, a: sj.policy_entropy(q, temperature=t, epsilon=e, where=STEPS),
        (2, 0, 0),
    ),
    "policy_probs": (
        lambda q, t, e, a: sj.policy_probs(q, temperature=t, epsilon=e, where=STEPS),
        (2, 0, 0),
    ),
    "visit_count_temperature": (
        lambda q, n, a: sj.visit_count_temperature(q, n, where=STEPS),
        (2, 0),
    ),
    "target_entropy_temperature": (
        lambda q, h, a: sj.target_entropy_temperature(q, h, where=STEPS),
        (2, 0),
    ),
    "mellowmax_temperature": (
        lambda q, o, a: sj.mellowmax_temperature(q, omega=o, where=STEPS),
        (2, 0),
    ),
}
PLAIN = (
    np.array([[0.5], [0.4], [0.3]]),
    np.array([0.5, 0.4, 0.3]),
    np.array([[0.1, 0.5, 0.2], [0.3, 0.2, 0.1], [1.0, 0.0, -1.0]]),
)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_step_that_is_left_out_reaches_nothing(name):
    """Every argument of it is poisoned; the values and all gradients are those without."""
    call, kinds = LEFT_OUT[name]

    @jax.jit
    def everything(actions, *args):
        total = lambda *args: jnp.sum(call(*args, actions))
        return call(*args, actions), jax.grad(total, tuple(range(len(args))))(*args)

    plain = [jnp.asarray(PLAIN[kind]) for kind in kinds]
    clean = everything(jnp.array([0, 0, 2]), *plain)
    assert (np.asarray(clean[0][1]) == 0).all()
    for bad, unknown in itertools.product((NAN, INF, -INF, 1e300, -1.0), (99, -1)):
        poisoned = [x.at[1].set(bad) for x in plain]
        values, grads = everything(jnp.array([0, unknown, 2]), *poisoned)
        assert_same(values, clean[0])
        assert_same(grads, clean[1])
        for grad in grads:
            assert (grad[1] == 0).all()


def test_a_mask_of_steps_alone():
    logits, actions = jnp.array([[0.0, 1.0], [NAN, 0.0]]), jnp.array([1, 7])
    steps = jnp.array([True, False])
    call = lambda z: sj.policy_gradient_loss(z, actions, 1.0, where=steps[:, None])
    assert_close(call(logits), [math.log1p(math.exp(-1)), 0.0], rtol=1e-14)
    mean = lambda z: sj.mean_loss(call(z), example_weights=steps)
    assert_close(mean(logits), math.log1p(math.exp(-1)), rtol=1e-14)
    assert jnp.isfinite(jax.grad(mean)(logits)).all()


# Ties.


@pytest.mark.parametrize("axis", [0, 1, (0, 1), None])
def test_the_first_of_ties(axis):
    values = jnp.array([[1.0, 3.0, 3.0, -INF], [3.0, 3.0, 0.0, 2.0], [-INF, 0.0, 3.0, 3.0]])
    options = {"temperature": 0.0, "ties": "first", "axis": axis}
    probs = np.asarray(sj.policy_probs(values, **options))
    flat = np.asarray(values)
    if axis in (0, 1):
        expected = np.zeros_like(flat)
        places = np.expand_dims(flat.argmax(axis), axis)
        np.put_along_axis(expected, places, 1, axis)
    else:
        expected = (np.arange(flat.size) == flat.argmax()).reshape(flat.shape).astype(float)
    np.testing.assert_array_equal(probs, expected)
    assert not np.asarray(sj.policy_entropy(values, **options)).any()
    explored = np.asarray(sj.policy_probs(values, epsilon=0.3, **options))
    legal = flat != -INF
    uniform = legal / legal.sum(axis if axis in (0, 1) else None, keepdims=True)
    assert_close(explored, 0.7 * expected + 0.3 * uniform, rtol=1e-14)


def test_the_same_row_gives_the_same_action_with_any_key():
    rows = np.random.default_rng(0).integers(0, 3, (200, 7)).astype("float32")
    rows[0], rows[1, 0], rows[2, 3] = -INF, NAN, INF
    rows[2, 5] = INF
    rows = jnp.asarray(rows, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key: sj.select_action(key, rows, temperature=0.0, ties="first")
    actions, log_probs = jax.vmap(draw)(keys)
    expected = np.where(np.arange(200) < 2, -1, np.argmax(np.asarray(rows, float), -1))
    np.testing.assert_array_equal(actions, np.broadcast_to(expected, (5, 200)))
    assert (log_probs[:, 2:] == 0).all()
    again = sj.policy_log_prob(rows[2:], actions[0, 2:], temperature=0.0, ties="first")
    assert_same(again, log_probs[0, 2:])
    shared = jax.vmap(lambda key: sj.select_action(key, rows, temperature=0.0)[0])(keys)
    assert (shared != shared[:1]).any()
    # At other temperatures, per slice, ties make no difference.
    options = {"temperature": jnp.where(jnp.arange(200) % 2, 0.5, 0.0)[:, None]}
    warm = sj.policy_probs(rows, ties="first", **options)[3::2]
    assert_same(warm, sj.policy_probs(rows, **options)[3::2])


# Values.


def test_means_of_values_at_the_ends_of_the_range():
    """The distance of two values overflows, and their mean does not."""
    values = jnp.array([3e38, -3e38, -3e38], jnp.float32)
    for got in (
        sj.expected_value(values, temperature=INF),
        sj.actor_critic_value(values, jnp.zeros(3, jnp.float32), temperature=0.0),
    ):
        assert_close(got, -1e38, rtol=1e-6)
    tiny = jnp.array([3e-36, 1.5e-36], jnp.float32)
    assert_close(sj.expected_value(tiny, temperature=INF), 2.25e-36, rtol=1e-6)
    infinite = jnp.array([[INF, 1.0], [-INF, -INF], [-INF, 1.0]])
    got = sj.actor_critic_value(infinite, jnp.zeros((3, 2)), temperature=0.0)
    assert got.tolist() == [INF, -INF, -INF]


def test_soft_value_is_the_best_there_is():
    """The optimum of value plus temperature times entropy, and what any other policy lacks."""
    values, legal = draw(7, (4, 6), scale=2.0)
    values, legal = jnp.asarray(values), jnp.asarray(legal)
    other = jnp.asarray(draw(8, (4, 6))[0])
    for temperature in (0.05, 0.7, 20.0):
        best = sj.soft_value(values, temperature=temperature, where=legal)
        assert_close(
            best, oracles.soft_value(values, temperature=temperature, where=legal), rtol=1e-14
        )
        options = {"temperature": temperature, "where": legal}
        own = sj.actor_critic_value(values, values / temperature, **options)
        assert_close(own, best, rtol=1e-13)
        lacking = sj.kl_divergence(other, values / temperature, where=legal)
        got = best - sj.actor_critic_value(values, other, **options)
        assert_close(got, temperature * lacking, rtol=1e-12)
        count = legal.sum(-1)
        mellow = sj.mellowmax(values, omega=1 / temperature, where=legal)
        assert_close(best - temperature * jnp.log(count), mellow, rtol=1e-12, atol=1e-13)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_soft_value_just_above_zero(dtype):
    """The best action is worth 0, and what the others add must keep its digits."""
    for gap in (1.0, 20.0, 60.0, 86.0):
        values = np.array([0, -gap, -gap - 0.5]).astype(dtype)
        exact = oracles.soft_value(values)
        assert ulp_error(np.asarray(sj.soft_value(jnp.asarray(values))), exact, dtype) <= 4


def test_derivatives_of_soft_value():
    """The policy in the values, its entropy in the temperature, at 0 too."""
    values = jnp.array([1.0, 3.0, 3.0, -INF])
    call = lambda v, t: sj.soft_value(v, temperature=t)
    for temperature in (0.0, 1e-300, 0.5, 2.0):
        with jax.debug_nans(True):
            by_value, by_temperature = jax.jacrev(call, (0, 1))(values, temperature)
            forward = jax.jacfwd(call, (0, 1))(values, temperature)
        policy = oracles.softmax(np.asarray(values), temperature=temperature)
        entropy = oracles.policy_entropy(np.asarray(values), temperature=temperature)
        for got in (by_value, forward[0]):
            assert_close(got, policy, rtol=1e-14, atol=1e-15)
        for got in (by_temperature, forward[1]):
            assert_close(got, entropy, rtol=1e-13)
    assert_close(call(values, 0.0), 3.0, rtol=0)
    assert call(values, INF) == INF
    assert call(values[:1], INF) == 1.0
    assert (jax.grad(call)(values, INF) == 0).all()
    assert sj.soft_value(jnp.array([INF, 0.0])) == INF
    assert jnp.isfinite(jax.grad(sj.soft_value)(jnp.array([INF, 0.0]))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_values_of_huge_and_tiny_numbers(dtype):
    info = jnp.finfo(dtype)
    rows = np.array([[1.0, 0.5, -1.0], [1.0, 1.0, 0.0], [-1.0, -1.0, -0.5]])
    for scale in (float(info.max) / 4, 1.0, float(info.tiny) * 8):
        values = jnp.asarray(rows * scale).astype(dtype)
        for temperature in (scale, 1.0, 0.0):
            temperature = jnp.asarray(temperature).astype(dtype)
            for name in ("soft_value", "expected_value"):
                got = getattr(sj, name)(values, temperature=temperature)
                assert got.dtype == jnp.dtype(dtype)
                wanted = getattr(oracles, name)(values, temperature=temperature)
                size = np.abs(np.asarray(values, float)).max(-1) + float(temperature) * 2
                assert (
                    np.abs(np.asarray(got, float) - wanted) <= 4 * float(info.eps) * size
                ).all()


def test_expected_value():
    values = jnp.array([1.0, 3.0, -2.0, NAN])
    legal = jnp.array([True, True, True, False])
    greedy = sj.expected_value(values, temperature=0.0, epsilon=0.3, where=legal)
    assert_close(greedy, 0.7 * 3 + 0.3 * 2 / 3, rtol=1e-15)
    options = {"temperature": 0.8, "epsilon": 0.3, "where": legal}
    wanted = jnp.sum(jnp.where(legal, sj.policy_probs(values, **options) * values, 0))
    assert_close(sj.expected_value(values, **options), wanted, rtol=1e-15)
    # A large common part costs the derivative no digits.
    grad = jax.grad(lambda v: sj.expected_value(v, **options))
    assert_close(grad(values + 2.0**40), grad(values), rtol=1e-14, atol=1e-15)
    assert sj.expected_value(jnp.array([INF, 1.0])) == INF
    assert jnp.isfinite(jax.grad(sj.expected_value)(jnp.array([INF, 1.0]))).all()


def test_actor_critic_value_leaves_out_what_the_policy_drops():
    logits = jnp.array([0.3, -INF, -0.2, 0.1])
    legal = jnp.array([True, True, True, False])
    call = lambda q, z, t: sj.actor_critic_value(q, z, temperature=t, where=legal)
    clean = call(jnp.array([1.0, 0.0, 2.0, 0.0]), logits, 0.5)
    for bad in (NAN, INF, -INF):
        values = jnp.array([1.0, bad, 2.0, bad])
        with jax.debug_nans(True):
            assert_same(call(values, logits, 0.5), clean)
            grads = jax.grad(call, (0, 1, 2))(values, logits, 0.5)
        for grad in grads:
            assert jnp.isfinite(grad).all()
        assert (grads[0][jnp.array([1, 3])] == 0).all()
    assert call(jnp.array([1.0, 0.0, -INF, 0.0]), logits, 0.5) == -INF
    with pytest.raises(ValueError, match="`values` of shape"):
        sj.actor_critic_value(jnp.ones((2, 3)), jnp.ones((1, 3)))


def test_bellman_target():
    rewards, discounts = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.9, 0.0, 0.0])
    values = jnp.array([10.0, -INF, 7.0])
    with jax.debug_nans(True):
        assert sj.bellman_target(rewards, discounts, values).tolist() == [10.0, 2.0, 3.0]
        grads = jax.grad(lambda *a: jnp.sum(sj.bellman_target(*a)), (0, 1, 2))(
            rewards, discounts, values
        )
    assert_same(grads, (jnp.ones(3), jnp.array([10.0, 0.0, 7.0]), discounts))
    assert sj.bellman_target(1.0, 0.5, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert sj.bellman_target(1, 1, jnp.ones(3, int)).dtype == jnp.float64
    half = sj.bellman_target(*(jnp.ones(2, jnp.bfloat16) for _ in range(3)))
    assert half.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="`rewards` of shape"):
        sj.bellman_target(jnp.ones((2, 3)), 0.9, jnp.ones(3))


# Temperatures.


def test_exponential_temperature():
    call = functools.partial(sj.exponential_temperature, initial=2.0, final=0.5)
    steps = jnp.arange(0, 2**20, 2**18)
    assert (call(steps, half_life=INF) == 2.0).all()  # The constant schedule.
    assert call(steps, half_life=0.0).tolist() == [2.0, 0.5, 0.5, 0.5]
    assert_close(call(jnp.array([0, 3, 6]), half_life=3.0), [2.0, 1.25, 0.875], rtol=1e-15)
    assert call(jnp.array(5, jnp.int8), half_life=3.0).dtype == jnp.float64
    assert call(jnp.ones((), jnp.float32), half_life=3.0).dtype == jnp.float32
    far = call(jnp.float32(1e6), half_life=1e6)
    assert_close(far, 1.25, rtol=1e-6)
    with jax.debug_nans(True):
        for half_life in (0.0, 2.0, INF):
            grads = jax.grad(lambda t, h: call(t, half_life=h), (0, 1))(1.5, half_life)
            assert all(math.isfinite(g) for g in grads)


def test_visits_leave_each_action_its_share():
    """At least 1 / (n N) for each of n actions, and all for the best one in the end."""
    values, legal = draw(9, (3, 6), scale=10.0)
    values, legal = jnp.asarray(values), jnp.asarray(legal)
    num_legal = legal.sum(-1, keepdims=True)
    for counts in (0, 1, 2, 10, 10**6, 1e300):
        temperature = sj.visit_count_temperature(values, counts, where=legal)
        assert temperature.shape == (3, 1)
        probs = sj.policy_probs(values, temperature=temperature, where=legal)
        bound = 1 / num_legal / max(counts, 1)
        assert (jnp.where(legal, probs, 1) >= bound * (1 - 1e-10)).all()
    best = jnp.max(jnp.where(legal, values, -INF), -1)
    assert (jnp.max(probs, -1) > 0.99).all()
    assert_same(jnp.max(jnp.where(probs > 0.99, values, -INF), -1), best)
    ties = jnp.array([2.0, 2.0])
    assert sj.visit_count_temperature(ties, 5) == 0
    assert sj.visit_count_temperature(jnp.array([INF, INF, -INF]), 5) == 0
    assert sj.visit_count_temperature(ties, 1) == INF
    with jax.debug_nans(True):
        grads = jax.grad(lambda v, n: sj.visit_count_temperature(v, n)[0], (0, 1))
        assert_close(
            grads(jnp.array([0.0, 1.0]), 8.0)[1], -1 / (8 * math.log(8) ** 2), rtol=1e-14
        )
        for counts in (0.0, 1.0):
            assert grads(jnp.array([0.0, 1.0]), counts)[1] == 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_temperatures_solve_their_equations(dtype):
    """At scales from the smallest to the largest numbers, and for gaps of different size."""
    info = np.finfo(dtype)
    rows = np.array(
        [[1.0, 0.5, -1.0], [1.0, 1 - 1e-5, 0.0], [1.0, 1.0, 0.0], [0.0, -0.1, -INF]]
    )
    scales = (float(info.max) / 8, 1e10, 1.0, 1e-10, float(info.tiny) * 2**20)
    values = np.concatenate([rows * s for s in scales]).astype(dtype)
    scale = np.repeat(scales, len(rows)).astype(dtype)[:, None]
    lowest, highest = (
        np.tile(np.log(n), len(scales))[:, None] for n in ([1, 1, 2, 1], [3, 3, 3, 2])
    )
    find = jax.jit(sj.target_entropy_temperature)
    for share in (1e-3, 0.25, 0.9):
        target = (lowest + share * (highest - lowest)).astype(dtype)
        temperature = find(values, target)
        assert temperature.dtype == jnp.dtype(dtype)
        got = oracles.policy_entropy(values, temperature=temperature)
        # A temperature within a few eps moves the entropy by as much, at most.
        assert_close(got, target[:, 0], rtol=64 * info.eps)
    find = jax.jit(lambda v, o: sj.mellowmax_temperature(v, omega=o))
    usable = np.abs(np.log2(scale[:, 0].astype(float))) < 100
    for omega in (0.5, 5.0, 60.0):
        rate = (omega / scale[usable]).astype(dtype)
        temperature = find(values[usable], rate)
        got = oracles.expected_value(values[usable], temperature=temperature)
        wanted = oracles.mellowmax(values[usable], omega=rate)
        gap = np.abs(got - wanted) / scale[usable, 0]
        assert gap.max() <= 64 * info.eps


@pytest.mark.slow
def test_ends_of_the_temperatures_and_their_scale():
    values = jnp.array([[1.0, 2.0, 4.0], [4.0, 4.0, 1.0], [2.0, 2.0, 2.0]])
    by_entropy = lambda h: sj.target_entropy_temperature(values, h)[:, 0].tolist()
    with jax.debug_nans(True):
        assert by_entropy(0.0) == [0.0, 0.0, 0.0]
        assert by_entropy(math.log(3)) == [INF, INF, INF] or by_entropy(1.1) == [INF] * 3
        middle = by_entropy(math.log(2))
        assert middle[0] > 0
        assert middle[1:] == [0.0, 0.0]
        by_value = lambda o: sj.mellowmax_temperature(values, omega=o)[:, 0].tolist()
        assert by_value(INF) == [0.0, 0.0, 0.0]
        assert by_value(0.0) == by_value(-1.0) == [INF, INF, INF]
        assert by_value(2.0)[2] == 0
        infinite = jnp.array([INF, 0.0, 1.0])
        assert sj.target_entropy_temperature(infinite, 0.5) == 0
        assert sj.mellowmax_temperature(infinite, omega=1.0) == 0


@pytest.mark.slow
def test_derivatives_of_temperatures():
    """0 at the ends; homogeneous, so that <dT/dq, q> = T; free of shifts: the sum is 0."""
    values = jnp.array([[1.0, 2.0, 4.0], [4.0, 4.0, 1.0], [2.0, 2.0, 2.0]])

    def finite_sum(values, target):
        temperature = sj.target_entropy_temperature(values, target)
        return jnp.sum(jnp.where(jnp.isinf(temperature), 0, temperature))

    with jax.debug_nans(True):
        for target in (0.0, 0.5, 1.5):
            for grad in jax.grad(finite_sum, (0, 1))(values, target):
                assert jnp.isfinite(grad).all()
    for call in (
        lambda v: sj.target_entropy_temperature(v, 0.6)[0],
        lambda v: sj.mellowmax_temperature(v - jnp.mean(v), omega=3.0)[0],
    ):
        grad = jax.grad(call)(values[0])
        assert_close(grad.sum(), 0.0, rtol=0, atol=1e-14)
    grad = jax.grad(lambda v: sj.target_entropy_temperature(v, 0.6)[0])(values[0])
    assert_close(grad @ values[0], sj.target_entropy_temperature(values[0], 0.6)[0], rtol=1e-13)
    wide = sj.target_entropy_temperature(values * 2.0**50, 0.6)[0]
    assert_close(wide, 2.0**50 * sj.target_entropy_temperature(values, 0.6)[0], rtol=1e-14)


# Transformations.


@pytest.mark.slow
def test_keys_values_and_options_batch():
    """Each lane draws as it would alone, and a key is all that a draw depends on."""
    values = jnp.asarray(draw(4, (3, 2, 5))[0])
    keys = jax.random.split(jax.random.key(0), 3)
    epsilon = jnp.array([0.0, 0.5, 1.0])
    call = lambda k, v, e: sj.select_action(k, v, epsilon=e, temperature=0.5)
    for in_axes in ((0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)):
        pick = lambda x, a, i: x[i] if a == 0 else (x[0])
        several = [
            x if a == 0 else x[0] for x, a in zip((keys, values, epsilon), in_axes, strict=True)
        ]
        got = jax.vmap(call, in_axes)(*several)
        for i in range(3):
            alone = call(
                *(pick(x, a, i) for x, a in zip((keys, values, epsilon), in_axes, strict=True))
            )
            assert (got[0][i] == alone[0]).all()
            assert_close(got[1][i], alone[1], rtol=1e-14)


@pytest.mark.slow
def test_in_a_scan_with_remat():
    """A policy gradient through a rollout, differentiated once more."""
    keys = jax.random.split(jax.random.key(0), 3)
    legal = jnp.array([True, True, False, True])

    def loss(logits):
        def step(total, key):
            action, log_prob = sj.select_action(key, logits, epsilon=0.1, where=legal)
            surrogate = sj.clipped_surrogate_loss(
                logits, action, jax.lax.stop_gradient(log_prob), 1.3, where=legal
            )
            return total + surrogate + log_prob**2, None

        return jax.lax.scan(jax.checkpoint(step), 0.0, keys)[0]

    logits = jnp.array([0.1, 0.4, NAN, -0.3])
    hessian = jax.jit(jax.jacfwd(jax.grad(loss)))(logits)
    assert jnp.isfinite(hessian).all()
    assert (hessian[2] == 0).all()
    assert_close(hessian, hessian.T, rtol=0, atol=1e-13)
    assert jnp.abs(hessian).max() > 1e-2


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (
            lambda v: sj.select_action(jax.random.key(0), v, axis=None),
            TypeError,
            "`axis` must be one",
        ),
        (
            lambda v: sj.select_action(jax.random.key(0), v, epsilon=1.5),
            ValueError,
            "`epsilon` must be in",
        ),
        (
            lambda v: sj.policy_probs(v, temperature=-1.0),
            ValueError,
            "`temperature` must be in",
        ),
        (lambda v: sj.policy_probs(v, epsilon=jnp.ones(3)), ValueError, "`epsilon` of shape"),
        (lambda v: sj.policy_log_prob(v, jnp.ones(2)), TypeError, "`actions` must be integers"),
        (lambda v: sj.policy_log_prob(v, jnp.ones(3, int)), ValueError, "`actions` of shape"),
        (
            lambda v: sj.policy_gradient_loss(v, jnp.zeros(2, int), jnp.ones(3)),
            ValueError,
            "`advantages` of shape",
        ),
        (
            lambda v: sj.clipped_surrogate_loss(v, jnp.zeros(2, int), 0.0, 1.0, clip=-1.0),
            ValueError,
            "`clip` must be in",
        ),
        (lambda v: sj.soft_value(v, where=jnp.ones(3)), TypeError, "`where` must be bool"),
        (lambda v: sj.policy_probs(v, ties="last"), ValueError, "`ties` must be one of"),
        (
            lambda v: sj.policy_gradient_loss(v, jnp.zeros(2, int), 1.0, temperature=-1.0),
            ValueError,
            "`temperature` must be in",
        ),
        (
            lambda v: sj.policy_gradient_loss(v, jnp.zeros(2, int), 1.0, temperature=v),
            ValueError,
            "`temperature` of shape",
        ),
        (
            lambda v: sj.actor_critic_value(v, v, policy_temperature=v),
            ValueError,
            "`temperature` of shape",
        ),
        (lambda v: sj.target_entropy_temperature(v, -1.0), ValueError, "`target` must be in"),
        (
            lambda v: sj.mellowmax_temperature(v, omega=jnp.ones((1, 3))),
            ValueError,
            "`omega` of shape",
        ),
        (lambda v: sj.visit_count_temperature(v, 1j), TypeError, "`counts` must be"),
        (
            lambda v: sj.exponential_temperature(v, initial=jnp.ones(4), half_life=1.0),
            ValueError,
            "`initial` of shape",
        ),
    ],
)
def test_errors(call, error, problem):
    with pytest.raises(error, match=problem):
        call(jnp.zeros((2, 3)))


def test_an_unknown_target_has_an_unknown_temperature():
    values = jnp.array([1.0, 2.0, 4.0])
    assert jnp.isnan(sj.target_entropy_temperature(values, jnp.array(NAN))).all()
    assert jnp.isnan(sj.mellowmax_temperature(values, omega=jnp.array(NAN))).all()
    unsigned = jnp.array(2**32 - 1, "uint32")
    assert jnp.isnan(sj.policy_log_prob(jnp.full(3, -INF), unsigned))
