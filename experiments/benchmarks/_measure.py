"""Shared by the benchmarks: paired times, equations, memory, limits, tables and JSON.

Times are compared only within a round, in which the rivals run one after the other in the
same process. Whatever slows the machine for a second slows all of them, so the ratio stays.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import subjaxprs
from jax.stages import Compiled

__all__ = [
    "Call",
    "Function",
    "Times",
    "at_most",
    "by",
    "compile_times",
    "compiled_bytes",
    "cotangent",
    "environment",
    "equations",
    "kept",
    "limited",
    "machine",
    "missing",
    "number",
    "options",
    "over",
    "paired",
    "peer",
    "planned_bytes",
    "residual_bytes",
    "scaled",
    "table",
    "verdict",
    "with_gradient",
    "write",
]

Call = Callable[[], object]
Function = Callable[..., Any]
PEERS = ("distrax", "entmax", "optax", "rlax", "tokamax", "torch")
SAMPLE_SECONDS = 2e-3  # Shorter calls are repeated to fill a sample, because clocks are coarse.


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call by name, one number per round."""

    samples: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds that a call took in the middle round."""
        return statistics.median(self.samples[name])

    def ratio(self, name: str, rival: str) -> float:
        """How many times as long `name` took as `rival`: the median over the rounds."""
        pairs = zip(self.samples[name], self.samples[rival], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def rounds(self) -> int:
        """How often each call was timed."""
        return len(next(iter(self.samples.values())))


def paired(calls: Mapping[str, Call], *, seconds: float, least: int, most: int = 101) -> Times:
    """Times the calls in turn, round after round, for about so many seconds.

    Args:
        calls: calls to time, by name; each returns arrays, for which the clock waits.
        seconds: time after which no new round starts.
        least: smallest number of rounds, however long they take.
        most: largest number of rounds.

    Returns:
        The times of every round, after a warm-up of three calls that compiles.
    """
    repeats = {}
    for name, call in calls.items():
        _seconds_per_call(call, 2)
        repeats[name] = max(1, round(SAMPLE_SECONDS / _seconds_per_call(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name in _turn(names, done):
            samples[name].append(_seconds_per_call(calls[name], repeats[name]))
    return Times(samples)


def compile_times(
    functions: Mapping[str, tuple[Function, Sequence[Any]]], *, rounds: int
) -> tuple[Times, dict[str, Compiled]]:
    """Traces and compiles the functions in turn, each time as a new process would.

    Args:
        functions: each function, not yet jitted, and its arguments, by name.
        rounds: how often each function is compiled.

    Returns:
        The times of every round, and the programs of the last round. JAX forgets all
        that it has traced and compiled before each time.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    programs: dict[str, Compiled] = {}
    persistent = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    for done in range(rounds):
        for name in _turn(list(functions), done):
            function, args = functions[name]
            jax.clear_caches()
            begin = time.perf_counter()
            programs[name] = jax.jit(function).lower(*args).compile()
            samples[name].append(time.perf_counter() - begin)
    jax.config.update("jax_enable_compilation_cache", persistent)
    return Times(samples), programs


def _turn(names: list[str], done: int) -> list[str]:
    """The order of a round: it rotates, because a rival may slow the one that follows it."""
    first = done % len(names)
    return names[first:] + names[:first]


def _seconds_per_call(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def equations(function: Function, *args: Any) -> int:
    """Equations of a program; a jaxpr counts once, however many times it is called."""
    waiting = [jax.jit(function).trace(*args).jaxpr.jaxpr]
    seen, count = set(), 0
    while waiting:
        jaxpr = waiting.pop()
        if id(jaxpr) not in seen:
            seen.add(id(jaxpr))
            count += len(jaxpr.eqns)
            waiting += subjaxprs(jaxpr)
    return count


def with_gradient(function: Function, num_floats: int = 1) -> Function:
    """The value together with the gradient, as training computes them.

    Args:
        function: function of arrays, the differentiable ones first, to one array.
        num_floats: number of differentiable arguments.

    Returns:
        A function of the cotangent of the value, and then of the same arguments.
    """

    def both(bar: Array, *args: Any) -> tuple[Array, tuple[Array, ...]]:
        floats, others = args[:num_floats], args[num_floats:]
        value, pullback = jax.vjp(lambda *floats: function(*floats, *others), *floats)
        return value, pullback(bar)

    return both


def cotangent(function: Function, *args: Any) -> Array:
    """A standard normal cotangent for the value of a function."""
    value = jax.eval_shape(function, *args)
    return jnp.asarray(np.random.default_rng(9).standard_normal(value.shape), value.dtype)


def compiled_bytes(function: Function, *args: Any) -> dict[str, int | None]:
    """Bytes of temporary memory and of output, as the compiler plans them."""
    return planned_bytes(jax.jit(function).lower(*args).compile())


def planned_bytes(program: Compiled) -> dict[str, int | None]:
    """The same of a program that is compiled already."""
    plan = program.memory_analysis()
    return {
        "temporary_bytes": getattr(plan, "temp_size_in_bytes", None),
        "output_bytes": getattr(plan, "output_size_in_bytes", None),
    }


def residual_bytes(function: Function, *args: Array) -> int:
    """Bytes that wait between the forward and the backward pass of `jax.vjp`."""
    leaves = jax.tree.leaves(jax.vjp(function, *args)[1])
    # An array that appears twice is stored once.
    return sum({id(leaf): int(leaf.nbytes) for leaf in leaves}.values())


def peer(name: str) -> Any:
    """The module of that name, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing(*names: str) -> str:
    """A sentence that names the peers that are not installed; empty if all of them are."""
    absent = [name for name in names if peer(name) is None]
    if not absent:
        return ""
    verb = "is" if len(absent) == 1 else "are"
    return f"Not compared, because {' and '.join(absent)} {verb} not installed."


def machine(environment: dict[str, Any]) -> str:
    """The device, its load and the version of JAX, in a few words."""
    busy = environment["load_average"]
    load = "" if busy is None else f", load average {busy:.1f} before the run"
    device, cores = environment["device"], environment["cores"]
    return f"{device}, {cores} cores{load}, jax {environment['versions']['jax']}"


def environment() -> dict[str, Any]:
    """Device, platform and versions, where a peer that is not installed has version None."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        # Before the benchmark's own work, this is the work of other processes.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {
            **{name: _version(name) for name in ("jax", "jaxlib", "numpy", *PEERS)},
            "softjax": importlib.import_module("softjax").__version__,
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def options(
    description: str | None, args: Sequence[str], name: str, **choices: Sequence[str]
) -> argparse.Namespace:
    """Parses the command line that all benchmarks share: `quick` and `out`.

    Each of the `choices` is one more option, whose default comes first.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and no limits, in seconds"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it, only print")
    for option, known in choices.items():
        parser.add_argument(f"--{option}", choices=known, default=known[0])
    given = parser.parse_args(args)
    if given.quick:
        # Optimizing would take longer than it saves, and --quick compares no figures.
        jax.config.update("jax_disable_most_optimizations", True)
    return given


def kept(figures: Mapping[str, Any], limits: Mapping[str, float | None]) -> bool | None:
    """Whether all figures that have a limit keep it; None if none has one."""
    pairs = [(figures[name], limit) for name, limit in limits.items()]
    checks = [figure <= limit for figure, limit in pairs if None not in (figure, limit)]
    return all(checks) if checks else None


def over(ours: float | None, theirs: float | None) -> float | None:
    """The ratio of two figures, or None without both of them or over a zero."""
    return None if ours is None or not theirs else ours / theirs


def number(value: float | None) -> str:
    """A figure in two digits or, from 100, in whole numbers; a small ratio as a fraction."""
    if value is None:
        return "-"
    if 0 < value < 0.5:
        return f"1/{1 / value:.3g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 10 else f"{value:.2f}"


def scaled(value: float | None, unit: float) -> str:
    """A figure in other units, in three digits."""
    return "-" if value is None else f"{unit * value:.3g}"


def by(shape: Sequence[int]) -> str:
    """A shape for people: 4096 x 1024."""
    return " x ".join(map(str, shape))


def limited(value: float | None, limit: float | None) -> str:
    """A figure with its limit beside it, in bold if it misses the limit."""
    if value is None or limit is None:
        return number(value)
    text = f"{number(value)} (<= {number(limit)})"
    return text if value <= limit else f"**{text}**"


def at_most(limit: float | None) -> str:
    """The cell of a limit."""
    return "-" if limit is None else f"<= {number(limit)}"


def verdict(passed: bool | None) -> str:
    """The cell of a row that keeps its limits, misses one, or has none."""
    return {True: "yes", False: "**no**", None: "-"}[passed]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned for readers of the plain text too.

    A column that holds nothing but "-" is left out: limits under --quick, for example.
    """
    lines = [list(head), *map(list, rows)]
    columns = [
        column
        for column in zip(*lines, strict=True)
        if len(column) == 1 or any(cell != "-" for cell in column[1:])
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = [list(line) for line in zip(*columns, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write(folder: Path | None, name: str, results: Mapping[str, Any]) -> None:
    """Writes `name`.json into the folder; does nothing without one."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, allow_nan=False)
    # A run that is stopped while it writes must not lose the old file.
    part = folder / f"{name}.json.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / f"{name}.json")
