"""Distillation of two linear layers against the plain definition, and where it is small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests.helpers import INF, NAN, assert_close, eps

TOKENS, CLASSES = 5, 11


def draw(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.5, 1.5, shape))
    return {
        "features": normal(TOKENS, 3),
        "weights": normal(CLASSES, 3),
        "teacher_features": normal(TOKENS, 4),
        "teacher_weights": normal(CLASSES, 4),
        "bias": normal(CLASSES),
        "teacher_bias": normal(CLASSES),
        "temperature": uniform(TOKENS),
        "soft_cap": 2 * uniform(),
        "teacher_soft_cap": 2 * uniform(),
        "example_weights": uniform(TOKENS),
    }


def plain(args):
    """The definition, written out."""

    def log_probs(prefix):
        part = {
            name: args[prefix + name] for name in ("features", "weights", "bias", "soft_cap")
        }
        logits = part["features"] @ part["weights"].T + part["bias"][None]
        logits = part["soft_cap"] * jnp.tanh(logits / part["soft_cap"])
        return jax.nn.log_softmax(logits / args["temperature"][:, None])

    teacher, student = log_probs("teacher_"), log_probs("")
    loss = jnp.sum(jnp.exp(teacher) * (teacher - student), 1) * args["temperature"] ** 2
    shares = args["example_weights"]
    return jnp.sum(shares * loss) / jnp.sum(shares)


def close(actual, desired, tolerance=1e-12):
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(one, np.asarray(two), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, None, 1])
def test_all_options_together(block_size):
    args = draw()
    ours = lambda args: sj.linear_distillation_loss(**args, block_size=block_size)
    close(ours(args), plain(args))
    close(jax.jit(jax.grad(ours))(args), jax.grad(plain)(args))
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), args)
    close(jax.jvp(ours, (args,), (dots,))[1], jax.jvp(plain, (args,), (dots,))[1])
    twice = lambda f: jax.jit(lambda a: jax.jvp(jax.grad(f), (a,), (dots,))[1])(args)
    close(twice(ours), twice(plain), 1e-11)


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_small_divergence_keeps_its_digits(block_size):
    """The relative error is about eps, the rounding of the logits, over their distance."""
    args = draw()
    for apart in (1e-2, 1e-5, 1e-8):
        moved = args["weights"] + apart * jnp.sin(args["weights"])
        heads = args["features"], args["weights"], args["features"], moved
        loss = sj.linear_distillation_loss(
            *heads, temperature=1.0, block_size=block_size, reduction=None
        )
        exact = sj.distillation_loss(
            *(f @ w.T for f, w in (heads[:2], heads[2:])), temperature=1.0
        )
        assert_close(loss, exact, rtol=64 * eps("float64") / apart)
        assert (loss > 0).all()
    same = sj.linear_distillation_loss(
        *heads[:2], *heads[:2], temperature=1.0, block_size=block_size
    )
    assert same == 0


HEADS = ("features", "weights", "teacher_features", "teacher_weights")


def heads():
    return {name: x for name, x in draw().items() if name in HEADS}


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, None])
def test_dropped_classes(block_size):
    args = heads()
    drop = jnp.zeros(CLASSES).at[3].set(-INF)
    call = lambda a, **bias: sj.linear_distillation_loss(
        **a, temperature=2.0, **bias, block_size=block_size
    )
    kept = jnp.array([i for i in range(CLASSES) if i != 3])
    fewer = {n: x[kept] if n.endswith("weights") else x for n, x in args.items()}
    both = {"bias": drop, "teacher_bias": drop}
    close(call(args, **both), call(fewer))
    student, teacher = (args[f] @ args[w].T for f, w in (HEADS[:2], HEADS[2:]))
    exact = jnp.mean(sj.distillation_loss(student, teacher + drop[None], temperature=2.0))
    close(call(args, teacher_bias=drop), exact)
    assert call(args, bias=drop) == INF
    for biases in (both, {"teacher_bias": drop}, {"bias": drop}):
        slopes = jax.jit(jax.grad(lambda a, b=biases: call(a, **b)))(args)
        assert all(jnp.isfinite(x).all() for x in slopes.values())
    assert (slopes["features"] == 0).all()  # An infinite loss is constant.


@pytest.mark.slow
def test_tokens_that_do_not_count():
    args = draw()
    spoilt = args | {
        "features": args["features"].at[1].set(NAN),
        "example_weights": args["example_weights"].at[1].set(0),
    }
    clean = args | {"example_weights": spoilt["example_weights"]}
    assert_close(
        sj.linear_distillation_loss(**spoilt), sj.linear_distillation_loss(**clean), rtol=1e-15
    )
    for reduction, fold in (("sum", jnp.sum), (None, lambda x: x)):
        each = sj.linear_distillation_loss(**args, reduction=None)
        assert_close(
            sj.linear_distillation_loss(**args, reduction=reduction), fold(each), rtol=1e-14
        )


def test_nothing_of_tokens_times_classes_is_kept():
    tokens, width, classes = 2048, 8, 32768
    shapes = [(tokens, width), (classes, width)] * 2
    heads = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = lambda *heads: sj.linear_distillation_loss(*heads, temperature=2.0)
    for function in (jax.grad(loss, (0, 1, 2, 3)), lambda *a: jax.jvp(loss, a, a)):
        compiled = jax.jit(function).lower(*heads).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.2 * 4 * tokens * classes


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"teacher_features": jnp.ones((4, 4))}, ValueError, "`teacher_features` must hold"),
        ({"teacher_weights": jnp.ones((4, 4))}, ValueError, "`teacher_weights` must hold"),
        ({"teacher_weights": jnp.ones((11, 3))}, ValueError, "`teacher_features` must be"),
        ({"teacher_bias": jnp.ones(3)}, ValueError, "`teacher_bias` must be"),
        ({"teacher_soft_cap": jnp.ones(3)}, ValueError, "`teacher_soft_cap` must be"),
        ({"teacher_weights": jnp.ones((11, 4), complex)}, TypeError, "`teacher_weights` must"),
        ({"teacher_bias": jnp.ones(11, bool)}, TypeError, "`teacher_bias` must hold numbers"),
        ({"where": jnp.ones(5)}, TypeError, "`where` must be bool"),
        ({"where": jnp.ones(3, bool)}, ValueError, "`where` of shape"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be"),
        ({"reduction": "max"}, ValueError, "`reduction` must be"),
        ({"block_size": 0}, ValueError, "`block_size` must be"),
    ],
)
def test_errors(change, error, problem):
    with pytest.raises(error, match=problem):
        sj.linear_distillation_loss(**(heads() | {"temperature": 1.5} | change))


@pytest.mark.parametrize("block_size", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_what_does_not_count_may_hold_anything(block_size):
    """Tokens of weight 0, and classes that the bias drops."""
    args = draw()
    args["example_weights"] = args["example_weights"].at[1].set(0)
    for name in ("bias", "teacher_bias"):
        args[name] = args[name].at[3].set(-INF)
    bad = args | {
        "temperature": args["temperature"].at[1].set(NAN),
        "features": args["features"].at[1].set(INF),
        "teacher_features": args["teacher_features"].at[1].set(NAN),
        "weights": args["weights"].at[3].set(NAN),
        "teacher_weights": args["teacher_weights"].at[3].set(INF),
    }
    loss = lambda args: sj.linear_distillation_loss(**args, block_size=block_size)
    both = jax.jit(jax.value_and_grad(loss))
    (value, slopes), (desired, exact) = both(bad), both(args)
    assert slopes["example_weights"][1] == 0
    exact["example_weights"] = exact["example_weights"].at[1].set(0)
    close((value, slopes), (desired, exact))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, None])
def test_the_limit_of_endless_temperature(block_size):
    """Half the variance of the difference of the logits, from far below the limit on."""
    full = {name: x.astype("float32") for name, x in draw().items() if "features" in name}
    full |= {name: x.astype("float32") for name, x in draw().items() if "weights" in name}
    del full["example_weights"]
    loss = jax.jit(
        lambda args, heat: sj.linear_distillation_loss(
            **args, temperature=heat, reduction=None, block_size=block_size
        )
    )
    slope = jax.jit(jax.grad(lambda args, heat: jnp.sum(loss(args, heat))))
    double = {name: np.float64(x) for name, x in full.items()}
    student = double["features"] @ double["weights"].T
    teacher = double["teacher_features"] @ double["teacher_weights"].T
    apart = (student - teacher) - np.mean(student - teacher, 1, keepdims=True)
    for heat in (1e8, 1e15, 1e20, 3e38, INF):
        # Products of 4 terms and the two sums are rounded; the rest of the limit is 10 / T.
        got = loss(full, jnp.float32(heat))
        assert_close(got, (apart**2).mean(1) / 2, rtol=16 * eps("float32"))
        grads = slope(full, jnp.float32(heat))
        exact = apart @ double["weights"] / CLASSES
        assert_close(grads["features"], exact, rtol=1e-5, atol=1e-6)
    dot = jax.jvp(lambda heat: loss(full, heat), (jnp.float32(INF),), (jnp.float32(1),))[1]
    assert (dot == 0).all()


@pytest.mark.parametrize("block_size", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_tokens_left_out_by_a_mask_may_hold_anything(block_size):
    args = draw()
    left_out = jnp.array([1, 3])
    kept = jnp.array([0, 2, 4])
    where = jnp.ones(TOKENS, bool).at[left_out].set(False)
    by_token = ("features", "teacher_features", "temperature", "example_weights")
    bad = {n: x.at[left_out].set(NAN) if n in by_token else x for n, x in args.items()}
    bad["teacher_features"] = bad["teacher_features"].at[3].set(INF)
    fewer = {n: x[kept] if n in by_token else x for n, x in args.items()}
    loss = lambda args, **rest: sj.linear_distillation_loss(
        **args, **rest, block_size=block_size
    )
    both = jax.jit(jax.value_and_grad(lambda args: loss(args, where=where)))
    value, slopes = both(bad)
    desired, exact = jax.value_and_grad(loss)(fewer)
    for name in by_token:
        np.testing.assert_array_equal(slopes[name][left_out], 0)
        slopes[name] = slopes[name][kept]
    close((value, slopes), (desired, exact))
    each = loss(bad, where=where, reduction=None)
    assert (each[left_out] == 0).all()
    assert jnp.isfinite(each).all()


def test_mixed_dtypes():
    """A student in bfloat16 with float32 weights, and a teacher in float32."""
    args = heads()
    narrow = {name: x.astype("float32") for name, x in args.items()}
    narrow["features"] = args["features"].astype("bfloat16")
    exact = {name: x.astype("float64") for name, x in narrow.items()}
    exact["weights"] = narrow["weights"].astype("bfloat16").astype("float64")
    for block_size in (4, None):
        loss = lambda a, size=block_size: sj.linear_distillation_loss(
            **a, temperature=2.0, block_size=size
        )
        value, slopes = jax.jit(jax.value_and_grad(loss))(narrow)
        desired, wanted = jax.value_and_grad(loss)(exact)
        assert value.dtype == jnp.float32
        assert_close(value, np.asarray(desired), rtol=1e-5)
        for name, slope in slopes.items():
            assert slope.dtype == narrow[name].dtype
            # The features' gradient is that of the weights before they were rounded.
            atol = 4 * eps("bfloat16" if name == "features" else "float32")
            assert_close(slope, np.asarray(wanted[name]), rtol=0, atol=atol)


@pytest.mark.parametrize("option", ["temperature", "soft_cap", "teacher_soft_cap"])
def test_no_option_widens_the_loss(option):
    args = {name: x.astype("float32") for name, x in heads().items()}
    for value in (0.5, jnp.float32(0.5), jnp.float64(0.5)):
        given = args | {"temperature": 1.0} | {option: value}
        for block_size in (None, 4):
            loss = lambda given, size=block_size: sj.linear_distillation_loss(
                **given, block_size=size, example_weights=jnp.ones(TOKENS)
            )
            assert jax.eval_shape(loss, given).dtype == jnp.float32


def test_an_infinite_loss_of_no_weight_reaches_nothing():
    """Where the student drops what the teacher keeps, at a temperature that is learned."""
    args = heads() | {"bias": jnp.zeros(CLASSES).at[3].set(-INF)}
    loss = lambda args, temperature: sj.linear_distillation_loss(
        **args, temperature=temperature, example_weights=jnp.zeros(TOKENS), block_size=4
    )
    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(args, jnp.float64(2.0))
    assert value == 0
    assert all((x == 0).all() for x in jax.tree.leaves(slopes))


def shannon_logs(logits):
    logits = np.asarray(logits, np.float64)
    with np.errstate(divide="ignore"):
        return logits - np.log(np.sum(np.exp(logits), 1, keepdims=True))


def plain_mixture(t, s, weight):
    """The Jensen-Shannon divergence of each row, in float64, from the definition."""
    log_p, log_q, weight = shannon_logs(t), shannon_logs(s), np.asarray(weight)
    p, q = np.exp(log_p), np.exp(log_q)
    mixture = weight * p + (1 - weight) * q
    with np.errstate(divide="ignore", invalid="ignore"):
        to_p = np.where(p == 0, 0, p * (log_p - np.log(mixture))).sum(1)
        to_q = np.where(q == 0, 0, q * (log_q - np.log(mixture))).sum(1)
        weight = weight[:, 0] if weight.ndim else weight
        return np.where(weight == 0, 0, weight * to_p) + np.where(
            weight == 1, 0, (1 - weight) * to_q
        )


MIXED = (*HEADS, "bias", "teacher_bias", "temperature", "example_weights")


def mixed():
    """Arguments of the Jensen-Shannon divergence of two heads, without the caps."""
    args = draw()
    return {name: args[name] for name in MIXED} | {"weight": jnp.linspace(0.1, 0.9, TOKENS)}


def mixed_rows(args):
    """The scores of teacher and student over the temperature."""
    return (
        (args[f"{part}features"] @ args[f"{part}weights"].T + args[f"{part}bias"][None])
        / args["temperature"][:, None]
        for part in ("teacher_", "")
    )


@pytest.mark.parametrize("block_size", [4, None])
def test_jensen_shannon_of_two_heads(block_size):
    """Values from the definition, and derivatives of `jensen_shannon_divergence`."""
    args = mixed()
    ours = lambda args: sj.linear_jensen_shannon_divergence(**args, block_size=block_size)
    shares = np.asarray(args["example_weights"])
    each = plain_mixture(*mixed_rows(args), np.asarray(args["weight"])[:, None])

    def dense(args):
        rows = sj.jensen_shannon_divergence(*mixed_rows(args), weight=args["weight"][:, None])
        return jnp.sum(args["example_weights"] * rows) / jnp.sum(args["example_weights"])

    value, slopes = jax.jit(jax.value_and_grad(ours))(args)
    assert_close(value, np.sum(shares * each) / np.sum(shares), rtol=1e-13)
    close(slopes, jax.jit(jax.grad(dense))(args))


@pytest.mark.slow
def test_jensen_shannon_of_two_heads_in_both_modes_and_twice():
    args = mixed()
    ours = lambda args: sj.linear_jensen_shannon_divergence(**args, block_size=4)
    plain = lambda args: sj.linear_jensen_shannon_divergence(**args)
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), args)
    close(jax.jvp(ours, (args,), (dots,))[1], jax.jvp(plain, (args,), (dots,))[1])
    twice = lambda f: jax.jit(lambda a: jax.jvp(jax.grad(f), (a,), (dots,))[1])(args)
    close(twice(ours), twice(plain), 1e-11)


def test_jensen_shannon_of_dropped_classes():
    """Either layer may drop what the other keeps, at every weight of the mixture."""
    args = {name: x for name, x in mixed().items() if name in HEADS}
    drop, none = jnp.zeros(CLASSES).at[3].set(-INF), jnp.zeros(CLASSES)

    @functools.partial(jax.jit, static_argnames="block_size")
    def run(args, weight, bias, teacher_bias, block_size):
        call = lambda args, weight: sj.linear_jensen_shannon_divergence(
            **args,
            weight=weight,
            bias=bias,
            teacher_bias=teacher_bias,
            block_size=block_size,
        )
        return jax.value_and_grad(call, (0, 1))(args, weight)

    other = jnp.zeros(CLASSES).at[1].set(-INF)
    for biases in ((drop, none), (none, drop), (drop, drop), (drop, other), (none - INF, none)):
        for weight in (0.0, 0.3, 1.0):
            value, slopes = run(args, jnp.asarray(weight), *biases, block_size=4)
            student, teacher = (args[f] @ args[w].T for f, w in (HEADS[:2], HEADS[2:]))
            some = jnp.isfinite(biases[0]).any()  # A layer without classes has divergence 0.
            student += jnp.where(some, biases[0], 0)[None]
            exact = np.mean(plain_mixture(teacher + biases[1][None], student, weight))
            exact = exact if some else 0
            assert_close(value, exact, rtol=1e-12, atol=1e-15)
            assert all(jnp.isfinite(x).all() for x in slopes[0].values())
            if weight == 0.3:
                dense, dense_slopes = run(args, jnp.asarray(weight), *biases, block_size=None)
                assert_close(dense, value, rtol=1e-12)
                for one, two in zip(*map(jax.tree.leaves, (slopes, dense_slopes)), strict=True):
                    assert_close(one, two, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block_size", [4, None])
def test_a_small_jensen_shannon_divergence_keeps_its_digits(block_size):
    """The relative error is about eps, the rounding of the logits, over their distance."""
    args = {name: x for name, x in mixed().items() if name in HEADS[:2]}
    call = jax.jit(
        lambda x, w, moved: sj.linear_jensen_shannon_divergence(
            x, w, x, moved, weight=0.3, block_size=block_size
        )
    )
    features, weights = args.values()
    shift = jnp.sin(weights)
    limit = None
    for apart in (1e-4, 1e-6, 1e-8):
        found = call(features, weights, weights + apart * shift) / apart**2
        limit = found if limit is None else limit
        # The quotient changes by a share of `apart`; the logits are rounded.
        assert_close(found, limit, rtol=1e-3 + 64 * eps("float64") / apart)
        assert found > 0


def test_a_token_that_jensen_shannon_leaves_out_reaches_nothing():
    args = mixed()
    keep = jnp.arange(TOKENS) != 1
    spoil = ("features", "teacher_features", "temperature", "weight", "example_weights")
    spoilt = args | {name: args[name].at[1].set(NAN) for name in spoil}
    kept = {name: x[keep] if name in spoil else x for name, x in args.items()}
    run = lambda args, **options: jax.value_and_grad(
        lambda a: sj.linear_jensen_shannon_divergence(**a, **options, block_size=4)
    )(args)
    value, slopes = run(spoilt, where=keep)
    exact, wanted = run(kept)
    assert_close(value, exact, rtol=1e-14)
    for name, slope in slopes.items():
        close(slope[keep] if name in spoil else slope, wanted[name])
        assert name not in spoil or (slope[1] == 0).all()


def test_no_logits_of_jensen_shannon_are_kept():
    tokens, width, classes = 2048, 8, 65536
    shapes = [(tokens, width), (classes, width)] * 2
    heads = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for function in (
        jax.grad(sj.linear_jensen_shannon_divergence, (0, 1, 2, 3)),
        lambda *a: jax.jvp(sj.linear_jensen_shannon_divergence, a, a),
    ):
        compiled = jax.jit(function).lower(*heads).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.2 * 4 * tokens * classes
