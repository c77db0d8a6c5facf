"""Does a network notice inputs of no known class?

A dense network learns to tell two, and then six, of the ten handwritten digits apart, and is
shown digits that it does not know; it can only answer with one that it knows. Half of the
unknown classes are held out: no network trains on them, and "unknown" means their test images.
The other half serves a second network, which trains on them as one more class, "other". Both
networks start from the same weights and train on the same images of known digits.

Four scores say how unknown an image is: the largest probability of a known class, and the
largest logit, the entropy and the energy, -logsumexp, of the known classes. The second network
has a fifth one, the probability of "other". A score is judged by its AUROC, the chance that an
unknown test image scores higher than a known one; its gain is its AUROC less that of the
largest probability, on the same images.

Expected: confidence is not knowledge. Many unknown digits get a probability above 0.9, most of
all where two classes are known; with a trained "other" fewer do. With six known classes, the
AUROC of the largest probability is at least 0.85; this score was chosen before these runs, but
after a pilot. No score is a clear winner: with seven known digits, the pilot gave .890 for the
largest probability, .888 for the largest logit and .883 for the energy, with a spread of .03 to
.05.
Control: between two halves of the known test images, the AUROC is 0.5. A lower AUROC, an
"other" that lowers no confidence, or a control that fails, would refute it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import load
from experiments._networks import Layers, mlp
from experiments._plots import SEEDS, errorbars, finish, legend, lines, panels
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
from experiments._training import auroc, each

__all__ = ["Config", "draw", "judge", "main", "run"]

SCORES = ("probability", "logit", "entropy", "energy", "other")
ARMS = {"alone": SCORES[:4], "and other": SCORES}
GROUPS = ("known", "unknown")
LEVELS = np.linspace(0, 1, 101)  # of confidence
HIGH = 90  # LEVELS[HIGH] is 0.9.


@dataclass(frozen=True)
class Config(Options):
    """Options of the open set."""

    data_dir: Path | None = None
    """Folder with MNIST, CIFAR-10, CIFAR-100 (binary) or an .npz file; none: the digits."""
    known: tuple[int, ...] = (2, 6)
    """Numbers of classes that a network knows; the last one is judged."""
    num_train: int = 1200
    """Images to draw for training; those of known classes, and of "other", are used."""
    num_test: int = 597
    """Images to draw for testing."""
    num_steps: int = 200
    """Steps of Adam, each over all training images."""
    learning_rate: float = 3e-3
    """Step size of Adam."""
    min_auroc: float = 0.85
    """Target on the digits: AUROC of the largest probability, without "other"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.known or min(self.known) < 2:
            raise ValueError(f"known must be numbers of at least 2, got {self.known}.")

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds, images and steps, with a target to go with them."""
        size: dict[str, Any] = {"num_seeds": 8, "num_train": 400, "num_test": 400}
        return cls(quick=True, **size, num_steps=60, min_auroc=0.8)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains both networks for each number of known classes, and scores the test images."""
    data, rng = load(config.data_dir), np.random.default_rng(config.seed)
    size, num_rows = len(data.labels), config.num_train + config.num_test
    if num_rows > size:
        wanted = f"num_train and num_test need {num_rows} images"
        raise ValueError(f"{wanted}; {data.name} has {size}.")
    if max(config.known) > data.num_classes - 2:
        raise ValueError(f"known must be at most {data.num_classes - 2}, got {config.known}.")
    rows = np.stack([rng.permutation(size)[:num_rows] for _ in range(config.num_seeds)])
    # A class has another number in each seed; the first numbers are known.
    numbers = np.stack([rng.permutation(data.num_classes) for _ in range(config.num_seeds)])
    labels = np.take_along_axis(numbers, data.labels[rows], axis=1).astype(np.int32)
    images = jnp.asarray(data.images.reshape(size, -1)[rows], float)
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"data": np.array(data.name), "known": np.array(config.known)}
    cases = [(known, arm) for known in config.known for arm in ARMS]
    classes = np.arange(data.num_classes + 1)  # The last one is "other".
    # One program for all cases, which differ in the outputs that are used.
    one_seed = functools.partial(train, config=config)
    train_all = jax.jit(jax.vmap(one_seed, (0, 0, 0, None, None)))
    for known, arm in each(cases, track, "networks"):
        held_out = known + (data.num_classes - known) // 2
        is_known = classes < known
        is_kept = is_known | (arm == "and other") & (classes == data.num_classes)
        # A label of -1 is ignored.
        others = np.where((labels < held_out) & is_kept[-1], data.num_classes, -1)
        given = np.where(labels < known, labels, others)[:, : config.num_train]
        found = train_all(keys, images, given.astype(np.int32), is_known, is_kept)
        predicted, scores = jax.device_get(found)
        seeds = zip(labels[:, config.num_train :], predicted, scores, strict=True)
        reports = [report(*seed, known, held_out, rng) for seed in seeds]
        for name in reports[0]:
            arrays[f"{name}/{known} {arm}"] = np.stack([of[name] for of in reports])
    return arrays


def train(
    key: Array, images: Array, labels: Array, is_known: Array, is_kept: Array, config: Config
) -> tuple[Array, Array]:
    """Predictions `[num_test]` and scores `[5, num_test]` of the test images.

    `labels` are those of the training images, -1 for an image that is not used. A network
    has an output for each class and one for "other"; `is_kept` says which of them it uses.
    """
    optimizer = optax.adam(config.learning_rate)
    network = mlp([images.shape[-1], 64, 64, is_known.size])
    seen, tested = images[: config.num_train], images[config.num_train :]

    def mean_loss(layers: Layers) -> Array:
        options: dict[str, Any] = {"where": is_kept, "ignore_index": -1, "reduction": "mean"}
        return sj.cross_entropy(network.apply(layers, seen), labels, **options)

    def step(state: Any, _: None) -> Any:
        layers, optimizer_state = state
        grads = jax.grad(mean_loss)(layers)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
        return (optax.apply_updates(layers, updates), optimizer_state), None

    layers = network.init(key)
    state = layers, optimizer.init(layers)
    (layers, _), _ = jax.lax.scan(step, state, length=config.num_steps)
    logits = network.apply(layers, tested)
    probs = sj.softmax(logits, where=is_kept)
    of_known = jnp.where(is_known, logits, -jnp.inf)
    scores = {
        "probability": -jnp.max(jnp.where(is_known, probs, 0), axis=-1),
        "logit": -jnp.max(of_known, axis=-1),
        "entropy": sj.entropy(of_known),
        "energy": sj.energy_score(of_known),
        "other": probs[:, -1],
    }
    return jnp.argmax(of_known, axis=-1), jnp.stack([scores[name] for name in SCORES])


def report(
    labels: NDArray,
    predicted: NDArray,
    scores: NDArray,
    known: int,
    held_out: int,
    rng: np.random.Generator,
) -> Arrays:
    """What is reported of one network; scores are `[5, num_test]`."""
    is_known, is_unknown = labels < known, labels >= held_out
    above = -scores[0][:, None] > LEVELS
    halves = np.array_split(rng.permutation(scores[0][is_known]), 2)
    # The variance of the AUROC between halves that are alike.
    variance = (is_known.sum() + 1) / 12 / len(halves[0]) / len(halves[1])
    return {
        "accuracy": np.mean(predicted[is_known] == labels[is_known]),
        "known": above[is_known].mean(axis=0),
        "unknown": above[is_unknown].mean(axis=0),
        "AUROC": np.array([auroc(score[is_unknown], score[is_known]) for score in scores]),
        "halves": np.array([auroc(*halves), variance]),
    }


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The AUROC of every score, the share of confident unknowns, and the control."""
    on_digits, measures = arrays["data"] == "digits", []
    for known in config.known:
        for arm, names in ARMS.items():
            case = f"{known} {arm}"
            chosen, *others = arrays[f"AUROC/{case}"].T[: len(names)]
            is_judged = on_digits and case == f"{config.known[-1]} alone"
            goal = config.min_auroc if is_judged else None
            measures += [
                Measure(f"accuracy, {case}", arrays[f"accuracy/{case}"]),
                *(
                    Measure(f"{group} above 0.9, {case}", arrays[f"{group}/{case}"][:, HIGH])
                    for group in GROUPS
                ),
                Measure(f"AUROC of probability, {case}", chosen, at_least=goal),
                *(
                    Measure(f"gain of {name}, {case}", values - chosen)
                    for name, values in zip(names[1:], others, strict=True)
                ),
            ]
        before, after = (arrays[f"unknown/{known} {arm}"][:, HIGH] for arm in ARMS)
        halves, variances = arrays[f"halves/{known} alone"].T
        slack = 3 * (np.mean(variances) / len(variances)) ** 0.5
        least = 0.0 if on_digits else None
        measures += [
            Measure(f"fall above 0.9, {known}", before - after, at_least=least),
            Measure(f"AUROC between halves, {known}", halves, 0.5 - slack, 0.5 + slack),
        ]
    return measures


def draw(arrays: Arrays) -> dict[str, Figure]:
    """How many images are above each confidence, and the AUROC of the scores."""
    cases = [(known, arm) for known in arrays["known"] for arm in ARMS]
    confidence, axes = panels(
        [f"{known} known classes, {arm}" for known, arm in cases],
        "Share of the test images above each confidence. Networks learn the known classes alone"
        f" or these and others, as one more class; no network sees the unknown ones.{SEEDS}",
    )
    for panel, (known, arm) in zip(axes, cases, strict=True):
        for number, group in enumerate(GROUPS):
            values = arrays[f"{group}/{known} {arm}"]
            lines(panel, LEVELS, values, f"{group} classes", number)
        panel.axvline(0.9, color="black", linewidth=4, alpha=0.15, label="0.9")
        finish(panel, "largest probability of a known class", "share of images above it")
    legend(confidence)
    areas, axes = panels(
        [f"{known} known classes" for known in arrays["known"]],
        "How well each score tells held-out classes from known ones; 0.5 is chance. Means and"
        " standard errors of the seeds.",
        sharey=True,
    )
    for panel, known in zip(axes, arrays["known"], strict=True):
        for number, (arm, names) in enumerate(ARMS.items()):
            places = np.arange(len(names)) + 0.12 * (2 * number - 1)
            values = arrays[f"AUROC/{known} {arm}"][:, : len(names)]
            errorbars(panel, places, values, f"known {arm}", number, joined=False)
        finish(panel, "score", "AUROC")
        panel.set_xticks(range(len(SCORES)), SCORES, rotation=20)
    legend(areas)
    return {"auroc": areas, "confidence": confidence}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("open_set", __doc__, Config, run, judge, draw), args)
