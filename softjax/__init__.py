"""From scores to choices: softmax and its relatives, exact and differentiable in JAX.

Every public function is an attribute of this package, and masks of attention are in
`softjax.masks`. The code lies in these modules and subpackages:

    reductions     log-sum-exp, its mean form, and mellowmax
    dense          softmax and log_softmax
    sparse         maps that give exact zeros: sparsemax, entmax15, entmax
    top_k          weights that sum to k
    segments       softmax of segments of different lengths
    scores         transformations of logits before a map
    filters        top-k, top-p and other filters of logits
    decoding       penalties on tokens that came before
    entropies      entropy, divergence, and the log-probability of a label
    losses         losses of logits and labels, and their weighted means
    output_layers  losses of a linear layer whose logits are never stored
    contrastive    losses of pairs
    sampling       samples, and Gumbel noise
    subsets        samples without replacement
    gradients      functions that change a gradient and no value
    estimators     relaxed samples, and estimators of gradients
    policies       action values and policies in reinforcement learning
    calibration    whether probabilities are frequencies, and what to do where they are not
    masks          which query sees which key
    attentions     attention, dense and streamed, of whole sequences and of pages
    testing        checks of a map of your own: `from softjax.testing import check_map`

The policy is the same everywhere. A logit of -inf, or one that `where` masks, is dropped: its
probability and its derivatives are exactly 0. A kept NaN makes its slice NaN. float16 and
bfloat16 are computed in float32, and the result has their dtype again. Narrower floats give
float32, and integers give the default float. An argument that is not understood raises an error
that names it. Numbers in arrays cannot be refused under `jit`: a temperature out of its range
gives NaN. Precision is promised on CPUs, where XLA flushes float32 numbers below 1.2e-38 to 0.
JAX before 0.12 loses custom derivatives when the reverse-mode derivative of a scan is
differentiated in reverse mode again. JAX then raises an error for sparse maps, and for
temperatures that solve an equation.

Modules that begin with an underscore are private: `_api` checks and jits, `_inputs` checks
arrays, `_slices`, `_threshold` and `_softmax` hold the algorithm that all maps share, and the
others support these.
"""

from softjax import masks as masks
from softjax.attentions import (
    alibi_slopes,
    attention,
    explain_attention,
    inverse_zigzag_permutation,
    merge_attention,
    paged_attention,
    qk_norm,
    scalable_queries,
    zigzag_permutation,
)
from softjax.calibration import (
    brier_score,
    conformal_threshold,
    energy_score,
    ensemble_log_probs,
    expected_calibration_error,
    fit_temperature,
    prediction_sets,
    reliability,
)
from softjax.contrastive import info_nce, siglip_loss
from softjax.decoding import repetition_penalty
from softjax.dense import log_softmax, softmax
from softjax.entropies import entropy, jensen_shannon_divergence, kl_divergence, log_prob
from softjax.estimators import (
    gumbel_softmax,
    rao_blackwell_gumbel_softmax,
    reinmax,
    relaxed_log_density,
)
from softjax.filters import (
    epsilon_filter,
    eta_filter,
    min_p_filter,
    top_k_filter,
    top_n_sigma_filter,
    top_p_filter,
    typical_filter,
)
from softjax.gradients import clip_gradient, reverse_gradient, score_function, straight_through
from softjax.losses import (
    check_labels,
    class_balanced_weights,
    cross_entropy,
    distillation_loss,
    entmax_loss,
    focal_loss,
    logit_adjustment,
    mean_loss,
    sigmoid_focal_loss,
    soft_cross_entropy,
    sparsemax_loss,
)
from softjax.output_layers import (
    adaptive_log_softmax,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_jensen_shannon_divergence,
    linear_statistics,
    sampled_cross_entropy,
)
from softjax.policies import (
    actor_critic_value,
    bellman_target,
    clipped_surrogate_loss,
    expected_value,
    exponential_temperature,
    mellowmax_temperature,
    policy_entropy,
    policy_gradient_loss,
    policy_log_prob,
    policy_probs,
    select_action,
    soft_value,
    target_entropy_temperature,
    visit_count_temperature,
)
from softjax.reductions import logmeanexp, logsumexp, mellowmax
from softjax.sampling import gumbel, gumbel_given_argmax, sample
from softjax.scores import (
    adjusted_scores,
    scalable_scores,
    sigsoftmax_scores,
    soft_cap,
    taylor_scores,
)
from softjax.segments import segment_logsumexp, segment_softmax
from softjax.sparse import entmax, entmax15, sparsemax
from softjax.subsets import ranking_log_prob, sample_without_replacement, weighted_subset
from softjax.top_k import soft_top_k

__version__ = "0.2.0.dev0"

__all__ = [
    "actor_critic_value",
    "adaptive_log_softmax",
    "adjusted_scores",
    "alibi_slopes",
    "attention",
    "bellman_target",
    "brier_score",
    "check_labels",
    "class_balanced_weights",
    "clip_gradient",
    "clipped_surrogate_loss",
    "conformal_threshold",
    "cross_entropy",
    "distillation_loss",
    "energy_score",
    "ensemble_log_probs",
    "entmax",
    "entmax15",
    "entmax_loss",
    "entropy",
    "epsilon_filter",
    "eta_filter",
    "expected_calibration_error",
    "expected_value",
    "explain_attention",
    "exponential_temperature",
    "fit_temperature",
    "focal_loss",
    "gumbel",
    "gumbel_given_argmax",
    "gumbel_softmax",
    "info_nce",
    "inverse_zigzag_permutation",
    "jensen_shannon_divergence",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_jensen_shannon_divergence",
    "linear_statistics",
    "log_prob",
    "log_softmax",
    "logit_adjustment",
    "logmeanexp",
    "logsumexp",
    "mean_loss",
    "mellowmax",
    "mellowmax_temperature",
    "merge_attention",
    "min_p_filter",
    "paged_attention",
    "policy_entropy",
    "policy_gradient_loss",
    "policy_log_prob",
    "policy_probs",
    "prediction_sets",
    "qk_norm",
    "ranking_log_prob",
    "rao_blackwell_gumbel_softmax",
    "reinmax",
    "relaxed_log_density",
    "reliability",
    "repetition_penalty",
    "reverse_gradient",
    "sample",
    "sample_without_replacement",
    "sampled_cross_entropy",
    "scalable_queries",
    "scalable_scores",
    "score_function",
    "segment_logsumexp",
    "segment_softmax",
    "select_action",
    "siglip_loss",
    "sigmoid_focal_loss",
    "sigsoftmax_scores",
    "soft_cap",
    "soft_cross_entropy",
    "soft_top_k",
    "soft_value",
    "softmax",
    "sparsemax",
    "sparsemax_loss",
    "straight_through",
    "target_entropy_temperature",
    "taylor_scores",
    "top_k_filter",
    "top_n_sigma_filter",
    "top_p_filter",
    "typical_filter",
    "visit_count_temperature",
    "weighted_subset",
    "zigzag_permutation",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "masks"])
