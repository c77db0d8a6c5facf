"""Does training stall once a classifier is confident?

First, one number is trained: the scale s of the logits s y, as in classifiers that learn a
scale for their cosines, by steps of a constant size along the sign of the gradient. The answer
is known: the gradient is never zero, so that s grows by one step size at every step. Expected:
with `cross_entropy` it does, in float32 and in bfloat16; with the usual form, which subtracts 1
from a probability that has been rounded to 1, the gradient becomes exactly 0 and s stops, near
17 in float32 and long before in bfloat16. The usual form going on, or `cross_entropy` stopping,
would refute it.

Second, a network is trained on handwritten digits with both losses, from the same weights, on
logits in float32 and in bfloat16. In float32 the custom derivatives of `cross_entropy` and
plain automatic differentiation must lead to the same network: the control is that their test
losses agree within 1 % and their accuracies within 1 point on every seed.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import digits
from experiments._networks import Layers, mlp
from experiments._plots import curves, finish, legend, panels, style
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

__all__ = ["Config", "draw", "judge", "main", "run"]

LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "softjax": sj.cross_entropy,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
}
DtypeName = Literal["float32", "bfloat16"]
NETWORK = mlp([64, 64, 10])


@dataclass(frozen=True)
class Config(Options):
    """Options of training beyond confidence."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    dtypes: tuple[DtypeName, ...] = ("float32", "bfloat16")
    """Dtypes of the logits, float32 among them: most targets are for it."""
    num_scale_steps: int = 240
    """Steps of the scale."""
    scale_step: float = 0.25
    """Size of each of them."""
    num_steps: int = 300
    """Steps of Adam of the network, each over all training images."""
    learning_rate: float = 0.01
    """Step size of Adam."""
    max_optax_scale: float = 18.0
    """Target: where the usual form has stopped in float32."""
    max_gap: float = 0.01
    """Target: largest relative difference of the test losses in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "float32" not in self.dtypes:
            raise ValueError(f"dtypes must include float32, got {self.dtypes}.")

    @property
    def arms(self) -> dict[str, tuple[str, DtypeName]]:
        """The loss and the dtype of each arm."""
        return {f"{loss}, {dtype}": (loss, dtype) for dtype in self.dtypes for loss in LOSSES}

    @classmethod
    def reduced(cls) -> Self:
        """One dtype, and fewer seeds and steps of the network; the targets stay."""
        return cls(quick=True, num_seeds=2, dtypes=("float32",), num_steps=60)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains the scale and the network, with each loss in each dtype."""
    data = digits()
    rng = np.random.default_rng(config.seed)
    rows = np.stack([rng.permutation(len(data.labels)) for _ in range(config.num_seeds)])
    images = jnp.asarray(data.images.reshape(len(data.images), -1)[rows], jnp.float32)
    labels = jnp.asarray(data.labels[rows])
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"scale_step": np.array(config.scale_step)}
    arms = list(config.arms)
    for number in track(range(len(arms)), "losses and dtypes"):
        loss, dtype = config.arms[arms[number]]
        arrays[f"scale/{arms[number]}"] = np.asarray(_train_scale(loss, dtype, config))
        scores = _train(keys, images, labels, loss, dtype, data.num_train, config)
        names = ("train_loss", "test_loss", "test_accuracy")
        for measure, values in zip(names, scores, strict=True):
            arrays[f"curves/{arms[number]}/{measure}"] = np.asarray(values)
    return arrays


@functools.partial(jax.jit, static_argnames=("loss", "dtype", "config"))
def _train_scale(loss: str, dtype: DtypeName, config: Config) -> Array:
    """The scale after each step, `[steps]`, for ten classes of which the first is right."""

    def step(scale: Array, _: None) -> tuple[Array, Array]:
        def of_scale(scale: Array) -> Array:
            one_hot = jnp.zeros(10, dtype).at[0].set(1)
            return LOSSES[loss](scale.astype(one_hot.dtype) * one_hot, jnp.array(0, jnp.int32))

        slope = jax.grad(lambda scale: of_scale(scale).astype(jnp.float32))(scale)
        scale -= config.scale_step * jnp.sign(slope)
        return scale, scale

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), length=config.num_scale_steps)[1]


@functools.partial(jax.jit, static_argnames=("loss", "dtype", "num_train", "config"))
def _train(
    keys: Array,
    images: Array,
    labels: Array,
    loss: str,
    dtype: DtypeName,
    num_train: int,
    config: Config,
) -> tuple[Array, Array, Array]:
    """Training loss, test loss and test accuracy, each `[seeds, steps]`.

    The weights are float32; the loss sees the logits in the dtype. The losses that are
    returned are computed from the logits in float32, by `cross_entropy` for all arms.
    """
    optimizer = optax.adam(config.learning_rate)

    def one_seed(key: Array, images: Array, labels: Array) -> tuple[Array, Array, Array]:
        layers = jax.tree.map(lambda leaf: leaf.astype(images.dtype), NETWORK.init(key))

        def mean_loss(layers: Layers) -> tuple[Array, Array]:
            logits = NETWORK.apply(layers, images[:num_train])
            losses = LOSSES[loss](logits.astype(dtype), labels[:num_train])
            exact = jnp.mean(sj.cross_entropy(logits, labels[:num_train]))
            return jnp.mean(losses.astype(images.dtype)), exact

        def step(state: tuple[Layers, Any], _: None) -> Any:
            layers, optimizer_state = state
            grads, train_loss = jax.grad(mean_loss, has_aux=True)(layers)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
            layers = optax.apply_updates(layers, updates)
            logits, tested = NETWORK.apply(layers, images[num_train:]), labels[num_train:]
            test_loss = jnp.mean(sj.cross_entropy(logits, tested))
            accuracy = jnp.mean(jnp.argmax(logits, -1).astype(tested.dtype) == tested)
            return (layers, optimizer_state), (train_loss, test_loss, accuracy)

        state = layers, optimizer.init(layers)
        return jax.lax.scan(step, state, length=config.num_steps)[1]

    return jax.vmap(one_seed)(keys, images, labels)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Where each scale is after all steps, and how far the networks differ."""
    reached = {arm: arrays[f"scale/{arm}"][-1] for arm in config.arms}
    known = config.scale_step * config.num_scale_steps
    limits = {"optax, float32": config.max_optax_scale, "optax, bfloat16": 9.0}
    measures = [
        Measure(
            f"scale, {arm}",
            scale,
            at_least=known if arm.startswith("softjax") else None,
            at_most=limits.get(arm, known),
        )
        for arm, scale in reached.items()
    ]
    final = {
        (arm, measure): arrays[f"curves/{arm}/{measure}"][:, -1]
        for arm in config.arms
        for measure in ("test_loss", "test_accuracy")
    }
    ours, theirs = "softjax, float32", "optax, float32"
    gap = np.abs(final[ours, "test_loss"] / final[theirs, "test_loss"] - 1)
    points = np.abs(final[ours, "test_accuracy"] - final[theirs, "test_accuracy"])
    return [
        *measures,
        *(Measure(f"test loss, {arm}, nats", final[arm, "test_loss"]) for arm in config.arms),
        *(Measure(f"test accuracy, {arm}", final[arm, "test_accuracy"]) for arm in config.arms),
        Measure(
            "float32: relative difference of the test losses",
            gap,
            at_most=config.max_gap,
            summary="max",
        ),
        Measure(
            "float32: difference of the test accuracies", points, at_most=0.01, summary="max"
        ),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The scale by step, and the training of the network."""
    figure, (panel,) = panels(
        ["the scale of the logits"],
        "The scale of the right logit under steps of constant size; the true gradient is never"
        " 0, so that an exact loss climbs for ever. A flat curve has stalled.",
        size=5.0,
    )
    arms = list(arms_of(arrays))
    steps = np.arange(1, len(arrays[f"scale/{arms[0]}"]) + 1)
    known = float(arrays["scale_step"]) * steps
    panel.plot(steps, known, color="black", linewidth=4, alpha=0.15, label="known answer")
    for number, arm in enumerate(arms):
        panel.plot(steps, arrays[f"scale/{arm}"], **style(number), label=arm)
    finish(panel, "step", "scale: margin of the right class, nats", whole=True)
    legend(figure)
    training = curves(
        arrays,
        "step of Adam",
        "A network on digits under each loss, in each dtype of the logits; losses are measured"
        " in float32 for all. Thick: median of the seeds; thin: each seed.",
        names={
            "train_loss": "training loss, nats per image",
            "test_loss": "test loss, nats per image",
            "test_accuracy": "test accuracy, share of images",
        },
    )
    return {"scale": figure, "training": training}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("confidence", __doc__, Config, run, judge, draw), args)
