"""Which gradient trains discrete latent variables best?

A variational autoencoder of handwritten digits, 8 x 8 and binarised, whose latent variables are
a few classes each: an encoder gives their logits, a sample is decoded to the probability of
every pixel. Four arms differ in the gradient that comes back through the sample: relaxed
Gumbel-softmax samples at a falling temperature, the same straight through, ReinMax, and the
score function of several samples with the others as baseline. All share the images, the first
weights and the order of the batches. Judged is the negative evidence lower bound (NELBO) on
images that were not trained on, in nats per image, with one-hot samples for all arms, and with
relaxed ones too.

Expected: less than 20 nats with one-hot samples in every arm, and straight through and ReinMax
before the relaxed samples, which are trained on what they are not judged by. Controls: the last
layer of the decoder starts at zero, so that the first reconstruction costs 64 ln 2; and pixels
that know nothing of each other cost more than any arm. A missed target, or a control that
fails, would refute it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import digits
from experiments._networks import Layers, Network, mlp
from experiments._plots import curves, panels
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

__all__ = ["Config", "draw", "judge", "main", "run"]

Arm = Literal["relaxed", "straight through", "ReinMax", "score function"]
NUM_PIXELS = 64
NUM_SHOWN = 10


@dataclass(frozen=True)
class Config(Options):
    """Options of the autoencoder with discrete latent variables."""

    num_seeds: int = 3
    """Number of independent repetitions, run side by side."""
    arms: tuple[Arm, ...] = ("relaxed", "straight through", "ReinMax", "score function")
    """Estimates of the gradient that are compared."""
    num_latents: int = 8
    """Latent variables of an image."""
    num_classes: int = 8
    """Classes of each."""
    num_hidden: int = 128
    """Units of the one hidden layer, of the encoder and of the decoder."""
    num_rounds: int = 15
    """Rounds of training; the test images are judged after each."""
    num_epochs: int = 10
    """Passes over the training images in a round."""
    batch_size: int = 96
    """Images in a step."""
    learning_rate: float = 2e-3
    """Step size of Adam."""
    first_temperature: float = 1.0
    """Temperature of relaxed samples in the first round."""
    last_temperature: float = 0.5
    """Temperature in the last; it falls by the same factor from round to round."""
    num_scored: int = 4
    """Samples per image of the score function."""
    num_judged: int = 16
    """Samples per image that the NELBO is averaged over."""
    max_nelbo: float = 20.0
    """Target: the largest mean NELBO with one-hot samples, in nats per image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.arms:
            raise ValueError("arms must name at least one.")

    @classmethod
    def reduced(cls) -> Self:
        """A short training of one arm, and a target to go with it."""
        return cls(
            quick=True,
            num_seeds=2,
            arms=("relaxed",),
            num_rounds=2,
            num_epochs=5,
            learning_rate=5e-3,
            num_judged=2,
            max_nelbo=24.5,
        )


class Model(NamedTuple):
    """The weights of one model, or of one model per seed along a leading axis."""

    encoder: Layers
    decoder: Layers


class _State(NamedTuple):
    model: Model
    optimizer: Any


Sampler = Callable[[Array, Array, Array], Array]  # key, logits, temperature -> samples

# The score function needs no derivative of a sample: it uses `sj.sample` and a surrogate.
SAMPLERS: dict[str, Sampler] = {
    "relaxed": lambda key, z, t: sj.gumbel_softmax(key, z, temperature=t),
    "straight through": lambda key, z, t: sj.gumbel_softmax(key, z, temperature=t, hard=True),
    "ReinMax": lambda key, z, t: sj.reinmax(key, z),
}


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every arm from the same weights on the same batches, and judges it."""
    images = digits().images.reshape(-1, NUM_PIXELS)
    pixels = jnp.asarray(images >= 0.5, float)
    num_train = len(pixels) * 4 // 5
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    rows = jnp.stack([jax.random.permutation(key, len(pixels)) for key in keys])
    train, test = pixels[rows[:, :num_train]], pixels[rows[:, num_train:]]
    start = _start(keys, config)
    temperatures = jnp.geomspace(
        config.first_temperature, config.last_temperature, config.num_rounds
    )
    (first_loss, _), _ = _judge(start.model, keys, test, temperatures[0], config)
    arrays: Arrays = {
        "first_loss": np.asarray(first_loss),
        "independent": _independent(np.asarray(train), np.asarray(test)),
        "images/original": np.asarray(test[0, :NUM_SHOWN]),
    }
    for arm in config.arms:
        state, scores = start, []
        for number in track(range(config.num_rounds), arm):
            temperature = temperatures[number]
            options = jnp.int32(number), train, temperature, arm, config
            state, train_nelbo = _train(state, keys, *options)
            judged = _judge(state.model, keys, test, temperature, config)
            hard, relaxed = (np.asarray(loss + rate) for loss, rate in judged)
            scores.append((np.asarray(train_nelbo), hard, relaxed))
        names = ("train_nelbo", "test_nelbo", "test_nelbo_of_relaxed_samples")
        for name, values in zip(names, np.moveaxis(np.array(scores), 0, -1), strict=True):
            arrays[f"curves/{arm}/{name}"] = values
        first_model = jax.tree.map(lambda leaf: leaf[0], state.model)
        shown = _reconstruct(first_model, keys[0], test[0, :NUM_SHOWN], config)
        arrays[f"images/{arm}"] = np.asarray(shown)
    return arrays


def _networks(config: Config) -> tuple[Network, Network]:
    num_features = config.num_latents * config.num_classes
    return (
        mlp([NUM_PIXELS, config.num_hidden, num_features]),
        mlp([num_features, config.num_hidden, NUM_PIXELS]),
    )


@functools.partial(jax.jit, static_argnames=("config",))
def _start(keys: Array, config: Config) -> _State:
    def start(key: Array) -> _State:
        encoder, decoder = (
            network.init(key)
            for network, key in zip(_networks(config), jax.random.split(key), strict=True)
        )
        decoder[-1] = jax.tree.map(jnp.zeros_like, decoder[-1])
        model = Model(encoder, decoder)
        return _State(model, optax.adam(config.learning_rate).init(model))

    return jax.vmap(start)(keys)


def _encode(model: Model, pixels: Array, config: Config) -> tuple[Array, Array]:
    """Logits of the latent variables `[n, latents, classes]`, and their rate in nats `[n]`."""
    logits = _networks(config)[0].apply(model.encoder, pixels)
    logits = logits.reshape(-1, config.num_latents, config.num_classes)
    # The divergence from a uniform prior.
    return logits, jnp.sum(math.log(config.num_classes) - sj.entropy(logits), axis=-1)


def _decode(model: Model, samples: Array, config: Config) -> Array:
    """Logits of the pixels, `[n, 64]`, of samples `[n, latents, classes]`."""
    return _networks(config)[1].apply(model.decoder, samples)


def _loss(model: Model, samples: Array, pixels: Array, config: Config) -> Array:
    """The cost of naming the pixels, in nats, `[n]`."""
    logits = _decode(model, samples, config)
    return jnp.sum(jax.nn.softplus(logits) - pixels * logits, axis=-1)


def _one_hot(labels: Array, config: Config) -> Array:
    return jax.nn.one_hot(labels, config.num_classes, dtype=jnp.zeros(()).dtype)


def _nelbo(
    model: Model, key: Array, pixels: Array, temperature: Array, arm: str, config: Config
) -> Array:
    """The bound, `[n]`, with the gradient that the arm stands for."""
    logits, rate = _encode(model, pixels, config)
    if arm != "score function":
        return rate + _loss(model, SAMPLERS[arm](key, logits, temperature), pixels, config)
    labels = sj.sample(key, logits, shape=(config.num_scored,))
    losses = jax.vmap(lambda y: _loss(model, _one_hot(y, config), pixels, config))(labels)
    several = jnp.broadcast_to(logits[None], (*labels.shape, config.num_classes))
    log_probs = jnp.sum(sj.log_prob(several, labels), axis=-1)
    return rate + sj.score_function(losses, log_probs)


@functools.partial(jax.jit, static_argnames=("arm", "config"))
def _train(
    state: _State,
    keys: Array,
    number: Array,
    images: Array,
    temperature: Array,
    arm: str,
    config: Config,
) -> tuple[_State, Array]:
    """One round; the new state, and the mean NELBO `[seeds]`."""
    optimizer = optax.adam(config.learning_rate)
    num_steps = config.num_epochs * (images.shape[1] // config.batch_size)

    def step(images: Array, state: _State, batch: tuple[Array, Array]) -> tuple[_State, Array]:
        key, rows = batch

        def mean_nelbo(model: Model) -> Array:
            return jnp.mean(_nelbo(model, key, images[rows], temperature, arm, config))

        nelbo, grads = jax.value_and_grad(mean_nelbo)(state.model)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.model)
        return _State(optax.apply_updates(state.model, updates), optimizer_state), nelbo

    def one_seed(state: _State, key: Array, images: Array) -> tuple[_State, Array]:
        batch_key, sample_key = jax.random.split(jax.random.fold_in(key, number))
        shape = num_steps, config.batch_size
        batches = (
            jax.random.split(sample_key, num_steps),
            jax.random.randint(batch_key, shape, 0, len(images), jnp.int32),
        )
        state, nelbos = jax.lax.scan(functools.partial(step, images), state, batches)
        return state, jnp.mean(nelbos)

    return jax.vmap(one_seed)(state, keys, images)


@functools.partial(jax.jit, static_argnames=("config",))
def _judge(
    model: Model, keys: Array, images: Array, temperature: Array, config: Config
) -> list[tuple[Array, Array]]:
    """Loss and rate `[seeds]`, with one-hot and with relaxed samples."""

    def one_seed(model: Model, key: Array, pixels: Array) -> list[tuple[Array, Array]]:
        logits, rate = _encode(model, pixels, config)

        several = jnp.broadcast_to(logits[None], (config.num_judged, *logits.shape))
        hard = _one_hot(sj.sample(key, logits, shape=(config.num_judged,)), config)
        relaxed = sj.gumbel_softmax(key, several, temperature=temperature)
        loss = jax.vmap(lambda samples: _loss(model, samples, pixels, config))
        return [(jnp.mean(loss(y)), jnp.mean(rate)) for y in (hard, relaxed)]

    return jax.vmap(one_seed)(model, keys, images)


@functools.partial(jax.jit, static_argnames=("config",))
def _reconstruct(model: Model, key: Array, pixels: Array, config: Config) -> Array:
    """The probability of each pixel given one one-hot sample."""
    logits, _ = _encode(model, pixels, config)
    return jax.nn.sigmoid(_decode(model, _one_hot(sj.sample(key, logits), config), config))


def _independent(train: NDArray, test: NDArray) -> NDArray:
    """The loss `[seeds]` of a model in which the pixels are independent."""
    rates = (train.sum(axis=1, keepdims=True) + 0.5) / (train.shape[1] + 1)
    losses = -np.log(np.where(test > 0.5, rates, 1 - rates))
    return np.asarray(losses.sum(axis=-1).mean(axis=-1))


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The NELBO of each arm, with both kinds of samples, and the controls."""
    measures = []
    worst = np.full(config.num_seeds, -np.inf)
    for arm in config.arms:
        hard, relaxed = (
            arrays[f"curves/{arm}/{name}"][:, -1]
            for name in ("test_nelbo", "test_nelbo_of_relaxed_samples")
        )
        worst = np.maximum(worst, hard)
        measures += [
            Measure(f"{arm}: NELBO, one-hot samples", hard, at_most=config.max_nelbo),
            Measure(f"{arm}: NELBO, relaxed samples", relaxed),
        ]
    expected = NUM_PIXELS * math.log(2)
    eps = float(np.finfo(arrays["first_loss"].dtype).eps)
    return [
        *measures,
        Measure(
            "first loss, less 64 ln 2",
            abs(arrays["first_loss"] - expected),
            at_most=NUM_PIXELS * eps * expected,
            summary="max",
        ),
        Measure("loss of independent pixels", arrays["independent"]),
        Measure(
            "independent pixels, less the worst arm",
            arrays["independent"] - worst,
            at_least=0.0,
            summary="min",
        ),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The curves of all arms, and images of the first seed with their reconstructions."""
    kinds = [name.removeprefix("images/") for name in arrays if name.startswith("images/")]
    titles = [kind if column == 0 else "" for kind in kinds for column in range(NUM_SHOWN)]
    figure, axes = panels(
        titles,
        "Test images of the first seed, and the probability of each pixel given one one-hot"
        " sample of the latent variables: black is 1, white is 0.",
        size=1.2,
        columns=NUM_SHOWN,
    )
    images = np.concatenate([arrays[f"images/{kind}"] for kind in kinds])
    for panel, image in zip(axes, images, strict=True):
        panel.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set_xticks([])
        panel.set_yticks([])
    nelbo = curves(
        arrays,
        "round of training",
        "Negative evidence lower bound by round, in nats per image; lower is better. Thick:"
        " median of the seeds; thin: each seed.",
        names={
            "train_nelbo": "training images, nats",
            "test_nelbo": "test images, one-hot samples, nats",
            "test_nelbo_of_relaxed_samples": "test images, relaxed samples, nats",
        },
    )
    return {"nelbo": nelbo, "reconstructions": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("gumbel_vae", __doc__, Config, run, judge, draw), args)
