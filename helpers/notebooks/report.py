"""The report: notebooks as one HTML page that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import base64
import logging
import mimetypes
import os
import re
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

from helpers.notebooks.format import SECTION, anchor, explanation
from helpers.notebooks.run import NOTEBOOKS, listing, opening, plain, read, tags
from helpers.runtime import replacing

TITLE = "An SE-ResNet under five million parameters, step by step"
ABOUT = (
    "The whole course on one page, made from the notebooks as they are stored: their numbers come from recorded runs, "
    "and nothing was run to make this page. To run, change and test it, open the notebooks themselves."
)

_CELL = """{% extends 'lab/base.html.j2' %}
{% block codecell %}{% if 'solution' in cell.metadata.tags %}<details><summary>Solution</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}{% endblock %}
{% block input %}<div class="jp-InputArea-editor">{{ cell.source | highlight_code }}</div>{% endblock %}"""
# What latex2mathml reads only in a longer form: \mathcal{N}, large brackets of a named kind, ln with its space.
_LONGER = (
    (r"\\(mathcal|mathbb|mathrm) ?(\w)", r"\\\1{\2}"),
    (r"\\[bB]igg?[lr]? *(?=\\)", ""),
    (r"\\(ln|log|cos) +(?=[\w\\])", r"\\\1\\,"),
)


def course_report(path: Path, folder: Path = NOTEBOOKS) -> Path:
    """Write the notebooks of `folder`, as they are stored, to `path`. Runs nothing. CourseError if there are none."""
    pages = {entry.name: read(entry.path) for entry in listing(folder)}
    questions = {entry.name: entry.question for entry in listing(folder)}
    _write(Path(path), TITLE, "\n".join([f"# {TITLE}", "", ABOUT, "", *_contents(pages, questions)]), pages, folder)
    return Path(path)


def results_report(out_dir: Path, summary: dict[str, Any], folder: Path) -> None:
    """Write report.html from the summary of `reproduce` and the executed notebooks in `out_dir`.

    `folder` is what relative links in the notebooks start from.
    """
    pages = {name: read(out_dir / f"{name}.ipynb") for name in summary["notebooks"]}
    questions = {name: record["question"] for name, record in summary["notebooks"].items()}
    head = "\n".join([*_results(summary), "", *_contents(pages, questions)])
    _write(out_dir / "report.html", "Course report", head, pages, folder)


def _write(path: Path, title: str, head: str, pages: dict[str, NotebookNode], folder: Path) -> None:
    """One page: contents at the side, then a section each for the head, in Markdown, and for the notebooks."""
    folder, menu = Path(folder).resolve(), []
    for name, notebook in pages.items():
        sections = "".join(f'<li><a href="#{name}-{escape(unquote(to))}">{escape(text)}</a></li>'
                           for text, to in _sections(notebook))  # fmt: skip
        menu.append(f'<li><a href="#{name}">{escape(_title(notebook) or name)}</a><ul>{sections}</ul></li>')

    def address(match: re.Match) -> str:
        """The address of a link or picture in notebook `name`, as it must be on the one page."""
        start, target = match[1], unquote(unescape(match[2]))
        file, _, fragment = target.partition("#")
        owner = Path(file).stem if file else name
        if owner in contents and file in ("", f"{owner}.ipynb"):
            target = f"#{owner}-{fragment}" if fragment else f"#{owner}"
        elif not os.path.isfile(folder / file):  # on the network, embedded already, or missing
            return match[0]
        elif start.startswith("<img"):
            target = f"data:{mimetypes.guess_type(file)[0]};base64,{_base64(folder / file)}"
        else:
            target = os.path.relpath(folder / file, path.parent)
        return f'{start}{escape(target)}"'

    def target(match: re.Match) -> str:
        """The id of a heading or cell of notebook `name`, unlike any other's."""
        return f'{match[1]}{name}-{escape(unquote(unescape(match[2])))}"'

    exporter, bodies = _Exporter(raw_template=_CELL, log=logging.Logger("quiet", logging.CRITICAL)), []
    contents = {"contents": new_notebook(cells=[new_markdown_cell(head)])} | pages
    for name, notebook in contents.items():
        body = exporter.from_notebook_node(_prepared(notebook))[0]
        body = re.sub(r'(<(?:h[1-6]|div)\b[^>]*? id=")([^"]*)"', target, body)
        body = re.sub(r'(<(?:a|img)\b[^>]*? (?:href|src)=")([^"]*)"', address, body)
        up = '<a class="up" href="#contents">↑ Contents</a>' if name in pages else ""
        bodies.append(f'<section id="{name}">{up}{body}</section>')
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{_style()}</style>\n</head>\n'
        f'<body>\n<nav aria-label="Contents"><ul><li><a href="#contents">Contents</a></li>{"".join(menu)}</ul></nav>\n'
        f"<main>{''.join(bodies)}</main>\n</body>\n</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


class _Renderer(IPythonRenderer):
    """Formulas as MathML, which browsers draw by themselves."""

    def inline_math(self, body: str) -> str:
        return _formula(body, "inline")

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{_formula(body, "block")}</span>'


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(_Renderer(escape=False, attachments=attachments)).render(source)


def _formula(tex: str, display: str) -> str:
    """LaTeX as MathML; what the converter does not know stays as it was written."""
    longer = tex
    for pattern, replacement in _LONGER:
        longer = re.sub(pattern, replacement, longer)
    try:
        formula = convert(longer, display=display)
    except Exception:  # it has no base class of its own
        formula = "\\"
    return f'<code class="tex">{escape(tex)}</code>' if "\\" in formula else formula


def _style() -> str:
    """The style sheet beside this file, and the colours of code, for a light and a dark page."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("xcode", "github-dark"))
    own = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    colours = "\n".join([light, "@media screen and (prefers-color-scheme: dark) {", dark, "}"])
    return f"{colours}\n{own}"


def _prepared(notebook: NotebookNode) -> NotebookNode:
    """Without navigation bars, and each picture with the 'What to see' below it as alt text."""
    notebook.cells = [cell for cell in notebook.cells if "navigation" not in tags(cell)]
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        drawn = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        words = _spoken(explanation(cell, below)) or "A picture that the text around it explains"
        for number, output in enumerate(drawn, 1):
            alt = escape(f"figure {number} of {len(drawn)}: {words}" if len(drawn) > 1 else words)
            source = f"data:image/png;base64,{output.data['image/png'].strip()}"
            output.data = {"text/html": f'<div class="jp-RenderedImage"><img alt="{alt}" src="{source}"></div>'}
    return notebook


def _spoken(words: str) -> str:
    """Text for a screen reader: a link is its words, and a formula between single $ its characters, such as α = 0.2."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", words)
    return re.sub(r"\$([^$]+)\$", lambda tex: unescape(re.sub("<[^>]*>", "", _formula(tex[1], "inline"))), words)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _title(notebook: NotebookNode) -> str:
    found = re.search(r"^# +(.+?) *$", opening(notebook), re.MULTILINE)
    return plain(found[1]) if found else ""


def _sections(notebook: NotebookNode) -> list[tuple[str, str]]:
    """(text, fragment) of each heading of the second level."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [(plain(heading), anchor(heading)) for heading in SECTION.findall(text)]


def _contents(pages: dict[str, NotebookNode], questions: dict[str, str]) -> list[str]:
    """Markdown: the notebooks with their questions and sections."""
    lines = ["## Contents", ""]
    for name, notebook in pages.items():
        sections = " · ".join(f"[{escape(text)}]({name}.ipynb#{to})" for text, to in _sections(notebook))
        title = f"**[{escape(_title(notebook) or name)}]({name}.ipynb)**"
        lines.append(f'- {title} {escape(questions[name])}<small class="sections"><br>{sections}</small>')
    return lines


def _literal(text: str) -> str:
    """Text as Markdown that shows these characters: an error's *, $ or | is no mark of emphasis, formula or table."""
    return re.sub(r"[^\w\s.,:;%/()·-]|_", lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))


def _results(summary: dict[str, Any]) -> list[str]:
    """Markdown: what was run, the state of each notebook, and what they reached."""

    def row(*cells: Any) -> str:
        return "| " + " | ".join(_literal(str(cell)) for cell in cells) + " |"

    about = [f"profile {summary['profile']}", summary["data_source"], summary["state"], f"{summary['seconds']:.0f} s"]
    lines = ["# Course report", "", _literal(" · ".join(filter(None, about))), ""]
    if summary["results"]:
        lines += ["## Results", "", row("From", "Quantity", "Value"), "|:---|:---|:---|"]
    for name, found in summary["results"].items():
        lines += [row(name, key, value) for key, value in (found if isinstance(found, dict) else {"": found}).items()]
    lines += ["", "## Summary", "", row("Notebook", "Seconds", "State"), "|:---|---:|:---|"]
    for name, record in summary["notebooks"].items():
        lines.append(row(name, record["seconds"], record.get("error", record["state"])))
    return lines
