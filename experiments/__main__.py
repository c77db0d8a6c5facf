"""`python -m experiments` lists the scripts; `python -m experiments NAME` runs one.

`all` runs every script, and `report` gathers the newest run of each into one HTML page.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import _gallery, _report
from experiments._choice import choose, docstrings_in, questions_in

__all__ = ["main", "questions"]

FOLDER = Path(__file__).parent


def questions() -> dict[str, str]:
    """The question that each script asks: the first line of its docstring, by name."""
    return questions_in(FOLDER)


def main(args: Sequence[str] | None = None) -> int:
    """Lists the scripts, or runs the one that is named, or all; returns the exit code."""
    args = sys.argv[1:] if args is None else list(args)
    if args[:1] == ["all"]:
        return _gallery.main(list(questions()), args[1:])
    if args[:1] == ["report"]:
        return _report.main(docstrings_in(FOLDER), args[1:])
    usage = """python -m experiments NAME [options]; options: python -m experiments NAME --help
python -m experiments all [--quick] [--check] [--out DIR] runs every script
python -m experiments report [--out DIR] makes a page of the newest run of each"""
    return choose(args, folder=FOLDER, package="experiments", noun="experiment", usage=usage)


if __name__ == "__main__":
    sys.exit(main())
