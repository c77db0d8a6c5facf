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

# One entry per kind of function by default, where a test compiles many programs per entry.
_KINDS = {"softmax", "sparsemax", "soft_top_k-capped", "segment_softmax", "cross_entropy"}
_marks = {entry: [pytest.mark.slow] if entry.title not in _KINDS else [] for entry in CATALOGUE}
every_entry = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.title)
every_kind = pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=m, id=e.title) for e, m in _marks.items()]
)


def _dtypes_of(entry):
    return ("float32", "bfloat16", "float16") if entry.title in _KINDS else ("float32",)


# The half dtypes pass through code that all functions share: one function per kind will do.
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
FUSED += ("clipped_surrogate_loss", "kl_divergence")

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


def stacked(entry, count):
    """`count` argument lists, and the same with the arrays stacked."""
    lists = [sum(entry.arguments(seed), ()) for seed in range(count)]
    return lists, tuple(jnp.stack(arrays) for arrays in zip(*lists, strict=True))


@every_kind
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


class Transformed:
    """An entry under every transformation.

    The arguments are rounded to float32, so that derivatives in both dtypes are of one point.
    """

    def __init__(self, entry):
        self.entry = entry
        self.num_floats = num = len(entry.arguments()[0])
        lists = [
            (*(f.astype("float64") for f in floats), *others)
            for floats, others in (entry.arguments(seed, "float32") for seed in range(6))
        ]
        self.lists = lists
        stacks = tuple(np.stack(arrays) for arrays in zip(*lists, strict=True))
        self.unravel = ravel_pytree(lists[0][:num])[1]
        self.vectors = jnp.stack([ravel_pytree(args[:num])[0] for args in lists[:2]])
        self.eager = [entry.call(*args) for args in lists]
        rng = np.random.default_rng(0)
        self.direction = jnp.asarray(rng.standard_normal(self.vectors[0].shape))
        self.weights = jnp.asarray(rng.standard_normal(self.eager[0].size))
        self.whole = jnp.round(4 * lists[0][0])
        # Neighbours differ, so that each argument is batched beside one that is not.
        count = len(lists[0])
        self.batched = [np.arange(count) % 2 == i for i in range(min(2, count))]
        arguments = stacks, self.vectors, self.direction, self.weights, self.whole
        # One small program each compiles faster than one large one.
        for name in self._pieces(*arguments):
            piece = lambda *arguments, name=name: self._pieces(*arguments)[name]()
            setattr(self, name, jax.jit(piece)(*arguments))

    def _pieces(self, stacks, vectors, direction, weights, whole):
        call, num = self.entry.call, self.num_floats
        first = [stack[0] for stack in stacks]
        pairs = [stack[:2] for stack in stacks]
        others = pairs[num:]

        def flat(vector, *others):
            return finite(call(*self.unravel(vector), *others)).reshape(-1)

        def loss(*args):
            return jnp.sum(jnp.sin(finite(call(*args)).astype("float64")))

        def total(floats):
            body = jax.checkpoint(lambda carry, args: (carry + loss(*args), None))
            return jax.lax.scan(body, jnp.zeros(()), (*floats, *others))[0]

        def over(batched):
            args = [p if yes else f for p, f, yes in zip(pairs, first, batched, strict=True)]
            return jax.vmap(call, [0 if yes else None for yes in batched])(*args)

        at_first = lambda vector: flat(vector, *first[num:])
        scalar = lambda vector: jnp.vdot(weights, at_first(vector))
        grad = jax.grad(scalar)
        slope = lambda vector: jax.jvp(scalar, (vector,), (direction,))[1]
        backward = lambda vector: jnp.vdot(grad(vector), direction)
        inner = jax.vmap(call, in_axes=-1, out_axes=-1)
        grid = [jnp.moveaxis(s.reshape(2, 3, *s.shape[1:]), 1, -1) for s in stacks]
        narrow = [f.astype("float32") for f in first[:num]]
        return {
            "jitted": lambda: call(*first),
            "of_whole": lambda: call(whole.astype(int), *first[1:]),
            "over_arguments": lambda: [over(batched) for batched in self.batched],
            "over_grid": lambda: jax.vmap(inner)(*grid),
            "forward": lambda: jax.jacfwd(at_first)(vectors[0]),
            "reverse": lambda: jax.vmap(jax.jacrev(flat))(vectors, *others),
            "scanned": lambda: jax.value_and_grad(total)(pairs[:num]),
            "hessian_times_direction": lambda: {
                "forward over reverse": jax.jvp(grad, (vectors[0],), (direction,))[1],
                "reverse over forward": jax.grad(slope)(vectors[0]),
                "reverse over reverse": jax.grad(backward)(vectors[0]),
            },
            "narrow_grads": lambda: jax.grad(loss, range(num))(*narrow, *first[num:]),
        }

    def oracle(self, index, vector):
        """The finite values by the definition, with the arguments `index` but for floats."""
        floats = map(np.asarray, self.unravel(jnp.asarray(vector)))
        with np.errstate(invalid="ignore"):
            out = np.asarray(self.entry.oracle(*floats, *self.lists[index][self.num_floats :]))
        return np.where(np.isfinite(out), out, 0).reshape(-1).astype(np.float64)

    def gradient(self, index):
        """That of the sum of sines, from the Jacobian."""
        value = np.asarray(finite(self.eager[index])).reshape(-1)
        return np.cos(value) @ np.asarray(self.reverse[index])


@every_kind
def test_every_transformation(entry):
    found = Transformed(entry)
    for check in (
        _check_jit,
        _check_whole_numbers,
        _check_vmap,
        _check_jacobian,
        _check_scan_of_remat,
        _check_hessian,
        _check_narrow_gradients,
    ):
        check(found)


def _check_jit(found):
    assert_close(found.jitted, found.eager[0], **ROUNDINGS)


def _check_whole_numbers(found):
    """Integers become the default float."""
    assert found.of_whole.dtype == jnp.dtype("float64")
    floats = found.entry.call(found.whole, *found.lists[0][1:])
    assert_close(found.of_whole, floats, **ROUNDINGS)


def _check_vmap(found):
    """Over every other argument, and over axes of all arguments, the last and the first."""
    for batched, out in zip(found.batched, found.over_arguments, strict=True):
        second = [b if yes else a for a, b, yes in zip(*found.lists[:2], batched, strict=True)]
        assert_close(out, np.stack([found.eager[0], found.entry.call(*second)]), **ROUNDINGS)
    rows = [np.stack(found.eager[i : i + 3], -1) for i in (0, 3)]
    assert_close(found.over_grid, np.stack(rows), **ROUNDINGS)


def _check_jacobian(found):
    """Central differences of the oracle: their error is h^2 / 6 times a third derivative."""
    step = 2.0**-14
    for index, vector in enumerate(np.asarray(found.vectors)):
        columns = [
            found.oracle(index, vector + move) - found.oracle(index, vector - move)
            for move in step * np.eye(len(vector))
        ]
        expected = np.stack(columns, -1) / (2 * step)
        assert_close(found.reverse[index], expected, rtol=1e-6, atol=1e-6)
    # Transposes of each other, to a few roundings.
    scale = 1 + np.abs(found.forward).max()
    assert_close(found.forward, found.reverse[0], rtol=0, atol=64 * eps("float64") * scale)
    sizes = np.cumsum([f.size for f in found.lists[0][: found.num_floats]])[:-1]
    for block in np.split(np.asarray(found.forward), sizes, axis=-1):
        assert np.abs(block).max() > 1e-2  # A flat point would prove nothing.


def _check_scan_of_remat(found):
    value, grads = found.scanned
    values = [np.sum(np.sin(finite(out))) for out in found.eager[:2]]
    assert_close(value, np.sum(values), **ROUNDINGS)
    for index in (0, 1):
        got = ravel_pytree([grad[index] for grad in grads])[0]
        assert_close(got, found.gradient(index), rtol=0, atol=1e-13 * _size(found.reverse))


def _check_hessian(found):
    """Three orders agree, and second differences of the oracle are the curvature."""
    first, *others = found.hessian_times_direction.values()
    for other in others:
        assert_close(other, first, rtol=0, atol=1e-12 * _size(first))
    step = 2.0**-10
    move = step * np.asarray(found.direction)
    center = np.asarray(found.vectors[0])
    ahead, middle, behind = (found.oracle(0, center + i * move) for i in (1, 0, -1))
    curvature = np.asarray(found.weights) @ (ahead - 2 * middle + behind) / step**2
    got = np.vdot(found.direction, first)
    assert_close(got, curvature, rtol=0, atol=1e-4 * _size(first))


def _check_narrow_gradients(found):
    """Gradients are rounded like their argument; values are rounded before the sine."""
    got = ravel_pytree(found.narrow_grads)[0]
    assert all(grad.dtype == jnp.dtype("float32") for grad in found.narrow_grads)
    unit = eps("float32")
    assert_close(got, found.gradient(0), rtol=8 * unit, atol=32 * unit)


def _size(array):
    return 1 + float(np.abs(array).max())


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


@every_kind
def test_without_jit(entry):
    arguments = sum(entry.arguments(), ())
    with jax.disable_jit():
        plain = entry.call(*arguments)
    assert_close(plain, entry.call(*arguments), **ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if sum(map(len, e.arguments())) > 2], ids=lambda e: e.title
)
def test_vmap_over_some_arguments(entry):
    """Each alone, neighbours, and the last with the first."""
    lists, stacks = stacked(entry, 2)
    count = len(stacks)
    for batched in [np.roll(np.arange(count) < n, i) for n in (1, 2) for i in range(count)]:
        pick = lambda many, one, b=batched: [
            m if yes else o for m, o, yes in zip(many, one, b, strict=True)
        ]
        in_axes = [0 if yes else None for yes in batched]
        out = jax.vmap(entry.call, in_axes)(*pick(stacks, lists[0]))
        expected = [entry.call(*pick(args, lists[0])) for args in lists]
        assert_close(out, np.stack(expected), **ROUNDINGS)


@pytest.mark.slow
@every_kind
def test_two_orders_in_both_modes(entry):
    floats, others = entry.arguments()
    fn = jax.jit(lambda *floats: finite(entry.call(*floats, *others)))
    check_grads(fn, floats, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if e.title in _KINDS], ids=lambda e: e.title
)
def test_hessian_is_symmetric(entry):
    floats, others = entry.arguments()
    vector, unravel = ravel_pytree(floats)
    fn = lambda v: finite(entry.call(*unravel(v), *others)).reshape(-1)
    weights = jnp.cos(jnp.arange(fn(vector).size))
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        hessian = jax.jit(outer(inner(lambda v: jnp.vdot(weights, fn(v)))))(vector)
        atol = 1e-12 * (1 + float(jnp.abs(hessian).max()))
        assert_close(hessian, hessian.T, rtol=0, atol=atol)


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "entry", [e for e in CATALOGUE if e.title in _KINDS], ids=lambda e: e.title
)
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
