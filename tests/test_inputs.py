"""What is wrong is refused at once, by an error that names the argument."""

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
        sj.cross_entropy(Z, jnp.zeros(len(Z), int), reduction="mean")
    with pytest.raises(TypeError, match="`values` must be an array or a number, got function"):
        sj.score_function(lambda x: x, Z)
    with pytest.raises(TypeError, match="`soft_cross_entropy`"):
        sj.cross_entropy(Z, Z)


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


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="where"):
        jax.eval_shape(lambda z: sj.softmax(z, where=jnp.ones(3, bool)), Z)
