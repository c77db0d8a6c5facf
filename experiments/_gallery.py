"""Runs every experiment, two at a time, each in a process of its own."""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["main"]


class Run(NamedTuple):
    """How the process of an experiment ended."""

    name: str
    exit_code: int
    seconds: float
    output: str


def main(names: Sequence[str], args: Sequence[str]) -> int:
    """Runs the experiments of these names; returns 1 if one of them fails."""
    parser = argparse.ArgumentParser("python -m experiments all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="make short runs")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    options = parser.parse_args(args)
    flags = [f"--{flag}" for flag in ("quick", "check") if getattr(options, flag)]
    flags += ["--out", str(options.out)]

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
    runs = []
    with progress, ThreadPoolExecutor(max(1, options.jobs)) as pool:
        task = progress.add_task("experiments", total=len(names))
        for done in as_completed([pool.submit(_run, name, flags) for name in names]):
            runs.append(done.result())
            progress.advance(task)
            progress.console.print(f"{runs[-1].name}: {runs[-1].seconds:.0f} s")

    table = Table("experiment", "seconds", "result")
    for run in sorted(runs):
        table.add_row(run.name, f"{run.seconds:.0f}", "FAILED" if run.exit_code else "done")
    console = Console(width=None if sys.stdout.isatty() else 100)
    for run in sorted(runs):
        if run.exit_code:
            console.print(run.output, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    return int(any(run.exit_code for run in runs))


def _run(name: str, flags: Sequence[str]) -> Run:
    start = time.perf_counter()
    command = [sys.executable, "-m", "experiments", name, *flags]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return Run(name, done.returncode, time.perf_counter() - start, done.stdout)
