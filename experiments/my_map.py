"""Can a map of your own replace softmax?

Softmax is exp(z - t), where the threshold t makes the sum 1. Any function that rises from 0 may
stand in place of exp. Here it is exp(m) - 1 where m is positive, and 0 elsewhere: a map with
exact zeros, a little steeper than sparsemax. It is defined below in 20 lines of plain JAX;
copy these, and put in a function of your own. `softjax.testing.check_map` says whether the map
keeps its promises, and `python -m experiments classification --maps expm1max` trains with it.

Expected: the map passes; it agrees with the solution that sorting finds in float64 to 1e-6; and
the gradient of its loss is p - y, as for softmax. Control: versions of the map that break one
promise each are refused, and the promise is named. A map that fails, or a broken one that
passes, would refute it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._plots import SEEDS, finish, legend, lines, panels
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
from softjax.testing import check_map

__all__ = ["Config", "draw", "expm1max", "expm1max_loss", "judge", "main", "run"]


LOG_2 = math.log(2)

# The map. `_weights` is the function that rises from 0; the rest suits any such
# function whose weight reaches 1 at the margin log 2.


def _weights(margins: Array) -> Array:
    return jnp.expm1(jnp.maximum(margins, 0))


def _solve(logits: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """Centred scores, with -1 where dropped, their threshold, and the mask of kept entries."""
    keep = (logits != -jnp.inf) & (True if where is None else where)
    wide = jnp.where(keep, logits, 0).astype(jnp.promote_types(logits.dtype, jnp.float32))
    peak = jnp.max(wide, axis=-1, keepdims=True, where=keep, initial=-jnp.inf)
    scores = jnp.where(keep, wide - jax.lax.stop_gradient(peak), -1)
    still, low = jax.lax.stop_gradient(scores), jnp.full_like(peak, -LOG_2)

    def halve(number: Array, low: Array) -> Array:  # The threshold is from -log 2 to 0.
        middle = low + LOG_2 * 0.5 ** number.astype(low.dtype)
        total = jnp.sum(_weights(still - middle), axis=-1, keepdims=True)
        return jnp.where(total >= 1, middle, low)

    low = jax.lax.fori_loop(1, 25, halve, low)
    # One step of Newton's method hardly moves t, and gives it the derivative of the solution.
    excess = lambda t: jnp.sum(_weights(scores - t), axis=-1, keepdims=True) - 1
    value, slope = jax.jvp(excess, (low,), (jnp.ones_like(low),))
    return scores, low - value / jnp.minimum(slope, -1), keep


def expm1max(logits: Array, *, where: Array | None = None) -> Array:
    """Weights exp(m) - 1 of positive margins m = z - t, which sum to 1 along the last axis."""
    scores, threshold, keep = _solve(logits, where)
    return jnp.where(keep, _weights(scores - threshold), 0).astype(logits.dtype)


def expm1max_loss(logits: Array, labels: Array) -> Array:
    """The loss with gradient p - y: t + sum(F(z - t)) - z_y, F(m) = exp(m) - 1 - m where m > 0.

    A constant makes it 0 where p = y (Blondel, Martins, Niculae 2020, on such losses).
    """
    scores, threshold, _ = _solve(logits, None)
    threshold = jax.lax.stop_gradient(threshold)  # The loss has slope 1 - sum(p) = 0 in it.
    margins = jnp.maximum(scores - threshold, 0)
    own = jnp.take_along_axis(scores, labels[..., None], axis=-1)
    conjugate = threshold[..., 0] + jnp.sum(jnp.expm1(margins) - margins, axis=-1)
    return conjugate - own[..., 0] + (2 * LOG_2 - 1)


SCALES = np.geomspace(0.1, 10, 13)  # Standard deviations of the logits.
BROKEN: dict[str, Callable[..., Array]] = {  # The control: each breaks one promise.
    "simplex": lambda z, where=None: 1.01 * expm1max(z, where=where),
    "permutation": lambda z, where=None: expm1max(
        z + jnp.broadcast_to(jnp.arange(z.shape[-1]) / 10, z.shape).astype(z.dtype), where=where
    ),
    "masks": lambda z, where=None: expm1max(z),
    "dtypes": lambda z, where=None: expm1max(z.astype(jnp.float32), where=where),
    "derivatives": lambda z, where=None: jax.lax.stop_gradient(expm1max(z, where=where)),
}


@dataclass(frozen=True)
class Config(Options):
    """Options of the map of one's own."""

    num_classes: int = 20
    """Number of logits in a slice."""
    max_error: float = 1e-6
    """Target: the largest difference from what sorting finds in float64, and from p - y."""

    @classmethod
    def reduced(cls) -> Self:
        """Fewer seeds; the target stays."""
        return cls(quick=True, num_seeds=3)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Checks the map and its broken versions, and compares it with the sorted solution."""
    names, found = ["", *list(BROKEN)[: 2 if config.quick else None]], []
    for name in each(names, track, "checks"):
        try:
            check_map(jax.jit(BROKEN.get(name, expm1max)), seed=config.seed)
            found.append("")
        except AssertionError as error:
            found.append(str(error).partition(":")[0].partition(" ")[0])
    rng = np.random.default_rng(config.seed)
    shape = config.num_seeds, len(SCALES), config.num_classes
    logits = rng.normal(size=shape) * SCALES[:, None]
    labels = rng.integers(0, config.num_classes, shape[:2])
    x = np.linspace(-3, 3, 121, dtype=np.float32)
    pairs = np.stack([x, np.zeros_like(x)], axis=-1)

    @jax.jit  # All maps in one program.
    def tables(logits: Array, labels: Array, pairs: Array) -> tuple[Array, Array, Any]:
        gradient = jax.grad(lambda z: expm1max_loss(z, labels).sum())(logits)
        maps = {"softmax": sj.softmax, "expm1max": expm1max, "sparsemax": sj.sparsemax}
        first = {f"first/{name}": of(pairs)[:, 0] for name, of in maps.items()}
        kept = {f"kept/{name}": jnp.sum(of(logits) > 0, axis=-1) for name, of in maps.items()}
        return gradient, expm1max(logits), first | kept

    given = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    gradient, mine, shown = jax.device_get(tables(*given, jnp.asarray(pairs)))
    slope_error = np.abs(gradient - (mine - np.eye(config.num_classes)[labels]))
    return {
        "promises": np.array(names),
        "found": np.array(found),
        "error": np.abs(mine - _by_sorting(np.asarray(given[0], float))).max(axis=(1, 2)),
        "slope error": slope_error.max(axis=(1, 2)),
        "x": x,
        **shown,
    }


def _by_sorting(logits: NDArray) -> NDArray:
    """The map in float64: with the k largest kept, exp(t) = sum(exp(z)) / (1 + k)."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    ordered = -np.sort(-weights, axis=-1)
    level = np.cumsum(ordered, axis=-1) / (2 + np.arange(logits.shape[-1]))
    num_kept = np.sum(ordered > level, axis=-1, keepdims=True)
    return np.maximum(weights / np.take_along_axis(level, num_kept - 1, axis=-1) - 1, 0)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Whether the map passes, the errors, and whether broken maps are refused by name."""
    passed = arrays["found"] == arrays["promises"]
    # If an error is not finite, nothing is known, so both shares below are NaN.
    known = np.where(np.isfinite(arrays["error"]).all(), 1.0, np.nan)
    limit = config.max_error
    return [
        Measure("expm1max keeps its promises", passed[0] * known, at_least=1),
        Measure("largest error", arrays["error"], at_most=limit, summary="max"),
        Measure("gradient less p - y", arrays["slope error"], at_most=limit, summary="max"),
        Measure("broken maps refused by name", passed[1:] * known, at_least=1, summary="min"),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The map beside softmax and sparsemax: its values, and how many entries it keeps."""
    figure, (values, kept) = panels(
        ["two logits", "many logits"],
        "Left: the first of two probabilities by the difference of the logits. Right: the"
        f" number of entries with a probability above 0 by the spread of normal logits.{SEEDS}",
    )
    for number, name in enumerate(("softmax", "expm1max", "sparsemax")):
        lines(values, arrays["x"], arrays[f"first/{name}"][None], name, number)
        lines(kept, SCALES, arrays[f"kept/{name}"], name, number)
    finish(values, "first logit less the second", "first probability")
    kept.set_ylim(bottom=0)
    finish(kept, "standard deviation of the logits", "entries kept", x_scale="log")
    legend(figure)
    return {"map": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("my_map", __doc__, Config, run, judge, draw), args)
