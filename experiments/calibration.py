"""Are outputs probabilities, and what helps if not?

Dense networks learn handwritten digits from 400 images, 15 % of them with a wrong label. The
wrong labels are put in on purpose: the networks learn them by heart and become over-confident.
All other labels are right. Further images fit a temperature, others the thresholds of the
prediction sets, and the rest is for testing; no network trains on any of these.

Expected: one temperature, above 1, takes away a third or more of the expected calibration error
(ECE) and lowers the negative log-likelihood (NLL). The mean of five networks has a lower NLL
than one of them; a mean of probabilities is less confident than a mean of logits. Sets of
classes that shall hold the label of 90 % of the images do so. Guo et al. (2017) publish an ECE
of 16.5 % before scaling and 1.3 % after it, for a deep network on CIFAR-100.

The gain depends on the length of training, which was chosen after a look at the results: after
150 steps the networks are not over-confident yet, and one temperature does not lower the ECE.

Controls: a temperature that is fitted again, to scaled logits, is 1. Labels that are drawn from
the probabilities themselves leave the ECE that theory gives for so few images. No ensemble has
a larger NLL than its members have on average. The share of sets that hold their label follows a
beta-binomial distribution, whatever the network is; scores that are equal can only raise it,
and sums of probabilities, in "aps" and "raps", may be equal. An ECE or NLL that does not fall,
or a control that fails, would refute it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import load
from experiments._networks import Layers, Network, mlp
from experiments._plots import SEEDS, errorbars, finish, legend, lines, panels, under
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
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

ARMS = ("one network", "one, scaled", "mean of probabilities", "mean of logits")
SPACES: tuple[Literal["probability", "logit"], ...] = ("probability", "logit")
NUM_DRAWS = 20  # of labels, for the control of the ECE
Kind = Literal["threshold", "aps", "raps"]
RAPS = {"penalty": 0.05, "num_free": 2}  # "raps" adds the penalty from the third class on.


@dataclass(frozen=True)
class Config(Options):
    """Options of calibration."""

    data_dir: Path | None = None
    """Folder with MNIST, CIFAR-10, CIFAR-100 (binary) or an .npz file; none: the digits."""
    num_members: int = 5
    """Networks of an ensemble; they differ in their first weights."""
    num_hidden: int = 256
    """Width of both hidden layers."""
    part: int = 400
    """Images to train on, as many for the temperature, and as many for the thresholds."""
    num_test: int = 597
    """Images for testing; together with the three parts, these are all the digits."""
    wrong: float = 0.15
    """Share of the training labels that are wrong."""
    num_steps: int = 300
    """Steps of Adam, each over all training images."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    kinds: tuple[Kind, ...] = ("threshold", "aps", "raps")
    """Kinds of prediction sets."""
    level: float = 0.9
    """How often a prediction set shall hold its label."""
    min_fall: float = 1 / 3
    """Target on the digits: the share of the ECE that scaling takes away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, got {self.level}.")

    @classmethod
    def reduced(cls) -> Self:
        """Fewer and smaller networks, larger steps and one kind of sets; the targets stay."""
        size: dict[str, Any] = {"num_seeds": 5, "num_members": 2, "num_hidden": 64}
        return cls(quick=True, **size, num_steps=80, learning_rate=2e-2, kinds=("threshold",))


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains the members, all seeds side by side, and measures what their logits are worth."""
    data, rng = load(config.data_dir), np.random.default_rng(config.seed)
    size, num_rows = len(data.labels), 3 * config.part + config.num_test
    if num_rows > size:
        raise ValueError(f"part and num_test need {num_rows} images; {data.name} has {size}.")
    rows = np.stack([rng.permutation(size)[:num_rows] for _ in range(config.num_seeds)])
    train, fit, conform, test = np.split(np.arange(num_rows), config.part * np.arange(1, 4))
    labels, order = data.labels[rows], rng.permuted(np.tile(train, (len(rows), 1)), axis=1)
    shifts = rng.integers(1, data.num_classes, order.shape, np.int32)
    given = (labels[:, train] + shifts * (order < config.wrong * len(train))) % data.num_classes
    images = jnp.asarray(data.images.reshape(size, -1)[rows], float)
    hidden = config.num_hidden, config.num_hidden
    network = mlp([images.shape[-1], *hidden, data.num_classes])
    keys = jax.random.split(jax.random.key(config.seed), (config.num_members, config.num_seeds))
    train_all = jax.jit(jax.vmap(functools.partial(train_one, network=network, config=config)))
    found = [np.asarray(train_all(k, images, given)) for k in each(keys, track, "networks")]
    logits = np.stack(found, axis=1)

    fit_temperature = jax.jit(jax.vmap(sj.fit_temperature))
    temperature = np.asarray(fit_temperature(logits[:, 0, fit], labels[:, fit]))
    scaled = logits[:, 0] / temperature[:, None, None]
    refitted = np.asarray(fit_temperature(scaled[:, fit], labels[:, fit]))
    arrays: Arrays = {"temperature": temperature, "refitted": refitted}
    tested, answers = scaled[:, test], labels[:, test]
    weights = np.exp(tested - tested.max(axis=-1, keepdims=True))
    probs = weights / weights.sum(axis=-1, keepdims=True)
    drawn = draw_labels(rng, probs)
    scores = jax.device_get(score(logits[:, :, test], tested, answers, drawn))
    places = dict(zip(ARMS, (0, *range(len(found), len(found) + 3)), strict=True))
    for name, values in scores.items():
        arrays |= {f"{name}/{arm}": values[:, place] for arm, place in places.items()}
    arrays["members"] = scores["NLL"][:, : len(found)].mean(axis=1)
    of_drawn = scores["ECE"][:, len(found) + 3 :].mean(axis=1)
    arrays["own labels"] = of_drawn / expected_error(probs)
    for kind in config.kinds:
        options: dict[str, Any] = {"kind": kind, **(RAPS if kind == "raps" else {})}
        choose: Any = functools.partial(sj.conformal_threshold, level=config.level, **options)
        threshold = jax.vmap(choose)(scaled[:, conform], labels[:, conform])
        sets = np.asarray(sj.prediction_sets(tested, threshold[:, None, None], **options))
        holds = np.take_along_axis(sets, answers[..., None], axis=-1)
        sizes = sets.sum(axis=-1)[..., None] == np.arange(data.num_classes + 1)
        arrays |= {f"coverage/{kind}": holds.mean((1, 2)), f"sizes/{kind}": sizes.mean(axis=1)}
    return arrays | {"data": np.array(data.name)}


def draw_labels(rng: np.random.Generator, probs: NDArray) -> NDArray:
    """Labels drawn from the probabilities `[seeds, n, K]`, `[seeds, draws, n]`."""
    # The last sum, which is 1 but for rounding, is left out.
    sums, uniform = np.cumsum(probs, axis=-1), rng.random((NUM_DRAWS, *probs.shape[:-1], 1))
    return np.swapaxes((uniform > sums[..., :-1]).sum(axis=-1, dtype=np.int32), 0, 1)


def expected_error(probs: NDArray) -> NDArray:
    """The mean ECE `[seeds]` of labels that are drawn from the probabilities, in theory."""
    # The gap of each of the 15 bins is nearly normal around 0 under drawn labels, and its
    # expected size is the square root of 2 / pi of its standard deviation.
    top = probs.max(axis=-1)[..., None]
    variances = np.sum(top * (1 - top) * (np.ceil(15 * top) == np.arange(1, 16)), axis=1)
    return np.asarray(np.sum(np.sqrt(2 / np.pi * variances), axis=-1) / probs.shape[1])


def train_one(
    key: Array, images: Array, labels: Array, network: Network, config: Config
) -> Array:
    """The logits `[n, K]` of all images, of a network that knows the labels of the first."""
    optimizer = optax.adam(config.learning_rate)

    def mean_loss(layers: Layers) -> Array:
        logits = network.apply(layers, images[: len(labels)])
        return sj.cross_entropy(logits, labels, reduction="mean")

    def step(state: Any, _: None) -> Any:
        layers, optimizer_state = state
        grads = jax.grad(mean_loss)(layers)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
        return (optax.apply_updates(layers, updates), optimizer_state), None

    layers = network.init(key)
    state = layers, optimizer.init(layers)
    (layers, _), _ = jax.lax.scan(step, state, length=config.num_steps)
    return network.apply(layers, images)


@jax.jit
def score(logits: Array, scaled: Array, labels: Array, drawn: Array) -> dict[str, Array]:
    """Scores of the networks, of one that is scaled, of both means, and of drawn labels.

    Each is `[seeds, networks + 3 + draws, ...]`; the logits are `[seeds, networks, n, K]`.
    """

    def of_arm(log_probs: Array, labels: Array) -> dict[str, Array]:
        probs = jnp.exp(log_probs)
        bins = sj.reliability(probs, labels, num_bins=10, bins="mass")
        return {
            "accuracy": jnp.sum(bins.accuracy * bins.count) / len(labels),
            "NLL": -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=-1)),
            "ECE": sj.expected_calibration_error(probs, labels),
            "bins": jnp.stack([bins.confidence, bins.accuracy]),
        }

    def one_seed(logits: Array, scaled: Array, labels: Array, drawn: Array) -> dict[str, Array]:
        own = jnp.broadcast_to(sj.log_softmax(scaled), (NUM_DRAWS + 1, *scaled.shape))
        means = [sj.ensemble_log_probs(logits, space=space)[None] for space in SPACES]
        log_probs = jnp.concatenate([sj.log_softmax(logits), own[:1], *means, own[1:]])
        given = jnp.broadcast_to(labels, (len(logits) + 3, len(labels)))
        return jax.vmap(of_arm)(log_probs, jnp.concatenate([given, drawn]))

    return jax.vmap(one_seed)(logits, scaled, labels, drawn)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Every score of every arm, what scaling gains, the sets, and the controls."""
    names = [f"{name}/{arm}" for name in ("accuracy", "NLL", "ECE") for arm in ARMS]
    targets = (config.min_fall, 0.0, 1.0) if arrays["data"] == "digits" else (None,) * 3
    before, after = arrays["ECE/one network"], arrays["ECE/one, scaled"]
    nll = {arm: arrays[f"NLL/{arm}"] for arm in ARMS}
    gain = nll["one network"] - nll["one, scaled"]
    measures = [
        *(Measure(name.replace("/", ", "), arrays[name]) for name in names),
        Measure("fall of the ECE", (before - after) / np.mean(before), at_least=targets[0]),
        Measure("fall of the NLL", gain, at_least=targets[1]),
        Measure("temperature", arrays["temperature"], at_least=targets[2]),
    ]
    # Three standard deviations of the mean of the seeds.
    level, inverse = config.level, 1 / (config.part + 2)
    variance = level * (1 - level) * (inverse + (1 - inverse) / config.num_test)
    slack = 3 * (variance / config.num_seeds) ** 0.5
    for kind in config.kinds:
        coverage, sizes = arrays[f"coverage/{kind}"], arrays[f"sizes/{kind}"]
        high = level + 1 / (config.part + 1) + slack if kind == "threshold" else None
        measures += [
            Measure(f"coverage, {kind}", coverage, at_least=level - slack, at_most=high),
            Measure(f"mean size, {kind}", sizes @ np.arange(sizes.shape[1])),
        ]
    again, ratio = np.abs(arrays["refitted"] - 1), arrays["own labels"]
    gaps = arrays["members"] - np.max([nll[arm] for arm in ARMS[2:]], axis=0)
    return [
        *measures,
        Measure("refitted temperature, less 1", again, at_most=1e-3, summary="max"),
        Measure("ECE of drawn labels, over theory", ratio, at_least=0.85, at_most=1.15),
        Measure("NLL, members less ensembles", gaps, at_least=0.0, summary="min"),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Reliability diagrams, and the sizes of the sets."""
    diagrams, axes = panels(
        ["one network", "several networks"],
        "Share of right predictions by confidence, in ten bins with as many test images each:"
        " means and standard errors of the seeds. Below the diagonal, confidence is too high.",
    )
    for number, arm in enumerate(ARMS):
        confidence, accuracy = np.moveaxis(arrays[f"bins/{arm}"], 1, 0)
        errorbars(axes[number // 2], confidence.mean(axis=0), accuracy, arm, number)
    for panel in axes:
        panel.plot([0, 1], [0, 1], color="black", linewidth=4, alpha=0.15, label="calibrated")
        panel.set(xlim=(0.2, 1.02), ylim=(0.2, 1.02))
        finish(panel, "confidence: largest probability", "accuracy, share of images")
    legend(diagrams)
    sets, (panel,) = panels(
        ["sizes of prediction sets"],
        "Share of the test images by the size of their sets, for one scaled network. A set of"
        f" aps or raps is empty where the largest probability is above the threshold.{SEEDS}",
        size=5.0,
    )
    for number, (kind, sizes) in enumerate(under(arrays, "sizes").items()):
        lines(panel, np.arange(sizes.shape[1]), sizes, kind, number)
    finish(panel, "classes in the set", "share of the test images", whole=True)
    legend(sets)
    return {"reliability": diagrams, "sets": sets}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("calibration", __doc__, Config, run, judge, draw), args)
