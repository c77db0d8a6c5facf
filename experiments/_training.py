"""What the scripts that train share: a walk with a progress bar, and the area under the ROC."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from experiments._run import NDArray, Track

__all__ = ["auroc", "each"]

T = TypeVar("T")


def each(items: Iterable[T], track: Track, label: str) -> Iterator[T]:
    """Walks through the items, such as the arms of a comparison, and shows the progress."""
    known = list(items)
    for number in track(range(len(known)), label):
        yield known[number]


def auroc(positive: NDArray, negative: NDArray) -> float:
    """How often a positive example scores above a negative one; ties count half."""
    ordered = np.sort(negative)
    below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float(np.mean(below + up_to) / 2 / len(ordered))
