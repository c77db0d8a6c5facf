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
from experiments._data import Split, shuffled_digits
from experiments._networks import Layers, mlp
from experiments._plots import SEEDS, curves, finish, legend, lines, panels, under
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

Loss = Callable[[Array, Array], Array]
LOSSES: dict[str, Loss] = {
    "softjax": sj.cross_entropy,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
}
CURVES = {  # What is measured at each step, and how pictures name it.
    "train_loss": "training loss, nats per image",
    "test_loss": "test loss, nats per image",
    "test_accuracy": "test accuracy, share of images",
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
    data = shuffled_digits(np.random.default_rng(config.seed), config.num_seeds)
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"scale_step": np.array(config.scale_step)}
    for arm, (loss, dtype) in each(config.arms.items(), track, "losses and dtypes"):
        one_seed = functools.partial(train, loss=LOSSES[loss], dtype=dtype, config=config)
        scores = jax.device_get(jax.jit(jax.vmap(one_seed))(keys, data))
        arrays |= {f"curves/{arm}/{n}": of for n, of in zip(CURVES, scores, strict=True)}
        one_scale = functools.partial(train_scale, LOSSES[loss], dtype, config)
        arrays[f"scale/{arm}"] = np.asarray(jax.jit(one_scale)())
    return arrays


def train_scale(loss: Loss, dtype: DtypeName, config: Config) -> Array:
    """The scale after each step, `[steps]`, for ten classes of which the first is right."""

    def step(scale: Array, _: None) -> tuple[Array, Array]:
        def of_scale(scale: Array) -> Array:
            logits = scale.astype(dtype) * jnp.zeros(10, dtype).at[0].set(1)
            return loss(logits, jnp.array(0, jnp.int32)).astype(jnp.float32)

        scale -= config.scale_step * jnp.sign(jax.grad(of_scale)(scale))
        return scale, scale

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), length=config.num_scale_steps)[1]


def train(
    key: Array, data: Split, loss: Loss, dtype: DtypeName, config: Config
) -> tuple[Array, Array, Array]:
    """Training loss, test loss and test accuracy, each `[steps]`.

    The weights are float32; the loss sees the logits in the dtype. The losses that are
    returned are computed from the logits in float32, by `cross_entropy` for all arms.
    """
    optimizer = optax.adam(config.learning_rate)

    def mean_loss(layers: Layers) -> tuple[Array, Array]:
        logits = NETWORK.apply(layers, data.images)
        losses = loss(logits.astype(dtype), data.labels).astype(jnp.float32)
        return jnp.mean(losses), jnp.mean(sj.cross_entropy(logits, data.labels))

    def step(state: Any, _: None) -> Any:
        layers, optimizer_state = state
        grads, train_loss = jax.grad(mean_loss, has_aux=True)(layers)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
        layers = optax.apply_updates(layers, updates)
        logits = NETWORK.apply(layers, data.test_images)
        test_loss = jnp.mean(sj.cross_entropy(logits, data.test_labels))
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == data.test_labels)
        return (layers, optimizer_state), (train_loss, test_loss, accuracy)

    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), NETWORK.init(key))
    state = layers, optimizer.init(layers)
    return jax.lax.scan(step, state, length=config.num_steps)[1]


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Where each scale is after all steps, and how far the networks differ."""
    known = config.scale_step * config.num_scale_steps
    stalls = {"optax, float32": config.max_optax_scale, "optax, bfloat16": 9.0}
    measures = []
    for arm in config.arms:
        low, high = (None, stalls[arm]) if arm in stalls else (known, known)
        measures.append(Measure(f"scale, {arm}", arrays[f"scale/{arm}"][-1], low, high))
    losses, accuracies = (
        {arm: arrays[f"curves/{arm}/{measure}"][:, -1] for arm in config.arms}
        for measure in ("test_loss", "test_accuracy")
    )
    ours, theirs = "softjax, float32", "optax, float32"
    gap, limit = np.abs(losses[ours] / losses[theirs] - 1), config.max_gap
    points = np.abs(accuracies[ours] - accuracies[theirs])
    title = "float32: relative difference of the test losses"
    return [
        *measures,
        *(Measure(f"test loss, {arm}, nats", values) for arm, values in losses.items()),
        *(Measure(f"test accuracy, {arm}", values) for arm, values in accuracies.items()),
        Measure(title, gap, None, limit, "max"),
        Measure("float32: difference of the test accuracies", points, None, 0.01, "max"),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The scale by step, and the training of the network."""
    figure, (panel,) = panels(
        ["the scale of the logits"],
        "The scale of the right logit under steps of constant size; the true gradient is never"
        " 0, so that an exact loss climbs for ever. A flat curve has stalled.",
        size=5.0,
    )
    for number, (arm, scale) in enumerate(under(arrays, "scale").items()):
        steps = np.arange(1, len(scale) + 1)
        lines(panel, steps, scale[None], arm, number)
    known = float(arrays["scale_step"]) * steps
    panel.plot(steps, known, color="black", linewidth=4, alpha=0.15, label="known answer")
    finish(panel, "step", "scale: margin of the right class, nats", whole=True)
    legend(figure)
    training = curves(
        arrays,
        "step of Adam",
        "A network on digits under each loss, in each dtype of the logits; losses are measured"
        f" in float32 for all. Where curves lie on each other, the losses agree.{SEEDS}",
        names=CURVES,
    )
    return {"scale": figure, "training": training}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("confidence", __doc__, Config, run, judge, draw), args)
