"""Every function on a mesh of explicit axes, and outside of `shard_map` on automatic ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import softjax as sj
from softjax import masks
from tests.catalogue import CATALOGUE
from tests.helpers import assert_close
from tests.test_sharding import ROUNDINGS, cpu_mesh, results

P = PartitionSpec
# The lengths of axes that are spread over the axes of the mesh.
ROWS, CLASSES = (2,), (6, 8)

# Where the rule of `spec_of` does not hold: heads, members, and sizes that are equal by chance.
PLACES = {
    "ensemble_log_probs": (P(None, "rows", "classes"), P("rows", "classes")),
    "adaptive_log_softmax": (P("rows"), P(), P(), P(), P(), P("rows")),
    "info_nce": (P("rows"), P("rows"), P()),
    "siglip_loss": (P("rows"), P("rows"), P(), P()),
    "attention": (P(None, "rows"), P(), P(), P("rows"), P("rows"), P()),
    "paged_attention": (P("rows"), P(), P(), P("rows"), P("rows")),
    "qk_norm": (P(None, "rows"), P(None, "rows"), P("rows"), P()),
    "scalable_queries": (P(None, "rows"), P("rows"), P()),
    "merge_attention": (P(None, "rows"), P(None, "rows")),
}
LAYERS_OF_TWO = (P("rows"), P("classes"), P("rows"), P("classes"), P("classes"), P("rows"))
PLACES |= {
    "linear_distillation_loss": LAYERS_OF_TWO,
    "linear_jensen_shannon_divergence": (*LAYERS_OF_TWO, P("rows")),
}
RESULTS = {"attention": P(None, "rows", None)}

# Whose entries, weights or pairs other collectives than all-reduces move.
MOVES = {
    # Sorts, running sums and `lax.top_k` of XLA along an axis that is spread, or over rows.
    *("adaptive_log_softmax", "conformal_threshold", "expected_calibration_error"),
    *("ranking_log_prob", "reliability", "sample_without_replacement", "select_action"),
    # Each device needs the keys of all, or all weights: there is no partial result.
    *(
        "info_nce",
        "siglip_loss",
        "linear_distillation_loss",
        "linear_jensen_shannon_divergence",
    ),
}
# Whose rows ask one another: means, sorts and pairs of rows.
JOINT = {
    *("adaptive_log_softmax", "conformal_threshold", "expected_calibration_error"),
    *("fit_temperature", "info_nce", "mean_loss", "reliability", "siglip_loss"),
    # XLA gathers the rows of `lax.top_k`, which need no other rows.
    "sample_without_replacement",
}
# What is dear to compile, and made of what is tested by default.
DEAR = {
    *("clipped_surrogate_loss", "distillation_loss", "ensemble_log_probs", "entmax_loss"),
    *("fit_temperature", "linear_distillation_loss", "linear_jensen_shannon_divergence"),
    *("mellowmax_temperature", "policy_entropy", "policy_gradient_loss", "select_action"),
    *("sparsemax_loss", "target_entropy_temperature", "sampled_cross_entropy"),
    *("jensen_shannon_divergence", "policy_log_prob", "ranking_log_prob", "mellowmax"),
    *("soft_value", "expected_value", "actor_critic_value", "relaxed_log_density"),
    *("adaptive_log_softmax", "sample_without_replacement", "gumbel_given_argmax"),
}
KINDS = {"softmax", "sparsemax", "top_k_filter", "cross_entropy", "log_prob", "attention"}
VARIANTS = {"sparse", "sigmoid", "laplace", "mass", "sink"}


def entries(slow):
    marks = lambda entry: [pytest.mark.slow] if slow(entry) else []
    params = [pytest.param(e, marks=marks(e), id=e.title) for e in CATALOGUE]
    return pytest.mark.parametrize("entry", params)


def spec_of(shape):
    """The first axis of a length that is spread takes the axis of the mesh."""
    axes = [None] * len(shape)
    for name, sizes in (("rows", ROWS), ("classes", CLASSES)):
        place = next((i for i, size in enumerate(shape) if size in sizes), None)
        if place is not None:
            axes[place] = name
    return P(*axes)


def even(x):
    """The first entries once more, or nearly, along axes that two devices cannot share."""
    x = np.asarray(x)
    for axis, size in enumerate(x.shape):
        if size + 1 in CLASSES:
            first = x.take([0], axis)
            first = first + 0.03 if x.dtype.kind == "f" else first
            x = np.concatenate([x, first], axis)
    return x


def arguments(entry, names):
    """The arguments, and how they are spread over the axes that `names` holds."""
    args = [even(x) for kind in entry.arguments() for x in kind]
    specs = PLACES.get(entry.name) or [spec_of(x.shape) for x in args]
    only = lambda spec: P(*(name if name in names else None for name in spec))
    return args, list(map(only, specs))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def placed(args, specs, mesh):
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(args, specs, strict=True)
    ]


def collectives(compiled):
    """The kinds and results of the collectives in a program."""
    kinds = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    found = re.finditer(rf"= (.*) {kinds}(?:-start)?\(", compiled.as_text())
    return [(line[2], line[1]) for line in found]


mesh_of = functools.partial(cpu_mesh, rows=2, classes=2)
explicit_mesh = functools.partial(mesh_of, AxisType.Explicit)


def compiled_on(mesh, function, args, specs):
    """The program and its result."""
    with jax.sharding.set_mesh(mesh):
        args = placed(args, specs, mesh)
        program = jax.jit(function).lower(*args).compile()
        return program, program(*args)


@entries(slow=lambda entry: entry.name in DEAR or entry.variant in VARIANTS)
def test_values_and_types(entry):
    """Rows and slices are spread, each over an axis of its own."""
    args, specs = arguments(entry, ("rows", "classes"))
    program, got = compiled_on(explicit_mesh(), entry.call, args, specs)
    # The oracle of this entry holds for classes that are not spread.
    wanted = entry.call if entry.name == "sampled_cross_entropy" else entry.oracle
    assert_close(got, wanted(*args), **ROUNDINGS)
    assert jax.typeof(got).sharding.spec == RESULTS.get(entry.name, spec_of(got.shape))
    moves = {kind for kind, _ in collectives(program)} - {"all-reduce"}
    assert bool(moves) == (entry.name in MOVES)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Explicit, id="explicit"),
        pytest.param(AxisType.Auto, id="automatic", marks=pytest.mark.slow),
    ],
)
@entries(slow=lambda entry: entry.title not in ("softmax", "top_k_filter"))
def test_rows_need_no_other_rows(entry, kind):
    """At most a bool per step, which tells whether a search has ended on all devices."""
    args, specs = arguments(entry, ("rows",))
    program, _ = compiled_on(mesh_of(kind), entry.call, args, specs)
    found = [result for _, result in collectives(program) if not result.startswith("pred[]")]
    assert bool(found) == (entry.name in JOINT)


STREAMED = {"block_size": 4}
LAYERS = {
    "loss": lambda x, w, y: sj.linear_cross_entropy(x, w, y, **STREAMED),
    "losses": lambda x, w, y: sj.linear_cross_entropy(x, w, y, reduction=None, **STREAMED),
    "dense": lambda x, w, y: sj.linear_cross_entropy(x, w, y),
    "entropy": lambda x, w, y: sj.linear_statistics(x, w, y, **STREAMED).entropy,
}


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "loss" else [pytest.mark.slow]) for n in LAYERS]
)
def test_classes_of_a_layer_stay_where_they_are(name):
    """The gradient adds up numbers per token, the features' gradient and the weights' parts."""
    features, weights, labels = draw(4, 8), draw(32, 8, seed=1), np.array([3, 31, 16, 0])
    specs = [P("rows"), P("classes"), P("rows")]
    report = functools.partial(results, LAYERS[name], 2)
    on = explicit_mesh()
    program, got = compiled_on(on, report, (features, weights, labels), specs)
    for one, other in zip(got, jax.jit(report)(features, weights, labels), strict=True):
        assert_close(one, other, **ROUNDINGS)
    assert [jax.typeof(x).sharding.spec[0] for x in got[1:]] == ["rows", "classes"]
    found = collectives(program)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert len(found) <= 6
    assert not any("32,8]" in result for _, result in found)
    lines = program.as_text().splitlines()
    assert not any("all-reduce" in line and "while/body" in line for line in lines)


@pytest.mark.slow
@entries(slow=lambda entry: True)
def test_gradients(entry):
    """On automatic axes too, for one function of each kind."""
    args, specs = arguments(entry, ("rows", "classes"))
    num_floats = len(entry.arguments()[0])
    report = functools.partial(results, entry.call, num_floats)
    wanted = jax.jit(report)(*args)
    _, got = compiled_on(explicit_mesh(), report, args, specs)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, **ROUNDINGS)
    for bar, spec in zip(got[1:], specs, strict=False):
        assert tuple(jax.typeof(bar).sharding.spec)[: len(spec)] == tuple(spec)
    if entry.title in KINDS:
        _, got = compiled_on(mesh_of(AxisType.Auto), report, args, specs)
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, **ROUNDINGS)


def assert_spread(got, wanted, spec):
    assert jax.typeof(got).sharding.spec == spec
    assert_close(got, wanted, **ROUNDINGS)


def test_an_argument_that_is_the_same_on_all_devices():
    """Labels and masks need not be spread as the logits are."""
    logits, labels, mask = draw(4, 6), np.array([1, 0, 5, 3]), draw(4, 6, seed=1) > -1
    mask[:, [0, 1, 3, 5]] = True
    call = functools.partial(sj.cross_entropy, class_weights=np.arange(1.0, 7.0))
    on = explicit_mesh()
    with jax.sharding.set_mesh(on):
        spread = jax.device_put(logits, P("rows"))
        got = call(spread, labels, where=mask)
        assert_spread(got, call(logits, labels, where=mask), P("rows"))
        drawn = sj.sample(jax.random.key(0), spread, shape=(3,))
    assert jax.typeof(drawn).sharding.spec == P(None, "rows")
    assert_close(drawn, sj.sample(jax.random.key(0), logits, shape=(3,)), rtol=0)


def test_types_alone_and_eager_calls():
    """The mesh need not be set, and an axis of an array may lie over two axes of the mesh."""
    logits, on = draw(4, 6), explicit_mesh()
    spread = jax.device_put(logits, NamedSharding(on, P(("rows", "classes"))))
    wanted = sj.top_p_filter(logits, 0.5)
    for call in (sj.top_p_filter, jax.jit(sj.top_p_filter)):
        assert_spread(call(spread, 0.5), wanted, P(("rows", "classes"), None))


def test_vmap_over_axes_that_are_spread():
    """The types hide these axes; each of the results has one more."""
    logits = draw(2, 2, 6)
    calls = (sj.sparsemax, functools.partial(sj.top_p_filter, p=0.5))
    with jax.sharding.set_mesh(explicit_mesh()):
        spread = jax.device_put(logits, P("rows", "classes"))
        for call in calls:
            got = jax.jit(jax.vmap(jax.vmap(call)))(spread)
            assert_spread(got, call(logits), P("rows", "classes", None))


@pytest.mark.parametrize(
    "name",
    [
        "top_p_filter",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sample", "soft_top_k", "entmax", "typical_filter")
        ),
    ],
)
def test_a_shard_map_over_some_of_the_axes(name):
    call = {
        "soft_top_k": lambda z: sj.soft_top_k(z, 2.5),
        "sample": lambda z: sj.sample(jax.random.key(0), z),
        "entmax": lambda z: sj.entmax(z, 1.3),
    }.get(name, lambda z: getattr(sj, name)(z, 0.5))
    logits = draw(4, 6)
    rows = P("rows")
    with jax.sharding.set_mesh(explicit_mesh()):
        spread = jax.device_put(logits, P("rows", "classes"))
        part = jax.shard_map(call, in_specs=rows, out_specs=rows, axis_names={"rows"})
        got = jax.jit(part)(spread)
    spec = P("rows") if name == "sample" else P("rows", "classes")
    assert jax.typeof(got).sharding.spec == spec
    wanted = np.concatenate([call(half) for half in np.split(logits, 2)])
    assert_close(got, wanted, **ROUNDINGS)


def test_tokens_and_classes_on_one_axis():
    """The weights are gathered then, because the tokens stay where they are."""
    features, weights, labels = draw(4, 8), draw(32, 8, seed=1), np.array([3, 31, 16, 0])
    specs = [P("rows"), P("rows"), P("rows")]
    call = LAYERS["losses"]
    _, got = compiled_on(explicit_mesh(), call, (features, weights, labels), specs)
    assert_spread(got, call(features, weights, labels), P("rows"))


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"block_size": 4, "mask": masks.Causal()}, id="causal"),
        pytest.param({}, id="dense", marks=pytest.mark.slow),
        pytest.param({"block_size": 4}, id="streamed", marks=pytest.mark.slow),
        pytest.param({"normalizer": "sparsemax"}, id="sparse", marks=pytest.mark.slow),
    ],
)
def test_rows_and_heads_of_attention(way):
    """Nothing crosses devices, the gradient included."""
    args = [draw(2, 8, n, 3, seed=n) for n in (4, 2)]
    call = lambda q, k: sj.attention(q, k, jnp.sin(k), **way)
    report = functools.partial(results, call, 2)
    specs = [P("rows", None, "classes")] * 2
    program, got = compiled_on(explicit_mesh(), report, args, specs)
    for one, other in zip(got, jax.jit(report)(*args), strict=True):
        assert_spread(one, other, P("rows", None, "classes", None))
    assert all(result.startswith("pred[]") for _, result in collectives(program))


IDS = np.sort(np.random.default_rng(3).integers(0, 3, (2, 8)), -1)
ORDER = sj.zigzag_permutation(8, 2)
IN_A_RING = {
    "causal": {"mask": masks.Causal()},
    "arrays": {"mask": np.tri(8, dtype=bool), "bias": draw(4, 8, 8), "sink": np.ones(4)},
    "zigzag": {"mask": masks.Causal() & masks.Segments(IDS), "positions": ORDER},
    "functions": {
        "mask": masks.Function(lambda at: (at.key + at.head + at.batch) % 3 != at.query % 2),
        "score": lambda scores, at: scores - (at.query - at.key + at.head).astype(scores.dtype),
    },
}


@pytest.mark.parametrize(
    "name",
    [
        *("causal", "arrays"),
        pytest.param("zigzag", marks=pytest.mark.slow),
        pytest.param("functions", marks=pytest.mark.slow),
    ],
)
def test_tokens_of_attention_meet_in_a_ring(name):
    """Neither keys nor scores are gathered, for the value or the gradient."""
    args = [draw(2, 8, n, 3, seed=n) for n in (4, 2)]
    call = lambda q, k: sj.attention(q, k, jnp.sin(k), **IN_A_RING[name])
    report = functools.partial(results, call, 2)
    wanted, spec = jax.jit(report)(*args), P("rows", "classes", None, None)
    program, got = compiled_on(explicit_mesh(), report, args, [spec, spec])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_spread(one, other, P(*spec[: one.ndim]))
    kinds = {kind for kind, _ in collectives(program)}
    assert "collective-permute" in kinds
    assert not kinds & {"all-gather", "all-to-all"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {"normalizer": "sparsemax"},
        {"implementation": "dense"},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
    ],
    ids=["sparse", "dense", "dropout"],
)
def test_options_for_which_keys_are_gathered(way):
    args = [draw(2, 8, n, 3, seed=n) for n in (4, 2)]
    mask = masks.Causal() & masks.Segments(IDS[0])
    call = lambda q, k: sj.attention(q, k, jnp.sin(k), mask=mask, **way)
    spec = P("rows", "classes", None, None)
    _, got = compiled_on(explicit_mesh(), call, args, [spec, spec])
    assert_spread(got, call(*args), spec)


@pytest.mark.parametrize("axes", [("rows", "classes"), ("classes", "rows")], ids="-".join)
def test_a_ring_over_two_axes(axes):
    """In either order of the axes."""
    args = [draw(8, n, 3, seed=n) for n in (4, 2)]
    call = lambda q, k: sj.attention(q, k, k, **IN_A_RING["arrays"])
    spec = P(axes, None, None)
    _, got = compiled_on(explicit_mesh(), call, args, [spec, spec])
    assert_spread(got, call(*args), spec)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bias_per_key_in_half_precision(dtype):
    """Its gradients on the devices are added up before they are rounded."""
    queries, keys = (draw(2, 8, n, 3, seed=n) for n in (4, 2))
    bias = np.asarray(jnp.asarray(draw(4, 1, 8), dtype))
    call = lambda q, k, b: jnp.sum(jnp.sin(sj.attention(q, k, k, bias=b)))
    spec = P("rows", "classes", None, None)
    slope = jax.grad(call, 2)
    _, got = compiled_on(explicit_mesh(), slope, (queries, keys, bias), [spec, spec, P()])
    wanted = slope(queries, keys, bias).astype(jnp.float32)
    assert_close(
        got.astype(jnp.float32), wanted, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_wrong_shapes_of_a_ring_are_refused():
    """Each would fit the part of one device."""
    mesh, spec = explicit_mesh(), P("rows", "classes")
    with jax.sharding.set_mesh(mesh):
        q = jax.device_put(draw(2, 8, 4, 3), NamedSharding(mesh, spec))
        for name, value, message in (
            ("bias", np.ones((4, 8)), r"`bias` of shape \(4, 8\) .*\(2, 4, 8, 8\)"),
            ("mask", np.ones((4, 8), bool), r"`mask` of shape \(4, 8\) .*\(2, 4, 8, 8\)"),
            ("mask", masks.Segments(np.ones((2, 4), int)), r"query_ids.*\(2, 8\)"),
            ("positions", np.arange(4), r"positions.*\(2, 8\)"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                sj.attention(q, q, q, **{name: value})
            assert "axis_name" not in str(error.value)


def test_a_ring_outside_of_jit_and_its_explanation():
    mesh, spec = explicit_mesh(), P("rows", "classes")
    args = [draw(2, 8, n, 3, seed=n) for n in (4, 2, 2)]
    wanted = sj.attention(*args, **IN_A_RING["functions"])
    with jax.sharding.set_mesh(mesh):
        args = placed(args, [spec] * 3, mesh)
        assert_spread(
            sj.attention(*args, **IN_A_RING["functions"]), wanted, P(*spec, None, None)
        )
        assert "streamed: 2 hops of 2 tiles of 4 x 2; taken." in sj.explain_attention(*args)


def test_log_sum_exp_of_tokens_in_a_ring():
    args = [draw(2, 8, n, 3, seed=n) for n in (4, 2)]
    call = lambda q, k: sj.attention(q, k, k, return_lse=True)
    spec = P("rows", "classes", None, None)
    _, got = compiled_on(explicit_mesh(), call, args, [spec, spec])
    for one, other in zip(got, call(*args), strict=True):
        assert_spread(one, other, P(*spec[: one.ndim]))


def test_a_score_that_holds_arrays_of_the_mesh():
    """It is a pytree, whose arrays are arguments; one that captures none may be a closure."""
    queries, keys, slopes = draw(2, 4, 4, 3), draw(2, 4, 2, 3, seed=1), np.arange(1.0, 5)

    def score(slopes, scores, at):
        gap = jnp.abs(at.query - at.key).astype(scores.dtype)
        return scores - slopes[None, :, None, None] * gap

    call = lambda q, k, s: sj.attention(q, k, k, score=jax.tree_util.Partial(score, s))
    heads = P(None, None, "rows")
    args, on = (queries, keys, slopes), explicit_mesh()
    wanted = jax.jit(call)(*args)
    _, got = compiled_on(on, call, args, [heads, heads, P("rows")])
    assert_spread(got, wanted, P(None, None, "rows", None))
    closure = lambda q, k, s: sj.attention(q, k, k, score=functools.partial(score, s))
    _, got = compiled_on(on, closure, args, [P(), P(), P()])
    assert_close(got, wanted, **ROUNDINGS)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["softmax", "sparsemax"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_large_arrays_are_not_cut_into_blocks(name, kind):
    """The blocks would be spread over the devices again."""
    call = lambda z: getattr(sj, name)(z)
    args, specs = (draw(512, 1024),), [P("rows")]
    report = functools.partial(results, call, 1)
    program, got = compiled_on(mesh_of(kind), report, args, specs)
    for one, other in zip(got, jax.jit(report)(*args), strict=True):
        assert_close(one, other, **ROUNDINGS)
    assert all(result.startswith("pred[]") for _, result in collectives(program))


def test_other_programs_are_as_they_were():
    """Without a mesh, and on an automatic one, there is nothing that places an array."""
    logits = draw(2, 6)
    assert "reshard" not in str(jax.make_jaxpr(sj.softmax)(logits))
    with jax.sharding.set_mesh(mesh_of(AxisType.Auto)):
        assert "reshard" not in str(jax.make_jaxpr(sj.softmax)(logits))


def test_wrong_arguments_raise_the_same_errors():
    with jax.sharding.set_mesh(explicit_mesh()):
        logits = jax.device_put(draw(4, 6), P("rows"))
        with pytest.raises(ValueError, match=r"`where` of shape \(5,\) does not broadcast"):
            sj.softmax(logits, where=np.ones(5, bool))
