"""What does a baseline buy a gradient bandit, and which softmax explores best?

The 10-armed testbed of Sutton and Barto (2018, chapter 2), 2000 runs of 1000 steps. First the
gradient bandit, whose preferences move by the gradient of `policy_gradient_loss`, on arms worth
N(4, 1), with the mean reward as a baseline and without (their figure 2.5). Then learners that
average the rewards of each arm, on arms worth N(0, 1), and differ in how they explore:
epsilon-greedy, Boltzmann, mellowmax (the Boltzmann policy that is worth the mellowmax of the
values), and Boltzmann cooled by the number of steps.

Expected at a step size of 0.1: the best arm in 84 % of the last 100 steps with the baseline,
in 49 % without. Controls: a uniform policy takes the best arm in 10 % of the steps, whatever it
has learnt; epsilon-greedy with 0.1 never more often than in 91 %; and a greedy learner finds it
in about a third of the runs. A figure off by more than 2 points would refute it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from matplotlib.figure import Figure

import softjax as sj
from experiments._plots import COLOURS, panels
from experiments._run import Experiment, Measure, Options, launch
from experiments._types import Arrays, NDArray, Track, untracked

__all__ = ["Config", "draw", "judge", "main", "run"]


@dataclass(frozen=True)
class Config(Options):
    """Options of the bandits; a seed stands for `num_runs` runs."""

    num_runs: int = 200
    """Runs that a seed stands for: 2000 in all by default."""
    num_steps: int = 1000
    """Steps of a run."""
    num_arms: int = 10
    """Arms of a bandit."""
    num_last: int = 100
    """Last steps, over which the targets are judged."""
    with_baseline: float = 0.84
    """Target: share of the best arm at step size 0.1 with the baseline."""
    without_baseline: float = 0.49
    """Target: share of the best arm at step size 0.1 without it."""
    tolerance: float = 0.02
    """How far the shares may be from their targets."""

    @classmethod
    def reduced(cls) -> Self:
        """Fewer runs and steps, and targets to go with them."""
        return cls(
            quick=True,
            num_seeds=2,
            num_runs=250,
            num_steps=200,
            with_baseline=0.61,
            without_baseline=0.36,
            tolerance=0.06,
        )


class Arm(NamedTuple):
    """A way to learn and to explore, and the settings of its one parameter that are tried."""

    parameter: str
    settings: tuple[float, ...]


LEARNERS = {
    "baseline": Arm("step size", (0.1, 0.4)),
    "no baseline": Arm("step size", (0.1, 0.4)),
    "epsilon-greedy": Arm("epsilon", (0.0, 0.01, 0.03125, 0.0625, 0.1, 0.25, 1.0)),
    "Boltzmann": Arm("temperature", (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)),
    "Boltzmann, cooled": Arm("scale", (0.0625, 0.125, 0.25, 0.5, 1.0)),
    "mellowmax": Arm("1 / omega", (0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25)),
}
GRADIENT, EXPLORERS = list(LEARNERS)[:2], list(LEARNERS)[2:]


class State(NamedTuple):
    """What the learners of all runs know."""

    values: Array  # [runs, arms]: preferences, or estimated values
    counts: Array  # [runs, arms], how often each arm was taken
    mean: Array  # [runs], mean reward


def run(config: Config, track: Track = untracked) -> Arrays:
    """Every arm of both comparisons on the same bandits, with the same draws."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    pairs = [(name, s) for name, arm in LEARNERS.items() for s in arm.settings]
    found: dict[str, list[tuple[NDArray, NDArray]]] = {name: [] for name in LEARNERS}
    for number in track(range(len(pairs)), "bandits"):
        name, setting = pairs[number]
        kind = jnp.int32(list(LEARNERS).index(name))
        reward, best = _simulate(keys, kind, jnp.asarray(setting, float), config)
        found[name].append((np.asarray(reward), np.asarray(best)))
    arrays = {}
    for name, curves in found.items():
        reward, best = map(np.stack, zip(*curves, strict=True))
        arrays[f"reward/{name}"] = reward.mean(axis=2)
        arrays[f"best_arm/{name}"] = best[..., -config.num_last :].mean(axis=2)
        shown = {name: int(np.argmax(reward.mean(axis=(1, 2))))}
        if name in GRADIENT:
            shown = {f"{name}, {s}": i for i, s in enumerate(LEARNERS[name].settings)}
        for arm, i in shown.items():
            arrays[f"curves/{arm}/reward"] = reward[i]
            arrays[f"curves/{arm}/best_arm"] = best[i]
    return arrays


@functools.partial(jax.jit, static_argnames=("config",))
def _simulate(keys: Array, kind: Array, setting: Array, config: Config) -> tuple[Array, Array]:
    """Mean reward and share of the best arm over the runs of a seed, each `[seeds, steps]`.

    `kind` numbers the learners, which are all compiled into one program.
    """
    is_gradient = kind < len(GRADIENT)
    every_run = jnp.arange(config.num_runs, dtype=jnp.int32)

    def one_seed(key: Array) -> tuple[Array, Array]:
        draws_key, step_key = jax.random.split(key)
        # The worth of the arms, and the noise of every step, in one draw: less to compile.
        shape = (config.num_runs, config.num_arms + config.num_steps)
        worth, noise = jnp.split(jax.random.normal(draws_key, shape), [config.num_arms], axis=1)
        worth += jnp.where(is_gradient, 4.0, 0.0).astype(worth.dtype)
        best = jnp.argmax(worth, axis=-1).astype(jnp.int32)

        def step(state: State, given: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
            key, noise = given
            temperature, epsilon = jax.lax.switch(kind, _OPTIONS, state, setting)
            arm, _ = sj.select_action(
                key, state.values, temperature=temperature, epsilon=epsilon
            )
            reward = worth[every_run, arm] + noise
            counts = state.counts.at[every_run, arm].add(1)
            number = jnp.sum(counts, axis=-1)
            # The mean of the rewards before this one; the first is its own.
            baseline = jnp.where(number == 1, reward, state.mean)
            baseline = jnp.where(kind == 0, baseline, 0)
            move = jax.lax.cond(
                is_gradient,
                _by_gradient,
                _by_average,
                state.values,
                counts,
                arm,
                reward,
                baseline,
                setting,
            )
            mean = state.mean + (reward - state.mean) / number
            averages = jnp.mean(reward), jnp.mean((arm == best).astype(reward.dtype))
            return State(state.values + move, counts, mean), averages

        zeros = jnp.zeros_like(worth)
        start = State(zeros, zeros, jnp.zeros(config.num_runs))
        keys = jax.random.split(step_key, config.num_steps)
        return jax.lax.scan(step, start, (keys, noise.T))[1]

    return jax.vmap(one_seed)(keys)


def _by_gradient(
    values: Array, counts: Array, arm: Array, reward: Array, baseline: Array, rate: Array
) -> Array:
    """A step of preferences against the gradient of their loss."""
    del counts

    def loss(values: Array) -> Array:
        return jnp.sum(sj.policy_gradient_loss(values, arm, reward - baseline))

    return -rate * jax.grad(loss)(values)


def _by_average(
    values: Array, counts: Array, arm: Array, reward: Array, baseline: Array, rate: Array
) -> Array:
    """What makes the value of the arm the mean of its rewards."""
    del baseline, rate
    taken = jax.nn.one_hot(arm, values.shape[-1], dtype=values.dtype)
    return taken * (reward[:, None] - values) / jnp.maximum(counts, 1)


def _per_run(
    state: State, temperature: ArrayLike, epsilon: ArrayLike = 0.0
) -> tuple[Array, Array]:
    """Both as options of `select_action`, `[runs, 1]`."""
    shape, dtype = state.values[:, :1].shape, state.values.dtype
    options = (jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x in (temperature, epsilon))
    first, second = options
    return first, second


def _cooled(state: State, setting: Array) -> tuple[Array, Array]:
    visits = jnp.sum(state.counts, axis=-1, keepdims=True)
    return _per_run(state, setting * sj.visit_count_temperature(state.values, visits))


def _mellowmax(state: State, setting: Array) -> tuple[Array, Array]:
    return _per_run(state, sj.mellowmax_temperature(state.values, omega=1 / setting))


# Temperature and epsilon, `[runs, 1]`, by learner.
_OPTIONS = [
    lambda state, _: _per_run(state, 1.0),
    lambda state, _: _per_run(state, 1.0),
    lambda state, epsilon: _per_run(state, 0.0, epsilon),
    lambda state, temperature: _per_run(state, temperature),
    _cooled,
    _mellowmax,
]


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Shares of the best arm over the last steps, the best explorers, and the controls."""
    targets = {"baseline": config.with_baseline, "no baseline": config.without_baseline}
    measures = []
    for name in GRADIENT:
        for setting, share in zip(
            LEARNERS[name].settings, arrays[f"best_arm/{name}"], strict=True
        ):
            low, high = None, None
            if setting == 0.1:
                low, high = (100 * (targets[name] + s * config.tolerance) for s in (-1, 1))
            title = f"{name}, {setting}: best arm, %"
            measures.append(Measure(title, 100 * share, at_least=low, at_most=high))
    for name in EXPLORERS:
        rewards = arrays[f"reward/{name}"]
        chosen = int(np.argmax(rewards.mean(axis=1)))
        setting = LEARNERS[name].settings[chosen]
        title = f"{name}, {LEARNERS[name].parameter} {setting:.3g}: mean reward"
        measures.append(Measure(title, rewards[chosen]))
    greedy, tenth, uniform = (
        100 * arrays["best_arm/epsilon-greedy"][LEARNERS["epsilon-greedy"].settings.index(e)]
        for e in (0.0, 0.1, 1.0)
    )
    return [
        *measures,
        Measure("greedy: best arm, %", greedy, at_least=25.0, at_most=45.0),
        Measure("epsilon-greedy, 0.1: best arm, %", tenth, at_most=91.0),
        Measure("uniform: best arm, %", uniform, at_least=9.0, at_most=11.0),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Curves of the gradient bandit and of the best explorers; rewards by parameter."""
    return {
        "gradient": _draw_curves(
            arrays, [f"{name}, {s}" for name in GRADIENT for s in LEARNERS[name].settings]
        ),
        "exploration": _draw_curves(arrays, EXPLORERS),
        "parameters": _draw_parameters(arrays),
    }


def _draw_curves(arrays: Arrays, arms: list[str]) -> Figure:
    figure, axes = panels(["mean reward", "best arm, %"], size=4.0)
    for panel, measure, scale in zip(axes, ("reward", "best_arm"), (1, 100), strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            curve = scale * arrays[f"curves/{arm}/{measure}"]
            steps = np.arange(1, curve.shape[1] + 1)
            mean, error = curve.mean(0), curve.std(0) / len(curve) ** 0.5
            panel.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.3)
            panel.plot(steps, mean, color=colour, linewidth=0.8, label=arm)
        panel.set_xlabel("step")
    axes[1].set_ylim(0, 100)
    axes[1].legend(fontsize=7)
    return figure


def _draw_parameters(arrays: Arrays) -> Figure:
    figure, (panel,) = panels(["mean reward of all steps"], size=4.0)
    for name, colour in zip(EXPLORERS, COLOURS, strict=False):
        settings, rewards = np.array(LEARNERS[name].settings), arrays[f"reward/{name}"]
        error = rewards.std(axis=1) / rewards.shape[1] ** 0.5
        kept = settings > 0  # A logarithmic axis has no place for 0.
        panel.errorbar(
            settings[kept],
            rewards.mean(axis=1)[kept],
            error[kept],
            color=colour,
            marker="o",
            markersize=3,
            label=f"{name}: {LEARNERS[name].parameter}",
        )
    panel.set_xscale("log", base=2)
    panel.set_xlabel("parameter")
    panel.legend(fontsize=7)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("bandit", __doc__, Config, run, judge, draw), args)
