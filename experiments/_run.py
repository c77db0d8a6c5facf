"""The command line and the run folder that all experiments share.

An experiment is a pure `run(config, track)` that returns arrays by name, a `judge` that
compares them with the targets, and a `draw` that makes figures from the arrays alone, so that
`draw(dict(numpy.load("arrays.npz")))` makes them again. Every array `curves/<arm>/<measure>`,
of shape `[seeds, steps]`, is logged step by step.

An experiment whose options are `SpreadOptions` runs on a mesh of devices, in one process or in
several, and keeps checkpoints, from which `--resume` goes on.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import jax
import numpy as np
import numpy.typing as npt
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import softjax
from experiments import _processes

__all__ = [
    "Arrays",
    "Experiment",
    "Measure",
    "NDArray",
    "Options",
    "SpreadOptions",
    "Track",
    "arms_of",
    "launch",
    "untracked",
]

NDArray = npt.NDArray[Any]
Arrays = dict[str, NDArray]
Track = Callable[[range, str], Iterable[int]]  # Walks through a range and shows the progress.


def untracked(steps: range, label: str) -> Iterable[int]:
    """A `Track` that shows nothing."""
    del label
    return steps


def arms_of(arrays: Arrays) -> dict[str, Arrays]:
    """The curves `[seeds, steps]` of each arm by measure, from `curves/<arm>/<measure>`."""
    arms: dict[str, Arrays] = {}
    for name, values in arrays.items():
        if name.startswith("curves/"):
            _, arm, measure = name.split("/")
            arms.setdefault(arm, {})[measure] = values
    return arms


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of every experiment."""

    seed: int = 0
    """Seed of all random draws."""
    num_seeds: int = 10
    """Number of independent repetitions, run side by side."""
    quick: bool = False
    """A short run, with defaults and targets of its own."""
    out: Path = Path("runs")
    """Folder that run folders are made in."""
    check: bool = False
    """Exit with code 1 when a target is missed."""

    def __post_init__(self) -> None:
        # Every integer option except a seed is a count.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not field.name.endswith("seed") and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")

    @classmethod
    def reduced(cls) -> Self:
        """The defaults under `--quick`; an option that is given still counts."""
        return cls(quick=True)


@dataclasses.dataclass(frozen=True)
class SpreadOptions(Options):
    """The options of an experiment that is spread over devices and can be resumed."""

    axes: ClassVar[tuple[str, ...]] = ()  # of the mesh

    mesh: str = ""
    """Devices along each axis of the mesh, such as data=2,vocab=2; 1 along the others."""
    processes: int = 1
    """Processes, on this machine, that share the devices evenly."""
    resume: Path | None = None
    """Run folder of a run that was stopped, to go on with its options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.prod(self.sizes.values()) % self.processes:
            raise ValueError(
                f"mesh must have a multiple of `processes`, {self.processes}, devices, got"
                f" {self.mesh!r}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices along each axis."""
        parts = [part.partition("=") for part in self.mesh.split(",") if part]
        given = {name: int(size) if size.isdecimal() else 0 for name, _, size in parts}
        if not set(given) <= set(self.axes) or not all(given.values()):
            wanted = ",".join(f"{name}=2" for name in self.axes)
            raise ValueError(f"mesh must be sizes such as {wanted}, got {self.mesh!r}.")
        return {name: given.get(name, 1) for name in self.axes}

    def make_mesh(self) -> jax.sharding.Mesh:
        """The mesh of the first devices, whose arrays JAX places where no type says so."""
        sizes = tuple(self.sizes.values())
        count, found = math.prod(sizes), jax.devices()
        if count > len(found):
            raise ValueError(f"mesh {self.mesh} needs {count} devices, got {len(found)}.")
        kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
        return jax.make_mesh(sizes, self.axes, axis_types=kinds, devices=found[:count])


ConfigT = TypeVar("ConfigT", bound=Options)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that a run reports, from one value per seed, and its target, if it has one."""

    name: str
    values: npt.ArrayLike
    at_least: float | None = None
    at_most: float | None = None
    summary: Literal["mean", "median", "min", "max"] = "mean"

    @property
    def got(self) -> float:
        """The values in one number."""
        return float(getattr(np, self.summary)(self.values))

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached, which a NaN never does; None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        lower = -np.inf if self.at_least is None else self.at_least
        upper = np.inf if self.at_most is None else self.at_most
        return bool(lower <= self.got <= upper)

    def record(self) -> dict[str, Any]:
        """The record that is logged."""
        values = np.ravel(self.values)
        error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        fields = {"measure": self.name, "summary": self.summary, "got": self.got}
        targets = {"at_least": self.at_least, "at_most": self.at_most, "passed": self.passed}
        return {**fields, "standard_error": error, "n": len(values), **targets}

    def row(self) -> tuple[str, str, str, str]:
        """Its line in the final table: measure, target, got, pass."""
        record = self.record()
        bounds = [("≥", self.at_least), ("≤", self.at_most)]
        target = " ".join(f"{sign} {bound:.4g}" for sign, bound in bounds if bound is not None)
        got = f"{self.got:.4g}"
        if record["n"] > 1:
            spread = f" ± {record['standard_error']:.2g}" if self.summary == "mean" else ""
            got = f"{got}{spread} ({self.summary} of {record['n']})"
        return self.name, target, got, {True: "yes", False: "NO", None: ""}[self.passed]


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[ConfigT]):
    """One question, and the functions that answer it; `tell` adds text to the final table.

    With `SpreadOptions`, `run` has a third argument: the folder of the checkpoints.
    """

    name: str
    question: str | None
    config: type[ConfigT]
    run: Callable[..., Arrays]
    judge: Callable[[ConfigT, Arrays], list[Measure]]
    draw: Callable[[Arrays], dict[str, Figure]]
    tell: Callable[[Arrays], str] | None = None


def launch(experiment: Experiment[ConfigT], args: Sequence[str] | None = None) -> int:
    """Runs an experiment from its command line; returns the exit code."""
    args = sys.argv[1:] if args is None else list(args)
    config: Any = _parsed(experiment, args)
    options = args
    folder = config.out / experiment.name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    kept_in: list[Path] = []
    if isinstance(config, SpreadOptions):
        if config.resume is not None:
            folder = config.resume
            config, options = _resumed(experiment, args, folder)
        if config.processes > 1 and not _processes.is_one_of_several():
            script = ["-m", "experiments", experiment.name]
            return _processes.run_together(config.processes, [*script, *args])
        _processes.connect(math.prod(config.sizes.values()))
        kept_in = [folder]
    if config.quick:
        # In so short a run, XLA's optimizations take longer than they save.
        jax.config.update("jax_disable_most_optimizations", True)
    if jax.process_index() > 0:  # The first process alone writes and prints.
        experiment.run(config, untracked, *kept_in)
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "experiments", experiment.name, *options])
    _save_json(folder / "config.json", dataclasses.asdict(config))
    environment = _environment(command)
    _save_json(folder / "environment.json", environment)
    start = time.perf_counter()
    with _progress() as track:
        arrays = experiment.run(config, track, *kept_in)
    seconds = time.perf_counter() - start
    measures = experiment.judge(config, arrays)

    _save_json(folder / "environment.json", {**environment, "seconds": seconds})
    _save_lines(folder / "metrics.jsonl", [*_steps(arrays), *(m.record() for m in measures)])
    np.savez_compressed(folder / "arrays.npz", allow_pickle=False, **arrays)
    figures = experiment.draw(arrays)
    _save_json(folder / "pictures.json", {name: _in_words(f) for name, f in figures.items()})
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")

    console = Console(width=None if sys.stdout.isatty() else 100)
    if experiment.tell is not None:
        console.print(experiment.tell(arrays), highlight=False, markup=False, soft_wrap=True)
    console.print(_table(f"{experiment.name}, {seconds:.1f} s", measures))
    console.print(f"Saved in {folder}", highlight=False, markup=False, soft_wrap=True)
    return int(config.check and any(measure.passed is False for measure in measures))


def _parsed(experiment: Experiment[ConfigT], args: Sequence[str]) -> ConfigT:
    return tyro.cli(
        experiment.config,
        default=experiment.config.reduced() if "--quick" in args else experiment.config(),
        prog=f"python -m experiments {experiment.name}",
        description=experiment.question,
        args=args,
    )


def _resumed(
    experiment: Experiment[ConfigT], args: Sequence[str], folder: Path
) -> tuple[Any, list[str]]:
    """The options of the run in the folder, with `args` behind them, and those of the run."""
    try:
        command = json.loads((folder / "environment.json").read_text("utf-8"))["command"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"--resume {folder}: no run can be resumed from there, {error}."
        ) from None
    name, *options = shlex.split(command)[3:]
    if name != experiment.name:
        raise SystemExit(f"--resume {folder}: that is a run of {name}, not {experiment.name}.")
    then: Any = _parsed(experiment, options)
    now: Any = _parsed(experiment, [*options, *args])
    free = {"check": then.check, "processes": then.processes, "resume": None}
    if dataclasses.replace(now, **free) != then:
        raise SystemExit(
            f"--resume {folder} takes the options of that run; beside it, only --check and"
            " --processes may change."
        )
    return now, options


@contextmanager
def _progress() -> Iterator[Track]:
    """Shows a bar per range on a terminal; otherwise prints a line per range."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _walk
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield lambda steps, label: progress.track(steps, description=label)


def _walk(steps: range, label: str) -> Iterator[int]:
    start = time.perf_counter()
    yield from steps
    seconds = time.perf_counter() - start
    print(f"{label}: {len(steps)} of {len(steps)} in {seconds:.1f} s", file=sys.stderr)


def _table(title: str, measures: Iterable[Measure]) -> Table:
    table = Table("measure", "target", "got", "pass", title=title)
    for measure in measures:
        table.add_row(*measure.row())
    return table


def _steps(arrays: Arrays) -> Iterator[dict[str, Any]]:
    """The mean over the seeds of every curve: one record per arm and step."""
    for arm, curves in arms_of(arrays).items():
        means = {
            measure: np.mean(values, axis=0).tolist() for measure, values in curves.items()
        }
        for step, values in enumerate(zip(*means.values(), strict=True), start=1):
            yield {"arm": arm, "step": step, **dict(zip(means, values, strict=True))}


def _environment(command: str) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "numpy", "optax", "scikit-learn", "matplotlib")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "command": command,
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "softjax": softjax.__version__,
            **versions,
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _commit() -> str | None:
    """The commit of the checkout, marked when files differ from it; None outside of one."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            git, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _in_words(figure: Figure) -> str:
    """What the panels of a figure show, for readers who cannot see it."""
    panels = []
    for axes in figure.axes:
        _, labels = axes.get_legend_handles_labels()
        shown = " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        arms = ", ".join(label for label in labels if not label.startswith("_"))
        panels.append(": ".join(filter(None, (axes.get_title(), shown, arms))))
    return "; ".join(filter(None, panels)).replace("\n", " ")


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_suffix(
        ".part"
    )  # A run that is stopped while it writes keeps the old file.
    part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def _save_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
