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
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import shuffled_digits
from experiments._networks import Layers, mlp
from experiments._plots import SEEDS, curves, panels, under
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked
from experiments._training import each

__all__ = ["Config", "draw", "judge", "main", "run"]

Arm = Literal["relaxed", "straight through", "ReinMax", "score function"]
NUM_PIXELS, NUM_SHOWN = 64, 10
NUM_HIDDEN = 128  # Units of the one hidden layer, of the encoder and of the decoder.
BATCH_SIZE = 96
TEMPERATURES = (1.0, 0.5)  # In the first round and in the last; it falls geometrically.
NUM_SCORED = 4  # Samples per image of the score function.
# From a key, logits and a temperature to samples. The score function needs no derivative of a
# sample: it has `sj.sample` and a surrogate.
SAMPLERS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "relaxed": lambda key, z, t: sj.gumbel_softmax(key, z, temperature=t),
    "straight through": lambda key, z, t: sj.gumbel_softmax(key, z, temperature=t, hard=True),
    "ReinMax": lambda key, z, t: sj.reinmax(key, z),
}


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
    num_rounds: int = 15
    """Rounds of training; the test images are judged after each."""
    num_epochs: int = 10
    """Passes over the training images in a round."""
    learning_rate: float = 2e-3
    """Step size of Adam."""
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
        size: dict[str, Any] = {"num_seeds": 2, "num_rounds": 2, "num_epochs": 5}
        size |= {"arms": ("relaxed",), "num_judged": 2, "learning_rate": 5e-3}
        return cls(quick=True, **size, max_nelbo=24.5)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains every arm from the same weights on the same batches, and judges it."""
    rng = np.random.default_rng(config.seed)
    data = shuffled_digits(rng, config.num_seeds)
    train, test = ((of >= 0.5).astype(np.float32) for of in (data.images, data.test_images))
    num_train, num_steps = train.shape[1], config.num_epochs * (train.shape[1] // BATCH_SIZE)
    shape = config.num_seeds, config.num_rounds, num_steps, BATCH_SIZE
    rows = rng.integers(0, num_train, shape, np.int32)
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    # A control: a model in which the pixels are independent.
    rates = (train.sum(axis=1, keepdims=True) + 0.5) / (train.shape[1] + 1)
    losses = -np.log(np.where(test > 0.5, rates, 1 - rates)).sum(axis=-1)
    arrays: Arrays = {"independent": losses.mean(axis=-1)}
    arrays["images/original"] = test[0, :NUM_SHOWN]
    for arm in each(config.arms, track, "arms"):
        one_seed = functools.partial(train_and_judge, arm=arm, config=config)
        found = jax.device_get(jax.jit(jax.vmap(one_seed))(keys, train, test, rows))
        arrays["first_loss"], (shown, *scores) = found
        names = ("train_nelbo", "test_nelbo", "test_nelbo_of_relaxed_samples")
        arrays |= {f"curves/{arm}/{n}": of for n, of in zip(names, scores, strict=True)}
        arrays[f"images/{arm}"] = shown[0, -1]
    return arrays


def train_and_judge(
    key: Array, train: Array, test: Array, rows: Array, arm: str, config: Config
) -> tuple[Array, tuple[Array, ...]]:
    """One seed: the loss before training; and reconstructions and NELBOs by round.

    `rows` are those of the batches, `[rounds, steps, batch]`.
    """
    num_features = config.num_latents * config.num_classes
    encoder = mlp([NUM_PIXELS, NUM_HIDDEN, num_features])
    decoder = mlp([num_features, NUM_HIDDEN, NUM_PIXELS])
    optimizer = optax.adam(config.learning_rate)
    temperatures = jnp.geomspace(*TEMPERATURES, config.num_rounds)
    Model = tuple[Layers, Layers]  # The layers of the encoder and of the decoder.

    def encode(model: Model, pixels: Array) -> tuple[Array, Array]:
        """Logits of the latent variables `[n, latents, classes]`, and their rate `[n]`."""
        logits = encoder.apply(model[0], pixels)
        logits = logits.reshape(-1, config.num_latents, config.num_classes)
        # The rate is the divergence from a uniform prior, in nats.
        return logits, jnp.sum(math.log(config.num_classes) - sj.entropy(logits), axis=-1)

    def decode(model: Model, samples: Array, pixels: Array) -> tuple[Array, Array]:
        """The cost of naming the pixels in nats, `[n]`, and their probabilities."""
        logits = decoder.apply(model[1], samples)
        losses = jax.nn.softplus(logits) - pixels * logits
        return jnp.sum(losses, axis=-1), jax.nn.sigmoid(logits)

    def one_hot(labels: Array) -> Array:
        return jax.nn.one_hot(labels, config.num_classes, dtype=train.dtype)

    def nelbo(model: Model, key: Array, pixels: Array, temperature: Array) -> Array:
        """The mean bound, with the gradient that the arm stands for."""
        logits, rate = encode(model, pixels)
        if arm != "score function":
            samples = SAMPLERS[arm](key, logits, temperature)
            return jnp.mean(rate + decode(model, samples, pixels)[0])
        labels = sj.sample(key, logits, shape=(NUM_SCORED,))
        losses = jax.vmap(lambda y: decode(model, one_hot(y), pixels)[0])(labels)
        several = jnp.broadcast_to(logits[None], (*labels.shape, config.num_classes))
        log_probs = jnp.sum(sj.log_prob(several, labels), axis=-1)
        return jnp.mean(rate + sj.score_function(losses, log_probs))

    def test_nelbos(model: Model, temperature: Array) -> tuple[Array, Array, Array]:
        """Reconstructions of the first images, and the mean NELBO by both kinds of samples."""
        logits, rate = encode(model, test)
        several = jnp.broadcast_to(logits[None], (config.num_judged, *logits.shape))
        hard = one_hot(sj.sample(key, logits, shape=(config.num_judged,)))
        relaxed = sj.gumbel_softmax(key, several, temperature=temperature)
        of_samples = jax.vmap(lambda samples: decode(model, samples, test))
        (of_hard, probs), (of_relaxed, _) = of_samples(hard), of_samples(relaxed)
        mean_rate = jnp.mean(rate)
        shown = probs[0, :NUM_SHOWN]
        return shown, jnp.mean(of_hard) + mean_rate, jnp.mean(of_relaxed) + mean_rate

    def one_round(state: Any, given: tuple[Array, Array]) -> Any:
        number, rows = given
        temperature = temperatures[number]

        def step(state: Any, batch: tuple[Array, Array]) -> Any:
            model, optimizer_state = state
            key, of_batch = batch
            given = model, key, train[of_batch], temperature
            value, grads = jax.value_and_grad(nelbo)(*given)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, model)
            return (optax.apply_updates(model, updates), optimizer_state), value

        keys = jax.random.split(jax.random.fold_in(key, number), len(rows))
        state, nelbos = jax.lax.scan(step, state, (keys, rows))
        shown, *judged = test_nelbos(state[0], temperature)
        return state, (shown, jnp.mean(nelbos), *judged)

    encoder_key, decoder_key = jax.random.split(key)
    hidden, output = decoder.init(decoder_key)
    decoded = [hidden, jax.tree.map(jnp.zeros_like, output)]
    model = encoder.init(encoder_key), decoded
    # Samples do not matter yet, so that the means of the latent variables will do.
    first_loss = jnp.mean(decode(model, sj.softmax(encode(model, test)[0]), test)[0])
    state = model, optimizer.init(model)
    numbers = jnp.arange(config.num_rounds, dtype=jnp.int32)
    return first_loss, jax.lax.scan(one_round, state, (numbers, rows))[1]


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The NELBO of each arm, with both kinds of samples, and the controls."""
    measures, last = [], {}
    for arm in config.arms:
        last[arm] = arrays[f"curves/{arm}/test_nelbo"][:, -1]
        relaxed = arrays[f"curves/{arm}/test_nelbo_of_relaxed_samples"][:, -1]
        title, goal = f"{arm}: NELBO, one-hot samples", config.max_nelbo
        measures.append(Measure(title, last[arm], at_most=goal))
        measures.append(Measure(f"{arm}: NELBO, relaxed samples", relaxed))
    independent, expected = arrays["independent"], NUM_PIXELS * math.log(2)
    gap, worst = np.abs(arrays["first_loss"] - expected), np.max(list(last.values()), axis=0)
    rounding = NUM_PIXELS * float(np.finfo(gap.dtype).eps) * expected
    title = "independent pixels, less the worst arm"
    return [
        *measures,
        Measure("first loss, less 64 ln 2", gap, at_most=rounding, summary="max"),
        Measure("loss of independent pixels", independent),
        Measure(title, independent - worst, at_least=0.0, summary="min"),
    ]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The curves of all arms, and images of the first seed with their reconstructions."""
    kinds = under(arrays, "images")
    figure, axes = panels(
        [""] * (len(kinds) * NUM_SHOWN),
        "Test images of the first seed, and the probability of each pixel given one one-hot"
        " sample of the latent variables: black is 1, white is 0.",
        size=0.72,
        columns=NUM_SHOWN,
    )
    for panel, image in zip(axes, np.concatenate(list(kinds.values())), strict=True):
        panel.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
    for panel, kind in zip(axes[::NUM_SHOWN], kinds, strict=True):
        panel.set_title(kind, fontsize=9, loc="left")
    nelbo = curves(
        arrays,
        "round of training",
        "Negative evidence lower bound by round, in nats per image; lower is better. One-hot"
        f" and relaxed samples are those of the test images.{SEEDS}",
        names={
            "train_nelbo": "NELBO of training images, nats",
            "test_nelbo": "NELBO of one-hot samples, nats",
            "test_nelbo_of_relaxed_samples": "NELBO of relaxed samples, nats",
        },
    )
    return {"nelbo": nelbo, "reconstructions": figure}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("gumbel_vae", __doc__, Config, run, judge, draw), args)
