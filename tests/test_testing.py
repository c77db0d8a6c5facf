"""`check_map` passes maps that keep their promises, and names the promise that others break."""

import functools

import jax
import jax.numpy as jnp
import pytest

import softjax as sj
from experiments.my_map import expm1max
from softjax.testing import check_map


@pytest.fixture(autouse=True)
def as_users_run():
    """Under JAX's own promotions, which users' maps may use."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(sj.softmax, id="softmax"),
        slow(sj.sparsemax, id="sparsemax"),
        slow(sj.entmax15, id="entmax15"),
        slow(functools.partial(sj.entmax, alpha=1.2), id="entmax"),
        slow(functools.partial(sj.soft_top_k, k=1), id="soft_top_k"),
        slow(expm1max, id="expm1max"),
    ],
)
def test_maps_that_keep_their_promises(fn):
    check_map(fn)


def plain(z, where=None, centre=True):
    """A softmax that keeps all promises, in few lines."""
    keep = (z != -jnp.inf) & (True if where is None else where)
    wide = jnp.where(keep, z, 0).astype(jnp.float32)
    if centre:
        peak = jnp.max(wide, -1, keepdims=True, where=keep, initial=-jnp.inf)
        wide = jnp.where(keep, wide - jax.lax.stop_gradient(peak), 0)
    weights = jnp.where(keep, jnp.exp(wide), 0)
    total = weights.sum(-1, keepdims=True)
    return (weights / jnp.where(total == 0, 1, total)).astype(z.dtype)


def first_of_ties(z, where=None):
    """Tied logits share unevenly: half of all mass goes to the first of the largest."""
    probs = plain(z, where)
    chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), z.shape[-1], dtype=z.dtype)
    return jnp.where(probs.sum(-1, keepdims=True) > 0, (probs + chosen) / 2, 0)


def leaves_traces(z, where=None):
    """Dropped entries are only made unlikely."""
    keep = (z != -jnp.inf) & (True if where is None else where)
    low = jnp.asarray(-9.0, z.dtype)
    return plain(jnp.where(keep, z, low)) * jnp.any(keep, -1, keepdims=True)


def spoils_the_gradient(z, where=None):
    """The values are right, but a NaN that is masked comes back in the gradient."""
    keep = (z != -jnp.inf) & (True if where is None else where)
    weights = jnp.where(
        keep, jnp.exp(z - jnp.max(z, -1, keepdims=True, where=keep, initial=0)), 0
    )
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def keeps_what_is_empty(z, where=None):
    """A slice that keeps nothing becomes uniform."""
    probs = plain(z, where)
    return jnp.where(probs.sum(-1, keepdims=True) == 0, 1 / z.shape[-1], probs).astype(z.dtype)


@jax.custom_jvp
def half_slope(probs):
    return probs


half_slope.defjvp(lambda primals, tangents: (primals[0], tangents[0] / 2))


@jax.custom_jvp
def double_slope(probs):
    return probs


double_slope.defjvp(lambda primals, tangents: (primals[0], tangents[0] * 2))


def steep_under_a_mask(z, where=None):
    """The slope is wrong only where entries are masked."""
    return plain(z) if where is None else double_slope(plain(z, where))


def steep_beside_a_dropped_entry(z, where=None):
    """The slope is wrong only in slices that drop an entry by -inf."""
    probs = plain(z, where)
    return jnp.where(jnp.any(z == -jnp.inf, -1, keepdims=True), double_slope(probs), probs)


def flat_in_half_precision(z, where=None):
    """Only float32 has a slope."""
    probs = plain(z, where)
    return probs if z.dtype == jnp.float32 else jax.lax.stop_gradient(probs)


def on_the_host(z, where=None):
    """Not traceable: it asks for a number."""
    return plain(z, where) * float(jnp.sum(plain(z, where)) > -1)


def over_the_batch(z, where=None):
    """Sees how many slices there are."""
    return plain(z * (1.0 if z.ndim == 1 else 0.9), where)


BROKEN = {
    "sum": (lambda z, where=None: 1.01 * plain(z, where), "simplex", "do not sum to 1"),
    "negative": (
        lambda z, where=None: 1.5 * plain(z, where) - 0.5 / z.shape[-1],
        "simplex",
        "negative",
    ),
    "shape": (lambda z, where=None: plain(z, where)[..., :-1], "simplex", "became"),
    "jit": (on_the_host, "jit", "float"),
    "slices": (over_the_batch, "vmap", "another result"),
    "order": (
        lambda z, where=None: plain(z + jnp.arange(z.shape[-1], dtype=z.dtype), where),
        "permutation",
        "did not permute",
    ),
    "ties": (first_of_ties, "ties", "equal"),
    "no where": (lambda z, where=None: plain(z), "masks", "where over NaN"),
    "traces": (leaves_traces, "masks", "a dropped entry has a probability"),
    "empty": (keeps_what_is_empty, "masks (all)", "keeps nothing"),
    "gradient": (spoils_the_gradient, "masks", "gradient"),
    "overflow": (functools.partial(plain, centre=False), "saturation", "not finite"),
    "float32": (
        lambda z, where=None: plain(z.astype(jnp.float32), where),
        "dtypes (bfloat16)",
        "became",
    ),
    "rounding": (
        lambda z, where=None: plain(
            z if z.dtype == jnp.float32 else jnp.round(z * 8) / 8, where
        ),
        "dtypes",
        "not that of float32",
    ),
    "masked slope": (steep_under_a_mask, "masks (where", "kept logits alone"),
    "slope beside -inf": (steep_beside_a_dropped_entry, "masks (-inf)", "kept logits alone"),
    "flat halves": (flat_in_half_precision, "dtypes", "gradient is not that of float32"),
    "no slope": (
        lambda z, where=None: jax.lax.stop_gradient(plain(z, where)),
        "derivatives",
        "finite difference",
    ),
    "half a slope": (
        lambda z, where=None: half_slope(plain(z, where)),
        "derivatives",
        "finite difference",
    ),
}


def test_the_plain_map_passes():
    check_map(plain, num_classes=5, seed=3)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_maps_are_refused(name):
    """The message names the promise, and shows the logits."""
    fn, promise, problem = BROKEN[name]
    with pytest.raises(AssertionError) as caught:
        check_map(fn)
    message = str(caught.value)
    assert message.startswith(promise), message
    assert problem in message
    assert "logits: [" in message


def test_modes_that_differ_are_refused():
    """A rule for one mode alone is an error of JAX itself; two rules that differ are not."""

    @jax.custom_jvp
    def fn(z):
        return plain(z)

    @fn.defjvp
    def _(primals, tangents):
        (z,), (dot,) = primals, tangents
        return jax.jvp(plain, (z,), (dot,))[0], forwards(z, dot)

    # The transpose of this linear map is stated, and it is stated wrongly.
    def forwards(z, dot):
        true = lambda _, t: jax.jvp(plain, (z,), (t,))[1]
        return jax.custom_derivatives.linear_call(
            true, lambda _, bar: 2 * true(None, bar), None, dot
        )

    def masked(z, where=None):
        return (
            fn(jnp.where((z != -jnp.inf) & where, z, -jnp.inf)) if where is not None else fn(z)
        )

    with pytest.raises(AssertionError, match="forward and reverse mode differ"):
        check_map(masked)


def test_too_few_classes():
    with pytest.raises(ValueError, match="`num_classes` must be at least 3, got 2"):
        check_map(sj.softmax, num_classes=2)
