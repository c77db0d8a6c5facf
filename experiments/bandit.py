"""Which bandit finds the best arm?

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from matplotlib.figure import Figure

import softjax as sj
from experiments._plots import COLOURS, MARKERS, finish, legend, panels, style
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    NDArray,
    Options,
    Track,
    arms_of,
    launch,
    untracked,
)

__all__ = ["Config", "draw", "judge", "main", "run"]

LearnerName = Literal[
    "baseline", "no baseline", "epsilon-greedy", "Boltzmann", "Boltzmann, cooled", "mellowmax"
]


class Learner(NamedTuple):
    """A way to learn and to explore, and the settings of its one parameter that are tried."""

    parameter: str
    settings: tuple[float, ...]


LEARNERS: dict[LearnerName, Learner] = {
    "baseline": Learner("step size", (0.1, 0.4)),
    "no baseline": Learner("step size", (0.1, 0.4)),
    "epsilon-greedy": Learner("epsilon", (0.0, 0.01, 0.03125, 0.0625, 0.1, 0.25, 1.0)),
    "Boltzmann": Learner("temperature", (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)),
    "Boltzmann, cooled": Learner("scale", (0.0625, 0.125, 0.25, 0.5, 1.0)),
    "mellowmax": Learner("1 / omega", (0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25)),
}
GRADIENT: tuple[LearnerName, ...] = ("baseline", "no baseline")
JUDGED: tuple[LearnerName, ...] = (*GRADIENT, "epsilon-greedy")  # By the targets.


@dataclass(frozen=True)
class Config(Options):
    """Options of the bandits; a seed stands for `num_runs` runs."""

    num_runs: int = 200
    """Runs that a seed stands for: 2000 in all by default."""
    num_steps: int = 1000
    """Steps of a run."""
    num_arms: int = 10
    """Arms of a bandit."""
    learners: tuple[LearnerName, ...] = tuple(LEARNERS)
    """Learners that are compared; the targets need the first three."""
    stride: int = 1
    """Every how many of a learner's settings are tried."""
    num_last: int = 100
    """Last steps, over which the targets are judged."""
    with_baseline: float = 0.84
    """Target: share of the best arm at step size 0.1 with the baseline."""
    without_baseline: float = 0.49
    """Target: share of the best arm at step size 0.1 without it."""
    tolerance: float = 0.02
    """How far the shares may be from their targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(JUDGED) <= set(self.learners):
            raise ValueError(f"learners must include {JUDGED}, got {self.learners}.")

    def settings(self, name: LearnerName) -> tuple[float, ...]:
        """The settings of a learner that are tried."""
        return LEARNERS[name].settings[:: self.stride]

    @classmethod
    def reduced(cls) -> Self:
        """Fewer learners, settings, runs and steps, and targets to go with them."""
        return cls(
            quick=True,
            num_seeds=2,
            num_runs=100,
            num_steps=200,
            learners=JUDGED,
            stride=2,
            with_baseline=0.61,
            without_baseline=0.36,
            tolerance=0.06,
        )


class State(NamedTuple):
    """The state of the learners of all runs."""

    values: Array  # [runs, arms]: preferences, or estimated values
    counts: Array  # [runs, arms], how often each arm was taken
    mean: Array  # [runs], mean reward


def run(config: Config, track: Track = untracked) -> Arrays:
    """Every learner of both comparisons on the same bandits, with the same draws."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    pairs = [(name, s) for name in config.learners for s in config.settings(name)]
    found: dict[str, list[tuple[NDArray, NDArray]]] = {name: [] for name in config.learners}
    for number in track(range(len(pairs)), "bandits"):
        name, setting = pairs[number]
        kind = jnp.int32(config.learners.index(name))
        reward, best = _simulate(keys, kind, jnp.asarray(setting, float), config)
        found[name].append((np.asarray(reward), np.asarray(best)))
    arrays: Arrays = {}
    for name in config.learners:
        reward, best = map(np.stack, zip(*found[name], strict=True))
        arrays[f"settings/{name}"] = np.array(config.settings(name))
        arrays[f"reward/{name}"] = reward.mean(axis=2)
        arrays[f"best_arm/{name}"] = best[..., -config.num_last :].mean(axis=2)
        shown = {str(name): int(np.argmax(reward.mean(axis=(1, 2))))}
        if name in GRADIENT:
            shown = {f"{name}, {s}": i for i, s in enumerate(config.settings(name))}
        for arm, i in shown.items():
            arrays[f"curves/{arm}/reward"] = reward[i]
            arrays[f"curves/{arm}/best_arm"] = best[i]
    return arrays


@functools.partial(jax.jit, static_argnames=("config",))
def _simulate(keys: Array, kind: Array, setting: Array, config: Config) -> tuple[Array, Array]:
    """Mean reward and share of the best arm over the runs of a seed, each `[seeds, steps]`.

    `kind` numbers the learners, which are all compiled into one program.
    """
    is_gradient = jnp.array([name in GRADIENT for name in config.learners])[kind]
    has_baseline = jnp.array([name == "baseline" for name in config.learners])[kind]
    options = [_OPTIONS[name] for name in config.learners]
    every_run = jnp.arange(config.num_runs, dtype=jnp.int32)

    def one_seed(key: Array) -> tuple[Array, Array]:
        draws_key, step_key = jax.random.split(key)
        # One draw gives the worth of the arms and the noise of every step, because each draw
        # takes time to compile.
        shape = (config.num_runs, config.num_arms + config.num_steps)
        worth, noise = jnp.split(jax.random.normal(draws_key, shape), [config.num_arms], axis=1)
        worth += jnp.where(is_gradient, 4.0, 0.0).astype(worth.dtype)
        best = jnp.argmax(worth, axis=-1).astype(jnp.int32)

        def step(state: State, given: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
            key, noise = given
            temperature, epsilon = jax.lax.switch(kind, options, state, setting)
            arm, _ = sj.select_action(
                key, state.values, temperature=temperature, epsilon=epsilon
            )
            reward = worth[every_run, arm] + noise
            counts = state.counts.at[every_run, arm].add(1)
            number = jnp.sum(counts, axis=-1)
            # The mean of the rewards before this one; the first reward is its own baseline.
            baseline = jnp.where(number == 1, reward, state.mean)
            baseline = jnp.where(has_baseline, baseline, 0)
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
    """The step that makes the value of the arm the mean of its rewards."""
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
_OPTIONS: dict[LearnerName, Callable[[State, Array], tuple[Array, Array]]] = {
    "baseline": lambda state, _: _per_run(state, 1.0),
    "no baseline": lambda state, _: _per_run(state, 1.0),
    "epsilon-greedy": lambda state, epsilon: _per_run(state, 0.0, epsilon),
    "Boltzmann": lambda state, temperature: _per_run(state, temperature),
    "Boltzmann, cooled": _cooled,
    "mellowmax": _mellowmax,
}


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Shares of the best arm over the last steps, the best explorers, and the controls."""
    targets = {"baseline": config.with_baseline, "no baseline": config.without_baseline}
    measures = []
    for name in GRADIENT:
        for setting, share in zip(
            config.settings(name), arrays[f"best_arm/{name}"], strict=True
        ):
            low, high = None, None
            if setting == 0.1:
                low, high = (100 * (targets[name] + s * config.tolerance) for s in (-1, 1))
            title = f"{name}, {setting}: best arm, %"
            measures.append(Measure(title, 100 * share, at_least=low, at_most=high))
    for name in config.learners:
        if name not in GRADIENT:
            rewards = arrays[f"reward/{name}"]
            chosen = int(np.argmax(rewards.mean(axis=1)))
            setting = config.settings(name)[chosen]
            title = f"{name}, {LEARNERS[name].parameter} {setting:.3g}: mean reward"
            measures.append(Measure(title, rewards[chosen]))
    controls = {  # The settings of epsilon-greedy whose shares are known.
        0.0: ("greedy: best arm, %", 25.0, 45.0),
        0.1: ("epsilon-greedy, 0.1: best arm, %", None, 91.0),
        1.0: ("uniform: best arm, %", 9.0, 11.0),
    }
    for setting, share in zip(
        config.settings("epsilon-greedy"), arrays["best_arm/epsilon-greedy"], strict=True
    ):
        if setting in controls:
            title, low, high = controls[setting]
            measures.append(Measure(title, 100 * share, at_least=low, at_most=high))
    return measures


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Curves of the gradient bandit and of the best explorers; rewards by parameter."""
    arms = list(arms_of(arrays))
    gradient = [arm for arm in arms if arm.startswith(GRADIENT)]
    return {
        "gradient": _draw_curves(
            arrays, gradient, "Gradient bandits on arms worth N(4, 1), by step size"
        ),
        "exploration": _draw_curves(
            arrays,
            [arm for arm in arms if arm not in gradient],
            "Explorers on arms worth N(0, 1), each at its best setting",
        ),
        "parameters": _draw_parameters(arrays),
    }


def _draw_curves(arrays: Arrays, arms: list[str], title: str) -> Figure:
    figure, axes = panels(
        ["mean reward", "how often the best arm is taken"],
        f"{title}; shaded: one standard error of the mean.",
        size=4.4,
    )
    for panel, measure, scale in zip(axes, ("reward", "best_arm"), (1, 100), strict=True):
        for number, arm in enumerate(arms):
            curve = scale * arrays[f"curves/{arm}/{measure}"]
            steps = np.arange(1, curve.shape[1] + 1)
            mean, error = curve.mean(0), curve.std(0) / len(curve) ** 0.5
            colour = COLOURS[number]
            panel.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.3)
            panel.plot(steps, mean, **style(number), linewidth=1, label=arm)
    finish(axes[0], "step", "mean reward of the step", whole=True)
    finish(axes[1], "step", "runs that take the best arm, %", whole=True)
    axes[1].set_ylim(0, 100)
    legend(figure)
    return figure


def _draw_parameters(arrays: Arrays) -> Figure:
    figure, (panel,) = panels(
        ["exploration: mean reward of all steps"],
        "Each explorer by the setting of its one parameter; bars: one standard error. Greedy,"
        " epsilon 0, has no place on the logarithmic axis.",
        size=5.0,
    )
    explorers = [name for name in LEARNERS if name not in GRADIENT]
    for number, name in enumerate(explorers):
        if f"settings/{name}" not in arrays:
            continue
        settings, rewards = arrays[f"settings/{name}"], arrays[f"reward/{name}"]
        error = rewards.std(axis=1) / rewards.shape[1] ** 0.5
        kept = settings > 0
        panel.errorbar(
            settings[kept],
            rewards.mean(axis=1)[kept],
            error[kept],
            **style(number),
            marker=MARKERS[number],
            markersize=4,
            label=f"{name}: {LEARNERS[name].parameter}",
        )
    finish(panel, "parameter", "mean reward of a step", x_scale="log2")
    legend(figure)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("bandit", __doc__, Config, run, judge, draw), args)
