"""Every public function under every transformation of JAX."""

import functools
import itertools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import softjax as sj
from tests.catalogue import CATALOGUE
from tests.helpers import DTYPES, assert_close, assert_same, eps

# One entry a kind of function by default; the others share what is looked at here.
_KINDS = {"softmax", "sparsemax", "soft_top_k-capped", "segment_softmax", "cross_entropy"}
_marks = {entry: [pytest.mark.slow] if entry.title not in _KINDS else [] for entry in CATALOGUE}
every_entry = pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=m, id=e.title) for e, m in _marks.items()]
)


def _dtypes_of(entry):
    return ("float32", "bfloat16", "float16") if entry.title in _KINDS else ("float32",)


# The half dtypes pass through code that all functions share: one function of a kind will do.
every_dtype = pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        pytest.param(
            entry,
            dtype,
            marks=marks if dtype == "float32" else [pytest.mark.slow],
            id=f"{entry.title}-{dtype}",
        )
        for entry, marks in _marks.items()
        for dtype in _dtypes_of(entry)
    ],
)

# They end in sums of products, which a compiler may fuse, or not, in its own way: their values
# with and without differentiation may differ by a rounding.
FUSED = ("entropy", "cross_entropy-options", "class_balanced_weights", "policy_entropy")
FUSED += ("qk_norm", "scalable_queries", "expected_value", "actor_critic_value")
FUSED += ("clipped_surrogate_loss",)

# Compiled apart, the same function may be fused, and so rounded, in another way.
ROUNDINGS = {"rtol": 32 * eps("float64"), "atol": 32 * eps("float64")}

SPANS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: SPANS.append(event)
)


def traces():
    return [event for event in SPANS if "trace" in event or "compile" in event]


def finite(out):
    """Infinite values are fixed, for a map as for its derivatives: leave them out."""
    return jnp.where(jnp.isfinite(out), out, 0)


def of_floats(entry, others):
    """The function of its float arguments, without its infinite values."""
    return jax.jit(lambda *floats: finite(entry.call(*floats, *others)))


def flat(entry, seed=0):
    """The same as a function from a vector to a vector."""
    floats, others = entry.arguments(seed)
    vector, unravel = ravel_pytree(floats)
    fn = of_floats(entry, others)
    return lambda v: fn(*unravel(v)).reshape(-1), vector, unravel


def stacked(entry, count):
    """`count` argument lists, and the same with the arrays stacked."""
    lists = [sum(entry.arguments(seed), ()) for seed in range(count)]
    return lists, tuple(jnp.stack(arrays) for arrays in zip(*lists, strict=True))


@every_entry
def test_value_is_the_definition(entry):
    for seed, dtype in itertools.product(range(3), DTYPES):
        floats, others = entry.arguments(seed, dtype)
        out = entry.call(*floats, *others)
        assert out.dtype == entry.dtype(dtype)
        # Of numbers of order one: a few roundings, and one more to the dtype.
        unit = eps(out.dtype)
        assert_close(out, entry.oracle(*floats, *others), rtol=4 * unit, atol=4 * unit)


def test_no_effects():
    """JAX calls a program that has one, as a check or a print is, by a slower path."""
    for entry in CATALOGUE:
        floats, others = entry.arguments()
        assert not jax.make_jaxpr(entry.call)(*floats, *others).effects, entry.title


@every_entry
def test_invariants(entry):
    for seed in range(3):
        (logits, *floats), others = entry.arguments(seed)
        logits = jnp.round(logits * 64) / 64  # Shifts by whole numbers are then exact.
        out = entry.call(logits, *floats, *others)
        for name in entry.invariants:
            globals()[f"_check_{name}"](entry, out, logits, floats, others)


def _check_mass(entry, out, logits, floats, others):
    assert_close(jnp.sum(out, -1), np.ones(len(out)), rtol=8 * eps("float64"))
    assert (out >= 0).all()


def _check_shift(entry, out, logits, floats, others):
    for shift in (8.0, -1024.0):
        assert_close(entry.call(logits + shift, *floats, *others), out, **ROUNDINGS)


def _check_permutation(entry, out, logits, floats, others):
    order = jnp.asarray([3, 1, 4, 0, 2])
    permute = lambda a: a[..., order] if a.shape == logits.shape else a
    permuted = entry.call(*map(permute, (logits, *floats, *others)))
    assert_close(permuted, out[..., order], **ROUNDINGS)


def _check_order(entry, out, logits, floats, others):
    """A larger logit never gets a smaller weight."""
    mask = others[0] if others else jnp.ones(logits.shape, bool)
    for row, weights, keep in zip(logits, out, mask, strict=True):
        by_logit = jnp.argsort(row[keep])
        assert (jnp.diff(weights[keep][by_logit]) >= 0).all()


def _check_temperature(entry, out, logits, floats, others):
    """Halving the scores and the temperature changes nothing, not even a rounding."""
    assert_same(entry.call(logits / 2, *(f / 2 for f in floats), *others), out)


@every_entry
def test_integers_become_the_default_float(entry):
    floats, others = entry.arguments()
    whole = jnp.round(4 * floats[0]).astype(int)
    out = entry.call(whole, *floats[1:], *others)
    assert out.dtype == jnp.dtype("float64")
    expected = entry.call(whole.astype(float), *floats[1:], *others)
    assert_close(out, expected, **ROUNDINGS)


@every_entry
def test_jit_and_no_jit(entry):
    arguments = sum(entry.arguments(), ())
    out = entry.call(*arguments)
    assert_close(jax.jit(entry.call)(*arguments), out, **ROUNDINGS)
    with jax.disable_jit():
        plain = entry.call(*arguments)
    assert_close(plain, out, **ROUNDINGS)


@every_entry
def test_a_repeated_shape_is_not_traced_again(entry):
    first, second = (sum(entry.arguments(seed), ()) for seed in (0, 1))
    jax.block_until_ready(entry.call(*first))
    SPANS.clear()
    jax.block_until_ready(entry.call(*second))
    assert traces() == []


def test_the_count_of_traces_sees_a_new_function():
    SPANS.clear()
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert traces() != []


def check_vmap(entry, choices):
    lists, stacks = stacked(entry, 2)
    for batched in choices:
        pick = lambda many, one, b=batched: [
            m if yes else o for m, o, yes in zip(many, one, b, strict=True)
        ]
        in_axes = [0 if yes else None for yes in batched]
        out = jax.vmap(entry.call, in_axes)(*pick(stacks, lists[0]))
        expected = [entry.call(*pick(args, lists[0])) for args in lists]
        assert_close(out, np.stack(expected), **ROUNDINGS)


def count_arguments(entry):
    return sum(map(len, entry.arguments()))


@every_entry
def test_vmap(entry):
    """Over each argument alone, and over all at once."""
    count = count_arguments(entry)
    check_vmap(entry, [*np.eye(count, dtype=bool), (True,) * count][count == 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if count_arguments(e) > 2], ids=lambda e: e.title
)
def test_vmap_over_pairs_of_arguments(entry):
    """Neighbours, and the last with the first."""
    count = count_arguments(entry)
    check_vmap(entry, [np.roll(np.arange(count) < 2, i) for i in range(count)])


@every_entry
def test_vmap_over_the_last_axis(entry):
    lists, stacks = stacked(entry, 3)
    moved = [jnp.moveaxis(a, 0, -1) for a in stacks]
    out = jax.vmap(entry.call, in_axes=-1, out_axes=-1)(*moved)
    expected = np.stack([entry.call(*args) for args in lists], -1)
    assert_close(out, expected, **ROUNDINGS)


@every_entry
def test_nested_vmap(entry):
    lists, stacks = stacked(entry, 6)
    out = jax.vmap(jax.vmap(entry.call))(*(a.reshape(2, 3, *a.shape[1:]) for a in stacks))
    expected = np.stack([entry.call(*args) for args in lists])
    assert_close(out.reshape(expected.shape), expected, **ROUNDINGS)


@every_entry
def test_vmap_of_grad(entry):
    num_floats = len(entry.arguments()[0])
    lists, stacks = stacked(entry, 2)
    loss = lambda *args: jnp.sum(jnp.sin(finite(entry.call(*args))))
    grad = jax.jit(jax.grad(loss, argnums=tuple(range(num_floats))))
    outs = jax.vmap(grad)(*stacks)
    expected = [grad(*args) for args in lists]
    for i, out in enumerate(outs):
        assert_close(out, np.stack([e[i] for e in expected]), **ROUNDINGS)


@every_entry
def test_jacobian_is_that_of_the_definition(entry):
    """Central differences of the oracle: their error is h^2 / 6 times a third derivative."""
    fn, vector, unravel = flat(entry)
    others = entry.arguments()[1]
    step, columns = 2.0**-14, []
    with np.errstate(invalid="ignore"):
        for direction in np.eye(len(vector)):
            moved = [unravel(vector + sign * step * direction) for sign in (1, -1)]
            ahead, behind = (np.asarray(entry.oracle(*m, *others)) for m in moved)
            difference = np.where(np.isfinite(ahead), ahead - behind, 0) / (2 * step)
            columns.append(difference.reshape(-1))
    expected = np.stack(columns, -1)
    forward, reverse = jax.jit(lambda v: (jax.jacfwd(fn)(v), jax.jacrev(fn)(v)))(vector)
    assert_close(forward, expected, rtol=1e-6, atol=1e-6)
    # Transposes of each other, to a few roundings.
    scale = 1 + np.abs(expected).max()
    assert_close(reverse, forward, rtol=0, atol=64 * eps("float64") * scale)
    sizes = np.cumsum([f.size for f in entry.arguments()[0]])[:-1]
    for block in np.split(expected, sizes, axis=-1):
        assert np.abs(block).max() > 1e-2  # A flat point would prove nothing.


@pytest.mark.slow
@every_entry
def test_two_orders_in_both_modes(entry):
    floats, others = entry.arguments()
    fn = of_floats(entry, others)
    check_grads(fn, floats, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@every_entry
def test_hessian_in_three_orders(entry):
    """Hessian times vector, against each other and against differences of the gradient."""
    fn, vector, _ = flat(entry)
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal(fn(vector).shape))
    direction = jnp.asarray(rng.standard_normal(vector.shape))
    step = 2.0**-14 * direction
    scalar = lambda v: jnp.vdot(weights, fn(v))
    grad = jax.grad(scalar)
    slope = lambda v: jax.jvp(scalar, (v,), (direction,))[1]

    @jax.jit
    def products(v):
        forward_over_reverse = jax.jvp(grad, (v,), (direction,))[1]
        reverse_over_forward = jax.grad(slope)(v)
        reverse_over_reverse = jax.grad(lambda v: jnp.vdot(grad(v), direction))(v)
        ends = jax.lax.map(grad, jnp.stack([v + step, v - step]))
        return forward_over_reverse, reverse_over_forward, reverse_over_reverse, ends

    first, *others, ends = products(vector)
    scale = 1 + float(jnp.abs(first).max())
    for other in others:
        assert_close(other, first, rtol=0, atol=1e-12 * scale)
    expected = (ends[0] - ends[1]) * 2.0**13
    assert_close(first, expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if e.title in _KINDS], ids=lambda e: e.title
)
def test_hessian_is_symmetric(entry):
    fn, vector, _ = flat(entry)
    weights = jnp.cos(jnp.arange(fn(vector).size))
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        hessian = jax.jit(outer(inner(lambda v: jnp.vdot(weights, fn(v)))))(vector)
        atol = 1e-12 * (1 + float(jnp.abs(hessian).max()))
        assert_close(hessian, hessian.T, rtol=0, atol=atol)


@every_entry
def test_scan_of_remat(entry):
    _, stacks = stacked(entry, 3)
    num_floats = len(entry.arguments()[0])
    loss = lambda *args: jnp.sum(jnp.sin(finite(entry.call(*args))))

    def total(floats):
        body = jax.checkpoint(lambda carry, args: (carry + loss(*args), None))
        return jax.lax.scan(body, jnp.zeros(()), (*floats, *stacks[num_floats:]))[0]

    grad = jax.value_and_grad(loss, argnums=tuple(range(num_floats)))
    values, expected = jax.jit(jax.vmap(grad))(*stacks)
    value, grads = jax.jit(jax.value_and_grad(total))(stacks[:num_floats])
    assert_close(value, values.sum(), **ROUNDINGS)
    for got, wanted in zip(grads, expected, strict=True):
        assert_close(got, wanted, **ROUNDINGS)


@pytest.mark.optimized
@every_dtype
def test_differentiation_does_not_change_the_value(entry, dtype):
    floats, others = entry.arguments(dtype=dtype)
    fn = lambda *f: entry.call(*f, *others)
    value = fn(*floats)
    same = assert_same
    if entry.title in FUSED:
        same = functools.partial(assert_close, rtol=2 * eps("float32"), atol=0)
    same(jax.jit(lambda *f: jax.vjp(fn, *f)[0])(*floats), value)
    ones = tuple(map(jnp.ones_like, floats))
    same(jax.jit(lambda *f: jax.jvp(fn, f, ones)[0])(*floats), value)
    same(jax.linearize(fn, *floats)[0], value)


@every_dtype
def test_derivatives_keep_the_dtype_of_their_argument(entry, dtype):
    floats, others = entry.arguments(dtype=dtype)
    exact = tuple(f.astype("float64") for f in floats)
    loss = lambda *f: jnp.sum(jnp.sin(finite(entry.call(*f, *others)).astype("float64")))
    grad = jax.jit(jax.grad(loss, argnums=tuple(range(len(floats)))))
    for got, expected in zip(grad(*floats), grad(*exact), strict=True):
        assert got.dtype == jnp.dtype(dtype)
        # The cotangent is rounded to the dtype, and so is a value, before it comes back.
        assert_close(got, expected, rtol=8 * eps(dtype), atol=32 * eps(dtype))


# Calls that take Python numbers, as most users write them.
SCALAR_OPTIONS = {
    "logsumexp": lambda z, x: sj.logsumexp(z, weights=x),
    "mellowmax": lambda z, x: sj.mellowmax(z, omega=x),
    "softmax": lambda z, x: sj.softmax(z, temperature=x),
    "softmax sink": lambda z, x: sj.softmax(z, sink=x),
    "log_softmax": lambda z, x: sj.log_softmax(z, temperature=x),
    "sparsemax": lambda z, x: sj.sparsemax(z, temperature=x),
    "entmax15": lambda z, x: sj.entmax15(z, temperature=x),
    "entmax": lambda z, x: sj.entmax(z, x + 1),
    "soft_top_k": lambda z, x: sj.soft_top_k(z, x),
    "soft_cap": lambda z, x: sj.soft_cap(z, x),
    "top_p_filter": lambda z, x: sj.top_p_filter(z, x),
    "min_p_filter": lambda z, x: sj.min_p_filter(z, x),
    "typical_filter": lambda z, x: sj.typical_filter(z, x),
    "scalable_scores": lambda z, x: sj.scalable_scores(z, x),
    "policy_probs": lambda z, x: sj.policy_probs(z, temperature=x),
    "policy_probs epsilon": lambda z, x: sj.policy_probs(z, epsilon=x),
    "soft_value": lambda z, x: sj.soft_value(z, temperature=x),
    "target_entropy_temperature": lambda z, x: sj.target_entropy_temperature(z, x),
    "exponential_temperature": lambda z, x: sj.exponential_temperature(
        z**2, initial=x, half_life=1.0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_python_numbers_keep_the_dtype_and_are_not_static(dtype):
    logits = jnp.asarray(np.linspace(-1, 1, 6).reshape(2, 3).astype(jnp.dtype(dtype)))
    for name, call in SCALAR_OPTIONS.items():
        out = call(logits, 0.5)
        assert out.dtype == jnp.dtype(dtype), name
        SPANS.clear()
        other = call(logits, 0.75)
        assert traces() == [], name
        assert (np.asarray(out) != np.asarray(other)).any() or "filter" in name, name
