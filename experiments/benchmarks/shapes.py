"""How do the maps and losses do at the shapes that models have?

Values and gradients together, as in training, beside `jax.nn`, optax, and the definition of
distillation, in float32 on the device that JAX finds: classifiers with few and many classes,
segmentation along the first and the last axis, attention scores, vocabularies; the time and
the temporary memory that the compiler plans. Expected: every ratio of times within its limit,
and temporaries no larger than the peer's or than the logits. A limit that is missed in run
after run refutes it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks._measure import Function

__all__ = ["QUICK", "contests", "main", "run"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A function of logits and other arrays beside its peer, and the limit of its time."""

    name: str
    shape: Shape
    ours: Function
    peer_name: str
    peer: Function
    others: tuple[Array, ...]  # the arguments after the logits, which have no derivative
    limit: float
    mode: str = "gradient"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of logits, by the functions that take them."""

    classifiers: tuple[Shape, ...] = (
        *((512, 10), (128, 1000), (2048, 5000), (4, 128, 128, 21), (4096, 32000)),
    )
    images: Shape = (8, 19, 128, 128)  # with the classes along axis 1
    options: Shape = (2048, 5000)
    softmax: tuple[Shape, ...] = (
        *((8, 12, 128, 128), (64, 50, 50), (32, 1000), (8, 256, 1024)),
        *((4096, 1024), (512, 32768)),
    )
    log_softmax: tuple[Shape, ...] = ((4096, 1024), (512, 32768))
    seconds: float = 2.5
    least: int = 5
    judged: bool = True


QUICK = Sizes(
    *(((16, 10),), (2, 3, 4, 4), (8, 20), ((4, 5, 5),), ((8, 20),)),
    seconds=0.02,
    least=2,
    judged=False,
)
FEW_CLASSES = 21
HEAD = ["function", "logits", "mode", "ms", "MiB", "peer", "ms of peer", "MiB of peer"]
HEAD += ["time ratio", "limit", "MiB at most", "pass"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `shapes-<platform>.json`."""
    options = measure.options(__doc__, args, "shapes")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"shapes-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    records = [_measured(contest, sizes) for contest in contests(sizes)]
    return {"benchmark": "shapes", "environment": environment, "records": records}


def contests(sizes: Sizes) -> Iterator[Contest]:
    """Each function at each of its shapes; one at a time, because the arrays are large."""
    # Losses.
    for shape in sizes.classifiers:
        yield _cross_entropy("cross_entropy", shape)
    yield _cross_entropy("cross_entropy along axis 1", sizes.images, axis=1)
    yield _cross_entropy("cross_entropy, half ignored", sizes.options, ignored=True)
    yield _cross_entropy("cross_entropy, smoothed", sizes.options, smoothing=0.1)
    ours = lambda s, t: jnp.mean(sj.distillation_loss(s, t, temperature=2.0))
    teacher = (_normal(sizes.options, seed=1),)
    losses = ours, "definition", _distillation
    yield Contest("distillation_loss", sizes.options, *losses, teacher, 1.25)

    # Maps.
    for shape, axis in (*((shape, -1) for shape in sizes.softmax), (sizes.images, 1)):
        title = "softmax" if axis == -1 else f"softmax along axis {axis}"
        ours, theirs = (functools.partial(m.softmax, axis=axis) for m in (sj, jax.nn))
        yield Contest(title, shape, ours, "jax.nn", theirs, (), 1.3)
        keep = (jnp.asarray(np.random.default_rng(2).random(shape) < 0.7),)
        masked = _masked(ours), "jax.nn", _masked(theirs)
        yield Contest(f"{title}, masked", shape, *masked, keep, 1.3)
    for shape in sizes.log_softmax:
        for mode in ("value", "gradient"):
            functions = sj.log_softmax, "jax.nn", jax.nn.log_softmax
            yield Contest("log_softmax", shape, *functions, (), 1.3, mode)


def _cross_entropy(
    title: str, shape: Shape, *, axis: int = -1, ignored: bool = False, smoothing: float = 0.0
) -> Contest:
    """The mean loss of the labels that count, beside the same with optax."""
    num_classes = shape[axis]
    rng = np.random.default_rng(1)
    size = tuple(np.delete(shape, axis))
    labels = rng.integers(0, num_classes, size)
    if ignored:
        labels = np.where(rng.random(size) < 0.5, -1, labels)

    def ours(logits: Array, labels: Array) -> Array:
        index = -1 if ignored else None
        options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": index}
        return sj.cross_entropy(logits, labels, axis=axis, reduction="mean", **options)

    def theirs(logits: Array, labels: Array) -> Array:
        if smoothing:
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, num_classes, dtype=logits.dtype), smoothing
            )
            return jnp.mean(optax.softmax_cross_entropy(logits, targets))
        loss = functools.partial(optax.softmax_cross_entropy_with_integer_labels, axis=axis)
        if not ignored:
            return jnp.mean(loss(logits, labels))
        counts = labels >= 0
        return jnp.mean(loss(logits, jnp.where(counts, labels, 0)), where=counts)

    limit = 2.0 if num_classes <= FEW_CLASSES else 1.25
    return Contest(title, shape, ours, "optax", theirs, (jnp.asarray(labels),), limit)


def _masked(function: Function) -> Function:
    return lambda logits, keep: function(logits, where=keep)


def _distillation(student: Array, teacher: Array) -> Array:
    """Mean of T^2 KL(softmax(teacher / T), softmax(student / T)) at T = 2."""
    log_p, log_q = jax.nn.log_softmax(teacher / 2), jax.nn.log_softmax(student / 2)
    return 4 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _normal(shape: Shape, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _measured(contest: Contest, sizes: Sizes) -> dict[str, Any]:
    """Times in turn, and temporary bytes, of one contest."""
    args = (_normal(contest.shape), *contest.others)
    functions = {"ours": contest.ours, "peer": contest.peer}
    if contest.mode == "gradient":
        args = (measure.cotangent(contest.ours, *args), *args)
        functions = {name: measure.with_gradient(f) for name, f in functions.items()}
    programs = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    calls = {name: functools.partial(program, *args) for name, program in programs.items()}
    times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    temporary = {
        name: measure.planned_bytes(program)["temporary_bytes"]
        for name, program in programs.items()
    }
    record: dict[str, Any] = {
        "function": contest.name,
        "shape": list(contest.shape),
        "mode": contest.mode,
        "seconds": times.median("ours"),
        "temporary_bytes": temporary["ours"],
        "peer": contest.peer_name,
        "peer_seconds": times.median("peer"),
        "peer_temporary_bytes": temporary["peer"],
        "ratio": times.ratio("ours", "peer"),
        "rounds": times.rounds,
    }
    array = 4 * math.prod(contest.shape)
    limits: dict[str, float] = {}
    if sizes.judged:
        limits = {
            "ratio": contest.limit,
            "temporary_bytes": max(array, record["peer_temporary_bytes"] or 0),
        }
    return record | {"limits": limits, "passed": measure.kept(record, limits)}


def _report(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}, float32. Gradient: with the value. "
            "MiB: temporary memory, as the compiler plans it. A ratio is the time of softjax "
            "over the peer's, the median of the rounds.",
            measure.table(HEAD, map(_row, results["records"])),
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    mebibytes = functools.partial(measure.scaled, unit=2**-20)
    limits = record["limits"]
    return [
        *(record["function"], measure.by(record["shape"]), record["mode"]),
        *(measure.scaled(record["seconds"], 1e3), mebibytes(record["temporary_bytes"])),
        *(record["peer"], measure.scaled(record["peer_seconds"], 1e3)),
        *(mebibytes(record["peer_temporary_bytes"]), measure.number(record["ratio"])),
        measure.at_most(limits.get("ratio")),
        mebibytes(limits.get("temporary_bytes")),
        measure.verdict(record["passed"]),
    ]
