"""The types that the experiments share."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy.typing as npt

__all__ = ["Arrays", "NDArray", "Track", "untracked"]

NDArray = npt.NDArray[Any]
Arrays = dict[str, NDArray]
Track = Callable[[range, str], Iterable[int]]  # Walks through a range, and shows how far it is.


def untracked(steps: range, label: str) -> Iterable[int]:
    """A `Track` that shows nothing."""
    del label
    return steps
