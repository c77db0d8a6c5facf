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
from experiments._networks import Layers, mlp, orthogonal
from experiments._plots import COLOURS, finish, legend, panels
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked

__all__ = ["Config", "draw", "judge", "main", "run"]

NUM_CARTS, NUM_STEPS = 4, 128  # One policy drives the carts so many steps in each update.
NUM_EPOCHS, NUM_MINIBATCHES = 4, 4  # Passes over these steps, and the parts of each pass.
DISCOUNT, TRACE_DECAY = 0.99, 0.95  # The second is of the generalised advantage estimate.
CLIP = 0.2  # How far the ratio of the policies, and the critic, may move in an update.
ENTROPY_COST, CRITIC_COST = 0.01, 0.5
MAX_NORM = 0.5  # Gradients are clipped to it.
NUM_TRIALS = 20  # Episodes of the trained policy.
NUM_ROUNDS = 16  # The training is run in so many parts, and progress is shown after each.
POLICY_SIZES, CRITIC_SIZES = (4, 64, 64, cartpole.NUM_ACTIONS), (4, 64, 64, 1)
POLICY, CRITIC = (mlp(sizes, activation=jnp.tanh) for sizes in (POLICY_SIZES, CRITIC_SIZES))


@dataclass(frozen=True)
class Config(Options):
    """Options of the cart and pole."""

    num_seeds: int = 3
    """Number of independent repetitions, run side by side."""
    num_updates: int = 976
    """Updates, each after 512 steps: about 500000 in all."""
    learning_rate: float = 2.5e-4
    """Step size of Adam at the start; it falls to zero along a line."""
    min_return: float = 475.0
    """Target: mean return at the end of training, and of the trained policy taken greedily."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_updates < NUM_ROUNDS:
            wanted = f"num_updates must be at least {NUM_ROUNDS}"
            raise ValueError(f"{wanted}, got {self.num_updates}.")

    @classmethod
    def reduced(cls) -> Self:
        """A thirtieth of the steps, taken with larger ones, and a target to go with them."""
        # Rounds of one length are one program.
        size: dict[str, Any] = {"num_seeds": 2, "num_updates": 2 * NUM_ROUNDS}
        return cls(quick=True, **size, learning_rate=2e-3, min_return=60.0)


class Learner(NamedTuple):
    """Everything that an update changes, for one seed."""

    weights: tuple[Layers, Layers]  # of the policy and of the critic
    optimizer: Any
    carts: cartpole.State  # [carts]
    returned: Array  # [carts], int32, the return of the last episode that each has ended


class Steps(NamedTuple):
    """What the carts met, `[steps, carts, ...]`."""

    observation: Array
    action: Array
    log_prob: Array
    next_obs: Array  # before a new episode starts
    terminated: Array
    done: Array


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains one policy per seed, and tries each greedily."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    learners, entropy = jax.jit(jax.vmap(functools.partial(start, config=config)))(keys)
    one_round = functools.partial(train, config=config)
    train_all = jax.jit(jax.vmap(one_round, in_axes=(0, 0, None)))
    rounds = np.array_split(np.arange(config.num_updates, dtype=np.int32), NUM_ROUNDS)
    curves = []
    for number in track(range(NUM_ROUNDS), "cart and pole"):
        learners, found = train_all(learners, keys, rounds[number])
        curves.append(jax.device_get(found))  # Waits for the round.
    returned, losses = (np.concatenate(parts, axis=1) for parts in zip(*curves, strict=True))
    try_all = jax.jit(jax.vmap(balance, in_axes=(0, 0, None)))
    policies, _ = learners.weights
    return {
        "curves/ppo/return": returned,
        "curves/ppo/policy_loss": losses,
        "first_entropy": np.asarray(entropy),
        "trials/uniform": np.asarray(try_all(policies, keys, jnp.asarray(math.inf))),
        "trials/greedy": np.asarray(try_all(policies, keys, jnp.asarray(0.0))),
    }


def optimizer_of(config: Config) -> Any:
    """Adam with a falling step size, on gradients that are clipped."""
    num_steps = config.num_updates * NUM_EPOCHS * NUM_MINIBATCHES
    schedule = optax.linear_schedule(config.learning_rate, 0.0, num_steps)
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(schedule, eps=1e-5))


def start(key: Array, config: Config) -> tuple[Learner, Array]:
    """A learner that knows nothing, and the mean entropy of its policy."""
    policy_key, critic_key, cart_key = jax.random.split(key, 3)
    policy = orthogonal(policy_key, POLICY_SIZES, last_scale=0.01)
    weights = policy, orthogonal(critic_key, CRITIC_SIZES, last_scale=1.0)
    carts = cartpole.reset(cart_key, (NUM_CARTS,))
    returned = jnp.zeros(NUM_CARTS, jnp.int32)
    learner = Learner(weights, optimizer_of(config).init(weights), carts, returned)
    return learner, jnp.mean(sj.policy_entropy(POLICY.apply(policy, carts.motion)))


def train(learner: Learner, key: Array, numbers: Array, config: Config) -> Any:
    """Some updates; the carts' mean last return and the policy's loss, both `[updates]`."""

    def update(learner: Learner, number: Array) -> tuple[Learner, tuple[Array, Array]]:
        rollout_key, learn_key = jax.random.split(jax.random.fold_in(key, number))
        learner, steps = rollout(learner, rollout_key)
        learner, loss = learn(learner, steps, learn_key, config)
        return learner, (jnp.mean(learner.returned.astype(float)), loss)

    return jax.lax.scan(update, learner, numbers)


def rollout(learner: Learner, key: Array) -> tuple[Learner, Steps]:
    """The policy drives all carts for some steps; an episode that ends starts anew."""

    def move(state: tuple[cartpole.State, Array], key: Array) -> Any:
        carts, returned = state
        action_key, reset_key = jax.random.split(key)
        logits = POLICY.apply(learner.weights[0], carts.motion)
        action, log_prob = sj.select_action(action_key, logits)
        after, terminated, truncated = cartpole.step(carts, action)
        done = terminated | truncated
        steps = Steps(carts.motion, action, log_prob, after.motion, terminated, done)
        returned = jnp.where(done, after.time, returned)
        return (cartpole.restart(reset_key, after, done), returned), steps

    keys = jax.random.split(key, NUM_STEPS)
    (carts, returned), steps = jax.lax.scan(move, (learner.carts, learner.returned), keys)
    return learner._replace(carts=carts, returned=returned), steps


def learn(learner: Learner, steps: Steps, key: Array, config: Config) -> tuple[Learner, Array]:
    """Some epochs over the steps, in minibatches; the mean loss of the policy."""
    values, next_values = (
        CRITIC.apply(learner.weights[1], seen.reshape(-1, 4)).reshape(NUM_STEPS, NUM_CARTS)
        for seen in (steps.observation, steps.next_obs)
    )
    # A fallen pole earns nothing more; an episode cut off by the clock would go on.
    discounts = jnp.where(steps.terminated, 0, DISCOUNT).astype(values.dtype)
    errors = sj.bellman_target(jnp.ones_like(values), discounts, next_values) - values
    advantages = advantages_of(errors, steps.done)
    examples = steps.observation, steps.action, steps.log_prob, values, advantages
    examples = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), examples)
    optimizer = optimizer_of(config)

    def minibatch(state: Any, rows: Array) -> Any:
        weights, optimizer_state = state
        batch = jax.tree.map(lambda leaf: leaf[rows], examples)
        (_, policy_loss), grads = jax.value_and_grad(loss, has_aux=True)(weights, *batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, weights)
        return (optax.apply_updates(weights, updates), optimizer_state), policy_loss

    keys = jax.random.split(key, NUM_EPOCHS)
    orders = jax.vmap(lambda key: jax.random.permutation(key, NUM_STEPS * NUM_CARTS))(keys)
    rows = orders.reshape(NUM_EPOCHS * NUM_MINIBATCHES, -1)
    state, losses = jax.lax.scan(minibatch, (learner.weights, learner.optimizer), rows)
    return learner._replace(weights=state[0], optimizer=state[1]), jnp.mean(losses)


def advantages_of(errors: Array, done: Array) -> Array:
    """Sums of the errors to come, which decay backwards within an episode."""

    def back(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        error, is_last = step
        advantage = error + jnp.where(is_last, 0, DISCOUNT * TRACE_DECAY * later)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(errors[0]), (errors, done), reverse=True)[1]


def loss(
    weights: tuple[Layers, Layers],
    observation: Array,
    action: Array,
    log_prob: Array,
    value: Array,
    advantage: Array,
) -> tuple[Array, Array]:
    """The loss of both networks on a minibatch `[batch, ...]`, and that of the policy alone."""
    scaled = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    logits, options = POLICY.apply(weights[0], observation), {"entropy_cost": ENTROPY_COST}
    losses = sj.clipped_surrogate_loss(logits, action, log_prob, scaled, clip=CLIP, **options)
    policy_loss = jnp.mean(losses)
    # The critic's loss is clipped like the policy's: it takes the larger of both errors.
    now, goal = CRITIC.apply(weights[1], observation)[:, 0], value + advantage
    near = value + jnp.clip(now - value, -CLIP, CLIP)
    errors = jnp.maximum((now - goal) ** 2, (near - goal) ** 2)
    return policy_loss + CRITIC_COST * jnp.mean(errors) / 2, policy_loss


def balance(policy: Layers, key: Array, temperature: Array) -> Array:
    """The return of some episodes at a temperature of the policy, `[trials]`."""

    def move(state: Any, key: Array) -> Any:
        carts, alive, total = state
        logits = POLICY.apply(policy, carts.motion)
        action, _ = sj.select_action(key, logits, temperature=temperature)
        carts, terminated, _ = cartpole.step(carts, action)
        return (carts, alive & ~terminated, total + alive.astype(jnp.int32)), None

    keys = jax.random.split(key, cartpole.MAX_STEPS + 1)
    carts = cartpole.reset(keys[0], (NUM_TRIALS,))
    state = carts, jnp.ones(NUM_TRIALS, bool), jnp.zeros(NUM_TRIALS, jnp.int32)
    (_, _, total), _ = jax.lax.scan(move, state, keys[1:])
    return total.astype(float)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The return at the end of training, and the controls."""
    curve, goal = arrays["curves/ppo/return"], config.min_return
    last = np.mean(curve[:, -max(1, curve.shape[1] // 10) :], axis=1)
    uniform, greedy = (arrays[f"trials/{name}"].mean(axis=1) for name in ("uniform", "greedy"))
    lost = np.log(2) - arrays["first_entropy"]
    return [
        Measure("return, last tenth of training", last, at_least=goal),
        Measure("return, trained policy taken greedily", greedy, at_least=goal),
        Measure("return, uniform policy", uniform, at_least=17.0, at_most=28.0),
        Measure("ln 2, less entropy of the first policy", lost, at_most=1e-4),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The returns of all seeds against the steps, with the range between them."""
    figure, (panel,) = panels(
        ["return of the last episodes"],
        "Return of the last episode of each cart, mean over 15 updates; thin: each seed,"
        " shaded: the range of the seeds.",
        size=5.0,
    )
    curve = arrays["curves/ppo/return"]
    window = np.ones(min(15, curve.shape[1]))
    sums = np.array([np.convolve(row, window, mode="same") for row in curve])
    smooth = sums / np.convolve(np.ones(curve.shape[1]), window, mode="same")
    steps = np.arange(1, curve.shape[1] + 1) * NUM_CARTS * NUM_STEPS / 1000
    panel.fill_between(steps, smooth.min(0), smooth.max(0), color=COLOURS[0], alpha=0.2)
    panel.plot(steps, smooth.T, color=COLOURS[0], linewidth=0.6, alpha=0.5)
    panel.plot(steps, smooth.mean(0), color=COLOURS[0], label=f"mean of {len(curve)} seeds")
    levels = {
        "500: the longest episode": (500.0, "-"),
        "475: the task counts as solved": (475.0, "--"),
        "mean return of the uniform policy": (float(np.mean(arrays["trials/uniform"])), ":"),
    }
    for name, (level, dashes) in levels.items():
        panel.axhline(level, color=COLOURS[-1], linewidth=0.9, linestyle=dashes, label=name)
    panel.set_ylim(0, 520)
    finish(panel, "environment steps, thousands", "return, steps balanced", whole=True)
    legend(figure)
    return {"return": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("cartpole", __doc__, Config, run, judge, draw), args)
