"""Adaptive softmax: PyTorch's numbers and gradients, its edges, and what it does not visit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax.output_layers import adaptive
from tests.helpers import NAN, assert_close, eps

WIDTH, FREQUENT, SIZES = 6, 5, (7, 11)
CLASSES = FREQUENT + sum(SIZES)


def draw(tokens, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(dtype))
    tails = [(normal(4 - i, WIDTH), normal(size, 4 - i)) for i, size in enumerate(SIZES)]
    head = normal(FREQUENT + len(SIZES), WIDTH), tails, normal(FREQUENT + len(SIZES))
    return (normal(tokens, WIDTH), *head), jnp.asarray(rng.integers(0, CLASSES, tokens))


def of(args, labels, **rest):
    features, head, tails, bias = args
    return sj.adaptive_log_softmax(features, head, tails, labels, head_bias=bias, **rest)


def plain(args, labels):
    """The definition, written out."""
    features, head, tails, bias = args
    logs = jax.nn.log_softmax(features @ head.T + bias[None])
    columns = [logs[:, :FREQUENT]]
    for i, (projection, weights) in enumerate(tails):
        tail = jax.nn.log_softmax(features @ projection.T @ weights.T)
        columns.append(logs[:, FREQUENT + i, None] + tail)
    return jnp.concatenate(columns, 1)[jnp.arange(len(labels)), labels]


def close(actual, desired, tolerance=1e-12):
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert_close(one, np.asarray(two), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "block_size"),
    [(4, 3), (256, None), (1, 2)],
)
def test_all_clusters_in_every_mode(together, block_size, monkeypatch):
    monkeypatch.setattr(adaptive, "_TOGETHER", together)
    jax.clear_caches()
    args, labels = draw(13)
    ours = lambda args: jnp.sum(jnp.sin(of(args, labels, block_size=block_size)))
    theirs = lambda args: jnp.sum(jnp.sin(plain(args, labels)))
    dots = jax.tree.map(lambda x: jnp.cos(7 * x), args)
    close(of(args, labels, block_size=block_size), plain(args, labels))
    close(jax.jit(jax.grad(ours))(args), jax.grad(theirs)(args))
    close(jax.jvp(ours, (args,), (dots,))[1], jax.jvp(theirs, (args,), (dots,))[1])
    twice = lambda f: jax.jit(lambda a: jax.jvp(jax.grad(f), (a,), (dots,))[1])(args)
    close(twice(ours), twice(theirs), 1e-11)
    jax.clear_caches()


@pytest.mark.slow
def test_parity_with_pytorch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.AdaptiveLogSoftmaxWithLoss(8, 60, [10, 30], div_value=2.0, head_bias=True)
    layer = layer.double()
    features = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 60, (40,))
    output, loss = layer(features, labels)
    loss.backward()
    ours = lambda x: jnp.asarray(x.detach().numpy())
    head = layer.head.weight, [(first.weight, last.weight) for first, last in layer.tail]
    tensors = features, *head, layer.head.bias
    args = jax.tree.map(ours, tensors)
    close(of(args, ours(labels)), ours(output))
    mean = jax.jit(jax.grad(lambda args: -jnp.mean(of(args, ours(labels)))))
    close(mean(args), jax.tree.map(lambda x: jnp.asarray(x.grad.numpy()), tensors))


@pytest.mark.slow
def test_labels_that_are_none():
    args, labels = draw(6)
    labels = labels.at[1].set(-1).at[4].set(CLASSES)
    logs = of(args, labels)
    assert np.isnan(logs).tolist() == [False, True, False, False, True, False]
    features = args[0].at[1].set(NAN)
    ours = lambda f: of((f, *args[1:]), labels, ignore_index=-1)
    logs, pull = jax.vjp(ours, features)
    assert logs[1] == 0
    assert (pull(jnp.ones(6).at[4].set(0))[0][1] == 0).all()
    assert of((args[0][:0], *args[1:]), labels[:0]).shape == (0,)
    for shape in ((), (2, 3)):
        some = labels.reshape(2, 3)[:, :3] if shape else labels[0]
        wide = args[0].reshape(2, 3, WIDTH) if shape else args[0][0]
        assert of((wide, *args[1:]), some).shape == shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    args, labels = draw(16, dtype="float32")
    narrow = jax.tree.map(lambda x: x.astype(dtype), args)
    logs = of(narrow, labels)
    assert logs.dtype == jnp.float32
    exact = plain(jax.tree.map(lambda x: x.astype("float64"), narrow), labels)
    # (Logits of order ten, known to a few eps of float32.)
    assert_close(logs, np.asarray(exact), rtol=0, atol=100 * eps("float32"))


def test_mixed_dtypes():
    """Features in bfloat16 with float32 weights: the first products are in bfloat16."""
    args, labels = draw(16, dtype="float32")
    narrow = (args[0].astype("bfloat16"), *args[1:])
    short = lambda x: x.astype("bfloat16").astype("float64")
    wide = lambda x: x.astype("float64")
    features, head, tails, bias = narrow
    tails = [(short(first), wide(last)) for first, last in tails]
    exact = short(features), short(head), tails, wide(bias)
    both = lambda fn: (
        lambda args: (fn(args, labels), jax.grad(lambda a: fn(a, labels).sum())(args))
    )
    (logs, slopes), (desired, wanted) = jax.jit(both(of))(narrow), both(plain)(exact)
    assert logs.dtype == jnp.float32
    assert_close(logs, np.asarray(desired), rtol=0, atol=100 * eps("float32"))
    assert [x.dtype for x in jax.tree.leaves(slopes)] == [
        x.dtype for x in jax.tree.leaves(narrow)
    ]
    for slope, want in zip(
        jax.tree.leaves(slopes[1:]), jax.tree.leaves(wanted[1:]), strict=True
    ):
        assert_close(slope, np.asarray(want), rtol=0, atol=1000 * eps("float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_bias_widens_the_result(dtype):
    (*args, bias), labels = draw(3, dtype="float32")
    call = lambda bias: of((*args, bias), labels)
    assert jax.eval_shape(call, bias.astype(dtype)).dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    args, labels = draw(3)
    features, head, tails, bias = args
    call = lambda **change: sj.adaptive_log_softmax(
        **(
            {"features": features, "head_weights": head, "tails": tails, "labels": labels}
            | change
        )
    )
    bad = ((jnp.ones((2, 5)), jnp.ones((4, 2))), (jnp.ones((2, 6)), jnp.ones((4, 3))))
    for tail in (*bad, (jnp.ones(6), jnp.ones((4, 1))), (jnp.ones((2, 6)), jnp.ones((0, 2)))):
        with pytest.raises(ValueError, match=r"`tails\[0\]` must be"):
            call(tails=[tail])
    with pytest.raises(TypeError, match=r"`tails\[0\]` must be real"):
        call(tails=[(jnp.ones((2, 6), complex), jnp.ones((4, 2)))])
    with pytest.raises(TypeError, match="`head_bias` must hold numbers"):
        call(head_bias=bias > 0)
    with pytest.raises(ValueError, match="`tails` must hold"):
        call(tails=[])
    with pytest.raises(ValueError, match="`head_weights` must hold"):
        call(head_weights=head[:1])
    with pytest.raises(ValueError, match=r"`features` must be .* and `head_weights`"):
        call(features=features[:, 1:])
    with pytest.raises(ValueError, match="`head_bias` must be"):
        call(head_bias=bias[:2])
    with pytest.raises(TypeError, match="`labels` must be integers"):
        call(labels=jnp.ones(3))


def test_the_gradient_keeps_nothing_of_tokens_times_classes():
    tokens, width, sizes = 4096, 16, (16384, 16384)
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = (
        struct(tokens, width),
        struct(34, width),
        [(struct(8, width), struct(n, 8)) for n in sizes],
    )
    loss = lambda x, h, t, y: -jnp.mean(sj.adaptive_log_softmax(x, h, t, y))
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args, labels).compile()
    bound = 0.15 * 4 * tokens * sum(sizes)
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


def test_a_wide_choice_of_cutoffs_sums_to_one():
    for sizes, frequent in itertools.product(((1,), (3, 1, 2)), (0, 2)):
        rng = np.random.default_rng(1)
        normal = lambda *shape, rng=rng: jnp.asarray(rng.standard_normal(shape))
        tails = [(normal(2, 3), normal(size, 2)) for size in sizes]
        head, feature = normal(frequent + len(sizes), 3), normal(3)
        every = jnp.arange(frequent + sum(sizes))
        logs = sj.adaptive_log_softmax(
            jnp.broadcast_to(feature, (every.size, 3)), head, tails, every
        )
        assert_close(jnp.sum(jnp.exp(logs)), 1.0, rtol=1e-14)
