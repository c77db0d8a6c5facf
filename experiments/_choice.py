"""A command line that lists the scripts of a folder, or runs the one that is named."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["choose", "docstrings_in", "questions_in"]


def questions_in(folder: Path) -> dict[str, str]:
    """The question that each script asks: the first line of its docstring, by name."""
    return {name: text.partition("\n")[0] for name, text in docstrings_in(folder).items()}


def docstrings_in(folder: Path) -> dict[str, str]:
    """The docstring of each script, by name."""
    # Parsed, not imported: a list should not wait for JAX to load.
    scripts = sorted(folder.glob("[!_]*.py"))
    parsed = {script.stem: ast.parse(script.read_text(encoding="utf-8")) for script in scripts}
    return {name: ast.get_docstring(tree) or "" for name, tree in parsed.items()}


def choose(
    args: Sequence[str] | None, *, folder: Path, package: str, noun: str, usage: str
) -> int:
    """Lists the scripts, or runs the one that is named; returns the exit code."""
    questions = questions_in(folder)
    width = max(map(len, questions))
    lines = [f"  {name:{width}}  {question}" for name, question in questions.items()]
    listing = "\n".join([usage, "", *lines])
    name, *options = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(listing)
        return 0
    if name not in questions:
        print(f"There is no {noun} {name!r}.\n\n{listing}", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(f"{package}.{name}").main(options)
    return exit_code
