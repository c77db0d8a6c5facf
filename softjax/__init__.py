"""From scores to choices: softmax and its relatives, exact and differentiable in JAX."""

from softjax.contrastive import info_nce, siglip_loss
from softjax.decoding import repetition_penalty
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
from softjax.policies.actions import (
    policy_entropy,
    policy_log_prob,
    policy_probs,
    select_action,
)
from softjax.policies.backups import (
    actor_critic_value,
    bellman_target,
    expected_value,
    soft_value,
)
from softjax.policies.objectives import clipped_surrogate_loss, policy_gradient_loss
from softjax.policies.temperatures import (
    exponential_temperature,
    mellowmax_temperature,
    target_entropy_temperature,
    visit_count_temperature,
)
from softjax.reductions import logmeanexp, logsumexp, mellowmax
from softjax.sampling import gumbel, gumbel_given_argmax, sample
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
from softjax.subsets import ranking_log_prob, sample_without_replacement, weighted_subset

__version__ = "0.1.0"

__all__ = [
    "actor_critic_value",
    "bellman_target",
    "class_balanced_weights",
    "clipped_surrogate_loss",
    "cross_entropy",
    "distillation_loss",
    "entmax",
    "entmax15",
    "entmax_loss",
    "entropy",
    "expected_value",
    "exponential_temperature",
    "focal_loss",
    "gumbel",
    "gumbel_given_argmax",
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
    "mellowmax_temperature",
    "min_p_filter",
    "policy_entropy",
    "policy_gradient_loss",
    "policy_log_prob",
    "policy_probs",
    "ranking_log_prob",
    "repetition_penalty",
    "sample",
    "sample_without_replacement",
    "scalable_scores",
    "segment_softmax",
    "select_action",
    "siglip_loss",
    "sigsoftmax_scores",
    "soft_cap",
    "soft_cross_entropy",
    "soft_top_k",
    "soft_value",
    "softmax",
    "sparsemax",
    "sparsemax_loss",
    "target_entropy_temperature",
    "taylor_scores",
    "top_k_filter",
    "top_p_filter",
    "typical_filter",
    "visit_count_temperature",
    "weighted_subset",
]
