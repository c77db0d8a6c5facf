"""The surprise at a label, -log p: the regret of softmax."""

import jax.numpy as jnp
from jax import Array

from softjax._exponential import SOFTMAX
from softjax._threshold import Solution
from softjax.entropies import pick
from softjax.losses._regret import Regret, regret


def surprise(logits: Array, labels: Array, axis: int) -> Array:
    """-log p of labels in [0, n): `cross_entropy` of what has been prepared."""
    return regret(_CROSS_ENTROPY, axis, logits, labels, None)


def of_solution(solution: Solution, labels: Array, axis: int, _: None) -> Array:
    return -pick(solution.margins, labels, axis)


def _missing_from_surprise(_: Solution, loss: Array, labels: Array, axis: int) -> Array:
    return -jnp.expm1(-loss)


_CROSS_ENTROPY = Regret(SOFTMAX, of_solution, _missing_from_surprise)
