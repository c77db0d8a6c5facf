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
from experiments._data import digits
from experiments._networks import Layers, mlp
from experiments._plots import curves, finish, legend, lines, panels
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    NDArray,
    Options,
    Track,
    launch,
    untracked,
)

__all__ = ["Config", "draw", "judge", "main", "run"]

NUM_CLASSES, NUM_TEST = 10, 50  # test images per class
ARMS = ("plain", "class-balanced", "post hoc", "in training")
BALANCED = "equal frequencies"  # The control.
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
    draws = [_draw(rng, data.labels, ranks, (counts, equal)) for ranks in order]
    test, tail, balanced = (np.stack(rows) for rows in zip(*draws, strict=True))
    by_class = np.zeros_like(order)
    np.put_along_axis(by_class, order, np.tile(counts, (config.num_seeds, 1)), axis=1)

    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"counts": counts, "order": order}
    arms = ("plain", "class-balanced", "in training", BALANCED)
    for number in track(range(len(arms)), "long tail"):
        arm = arms[number]
        rows = balanced if arm == BALANCED else tail
        frequencies = np.full_like(by_class, 1) if arm == BALANCED else by_class
        examples = (images[rows], data.labels[rows], images[test], data.labels[test])
        found = _train(
            keys,
            *(
                jnp.asarray(part, float if part.dtype.kind == "f" else None)
                for part in examples
            ),
            jnp.asarray(frequencies, float),
            jnp.int32(arms.index(arm)),
            config,
        )
        (loss, accuracy), (recall, adjusted, changed) = jax.device_get(found)
        arrays[f"curves/{arm}/train_loss"] = loss
        arrays[f"curves/{arm}/balanced_accuracy"] = accuracy
        arrays[f"recall/{arm}"] = recall
        if arm == "plain":
            arrays["recall/post hoc"] = adjusted
        if arm == BALANCED:
            arrays["changed"] = changed
    return arrays


def _draw(
    rng: np.random.Generator, labels: NDArray, ranks: NDArray, counts: tuple[NDArray, NDArray]
) -> tuple[NDArray, ...]:
    """Rows for testing, and rows for training with each of the counts by rank."""
    rows = [rng.permutation(np.flatnonzero(labels == digit)) for digit in ranks]
    test = np.concatenate([of[:NUM_TEST] for of in rows])
    picked = [
        [of[NUM_TEST : NUM_TEST + n] for of, n in zip(rows, count, strict=True)]
        for count in counts
    ]
    return test, *(np.concatenate(parts) for parts in picked)


@functools.partial(jax.jit, static_argnames=("config",))
def _train(
    keys: Array,
    images: Array,
    labels: Array,
    test_images: Array,
    test_labels: Array,
    counts: Array,
    arm: Array,
    config: Config,
) -> Any:
    """Loss and balanced accuracy `[seeds, steps]`; and recalls `[seeds, classes]`.

    `arm` numbers the losses: 1 is class-balanced, 2 adjusts the logits, all others are plain.
    They are compiled into one program. The recalls are those of the logits as they are, and of
    those that are corrected for the counts; last, the share of predictions that differ.
    """
    optimizer = optax.adam(config.learning_rate)

    def one_seed(
        key: Array,
        images: Array,
        labels: Array,
        test_images: Array,
        test_labels: Array,
        counts: Array,
    ) -> Any:
        adjustment = sj.logit_adjustment(counts)
        weights = jnp.where(arm == 1, sj.class_balanced_weights(counts, beta=config.beta), 1)
        shifts = jnp.where(arm == 2, adjustment, 0)
        layers = NETWORK.init(key)

        def mean_loss(layers: Layers) -> Array:
            logits = sj.adjusted_scores(NETWORK.apply(layers, images), shifts)
            losses = sj.cross_entropy(logits, labels, class_weights=weights)
            return jnp.sum(losses) / jnp.sum(weights[labels])

        def recalls(logits: Array) -> tuple[Array, Array]:
            predicted = jnp.argmax(logits, axis=-1).astype(test_labels.dtype)
            is_class = jax.nn.one_hot(test_labels, NUM_CLASSES, dtype=logits.dtype)
            is_right = (predicted == test_labels).astype(logits.dtype)
            return is_right @ is_class / NUM_TEST, predicted

        def step(state: tuple[Layers, Any], _: None) -> Any:
            layers, optimizer_state = state
            loss, grads = jax.value_and_grad(mean_loss)(layers)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
            layers = optax.apply_updates(layers, updates)
            recall = recalls(NETWORK.apply(layers, test_images))[0]
            return (layers, optimizer_state), (loss, jnp.mean(recall))

        state = layers, optimizer.init(layers)
        (layers, _), scores = jax.lax.scan(step, state, length=config.num_steps)
        logits = NETWORK.apply(layers, test_images)
        recall, predicted = recalls(logits)
        corrected, others = recalls(sj.adjusted_scores(logits, -adjustment))
        return scores, (recall, corrected, jnp.mean((predicted != others).astype(logits.dtype)))

    return jax.vmap(one_seed)(keys, images, labels, test_images, test_labels, counts)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Balanced accuracies, the gain of logit adjustment, and the controls."""
    accuracy = {arm: arrays[f"recall/{arm}"].mean(axis=-1) for arm in (*ARMS, BALANCED)}
    best = np.max([accuracy[arm] for arm in ARMS], axis=0)
    return [
        *(Measure(f"balanced accuracy, {arm}", values) for arm, values in accuracy.items()),
        *(
            Measure(
                f"{arm}, less plain",
                accuracy[arm] - accuracy["plain"],
                at_least=config.min_gain if arm == "in training" else 0.0,
            )
            for arm in ARMS[1:]
        ),
        Measure(
            f"{BALANCED}: predictions changed",
            arrays["changed"],
            at_most=0,
            summary="max",
        ),
        Measure(f"{BALANCED}, less the best arm", accuracy[BALANCED] - best, at_least=0.0),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Recall from the commonest class to the rarest, and the training."""
    figure, (panel,) = panels(
        ["recall by how common the class is"],
        "Share of the test images of a class that are recognised, by its number of training"
        " images; with equal frequencies every class has 29 or 30. Thick: median of the seeds;"
        " thin: each seed.",
        size=5.0,
    )
    for number, arm in enumerate((*ARMS, BALANCED)):
        by_rank = np.take_along_axis(arrays[f"recall/{arm}"], arrays["order"], axis=1)
        lines(panel, np.arange(1, NUM_CLASSES + 1), by_rank, arm, number)
    panel.set_ylim(-0.02, 1.02)
    finish(panel, "training images of the class", "recall, share of its images")
    panel.set_xticks(range(1, NUM_CLASSES + 1), [str(count) for count in arrays["counts"]])
    legend(figure)
    training = curves(
        arrays,
        "step of Adam",
        "Training by step; the losses of the arms weigh the classes differently. Thick: median"
        " of the seeds; thin: each seed.",
        names={
            "train_loss": "training loss, nats per image",
            "balanced_accuracy": "balanced accuracy on test images",
        },
    )
    return {"recall": figure, "training": training}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("long_tail", __doc__, Config, run, judge, draw), args)
