"""The output layer of a large vocabulary: losses and statistics of logits never stored.

The logits of N tokens over V classes, z = features weights^T + bias, are formed block by block
of the vocabulary, and each block is reduced at once to a few numbers per token, because the
softmax of two blocks together follows from such numbers of each. The derivative visits the
blocks again in the same way. Nothing of size N x V is kept, in either mode, at any order.
"""

from softjax.output_layers.adaptive import adaptive_log_softmax
from softjax.output_layers.distillation import linear_distillation_loss
from softjax.output_layers.jensen_shannon import linear_jensen_shannon_divergence
from softjax.output_layers.linear import linear_cross_entropy, linear_statistics
from softjax.output_layers.sampled import sampled_cross_entropy

__all__ = [
    "adaptive_log_softmax",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_jensen_shannon_divergence",
    "linear_statistics",
    "sampled_cross_entropy",
]
