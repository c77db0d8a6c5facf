"""From scores to choices: softmax and its relatives, exact and differentiable in JAX."""

from softjax import masks as masks
from softjax.attentions.attend import attention
from softjax.attentions.decoding import merge_attention, paged_attention
from softjax.contrastive import info_nce, siglip_loss
from softjax.dense import log_softmax, softmax
from softjax.entropies import entropy, kl_divergence, log_prob
from softjax.losses import (
    class_balanced_weights,
    cross_entropy,
    distillation_loss,
    entmax_loss,
    focal_loss,
    mean_loss,
    soft_cross_entropy,
    sparsemax_loss,
)
from softjax.output_layers import linear_cross_entropy, linear_statistics
from softjax.reductions import logmeanexp, logsumexp, mellowmax
from softjax.scores import (
    min_p_filter,
    scalable_scores,
    sigsoftmax_scores,
    soft_cap,
    taylor_scores,
    top_k_filter,
    top_p_filter,
    typical_filter,
)
from softjax.segments import segment_softmax
from softjax.sparse import entmax, entmax15, soft_top_k, sparsemax

__version__ = "0.1.0"

__all__ = [
    "attention",
    "class_balanced_weights",
    "cross_entropy",
    "distillation_loss",
    "entmax",
    "entmax15",
    "entmax_loss",
    "entropy",
    "focal_loss",
    "info_nce",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_statistics",
    "log_prob",
    "log_softmax",
    "logmeanexp",
    "logsumexp",
    "mean_loss",
    "mellowmax",
    "merge_attention",
    "min_p_filter",
    "paged_attention",
    "scalable_scores",
    "segment_softmax",
    "siglip_loss",
    "sigsoftmax_scores",
    "soft_cap",
    "soft_cross_entropy",
    "soft_top_k",
    "softmax",
    "sparsemax",
    "sparsemax_loss",
    "taylor_scores",
    "top_k_filter",
    "top_p_filter",
    "typical_filter",
]
