"""The form of the committed notebooks: navigation bars, outputs of one clean run, and a check of every rule."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from PIL import Image

from helpers.notebooks.run import NOTEBOOKS, Notebook, declared_parameters, execute, listing, opening, read, tags, write
from helpers.runtime import ROOT, CourseError

TAGS = {"parameters", "navigation", "nbval-check-output", "nbval-ignore-output", "raises-exception"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
MAX_BYTES, MIN_CELLS, MAX_CELLS, MAX_LINES = 300_000, 20, 60, 30
SEE = re.compile(r"\*{0,2}What to see\W+(?=\w)")

_MACHINE_PATH = re.compile(
    rf"(?<![\w.-])(?:/(?:home|Users|root|work|tmp)/|[A-Za-z]:\\+Users\\|{re.escape(str(ROOT))}/)"
)


def navigate(folder: Path = NOTEBOOKS) -> list[Path]:
    """Put the navigation bar (previous, contents, next) first and last in each notebook; returns those rewritten."""
    entries, rewritten = listing(folder), []
    for at, entry in enumerate(entries):
        notebook, metadata = read(entry.path), {"tags": ["navigation"]}
        body = [cell for cell in notebook.cells if "navigation" not in tags(cell)]
        ids = ("navigation-above", "navigation-below")
        above, below = (new_markdown_cell(_bar(entries, at), id=name, metadata=metadata) for name in ids)
        notebook.cells = [above, *body, below]
        if write(notebook, entry.path):
            rewritten.append(entry.path)
    return rewritten


def _bar(entries: list[Notebook], at: int) -> str:
    before, after = entries[max(at - 1, 0) : at], entries[at + 1 : at + 2]
    parts = [f"[← {entry.title}]({entry.path.name})" for entry in before]
    parts += [f"[Contents]({entries[0].path.name})" if at else "Contents"]
    return " · ".join([*parts, *(f"[{entry.title} →]({entry.path.name})" for entry in after)])


def refresh(folder: Path = NOTEBOOKS) -> None:
    """Bring the committed notebooks up to date in place: navigation, then outputs of one clean run, normalised.

    Runs each with its defaults. Two refreshes with equal outputs write the same bytes. A notebook that fails stays as
    it was; what ran is under out/refresh/.
    """
    folder = Path(folder).resolve()
    navigate(folder)
    for entry in listing(folder):
        output = folder.parent / "out" / "refresh" / entry.path.name
        began = time.monotonic()
        execute(entry.path, output)
        changed = write(normalised(read(output)), entry.path)
        state = "rewritten" if changed else "unchanged"
        print(f"{entry.name:<24} {time.monotonic() - began:7.1f} s  {state}", flush=True)


def normalised(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run or from machine to machine."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)  # <Figure size 640x480 with 1 Axes>
                output.data["image/png"] = _smaller(output.data["image/png"])
            if output.output_type == "error":  # one that is meant; the traceback names files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return notebook


def _smaller(picture: str) -> str:
    """A PNG in base64 with a palette of 128 colours where that takes fewer bytes: a third, for most plots."""
    image, buffer = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    quantized = base64.b64encode(buffer.getvalue()).decode()
    return min(picture, quantized, key=len)


def check(path: Path) -> list[str]:
    """What a committed notebook breaks of the course's format, a sentence each; empty if nothing. Runs nothing."""
    path = Path(path)
    try:
        notebook = read(path)
        problems = _frame_problems(path, notebook)
        for number, (cell, below) in enumerate(zip(notebook.cells, [*notebook.cells[1:], None], strict=True), 1):
            problems += [f"Cell {number} {problem}." for problem in _cell_problems(cell, below)]
    except CourseError as error:
        problems = [str(error)]
    return [problem if path.name in problem else f"{path.name}: {problem}" for problem in problems]


def _frame_problems(path: Path, notebook: NotebookNode) -> list[str]:
    cells, start, size = notebook.cells, opening(notebook), path.stat().st_size
    entries = listing(path.parent)
    at = next((at for at, entry in enumerate(entries) if entry.path.name == path.name), None)
    if at is None:
        raise CourseError("The file is not named like 01_name.ipynb.")
    bar = _bar(entries, at)
    bars = [(number, cell.source) for number, cell in enumerate(cells) if "navigation" in tags(cell)]
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    profile = declared_parameters(path).get("profile")
    exercises = re.search(r"^#+ .*Exercises", prose, re.MULTILINE)
    rules = [
        (profile != "recorded", f"The default of `profile` is {profile!r}, not 'recorded'."),
        (bars != [(0, bar), (len(cells) - 1, bar)], "The navigation bars are not up to date: run `make notebooks`."),
        (notebook.metadata.get("kernelspec") != KERNEL, "The kernel is not exactly python3, shown as 'Python 3'."),
        ("widgets" in notebook.metadata, "It stores the state of widgets."),
        (size > MAX_BYTES, f"It is {size / 1000:.0f} KB; at most {MAX_BYTES // 1000} KB are allowed."),
        (not MIN_CELLS <= len(cells) <= MAX_CELLS, f"It has {len(cells)} cells, not {MIN_CELLS} to {MAX_CELLS}."),
        (counts != [*range(1, len(counts) + 1)], f"The execution counts are not 1 to {len(counts)} in order."),
        (not entries[at].title, "The first cell after the navigation bar has no title heading."),
        (not entries[at].question, "The first cell after the bar does not state the Question, ending in a '?'."),
        ("Running time" not in start, "The first cell after the navigation bar does not state the Running time."),
        (not exercises, "There is no heading Exercises."),
        (exercises and prose.count("<details", exercises.end()) < 2, "Fewer than two exercises have <details>."),
        (not re.search(r"^#+ .*References", prose, re.MULTILINE), "There is no heading References."),
    ]
    return [sentence for found, sentence in rules if found]


def _cell_problems(cell: NotebookNode, below: NotebookNode | None) -> list[str]:
    source, code, outputs = cell.source, cell.cell_type == "code", cell.get("outputs", [])
    bundles = [output.get("data", {}) for output in outputs]
    mimes = {mime for bundle in [*bundles, *cell.get("attachments", {}).values()] for mime in bundle}
    foreign = sorted(mime for mime in mimes if mime.startswith("image/") and mime != "image/png")
    texts = [output.get("text", "") + "\n".join(output.get("traceback", [])) for output in outputs]
    texts += [str(value) for bundle in bundles for mime, value in bundle.items() if not mime.startswith("image/")]
    shows = "\n".join(texts)
    unknown = sorted(set(tags(cell)) - TAGS)
    explained = below is not None and below.cell_type == "markdown" and SEE.match(below.source)
    errors = [output.ename for output in outputs if output.output_type == "error"]
    rules = [
        (unknown, f"has an unknown tag: {unknown}"),
        (re.search(r"\b(?:TODO|FIXME)\b", source), "still has something to do (TODO or FIXME)"),
        (found := _MACHINE_PATH.search(source), f"names a machine's path, {found and found[0]}"),
        (found := _MACHINE_PATH.search(shows), f"shows a machine's path, {found and found[0]}"),
        (re.search(r"<[\w.]+ [^<>]*at 0x[0-9a-f]+>", shows), "shows an object's address, which changes with each run"),
        (not code and re.search(r"!\[\s*\]\(", source), "has a picture without alt text"),
        (
            code and len(source.splitlines()) > MAX_LINES,
            f"has more than {MAX_LINES} lines of code: move some to helpers",
        ),
        (code and re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.MULTILINE), "imports with a star"),
        (errors and "raises-exception" not in tags(cell), f"stores an error: {errors}"),
        (any(output.get("name") == "stderr" for output in outputs), "stores output on stderr"),
        (any("widget" in mime for mime in mimes), "shows a widget"),
        (foreign, f"shows {foreign}; pictures are PNG only"),
        (
            "image/png" in mimes and "nbval-check-output" in tags(cell),
            "compares its output, which is a picture: tag cells of text alone",
        ),
        (code and "image/png" in mimes and not explained, "shows a picture, but no `*What to see:*` follows it"),
    ]
    return [sentence for found, sentence in rules if found]
