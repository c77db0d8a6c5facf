"""How well does each map classify images?

A dense network and a small convolutional one are trained on scikit-learn's handwritten digits
(or on the MNIST, CIFAR or .npz files in `--data-dir`), with softmax, sparsemax or entmax15 as
the output map, each on its own loss. All arms share splits, networks at the start, and
batches.

Expected on the digits: a test accuracy of at least 96.5 % for the dense network and 98 % for
the convolutional one, whatever the map. Control: with the labels shuffled over the images,
nothing can be learnt that holds on others, so the accuracy cannot exceed the share of the
commonest class by more than chance. An arm that misses, or a control that does better, would
refute it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import Dataset, load
from experiments._networks import Layers, Network, cnn, mlp
from experiments._plots import curves, heatmap, panels
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    NDArray,
    Options,
    Track,
    launch,
    untracked,
)
from experiments.my_map import expm1max_loss

__all__ = ["Config", "draw", "judge", "main", "run"]

NetworkName = Literal["mlp", "cnn"]
State = tuple[Layers, Any]  # Layers, and the state of the optimiser.

# The loss of a map is 0 exactly where its probabilities are the label's, and its gradient is
# p - y (Blondel, Martins, Niculae 2020, Learning with Fenchel-Young losses). A line with the
# loss of your own map makes its name an answer to `--maps`.
LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "softmax": sj.cross_entropy,
    "sparsemax": sj.sparsemax_loss,
    "entmax15": functools.partial(sj.entmax_loss, alpha=1.5),
    "expm1max": expm1max_loss,  # The worked example of a map of one's own.
}


@dataclass(frozen=True)
class Config(Options):
    """Options of the classification of images."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    data_dir: Path | None = None
    """Folder with MNIST, CIFAR-10, CIFAR-100 (binary) or an .npz file; none: the digits."""
    networks: tuple[NetworkName, ...] = ("mlp", "cnn")
    """Networks to train."""
    maps: tuple[str, ...] = ("softmax", "sparsemax", "entmax15")
    """Output maps to train them with, of softmax, sparsemax, entmax15 and expm1max."""
    num_epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 32
    """Images in a batch."""
    learning_rate: float = 2e-3
    """Step size of Adam at the start; it falls to zero along a cosine."""
    min_mlp_accuracy: float = 0.965
    """Target on the digits: the smallest mean test accuracy of the dense network."""
    min_cnn_accuracy: float = 0.98
    """Target on the digits: the smallest mean test accuracy of the convolutional network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.networks and self.maps):
            raise ValueError("networks and maps must each name at least one.")
        if unknown := set(self.maps) - set(LOSSES):
            raise ValueError(f"maps must be among {', '.join(LOSSES)}; got {unknown}.")

    @classmethod
    def reduced(cls) -> Self:
        """One map and a few epochs, with targets to go with them."""
        return cls(
            quick=True,
            num_seeds=2,
            maps=("softmax",),
            num_epochs=4,
            min_mlp_accuracy=0.9,
            min_cnn_accuracy=0.93,
        )


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every network with every map on the same splits, and the control."""
    data = load(config.data_dir)
    if config.batch_size > data.num_train:
        wanted = f"batch_size must be at most {data.num_train}, the images to train on"
        raise ValueError(f"{wanted}; got {config.batch_size}.")
    rng = np.random.default_rng(config.seed)
    rows = np.stack([_split(rng, data) for _ in range(config.num_seeds)])
    shuffled = rng.permutation(data.labels)
    arms: dict[str, tuple[NetworkName, str, NDArray]] = {
        f"{network}, {name}": (network, name, data.labels)
        for network in config.networks
        for name in config.maps
    }
    arms["shuffled labels"] = (config.networks[0], config.maps[0], shuffled)

    arrays: Arrays = {"data": np.array(data.name)}
    networks = {name: _network(name, data) for name in config.networks}
    images = jnp.asarray(data.images, float)
    train_rows, test_rows = jnp.split(jnp.asarray(rows), [data.num_train], axis=1)
    start_keys, order_keys = jax.random.split(
        jax.random.key(config.seed), (2, config.num_seeds)
    )
    for arm, (network, name, labels) in arms.items():
        arm_of = {"network": networks[network], "loss": LOSSES[name]}
        examples = images, jnp.asarray(labels)
        state = _start(start_keys, networks[network], config, data.num_train)
        scores = []
        for epoch in track(range(config.num_epochs), arm):
            keys = _fold_in(order_keys, jnp.int32(epoch))
            state, train_loss = _epoch(
                state, keys, *examples, train_rows, **arm_of, config=config
            )
            test_loss, predicted, accuracy = _test(state[0], *examples, test_rows, **arm_of)
            # Fetching waits for the epoch, so that the progress bar shows finished work.
            scores.append(jax.device_get((train_loss, test_loss, accuracy)))
        for measure, values in zip(
            ("train_loss", "test_loss", "test_accuracy"),
            np.moveaxis(np.array(scores), 0, -1),
            strict=True,
        ):
            arrays[f"curves/{arm}/{measure}"] = values
        tested = labels[rows[:, data.num_train :]]
        arrays[f"confusion/{arm}"] = _confusion(tested, np.asarray(predicted), data.num_classes)
    return arrays


def _split(rng: np.random.Generator, data: Dataset) -> NDArray:
    """The rows of one seed, those for training first."""
    num_rows = len(data.labels)
    return np.arange(num_rows) if data.is_split else rng.permutation(num_rows)


def _network(name: NetworkName, data: Dataset) -> Network:
    height, width, num_channels = data.images.shape[1:]
    if name == "mlp":
        return mlp([height * width * num_channels, 128, 64, data.num_classes])
    return cnn((height, width, num_channels), [32, 64], 64, data.num_classes)


def _optimizer(config: Config, num_train: int) -> Any:
    num_steps = config.num_epochs * (num_train // config.batch_size)
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))


@functools.partial(jax.jit, static_argnames=("network", "config", "num_train"))
def _start(keys: Array, network: Network, config: Config, num_train: int) -> State:
    """One network per seed, and the state of its optimiser."""

    def start(key: Array) -> State:
        layers = network.init(key)
        return layers, _optimizer(config, num_train).init(layers)

    return jax.vmap(start)(keys)


@jax.jit
def _fold_in(keys: Array, epoch: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, epoch)


@functools.partial(jax.jit, static_argnames=("network", "loss", "config"))
def _epoch(
    state: State,
    keys: Array,
    images: Array,
    labels: Array,
    rows: Array,
    *,
    network: Network,
    loss: Callable[[Array, Array], Array],
    config: Config,
) -> tuple[State, Array]:
    """One pass over the training rows `[seeds, n]`; the new state, and the mean loss."""
    num_train = rows.shape[1]
    num_batches = num_train // config.batch_size
    optimizer = _optimizer(config, num_train)

    def mean_loss(layers: Layers, batch: Array) -> Array:
        return jnp.mean(loss(network.apply(layers, images[batch]), labels[batch]))

    def step(state: State, batch: Array) -> tuple[State, Array]:
        layers, optimizer_state = state
        batch_loss, grads = jax.value_and_grad(mean_loss)(layers, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
        return (optax.apply_updates(layers, updates), optimizer_state), batch_loss

    def one_seed(state: State, key: Array, rows: Array) -> tuple[State, Array]:
        # A smaller last batch is left out; the next epoch has another order.
        order = jax.random.permutation(key, rows)[: num_batches * config.batch_size]
        state, losses = jax.lax.scan(step, state, order.reshape(num_batches, -1))
        return state, jnp.mean(losses)

    return jax.vmap(one_seed)(state, keys, rows)


@functools.partial(jax.jit, static_argnames=("network", "loss"))
def _test(
    layers: Layers,
    images: Array,
    labels: Array,
    rows: Array,
    *,
    network: Network,
    loss: Callable[[Array, Array], Array],
) -> tuple[Array, Array, Array]:
    """Mean loss `[seeds]`, predictions `[seeds, rows]` and accuracy `[seeds]`."""

    def one_seed(layers: Layers, rows: Array) -> tuple[Array, Array, Array]:
        # The images of a large test set go through the network in parts that fit in memory.
        apply = lambda row: network.apply(layers, images[row][None])[0]
        logits = jax.lax.map(apply, rows, batch_size=min(512, len(rows)))
        predicted = jnp.argmax(logits, axis=-1).astype(labels.dtype)  # Maps keep the order.
        is_right = predicted == labels[rows]
        return jnp.mean(loss(logits, labels[rows])), predicted, jnp.mean(is_right)

    return jax.vmap(one_seed)(layers, rows)


def _confusion(labels: NDArray, predicted: NDArray, num_classes: int) -> NDArray:
    """How often each class, by row, was taken for each, by column, over all seeds."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The accuracy of every arm, with targets on the digits only, and the control."""
    targets = {"mlp": config.min_mlp_accuracy, "cnn": config.min_cnn_accuracy}
    measures = []
    for network in config.networks:
        for name in config.maps:
            accuracy = arrays[f"curves/{network}, {name}/test_accuracy"][:, -1]
            target = targets[network] if arrays["data"] == "digits" else None
            measures.append(
                Measure(f"{network}, {name}: test accuracy", accuracy, at_least=target)
            )
    counts = arrays["confusion/shuffled labels"]
    chance = float(counts.sum(axis=1).max() / counts.sum())
    control = arrays["curves/shuffled labels/test_accuracy"][:, -1]
    return [
        *measures,
        Measure("shuffled labels: test accuracy", control, at_most=chance + 0.05),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The curves of all arms, and the confusion matrix of each."""
    losses = curves(
        arrays,
        "epoch",
        "Training and testing by epoch; thick: median of the seeds, thin: each seed. Every map"
        " has a loss of its own, in its own unit, so losses are compared only within an arm.",
        names={
            "train_loss": "training",
            "test_loss": "test",
            "test_accuracy": "test accuracy, share of images",
        },
        apart=("train_loss", "test_loss"),
    )
    arms = [name.removeprefix("confusion/") for name in arrays if name.startswith("confusion/")]
    figure, axes = panels(
        arms,
        "How often each class was taken for each, over all seeds: every row sums to 1;"
        " the numbers are counts.",
        size=3.9,
    )
    for panel, arm in zip(axes, arms, strict=True):
        counts = arrays[f"confusion/{arm}"]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        texts = [[str(n) if n else "" for n in row] for row in counts]
        heatmap(
            figure,
            panel,
            shares,
            x="predicted class",
            y="class",
            scale="share of the class",
            numbers=texts if len(counts) <= 10 else None,
        )
        if len(counts) <= 10:
            panel.set_xticks(range(len(counts)))
            panel.set_yticks(range(len(counts)))
    return {"curves": losses, "confusion": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("classification", __doc__, Config, run, judge, draw), args)
