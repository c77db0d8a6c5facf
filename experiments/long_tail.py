"""What helps a classifier with rare classes?

Handwritten digits with a long tail: 120 training images of the commonest class, fewer and fewer
of the others, and one of the rarest; which digit is rare differs from seed to seed. Four ways,
judged by the balanced accuracy, the mean over the classes, on test images of which every class
has as many: the plain cross-entropy; class-balanced weights (Cui et al. 2019); the plain model
with its logits corrected for the frequencies afterwards (post hoc), and logit adjustment in the
training loss (both Menon et al. 2021).

Expected: logit adjustment in training is at least 5 points better than plain training, and all
others are better than plain too. Published for CIFAR-10 with the same imbalance: 71 % plain,
77 % post hoc, 78 % in training. Controls: on as many images with equal frequencies the
adjustment is the same for all classes and changes no prediction at all; and equal frequencies
do better than any arm. A gain below 5 points, or a control that fails, would refute it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import Split, digits
from experiments._networks import Layers, mlp
from experiments._plots import SEEDS, curves, finish, legend, lines, panels
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

NUM_CLASSES, NUM_TEST = 10, 50  # test images per class
BALANCED = "equal frequencies"  # The control.
TRAINED = ("plain", "class-balanced", "in training", BALANCED)
ARMS = ("plain", "class-balanced", "post hoc", "in training")
NETWORK = mlp([64, 64, NUM_CLASSES])


@dataclass(frozen=True)
class Config(Options):
    """Options of the long tail."""

    max_count: int = 120
    """Training images of the commonest class."""
    imbalance: float = 100.0
    """The commonest class's count over the rarest one's; counts fall geometrically."""
    beta: float = 0.999
    """Beta of the class-balanced weights, (1 - beta) / (1 - beta^count)."""
    num_steps: int = 200
    """Steps of Adam, each over all training images."""
    learning_rate: float = 0.005
    """Step size of Adam."""
    min_gain: float = 0.05
    """Target: balanced accuracy of logit adjustment in training, less that of plain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.imbalance <= self.max_count or self.max_count > 120:
            raise ValueError(
                f"imbalance must be from 1 to max_count, and max_count at most 120;"
                f" got {self.imbalance} and {self.max_count}."
            )

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds and steps; the target stays."""
        return cls(quick=True, num_seeds=4, num_steps=100)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every arm on the same long tails, and plain on equal frequencies."""
    data, rng = digits(), np.random.default_rng(config.seed)
    images = data.images.reshape(len(data.images), -1)
    falling = config.imbalance ** (-np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    counts = np.maximum(1, np.rint(config.max_count * falling)).astype(int)
    equal = np.full(NUM_CLASSES, counts.sum() // NUM_CLASSES)
    equal[: counts.sum() % NUM_CLASSES] += 1
    # The class of each rank, the commonest first, `[seeds, classes]`.
    order = np.stack([rng.permutation(NUM_CLASSES) for _ in range(config.num_seeds)])
    # The images of each class in an order of its own: the first are for testing.
    rows = [[rng.permutation(np.flatnonzero(data.labels == k)) for k in o] for o in order]
    test = np.array([np.concatenate([of[:NUM_TEST] for of in seed]) for seed in rows])
    tail, balanced = (
        np.array(
            [
                np.concatenate([of[NUM_TEST:][:n] for of, n in zip(seed, numbers, strict=True)])
                for seed in rows
            ]
        )
        for numbers in (counts, equal)
    )
    by_class = np.take_along_axis(np.tile(counts, (len(order), 1)), np.argsort(order), axis=1)

    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"counts": counts, "order": order}
    # One program for all arms, which are numbered.
    train_all = jax.jit(jax.vmap(functools.partial(train, config=config), (0, 0, 0, None)))
    for number, arm in each(enumerate(TRAINED), track, "long tail"):
        seen, frequencies = (balanced, by_class**0) if arm == BALANCED else (tail, by_class)
        given = Split(images[seen], data.labels[seen], images[test], data.labels[test])
        found = train_all(keys, given, jnp.asarray(frequencies, float), jnp.int32(number))
        (loss, accuracy), (recall, corrected, changed) = jax.device_get(found)
        arrays[f"curves/{arm}/train_loss"] = loss
        arrays[f"curves/{arm}/balanced_accuracy"] = accuracy
        arrays[f"recall/{arm}"] = recall
        if arm == "plain":
            arrays["recall/post hoc"] = corrected
    arrays["changed"] = changed  # Of the last arm, the control.
    return arrays


def train(key: Array, data: Split, counts: Array, arm: Array, config: Config) -> Any:
    """Loss and balanced accuracy `[steps]`; and recalls `[classes]`.

    `arm` numbers the losses: 1 is class-balanced, 2 adjusts the logits, all others are plain.
    The recalls are those of the logits as they are, and of those that are corrected for the
    counts; last, the share of predictions that differ.
    """
    optimizer = optax.adam(config.learning_rate)
    adjustment = sj.logit_adjustment(counts)
    weights = jnp.where(arm == 1, sj.class_balanced_weights(counts, beta=config.beta), 1)
    shifts = jnp.where(arm == 2, adjustment, 0)

    def mean_loss(layers: Layers) -> Array:
        logits = sj.adjusted_scores(NETWORK.apply(layers, data.images), shifts)
        losses = sj.cross_entropy(logits, data.labels, class_weights=weights)
        return jnp.sum(losses) / jnp.sum(weights[data.labels])

    def recalls(logits: Array) -> tuple[Array, Array]:
        predicted = jnp.argmax(logits, axis=-1)
        is_class = jax.nn.one_hot(data.test_labels, NUM_CLASSES, dtype=logits.dtype)
        is_right = (predicted == data.test_labels).astype(logits.dtype)
        return is_right @ is_class / NUM_TEST, predicted

    def step(state: Any, _: None) -> Any:
        layers, optimizer_state = state
        loss, grads = jax.value_and_grad(mean_loss)(layers)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
        layers = optax.apply_updates(layers, updates)
        accuracy = jnp.mean(recalls(NETWORK.apply(layers, data.test_images))[0])
        return (layers, optimizer_state), (loss, accuracy)

    layers = NETWORK.init(key)
    state = layers, optimizer.init(layers)
    (layers, _), scores = jax.lax.scan(step, state, length=config.num_steps)
    logits = NETWORK.apply(layers, data.test_images)
    recall, predicted = recalls(logits)
    corrected, others = recalls(sj.adjusted_scores(logits, -adjustment))
    return scores, (recall, corrected, jnp.mean(predicted != others))


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Balanced accuracies, the gain of logit adjustment, and the controls."""
    accuracy = {arm: arrays[f"recall/{arm}"].mean(axis=-1) for arm in (*ARMS, BALANCED)}
    measures = [Measure(f"balanced accuracy, {arm}", of) for arm, of in accuracy.items()]
    for arm in ARMS[1:]:
        gain = accuracy[arm] - accuracy["plain"]
        goal = config.min_gain if arm == "in training" else 0.0
        measures.append(Measure(f"{arm}, less plain", gain, at_least=goal))
    changed, best = arrays["changed"], np.max([accuracy[arm] for arm in ARMS], axis=0)
    return [
        *measures,
        Measure(f"{BALANCED}: predictions changed", changed, at_most=0, summary="max"),
        Measure(f"{BALANCED}, less the best arm", accuracy[BALANCED] - best, at_least=0.0),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Recall from the commonest class to the rarest, and the training."""
    figure, (panel,) = panels(
        ["recall by how common the class is"],
        "Share of the test images of a class that are recognised, by its number of training"
        f" images; with equal frequencies every class has 29 or 30.{SEEDS}",
        size=5.0,
    )
    for number, arm in enumerate((*TRAINED, "post hoc")):
        by_rank = np.take_along_axis(arrays[f"recall/{arm}"], arrays["order"], axis=1)
        lines(panel, np.arange(1, NUM_CLASSES + 1), by_rank, arm, number)
    panel.set_ylim(-0.02, 1.02)
    finish(panel, "training images of the class", "recall, share of its images")
    panel.set_xticks(range(1, NUM_CLASSES + 1), [str(count) for count in arrays["counts"]])
    legend(figure)
    training = curves(
        arrays,
        "step of Adam",
        f"Training by step; the losses of the arms weigh the classes differently.{SEEDS}",
        names={
            "train_loss": "training loss, nats per image",
            "balanced_accuracy": "balanced accuracy on test images",
        },
    )
    return {"recall": figure, "training": training}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("long_tail", __doc__, Config, run, judge, draw), args)
