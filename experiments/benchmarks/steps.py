"""How fast are whole training steps, and how long do they take to compile?

Three steps as users write them, with `optax.adamw` in float32: a transformer that predicts
the next token, an actor-critic on a batch of states, and a classifier. Each stands beside the
same step in which only the functions of softjax change: to those of `jax.nn` and optax, or
of distrax where it is installed. Expected: the time to compile, the time of a step and the
temporary memory that the compiler plans within their limits. A limit that is missed in run
after run refutes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks._measure import Function
from softjax import masks

__all__ = ["QUICK", "main", "run"]

Params = dict[str, Any]
Loss = Callable[..., Array]  # of the parameters and the arrays of a batch


@dataclasses.dataclass(frozen=True)
class Task:
    """Parameters, a batch, and the loss as each library writes it."""

    name: str
    params: Params
    batch: tuple[Array, ...]
    losses: dict[str, Loss | None]  # by arm; None: not installed here.
    peers: tuple[str, ...]  # Limits hold for the first arm beside the first of these peers.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the three tasks, and how long each is measured."""

    # Transformer.
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    tokens: tuple[int, int] = (8, 256)
    vocabulary: int = 4096
    # Actor-critic.
    num_states: int = 4096
    num_actions: int = 6
    # Classifier.
    images: tuple[int, int] = (512, 784)
    num_classes: int = 100
    # Measurement.
    seconds: float = 10.0
    least: int = 5
    num_compilations: int = 3
    judged: bool = True


QUICK = Sizes(
    1,
    8,
    2,
    (2, 4),
    16,
    8,
    3,
    (4, 8),
    5,
    seconds=0.05,
    least=2,
    num_compilations=1,
    judged=False,
)
LIMITS = {"compile_ratio": 1.5, "ratio": 1.05, "memory_ratio": 1.0}
ADAMW = optax.adamw(1e-3)
HEAD = ["step", "with", "peer", "s to compile", "ms", "MiB", "compile ratio", "time ratio"]
HEAD += ["memory ratio", "pass"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `steps-<platform>.json`."""
    options = measure.options(__doc__, args, "steps")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"steps-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    tasks = _transformer(sizes), _actor_critic(sizes), _classifier(sizes)
    records = [record for task in tasks for record in _measured(task, sizes)]
    return {"benchmark": "steps", "environment": environment, "records": records}


# The tasks.


def _transformer(sizes: Sizes) -> Task:
    """Predicts the next token, with causal attention and a residual stream."""
    rng = np.random.default_rng(0)
    width, num_heads = sizes.width, sizes.num_heads

    def layer() -> Params:
        shapes = {"qkv": (width, 3 * width), "out": (width, width)}
        shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
        return {name: _weights(rng, *shape) for name, shape in shapes.items()}

    params: Params = {
        "embedding": _weights(rng, sizes.vocabulary, width),
        "layers": [layer() for _ in range(sizes.num_layers)],
        "vocabulary": _weights(rng, sizes.vocabulary, width),
    }
    tokens = jnp.asarray(rng.integers(0, sizes.vocabulary, sizes.tokens))

    def features(params: Params, tokens: Array, attend: Function) -> Array:
        x = params["embedding"][tokens]
        for layer in params["layers"]:
            heads = (_norm(x) @ layer["qkv"]).reshape(*x.shape[:2], num_heads, 3, -1)
            queries, keys, values = jnp.moveaxis(heads, -2, 0)
            x += attend(queries, keys, values).reshape(x.shape) @ layer["out"]
            x += jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]
        return _norm(x)

    ours = functools.partial(sj.attention, mask=masks.Causal())
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)

    def with_softjax(params: Params, tokens: Array) -> Array:
        logits = features(params, tokens, ours) @ params["vocabulary"].T
        return jnp.mean(sj.cross_entropy(logits[:, :-1], tokens[:, 1:]))

    def with_fused_layer(params: Params, tokens: Array) -> Array:
        x = features(params, tokens, ours)
        return sj.linear_cross_entropy(x[:, :-1], params["vocabulary"], tokens[:, 1:])

    def with_jax_nn(params: Params, tokens: Array) -> Array:
        logits = features(params, tokens, theirs) @ params["vocabulary"].T
        loss = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(loss(logits[:, :-1], tokens[:, 1:]))

    losses: dict[str, Loss | None] = {
        "softjax": with_softjax,
        "softjax, linear_cross_entropy": with_fused_layer,
        "jax.nn, optax": with_jax_nn,
    }
    return Task("transformer", params, (tokens,), losses, ("jax.nn, optax",))


def _actor_critic(sizes: Sizes) -> Task:
    """The clipped surrogate of proximal policy optimization, with entropy and a critic."""
    rng = np.random.default_rng(0)
    num_features, num_hidden, num_states = 16, 64, sizes.num_states
    params: Params = {
        "hidden": _weights(rng, num_features, num_hidden),
        "actor": _weights(rng, num_hidden, sizes.num_actions),
        "critic": _weights(rng, num_hidden, 1),
    }
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    actions = jnp.asarray(rng.integers(0, sizes.num_actions, num_states))
    old_log_probs = jnp.full(num_states, -np.log(sizes.num_actions), jnp.float32)
    batch = (
        *(normal(num_states, num_features), actions, old_log_probs),
        *(normal(num_states), normal(num_states)),
    )

    def loss(log_prob: Function, entropy: Function) -> Loss:
        def total(
            params: Params,
            states: Array,
            actions: Array,
            old_log_probs: Array,
            advantages: Array,
            returns: Array,
        ) -> Array:
            hidden = jnp.tanh(states @ params["hidden"])
            logits, values = hidden @ params["actor"], hidden @ params["critic"]
            ratio = jnp.exp(log_prob(logits, actions) - old_log_probs)
            clipped = jnp.clip(ratio, 0.8, 1.2)
            gain = jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
            error = jnp.mean((values[:, 0] - returns) ** 2)
            return 0.5 * error - gain - 0.01 * jnp.mean(entropy(logits))

        return total

    def picked(logits: Array, actions: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, actions[:, None], axis=-1)[:, 0]

    def plain_entropy(logits: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    distrax = measure.peer("distrax")
    losses: dict[str, Loss | None] = {
        "softjax": loss(sj.log_prob, sj.entropy),
        "jax.nn": loss(picked, plain_entropy),
        "distrax": None,
    }
    if distrax is not None:
        losses["distrax"] = loss(
            lambda logits, actions: distrax.Categorical(logits).log_prob(actions),
            lambda logits: distrax.Categorical(logits).entropy(),
        )
    return Task("actor-critic", params, batch, losses, ("jax.nn", "distrax"))


def _classifier(sizes: Sizes) -> Task:
    """Two layers and a cross-entropy."""
    rng = np.random.default_rng(0)
    num_images, num_pixels = sizes.images
    params: Params = {
        "hidden": _weights(rng, num_pixels, 256),
        "out": _weights(rng, 256, sizes.num_classes),
    }
    images = jnp.asarray(rng.standard_normal(sizes.images, dtype=np.float32))
    labels = jnp.asarray(rng.integers(0, sizes.num_classes, num_images))

    def loss(cross_entropy: Function) -> Loss:
        def mean(params: Params, images: Array, labels: Array) -> Array:
            logits = jax.nn.relu(images @ params["hidden"]) @ params["out"]
            return jnp.mean(cross_entropy(logits, labels))

        return mean

    losses: dict[str, Loss | None] = {
        "softjax": loss(sj.cross_entropy),
        "optax": loss(optax.softmax_cross_entropy_with_integer_labels),
    }
    return Task("classifier", params, (images, labels), losses, ("optax",))


def _weights(rng: np.random.Generator, rows: int, columns: int) -> Array:
    weights = rng.standard_normal((rows, columns), dtype=np.float32)
    return jnp.asarray(weights / np.sqrt(np.float32(rows)))


def _norm(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


# The measurement.


def _step(loss: Loss) -> Function:
    """One update of the parameters and of the state of the optimizer."""

    def step(params: Params, state: optax.OptState, batch: tuple[Array, ...]) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = ADAMW.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _measured(task: Task, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One record for each arm of softjax and each peer; all arms run in the same rounds."""
    args = task.params, ADAMW.init(task.params), task.batch
    steps = {arm: _step(loss) for arm, loss in task.losses.items() if loss is not None}
    compiled, programs = measure.compile_times(
        {arm: (step, args) for arm, step in steps.items()}, rounds=sizes.num_compilations
    )
    calls = {arm: functools.partial(program, *args) for arm, program in programs.items()}
    times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    temporary = {
        arm: measure.planned_bytes(program)["temporary_bytes"]
        for arm, program in programs.items()
    }
    for arm in (arm for arm in task.losses if arm not in task.peers):
        for peer in task.peers:
            found = peer in programs
            record = {
                "step": task.name,
                "arm": arm,
                "compile_seconds": compiled.median(arm),
                "seconds": times.median(arm),
                "temporary_bytes": temporary[arm],
                "peer": peer,
                "peer_compile_seconds": compiled.median(peer) if found else None,
                "peer_seconds": times.median(peer) if found else None,
                "peer_temporary_bytes": temporary.get(peer),
                "compile_ratio": compiled.ratio(arm, peer) if found else None,
                "ratio": times.ratio(arm, peer) if found else None,
                "memory_ratio": measure.over(temporary[arm], temporary.get(peer)),
                "rounds": times.rounds,
            }
            judged = sizes.judged and (arm, peer) == (next(iter(task.losses)), task.peers[0])
            limits = LIMITS if judged else {}
            yield record | {"limits": limits, "passed": measure.kept(record, limits)}


def _report(results: dict[str, Any]) -> str:
    parts = [
        f"{measure.machine(results['environment'])}, float32, with `optax.adamw`. A ratio is "
        "that of softjax over the peer: of times, the median of the rounds; of memory, of the "
        "temporary bytes that the compiler plans.",
        measure.table(HEAD, map(_row, results["records"])),
        measure.missing("distrax"),
    ]
    return "\n\n".join(filter(None, parts))


def _row(record: dict[str, Any]) -> list[str]:
    """Figures of softjax, and of the peer after a slash."""

    def both(key: str, unit: float) -> str:
        ours, theirs = (measure.scaled(record[k], unit) for k in (key, f"peer_{key}"))
        return f"{ours} / {theirs}"

    ratios = ("compile_ratio", "ratio", "memory_ratio")
    return [
        *(record["step"], record["arm"], record["peer"]),
        *(both("compile_seconds", 1), both("seconds", 1e3), both("temporary_bytes", 2**-20)),
        *(measure.limited(record[name], record["limits"].get(name)) for name in ratios),
        measure.verdict(record["passed"]),
    ]
