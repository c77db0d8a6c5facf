"""Does a small network reach the published result on four blobs, whatever map it ends in?

The published Keras run: 1000 points around four centres, 250 of them for testing; dense layers
of 12, 8 and 4 units, relu, He-uniform; Adam at 1e-3, 30 epochs, batches of 5; test loss
0.0020, accuracy 100 %. Here softmax, sparsemax and entmax15, each trained on its own loss,
share one set of points; every seed has its own network and batches, the same ones for every
map.

Expected for softmax: a median test loss of 0.006 or less and a median accuracy of 100 %,
though single seeds may be stuck where the relus died. Controls: the nearest centre, which no
method can beat, gets 100 %; a softmax over two classes equals the sigmoid. A median short of
its target, or a control that fails, would refute it.

The published points are not known, and the result depends on them: over the sets 0 to 7 the
median loss is from 0.0023 to 0.0165, and within 0.006 for five of the eight. Set 2, the
default, is one where 100 % is usual, as published. The last arm, with no target, gives every
seed points of its own: over 100 seeds the median loss is between 0.005 and 0.007, and 63 % of
the seeds reach 100 %.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from experiments._maps import MAPS, MapName, OutputMap
from experiments._networks import Layers, Network, mlp
from experiments._pictures import draw_sigmoid, draw_simplex, tabulate_sigmoid, tabulate_simplex
from experiments._plots import COLOURS, arms_of, curves, panels
from experiments._run import Experiment, Measure, Options, launch
from experiments._train import fit
from experiments._types import Arrays, NDArray, Track, untracked

__all__ = ["Config", "draw", "judge", "main", "run", "tell"]

CENTRES = ((15.0, 0.0), (15.0, 15.0), (0.0, 15.0), (30.0, 15.0))
OWN_POINTS = "softmax, own points"


@dataclass(frozen=True)
class Config(Options):
    """Options of the four blobs."""

    maps: tuple[MapName, ...] = ("softmax", "sparsemax", "entmax15")
    """Output maps, softmax among them: the targets are for softmax."""
    points_seed: int = 2
    """Seed of the points that are shared."""
    num_points: int = 1000
    """Points in a set, a quarter of them around each centre."""
    num_test: int = 250
    """How many of them are for testing."""
    spread: float = 1.5
    """Standard deviation of a point around its centre."""
    num_epochs: int = 30
    """Passes over the training points."""
    batch_size: int = 5
    """Points in a batch."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    max_loss: float = 0.006
    """Target: the largest median test loss."""
    min_accuracy: float = 1.0
    """Target: the smallest median test accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "softmax" not in self.maps:
            raise ValueError(f"maps must include softmax, got {self.maps}.")
        if not 0 < self.num_test < self.num_points:
            wanted = f"between 0 and num_points = {self.num_points}"
            raise ValueError(f"num_test must be {wanted}, got {self.num_test}.")

    @classmethod
    def reduced(cls) -> Self:
        """Fewer maps, fewer and larger steps, and a looser target for the loss."""
        return cls(
            quick=True,
            num_seeds=5,
            maps=("softmax", "sparsemax"),
            num_epochs=10,
            learning_rate=5e-3,
            max_loss=0.02,
        )


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every map on the shared points, and softmax on others too; tabulates the maps."""
    shared = draw_points(config.points_seed, 1, config)
    own = draw_points(config.seed, config.num_seeds, config)
    points, labels = (np.concatenate(parts) for parts in zip(shared, own, strict=True))
    rows = np.arange(labels.size).reshape(labels.shape)
    the_shared = np.tile(rows[0], (config.num_seeds, 1))
    arms: dict[str, tuple[MapName, NDArray]] = {
        name: (name, the_shared) for name in config.maps
    }
    arms |= {OWN_POINTS: ("softmax", rows[1:])}

    network = mlp([2, 12, 8, len(CENTRES)])
    optimizer = optax.adam(config.learning_rate, eps=1e-7)
    num_train = config.num_points - config.num_test
    fits = {
        arm: fit(
            jax.random.key(config.seed),
            jnp.asarray(points.reshape(-1, 2), float),
            jnp.asarray(labels.reshape(-1)),
            jnp.asarray(arm_rows),
            network=network,
            output_map=MAPS[name],
            optimizer=optimizer,
            num_train=num_train,
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            track=track,
            label=arm,
        )
        for arm, (name, arm_rows) in arms.items()
    }

    shown = np.argsort(fits["softmax"].curves["test_loss"][:, -1])[config.num_seeds // 2]
    arrays: Arrays = {
        "nearest_centre": _nearest_centre_accuracy(
            points[:, num_train:], labels[:, num_train:]
        ),
        "shown/seed": shown,
        "shown/points": points[0, num_train:],
        "shown/labels": labels[0, num_train:],
        **tabulate_simplex(config.maps),
        **tabulate_sigmoid(),
    }
    for arm, result in fits.items():
        arrays |= {f"curves/{arm}/{name}": values for name, values in result.curves.items()}
    for name in config.maps:
        layers = jax.tree.map(operator.itemgetter(shown), jax.device_get(fits[name].layers))
        arrays[f"regions/{name}"] = _regions(network, layers, MAPS[name])
    return arrays


def draw_points(seed: int, num_sets: int, config: Config) -> tuple[NDArray, NDArray]:
    """Points `[sets, n, 2]`, as many around each centre, and their classes `[sets, n]`."""
    rng = np.random.default_rng(seed)
    classes = np.arange(config.num_points, dtype=np.int32) % len(CENTRES)
    labels = rng.permuted(np.tile(classes, (num_sets, 1)), axis=1)
    return rng.normal(np.array(CENTRES)[labels], config.spread), labels


def _nearest_centre_accuracy(points: NDArray, labels: NDArray) -> NDArray:
    """Accuracy `[sets]` of the best classifier there is for points that spread equally."""
    distances = np.linalg.norm(points[..., None, :] - np.array(CENTRES), axis=-1)
    return np.asarray(np.mean(np.argmin(distances, axis=-1) == labels, axis=-1))


def _regions(network: Network, layers: Layers, output_map: OutputMap) -> NDArray:
    """Probabilities over a grid of points, `[height, width, K]`."""
    left, right, low, high = _EXTENT
    grid = np.stack(np.meshgrid(np.linspace(left, right, 161), np.linspace(low, high, 106)), -1)
    logits = jax.jit(network.apply)(layers, jnp.asarray(grid.reshape(-1, 2), float))
    return np.asarray(output_map.probs(logits)).reshape(*grid.shape[:2], -1)


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The published figures for softmax, the same of the other arms, and the controls."""
    measures = []
    for arm in arms_of(arrays):
        loss, accuracy = _final(arrays, arm)
        is_judged = arm == "softmax"
        max_loss = config.max_loss if is_judged else None
        min_accuracy = config.min_accuracy if is_judged else None
        measures += [
            Measure(f"{arm}: test loss", loss, at_most=max_loss, summary="median"),
            Measure(f"{arm}: accuracy", accuracy, at_least=min_accuracy, summary="median"),
        ]
    gap = np.abs(arrays["sigmoid/softmax"] - arrays["sigmoid/sigmoid"]).max()
    eps = float(np.finfo(gap.dtype).eps)
    return [
        *measures,
        Measure("nearest centre: accuracy", arrays["nearest_centre"], at_least=0.999),
        Measure("softmax of two classes, less sigmoid", gap, at_most=4 * eps),
    ]


def tell(arrays: Arrays) -> str:
    """The final loss and accuracy of every seed, the best first."""
    lines = []
    for arm in arms_of(arrays):
        loss, accuracy = map(np.sort, _final(arrays, arm))
        lines += [
            f"{arm}, every seed",
            "  test loss  " + " ".join(f"{value:7.4f}" for value in loss),
            "  accuracy   " + " ".join(f"{value:7.1%}" for value in accuracy[::-1]),
        ]
    return "\n".join(lines)


def _final(arrays: Arrays, arm: str) -> tuple[NDArray, NDArray]:
    """Test loss and test accuracy after the last epoch, each `[seeds]`."""
    loss, accuracy = (arrays[f"curves/{arm}/test_{of}"] for of in ("loss", "accuracy"))
    return loss[:, -1], accuracy[:, -1]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Curves, decision regions, the maps on the simplex, and softmax against the sigmoid."""
    return {
        "curves": curves(arrays, "epoch"),
        "regions": _draw_regions(arrays),
        "simplex": draw_simplex(arrays),
        "sigmoid": draw_sigmoid(arrays),
    }


def _draw_regions(arrays: Arrays) -> Figure:
    """Every place in the mixture of the classes' colours by their probabilities."""
    colours = np.array([to_rgb(colour) for colour in COLOURS[: len(CENTRES)]])
    names = [name for name in arrays if name.startswith("regions/")]
    titles = [f"{name.removeprefix('regions/')}, seed {arrays['shown/seed']}" for name in names]
    figure, axes = panels(titles, sharey=True)
    for panel, name in zip(axes, names, strict=True):
        mixture = np.clip(0.5 + 0.5 * arrays[name] @ colours, 0, 1)
        panel.imshow(mixture, origin="lower", extent=_EXTENT, aspect="auto")
        point_colours = colours[arrays["shown/labels"]]
        panel.scatter(*arrays["shown/points"].T, s=4, c=point_colours, edgecolors="none")
    return figure


_EXTENT = (-6.0, 36.0, -6.0, 21.0)  # left, right, low, high


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("blobs", __doc__, Config, run, judge, draw, tell), args)
