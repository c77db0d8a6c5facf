"""Why not argmax, or a sigmoid per class?

A linear classifier of handwritten digits is trained three times from the same weights: by the
cross-entropy of softmax, by the squared error of the one-hot argmax, and by a sigmoid with a
logistic loss for each class. Expected: argmax is a step function, so its gradient is exactly
zero and nothing is learnt; the sigmoids do learn, but each ignores the others, so that their
sum misses 1 by more than 0.1 on at least one test image in twenty, where softmax shares one
unit of probability among all classes.

Controls with known answers: a softmax of (x, 0) is the sigmoid of x; softmax tends to argmax as
T falls, with an error of at most (K - 1) exp(-gap / T), and to equal shares as T grows, with an
error of at most half of the range of the logits over T. A gradient of argmax other than zero,
sigmoids that sum to 1, or a bound that is exceeded would refute it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments import _plots as plots
from experiments._data import Split, shuffled_digits
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

ROW = (2.0, 1.0, 0.2, -0.5)  # The logits whose temperature is varied.


def by_argmax(logits: Array, labels: Array) -> Array:
    """Squared error of the one-hot argmax: 0 or 2 for each image."""
    chosen, targets = (
        jax.nn.one_hot(number, 10, dtype=logits.dtype)
        for number in (jnp.argmax(logits, axis=-1), labels)
    )
    # The sum with 0 z makes the loss depend on the logits in a way that JAX differentiates.
    return jnp.sum((chosen + 0 * logits - targets) ** 2, axis=-1)


def by_sigmoids(logits: Array, labels: Array) -> Array:
    """The logistic loss of each class against all others, summed over the classes."""
    targets = jax.nn.one_hot(labels, 10, dtype=logits.dtype)
    return jnp.sum(jax.nn.softplus(logits) - targets * logits, axis=-1)


Loss = Callable[[Array, Array], Array]
LOSSES: dict[str, Loss] = {
    "softmax": sj.cross_entropy,
    "argmax": by_argmax,
    "sigmoids": by_sigmoids,
}
SIMPLEX_MAPS = {"softmax": sj.softmax, "entmax15": sj.entmax15, "sparsemax": sj.sparsemax}


@dataclass(frozen=True)
class Config(Options):
    """Options of the comparison of softmax with argmax and sigmoids."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    num_steps: int = 200
    """Steps of Adam, each over all training images."""
    learning_rate: float = 0.05
    """Step size of Adam."""
    min_accuracy: float = 0.94
    """Target: the smallest mean test accuracy of softmax."""
    min_missed: float = 0.05
    """Target: share of the test images on which the sigmoids' sum misses 1 by 0.1."""

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds and steps, and a looser target for the accuracy."""
        return cls(quick=True, num_seeds=2, num_steps=60, min_accuracy=0.9)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains the three arms, and tabulates the limits and the pictures of the maps."""
    data = shuffled_digits(np.random.default_rng(config.seed), config.num_seeds)
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {}
    for name, loss in each(LOSSES.items(), track, "three losses"):
        one_seed = functools.partial(train, loss=loss, config=config)
        logits, accuracy, norm = jax.device_get(jax.jit(jax.vmap(one_seed))(keys, data))
        arrays |= {f"curves/{name}/test_accuracy": accuracy}
        arrays |= {f"curves/{name}/gradient_norm": norm}
        probs = jax.nn.sigmoid(logits) if name == "sigmoids" else sj.softmax(logits)
        arrays[f"sum/{name}"] = np.asarray(probs).sum(axis=-1)

    temperatures, x = np.geomspace(0.02, 100, 160), np.linspace(-8, 8, 321)
    radius, angle = np.arange(1, 11)[:, None] / 5, np.linspace(0, 2 * np.pi, 361)
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    circles = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1) @ basis
    given = (jnp.asarray(values, float) for values in (ROW, temperatures, x, circles))
    return arrays | jax.device_get(tables(*given))


@jax.jit  # All maps in one program.
def tables(row: Array, temperatures: Array, x: Array, circles: Array) -> dict[str, Array]:
    """What the controls and the pictures of the maps need."""
    several = jnp.broadcast_to(row, (len(temperatures), len(row)))
    pairs = jnp.stack([x, jnp.zeros_like(x)], axis=-1)
    return {
        "temperatures": temperatures,
        "limits": sj.softmax(several, temperature=temperatures[:, None]),
        "x": x,
        "two classes": sj.softmax(pairs)[:, 0],
        "sigmoid": jax.nn.sigmoid(x),
        "jacobian/softmax": jax.jacobian(sj.softmax)(row),
        "jacobian/sigmoids": jax.jacobian(jax.nn.sigmoid)(row),
        **{f"simplex/{name}": fn(circles) for name, fn in SIMPLEX_MAPS.items()},
    }


def train(key: Array, data: Split, loss: Loss, config: Config) -> tuple[Array, Array, Array]:
    """Logits of the test images, and their accuracy and the gradient's norm at every step."""
    optimizer = optax.adam(config.learning_rate)

    def step(state: Any, _: None) -> Any:
        weights, optimizer_state = state
        mean_loss = lambda weights: jnp.mean(loss(data.images @ weights, data.labels))
        gradient = jax.grad(mean_loss)(weights)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        weights = optax.apply_updates(weights, updates)
        accuracy = jnp.mean(jnp.argmax(data.test_images @ weights, -1) == data.test_labels)
        return (weights, optimizer_state), (accuracy, jnp.linalg.norm(gradient))

    weights = 0.1 * jax.random.normal(key, (data.images.shape[-1], 10))
    state = weights, optimizer.init(weights)
    (weights, _), scores = jax.lax.scan(step, state, length=config.num_steps)
    return data.test_images @ weights, *scores


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The three arms, and the controls whose answers are known."""
    accuracy = {name: arrays[f"curves/{name}/test_accuracy"] for name in LOSSES}
    last = {name: values[:, -1] for name, values in accuracy.items()}
    gained = np.abs(last["argmax"] - accuracy["argmax"][:, 0])
    gradient = arrays["curves/argmax/gradient_norm"]
    missed = np.mean(np.abs(arrays["sum/sigmoids"] - 1) > 0.1, axis=-1)
    probs, temperatures = arrays["limits"], arrays["temperatures"]
    eps = float(np.finfo(probs.dtype).eps)
    gap = ROW[0] - ROW[1]
    to_argmax = probs[:, 1:].sum(axis=-1) / ((len(ROW) - 1) * np.exp(-gap / temperatures))
    to_uniform = np.abs(probs - 1 / len(ROW)).max(axis=-1) * temperatures / np.ptp(ROW)
    off = np.abs(arrays["sum/softmax"] - 1)
    two = np.abs(arrays["two classes"] - arrays["sigmoid"])
    # At the smallest temperature the exponents are as large as 2 * 2.5 / 0.02 = 250.
    low, high = (1 + 250 * eps, 0.5)
    share = "sigmoids: sums that miss 1 by 0.1, share"
    return [
        Measure("argmax: largest gradient", gradient, at_most=0.0, summary="max"),
        Measure("argmax: accuracy gained or lost", gained, at_most=0.0, summary="max"),
        Measure("argmax: test accuracy", last["argmax"]),
        Measure("softmax: test accuracy", last["softmax"], at_least=config.min_accuracy),
        Measure("sigmoids: test accuracy", last["sigmoids"]),
        Measure(share, missed, at_least=config.min_missed),
        Measure("softmax: sum, less 1", off, at_most=10 * eps, summary="max"),
        Measure("softmax of (x, 0), less sigmoid of x", two.max(), at_most=4 * eps),
        Measure("low T: distance from argmax, over its bound", to_argmax.max(), at_most=low),
        Measure("high T: distance from 1 / K, times T / range", to_uniform.max(), at_most=high),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Training of the arms, how classes share, the limits of T, and the simplex."""
    training = plots.curves(
        arrays,
        "step of Adam",
        "A linear classifier of digits from the same weights under three losses; the gradient"
        f" of argmax is exactly 0 at every step.{plots.SEEDS}",
        names={
            "test_accuracy": "test accuracy, share of images",
            "gradient_norm": "norm of the gradient",
        },
    )
    return {
        "training": training,
        "sharing": draw_sharing(arrays),
        "limits": draw_limits(arrays),
        "simplex": draw_simplex(arrays),
    }


def draw_sharing(arrays: Arrays) -> Figure:
    """What a class gains when a logit grows, and whether the classes sum to 1."""
    figure, (*heatmaps, sums) = plots.panels(
        ["softmax: dp / dz", "sigmoids: dp / dz", "sum of the probabilities"],
        f"Above: derivative of each probability by each logit at {ROW}; what softmax"
        " gives one class it takes from the others. Below: test images by the sum of classes.",
    )
    for number, (name, panel) in enumerate(zip(("softmax", "sigmoids"), heatmaps, strict=True)):
        jacobian = arrays[f"jacobian/{name}"]
        texts = [[f"{entry:.2f}" for entry in row] for row in jacobian]
        look: dict[str, Any] = {"x": "logit", "y": "class", "scale": "derivative"}
        plots.heatmap(figure, panel, jacobian, **look, numbers=texts, low=-0.25, high=0.25)
        panel.set(xticks=range(len(ROW)), yticks=range(len(ROW)))
        plots.histogram(
            sums, arrays[f"sum/{name}"], np.linspace(-0.025, 2.025, 42), name, number
        )
    sums.legend(fontsize=8)
    plots.finish(sums, "sum over the classes", "test images of all seeds")
    return figure


def draw_limits(arrays: Arrays) -> Figure:
    """Probabilities by temperature, and the case of two classes."""
    figure, (limits, two) = plots.panels(
        ["limits of the temperature", "two classes"],
        f"Left: softmax of {ROW} at temperature T, from argmax to equal shares. Right: the"
        " softmax of (x, 0) and the sigmoid of x are one curve.",
    )
    for number, logit in enumerate(ROW):
        probs = arrays["limits"][None, :, number]
        plots.lines(limits, arrays["temperatures"], probs, f"z = {logit:g}", number)
    plots.finish(limits, "temperature T", "probability", x_scale="log")
    wide = {"color": plots.COLOURS[0], "linewidth": 5, "alpha": 0.4}
    two.plot(arrays["x"], arrays["two classes"], **wide, label="softmax of (x, 0)")
    plots.lines(two, arrays["x"], arrays["sigmoid"][None], "sigmoid of x", 1)
    plots.finish(two, "x", "probability of the first class")
    for panel in (limits, two):
        panel.legend(fontsize=8)
    return figure


def draw_simplex(arrays: Arrays) -> Figure:
    """Where each map sends the circles: sparse maps reach the edges, softmax never does."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    figure, axes = plots.panels(
        list(SIMPLEX_MAPS),
        "Circles of three logits around zero, of radius 0.2 to 2 (darker is larger), where each"
        " map sends them on the simplex; argmax would send every point to a corner.",
    )
    for panel, name in zip(axes, SIMPLEX_MAPS, strict=True):
        panel.fill(*corners.T, facecolor="none", edgecolor="black", linewidth=0.8)
        for number, (x, y) in enumerate(corners, start=1):
            place = y + (0.03 if y else -0.08)
            panel.text(x, place, f"class {number}", fontsize=8, ha="center")
        circles = arrays[f"simplex/{name}"] @ corners
        for shade, circle in zip(np.linspace(0.35, 1, len(circles)), circles, strict=True):
            panel.plot(*circle.T, color=plots.COLOURS[0], alpha=shade, linewidth=1.2)
        panel.set_aspect("equal")
        panel.set_axis_off()
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("argmax", __doc__, Config, run, judge, draw), args)
