"""What does a softmax do, number by number?

One hidden layer of four tanh units and a softmax over three classes are fitted to the table
that tutorials show. The output layer starts at zero, so that the answers before training are
known: every probability is 1/3, every loss ln 3. For one row, each step is printed, before
training and after it: scores, exponentials, their sum, probabilities, loss, and the gradient,
p - y.

Expected: all seven rows right, for every seed; the steps by hand agree with `softjax` and with
automatic differentiation. A wrong row, a first loss other than ln 3, or a gradient other than
p - y would refute it.
"""

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
from experiments._networks import Layers, mlp
from experiments._plots import SEEDS, bars, curves, finish, legend, panels
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked

__all__ = ["Config", "Steps", "draw", "judge", "main", "run", "steps_by_hand", "tell"]

FEATURES = (
    (1, 22, 569, 35, 0),
    (1, 7, 351, 75, 1),
    (1, 45, 451, 542, 1),
    (1, 5, 572, 8, 0),
    (0, 22, 565, 44, 1),
    (0, 24, 243, 546, 1),
    (1, 78, 953, 42, 0),
)
CLASSES = (1, 2, 2, 1, 3, 3, 2)
MEANINGS = {
    "scores": "x",
    "exponentials": "e^x",
    "total": "sum of e^x",
    "probs": "p = e^x / sum",
    "loss": "-ln p of the class",
    "gradient": "p - y",
}
BARS = ("scores", "exponentials", "probs", "gradient")


@dataclass(frozen=True)
class Config(Options):
    """Options of the seven-row table."""

    num_steps: int = 500
    """Steps of Adam, each over all rows."""
    learning_rate: float = 0.05
    """Step size of Adam."""
    row: int = 1
    """Row, 1 to 7, whose steps are printed."""
    min_rows_right: int = 7
    """Target: rows that every seed must get right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.row <= len(FEATURES):
            raise ValueError(f"row must be from 1 to {len(FEATURES)}, got {self.row}.")

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds and steps; the target stays."""
        return cls(quick=True, num_seeds=3, num_steps=200)


class Steps(NamedTuple):
    """From scores to the gradient, one field per step, in order."""

    scores: Array  # [..., K]
    exponentials: Array  # [..., K]
    total: Array  # [...]
    probs: Array  # [..., K]
    loss: Array  # [...]
    gradient: Array  # [..., K]


def steps_by_hand(scores: Array, labels: Array) -> Steps:
    """The textbook's steps, for scores `[..., K]` that are small enough for `exp`."""
    is_label = jax.nn.one_hot(labels, scores.shape[-1], dtype=scores.dtype)
    exponentials = jnp.exp(scores)
    total = jnp.sum(exponentials, axis=-1)
    probs = exponentials / total[..., None]
    loss = -jnp.log(jnp.sum(probs * is_label, axis=-1))
    return Steps(scores, exponentials, total, probs, loss, probs - is_label)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Fits the table once per seed; steps, before and after, are `[2, seeds, 7, ...]`."""
    table = np.array(FEATURES)
    features = jnp.asarray((table - table.mean(axis=0)) / table.std(axis=0), float)
    labels = jnp.array(CLASSES, jnp.int32) - 1
    network = mlp([table.shape[1], 4, 3], activation=jnp.tanh)
    optimizer = optax.adam(config.learning_rate)

    def start(key: Array) -> tuple[Layers, Any]:
        hidden, output = network.init(key)
        layers = [hidden, jax.tree.map(jnp.zeros_like, output)]
        return layers, optimizer.init(layers)

    def step(layers: Layers, state: Any) -> tuple[Layers, Any, Array, Array]:
        def mean_loss(layers: Layers) -> tuple[Array, Array]:
            scores = network.apply(layers, features)
            return -jnp.mean(sj.log_prob(scores, labels)), scores

        (loss, scores), grads = jax.value_and_grad(mean_loss, has_aux=True)(layers)
        updates, state = optimizer.update(grads, state, layers)
        return optax.apply_updates(layers, updates), state, loss, scores

    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    layers, state = jax.jit(jax.vmap(start))(keys)
    step_all, losses, scores = jax.jit(jax.vmap(step)), [], []
    # One step more, because a step gives the scores before it.
    for _ in track(range(config.num_steps + 1), "seven rows"):
        layers, state, loss, found = step_all(layers, state)
        losses.append(jax.device_get(loss))
        scores.append(found)

    ends = jnp.stack([scores[0], scores[-1]])
    steps, gaps = jax.jit(both_ways)(ends, jnp.broadcast_to(labels, ends.shape[:-1]))
    return {
        "curves/softmax/loss": np.stack(losses[:-1], axis=1),
        "labels": np.asarray(labels),
        "row": np.array(config.row - 1),
        "gap": np.array(gaps),
        **{f"steps/{name}": np.asarray(values) for name, values in steps._asdict().items()},
    }


def both_ways(scores: Array, labels: Array) -> tuple[Steps, list[Array]]:
    """The steps by hand, and how far `softjax` and automatic differentiation are from them."""
    steps = steps_by_hand(scores, labels)
    gradient = jax.grad(lambda scores: -jnp.sum(sj.log_prob(scores, labels)))(scores)
    library = {
        "probs": sj.softmax(scores),
        "loss": -sj.log_prob(scores, labels),
        "gradient": gradient,
    }
    return steps, [jnp.max(jnp.abs(of - getattr(steps, name))) for name, of in library.items()]


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Rows right, and the two controls: the first loss, and the steps by another way."""
    _, after = arrays["steps/scores"]
    rows_right = np.sum(np.argmax(after, axis=-1) == arrays["labels"], axis=-1)
    first, last = arrays["curves/softmax/loss"][:, [0, -1]].T
    eps = float(np.finfo(after.dtype).eps)
    # exp(s) has the relative error |s| eps, and the logarithm of it that error as it is.
    bound = 4 * eps * (1 + float(np.max(np.abs(after))))
    off, gap = abs(first - math.log(3)), arrays["gap"]
    return [
        Measure("rows right, of 7", rows_right, at_least=config.min_rows_right, summary="min"),
        Measure("loss after training", last),
        Measure("first loss, less ln 3", off, at_most=4 * eps, summary="max"),
        Measure("steps by hand, less softjax", gap, at_most=bound, summary="max"),
    ]


def tell(arrays: Arrays) -> str:
    """The steps of one row, for the first seed, as text."""
    row = int(arrays["row"])
    title = f"Row {row + 1} {FEATURES[row]}, of class {CLASSES[row]}"
    lines = [f"{title:42}{'class 1':>12}{'class 2':>12}{'class 3':>12}"]
    for when, moment in enumerate(("before training", "after training")):
        lines.append(moment)
        for name, meaning in MEANINGS.items():
            values = np.atleast_1d(arrays[f"steps/{name}"][when, 0, row])
            lines.append(f"  {name:14}{meaning:26}" + "".join(f"{v:12.6f}" for v in values))
    return "\n".join(lines)


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The loss of all seeds, and the steps of one row as bars."""
    row = int(arrays["row"])
    figure, axes = panels(
        [f"{name}: {MEANINGS[name]}" for name in BARS],
        f"Row {row + 1}, of class {CLASSES[row]}, for the first seed: every step from the"
        " scores to the gradient, before training and after it.",
    )
    for panel, name in zip(axes, BARS, strict=True):
        before, after = arrays[f"steps/{name}"][:, 0, row]
        heights = {"before training": before, "after training": after}
        bars(panel, [str(number + 1) for number in range(len(before))], heights, ".3g")
        panel.axhline(0, color="black", linewidth=0.6)
        finish(panel, "class", MEANINGS[name])
    legend(figure)
    loss = curves(
        arrays,
        "step of Adam",
        "Cross-entropy of the seven rows; it starts at ln 3 = 1.0986 because the output layer"
        f" starts at zero.{SEEDS}",
        names={"loss": "mean cross-entropy, nats per row"},
    )
    return {"loss": loss, "steps": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("toy", __doc__, Config, run, judge, draw, tell), args)
