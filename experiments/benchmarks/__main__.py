"""`python -m experiments.benchmarks` lists the benchmarks; with a NAME it runs one."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "questions"]


def questions() -> dict[str, str]:
    """The question that each benchmark asks: the first line of its docstring, by name."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem: _first_line(file) for file in files}


def main(args: Sequence[str] | None = None) -> int:
    """Lists the benchmarks, or runs the one that is named; returns the exit code."""
    name, *options = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(_listing())
        return 0
    if name not in questions():
        print(f"There is no benchmark {name!r}.\n\n{_listing()}", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(f"experiments.benchmarks.{name}").main(options)
    return exit_code


def _first_line(file: Path) -> str:
    # Parsed, not imported: a list should not wait for JAX to load.
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _listing() -> str:
    width = max(map(len, questions()))
    lines = [f"  {name:{width}}  {question}" for name, question in questions().items()]
    usage = "python -m experiments.benchmarks NAME [--quick] [--out FOLDER]"
    return "\n".join([usage, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
