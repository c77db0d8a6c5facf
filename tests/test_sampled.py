"""Sampled softmax: its draws, and the bias that its docstring states."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import softjax as sj
from softjax._uint64 import Wide
from softjax.output_layers.sampled import log_uniform, log_uniform_of_bits
from tests.helpers import INF, NAN

TOKENS, CLASSES = 3, 40


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (TOKENS, 4), (CLASSES, 4), (CLASSES,)
    arrays = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    return *arrays, jnp.asarray(rng.integers(0, CLASSES, TOKENS))


def shares(num_classes):
    return np.log1p(1 / (np.arange(num_classes) + 1.0)) / np.log1p(num_classes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_candidates_are_log_uniform(dtype):
    """Chi-squared is at most 6 standard deviations above its mean."""
    count = 400_000
    draw_all = jax.jit(log_uniform, static_argnums=(1, 2))
    with jax.enable_x64(dtype == "float64"):
        for num_classes in (1, 2, 7, 100):
            drawn = np.asarray(draw_all(jax.random.key(num_classes), count, num_classes))
            expected = count * shares(num_classes)
            found = np.bincount(drawn, minlength=num_classes)
            assert len(found) == num_classes
            chi = np.sum((found - expected) ** 2 / expected)
            assert chi <= num_classes - 1 + 6 * np.sqrt(2 * num_classes)
        # Rare classes of a large vocabulary, whose neighbours are equally frequent.
        drawn = np.asarray(draw_all(jax.random.key(0), count, 10**6))
        assert drawn.min() == 0
        assert 10**5 * 9 < drawn.max() < 10**6
        rare = drawn[drawn >= 10**5]
        expected = count * shares(10**6)[10**5 :].sum()
        assert abs(len(rare) - expected) <= 6 * np.sqrt(expected)
        assert abs(np.sum(rare % 2) - len(rare) / 2) <= 6 * np.sqrt(len(rare)) / 2


@pytest.mark.parametrize("num_classes", [1, 2, 7, 10**6, 2**24, 2**26 + 1, 2**31 - 2])
def test_bits_stand_for_the_class_that_is_defined(num_classes):
    """c + 1 is the whole part of (n + 1)^u, in arithmetic of 50 digits."""
    rng = np.random.default_rng(num_classes)
    numbers = [int(n) for n in rng.integers(0, 2**64, 400, np.uint64)]
    numbers += [0, 1, 2**63, 2**64 - 1]
    words = np.array([divmod(n, 2**32) for n in numbers], np.uint32)
    draw_all = jax.jit(log_uniform_of_bits, static_argnums=1)
    drawn = draw_all(Wide(*(jnp.asarray(w) for w in words.T)), num_classes)
    assert drawn.dtype == jnp.int32
    with mpmath.workdps(50):
        top = mpmath.log(num_classes + 1)
        expected = [int(mpmath.exp(top * n / 2**64)) - 1 for n in numbers]
    assert drawn.tolist() == expected


def test_shares_of_octaves_and_parities():
    """Up to 2^26 classes, where float32 has neither odd numbers nor equal shares."""
    count, size = 2**22, 2**26
    with jax.enable_x64(False):
        drawn = jax.jit(log_uniform, static_argnums=(1, 2))(jax.random.key(5), count, size)
        drawn = np.asarray(drawn) + 1
    assert 1 <= drawn.min() < drawn.max() <= size
    octave = np.frexp(drawn.astype(float))[1] - 1
    found = np.bincount(octave, minlength=27)
    edges = np.minimum(2.0 ** np.arange(28), size + 1)
    expected = count * np.diff(np.log(edges)) / np.log(size + 1)
    error = np.sqrt(expected * (1 - expected / count)) + 1
    assert (np.abs(found - expected) <= 5 * error).all()
    for first in range(20, 26):
        inside = drawn[octave == first]
        for bit in (1, 2, 4):  # Parity, and the next digits.
            odd = np.sum((inside & bit) != 0)
            assert abs(odd - len(inside) / 2) <= 5 * np.sqrt(len(inside)) / 2
        # Halves of an octave, and quarters of it: log(5/4), log(6/5), log(7/6), log(8/7).
        quarter = np.bincount((inside >> (first - 2)) - 4, minlength=4)
        wanted = len(inside) * np.log2(np.arange(5, 9) / np.arange(4, 8))
        assert (np.abs(quarter - wanted) <= 5 * np.sqrt(wanted)).all()


@pytest.mark.slow
def test_even_classes_of_a_large_vocabulary_are_drawn():
    with jax.enable_x64(False):
        classes = jnp.arange(2**25)
        kept = ((classes > 2**24) & (classes % 2 == 0)) | (classes == 0)
        loss = sj.sampled_cross_entropy(
            jax.random.key(0),
            jnp.ones((1, 1)),
            jnp.zeros((2**25, 1)),
            jnp.array([0]),
            num_samples=200_000,
            bias=jnp.where(kept, 0.0, -INF),
        )
    # About 4000 candidates are kept.
    assert abs(loss.item() - np.log(2**23)) < 5 / np.sqrt(4000)


@pytest.mark.slow
def test_the_sum_has_no_bias_and_its_logarithm_has():
    """E[exp(estimate)] is exp(loss), and the estimate is too small, by O(1 / m)."""
    features, weights, bias, labels = draw()
    exact = sj.cross_entropy(features @ weights.T + bias[None], labels)
    keys = jax.random.split(jax.random.key(0), 4000)
    missing = []
    for num_samples in (8, 32, 128):
        estimate = jax.vmap(
            lambda key, m=num_samples: sj.sampled_cross_entropy(
                key, features, weights, labels, bias=bias, num_samples=m
            )
        )(keys)
        ratio = np.asarray(jnp.exp(estimate - exact[None]))
        error = ratio.std(0) / np.sqrt(len(keys))
        assert (np.abs(ratio.mean(0) - 1) <= 5 * error).all()
        too_small = np.asarray(jnp.mean(exact[None] - estimate, 1))
        missing.append(too_small.mean())
        assert missing[-1] > 5 * too_small.std() / np.sqrt(len(keys))
        # Half the relative variance, once that is small.
        if num_samples == 128:
            assert missing[-1] == pytest.approx(np.mean(ratio.var(0)) / 2, rel=0.25)
    assert missing[0] > 2 * missing[1] > 4 * missing[2]


def test_accidental_hits_are_left_out():
    """With one class all candidates are the label: the loss is 0, as it should be."""
    features, weights, _, _ = draw()
    label = jnp.zeros(TOKENS, int)
    key = jax.random.key(3)
    alone = sj.sampled_cross_entropy(key, features, weights[:1], label, num_samples=5)
    assert (alone == 0).all()


def test_a_confident_token_keeps_its_digits():
    """Scores that are log-frequencies make the sum exact: e^-50, which is lost beside 1."""
    bias = jnp.log(shares(CLASSES)).at[-1].set(50.0)
    features, weights = jnp.zeros((1, 1)), jnp.zeros((CLASSES, 1))
    loss = lambda bias: sj.sampled_cross_entropy(
        jax.random.key(1), features, weights, jnp.array([CLASSES - 1]), bias=bias, num_samples=6
    )
    along = jnp.zeros(CLASSES).at[-1].set(1.0)
    value, slope = jax.jit(lambda b: jax.jvp(loss, (b,), (along,)))(bias)
    np.testing.assert_allclose(value, [np.exp(-50)], rtol=1e-13)
    np.testing.assert_allclose(slope, [-np.exp(-50)], rtol=1e-13)


def test_gradients_reach_drawn_classes_alone():
    features, weights, _, labels = draw()
    key = jax.random.key(1)
    loss = lambda w: jnp.sum(sj.sampled_cross_entropy(key, features, w, labels, num_samples=6))
    reached = np.flatnonzero(np.any(np.asarray(jax.grad(loss)(weights)) != 0, 1))
    drawn = np.asarray(log_uniform(key, 6, CLASSES))
    assert set(reached) == set(drawn) | set(np.asarray(labels))


@pytest.mark.slow
def test_labels_that_are_none():
    features, weights, bias, labels = draw()
    labels = labels.at[0].set(-1).at[2].set(CLASSES)
    call = lambda f, **rest: sj.sampled_cross_entropy(
        jax.random.key(0), f, weights, labels, num_samples=4, **rest
    )
    assert np.isnan(call(features)).tolist() == [True, False, True]
    spoilt, heat = features.at[0].set(NAN), jnp.array([NAN, 1.0, 2.0])
    loss, pull = jax.vjp(lambda f: call(f, ignore_index=-1, temperature=heat), spoilt)
    assert loss[0] == 0
    slopes = pull(jnp.array([1.0, 1.0, 0.0]))[0]
    assert (slopes[0] == 0).all()
    assert jnp.isfinite(slopes[1]).all()
    weights = weights.at[labels[1]].set(NAN)  # Of a class that is dropped.
    dropped = call(features, bias=bias.at[labels[1]].set(-INF))
    assert dropped[1] == INF


def test_reductions_and_labels_that_are_left_out():
    """An ignored token, and an unknown label whose loss a mean leaves out, reach nothing."""
    features, weights, _, labels = draw()
    options = {"num_samples": 4, "ignore_index": -1}
    call = lambda f, w, **rest: sj.sampled_cross_entropy(
        jax.random.key(0), f, w, labels.at[1].set(-1), **options, **rest
    )
    losses = call(features, weights)
    spoilt = features.at[1].set(NAN)
    for reduction, wanted in (("sum", losses[0] + losses[2]), ("mean", losses.sum() / 2)):
        mean = lambda f, w, r=reduction: call(f, w, reduction=r)
        value, slopes = jax.value_and_grad(mean, (0, 1))(spoilt, weights)
        np.testing.assert_allclose(value, wanted, rtol=1e-15)
        assert (slopes[0][1] == 0).all()
        assert all(jnp.isfinite(x).all() for x in slopes)
    with pytest.raises(ValueError, match='`reduction` must be "mean", "sum" or None'):
        call(features, weights, reduction="none")
    losses_of = (
        lambda w, y: sj.sampled_cross_entropy(jax.random.key(0), features, w, y, num_samples=4),
        lambda w, y: sj.linear_cross_entropy(features, w, y, reduction=None),
        lambda w, y: sj.linear_cross_entropy(features, w, y, reduction=None, block_size=2),
    )
    shares = jnp.array([1.0, 0.0, 1.0])
    for each in losses_of:
        mean = lambda w, each=each: sj.mean_loss(
            each(w, labels.at[1].set(-1)), example_weights=shares
        )
        value, slope = jax.value_and_grad(mean)(weights)
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope).all()
        assert jnp.abs(slope).max() > 0


def test_a_dropped_label_leaves_the_temperature_of_other_tokens():
    x, w = jnp.array([[1.0, 0], [0, 2]]), jnp.array([[1.0, 2], [3, 4], [0, -1]])
    loss = lambda heat, bias: sj.sampled_cross_entropy(
        jax.random.key(0), x, w, jnp.array([0, 2]), num_samples=4, bias=bias, temperature=heat
    )[1]
    # A bias so low that its class has no weight is as good as -inf.
    slopes = [jax.grad(loss)(2.0, jnp.array([low, 0, 0])) for low in (-INF, -1e3)]
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-12)


def test_many_tokens_at_a_time_and_one_by_one_agree():
    features, weights, bias, labels = draw()
    key = jax.random.key(2)
    call = lambda f, y: sj.sampled_cross_entropy(key, f, weights, y, bias=bias, num_samples=9)
    together = call(features, labels)
    one_by_one = jnp.stack([call(f, y) for f, y in zip(features, labels, strict=True)])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-13)


def test_what_does_not_fit_is_refused():
    features, weights, bias, labels = draw()
    key = jax.random.key(0)
    for bad, error in ((0, TypeError), (jax.random.split(key), ValueError)):
        with pytest.raises(error, match="`key` must be"):
            sj.sampled_cross_entropy(bad, features, weights, labels, num_samples=1)
    with pytest.raises(ValueError, match="`num_samples` must be"):
        sj.sampled_cross_entropy(key, features, weights, labels, num_samples=0)
    with pytest.raises(ValueError, match="`bias` must be"):
        sj.sampled_cross_entropy(key, features, weights, labels, num_samples=1, bias=bias[1:])
    with pytest.raises(TypeError, match="`labels` must be"):
        sj.sampled_cross_entropy(key, features, weights, features[:, 0], num_samples=1)
