"""From scores to choices: softmax and its relatives, exact and differentiable in JAX."""

__version__ = "0.1.0"
