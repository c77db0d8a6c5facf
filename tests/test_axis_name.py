"""`axis_name`: slices that are spread over the devices of a mesh, inside of `shard_map`."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import softjax as sj
from tests.helpers import INF, NAN, assert_close, eps
from tests.test_sharding import ROUNDINGS, mesh

ROWS, CLASSES = 4, 24
ENTRIES = PartitionSpec("rows", "classes")
PER_SLICE = PartitionSpec("rows")
COLUMN = PartitionSpec("rows", None)
ONE = PartitionSpec()


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


LOGITS, OTHERS = 2 * normal(0, ROWS, CLASSES), 2 * normal(1, ROWS, CLASSES)
MASK = normal(2, ROWS, CLASSES) > -1
MASK[:, 3] = True  # of the first label
TEMPERATURE = np.exp(0.3 * normal(3, ROWS, 1))
HEAVY = LOGITS[:, :1] + 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, its float and other arguments with a spec each, and the spec of its result."""

    call: Callable[..., Any]
    floats: tuple[Any, ...]
    others: tuple[Any, ...] = ()
    out: PartitionSpec = PER_SLICE
    # The most all-reduces of the value, the gradient and the tangent, and the most in loops.
    reduces: tuple[int, int, int] | None = None
    in_loops: int = 0


Z = (LOGITS, ENTRIES)
W = (MASK, ENTRIES)
T = (TEMPERATURE, COLUMN)
S = (HEAVY, COLUMN)

Y = (np.array([3, 20, 7, 13]), PER_SLICE)
SOME_Y = (np.array([3, -1, 24, 13]), PER_SLICE)  # one ignored, and one out of range
ZZ = (OTHERS, ENTRIES)
C = (np.exp(0.3 * normal(4, CLASSES)), PartitionSpec("classes"))
X = (normal(5, ROWS, 6), COLUMN)
V = (normal(6, CLASSES, 6), PartitionSpec("classes", None))
B = (np.where(np.arange(CLASSES) % 7 == 5, -INF, normal(7, CLASSES)), PartitionSpec("classes"))
KEPT = (np.array([True, False, True, True, True, True, False, True]), PartitionSpec("classes"))
PAIRS = (
    (normal(8, 8, 6), PartitionSpec("classes", None)),
    (normal(9, 8, 6), PartitionSpec("classes", None)),
    (np.array(0.3), ONE),
)
ALPHA = (np.array([[1.2], [1.5], [2.0], [2.5]]), COLUMN)
K = (np.array([[1.5], [2.0], [7.3], [16.0]]), COLUMN)

CASES = {
    "scalable_scores": Case(
        lambda z, s, w, **on: sj.scalable_scores(z, jnp.exp(s), where=w, **on),
        (Z, S),
        (W,),
        out=ENTRIES,
    ),
    **{
        f"{function.__name__} {options}": Case(
            lambda z, _function=function, _amount=amount, _options=options, **on: jnp.maximum(
                _function(z, _amount, **_options, **on), -100
            ),
            (Z,),
            out=ENTRIES,
        )
        for function, amount, options in (
            (sj.top_k_filter, 5, {}),
            (sj.top_k_filter, 5, {"ties": "first"}),
            (sj.top_p_filter, 0.7, {}),
            (sj.top_p_filter, 0.1, {"min_tokens_to_keep": 3}),
            (sj.typical_filter, 0.5, {}),
            (sj.min_p_filter, 0.1, {}),
            (sj.epsilon_filter, 0.05, {}),
            (sj.eta_filter, 0.05, {}),
            (sj.top_n_sigma_filter, 1.0, {}),
        )
    },
    "softmax": Case(sj.softmax, (Z,), out=ENTRIES, reduces=(2, 4, 4)),
    "softmax options": Case(
        lambda z, t, s, w, **on: sj.softmax(z, temperature=t, sink=s, where=w, **on),
        (Z, T, S),
        (W,),
        out=ENTRIES,
    ),
    "log_softmax": Case(sj.log_softmax, (Z,), out=ENTRIES, reduces=(2, 3, 3)),
    "log_softmax options": Case(
        lambda z, t, s, w, **on: sj.log_softmax(z, temperature=t, sink=s, where=w, **on),
        (Z, T, S),
        (W,),
        out=ENTRIES,
    ),
    "logsumexp": Case(
        lambda z, w, **on: sj.logsumexp(z, axis=-1, where=w, **on),
        (Z,),
        (W,),
        reduces=(2, 3, 4),
    ),
    "logsumexp weights": Case(
        lambda z, b, w, **on: sj.logsumexp(
            z, axis=-1, where=w, weights=b, return_sign=True, **on
        )[0],
        (Z, (OTHERS, ENTRIES)),
        (W,),
    ),
    "logmeanexp": Case(lambda z, w, **on: sj.logmeanexp(z, axis=-1, where=w, **on), (Z,), (W,)),
    "mellowmax": Case(
        lambda z, omega, w, **on: sj.mellowmax(z, omega=omega, where=w, **on),
        (Z, (np.array([[2.0], [-0.5], [0.0], [1e-9]]), COLUMN)),
        (W,),
    ),
    "mellowmax ends": Case(
        lambda z, w, **on: (
            sj.mellowmax(z, omega=jnp.array(INF), where=w, **on)
            + sj.mellowmax(z, omega=jnp.array(-INF), where=w, **on)
        ),
        (Z,),
        (W,),
    ),
    "cross_entropy": Case(sj.cross_entropy, (Z,), (Y,), reduces=(2, 2, 3)),
    "cross_entropy options": Case(
        lambda z, c, s, y, w, **on: sj.cross_entropy(
            z,
            y,
            where=w,
            ignore_index=-1,
            label_smoothing=jax.nn.sigmoid(s[:, 0]),
            z_loss=0.1,
            class_weights=c,
            **on,
        ),
        (Z, C, S),
        (Y, W),
        reduces=(3, 3, 3),
    ),
    "cross_entropy mean": Case(
        lambda z, c, y, **on: sj.cross_entropy(
            z[:3], y[:3], ignore_index=-1, class_weights=c, reduction="mean", **on
        ),
        ((LOGITS, PartitionSpec(None, "classes")), C),
        ((SOME_Y[0], ONE),),
        out=ONE,
    ),
    "log_prob": Case(
        lambda z, y, w, **on: sj.log_prob(z, y, where=w, **on),
        (Z,),
        (SOME_Y, W),
        reduces=(2, 2, 3),
    ),
    "focal_loss": Case(
        lambda z, c, g, y, w, **on: sj.focal_loss(
            z, y, gamma=g, where=w, ignore_index=-1, class_weights=c, **on
        ),
        (Z, C, (np.array([0.0, 1.0, 2.0, 0.5]), PER_SLICE)),
        (SOME_Y, W),
        reduces=(3, 4, 4),
    ),
    "soft_cross_entropy": Case(
        lambda z, t, c, w, **on: sj.soft_cross_entropy(
            z, t * t / 16, where=w, class_weights=c, **on
        ),
        (Z, ZZ, C),
        (W,),
    ),
    "distillation_loss": Case(
        lambda z, x, t, w, **on: sj.distillation_loss(z, x, temperature=t, where=w, **on),
        (Z, ZZ, T),
        (W,),
    ),
    "sparsemax_loss": Case(
        lambda z, c, y, w, **on: sj.sparsemax_loss(
            z, y, where=w, ignore_index=-1, class_weights=c, **on
        ),
        (Z, C),
        (SOME_Y, W),
    ),
    "entmax_loss": Case(
        lambda z, c, a, y, w, **on: sj.entmax_loss(
            z, y, a, where=w, ignore_index=-1, class_weights=c, **on
        ),
        (Z, C, ALPHA),
        (SOME_Y, W),
    ),
    "linear_cross_entropy": Case(
        lambda x, w, y, **on: sj.linear_cross_entropy(x, w, y, reduction=None, **on),
        (X, V),
        (Y,),
        reduces=(2, 3, 3),
    ),
    "linear_cross_entropy streamed": Case(
        lambda x, w, y, **on: sj.linear_cross_entropy(
            x, w, y, reduction=None, block_size=2, **on
        ),
        (X, V),
        (Y,),
        reduces=(2, 3, 3),
    ),
    **{
        f"linear_cross_entropy options {size}": Case(
            lambda x, v, b, c, s, y, size=size, **on: sj.linear_cross_entropy(
                x,
                v,
                y,
                bias=b,
                temperature=jnp.exp(s[:, 0] / 8),
                soft_cap=3.0,
                label_smoothing=jax.nn.sigmoid(s[:, 0]),
                z_loss=0.1,
                ignore_index=-1,
                class_weights=c,
                example_weights=jax.nn.sigmoid(-s[:, 0]),
                reduction=None,
                block_size=size,
                **on,
            ),
            (X, V, B, C, S),
            (SOME_Y,),
        )
        for size in (None, 5)
    },
    "linear_statistics": Case(
        lambda x, v, b, s, y, **on: jnp.stack(
            [
                x.astype(b.dtype)
                for x in sj.linear_statistics(
                    x, v, y, bias=b, temperature=jnp.exp(s[:, 0] / 8), block_size=2, **on
                )
            ],
            -1,
        ),
        (X, V, B, S),
        (SOME_Y,),
        out=COLUMN,
        reduces=(4, 5, 5),
    ),
    **{
        f"info_nce {symmetric}": Case(
            lambda q, k, t, symmetric=symmetric, **on: sj.info_nce(
                q, k, temperature=jnp.exp(t), symmetric=symmetric, **on
            ),
            PAIRS,
            out=ONE,
        )
        for symmetric in (True, False)
    },
    "info_nce where": Case(
        lambda q, k, t, w, **on: sj.info_nce(q, k, temperature=jnp.exp(t), where=w, **on),
        PAIRS,
        (KEPT,),
        out=ONE,
    ),
    "siglip_loss where": Case(
        lambda q, k, t, w, **on: sj.siglip_loss(
            q, k, temperature=jnp.exp(t), bias=t, where=w, **on
        ),
        PAIRS,
        (KEPT,),
        out=ONE,
    ),
    "siglip_loss": Case(
        lambda q, k, t, **on: sj.siglip_loss(q, k, temperature=jnp.exp(t), bias=t, **on),
        PAIRS,
        out=ONE,
    ),
    "brier_score": Case(
        lambda z, y, **on: sj.brier_score(jax.nn.sigmoid(z), y, ignore_index=-1, **on),
        (Z,),
        (SOME_Y,),
    ),
    "sparsemax": Case(sj.sparsemax, (Z,), out=ENTRIES, reduces=(3, 4, 4), in_loops=1),
    "sparsemax options": Case(
        lambda z, t, w, **on: sj.sparsemax(z, temperature=t, where=w, **on),
        (Z, T),
        (W,),
        out=ENTRIES,
    ),
    "entmax15": Case(
        lambda z, t, w, **on: sj.entmax15(z, temperature=t, where=w, **on),
        (Z, T),
        (W,),
        out=ENTRIES,
        reduces=(3, 5, 5),
        in_loops=1,
    ),
    "entmax": Case(
        lambda z, a, t, w, **on: sj.entmax(z, a, temperature=t, where=w, **on),
        (Z, ALPHA, T),
        (W,),
        out=ENTRIES,
        reduces=(4, 6, 6),
        in_loops=1,
    ),
    **{
        f"soft_top_k {kind}": Case(
            lambda z, k, t, w, kind=kind, **on: sj.soft_top_k(
                z, k, kind=kind, temperature=t, where=w, **on
            ),
            (Z, K, T),
            (W,),
            out=ENTRIES,
        )
        for kind in ("capped", "sigmoid", "laplace")
    },
    "entropy": Case(
        lambda z, w, **on: sj.entropy(z, where=w, **on), (Z,), (W,), reduces=(3, 5, 5)
    ),
    "kl_divergence": Case(
        lambda z, x, w, **on: sj.kl_divergence(z, x, where=w, **on),
        (Z, ZZ),
        (W,),
        reduces=(4, 6, 6),
    ),
    "jensen_shannon_divergence": Case(
        lambda z, x, m, w, **on: sj.jensen_shannon_divergence(
            z, x, weight=jax.nn.sigmoid(m), where=w, **on
        ),
        (Z, ZZ, S),
        (W,),
    ),
}


def sharded(case, on, axis_name="classes"):
    """The call on a mesh, with slices in parts."""
    places = [spec for _, spec in case.floats + case.others]
    places, out = on_axes((places, case.out), axis_name)
    call = functools.partial(case.call, axis_name=axis_name)
    return jax.shard_map(call, mesh=on, in_specs=tuple(places), out_specs=out)


def on_axes(specs, axis_name):
    """Specs with the classes on the axes `axis_name`, and the rows on none of these."""

    def moved(name):
        if name == "rows" and name in axis_name:
            return None
        return axis_name if name == "classes" else name

    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(lambda s: PartitionSpec(*map(moved, s)), specs, is_leaf=is_spec)


def arguments(case, dtype="float64"):
    floats = [jnp.asarray(x, dtype) for x, _ in case.floats]
    return floats, [jnp.asarray(x) for x, _ in case.others]


def first_order(call, floats, others):
    """The value, a tangent, and the gradient of one number."""
    of_floats = lambda *floats: call(*floats, *others)
    gradient = gradient_of(of_floats, len(floats))(*floats)
    return {
        "value": of_floats(*floats),
        "tangent": jax.jvp(of_floats, floats, dots_of(floats))[1],
        "gradient": gradient,
    }


def second_order(call, floats, others):
    """Products with the Hessian of one number."""
    gradient = gradient_of(lambda *floats: call(*floats, *others), len(floats))
    dots = dots_of(floats)
    product = lambda *floats: sum(map(jnp.vdot, gradient(*floats), dots))
    return {
        "forward over reverse": jax.jvp(gradient, floats, dots)[1],
        "reverse over reverse": jax.grad(product, tuple(range(len(floats))))(*floats),
    }


def gradient_of(call, num_floats):
    total = lambda *floats: jnp.sum(jnp.sin(call(*floats)))
    return jax.grad(total, argnums=tuple(range(num_floats)))


def dots_of(floats):
    return [jnp.asarray(normal(10 + i, *x.shape), x.dtype) for i, x in enumerate(floats)]


MESHES = {
    "rows and classes": ({"rows": 2, "classes": 2}, "classes"),
    "four": ({"rows": 1, "classes": 4}, "classes"),
    "two names": ({"rows": 2, "classes": 2}, ("rows", "classes")),
}
DEFAULT = "rows and classes"


@functools.cache
def compiled(name, order, way=None):
    """A report on a case, on a mesh or, without `way`, on one device."""
    case = CASES[name]
    call = case.call
    if way is not None:
        axes, axis_name = MESHES[way]
        call = sharded(case, mesh(**axes), axis_name)
    return jax.jit(functools.partial(order, call))


def assert_alike(name, order, way, args):
    got, wanted = compiled(name, order, way)(*args), compiled(name, order)(*args)
    for kind in wanted:
        for one, other in zip(*map(jax.tree.leaves, (got[kind], wanted[kind])), strict=True):
            # Hessians of the sine of a loss carry the rounding of the largest terms into all.
            largest = np.abs(other).max(initial=0) if order is second_order else 0
            atol = ROUNDINGS["atol"] * max(1, largest)
            np.testing.assert_allclose(one, other, ROUNDINGS["rtol"], atol, err_msg=kind)


DEFAULTS = {
    *("softmax", "log_softmax options", "logsumexp", "sparsemax", "soft_top_k capped"),
    *("cross_entropy options", "log_prob", "kl_divergence", "top_p_filter {}", "info_nce True"),
    *("linear_cross_entropy streamed", "linear_statistics"),
}


def cases(names=CASES, defaults=DEFAULTS):
    """A parameter of a test, whose other values are slow."""
    marks = lambda name: [] if name in defaults else [pytest.mark.slow]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in names])


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w == DEFAULT else [pytest.mark.slow]) for w in MESHES]
)
@cases()
def test_values_and_derivatives(name, way):
    assert_alike(name, first_order, way, arguments(CASES[name]))


@cases(defaults={"softmax", "cross_entropy", "linear_cross_entropy streamed"})
def test_products_with_hessians(name):
    assert_alike(name, second_order, DEFAULT, arguments(CASES[name]))


@cases([name for name in CASES if not name.startswith("linear")])
def test_edges(name):
    """A NaN on one device, slices that are empty on one and on all devices, and an infinity."""
    (first, *floats), others = arguments(CASES[name])
    half = first.shape[-1] // 2
    first = first.at[0, -1].set(NAN).at[1, :half].set(-INF).at[2].set(-INF).at[3, 1].set(INF)
    assert_alike(name, first_order, DEFAULT, ([first, *floats], others))


@pytest.mark.parametrize("kind", ["empty on one device", "empty", "NaN"])
@cases([name for name in CASES if "linear" in name and "options" in name])
def test_edges_of_output_layers(name, kind):
    (x, weights, bias, *floats), others = arguments(CASES[name])
    if kind == "NaN":
        weights = weights.at[-1].set(NAN)
    else:
        bias = bias.at[: CLASSES // 2 if kind == "empty on one device" else None].set(-INF)
    assert_alike(name, first_order, DEFAULT, ([x, weights, bias, *floats], others))


@pytest.mark.slow
@cases()
def test_values_in_single_precision(name):
    case = CASES[name]
    floats, others = arguments(case, "float32")
    got = jax.jit(sharded(case, mesh(rows=2, classes=2)))(*floats, *others)
    wanted = jax.jit(case.call)(*floats, *others)
    assert got.dtype == wanted.dtype
    assert_close(got, wanted, rtol=32 * eps("float32"), atol=32 * eps("float32"))


@pytest.mark.slow
@cases()
def test_gradients_that_are_taken_inside(name):
    """They need one psum of the result if it is spread, and none of the gradient."""
    case = CASES[name]
    floats, others = arguments(case)
    places = tuple(spec for _, spec in case.floats + case.others)

    def inside(*args):
        def total(*floats):
            out = case.call(*floats, *args[len(floats) :], axis_name="classes")
            varies = jax.typeof(out).manual_axis_type.varying
            return jax.lax.psum(jnp.sum(jnp.sin(out)), tuple(varies))

        return jax.grad(total, argnums=tuple(range(len(floats))))(*args[: len(floats)])

    on = mesh(rows=2, classes=2)
    out = tuple(spec for _, spec in case.floats)
    got = jax.shard_map(inside, mesh=on, in_specs=places, out_specs=out)(*floats, *others)
    wanted = compiled(name, first_order)(floats, others)["gradient"]
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, **ROUNDINGS)


def collectives(function, *args):
    """The collectives in the compiled program, and whether each is in a loop."""
    return collectives_of(jax.jit(function).lower(*args).compile())


def collectives_of(program):
    kinds = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    found = re.finditer(rf" {kinds}(?:-start)?\(.*", program.as_text())
    return [(line[1], "while/body" in line[0]) for line in found]


@pytest.mark.optimized
@cases([name for name, case in CASES.items() if case.reduces], {"softmax", "cross_entropy"})
def test_collectives(name):
    case = CASES[name]
    floats, others = arguments(case)
    call = lambda *floats: sharded(case, mesh(rows=1, classes=4))(*floats, *others)
    grad = jax.grad(lambda *floats: jnp.sum(jnp.sin(call(*floats))))
    tangent = lambda *floats: jax.jvp(call, floats, floats)[1]
    for function, most in zip((call, grad, tangent), case.reduces, strict=True):
        found = collectives(function, *floats)
        assert {kind for kind, _ in found} == {"all-reduce"}
        in_loops = sum(is_in_loop for _, is_in_loop in found)
        assert in_loops <= case.in_loops
        assert len(found) - in_loops <= most


def on_classes(function, *args, **options):
    """The function inside of `shard_map`, with all arguments in parts along the last axis."""
    specs = tuple(PartitionSpec(*(None,) * (x.ndim - 1), "classes") for x in args)
    out = PartitionSpec(None, "classes")
    on = mesh(rows=2, classes=2)
    return jax.shard_map(function, mesh=on, in_specs=specs, out_specs=out, **options)(*args)


@pytest.mark.parametrize(
    ("axis_name", "error", "words"),
    [
        (
            "other",
            ValueError,
            "must name mesh axes of a `jax.shard_map`.* rows, classes, got 'o",
        ),
        (("classes", "other"), ValueError, "got 'other'"),
        (("classes", "classes"), ValueError, "names an axis twice"),
        ((), TypeError, "a name or a tuple of names"),
        (0, TypeError, "a name or a tuple of names"),
        ("rows", ValueError, "`logits` must vary over the mesh axes rows .* over classes"),
    ],
)
def test_wrong_names(axis_name, error, words):
    call = functools.partial(sj.softmax, axis_name=axis_name)
    with pytest.raises(error, match=words):
        on_classes(call, jnp.asarray(LOGITS))


def test_outside_of_a_mesh():
    words = "must name mesh axes of a `jax.shard_map` around the call, which are none here"
    with pytest.raises(ValueError, match=words):
        sj.softmax(jnp.asarray(LOGITS), axis_name="classes")
    call = functools.partial(sj.softmax, axis_name="classes")
    with pytest.raises(ValueError, match=r"The axis of a `vmap` is no mesh axis"):
        jax.vmap(call, axis_name="classes")(jnp.asarray(LOGITS))


def test_a_shard_map_that_checks_nothing():
    call = functools.partial(sj.softmax, axis_name="classes")
    with pytest.raises(ValueError, match="`check_vma=False` turns off"):
        on_classes(call, jnp.asarray(LOGITS), check_vma=False)


def test_an_option_that_differs_between_devices():
    call = lambda z, t: sj.softmax(z, temperature=t[:, :1], axis_name="classes")
    with pytest.raises(ValueError, match="`temperature` must be the same along the mesh axes"):
        on_classes(call, jnp.asarray(LOGITS), jnp.exp(jnp.asarray(OTHERS)))


@pytest.mark.parametrize("weighted", [False, True])
def test_means_over_rows_of_which_devices_ignore_different_numbers(weighted):
    losses, labels = jnp.asarray(LOGITS[:, 0]), jnp.array([-1, 5, 7, 2])
    options = {"ignore_index": -1, "class_weights": jnp.asarray(C[0])} if weighted else {}
    labels = (labels,) if weighted else ()
    call = functools.partial(sj.mean_loss, **options)
    specs = (PER_SLICE,) * (1 + len(labels))
    mean = jax.shard_map(
        functools.partial(call, axis_name="rows"),
        mesh=mesh(rows=2, classes=2),
        in_specs=specs,
        out_specs=ONE,
    )
    got, wanted = (
        jax.jit(functools.partial(first_order, f))([losses], labels) for f in (mean, call)
    )
    for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert_close(one, other, **ROUNDINGS)


@pytest.mark.parametrize("length", [8, 24, pytest.param(1000, marks=pytest.mark.slow)])
def test_draws_are_those_of_whole_slices(length):
    logits = jnp.asarray(3 * normal(0, 5, length))
    logits = logits.at[0, -1].set(NAN).at[1].set(-INF).at[2, : length // 2].set(-INF)
    logits = logits.at[3, 1].set(INF)
    key = jax.random.key(0)
    temperature = jnp.array([[1.0], [1.0], [0.7], [1.0], [2.0]])
    call = functools.partial(sj.sample, shape=(200,))
    on_mesh = lambda z: call(key, z, temperature=temperature, axis_name="classes")
    out = PartitionSpec()
    whole = PartitionSpec(None, "classes")
    drawn = jax.jit(
        jax.shard_map(on_mesh, mesh=mesh(rows=1, classes=4), in_specs=whole, out_specs=out)
    )
    np.testing.assert_array_equal(drawn(logits), call(key, logits, temperature=temperature))
    kinds = [kind for kind, _ in collectives(drawn, logits)]
    assert kinds == ["all-reduce"] * 3


def test_greedy_draws_take_the_first_of_ties_on_all_devices():
    logits = jnp.zeros((3, 8)).at[0, 5:7].set(1).at[1, 2].set(1)
    call = lambda z: sj.sample(
        jax.random.key(0), z, temperature=0.0, ties="first", axis_name="classes"
    )
    whole = PartitionSpec(None, "classes")
    on = mesh(rows=2, classes=2)
    drawn = jax.shard_map(call, mesh=on, in_specs=whole, out_specs=PartitionSpec())(logits)
    np.testing.assert_array_equal(drawn, [5, 2, 0])


def test_what_cannot_be_had_is_refused():
    logits = jnp.asarray(LOGITS)
    sample = functools.partial(sj.sample, method="gumbel", axis_name="classes")
    with pytest.raises(ValueError, match='`method` must be "inverse" with `axis_name`'):
        on_classes(lambda z: sample(jax.random.key(0), z)[:, None], logits)
    first = functools.partial(
        sj.top_k_filter, k=1, axis=None, ties="first", axis_name="classes"
    )
    with pytest.raises(ValueError, match='`ties` must be "keep" with `axis_name` and several'):
        on_classes(first, logits)

    def forward(z, w):
        return sj.linear_cross_entropy(
            jnp.ones((1, ROWS)), z, jnp.zeros(1, int), forward_gradient=True, axis_name=w
        )

    call = functools.partial(forward, w="classes")
    with pytest.raises(ValueError, match="`forward_gradient` must be False with `axis_name`"):
        on_classes(lambda z: call(z.T)[None, None], logits)


@pytest.mark.slow
def test_more_tokens_than_are_taken_at_once():
    """The tokens are then taken in blocks, each of which ends in its own collectives."""
    features, weights = jnp.asarray(normal(0, 4097, 2)), jnp.asarray(normal(1, 8, 2))
    labels = jnp.arange(4097) % 8
    call = functools.partial(sj.linear_cross_entropy, block_size=2)
    classes = PartitionSpec("classes", None)
    split = jax.shard_map(
        functools.partial(call, axis_name="classes"),
        mesh=mesh(rows=1, classes=2),
        in_specs=(ONE, classes, ONE),
        out_specs=ONE,
    )
    got, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(features, weights, labels)
        for f in (split, call)
    )
    for one, other in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert_close(one, other, **ROUNDINGS)


@pytest.mark.parametrize("argument", ["labels", "features"])
def test_tokens_that_differ_between_devices_of_classes(argument):
    specs = {"features": ONE, "weights": PartitionSpec("classes", None), "labels": ONE}
    specs[argument] = PartitionSpec("classes")
    call = jax.shard_map(
        functools.partial(sj.linear_cross_entropy, axis_name="classes"),
        mesh=mesh(rows=2, classes=2),
        in_specs=tuple(specs.values()),
        out_specs=ONE,
    )
    with pytest.raises(ValueError, match=f"`{argument}` must be the same along the mesh axes"):
        call(jnp.ones((4, 3)), jnp.ones((8, 3)), jnp.zeros(4, int))
