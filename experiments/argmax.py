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
from experiments._data import digits
from experiments._plots import COLOURS, curves, finish, heatmap, panels, style
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked

__all__ = ["Config", "draw", "judge", "main", "run"]

ROW = (2.0, 1.0, 0.2, -0.5)  # The logits whose temperature is varied.


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


def _by_argmax(logits: Array, labels: Array) -> Array:
    """Squared error of the one-hot argmax: 0 or 2 for each image."""
    num_classes = logits.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(logits, -1), num_classes, dtype=logits.dtype)
    targets = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
    # The sum with 0 z makes the loss depend on the logits in a way that JAX differentiates.
    return jnp.sum((chosen + 0 * logits - targets) ** 2, axis=-1)


def _by_sigmoids(logits: Array, labels: Array) -> Array:
    """The logistic loss of each class against all others, summed over the classes."""
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.sum(jax.nn.softplus(logits) - targets * logits, axis=-1)


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "softmax": sj.cross_entropy,
    "argmax": _by_argmax,
    "sigmoids": _by_sigmoids,
}
SIMPLEX_MAPS = {"softmax": sj.softmax, "entmax15": sj.entmax15, "sparsemax": sj.sparsemax}


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains the three arms, and tabulates the limits and the pictures of the maps."""
    data = digits()
    rng = np.random.default_rng(config.seed)
    rows = np.stack([rng.permutation(len(data.labels)) for _ in range(config.num_seeds)])
    images = jnp.asarray(data.images.reshape(len(data.images), -1)[rows], float)
    labels = jnp.asarray(data.labels[rows])
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {}
    names = list(LOSSES)
    for number in track(range(len(names)), "three losses"):
        logits, *scores = _train(
            keys, images, labels, LOSSES[names[number]], data.num_train, config
        )
        for measure, values in zip(("test_accuracy", "gradient_norm"), scores, strict=True):
            arrays[f"curves/{names[number]}/{measure}"] = np.asarray(values)
        probs = jax.nn.sigmoid(logits) if names[number] == "sigmoids" else sj.softmax(logits)
        arrays[f"sum/{names[number]}"] = np.asarray(jnp.sum(probs, axis=-1))

    # The inputs are made by NumPy, because every operation of JAX takes time to compile.
    row = jnp.array(ROW)
    temperatures = np.geomspace(0.02, 100, 160).astype(row.dtype)
    several = np.tile(np.asarray(row), (len(temperatures), 1))
    x = np.linspace(-8, 8, 321).astype(row.dtype)
    radius, angle = np.arange(1, 11)[:, None] / 5, np.linspace(0, 2 * np.pi, 361)
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    circles = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1) @ basis
    tables = {
        "temperatures": temperatures,
        "limits": sj.softmax(several, temperature=temperatures[:, None]),
        "x": x,
        "two classes": np.asarray(sj.softmax(np.stack([x, np.zeros_like(x)], axis=-1)))[:, 0],
        "sigmoid": jax.nn.sigmoid(x),
        "jacobian/softmax": jax.jacobian(sj.softmax)(row),
        "jacobian/sigmoids": jax.jacobian(jax.nn.sigmoid)(row),
        **{f"simplex/{n}": fn(jnp.asarray(circles, float)) for n, fn in SIMPLEX_MAPS.items()},
    }
    return arrays | {name: np.asarray(table) for name, table in tables.items()}


@functools.partial(jax.jit, static_argnames=("loss", "num_train", "config"))
def _train(
    keys: Array,
    images: Array,
    labels: Array,
    loss: Callable[[Array, Array], Array],
    num_train: int,
    config: Config,
) -> tuple[Array, Array, Array]:
    """Logits of the test images, and their accuracy and the gradient's norm at every step."""
    optimizer = optax.adam(config.learning_rate)

    def one_seed(key: Array, images: Array, labels: Array) -> tuple[Array, Array, Array]:
        weights = 0.1 * jax.random.normal(key, (images.shape[-1], 10))

        def step(state: tuple[Array, Any], _: None) -> Any:
            weights, optimizer_state = state
            mean_loss = lambda w: jnp.mean(loss(images[:num_train] @ w, labels[:num_train]))
            gradient = jax.grad(mean_loss)(weights)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            weights = optax.apply_updates(weights, updates)
            predicted = jnp.argmax(images[num_train:] @ weights, -1).astype(labels.dtype)
            accuracy = jnp.mean(predicted == labels[num_train:])
            return (weights, optimizer_state), (accuracy, jnp.linalg.norm(gradient))

        state = weights, optimizer.init(weights)
        (weights, _), scores = jax.lax.scan(step, state, length=config.num_steps)
        return images[num_train:] @ weights, *scores

    return jax.vmap(one_seed)(keys, images, labels)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The three arms, and the controls whose answers are known."""
    accuracy = {name: arrays[f"curves/{name}/test_accuracy"] for name in LOSSES}
    gained = np.abs(accuracy["argmax"][:, -1] - accuracy["argmax"][:, 0])
    missed = np.mean(np.abs(arrays["sum/sigmoids"] - 1) > 0.1, axis=-1)
    probs, temperatures = arrays["limits"], arrays["temperatures"]
    eps = float(np.finfo(probs.dtype).eps)
    gap = ROW[0] - ROW[1]
    to_argmax = probs[:, 1:].sum(axis=-1) / ((len(ROW) - 1) * np.exp(-gap / temperatures))
    to_uniform = np.abs(probs - 1 / len(ROW)).max(axis=-1) * temperatures / np.ptp(ROW)
    # At the smallest temperature the exponents are as large as 2 * 2.5 / 0.02 = 250.
    rounding = 1 + 250 * eps
    return [
        Measure(
            "argmax: largest gradient",
            arrays["curves/argmax/gradient_norm"],
            at_most=0.0,
            summary="max",
        ),
        Measure("argmax: accuracy gained or lost", gained, at_most=0.0, summary="max"),
        Measure("argmax: test accuracy", accuracy["argmax"][:, -1]),
        Measure(
            "softmax: test accuracy",
            accuracy["softmax"][:, -1],
            at_least=config.min_accuracy,
        ),
        Measure("sigmoids: test accuracy", accuracy["sigmoids"][:, -1]),
        Measure(
            "sigmoids: sums that miss 1 by 0.1, share",
            missed,
            at_least=config.min_missed,
        ),
        Measure(
            "softmax: sum, less 1",
            np.abs(arrays["sum/softmax"] - 1),
            at_most=10 * eps,
            summary="max",
        ),
        Measure(
            "softmax of (x, 0), less sigmoid of x",
            np.abs(arrays["two classes"] - arrays["sigmoid"]).max(),
            at_most=4 * eps,
        ),
        Measure(
            "low T: distance from argmax, over its bound", to_argmax.max(), at_most=rounding
        ),
        Measure(
            "high T: distance from 1 / K, times T / range",
            to_uniform.max(),
            at_most=0.5,
        ),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Training of the arms, how classes share, the limits of T, and the simplex."""
    training = curves(
        arrays,
        "step of Adam",
        "A linear classifier of digits from the same weights under three losses; the gradient"
        " of argmax is exactly 0 at every step. Thick: median of the seeds; thin: each seed.",
        names={
            "test_accuracy": "test accuracy, share of images",
            "gradient_norm": "norm of the gradient",
        },
    )
    return {
        "training": training,
        "sharing": _draw_sharing(arrays),
        "limits": _draw_limits(arrays),
        "simplex": _draw_simplex(arrays),
    }


def _draw_sharing(arrays: Arrays) -> Figure:
    titles = ["softmax: dp / dz", "sigmoids: dp / dz", "sum of the probabilities"]
    figure, axes = panels(
        titles,
        f"Left, middle: derivative of each probability by each logit at {ROW}; what softmax"
        " gives one class it takes from the others. Right: test images by the sum of classes.",
    )
    for panel, name in zip(axes, ("softmax", "sigmoids"), strict=False):
        jacobian = arrays[f"jacobian/{name}"]
        texts = [[f"{entry:.2f}" for entry in row] for row in jacobian]
        heatmap(
            figure,
            panel,
            jacobian,
            x="logit",
            y="class",
            scale="derivative",
            numbers=texts,
            low=-0.25,
            high=0.25,
        )
        panel.set_xticks(range(len(ROW)))
        panel.set_yticks(range(len(ROW)))
    for number, name in enumerate(("softmax", "sigmoids")):
        axes[2].hist(
            np.clip(np.ravel(arrays[f"sum/{name}"]), 0, 2),
            bins=np.linspace(0, 2, 41),
            histtype="step",
            linewidth=1.5,
            **style(number),
            label=name,
        )
    axes[2].legend(fontsize=8)
    finish(axes[2], "sum over the classes", "test images of all seeds")
    return figure


def _draw_limits(arrays: Arrays) -> Figure:
    figure, (limits, two) = panels(
        ["limits of the temperature", "two classes"],
        f"Left: softmax of {ROW} at temperature T, from argmax to equal shares. Right: the"
        " softmax of (x, 0) and the sigmoid of x are one curve.",
        size=4.4,
    )
    for number, logit in enumerate(ROW):
        look = style(number)
        limits.plot(
            arrays["temperatures"], arrays["limits"][:, number], **look, label=f"z = {logit:g}"
        )
    limits.legend(fontsize=8)
    finish(limits, "temperature T", "probability", x_scale="log")
    two.plot(
        arrays["x"],
        arrays["two classes"],
        color=COLOURS[0],
        linewidth=5,
        alpha=0.4,
        label="softmax of (x, 0)",
    )
    two.plot(arrays["x"], arrays["sigmoid"], **style(1), label="sigmoid of x")
    two.legend(fontsize=8)
    finish(two, "x", "probability of the first class")
    return figure


def _draw_simplex(arrays: Arrays) -> Figure:
    """Where each map sends the circles: sparse maps reach the edges, softmax never does."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    figure, axes = panels(
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
            panel.plot(*circle.T, color=COLOURS[0], alpha=shade, linewidth=1.2)
        panel.set_aspect("equal")
        panel.set_axis_off()
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("argmax", __doc__, Config, run, judge, draw), args)
