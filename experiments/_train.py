"""Minibatch training of one network over many seeds at once."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments._maps import OutputMap
from experiments._networks import Layers, Network
from experiments._types import Arrays, NDArray, Track, untracked

__all__ = ["Fit", "descend", "fit"]


WeightsT = TypeVar("WeightsT")  # Layers, or any tree of arrays.


class Fit(NamedTuple):
    """What training gave; every array has a leading axis of seeds."""

    layers: Layers
    curves: Arrays  # train_loss, test_loss and test_accuracy, each [seeds, epochs]
    predicted: NDArray  # [seeds, num_test], classes, after the last epoch


class _State(NamedTuple):
    layers: Layers
    optimizer: Any


def fit(
    key: Array,
    inputs: Array,
    labels: Array,
    rows: Array,
    *,
    network: Network,
    output_map: OutputMap,
    optimizer: Any,
    num_train: int,
    num_epochs: int,
    batch_size: int,
    track: Track = untracked,
    label: str = "training",
) -> Fit:
    """Trains one network a seed, all side by side.

    Args:
        key: random key of all seeds.
        inputs: the examples that all seeds share, `[n, *shape]`.
        labels: their classes, `[n]`.
        rows: the examples of each seed, `[seeds, m]`; the first `num_train` are trained on,
            the rest are for testing.
        network: the network; it is compiled once, as long as the same object is passed.
        output_map: gives the loss.
        optimizer: an `optax` optimiser.
        num_train: number of examples that are trained on.
        num_epochs: number of passes over them.
        batch_size: size of a batch; a smaller last one is left out.
        track: shows the progress, epoch by epoch.
        label: what `track` calls this run.

    Returns:
        The trained layers, the curves and the predictions.

    Raises:
        ValueError: there is no epoch, or no batch of that size, to train on.
    """
    if num_epochs < 1 or not 1 <= batch_size <= num_train:
        wanted = f"num_epochs >= 1 and batch_size from 1 to {num_train}"
        raise ValueError(f"Wanted {wanted}, got {num_epochs} and {batch_size}.")
    start_keys, order_keys = jax.random.split(key, (2, len(rows)))
    state = _start(start_keys, network, optimizer)
    test = rows[:, num_train:]
    scores = []
    for epoch in track(range(num_epochs), label):
        batches = _batches(order_keys, jnp.int32(epoch), rows[:, :num_train], batch_size)
        state, train_loss = _epoch(
            state, inputs, labels, batches, network, output_map, optimizer
        )
        logits = _logits(state.layers, inputs, test, network)
        test_loss, predicted, accuracy = _scores(logits, labels, test, output_map)
        # Fetched, and so waited for: `track` then shows what is done, not what is queued.
        scores.append(jax.device_get((train_loss, test_loss, accuracy)))
    names = ("train_loss", "test_loss", "test_accuracy")
    curves = dict(zip(names, np.moveaxis(np.array(scores), 0, -1), strict=True))
    return Fit(state.layers, curves, np.asarray(predicted))


def descend(
    optimizer: Any, grads: WeightsT, state: Any, weights: WeightsT
) -> tuple[WeightsT, Any]:
    """One step of an `optax` optimiser: the new weights and its new state."""
    with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to integer powers.
        updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state


# An epoch is compiled in parts, as all but one of them serve every output map.


@functools.partial(jax.jit, static_argnames=("network", "optimizer"))
def _start(keys: Array, network: Network, optimizer: Any) -> _State:
    def start(key: Array) -> _State:
        layers = network.init(key)
        return _State(layers, optimizer.init(layers))

    return jax.vmap(start)(keys)


@functools.partial(jax.jit, static_argnames=("batch_size",))
def _batches(keys: Array, epoch: Array, rows: Array, batch_size: int) -> Array:
    """The rows of an epoch in random order, `[seeds, batches, batch_size]`."""
    num_seeds, num_rows = rows.shape
    num_batches = num_rows // batch_size
    epoch_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, epoch)
    shuffled = jax.vmap(jax.random.permutation)(epoch_keys, rows)
    return shuffled[:, : num_batches * batch_size].reshape(num_seeds, num_batches, batch_size)


@functools.partial(jax.jit, static_argnames=("network", "output_map", "optimizer"))
def _epoch(
    state: _State,
    inputs: Array,
    labels: Array,
    batches: Array,
    network: Network,
    output_map: OutputMap,
    optimizer: Any,
) -> tuple[_State, Array]:
    """One step a batch; the new state, and the mean loss `[seeds]`."""

    def mean_loss(layers: Layers, batch: Array) -> Array:
        return jnp.mean(output_map.loss(network.apply(layers, inputs[batch]), labels[batch]))

    def step(state: _State, batch: Array) -> tuple[_State, Array]:
        loss, grads = jax.value_and_grad(mean_loss)(state.layers, batch)
        return _State(*descend(optimizer, grads, state.optimizer, state.layers)), loss

    state, losses = jax.vmap(functools.partial(jax.lax.scan, step))(state, batches)
    return state, jnp.mean(losses, axis=-1)


@functools.partial(jax.jit, static_argnames=("network",))
def _logits(layers: Layers, inputs: Array, rows: Array, network: Network) -> Array:
    """The logits of every row, `[seeds, rows, K]`, in parts that memory can hold."""

    def one_seed(layers: Layers, rows: Array) -> Array:
        def one_row(row: Array) -> Array:
            return network.apply(layers, inputs[row][None])[0]

        logits: Array = jax.lax.map(one_row, rows, batch_size=min(512, len(rows)))
        return logits

    return jax.vmap(one_seed)(layers, rows)


@functools.partial(jax.jit, static_argnames=("output_map",))
def _scores(
    logits: Array, labels: Array, rows: Array, output_map: OutputMap
) -> tuple[Array, Array, Array]:
    """Mean loss `[seeds]`, predictions `[seeds, rows]` and accuracy `[seeds]`."""
    loss = jnp.mean(output_map.loss(logits, labels[rows]), axis=-1)
    predicted = jnp.argmax(logits, axis=-1).astype(labels.dtype)  # Maps keep the order.
    return loss, predicted, jnp.mean(predicted == labels[rows], axis=-1)
