"""`python -m experiments` lists the scripts; `python -m experiments NAME` runs one."""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments._choice import choose, questions_in

__all__ = ["main", "questions"]

FOLDER = Path(__file__).parent


def questions() -> dict[str, str]:
    """The question that each script asks: the first line of its docstring, by name."""
    return questions_in(FOLDER)


def main(args: Sequence[str] | None = None) -> int:
    """Lists the scripts, or runs the one that is named; returns the exit code."""
    usage = "python -m experiments NAME [options]; options: python -m experiments NAME --help"
    return choose(args, folder=FOLDER, package="experiments", noun="experiment", usage=usage)


if __name__ == "__main__":
    sys.exit(main())
