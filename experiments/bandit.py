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
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments import _plots as plots
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    Options,
    Track,
    arms_of,
    launch,
    untracked,
)
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

Name = Literal[
    "baseline", "no baseline", "epsilon-greedy", "Boltzmann", "Boltzmann, cooled", "mellowmax"
]
NAMES: tuple[Name, ...] = get_args(Name)
GRADIENT: tuple[Name, ...] = ("baseline", "no baseline")
NUM_ARMS = 10
NUM_LAST = 100  # Steps at the end, over which the targets are judged.


class State(NamedTuple):
    """The state of the learners of all runs."""

    values: Array  # [runs, arms]: preferences, or estimated values
    counts: Array  # [runs, arms], how often each arm was taken
    mean: Array  # [runs], mean reward


class Learner(NamedTuple):
    """How a learner explores, and the settings of its one parameter that are tried.

    `options` gives the temperature and the epsilon of `select_action`, `[runs, 1]` or `[]`.
    """

    parameter: str
    settings: tuple[float, ...]
    options: Callable[[State, Array], tuple[Any, Any]]


def cooled(state: State, scale: Array) -> tuple[Any, Any]:
    """A temperature that falls with the number of steps."""
    visits = jnp.sum(state.counts, axis=-1, keepdims=True)
    return scale * sj.visit_count_temperature(state.values, visits), 0.0


def mellow(state: State, setting: Array) -> tuple[Any, Any]:
    """The temperature whose policy is worth the mellowmax of the values."""
    return sj.mellowmax_temperature(state.values, omega=1 / setting), 0.0


GREEDY = (0.0, 0.01, 0.03125, 0.0625, 0.1, 0.25, 1.0)
POWERS = tuple(2.0**i for i in range(-7, 1))  # From 1/128 to 1.
LEARNERS: dict[Name, Learner] = {
    "baseline": Learner("step size", (0.1, 0.4), lambda state, rate: (1.0, 0.0)),
    "no baseline": Learner("step size", (0.1, 0.4), lambda state, rate: (1.0, 0.0)),
    "epsilon-greedy": Learner("epsilon", GREEDY, lambda state, epsilon: (0.0, epsilon)),
    "Boltzmann": Learner("temperature", POWERS[2:], lambda state, t: (t, 0.0)),
    "Boltzmann, cooled": Learner("scale", POWERS[3:], cooled),
    "mellowmax": Learner("1 / omega", POWERS[:6], mellow),
}


@dataclass(frozen=True)
class Config(Options):
    """Options of the bandits; a seed stands for `num_runs` runs."""

    num_runs: int = 200
    """Runs that a seed stands for: 2000 in all by default."""
    num_steps: int = 1000
    """Steps of a run."""
    learners: tuple[Name, ...] = NAMES
    """Learners that are compared; the targets need the first three."""
    stride: int = 1
    """Every how many of a learner's settings are tried."""
    with_baseline: float = 0.84
    """Target: share of the best arm at step size 0.1 with the baseline."""
    without_baseline: float = 0.49
    """Target: share of the best arm at step size 0.1 without it."""
    tolerance: float = 0.02
    """How far the shares may be from their targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(NAMES[:3]) <= set(self.learners):
            raise ValueError(f"learners must include {NAMES[:3]}, got {self.learners}.")

    def settings(self, name: Name) -> tuple[float, ...]:
        """The settings of a learner that are tried."""
        return LEARNERS[name].settings[:: self.stride]

    @classmethod
    def reduced(cls) -> Self:
        """Fewer learners, settings, runs and steps, and targets to go with them."""
        size: dict[str, Any] = {"num_seeds": 2, "num_runs": 100, "num_steps": 200, "stride": 2}
        goals: dict[str, Any] = {
            "with_baseline": 0.61,
            "without_baseline": 0.36,
            "tolerance": 0.06,
        }
        return cls(quick=True, learners=NAMES[:3], **size, **goals)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Every learner of both comparisons on the same bandits, with the same draws."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    pairs = [(name, s) for name in config.learners for s in config.settings(name)]
    # One program for all learners, which are numbered.
    one_seed = functools.partial(simulate, config=config)
    simulate_all = jax.jit(jax.vmap(one_seed, in_axes=(0, None, None)))
    found = {}
    for name, setting in each(pairs, track, "bandits"):
        kind = jnp.int32(config.learners.index(name))
        given = keys, kind, jnp.asarray(setting, float)
        found[name, setting] = jax.device_get(simulate_all(*given))
    arrays: Arrays = {}
    for name in config.learners:
        settings = config.settings(name)
        reward, best = map(np.stack, zip(*(found[name, s] for s in settings), strict=True))
        arrays[f"settings/{name}"] = np.array(settings)
        arrays[f"reward/{name}"] = reward.mean(axis=2)
        arrays[f"best_arm/{name}"] = best[..., -NUM_LAST:].mean(axis=2)
        shown = {str(name): int(np.argmax(reward.mean(axis=(1, 2))))}
        if name in GRADIENT:
            shown = {f"{name}, {s}": i for i, s in enumerate(settings)}
        for arm, i in shown.items():
            arrays |= {f"curves/{arm}/reward": reward[i], f"curves/{arm}/best_arm": best[i]}
    return arrays


def simulate(key: Array, kind: Array, setting: Array, config: Config) -> tuple[Array, Array]:
    """Mean reward and share of the best arm over the runs of a seed, each `[steps]`."""
    is_gradient = jnp.array([name in GRADIENT for name in config.learners])[kind]
    has_baseline = jnp.array([name == "baseline" for name in config.learners])[kind]
    every_run = jnp.arange(config.num_runs, dtype=jnp.int32)
    draws_key, step_key = jax.random.split(key)
    # One draw gives the worth of the arms and the noise of every step, because each draw takes
    # time to compile.
    shape = (config.num_runs, NUM_ARMS + config.num_steps)
    worth, noise = jnp.split(jax.random.normal(draws_key, shape), [NUM_ARMS], axis=1)
    worth += jnp.where(is_gradient, 4.0, 0.0).astype(worth.dtype)
    best = jnp.argmax(worth, axis=-1)

    def options_of(name: Name) -> Callable[[State, Array], list[Array]]:
        def options(state: State, setting: Array) -> list[Array]:
            each = LEARNERS[name].options(state, setting)
            return [jnp.broadcast_to(jnp.asarray(x, float), (config.num_runs, 1)) for x in each]

        return options

    all_options = [options_of(name) for name in config.learners]

    def step(state: State, given: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        key, noise = given
        temperature, epsilon = jax.lax.switch(kind, all_options, state, setting)
        arm, _ = sj.select_action(key, state.values, temperature=temperature, epsilon=epsilon)
        reward = worth[every_run, arm] + noise
        counts = state.counts.at[every_run, arm].add(1)
        number = jnp.sum(counts, axis=-1)
        # The mean of the rewards before this one; the first reward is its own baseline.
        baseline = jnp.where(number == 1, reward, state.mean)
        baseline = jnp.where(has_baseline, baseline, 0)

        move = jax.lax.cond(
            is_gradient,
            lambda values: setting * uphill(values, arm, reward - baseline),
            lambda values: towards_mean(values, arm, reward, counts),
            state.values,
        )
        mean = state.mean + (reward - state.mean) / number
        return State(state.values + move, counts, mean), (
            jnp.mean(reward),
            jnp.mean((arm == best).astype(reward.dtype)),
        )

    start = State(jnp.zeros_like(worth), jnp.zeros_like(worth), jnp.zeros(config.num_runs))
    keys = jax.random.split(step_key, config.num_steps)
    return jax.lax.scan(step, start, (keys, noise.T))[1]


def uphill(values: Array, arm: Array, advantage: Array) -> Array:
    """The gradient of the reward that is expected, in values that are preferences."""
    return -jax.grad(lambda z: jnp.sum(sj.policy_gradient_loss(z, arm, advantage)))(values)


def towards_mean(values: Array, arm: Array, reward: Array, counts: Array) -> Array:
    """The move that makes the value of the arm the mean of its rewards."""
    taken = jax.nn.one_hot(arm, values.shape[-1], dtype=values.dtype)
    return taken * (reward[:, None] - values) / jnp.maximum(counts, 1)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Shares of the best arm over the last steps, the best explorers, and the controls."""
    measures = []
    for name, goal in zip(
        GRADIENT, (config.with_baseline, config.without_baseline), strict=True
    ):
        for setting, share in zip(
            config.settings(name), arrays[f"best_arm/{name}"], strict=True
        ):
            ends: list[Any] = [100 * (goal + sign * config.tolerance) for sign in (-1, 1)]
            bounds = ends if setting == 0.1 else [None, None]
            measures.append(Measure(f"{name}, {setting}: best arm, %", 100 * share, *bounds))
    for name in config.learners:
        if name not in GRADIENT:
            rewards = arrays[f"reward/{name}"]
            chosen = int(np.argmax(rewards.mean(axis=1)))
            parameter = f"{LEARNERS[name].parameter} {config.settings(name)[chosen]:.3g}"
            measures.append(Measure(f"{name}, {parameter}: mean reward", rewards[chosen]))
    controls = {  # The settings of epsilon-greedy whose shares are known.
        0.0: ("greedy: best arm, %", 25.0, 45.0),
        0.1: ("epsilon-greedy, 0.1: best arm, %", None, 91.0),
        1.0: ("uniform: best arm, %", 9.0, 11.0),
    }
    shares = dict(zip(config.settings(NAMES[2]), arrays[f"best_arm/{NAMES[2]}"], strict=True))
    for setting, (title, *bounds) in controls.items():
        if setting in shares:
            measures.append(Measure(title, 100 * shares[setting], *bounds))
    return measures


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Curves of the gradient bandit and of the best explorers; rewards by parameter."""
    curves = arms_of(arrays)
    gradient = {arm: of for arm, of in curves.items() if arm.startswith(GRADIENT)}
    explorers = {arm: of for arm, of in curves.items() if arm not in gradient}
    figure, (panel,) = plots.panels(
        ["exploration: mean reward of all steps"],
        "Each explorer by the setting of its one parameter; bars: one standard error. Greedy,"
        " epsilon 0, has no place on the logarithmic axis.",
        size=5.0,
    )
    for number, name in enumerate(name for name in LEARNERS if name in explorers):
        settings, rewards = arrays[f"settings/{name}"], arrays[f"reward/{name}"]
        label = f"{name}: {LEARNERS[name].parameter}"
        kept = settings > 0
        plots.errorbars(panel, settings[kept], rewards[kept].T, label, number)
    plots.finish(panel, "parameter", "mean reward of a step", x_scale="log2")
    plots.legend(figure)
    return {
        "gradient": draw_curves(gradient, "Gradient bandits on arms worth N(4, 1)"),
        "exploration": draw_curves(explorers, "Explorers at their best, on arms worth N(0, 1)"),
        "parameters": figure,
    }


def draw_curves(arms: dict[str, Arrays], title: str) -> Figure:
    """The reward, and how often the best arm is taken, of each arm by step."""
    figure, axes = plots.panels(
        ["mean reward", "how often the best arm is taken"],
        f"{title}; shaded: one standard error of the mean.",
    )
    for panel, measure, scale in zip(axes, ("reward", "best_arm"), (1, 100), strict=True):
        for number, (arm, curves) in enumerate(arms.items()):
            curve = scale * curves[measure]
            steps = np.arange(1, curve.shape[1] + 1)
            mean, error = curve.mean(0), curve.std(0) / len(curve) ** 0.5
            look = plots.style(number)
            band = mean - error, mean + error
            panel.fill_between(steps, *band, color=look["color"], alpha=0.3)
            panel.plot(steps, mean, **look, linewidth=1, label=arm)
    plots.finish(axes[0], "step", "mean reward of the step", whole=True)
    plots.finish(axes[1], "step", "runs that take the best arm, %", whole=True)
    axes[1].set_ylim(0, 100)
    plots.legend(figure)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("bandit", __doc__, Config, run, judge, draw), args)
