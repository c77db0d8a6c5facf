"""How close is softmax regression to the rule of Bayes?

A vowel is heard by its formants, the resonances of the mouth. The ten English vowels of "heed",
"hid", ... are drawn, not recorded: a man, a woman or a child says one of them, and the
logarithms of its first three formants are normal. Their means are those that Peterson and
Barney published (1952, table II), their spreads those of the 1520 measurements of that study,
as the program Praat lists them. We assume that the three are independent. So the best rule,
that of Bayes, is known, and its error is the least that any classifier can have. Softmax
regression learns from frames of the same kind: on the formants, on their squares and products
too, and on formants and squares for each kind of speaker, where that is told.

Expected: the rule of Bayes is a softmax of quadratic functions for each kind of speaker, so the
last arm contains it. The loss of this arm exceeds the best one by d / (2 n) nats, within a
factor of 2, for d = 189 free weights and n frames. Where the speaker is not told, the best rule
is no softmax of quadratic functions. The error of quadratic functions is within 3 points of the
best error, and closer to it than the error of linear functions. Control: on average no arm has
a smaller loss than the rule of Bayes.

`--data-dir` takes WAV files in folders by class, whose formants are found by linear prediction;
there the best rule is unknown, and nothing is judged.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments import _plots as plots
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
from experiments._sounds import formants, load_sounds
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

# F1, F2 and F3 of men, women and children: means in Hz, and standard deviations of the natural
# logarithm in per cent.
TABLE = {
    "heed": "270 2290 3010  310 2790 3310  370 3200 3730   14  6  6  16  5  7  18  7  7",
    "hid": "390 1990 2550  430 2480 3070  530 2730 3600   14  6  5  11  6  5  14  7  7",
    "head": "530 1840 2480  610 2330 2990  690 2610 3570   12  6  5  13  6  5  12  8  7",
    "had": "660 1720 2410  860 2050 2850 1010 2320 3320    9  7  6  13  9  6  16 10 11",
    "hod": "730 1090 2440  850 1220 2810 1030 1370 3170    8  9  9  11  8  8  12 12 11",
    "hawed": "570  840 2410  590  920 2710  680 1060 3180   11 14  9  15 14  9  17 11 12",
    "hood": "440 1020 2240  470 1160 2680  560 1410 3310   11 12  7  12 14  7  12  9  9",
    "who'd": "300  870 2240  370  950 2670  430 1170 3260   17 18 10  13 18  8  20 24 10",
    "hud": "640 1190 2390  760 1400 2780  850 1590 3360    7  9  7   9  9  6  14  6  9",
    "heard": "490 1350 1690  500 1640 1960  560 1820 2160   12  7  8  12 11 12  16 11 15",
}
VOWELS = tuple(TABLE)
MEANS, SPREADS = np.moveaxis(
    np.array([row.split() for row in TABLE.values()], float).reshape(10, 2, 3, 3), 1, 0
)  # `[vowels, speakers, formants]` each
SPEAKERS = np.array([33, 28, 15]) / 76  # Shares of men, women and children in the study.
BAYES = {"linear": "Bayes", "quadratic": "Bayes", "speaker told": "Bayes, speaker told"}
ARMS = tuple(BAYES)  # Each has the best rule of its kind beside it.
NUM_FEATURES = 21  # of the last arm; the others leave columns empty


@dataclass(frozen=True)
class Config(Options):
    """Options of the vowels."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    data_dir: Path | None = None
    """Folder with a folder of WAV files (PCM) for each class; none: vowels are drawn."""
    sizes: tuple[int, ...] = (500, 1000, 2000, 4000)
    """Numbers of drawn frames to learn from; the last one is judged."""
    num_test: int = 20000
    """Drawn frames to test on."""
    num_steps: int = 100
    """Steps of L-BFGS, each over all training frames."""
    weight_scale: float = 10.0
    """Standard deviation of the normal prior of the weights."""
    max_factor: float = 2.0
    """Target: the most by which the excess loss of the last arm may differ from d / (2 n)."""
    max_excess: float = 0.03
    """Target: error of the quadratic arm, less that of the rule of Bayes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sizes or min(self.sizes) < 100:
            raise ValueError(f"sizes must be numbers of at least 100, got {self.sizes}.")

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds, frames and steps; the targets stay, save for the excess."""
        size: dict[str, Any] = {"num_seeds": 3, "num_test": 5000, "num_steps": 60}
        return cls(quick=True, sizes=(500, 1500), **size, max_excess=0.04)


class Frames(NamedTuple):
    """Formants as logarithms `[n, 3]`, and the numbers of vowels and speakers `[n]`."""

    log_formants: NDArray
    vowels: NDArray
    speakers: NDArray


def run(config: Config, track: Track = untracked) -> Arrays:
    """Learns from the same frames in every arm, and applies the rule of Bayes."""
    rng = np.random.default_rng(config.seed)
    if config.data_dir is None:
        classes, sizes, arms = list(VOWELS), config.sizes, ARMS
        train, test = (
            [draw_frames(rng, size) for _ in range(config.num_seeds)]
            for size in (max(config.sizes), config.num_test)
        )
    else:
        sounds = load_sounds(config.data_dir)
        found = np.log([formants(samples, sounds.rate) for samples in sounds.samples])
        rows = [rng.permutation(len(found)) for _ in range(config.num_seeds)]
        num_train = len(found) - len(found) // 3
        train, test = (
            [Frames(found[r[part]], sounds.labels[r[part]], 0 * r[part]) for r in rows]
            for part in (slice(num_train), slice(num_train, None))
        )
        classes, sizes, arms = sounds.classes, (num_train,), ARMS[:2]
    arrays: Arrays = {
        "is_drawn": np.array(config.data_dir is None),
        "classes": np.array(classes),
        "sizes": np.array(sizes),
        "formants": np.exp(test[0].log_formants[:600]),
        "vowels": test[0].vowels[:600],
    }
    one_fit = functools.partial(fit, num_classes=len(classes), config=config)
    by_size = jax.vmap(one_fit, in_axes=(None, None, None, 0))
    fit_all = jax.jit(jax.vmap(by_size, in_axes=(0, 0, 0, None)))
    labels, answers = (np.stack([f.vowels for f in part]) for part in (train, test))
    for arm in each(arms, track, "vowels"):
        seen, tested = (
            jnp.asarray([features_of(frames, arm) for frames in part], float)
            for part in (train, test)
        )
        given = labels.astype(np.int32), tested, jnp.asarray(sizes, seen.dtype)
        logits = np.asarray(fit_all(seen, *given))  # `[seeds, sizes, n, K]`
        arrays[f"loss/{arm}"], arrays[f"error/{arm}"] = judged(logits, answers[:, None])
        if arm == "quadratic":
            arrays["confusion"] = np.zeros((len(classes), len(classes)), np.int64)
            np.add.at(arrays["confusion"], (answers, logits[:, -1].argmax(axis=-1)), 1)
    for name in dict.fromkeys(BAYES.values()) if config.data_dir is None else ():
        best = np.stack([bayes(frames, name != "Bayes") for frames in test])
        arrays[f"loss/{name}"], arrays[f"error/{name}"] = judged(best, answers)
    return arrays


def draw_frames(rng: np.random.Generator, size: int) -> Frames:
    """Frames of vowels that are equally common, by speakers as common as in the study."""
    vowels = rng.integers(0, len(VOWELS), size)
    speakers = rng.choice(len(SPEAKERS), size, p=SPEAKERS)
    noise = SPREADS[vowels, speakers] / 100 * rng.normal(size=(size, 3))
    return Frames(np.log(MEANS[vowels, speakers]) + noise, vowels, speakers)


def bayes(frames: Frames, is_told: bool) -> NDArray:
    """Log-probabilities of the vowels `[n, 10]`, from the model that frames are drawn from."""
    spreads = SPREADS / 100
    z = (frames.log_formants[:, None, None] - np.log(MEANS)) / spreads
    log_density = -np.sum(z**2 / 2 + np.log(spreads), axis=-1)  # `[n, vowels, speakers]`
    if is_told:
        return np.take_along_axis(log_density, frames.speakers[:, None, None], -1)[..., 0]
    return np.asarray(sj.logsumexp(log_density, axis=-1, weights=SPEAKERS))


def features_of(frames: Frames, arm: str) -> NDArray:
    """The functions of the formants that an arm weighs, `[n, 21]`; unused columns are 0."""
    # All spoken vowels lie within about 3 of 0 after this.
    x = (frames.log_formants - np.log([530, 1500, 2650])) / [0.36, 0.39, 0.2]
    one = np.ones((len(x), 1))
    if arm == "speaker told":
        base = np.concatenate([one, x, x**2], axis=1)
        is_speaker = np.eye(len(SPEAKERS))[frames.speakers]
        return (is_speaker[:, :, None] * base[:, None, :]).reshape(len(x), -1)
    rows, columns = np.triu_indices(3)
    products = x[:, rows] * x[:, columns] * (arm == "quadratic")
    used = np.concatenate([one, x, products], axis=1)
    return np.pad(used, ((0, 0), (0, NUM_FEATURES - used.shape[1])))


def fit(
    features: Array, labels: Array, tested: Array, size: Array, num_classes: int, config: Config
) -> Array:
    """Logits of the tested frames `[n, K]`, learnt from the first `size` frames by L-BFGS."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=12, store_grad=True)
    optimizer = optax.lbfgs(linesearch=search)
    seen = jnp.where(jnp.arange(len(labels)) < size, labels, -1)  # -1 is ignored.

    def loss_of(weights: Array) -> Array:
        logits = features @ weights
        loss = sj.cross_entropy(logits, seen, ignore_index=-1, reduction="mean")
        return loss + jnp.sum(weights**2) / (2 * config.weight_scale**2 * size)

    def step(state: Any, _: None) -> tuple[Any, None]:
        weights, optimizer_state = state
        value, grad = optax.value_and_grad_from_state(loss_of)(weights, state=optimizer_state)
        updates, optimizer_state = optimizer.update(
            grad, optimizer_state, weights, value=value, grad=grad, value_fn=loss_of
        )
        return (optax.apply_updates(weights, updates), optimizer_state), None

    weights = jnp.zeros((NUM_FEATURES, num_classes), features.dtype)
    state = weights, optimizer.init(weights)
    (weights, _), _ = jax.lax.scan(step, state, length=config.num_steps)
    return tested @ weights


def judged(logits: NDArray, vowels: NDArray) -> tuple[NDArray, NDArray]:
    """Mean cross-entropy, and the share of wrong answers, over the frames `[..., n, K]`."""
    vowels = np.broadcast_to(vowels, logits.shape[:-1]).astype(np.int32)
    losses = np.asarray(sj.cross_entropy(logits, vowels))
    return losses.mean(axis=-1), (logits.argmax(axis=-1) != vowels).mean(axis=-1)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Errors and losses at the largest size, beside those of the rule of Bayes."""
    if not arrays["is_drawn"]:
        return [Measure(f"error, {arm}", arrays[f"error/{arm}"][:, -1]) for arm in ARMS[:2]]
    best = dict.fromkeys(BAYES.values())
    measures = [Measure(f"error, {name}", arrays[f"error/{name}"]) for name in best]
    excess = {}
    for arm, name in BAYES.items():
        error, loss = (arrays[f"{what}/{arm}"][:, -1] for what in ("error", "loss"))
        excess[arm], above = error - arrays[f"error/{name}"], loss - arrays[f"loss/{name}"]
        measures.append(Measure(f"error, {arm}", error))
        measures.append(Measure(f"loss above Bayes, {arm}", above, at_least=0.0))
    ratio, factor = above / theory(arrays["sizes"][-1]), config.max_factor
    quadratic, limit = excess["quadratic"], config.max_excess
    return [
        *measures,
        Measure("that loss over d / (2 n), speaker told", ratio, 1 / factor, factor),
        Measure("error above Bayes, quadratic", quadratic, at_most=limit),
        Measure("that of linear, less that", excess["linear"] - quadratic, at_least=0.0),
    ]


def theory(sizes: NDArray) -> NDArray:
    """The loss above that of Bayes, d / (2 n), where the best rule can be learnt."""
    return NUM_FEATURES * (len(VOWELS) - 1) / (2 * sizes)


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The frames, what the vowels are taken for, and the way to the best rule."""
    classes, sizes = arrays["classes"], arrays["sizes"]
    vowels, (plane, confusion) = plots.panels(
        ["some test frames", "quadratic: what each is taken for"],
        "Above: the first two formants of frames of every vowel, with its word at their"
        " medians. Below: every row sums to 1; the numbers are per cent, over all seeds, and"
        " shares below 0.5 % are left out.",
        size=5.0,
        columns=1,
    )
    for number, name in enumerate(classes):
        first, second, _ = arrays["formants"][arrays["vowels"] == number].T
        colour, marker = plots.COLOURS[number % 7], plots.MARKERS[number % 6]
        look = {"color": colour, "marker": marker, "s": 12, "alpha": 0.6}
        plane.scatter(second, first, **look, linewidths=0)
        box = {"facecolor": "white", "edgecolor": colour, "alpha": 0.8, "pad": 1}
        place = np.median(second), np.median(first)
        plane.text(*place, name, fontsize=8, ha="center", va="center", bbox=box)
    plots.finish(plane, "F2, Hz", "F1, Hz", x_scale="log", y_scale="log")
    plane.invert_xaxis()  # As phoneticians draw it: "heed" at the top left.
    plane.invert_yaxis()
    plots.confusion(vowels, confusion, arrays["confusion"], classes, what="vowel")
    if not arrays["is_drawn"]:
        return {"vowels": vowels}

    learning, axes = plots.panels(
        ["error", "loss above that of Bayes"],
        "Test error, and loss less that of the rule of Bayes, by the frames learnt from."
        " Horizontal: the rule of Bayes. d/(2n): what theory expects where the best rule can be"
        f" learnt.{plots.SEEDS}",
    )
    for number, (arm, name) in enumerate(BAYES.items()):
        above = arrays[f"loss/{arm}"] - arrays[f"loss/{name}"][:, None]
        plots.lines(axes[0], sizes, arrays[f"error/{arm}"], arm, number)
        plots.lines(axes[1], sizes, above, arm, number)
    for number, name in enumerate(dict.fromkeys(BAYES.values()), start=5):
        level = np.full((1, len(sizes)), arrays[f"error/{name}"].mean())
        plots.lines(axes[0], sizes, level, name, number)
    plots.lines(axes[1], sizes, theory(sizes)[None], "d/(2n)", 4)
    plots.finish(axes[0], "frames learnt from", "error, share of frames", x_scale="log")
    plots.finish(axes[1], "frames learnt from", "nats per frame", x_scale="log", y_scale="log")
    for panel in axes:
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
    plots.legend(learning)
    return {"learning": learning, "vowels": vowels}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("vowels", __doc__, Config, run, judge, draw), args)
