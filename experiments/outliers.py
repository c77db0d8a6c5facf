"""Which losses do wrong labels and far points pull?

A linear classifier of handwritten digits is trained on labels of which a share is wrong, and
once more with the wrongly labelled images multiplied by a factor, so that they lie far from all
others. The losses: the cross-entropy of softmax, the same with smoothed labels, at a high
temperature and on softly capped logits, and the loss of entmax15. All arms share the images,
the wrong labels and the first weights; the test images and their labels are clean.

Expected: every loss is pulled, and far points pull the cross-entropy more than near ones,
because its gradient grows with the image and never saturates; a soft cap bounds the loss of a
point, so that it keeps more of its accuracy. After training, the loss of each training example
tells which labels are wrong. Controls: without wrong labels the accuracy is that of clean
training, and flags that are shuffled over the examples are found with an AUROC of one half. A
soft cap that loses as much as the plain loss would refute it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import digits
from experiments._plots import finish, legend, lines, panels, style
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

ArmName = Literal["softmax", "smoothing", "temperature", "soft cap", "entmax15"]
TEMPERATURE, CAP, SMOOTHING = 5.0, 4.0, 0.1


class Arm(NamedTuple):
    """From logits `[n, K]` to log-probabilities, and, with labels `[n]`, to a loss `[n]`."""

    log_probs: Callable[[Array], Array]
    loss: Callable[[Array, Array], Array]


ARMS: dict[ArmName, Arm] = {
    "softmax": Arm(sj.log_softmax, sj.cross_entropy),
    "smoothing": Arm(
        sj.log_softmax, functools.partial(sj.cross_entropy, label_smoothing=SMOOTHING)
    ),
    "temperature": Arm(
        functools.partial(sj.log_softmax, temperature=TEMPERATURE),
        lambda logits, labels: sj.cross_entropy(logits / TEMPERATURE, labels),
    ),
    "soft cap": Arm(
        lambda logits: sj.log_softmax(sj.soft_cap(logits, CAP)),
        lambda logits, labels: sj.cross_entropy(sj.soft_cap(logits, CAP), labels),
    ),
    "entmax15": Arm(
        lambda logits: jnp.log(sj.entmax15(logits)),
        functools.partial(sj.entmax_loss, alpha=1.5),
    ),
}
KINDS = ("near", "far")


@dataclass(frozen=True)
class Config(Options):
    """Options of training on wrong labels."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    arms: tuple[ArmName, ...] = tuple(ARMS)
    """Losses that are compared; the targets need softmax and soft cap."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    """Shares of wrong labels, 0 among them; the largest below 0.35 is judged."""
    factor: float = 5.0
    """Factor of the images with wrong labels when they are far."""
    num_steps: int = 300
    """Steps of Adam, each over all training images."""
    learning_rate: float = 0.05
    """Step size of Adam."""
    min_clean: float = 0.93
    """Target: accuracy of softmax without wrong labels."""
    min_gain: float = 0.05
    """Target: accuracy of the soft cap, less that of softmax, with far wrong labels."""
    min_auroc: float = 0.85
    """Target: how well the soft cap's loss tells far wrong labels from right ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {"softmax", "soft cap"} <= set(self.arms):
            raise ValueError(f"arms must include softmax and soft cap, got {self.arms}.")
        if 0.0 not in self.rates or not any(0 < rate < 0.35 for rate in self.rates):
            raise ValueError(f"rates must include 0 and one below 0.35, got {self.rates}.")

    @classmethod
    def reduced(cls) -> Self:
        """Two losses, two rates, and few steps."""
        return cls(
            quick=True,
            num_seeds=2,
            arms=("softmax", "soft cap"),
            rates=(0.0, 0.2),
            num_steps=60,
            min_clean=0.88,
        )


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every arm at every rate, with near and with far wrong labels."""
    data = digits()
    rng = np.random.default_rng(config.seed)
    rows = np.stack([rng.permutation(len(data.labels)) for _ in range(config.num_seeds)])
    images = data.images.reshape(len(data.images), -1)[rows]
    labels, num_train = data.labels[rows], data.num_train
    order = rng.permuted(np.tile(np.arange(num_train), (config.num_seeds, 1)), axis=1)
    shifts = rng.integers(1, 10, (config.num_seeds, num_train))
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"rates": np.array(config.rates)}
    for arm in config.arms:
        found: dict[str, list[Any]] = {f"{n}/{k}": [] for n in _NAMES for k in KINDS}
        for number in track(range(len(config.rates)), arm):
            is_wrong = order < config.rates[number] * num_train
            given = labels.copy()
            given[:, :num_train] = (labels[:, :num_train] + is_wrong * shifts) % 10
            for kind in KINDS:
                seen = images.copy()
                seen[:, :num_train][is_wrong] *= config.factor if kind == "far" else 1
                accuracy, nll, losses = _train(
                    keys, jnp.asarray(seen, float), jnp.asarray(given), arm, num_train, config
                )
                found[f"accuracy/{kind}"].append(np.asarray(accuracy))
                found[f"nll/{kind}"].append(np.asarray(nll))
                found[f"auroc/{kind}"].append(_auroc(np.asarray(losses), is_wrong))
                shuffled = rng.permuted(is_wrong, axis=1)
                found[f"shuffled/{kind}"].append(_auroc(np.asarray(losses), shuffled))
                arrays[f"losses/{arm}/{kind}"] = np.asarray(losses[0])
                arrays[f"wrong/{arm}/{kind}"] = is_wrong[0]
        arrays |= {f"{name}/{arm}": np.stack(of, -1) for name, of in found.items()}
    return arrays


_NAMES = ("accuracy", "nll", "auroc", "shuffled")


@functools.partial(jax.jit, static_argnames=("arm", "num_train", "config"))
def _train(
    keys: Array, images: Array, labels: Array, arm: ArmName, num_train: int, config: Config
) -> tuple[Array, Array, Array]:
    """Test accuracy and NLL `[seeds]`, and the loss of each training example."""
    optimizer = optax.adam(config.learning_rate)
    loss = ARMS[arm].loss

    def one_seed(key: Array, images: Array, labels: Array) -> tuple[Array, Array, Array]:
        weights = 0.1 * jax.random.normal(key, (images.shape[-1], 10))

        def step(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
            weights, optimizer_state = state
            mean_loss = lambda w: jnp.mean(loss(images[:num_train] @ w, labels[:num_train]))
            updates, optimizer_state = optimizer.update(
                jax.grad(mean_loss)(weights), optimizer_state
            )
            return (optax.apply_updates(weights, updates), optimizer_state), None

        state = weights, optimizer.init(weights)
        (weights, _), _ = jax.lax.scan(step, state, length=config.num_steps)
        logits, tested = images[num_train:] @ weights, labels[num_train:]
        accuracy = jnp.mean(jnp.argmax(logits, -1).astype(tested.dtype) == tested)
        log_probs = ARMS[arm].log_probs(logits)
        nll = -jnp.mean(jnp.take_along_axis(log_probs, tested[:, None], axis=-1))
        return accuracy, nll, loss(images[:num_train] @ weights, labels[:num_train])

    return jax.vmap(one_seed)(keys, images, labels)


def _auroc(scores: NDArray, is_positive: NDArray) -> NDArray:
    """How often a positive example scores above a negative one, `[seeds]`; ties count half."""
    areas = []
    for score, flag in zip(scores, is_positive, strict=True):
        negatives = np.sort(score[~flag])
        if not flag.any() or flag.all():
            areas.append(0.5)
            continue
        below = np.searchsorted(negatives, score[flag], "left")
        up_to = np.searchsorted(negatives, score[flag], "right")
        areas.append(np.mean(below + up_to) / 2 / len(negatives))
    return np.array(areas)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Accuracy without and with wrong labels, and how well the losses find them."""
    measures = []
    clean = config.rates.index(0.0)
    judged = max(i for i, rate in enumerate(config.rates) if rate < 0.35)
    rate = config.rates[judged]
    for arm in config.arms:
        target = config.min_clean if arm == "softmax" else None
        accuracy = arrays[f"accuracy/near/{arm}"][:, clean]
        measures.append(Measure(f"accuracy, all right, {arm}", accuracy, at_least=target))
    for kind in KINDS:
        for arm in config.arms:
            accuracy = arrays[f"accuracy/{kind}/{arm}"][:, judged]
            measures.append(Measure(f"accuracy, {rate:.0%} wrong and {kind}, {arm}", accuracy))
    capped, plain = (
        arrays[f"accuracy/far/{arm}"][:, judged] for arm in ("soft cap", "softmax")
    )
    for kind in KINDS:
        for arm in config.arms:
            auroc = arrays[f"auroc/{kind}/{arm}"][:, judged]
            goal = config.min_auroc if (kind, arm) == ("far", "soft cap") else None
            measures.append(Measure(f"AUROC, {kind} wrong labels, {arm}", auroc, at_least=goal))
    control = arrays["shuffled/near/softmax"][:, judged]
    return [
        *measures,
        Measure(
            f"gain of the soft cap, {rate:.0%} wrong and far",
            capped - plain,
            at_least=config.min_gain,
        ),
        Measure("AUROC, shuffled flags", control, at_least=0.45, at_most=0.55),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Accuracy and NLL by rate, and the loss of right and wrong examples."""
    arms = [name.removeprefix("auroc/far/") for name in arrays if name.startswith("auroc/far/")]
    titles = [f"{kind} wrong labels: {what}" for what in ("accuracy", "NLL") for kind in KINDS]
    by_rate, axes = panels(
        titles,
        "Clean test images after training on wrong labels. The NLL of entmax15 is missing where"
        " it gives a right class no probability. Thick: median of the seeds; thin: each seed.",
        columns=2,
    )
    measures = [(what, kind) for what in ("accuracy", "nll") for kind in KINDS]
    for panel, (what, kind) in zip(axes, measures, strict=True):
        for number, arm in enumerate(arms):
            values = arrays[f"{what}/{kind}/{arm}"]
            finite = np.where(np.isfinite(values), values, np.nan)
            lines(panel, 100 * arrays["rates"], finite, arm, number)
        name = "accuracy, share of images" if what == "accuracy" else "NLL, nats per image"
        finish(panel, "wrong labels, %", name)
    legend(by_rate)
    pulls, axes = panels(
        arms,
        "Loss of each training example at the highest rate of far wrong labels, for the first"
        " seed, after training; where the curves lie apart, the loss finds the wrong labels.",
    )
    for panel, arm in zip(axes, arms, strict=True):
        losses, is_wrong = arrays[f"losses/{arm}/far"], arrays[f"wrong/{arm}/far"]
        edges = np.linspace(0, np.quantile(losses, 0.99), 40)
        for number, (flag, label) in enumerate(((False, "right label"), (True, "wrong label"))):
            shown = np.clip(losses[is_wrong == flag], 0, edges[-1])
            panel.hist(shown, edges, histtype="step", **style(number), label=label)
        finish(panel, "loss of the example", "training images", y_scale="log")
    legend(pulls)
    return {"rates": by_rate, "losses": pulls}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("outliers", __doc__, Config, run, judge, draw), args)
