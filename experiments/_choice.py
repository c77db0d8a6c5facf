"""A command line that lists the scripts of a folder, or runs the one that is named."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["choose", "questions_in"]


def questions_in(folder: Path) -> dict[str, str]:
    """The question that each script asks: the first line of its docstring, by name."""
    scripts = sorted(folder.glob("[!_]*.py"))
    return {script.stem: _first_line(script) for script in scripts}


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


def _first_line(script: Path) -> str:
    # Parsed, not imported: a list should not wait for JAX to load.
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
