"""Attention, in one folder: operands and tiles, walks over them, and what is found there."""

from softjax.attentions.attend import attention
from softjax.attentions.decoding import merge_attention, paged_attention

__all__ = ["attention", "merge_attention", "paged_attention"]
