"""The command line, the Makefile and the promises of a checkout: what a newcomer types, and what they get wrong."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from types import SimpleNamespace

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from helpers import checkpoint, data
from helpers.__main__ import app, main
from helpers.notebooks import run
from helpers.runtime import ROOT, CourseError, replacing

NO_DATA = {"CIFAR10_ROOT": "/nonexistent/cifar"}


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch, capfd):
    """A command without images in this process, told of as a process is: one of its own spends seconds on imports."""

    def call(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["helpers", *map(str, arguments)])
            patch.setattr(warnings, "showwarning", warnings.showwarning)  # which main sets, as it does the signal
            patch.setattr(signal, "signal", lambda *_: None)
            for name, value in NO_DATA.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main()
        return subprocess.CompletedProcess(arguments, left.value.code or 0, *capfd.readouterr())

    return call


def refused(result) -> str:
    """The one sentence of a refusal: exit code 1, one line on stderr, no traceback."""
    assert result.returncode == 1, result
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr


def test_help_names_every_public_command():
    shown = command("--help").stdout
    for name in ("fetch", "train", "evaluate", "sweep", "runs", "distort", "bench", "figures", "reproduce", "report"):
        assert re.search(rf"\b{name}\b", shown)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help")])
def test_help_does_not_wait_for_torch(tmp_path, arguments):
    for package in ("torch", "numpy"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    assert "Usage:" in command(*arguments, PYTHONPATH=str(tmp_path)).stdout


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("train", "nope"), "no recipe 'nope': expected one of .*quick"),
    (("train",), "Give one recipe to train, as in `train paper`"),
    (("train", ""), "no recipe ''"),
    (("runs", "export", "x.zip", "--split-mb", "inf"), "--split-mb inf is out of range"),
    (("evaluate", ROOT / "data" / "runs" / "quick", "--out", "x"), "leave out --data, --corruptions and --out"),
    (("evaluate", "--weights", ROOT / "data" / "runs" / "quick"), "has 0 seeds with weights"),
    (("train", "quick", "--recipe", "quick"), "Give one recipe to train"),
    (("train", "--recipe", "quick", "--seed", "0", "--seeds", "2"), "--seed K .* or --seeds N .* not both"),
    (("train", "quick", "--seeds", "2", "--run-dir", "x"), "--run-dir is the folder of one run"),
    (("train", "quick", "--set", "epochs=0"), "epochs=0 is out of range: expected a whole number from 1 to 5,000"),
    (("train", "quick", "--set", "colour=red"), "no field 'colour': expected one of .*learning_rate"),
    (("train", "quick", "--set", "epochs"), "has no value"),
    (("train", "quick", "--set", "name=other"), "cannot change the name"),
    (("train", "quick", "--set", "seed=5"), "with --seed"),
    (("train", "quick", "--set", "epochs={[]: 1}"), "epochs='.*' is out of range"),
    (("train", "quick", "--set", "nesterov=1"), "nesterov=1 is unknown"),
    (("reproduce", "--only", "99"), "no notebook '99': choose from"),
    (("sweep", "nope"), "no recipe 'nope'"),
    (("sweep", "quick", "--root", ROOT / "README.md", "--stand-in"), "README.md is a file, and runs need a folder"),
    (("evaluate", "/nonexistent/run"), "is not a finished run"),
    (("evaluate", "--weights", "/nonexistent/w.safetensors"), "is not a finished run"),
    (("evaluate",), "Give one run to evaluate"),
    (("evaluate", "x", "--data", "y.npy", "--corruptions", "5"), "give it or --data, not both"),
    (("runs", "list", "--root", "/nonexistent"), "no finished run in /nonexistent"),
    (("runs", "export", "x.zip", "--root", "/nonexistent"), "no finished run to export"),
    (("runs", "export", "x.zip", "y", "--root", "z"), "or the --root that holds them, not both"),
    (("runs", "import", "/nonexistent.zip"), "There is no file /nonexistent.zip, and nothing was"),
    (("runs", "import", ROOT / "README.md"), "cannot be read, and nothing was taken in"),
    (("runs", "publish", ROOT / "data" / "weights" / "beyond.safetensors", "x.safetensors"), "is one file of weights"),
    (("sweep", "quick", "--base", "paper"), "--base paper changes nothing: of quick, none is a sweep"),
    (("sweep", "ladder", "--gpus-per-run", "0.5"), "--gpus-per-run is for --ray"),
    (("runs", "publish", "/nonexistent", "x.safetensors"), "is not a finished run"),
    (("bench", "distort", "nope"), "no benchmark 'nope'"),  # at once: the first takes minutes
    (("reproduce", "--profile", "nope"), "no profile 'nope'"),
    (("distort", "cifar10c", "--kind", "nope", "--stand-in"), "no distortion 'nope'"),
    (("distort", "competition-like", "--out", "/nonexistent/x.npy", "--stand-in"), "expected one that ends in .pkl"),
    (("train", "laptop"), "CIFAR-10 is not in "),
    (("reproduce", "--profile", "paper"), "could not be downloaded|Cannot write"),
])  # fmt: skip
def test_mistakes_are_one_sentence(here, arguments, sentence):
    assert re.search(sentence, refused(here(*arguments)))


def test_a_mistake_is_one_sentence_in_a_process_of_its_own():
    assert "no recipe 'nope'" in refused(command("train", "nope", **NO_DATA))


@pytest.mark.parametrize("package", ["torch", "pandas"])  # imported before, and by, the command
def test_ctrl_c_during_an_import_is_one_sentence(tmp_path, package):
    module = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    (tmp_path / f"{package}.py").write_text(module)
    result = command("runs", "list", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: stopped by Ctrl-C\n")


def test_train_then_evaluate_then_again(here, tmp_path):
    """The whole path on the drawn set: train, test, a second call that finds it done, another recipe refused."""
    changes = ("epochs=2", "train_size=200", "val_size=50", "width=8", "stem_stride=2")
    tiny = [*(word for change in changes for word in ("--set", change)), "--run-dir", tmp_path / "run"]
    first = command("train", "quick", *tiny, "--stand-in", **NO_DATA)
    assert first.returncode == 0, first.stderr
    banner, *lines = first.stdout.splitlines()
    assert banner.startswith("STAND-IN DATA")
    assert [line.split("epoch")[0] for line in lines[:2]] == ["quick/0 ", "quick/0 "] and len(lines) == 3
    assert re.match(r"quick/0 on stand-in: validation .* %.*, test .* % \[", lines[2])
    assert first.stderr == "", "off a terminal there is no progress bar"
    again = here("train", "quick", *tiny, "--stand-in")
    assert again.stdout.splitlines() == [banner, *lines[2:]], "a finished run is not trained again"
    assert "was trained on the stand-in set: give --stand-in" in refused(here("evaluate", tmp_path / "run"))
    tested = here("evaluate", tmp_path / "run", "--stand-in", "--out", tmp_path / "out").stdout
    assert tested.splitlines()[0] == banner and tested.splitlines()[-1:] == lines[2:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["confusion.png", "reliability.png"]
    last = here("evaluate", tmp_path / "run" / "last.safetensors", "--stand-in", "--out", tmp_path / "out").stdout
    assert re.match("quick/0 on stand-in: the last of 2 epochs, test .* %", last.splitlines()[-1])
    file = tmp_path / "quick.safetensors"
    published = here("runs", "publish", tmp_path / "run", file, "--stand-in").stdout.splitlines()
    assert published[-2].endswith("quick.safetensors") and published[-1].endswith("quick.md")
    assert file.exists() and "# quick/0: SE-ResNet" in file.with_suffix(".md").read_text()
    other = here("train", "quick", *tiny, "--set", "momentum=0.5", "--stand-in")
    assert "another momentum" in refused(other)


def test_sets_of_one_name_do_not_share_a_folder(monkeypatch):
    seen = []
    monkeypatch.setattr("helpers.assess.shifted", lambda run, path, folder, stand_in: seen.append(folder))
    for path in ("/ours/fog.npy", "/theirs/fog.npy", "/set.pkl"):
        CliRunner().invoke(app, ["evaluate", str(ROOT / "data" / "runs" / "beyond" / "0"), "--data", path])
    assert [folder.name for folder in seen] == ["ours-fog.npy", "theirs-fog.npy", "set.pkl"]
    assert {folder.parent for folder in seen} == {ROOT / "out" / "evaluate" / "beyond-0"}


def test_outputs_are_stored_only_with_cifar10(monkeypatch):
    def missing():
        raise CourseError("no images")

    monkeypatch.setattr(data, "fetch", missing)
    monkeypatch.setattr("helpers.notebooks.refresh", lambda only: pytest.fail("notebooks were stored"))
    result = CliRunner().invoke(app, ["notebooks", "--only", "01"])
    assert isinstance(result.exception, CourseError) and str(result.exception) == "no images"


def test_the_recorded_course_runs_without_images(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.__main__.out_dir", lambda profile: tmp_path)  # what lies under out/ is the user's
    monkeypatch.setenv("CIFAR10_ROOT", NO_DATA["CIFAR10_ROOT"])
    result = CliRunner().invoke(app, ["reproduce", "--profile", "recorded", "--only", "00"])
    assert result.exit_code == 0, result.exception
    assert "Going on without: recorded runs, drawn pictures." in result.stdout and "STAND-IN" not in result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["state"] == "passed" and summary["data_source"] == data.CIFAR10


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """`reproduce` with notebooks that take no time, in a folder of the test's; what they were asked is kept."""
    asked = []

    def ran(profile, folder, only, parameters, *, data_source, results):
        asked.append((profile, only, parameters, data_source))
        return {"state": stubbed.state, "seconds": 1.0, "results": results()}

    stubbed = SimpleNamespace(state="passed", asked=asked, folder=tmp_path / "out" / "quick")
    monkeypatch.setattr("helpers.__main__.out_dir", lambda profile: stubbed.folder)
    monkeypatch.setattr("helpers.notebooks.reproduce", ran)
    return stubbed


def test_reproduce_fails_with_its_notebooks_and_says_what_it_ran_on(here, stubbed):
    passed = here("reproduce")
    assert passed.returncode == 0 and passed.stdout.count(data.BANNER) == 2, "at the start and at the end"
    assert "data      stand-in" in passed.stdout
    assert stubbed.asked == [("quick", None, {"pictures": "drawn"}, data.STAND_IN)]
    stubbed.state = "failed"
    assert "Not every notebook passed" in refused(here("reproduce"))


def test_reproduce_removes_only_what_it_makes_anew_and_what_nobody_holds(here, stubbed):
    old = stubbed.folder / "runs" / "quick" / "0" / "run.json"
    old.parent.mkdir(parents=True)
    old.touch()
    for kept in (("--resume",), ("--only", "00")):
        here("reproduce", *kept)
        assert old.exists()
    (old.parent / ".lock").touch()
    with checkpoint.hold(old.parent):
        assert "Another process is training in" in refused(here("reproduce"))
    assert old.exists()
    with FileLock(stubbed.folder.with_name(".quick.lock")):
        assert "Another `reproduce` is at work in" in refused(here("reproduce"))
    assert old.exists() and here("reproduce").returncode == 0 and not old.exists()


def test_runs_on_other_data_are_not_told_as_of_this(here, stubbed):
    shutil.copytree(ROOT / "data" / "runs" / "quick" / "0", stubbed.folder / "runs" / "quick" / "0")
    shown = here("reproduce", "--only", "00").stdout
    assert "data      stand-in" in shown and "accuracy" not in shown, "it is of CIFAR-10"


def test_a_papers_cell_may_take_as_long_as_it_takes(monkeypatch, tmp_path):
    waits = {}
    monkeypatch.setattr(run, "execute", lambda path, output, parameters, timeout: waits.update(
        {parameters["profile"]: timeout}))  # fmt: skip
    monkeypatch.setattr("helpers.notebooks.report.results_report", lambda *_: None)
    for profile in ("recorded", "quick", "paper"):
        run.reproduce(profile, tmp_path, ["00"])
    assert waits == {"recorded": 3_600, "quick": 3_600, "paper": None}


def test_no_notebook_is_stored_where_one_is_misnamed(monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda: pytest.fail("images were fetched"))
    result = CliRunner().invoke(app, ["notebooks", "--only", "nope"])
    assert "no notebook 'nope'" in str(result.exception)


def test_a_set_of_our_own_is_written_and_read_back(here, tmp_path):
    path = tmp_path / "competition-like.pkl"
    result = here("distort", "competition-like", "--out", path, "--stand-in")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("STAND-IN DATA") and result.stdout.endswith("-kinds.csv\n")
    assert {line.rpartition("/")[2] for line in result.stdout.splitlines()[-3:]} == {p.name for p in tmp_path.iterdir()}
    images, labels, ids = data.load_shifted(path)
    assert images.shape == (2_000, 3, 32, 32) and labels is None and ids.tolist() == list(range(2_000))


def test_the_stand_in_is_never_recorded(here):
    where = ROOT / "data" / "runs" / "quick" / "999"
    result = here("train", "quick", "--set", "epochs=2", "--set", "train_size=100", "--set", "val_size=50",
                  "--run-dir", where, "--stand-in")  # fmt: skip
    assert "never recorded" in refused(result)
    assert not where.exists()


def test_make_help_has_a_line_for_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    shown = subprocess.run(["make", "-s", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets
    assert targets >= {"setup", "reproduce", "test", "figures", "notebooks", "report", "bench", "lab"}


def test_later_rooms_use_earlier_ones_and_are_listed_so():
    table = re.search(r"\| room \| holds \|\n.*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[0]
    order = [name for row in table.split("\n")[2:-2] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    rooms = {path.name.removesuffix(".py"): path for path in (ROOT / "helpers").iterdir() if path.suffix == ".py"
             or (path / "__init__.py").exists()}  # fmt: skip
    assert sorted(order) == sorted(set(rooms) - {"__init__"})
    for number, room in enumerate(order):
        for path in [rooms[room]] if rooms[room].is_file() else rooms[room].glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
                    named = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                    late = [name for name in named if name in rooms and order.index(name) > number]
                    assert not late, f"{path.name} imports {late}"


def test_setup_does_nothing_twice():
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("no environment made by make here")
    stamp, project = (ROOT / name for name in (".venv/installed", "pyproject.toml"))
    if stamp.stat().st_mtime < project.stat().st_mtime:
        pytest.skip("the environment is older than pyproject.toml: make setup brings it up to date")
    again = subprocess.run(["make", "-n", "setup"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "Nothing to be done" in again


def test_dependencies_have_a_lower_and_an_upper_bound_and_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement
        assert re.search(rf'"{re.escape(requirement)}", +# \S', text), f"{requirement} has no reason beside it"
    for requirement in [r for extra in project["optional-dependencies"].values() for r in extra]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement


def test_a_machine_without_notebooks_gets_packages_as_new_as_the_course_asks_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = {re.match(r"[\w-]+>=[\d.]+", line)[0] for line in asked}
    block = re.search(r"```\npip install (.*?)```", (ROOT / "scripts" / "README.md").read_text(), re.DOTALL)[1]
    told = {word.strip("'") for word in block.split() if word != "\\"}
    assert {"numpy>=2", "filelock>=3.21"} <= told <= least


def test_importing_a_room_does_no_work():
    rooms = (
        "runtime readers data augment distort shift mixing model recipe runs evaluate estimate publish checkpoint "
        "exchange train sweep together stats plots assess figures notebooks bench tables __main__"
    )
    code = f"import sys; sys.argv = ['x']; import {', '.join(f'helpers.{room}' for room in rooms.split())}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **NO_DATA}
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_replacing_keeps_the_old_file_when_the_write_fails(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(CourseError, match=r"Cannot write .*kept.txt .*untouched"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
