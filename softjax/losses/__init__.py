"""Losses from logits, one number an example, that stay exact when the model is confident.

Every loss here is the regret of a threshold map p = f(z - tau) (a Fenchel-Young loss): it is
0 where p puts all weight on the label, and its gradient is p - y. Both are computed without
the subtractions that cancel there, so a loss of 1e-30 has all its digits, and so does its
gradient. Losses are float32 or wider, whatever the logits' dtype.

A label outside [0, n) makes the loss of its row, and the gradient, NaN; `check_labels` makes it
an error that names the row. A dropped label has loss inf.
"""

from softjax.losses.cross_entropies import (
    cross_entropy,
    distillation_loss,
    focal_loss,
    soft_cross_entropy,
)
from softjax.losses.fenchel_young import entmax_loss, sparsemax_loss
from softjax.losses.labels import check_labels
from softjax.losses.means import class_balanced_weights, logit_adjustment, mean_loss

__all__ = [
    "check_labels",
    "class_balanced_weights",
    "cross_entropy",
    "distillation_loss",
    "entmax_loss",
    "focal_loss",
    "logit_adjustment",
    "mean_loss",
    "soft_cross_entropy",
    "sparsemax_loss",
]
