"""Which map finds one token among ever more?

Two tasks, small transformers, all maps of one registry and several seeds. In max-retrieval
(Velickovic et al. 2024, Softmax is not enough for sharp out-of-distribution) a query must give
the class of the item with the highest priority; trained on 16 items, it is tested on up to
4096. In associative recall (Arora et al. 2023, Zoology) two layers read pairs of keys and
values, then keys alone, and must name the value of each. Expected: all maps recall everything;
in retrieval softmax spreads its weight over the many and fades, and scalable softmax
(Nakanishi 2025), whose scores grow with the logarithm of the number of items, fades later.
Softmax as good as that at 16 times the training length would refute it.

Long sequences of pairs are recalled over several devices, each of which holds a part of the
tokens: `--mesh context=4` sends keys and values around a ring, and with `--context allgather`
each device gathers all of them, as the sparse maps need. `--processes` and `--resume` are those
of `language_model`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import softjax as sj
from experiments._checkpoints import fetch, restore, save
from experiments._networks import mlp
from experiments._plots import curves, finish, heatmap, legend, lines, panels
from experiments._run import (
    Arrays,
    Experiment,
    Measure,
    SpreadOptions,
    Track,
    launch,
    untracked,
)
from softjax import masks

__all__ = ["Config", "draw", "judge", "main", "run"]

NUM_CLASSES = 10
MapName = Literal[
    "softmax", "sink", "scalable softmax", "sparsemax", "entmax15", "adaptive temperature"
]
Params = dict[str, Any]
Attention = Callable[..., Any]  # `sj.attention`, over one device or several
# Attention under a map: of a learnt number, queries, keys, values and a mask.
Attend = Callable[[Array, Array, Array, Array, masks.Mask | None], Array]


class Map(NamedTuple):
    """Attention under one map, and how the number that it may learn starts."""

    attend: Callable[..., Array]  # of `sj.attention` over devices, and the arguments of Attend
    start: float = 0.0
    trained_as: MapName | None = None  # The map whose weights are used, where it is another.
    sparse: bool = False


def _normalizer(name: str) -> Callable[..., Array]:
    return lambda attention, _, *args: attention(*args[:3], mask=args[3], normalizer=name)


def _sink(
    attention: Attention, level: Array, q: Array, k: Array, v: Array, mask: masks.Mask | None
) -> Array:
    return attention(q, k, v, mask=mask, sink=level)


def _scalable(
    attention: Attention, scale: Array, q: Array, k: Array, v: Array, mask: masks.Mask | None
) -> Array:
    """Scores times s ln n, of the n keys that a query sees."""
    seen = k.shape[-3] if mask is None else jnp.arange(1, q.shape[-3] + 1)
    return attention(sj.scalable_queries(q, seen, scale), k, v, mask=mask)


def _adaptive(
    attention: Attention, _: Array, q: Array, k: Array, v: Array, mask: masks.Mask | None
) -> Array:
    """Softmax, sharpened by a polynomial in its entropy, as in the paper on retrieval."""
    attend = functools.partial(attention, mask=mask)
    mean_key, lse = attend(q, k, k, return_lse=True)
    mean_score = jnp.sum(q * mean_key, -1) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    entropy = lse - mean_score
    fitted = jnp.polyval(jnp.array([-0.037, 0.481, -2.3, 4.917, -1.791], q.dtype), entropy)
    sharper = jnp.where(entropy > 0.5, jnp.maximum(fitted, 1), 1)
    return attend(q * sharper[..., None], k, v)


MAPS: dict[MapName, Map] = {
    "softmax": Map(_normalizer("softmax")),
    "sink": Map(_sink),
    "scalable softmax": Map(_scalable, start=0.43),
    "sparsemax": Map(_normalizer("sparsemax"), sparse=True),
    "entmax15": Map(_normalizer("entmax15"), sparse=True),
    "adaptive temperature": Map(_adaptive, trained_as="softmax"),
}


@dataclass(frozen=True)
class Config(SpreadOptions):
    """Options of attention over ever more tokens."""

    axes: ClassVar[tuple[str, ...]] = ("context",)

    context: Literal["ring", "allgather"] = "ring"
    """How recall meets the keys of other devices."""
    num_seeds: int = 3
    """Number of independent repetitions, run side by side."""
    maps: tuple[MapName, ...] = tuple(MAPS)
    """The maps that are compared."""
    num_items: int = 16
    """Items of max-retrieval in training."""
    lengths: tuple[int, ...] = (16, 256, 1024, 4096)
    """Items in testing."""
    num_pairs: int = 4
    """Pairs of associative recall, and keys that are asked."""
    num_symbols: int = 16
    """Keys of associative recall, and as many values."""
    num_features: int = 64
    """Width of both models."""
    num_rounds: int = 10
    """Points of the training curves."""
    retrieval_steps: int = 50
    """Steps per round of max-retrieval."""
    recall_steps: int = 80
    """Steps per round of associative recall."""
    batch_size: int = 64
    """Sequences per step."""
    num_test: int = 96
    """Sequences in testing."""
    learning_rate: float = 2e-3
    """Step size of Adam at the start; it falls to zero along a cosine."""
    min_recall: float = 0.995
    """Target: accuracy of associative recall under softmax."""
    min_retrieval: float = 0.97
    """Target: accuracy of max-retrieval under softmax, as long as in training."""
    min_gain: float = 0.10
    """Target: by how much scalable softmax surpasses softmax at `gain_length`."""
    gain_length: int = 256
    """Where they are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.maps:
            raise ValueError("maps must name at least one map.")
        if self.num_items not in self.lengths or self.gain_length not in self.lengths:
            raise ValueError(
                f"lengths must include num_items, {self.num_items}, and gain_length,"
                f" {self.gain_length}, got {self.lengths}."
            )
        if self.num_symbols < self.num_pairs:
            raise ValueError(
                f"num_symbols must be at least num_pairs, {self.num_pairs}, got"
                f" {self.num_symbols}."
            )
        num_devices = self.sizes["context"]
        multiple = num_devices // math.gcd(3, num_devices)
        if self.num_pairs % multiple:
            raise ValueError(
                f"num_pairs must be a multiple of {multiple}, because {num_devices} devices"
                f" share three times as many tokens, got {self.num_pairs}."
            )
        sparse = [name for name in self.maps if MAPS[name].sparse]
        if sparse and num_devices > 1 and self.context == "ring":
            raise ValueError(
                f"maps must not be sparse in a ring, got {', '.join(sparse)}; they need"
                " --context allgather."
            )

    @classmethod
    def reduced(cls) -> Self:
        """One map, one short length, few steps; only that something is learnt is judged."""
        return cls(
            quick=True,
            num_seeds=2,
            maps=("softmax",),
            num_items=4,
            lengths=(4,),
            num_pairs=2,
            num_symbols=4,
            num_features=16,
            num_rounds=2,
            retrieval_steps=50,
            recall_steps=30,
            num_test=64,
            learning_rate=1e-2,
            min_recall=0.25,
            min_retrieval=0.3,
            gain_length=4,
        )


class Task(NamedTuple):
    """A task: its first parameters, examples of it, and logits of the labels that count."""

    start: Callable[[Array, Array, Config], Params]
    sample: Callable[..., tuple[Any, Array]]  # of (key, count, config, length)
    apply: Callable[[Params, Any, Attend], Array]
    num_steps: Callable[[Config], int]


# Max-retrieval: one query over items without order.


def _retrieval_start(key: Array, number: Array, config: Config) -> Params:
    items_key, values_key, out_key, query_key = jax.random.split(key, 4)
    width = config.num_features
    return {
        "items": mlp([1 + NUM_CLASSES, width, width]).init(items_key),
        "keys_values": jax.random.normal(values_key, (width, 2 * width)) / width**0.5,
        "out": mlp([width, width, NUM_CLASSES]).init(out_key),
        "query": jax.random.normal(query_key, (width,)),
        "number": number,
    }


def _retrieval_sample(key: Array, count: int, config: Config, length: int) -> Any:
    # Here and below, one draw serves both, because each draw takes a second to compile.
    draws = jax.random.uniform(key, (count, 2 * length))
    priorities, draws = jnp.split(draws, 2, axis=1)
    classes = _whole(draws, NUM_CLASSES)
    first = jnp.argmax(priorities, -1, keepdims=True)
    return (priorities, classes), jnp.take_along_axis(classes, first, -1)


def _items(params: Params, items: Any) -> tuple[Array, Array, Array]:
    """The query, keys and values `[count, tokens, 1, width]` of items."""
    priorities, classes = items
    one_hot = jax.nn.one_hot(classes, NUM_CLASSES, dtype=priorities.dtype)
    inputs = jnp.concatenate([priorities[..., None], one_hot], -1)
    width = params["query"].size
    network = mlp([1 + NUM_CLASSES, width, width])
    hidden = network.apply(params["items"], inputs.reshape(-1, 1 + NUM_CLASSES))
    hidden = hidden.reshape(*priorities.shape, width) @ params["keys_values"]
    keys, values = jnp.split(hidden[:, :, None], 2, -1)
    query = jnp.broadcast_to(params["query"], (len(priorities), 1, 1, width))
    return query, keys, values


def _retrieval_apply(params: Params, items: Any, attend: Attend) -> Array:
    out = attend(params["number"], *_items(params, items), None)
    width = params["query"].size
    network = mlp([width, width, NUM_CLASSES])
    return network.apply(params["out"], out.reshape(-1, width))[:, None]


# Associative recall: pairs of a key and its value, then keys, each to be answered.


def _recall_start(key: Array, number: Array, config: Config) -> Params:
    width, length = config.num_features, 3 * config.num_pairs
    counts = np.array([2 * config.num_symbols, length])
    draws = jax.random.normal(key, ((counts.sum() + 8 * width) * width,))
    tokens, places, layers = jnp.split(draws.reshape(-1, width), np.cumsum(counts))
    return {
        "tokens": tokens,
        "places": places,
        "layers": layers.reshape(2, width, 4 * width) / width**0.5,
        "out": jnp.zeros((width, 2 * config.num_symbols)),
        "number": jnp.broadcast_to(number, (2,)),
    }


def _recall_sample(key: Array, count: int, config: Config, length: int) -> Any:
    del length

    num_symbols, num_pairs = config.num_symbols, config.num_pairs
    draws = jax.random.uniform(key, (count, num_symbols + 2 * num_pairs))
    of_keys, of_values, of_order = jnp.split(draws, [num_symbols, num_symbols + num_pairs], 1)
    keys = jnp.argsort(of_keys, axis=1)[:, :num_pairs]
    values = num_symbols + _whole(of_values, num_symbols)
    asked = jnp.argsort(of_order, axis=1)
    pairs = jnp.stack([keys, values], axis=2).reshape(count, -1)
    asked_keys, answers = (jnp.take_along_axis(x, asked, axis=1) for x in (keys, values))
    return jnp.concatenate([pairs, asked_keys], axis=1), answers


def _whole(draws: Array, count: int) -> Array:
    """Whole numbers below `count` from uniform draws in [0, 1)."""
    return jnp.minimum((draws * count).astype(int), count - 1)


def _recall_apply(params: Params, tokens: Array, attend: Attend) -> Array:
    width = params["places"].shape[-1]
    x = params["tokens"][tokens] + params["places"][None]

    def read(x: Array, parts: tuple[Array, Array]) -> tuple[Array, None]:
        layer, number = parts
        normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        q, k, v = jnp.split((normed @ layer[:, : 3 * width])[:, :, None], 3, -1)
        out = attend(number, q, k, v, masks.Causal())[:, :, 0]
        return x + out @ layer[:, 3 * width :], None

    x, _ = jax.lax.scan(read, x, (params["layers"], params["number"]))
    num_asked = tokens.shape[1] // 3
    return x[:, -num_asked:] @ params["out"]


TASKS = {
    "retrieval": Task(
        _retrieval_start, _retrieval_sample, _retrieval_apply, lambda c: c.retrieval_steps
    ),
    "recall": Task(_recall_start, _recall_sample, _recall_apply, lambda c: c.recall_steps),
}


def run(config: Config, track: Track = untracked, folder: Path | None = None) -> Arrays:
    """Training curves, accuracies by seed (and length), and the weights of one example."""
    with jax.set_mesh(config.make_mesh()):
        return _run(config, track, folder)


def _run(config: Config, track: Track, folder: Path | None) -> Arrays:
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    arrays: Arrays = {"lengths": np.array(config.lengths)}
    for task in TASKS:
        trained: dict[MapName, Params] = {}
        for name in config.maps:
            source = MAPS[name].trained_as or name
            if source not in trained:
                kept = folder and folder / "checkpoints" / f"{task}, {source}"
                trained[source], losses = _fit(keys, task, source, config, track, kept)
                arrays[f"curves/{task}, {source}/train_loss"] = losses
            params = trained[source]
            if task == "recall":
                arrays[f"recall/{name}"] = fetch(_right(params, keys, task, name, config, 0))
                continue
            by_length = [_right(params, keys, task, name, config, n) for n in config.lengths]
            arrays[f"retrieval/{name}"] = np.stack(fetch(by_length), -1)
            arrays[f"weights/{name}"] = fetch(_weights(params, keys[0], name, config))
    return arrays


def _fit(
    keys: Array, task: str, name: MapName, config: Config, track: Track, kept: Path | None
) -> tuple[Params, Any]:
    state = _start(keys, jnp.asarray(MAPS[name].start, float), task, config)
    losses = np.full((config.num_seeds, config.num_rounds), np.nan, jnp.result_type(float))
    done, (state, losses) = restore(kept, (state, losses))
    for number in track(range(done, config.num_rounds), f"{task}, {name}"):
        *state, loss = _train(*state, keys, jnp.int32(number), task, name, config)
        losses[:, number] = fetch(loss)
        save(kept, number + 1, (tuple(state), losses))
    return state[0], losses


def _attend(task: str, name: MapName, config: Config) -> Attend:
    """Attention under the map; in recall, each device holds a part of the tokens."""

    def over_devices(q: Array, k: Array, v: Array, **options: Any) -> Any:
        tokens = P(None, "context")
        on = {"axis_name": "context", "context": config.context}
        attention = functools.partial(sj.attention, **options, **on)
        specs = (tokens, tokens, tokens)
        return jax.shard_map(attention, in_specs=specs, out_specs=tokens)(q, k, v)

    is_spread = task == "recall" and config.sizes["context"] > 1
    return functools.partial(MAPS[name].attend, over_devices if is_spread else sj.attention)


def _optimizer(task: str, config: Config) -> Any:
    num_steps = config.num_rounds * TASKS[task].num_steps(config)
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))


@functools.partial(jax.jit, static_argnames=("task", "config"), out_shardings=P())
def _start(keys: Array, number: Array, task: str, config: Config) -> tuple[Params, Any]:
    start = lambda key: TASKS[task].start(key, number, config)
    params = jax.vmap(start)(keys)
    return params, jax.vmap(_optimizer(task, config).init)(params)


@functools.partial(jax.jit, static_argnames=("task", "name", "config"), out_shardings=P())
def _train(
    params: Params,
    state: Any,
    keys: Array,
    number: Array,
    task: str,
    name: MapName,
    config: Config,
) -> tuple[Params, Any, Array]:
    """One round; the new parameters and state, and the mean loss `[seeds]`."""
    optimizer, attend = _optimizer(task, config), _attend(task, name, config)

    def mean_loss(params: Params, examples: Any, labels: Array) -> Array:
        logits = TASKS[task].apply(params, examples, attend)
        return jnp.mean(sj.cross_entropy(logits, labels))

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        params, state = carry
        examples = TASKS[task].sample(key, config.batch_size, config, config.num_items)
        loss, grads = jax.value_and_grad(mean_loss)(params, *examples)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def one_seed(params: Params, state: Any, key: Array) -> tuple[Params, Any, Array]:
        step_keys = jax.random.split(
            jax.random.fold_in(key, number), TASKS[task].num_steps(config)
        )
        (params, state), losses = jax.lax.scan(step, (params, state), step_keys)
        return params, state, jnp.mean(losses)

    return jax.vmap(one_seed)(params, state, keys)


@functools.partial(jax.jit, static_argnames=("task", "name", "config", "length"))
def _right(
    params: Params, keys: Array, task: str, name: MapName, config: Config, length: int
) -> Array:
    def one_seed(params: Params, key: Array) -> Array:
        # No round has this number, so these examples occur in no training.
        key = jax.random.fold_in(key, config.num_rounds + length)

        def some(key: Array) -> Array:
            count = max(1, min(config.num_test, 2**16 // max(1, length)))
            examples, labels = TASKS[task].sample(key, count, config, length)
            logits = TASKS[task].apply(params, examples, _attend(task, name, config))
            return jnp.mean(jnp.argmax(logits, -1).astype(labels.dtype) == labels)

        num_parts = max(1, config.num_test * length // 2**16)
        return jnp.mean(jax.lax.map(some, jax.random.split(key, num_parts)))

    return jax.vmap(one_seed)(params, keys)


@functools.partial(jax.jit, static_argnames=("name", "config"))
def _weights(params: Params, key: Array, name: MapName, config: Config) -> Array:
    """The weights of items in the order of their priority, of a few examples."""
    params = jax.tree.map(lambda leaf: leaf[0], params)
    length = config.lengths[min(1, len(config.lengths) - 1)]
    (priorities, classes), _ = _retrieval_sample(key, 8, config, length)
    order = jnp.argsort(priorities, -1, descending=True)
    items = tuple(jnp.take_along_axis(x, order, -1) for x in (priorities, classes))
    query, keys, _ = _items(params, items)
    eye = jnp.broadcast_to(jnp.eye(length, dtype=query.dtype)[:, None], (8, length, 1, length))
    attend = _attend("retrieval", name, config)
    return attend(params["number"], query, keys, eye, None)[:, 0, 0]


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """Accuracies of all maps, and the gain of scalable softmax."""
    measures = []
    for name in config.maps:
        target = config.min_recall if name == "softmax" else None
        measures.append(Measure(f"recall, {name}", arrays[f"recall/{name}"], at_least=target))
    for name in config.maps:
        for column, length in enumerate(config.lengths):
            judged = name == "softmax" and length == config.num_items
            measures.append(
                Measure(
                    f"retrieval among {length}, {name}",
                    arrays[f"retrieval/{name}"][:, column],
                    at_least=config.min_retrieval if judged else None,
                )
            )
    if {"softmax", "scalable softmax"} <= set(config.maps):
        column = config.lengths.index(config.gain_length)
        ours, theirs = (
            arrays[f"retrieval/{name}"][:, column] for name in ("scalable softmax", "softmax")
        )
        title = f"gain of scalable softmax among {config.gain_length}"
        measures.append(Measure(title, ours - theirs, at_least=config.min_gain))
    return measures


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Accuracy against length, training curves, and where each map puts its weight."""
    names = [key.removeprefix("retrieval/") for key in arrays if key.startswith("retrieval/")]
    length, (panel,) = panels(
        ["max-retrieval"],
        f"Trained on {arrays['lengths'][0]} items, tested on more; thick: median of the seeds,"
        " thin: each seed.",
        size=5.0,
    )
    for number, name in enumerate(names):
        lines(panel, arrays["lengths"], arrays[f"retrieval/{name}"], name, number)
    finish(panel, "items in testing", "accuracy, share of queries", x_scale="log2")
    panel.set_xticks(arrays["lengths"])
    panel.set_ylim(0, 1.02)
    legend(length)
    shown = min(32, arrays[f"weights/{names[0]}"].shape[1])
    weights, axes = panels(
        names,
        f"Weight of the {shown} items of highest priority, highest first, in eight examples, as"
        " the logarithm to base 10; weights below 0.0001 are shown as such.",
        size=3.4,
    )
    for axis, name in zip(axes, names, strict=True):
        image = np.log10(np.maximum(arrays[f"weights/{name}"][:, :shown], 1e-4))
        heatmap(
            weights,
            axis,
            image,
            x="rank of the item by priority",
            y="example",
            scale="log10 of the weight",
            low=-4,
            high=0,
        )
    training = curves(
        arrays,
        "round of training",
        "Mean cross-entropy by round; thick: median of the seeds, thin: each seed.",
        names={"train_loss": "training loss, nats per answer"},
    )
    return {"accuracy": length, "curves": training, "weights": weights}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("attention", __doc__, Config, run, judge, draw), args)
