"""Policies: from action values and preferences to actions, and how to learn them."""

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

__all__ = [
    "actor_critic_value",
    "bellman_target",
    "clipped_surrogate_loss",
    "expected_value",
    "exponential_temperature",
    "mellowmax_temperature",
    "policy_entropy",
    "policy_gradient_loss",
    "policy_log_prob",
    "policy_probs",
    "select_action",
    "soft_value",
    "target_entropy_temperature",
    "visit_count_temperature",
]
