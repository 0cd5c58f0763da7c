"""Numbers and pictures in the committed notebooks are those of the store: nbval compares what is tagged, so what comes
from recorded runs must be tagged; and below a published figure stands its alt text.
"""

import ast
import re

import nbformat
import pytest

from helpers import figures, notebooks
from helpers.notebooks.format import SEE

NOTEBOOKS = [entry.path for entry in notebooks.listing()]
STORE = re.compile(r"\b(runs\.(load|find|read|current)|sweep\.results|bench\.recorded|figures\.\w+\()")


def code(path) -> list[tuple]:
    """(cell, the cell below) of each code cell."""
    cells = nbformat.read(path, 4).cells
    return [(cell, below) for cell, below in zip(cells, [*cells[1:], None], strict=True) if cell.cell_type == "code"]


def from_store(cells) -> list:
    """The cells that name something which came, however indirectly, out of the run store."""
    tainted, found = set(), []
    for cell in cells:
        tree = ast.parse(re.sub(r"^[%!].*$", "", cell.source, flags=re.MULTILINE))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if names & tainted or STORE.search(cell.source):
            found.append(cell)
        for _ in range(2):  # twice: what a line needs may be assigned further down in a loop
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign | ast.AugAssign | ast.For | ast.comprehension | ast.FunctionDef):
                    source = ast.unparse(node)
                    read = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                    if read & tainted or STORE.search(source):
                        if isinstance(node, ast.FunctionDef):
                            tainted.add(node.name)
                            continue
                        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                        tainted |= {part.id for target in targets for part in ast.walk(target)
                                    if isinstance(part, ast.Name)}  # fmt: skip
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_prints_from_the_store_is_compared(path):
    """Text in a cell of its own, tagged; a picture's cell cannot be compared, so it prints no number."""
    for cell in from_store([cell for cell, _ in code(path) if "solution" not in cell.metadata.get("tags", [])]):
        outputs = cell.get("outputs", [])
        printed = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
        numbers = re.search(r"\d", "\n".join(printed))
        tagged = "nbval-check-output" in cell.metadata.get("tags", [])
        assert tagged or not numbers, f"{path.name}, cell {cell.id}: tag it, or print in a cell without a picture"


# What draws a published figure -> its entry in figures.ALT
DRAWN = {
    "figures.training_accuracy(": "figure_2_training_accuracy", "figures.loss(": "figure_3_loss",
    "figures.validation_accuracy(": "figure_4_validation_accuracy", "figures.ladder(": "ladder",
    "figures.vary(": "varied", "figures.kind_severity(": "kind_severity",
    "figures.epochs(": "epochs",
    "figures.climb(": "climb", "figures.approach(": "approach", "figures.predicted_accuracy(": "predicted_accuracy",
    "figures.reported(": "reported_reproduced",
}  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_below_a_published_figure_stands_its_alt_text(path):
    """So that README, notebook and report, which takes the sentence below as alt, say the same of a picture."""
    for cell, below in code(path):
        shows = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        for name in (DRAWN[call] for call in DRAWN if shows and call in cell.source):
            text = " ".join(below.source[SEE.match(below.source).end() :].replace("*", "").split())
            said = re.sub(r"^Figure \d, ", "", text).lower()
            assert said.startswith(figures.ALT[name].lower()), f"{path.name}, cell {below.id}: begin with ALT[{name!r}]"


def test_every_published_figure_has_its_words():
    assert {*DRAWN.values(), "figure_1_architecture"} == set(figures.ALT)
    assert figures.alt("ladder_x") == figures.ALT["ladder"] and figures.alt("varied_x_y") == figures.ALT["varied"]
    assert not any(map(figures.alt, ("ladder", "nothing", "ladderx")))
