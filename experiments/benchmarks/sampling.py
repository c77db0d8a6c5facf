"""How fast are samples of a softmax, and how much memory do they take?

Draws from standard normal logits in float32 are timed beside `jax.random.categorical`, on the
device that JAX finds: one draw per row, and many draws from few rows. Expected: at most 1/8 of
its time for rows of 131072 classes, 1/3 for 1024, and no more for 4, although rare classes keep
their rates; and for 1000 x 8 draws from 50257 classes a memory of a few numbers per class and
draw, where noise for each class and draw takes thousands. A limit that is missed in run after
run refutes it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure

__all__ = ["main", "run"]

Sampler = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits `[rows, classes]`, draws from each row, and the limits, if there are any."""

    rows: int
    classes: int
    draws: int = 1
    ratio: float | None = None  # of times
    numbers: float | None = None  # of temporary memory, per class and draw

    @property
    def name(self) -> str:
        return f"{self.draws} from each of {self.rows} x {self.classes}"


CASES = (
    Case(64, 131072, ratio=1 / 8),
    Case(4096, 1024, ratio=1 / 3),
    Case(65536, 4, ratio=1.0),
    Case(1, 131072, draws=4096),
    Case(8, 50257, draws=1000, numbers=8.0),
)
QUICK = (Case(4, 4096), Case(256, 4), Case(2, 512, draws=100))
HEAD = ["draws", "ms", "ms of jax.random", "ratio", "limit", "pass", "MiB", "MiB of jax.random"]
HEAD += ["numbers", "limit", "pass"]
LARGEST = 2**28  # A rival that needs more numbers of noise than this is not run.


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `sampling-<platform>.json`."""
    options = measure.options(__doc__, args, "sampling")
    cases, seconds = (QUICK, 0.05) if options.quick else (CASES, 4.0)
    results = run(cases, seconds)
    print(_report(results))
    measure.write(options.out, f"sampling-{results['environment']['platform']}", results)
    return 0


def run(cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    records = [_measured(case, seconds) for case in cases]
    return {"benchmark": "sampling", "environment": environment, "records": records}


def _measured(case: Case, seconds: float) -> dict[str, Any]:
    shape = case.rows, case.classes
    logits = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    arguments = jax.random.key(0), jnp.asarray(logits)
    samplers = {"ours": _ours(case), "theirs": _theirs(case)}
    memory = {
        name: measure.compiled_bytes(sampler, *arguments)["temporary_bytes"]
        for name, sampler in samplers.items()
    }
    if math.prod(shape) * case.draws > LARGEST:
        del samplers["theirs"]
    calls = {
        name: functools.partial(jax.jit(sampler), *arguments)
        for name, sampler in samplers.items()
    }
    times = measure.paired(calls, seconds=seconds, least=5)
    ratio = times.ratio("ours", "theirs") if "theirs" in calls else None
    size = math.prod(shape) + case.rows * case.draws
    numbers = None if memory["ours"] is None else memory["ours"] / (4 * size)
    return {
        "rows": case.rows,
        "classes": case.classes,
        "draws": case.draws,
        "limits": {"ratio": case.ratio, "numbers": case.numbers},
        "name": case.name,
        "seconds": times.median("ours"),
        "rival_seconds": times.median("theirs") if "theirs" in calls else None,
        "ratio": ratio,
        "ratio_passed": measure.kept({"ratio": ratio}, {"ratio": case.ratio}),
        "temporary_bytes": memory["ours"],
        "rival_temporary_bytes": memory["theirs"],
        "numbers": numbers,
        "numbers_passed": measure.kept({"numbers": numbers}, {"numbers": case.numbers}),
        "rounds": times.rounds,
    }


def _ours(case: Case) -> Sampler:
    shape = () if case.draws == 1 else (case.draws,)
    return lambda key, logits: sj.sample(key, logits, shape=shape)


def _theirs(case: Case) -> Sampler:
    shape = (case.rows,) if case.draws == 1 else (case.draws, case.rows)
    return lambda key, logits: jax.random.categorical(key, logits, shape=shape)


def _report(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}, "
            "float32. A ratio is the time of softjax over the rival's, the median of the "
            "rounds; memory is temporary, also in numbers per class and draw.",
            measure.table(HEAD, map(_row, results["records"])),
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    limits = record["limits"]
    return [
        *(record["name"], measure.scaled(record["seconds"], 1e3)),
        *(measure.scaled(record["rival_seconds"], 1e3), measure.number(record["ratio"])),
        *(measure.at_most(limits["ratio"]), measure.verdict(record["ratio_passed"])),
        measure.scaled(record["temporary_bytes"], 2**-20),
        measure.scaled(record["rival_temporary_bytes"], 2**-20),
        *(measure.scaled(record["numbers"], 1), measure.at_most(limits["numbers"])),
        measure.verdict(record["numbers_passed"]),
    ]
