"""Orders of the tokens of a sequence that is spread over devices.

Under a causal mask, a device that holds the last tokens of a sequence in their natural order
does most of the work, and the others wait. Any order serves `attention`, as long as
`positions` tells it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._api import api
from softjax._inputs import check_int

__all__ = ["inverse_zigzag_permutation", "zigzag_permutation"]


@api("num_tokens", "num_devices")
def zigzag_permutation(num_tokens: int, num_devices: int) -> Array:
    r"""Orders tokens so that causal attention gives each device of a ring the same work.

    The sequence is cut into 2 n chunks of the length c, and device i gets the chunks i and
    2 n - 1 - i:

    .. math:: \pi_{2 c i + j} = c i + j, \qquad \pi_{2 c i + c + j} = c (2 n - 1 - i) + j,
        \qquad 0 \le i < n, \; 0 \le j < c

    Args:
        num_tokens: 2 n c, an int that is not negative and a multiple of twice the devices.
        num_devices: n, a positive int.

    Returns:
        The permutation, int32 `[num_tokens]`: `x[permutation]` has the new order, and the
        permutation itself holds the positions of its tokens.

    Raises:
        TypeError: an argument is not an int.
        ValueError: one is out of its range, or the tokens are no multiple of twice the devices.

    Example:
        >>> print(zigzag_permutation(8, 2))  # The first device holds the first four.
        [0 1 6 7 2 3 4 5]

    Note:
        Pass the part of the permutation that belongs to a device as `positions`. Striped
        attention is another such order, `jnp.arange(num_tokens).reshape(-1, n).T.reshape(-1)`.

    Reference:
        Brandon et al. (2023), Striped attention: faster ring attention for causal
        transformers, on the balance of work.
    """
    return jnp.asarray(_zigzag(num_tokens, num_devices))


@api("num_tokens", "num_devices")
def inverse_zigzag_permutation(num_tokens: int, num_devices: int) -> Array:
    r"""Orders tokens as they were before `zigzag_permutation`.

    .. math:: \pi^{-1}_{\pi_t} = t

    Args:
        num_tokens: as in `zigzag_permutation`.
        num_devices: as in `zigzag_permutation`.

    Returns:
        The permutation, int32 `[num_tokens]`: `x[permutation]` has the natural order.

    Raises:
        TypeError: as `zigzag_permutation`.
        ValueError: as `zigzag_permutation`.

    Example:
        >>> tokens = jnp.array([0, 1, 6, 7, 2, 3, 4, 5])
        >>> print(tokens[inverse_zigzag_permutation(8, 2)])
        [0 1 2 3 4 5 6 7]
    """
    return jnp.asarray(np.argsort(_zigzag(num_tokens, num_devices)).astype(np.int32))


def _zigzag(num_tokens: int, num_devices: int) -> np.ndarray:
    num_tokens = check_int(num_tokens, name="num_tokens", least=0)
    num_devices = check_int(num_devices, name="num_devices", least=1)
    if num_tokens % (2 * num_devices):
        raise ValueError(
            f"`num_tokens` must be a multiple of {2 * num_devices}, twice the devices, got"
            f" {num_tokens}."
        )
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2, num_devices, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], 1).reshape(-1)
