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
from experiments._data import Split, shuffled_digits
from experiments._plots import SEEDS, finish, histogram, legend, lines, panels, under
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

ArmName = Literal["softmax", "smoothing", "temperature", "soft cap", "entmax15"]
TEMPERATURE, CAP, SMOOTHING = 5.0, 4.0, 0.1
KINDS = ("near", "far")


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
        size: dict[str, Any] = {"num_seeds": 2, "arms": ("softmax", "soft cap")}
        return cls(quick=True, **size, rates=(0.0, 0.2), num_steps=60, min_clean=0.88)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every arm at every rate, with near and with far wrong labels."""
    rng = np.random.default_rng(config.seed)
    data = shuffled_digits(rng, config.num_seeds)
    shape = data.labels.shape
    order = rng.permuted(np.tile(np.arange(shape[1]), (config.num_seeds, 1)), axis=1)
    shifts = rng.integers(1, 10, shape)
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"rates": np.array(config.rates)}
    cases = [(rate, kind) for rate in config.rates for kind in KINDS]
    for name in each(config.arms, track, "losses"):
        one_seed = functools.partial(train, arm=ARMS[name], config=config)
        train_all = jax.jit(jax.vmap(one_seed))
        found: dict[str, list[Any]] = {}
        for rate, kind in cases:
            is_wrong = order < rate * shape[1]
            factors = np.where(is_wrong & (kind == "far"), config.factor, 1).astype(np.float32)
            given = data._replace(
                images=data.images * factors[..., None],
                labels=((data.labels + is_wrong * shifts) % 10).astype(np.int32),
            )
            accuracy, nll, losses = jax.device_get(train_all(keys, given))
            shuffled = rng.permuted(is_wrong, axis=1)
            scores = {"accuracy": accuracy, "nll": nll, "auroc": aurocs(losses, is_wrong)}
            scores["shuffled"] = aurocs(losses, shuffled)
            for measure, values in scores.items():
                found.setdefault(f"{measure}/{kind}/{name}", []).append(values)
            arrays[f"losses/{name}/{kind}"] = losses[0]
            arrays[f"wrong/{name}/{kind}"] = is_wrong[0]
        arrays |= {key: np.stack(values, axis=-1) for key, values in found.items()}
    return arrays


def train(key: Array, data: Split, arm: Arm, config: Config) -> tuple[Array, Array, Array]:
    """Test accuracy and NLL, and the loss of each training example `[n]`."""
    optimizer = optax.adam(config.learning_rate)

    def step(state: Any, _: None) -> Any:
        weights, optimizer_state = state
        mean_loss = lambda weights: jnp.mean(arm.loss(data.images @ weights, data.labels))
        gradient = jax.grad(mean_loss)(weights)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(weights, updates), optimizer_state), None

    weights = 0.1 * jax.random.normal(key, (data.images.shape[-1], 10))
    state = weights, optimizer.init(weights)
    (weights, _), _ = jax.lax.scan(step, state, length=config.num_steps)
    logits = data.test_images @ weights
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == data.test_labels)
    log_probs = arm.log_probs(logits)
    nll = -jnp.mean(jnp.take_along_axis(log_probs, data.test_labels[:, None], axis=-1))
    return accuracy, nll, arm.loss(data.images @ weights, data.labels)


def aurocs(losses: NDArray, is_wrong: NDArray) -> NDArray:
    """How well the losses find wrong labels, `[seeds]`; 1/2 where there are none."""
    areas = [
        auroc(loss[flag], loss[~flag]) if flag.any() else 0.5
        for loss, flag in zip(losses, is_wrong, strict=True)
    ]
    return np.array(areas)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Accuracy without and with wrong labels, and how well the losses find them."""
    clean = config.rates.index(0.0)
    judged = max(i for i, rate in enumerate(config.rates) if rate < 0.35)
    wrong = f"{config.rates[judged]:.0%} wrong"
    at = {name: values[:, judged] for name, values in arrays.items() if values.ndim == 2}
    goals = {"accuracy/softmax": config.min_clean, "auroc/far/soft cap": config.min_auroc}
    measures = []
    for arm in config.arms:
        accuracy, goal = arrays[f"accuracy/near/{arm}"][:, clean], goals.get(f"accuracy/{arm}")
        measures.append(Measure(f"accuracy, all right, {arm}", accuracy, at_least=goal))
    pairs = [(kind, arm) for kind in KINDS for arm in config.arms]
    for kind, arm in pairs:
        accuracy = at[f"accuracy/{kind}/{arm}"]
        measures.append(Measure(f"accuracy, {wrong} and {kind}, {arm}", accuracy))
    for kind, arm in pairs:
        area, goal = at[f"auroc/{kind}/{arm}"], goals.get(f"auroc/{kind}/{arm}")
        measures.append(Measure(f"AUROC, {kind} wrong labels, {arm}", area, at_least=goal))
    gain = at["accuracy/far/soft cap"] - at["accuracy/far/softmax"]
    title, control = f"gain of the soft cap, {wrong} and far", at["shuffled/near/softmax"]
    return [
        *measures,
        Measure(title, gain, at_least=config.min_gain),
        Measure("AUROC, shuffled flags", control, at_least=0.45, at_most=0.55),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Accuracy and NLL by rate, and the loss of right and wrong examples."""
    arms = list(under(arrays, "auroc/far"))
    measures = {"accuracy": "accuracy, share of images", "nll": "NLL, nats per image"}
    pairs = [(measure, kind) for measure in measures for kind in KINDS]
    by_rate, axes = panels(
        [f"{kind} wrong labels: {measures[measure].split(',')[0]}" for measure, kind in pairs],
        "Clean test images after training on wrong labels. The NLL of entmax15 is missing where"
        f" it gives a right class no probability.{SEEDS}",
    )
    for panel, (measure, kind) in zip(axes, pairs, strict=True):
        for number, arm in enumerate(arms):
            values = arrays[f"{measure}/{kind}/{arm}"]
            finite = np.where(np.isfinite(values), values, np.nan)
            lines(panel, 100 * arrays["rates"], finite, arm, number)
        finish(panel, "wrong labels, %", measures[measure])
    legend(by_rate)
    pulls, axes = panels(
        arms,
        "Loss of each training example at the highest rate of far wrong labels, for the first"
        " seed, after training; where the curves lie apart, the loss finds the wrong labels."
        " Each loss has its own unit; larger losses are in its last bin.",
    )
    for panel, arm in zip(axes, arms, strict=True):
        losses, is_wrong = arrays[f"losses/{arm}/far"], arrays[f"wrong/{arm}/far"]
        edges = np.linspace(0, np.quantile(losses, 0.99), 40)
        for number, (flag, label) in enumerate(((False, "right label"), (True, "wrong label"))):
            histogram(panel, losses[is_wrong == flag], edges, label, number)
        finish(panel, "loss of the example", "training images", y_scale="log")
    legend(pulls)
    return {"rates": by_rate, "losses": pulls}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("outliers", __doc__, Config, run, judge, draw), args)
