"""How fast are the maps from scores to weights, and how much memory do they take?

Each map is timed beside its rivals on standard normal logits in float32, on the device that
JAX finds; no map can be faster than a copy, `x + 1` of the same size. Expected: every ratio
within its limit, although the maps are exact, and nothing but the result is kept for the
gradient. A limit that is missed in run after run refutes it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure

__all__ = ["main", "run"]

Map = Callable[[Array], Array]
Gradient = Callable[[Array, Array], Any]  # of an array and the cotangent of its map


@dataclasses.dataclass(frozen=True)
class Rival:
    """A peer of a map, with the limit of the ratio of their times."""

    name: str
    call: measure.Call | None  # None: not installed here.
    limit: float | None = None  # None: for information.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes, each with the limits of softmax, log_softmax and gradients at that shape."""

    dense: tuple[tuple[tuple[int, int], float, float], ...] = (
        ((64, 128), 2.0, 1.5),
        ((4096, 1024), 2.0, 1.5),
        ((512, 32768), 1.25, 1.25),
    )
    sparse: tuple[int, int] = (4096, 1024)
    filters: tuple[int, int] = (64, 131072)
    seconds: float = 3.0
    least: int = 5
    judged: bool = True  # Limits hold for sizes like these.


GRADIENT_LIMIT = 1.25
TIME_HEAD = ["map", "shape", "ms", "copies", "rival", "ms of rival", "ratio", "limit", "pass"]
MEMORY_HEAD = ["map", "shape", "temporary", "temporary of the gradient", "residuals", "pass"]
QUICK = Sizes(
    (((64, 128), 2.0, 1.5),), (64, 256), (4, 4096), seconds=0.05, least=3, judged=False
)


def main(args: Sequence[str]) -> int:
    """Runs, prints the tables and, with --out, writes `maps-<platform>.json`."""
    options = measure.options(__doc__, args, "maps")
    # Otherwise idle threads of PyTorch spin on the cores on which JAX is timed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"maps-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    times: list[dict[str, Any]] = []
    timed = functools.partial(_timed, sizes=sizes)
    for shape, softmax_limit, log_softmax_limit in sizes.dense:
        for name, limit in (("softmax", softmax_limit), ("log_softmax", log_softmax_limit)):
            times += timed(*_dense(name, shape, limit))
            for kind, transform in GRADIENTS.items():
                times += timed(*_dense_gradient(name, shape, kind, transform))
    for name in ("sparsemax", "entmax15", "entmax(alpha=1.3)", "soft_top_k(k=8)"):
        times += timed(*_sparse(name, sizes.sparse))
    for name in ("top_p_filter(p=0.9)", "top_k_filter(k=50)"):
        times += timed(*_filter(name, sizes.filters))
    memory = [_memory(name, sizes) for name in MAPS]
    return {
        "benchmark": "maps",
        "environment": environment,
        "times": times,
        "memory": memory,
    }


MAPS: dict[str, Map] = {
    "softmax": sj.softmax,
    "log_softmax": sj.log_softmax,
    "sparsemax": sj.sparsemax,
    "entmax15": sj.entmax15,
    "entmax(alpha=1.3)": lambda x: sj.entmax(x, 1.3),
    "soft_top_k(k=8)": lambda x: sj.soft_top_k(x, 8),
    "top_p_filter(p=0.9)": lambda x: sj.top_p_filter(x, 0.9),
    "top_k_filter(k=50)": lambda x: sj.top_k_filter(x, 50),
}
Contest = tuple[str, tuple[int, int], measure.Call, list[Rival]]


def _dense(name: str, shape: tuple[int, int], limit: float) -> Contest:
    x = _normal(shape)
    ours, theirs = jax.jit(MAPS[name]), jax.jit(getattr(jax.nn, name))
    torch = _torch_call("torch", name, shape)
    rivals = [Rival("jax.nn", lambda: theirs(x), limit), Rival("PyTorch", torch)]
    return name, shape, lambda: ours(x), rivals


def _dense_gradient(
    name: str, shape: tuple[int, int], kind: str, transform: Callable[[Map], Gradient]
) -> Contest:
    x, bar = _normal(shape), _normal(shape, seed=1)
    ours, theirs = transform(MAPS[name]), transform(getattr(jax.nn, name))
    rivals = [Rival("jax.nn", lambda: theirs(x, bar), GRADIENT_LIMIT)]
    return f"{name}, {kind}", shape, lambda: ours(x, bar), rivals


def _sparse(name: str, shape: tuple[int, int]) -> Contest:
    x = _normal(shape)
    ours, softmax = jax.jit(MAPS[name]), jax.jit(sj.softmax)
    judged = name in ("sparsemax", "entmax15")
    rivals = [Rival("softjax.softmax", lambda: softmax(x), 6.0 if judged else None)]
    if judged:
        rivals.append(Rival("entmax (PyTorch)", _torch_call("entmax", name, shape), 1 / 5))
        rivals.append(Rival("optax projection", _optax_call(x), 1 / 10))
    if name == "entmax(alpha=1.3)":
        bisect = _torch_call("entmax", "entmax_bisect", shape, alpha=1.3)
        rivals.append(Rival("entmax (PyTorch)", bisect))
    return name, shape, lambda: ours(x), rivals


def _filter(name: str, shape: tuple[int, int]) -> Contest:
    x = _normal(shape)
    ours, rival = jax.jit(MAPS[name]), jax.jit(SORTING[name])
    return name, shape, lambda: ours(x), [Rival("jnp.sort", lambda: rival(x), 1 / 10)]


def _sorted_top_p(logits: Array, p: float) -> Array:
    """The nucleus as it is usually found: sort, sum up, cut."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    last = jnp.sum(mass < p, axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)


def _sorted_top_k(logits: Array, k: int) -> Array:
    smallest = jnp.sort(logits, axis=-1, descending=True)[..., k - 1 : k]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


SORTING: dict[str, Map] = {
    "top_p_filter(p=0.9)": functools.partial(_sorted_top_p, p=0.9),
    "top_k_filter(k=50)": functools.partial(_sorted_top_k, k=50),
}


def _normal(shape: tuple[int, int], seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _pullback(function: Map) -> Gradient:
    return jax.jit(lambda x, bar: jax.vjp(function, x)[1](bar)[0])


def _value_and_pullback(function: Map) -> Gradient:
    """Both together, as in training."""

    def call(x: Array, bar: Array) -> tuple[Array, Array]:
        value, pullback = jax.vjp(function, x)
        return value, pullback(bar)[0]

    return jax.jit(call)


GRADIENTS = {"gradient": _pullback, "value and gradient": _value_and_pullback}


def _optax_call(x: Array) -> measure.Call | None:
    optax = measure.peer("optax")
    if optax is None:
        return None
    project = jax.jit(jax.vmap(optax.projections.projection_simplex))
    return lambda: project(x)


def _torch_call(
    module: str, name: str, shape: tuple[int, int], **parameters: float
) -> measure.Call | None:
    torch, peer = measure.peer("torch"), measure.peer(module)
    on_cpu = jax.default_backend() == "cpu"
    if torch is None or peer is None or not (on_cpu or torch.cuda.is_available()):
        return None
    function = getattr(peer, name)
    x = torch.tensor(np.asarray(_normal(shape)), device="cpu" if on_cpu else "cuda")

    def call() -> None:
        with torch.no_grad():
            function(x, dim=-1, **parameters)
        if not on_cpu:
            torch.cuda.synchronize()

    return call


def _timed(
    name: str, shape: tuple[int, int], ours: measure.Call, rivals: list[Rival], *, sizes: Sizes
) -> list[dict[str, Any]]:
    """One record per rival. All of them and a copy run in the same rounds."""
    x = _normal(shape)
    copy = jax.jit(lambda x: x + 1)
    calls = {rival.name: rival.call for rival in rivals if rival.call is not None}
    calls |= {"ours": ours, "copy": lambda: copy(x)}
    times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    copy_seconds = times.median("copy")
    records = []
    for rival in rivals:
        ratio = None if rival.call is None else times.ratio("ours", rival.name)
        limit = rival.limit if sizes.judged else None
        records.append(
            {
                "map": name,
                "shape": list(shape),
                "rival": rival.name,
                "seconds": times.median("ours"),
                "rival_seconds": None if ratio is None else times.median(rival.name),
                "ratio": ratio,
                "limit": limit,
                "passed": measure.kept({"ratio": ratio}, {"ratio": limit}),
                "copy_seconds": copy_seconds,
                "copy_gb_per_second": 2e-9 * x.nbytes / copy_seconds,
                "copies": times.ratio("ours", "copy"),
                "rounds": times.rounds,
            }
        )
    return records


def _memory(name: str, sizes: Sizes) -> dict[str, Any]:
    """Bytes of a map and of `jax.nn`: of the map of the same name, or else of softmax."""
    shape = sizes.sparse
    x = _normal(shape)
    slices = math.prod(shape[:-1])
    ours, theirs = MAPS[name], getattr(jax.nn, name, jax.nn.softmax)
    residuals = measure.residual_bytes(ours, x)
    limit = x.nbytes + slices * x.dtype.itemsize  # the result and one number per slice
    return {
        "map": name,
        "shape": list(shape),
        **_bytes(ours, x),
        "residual_bytes": residuals,
        "residual_limit_bytes": limit if sizes.judged else None,
        "passed": residuals <= limit if sizes.judged else None,
        "jax_nn": {**_bytes(theirs, x), "residual_bytes": measure.residual_bytes(theirs, x)},
    }


def _bytes(function: Map, x: Array) -> dict[str, int | None]:
    gradient = measure.compiled_bytes(_pullback(function), x, x)
    forward = measure.compiled_bytes(function, x)
    return forward | {"gradient_temporary_bytes": gradient["temporary_bytes"]}


def _report(results: dict[str, Any]) -> str:
    """Both tables, and the speed of a copy at each shape."""
    copies = {measure.by(r["shape"]): r["copy_gb_per_second"] for r in results["times"]}
    speeds = ", ".join(f"{speed:.1f} GB/s at {shape}" for shape, speed in copies.items())
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}, "
            "float32. A ratio is the time of softjax over the rival's, the median of the "
            "rounds; copies: over the time of `x + 1`.",
            measure.table(
                TIME_HEAD,
                map(_time_row, results["times"]),
            ),
            f"Copy: {speeds}.",
            "Memory in units of the result; in brackets `jax.nn`, or its softmax.",
            measure.table(
                MEMORY_HEAD,
                map(_memory_row, results["memory"]),
            ),
        ]
    )


def _time_row(record: dict[str, Any]) -> list[str]:
    return [
        record["map"],
        measure.by(record["shape"]),
        measure.scaled(record["seconds"], 1e3),
        f"{record['copies']:.1f}",
        record["rival"],
        measure.scaled(record["rival_seconds"], 1e3),
        measure.number(record["ratio"]),
        measure.at_most(record["limit"]),
        measure.verdict(record["passed"]),
    ]


def _memory_row(record: dict[str, Any]) -> list[str]:
    def cell(key: str) -> str:
        shown = [
            "-" if part[key] is None else f"{part[key] / size:.2f}"
            for part in (record, record["jax_nn"])
        ]
        return "{} ({})".format(*shown)

    size = 4 * math.prod(record["shape"])
    kinds = ("temporary_bytes", "gradient_temporary_bytes", "residual_bytes")
    cells = map(cell, kinds)
    return [
        record["map"],
        measure.by(record["shape"]),
        *cells,
        measure.verdict(record["passed"]),
    ]
