"""Checks of a map of your own: whether it keeps the promises that the maps of softjax keep.

`check_map` is for maps from logits to probabilities along the last axis. It needs no test
framework: it raises an AssertionError that names the promise and the logits. Import it by
`from softjax.testing import check_map`; the package itself does not load this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["check_map"]

Map = Callable[..., Array]
HALVES = ("bfloat16", "float16")
STEP = 1e-2  # of finite differences in float32, where rounding and curvature cost alike


def check_map(fn: Map, *, num_classes: int = 7, seed: int = 0) -> None:
    r"""Checks that a map keeps its promises, one after the other.

    .. math:: p = f(z) \in \Delta, \qquad f(P z) = P f(z) \text{ for permutations } P

    The promises: float32, bfloat16 and float16 logits give probabilities of their shape and
    dtype, which are not negative and sum to one; an entry that is -inf, or that `where`
    masks whatever stands there, has probability and derivative exactly 0, and the others are
    as if it were not there; a slice that keeps nothing is all zeros; permuted logits give
    permuted probabilities, and equal logits equal ones; logits of any finite size give no
    NaN; both modes of differentiation agree with finite differences; and `jit`, `vmap` and
    one slice at a time change nothing.

    Args:
        fn: the map: `fn(logits, where=mask)`, along the last axis, `[*shape, K]`; the mask is
            bool, of the same shape, and `fn(logits)` keeps all entries.
        num_classes: K, at least 3.
        seed: of the logits that are drawn.

    Returns:
        None: a map that keeps its promises passes in silence.

    Raises:
        AssertionError: a promise is broken; the message names it, the logits and the result.
        ValueError: `num_classes` is below 3.

    Example:
        >>> import jax, jax.numpy as jnp, softjax
        >>> from softjax.testing import check_map
        >>> check_map(softjax.softmax)
        >>> check_map(lambda z, where=None: jax.nn.softmax(z + jnp.arange(z.shape[-1])))
        Traceback (most recent call last):
        ...
        AssertionError: permutation: ...

    Note:
        Finite differences are taken in float32, so a derivative that is wrong by less than
        about 1 % may pass. Points where a map has a kink are left out.
    """
    if num_classes < 3:
        raise ValueError(f"`num_classes` is {num_classes}; at least 3 are needed.")
    rng = np.random.default_rng(seed)
    for check in (
        _check_simplex,
        _check_permutation,
        _check_ties,
        _check_masks,
        _check_saturation,
        _check_dtypes,
        _check_transformations,
        _check_derivatives,
    ):
        check(fn, num_classes, rng)


def _draw(rng: np.random.Generator, *shape: int, scale: float = 2.0) -> Array:
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def _require(condition: Any, promise: str, problem: str, logits: Any, got: Any) -> None:
    if not np.all(condition):
        raise AssertionError(
            f"{promise}: {problem}.\nlogits: {np.asarray(logits)}\ngot: {np.asarray(got)}"
        )


def _near(one: Any, two: Any, tolerance: float) -> Any:
    one, two = (np.asarray(x).astype(np.float64) for x in (one, two))
    return one.shape == two.shape and np.abs(one - two) <= tolerance


def _check_simplex(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    for scale in (0.01, 1.0, 10.0):
        logits = _draw(rng, 5, num_classes, scale=scale)
        _require_simplex("simplex", logits, fn(logits))


def _require_simplex(promise: str, logits: Array, probs: Array) -> None:
    shape = f"shape {logits.shape} and dtype {logits.dtype}"
    got = f"{probs.shape} and {probs.dtype}"
    is_alike = probs.shape == logits.shape and probs.dtype == logits.dtype
    _require(is_alike, promise, f"{shape} became {got}", logits, probs)
    wide = np.asarray(probs).astype(np.float64)
    _require(np.isfinite(wide), promise, "a probability is not finite", logits, probs)
    _require(wide >= 0, promise, "a probability is negative", logits, probs)
    slack = 4 * logits.shape[-1] * float(jnp.finfo(logits.dtype).eps)
    is_one = np.abs(wide.sum(axis=-1) - 1) <= slack
    _require(is_one, promise, "the probabilities do not sum to 1", logits, probs)


def _check_permutation(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    for _ in range(3):
        order = rng.permutation(num_classes)
        got, wanted = fn(logits[order]), fn(logits)[order]
        problem = f"the order {order} of the logits did not permute the probabilities"
        _require(_near(got, wanted, 1e-5), "permutation", problem, logits[order], got)


def _check_ties(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    top = jnp.max(logits)
    for tied in (logits.at[0].set(top).at[-1].set(top), logits.at[-1].set(logits[0])):
        probs = fn(tied)
        problem = "the first and the last logit are equal, their probabilities are not"
        _require(_near(probs[0], probs[-1], 1e-5), "ties", problem, tied, probs)
    even = jnp.full(num_classes, 3.0, jnp.float32)
    probs = fn(even)
    is_even = _near(probs, np.full(num_classes, 1 / num_classes), 1e-5)
    _require(is_even, "ties", "equal logits do not share evenly", even, probs)


def _check_masks(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    cotangent = _draw(rng, num_classes)
    keep = np.arange(num_classes) % 3 != 1
    alone = fn(logits[keep])
    kept = jnp.asarray(keep)
    for name, beneath in (
        ("-inf", -jnp.inf),
        ("where over NaN", jnp.nan),
        ("where over inf", jnp.inf),
        ("where over a large number", 1e30),
    ):
        given = jnp.where(kept, logits, jnp.float32(beneath))
        options = {} if name == "-inf" else {"where": kept}
        call = lambda z, options=options: fn(z, **options)  # noqa: E731
        probs, pullback = jax.vjp(call, given)
        promise = f"masks ({name})"
        zeros = np.asarray(probs)[~keep] == 0
        _require(zeros, promise, "a dropped entry has a probability", given, probs)
        is_same = _near(np.asarray(probs)[keep], alone, 1e-5)
        _require(is_same, promise, f"the kept entries are not {alone}", given, probs)
        (gradient,) = pullback(cotangent)
        zeros = np.asarray(gradient)[~keep] == 0
        _require(zeros, promise, "the gradient of a dropped entry is not 0", given, gradient)
        is_finite = np.isfinite(np.asarray(gradient)[keep])
        _require(is_finite, promise, "a gradient is not finite", given, gradient)
    empty = jnp.full(num_classes, -jnp.inf, jnp.float32)
    for given, options in ((empty, {}), (logits, {"where": jnp.zeros_like(kept)})):
        probs = fn(given, **options)
        problem = "a slice that keeps nothing is not all zeros"
        _require(np.asarray(probs) == 0, "masks (all)", problem, given, probs)


def _check_saturation(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    largest = float(jnp.finfo(jnp.float32).max)
    cotangent = _draw(rng, num_classes)
    for size in (30.0, 1e4, 1e30, largest / 2):
        ahead = jnp.zeros(num_classes, jnp.float32).at[1].set(size)
        for logits in (ahead, -ahead, ahead - size, jnp.full_like(ahead, size)):
            probs, pullback = jax.vjp(fn, logits)
            _require_simplex("saturation", logits, probs)
            (gradient,) = pullback(cotangent)
            is_finite = np.isfinite(np.asarray(gradient))
            _require(is_finite, "saturation", "a gradient is not finite", logits, gradient)


def _check_dtypes(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    for dtype in HALVES:
        logits = _draw(rng, 4, num_classes).astype(dtype)
        probs, exact = fn(logits), fn(logits.astype(jnp.float32))
        _require_simplex(f"dtypes ({dtype})", logits, probs)
        problem = "the result is not that of float32, rounded"
        is_near = _near(probs, exact, 4 * float(jnp.finfo(dtype).eps))
        _require(is_near, f"dtypes ({dtype})", problem, logits, probs)


def _check_transformations(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, 2, 3, num_classes)
    wanted = fn(logits)
    one_by_one = [[fn(row) for row in rows] for rows in logits]
    for name, got in (
        ("jit", jax.jit(fn)(logits)),
        ("vmap", jax.vmap(fn)(logits)),
        ("vmap over columns", jax.vmap(fn, in_axes=1, out_axes=1)(logits)),
        ("one slice at a time", np.stack([np.stack(rows) for rows in one_by_one])),
    ):
        _require(_near(got, wanted, 1e-5), name, "another result than without it", logits, got)


def _check_derivatives(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    num_smooth = 0
    for scale in (0.1, 1.0, 1.0, 1.0, 3.0, 3.0):
        logits = _draw(rng, num_classes, scale=scale)
        tangent, cotangent = _draw(rng, 2, num_classes, scale=1.0)
        middle, forward = jax.jvp(fn, (logits,), (tangent,))
        _, pullback = jax.vjp(fn, logits)
        (backward,) = pullback(cotangent)
        one = np.vdot(np.asarray(forward), np.asarray(cotangent))
        two = np.vdot(np.asarray(backward), np.asarray(tangent))
        problem = "forward and reverse mode differ"
        _require(_near(one, two, 1e-3), "derivatives", problem, logits, backward)

        above = np.asarray(fn(logits + STEP * tangent)) - np.asarray(middle)
        below = np.asarray(middle) - np.asarray(fn(logits - STEP * tangent))
        if np.abs(above - below).max() > 0.1 * np.abs(above).max():
            continue  # There is a kink nearby.
        num_smooth += 1
        slope = (above + below) / (2 * STEP)
        problem = f"forward mode is not the finite difference {slope}"
        _require(_near(forward, slope, 5e-3), "derivatives", problem, logits, forward)
    problem = "all points have kinks nearby"
    _require(num_smooth > 0, "derivatives", problem, logits, middle)
