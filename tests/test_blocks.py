"""Arrays a part at a time: the parts make up the whole, however they are taken."""

import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import softjax as sj
from softjax import _cpu
from softjax._scan import scan_blocks
from tests import oracles
from tests.helpers import assert_close, assert_same, draw, eps
from tests.test_sharding import cpu_mesh, mesh


@pytest.mark.parametrize("shape", [(64, 128), (33, 77), (1, 2048)])
def test_slices_that_differ_in_everything(shape):
    """Temperature, sink, mask and edges differ from slice to slice."""
    logits, keep = draw(2, shape)
    logits[0, 1:4] = [-np.inf, np.nan, logits.max() + 3]
    keep[0, 2] = False
    logits[-1, -1] = 40  # A confident row.
    temperature = np.linspace(0.3, 2, shape[0])[:, None]
    sink = np.linspace(-1, 1, shape[0])[:, None]
    options = {"where": jnp.asarray(keep), "temperature": jnp.asarray(temperature)}
    got = jax.jit(lambda z: sj.softmax(z, sink=jnp.asarray(sink), **options))(logits)
    whole = np.concatenate([np.where(keep, logits, -np.inf), sink], -1)
    wanted = oracles.fast_softmax(whole / temperature)[:, :-1]
    assert_close(got, np.asarray(wanted, np.float64), rtol=8 * eps("float64"))


def test_a_sharded_small_array_is_the_same():
    z = jnp.asarray(draw(3, (64, 128))[0])
    spread = jax.device_put(z, NamedSharding(mesh(rows=2), PartitionSpec("rows")))
    # The gradient has the exponential of a rounded logarithm, which is about -5.
    gradient = jax.grad(lambda z: jnp.sum(sj.log_softmax(z)[:, 0]))
    for fn, limit in ((sj.softmax, 4), (gradient, 16)):
        assert_close(jax.jit(fn)(spread), jax.jit(fn)(z), rtol=limit * eps("float64"))


def test_rows_that_are_spread_over_an_explicit_mesh():
    explicit = cpu_mesh(jax.sharding.AxisType.Explicit, rows=2)
    z, temperature = jnp.asarray(draw(5, (32, 64))[0]), jnp.full((32, 1), 0.5)
    labels = jnp.arange(32)
    wanted = (
        sj.softmax(z, temperature=temperature),
        sj.cross_entropy(z, labels),
        sj.cross_entropy(z, labels, label_smoothing=0.1),
    )
    with jax.set_mesh(explicit):
        put = lambda x, *axes: jax.device_put(x, NamedSharding(explicit, PartitionSpec(*axes)))
        rows, labels = put(temperature, "rows"), put(labels, "rows")
        got = (
            sj.softmax(put(z), temperature=rows),
            sj.cross_entropy(put(z), labels),
            sj.cross_entropy(put(z, "rows"), labels, label_smoothing=0.1),
        )
    for one, other in zip(got, wanted, strict=True):
        assert_close(np.asarray(one), np.asarray(other), rtol=8 * eps("float64"))


def test_a_loss_of_labels_is_exported_for_any_batch():
    (batch,) = jax.export.symbolic_shape("b")
    loss = jax.jit(lambda z: sj.cross_entropy(z, jnp.zeros(z.shape[0], int)))
    exported = jax.export.export(loss)(jax.ShapeDtypeStruct((batch, 64), jnp.float32))
    z = jnp.asarray(draw(6, (30, 64), dtype="float32")[0])
    assert_close(exported.call(z), loss(z), rtol=8 * eps("float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_a_scan_in_reverse_is_differentiated_again(outer, dtype):
    """Where JAX before 0.12 forgets the rule, what is left differentiates rightly."""
    z = jnp.asarray(draw(4, (12, 150), dtype=dtype)[0])

    def loss(z):
        step = lambda total, _: (total + jnp.sum(sj.softmax(z * (1 + total)) ** 2), None)
        return jax.lax.scan(step, jnp.zeros((), dtype), None, length=2)[0]

    def plain(z):
        total = jnp.zeros((), dtype)
        for _ in range(2):
            total += jnp.sum(jax.nn.softmax(z * (1 + total)) ** 2)
        return total

    twice = lambda fn: outer(lambda z: jnp.sum(jnp.sin(jax.grad(fn)(z))))(z)
    atol = 1e-9 if dtype == "float64" else 1e-5
    assert_close(twice(loss), twice(plain), rtol=atol, atol=atol)


# Several blocks and slices over, by rows and by entries; along one axis, the first, and two.
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5000, 4), -1), ((9, 2300), 0), ((3, 2100, 4), (0, 2)), ((7, 100_000), -1)],
)
@pytest.mark.parametrize("fn", [sj.sparsemax, sj.entmax15], ids=lambda fn: fn.__name__)
def test_slices_a_few_at_a_time_are_as_each_alone(fn, shape, axis):
    axes = (axis,) if isinstance(axis, int) else axis
    size = math.prod(shape[i] for i in axes)
    assert math.prod(shape) > _cpu.UNCUT
    assert math.prod(shape) > size * min(_cpu.ROWS, _cpu.BLOCK // size)
    z, keep = draw(3, shape, scale=2.0)
    counts = [1 if i in {a % len(shape) for a in axes} else n for i, n in enumerate(shape)]
    temperature = np.random.default_rng(4).uniform(0.3, 3, counts)
    call = lambda z, keep, t, axis=-1: fn(z, axis=axis, where=keep, temperature=t)
    last = range(-len(axes), 0)
    flat = lambda x: jnp.moveaxis(jnp.asarray(x), axes, last).reshape(-1, size)
    each = jax.lax.map(
        lambda args: call(*args),
        (flat(z), flat(keep), flat(np.broadcast_to(temperature, shape))[:, :1]),
    )
    got = jax.jit(lambda *args: call(*args, axis=axis))(z, keep, jnp.asarray(temperature))
    assert_close(flat(got), each, rtol=0, atol=4 * eps("float64"))
    np.testing.assert_array_equal(flat(got) > 0, each > 0)


def test_blocks_and_a_tail_make_up_the_whole():
    x = jnp.arange(23)
    visit = lambda total, first, part: (total + jnp.sum(part), part + first)
    for size in (1, 4, 22, 23, 24):
        total, out = scan_blocks(visit, jnp.array(0), x, size)
        assert total == jnp.sum(x)
        assert_same(out, x + jnp.arange(23) // size * size)
