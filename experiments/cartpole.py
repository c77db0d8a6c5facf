"""Does PPO with a softmax policy balance a pole?

Half a million steps of proximal policy optimisation (PPO), with the hyper-parameters that
CleanRL publishes for CartPole-v1: 4 carts by 128 steps an update, 4 epochs of 4 minibatches, a
step size of 2.5e-4 that falls to zero, two tanh networks of 64-64 units. Actions are drawn by
`select_action`, the policy learns by `clipped_surrogate_loss`, the critic towards targets of
`bellman_target`; the cart, the policy and the learner are one compiled program, with a seed to
each lane of a `vmap`.

Expected: a mean return of 475 or more (500 is the most there is) of the last episodes over the
last tenth of the training. CleanRL reports 488.75 +- 18.40. Controls: before it has learnt, the
policy is nearly uniform, and a uniform policy holds the pole for about 22 steps; the trained
policy, taken greedily (temperature 0), balances as well. A lower return would refute it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments import _cartpole as cartpole
from experiments._networks import Layer, Layers, Network, mlp
from experiments._plots import COLOURS, finish, legend, panels
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    NDArray,
    Options,
    Track,
    launch,
    untracked,
)

__all__ = ["Config", "draw", "judge", "main", "run"]


@dataclass(frozen=True)
class Config(Options):
    """Options of the cart and pole."""

    num_seeds: int = 3
    """Number of independent repetitions, run side by side."""
    num_updates: int = 976
    """Updates, each after `num_carts` times `num_steps` steps: about 500000 in all."""
    num_carts: int = 4
    """Carts that one policy drives at a time."""
    num_steps: int = 128
    """Steps of each cart between two updates."""
    num_epochs: int = 4
    """Passes over the steps of an update."""
    num_minibatches: int = 4
    """Minibatches in an epoch."""
    num_hidden: int = 64
    """Units of each of the two layers of either network."""
    learning_rate: float = 2.5e-4
    """Step size of Adam at the start; it falls to zero along a line."""
    discount: float = 0.99
    """Discount of a step."""
    trace_decay: float = 0.95
    """Decay of the generalised advantage estimate."""
    clip: float = 0.2
    """How far the ratio of the policies, and the critic, may move in an update."""
    entropy_cost: float = 0.01
    """Weight of the entropy bonus."""
    critic_cost: float = 0.5
    """Weight of the critic's loss."""
    max_norm: float = 0.5
    """Norm that gradients are clipped to."""
    num_trials: int = 20
    """Episodes of the greedy policy after training."""
    min_return: float = 475.0
    """Target: mean return over the seeds, at the end of training."""
    min_greedy_return: float = 475.0
    """Target: mean return of the greedy policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_updates < NUM_ROUNDS:
            raise ValueError(
                f"num_updates must be at least {NUM_ROUNDS}, got {self.num_updates}."
            )
        if (self.num_carts * self.num_steps) % self.num_minibatches:
            raise ValueError(
                f"num_minibatches must divide the {self.num_carts * self.num_steps} steps of"
                f" an update, got {self.num_minibatches}."
            )

    @classmethod
    def reduced(cls) -> Self:
        """A thirtieth of the steps, taken with larger ones, and targets to go with them."""
        return cls(
            quick=True,
            num_seeds=2,
            num_updates=2 * NUM_ROUNDS,  # Rounds of one length are one program.
            learning_rate=2e-3,
            min_return=60.0,
            min_greedy_return=60.0,
        )


NUM_ROUNDS = 16  # The training is run in so many parts, and progress is shown after each.


class Weights(NamedTuple):
    """The weights of both networks."""

    policy: Layers
    critic: Layers


class Learner(NamedTuple):
    """Everything that an update changes, for one seed."""

    weights: Weights
    optimizer: Any
    carts: cartpole.State  # [carts]
    returned: Array  # [carts], int32, the return of the last episode that each has ended


class Steps(NamedTuple):
    """The rollout of all carts, `[steps, carts, ...]`."""

    observation: Array
    action: Array
    log_prob: Array
    next_obs: Array  # before a new episode starts
    terminated: Array
    done: Array


class Examples(NamedTuple):
    """The examples of a minibatch, `[batch, ...]`."""

    observation: Array
    action: Array
    log_prob: Array
    value: Array
    advantage: Array


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains one policy per seed, and tries each greedily."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    learners = _start(keys, config)
    first = _mean_entropy(learners, config)
    rounds = np.array_split(np.arange(config.num_updates, dtype=np.int32), NUM_ROUNDS)
    returned, losses = [], []
    for number in track(range(NUM_ROUNDS), "cart and pole"):
        learners, (of_carts, loss) = _train(learners, keys, jnp.asarray(rounds[number]), config)
        # Fetching waits for the round, so that the progress bar shows finished work.
        returned.append(np.asarray(of_carts))
        losses.append(np.asarray(loss))
    uniform, greedy = (
        np.asarray(_try(learners.weights, keys, jnp.asarray(temperature), config))
        for temperature in (math.inf, 0.0)
    )
    return {
        "curves/ppo/return": np.concatenate(returned, axis=1),
        "curves/ppo/policy_loss": np.concatenate(losses, axis=1),
        "steps_per_update": np.array(config.num_carts * config.num_steps),
        "first_entropy": first,
        "trials/uniform": uniform,
        "trials/greedy": greedy,
    }


def _network(num_outputs: int, config: Config) -> Network:
    return mlp([4, config.num_hidden, config.num_hidden, num_outputs], activation=jnp.tanh)


def _logits(layers: Layers, observations: Array, config: Config) -> Array:
    return _network(cartpole.NUM_ACTIONS, config).apply(layers, observations)


def _values(layers: Layers, observations: Array, config: Config) -> Array:
    flat = _network(1, config).apply(layers, observations.reshape(-1, 4))
    return flat.reshape(observations.shape[:-1])


def _optimizer(config: Config) -> Any:
    num_steps = config.num_updates * config.num_epochs * config.num_minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, num_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.max_norm), optax.adam(schedule, eps=1e-5)
    )


@functools.partial(jax.jit, static_argnames=("config",))
def _start(keys: Array, config: Config) -> Learner:
    def start(key: Array) -> Learner:
        policy_key, critic_key, cart_key = jax.random.split(key, 3)
        policy = _orthogonal(policy_key, config, cartpole.NUM_ACTIONS, last_scale=0.01)
        weights = Weights(policy, _orthogonal(critic_key, config, 1, last_scale=1.0))
        carts = cartpole.reset(cart_key, (config.num_carts,))
        returned = jnp.zeros(config.num_carts, jnp.int32)
        return Learner(weights, _optimizer(config).init(weights), carts, returned)

    return jax.vmap(start)(keys)


def _orthogonal(key: Array, config: Config, num_outputs: int, last_scale: float) -> Layers:
    """Layers whose weights are orthogonal, times sqrt(2), and the last one's times a scale."""
    sizes = [4, config.num_hidden, config.num_hidden, num_outputs]
    scales = [2**0.5, 2**0.5, last_scale]
    return [
        Layer(jax.nn.initializers.orthogonal(scale)(k, (m, n), float), jnp.zeros(n))
        for k, m, n, scale in zip(
            jax.random.split(key, 3), sizes[:-1], sizes[1:], scales, strict=True
        )
    ]


@functools.partial(jax.jit, static_argnames=("config",))
def _train(
    learners: Learner, keys: Array, numbers: Array, config: Config
) -> tuple[Learner, tuple[Array, Array]]:
    """Some updates; the carts' mean last return and the loss, both `[seeds, updates]`."""

    def one_seed(learner: Learner, key: Array) -> tuple[Learner, tuple[Array, Array]]:
        def update(learner: Learner, number: Array) -> tuple[Learner, tuple[Array, Array]]:
            rollout_key, learn_key = jax.random.split(jax.random.fold_in(key, number))
            learner, steps = _rollout(learner, rollout_key, config)
            learner, loss = _learn(learner, steps, learn_key, config)
            return learner, (jnp.mean(learner.returned.astype(float)), loss)

        return jax.lax.scan(update, learner, numbers)

    return jax.vmap(one_seed)(learners, keys)


def _rollout(learner: Learner, key: Array, config: Config) -> tuple[Learner, Steps]:
    """The policy drives all carts for some steps; an episode that ends starts anew."""

    def move(state: tuple[cartpole.State, Array], key: Array) -> Any:
        carts, returned = state
        action_key, reset_key = jax.random.split(key)
        logits = _logits(learner.weights.policy, carts.motion, config)
        action, log_prob = sj.select_action(action_key, logits)
        after, terminated, truncated = cartpole.step(carts, action)
        done = terminated | truncated
        fresh = cartpole.reset(reset_key, done.shape)
        started = cartpole.State(
            jnp.where(done[:, None], fresh.motion, after.motion),
            jnp.where(done, fresh.time, after.time),
        )
        steps = Steps(carts.motion, action, log_prob, after.motion, terminated, done)
        return (started, jnp.where(done, after.time, returned)), steps

    keys = jax.random.split(key, config.num_steps)
    (carts, returned), steps = jax.lax.scan(move, (learner.carts, learner.returned), keys)
    return learner._replace(carts=carts, returned=returned), steps


def _learn(learner: Learner, steps: Steps, key: Array, config: Config) -> tuple[Learner, Array]:
    """Some epochs over the steps, in minibatches; the mean loss of the policy."""
    values = _values(learner.weights.critic, steps.observation, config)
    next_values = _values(learner.weights.critic, steps.next_obs, config)
    # A fallen pole earns nothing more; an episode cut off by the clock would go on.
    discounts = jnp.where(steps.terminated, 0, config.discount).astype(values.dtype)
    targets = sj.bellman_target(jnp.ones_like(values), discounts, next_values)
    advantages = _advantages(targets - values, steps.done, config)
    size = config.num_carts * config.num_steps
    examples = Examples(steps.observation, steps.action, steps.log_prob, values, advantages)
    examples = jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), examples)
    optimizer = _optimizer(config)

    def minibatch(state: tuple[Weights, Any], rows: Array) -> tuple[tuple[Weights, Any], Array]:
        weights, optimizer_state = state
        batch = jax.tree.map(lambda leaf: leaf[rows], examples)
        (_, loss), grads = jax.value_and_grad(_loss, has_aux=True)(weights, batch, config)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, weights)
        return (optax.apply_updates(weights, updates), optimizer_state), loss

    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(
        jax.random.split(key, config.num_epochs)
    )
    rows = orders.reshape(config.num_epochs * config.num_minibatches, -1)
    state, losses = jax.lax.scan(minibatch, (learner.weights, learner.optimizer), rows)
    weights, optimizer_state = state
    return learner._replace(weights=weights, optimizer=optimizer_state), jnp.mean(losses)


def _advantages(errors: Array, done: Array, config: Config) -> Array:
    """Sums of temporal differences `[steps, carts]`, decaying backwards within an episode."""
    decay = config.discount * config.trace_decay

    def back(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        error, is_last = step
        advantage = error + jnp.where(is_last, 0, decay * later)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(errors[0]), (errors, done), reverse=True)[1]


def _loss(weights: Weights, batch: Examples, config: Config) -> tuple[Array, Array]:
    """The loss of both networks on a minibatch, and that of the policy alone."""
    mean, deviation = jnp.mean(batch.advantage), jnp.std(batch.advantage)
    policy_loss = jnp.mean(
        sj.clipped_surrogate_loss(
            _logits(weights.policy, batch.observation, config),
            batch.action,
            batch.log_prob,
            (batch.advantage - mean) / (deviation + 1e-8),
            clip=config.clip,
            entropy_cost=config.entropy_cost,
        )
    )
    # The critic's loss is clipped like the policy's: it takes the larger of both errors.
    values = _values(weights.critic, batch.observation, config)
    goals = batch.value + batch.advantage
    near = batch.value + jnp.clip(values - batch.value, -config.clip, config.clip)
    errors = jnp.maximum((values - goals) ** 2, (near - goals) ** 2)
    return policy_loss + config.critic_cost * jnp.mean(errors) / 2, policy_loss


@functools.partial(jax.jit, static_argnames=("config",))
def _try(weights: Weights, keys: Array, temperature: Array, config: Config) -> Array:
    """The return of some episodes at a temperature of the policy, `[seeds, trials]`."""

    def one_seed(weights: Weights, key: Array) -> Array:
        def move(state: Any, key: Array) -> Any:
            carts, alive, total = state
            logits = _logits(weights.policy, carts.motion, config)
            action, _ = sj.select_action(key, logits, temperature=temperature)
            carts, terminated, _ = cartpole.step(carts, action)
            return (carts, alive & ~terminated, total + alive.astype(jnp.int32)), None

        keys = jax.random.split(key, cartpole.MAX_STEPS + 1)
        shape = (config.num_trials,)
        carts = cartpole.reset(keys[0], shape)
        start = (carts, jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32))
        (_, _, total), _ = jax.lax.scan(move, start, keys[1:])
        return total.astype(float)

    return jax.vmap(one_seed)(weights, keys)


def _mean_entropy(learners: Learner, config: Config) -> NDArray:
    """Mean entropy `[seeds]` of the policy at the start of the training."""
    logits = jax.vmap(functools.partial(_logits, config=config))(
        learners.weights.policy, learners.carts.motion
    )
    return np.asarray(jnp.mean(sj.policy_entropy(logits), axis=-1))


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The return at the end of training, and the controls."""
    curve = arrays["curves/ppo/return"]
    last = np.mean(curve[:, -max(1, curve.shape[1] // 10) :], axis=1)
    uniform = np.mean(arrays["trials/uniform"], axis=1)
    return [
        Measure("return, last tenth of training", last, at_least=config.min_return),
        Measure(
            "return, trained policy taken greedily",
            np.mean(arrays["trials/greedy"], axis=1),
            at_least=config.min_greedy_return,
        ),
        Measure("return, uniform policy", uniform, at_least=17.0, at_most=28.0),
        Measure(
            "ln 2, less entropy of the first policy",
            np.log(2) - arrays["first_entropy"],
            at_most=1e-4,
        ),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The returns of all seeds against the steps, with the range between them."""
    curve = arrays["curves/ppo/return"]
    steps = np.arange(1, curve.shape[1] + 1) * int(arrays["steps_per_update"]) / 1000
    figure, (panel,) = panels(
        ["return of the last episodes"],
        "Return of the last episode of each cart, mean over 15 updates; thin: each seed,"
        " shaded: the range of the seeds.",
        size=5.0,
    )
    smooth = np.array([_smooth(row) for row in curve])
    panel.fill_between(steps, smooth.min(0), smooth.max(0), color=COLOURS[0], alpha=0.2)
    panel.plot(steps, smooth.T, color=COLOURS[0], linewidth=0.6, alpha=0.5)
    panel.plot(steps, smooth.mean(0), color=COLOURS[0], label=f"mean of {len(curve)} seeds")
    levels = {
        "500: the longest episode": 500.0,
        "475: the task counts as solved": 475.0,
        "mean return of the uniform policy": float(np.mean(arrays["trials/uniform"])),
    }
    for (name, level), dashes in zip(levels.items(), ("-", "--", ":"), strict=True):
        panel.axhline(level, color=COLOURS[-1], linewidth=0.9, linestyle=dashes, label=name)
    panel.set_ylim(0, 520)
    finish(panel, "environment steps, thousands", "return, steps balanced", whole=True)
    legend(figure)
    return {"return": figure}


def _smooth(row: NDArray, width: int = 15) -> NDArray:
    """Running means over as many neighbours as there are on both sides."""
    ones = np.ones(min(width, len(row)))
    sums, counts = (np.convolve(x, ones, mode="same") for x in (row, np.ones_like(row)))
    return np.asarray(sums / counts)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("cartpole", __doc__, Config, run, judge, draw), args)
