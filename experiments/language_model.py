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
predicts. The compiled memory of the gradient of the output layer is compared with that of one
that stores the logits: expected is less than a tenth at a large vocabulary. A missed target, or
a control that fails, would refute it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._data import REFERENCE, load_text
from experiments._networks import Layers, Network, mlp
from experiments._plots import COLOURS, bars, curves, finish, legend, panels
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

__all__ = ["Config", "Model", "draw", "judge", "main", "run", "tell"]

SHUFFLED = "shuffled characters"
LARGE_HEAD = (1024, 64, 32768)  # tokens, features, classes


@dataclass(frozen=True)
class Config(Options):
    """Options of the language model."""

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
    max_memory_ratio: float = 0.1
    """Target: memory without the stored logits over memory with them, large vocabulary."""

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
    weights: Array  # [V, num_features], of the output layer


class _State(NamedTuple):
    model: Model
    optimizer: Any


def run(config: Config, track: Track = untracked) -> Arrays:
    """Trains on the text and on its shuffled characters; samples; measures memory."""
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
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    start = _start(keys, config, len(vocabulary))

    def train(arm: str, tokens: Array, num_rounds: int) -> tuple[Model, Arrays]:
        state, losses = start, []
        for number in track(range(num_rounds), arm):
            state, train_loss = _train(state, keys, jnp.int32(number), tokens, config)
            # Fetching waits for the round, so that the progress bar shows finished work.
            losses.append((np.asarray(train_loss), _validate(state.model, tokens, config)))
        train_losses, validation_losses = np.moveaxis(np.array(losses), 0, -1)
        return state.model, {
            f"curves/{arm}/train_loss": train_losses,
            f"curves/{arm}/validation_loss": validation_losses,
        }

    model, learnt = train("text", jnp.asarray(tokens), config.num_rounds)
    _, control = train(SHUFFLED, jnp.asarray(shuffled), config.num_control_rounds)
    prompt = jnp.asarray(tokens[num_train : num_train + config.window])
    first_model = jax.tree.map(lambda leaf: leaf[0], model)
    written = _write(jax.random.key(config.seed), first_model, prompt, config)
    own_head = (config.batch_size, config.num_features, len(vocabulary))
    return {
        "data": np.array(text.name),
        "vocabulary": vocabulary,
        "steps_per_round": np.array(config.num_steps),
        "first_loss": _validate(start.model, jnp.asarray(tokens), config),
        "entropy/text": _entropy(tokens[num_train:]),
        f"entropy/{SHUFFLED}": _entropy(shuffled[num_train:]),
        **learnt,
        **control,
        "sample/prompt": np.asarray(prompt),
        "sample/written": np.asarray(written),
        "memory/sizes": np.array([own_head, LARGE_HEAD]),
        **{
            f"memory/{name}": np.array([_memory(head, *own_head), _memory(head, *LARGE_HEAD)])
            for name, head in _HEADS.items()
        },
    }


def _network(config: Config) -> Network:
    return mlp([config.window * config.num_embedding, config.num_hidden, config.num_features])


def _optimizer(config: Config) -> Any:
    num_steps = config.num_rounds * config.num_steps
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def _features(model: Model, windows: Array, config: Config) -> Array:
    """The features `[n, D]` of windows `[n, window]`, which predict the next character."""
    return jax.nn.relu(_network(config).apply(model.layers, model.embeddings[windows]))


@functools.partial(jax.jit, static_argnames=("config", "num_classes"))
def _start(keys: Array, config: Config, num_classes: int) -> _State:
    def start(key: Array) -> _State:
        layers_key, embeddings_key = jax.random.split(key)
        model = Model(
            jax.random.normal(embeddings_key, (num_classes, config.num_embedding)),
            _network(config).init(layers_key),
            jnp.zeros((num_classes, config.num_features)),
        )
        return _State(model, _optimizer(config).init(model))

    return jax.vmap(start)(keys)


@functools.partial(jax.jit, static_argnames=("config",))
def _train(
    state: _State, keys: Array, number: Array, tokens: Array, config: Config
) -> tuple[_State, Array]:
    """One round on the first nine tenths; the new state, and the mean loss `[seeds]`."""
    num_places = len(tokens) * 9 // 10 - config.window
    window = jnp.arange(config.window + 1, dtype=jnp.int32)

    def mean_loss(model: Model, texts: Array) -> Array:
        features = _features(model, texts[:, :-1], config)
        return sj.linear_cross_entropy(features, model.weights, texts[:, -1])

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

    return jax.vmap(one_seed)(state, keys)


def _validate(model: Model, tokens: Array, config: Config) -> NDArray:
    """The mean loss `[seeds]` on the last tenth, which no step of training reads."""
    return np.mean(np.asarray(_losses(model, tokens, config)), axis=-1)


@functools.partial(jax.jit, static_argnames=("config",))
def _losses(model: Model, tokens: Array, config: Config) -> Array:
    """The loss of every character of the last tenth that a window precedes, `[seeds, n]`."""
    held_out = tokens[len(tokens) * 9 // 10 :]
    labels = held_out[config.window :]

    def one_place(model: Model, place: Array) -> Array:
        window = jax.lax.dynamic_slice(held_out, (place,), (config.window,))
        return _features(model, window[None], config)[0]

    def one_seed(model: Model) -> Array:
        places = jnp.arange(len(labels), dtype=jnp.int32)
        features = jax.lax.map(
            functools.partial(one_place, model), places, batch_size=min(512, len(labels))
        )
        return sj.linear_cross_entropy(features, model.weights, labels, reduction=None)

    return jax.vmap(one_seed)(model)


@functools.partial(jax.jit, static_argnames=("config",))
def _write(key: Array, model: Model, prompt: Array, config: Config) -> Array:
    """Characters `[sample_length]`, each drawn given the window before it."""

    def step(window: Array, key: Array) -> tuple[Array, Array]:
        logits = _features(model, window[None], config)[0] @ model.weights.T
        log_probs = sj.log_softmax(logits, temperature=config.temperature)
        token = jax.random.categorical(key, log_probs).astype(window.dtype)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(step, prompt, jax.random.split(key, config.sample_length))[1]


def _entropy(tokens: NDArray) -> NDArray:
    """The least loss, in nats, of a prediction that is the same for every character."""
    shares = np.bincount(tokens) / len(tokens)
    return np.asarray(-np.sum(shares * np.log(np.where(shares > 0, shares, 1))))


def _dense_head(features: Array, weights: Array, labels: Array) -> Array:
    """The usual output layer, which stores the logits."""
    logits = features @ weights.T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


_HEADS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "dense": _dense_head,
    "fused": sj.linear_cross_entropy,
}


def _memory(
    head: Callable[[Array, Array, Array], Array],
    num_tokens: int,
    num_features: int,
    num_classes: int,
) -> float:
    """Temporary memory of the compiled gradient in both float arguments, in MiB."""
    features = jax.ShapeDtypeStruct((num_tokens, num_features), float)
    weights = jax.ShapeDtypeStruct((num_classes, num_features), float)
    labels = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    gradient = jax.jit(jax.grad(head, argnums=(0, 1)))
    analysis = gradient.lower(features, weights, labels).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20 if analysis else math.nan


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The loss on the last tenth, its two controls, and the memory of the output layer."""
    loss = arrays["curves/text/validation_loss"][:, -1]
    control = arrays[f"curves/{SHUFFLED}/validation_loss"][:, -1]
    num_classes = len(arrays["vocabulary"])
    eps = float(np.finfo(loss.dtype).eps)
    own, large = arrays["memory/fused"] / arrays["memory/dense"]
    is_reference = arrays["data"] == REFERENCE
    return [
        Measure(
            "validation loss, nats per character",
            loss,
            at_most=config.max_loss if is_reference else None,
        ),
        Measure("the same, without the characters before", arrays["entropy/text"]),
        Measure(
            f"first loss, less ln {num_classes}",
            abs(arrays["first_loss"] - math.log(num_classes)),
            at_most=4 * eps * math.log(num_classes),
            summary="max",
        ),
        Measure(
            f"{SHUFFLED}: loss, less entropy",
            control - arrays[f"entropy/{SHUFFLED}"],
            at_least=-0.02,  # Chance; a model that is not perfect is above 0.
            summary="min",
        ),
        Measure("memory, fused / dense, own head", own),
        Measure("memory, fused / dense, large head", large, at_most=config.max_memory_ratio),
    ]


def tell(arrays: Arrays) -> str:
    """A text that the first seed's model wrote, and the memory of the output layers."""
    prompt, written = (
        "".join(map(chr, arrays["vocabulary"][arrays[f"sample/{part}"]]))
        for part in ("prompt", "written")
    )
    lines = [f"Written after {prompt!r}:", written, "", _MEMORY_TITLE]
    for number, sizes in enumerate(arrays["memory/sizes"]):
        memory = "".join(f"{arrays[f'memory/{name}'][number]:12.2f}" for name in _HEADS)
        lines.append("".join(f"{size:>10}" for size in sizes) + memory)
    return "\n".join(lines)


_MEMORY_TITLE = "".join(
    [
        *(f"{name:>10}" for name in ("tokens", "features", "classes")),
        *(f"{name + ', MiB':>12}" for name in _HEADS),
        "   (temporary memory of the gradient of the output layer)",
    ]
)


def draw(arrays: Arrays) -> dict[str, Figure]:
    """The losses, with the entropy of a character, and the memory of the output layers."""
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
    sizes = [" x ".join(map(str, row)) for row in arrays["memory/sizes"]]
    memory, (panel,) = panels(
        ["gradient of the output layer"],
        "Temporary memory of the compiled gradient: the dense layer stores the logits,"
        " the fused one does not.",
        size=5.0,
    )
    bars(panel, sizes, {name: arrays[f"memory/{name}"] for name in _HEADS}, ".3g")
    finish(panel, "tokens x features x classes", "temporary memory, MiB", y_scale="log")
    panel.set_ylim(top=10 * float(max(arrays[f"memory/{name}"].max() for name in _HEADS)))
    legend(memory)
    return {"loss": losses, "memory": memory}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("language_model", __doc__, Config, run, judge, draw, tell), args)
