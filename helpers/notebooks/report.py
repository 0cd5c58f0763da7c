"""The report: the executed notebooks and what they reached, on one HTML page. Only formulas need the network."""

from __future__ import annotations

import json
import logging
import os
import re
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from helpers.notebooks.format import SEE
from helpers.notebooks.run import NOTEBOOKS, plain, read, tags
from helpers.runtime import CourseError, replacing, shown

_STYLE = """<style>
body.jp-Notebook { margin: 0; padding: 2rem 1.25rem 6rem; background: #fff; overflow: visible; }
main { max-width: 56rem; margin: 0 auto; }
section + section { margin-top: 3rem; padding-top: 1.5rem; border-top: 3px solid #ddd; }
.jp-RenderedMarkdown table { margin-left: 0; margin-right: auto; }
.jp-InputArea-editor, .jp-OutputArea-output { overflow-x: auto; }
.up { margin-left: 79px; font: 13px var(--jp-content-font-family); }
a { color: #0b57a4; text-decoration: none; } a:hover { text-decoration: underline; }
@media (max-width: 48rem) { .jp-InputPrompt, .jp-OutputPrompt { display: none; } .up { margin-left: 0; } }
</style></head>"""
_UP = '<div class="up"><a href="#contents">↑ Contents</a></div>'


def rebuild_report(out_dir: Path, folder: Path = NOTEBOOKS) -> Path:
    """Write report.html from summary.json and the executed notebooks in `out_dir`; CourseError if there are none.

    Links between notebooks become anchors, and a figure's alt text is the 'What to see' below it. `folder` is what
    relative links in the notebooks start from.
    """
    out_dir = Path(out_dir).resolve()
    if not (out_dir / "summary.json").exists():
        raise CourseError(f"There is no summary.json in {shown(out_dir)}: run `python -m helpers reproduce` first.")
    try:
        summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
        cells = [new_markdown_cell(_contents(summary))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(
            f"{shown(out_dir / 'summary.json')} is damaged ({type(error).__name__}): run `python -m helpers reproduce` "
            "again."
        ) from error
    contents = new_notebook(cells=cells, metadata={"title": "Course report"})
    pages = {"contents": contents} | {name: read(out_dir / f"{name}.ipynb") for name in summary["notebooks"]}

    def address(match: re.Match) -> str:
        """The address of a link or picture on page `name`, as it must be on the one page."""
        start, target = match[1], unquote(unescape(match[2]))
        file, _, fragment = target.partition("#")
        owner = Path(file).stem if file else name
        if owner in pages and file in ("", f"{owner}.ipynb"):
            target = f"#{owner}-{fragment}" if fragment else f"#{owner}"
        elif not os.path.exists(folder / file):  # on the network, or an embedded picture
            return match[0]
        else:
            target = os.path.relpath(folder / file, out_dir)
        return f'{start}{escape(target)}"'

    exporter = HTMLExporter(log=logging.Logger("quiet", logging.CRITICAL))
    head, sections = "", []
    for name, notebook in pages.items():
        before, _, body = exporter.from_notebook_node(_prepared(notebook))[0].partition("<main>")
        head = head or before
        body = re.sub(r'(<(?:h[1-6]|div)\b[^>]*? id=")', rf"\g<1>{name}-", body.rpartition("</main>")[0])
        body = re.sub(r'(<(?:a|img)\b[^>]*? (?:href|src)=")([^"]*)"', address, body)
        sections.append(f'<section id="{name}">{_UP if notebook is not contents else ""}{body}</section>')
    head = re.sub("<script.*?</script>", _script, head, flags=re.DOTALL).replace("</head>", _STYLE)
    with replacing(out_dir / "report.html") as temporary:
        temporary.write_text(f"{head}<main>{''.join(sections)}</main></body></html>\n", encoding="utf-8")
    return out_dir / "report.html"


def _script(match: re.Match) -> str:
    """MathJax, without waiting for the network; no script for widgets or diagrams, which the notebooks have none of."""
    return match[0].replace("<script src", "<script async src") if "mathjax" in match[0].lower() else ""


def _prepared(notebook: NotebookNode) -> NotebookNode:
    """Without navigation bars, and each figure with the 'What to see' below it as alt text."""
    notebook.cells = [cell for cell in notebook.cells if "navigation" not in tags(cell)]
    for cell, below in zip(notebook.cells, notebook.cells[1:], strict=False):
        seen = SEE.match(below.source)
        for output in cell.get("outputs", []) if seen else []:
            if picture := output.get("data", {}).get("image/png"):
                alt = escape(plain(below.source[seen.end() :].split("\n\n")[0]))
                output.data["text/html"] = f'<img alt="{alt}" src="data:image/png;base64,{picture.strip()}">'
    return notebook


def _contents(summary: dict[str, Any]) -> str:
    """The head of the report, in Markdown: contents with the questions, state of each notebook, results."""

    def row(*cells: Any) -> str:
        return "| " + " | ".join(escape(str(cell)).replace("|", "&#124;") for cell in cells) + " |"

    about = [f"profile {summary['profile']}", summary["data_source"], summary["state"], f"{summary['seconds']:.0f} s"]
    lines = ["# Course report", "", escape(" · ".join(filter(None, about))), "", "## Contents", ""]
    for name, record in summary["notebooks"].items():
        lines.append(f"- [{record['title']}]({name}.ipynb)<br>{escape(record['question'])}")
    lines += ["", "## Summary", "", row("Notebook", "Seconds", "State"), "|:---|---:|:---|"]
    for name, record in summary["notebooks"].items():
        lines.append(row(name, record["seconds"], record.get("error", record["state"])))
    if summary["results"]:
        lines += ["", "## Results", "", row("From", "Quantity", "Value"), "|:---|:---|:---|"]
    for name, found in summary["results"].items():
        lines += [row(name, key, value) for key, value in (found if isinstance(found, dict) else {"": found}).items()]
    return "\n".join(lines)
