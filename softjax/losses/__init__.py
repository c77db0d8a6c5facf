"""Losses from logits, one number per example, that stay exact when the model is confident.

The losses of labels are the regrets of threshold maps p = f(z - tau) (Fenchel-Young losses): a
loss is 0 where p puts all weight on the label, and its gradient is p - y. Both are computed
without the subtractions that cancel there, so a loss of 1e-30 has all its digits, and so does
its gradient. Losses are float32 or wider, whatever the logits' dtype.

A label outside [0, n) makes the loss of its row NaN, a constant; `check_labels` makes it an
error that names the row. A dropped label has loss inf. An example that a loss leaves out (its
label is ignored, or a mask drops it) has loss and gradient 0, whatever it holds.
"""

from softjax.losses.cross_entropies import cross_entropy, focal_loss, sigmoid_focal_loss
from softjax.losses.fenchel_young import entmax_loss, sparsemax_loss
from softjax.losses.labels import check_labels
from softjax.losses.means import class_balanced_weights, logit_adjustment, mean_loss
from softjax.losses.soft_targets import distillation_loss, soft_cross_entropy

__all__ = [
    "check_labels",
    "class_balanced_weights",
    "cross_entropy",
    "distillation_loss",
    "entmax_loss",
    "focal_loss",
    "logit_adjustment",
    "mean_loss",
    "sigmoid_focal_loss",
    "soft_cross_entropy",
    "sparsemax_loss",
]
