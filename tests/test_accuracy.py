"""How far the results lie from the true ones, in units of the last place.

The true inputs are those that the dtype holds: logits and temperature are rounded first.
The bounds are promises, not what happens to be reached:

- softmax and log_softmax: 4 ulp, entry by entry, wherever the true value is a normal number,
  but for a log-probability whose sum of other weights underflows: n times the smallest normal
  number is lost of it at most;
- logsumexp: 2.5 ulp (2 in most tests), except that where the peak and the logarithm of the sum
  cancel, it is of the larger of the two: the logits' own rounding leaves no more there;
- sparse maps: 8 ulp of the largest weight of the slice, and exactly the right support;
- half precision: 0.52 ulp of the dtype, because they are computed in float32 and rounded once.

Results below the normal range may be flushed to zero, as XLA does on CPUs.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import oracles
from tests.helpers import INF, eps, finfo, normal, ulp, ulp_error, wide

pytestmark = pytest.mark.optimized

SCALES = (1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 30.0)
OFFSETS = (0.0, 1e2, -1e2, 1e4, -1e4)
MARGINS = (1.0, 2.0, 5.0, 10.0, 15.0, 16.0, 17.0, 20.0, 30.0, 36.0, 40.0, 60.0, 80.0)
TEMPERATURES = (0.05, 0.3, 1.0, 1.7, 20.0)
SMALL = (1, 2, 3, 7)

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def cases(n, dtype, *, seed=0, thin=1):
    """Slices of n logits `[cases, n]`, rounded to the dtype: scales, offsets, margins, ties."""
    rng = np.random.default_rng(seed)
    rows = [o + s * rng.standard_normal(n) for s in SCALES for o in OFFSETS]
    for margin in MARGINS:
        for scale, offset in ((0.0, 0.0), (1.0, 0.0), (0.1, 1e2)):
            row = offset + scale * rng.standard_normal(n)
            row[rng.integers(n)] = row.max() + margin
            rows.append(row)
    for step in (0.25, 1.0, 4.0):
        rows.append(step * rng.integers(-2, 3, n))
    rows.append(np.full(n, 3.0))
    rows.append(rng.integers(0, 2, n) * -200.0)  # Two levels, one of them out of sight.
    return np.stack(rows[::thin]).astype(jnp.dtype(dtype))


def mask(shape, seed):
    keep = np.random.default_rng(seed).random(shape) < 0.6
    keep[..., 0] = True
    return keep


def temperatures(dtype, chosen=TEMPERATURES):
    return [np.asarray(t).astype(jnp.dtype(dtype)) for t in chosen]


def worst(actual, exact, dtype, lost=0.0):
    """The largest error over normal values, after a check of the others.

    An absolute error up to `lost` does not count.
    """
    actual = np.asarray(actual)
    assert actual.dtype == jnp.dtype(dtype)
    regular = normal(exact, dtype)
    small = np.abs(exact) < float(finfo(dtype).tiny)
    flushed = np.abs(wide(actual) - np.where(small, exact, 0))[small]
    assert (flushed <= float(finfo(dtype).tiny) + lost).all()
    np.testing.assert_array_equal(wide(actual)[np.isinf(exact)], exact[np.isinf(exact)])
    with np.errstate(invalid="ignore"):
        counted = regular & ~(np.abs(wide(actual) - exact) <= lost)
    return ulp_error(actual, exact, dtype)[counted].max(initial=0.0)


def thinned(n):
    """One case in this many is tested, because long cases are slow."""
    return 7 if n > 1000 else 1


@functools.cache
def truth(name, n, dtype, temperature, masked, thin):
    """Logits, mask and the exact results."""
    logits = cases(n, dtype, thin=thin)
    keep = mask(logits.shape, n) if masked else None
    options = {"where": keep, "temperature": temperature}
    if n in SMALL:
        return logits, keep, getattr(oracles, name)(logits, **options)
    return logits, keep, getattr(oracles, f"fast_{name}")(logits, **options)


def check_dense(n, dtype, chosen, thin=1, masked=(False, True)):
    for use_mask in masked:
        for temperature in temperatures(dtype, chosen):
            for name in ("softmax", "log_softmax"):
                exact_at = float(temperature)
                logits, keep, exact = truth(name, n, dtype, exact_at, use_mask, thin)
                options = {"where": keep, "temperature": temperature}
                actual = getattr(sj, name)(jnp.asarray(logits), **options)
                # Weights below the normal range are flushed to 0, and miss in log1p(sum).
                tiny = float(finfo("float64" if dtype == "float64" else "float32").tiny)
                lost = n * tiny if name == "log_softmax" else 0
                error = worst(actual, exact, dtype, lost)
                assert error <= 4.0, (name, exact_at, use_mask, error)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 7])
def test_dense_maps_of_small_slices(n, dtype):
    check_dense(n, dtype, (0.05, 1.7), thin=3)


@every_dtype
def test_dense_maps_of_a_thousand(dtype):
    check_dense(1000, dtype, TEMPERATURES)


@every_dtype
def test_dense_maps_of_a_hundred_thousand(dtype):
    check_dense(100_000, dtype, (1.0,), thin=7, masked=(False,))


@every_dtype
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("n", [9, 64, 1000, 4095])
def test_one_slice_of_equal_scores_below_its_peak(n, axis, dtype):
    """A running sum of so many equal terms rounds most of them the same way."""
    mp = oracles.mp
    for margin in np.linspace(0.1, 87.3, 20):
        logits = np.full((n, 1) if axis == 0 else (1, n), -margin).astype(dtype)
        logits[0, 0] = 0
        score = float(logits[-1, -1])
        threshold = mp.log1p((n - 1) * mp.exp(score))
        log_probs = [-threshold, score - threshold]
        for name, want in (("log_softmax", log_probs), ("softmax", map(mp.exp, log_probs))):
            got = np.asarray(getattr(sj, name)(jnp.asarray(logits), axis=axis)).reshape(-1)
            exact = np.array([np.longdouble(str(value)) for value in want])
            exact = np.repeat(exact, (1, n - 1))
            assert worst(got, exact, dtype) <= 4, (name, margin)


def test_many_slices_of_equal_scores_below_their_peaks():
    """Along the first axis XLA runs through the terms, however many columns there are."""
    n, columns, mp = 65, 20000, oracles.mp
    for margin in (0.7, 6.9, 9.703582170936475):
        logits = np.full((n, columns), -margin)
        logits[0] = 0
        exact = -mp.log1p((n - 1) * mp.exp(-margin))
        for name, want in (("log_softmax", exact), ("softmax", mp.exp(exact))):
            got = np.asarray(getattr(sj, name)(jnp.asarray(logits), axis=0))[0]
            assert ulp_error(got, np.longdouble(str(want))).max() <= 4


@every_dtype
def test_temperatures_of_all_sizes(dtype):
    """What rounding takes is not flushed to 0, and no difference overflows."""
    info = finfo(dtype)
    draws = np.random.default_rng(0).uniform(-1, 1, (40, 7))
    for temperature in (1.1 * info.tiny, 1e8 * info.tiny, 1e-10, 1e10, 1e-2 * info.max):
        for scale in (0.3, 3.0, 30.0):
            logits = (np.longdouble(temperature) * scale * draws).astype(dtype)
            logits = np.where(np.abs(logits) < info.tiny, 0, logits)
            logits = np.where(np.isfinite(logits), logits, -info.max).astype(dtype)
            rate = np.asarray(temperature, dtype)
            for name in ("softmax", "log_softmax"):
                exact = getattr(oracles, f"fast_{name}")(logits, temperature=float(rate))
                got = getattr(sj, name)(jnp.asarray(logits), temperature=rate)
                assert worst(got, exact, dtype) <= 4, (name, temperature, scale)


every_size = pytest.mark.parametrize("n", [*SMALL, 1000, 100_000])


@pytest.mark.slow
@every_dtype
@every_size
def test_dense_maps_in_full(n, dtype):
    check_dense(n, dtype, TEMPERATURES, thin=thinned(n))


def lse_errors(n, dtype, masked, thin=1):
    """Errors in ulp of the result, the same of the larger of its two terms, and the terms."""
    logits = cases(n, dtype, thin=thin)
    keep = mask(logits.shape, n) if masked else None
    if n in SMALL:
        exact = oracles.logsumexp(logits, axis=-1, where=keep)
    else:
        exact = oracles.fast_logsumexp(logits, where=keep)
    actual = np.asarray(sj.logsumexp(jnp.asarray(logits), axis=-1, where=keep))
    assert actual.dtype == jnp.dtype(dtype)
    kept = wide(logits) if keep is None else np.where(keep, wide(logits), -INF)
    peak = kept.max(-1)
    term = np.maximum(np.maximum(np.abs(peak), np.abs(exact - peak)), np.abs(exact))
    regular = normal(exact, dtype)
    error = np.abs(wide(actual) - exact)
    return (error / ulp(exact, dtype))[regular], (error / ulp(term, dtype)), (exact, term)


def check_logsumexp(n, dtype, thin=1):
    for masked in (False, True):
        errors, of_terms, (exact, term) = lse_errors(n, dtype, masked, thin)
        assert of_terms.max() <= 2.0
        regular = normal(exact, dtype)
        # Where at most one bit cancels, the bound holds for the result itself.
        calm = (np.abs(exact) >= term / 2)[regular]
        assert errors[calm].max(initial=0.0) <= 2.0


@every_dtype
@pytest.mark.parametrize("n", [*SMALL, 1000])
def test_logsumexp(n, dtype):
    check_logsumexp(n, dtype)


@pytest.mark.slow
@every_dtype
def test_logsumexp_in_full(dtype):
    for n in (*SMALL, 1000, 100_000):
        check_logsumexp(n, dtype, thin=thinned(n))


@every_dtype
def test_logsumexp_of_a_hundred_thousand(dtype):
    check_logsumexp(100_000, dtype, thin=11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_logsumexp_of_many_short_slices(n, dtype):
    rng = np.random.default_rng(n)
    for scale in (0.1, 1.0, 3.0):
        logits = (scale * rng.standard_normal((2**16, n))).astype(dtype)
        exact = oracles.fast_logsumexp(logits)
        peak = wide(logits).max(-1)
        term = np.maximum(np.maximum(np.abs(peak), exact - peak), np.abs(exact))
        actual = np.asarray(sj.logsumexp(jnp.asarray(logits), axis=-1))
        error = np.abs(wide(actual) - exact) / ulp(term, dtype)
        assert error.max() <= 2.5  # 2.46 was seen.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_where_its_terms_cancel(dtype):
    """peak = -log n, nearly: what is left is right to the rounding of log n."""
    for n in (2, 3, 10, 1000):
        logits = np.full((1, n), -np.log(n)).astype(dtype)
        logits[0, 0] *= 1 + 2.0**-6
        exact = oracles.logsumexp(logits, axis=-1)
        actual = np.asarray(sj.logsumexp(jnp.asarray(logits), axis=-1))
        assert np.abs(wide(actual) - exact) <= 2 * ulp(np.log(n), dtype)


def check_sparse(name, n, dtype, chosen, thin=1, limit=8.0):
    alpha = {"sparsemax": 2.0, "entmax15": 1.5}[name]
    for masked in (False, True):
        for temperature in temperatures(dtype, chosen):
            logits = cases(n, dtype, thin=thin)
            keep = mask(logits.shape, n) if masked else None
            options = {"where": keep, "temperature": float(temperature)}
            exact = (oracles.entmax if n in SMALL else oracles.fast_entmax)(
                logits, alpha, **options
            )
            # What is left of an exact tie in an oracle of 50 digits is a tie.
            exact = np.where(exact < 1e-45 ** (1 / (alpha - 1)), 0, exact)
            options["temperature"] = temperature
            actual = np.asarray(getattr(sj, name)(jnp.asarray(logits), **options))
            assert actual.dtype == jnp.dtype(dtype)
            largest = exact.max(-1, keepdims=True)
            error = np.abs(wide(actual) - exact) / ulp(largest, dtype)
            worst_case = error.max(), float(temperature), masked
            assert error.max() <= limit, worst_case
            # A weight below the smallest normal number of the dtype has no place in it.
            seen = (exact == 0) | (exact >= float(finfo(dtype).tiny))
            np.testing.assert_array_equal((actual > 0)[seen], (exact > 0)[seen])


every_sparse_map = pytest.mark.parametrize("name", ["sparsemax", "entmax15"])


@every_dtype
@every_sparse_map
@pytest.mark.parametrize("n", [1, 2, 7])
def test_sparse_maps_of_small_slices(name, n, dtype):
    check_sparse(name, n, dtype, (0.3, 20.0), thin=3)


@every_dtype
@every_sparse_map
def test_sparse_maps_of_a_thousand(name, dtype):
    check_sparse(name, 1000, dtype, (0.05, 1.0, 20.0), thin=3)


@pytest.mark.slow
@every_dtype
@every_size
@every_sparse_map
def test_sparse_maps_in_full(name, n, dtype):
    # The oracle takes most of the time: of the longest slices the ends and one between.
    chosen = TEMPERATURES if n < 100_000 else TEMPERATURES[::2]
    check_sparse(name, n, dtype, chosen, thin=thinned(n))


@every_dtype
@pytest.mark.parametrize("alpha", [pytest.param(1.25, marks=pytest.mark.slow), 1.5, 2.0, 3.0])
def test_entmax_of_any_alpha(alpha, dtype):
    """Through the general solver. Above 2 the slope p^(2 - alpha) grows towards the edge of
    the support, and what the last bit of a score is worth there is added to the bound.
    """
    for n in (2, 7, 1000):
        logits = cases(n, dtype, thin=5)
        for temperature in temperatures(dtype, (0.3, 20.0)):
            exact = oracles.fast_entmax(logits, alpha, temperature=float(temperature))
            actual = np.asarray(sj.entmax(jnp.asarray(logits), alpha, temperature=temperature))
            largest = exact.max(-1, keepdims=True)
            allowed = 8.0 * ulp(largest, dtype)
            if alpha > 2:
                # A weight d from the edge is d^(1 / (alpha - 1)): so much is an eps of d.
                computed = eps("float64" if dtype == "float64" else "float32")
                allowed = allowed + largest * (4 * computed) ** (1 / (alpha - 1))
            error = np.abs(wide(actual) - exact) / allowed
            assert error.max() <= 1, (n, float(temperature), error.max())
            if n < 1000 and alpha <= 2:
                seen = (exact == 0) | (exact >= float(finfo(dtype).tiny))
                np.testing.assert_array_equal((actual > 0)[seen], (exact > 0)[seen])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [7, 1000])
@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15", "entmax"]
)
def test_half_precision_is_float32_rounded_once(name, n, dtype):
    """So the error is at most 0.5 ulp of the dtype, plus the bounds above in float32."""
    function = getattr(sj, name)
    options = {"alpha": 1.25} if name == "entmax" else {}
    for temperature in (None,) if name == "logsumexp" else (1.0, 0.3):
        given = {} if temperature is None else {"temperature": jnp.asarray(temperature, dtype)}
        axis = {"axis": -1}
        logits = jnp.asarray(cases(n, dtype, thin=3))
        got = np.asarray(function(logits, **options, **axis, **given))
        assert got.dtype == jnp.dtype(dtype)
        given = {key: value.astype("float32") for key, value in given.items()}
        exact = np.asarray(function(logits.astype("float32"), **options, **axis, **given))
        regular = normal(exact, dtype)
        assert ulp_error(got, exact, dtype)[regular].max() <= 0.501
        assert (np.abs(wide(got)[~regular]) <= float(finfo(dtype).tiny)).all()
