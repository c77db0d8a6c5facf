"""What is wrong is refused at once, by an error that names the argument."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.helpers import assert_close, assert_same

Z = jnp.arange(12.0).reshape(3, 4)
IDS = jnp.array([0, 1, 1])

# Functions of logits that take an axis, each as a call with the rest of its arguments.
WITH_AXIS = {
    "logsumexp": sj.logsumexp,
    "logmeanexp": sj.logmeanexp,
    "mellowmax": lambda z, **o: sj.mellowmax(z, omega=1.0, **o),
    "softmax": sj.softmax,
    "log_softmax": sj.log_softmax,
    "sparsemax": sj.sparsemax,
    "entmax15": sj.entmax15,
    "entmax": sj.entmax,
    "soft_top_k": lambda z, **o: sj.soft_top_k(z, 1, **o),
    "entropy": sj.entropy,
    "kl_divergence": lambda z, **o: sj.kl_divergence(z, z, **o),
    "scalable_scores": sj.scalable_scores,
}
FILTERS = {
    "top_k_filter": lambda z, **o: sj.top_k_filter(z, 1, **o),
    "top_p_filter": lambda z, **o: sj.top_p_filter(z, 0.5, **o),
    "min_p_filter": lambda z, **o: sj.min_p_filter(z, 0.5, **o),
    "typical_filter": lambda z, **o: sj.typical_filter(z, 0.5, **o),
}
WITH_TEMPERATURE = ("softmax", "log_softmax", "sparsemax", "entmax15", "entmax", "soft_top_k")


@pytest.mark.parametrize("name", [*WITH_AXIS, *FILTERS])
@pytest.mark.parametrize("axis", [2, -3, (0, 2), (0, 0), (0, -2), 1.0, "0"])
def test_axis(name, axis):
    fn = (WITH_AXIS | FILTERS)[name]
    with pytest.raises((ValueError, TypeError), match="axis"):
        fn(Z, axis=axis)


@pytest.mark.parametrize("name", WITH_AXIS)
def test_where_that_does_not_fit(name):
    for shape in [(3,), (4, 3), (1, 3, 4), (2, 4)]:
        with pytest.raises(ValueError, match="where"):
            WITH_AXIS[name](Z, where=jnp.ones(shape, bool))


@pytest.mark.parametrize("name", WITH_AXIS)
def test_lists_are_refused(name):
    with pytest.raises(TypeError, match="must be an array or a number, got list"):
        WITH_AXIS[name](Z.tolist())
    with pytest.raises(TypeError, match="`where` must be an array or a number, got list"):
        WITH_AXIS[name](Z, where=[True] * 4)


def test_lists_of_integers_are_refused():
    with pytest.raises(TypeError, match="`labels` must be an array"):
        sj.log_prob(Z, [0, 1, 2])
    with pytest.raises(TypeError, match="`segment_ids` must be an array"):
        sj.segment_softmax(Z, [0, 1, 1], num_segments=2)


@pytest.mark.parametrize("name", WITH_AXIS)
def test_where_that_is_not_bool(name):
    for mask in (jnp.ones((3, 4)), jnp.ones((3, 4), int)):
        with pytest.raises(TypeError, match="where"):
            WITH_AXIS[name](Z, where=mask)


@pytest.mark.parametrize("name", [*WITH_AXIS, *FILTERS])
def test_logits_that_are_not_real(name):
    argument = {"kl_divergence": "p_logits", "mellowmax": "values"}.get(name, "logits")
    with pytest.raises(TypeError, match=argument):
        (WITH_AXIS | FILTERS)[name](Z.astype(complex))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperature(name):
    fn = WITH_AXIS[name]
    # It must not vary along what it normalises, nor have a shape of its own.
    for shape in [(3, 4), (1, 4), (4,), (2, 1), (1, 3, 1)]:
        with pytest.raises(ValueError, match="temperature"):
            fn(Z, temperature=jnp.ones(shape))
    with pytest.raises(ValueError, match="temperature"):
        fn(Z, temperature=jnp.ones((3, 1)), axis=0)
    with pytest.raises(ValueError, match="temperature"):
        fn(Z, temperature=jnp.ones((3, 1)), axis=None)
    with pytest.raises(TypeError, match="temperature"):
        fn(Z, temperature=1j)
    for shape in [(3, 1), (1, 1), (1,), ()]:
        assert_same(fn(Z, temperature=jnp.ones(shape)), fn(Z))


def test_other_options_that_do_not_fit():
    wrong = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="sink"):
        sj.softmax(Z, sink=wrong)
    with pytest.raises(ValueError, match="sink"):
        sj.log_softmax(Z, sink=jnp.ones(3))
    with pytest.raises(ValueError, match="alpha"):
        sj.entmax(Z, wrong)
    with pytest.raises(ValueError, match="`k`"):
        sj.soft_top_k(Z, wrong)
    with pytest.raises(ValueError, match="weights"):
        sj.logsumexp(Z, weights=jnp.ones(3))
    with pytest.raises(ValueError, match="kind"):
        sj.soft_top_k(Z, 1, kind="soft")
    with pytest.raises(ValueError, match="`k`"):
        sj.top_k_filter(Z, wrong.astype(int))
    with pytest.raises(ValueError, match="`p`"):
        sj.top_p_filter(Z, wrong)
    with pytest.raises(ValueError, match="min_p"):
        sj.min_p_filter(Z, wrong)
    with pytest.raises(ValueError, match="mass"):
        sj.typical_filter(Z, wrong)
    with pytest.raises(ValueError, match="scale"):
        sj.scalable_scores(Z, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="omega"):
        sj.mellowmax(Z, omega=jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="cap"):
        sj.soft_cap(Z, jnp.ones((2, 1)))


def test_labels():
    with pytest.raises(ValueError, match="labels"):
        sj.log_prob(Z, jnp.zeros(4, int))
    with pytest.raises(ValueError, match="labels"):
        sj.log_prob(Z, jnp.zeros((3, 1), int))
    for labels in (jnp.zeros(3), jnp.zeros(3, bool)):
        with pytest.raises(TypeError, match="labels"):
            sj.log_prob(Z, labels)
    with pytest.raises((ValueError, TypeError), match="axis"):
        sj.log_prob(Z, jnp.zeros((), int), axis=2)


def test_kl_divergence_of_other_shapes():
    with pytest.raises(ValueError, match="q_logits"):
        sj.kl_divergence(Z, Z[:, :3])


def test_segments():
    with pytest.raises(ValueError, match="segment_ids"):
        sj.segment_softmax(Z, jnp.zeros(4, int), num_segments=2)
    with pytest.raises(ValueError, match="segment_ids"):
        sj.segment_softmax(Z, jnp.zeros((3, 4), int), num_segments=2)
    with pytest.raises(TypeError, match="segment_ids"):
        sj.segment_softmax(Z, jnp.zeros(3), num_segments=2)
    for number in (-1, 2.5):
        with pytest.raises((ValueError, TypeError), match="num_segments"):
            sj.segment_softmax(Z, IDS, num_segments=number)
    with pytest.raises(ValueError, match="logits"):
        sj.segment_softmax(jnp.asarray(1.0), jnp.asarray(0), num_segments=2)
    with pytest.raises(ValueError, match="temperature"):
        sj.segment_softmax(Z, IDS, num_segments=2, temperature=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="where"):
        sj.segment_softmax(Z, IDS, num_segments=2, where=jnp.ones(3, bool))


def test_options_are_keywords():
    for fn in (sj.logsumexp, sj.softmax, sj.log_softmax, sj.sparsemax, sj.entropy):
        with pytest.raises(TypeError):
            fn(Z, 0)
    with pytest.raises(TypeError):
        sj.softmax(Z, temprature=1.0)


def test_what_is_no_argument():
    with pytest.raises(TypeError, match=r"cross_entropy\(\) got an unexpected"):
        sj.cross_entropy(Z, jnp.zeros(len(Z), int), reduce="mean")
    with pytest.raises(TypeError, match="`values` must be an array or a number, got function"):
        sj.score_function(lambda x: x, Z)
    with pytest.raises(TypeError, match="`soft_cross_entropy`"):
        sj.cross_entropy(Z, Z)
    for call in (
        lambda: sj.cross_entropy(Z, jnp.zeros(3, bool)),
        lambda: sj.cross_entropy(Z, jnp.zeros(3)),
        lambda: sj.fit_temperature(Z, Z),
    ):
        with pytest.raises(TypeError, match=r"`labels` must be integers, got \w+\.(\n|$)"):
            call()


def test_arguments_by_place_that_are_names():
    """As other libraries have them: the error says which there are."""
    wanted = r"softmax\(\) takes logits by position, got 2 .* axis, where, temperature, sink"
    with pytest.raises(TypeError, match=wanted):
        sj.softmax(jnp.zeros(3), -1)
    with pytest.raises(TypeError, match="'dim'; it takes logits, axis, where"):
        sj.softmax(jnp.zeros(3), dim=-1)
    with pytest.raises(TypeError, match="'is_causal'; it takes queries, keys, values, mask"):
        sj.attention(*[jnp.zeros((3, 1, 2))] * 3, is_causal=True)


def test_static_arguments_that_are_traced():
    with pytest.raises(TypeError, match=r"`axis` must be known while tracing.*static_argnames"):
        jax.jit(sj.softmax)(jnp.zeros(3), axis=0)


@pytest.mark.parametrize("value", [None, True, np.bool_(False)])
def test_numbers_that_are_none_or_flags(value):
    with pytest.raises(TypeError, match="`temperature` must be a number, got"):
        sj.softmax(jnp.zeros(3), temperature=value)
    with pytest.raises(TypeError, match="`p` must be a number, got"):
        sj.top_p_filter(jnp.zeros(3), value)
    assert sj.softmax(jnp.zeros(3), where=None, sink=None).shape == (3,)


def test_defaults_may_be_given():
    """None too, where it is one."""
    given = {"soft_cap": None, "bias": None, "temperature": 1.0, "label_smoothing": 0.0}
    arrays = jnp.ones((4, 3)), jnp.ones((5, 3)), jnp.arange(4)
    assert sj.linear_cross_entropy(*arrays, **given) == sj.linear_cross_entropy(*arrays)


def test_python_and_numpy_scalars_and_arrays_are_taken():
    assert sj.softmax(3.0, axis=None) == 1.0
    assert sj.logsumexp(2) == 2.0
    for array in (np.asarray(Z), np.asarray(Z).astype(int), np.asarray(Z) > 3):
        out = sj.softmax(array)
        assert out.dtype == jnp.float64
        assert_close(out, sj.softmax(jnp.asarray(array, "float64")), rtol=0)
    twos = (2, 2.0, np.float32(2), np.asarray(2), jnp.asarray(2, "bfloat16"), jnp.asarray(2))
    for temperature in twos:
        assert_same(sj.softmax(Z, temperature=temperature), sj.softmax(Z, temperature=2.0))


def test_a_call_costs_few_steps():
    """Outside of `jit`, every call checks its arguments: Python functions are counted."""
    z, labels, steps = jnp.zeros((2, 3)), jnp.array([0, 1]), []

    def count(frame, event, arg):
        if event == "call":
            steps.append(frame.f_code.co_name)

    for call, limit in (
        (lambda: sj.softmax(z), 6),
        (lambda: sj.softmax(z, axis=-1, temperature=0.5), 9),
        (lambda: sj.cross_entropy(z, labels, ignore_index=-1, label_smoothing=0.1), 16),
    ):
        call()
        steps.clear()
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert "call" in steps
        assert len(steps) <= limit, steps


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="where"):
        jax.eval_shape(lambda z: sj.softmax(z, where=jnp.ones(3, bool)), Z)


# Numbers that are out of range. A Python number is refused; in an array it gives NaN.

ROW, LABEL = jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.array(1)
ONE, HEAD = jnp.ones((1, 3)), jnp.arange(12.0).reshape(4, 3) / 10
OUT_OF_RANGE = {
    "top_k_filter k": (lambda o: sj.top_k_filter(ROW, o), [-1.0]),
    "top_p_filter p": (lambda o: sj.top_p_filter(ROW, o), [-0.5, 1.5]),
    "min_p_filter min_p": (lambda o: sj.min_p_filter(ROW, o), [-0.5, 1.5]),
    "typical_filter mass": (lambda o: sj.typical_filter(ROW, o), [-0.5, 1.5]),
    "epsilon_filter epsilon": (lambda o: sj.epsilon_filter(ROW, o), [-0.5, 1.5]),
    "eta_filter epsilon": (lambda o: sj.eta_filter(ROW, o), [-0.5, 1.5]),
    "top_n_sigma_filter n": (lambda o: sj.top_n_sigma_filter(ROW, o), [-0.5]),
    "cross_entropy label_smoothing": (
        lambda o: sj.cross_entropy(ROW, LABEL, label_smoothing=o),
        [-0.5, 2.0],
    ),
    "cross_entropy z_loss": (lambda o: sj.cross_entropy(ROW, LABEL, z_loss=o), [-0.5]),
    "focal_loss gamma": (lambda o: sj.focal_loss(ROW, LABEL, gamma=o), [-0.5]),
    "sigmoid_focal_loss gamma": (lambda o: sj.sigmoid_focal_loss(ROW, 0, gamma=o), [-0.5]),
    "sigmoid_focal_loss alpha": (lambda o: sj.sigmoid_focal_loss(ROW, 0, alpha=o), [-0.5, 1.5]),
    "linear_cross_entropy label_smoothing": (
        lambda o: sj.linear_cross_entropy(ONE, HEAD, LABEL[None], label_smoothing=o),
        [-0.5, 2.0],
    ),
    "linear_cross_entropy z_loss": (
        lambda o: sj.linear_cross_entropy(ONE, HEAD, LABEL[None], z_loss=o),
        [-0.5],
    ),
    "clipped_surrogate_loss clip": (
        lambda o: sj.clipped_surrogate_loss(ROW, LABEL, -1.0, 1.0, clip=o),
        [-0.2],
    ),
    "repetition_penalty penalty": (
        lambda o: sj.repetition_penalty(ROW, jnp.arange(4), o),
        [-1.0, 0.0],
    ),
    "class_balanced_weights beta": (
        lambda o: sj.class_balanced_weights(jnp.array([1, 2]), beta=o),
        [-0.5, 1.5],
    ),
    "clip_gradient max_norm": (
        lambda o: jax.grad(lambda z: jnp.sum(sj.clip_gradient(z, o) * (z + 2)))(ROW),
        [-0.5],
    ),
    "exponential_temperature initial": (
        lambda o: sj.exponential_temperature(3, initial=o, half_life=1.0),
        [-0.5],
    ),
    "exponential_temperature half_life": (
        lambda o: sj.exponential_temperature(3, initial=1.0, half_life=o),
        [-0.5],
    ),
    "visit_count_temperature counts": (lambda o: sj.visit_count_temperature(ROW, o), [-1.0]),
    "target_entropy_temperature target": (
        lambda o: sj.target_entropy_temperature(ROW, o),
        [-0.5],
    ),
}


@pytest.mark.parametrize("title", OUT_OF_RANGE)
def test_numbers_in_arrays_that_are_out_of_range(title):
    """A NaN is out of every range."""
    call, values = OUT_OF_RANGE[title]
    for value in (np.nan, *values):
        assert jnp.isnan(call(jnp.array(value))).all(), value
    for value in values:
        with pytest.raises(ValueError, match=f"`{title.split()[1]}` must be"):
            call(value)
    assert not jnp.isnan(call(jnp.array(0.5))).any()


def test_filters_with_an_option_that_is_out_of_range_in_one_row():
    """The other rows are untouched, and dropped logits stay dropped."""
    logits = jnp.array([[2.0, -np.inf, 0.0]] * 3)
    for name in ("top_p_filter", "min_p_filter", "typical_filter", "top_k_filter"):
        option = jnp.array([[0.5], [-1.0], [np.nan]])
        out = getattr(sj, name)(logits, option)
        assert_same(out[0], getattr(sj, name)(logits[0], 0.5))
        assert_same(out[1:], jnp.array([[np.nan, -np.inf, np.nan]] * 2))
    out = sj.top_k_filter(logits, jnp.array([[1], [-1], [3]]))
    assert_same(out[1], jnp.array([np.nan, -np.inf, np.nan]))
    assert_same(out[2], logits[2])


def test_negative_class_weights():
    """They give NaN, like every number in an array that is out of its range."""
    bad, labels = jnp.array([1.0, -1.0, 1.0, 1.0]), jnp.array([0, 1, 2])
    losses = sj.cross_entropy(Z, labels, class_weights=bad)
    assert_same(jnp.isnan(losses), labels == 1)
    assert jnp.isnan(sj.mean_loss(jnp.ones(3), labels, class_weights=bad))
    assert jnp.isnan(sj.soft_cross_entropy(Z, jnp.full(4, 0.25), class_weights=bad)).all()
    layer = jnp.ones((3, 2)), jnp.ones((4, 2)), labels
    found = sj.linear_cross_entropy(*layer, class_weights=bad, reduction=None)
    assert_same(jnp.isnan(found), labels == 1)


# Integers that are wider than JAX's.

WIDE = 2**40
F, W = np.ones((2, 3), "float32"), np.ones((4, 3), "float32")
Q = np.ones((2, 1, 3), "float32")
WIDE_LABELS = np.array([1, WIDE])
PAGES, TABLE = Q[None], np.array([[0]])

# Every kind of integer argument, each as a call that is given one number that is too large.
TOO_WIDE = {
    "labels of cross_entropy": ("labels", lambda: sj.cross_entropy(F, WIDE_LABELS)),
    "labels of log_prob": ("labels", lambda: sj.log_prob(F, WIDE_LABELS)),
    "labels of sparsemax_loss": ("labels", lambda: sj.sparsemax_loss(F, WIDE_LABELS)),
    "labels of check_labels": ("labels", lambda: sj.check_labels(WIDE_LABELS, 3)),
    "labels of mean_loss": ("labels", lambda: sj.mean_loss(F[:, 0], WIDE_LABELS)),
    "labels of a layer": ("labels", lambda: sj.linear_cross_entropy(F, W, WIDE_LABELS)),
    "negative labels": ("labels", lambda: sj.cross_entropy(F, np.array([1, -WIDE]))),
    "unsigned labels": ("labels", lambda: sj.cross_entropy(F, WIDE_LABELS.astype("uint64"))),
    "one label": ("labels", lambda: sj.cross_entropy(F[0], np.int64(WIDE))),
    "one label of Python": ("labels", lambda: sj.cross_entropy(F[0], WIDE)),
    "actions": ("actions", lambda: sj.policy_log_prob(F, WIDE_LABELS)),
    "indices": ("indices", lambda: sj.ranking_log_prob(F[0], WIDE_LABELS)),
    "ids": ("segment_ids", lambda: sj.segment_softmax(F[:, 0], WIDE_LABELS, num_segments=2)),
    "tokens": ("tokens", lambda: sj.repetition_penalty(F[0], WIDE_LABELS, 1.2)),
    "k": ("k", lambda: sj.top_k_filter(F, np.array([[1], [WIDE]]))),
    "logits": ("logits", lambda: sj.softmax(WIDE_LABELS)),
    "positions": ("positions", lambda: sj.attention(Q, Q, Q, positions=WIDE_LABELS)),
    "two positions": (
        "positions",
        lambda: sj.attention(Q, Q, Q, positions=(None, WIDE_LABELS)),
    ),
    "a mask": ("mask", lambda: sj.attention(Q, Q, Q, mask=sj.masks.Segments(WIDE_LABELS))),
    "a mask alone": ("Segments", lambda: sj.masks.Segments(WIDE_LABELS).array(2)),
    "lengths": (
        "lengths",
        lambda: sj.paged_attention(PAGES, PAGES, PAGES, TABLE, np.array([WIDE])),
    ),
    "ignore_index": (
        "ignore_index",
        lambda: sj.cross_entropy(F, np.array([0, 1]), ignore_index=np.iinfo(np.int64).min),
    ),
}


@pytest.mark.parametrize("title", TOO_WIDE)
def test_integers_that_jax_cannot_hold(title):
    name, call = TOO_WIDE[title]
    with jax.enable_x64(False), pytest.raises(ValueError, match=f"`{name}"):
        call()


def test_integers_that_jax_can_hold_although_their_dtype_is_wide():
    with jax.enable_x64(False):
        labels = np.array([1, 2**31 - 1])
        losses = sj.cross_entropy(F, labels)
        assert jnp.isfinite(losses[0])
        assert jnp.isnan(losses[1])
        losses = sj.cross_entropy(F, labels, ignore_index=np.int64(2**31 - 1))
        assert losses[1] == 0
    assert jnp.isnan(sj.cross_entropy(F, WIDE_LABELS)[1])


def test_large_python_integers_are_numbers():
    with jax.enable_x64(False):
        for big in (WIDE, np.int64(WIDE), 10**30):
            assert_same(sj.softmax(F, temperature=big), sj.softmax(F, temperature=float(big)))
            assert_same(sj.top_k_filter(F, big), jnp.asarray(F))


def test_arrays_of_no_numbers():
    for array in (np.array([1, None]), np.array(["a", "b"]), np.array([1, 2], object)):
        with pytest.raises(TypeError, match=f"`logits` must hold numbers, got {array.dtype}"):
            sj.softmax(array)
    with pytest.raises(TypeError, match="`logits` must be an array or a number, got set"):
        sj.softmax({1, 2})


# Integers where an int is wanted.


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.asarray, jnp.asarray, jnp.int16])
def test_integers_of_any_kind_are_ints(kind):
    key, labels, flat = jax.random.key(0), np.array([0, 1]), F[:, 0]
    calls = {
        "axis": lambda n: sj.softmax(F, axis=n(1)),
        "axes": lambda n: sj.softmax(F, axis=(n(0), n(1))),
        "num_segments": lambda n: sj.segment_softmax(flat, labels, num_segments=n(4)),
        "k": lambda n: sj.sample_without_replacement(key, F, n(2))[1],
        "num_samples": lambda n: sj.rao_blackwell_gumbel_softmax(key, F, num_samples=n(2)),
        "samples": lambda n: sj.sampled_cross_entropy(key, F, W, labels, num_samples=n(2)),
        "block_size": lambda n: sj.linear_cross_entropy(F, W, labels, block_size=n(2)),
        "blocks": lambda n: sj.attention(Q, Q, Q, block_size=(n(1), n(2))),
        "block": lambda n: sj.attention(Q, Q, Q, block_size=n(1)),
        "num_splits": lambda n: sj.paged_attention(
            PAGES, PAGES, PAGES, TABLE, np.array([1]), num_splits=n(1)
        ),
        "num_heads": lambda n: sj.alibi_slopes(n(8)),
        "num_classes": lambda n: sj.check_labels(labels, n(3)),
        "ignore_index": lambda n: sj.cross_entropy(F, labels, ignore_index=n(1)),
        "ignored": lambda n: sj.mean_loss(flat, labels, ignore_index=n(1)),
        "shape": lambda n: sj.gumbel(key, (n(3),)),
        "one size": lambda n: sj.sample(key, F, shape=n(3)),
    }
    for call in calls.values():
        assert_same(call(kind), call(int))


def test_shapes():
    key = jax.random.key(0)
    for shape in (3, [3], (np.int64(3),), jnp.array(3), np.array([3])):
        assert_same(sj.gumbel(key, shape), sj.gumbel(key, (3,)))
        assert sj.sample(key, F, shape=shape).shape == (3, 2)
    assert_same(sj.softmax(F, axis=np.array([0, 1])), sj.softmax(F, axis=(0, 1)))


def test_flags_of_any_kind_are_flags():
    for flag in (np.bool_(True), jnp.array(True), np.array(True)):
        assert sj.logsumexp(Z, keepdims=flag).shape == (1, 1)


def test_no_integers_where_an_int_is_wanted():
    for value, got in [(jnp.ones(2, int), "ArrayImpl"), (np.ones(2), "ndarray"), ({1}, "set")]:
        with pytest.raises(TypeError, match=f"`axis` must be an int, .* got {got}"):
            sj.softmax(Z, axis=value)
    for value in (2.0, np.float32(2), True, "2"):
        with pytest.raises((TypeError, ValueError), match="`block_size` must be"):
            sj.linear_cross_entropy(F, W, np.array([0, 1]), block_size=value)
        with pytest.raises((TypeError, ValueError), match="`ignore_index` must be an int"):
            sj.cross_entropy(F, np.array([0, 1]), ignore_index=value)
    with pytest.raises(TypeError, match="`k` must be known while tracing"):
        jax.jit(lambda k: sj.weighted_subset(jax.random.key(0), Z, k))(2)


def test_a_dropout_key_that_is_none():
    for key in (0, jnp.ones(2), jnp.zeros((3, 2))):
        with pytest.raises(TypeError, match="`dropout_key` must be a key of"):
            sj.attention(Q, Q, Q, dropout_rate=0.5, dropout_key=key)
    keys = jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match="`dropout_key` must be one key"):
        sj.attention(Q, Q, Q, dropout_rate=0.5, dropout_key=keys)


def test_keys():
    with pytest.raises(TypeError, match=r"`key` must be a key of jax\.random, got dict"):
        sj.sample({"params": jax.random.key(0)}, F)
    with pytest.raises(TypeError, match=r"`key` must be a key of jax\.random, got object"):
        sj.sample(object(), F)
    with pytest.raises(ValueError, match=r"`key` must be a key .*, got uint32 of shape \(3,\)"):
        sj.sample(jnp.zeros(3, "uint32"), F)
    assert sj.sample(jax.random.PRNGKey(0), F).shape == (2,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": Q}, ValueError, "`queries` must be"),
        (
            {"keys": np.ones((3, 2, 1, 3), "float32")},
            ValueError,
            r"`keys` .*\(2,\).*got \(3,\)",
        ),
        (
            {"values": np.ones((1, 2, 1, 3), "float32")},
            ValueError,
            r"`values` must have the batch",
        ),
        (
            {"score": 3.0},
            TypeError,
            r"`score` must be a function of \(scores, index\), got 3\.0",
        ),
        (
            {"score": lambda s, at: s[0]},
            ValueError,
            r"`score` .*\(2, 1, 2, 2\), got \(1, 2, 2\)",
        ),
        (
            {"score": lambda s: s},
            TypeError,
            r"`score` must be a function of \(scores, index\), got one of \(s\)",
        ),
        (
            {"mask": sj.masks.Function(lambda q, k: q >= k)},
            TypeError,
            r"`masks\.Function` must be a function of \(index\), got one of \(q, k\)",
        ),
        (
            {"mask": np.ones((2, 2, 2), bool)}
            | dict.fromkeys(("queries", "keys", "values"), np.ones((2, 2, 5, 3))),
            ValueError,
            r"per sequence is `mask\[\.\.\., None, :, :\]`, \(2, 1, 2, 2\)",
        ),
        (
            {
                "queries": jnp.ones((2, 2, 1, 3), "bfloat16"),
                "keys": np.ones((2, 2, 1, 3), "int8"),
            },
            TypeError,
            "`keys` must have the dtype bfloat16 of `queries`, got int8",
        ),
        (
            {"queries": jnp.ones((2, 2, 1, 3), "float8_e4m3fn"), "keys": np.ones((2, 2, 1, 3))},
            TypeError,
            "float8_e4m3fn of `queries`, which counts as float32, got float64",
        ),
        ({"score": lambda s, at: (s, s)}, ValueError, r"`score` must give .*got tuple"),
        ({"score": lambda s, at: None}, ValueError, r"`score` must give .*got NoneType"),
    ],
)
def test_arguments_of_attention_that_do_not_fit(change, error, message):
    batch = np.stack([Q, Q])
    given = {"queries": batch, "keys": batch, "values": batch} | change
    with pytest.raises(error, match=message):
        sj.attention(**given)


# Objects that stand for arrays.


class Wrapped:
    """The least that JAX takes as an array."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return jnp.asarray(self.array)


def wrappers():
    import equinox as eqx
    from flax import nnx

    class Parameter(eqx.Module):
        raw: jax.Array

        def __jax_array__(self):
            return self.raw

    return {
        "object": Wrapped,
        "nnx.Param": nnx.Param,
        "nnx.Variable": nnx.Variable,
        "equinox": Parameter,
    }


@pytest.mark.parametrize("title", ["object", "nnx.Param", "nnx.Variable", "equinox"])
def test_objects_that_stand_for_arrays(title):
    wrap = wrappers()[title]
    labels, one = jnp.array([0, 1]), jnp.array(1)
    f, w, q = (jnp.asarray(x) for x in (F, W, Q))
    calls = {
        "logits": lambda p: sj.softmax(p(f)),
        "temperature": lambda p: sj.log_softmax(f, temperature=p(jnp.ones((2, 1)))),
        "where": lambda p: sj.softmax(f, where=p(f > 0)),
        "loss": lambda p: sj.cross_entropy(p(f), p(labels), ignore_index=p(one)),
        "layer": lambda p: sj.linear_cross_entropy(p(f), p(w), labels, bias=p(jnp.ones(4))),
        "tails": lambda p: sj.adaptive_log_softmax(f, w, [(p(w[:2]), p(w[:3, :2]))], labels),
        "attention": lambda p: sj.attention(p(q), q, q, sink=p(jnp.ones(1)), scale=p(one)),
        "mask": lambda p: sj.attention(q, q, q, mask=p(jnp.array([[True, False]]))),
        "masks": lambda p: sj.attention(q, q, q, mask=sj.masks.Segments(p(labels))),
        "mask alone": lambda p: sj.masks.Segments(p(labels)).array(2),
        "qk_norm": lambda p: sj.qk_norm(q, q, query_scale=p(jnp.ones(3))),
        "labels": lambda p: sj.check_labels(p(labels), 3),
        "static": lambda p: sj.softmax(f, axis=p(one)),
    }
    for name, call in calls.items():
        assert_same(call(wrap), call(lambda x: x))
        if name != "static":
            jitted = (jax.jit(lambda p=p, call=call: call(p)) for p in (wrap, lambda x: x))
            assert_same(*(call() for call in jitted))


@pytest.mark.parametrize("title", ["nnx.Param", "nnx.Variable", "equinox"])
def test_gradients_of_objects_that_stand_for_arrays(title):
    """They are pytrees, so that JAX differentiates with respect to them."""
    wrap, x = wrappers()[title], jnp.cos(jnp.arange(6.0) ** 2).reshape(2, 3)
    labels, q = jnp.array([0, 1]), x[:, None]
    for loss, z in (
        (lambda z: sj.cross_entropy(z, labels).sum(), x),
        (lambda z: sj.linear_cross_entropy(x, z, labels), x + 1),
        (lambda z: sj.attention(q, q, q, sink=z).sum(), jnp.ones(1)),
        (lambda z: sj.qk_norm(q, q, query_scale=z)[0].sum(), jnp.ones(3)),
    ):
        (got,) = jax.tree.leaves(jax.jit(jax.grad(loss))(wrap(z)))
        assert_close(got, jax.grad(loss)(z), rtol=1e-12)
        assert jnp.abs(got).max() > 1e-3


# Floats and integers of fewer than 16 and 8 bits.

NARROW = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz"]
NARROW += ["float8_e5m2fnuz", "float8_e3m4", "float8_e4m3", "float4_e2m1fn"]


@pytest.mark.parametrize(
    "dtype", [*NARROW[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NARROW[2:])]
)
def test_narrow_floats_give_float32(dtype):
    """Dropped entries are -inf there, which most of these dtypes lack."""
    narrow = jnp.asarray(np.array([[0.5, 1.0, -2.0], [3.0, 1.5, 1.0]], "float32"), dtype)
    wide, keep = narrow.astype("float32"), jnp.array([True, True, False])
    for fn in (
        lambda z: sj.softmax(z, where=keep),
        lambda z: sj.log_softmax(z, where=keep),
        lambda z: sj.top_k_filter(z, 1),
        lambda z: sj.bellman_target(z[0], z[0], z[0]),
        lambda z: sj.attention(z[:, None], z[:, None], z[:, None]),
        lambda z: sj.linear_cross_entropy(z, z, jnp.array([0, 1])),
    ):
        out = fn(narrow)
        assert out.dtype == jnp.float32
        assert_same(out, fn(wide))
    grad = jax.grad(lambda z: sj.log_softmax(z)[0, 0])(narrow)
    assert grad.dtype == narrow.dtype


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_narrow_integers_are_integers(dtype):
    labels = jnp.array([0, 1], dtype)
    assert_same(sj.softmax(labels), sj.softmax(labels.astype("float64")))
    expected = sj.cross_entropy(F, labels.astype("int32"), ignore_index=1)
    assert_same(sj.cross_entropy(F, labels, ignore_index=1), expected)
    with pytest.raises(ValueError, match=f"`ignore_index` must be .* {dtype}"):
        sj.cross_entropy(F, labels, ignore_index=99)


@pytest.mark.parametrize("zero", [0, 0.0, np.float64(0), np.float32(0), np.int64(0)])
def test_an_option_that_is_given_as_its_default_costs_nothing(zero):
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    plain = jax.make_jaxpr(sj.cross_entropy)(logits, labels)
    options = {"label_smoothing": zero, "z_loss": zero}
    given = jax.make_jaxpr(lambda z, y: sj.cross_entropy(z, y, **options))(logits, labels)
    assert str(given) == str(plain)
    one = zero + 1
    plain = jax.make_jaxpr(sj.softmax)(logits)
    given = jax.make_jaxpr(lambda z: sj.softmax(z, temperature=one))(logits)
    assert str(given) == str(plain)
