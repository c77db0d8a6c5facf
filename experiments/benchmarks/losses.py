"""How fast are the losses, and how much memory do they take?

Each loss is timed beside its rivals in float32, on the device that JAX finds: the value, the
value with its gradient, and the JVP. Optax and tokamax get logits that are formed and stored;
the contrastive losses are compared with their plain definitions. Expected: every ratio within
its limit, although the losses keep all digits of a confident prediction; and memory that does
not grow with tokens x classes. A limit that is missed in run after run refutes it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure

__all__ = ["main", "run"]

Loss = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the ratios of a loss over its rival, of time and of temporary memory."""

    time: float | None = None  # None: for information.
    memory: float | None = None


@dataclasses.dataclass(frozen=True)
class Contest:
    """A loss beside its rivals, all with the same arguments, of which floats come first."""

    name: str
    shape: str
    args: tuple[Array, ...]
    num_floats: int
    ours: Loss
    rivals: dict[str, Loss | None]  # None: not installed here.
    limits: dict[str, Limits]  # by mode, against optax or the definition
    forward: Loss | None = None  # ours, with the gradient found along with the value
    timed: bool = True  # or only compiled, for its memory


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes: logits; tokens, width and classes of output layers; pairs and their width."""

    logits: tuple[tuple[int, int], ...] = ((4096, 1024), (512, 32768))
    layers: tuple[tuple[int, int, int], ...] = ((2048, 256, 512), (2048, 256, 65536))
    large: tuple[tuple[int, int, int], ...] = ((4096, 256, 65536),)  # for their memory
    pairs: tuple[int, int] = (4096, 256)
    seconds: float = 3.0
    least: int = 3
    judged: bool = True  # Limits hold for sizes like these.


QUICK = Sizes(
    ((64, 128),), ((32, 8, 64),), ((64, 8, 64),), (32, 8), seconds=0.02, least=2, judged=False
)
HEAD = [
    *("loss", "shape", "mode", "ms", "MiB", "rival", "ms of rival", "MiB of rival"),
    *("time", "memory", "limits", "pass"),
]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `losses-<platform>.json`."""
    options = measure.options(__doc__, args, "losses")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"losses-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    records: list[dict[str, Any]] = []
    for contest in _contests(sizes):
        for mode in ("value", "gradient", "jvp"):
            records += _timed(contest, mode, sizes)
    return {"benchmark": "losses", "environment": environment, "records": records}


def _contests(sizes: Sizes) -> Iterator[Contest]:
    for rows, classes in sizes.logits:
        args = (_normal(rows, classes), _labels(rows, classes))
        limits = {"gradient": Limits(time=1.5)}
        shape = f"{rows} x {classes}"
        ours = lambda z, y: jnp.mean(sj.cross_entropy(z, y))
        yield Contest("cross_entropy", shape, args, 1, ours, {"optax": _optax()}, limits)
    for tokens, width, classes in (*sizes.layers, *sizes.large):
        floats = (_normal(tokens, width), 0.05 * _normal(classes, width, seed=1))
        many = classes > 10_000
        limits = {
            "value": Limits(1 / 1.5 if many else 1.2, 0.04 if many else None),
            "gradient": Limits(1.1 if many else 1.2, 0.08 if many else None),
        }
        yield Contest(
            "linear_cross_entropy",
            f"{tokens} x {width}, {classes} classes",
            (*floats, _labels(tokens, classes)),
            2,
            sj.linear_cross_entropy,
            {"optax": _optax_layer(), "tokamax": _tokamax()},
            limits,
            functools.partial(sj.linear_cross_entropy, forward_gradient=True),
            (tokens, width, classes) in sizes.layers,
        )
    num_pairs, width = sizes.pairs
    pairs = (_normal(num_pairs, width), _normal(num_pairs, width, seed=1))
    shape, limits = f"{num_pairs} x {width}", {"gradient": Limits(memory=1 / 5)}
    ours = lambda q, k: sj.info_nce(q, k, temperature=0.5)
    yield Contest("info_nce", shape, pairs, 2, ours, {"definition": _info_nce}, limits)
    ours = lambda q, k: sj.siglip_loss(q, k, temperature=0.5, bias=-1.0)
    yield Contest("siglip_loss", shape, pairs, 2, ours, {"definition": _siglip}, limits)


def _normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _labels(rows: int, classes: int) -> Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, classes, rows))


def _optax() -> Loss | None:
    optax = measure.peer("optax")
    if optax is None:
        return None
    loss = optax.softmax_cross_entropy_with_integer_labels
    return lambda logits, labels: jnp.mean(loss(logits, labels))


def _optax_layer() -> Loss | None:
    loss = _optax()
    return None if loss is None else lambda x, w, y: loss(x @ w.T, y)


def _tokamax() -> Loss | None:
    tokamax = measure.peer("tokamax")
    if tokamax is None:
        return None
    loss = tokamax.linear_softmax_cross_entropy_loss
    return lambda x, w, y: loss(x, y, w.T, reduction="mean")


def _info_nce(queries: Array, keys: Array) -> Array:
    logits = queries @ keys.T / 0.5
    sides = [jnp.diagonal(jax.nn.log_softmax(logits, axis)) for axis in (0, 1)]
    return -(jnp.mean(sides[0]) + jnp.mean(sides[1])) / 2


def _siglip(queries: Array, keys: Array) -> Array:
    logits = queries @ keys.T / 0.5 - 1
    signs = 2 * jnp.eye(len(queries)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(queries)


def _in_mode(loss: Loss, mode: str, num_floats: int) -> Callable[..., Any]:
    if mode == "value":
        return loss
    if mode == "gradient":
        return jax.value_and_grad(loss, tuple(range(num_floats)))

    def jvp(*args: Array) -> Any:
        floats, others = args[:num_floats], args[num_floats:]
        return jax.jvp(lambda *floats: loss(*floats, *others), floats, floats)

    return jvp


def _timed(contest: Contest, mode: str, sizes: Sizes) -> list[dict[str, Any]]:
    """One record per loss of softjax and rival; all of them run in the same rounds."""
    ours = {contest.name: contest.ours}
    if mode == "gradient" and contest.forward is not None:
        ours[f"{contest.name}, forward_gradient"] = contest.forward
    rivals = dict(contest.rivals)
    if mode == "jvp" and "tokamax" in rivals:
        del rivals["tokamax"]  # It has no forward mode.
    functions = {
        name: jax.jit(_in_mode(loss, mode, contest.num_floats))
        for name, loss in (ours | rivals).items()
        if loss is not None
    }
    temporary = {
        name: measure.compiled_bytes(function, *contest.args)["temporary_bytes"]
        for name, function in functions.items()
    }
    times = None
    if contest.timed:
        calls = {name: functools.partial(f, *contest.args) for name, f in functions.items()}
        times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    records = []
    for name in ours:
        for rival in rivals:
            judged = sizes.judged and name == contest.name and rival != "tokamax"
            limits = contest.limits.get(mode, Limits()) if judged else Limits()
            found = rival in functions
            time = times.ratio(name, rival) if times and found else None
            memory = measure.over(temporary[name], temporary[rival]) if found else None
            figures = {"time": time, "memory": memory}
            records.append(
                {
                    "loss": name,
                    "shape": contest.shape,
                    "mode": mode,
                    "rival": rival,
                    "seconds": times.median(name) if times else None,
                    "rival_seconds": times.median(rival) if times and found else None,
                    "time_ratio": time,
                    "time_limit": limits.time,
                    "temporary_bytes": temporary[name],
                    "rival_temporary_bytes": temporary.get(rival),
                    "memory_ratio": memory,
                    "memory_limit": limits.memory,
                    "passed": measure.kept(figures, dataclasses.asdict(limits)),
                    "rounds": times.rounds if times else 0,
                }
            )
    return records


def _report(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}, "
            "float32. Gradient: with the value. MiB: temporary memory, as the compiler plans "
            "it. Ratios are those of softjax to the rival; of times, the median of the rounds.",
            measure.table(HEAD, map(_row, results["records"])),
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    limits = [
        f"{kind} <= {measure.number(record[f'{kind}_limit'])}"
        for kind in ("time", "memory")
        if record[f"{kind}_limit"] is not None
    ]
    return [
        *(record["loss"], record["shape"], record["mode"]),
        *(
            measure.scaled(record["seconds"], 1e3),
            measure.scaled(record["temporary_bytes"], 2**-20),
        ),
        *(record["rival"], measure.scaled(record["rival_seconds"], 1e3)),
        measure.scaled(record["rival_temporary_bytes"], 2**-20),
        *(measure.number(record["time_ratio"]), measure.number(record["memory_ratio"])),
        *(", ".join(limits) or "-", measure.verdict(record["passed"])),
    ]
