"""`python -m experiments` lists the scripts; `python -m experiments NAME` runs one."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "questions"]


def questions() -> dict[str, str]:
    """The question that each script asks: the first line of its docstring, by name."""
    scripts = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {script.stem: _first_line(script) for script in scripts}


def main(args: Sequence[str] | None = None) -> int:
    """Lists the scripts, or runs the one that is named; returns the exit code."""
    name, *options = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(_listing())
        return 0
    if name not in questions():
        print(f"There is no experiment {name!r}.\n\n{_listing()}", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(f"experiments.{name}").main(options)
    return exit_code


def _first_line(script: Path) -> str:
    # Parsed, not imported: a list should not wait for JAX to load.
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _listing() -> str:
    width = max(map(len, questions()))
    lines = [f"  {name:{width}}  {question}" for name, question in questions().items()]
    usage = "python -m experiments NAME [options]; options: python -m experiments NAME --help"
    return "\n".join([usage, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
