"""The course as it is committed: the form of the notebooks, a real run of one without data, what the README says."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import data, exchange, notebooks, runs, runtime
from helpers.notebooks.report import TITLE
from helpers.runtime import ROOT

NOTEBOOKS = [entry.path for entry in notebooks.listing()]


def test_the_seven_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_start_here", "01_data_inspection", "02_se_resnet", "03_augmentation", "04_mixup", "05_training_run",
        "06_beyond_the_paper",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_form_of_a_committed_notebook(path):
    assert notebooks.check(path) == []


def test_without_data_a_notebook_runs_on_the_stand_in_and_says_so(without_cifar10, tmp_path):
    """A real papermill run; the other notebooks take the same path in `make reproduce`."""
    summary = notebooks.reproduce("quick", tmp_path, ["00"], {"pictures": "drawn"}, data_source=data.STAND_IN)
    assert summary["state"] == "passed" and list(summary["notebooks"]) == ["00_start_here"]
    assert json.loads((tmp_path / "summary.json").read_text())["data_source"] == "stand-in"
    executed = nbformat.read(tmp_path / "00_start_here.ipynb", 4)
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert data.BANNER in printed
    assert "stand-in" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_parameter_that_a_notebook_does_not_know_is_refused_first(path):
    code = {cell.id: cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"}
    for name in re.findall("^(profile|pictures) =", code["parameters"], re.MULTILINE):
        given = {"profile": "quick", "pictures": "drawn", "runtime": runtime} | {name: "quik"}
        with pytest.raises(runtime.CourseError, match=r"^There is no .*'quik': expected one of \w+, \w+"):
            exec(code["derived"], given)


def test_no_photograph_is_published():
    """The committed notebooks ran with drawn pictures, which a parameter of theirs says."""
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        (parameters,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert "pictures" not in parameters or re.search(r'^pictures = "drawn"', parameters, re.MULTILINE)


def test_every_recorded_run_is_on_cifar10_and_whole():
    recorded = runs.load()
    assert set(recorded.data) == {data.CIFAR10}
    for row in recorded.itertuples():
        assert len(row.history) == row.epochs and row.history.epoch.tolist() == list(range(1, row.epochs + 1))
        best = row.history.loc[row.history.val_accuracy.idxmax()]
        assert best.epoch == row.best_epoch and best.val_accuracy == pytest.approx(row.val_accuracy, abs=1e-6)
        assert row.test_count == 10_000 and row.test_low < row.test_accuracy < row.test_high
        assert re.fullmatch(r"[0-9a-f]{40}", row.commit), "recorded from a clean checkout"


def test_no_recorded_run_contradicts_itself(tmp_path):
    """As an archive's runs are looked at when they come in: history, confusion, interval and tables say the same."""
    for path in filter(Path.is_dir, sorted(runs.RECORDED.glob("*/*"))):  # beside them lie tables of several seeds
        no_weights = shutil.ignore_patterns("*.safetensors")
        folder = shutil.copytree(path, tmp_path / path.parent.name / path.name, ignore=no_weights)
        exchange.check(folder, "/".join(path.parts[-2:]), recorded=True, stand_in=False)


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cited["title"] == TITLE and (ROOT / "README.md").read_text().startswith(f"# {TITLE}\n")
    (paper,) = cited["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Bhatt", "Mai", "Garg"]
