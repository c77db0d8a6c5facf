"""Gathers the newest run of each experiment into one HTML page.

The page holds its pictures and its style, so it opens without a server or a network. It is
made from the run folders alone, and is written beside them. With `--readme` the README's table
of experiments is written too, with the figures of the newest runs at full size; those of other
experiments stay as they were.
"""

import argparse
import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["FIGURES", "README", "main", "readme_with"]

FIGURES = Path(__file__).parent / "figures" / "figures.json"  # By name, for the README.
README = Path(__file__).parents[1] / "README.md"
HEAD = "| experiment | question | last run, targets reached |\n| --- | --- | --- |\n"


def main(docstrings: Mapping[str, str], args: Sequence[str]) -> int:
    """Writes `report.html` into the folder of the runs; returns 1 if there is no run."""
    parser = argparse.ArgumentParser("python -m experiments report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--readme", action="store_true", help="write the README's table too")
    options = parser.parse_args(args)
    newest = {name: _newest(options.out / name) for name in docstrings}
    folders = {name: folder for name, folder in newest.items() if folder is not None}
    if not folders:
        print(f"There is no run in {options.out}.")
        return 1
    page = options.out / "report.html"
    page.write_text(_page(docstrings, folders), encoding="utf-8")
    print(f"Saved {page}, with {len(folders)} of {len(docstrings)} experiments.")
    if options.readme:
        figures = json.loads(FIGURES.read_text(encoding="utf-8"))
        figures |= {name: _figure(_measures(f)) for name, f in folders.items() if _is_full(f)}
        kept = {name: figures[name] for name in docstrings if name in figures}
        FIGURES.write_text(
            json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        text = README.read_text(encoding="utf-8")
        README.write_text(readme_with(text, docstrings, kept), encoding="utf-8")
    return 0


def readme_with(text: str, docstrings: Mapping[str, str], figures: Mapping[str, str]) -> str:
    """The text of the README with the table of all experiments in place of the one it has."""
    before, _, rest = text.partition("| experiment | question |")
    after = rest[rest.index("\n\n") :]
    rows = (
        f"| `{name}` | {docstring.partition(chr(10))[0]} | {figures.get(name, '')} |"
        for name, docstring in docstrings.items()
    )
    return before + HEAD + "\n".join(rows) + after


def _figure(measures: Sequence[Mapping[str, Any]]) -> str:
    """A measure, and how many targets were reached.

    It is the first measure whose target is a single bound other than 0, because controls mostly
    have two bounds.
    """
    judged = [record for record in measures if record["passed"] is not None]
    told = next((r for r in judged if bool(r["at_least"]) != bool(r["at_most"])), judged[0])
    reached = sum(bool(record["passed"]) for record in judged)
    return f"{told['measure']}: {told['got']:.3g}; {reached}/{len(judged)}"


def _measures(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "measure" in record]


def _is_full(folder: Path) -> bool:
    """Whether a run is of full size, on the data that every reader has."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return not config["quick"] and config.get("data_dir") is None


def _newest(folder: Path) -> Path | None:
    """The newest run that is complete; the names of run folders are dates."""
    runs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    return runs[-1] if runs else None


def _page(docstrings: Mapping[str, str], folders: Mapping[str, Path]) -> str:
    questions = {name: docstrings[name].partition("\n")[0] for name in folders}
    links = "".join(
        f'<li><a href="#{name}">{name}</a>: {escape(question)}</li>'
        for name, question in questions.items()
    )
    sections = "".join(
        _section(name, docstrings[name], folder) for name, folder in folders.items()
    )
    return _PAGE.substitute(links=links, sections=sections)


def _section(name: str, docstring: str, folder: Path) -> str:
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    measures = _measures(folder)
    question, _, rest = docstring.partition("\n")
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in rest.strip().split("\n\n"))
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    facts = {
        "command": f"<code>{escape(environment['command'])}</code>",
        "time": f"{environment['seconds']:.0f} s on {escape(environment['device'])}",
        "versions": escape(versions),
        "commit": f"<code>{escape(str(environment['commit']))}</code>",
    }
    rows = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in facts.items())
    words = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    pictures = "".join(_picture(folder / f"{x}.png", shown) for x, shown in words.items())
    return (
        f'<section id="{name}"><h2>{name}</h2><p class="question">{escape(question)}</p>'
        f'<p class="answer">{_answer(measures)}</p>{paragraphs}'
        f"{_table(measures)}{pictures}<dl>{rows}</dl></section>"
    )


def _answer(measures: Sequence[Mapping[str, Any]]) -> str:
    """Which targets were reached, in a sentence."""
    judged = [record for record in measures if record["passed"] is not None]
    missed = [escape(record["measure"]) for record in judged if not record["passed"]]
    if not judged:
        return "This run has no targets."
    if not missed:
        return f"All {len(judged)} targets were reached, as expected."
    return f"{len(missed)} of {len(judged)} targets were missed: {'; '.join(missed)}."


def _table(measures: Iterable[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(record['measure'])}</td><td>{_target(record)}</td>"
        f"<td>{_got(record)}</td><td>{_PASSED[record['passed']]}</td></tr>"
        for record in measures
    )
    head = "".join(f'<th scope="col">{x}</th>' for x in ("measure", "target", "got", "pass"))
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


_PASSED = {True: "yes", False: "<strong>NO</strong>", None: ""}


def _target(record: Mapping[str, Any]) -> str:
    bounds = ("&ge;", record["at_least"]), ("&le;", record["at_most"])
    return " ".join(f"{sign} {bound:.4g}" for sign, bound in bounds if bound is not None)


def _got(record: Mapping[str, Any]) -> str:
    got = f"{record['got']:.4g}"
    if record["n"] == 1:
        return got
    is_mean = record["summary"] == "mean"
    spread = f" &plusmn; {record['standard_error']:.2g}" if is_mean else ""
    return f"{got}{spread} ({record['summary']} of {record['n']})"


def _picture(path: Path, shown: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    title = path.stem.replace("_", " ")
    return (
        f'<figure><img alt="{escape(shown)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{title}</figcaption></figure>"
    )


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experiments of softjax</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 50rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
.question { font-size: 1.2rem; }
.answer { border-left: 0.25rem solid; padding-left: 0.75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; border-bottom: 1px solid gray; }
td:nth-child(2) { white-space: nowrap; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: white; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 0.9rem; }
dd { margin: 0; }
@media (max-width: 30rem) { table { font-size: 0.8rem; } }
@media print { section { break-before: page; } .wide { overflow: visible; } }
</style>
</head>
<body>
<h1>Experiments of softjax</h1>
<nav aria-label="Contents"><ul>$links</ul></nav>
<main>$sections</main>
</body>
</html>
""")
