"""Checks of a map of your own: whether it keeps the promises that the maps of softjax keep.

`check_map` is for maps from logits to probabilities along the last axis. It needs no test
framework: it raises an AssertionError that names the promise and the logits. Import it by
`from softjax.testing import check_map`; the package itself does not load this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._inputs import check_int

__all__ = ["check_map"]

Map = Callable[..., Array]
SCALES = (0.01, 1.0, 3.0, 10.0)  # standard deviations of the logits in each of four slices
STEP = 1e-2  # of finite differences: rounding and curvature then cause like errors


def check_map(fn: Map, *, num_classes: int = 7, seed: int = 0) -> None:
    r"""Checks that a map keeps its promises, one after the other.

    .. math:: p = f(z) \in \Delta, \qquad f(P z) = P f(z) \text{ for permutations } P

    The promises: float32, bfloat16 and float16 logits give probabilities of their shape and
    dtype, which are not negative and sum to one; an entry that is -inf, or that `where` masks,
    whatever it holds, has probability and derivative exactly 0, and the others are as if it
    were not there; a slice that keeps nothing is all zeros; permuted logits give permuted
    probabilities, and equal logits equal ones; logits of any finite size give no NaN; both
    modes of differentiation agree with finite differences; and `jit`, `vmap` and one slice at a
    time change nothing.

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
        TypeError: `num_classes` is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, softjax
        >>> from softjax.testing import check_map
        >>> check_map(softjax.softmax)
        >>> try:
        ...     check_map(lambda z, where=None: jax.nn.softmax(z + jnp.arange(7)))
        ... except AssertionError as error:
        ...     print(str(error).partition(":")[0])
        permutation

    Note:
        Finite differences are taken in float32, so a derivative that is wrong by less than
        about 1 % may pass. Points where a map has a kink are left out.
    """
    num_classes = check_int(num_classes, name="num_classes", least=3)
    rng = np.random.default_rng(seed)
    _check_transformations(fn, num_classes, rng)
    programs = Programs(fn)  # Compiled, because one program serves many logits.
    for check in (
        _check_permutation,
        _check_equal_scores,
        _check_masks,
        _check_saturation,
        _check_dtypes,
        _check_derivatives,
    ):
        check(programs, num_classes, rng)


class Programs:
    """The map, its tangents and its pulled-back cotangents, compiled once for each shape."""

    def __init__(self, fn: Map) -> None:
        self.probs = jax.jit(fn)
        self.pushed = jax.jit(lambda z, z_dot: jax.jvp(fn, (z,), (z_dot,))[1])
        self.pulled = jax.jit(lambda z, bar: _pulled(fn, z, bar))
        self.masked = jax.jit(
            lambda z, keep, bar: _pulled(functools.partial(fn, where=keep), z, bar)
        )


def _pulled(fn: Map, logits: Array, cotangent: Array) -> tuple[Array, Array]:
    probs, pullback = jax.vjp(fn, logits)
    return probs, pullback(cotangent.astype(probs.dtype))[0]


def _draw(
    rng: np.random.Generator, num_classes: int, scales: Sequence[float] = SCALES
) -> Array:
    """Normal logits, `[4, num_classes]`, with a scale for each slice."""
    normal = rng.standard_normal((len(scales), num_classes))
    return jnp.asarray(normal * np.array(scales)[:, None], jnp.float32)


def _require(condition: Any, promise: str, problem: str, logits: Any, got: Any) -> None:
    if np.all(condition):
        return
    logits, got = np.asarray(logits), np.asarray(got)
    if np.ndim(condition) == np.ndim(logits) == 2 and len(logits) == len(got):
        row = np.flatnonzero(~np.all(condition, axis=-1))[0]  # The first slice that fails.
        logits, got = logits[row], got[row]
    raise AssertionError(f"{promise}: {problem}.\nlogits: {logits}\ngot: {got}")


def _near(one: Any, two: Any, tolerance: float) -> Any:
    one, two = (np.asarray(x).astype(np.float64) for x in (one, two))
    return one.shape == two.shape and np.abs(one - two) <= tolerance


def _require_simplex(promise: str, logits: Array, probs: Array) -> None:
    shape = f"shape {logits.shape} and dtype {logits.dtype}"
    got = f"{probs.shape} and {probs.dtype}"
    is_alike = probs.shape == logits.shape and probs.dtype == logits.dtype
    _require(is_alike, promise, f"{shape} became {got}", logits, probs)
    wide = np.asarray(probs).astype(np.float64)
    _require(np.isfinite(wide), promise, "a probability is not finite", logits, probs)
    _require(wide >= 0, promise, "a probability is negative", logits, probs)
    slack = 4 * logits.shape[-1] * float(jnp.finfo(logits.dtype).eps)
    is_one = np.abs(wide.sum(axis=-1, keepdims=True) - 1) <= slack
    _require(is_one, promise, "the probabilities do not sum to 1", logits, probs)


def _check_transformations(fn: Map, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    wanted = fn(logits)
    _require_simplex("simplex", logits, wanted)
    for name, transformed in (
        ("jit", fn),
        ("vmap", jax.vmap(fn)),
        ("one slice at a time", lambda z: jnp.stack([fn(per_slice) for per_slice in z])),
    ):
        try:
            got = jax.jit(transformed)(logits)
        except Exception as error:
            raise AssertionError(f"{name}: {error}\nlogits: {logits}") from error
        _require(_near(got, wanted, 1e-5), name, "another result than without it", logits, got)


def _check_permutation(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    wanted = programs.probs(logits)
    for _ in range(3):
        order = rng.permutation(num_classes)
        got = programs.probs(logits[:, order])
        problem = f"the order {order} of the logits did not permute the probabilities"
        is_near = _near(got, wanted[:, order], 1e-5)
        _require(is_near, "permutation", problem, logits[:, order], got)


def _check_equal_scores(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    logits = _draw(rng, num_classes)
    top = jnp.max(logits, axis=-1)
    for tied in (
        logits.at[:, 0].set(top).at[:, -1].set(top),
        logits.at[:, -1].set(logits[:, 0]),
    ):
        probs = programs.probs(tied)
        problem = "the first and the last logit are equal, their probabilities are not"
        _require(_near(probs[:, :1], probs[:, -1:], 1e-5), "ties", problem, tied, probs)
    even = jnp.zeros_like(logits) + top[:, None]
    probs = programs.probs(even)
    is_even = _near(probs, np.full(even.shape, 1 / num_classes), 1e-5)
    _require(is_even, "ties", "equal logits do not share evenly", even, probs)


def _check_masks(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    logits, cotangent = _draw(rng, num_classes), _draw(rng, num_classes)
    keep = np.broadcast_to(np.arange(num_classes) % 3 != 1, logits.shape)
    alone, slope = programs.pulled(logits[:, keep[0]], cotangent[:, keep[0]])
    for name, beneath in (
        ("-inf", -np.inf),
        ("where over NaN", np.nan),
        ("where over inf", np.inf),
        ("where over a large number", 1e30),
    ):
        given = jnp.where(keep, logits, jnp.float32(beneath))
        if name == "-inf":
            probs, gradient = programs.pulled(given, cotangent)
        else:
            probs, gradient = programs.masked(given, jnp.asarray(keep), cotangent)
        promise = f"masks ({name})"
        is_zero = keep | (np.asarray(probs) == 0)
        _require(is_zero, promise, "a dropped entry has a probability", given, probs)
        is_same = _near(np.asarray(probs)[:, keep[0]], alone, 1e-5)
        problem = "the probabilities are not those of the kept logits alone"
        _require(is_same, promise, problem, given, probs)
        is_same = _near(np.asarray(gradient)[:, keep[0]], slope, 1e-4)
        problem = "the gradient is not that of the kept logits alone"
        _require(is_same, promise, problem, given, gradient)
        is_zero = keep | (np.asarray(gradient) == 0)
        problem = "the gradient of a dropped entry is not 0"
        _require(is_zero, promise, problem, given, gradient)
        is_finite = np.isfinite(np.asarray(gradient))
        _require(is_finite, promise, "a gradient is not finite", given, gradient)
    nothing = jnp.zeros(logits.shape, bool)
    for given, (probs, gradient) in (
        (logits, programs.masked(logits, nothing, cotangent)),
        (empty := jnp.full_like(logits, -jnp.inf), programs.pulled(empty, cotangent)),
    ):
        problem = "a slice that keeps nothing has a probability or a gradient"
        is_zero = (np.asarray(probs) == 0) & (np.asarray(gradient) == 0)
        _require(is_zero, "masks (all)", problem, given, probs)


def _check_saturation(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    cotangent = _draw(rng, num_classes)
    sizes = jnp.asarray([[30.0], [1e4], [1e30], [1e38]], jnp.float32)
    ahead = jnp.zeros_like(cotangent).at[:, 1:2].set(sizes)
    for logits in (ahead, -ahead, ahead - sizes, jnp.zeros_like(ahead) + sizes):
        probs, gradient = programs.pulled(logits, cotangent)
        _require_simplex("saturation", logits, probs)
        is_finite = np.isfinite(np.asarray(gradient))
        _require(is_finite, "saturation", "a gradient is not finite", logits, gradient)


def _check_dtypes(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    for dtype in ("bfloat16", "float16"):
        logits, cotangent = (_draw(rng, num_classes).astype(dtype) for _ in range(2))
        probs, slope = programs.pulled(logits, cotangent)
        wide = (x.astype(jnp.float32) for x in (logits, cotangent))
        exact, exact_slope = programs.pulled(*wide)
        promise = f"dtypes ({dtype})"
        _require_simplex(promise, logits, probs)
        is_near = _near(probs, exact, 4 * float(jnp.finfo(dtype).eps))
        _require(is_near, promise, "the result is not that of float32", logits, probs)
        # The largest cotangent bounds the error that the rounding of cotangents adds.
        slack = 4 * float(jnp.finfo(dtype).eps) * float(jnp.abs(cotangent).max())
        is_near = _near(slope, exact_slope, slack)
        _require(is_near, promise, "the gradient is not that of float32", logits, slope)


def _check_derivatives(programs: Programs, num_classes: int, rng: np.random.Generator) -> None:
    num_smooth = 0
    for _ in range(4):
        logits = _draw(rng, num_classes, (0.1, 1.0, 1.0, 3.0))
        tangent, cotangent = (_draw(rng, num_classes, (1.0,) * 4) for _ in range(2))
        forward = np.asarray(programs.pushed(logits, tangent))
        middle, backward = map(np.asarray, programs.pulled(logits, cotangent))
        one = np.sum(forward * np.asarray(cotangent), axis=-1, keepdims=True)
        two = np.sum(backward * np.asarray(tangent), axis=-1, keepdims=True)
        problem = "forward and reverse mode differ"
        _require(_near(one, two, 1e-3), "derivatives", problem, logits, backward)

        above = np.asarray(programs.probs(logits + STEP * tangent)) - middle
        below = middle - np.asarray(programs.probs(logits - STEP * tangent))
        # The slopes on both sides of a kink differ.
        bend = np.abs(above - below).max(axis=-1, keepdims=True)
        is_smooth = bend <= 0.1 * np.abs(above).max(axis=-1, keepdims=True)
        num_smooth += is_smooth.sum()
        slope = (above + below) / (2 * STEP)
        is_near = ~is_smooth | _near(forward, slope, 5e-3)
        problem = "forward mode, above, is not the finite difference, below"
        _require(is_near, "derivatives", problem, logits, np.stack([forward, slope], axis=1))
    _require(num_smooth > 0, "derivatives", "all points have kinks nearby", logits, middle)
