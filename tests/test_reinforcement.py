"""The cart and pole, the bandits, and the learners on them.

The comparison with `gymnax` is skipped where that package is not installed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from experiments import _cartpole as physics
from experiments import bandit, cartpole

# The cart and pole.


def test_accelerations_satisfy_the_equations_of_motion():
    """Those of Newton and Euler, before they are solved for the accelerations."""
    rng = np.random.default_rng(0)
    angle, spin, force = rng.uniform(-3, 3, (3, 1000))
    forward, turning = physics.accelerations(*map(jnp.asarray, (angle, spin, force)))
    mass, length = physics.POLE_MASS, physics.HALF_LENGTH
    sideways = turning * np.cos(angle) - spin**2 * np.sin(angle)
    push = physics.TOTAL_MASS * forward + mass * length * sideways
    np.testing.assert_allclose(push, force, rtol=0, atol=1e-13)
    tilt = forward * np.cos(angle) + 4 / 3 * length * turning
    np.testing.assert_allclose(tilt, physics.GRAVITY * np.sin(angle), rtol=0, atol=1e-13)


def test_the_force_does_all_the_work():
    """The energy of cart and pole, from its own formula, changes at the rate F x'."""

    def energy(motion):
        _, velocity, angle, spin = motion
        mass, length = physics.POLE_MASS, physics.HALF_LENGTH
        kinetic = physics.TOTAL_MASS * velocity**2 / 2
        kinetic += mass * length * velocity * spin * jnp.cos(angle)
        kinetic += 2 / 3 * mass * length**2 * spin**2
        return kinetic + mass * physics.GRAVITY * length * jnp.cos(angle)

    for motion, force in zip(
        np.random.default_rng(1).uniform(-2, 2, (20, 4)), np.linspace(-10, 10, 20), strict=True
    ):
        motion, force = jnp.asarray(motion), jnp.asarray(force)
        forward, turning = physics.accelerations(motion[2], motion[3], force)
        rates = jnp.stack([motion[1], forward, motion[3], turning])
        np.testing.assert_allclose(
            jax.grad(energy)(motion) @ rates, force * motion[1], atol=1e-13
        )


@pytest.mark.parametrize(
    ("place", "value", "terminated"),
    [
        (0, 2.39, False),
        (0, 2.41, True),
        (0, -2.41, True),
        (2, math.radians(11.9), False),
        (2, math.radians(12.1), True),
        (2, -math.radians(12.1), True),
    ],
)
def test_the_end_of_an_episode(place, value, terminated):
    state = physics.State(jnp.zeros(4).at[place].set(value), jnp.int32(498))
    after, fell, over = physics.step(state, jnp.int32(1))
    assert (bool(fell), bool(over), int(after.time)) == (terminated, False, 499)
    assert bool(physics.step(after, jnp.int32(0))[2])  # Time is over after 500 steps.


def test_pushes_are_left_and_right():
    states = physics.reset(jax.random.key(0), (2, 3))
    assert states.motion.shape == (2, 3, 4)
    assert (jnp.abs(states.motion) <= 0.05).all()
    assert jnp.unique(states.motion).size == 24
    left, right = (physics.step(states, jnp.full((2, 3), a))[0] for a in (0, 1))
    assert (left.motion[..., 1] < states.motion[..., 1]).all()
    assert (right.motion[..., 1] > states.motion[..., 1]).all()


def test_the_cart_is_that_of_gymnax():
    """Step by step under the same actions, until the pole falls and to the end of time."""
    gymnax = pytest.importorskip("gymnax")
    environment, _ = gymnax.make("CartPole-v1")
    params = environment.default_params
    step, reference = jax.jit(physics.step), jax.jit(environment.step_env)
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(20):
            key = jax.random.key(seed)
            _, theirs = environment.reset(key, params)
            motion = jnp.stack([theirs.x, theirs.x_dot, theirs.theta, theirs.theta_dot])
            ours = physics.State(motion, jnp.int32(0))
            balance = seed % 2 == 0  # Every other episode is balanced by a simple rule.
            for number in range(physics.MAX_STEPS):
                noise = jax.random.bernoulli(jax.random.fold_in(key, number))
                lean = ours.motion[2] + 0.5 * ours.motion[3] + 0.05 * ours.motion[1] > 0
                action = (lean if balance else noise).astype(jnp.int32)
                observed, theirs, reward, terminated, _ = reference(key, theirs, action, params)
                ours, fell, over = step(ours, action)
                np.testing.assert_allclose(ours.motion, observed, rtol=1e-5, atol=1e-6)
                assert (bool(fell), float(reward)) == (bool(terminated), 1.0)
                assert bool(over) == bool(environment.is_truncated(theirs, params))
                ours = ours._replace(motion=observed.astype(ours.motion.dtype))
                if fell or over:
                    break
            assert int(ours.time) == int(theirs.time)


# The learner on it.


def test_advantages_are_sums_of_differences():
    """By the definition, over the steps that are left of the episode."""
    rng = np.random.default_rng(0)
    errors, done = rng.standard_normal((7, 3)), rng.random((7, 3)) < 0.3
    got = cartpole.advantages_of(jnp.asarray(errors), jnp.asarray(done))
    for t, cart in np.ndindex(errors.shape):
        total, weight = 0.0, 1.0
        for later in range(t, len(errors)):
            total += weight * errors[later, cart]
            weight *= 0.99 * 0.95
            if done[later, cart]:
                break
        np.testing.assert_allclose(got[t, cart], total, rtol=1e-13)


@pytest.mark.slow
def test_episodes_follow_each_other():
    """A fallen pole starts anew, its return is kept, and its last state is not the new one."""
    learner, _ = cartpole.start(jax.random.key(0), cartpole.Config.reduced())
    after, steps = jax.jit(lambda key: cartpole.rollout(learner, key))(jax.random.key(1))
    done = np.asarray(steps.done)
    assert done.any()
    assert (done == np.asarray(steps.terminated)).all()
    angles = np.abs(np.asarray(steps.next_obs)[..., 2])
    assert (angles[done] > physics.MAX_ANGLE).all()
    started = np.asarray(steps.observation)[1:][done[:-1]]
    assert (np.abs(started) <= 0.05).all()
    same = np.asarray(steps.next_obs)[:-1][~done[:-1]]
    np.testing.assert_array_equal(np.asarray(steps.observation)[1:][~done[:-1]], same)
    for cart in range(cartpole.NUM_CARTS):
        ends = np.flatnonzero(done[:, cart])
        length = np.diff(ends)[-1] if len(ends) > 1 else ends[-1] + 1
        assert int(after.returned[cart]) == length
        assert int(after.carts.time[cart]) == cartpole.NUM_STEPS - 1 - ends[-1]
    logits = cartpole.POLICY.apply(learner.weights[0], steps.observation.reshape(-1, 4))
    expected = sj.log_prob(logits, steps.action.reshape(-1))
    np.testing.assert_allclose(steps.log_prob.reshape(-1), expected, rtol=1e-12)


# The bandits.


def test_preferences_move_as_in_the_book():
    """H += a (R - B) (1 - p) for the arm that was taken, and -= a (R - B) p for the others."""
    rng = np.random.default_rng(0)
    values, arm = jnp.asarray(rng.standard_normal((4, 10))), jnp.array([3, 0, 9, 3])
    reward, baseline = jnp.asarray(rng.standard_normal((2, 4)))
    move = 0.1 * bandit.uphill(values, arm, reward - baseline)
    probs = jax.nn.softmax(values)
    expected = (
        0.1 * (reward - baseline)[:, None] * (jax.nn.one_hot(arm, 10, dtype=float) - probs)
    )
    np.testing.assert_allclose(move, expected, rtol=1e-12, atol=1e-16)


def test_values_are_the_means_of_their_rewards():
    values, counts = jnp.zeros((1, 3)), jnp.zeros((1, 3))
    rewards = [2.0, 4.0, 9.0]
    for reward, arm in zip(rewards, [1, 1, 0], strict=True):
        arm = jnp.array([arm])
        counts = counts.at[0, arm].add(1)
        values += bandit.towards_mean(values, arm, jnp.array([reward]), counts)
    np.testing.assert_allclose(values, [[9.0, 3.0, 0.0]])


def test_explorers_explore_as_they_say():
    """Temperature and epsilon of each, for values whose policies are known."""
    values = jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    state = bandit.State(values, jnp.full((2, 3), 2.0), jnp.zeros(2))

    def policy(name, setting):
        temperature, epsilon = bandit.LEARNERS[name].options(state, setting)
        return sj.policy_probs(values, temperature=temperature, epsilon=epsilon)

    for name in bandit.GRADIENT:
        np.testing.assert_allclose(policy(name, 0.4), jax.nn.softmax(values), rtol=1e-12)
    greedy = [[0.1, 0.1, 0.8], [1 / 3] * 3]
    np.testing.assert_allclose(policy("epsilon-greedy", 0.3), greedy, rtol=1e-12)
    np.testing.assert_allclose(policy("Boltzmann", 0.5), jax.nn.softmax(2 * values), rtol=1e-12)
    cooled = jax.nn.softmax(values * math.log(6) / 2 / 0.5)
    np.testing.assert_allclose(policy("Boltzmann, cooled", 0.5), cooled, rtol=1e-12)
    worth = jnp.sum(policy("mellowmax", 0.5) * values, -1)
    np.testing.assert_allclose(worth, sj.mellowmax(values, omega=2.0), rtol=1e-12)
