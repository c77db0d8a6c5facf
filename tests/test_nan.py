"""A NaN that is kept is seen, wherever it stands and however large the array.

On some processors XLA's CPU maximum drops a NaN in the last column. `.ci/run` runs this file
once more with `XLA_FLAGS=--xla_cpu_max_isa=AVX2`, where newer processors show it too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj

pytestmark = pytest.mark.optimized  # The fault is in the optimized program.

SHAPES = [(7, 33), (64, 128), (64, 1000), (4096, 64), (3, 40000)]
MAPS = {
    "softmax": sj.softmax,
    "log_softmax": sj.log_softmax,
    "sparsemax": sj.sparsemax,
    "entmax15": sj.entmax15,
    "entmax": functools.partial(sj.entmax, alpha=1.25),
    "soft_top_k": functools.partial(sj.soft_top_k, k=2.0),
    "softmax at a temperature": functools.partial(sj.softmax, temperature=0.5),
    "softmax with a sink": functools.partial(sj.softmax, sink=1.0),
}
REDUCTIONS = {
    "logsumexp": functools.partial(sj.logsumexp, axis=-1),
    "logmeanexp": functools.partial(sj.logmeanexp, axis=-1),
    "mellowmax": functools.partial(sj.mellowmax, omega=1.0),
    "entropy": sj.entropy,
    "soft_value": sj.soft_value,
    "kl_divergence": lambda z: sj.kl_divergence(z, jnp.ones_like(z)),
    "kl_divergence to": lambda z: sj.kl_divergence(jnp.ones_like(z), z),
    "distillation_loss": lambda z: sj.distillation_loss(z, jnp.ones_like(z), temperature=2.0),
    "cross_entropy": lambda z: sj.cross_entropy(z, jnp.zeros(len(z), int)),
    "focal_loss": lambda z: sj.focal_loss(z, jnp.zeros(len(z), int), gamma=2.0),
    "sparsemax_loss": lambda z: sj.sparsemax_loss(z, jnp.zeros(len(z), int)),
    "log_prob": lambda z: sj.log_prob(z, jnp.zeros(len(z), int)),
}


def with_nan(shape, place, fill=0.0):
    """Equal float32 logits, and a NaN in one row; the row's number."""
    row, last = shape[0] // 2, shape[1] - 1
    z = np.full(shape, fill, np.float32)
    z[row, {"first": 0, "middle": last // 2, "last": last}[place]] = np.nan
    return jnp.asarray(z), row


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*MAPS, *REDUCTIONS])
def test_a_kept_nan_is_seen(name, shape):
    fn = jax.jit((MAPS | REDUCTIONS)[name])
    for place in ("first", "middle", "last"):
        z, row = with_nan(shape, place)
        out = np.asarray(fn(z))
        assert np.isnan(out[row]).all(), place
        assert np.isfinite(np.delete(out, row, 0)).all(), place


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "entropy"])
def test_a_nan_among_dropped_entries_is_seen(name, shape):
    """The maximum of such a row may come back as -inf."""
    fn = jax.jit((MAPS | REDUCTIONS)[name])
    for place in ("first", "middle", "last"):
        z, row = with_nan(shape, place, -np.inf)
        out, is_nan = np.asarray(fn(z))[row], np.isnan(np.asarray(z)[row])
        assert np.isnan(out[is_nan] if out.ndim else out).all(), place


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_attention_isolates_a_nan(operand, place):
    """One query's output is NaN for a query; that of all who see it for a key or a value."""
    tokens, width = 200, 16
    number = {"first": 0, "middle": tokens // 2, "last": tokens - 1}[place]
    operands = {
        name: np.random.default_rng(i).standard_normal((1, tokens, 2, width)).astype("float32")
        for i, name in enumerate(("query", "key", "value"))
    }
    operands[operand][0, number, 0, width - 1] = np.nan
    attend = lambda *args: sj.attention(*args, mask=sj.masks.Causal())
    for implementation in ("dense", "streamed", None):
        call = functools.partial(attend)
        if implementation is not None:
            call = lambda *args, i=implementation: sj.attention(
                *args, mask=sj.masks.Causal(), implementation=i
            )
        out = np.isnan(np.asarray(jax.jit(call)(*map(jnp.asarray, operands.values()))))[0]
        assert not out[:, 1].any()  # The other head.
        assert not out[:number].any()
        if operand == "query":
            assert out[number, 0].all()
            assert not out[number + 1 :].any()
        else:
            assert out[number:, 0].any(-1).all()
