"""The form of the committed notebooks: navigation bars, outputs of one clean run, and a check of every rule."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from PIL import Image, ImageChops

from helpers.notebooks.run import (
    NOTEBOOKS,
    Notebook,
    choose,
    declared_parameters,
    execute,
    listing,
    opening,
    plain,
    read,
    tags,
    write,
)
from helpers.runtime import ROOT, CourseError

TAGS = {"parameters", "navigation", "solution", "nbval-check-output", "nbval-ignore-output", "raises-exception"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
HIDDEN = {"source_hidden": True, "outputs_hidden": True}  # what JupyterLab keeps folded of a solution
MAX_BYTES, MIN_CELLS, MAX_CELLS, MAX_LINES, EXERCISES = 300_000, 20, 72, 10, 3
MAX_WIDTH = 105  # of a printed line, in characters: a page 1,100 pixels wide breaks longer ones anywhere
SECTION = re.compile(r"^## +(.+?) *$", re.MULTILINE)
SEE = re.compile(r"\*{0,2}What to see\W+(?=\w)")

_MACHINE_PATH = re.compile(
    rf"(?<![\w.-])(?:/(?:home|Users|root|work|tmp)/|[A-Za-z]:\\+Users\\|{re.escape(str(ROOT))}/)"
)


def navigate(folder: Path = NOTEBOOKS) -> list[Path]:
    """Put the navigation bars (previous, contents, next; sections) around each notebook; returns those rewritten."""
    entries, rewritten = listing(folder), []
    for at, entry in enumerate(entries):
        notebook, metadata = read(entry.path), {"tags": ["navigation"]}
        body = [cell for cell in notebook.cells if "navigation" not in tags(cell)]
        ids = ("navigation-above", "navigation-below")
        bars = zip(_bars(entries, at, body), ids, strict=True)
        above, below = (new_markdown_cell(bar, id=name, metadata=metadata) for bar, name in bars)
        notebook.cells = [above, *body, below]
        if write(notebook, entry.path):
            rewritten.append(entry.path)
    return rewritten


def _bars(entries: list[Notebook], at: int, cells: list[NotebookNode]) -> tuple[str, str]:
    """The bars above and below a notebook: previous, contents, next; and above, the sections of the notebook."""
    before, after = entries[max(at - 1, 0) : at], entries[at + 1 : at + 2]
    parts = [f"[← {entry.title}]({entry.path.name})" for entry in before]
    parts += [f"[Contents]({entries[0].path.name})" if at else "Contents"]
    bar = " · ".join([*parts, *(f"[{entry.title} →]({entry.path.name})" for entry in after)])
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    sections = " · ".join(f"[{title}](#{anchor(title)})" for title in SECTION.findall(text))
    return f"{bar}\n\n{sections}" if sections else bar, bar


def anchor(heading: str) -> str:
    """The fragment by which JupyterLab, GitHub and nbconvert find a heading: its text with `-` for each space.

    JupyterLab compares it as it stands, without decoding, so what a link need not encode stays: `?` and `,`.
    """
    return quote(plain(heading).replace(" ", "-"), safe=";,/?:@&=+$!~*'()")


def refresh(folder: Path = NOTEBOOKS, only: Iterable[str] | None = None) -> None:
    """Bring the committed notebooks up to date in place: navigation, then outputs of one clean run, normalised.

    Runs each, or those named or numbered in `only`, with its defaults. Two refreshes with equal outputs write the same
    bytes. A notebook that fails stays as it was; what ran is under out/refresh/.
    """
    folder = Path(folder).resolve()
    navigate(folder)
    for entry in choose(only, folder):
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
        kept = {"tags": tags(cell)} if tags(cell) else {}
        cell.metadata = nbformat.from_dict(kept | ({"jupyter": HIDDEN} if "solution" in tags(cell) else {}))
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)  # <Figure size 640x480 with 1 Axes>
                output.data["image/png"] = _smaller(output.data["image/png"])
            if output.output_type == "error":  # one that is meant; the traceback names files of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return notebook


def _smaller(picture: str) -> str:
    """A PNG in base64 with a palette of 32, 64 or 128 colours where that takes fewer bytes: a third, for most plots.

    A rare colour of a plot, one mark among many, must not become another mark's: so the palette is spread over all
    colours, and the smallest is taken that comes near each. Pictures have too many: their largest palette moves to
    where most of their pixels are, so that a dull photograph does not turn grey.
    """
    image, buffer = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), io.BytesIO()
    for colours, moves in ((32, 0), (64, 0), (128, 1)):
        small = image.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=moves, dither=Image.Dither.NONE)
        if max(high for _, high in ImageChops.difference(image, small.convert("RGB")).getextrema()) <= 32:
            break
    small.save(buffer, "PNG", optimize=True)
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
    above, below = _bars(entries, at, [cell for cell in cells if "navigation" not in tags(cell)])
    bars = [(number, cell.source) for number, cell in enumerate(cells) if "navigation" in tags(cell)]
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    unreachable = [heading for heading in SECTION.findall(prose) if "%" in anchor(heading)]
    profile = declared_parameters(path).get("profile")
    exercises = next((at for at, cell in enumerate(cells) if cell.source.startswith("## Exercises")), None)
    body = len(cells) if exercises is None else exercises
    misplaced = "" if exercises is None else _exercise_problem(cells[exercises + 1 :])
    solutions = sum("solution" in tags(cell) for cell in cells)
    rules = [
        (profile != "recorded", f"The default of `profile` is {profile!r}, not 'recorded'."),
        (bars != [(0, above), (len(cells) - 1, below)], "The navigation bars are out of date: run `make notebooks`."),
        (notebook.metadata.get("kernelspec") != KERNEL, "The kernel is not exactly python3, shown as 'Python 3'."),
        ("widgets" in notebook.metadata, "It stores the state of widgets."),
        (size > MAX_BYTES, f"It is {size / 1000:.0f} KB; at most {MAX_BYTES // 1000} KB are allowed."),
        (
            not MIN_CELLS <= body <= MAX_CELLS,
            f"It has {body} cells before its exercises, not {MIN_CELLS} to {MAX_CELLS}.",
        ),
        (counts != [*range(1, len(counts) + 1)], f"The execution counts are not 1 to {len(counts)} in order."),
        (not entries[at].title, "The first cell after the navigation bar has no title heading."),
        (not entries[at].question, "The first cell after the bar does not state the Question, ending in a '?'."),
        ("Running time" not in start, "The first cell after the navigation bar does not state the Running time."),
        (exercises is None, "There is no cell with the heading '## Exercises'."),
        (unreachable, f"JupyterLab does not jump to {unreachable}: use letters, digits and simple punctuation."),
        ("<details" in prose, "It folds text in <details>: a solution is a code cell tagged 'solution'."),
        (misplaced, misplaced),
        (
            exercises is not None and not misplaced and solutions != EXERCISES,
            f"It has {solutions} cells tagged 'solution', not {EXERCISES}, one below each exercise.",
        ),
        (not re.search(r"^#+ .*References", prose, re.MULTILINE), "There is no heading References."),
    ]
    return [sentence for found, sentence in rules if found]


def _exercise_problem(cells: list[NotebookNode]) -> str:
    """What the cells below the heading Exercises are instead of three exercises, each followed by its solution."""
    for number in range(1, EXERCISES + 1):
        exercise, solution = [*cells, *[new_markdown_cell()] * 2 * EXERCISES][2 * number - 2 : 2 * number]
        first, _, rest = solution.source.partition("\n")
        if exercise.cell_type != "markdown" or not exercise.source.startswith(f"**{number}.** "):
            return f"Exercise {number} is not a cell of text that starts with '**{number}.** ', in its place."
        if solution.cell_type != "code" or "solution" not in tags(solution):
            return f"Exercise {number} is not followed by a code cell tagged 'solution'."
        if first.strip() != f"# Solution {number}" or not rest.strip():
            return f"The solution of exercise {number} is not '# Solution {number}' and code below that line."
        if not solution.metadata.get("jupyter", {}).get("source_hidden"):
            return f"The solution of exercise {number} is not folded: set jupyter.source_hidden in its metadata."
    return ""


def explanation(cell: NotebookNode, below: NotebookNode | None) -> str:
    """The 'What to see' of a cell's picture as plain text: in the text below or a solution's comments; '' if none."""
    if "solution" in tags(cell):
        text = re.sub(r"^# ?", "", cell.source, flags=re.MULTILINE)
        start = SEE.search(text)
    else:
        text = below.source if below is not None and below.cell_type == "markdown" else ""
        start = SEE.match(text)
    return plain(text[start.end() :].split("\n\n")[0]) if start else ""


def _cell_problems(cell: NotebookNode, below: NotebookNode | None) -> list[str]:
    source, code, outputs = cell.source, cell.cell_type == "code", cell.get("outputs", [])
    bundles = [output.get("data", {}) for output in outputs]
    mimes = {mime for bundle in [*bundles, *cell.get("attachments", {}).values()] for mime in bundle}
    foreign = sorted(mime for mime in mimes if mime.startswith("image/") and mime != "image/png")
    texts = [output.get("text", "") + "\n".join(output.get("traceback", [])) for output in outputs]
    texts += [str(value) for bundle in bundles for mime, value in bundle.items() if not mime.startswith("image/")]
    shows = "\n".join(texts)
    printed = "".join(output.text for output in outputs if output.output_type == "stream").splitlines()
    widest = max(map(len, printed), default=0)
    unknown = sorted(set(tags(cell)) - TAGS)
    errors = [output.ename for output in outputs if output.output_type == "error"]
    rules = [
        (unknown, f"has an unknown tag: {unknown}"),
        (re.search(r"\b(?:TODO|FIXME)\b", source), "still has something to do (TODO or FIXME)"),
        (found := _MACHINE_PATH.search(source), f"names a machine's path, {found and found[0]}"),
        (found := _MACHINE_PATH.search(shows), f"shows a machine's path, {found and found[0]}"),
        (re.search(r"<[\w.]+ [^<>]*at 0x[0-9a-f]+>", shows), "shows an object's address, which changes with each run"),
        (not code and re.search(r"!\[\s*\]\(", source), "has a picture without alt text"),
        (
            code and cell.id != "imports" and sum(map(bool, map(str.strip, source.splitlines()))) > MAX_LINES,
            f"has more than {MAX_LINES} lines of code: split it where a sentence helps, or move some to helpers",
        ),
        (code and re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.MULTILINE), "imports with a star"),
        (errors and "raises-exception" not in tags(cell), f"stores an error: {errors}"),
        (widest > MAX_WIDTH, f"prints a line of {widest} characters, above {MAX_WIDTH}: break it where it reads well"),
        (any(output.get("name") == "stderr" for output in outputs), "stores output on stderr"),
        (any("widget" in mime for mime in mimes), "shows a widget"),
        (foreign, f"shows {foreign}; pictures are PNG only"),
        (
            "image/png" in mimes and "nbval-check-output" in tags(cell),
            "compares its output, which is a picture: tag cells of text alone",
        ),
        (
            code and "image/png" in mimes and not explanation(cell, below),
            "shows a picture, but no `*What to see:*` follows it",
        ),
    ]
    return [sentence for found, sentence in rules if found]
