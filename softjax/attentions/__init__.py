"""Attention: its operands, the loops over its tiles, and its two kinds of maps.

Recipes
=======

`print(softjax.attentions.__doc__)` gives this text, ready to copy.

Some published kinds of attention take a line or two:

```python
import jax.numpy as jnp
import softjax as sj
from softjax import masks


def forgetting_attention(q, k, v, log_forget):  # [batch, tokens, heads], at most 0
    c = jnp.cumsum(log_forget, axis=1)
    decay = lambda s, at: s + c[at.batch, at.query, at.head] - c[at.batch, at.key, at.head]
    return sj.attention(q, k, v, mask=masks.Causal(), score=decay)


def threshold_attention(q, k, v, threshold):  # Keys with smaller scores are not read.
    return sj.attention(q, k, v, score=lambda s, at: jnp.where(s < threshold, -jnp.inf, s))


def softmax1_attention(q, k, v):  # exp(s) / (1 + sum of exp(s)): a query may read nothing.
    return sj.attention(q, k, v, sink=0.0)


def differential_attention(q, k, q2, k2, v, weight):
    return sj.attention(q, k, v) - weight * sj.attention(q2, k2, v)
```

The multi-head attention layers of flax (linen and nnx) take the function below. Their `mask`
may be one of `softjax.masks`, and `functools.partial(attention_fn, soft_cap=50.0)` binds
options of `softjax.attention`. It raises an error for an option that softjax does not offer. A
query that sees nothing gets 0, where flax averages all values.

```python
import jax.numpy as jnp
import softjax as sj
from flax import linen as nn
from softjax import masks


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    promote_dtype=None,
    is_causal=False,
    force_fp32_for_softmax=True,  # Softmax is always computed in float32.
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    **options,  # `attention` refuses those that it does not know.
):
    drops = dropout_rate > 0 and not deterministic
    refused = {
        "broadcast_dropout=True": drops and broadcast_dropout,  # Each weight has its own bit.
        "precision": precision,  # `jax.default_matmul_precision` sets it.
        "sow_weights=True": module,  # Weights are not kept.
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, given in refused.items():
        if given is not None and given is not False:
            raise ValueError(f"{name} is not offered.")
    arrays = query, key, value
    if promote_dtype is not None:
        arrays = promote_dtype(arrays, dtype=dtype)
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    is_own = mask is None or isinstance(mask, masks.Mask)
    seen = mask if is_own else masks.Dense(mask.astype(bool))
    if is_causal:
        seen = masks.Causal() if seen is None else masks.Causal() & seen
    if drops:
        options |= {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
    return sj.attention(*(x.astype(dtype) for x in arrays), bias=bias, mask=seen, **options)


layer = nn.MultiHeadDotProductAttention(
    num_heads=8, attention_fn=attention_fn, broadcast_dropout=False
)
```
"""

from softjax.attentions.attend import attention
from softjax.attentions.explain import explain_attention
from softjax.attentions.layouts import inverse_zigzag_permutation, zigzag_permutation
from softjax.attentions.paged import merge_attention, paged_attention
from softjax.attentions.shaping import alibi_slopes, qk_norm, scalable_queries

__all__ = [
    "alibi_slopes",
    "attention",
    "explain_attention",
    "inverse_zigzag_permutation",
    "merge_attention",
    "paged_attention",
    "qk_norm",
    "scalable_queries",
    "zigzag_permutation",
]
