"""The output maps that the experiments compare, each with its own loss.

Each map answers p(x) = argmax over the simplex of <p, x> + H(p), where H is the Tsallis entropy
(1 - sum_i p_i^a) / (a (a - 1)): a = 2 gives sparsemax, a = 1.5 entmax15, and the limit a = 1,
where H is Shannon's entropy, softmax. Its Fenchel-Young loss is how far the label y, one-hot,
stays below that maximum:

    L(x, y) = [<p, x> + H(p)] - [<y, x> + H(y)] = <p - y, x> + H(p),   as H(y) = 0.

Hence L >= 0, L = 0 just where p = y, and the gradient of L is p - y. For softmax, L is the
cross-entropy. (Blondel, Martins, Niculae 2020, Learning with Fenchel-Young losses.)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import softjax as sj

__all__ = ["MAPS", "MapName", "OutputMap"]

MapName = Literal["softmax", "sparsemax", "entmax15"]


class OutputMap(NamedTuple):
    """From logits `[..., K]` to probabilities, and, with labels `[...]`, to a loss `[...]`."""

    probs: Callable[[Array], Array]
    loss: Callable[[Array, Array], Array]


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return -sj.log_prob(logits, labels)


def _fenchel_young_loss(probs_of: Callable[[Array], Array], alpha: float) -> OutputMap:
    def loss(logits: Array, labels: Array) -> Array:
        # The envelope theorem: at a maximum the derivative through the maximiser is zero, so
        # stopping it changes no gradient; what is left is p - y, exactly.
        probs = jax.lax.stop_gradient(probs_of(logits))
        entropy = (1 - jnp.sum(probs**alpha, axis=-1)) / (alpha * (alpha - 1))
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        return jnp.sum(probs * (logits - chosen), axis=-1) + entropy

    return OutputMap(probs_of, loss)


MAPS: dict[MapName, OutputMap] = {
    "softmax": OutputMap(sj.softmax, _cross_entropy),
    "sparsemax": _fenchel_young_loss(sj.sparsemax, 2.0),
    "entmax15": _fenchel_young_loss(sj.entmax15, 1.5),
}
