"""How well does a small model predict text?

The model reads a window of characters, embeds them, and passes them through two dense layers to
the features from which a linear layer predicts the next character. It is trained on the first
nine tenths of a real text and judged on the last tenth, all of it, by `linear_cross_entropy`,
which never stores the logits. The text is Python's own reference (`pydoc_data.topics`), or the
.txt file in `--data-dir`.

Expected on the topics: less than 1.8 nats per character on the last tenth. Controls: the output
layer starts at zero, so that the first loss is the logarithm of the number of characters; and
once the characters are shuffled nothing can be learnt from those before, so that the loss stays
above the entropy of a single character. A model that does better there has seen what it
predicts. A missed target, or a control that fails, would refute it.

`--mesh data=2,vocab=2` spreads the windows of a step over two groups of devices, and the
classes over the two devices of each group; a CPU stands in for them where there is no other
device. With `--processes 2`, two processes share them. The losses are those of one device but
for rounding. `--resume RUN` goes on with a run that was stopped, to the very same losses.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import softjax as sj
from experiments._checkpoints import fetch, restore, save
from experiments._data import REFERENCE, load_text
from experiments._networks import Layers, Network, mlp
from experiments._plots import COLOURS, curves, legend
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    NDArray,
    SpreadOptions,
    Track,
    launch,
    untracked,
)

__all__ = ["Config", "Model", "draw", "judge", "main", "run", "tell"]

SHUFFLED = "shuffled characters"


@dataclass(frozen=True)
class Config(SpreadOptions):
    """Options of the language model."""

    axes: ClassVar[tuple[str, ...]] = ("data", "vocab")

    num_seeds: int = 3
    """Number of independent repetitions, run side by side."""
    data_dir: Path | None = None
    """Folder with a UTF-8 file *.txt, plain or compressed (.gz); none: Python's reference."""
    window: int = 12
    """Characters that the next one is predicted from."""
    num_embedding: int = 32
    """Numbers that a character is embedded in."""
    num_hidden: int = 512
    """Units of the first dense layer."""
    num_features: int = 128
    """Units of the second, which the characters are predicted from."""
    num_rounds: int = 20
    """Rounds of training; the last tenth is judged after each."""
    num_control_rounds: int = 2
    """Rounds of the control, whose characters are shuffled."""
    num_steps: int = 200
    """Steps in a round."""
    batch_size: int = 256
    """Windows in a step."""
    learning_rate: float = 2e-3
    """Step size of AdamW at the start; it falls to zero along a cosine."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    sample_length: int = 400
    """Characters that the trained model writes."""
    temperature: float = 0.7
    """Temperature that it writes them at."""
    max_loss: float = 1.8
    """Target on Python's reference: the largest mean loss on the last tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.sizes["data"]:
            raise ValueError(
                f"batch_size must be a multiple of the devices along data, got"
                f" {self.batch_size} and {self.sizes['data']}."
            )

    @classmethod
    def reduced(cls) -> Self:
        """A smaller model, few steps, and a target to go with them."""
        return cls(
            quick=True,
            num_seeds=2,
            window=6,
            num_embedding=16,
            num_hidden=128,
            num_features=32,
            num_rounds=4,
            num_control_rounds=1,
            num_steps=60,
            batch_size=128,
            learning_rate=5e-3,
            sample_length=100,
            max_loss=2.5,
        )


class Model(NamedTuple):
    """The weights of one model, or of one model per seed along a leading axis."""

    embeddings: Array  # [V, num_embedding]
    layers: Layers
    head: Array  # [V, num_features], padded to as many classes on each device


class _State(NamedTuple):
    model: Model
    optimizer: Any


def run(config: Config, track: Track = untracked, folder: Path | None = None) -> Arrays:
    """Trains on the text and on its shuffled characters, and writes a text."""
    text = load_text(config.data_dir)
    codes = np.frombuffer(text.characters.encode("utf-32-le"), np.uint32)
    vocabulary, tokens = np.unique(codes, return_inverse=True)
    tokens = tokens.astype(np.int32)
    num_train = len(tokens) * 9 // 10
    if len(tokens) - num_train <= config.window:
        least = 10 * config.window + 1
        raise ValueError(
            f"A window of {config.window} needs {least} characters; "
            f"{text.name} has {len(tokens)}."
        )
    shuffled = np.random.default_rng(config.seed).permutation(tokens)

    def validate(model: Model, tokens: NDArray) -> NDArray:
        return np.mean(fetch(_losses(model, tokens[num_train:], config)), axis=-1)

    def train(arm: str, tokens: NDArray, num_rounds: int) -> tuple[NDArray, Model, Arrays]:
        state = _start(config, len(vocabulary))
        first_loss = validate(state.model, tokens)
        kept = folder and folder / "checkpoints" / arm
        losses = np.full((2, config.num_seeds, num_rounds), np.nan, first_loss.dtype)
        done, (state, losses) = restore(kept, (state, losses))
        for number in track(range(done, num_rounds), arm):
            state, train_loss = _train(state, jnp.int32(number), tokens, config)
            # Fetching waits for the round, so that the progress bar shows finished work.
            losses[:, :, number] = fetch(train_loss), validate(state.model, tokens)
            save(kept, number + 1, (state, losses))
        curves = zip(("train_loss", "validation_loss"), losses, strict=True)
        named = {f"curves/{arm}/{name}": values for name, values in curves}
        return first_loss, fetch(state.model), named

    with jax.set_mesh(config.make_mesh()):
        first_loss, model, learnt = train("text", tokens, config.num_rounds)
        _, _, control = train(SHUFFLED, shuffled, config.num_control_rounds)
    prompt = tokens[num_train : num_train + config.window]
    first_model = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), model)
    written = _write(jax.random.key(config.seed), first_model, prompt, config)
    return {
        "data": np.array(text.name),
        "vocabulary": vocabulary,
        "steps_per_round": np.array(config.num_steps),
        "first_loss": first_loss,
        "entropy/text": _entropy(tokens[num_train:]),
        f"entropy/{SHUFFLED}": _entropy(shuffled[num_train:]),
        **learnt,
        **control,
        "sample/prompt": prompt,
        "sample/written": np.asarray(written),
    }


def _network(config: Config) -> Network:
    return mlp([config.window * config.num_embedding, config.num_hidden, config.num_features])


def _optimizer(config: Config) -> Any:
    num_steps = config.num_rounds * config.num_steps
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    # Adam divides a gradient by its size. With a smaller `eps`, one that is nearly 0 would make
    # a whole step of its rounding, so that the losses on two meshes would drift apart.
    return optax.adamw(schedule, eps=1e-5, weight_decay=config.weight_decay)


def _features(model: Model, windows: Array, config: Config) -> Array:
    """The features `[n, D]` of windows `[n, window]`, which predict the next character."""
    return jax.nn.relu(_network(config).apply(model.layers, model.embeddings[windows]))


def _token_losses(model: Model, features: Array, labels: Array, spread: bool) -> Array:
    """The loss of each token, `[n]`, from the classes of each device; `spread`: its tokens."""
    is_class = jnp.arange(len(model.head)) < len(model.embeddings)
    bias = jnp.where(is_class, 0.0, -jnp.inf)  # A class with bias -inf does not count.
    tokens, classes = P("data" if spread else None), P("vocab")

    def losses(features: Array, head: Array, bias: Array, labels: Array) -> Array:
        return sj.linear_cross_entropy(
            features, head, labels, bias=bias, axis_name="vocab", reduction=None
        )

    specs = (tokens, classes, classes, tokens)
    on_mesh = jax.shard_map(losses, in_specs=specs, out_specs=tokens)
    return on_mesh(features, model.head, bias, labels)


def _placed(state: _State) -> _State:
    """The state, of which each device has its classes of the output layer and all else."""

    def place(path: Any, leaf: Array) -> Array:
        is_head = "head" in jax.tree_util.keystr(path)
        return jax.lax.with_sharding_constraint(leaf, P(None, "vocab") if is_head else P())

    return jax.tree_util.tree_map_with_path(place, state)


def _keys(config: Config) -> Array:
    return jax.random.split(jax.random.key(config.seed), config.num_seeds)


@functools.partial(jax.jit, static_argnames=("config", "num_classes"))
def _start(config: Config, num_classes: int) -> _State:
    num_devices = config.sizes["vocab"]
    num_padded = -(-num_classes // num_devices) * num_devices

    def start(key: Array) -> _State:
        layers_key, embeddings_key = jax.random.split(key)
        model = Model(
            jax.random.normal(embeddings_key, (num_classes, config.num_embedding)),
            _network(config).init(layers_key),
            jnp.zeros((num_padded, config.num_features)),
        )
        return _State(model, _optimizer(config).init(model))

    return _placed(jax.vmap(start)(_keys(config)))


@functools.partial(jax.jit, static_argnames=("config",))
def _train(state: _State, number: Array, tokens: Array, config: Config) -> tuple[_State, Array]:
    """One round on the first nine tenths; the new state, and the mean loss `[seeds]`."""
    num_places = len(tokens) * 9 // 10 - config.window
    window = jnp.arange(config.window + 1, dtype=jnp.int32)

    def mean_loss(model: Model, texts: Array) -> Array:
        features = _features(model, texts[:, :-1], config)
        return jnp.mean(_token_losses(model, features, texts[:, -1], spread=True))

    def step(state: _State, key: Array) -> tuple[_State, Array]:
        places = jax.random.randint(key, (config.batch_size, 1), 0, num_places, jnp.int32)
        loss, grads = jax.value_and_grad(mean_loss)(state.model, tokens[places + window[None]])
        updates, optimizer_state = _optimizer(config).update(
            grads, state.optimizer, state.model
        )
        return _State(optax.apply_updates(state.model, updates), optimizer_state), loss

    def one_seed(state: _State, key: Array) -> tuple[_State, Array]:
        step_keys = jax.random.split(jax.random.fold_in(key, number), config.num_steps)
        state, losses = jax.lax.scan(step, state, step_keys)
        return state, jnp.mean(losses)

    state, losses = jax.vmap(one_seed)(state, _keys(config))
    return _placed(state), losses


@functools.partial(jax.jit, static_argnames=("config",))
def _losses(model: Model, tokens: Array, config: Config) -> Array:
    """The loss of every character that a window precedes, `[seeds, n]`; trains nothing."""
    labels = tokens[config.window :]

    def one_seed(model: Model) -> Array:
        def features_at(place: Array) -> Array:
            window = jax.lax.dynamic_slice(tokens, (place,), (config.window,))
            return _features(model, window[None], config)[0]

        places = jnp.arange(len(labels), dtype=jnp.int32)
        features = jax.lax.map(features_at, places, batch_size=min(512, len(labels)))
        return _token_losses(model, features, labels, spread=False)

    return jax.vmap(one_seed)(model)


@functools.partial(jax.jit, static_argnames=("config",))
def _write(key: Array, model: Model, prompt: Array, config: Config) -> Array:
    """Characters `[sample_length]`, each drawn given the window before it."""

    def step(window: Array, key: Array) -> tuple[Array, Array]:
        head = model.head[: len(model.embeddings)]  # without the padding
        logits = _features(model, window[None], config)[0] @ head.T
        log_probs = sj.log_softmax(logits, temperature=config.temperature)
        token = jax.random.categorical(key, log_probs).astype(window.dtype)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(step, prompt, jax.random.split(key, config.sample_length))[1]


def _entropy(tokens: NDArray) -> NDArray:
    """The least loss, in nats, of a prediction that is the same for every character."""
    shares = np.bincount(tokens) / len(tokens)
    return np.asarray(-np.sum(shares * np.log(np.where(shares > 0, shares, 1))))


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The loss on the last tenth, and its two controls."""
    loss = arrays["curves/text/validation_loss"][:, -1]
    control = arrays[f"curves/{SHUFFLED}/validation_loss"][:, -1]
    chance = math.log(len(arrays["vocabulary"]))
    target = config.max_loss if arrays["data"] == REFERENCE else None
    return [
        Measure("validation loss, nats per character", loss, at_most=target),
        Measure("the same, without the characters before", arrays["entropy/text"]),
        Measure(
            f"first loss, less ln {len(arrays['vocabulary'])}",
            abs(arrays["first_loss"] - chance),
            at_most=4 * float(np.finfo(loss.dtype).eps) * chance,
            summary="max",
        ),
        Measure(
            f"{SHUFFLED}: loss, less entropy",
            control - arrays[f"entropy/{SHUFFLED}"],
            at_least=-0.02,  # Chance; a model that is not perfect is above 0.
            summary="min",
        ),
    ]


def tell(arrays: Arrays) -> str:
    """A text that the first seed's model wrote."""
    prompt, written = (
        "".join(map(chr, arrays["vocabulary"][arrays[f"sample/{part}"]]))
        for part in ("prompt", "written")
    )
    return f"Written after {prompt!r}:\n{written}\n"


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The losses, with the entropy of a character."""
    losses = curves(
        arrays,
        f"round of {arrays['steps_per_round']} steps",
        "Mean loss by round. Once the characters are shuffled, no model can do better than the"
        " entropy of a single character, the dotted line.",
        names={
            "train_loss": "first nine tenths, nats per character",
            "validation_loss": "last tenth, nats per character",
        },
    )
    for panel in losses.axes:
        entropy = float(arrays[f"entropy/{SHUFFLED}"])
        panel.axhline(entropy, color=COLOURS[-1], linestyle=":", label="entropy of a character")
    losses.legends.clear()
    legend(losses)
    return {"loss": losses}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("language_model", __doc__, Config, run, judge, draw, tell), args)
