"""Temperatures, bins, averages of models and sets of classes against their definitions."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from tests import oracles
from tests.helpers import INF, NAN, assert_close, eps


def examples(seed, num=40, classes=5, scale=1.5, right=0.6, dtype="float64"):
    """Logits, and labels that are the likeliest class more often than not."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((num, classes))).astype(dtype)
    chance = rng.integers(0, classes, num)
    return logits, np.where(rng.random(num) < right, logits.argmax(-1), chance)


# The temperature.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.5, 1e8, 1e30, 1e37])
def test_temperature_is_where_labels_are_likeliest(dtype, scale):
    logits, labels = examples(0, scale=scale, dtype=dtype)
    found = sj.fit_temperature(jnp.asarray(logits), jnp.asarray(labels))
    assert_close(found, oracles.fit_temperature(logits, labels), rtol=32 * eps(dtype))


def test_temperature_of_each_group():
    logits, labels = examples(1)
    groups = np.arange(len(labels)) % 3
    groups[:4] = 7  # They do not count.
    found = sj.fit_temperature(logits, labels, groups=groups, num_groups=4)
    apart = [sj.fit_temperature(logits[groups == g], labels[groups == g]) for g in range(3)]
    np.testing.assert_allclose(found, [*apart, 1.0], rtol=1e-13)


def test_temperature_along_any_axis_and_mask():
    logits, labels = examples(2, num=12)
    keep = np.random.default_rng(3).random(logits.shape) < 0.8
    np.put_along_axis(keep, labels[:, None], True, -1)
    wanted = sj.fit_temperature(logits, labels, where=keep)
    turned = logits.reshape(3, 4, 5).transpose(0, 2, 1), labels.reshape(3, 4)
    mask = keep.reshape(3, 4, 5).transpose(0, 2, 1)
    np.testing.assert_allclose(sj.fit_temperature(*turned, axis=1, where=mask), wanted)
    np.testing.assert_allclose(
        wanted, oracles.fit_temperature(logits, labels, where=keep).astype(float), rtol=1e-12
    )


LADDER = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("logits", "labels", "wanted"),
    [
        (LADDER, LADDER.argmax(-1), 0.0),
        (LADDER, LADDER.argmin(-1), INF),
        (np.zeros((3, 3)), np.arange(3), 1.0),
        (np.zeros((0, 3)), np.zeros(0, int), 1.0),
        (np.where(LADDER == 3, NAN, LADDER), LADDER.argmax(-1), NAN),
        (LADDER, np.array([0, 1, 9]), NAN),
    ],
)
def test_temperature_at_the_limits(logits, labels, wanted):
    fit = lambda z: sj.fit_temperature(z, jnp.asarray(labels))
    found, slope = jax.value_and_grad(fit)(jnp.asarray(logits))
    chex.assert_trees_all_equal(np.asarray(found), np.asarray(wanted))
    if np.isnan(logits).any():
        assert np.isnan(slope).any()
    else:
        chex.assert_trees_all_equal(np.asarray(slope), np.zeros_like(logits))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_labels_as_likely_as_by_chance_have_no_temperature(dtype):
    """Each class of a row is the label once, so the derivative at 1 / T = 0 is 0."""
    rng = np.random.default_rng(0)
    fit = jax.jit(lambda z, y: sj.fit_temperature(z, y))
    for scale in (1e-3, 1.0, 1e3):
        logits = np.repeat((scale * rng.standard_normal((20, 7))).astype(dtype), 7, 0)
        assert fit(logits, np.tile(np.arange(7), 20)) == INF


def test_a_nan_in_one_group_stays_there():
    logits, labels = examples(1)
    groups = np.arange(len(labels)) % 2
    logits[1, 0] = NAN
    fit = lambda z: sj.fit_temperature(z, labels, groups=groups, num_groups=2)
    slopes = jax.jacrev(fit)(jnp.asarray(logits))
    assert np.isnan(fit(logits)).tolist() == [False, True]
    assert np.isnan(slopes[1, 1, 0])
    others = np.asarray(slopes.at[:, 1, 0].set(0))
    assert np.isfinite(others).all()
    assert np.abs(others[0]).max() > 0


def test_what_does_not_count_reaches_no_temperature():
    logits, labels = examples(4, num=10)
    wanted = sj.fit_temperature(logits, labels)
    more = np.concatenate([logits, [[NAN] * 5, [0, 1, 2, 3, -INF], [INF, 0, 0, 0, 0]]])
    ids = np.concatenate([labels, [-1, 4, 0]])
    fit = lambda z: sj.fit_temperature(z, ids, ignore_index=-1)
    found, slope = jax.value_and_grad(fit)(jnp.asarray(more))
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    assert not slope[10:].any()
    assert np.isfinite(slope).all()


def test_temperature_has_the_derivative_of_the_minimum():
    logits, labels = examples(5, num=9, classes=3)
    groups = np.arange(9) % 2
    fit = lambda z: sj.fit_temperature(z, labels, groups=groups, num_groups=2)
    check_grads(fit, (jnp.asarray(logits),), order=2, modes=["fwd", "rev"])
    assert np.abs(jax.jacobian(fit)(jnp.asarray(logits))).max() > 1e-2


def test_temperature_of_each_device():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    logits, labels = examples(11)
    fit = lambda z, y: sj.fit_temperature(z, y)[None]
    spec = jax.sharding.PartitionSpec("d")
    with jax.set_mesh(mesh):
        each = jax.shard_map(fit, in_specs=(spec, spec), out_specs=spec)
        found = jax.jit(each)(jax.device_put(logits, spec), jax.device_put(labels, spec))
    wanted = [fit(logits[i : i + 10], labels[i : i + 10])[0] for i in range(0, 40, 10)]
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


# Bins.


@pytest.mark.parametrize("bins", ["width", "mass"])
@pytest.mark.parametrize("num", [0, 1, 14, 100])
def test_bins(bins, num):
    rng = np.random.default_rng(num)
    probs, labels = rng.dirichlet(np.ones(4), num), rng.integers(-1, 4, num)
    options = {"bins": bins, "ignore_index": -1}
    found = sj.reliability(jnp.asarray(probs), jnp.asarray(labels), num_bins=7, **options)
    wanted = oracles.reliability(probs, labels, 7, **options)
    np.testing.assert_allclose(np.stack(found), wanted.astype(float), rtol=1e-13)
    error = sj.expected_calibration_error(probs, labels, num_bins=7, **options)
    wanted = oracles.expected_calibration_error(probs, labels, num_bins=7, **options)
    np.testing.assert_allclose(error, float(wanted), rtol=1e-12, atol=1e-15)


def test_edges_of_bins_belong_to_the_lower_one():
    probs = jnp.array([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5]])
    found = sj.reliability(probs, jnp.array([0, 0, 0]), num_bins=4)
    chex.assert_trees_all_equal(found.count, jnp.array([0.0, 1.0, 1.0, 1.0]))


def test_a_perfect_forecast_has_no_error():
    """Four examples of confidence 3/4, of which three are right."""
    probs = jnp.array([[0.75, 0.25]] * 4)
    assert sj.expected_calibration_error(probs, jnp.array([0, 0, 0, 1])) == 0


def test_a_nan_spoils_all_bins_unless_its_row_is_ignored():
    probs = jnp.array([[0.9, 0.1], [NAN, 0.5]])
    assert np.isnan(np.stack(sj.reliability(probs, jnp.array([0, 1])))).all()
    assert np.isnan(sj.expected_calibration_error(probs, jnp.array([0, 1]), bins="mass"))
    assert np.isnan(sj.expected_calibration_error(probs[:1], jnp.array([5])))
    slope = jax.grad(lambda p: sj.expected_calibration_error(p, jnp.array([0, 1])))(probs)
    assert np.isnan(slope).any()
    threshold = lambda z: sj.conformal_threshold(z, jnp.array([0, 1]), level=0.5)
    assert np.isnan(jax.grad(threshold)(probs)).any()
    kept = sj.expected_calibration_error(probs, jnp.array([0, -1]), ignore_index=-1)
    np.testing.assert_allclose(kept, 0.1)


# The Brier score.


def test_brier_score_and_its_reductions():
    rng = np.random.default_rng(6)
    probs, labels = rng.dirichlet(np.ones(3), (4, 5)), rng.integers(0, 3, (4, 5))
    wanted = oracles.brier_score(probs, labels).astype(float)
    np.testing.assert_allclose(sj.brier_score(probs, labels), wanted, rtol=1e-13)
    turned = sj.brier_score(probs.transpose(0, 2, 1), labels, axis=1)
    np.testing.assert_allclose(turned, wanted, rtol=1e-13)
    labels[0] = -1
    mean = sj.brier_score(probs, labels, ignore_index=-1, reduction="mean")
    np.testing.assert_allclose(mean, wanted[1:].mean(), rtol=1e-13)


@pytest.mark.parametrize("name", ["brier_score", "expected_calibration_error"])
def test_what_is_no_probability_gives_nan(name):
    score = getattr(sj, name)
    labels = jnp.array([0, 1])
    for rows in (
        [[9.0, 1.0], [3.0, 7.0]],
        [[-0.1, -2.3], [-0.7, -0.7]],
        [[1.1, 0.0], [0.5, 0.5]],
    ):
        assert np.isnan(score(jnp.array(rows), labels)).any()
        ignored = jnp.full(2, -1)
        assert (score(jnp.array(rows), ignored, ignore_index=-1) == 0).all()
    assert np.isfinite(score(jnp.array([[1.0001, -1e-4], [0.5, 0.5]]), labels)).all()


def test_brier_score_of_what_does_not_count():
    probs, labels = jnp.array([[0.5, 0.5], [NAN, 1.0]]), jnp.array([0, -1])
    score = lambda p: sj.brier_score(p, labels, ignore_index=-1, reduction="sum")
    value, slope = jax.value_and_grad(score)(probs)
    assert value == 0.5
    chex.assert_trees_all_equal(slope, jnp.array([[-1.0, 1.0], [0.0, 0.0]]))
    assert np.isnan(sj.brier_score(probs[0], jnp.array(2)))


# Ensembles.


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_ensembles(space):
    logits = 30 * np.random.default_rng(7).standard_normal((3, 4, 5))
    logits[0, 1, 2] = logits[2, 3] = -INF  # One class of a member, and a whole member.
    wanted = oracles.ensemble_log_probs(logits, space=space)
    if space == "logit":  # No class of the last slice is kept by all.
        wanted[3] = -INF
    assert_close(sj.ensemble_log_probs(logits, space=space), wanted, rtol=8 * eps("float64"))
    turned = np.moveaxis(logits, 0, 2)
    found = sj.ensemble_log_probs(turned, axis=1, member_axis=2, space=space)
    np.testing.assert_allclose(found, sj.ensemble_log_probs(logits, space=space), rtol=1e-14)


def test_likely_and_unlikely_classes_keep_their_digits():
    logits = jnp.array([[0.0, -800.0], [0.0, -900.0]])
    found = sj.ensemble_log_probs(logits)
    np.testing.assert_allclose(found[1], -800 - np.log(2), rtol=1e-15)
    logits = np.array([[20.0, 0.0], [21.0, 0.0]])
    wanted = oracles.ensemble_log_probs(logits)
    assert_close(sj.ensemble_log_probs(logits), wanted, rtol=8 * eps("float64"))


def test_huge_logits_have_a_mean():
    logits = jnp.array([[3e38, 3.2e38]] * 2, "float32")
    found = sj.ensemble_log_probs(logits, space="logit")
    np.testing.assert_allclose(found, [-2e37, 0], rtol=1e-5)


# Sets.

KINDS = [("threshold", {}), ("aps", {}), ("raps", {"penalty": 0.05, "num_free": 2})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_thresholds_and_sets(kind, options):
    logits, labels = examples(8, num=19)
    for level in (0.5, 0.9, 0.95, 0.96):
        found = sj.conformal_threshold(logits, labels, level=level, kind=kind, **options)
        wanted = oracles.conformal_threshold(logits, labels, level=level, kind=kind, **options)
        np.testing.assert_allclose(found, float(wanted), rtol=1e-12)
        assert np.isinf(found) == (level > 0.95)
    limit = oracles.conformal_threshold(logits, labels, level=0.8, kind=kind, **options)
    limit = float(limit) * (1 + 1e-9)
    wanted = oracles.conformity(logits, kind, **options) <= limit
    found = sj.prediction_sets(logits, limit, kind=kind, **options)
    np.testing.assert_array_equal(found, wanted)
    found = sj.prediction_sets(logits.T, limit, kind=kind, axis=0, **options)
    np.testing.assert_array_equal(found, wanted.T)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_sets_hold_the_label_as_often_as_promised(kind, options):
    """On average over 400 draws of 40 examples and 40 new ones, each within 4 deviations."""
    level, covered, num = 0.8, [], 40

    @jax.jit
    def coverage(logits, labels):
        limit = sj.conformal_threshold(
            logits[:num], labels[:num], level=level, kind=kind, **options
        )
        sets = sj.prediction_sets(logits[num:], limit, kind=kind, **options)
        return jnp.mean(jnp.take_along_axis(sets, labels[num:, None], 1))

    for seed in range(400):
        covered.append(coverage(*examples(seed, num=2 * num)))
    mean, error = np.mean(covered), np.std(covered) / 20
    assert mean > level - 4 * error
    assert mean < level + 1 / (num + 1) + 4 * error + (0.2 if kind != "threshold" else 0)


def test_what_sets_never_hold():
    logits = jnp.array([[0.0, 1.0, -INF], [NAN, 0.0, 1.0]])
    for kind, _ in KINDS:
        found = sj.prediction_sets(logits, INF, kind=kind)
        chex.assert_trees_all_equal(
            found, jnp.array([[True, True, False], [False, False, False]])
        )
        assert not sj.prediction_sets(logits, NAN, kind=kind).any()


def test_sets_of_the_highest_threshold_hold_all():
    logits = jax.random.normal(jax.random.key(0), (1000, 50), "float32")
    assert sj.prediction_sets(logits, 1.0, kind="aps").all()


def test_a_penalty_of_infinity_leaves_the_free_places():
    logits = 2 * jax.random.normal(jax.random.key(0), (30, 10))
    given = {"kind": "raps", "penalty": INF, "num_free": 2}
    assert (sj.prediction_sets(logits, 2.0, **given).sum(-1) == 2).all()
    assert sj.conformal_threshold(logits, jnp.argmax(logits, -1), **given) <= 1
    assert np.isnan(
        sj.conformal_threshold(logits, jnp.zeros(30, int), kind="raps", penalty=jnp.array(-1.0))
    )


def test_a_dropped_label_is_in_no_set():
    logits = jnp.array([[0.0, 1.0, -INF]] * 9)
    for kind, options in KINDS:
        found = sj.conformal_threshold(logits, jnp.full(9, 2), level=0.5, kind=kind, **options)
        assert found == INF


def test_rows_that_do_not_count_reach_no_threshold():
    logits, labels = examples(9, num=9)
    wanted = sj.conformal_threshold(logits, labels, level=0.7)
    more = np.concatenate([logits, [[NAN] * 5]])
    found = sj.conformal_threshold(more, np.append(labels, -1), level=0.7, ignore_index=-1)
    assert found == wanted
    assert np.isnan(sj.conformal_threshold(more, np.append(labels, 0), level=0.7))
    assert np.isnan(sj.conformal_threshold(logits, np.append(labels[:-1], 5), level=0.7))


def test_the_place_of_the_threshold_is_exact():
    """Also where the rounding of (N + 1) times the level moves it."""
    exact = lambda num, mille: -(-mille * (num + 1) // 1000)
    cases = [*itertools.product((9, 19, 49, 99, 199), range(10, 1000, 10)), (100979, 999)]
    moved = [(n, m) for n, m in cases if math.ceil((n + 1) * (m / 1000)) != exact(n, m)]
    assert len(moved) > 10
    for num, mille in [*moved, *cases[::50]]:
        ladder = jnp.linspace(-9, 9, num, dtype="float32")
        logits = jnp.stack([ladder, jnp.zeros(num, "float32")], -1)
        labels = jnp.zeros(num, jnp.int32)
        found = sj.conformal_threshold(logits, labels, level=mille / 1000)
        scores = np.sort(-sj.log_softmax(logits)[:, 0])
        place = exact(num, mille)
        wanted = scores[place - 1] if place <= num else INF
        assert found == wanted, (num, mille)


# The energy.


def test_energy():
    logits, _ = examples(10)
    found = sj.energy_score(logits, temperature=0.5)
    np.testing.assert_allclose(found, -0.5 * sj.logsumexp(logits / 0.5, axis=-1), rtol=1e-14)
    assert sj.energy_score(jnp.full(3, -INF)) == INF


# Errors.


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, y: sj.fit_temperature(z, y, groups=y), "`num_groups`"),
        (lambda z, y: sj.fit_temperature(z, y[:1]), "`labels`"),
        (lambda z, y: sj.fit_temperature(z, y, groups=z, num_groups=2), "`groups`"),
        (lambda z, y: sj.reliability(z, y, bins="equal"), "`bins`"),
        (lambda z, y: sj.reliability(z, y, num_bins=0), "`num_bins`"),
        (lambda z, y: sj.brier_score(z, y, reduction="all"), "`reduction`"),
        (lambda z, y: sj.ensemble_log_probs(z, space="log"), "`space`"),
        (lambda z, y: sj.ensemble_log_probs(z, axis=0), "`member_axis`"),
        (lambda z, y: sj.conformal_threshold(z, y, level=1.0), "`level`"),
        (lambda z, y: sj.conformal_threshold(z, y, kind="lac"), "`kind`"),
        (lambda z, y: sj.conformal_threshold(z, y, penalty=0.1), "`penalty`"),
        (lambda z, y: sj.prediction_sets(z, 0.5, num_free=2), "`num_free`"),
        (lambda z, y: sj.prediction_sets(z, jnp.zeros(7)), "`threshold`"),
        (lambda z, y: sj.energy_score(z, temperature=0.0), "`temperature`"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
