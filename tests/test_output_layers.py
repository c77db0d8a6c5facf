"""The fused output layer against the plain definition over logits that are formed."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import softjax as sj
from softjax.output_layers import _stream
from tests.helpers import INF, NAN, eps

TOKENS, WIDTH, CLASSES = 7, 5, 23


def draw(seed=0, tokens=TOKENS, width=WIDTH, classes=CLASSES, dtype="float64"):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((tokens, width))
    weights = rng.standard_normal((classes, width))
    labels = rng.integers(0, classes, tokens)
    arrays = jnp.asarray(features.astype(dtype)), jnp.asarray(weights.astype(dtype))
    return (*arrays, jnp.asarray(labels))


def options(seed=1):
    """Every option that has a derivative."""
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(rng.standard_normal(CLASSES)),
        "temperature": jnp.asarray(rng.uniform(0.5, 1.5, TOKENS)),
        "soft_cap": jnp.asarray(3.0),
        "label_smoothing": jnp.asarray(0.1),
        "z_loss": jnp.asarray(0.01),
        "class_weights": jnp.asarray(rng.uniform(0.5, 1.5, CLASSES)),
        "example_weights": jnp.asarray(rng.uniform(0.5, 1.5, TOKENS)),
    }


def plain_logits(features, weights, *, bias=None, temperature=None, soft_cap=None):
    logits = features @ weights.T
    if bias is not None:
        logits += bias[None]
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits if temperature is None else logits / temperature[:, None]


def plain_loss(features, weights, labels, *, reduction="mean", ignore_index=None, **rest):
    """The definition, written out."""
    layer = {k: rest.get(k) for k in ("bias", "temperature", "soft_cap")}
    logits = plain_logits(features, weights, **layer)
    log_probs = logits - jax.scipy.special.logsumexp(logits, 1, keepdims=True)
    factors = rest.get("class_weights", jnp.ones(weights.shape[0]))
    epsilon = rest.get("label_smoothing", 0.0)
    safe = jnp.where((labels >= 0) & (labels < weights.shape[0]), labels, 0)
    loss = -(1 - epsilon) * factors[safe] * log_probs[jnp.arange(len(labels)), safe]
    loss -= epsilon * jnp.mean(factors[None] * log_probs, 1)
    loss += rest.get("z_loss", 0.0) * jax.scipy.special.logsumexp(logits, 1) ** 2
    shares = rest.get("example_weights", jnp.ones(len(labels)))
    if ignore_index is not None:
        shares = jnp.where(labels == ignore_index, 0, shares)
    if reduction is None:
        return shares * loss
    total = jnp.sum(shares * loss)
    return total if reduction == "sum" else total / jnp.sum(shares * factors[safe])


def close(actual, desired, rtol=1e-12, atol=1e-12):
    chex.assert_trees_all_close(actual, desired, rtol=rtol, atol=atol)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
def test_the_z_loss_apart(reduction):
    call = functools.partial(sj.linear_cross_entropy, *draw(), reduction=reduction)
    given = {"z_loss": 0.1, "label_smoothing": 0.2, "ignore_index": int(draw()[2][0])}
    loss, z_loss = call(return_z_loss=True, **given)
    close(loss, call(**given))
    close(loss - z_loss, call(**given | {"z_loss": 0.0}))
    assert not np.any(call(return_z_loss=True)[1])


def test_the_z_loss_apart_needs_the_gradient_of_two_numbers():
    with pytest.raises(ValueError, match="`return_z_loss`"):
        sj.linear_cross_entropy(*draw(), return_z_loss=True, forward_gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "block_size"),
    [("mean", 4), ("mean", None), ("sum", 1), ("sum", 23), (None, 4), (None, None)],
)
def test_all_options_together(reduction, block_size):
    features, weights, labels = draw()
    labels = labels.at[2].set(-1)
    rest = options()

    def loss(function, features, weights, rest, **static):
        value = function(
            features, weights, labels, reduction=reduction, ignore_index=-1, **rest, **static
        )
        return jnp.sum(jnp.sin(value))

    ours = lambda *args: loss(sj.linear_cross_entropy, *args, block_size=block_size)
    theirs = lambda *args: loss(plain_loss, *args)
    args = features, weights, rest
    close(ours(*args), theirs(*args))
    close(jax.grad(ours, (0, 1, 2))(*args), jax.grad(theirs, (0, 1, 2))(*args))
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), args)
    close(jax.jvp(ours, args, dots)[1], jax.jvp(theirs, args, dots)[1])


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [3, None])
def test_the_gradient_found_with_the_value(block_size):
    """Of all options together; only what is asked for; and the modes that it gives up."""
    features, weights, labels = draw()
    labels = labels.at[2].set(-1)
    rest = options()
    shared = {"ignore_index": -1, "reduction": "mean"}
    ours = lambda f, w, r: sj.linear_cross_entropy(
        f, w, labels, forward_gradient=True, block_size=block_size, **shared, **r
    )
    theirs = lambda f, w, r: plain_loss(f, w, labels, **shared, **r)
    args = features, weights, rest
    close(ours(*args), theirs(*args))
    desired = jax.grad(theirs, (0, 1, 2))(*args)
    close(jax.jit(jax.grad(ours, (0, 1, 2)))(*args), desired)
    close(jax.grad(lambda w: 3 * ours(features, w, rest))(weights), 3 * desired[1])
    several = jnp.stack([weights, 2 * weights])
    grad = jax.grad(lambda w: ours(features, w, {}))
    close(jax.vmap(grad)(several), jnp.stack([grad(w) for w in several]))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda f: ours(f, weights, {}), (features,), (features,))
    with pytest.raises(ValueError, match="`reduction` must be"):
        sj.linear_cross_entropy(
            features, weights, labels, reduction=None, forward_gradient=True
        )


def test_what_moves_may_change_under_checkpoint():
    x, w, y = jnp.ones((2, 2)), jnp.ones((3, 2)), jnp.array([0, 2])
    loss = lambda x, w, y: sj.linear_cross_entropy(x, w, y, forward_gradient=True)
    alone = jax.grad(loss)(x, w, y)
    close(jax.grad(jax.checkpoint(lambda x: loss(x, w, y)))(x), alone)
    jax.grad(jax.checkpoint(lambda x, w: loss(x, w, y)), (0, 1))(x, w)
    jax.grad(jax.checkpoint(loss), (0, 1))(x, w, y)
    step = lambda x: jax.checkpoint(lambda total, _: (total + loss(x, w, y), None))
    summed = lambda x: jax.lax.scan(step(x), 0.0, None, length=2)[0]
    close(jax.grad(summed)(x), 2 * alone)


def test_the_gradient_found_with_the_value_keeps_no_logits():
    shapes = (4096, 32), (8192, 32)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    loss = lambda f, w, y: sj.linear_cross_entropy(f, w, y, forward_gradient=True)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.1 * 4 * 4096 * 8192


@pytest.mark.parametrize("block_size", [None, 4])
def test_dropped_labels_and_weights_of_zero(block_size):
    """A dropped label costs inf, without a derivative, unless its weight is 0."""
    features, weights, _ = draw(tokens=3, classes=6)
    labels = jnp.array([4, 0, 4])
    bias = jnp.zeros(6).at[4].set(-INF)
    call = lambda f, **rest: sj.linear_cross_entropy(
        f, weights, labels, bias=bias, reduction=None, block_size=block_size, **rest
    )
    assert np.isinf(call(features)).tolist() == [True, False, True]
    slopes = jax.grad(lambda f: jnp.sum(call(f)))(features)
    assert (slopes[jnp.array([0, 2])] == 0).all()
    assert (slopes[1] != 0).all()
    light = jnp.ones(6).at[4].set(0)
    assert (call(features, class_weights=light)[jnp.array([0, 2])] == 0).all()
    logits = features @ weights.T + bias[None]
    for rest in ({"label_smoothing": 1.0}, {"label_smoothing": 0.1, "class_weights": light}):
        close(call(features, **rest), sj.cross_entropy(logits, labels, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_sampled_combinations_of_options(seed):
    """Any of the options, against the definition: value, gradient, JVP and Hessian."""
    rng = np.random.default_rng(seed)
    features, weights, labels = draw(seed)
    ignored = int(labels[3]) if rng.random() < 0.5 else None
    reduction = ("mean", "sum", None)[rng.integers(3)]
    block_size = (None, 6, 1, 23)[rng.integers(4)]
    rest = {name: x for name, x in options(seed).items() if rng.random() < 0.5}

    def loss(function, args, **static):
        features, weights, rest = args
        static |= {"reduction": reduction, "ignore_index": ignored}
        return jnp.sum(jnp.sin(function(features, weights, labels, **static, **rest)))

    ours = lambda args: loss(sj.linear_cross_entropy, args, block_size=block_size)
    theirs = lambda args: loss(plain_loss, args)
    args = features, weights, rest
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), args)
    close(ours(args), theirs(args))
    close(jax.jit(jax.grad(ours))(args), jax.grad(theirs)(args))
    close(jax.jvp(ours, (args,), (dots,))[1], jax.jvp(theirs, (args,), (dots,))[1])
    twice = lambda f: jax.jit(lambda a: jax.jvp(jax.grad(f), (a,), (dots,))[1])(args)
    close(twice(ours), twice(theirs), 1e-10, 1e-10)
    if reduction is not None:
        forward = lambda args: loss(
            sj.linear_cross_entropy, args, block_size=block_size, forward_gradient=True
        )
        close(jax.jit(jax.grad(forward))(args), jax.grad(theirs)(args))


@SLOW
@pytest.mark.parametrize("name", sorted(options()))
def test_each_option_alone(name):
    features, weights, labels = draw()
    rest = {name: options()[name]}
    ours = lambda f, w, r: sj.linear_cross_entropy(f, w, labels, block_size=6, **r)
    theirs = lambda f, w, r: plain_loss(f, w, labels, **r)
    args = features, weights, rest
    close(ours(*args), theirs(*args))
    close(jax.grad(ours, (0, 1, 2))(*args), jax.grad(theirs, (0, 1, 2))(*args))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "width", "classes", "block_size"),
    [
        (252, 13, 507, 64),
        (0, 4, 6, 2),
        (1, 1, 1, None),
        (1, 3, 2, 1),
        (3, 1, 17, 5),
    ],
)
def test_odd_sizes(tokens, width, classes, block_size):
    features, weights, labels = draw(tokens=tokens, width=width, classes=classes)
    ours = lambda f, w: sj.linear_cross_entropy(f, w, labels, block_size=block_size)
    theirs = lambda f, w: plain_loss(f, w, labels) if tokens else jnp.zeros(())
    close(ours(features, weights), theirs(features, weights))
    if tokens:
        grads = jax.grad(theirs, (0, 1))(features, weights)
        close(jax.grad(ours, (0, 1))(features, weights), grads)


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        pytest.param(name, at_once, marks=SLOW)
        for name, at_once in (("soft_cap", 3), ("temperature", 3), ("label_smoothing", 100))
    ],
)
def test_second_derivatives_whatever_the_tokens_at_once(name, at_once, monkeypatch):
    """Forward over reverse, reverse over forward and reverse over reverse.

    (JAX 0.10 drops custom rules where the reverse of a scan is differentiated again: the value
    must differentiate rightly by itself.)
    """
    monkeypatch.setattr(_stream, "TOKENS", at_once)
    jax.clear_caches()
    features, weights, labels = draw()
    rest = {name: options()[name]}
    ours = lambda a: sj.linear_cross_entropy(*a, labels, block_size=6, **rest)
    theirs = lambda a: plain_loss(*a, labels, **rest)
    at = features, weights
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), at)
    pair = lambda f: (
        lambda a: sum(jnp.vdot(x, y) for x, y in zip(jax.grad(f)(a), dots, strict=True))
    )
    for second in (
        lambda f: jax.jvp(jax.grad(f), (at,), (dots,))[1],
        lambda f: jax.grad(lambda a: jax.jvp(f, (a,), (dots,))[1])(at),
        lambda f: jax.grad(pair(f))(at),
    ):
        close(second(ours), second(theirs))
    jax.clear_caches()


@SLOW
def test_derivatives():
    features, weights, labels = draw(tokens=3, classes=7)
    loss = lambda f, w, b, t: sj.linear_cross_entropy(
        f, w, labels, bias=b, temperature=t, block_size=3
    )
    args = features, weights, jnp.linspace(-1.0, 1.0, 7), jnp.array([0.7, 1.0, 1.6])
    check_grads(loss, args, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def test_vmap_scan_and_remat():
    features, weights, labels = draw()
    several = jnp.stack([features, 2 * features])
    loss = lambda f: sj.linear_cross_entropy(f, weights, labels, block_size=6)
    desired = jnp.stack([jax.grad(loss)(f) for f in several])
    close(jax.vmap(jax.grad(loss))(several), desired)
    close(jax.lax.map(jax.grad(loss), several), desired)
    close(jnp.stack([jax.grad(jax.checkpoint(loss))(f) for f in several]), desired)


@pytest.mark.parametrize("block_size", [None, 4])
def test_any_shape_of_tokens(block_size):
    features, weights, labels = draw(tokens=12)
    loss = sj.linear_cross_entropy(
        features.reshape(3, 4, WIDTH),
        weights,
        labels.reshape(3, 4),
        reduction=None,
        block_size=block_size,
    )
    close(loss, plain_loss(features, weights, labels, reduction=None).reshape(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [5, 23])
def test_statistics(block_size):
    features, weights, labels = draw()
    rest = {k: options()[k] for k in ("bias", "temperature", "soft_cap")}
    found = sj.linear_statistics(features, weights, labels, block_size=block_size, **rest)
    logits = plain_logits(features, weights, **rest)
    probs = jax.nn.softmax(logits)
    close(found.logsumexp, jax.scipy.special.logsumexp(logits, 1))
    close(found.entropy, -jnp.sum(probs * jnp.log(probs), 1))
    close(found.log_prob, jnp.log(probs)[jnp.arange(TOKENS), labels])
    np.testing.assert_array_equal(found.argmax, jnp.argmax(logits, 1))
    assert found.argmax.dtype == jnp.int32
    assert sj.linear_statistics(features, weights).log_prob is None
    check_grads(
        lambda f, w: sj.linear_statistics(f, w, labels, block_size=block_size)[:2],
        (features, weights),
        order=2,
        atol=1e-5,
        rtol=1e-5,
    )


def test_features_of_width_zero():
    features, weights, labels = jnp.ones((4, 0)), jnp.ones((3, 0)), jnp.array([0, 1, 2, 0])
    for rest in ({}, {"block_size": 2}, {"forward_gradient": True, "block_size": 2}):
        loss = lambda x, rest=rest: sj.linear_cross_entropy(x, weights, labels, **rest)
        close(loss(features), np.log(3))
        assert jax.grad(loss)(features).shape == (4, 0)
    close(sj.info_nce(features, features, temperature=0.5), np.log(4))
    # No tokens, of which some might not count.
    assert sj.linear_cross_entropy(features[:0], weights, labels[:0], ignore_index=0) == 0


def test_the_first_of_equals_is_the_argmax():
    found = sj.linear_statistics(jnp.ones((1, 2)), jnp.zeros((9, 2)), block_size=2)
    assert found.argmax.tolist() == [0]
    close(found.entropy, jnp.log(jnp.array([9.0])))


def test_a_confident_token_keeps_its_loss_and_gradient():
    """One logit 60 above three others: 3 exp(-60), where 1 - p is 0 in float32."""
    features = jnp.ones((1, 1), jnp.float32)
    weights = jnp.array([[60.0], [0.0], [0.0], [0.0]], jnp.float32)
    for block_size in (None, 1, 3):
        loss = lambda b, size=block_size: sj.linear_cross_entropy(
            features, weights, jnp.array([0]), bias=b, block_size=size
        )
        value, slope = jax.value_and_grad(loss)(jnp.zeros(4, jnp.float32))
        exact = 3 * np.exp(-60.0)
        assert abs(float(value) - exact) <= 1e-6 * exact
        np.testing.assert_allclose(slope, exact * np.array([-1, 1 / 3, 1 / 3, 1 / 3]), 1e-6)


@pytest.mark.parametrize("block_size", [None, 4])
def test_ignored_tokens_reach_nothing(block_size):
    features, weights, labels = draw()
    labels = labels.at[2].set(-100)
    spoilt = features.at[2].set(NAN)
    loss = lambda f, w: sj.linear_cross_entropy(
        f, w, labels, ignore_index=-100, block_size=block_size
    )
    grads = jax.grad(loss, (0, 1))(spoilt, weights)
    close(grads, jax.grad(loss, (0, 1))(features, weights))
    np.testing.assert_array_equal(grads[0][2], 0)
    none = sj.linear_cross_entropy(
        features, weights, jnp.full(TOKENS, -100), ignore_index=-100, block_size=block_size
    )
    assert float(none) == 0


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_label_out_of_range_is_no_other_class(block_size):
    features, weights, labels = draw()
    for bad in (-1, CLASSES, 2**31 - 1):
        at_two = labels.at[2].set(bad)
        loss = lambda f, at=at_two: sj.linear_cross_entropy(
            f, weights, at, reduction=None, block_size=block_size
        )
        assert np.isnan(loss(features)).tolist() == [i == 2 for i in range(TOKENS)]
        slopes = jax.grad(lambda f, loss=loss: jnp.sum(loss(f)))(features)
        assert jnp.isfinite(slopes).all()  # The NaN is a constant, as in `cross_entropy`.
        assert (slopes == 0).all(1).tolist() == [i == 2 for i in range(TOKENS)]


@pytest.mark.slow
def test_a_bias_of_minus_infinity_drops_a_class():
    features, weights, labels = draw(classes=6)
    labels = jnp.where(labels == 4, 0, labels)
    bias = jnp.zeros(6).at[4].set(-INF)
    kept = jnp.array([0, 1, 2, 3, 5])
    moved = jnp.where(labels == 5, 4, labels)
    for size, cap in itertools.product((None, 1, 4), (None, 2.0)):
        loss = lambda f, w, size=size, cap=cap: sj.linear_cross_entropy(
            f, w, labels, bias=bias, block_size=size, soft_cap=cap
        )
        theirs = lambda f, w, cap=cap: plain_loss(
            f, w, moved, **({} if cap is None else {"soft_cap": cap})
        )
        close(loss(features, weights), theirs(features, weights[kept]))
        grads = jax.grad(loss, (0, 1))(features, weights)
        desired = jax.grad(theirs, (0, 1))(features, weights[kept])
        close((grads[0], grads[1][kept]), desired)
        np.testing.assert_array_equal(grads[1][4], 0)


@pytest.mark.parametrize("block_size", [None, 2])
def test_an_infinite_bias_is_constant_in_the_temperature(block_size):
    x, w, labels = jnp.array([[1.0, 0], [0, 2]]), jnp.ones((3, 2)), jnp.array([0, 1])
    bias = jnp.array([0, INF, 0])
    loss = lambda heat: sj.linear_cross_entropy(
        x, w, labels, bias=bias, temperature=heat, reduction=None, block_size=block_size
    )
    assert jax.jacrev(loss)(2.0).tolist() == jax.jacfwd(loss)(2.0).tolist() == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [None, 2])
def test_a_soft_cap_of_infinity_bounds_nothing(block_size):
    x, w, labels = draw(tokens=2, width=2, classes=3)
    call = lambda x, cap: sj.linear_cross_entropy(
        x, w, labels, soft_cap=cap, block_size=block_size
    )
    loss, slopes = jax.value_and_grad(call, (0, 1))(x, INF)
    close((loss, slopes[0]), jax.value_and_grad(call)(x, None))
    assert slopes[1] == 0
    # An infinite logit is capped like a large one.
    biased = lambda cap, high: sj.linear_cross_entropy(
        x, w, labels, bias=jnp.array([0, high, 0]), soft_cap=cap, block_size=block_size
    )
    close(*(jax.value_and_grad(biased)(2.0, high) for high in (INF, 1e3)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [30.0, 1.0, 1e3])
def test_half_precision(dtype, scale):
    """The gradient's relative Frobenius error, against float64 at the same rounded inputs."""
    features, weights, labels = draw(tokens=64, width=64, classes=512, dtype="float32")
    features = (scale * features).astype(dtype)
    weights = (0.05 * weights).astype(dtype)
    widen = lambda x: x.astype(jnp.float64)
    ours = jax.grad(lambda f, w: sj.linear_cross_entropy(f, w, labels, block_size=100), (0, 1))(
        features, weights
    )
    exact = jax.grad(lambda f, w: plain_loss(f, w, labels), (0, 1))(
        widen(features), widen(weights)
    )
    loss = sj.linear_cross_entropy(features, weights, labels, block_size=100)
    assert loss.dtype == jnp.float32
    for actual, desired in zip(ours, exact, strict=True):
        assert actual.dtype == jnp.dtype(dtype)
        error = jnp.linalg.norm(widen(actual) - desired) / jnp.linalg.norm(desired)
        assert float(error) <= 1e-2


def test_nothing_of_tokens_times_classes_is_kept():
    tokens, width, classes = 1024, 32, 16384
    shapes = (tokens, width), (classes, width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    loss = sj.linear_cross_entropy
    moves = lambda f, w, y: jax.jvp(lambda f, w: loss(f, w, y), (f, w), (f, w))
    twice = lambda f, w, y: jax.jvp(
        jax.grad(lambda f, w: loss(f, w, y), (0, 1)), (f, w), (f, w)
    )[1]
    logits = 4 * tokens * classes
    for function, share in (
        (loss, 0.1),
        (jax.grad(loss, (0, 1)), 0.2),
        (moves, 0.3),
        (twice, 0.6),
    ):
        compiled = jax.jit(function).lower(*arrays, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= share * logits


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"features": jnp.ones((2, 4))}, ValueError, "`features` must be"),
        ({"weights": jnp.ones((3, 5), complex)}, TypeError, "`weights` must be real"),
        ({"weights": jnp.ones((0, 5))}, ValueError, "at least one class"),
        ({"labels": jnp.ones(2)}, TypeError, "`labels` must be integers"),
        ({"labels": jnp.ones(3, int)}, ValueError, "`labels` must have the shape"),
        ({"labels": jnp.ones(1, int)}, ValueError, "`labels` must have the shape"),
        ({"labels": 0}, ValueError, "`labels` must have the shape"),
        ({"bias": jnp.ones(2)}, ValueError, "`bias` must be"),
        ({"bias": jnp.ones(3, bool)}, TypeError, "`bias` must hold numbers"),
        ({"soft_cap": jnp.ones(2)}, ValueError, "`soft_cap` must be one number"),
        ({"class_weights": jnp.ones(2)}, ValueError, "`class_weights` must be"),
        ({"class_weights": 2.0}, ValueError, "`class_weights` must be"),
        ({"temperature": jnp.ones(3)}, ValueError, "`temperature` of shape"),
        ({"reduction": "max"}, ValueError, "`reduction` must be"),
        ({"block_size": 0}, ValueError, "`block_size` must be"),
        ({"block_size": 0, "forward_gradient": True}, ValueError, "`block_size` must be"),
        ({"label_smoothing": 1.5}, ValueError, "`label_smoothing` must be"),
    ],
)
def test_errors(change, error, problem):
    call = {
        "features": jnp.ones((2, 5)),
        "weights": jnp.ones((3, 5)),
        "labels": jnp.zeros(2, int),
    } | change
    with pytest.raises(error, match=problem):
        sj.linear_cross_entropy(**call)


def spoil(array, place):
    """NaN and inf in turn."""
    return array.at[place].set(jnp.resize(jnp.array([NAN, INF, -INF]), array[place].shape))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, None])
def test_what_a_bias_drops_may_hold_anything(block_size):
    features, weights, labels = draw(classes=6)
    labels = jnp.where(labels == 4, 0, labels)
    rest = {name: options()[name] for name in ("temperature", "soft_cap", "label_smoothing")}
    rest["bias"] = jnp.zeros(6).at[4].set(-INF)
    rest["class_weights"] = jnp.ones(6)
    args = features, weights, rest
    bad = features, spoil(weights, 4), rest | {"class_weights": jnp.ones(6).at[4].set(NAN)}
    loss = lambda f, w, r: sj.linear_cross_entropy(f, w, labels, block_size=block_size, **r)
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    (value, slopes), (desired, exact) = both(*bad), both(*args)
    close(value, desired)
    close(slopes, exact)
    np.testing.assert_array_equal(slopes[1][4], 0)
    dots = jax.tree.map(jnp.ones_like, args)
    forward = jax.jit(lambda *args: jax.jvp(loss, args, dots)[1])
    close(forward(*bad), forward(*args))


@pytest.mark.parametrize("block_size", [2, pytest.param(None, marks=SLOW)])
def test_infinite_logits_share_the_mass(block_size):
    """As in the dense loss, value and gradient; and a NaN is seen in its own token."""
    features = jnp.ones((4, 2)).at[3].set(NAN)
    weights = jnp.linspace(-1.0, 1.0, 14).reshape(7, 2)
    labels = jnp.array([3, 5, 0, 0])
    biases = [[0.0, 1, 2, INF, 0, 1, 0], [0.0, 1, 2, INF, 0, INF, 0], [INF] * 7]
    for rest in ({}, {"label_smoothing": jnp.asarray(0.25)}):
        streamed = lambda f, w, b, rest=rest: sj.linear_cross_entropy(
            f, w, labels, bias=b, reduction=None, block_size=block_size, **rest
        )
        dense = lambda f, w, b, rest=rest: sj.cross_entropy(f @ w.T + b[None], labels, **rest)
        calls = []
        for fn in (streamed, dense):
            total = lambda *args, fn=fn: (jnp.sum(fn(*args)[:3]), fn(*args))
            calls.append(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True)))
        for bias in map(jnp.array, biases):
            results = [call(features, weights, bias) for call in calls]
            (slopes, losses), (exact, desired) = results
            close((losses, slopes[0][:3]), (desired, exact[0][:3]))
            assert np.isnan(losses).tolist() == [False, False, False, True]
    found = sj.linear_statistics(features, weights, labels, bias=bias, block_size=block_size)
    close(found.entropy[:3], np.full(3, np.log(7)))
    assert np.isinf(found.logsumexp).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("block_size", "forward"),
    [
        (4, False),
        *(pytest.param(*case, marks=SLOW) for case in ((None, False), (None, True), (4, True))),
    ],
)
def test_tokens_that_do_not_count_may_hold_anything(block_size, forward):
    """Ignored ones, and those of weight 0, in every argument that has one number a token."""
    features, weights, labels = draw()
    labels = labels.at[2].set(-100)
    rest = options()
    rest["label_smoothing"] = jnp.full(TOKENS, 0.1)
    rest["z_loss"] = jnp.full(TOKENS, 0.01)
    rest["example_weights"] = rest["example_weights"].at[5].set(0)
    idle = jnp.array([2, 5])
    bad = rest | {
        name: spoil(rest[name], idle) for name in ("temperature", "label_smoothing", "z_loss")
    }
    loss = lambda f, w, r, y: sj.linear_cross_entropy(
        f, w, y, ignore_index=-100, block_size=block_size, forward_gradient=forward, **r
    )
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    value, slopes = both(spoil(features, idle), weights, bad, labels.at[5].set(10**6))
    desired, exact = both(features, weights, rest, labels)
    close(value, desired)
    np.testing.assert_array_equal(slopes[0][idle], 0)
    # The derivative in a weight of 0 is the loss of its token, if that is a number.
    assert jnp.abs(exact[2]["example_weights"][5]) > 1e-3
    assert slopes[2]["example_weights"][5] == 0
    exact[2]["example_weights"] = exact[2]["example_weights"].at[5].set(0)
    close(slopes, exact)


def rounded(array, dtype):
    """In float64, rounded to the dtype."""
    return jnp.asarray(array).astype(dtype).astype("float64")


MIXTURES = [  # the dtypes of features and weights, that of products, and of the loss
    ("bfloat16", "float32", "bfloat16", "float32"),
    ("float32", "bfloat16", "float32", "float32"),
    pytest.param("float16", "bfloat16", "float32", "float32", marks=SLOW),
    pytest.param("float32", "float64", "float64", "float64", marks=SLOW),
]


@pytest.mark.parametrize(("features_dtype", "weights_dtype", "product", "wide"), MIXTURES)
def test_mixed_dtypes(features_dtype, weights_dtype, product, wide):
    """As JAX promotes, but bfloat16 features meet float32 weights in bfloat16."""
    features, weights, labels = draw()
    features, weights = features.astype(features_dtype), weights.astype(weights_dtype)
    at = rounded(features, "float64"), rounded(weights, product)
    value, exact = jax.value_and_grad(plain_loss, (0, 1))(*at, labels)
    # A gradient is rounded to its own dtype, at most once per block of classes or tokens. For
    # the features of bfloat16 it is that of the float32 weights, of one more rounding.
    size = max(float(jnp.abs(x).max()) for x in (*exact, *at))
    for rest in ({}, {"block_size": 8}, {"block_size": 3, "forward_gradient": True}):
        loss = lambda f, w, rest=rest: sj.linear_cross_entropy(f, w, labels, **rest)
        got, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(features, weights)
        assert got.dtype == wide
        close(rounded(got, "float64"), value, rtol=16 * eps(wide))
        for slope, dtype, desired in zip(
            slopes, (features_dtype, weights_dtype), exact, strict=True
        ):
            assert slope.dtype == dtype
            close(rounded(slope, "float64"), desired, rtol=0, atol=4 * eps(dtype) * size)


@pytest.mark.parametrize("option", ["temperature", "soft_cap", "label_smoothing", "z_loss"])
def test_no_option_widens_the_loss(option):
    """Given as a Python number, a float32 and a float64 array."""
    features, weights, labels = draw(tokens=2, classes=3, dtype="float32")
    for value in (0.5, jnp.float32(0.5), jnp.float64(0.5)):
        for block_size in (None, 2):
            found = jax.eval_shape(
                lambda value, size=block_size: [
                    sj.linear_cross_entropy(
                        features, weights, labels, block_size=size, **{option: value}, **rest
                    )
                    for rest in ({}, {"reduction": None}, {"forward_gradient": True})
                ],
                value,
            )
            assert {x.dtype.name for x in found} == {"float32"}, (option, value)


@pytest.mark.parametrize("option", ["bias", "class_weights", "example_weights"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_vector_widens_the_results(option, dtype):
    features, weights, labels = draw(tokens=3, classes=3, dtype="float32")
    rest = {option: jnp.ones(3, dtype)}
    loss = lambda **more: sj.linear_cross_entropy(features, weights, labels, **rest, **more)
    found = jax.eval_shape(lambda: (loss(), loss(block_size=2), loss(forward_gradient=True)))
    if option == "bias":
        statistics = lambda: sj.linear_statistics(
            features, weights, labels, temperature=0.5, soft_cap=2.0, **rest
        )
        found = *found, *jax.eval_shape(statistics)[::3]
    assert {x.dtype.name for x in found} == {"float32"}


def test_the_argmax_is_decided_before_the_cap():
    """Scores of 200 and more under a cap of 1 are all 1 in float32."""
    weights = jnp.array([200.0, 400.0, 300.0, 390.0], jnp.float32)[:, None]
    for rest in ({"soft_cap": 1.0}, {"soft_cap": 1.0, "temperature": 1e30}, {}):
        for block_size in (None, 1, 3):
            found = sj.linear_statistics(
                jnp.ones((1, 1), jnp.float32), weights, block_size=block_size, **rest
            )
            assert found.argmax.tolist() == [1]
    close(found.logsumexp, np.float32([400 + np.log1p(np.exp(-10))]), rtol=1e-6)


@pytest.mark.parametrize("block_size", [1, 3, None])
def test_a_small_entropy_keeps_its_digits(block_size):
    """Wherever the largest score stands, and whatever the label is."""
    gap = 40.0
    exact = 3 * np.exp(-gap) * (1 + gap)
    for place in range(4):
        weights = jnp.zeros((4, 1), jnp.float32).at[place].set(gap)
        found = sj.linear_statistics(
            jnp.ones((1, 1), jnp.float32), weights, jnp.array([0]), block_size=block_size
        )
        close(found.entropy, np.float32([exact]), rtol=1e-6, atol=0)


def test_a_share_of_zero_counts_nothing_unreduced():
    """Not even the infinite loss of a dropped label."""
    losses = sj.linear_cross_entropy(
        jnp.ones((2, 1)),
        jnp.ones((3, 1)),
        jnp.array([0, 1]),
        bias=jnp.array([-INF, 0, 0]),
        example_weights=jnp.array([0.0, 1.0]),
        reduction=None,
    )
    close(losses, jnp.array([0, jnp.log(2.0)]))


@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float32"])
def test_the_gradient_of_half_features_is_rounded_once(weights_dtype):
    """Whatever the number of blocks: here 256 of 2 classes."""
    features, weights, labels = draw(tokens=8, width=8, classes=512, dtype="float32")
    features, weights = features.astype("bfloat16"), weights.astype(weights_dtype)
    loss = lambda f: sj.linear_cross_entropy(f, weights, labels, block_size=2)
    slope = jax.jit(jax.grad(loss))(features)
    exact = jax.grad(plain_loss)(
        rounded(features, "float64"), rounded(weights, "float64"), labels
    )
    # One rounding of half an eps, and that of the weights in the products, which moves p.
    error = jnp.linalg.norm(rounded(slope, "float64") - exact) / jnp.linalg.norm(exact)
    assert float(error) <= eps("bfloat16") / 2 * (1 if weights_dtype == "bfloat16" else 2)
