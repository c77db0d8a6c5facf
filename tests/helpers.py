"""Draws, errors measured in units of the last place, and strict comparisons."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from scipy import stats

INF, NAN = float("inf"), float("nan")
DTYPES = ("bfloat16", "float16", "float32", "float64")


def finfo(dtype):
    return ml_dtypes.finfo(jnp.dtype(dtype))


def draw(seed, shape, *, scale=1.0, offset=0.0, dtype="float64", dropped=0.3):
    """Normal logits, rounded to the dtype, and a mask; the first of a slice is always kept."""
    rng = np.random.default_rng(seed)
    logits = (offset + scale * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    keep = rng.random(shape) >= dropped
    keep[..., :1] = True
    return logits, keep


def spread(logits):
    """Largest minus smallest finite logit."""
    finite = np.asarray(logits, np.float64)
    finite = finite[np.isfinite(finite)]
    return finite.max() - finite.min()


def wide(array):
    return np.asarray(array).astype(np.longdouble)


def ulp(value, dtype):
    """The spacing of the dtype's numbers at `value`, in its normal range or just above it."""
    info = finfo(dtype)
    _, exponent = np.frexp(wide(value))
    exponent = np.maximum(exponent - 1, info.minexp)
    return np.ldexp(np.longdouble(1), exponent - info.nmant)


def normal(value, dtype):
    """Where a value is a normal number of the dtype."""
    info = finfo(dtype)
    size = np.abs(wide(value))
    return (size >= np.longdouble(float(info.tiny))) & (size <= np.longdouble(float(info.max)))


@np.errstate(all="ignore")
def ulp_error(actual, exact, dtype=None):
    """Errors in ulp of the exact value; equal infinities count as no error."""
    dtype = dtype or np.asarray(actual).dtype
    actual, exact = wide(actual), wide(exact)
    same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
    finite = np.where(np.isfinite(exact), exact, 0)
    error = np.abs(np.where(np.isfinite(exact), actual - finite, INF)) / ulp(finite, dtype)
    return np.where(same, 0, np.where(np.isnan(error), INF, error)).astype(np.float64)


def assert_close(actual, expected, *, rtol, atol=0.0):
    """|actual - expected| <= atol + rtol |expected| entry by entry; NaN and inf must match."""
    assert jnp.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(wide(actual), wide(expected), rtol=rtol, atol=atol)


def assert_same(actual, expected):
    """Bit for bit, with shapes and dtypes; NaN equals NaN."""
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        np.testing.assert_array_equal(wide(one), wide(two))


def eps(dtype):
    return float(finfo(dtype).eps)


def nan_makers(fn, *args):
    """Names of the operations in `fn(*args)` that make a NaN from arguments without one.

    Constants that are NaN are no offence; loops are looked at from the outside.
    """
    closed = jax.make_jaxpr(fn)(*args)
    found = []
    _interpret(closed.jaxpr, closed.consts, jax.tree.leaves(args), found)
    return found


def _interpret(jaxpr, consts, args, found):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.core.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None and eqn.primitive.name != "scan":
            consts = getattr(inner, "consts", [])
            outs = _interpret(getattr(inner, "jaxpr", inner), consts, inputs, found)
        else:
            outs = eqn.primitive.bind(*inputs, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
            if any(map(_has_nan, outs)) and not any(map(_has_nan, inputs)):
                found.append(eqn.primitive.name)
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _has_nan(value):
    is_float = jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return bool(is_float and jnp.isnan(value).any())


def g_test(counts, probs):
    """The p-value of counts under probabilities; a class of probability 0 must not occur.

    Classes are put together, in the order of their probability, until each group is expected
    100 times, where the distribution of G is that of chi-square.
    """
    counts, probs = np.asarray(counts, float), np.asarray(probs, float)
    assert not counts[probs == 0].any()
    order = np.argsort(probs)
    expected = probs[order] * counts.sum() / probs.sum()
    group = np.floor(np.cumsum(expected) / 100).astype(int)
    expected, observed = (np.bincount(group, w) for w in (expected, counts[order]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:  # All draws are of this class.
        return 1.0
    ratio = np.where(observed > 0, observed, 1) / expected
    return float(stats.chi2.sf(2 * np.sum(observed * np.log(ratio)), len(expected) - 1))
