"""The notebooks room on small notebooks: parameters, execution, navigation, refresh, format check, report."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers import notebooks, plots
from helpers.notebooks import NotebookFailed
from helpers.notebooks.format import normalised
from helpers.notebooks.run import declared_parameters
from helpers.runtime import ROOT, CourseError

PARAMETERS = "profile = 'recorded'  # or quick, paper\nsteps = 3\nrate = 0.5"
PLOT = """import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(5, 2.5))
axes.plot(range(steps), marker="o")
plt.close(figure)
figure"""
OPENING = """# {title}

**Question.** Does *notebook* {name} hold
what it promises? It should.

**Running time:** 1 s."""
SOLVED = "1 because\n2 because\n3 because\n"
EXERCISES = ("Why?", "And then?", "What if?")
REFERENCES = (
    """## References

[next](02_second.ipynb#References), [first](01_first.ipynb), [none](09_none.ipynb), [own](#Twice), [data](data.csv),
[elsewhere](https://example.org/02_second.ipynb), [long](https://example.org/"""
    + "x" * 300
    + ")."
)


def build(path: Path, *code: str, title: str | None = None, parameters: str = PARAMETERS) -> Path:
    """A notebook that the format check accepts once refreshed; `code` cells go between parameters and exercises."""
    cells = [
        new_markdown_cell(OPENING.format(title=title or f"The {path.stem}", name=path.stem)),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(source) for source in code]
    cells += [new_markdown_cell(f"Paragraph {number}, with $x^2$.") for number in range(17)]
    cells[-2:] = [new_markdown_cell("## Once"), new_markdown_cell("## Twice")]
    cells += [new_markdown_cell("## Exercises\n\nEach has its solution.")]
    for number, exercise in enumerate(EXERCISES, 1):
        cells += [
            new_markdown_cell(f"**{number}.** {exercise}"),
            new_code_cell(f"# Solution {number}\nprint({number}, 'because')", metadata={"tags": ["solution"]}),
        ]
    cells += [new_markdown_cell(REFERENCES)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def code_text(path: Path) -> str:
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="session")
def course(tmp_path_factory) -> Path:
    """Three notebooks, refreshed once: what `make notebooks` leaves behind. Tests copy it or leave it as it is."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    build(
        folder / "01_first.ipynb",
        "print(profile)\nprint(steps)",
        "import os\nprint(os.path.exists('01_first.ipynb'))",
        title="First of *three*",
    )
    second = build(folder / "02_second.ipynb", PLOT, "1 / 0", "import sys")
    notebook = nbformat.read(second, 4)
    notebook.cells[3].metadata["tags"] = ["raises-exception"]
    notebook.cells.insert(3, new_markdown_cell("*What to see:* the line & its points rise.\n\nMore.", id="see"))
    nbformat.write(notebook, second)
    build(folder / "03_third.ipynb")
    (folder / "data.csv").touch()
    notebooks.refresh(folder)
    return folder


@pytest.fixture
def copy(course, tmp_path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for path in course.glob("*.ipynb"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ------------------------------------------------------------------------------------------------ listing, parameters


def test_listing_reads_order_titles_and_questions(course):
    found = notebooks.listing(course)
    assert [one.name for one in found] == ["01_first", "02_second", "03_third"]
    assert found[0].title == "First of three"
    assert found[1].question == "Does notebook 02_second hold what it promises?"


def test_notebooks_are_chosen_in_their_order(course):
    chosen = notebooks.choose(["03", "01_first", "03_third"], course)
    assert [one.name for one in chosen] == ["01_first", "03_third"]


def test_listing_of_nothing_and_of_rubbish(tmp_path):
    with pytest.raises(CourseError, match="No notebook"):
        notebooks.listing(tmp_path)
    for text in ("", "[]", '{"nbformat": 4, "nbformat_minor": 5, "cells": 3}'):
        path = tmp_path / "01_rubbish.ipynb"
        path.write_text(text)
        with pytest.raises(CourseError, match="cannot be read as a Jupyter notebook"):
            notebooks.listing(tmp_path)
        assert len(notebooks.check(path)) == 1
    with pytest.raises(CourseError, match="cannot be read"):
        declared_parameters(tmp_path / "missing.ipynb")


def test_declared_parameters(tmp_path):
    path = build(tmp_path / "01_a.ipynb", parameters=f"# comment\n\n{PARAMETERS}\nlow = -1\nflag = True")
    assert declared_parameters(path) == {"profile": "recorded", "steps": 3, "rate": 0.5, "low": -1, "flag": True}


@pytest.mark.parametrize(
    "line",
    [
        "steps: int = 3",
        "a = b = 1",
        "a, b = 1, 2",
        "a = dict(b=1)",
        "a = 1 + x",
        "import os",
        "a = (1, 2)",
        "a = [1]",
        "a = {'b': 1}",
        "a = None",
        "a = 1; b = 2",
        "profile = 'quick'",
        "a = [\n1]",
        "a =",
        "if True: pass",
        "a += 1",
    ],
)
def test_other_than_plain_literals_is_refused(tmp_path, line):
    path = build(tmp_path / "01_a.ipynb", parameters=f"profile = 'recorded'\n{line}")
    with pytest.raises(CourseError, match=r"01_a\.ipynb, line 2 of the parameters cell"):
        declared_parameters(path)


def test_number_of_parameters_cells(tmp_path):
    path = build(tmp_path / "01_a.ipynb")
    notebook = nbformat.read(path, 4)
    for count, tags in ((0, []), (2, ["parameters"])):
        notebook.cells[1].metadata["tags"] = tags
        notebook.cells[2:2] = [new_code_cell("a = 1", metadata={"tags": tags})]
        nbformat.write(notebook, path)
        with pytest.raises(CourseError, match=f"has {count} code cells tagged"):
            declared_parameters(path)


# ----------------------------------------------------------------------------------------------------------- execute


@pytest.mark.parametrize(
    "parameters, complaint",
    [
        ({"speed": 1}, r"no parameter 'speed'; it declares profile = 'recorded', steps = 3"),
        ({"steps": "3"}, r"cannot take steps = '3', a str"),
        ({"steps": True}, "a bool"),
        ({"steps": 3.0}, "a float"),
        ({"rate": "fast"}, "a str"),
        ({"profile": None}, "a NoneType"),
    ],
)
def test_parameters_are_strict(tmp_path, parameters, complaint):
    path, output = build(tmp_path / "01_a.ipynb"), tmp_path / "out.ipynb"
    with pytest.raises(CourseError, match=complaint):
        notebooks.execute(path, output, parameters)
    assert not output.exists()


def test_execute_passes_parameters_and_leaves_no_machine_path(tmp_path):
    tricky = "quotes ' \" and \\ {braces} é\nnewline"
    path = build(
        tmp_path / "odd folder" / "01_a.ipynb",
        "import os\nprint(repr(profile), steps, rate)",
        "print(os.path.basename(os.getcwd()))",
    )
    output = tmp_path / "odd folder" / "new" / "01_a.ipynb"
    before, here = path.read_bytes(), os.getcwd()
    notebooks.execute(path, output, {"profile": tricky, "rate": 1})
    assert code_text(output) == f"{tricky!r} 3 1.0\nodd folder\n" + SOLVED
    assert str(tmp_path) not in output.read_text()
    assert path.read_bytes() == before and os.getcwd() == here
    assert [file.name for file in output.parent.iterdir()] == ["01_a.ipynb"]  # no temporary left


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("raise ValueError('first line\\nthe last line')", "ValueError: the last line"),
        ("import time; time.sleep(60)", "more than 2 seconds"),
        ("import os; os._exit(1)", "the kernel died"),
    ],
)
def test_failing_cell_is_named_and_what_ran_is_kept(tmp_path, code, complaint):
    path = build(tmp_path / "01_a.ipynb", "print('as far as here')", "", code, "print('never')")  # "" has no number
    output = tmp_path / "out" / "01_a.ipynb"
    with pytest.raises(NotebookFailed, match=rf"^01_a\.ipynb failed in cell In \[3\]: .*{complaint}") as caught:
        notebooks.execute(path, output, timeout=2)
    assert "\n" not in str(caught.value)
    assert code_text(output).startswith("as far as here")
    assert "never\n" not in code_text(output)
    assert [file.name for file in output.parent.iterdir()] == ["01_a.ipynb"]


def test_output_that_cannot_be_written(tmp_path):
    path = build(tmp_path / "01_a.ipynb")
    (tmp_path / "taken.ipynb").mkdir()
    with pytest.raises(CourseError, match="Cannot write"):
        notebooks.execute(path, tmp_path / "taken.ipynb")
    assert [file.name for file in tmp_path.iterdir()] == ["01_a.ipynb", "taken.ipynb"]


# ------------------------------------------------------------------------------------------- navigation and refresh


def test_navigation_at_the_ends_and_twice(copy):
    first, second, third = (nbformat.read(one.path, 4).cells for one in notebooks.listing(copy))
    sections = "[Once](#Once) · [Twice](#Twice) · [Exercises](#Exercises) · [References](#References)"
    assert first[-1].source == "Contents · [The 02_second →](02_second.ipynb)"
    assert first[0].source == f"{first[-1].source}\n\n{sections}"
    assert second[-1].source == (
        "[← First of three](01_first.ipynb) · [Contents](01_first.ipynb) · [The 03_third →](03_third.ipynb)"
    )
    assert third[-1].source == "[← The 02_second](02_second.ipynb) · [Contents](01_first.ipynb)"
    assert [cell.id for cell in (first[0], third[-1])] == ["navigation-above", "navigation-below"]
    assert notebooks.navigate(copy) == []  # refreshed already: nothing to do
    (copy / "02_second.ipynb").unlink()
    assert [path.name for path in notebooks.navigate(copy)] == ["01_first.ipynb", "03_third.ipynb"]
    assert notebooks.navigate(copy) == []


def test_refresh_twice_gives_the_same_bytes(copy, capsys):
    before = {path.name: path.read_bytes() for path in copy.glob("*.ipynb")}
    notebooks.refresh(copy)
    lines = capsys.readouterr().out.splitlines()
    assert {path.name: path.read_bytes() for path in copy.glob("*.ipynb")} == before
    assert len(lines) == 3 and all(line.endswith("unchanged") for line in lines)
    text = b"".join(before.values()).decode()
    assert not re.search(r"papermill|execution\":|<Figure|3\.\d+\.\d+", text)
    assert "True" in code_text(copy / "01_first.ipynb")  # runs in the notebooks' folder


def test_only_what_is_asked_for_is_refreshed(copy, capsys):
    notebooks.refresh(copy, ["03"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("03_third ")


def test_refresh_keeps_a_failing_notebook_as_it_was(tmp_path):
    path = build(tmp_path / "notebooks" / "01_a.ipynb", "1 / 0")
    notebooks.navigate(path.parent)
    before = path.read_bytes()
    with pytest.raises(NotebookFailed, match="ZeroDivisionError: division by zero"):
        notebooks.refresh(path.parent)
    assert path.read_bytes() == before
    assert (tmp_path / "out" / "refresh" / "01_a.ipynb").exists()


# ------------------------------------------------------------------------------------------------------------- check


def test_check_passes_clean_notebooks(course):
    assert [notebooks.check(one.path) for one in notebooks.listing(course)] == [[], [], []]


def picture(mime="image/png"):
    return new_output("display_data", {mime: "iVBORw0KGgo="})


def set_source(at, text):
    return lambda nb: nb.cells[at].update(source=text)


def replace_source(at, old, new):
    return lambda nb: nb.cells[at].update(source=nb.cells[at].source.replace(old, new))


def add_output(kind, **output):
    return lambda nb: nb.cells[3].outputs.append(new_output(kind, **output))


def count(notebook):
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number


# cells of 01_first: 0 bar, 1 opening, 2 parameters, 3 and 4 code, 5.. paragraphs, -9 heading of the exercises,
# -8 and -7 exercise and solution 1, -6 and -5, -4 and -3, -2 references, -1 bar
FAULTS = {
    "no parameters cell": (lambda nb: nb.cells[2].metadata.clear(), "0 code cells tagged 'parameters'"),
    "computed parameter": (set_source(2, "profile = str('recorded')"), "line 1 of the parameters cell"),
    "no profile": (set_source(2, "steps = 3"), "default of `profile` is None"),
    "other profile": (set_source(2, "profile = 'quick'"), "default of `profile` is 'quick'"),
    "no bar": (lambda nb: nb.cells.pop(0), "navigation bars"),
    "old bar": (replace_source(-1, "The", "An"), "navigation bars"),
    "bar in the middle": (lambda nb: nb.cells[6].metadata.update(tags=["navigation"]), "navigation bars"),
    "kernel": (lambda nb: nb.metadata.kernelspec.update(name="my-env"), "kernel"),
    "kernel's name": (lambda nb: nb.metadata.kernelspec.update(display_name="Python 3 (ipykernel)"), "kernel"),
    "counts": (lambda nb: nb.cells[3].update(execution_count=7), "execution counts are not 1 to 6"),
    "no count": (lambda nb: nb.cells[4].update(execution_count=None), "execution counts"),
    "error": (add_output("error", ename="KeyError", evalue="", traceback=[]), "stores an error: ['KeyError']"),
    "path in a traceback": (
        lambda nb: (
            nb.cells[3].metadata.update(tags=["raises-exception"]),
            add_output("error", ename="E", evalue="", traceback=["File /home/anna/x.py"])(nb),
        ),
        "shows a machine's path, /home/",
    ),
    "long line": (add_output("stream", name="stdout", text="x\n" + "y" * 106), "prints a line of 106 characters"),
    "stderr": (add_output("stream", name="stderr", text="warning"), "stderr"),
    "widget": (add_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}), "widget"),
    "widget state": (lambda nb: nb.metadata.update(widgets={}), "state of widgets"),
    "svg": (add_output("display_data", data={"image/svg+xml": "<svg/>"}), "PNG only"),
    "home in source": (set_source(6, "Look into `/home/anna/data`."), "names a machine's path, /home/"),
    "root in source": (set_source(6, f"{ROOT}/data"), "names a machine's path"),
    "tmp in output": (add_output("stream", name="stdout", text="x\n/tmp/x"), "shows a machine's path, /tmp/"),
    "Windows path": (add_output("display_data", data={"text/html": r"C:\Users\anna"}), "machine's path"),
    "address": (add_output("display_data", data={"text/plain": "<a.B object at 0x7f00aa>"}), "address"),
    "too large": (set_source(6, "word " * 70_000), "at most 300 KB"),
    "too few cells": (lambda nb: [nb.cells.pop(5) for _ in range(3)], "has 19 cells before its exercises"),
    "too many cells": (lambda nb: [nb.cells.insert(5, new_markdown_cell("x")) for _ in range(51)], "73 cells"),
    "long cell": (set_source(3, "x = 1\n\n" * 11), "more than 10 lines of code"),
    "to do": (set_source(6, "TODO: write"), "still has something to do"),
    "picture unexplained": (lambda nb: nb.cells[3].outputs.append(picture()), "no `*What to see:*` follows"),
    "solution's picture": (lambda nb: nb.cells[-3].outputs.append(picture()), "no `*What to see:*` follows"),
    "no alt text": (set_source(6, "![](data/cat.png)"), "without alt text"),
    "no title": (replace_source(1, "# First", "First"), "no title heading"),
    "no question": (replace_source(1, "Question", "Topic"), "does not state the Question"),
    "no running time": (replace_source(1, "Running", "Some"), "Running time"),
    "no exercises": (replace_source(-9, "## Exercises", "### Exercises"), "no cell with the heading '## Exercises'"),
    "exercise without a number": (replace_source(-6, "**2.**", "2."), "Exercise 2 is not a cell of text"),
    "two exercises": (lambda nb: [nb.cells.pop(-3), nb.cells.pop(-3), count(nb)], "Exercise 3 is not a cell of text"),
    "no solution": (lambda nb: [nb.cells.pop(-7), count(nb)], "Exercise 1 is not followed by a code cell"),
    "solution untagged": (lambda nb: nb.cells[-7].metadata.pop("tags"), "Exercise 1 is not followed by a code cell"),
    "solution of another": (replace_source(-5, "2\n", "1\n"), "exercise 2 is not '# Solution 2' and code"),
    "empty solution": (set_source(-3, "# Solution 3\n"), "exercise 3 is not '# Solution 3' and code"),
    "solution not folded": (lambda nb: nb.cells[-3].metadata.pop("jupyter"), "exercise 3 is not folded"),
    "a fourth solution": (lambda nb: nb.cells[4].metadata.update(tags=["solution"]), "4 cells tagged 'solution'"),
    "folded text": (set_source(6, "<details><summary>More</summary></details>"), "a solution is a code cell"),
    "heading in brackets": (set_source(6, "## Levels [0, 1]"), "does not jump to ['Levels [0, 1]']"),
    "heading with a foreign letter": (set_source(6, "## Which \N{GREEK SMALL LETTER ALPHA}?"), "does not jump to"),
    "no references": (set_source(-2, "Nobody."), "no heading References"),
    "star import": (set_source(3, "from os import *"), "star"),
    "unknown tag": (lambda nb: nb.cells[3].metadata.update(tags=["important"]), "unknown tag: ['important']"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_each_fault(copy, fault):
    plant, complaint = FAULTS[fault]
    path = copy / "01_first.ipynb"
    notebook = nbformat.read(path, 4)
    plant(notebook)
    nbformat.write(notebook, path)
    if fault.startswith(("heading", "no exercises", "no references")):
        notebooks.navigate(copy)  # the bar names the sections
    problems = notebooks.check(path)
    assert any(complaint in problem for problem in problems), problems
    assert len(problems) == 1 and problems[0].startswith("01_first.ipynb") and "\n" not in problems[0], problems


def test_check_accepts_what_looks_like_a_fault(copy):
    path = copy / "01_first.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[6].source = "See https://example.org/home/page and ../home/tmp/x; a mastodon; `from os import path`."
    notebook.cells[3].outputs += [picture(), new_output("stream", name="stdout", text=("y" * 105 + "\n") * 2)]
    notebook.cells.insert(4, new_markdown_cell("*What to see:* the curve flattens."))
    notebook.cells[-3].outputs.append(picture())
    notebook.cells[-3].source += "\n# What to see: the curve\n# flattens."
    nbformat.write(notebook, path)
    assert notebooks.check(path) == []


def test_check_of_a_misnamed_file(copy):
    path = (copy / "01_first.ipynb").rename(copy / "first.ipynb")
    assert notebooks.check(path) == ["first.ipynb: The file is not named like 01_name.ipynb."]


# ------------------------------------------------------------------------------------------------ reproduce and report


RESULTS = {"quick/0": {"accuracy": 0.5, "note": "a | b"}, "images": 100}


@pytest.fixture(scope="session")
def reproduced(course, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quick"
    summary = notebooks.reproduce(
        "quick",
        out,
        None,
        {"steps": 5, "pictures": "drawn"},
        data_source="stand-in <set>",
        results=lambda: RESULTS if (out / "03_third.ipynb").exists() else {},
        folder=course,
    )
    return out, summary


def test_reproduce_runs_everything_and_sums_up(reproduced):
    out, summary = reproduced
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["profile"], summary["state"], summary["data_source"]) == ("quick", "passed", "stand-in <set>")
    assert [record["state"] for record in summary["notebooks"].values()] == ["passed"] * 3
    assert all(record["seconds"] > 0 for record in summary["notebooks"].values())
    assert summary["results"] == RESULTS
    assert code_text(out / "01_first.ipynb") == "quick\n5\nTrue\n" + SOLVED
    assert sorted(path.name for path in out.iterdir()) == [
        "01_first.ipynb",
        "02_second.ipynb",
        "03_third.ipynb",
        "report.html",
        "summary.json",
    ]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = self.style = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "style":
            self.style += data
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [attrs[attribute] for name, attrs in self.found if tag in (name, "*") and attribute in attrs]


def needs_nothing_else(page: Page) -> None:
    """It opens in a browser without a network or other files: pictures with words beside them inside, no script."""
    assert all(source.startswith("data:image/png;base64,") for source in page.values("*", "src"))
    assert page.count("img") == len(page.values("img", "src")) == sum(map(bool, page.values("img", "alt")))
    assert [page.count(tag) for tag in ("script", "link", "iframe", "object")] == [0, 0, 0, 0]
    assert not re.search(r"@import|url\(", page.style)


def test_report_is_one_page_whose_anchors_resolve(reproduced, course):
    page = Page(reproduced[0] / "report.html")
    assert [page.count(tag) for tag in ("html", "head", "main")] == [1, 1, 1]
    assert page.values("section", "id") == ["contents", "01_first", "02_second", "03_third"]
    ids, links = page.values("*", "id"), page.values("a", "href")
    assert len(ids) == len(set(ids))
    assert links and all(link[1:] in ids for link in links if link.startswith("#"))
    assert {"#01_first", "#02_second-References", "#02_second-Twice", "09_none.ipynb"} <= set(links)
    assert {link for link in links if link.endswith(".ipynb")} == {
        "https://example.org/02_second.ipynb",
        "09_none.ipynb",
    }
    assert os.path.relpath(course / "data.csv", reproduced[0]) in links
    assert page.values("img", "alt") == ["the line & its points rise."]
    needs_nothing_else(page)
    assert [page.count(tag) for tag in ("nav", "math", "details", "summary")] == [1, 3 * 17 - 6, 9, 9]
    for text in ("First of three", "stand-in <set>", "accuracy", "0.5", "a | b", "Does notebook 02_second hold"):
        assert text in page.text
    assert "navigation" not in " ".join(ids)


def test_the_course_as_stored_is_one_page(course, tmp_path):
    (tmp_path / "notebooks").mkdir()
    for path in course.iterdir():
        (tmp_path / "notebooks" / path.name).write_bytes(path.read_bytes())
    first = tmp_path / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(first, 4)
    notebook.cells[6].source = "![A dot](dot.png) and $\\foo{x}$, but $\\mathcal N(0, 1)$."
    nbformat.write(notebook, first)
    Image.new("RGB", (1, 1)).save(tmp_path / "notebooks" / "dot.png")
    page = Page(notebooks.course_report(tmp_path / "out" / "report.html", tmp_path / "notebooks"))
    needs_nothing_else(page)
    assert page.values("section", "id") == ["contents", "01_first", "02_second", "03_third"]
    assert page.values("img", "alt") == ["A dot", "the line & its points rise."]
    assert page.values("code", "class") == ["tex"] and "\\foo{x}" in page.text, "what no converter knows stays"
    assert "𝒩" in page.text and "$" not in page.text.replace("$x^2$", "")
    assert "../notebooks/data.csv" in page.values("a", "href")


def test_several_pictures_of_a_cell_are_numbered_and_their_alt_text_is_free_of_tex(course, tmp_path):
    path = tmp_path / "02_second.ipynb"
    notebook = nbformat.read(course / path.name, 4)
    outputs = next(cell.outputs for cell in notebook.cells if "image/png" in str(cell.get("outputs")))
    outputs.append(picture())
    see = next(cell for cell in notebook.cells if cell.id == "see")
    cited = "([Zhang et al.](https://arxiv.org/abs/1710.09412))"
    see.source = f'*What to see:* at $\\alpha = 0.2$ most $\\lambda < 0.1$, "few" in the middle {cited}.'
    nbformat.write(notebook, path)
    page = Page(notebooks.course_report(tmp_path / "report.html", tmp_path))
    said = 'at α=0.2 most λ<0.1, "few" in the middle (Zhang et al.).'
    assert page.values("img", "alt") == [f"figure 1 of 2: {said}", f"figure 2 of 2: {said}"]


def test_the_report_of_the_committed_notebooks(tmp_path):
    page = Page(notebooks.course_report(tmp_path / "report.html"))
    needs_nothing_else(page)
    ids, links = page.values("*", "id"), page.values("a", "href")
    assert len(ids) == len(set(ids))
    assert [link for link in links if link.startswith("#") and link[1:] not in ids] == []
    assert [link for link in links if not link.startswith(("#", "http")) and not (tmp_path / link).exists()] == []
    assert "tex" not in page.values("code", "class"), "every formula is one that the report can set"
    assert page.count("math") > 100 and page.count("img") > 30


def test_reproduce_goes_on_after_a_failure_and_removes_only_its_own(tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    build(folder / "01_bad.ipynb", "raise SystemError('no | luck, *all* $x_1$ [a](b) _c_ <d> `e`')")
    build(folder / "02_good.ipynb", "print('went on')", parameters="profile = 'recorded'\nextra = 1")
    summary = notebooks.reproduce("recorded", out, folder=folder)
    assert summary["state"] == "failed"
    assert [record["state"] for record in summary["notebooks"].values()] == ["failed", "passed"]
    assert "In [3]: SystemError: no | luck" in capsys.readouterr().out  # as numbered in the executed copy
    shown = Page(out / "report.html").text
    assert "In [3]: SystemError: no | luck, *all* $x_1$ [a](b) _c_ <d> `e`; what ran" in shown, "letter for letter"

    (out / "mine.txt").write_text("keep me")
    (out / ".02_good.ipynb.12.tmp").write_text("half of a notebook, left by a run that was killed")
    summary = notebooks.reproduce("recorded", out, ["02"], {"pictures": "drawn"}, folder=folder)
    assert list(summary["notebooks"]) == ["02_good"] and summary["results"] == {}
    assert "01_bad" not in (out / "report.html").read_text()
    assert {path.name for path in out.iterdir()} == {
        "01_bad.ipynb",
        "02_good.ipynb",
        "mine.txt",
        "report.html",
        "summary.json",
    }


def test_reproduce_refuses_before_anything_runs(course, tmp_path):
    def refused(match, profile="quick", **more):
        with pytest.raises(CourseError, match=match):
            notebooks.reproduce(profile, tmp_path / "out", folder=course, **more)

    refused("no profile 'fast': expected one of recorded, quick, paper", profile="fast")
    refused("no notebook '09'", only=["01", "09"])
    refused("cannot take steps = 'many'", extra_parameters={"steps": "many"})
    assert not (tmp_path / "out").exists()


def stored(png: bytes) -> tuple[int, np.ndarray]:
    """How many bytes a notebook stores of a picture, and how many levels each value is then off."""
    output = new_output("display_data", {"image/png": base64.b64encode(png).decode()})
    kept = normalised(new_notebook(cells=[new_code_cell("x", outputs=[output])])).cells[0].outputs[0].data["image/png"]
    kept = base64.b64decode(kept)
    before, after = (np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).astype(int) for one in (png, kept))
    return len(kept), np.abs(after - before)


def test_a_stored_plot_keeps_the_colour_of_its_only_blue_mark():
    g, marks = np.random.default_rng(0), {"blue": 1, "orange": 3, "green": 120, "red": 20, "pink": 3}
    figure = plots.diagonal({name: g.random((2, count)) for name, count in marks.items()}, "", "x", "y", join=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    plt.close(figure)
    size, off = stored(buffer.getvalue())
    assert size < len(buffer.getvalue()) / 2
    assert off.max() <= 32


def test_a_stored_picture_keeps_its_colours():
    hue, value = np.meshgrid(np.arange(256), np.repeat([230, 120, 40], 60))
    value = value + np.random.default_rng(0).integers(0, 25, value.shape)  # else it takes fewer bytes as it is
    bright, dull = (np.stack([hue, np.full_like(hue, saturation), value], axis=2) for saturation in (255, 90))
    buffer = io.BytesIO()
    Image.fromarray(np.vstack([bright, dull]).astype(np.uint8), "HSV").convert("RGB").save(buffer, "PNG")
    size, off = stored(buffer.getvalue())
    assert size < len(buffer.getvalue()) / 2
    assert off.max() <= 32 and off.mean() < 6
