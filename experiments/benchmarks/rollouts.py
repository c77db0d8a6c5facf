"""How fast are tiny arrays inside `lax.scan`, where agents act?

Each step of a scan reads other logits and another key, as a rollout does, and calls a
function of softjax or its peer: `jax.nn`, `jax.random`, or `distrax.Categorical` where it is
installed. Float32, on the device that JAX finds. Expected: every ratio of times within its
limit. A limit that is missed in run after run refutes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks._measure import Function

__all__ = ["QUICK", "main", "run"]

Step = Callable[[Array, Array, Array, Array], Any]  # of key, logits, cotangents and actions


@dataclasses.dataclass(frozen=True)
class Contest:
    """One function beside its peer, as steps of a scan, and the limit of its time."""

    name: str
    ours: Step
    peer_name: str
    peer: Step | None  # None: not installed here.
    limit: float | None = None  # None: for information.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and classes of the logits, and how many steps are timed for how long."""

    logits: tuple[tuple[int, int], ...] = ((16, 4), (64, 6), (256, 18))
    num_steps: int = 1000
    seconds: float = 2.0
    least: int = 5
    judged: bool = True


QUICK = Sizes(((16, 4),), num_steps=10, seconds=0.02, least=2, judged=False)
HEAD = ["function", "logits", "us per step", "peer", "us of peer", "ratio", "limit", "pass"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `rollouts-<platform>.json`."""
    options = measure.options(__doc__, args, "rollouts")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"rollouts-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Seconds per step of the scans, with the environment that they hold for."""
    environment = measure.environment()
    records = [
        _measured(contest, shape, sizes) for contest in _contests() for shape in sizes.logits
    ]
    return {"benchmark": "rollouts", "environment": environment, "records": records}


def _contests() -> Iterator[Contest]:
    for name, limits in {"softmax": (1.5, 1.5), "log_softmax": (2.0, None)}.items():
        functions = getattr(sj, name), getattr(jax.nn, name)
        ours, theirs = (_of_logits(f) for f in functions)
        yield Contest(name, ours, "jax.nn", theirs, limits[0])
        ours, theirs = (_pullback_of_logits(f) for f in functions)
        yield Contest(f"{name}, gradient", ours, "jax.nn", theirs, limits[1])
    yield Contest(
        "log_prob, gradient",
        _log_prob_gradient(sj.log_prob),
        "jax.nn",
        _log_prob_gradient(_picked_log_softmax),
        2.0,
    )
    yield Contest(
        "sample",
        lambda key, logits, bars, actions: sj.sample(key, logits),
        "jax.random",
        lambda key, logits, bars, actions: jax.random.categorical(key, logits),
        1.0,
    )
    yield Contest(
        "select_action",
        lambda key, logits, bars, actions: sj.select_action(key, logits),
        "distrax",
        _distrax_action(),
        1.0,
    )


def _of_logits(function: Function) -> Step:
    return lambda key, logits, bars, actions: function(logits)


def _pullback_of_logits(function: Function) -> Step:
    return lambda key, logits, bars, actions: jax.vjp(function, logits)[1](bars)


def _log_prob_gradient(log_prob: Function) -> Step:
    total = lambda logits, actions: jnp.sum(log_prob(logits, actions))
    return lambda key, logits, bars, actions: jax.grad(total)(logits, actions)


def _picked_log_softmax(logits: Array, actions: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[:, None], axis=-1)


def _distrax_action() -> Step | None:
    distrax = measure.peer("distrax")
    if distrax is None:
        return None
    return lambda key, logits, bars, actions: distrax.Categorical(logits).sample_and_log_prob(
        seed=key
    )


def _measured(contest: Contest, shape: tuple[int, int], sizes: Sizes) -> dict[str, Any]:
    """Both scans in turn; the time of a step is that of its scan over the number of steps."""
    num_steps, (rows, classes) = sizes.num_steps, shape
    rng = np.random.default_rng(0)
    normal = lambda: jnp.asarray(rng.standard_normal((num_steps, *shape), dtype=np.float32))
    keys = jax.random.split(jax.random.key(0), num_steps)
    actions = jnp.asarray(rng.integers(0, classes, (num_steps, rows)))
    inputs = keys, normal(), normal(), actions

    def scan(step: Step) -> measure.Call:
        walk = jax.jit(lambda inputs: jax.lax.scan(lambda _, x: (None, step(*x)), None, inputs))
        return functools.partial(walk, inputs)

    steps = {"ours": contest.ours} | ({} if contest.peer is None else {"peer": contest.peer})
    calls = {name: scan(step) for name, step in steps.items()}
    times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    record = {
        "function": contest.name,
        "shape": list(shape),
        "seconds": times.median("ours") / num_steps,
        "peer": contest.peer_name,
        "peer_seconds": times.median("peer") / num_steps if "peer" in calls else None,
        "ratio": times.ratio("ours", "peer") if "peer" in calls else None,
        "rounds": times.rounds,
    }
    limits = {} if contest.limit is None or not sizes.judged else {"ratio": contest.limit}
    return record | {"limits": limits, "passed": measure.kept(record, limits)}


def _report(results: dict[str, Any]) -> str:
    parts = [
        f"{measure.machine(results['environment'])}, float32. A ratio is the time of softjax "
        "over the peer's, the median of the rounds.",
        measure.table(HEAD, map(_row, results["records"])),
        measure.missing("distrax"),
    ]
    return "\n\n".join(filter(None, parts))


def _row(record: dict[str, Any]) -> list[str]:
    return [
        *(record["function"], measure.by(record["shape"])),
        *(measure.scaled(record["seconds"], 1e6), record["peer"]),
        measure.scaled(record["peer_seconds"], 1e6),
        measure.number(record["ratio"]),
        measure.at_most(record["limits"].get("ratio")),
        measure.verdict(record["passed"]),
    ]
