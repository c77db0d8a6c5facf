"""What the benchmarks share: paired times, memory, the environment, tables and JSON.

Times are compared only within a round, in which the rivals run one after the other in the
same process: what slows the machine for a second slows them all, and leaves the ratio.
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
from jax import Array

__all__ = [
    "Call",
    "Times",
    "compiled_bytes",
    "environment",
    "options",
    "paired",
    "peer",
    "residual_bytes",
    "table",
    "write",
]

Call = Callable[[], object]
PEERS = ("entmax", "optax", "tokamax", "torch")
SAMPLE_SECONDS = 2e-3  # A shorter call is repeated to fill a sample: clocks are coarse.


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds a call, by name, one number a round."""

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
        calls: what to time, by name; each returns arrays, which are waited for.
        seconds: when to stop, after at least `least` and at most `most` rounds.
        least: fewest rounds.
        most: most rounds.

    Returns:
        The times of every round. Compilation and two more calls of each come before.
    """
    repeats = {}
    for name, call in calls.items():
        _seconds_a_call(call, 2)
        repeats[name] = max(1, round(SAMPLE_SECONDS / _seconds_a_call(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        first = done % len(names)  # Nobody always runs after the same rival.
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds_a_call(calls[name], repeats[name]))
    return Times(samples)


def _seconds_a_call(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def compiled_bytes(function: Callable[..., Any], *args: Array) -> dict[str, int | None]:
    """Bytes of temporary memory and of output, as the compiler plans them."""
    plan = jax.jit(function).lower(*args).compile().memory_analysis()
    return {
        "temporary_bytes": getattr(plan, "temp_size_in_bytes", None),
        "output_bytes": getattr(plan, "output_size_in_bytes", None),
    }


def residual_bytes(function: Callable[..., Any], *args: Array) -> int:
    """Bytes that wait between the forward and the backward pass of `jax.vjp`."""
    leaves = jax.tree.leaves(jax.vjp(function, *args)[1])
    # An array that stands in two places is stored once.
    return sum({id(leaf): int(leaf.nbytes) for leaf in leaves}.values())


def peer(name: str) -> Any:
    """The module of that name, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def machine(environment: dict[str, Any]) -> str:
    """What a run was measured on, in a few words."""
    busy = environment["load_average"]
    load = "" if busy is None else f", load average {busy:.1f} before the run"
    device, cores = environment["device"], environment["cores"]
    return f"{device}, {cores} cores{load}, jax {environment['versions']['jax']}"


def environment() -> dict[str, Any]:
    """Device, platform and versions; a peer that is not installed has version None."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        # Work of others, if the call comes before the benchmark's own.
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


def options(description: str | None, args: Sequence[str], name: str) -> argparse.Namespace:
    """The command line that every benchmark has: `quick` and `out`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--out", type=Path, help="folder for the JSON; none: only print")
    return parser.parse_args(args)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned for readers of the plain text too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
