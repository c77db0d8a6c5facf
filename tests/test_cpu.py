"""Sums in parts: the same as those of whole slices, in every mode, in little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from softjax import _cpu
from tests import oracles
from tests.helpers import INF, NAN, assert_close, draw, eps, ulp, wide

# Entry by entry; parts with a rest, and without; slices along two axes.
LARGE = [(16384, 10), (5000, 31), (140, 1003), (2, 100257), (30, 20, 300)]
SMALL = [(5,), (3, 31), (2, 70), (2, 2, 35)]


def axes_of(shape):
    return (1, 2) if len(shape) == 3 else (len(shape) - 1,)


def special(shape, dtype):
    """Logits with ties in one part and in two, confident rows, and all that may be dropped."""
    z = draw(0, shape, scale=3.0, dtype=dtype)[0]
    rows = z.reshape(shape[0], -1)
    length = rows.shape[1]
    rows[0, : length // 2] = -INF
    rows[1, [0, 1, length - 1]] = rows[1].max() + 1
    rows[2 % shape[0]] = np.minimum(rows[2 % shape[0]], -40)
    rows[2 % shape[0], length // 3] = 20
    return rows.reshape(shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", LARGE)
def test_value(shape, dtype):
    z, axes = special(shape, dtype), axes_of(shape)
    flat = z.reshape(shape[0], -1)
    probs = oracles.fast_softmax(flat).reshape(shape)
    row = np.asarray(oracles.fast_logsumexp(flat)).reshape(shape[:1] + (1,) * len(axes))
    kept = z != -INF
    got = sj.softmax(z, axis=axes)
    assert got.dtype == dtype
    assert_close(np.where(kept, got, 0), np.where(kept, probs, 0), rtol=4 * eps(dtype))
    log_probs = np.asarray(sj.log_softmax(z, axis=axes))
    # The oracle's own difference of two is off where a row is confident: the third is.
    usual = np.arange(shape[0]) != 2 % shape[0]
    wanted = np.where(kept, wide(z) - row, -INF)[usual]
    assert_close(log_probs[usual], wanted, rtol=4 * eps(dtype), atol=8 * float(ulp(4, dtype)))
    total = np.asarray(sj.logsumexp(z, axis=axes, keepdims=True))
    assert np.max(np.abs(wide(total) - row) / ulp(np.maximum(abs(row), 8), dtype)) <= 2


@pytest.mark.parametrize("shape", [(4096, 10), (70, 1003)])
def test_a_confident_row_keeps_its_digits(shape):
    z = np.full(shape, -30.0, np.float32)
    z[:, 3] = 20
    got = sj.log_softmax(z)[:, 3]
    wanted = -np.log1p((shape[1] - 1) * np.exp(np.float64(-50)))
    assert_close(got, np.full(shape[0], wanted), rtol=4 * eps("float32"))


def test_many_parts_of_a_confident_row():
    """Thousands of sums of parts, all rounded the same way, are not a running sum."""
    z = np.full((1, 200000), -90.0)
    z[:, -1] = 0
    wanted = np.log1p((z.size - 1) * np.exp(np.longdouble(-90)))
    assert_close(sj.logsumexp(z, axis=-1), [wanted], rtol=2 * eps("float64"))


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (100000, 0)])
def test_slices_without_entries(name, shape):
    assert getattr(sj, name)(jnp.zeros(shape)).shape == shape
    assert sj.top_k_filter(jnp.zeros(shape), 1).shape == shape


@pytest.mark.parametrize("shape", [(4096, 10), (70, 1003)])
def test_edges(shape):
    """Each kind of row, among others, is what it is alone."""
    z, keep = draw(1, shape)
    z[0], keep[1] = -INF, False
    z[2, 4], z[3, 4], keep[3, 4] = NAN, NAN, False
    z[4, [2, 7]] = INF
    z[5, 5], z[6] = -INF, 0.25
    for fn in (sj.softmax, sj.log_softmax):
        got = fn(z, where=keep)
        for i in range(8):
            alone = fn(z[i : i + 1], where=keep[i : i + 1])[0]
            assert_close(got[i], alone, rtol=4 * eps("float64"), atol=4 * eps("float64"))


def test_every_kind_of_slice_among_others():
    """Each kind of row, among others, is what it is alone, where the weights are written."""
    largest = float(np.finfo("float32").max)
    z, keep = draw(8, (130, 300), dtype="float32")
    z[0], keep[1] = -INF, False
    z[2, [4, 9, 10]], keep[2, 5:9] = [NAN, -INF, INF], False
    z[3, 4], keep[3, 4] = NAN, False
    z[4, [2, 7]], z[4, 3], keep[4, [2, 7]] = INF, largest, True
    z[5, 5], z[6], z[7], z[8] = -INF, 0.25, largest, -largest
    z[9, :2], z[10, :2], z[11, 3] = [largest, -largest], [1e38, -3e38], -largest
    z[12], z[13] = z[12] - 1e30, z[13] * 1e-40
    keep[7:14] = True
    for sink in (None, 1.0):
        call = functools.partial(sj.softmax, sink=sink)
        got = np.asarray(call(z, where=keep))
        for i in range(20):
            alone = call(z[i : i + 1], where=keep[i : i + 1])[0]
            assert_close(got[i], alone, rtol=6 * eps("float32"), atol=0)
        assert (got[~keep] == 0).all()


def rows_with_a_nan():
    """Rows of which each ends with a dropped entry, and an option."""
    lowest = np.finfo("float32").min
    rows = np.zeros((5, 300), np.float32)
    rows[0], rows[1] = -INF, lowest
    rows[1:, 2], rows[2:, 3], rows[:, 5], rows[:, -1] = 0, [1, 5000, INF], NAN, -INF
    return np.tile(rows, (30, 1))


@pytest.mark.parametrize("temperature", [1.0, 0.0, 1e-39, 0.5, INF])
def test_a_nan_outlasts_all_else(temperature):
    """As in small arrays, whatever XLA's maximum makes of it."""
    z = jnp.asarray(rows_with_a_nan())
    kept = np.asarray(z) != -INF
    for fn in (sj.softmax, sj.log_softmax, sj.sparsemax, sj.entmax15, sj.entmax):
        got = np.asarray(fn(z, temperature=temperature))
        np.testing.assert_array_equal(np.isnan(got), kept)
    assert np.isnan(sj.soft_value(z, temperature=temperature)).all()


def test_a_nan_outlasts_a_reduction():
    z = jnp.asarray(rows_with_a_nan())
    for row in (
        *(fn(z, axis=-1) for fn in (sj.logsumexp, sj.logmeanexp, sj.entropy)),
        *(sj.mellowmax(z, omega=omega) for omega in (-INF, -1.0, 0.0, 1.0, INF)),
        sj.kl_divergence(z, jnp.zeros_like(z)),
        sj.kl_divergence(jnp.zeros_like(z), z),
    ):
        assert np.isnan(row).all()


@pytest.mark.parametrize("shape", [(4096, 10), (70, 1003)])
def test_equal_entries_share_the_mass(shape):
    z = jnp.full(shape, 0.7, jnp.float32)
    assert_close(sj.softmax(z), np.full(shape, 1 / shape[1]), rtol=eps("float32"))
    assert_close(
        sj.logsumexp(z, axis=-1),
        np.full(shape[:1], np.float32(0.7) + np.log(shape[1])),
        rtol=2 * eps("float32"),
    )


@pytest.fixture
def large(monkeypatch):
    """Treats small arrays as large ones."""
    monkeypatch.setattr(_cpu, "LARGE", 0)
    monkeypatch.setattr(_cpu, "FEW", 2)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("axis", [0, 1])
def test_every_entry_of_every_length_counts_once(axis):
    def sum_of(x):
        return _cpu.sum_of_terms(jnp.multiply, (x,), (jnp.full((1, 1), 2.0),), (axis,))

    slope = jax.grad(lambda x: jnp.sum(sum_of(x)))
    for length in (*range(1, 12), 16, 39):
        rows = np.tile(2.0 ** np.arange(length), (3, 1))
        x = jnp.asarray(np.moveaxis(rows, 1, axis))
        total, at_zero = jax.jit(lambda x: (sum_of(x), slope(0 * x)))(x)
        assert (total == 2 * (2.0**length - 1)).all()
        assert (at_zero == 2).all()
        count = _cpu.sum_of_terms(jnp.positive, (jnp.ones_like(x, jnp.int32),), (), (axis,))
        assert jnp.issubdtype(count.dtype, jnp.integer)
        assert (count == length).all()


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.usefixtures("large")
def test_derivatives(name, shape):
    z, keep = draw(2, shape)
    z[..., 1] = z.max()  # Ties in other parts too, at which nothing is kinked.
    z[..., -1] = z.max()
    fn = jax.jit(
        lambda z, t: jnp.where(
            keep, getattr(sj, name)(z, axis=axes_of(shape), where=keep, temperature=t), 0
        )
    )
    args = jnp.asarray(z), jnp.asarray(0.7)
    check_grads(fn, args, order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.usefixtures("large")
def test_plain_differentiation(shape):
    """Where JAX forgets the rule, in the reverse of a scan that is differentiated again."""
    z = jnp.asarray(draw(3, shape)[0])
    z = z.at[..., 0].set(z.max()).at[..., -1].set(z.max())
    loss = lambda z: jnp.sum(jnp.sin(3 * sj.log_softmax(z, axis=axes_of(shape))))
    scanned = lambda z: jax.lax.scan(lambda c, _: (c + loss(z), None), 0.0, length=1)[0]
    wanted = jax.jacrev(jax.grad(loss))(z)
    assert_close(jax.jacrev(jax.grad(scanned))(z), wanted, rtol=1e-10, atol=1e-12)
    assert_close(jax.jacfwd(jax.grad(scanned))(z), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["vmap", "jvp", "transpose"])
@pytest.mark.usefixtures("large")
def test_transformed(way):
    z, bar = draw(4, (3, 40))[0], draw(5, (3, 40))[0]
    probs = np.asarray(oracles.fast_softmax(z), np.float64)
    slope = probs * (bar - np.sum(probs * bar, -1, keepdims=True))
    z, bar = jnp.asarray(z), jnp.asarray(bar)
    got, wanted = {
        "vmap": lambda: (jax.vmap(sj.softmax)(z), probs),
        "jvp": lambda: (jax.jvp(sj.softmax, (z,), (bar,))[1], slope),
        "transpose": lambda: (jax.vjp(sj.softmax, z)[1](bar)[0], slope),
    }[way]()
    assert_close(got, wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(4096, 1024), (65536, 10)])
def test_terms_are_not_written_out(shape):
    z = jnp.zeros(shape, jnp.float32)
    total = jax.jit(lambda z: sj.logsumexp(z, axis=-1)).lower(z).compile()
    plan = total.memory_analysis()
    # A sum stores a quarter, and a little more of short slices.
    assert plan.temp_size_in_bytes <= (0.45 if shape[1] < 32 else 0.3) * z.nbytes


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_gradient_stores_what_it_remembers(name):
    """A quarter of an array for softmax, which remembers its result alone; two of log_softmax.

    With JAX 0.12, XLA stores one more for softmax.
    """
    z = jnp.zeros((4096, 1024), jnp.float32)
    pull = lambda z, bar: jax.vjp(getattr(sj, name), z)[1](bar)
    plan = jax.jit(pull).lower(z, z).compile().memory_analysis()
    of_softmax = 0.27 if jax.__version_info__ < (0, 12) else 1.27
    assert plan.temp_size_in_bytes <= (of_softmax if name == "softmax" else 2.1) * z.nbytes


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.optimized
def test_passes_share_nothing_that_is_written_out():
    """Each forms its terms anew: two sums store a quarter each, and the gradient one."""
    z = jnp.zeros((4096, 1024), jnp.float32)
    loss = lambda p, q: jnp.sum(sj.kl_divergence(p, q))
    of_gradient = 0.27 if jax.__version_info__ < (0, 12) else 1.27  # XLA stores one more.
    for fn, arrays in ((sj.kl_divergence, 0.52), (jax.grad(loss, (0, 1)), of_gradient)):
        plan = jax.jit(fn).lower(z, z).compile().memory_analysis()
        assert plan.temp_size_in_bytes <= arrays * z.nbytes
