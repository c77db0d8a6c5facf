"""No option changes the dtype of a result: with 64-bit on, float32 stays float32."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.catalogue import CATALOGUE

KEY = jax.random.key(0)
LABELS = jnp.array([0, 1])
PUBLIC = sorted(sj.__all__)

# They take no float array, or give no float.
NO_FLOATS = {"alibi_slopes", "check_labels", "explain_attention"}
NO_FLOATS |= {"gumbel", "prediction_sets", "sample"}
NO_FLOATS |= {"zigzag_permutation", "inverse_zigzag_permutation"}

# Values of options; all others are 0.5.
CLASSES = np.array([0.5, 1.0, 0.75])
VALUES = {
    "adjustment": CLASSES,
    "alpha": 1.5,
    ("sigmoid_focal_loss", "alpha"): 0.25,
    "class_weights": CLASSES,
    "penalty": 1.2,
    "head_bias": CLASSES,
    "teacher_bias": CLASSES,
    ("linear_cross_entropy", "bias"): CLASSES,
    ("linear_distillation_loss", "bias"): CLASSES,
    ("linear_jensen_shannon_divergence", "bias"): CLASSES,
    ("linear_statistics", "bias"): CLASSES,
    ("sampled_cross_entropy", "bias"): CLASSES,
    ("score_function", "baseline"): np.array([[0.5], [0.1]]),
}
NOT_FLOATS = {"where", "example_where", "mask", "labels", "positions", "normalizer", "groups"}
OTHERS = {"ignore_index": -1, "num_samples": 2, "num_segments": 2, "dropout_key": KEY}


def arguments(dtype):
    """The arrays of a call of each function, without its options."""
    z = jnp.asarray(np.cos(np.arange(6.0)).reshape(2, 3).astype(dtype))
    w, q = z[jnp.array([0, 1, 0])], z[:, None]
    pages = q[None], q[None], q[None], jnp.array([[0]]), jnp.array([2])
    return dict.fromkeys(PUBLIC, (z,)) | {
        "actor_critic_value": (z, z),
        "adaptive_log_softmax": (z, w, [(z, w[:, :2])], LABELS),
        "attention": (q, q, q),
        "bellman_target": (z, z, z),
        "class_balanced_weights": (z[0] + 2,),
        "clipped_surrogate_loss": (z, LABELS),
        **dict.fromkeys(("brier_score", "expected_calibration_error"), (jnp.abs(z), LABELS)),
        **dict.fromkeys(("fit_temperature", "conformal_threshold"), (z, LABELS)),
        "reliability": (jnp.abs(z), LABELS),
        "cross_entropy": (z, LABELS),
        "distillation_loss": (z, z),
        "entmax_loss": (z, LABELS),
        "focal_loss": (z, LABELS),
        "gumbel_given_argmax": (KEY, z, LABELS),
        "gumbel_softmax": (KEY, z),
        "info_nce": (z, z),
        "jensen_shannon_divergence": (z, z),
        "kl_divergence": (z, z),
        "linear_cross_entropy": (z, w, LABELS),
        "linear_distillation_loss": (z, w, z, w),
        "linear_jensen_shannon_divergence": (z, w, z, w),
        "linear_statistics": (z, w, LABELS),
        "log_prob": (z, LABELS),
        "logit_adjustment": (z[0] + 2,),
        "mean_loss": (z[:, 0], LABELS),
        "merge_attention": (z, z[:, 0]),
        "paged_attention": pages,
        "policy_gradient_loss": (z, LABELS),
        "policy_log_prob": (z, LABELS),
        "qk_norm": (q, q),
        "ranking_log_prob": (z[0], LABELS),
        "rao_blackwell_gumbel_softmax": (KEY, z),
        "reinmax": (KEY, z),
        "relaxed_log_density": (z, z),
        "repetition_penalty": (z[0], LABELS),
        "sample_without_replacement": (KEY, z, 2),
        "sampled_cross_entropy": (KEY, z, w, LABELS),
        "scalable_queries": (q, LABELS),
        "score_function": (z, z),
        "segment_logsumexp": (z, LABELS),
        "segment_softmax": (z, LABELS),
        "select_action": (KEY, z),
        "siglip_loss": (z, z),
        "soft_cross_entropy": (z, jnp.abs(z)),
        "sparsemax_loss": (z, LABELS),
        "straight_through": (z, z),
        "weighted_subset": (KEY, z, 2),
    }


def options(name, given):
    """The options that are floats, each with whether it must be given."""
    parameters = list(inspect.signature(getattr(sj, name)).parameters.values())[given:]
    return {
        p.name: p.default is p.empty
        for p in parameters
        if "ArrayLike" in p.annotation and p.name not in NOT_FLOATS
    }


def kinds(name, option):
    """A value of an option, as a Python number if it is one, and as arrays."""
    value = np.asarray(VALUES.get((name, option), VALUES.get(option, 0.5)))
    arrays = [jnp.asarray(value, dtype) for dtype in ("float32", "float64")]
    return [arrays[0] if value.ndim else float(value), *arrays]


def dtypes(name, args, **given):
    """The dtypes of the floats of a result."""
    fn = getattr(sj, name)
    names = inspect.signature(fn).parameters
    others = {key: value for key, value in OTHERS.items() if key in names}
    if name == "conformal_threshold":
        others["kind"] = "raps"  # The others refuse a penalty.
    out = jax.eval_shape(lambda: fn(*args, **others, **given))
    return [x.dtype for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]


def check(name, dtype, choices):
    """The dtypes of the result stay when the options of each choice are given."""
    args = arguments(dtype)[name]
    found = options(name, len(args))
    required = {option: kinds(name, option)[0] for option, needed in found.items() if needed}
    expected = dtypes(name, args, **required)
    if dtype != "bfloat16":  # Some results are float32 then, and some bfloat16.
        assert set(expected) == {jnp.dtype(dtype)}
    for chosen in choices(found):
        for values in zip(*(kinds(name, option) for option in chosen), strict=True):
            given = required | dict(zip(chosen, values, strict=True))
            assert dtypes(name, args, **given) == expected, given


def test_the_functions_are_those_of_the_catalogue():
    assert {entry.name for entry in CATALOGUE} <= set(PUBLIC) - NO_FLOATS
    assert set(PUBLIC) > NO_FLOATS


every_function = pytest.mark.parametrize("name", [n for n in PUBLIC if n not in NO_FLOATS])


@every_function
def test_options_do_not_change_float32(name):
    """All options at once: as Python numbers, float32 and float64."""
    check(name, "float32", lambda found: [tuple(found)])


@pytest.mark.slow
@every_function
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_no_option_changes_the_dtype(name, dtype):
    """Each option alone."""
    check(name, dtype, lambda found: [(option,) for option in found])


def test_a_number_among_the_operands():
    """The docstring promises the widest dtype, to which a Python number adds nothing."""
    rewards, values = jnp.ones(3, "float32"), jnp.ones(3, "float32")
    assert sj.bellman_target(rewards, 0.9, values).dtype == jnp.float32
    assert sj.bellman_target(1, 0.9, values).dtype == jnp.float32
