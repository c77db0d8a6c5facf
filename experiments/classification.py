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
from experiments import _plots as plots
from experiments._data import Dataset, load
from experiments._networks import Layers, Network, cnn, mlp
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
CURVES = {  # What is measured in each epoch, and how pictures name it.
    "train_loss": "training",
    "test_loss": "test",
    "test_accuracy": "test accuracy, share of images",
}
Loss = Callable[[Array, Array], Array]

# The loss of a map is 0 exactly where its probabilities are the label's, and its gradient is
# p - y (Blondel, Martins, Niculae 2020, Learning with Fenchel-Young losses). A line with the
# loss of your own map makes its name an answer to `--maps`.
LOSSES: dict[str, Loss] = {
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
        """One network, one map and a few epochs, with a target to go with them."""
        size: dict[str, Any] = {"networks": ("mlp",), "maps": ("softmax",), "num_epochs": 4}
        return cls(quick=True, num_seeds=2, **size, min_mlp_accuracy=0.9)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every network with every map on the same splits, and the control."""
    data, rng = load(config.data_dir), np.random.default_rng(config.seed)
    if config.batch_size > data.num_train:
        wanted = f"batch_size must be at most {data.num_train}, the images to train on"
        raise ValueError(f"{wanted}; got {config.batch_size}.")
    size, num_train = len(data.labels), data.num_train
    order = lambda: np.arange(size) if data.is_split else rng.permutation(size)
    rows = np.stack([order() for _ in range(config.num_seeds)])
    train_rows, test_rows = np.split(rows, [num_train], axis=1)
    shuffled = rng.permutation(data.labels)
    arms: dict[str, tuple[NetworkName, str, NDArray]] = {
        f"{network}, {name}": (network, name, data.labels)
        for network in config.networks
        for name in config.maps
    }
    arms["shuffled labels"] = config.networks[0], config.maps[0], shuffled

    arrays: Arrays = {"data": np.array(data.name)}
    networks = {name: network_of(name, data) for name in config.networks}
    images = jnp.asarray(data.images, float)
    start_keys, order_keys = jax.random.split(
        jax.random.key(config.seed), (2, config.num_seeds)
    )
    for arm, (network, name, labels) in arms.items():
        start, epoch = trainer(networks[network], LOSSES[name], num_train, config)
        state, scores = start(start_keys), []
        for number in track(range(config.num_epochs), arm):
            given = order_keys, train_rows, test_rows, jnp.int32(number), images, labels
            state, score, predicted = jax.block_until_ready(epoch(state, *given))
            scores.append(jax.device_get(score))
        by_epoch = np.moveaxis(np.array(scores), 0, -1)
        arrays |= {f"curves/{arm}/{n}": of for n, of in zip(CURVES, by_epoch, strict=True)}
        counts = np.zeros((data.num_classes, data.num_classes), np.int64)
        np.add.at(counts, (labels[test_rows], np.asarray(predicted)), 1)
        arrays[f"confusion/{arm}"] = counts
    return arrays


def network_of(name: NetworkName, data: Dataset) -> Network:
    """The network of that name for images of this shape."""
    height, width, num_channels = data.images.shape[1:]
    if name == "mlp":
        return mlp([height * width * num_channels, 128, 64, data.num_classes])
    return cnn((height, width, num_channels), [32, 64], 64, data.num_classes)


@functools.cache  # The control runs the programs of another arm.
def trainer(network: Network, loss: Loss, num_train: int, config: Config) -> tuple[Any, Any]:
    """How the training starts, and one epoch of it, for all seeds side by side."""
    num_batches = num_train // config.batch_size
    num_steps = config.num_epochs * num_batches
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))

    def start(key: Array) -> tuple[Layers, Any]:
        layers = network.init(key)
        return layers, optimizer.init(layers)

    def epoch(
        state: tuple[Layers, Any],
        key: Array,
        train_rows: Array,
        test_rows: Array,
        number: Array,
        images: Array,
        labels: Array,
    ) -> tuple[tuple[Layers, Any], tuple[Array, Array, Array], Array]:
        """The new state; training loss, test loss and test accuracy; the predictions."""

        def mean_loss(layers: Layers, batch: Array) -> Array:
            return jnp.mean(loss(network.apply(layers, images[batch]), labels[batch]))

        def step(state: tuple[Layers, Any], batch: Array) -> tuple[tuple[Layers, Any], Array]:
            layers, optimizer_state = state
            batch_loss, grads = jax.value_and_grad(mean_loss)(layers, batch)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, layers)
            return (optax.apply_updates(layers, updates), optimizer_state), batch_loss

        # A smaller last batch is left out; the next epoch has another order.
        order = jax.random.permutation(jax.random.fold_in(key, number), train_rows)
        batches = order[: num_batches * config.batch_size].reshape(num_batches, -1)
        state, losses = jax.lax.scan(step, state, batches)
        # The images of a large test set go through the network in parts that fit in memory.
        apply = lambda row: network.apply(state[0], images[row][None])[0]
        logits = jax.lax.map(apply, test_rows, batch_size=min(512, len(test_rows)))
        predicted, tested = jnp.argmax(logits, axis=-1), labels[test_rows]
        test_loss, accuracy = jnp.mean(loss(logits, tested)), jnp.mean(predicted == tested)
        return state, (jnp.mean(losses), test_loss, accuracy), predicted

    axes = (0, 0, 0, 0, None, None, None)
    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(epoch, axes))


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The accuracy of every arm, with targets on the digits only, and the control."""
    goals = {"mlp": config.min_mlp_accuracy, "cnn": config.min_cnn_accuracy}
    measures = []
    for network in config.networks:
        for name in config.maps:
            accuracy = arrays[f"curves/{network}, {name}/test_accuracy"][:, -1]
            goal = goals[network] if arrays["data"] == "digits" else None
            title = f"{network}, {name}: test accuracy"
            measures.append(Measure(title, accuracy, at_least=goal))
    counts = arrays["confusion/shuffled labels"]
    limit = float(counts.sum(axis=1).max() / counts.sum()) + 0.05
    control = arrays["curves/shuffled labels/test_accuracy"][:, -1]
    return [*measures, Measure("shuffled labels: test accuracy", control, at_most=limit)]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The curves of all arms, and the confusion matrix of each."""
    losses = plots.curves(
        arrays,
        "epoch",
        "Training and testing by epoch. Every map has a loss of its own, in its own unit, so"
        f" losses are compared only within an arm.{plots.SEEDS}",
        names=CURVES,
        apart=("train_loss", "test_loss"),
    )
    counts = plots.under(arrays, "confusion")
    figure, axes = plots.panels(
        list(counts),
        "How often each class was taken for each, over all seeds: every row sums to 1; the"
        " numbers are per cent, and shares below 0.5 % are left out.",
    )
    for panel, matrix in zip(axes, counts.values(), strict=True):
        plots.confusion(figure, panel, matrix, range(len(matrix)), what="class")
    return {"curves": losses, "confusion": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("classification", __doc__, Config, run, judge, draw), args)
