"""How well do small networks classify real images, with softmax and its sparse kin on top?

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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments._data import Dataset, load
from experiments._maps import MAPS, MapName
from experiments._networks import Network, cnn, mlp
from experiments._plots import curves, panels
from experiments._run import Experiment, Measure, Options, launch
from experiments._train import fit
from experiments._types import Arrays, NDArray, Track, untracked

__all__ = ["Config", "draw", "judge", "main", "run"]

NetworkName = Literal["mlp", "cnn"]


@dataclass(frozen=True)
class Config(Options):
    """Options of the classification of images."""

    num_seeds: int = 5
    """Number of independent repetitions, run side by side."""
    data_dir: Path | None = None
    """Folder with MNIST, CIFAR-10, CIFAR-100 (binary) or an .npz file; none: the digits."""
    networks: tuple[NetworkName, ...] = ("mlp", "cnn")
    """Networks to train."""
    maps: tuple[MapName, ...] = ("softmax", "sparsemax", "entmax15")
    """Output maps to train them with."""
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
    rng = np.random.default_rng(config.seed)
    rows = np.stack([_split(rng, data) for _ in range(config.num_seeds)])
    num_steps = config.num_epochs * (data.num_train // config.batch_size)
    # No step at all is refused by `fit`, in clearer words than by the schedule.
    schedule = optax.cosine_decay_schedule(config.learning_rate, max(num_steps, 1))
    optimizer = optax.adam(schedule)
    images = jnp.asarray(data.images, float)
    networks = {name: _network(name, data) for name in config.networks}
    arrays: Arrays = {"data": np.array(data.name)}

    def train(arm: str, network: NetworkName, name: MapName, labels: NDArray) -> None:
        result = fit(
            jax.random.key(config.seed),
            images,
            jnp.asarray(labels),
            jnp.asarray(rows),
            network=networks[network],
            output_map=MAPS[name],
            optimizer=optimizer,
            num_train=data.num_train,
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            track=track,
            label=arm,
        )
        tested = labels[rows[:, data.num_train :]]
        arrays.update({f"curves/{arm}/{curve}": of for curve, of in result.curves.items()})
        arrays[f"confusion/{arm}"] = _confusion(tested, result.predicted, data.num_classes)

    for network in config.networks:
        for name in config.maps:
            train(f"{network}, {name}", network, name, data.labels)
    shuffled = rng.permutation(data.labels)
    train("shuffled labels", config.networks[0], config.maps[0], shuffled)
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
    arms = [name.removeprefix("confusion/") for name in arrays if name.startswith("confusion/")]
    figure, axes = panels(arms)
    for panel, arm in zip(axes, arms, strict=True):
        counts = arrays[f"confusion/{arm}"]
        panel.imshow(np.log1p(counts), cmap="Blues")
        panel.set_xlabel("predicted class")
        if len(counts) <= 10:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if row == column else "black"
                panel.text(
                    column, row, count or "", color=colour, ha="center", va="center", fontsize=5
                )
    axes[0].set_ylabel("class")
    return {"curves": curves(arrays, "epoch"), "confusion": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("classification", __doc__, Config, run, judge, draw), args)
