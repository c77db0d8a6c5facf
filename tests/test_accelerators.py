"""What accelerators compute in another way, run here as the CPU would run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import softjax as sj
from softjax import _accelerators
from tests.catalogue import CATALOGUE
from tests.helpers import INF, NAN, assert_close, draw, eps, wide

HUGE = float(np.finfo(np.float32).max)
NAMES = ("softmax", "log_softmax", "logsumexp", "entropy", "kl_divergence", "soft_value")
NAMES += ("distillation_loss", "policy_entropy", "cross_entropy", "log_prob")


@pytest.fixture
def as_accelerators(monkeypatch):
    """Takes what a platform other than the CPU takes, wherever the two differ."""
    other = lambda *args, default, **_: default(*args)
    monkeypatch.setattr(lax, "platform_dependent", other)
    jax.clear_caches()
    yield
    jax.clear_caches()


def peak_and_rest(x, temperature=None):
    return jax.jit(lambda x: _accelerators.peak_and_rest(x, (1,), temperature))(x)


def errors_in_roundings(x):
    """Those of the total, in units of half its spacing."""
    peak, rest = peak_and_rest(x)
    exact = np.exp(wide(x) - wide(x).max(1, keepdims=True)).sum(1, keepdims=True) - 1
    np.testing.assert_array_equal(peak, x.max(1, keepdims=True))
    return np.max(abs(wide(rest) - exact) / (1 + exact)) / (eps(x.dtype) / 2)


@pytest.mark.parametrize("order", ["ascending", "descending", "drawn"])
@pytest.mark.parametrize("shape", [(3, 7), (4, 1000), (2, 40000), (1, 10**6)])
def test_the_online_sum(shape, order):
    """A CPU adds up one by one, which is the worst order of all."""
    x = draw(0, shape, scale=5.0, dtype="float32")[0]
    if order != "drawn":
        x = np.sort(x, 1)
    if order == "descending":
        x = x[:, ::-1].copy()
    assert errors_in_roundings(x) <= max(4, shape[1] / 16)
    halves = x.reshape(-1, 10) if shape[1] % 10 == 0 else x
    assert errors_in_roundings(halves) <= 20


@pytest.mark.parametrize("temperature", [None, 1.0, INF])
@pytest.mark.parametrize(
    ("row", "peak", "rest"),
    [
        ([-INF, -INF], -INF, 0),
        ([], -INF, 0),
        ([-INF, 2, 2, -INF, 2], 2, 2),
        ([INF, 0, INF, -INF], INF, 1),
        ([NAN, 0, 1], NAN, NAN),
        ([0, 1, NAN], NAN, NAN),
        ([-INF, NAN, -INF], NAN, NAN),
        ([INF, NAN], NAN, NAN),
    ],
)
def test_edges_of_the_online_sum(row, peak, rest, temperature):
    x = jnp.array([row], jnp.float32)
    if temperature is not None:
        temperature = jnp.full((1, 1), temperature, jnp.float32)
    found = peak_and_rest(x, temperature)
    assert_close(jnp.concatenate(found, 1), np.array([[peak, rest]]), rtol=0)


@pytest.mark.parametrize(
    ("temperature", "rest"),
    [(0.0, 1), (INF, 3), (NAN, NAN), (-1.0, NAN), (0.5, 1 + np.exp(-2)), (1e-30, 1), (1e30, 2)],
)
def test_temperatures_of_the_online_sum(temperature, rest):
    x = jnp.array([[2.0, -INF, 1.0, 2.0, -HUGE]], jnp.float32)
    x = x if temperature == INF else x.at[0, 4].set(-INF)
    _, found = peak_and_rest(x, jnp.full((1, 1), temperature, jnp.float32))
    assert_close(found, np.array([[rest]]), rtol=4 * eps("float32"))


def test_huge_numbers_are_apart():
    assert peak_and_rest(jnp.array([[HUGE, -HUGE]], jnp.float32)) == (HUGE, 0)
    half = jnp.full((1, 1), HUGE / 2, jnp.float32)
    _, rest = peak_and_rest(jnp.array([[HUGE, -HUGE]], jnp.float32), half)
    assert_close(rest, [[np.exp(-4)]], rtol=4 * eps("float32"))


def test_the_online_sum_differentiates_by_itself():
    """JAX before 0.12 needs that where the reverse of a scan is differentiated again."""
    x, temperature = jnp.asarray(draw(0, (3, 7))[0]), jnp.array([[0.5], [1.0], [2.0]])

    def total(x, temperature):
        peak, rest = _accelerators.peak_and_rest(x, (1,), temperature)
        return jnp.sum(peak / temperature + jnp.log1p(rest))

    check_grads(jax.jit(total), (x, temperature), 2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("as_accelerators")
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            entry, id=entry.title, marks=[] if entry.name in NAMES else [pytest.mark.slow]
        )
        for entry in CATALOGUE
    ],
)
def test_every_function(entry):
    floats, others = entry.arguments()
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(entry.call(*floats, *others), entry.oracle(*floats, *others), **tolerance)
    check_grads(lambda *floats: entry.call(*floats, *others), floats, 1, modes=("rev",))


@pytest.mark.usefixtures("as_accelerators")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 3), 0), ((4, 5, 6), (0, 2)), ((2, 20000), 1)]
)
def test_split_slices(name, shape, axis):
    z, keep = draw(1, shape, scale=3.0, dtype="float64")
    v = jnp.asarray(draw(2, shape)[0])
    mine = lambda z: getattr(sj, name)(z, axis=axis, where=keep)
    peer = lambda z: getattr(jax.nn, name)(jnp.where(keep, z, -INF), axis)
    found, wanted = mine(z), peer(z)
    assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    weigh = lambda f: lambda z: jnp.vdot(jnp.where(keep, f(z), 0), v)
    grad, wanted = jax.grad(weigh(mine))(z), jax.grad(weigh(peer))(z)
    assert_close(grad, jnp.where(keep, wanted, 0), rtol=1e-10, atol=1e-13)
    half = mine(z.astype("float32"))
    assert_close(half, found, rtol=1e-5, atol=1e-5)
