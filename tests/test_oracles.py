"""The references themselves: against each other, and against SciPy."""

import numpy as np
import pytest
from scipy import optimize, special

from tests import oracles
from tests.helpers import assert_close, draw, eps

TEMPERATURES = (0.05, 1.0, 20.0)


def test_dense_maps_and_reductions_agree_with_scipy():
    logits, _ = draw(0, (4, 7), scale=3.0)
    for axis in (0, 1, -1, (0, 1), None):
        close = {"rtol": 64 * eps("float64"), "atol": 1e-14}
        assert_close(oracles.softmax(logits, axis=axis), special.softmax(logits, axis), **close)
        expected = special.log_softmax(logits, axis)
        assert_close(oracles.log_softmax(logits, axis=axis), expected, **close)
        weights = np.abs(logits)
        expected = special.logsumexp(logits, axis, b=weights, keepdims=True)
        actual = oracles.logsumexp(logits, axis=axis, weights=weights, keepdims=True)
        assert_close(actual, expected, **close)
    probs = special.softmax(logits, -1)
    assert_close(oracles.entropy(logits), special.entr(probs).sum(-1), rtol=1e-14)
    expected = special.rel_entr(probs, probs[::-1]).sum(-1)
    assert_close(oracles.kl_divergence(logits, logits[::-1]), expected, rtol=1e-13)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 2.5])
def test_entmax_maximises_its_objective(alpha):
    """<p, z> + H_a(p) over the simplex, H_a = (1 - sum p^a) / (a (a - 1)), by optimality."""
    logits, _ = draw(1, (3, 6), scale=1.5)
    probs = oracles.entmax(logits, alpha)
    assert_close(probs.sum(-1), np.ones(3), rtol=1e-18)
    slope = logits - probs ** (alpha - 1) / (alpha - 1)
    for row, p in zip(slope, probs, strict=True):
        inside = row[p > 0]
        assert np.ptp(inside) < 1e-15
        assert (row[p == 0] <= inside.max()).all()


@pytest.mark.parametrize("kind", ["capped", "sigmoid", "laplace"])
def test_soft_top_k_solves_its_equation(kind):
    logits, _ = draw(2, (3, 6), scale=1.5)
    unit = {
        "capped": lambda t: np.clip(t, 0, 1),
        "sigmoid": special.expit,
        "laplace": lambda t: np.where(t < 0, np.exp(t) / 2, 1 - np.exp(-t) / 2),
    }[kind]
    for k in (0.5, 2.0, 4.75):
        probs = oracles.soft_top_k(logits, k, kind=kind, temperature=0.5)
        for row, p in zip(logits / 0.5, probs, strict=True):
            excess = lambda tau, row=row, k=k: unit(row - tau).sum() - k
            tau = optimize.brentq(excess, -40, 40, xtol=1e-14)
            np.testing.assert_allclose(p.astype(float), unit(row - tau), atol=1e-13)


@pytest.mark.slow
def test_fast_family_agrees_with_the_exact_one():
    """To a hundredth of a float64 ulp: 64-bit significands hold 2048 to one."""
    for seed, (scale, offset) in enumerate([(1e-3, 1e4), (1.0, 0.0), (30.0, -1e2)]):
        logits, keep = draw(seed, (2, 300), scale=scale, offset=offset)
        for temperature in TEMPERATURES:
            options = {"where": keep, "temperature": temperature}
            for name in ("softmax", "log_softmax"):
                exact = getattr(oracles, name)(logits, **options)
                fast = getattr(oracles, f"fast_{name}")(logits, **options)
                assert_close(fast, exact, rtol=eps("float64") / 100)
            for alpha in (1.5, 2.0):
                exact = oracles.entmax(logits, alpha, **options)
                fast = oracles.fast_entmax(logits, alpha, **options)
                assert_close(fast, exact, rtol=0, atol=eps("float64") * exact.max() / 100)
                np.testing.assert_array_equal(fast > 0, exact > 0)
        exact = oracles.logsumexp(logits, axis=-1, where=keep)
        assert_close(
            oracles.fast_logsumexp(logits, where=keep), exact, rtol=eps("float64") / 100
        )


def test_fast_entmax_for_another_alpha():
    logits, _ = draw(5, (2, 60), scale=2.0)
    for alpha in (1.25, 2.5):
        exact = oracles.entmax(logits, alpha)
        fast = oracles.fast_entmax(logits, alpha)
        assert_close(fast, exact, rtol=0, atol=eps("float64") / 100)
