"""Which backend of attention serves a call, and the reasons that are told."""

import jax
import jax.numpy as jnp
import pytest

import softjax as sj
from softjax.attentions import _backends


def tokens(*shape):
    return jnp.zeros(shape, jnp.float32)


def lines(*args, **options):
    found = sj.explain_attention(*args, **options).splitlines()
    assert [line.partition(":")[0] for line in found] == ["cudnn", "dense", "streamed"]
    assert "cannot serve, because the default device is no GPU" in found[0]
    return found[1:]


# The tile that each call must take: sequences, T, S, heads, options, tile.
CHOICES = [
    (1, 64, 64, 4, {}, (64, 64)),
    (2, 512, 512, 8, {}, (512, 512)),
    (2, 1024, 512, 8, {}, (1024, 512)),
    (2, 1024, 513, 8, {}, (256, 103)),
    (3, 1024, 512, 8, {}, (128, 64)),
    (1, 10**6, 128, 1, {}, (10**6, 128)),
    (1, 4096, 4096, 1, {}, (512, 256)),
    (2, 2048, 2048, 8, {}, (256, 128)),
    (64, 2048, 2048, 64, {}, (64, 32)),
    (1, 64, 64, 4, {"implementation": "streamed"}, (64, 32)),
    (2, 2048, 2048, 8, {"implementation": "dense"}, (2048, 2048)),
    (1, 64, 64, 4, {"block_size": 7}, (7, 7)),
    (1, 64, 64, 4, {"block_size": (100, 3)}, (64, 3)),
]


@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys", "heads", "options", "tile"), CHOICES
)
def test_choice(batch, num_queries, num_keys, heads, options, tile):
    call = _backends.call_of(
        (batch, num_queries, heads, 8), num_keys, options.get("block_size")
    )
    backend = _backends.choose(call, options.get("implementation"))
    assert backend.blocks(call) == tile


ON_ACCELERATORS = [
    (2, 2048, 8, (2048, 2048)),
    (1, 8192, 2, (8192, 8192)),
    (1, 16384, 8, (2048, 1024)),
    (8, 8192, 32, (256, 128)),
]


@pytest.mark.parametrize(("batch", "length", "heads", "tile"), ON_ACCELERATORS)
def test_choice_on_accelerators(monkeypatch, batch, length, heads, tile):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    call = _backends.call_of((batch, length, heads, 64), length, None)
    assert _backends.choose(call, None).blocks(call) == tile


def test_the_first_that_keeps_its_promises_is_taken():
    small, large = tokens(2, 64, 4, 8), tokens(1, 4096, 1, 8)
    dense, streamed = lines(small, small, small)
    assert dense == "dense: 1 tile of 64 x 64; taken."
    assert streamed == "streamed: 2 tiles of 64 x 32; not taken."
    dense, streamed = lines(large, large, large)
    assert "not taken, because it keeps all scores" in dense
    assert "16777216 of them, more than 524288." in dense
    assert streamed == "streamed: 128 tiles of 512 x 256; taken."


def test_a_named_one_is_taken_or_tells_why_it_cannot_serve():
    x = tokens(2, 64, 4, 8)
    dense, streamed = lines(x, x, x, implementation="streamed")
    assert dense.endswith("; not taken.")
    assert streamed.endswith("; taken.")
    large = tokens(1, 4096, 1, 8)
    dense, streamed = lines(large, large, large, implementation="dense")
    assert dense.endswith("; taken.")
    assert streamed.endswith("; not taken.")

    options = {"block_size": 16, "implementation": "dense"}
    dense, streamed = lines(x, x, x, **options)
    assert "cannot serve, because `block_size` has no meaning" in dense
    assert streamed.endswith("; not taken.")
    with pytest.raises(ValueError, match="cannot serve this call, because `block_size`"):
        sj.attention(x, x, x, **options)


def test_what_is_told_is_what_runs():
    x = tokens(1, 1024, 1, 8)
    for implementation in (None, "dense", "streamed"):
        run = lambda x, i=implementation: sj.attention(x, x, x, implementation=i)
        shapes = str(jax.make_jaxpr(run)(x))
        dense, _ = lines(x, x, x, implementation=implementation)
        assert ("1024,1024" in shapes) == dense.endswith("; taken.")


def test_all_arguments_of_attention_are_taken_and_checked():
    x = tokens(2, 64, 4, 8)
    options = {
        "mask": sj.masks.Causal(),
        "score": lambda scores, at: scores - jnp.abs(at.query - at.key).astype(scores.dtype),
        "sink": jnp.zeros(4),
        "soft_cap": 30.0,
        "bias": tokens(64, 64),
        "positions": jnp.arange(64),
        "dropout_rate": 0.5,
        "dropout_key": jax.random.key(0),
        "return_lse": True,
    }
    assert lines(x, x, x, **options)[0].endswith("; taken.")
    traced = jax.jit(lambda x: jnp.zeros(len(sj.explain_attention(x, x, x))))
    assert traced(x).shape == (len(sj.explain_attention(x, x, x)),)

    for bad, error, message in [
        ({"implementation": "fast"}, ValueError, "`implementation` must be"),
        ({"soft_cap": -1.0}, ValueError, "`soft_cap` must be positive"),
        ({"block_size": (1, 2, 3)}, ValueError, "`block_size` must be"),
        ({"mask": tokens(64, 64)}, TypeError, "mask"),
    ]:
        with pytest.raises(error, match=message):
            sj.explain_attention(x, x, x, **bad)
    with pytest.raises(ValueError, match="`queries` must be"):
        sj.explain_attention(x, x[0], x)
