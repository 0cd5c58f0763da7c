"""Reads notebooks and runs them, with parameters that they declare and no others."""

from __future__ import annotations

import ast
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
from nbformat import NotebookNode

from helpers.runtime import ROOT, CourseError, refuse_unknown, replacing, shown

NOTEBOOKS = ROOT / "notebooks"
_TITLE = re.compile(r"^# +(.+?) *$", re.MULTILINE)
_QUESTION = re.compile(r"Question\W+([^?]+\?)")  # **Question.** What ...?
_ERROR_NOTE = "papermill-error-cell-tag"
TIMEOUTS = {"recorded": 3_600, "quick": 3_600, "paper": None}  # seconds a cell; one of the paper's trains for hours


class NotebookFailed(CourseError):
    """A cell raised, ran out of time or took the kernel with it; the notebook as far as it ran is kept."""


class Notebook(NamedTuple):
    """A numbered notebook: its file, its name (02_se_resnet), its title and the question it answers ('' if none)."""

    path: Path
    name: str
    title: str
    question: str


def read(path: Path) -> NotebookNode:
    """A notebook of format 4, validated. CourseError for anything else."""
    try:
        notebook = nbformat.v4.reads(Path(path).read_text(encoding="utf-8"))
        nbformat.validate(notebook)
    except Exception as error:  # there are many ways not to be a notebook
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CourseError(f"{shown(path)} cannot be read as a Jupyter notebook of format 4 ({reason}).") from error
    return notebook


def write(notebook: NotebookNode, path: Path) -> bool:
    """Write atomically; leave a file that already holds these bytes alone. True if it was written."""
    content = nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == content:
        return False
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return True


def tags(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def opening(notebook: NotebookNode) -> str:
    """The source of the first cell after the navigation bar: title, question, running time."""
    return next((cell.source for cell in notebook.cells if "navigation" not in tags(cell)), "")


def plain(markdown: str) -> str:
    """Markdown as one line without emphasis."""
    return " ".join(re.sub(r"[*`]", "", markdown).split())


def listing(folder: Path = NOTEBOOKS) -> list[Notebook]:
    """The notebooks NN_name.ipynb of a folder, in order. CourseError if there is none or one cannot be read."""
    entries = []
    for path in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")):
        found = (pattern.search(opening(read(path))) for pattern in (_TITLE, _QUESTION))
        entries.append(Notebook(path, path.stem, *(plain(match[1]) if match else "" for match in found)))
    if not entries:
        raise CourseError(f"No notebook named like 01_name.ipynb in {shown(folder)}: give the notebooks' folder.")
    return entries


def declared_parameters(path: Path) -> dict[str, Any]:
    """Name and default of each parameter, from the one cell tagged `parameters`.

    Each line is empty, a comment or `name = literal` with a number, a string, True or False. Anything else is a
    CourseError that names notebook and line.
    """
    cells = [cell for cell in read(path).cells if "parameters" in tags(cell) and cell.cell_type == "code"]
    if len(cells) != 1:
        raise CourseError(f"{path.name} has {len(cells)} code cells tagged 'parameters'; it must have exactly one.")
    declared: dict[str, Any] = {}
    for number, line in enumerate(cells[0].source.splitlines(), 1):
        value = None
        try:
            match ast.parse(line).body:
                case []:
                    continue
                case [ast.Assign(targets=[ast.Name(id=name)], value=literal)] if name not in declared:
                    value = ast.literal_eval(literal)
        except (SyntaxError, ValueError, TypeError):
            pass
        if type(value) not in (bool, int, float, str):
            raise CourseError(
                f"{path.name}, line {number} of the parameters cell, is not a new `name = literal` with a number, "
                f"a string, True or False: {line.strip()}"
            )
        declared[name] = value
    return declared


def _accepted(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, if the notebook declares each with the same type (a whole number may stand for a float)."""
    declared = declared_parameters(path)
    known = ", ".join(f"{name} = {default!r}" for name, default in declared.items()) or "none"
    accepted = {}
    for name, value in parameters.items():
        if name not in declared:
            raise CourseError(f"{path.name} has no parameter {name!r}; it declares {known}.")
        expected = type(declared[name])
        accepted[name] = float(value) if expected is float and type(value) is int else value
        if type(accepted[name]) is not expected:
            kind = type(value).__name__
            raise CourseError(f"{path.name} cannot take {name} = {value!r}, a {kind}: it declares {known}.")
    return accepted


def execute(path: Path, output: Path, parameters: Mapping[str, Any] | None = None, timeout: int | None = 3600) -> None:
    """Run a notebook in its own folder with the kernel `python3` and write the executed copy, atomically.

    `timeout` is in seconds a cell; None waits for ever. Raises CourseError before anything runs for a parameter the
    notebook does not declare or one of another type, and NotebookFailed when a cell fails; what ran until then is
    under `output`.
    """
    path, output = Path(path).resolve(), Path(output).resolve()
    accepted = _accepted(path, parameters or {})
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    failure = ""
    with replacing(output) as temporary:
        try:
            with warnings.catch_warnings(action="ignore"):  # the temporary does not end in .ipynb
                papermill.execute_notebook(
                    path, temporary, accepted, kernel_name="python3", language="python", cwd=path.parent,
                    progress_bar=False, execution_timeout=timeout, start_timeout=300, coalesce_streams=True,
                    store_widget_state=False,
                    extra_arguments=["--log-level=CRITICAL"])  # fmt: skip
        except papermill.PapermillExecutionError as error:
            failure = f"{error.ename}: {(error.evalue.strip().splitlines() or [''])[-1]}"
        except TimeoutError:
            failure = f"it ran for more than {timeout} seconds"
        except RuntimeError as error:
            failure = "the kernel died (often for want of memory)"
            if "respond" in str(error):
                failure = "the kernel did not start within five minutes: is the machine busy?"
        executed = read(temporary)
        raised = executed.metadata.pop("papermill").exception  # the rest of it names this machine's folders
        if _ERROR_NOTE in tags(executed.cells[0]) and not raised:
            failure = ""  # only cells tagged raises-exception raised, which papermill takes for a failure
            executed.cells = [cell for cell in executed.cells if _ERROR_NOTE not in tags(cell)]
        write(executed, temporary)
    if failure:
        begun = [cell for cell in executed.cells if cell.metadata.get("papermill", {}).get("start_time")]
        number = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in begun)
        raise NotebookFailed(f"{path.name} failed in cell In [{number}]: {failure}; what ran is in {shown(output)}")


def choose(only: Iterable[str] | None = None, folder: Path = NOTEBOOKS) -> list[Notebook]:
    """The notebooks named or numbered ("02") in `only`, in order; all for None. CourseError for another name."""
    only = None if only is None else list(only)
    known = {name: entry for entry in listing(folder) for name in (entry.name, entry.name[:2])}
    if unknown := set(only or ()) - known.keys():
        raise CourseError(f"There is no notebook {min(unknown)!r}: choose from {', '.join(known)}.")
    return sorted({known[name] for name in only or known})


def reproduce(profile: str, out_dir: Path, only: Iterable[str] | None = None,
              extra_parameters: Mapping[str, Any] | None = None, *, data_source: str | None = None,
              results: Callable[[], dict[str, Any]] | None = None, folder: Path = NOTEBOOKS) -> dict:  # fmt: skip
    """Run the notebooks in order with `profile=...` into `out_dir`: executed copies, report.html and summary.json.

    `only` picks notebooks by name or number ("02"). Each extra parameter goes to the notebooks that declare it. A
    notebook that fails is marked and the next one runs. What `results` returns, called after them, is the summary's
    "results". Returns the summary; bad requests are a CourseError before anything runs.
    """
    from helpers.notebooks.report import results_report  # which imports this module

    refuse_unknown(profile)
    plan = {}
    for entry in choose(only, folder):
        declared = declared_parameters(entry.path)
        extra = {name: value for name, value in (extra_parameters or {}).items() if name in declared}
        plan[entry] = _accepted(entry.path, {"profile": profile} | extra)
    out_dir = Path(out_dir).resolve()
    for name in ("report.html", "summary.json", *(entry.path.name for entry in plan)):
        (out_dir / name).unlink(missing_ok=True)
        for torn in out_dir.glob(f".{name}.*.tmp"):  # of a run that was killed
            torn.unlink()

    records: dict[str, dict[str, Any]] = {}
    for entry, parameters in plan.items():
        record = {"title": entry.title, "question": entry.question, "state": "passed"}
        began = time.monotonic()
        try:
            execute(entry.path, out_dir / entry.path.name, parameters, TIMEOUTS[profile])
        except NotebookFailed as error:
            record |= {"state": "failed", "error": str(error)}
        records[entry.name] = record | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{entry.name:<24} {records[entry.name]['seconds']:7.1f} s  {record.get('error', 'passed')}", flush=True)
    summary = {
        "profile": profile,
        "data_source": data_source,
        "state": "failed" if any("error" in record for record in records.values()) else "passed",
        "seconds": round(sum(record["seconds"] for record in records.values()), 1),
        "notebooks": records,
        "results": results() if results else {},
    }
    with replacing(out_dir / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results_report(out_dir, summary, folder)
    return summary
