"""Tests of the branches that accelerators take, run on the CPU."""

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
def large(monkeypatch):
    """Treats small arrays as large ones."""
    monkeypatch.setattr(_accelerators, "LARGE", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=["cuda", "tpu"])
def as_accelerators(monkeypatch, request, large):
    """Takes the branch of that platform wherever branches differ."""

    def chosen(*args, default, **branches):
        return branches.get(request.param, default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", chosen)


def peak_and_rest(x, temperature=None):
    return jax.jit(lambda x: _accelerators.peak_and_rest(x, (1,), temperature))(x)


def errors_in_roundings(x):
    """The largest error of 1 + rest, in half units in the last place."""
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
    short_rows = x.reshape(-1, 10) if shape[1] % 10 == 0 else x
    assert errors_in_roundings(short_rows) <= 20


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
    ("row", "temperature", "rest"),
    [
        ([2.0, 1.0, 2.0], 0.0, 1),
        ([2.0, 1.0, 2.0], -0.0, 1),
        ([-1.5e-38, -1.0], 0.0, 0),
        ([2.0, 1.0, 2.0, -HUGE], INF, 3),
        ([2.0, 1.0, 2.0], 0.5, 1 + np.exp(-2)),
        ([2.0, 1.0, 2.0], 1e-30, 1),
        ([2.0, 1.0, 2.0], 1e30, 2),
        ([2.0, 1.0, 2.0], NAN, NAN),
        ([2.0, 1.0, 2.0], -1.0, NAN),
        ([2.0, 2.0], -1.0, NAN),
        ([2.0], -1.0, NAN),
    ],
)
def test_temperatures_of_the_online_sum(row, temperature, rest):
    x = jnp.array([[*row, -INF]], jnp.float32)
    _, found = peak_and_rest(x, jnp.full((1, 1), temperature, jnp.float32))
    assert_close(found, np.array([[rest]]), rtol=4 * eps("float32"))


def test_entries_whose_difference_overflows():
    assert peak_and_rest(jnp.array([[HUGE, -HUGE]], jnp.float32)) == (HUGE, 0)
    temperature = jnp.full((1, 1), HUGE / 2, jnp.float32)
    assert peak_and_rest(jnp.array([[HUGE, -HUGE]], jnp.float32), temperature) == (HUGE, 0)


# JAX before 0.12 differentiates such sums by themselves where the reverse of a scan is
# differentiated again.

TIES = [[1.0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0.5, 1, -INF, -INF], [-INF] * 7]


@pytest.mark.parametrize("rows", ["drawn", "ties"])
@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)])
def test_the_online_sum_differentiates_by_itself(rows, argnums):
    x = jnp.array(TIES) if rows == "ties" else jnp.asarray(draw(0, (3, 7))[0])
    fixed = x, jnp.array([[0.5], [1.0], [2.0]])
    moved = tuple(fixed[i] for i in argnums)
    along = tuple(jnp.asarray(draw(1, x.shape)[0]) for x in moved)

    def online(x, temperature):
        _, rest = _accelerators.peak_and_rest(x, (1,), temperature)
        return jnp.log1p(rest)

    def plain(x, temperature):
        peak = lax.stop_gradient(jnp.max(x, 1, keepdims=True))
        kept = jnp.where(x == -INF, 0, x - jnp.where(peak == -INF, 0, peak))
        weights = jnp.where(x == -INF, 0, jnp.exp(kept / temperature))
        total = jnp.sum(weights, 1, keepdims=True)
        return jnp.log(jnp.where(total == 0, 1, total))

    def derivatives(f):
        def total(*moved):
            args = {**dict(enumerate(fixed)), **dict(zip(argnums, moved, strict=True))}
            return jnp.sum(jnp.sin(f(args[0], args[1])))

        grad = jax.grad(total, tuple(range(len(moved))))
        twice = jax.grad(lambda *moved: sum(map(jnp.vdot, grad(*moved), along)))(*moved)
        return jax.jvp(total, moved, along), grad(*moved), twice

    found, wanted = (jax.jit(derivatives, static_argnums=0)(f) for f in (online, plain))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "soft_value", "policy_entropy"])
def test_a_reversed_scan_with_a_temperature_is_differentiated_again(name):
    act = lambda x: jnp.sum(jnp.sin(getattr(sj, name)(x, temperature=0.7)))
    step = lambda total, x: (total + act(x), None)
    scanned = lambda xs: jax.lax.scan(step, 0.0, xs)[0]
    xs, v = (jnp.asarray(draw(seed, (2, 5))[0]) for seed in (0, 1))
    twice = lambda f: jax.grad(lambda xs: jnp.vdot(jax.grad(f)(xs), v))(xs)
    looped = lambda xs: sum(act(x) for x in xs)
    assert_close(twice(scanned), twice(looped), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("as_accelerators")
@pytest.mark.parametrize("as_accelerators", ["tpu"], indirect=True)
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
    single = mine(z.astype("float32"))
    assert_close(single, found, rtol=1e-5, atol=1e-5)
