"""Attention: its operands, the loops over its tiles, and its two kinds of maps."""

from softjax.attentions.attend import attention
from softjax.attentions.explain import explain_attention
from softjax.attentions.paged import merge_attention, paged_attention
from softjax.attentions.shaping import alibi_slopes, qk_norm, scalable_queries

__all__ = [
    "alibi_slopes",
    "attention",
    "explain_attention",
    "merge_attention",
    "paged_attention",
    "qk_norm",
    "scalable_queries",
]
