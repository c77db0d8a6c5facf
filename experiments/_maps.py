"""The output maps that the experiments compare, each with its own loss.

Each map answers p(x) = argmax over the simplex of <p, x> + H(p), where H is the Tsallis entropy
(1 - sum_i p_i^a) / (a (a - 1)): a = 2 gives sparsemax, a = 1.5 entmax15, and the limit a = 1,
where H is Shannon's entropy, softmax. Its own loss, the Fenchel-Young loss, is how far the
label y, one-hot, stays below that maximum: it is 0 just where p = y, and its gradient is p - y.
For softmax it is the cross-entropy. (Blondel, Martins, Niculae 2020, Learning with
Fenchel-Young losses.)
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from jax import Array

import softjax as sj

__all__ = ["MAPS", "MapName", "OutputMap"]

MapName = Literal["softmax", "sparsemax", "entmax15"]


class OutputMap(NamedTuple):
    """From logits `[..., K]` to probabilities, and, with labels `[...]`, to a loss `[...]`."""

    probs: Callable[[Array], Array]
    loss: Callable[[Array, Array], Array]


MAPS: dict[MapName, OutputMap] = {
    "softmax": OutputMap(sj.softmax, sj.cross_entropy),
    "sparsemax": OutputMap(sj.sparsemax, sj.sparsemax_loss),
    "entmax15": OutputMap(sj.entmax15, functools.partial(sj.entmax_loss, alpha=1.5)),
}
