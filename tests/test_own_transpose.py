"""A linear map with its own transpose: all modes, with stubs in place of a vendor's kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

from softjax._own_transpose import linear_map
from tests.helpers import assert_close

CALLS = []


def kernel(function):
    """A function that, like a vendor's kernel, has no derivative."""

    @jax.custom_jvp
    def run(*args):
        CALLS.append(function.__name__)
        return function(*args)

    @run.defjvp
    def refuse(primals, tangents):
        raise AssertionError("a kernel is differentiated")

    return run


def plain(q, k, v):
    """Attention and its log-sum-exp, [n, t, d]."""
    scores = jnp.einsum("ntd,nsd->nts", q, k)
    lse = jax.nn.logsumexp(scores, -1)
    return jnp.einsum("nts,nsd->ntd", jnp.exp(scores - lse[..., None]), v), lse


@kernel
def forward(q, k, v):
    return plain(q, k, v)


def tangent(residuals, dots):
    CALLS.append("tangent")
    q, k, v, out, lse = residuals
    zeros = map(jnp.zeros_like, (q, k, v))
    dq, dk, dv = (z if dot is None else dot for z, dot in zip(zeros, dots, strict=True))
    weights = jnp.exp(jnp.einsum("ntd,nsd->nts", q, k) - lse[..., None])
    moved = jnp.einsum("ntd,nsd->nts", dq, k) + jnp.einsum("ntd,nsd->nts", q, dk)
    mean = jnp.sum(weights * moved, -1)
    sums = jnp.einsum("nts,nsd->ntd", weights * moved, v)
    sums += jnp.einsum("nts,nsd->ntd", weights, dv)
    return sums - mean[..., None] * out, mean


@kernel
def backward(q, k, v, out, lse, out_bar, lse_bar):
    weights = jnp.exp(jnp.einsum("ntd,nsd->nts", q, k) - lse[..., None])
    moved = jnp.einsum("ntd,nsd->nts", out_bar, v)
    moved = weights * (moved - (jnp.sum(out_bar * out, -1) - lse_bar)[..., None])
    return (
        jnp.einsum("nts,nsd->ntd", moved, k),
        jnp.einsum("nts,ntd->nsd", moved, q),
        jnp.einsum("nts,ntd->nsd", weights, out_bar),
    )


def attention(backward=backward):
    @jax.custom_jvp
    def attend(q, k, v):
        return forward(q, k, v)

    @functools.partial(attend.defjvp, symbolic_zeros=True)
    def rule(primals, dots):
        out = attend(*primals)
        dots = [None if isinstance(dot, SymbolicZero) else dot for dot in dots]

        def transpose(residuals, bars):
            found = backward(*residuals, *bars)
            return [g if dot is not None else None for g, dot in zip(found, dots, strict=True)]

        return out, tuple(linear_map(tangent, transpose, out, (*primals, *out), dots))

    return attend


attend = attention()
RNG = np.random.default_rng(0)
SHAPES = ((2, 3, 2), (2, 4, 2), (2, 4, 2))
ARGS = tuple(jnp.asarray(RNG.standard_normal(shape)) for shape in SHAPES)
DOTS = tuple(jnp.asarray(RNG.standard_normal(shape)) for shape in SHAPES)
MORE = tuple(jnp.stack([x, x + 0.1]) for x in ARGS)
ALL = (0, 1, 2)


def loss(f):
    def of(*args):
        out, lse = f(*args)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2) / 10

    return of


def gradient(f):
    return jax.grad(loss(f), ALL)


def product(f, *args):
    """Forward over reverse."""
    return jax.jvp(gradient(f), args, DOTS)[1]


def twice_reversed(f, *args):
    inner = lambda *args: sum(map(jnp.vdot, gradient(f)(*args), DOTS))
    return jax.grad(inner, ALL)(*args)


def scaled(f):
    q, k, v = ARGS
    return lambda a: loss(f)(q * a[0], k * a[1], v)


def layers(f, q, k, v):
    return lax.scan(lambda x, _: (f(x, k, v)[0], None), q, None, 3)[0]


def descent(f, q, k, v):
    step = lambda x: x - 0.1 * jax.grad(loss(f))(x, k, v)
    return lax.scan(lambda x, _: (step(x), None), q, None, 3)[0]


def third(f, *args):
    return jax.jvp(lambda *a: jax.jvp(gradient(f), a, DOTS)[1], args, DOTS)[1]


def pushed(f, *args):
    return jax.jvp(f, args, DOTS)[1]


def transposed(f, q, k, v):
    still = jnp.zeros_like(k)
    push = lambda dot: jax.jvp(f, (q, k, v), (dot, still, still))[1]
    return jax.linear_transpose(push, q)((DOTS[0], DOTS[0][..., 0]))


def in_the_tangent(f, *args):
    norm = lambda dot: jnp.sum(jax.jvp(f, args, (dot, *DOTS[1:]))[1][0] ** 2)
    return jax.grad(norm)(DOTS[0])


def of_tangents(f, *args):
    push = lambda dot: jax.jvp(f, args, (dot, *DOTS[1:]))[1]
    return jax.vmap(push)(jnp.stack([DOTS[0], 2 * DOTS[0]]))


def sharded(mode):
    def run(f, *args):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("x")
        call = lambda *args: mode(f, *args)
        return jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec)(*args)

    return run


def of_sharded(f, *args):
    total = lambda *args: jnp.sum(sharded(lambda f, *args: f(*args)[0])(f, *args))
    return jax.grad(total, ALL)(*args)


# Each is computed for both attentions, at (q, k, v), and the results must agree.
CHECKS = {
    "value": lambda f, *a: f(*a),
    "jvp": pushed,
    "linearize": lambda f, *a: jax.linearize(f, *a)[1](*DOTS),
    "gradient": lambda f, *a: gradient(f)(*a),
    "gradient in queries and values": lambda f, *a: jax.grad(loss(f), (0, 2))(*a),
    "gradient in keys": lambda f, *a: jax.grad(loss(f), 1)(*a),
    "gradient of one result": lambda f, *a: jax.grad(lambda q: jnp.sum(f(q, *a[1:])[0]))(a[0]),
    "linear_transpose": transposed,
    "gradient in the tangent": in_the_tangent,
    "forward over reverse": product,
    "reverse over forward": lambda f, *a: jax.grad(
        lambda *a: jax.jvp(loss(f), a, DOTS)[1], ALL
    )(*a),
    "reverse over reverse": twice_reversed,
    "gradient of the other result": lambda f, *a: jax.grad(
        lambda k: jnp.sum(f(a[0], k, a[2])[1])
    )(a[1]),
    "forward over forward": lambda f, *a: jax.jvp(lambda *a: pushed(f, *a), a, DOTS)[1],
    "third order": third,
    "jacfwd": lambda f, *a: jax.jacfwd(scaled(f))(jnp.ones(2)),
    "jacrev of jacfwd": lambda f, *a: jax.jacrev(jax.jacfwd(scaled(f)))(jnp.ones(2)),
    "jacfwd of jacrev": lambda f, *a: jax.jacfwd(jax.jacrev(scaled(f)))(jnp.ones(2)),
    "remat": lambda f, *a: jax.grad(jax.checkpoint(loss(f)), ALL)(*a),
    "scan of gradients": descent,
    "gradient of a scan": lambda f, *a: jax.grad(lambda *a: jnp.sum(layers(f, *a)), ALL)(*a),
    "vmap of gradient": lambda f, *a: jax.vmap(gradient(f))(*MORE),
    "vmap of gradient in queries": lambda f, *a: jax.vmap(gradient(f), (0, None, None))(
        MORE[0], *a[1:]
    ),
    "vmap of tangents": of_tangents,
    "vmap of forward over reverse": lambda f, *a: jax.vmap(functools.partial(product, f))(
        *MORE
    ),
    "shard_map of gradient": sharded(lambda f, *a: gradient(f)(*a)),
    "shard_map of jvp": sharded(lambda f, *a: jax.jvp(f, a, a)[1]),
    "shard_map of forward over reverse": sharded(lambda f, *a: jax.jvp(gradient(f), a, a)[1]),
    "gradient of shard_map": of_sharded,
}


SLOW = (
    *("third order", "jacrev of jacfwd", "jacfwd of jacrev", "forward over forward"),
    *("vmap of forward over reverse", "shard_map of forward over reverse"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CHECKS],
)
def test_every_mode(name):
    if "shard_map" in name and jax.device_count() < 2:
        pytest.skip("needs two devices")
    check = CHECKS[name]
    run = lambda *args: (check(attend, *args), check(plain, *args))
    found, expected = map(jax.tree.leaves, jax.jit(run)(*ARGS))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def calls(function, *args):
    CALLS.clear()
    jax.make_jaxpr(function)(*args)
    return set(CALLS)


def test_each_program_serves_its_mode():
    """The tangent's own transpose plays no part in the gradient, as a wrong one shows."""
    assert calls(attend, *ARGS) == {"forward"}
    twice = attention(lambda *args: jax.tree.map(lambda x: 2 * x, backward(*args)))
    run = jax.jit(
        lambda *args: [(gradient(f)(*args), pushed(f, *args)) for f in (twice, plain)]
    )
    (bars, dots), (plain_bars, plain_dots) = run(*ARGS)
    for one, other in zip(bars, plain_bars, strict=True):
        assert_close(one, 2 * other, rtol=0, atol=1e-12)
    for one, other in zip(dots, plain_dots, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)
