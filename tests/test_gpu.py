"""What happens on a GPU machine, rehearsed without one: a Python without notebook packages, a stop, the way home."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from helpers import recipe, runs
from helpers.runtime import ROOT

# Each argument is a command, as JSON. No notebook package can be imported, and `paper` is a run of seconds.
BARE = """
import json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "IPython ipykernel jupyterlab nbclient nbconvert nbformat nbval papermill".split():
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
import torch
torch.set_num_threads(1)
from helpers import __main__, data, recipe
whole = data.draw_stand_in
data.draw_stand_in = lambda count, seed=0: whole(count // 10, seed)
for name, epochs in (("paper", 16), ("paper-none", 2)):
    recipe.RECIPES[name] = recipe.Recipe(name, blocks=(1, 1), width=8, reduction=2, stem_stride=2, epochs=epochs,
                                         batch_size=40, warmup_epochs=1, train_size=200, val_size=100, mixup_alpha=1.0)
for command in sys.argv[1:]:
    sys.argv = ["helpers", *json.loads(command)]
    try:
        __main__.main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def bare(*commands):
    environment = {**os.environ, "CIFAR10_ROOT": "/nonexistent/cifar"}
    arguments = [json.dumps([*map(str, command)]) for command in commands]
    return subprocess.Popen(
        [sys.executable, "-u", "-c", BARE, *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def test_train_stop_resume_evaluate_pack_and_bring_home(tmp_path):
    there, home, archive = tmp_path / "there", tmp_path / "home", tmp_path / "gpu.zip"
    train = ("train", "--recipe", "paper", "--seeds", 2, "--root", there, "--stand-in")
    stopped = bare(train)
    for line in stopped.stdout:
        if line.startswith("paper/0 epoch   2/16"):
            stopped.send_signal(signal.SIGTERM)
            break
    said = stopped.communicate(timeout=300)[1]
    assert stopped.returncode == 143, said
    assert said.startswith("error: Stopped by SIGTERM (paper/0 after epoch") and said.count("\n") == 1
    assert not list(there.rglob("run.json"))

    again = bare(
        train, ("sweep", "paper-none", "--seeds", 1, "--root", there, "--stand-in"),
        ("evaluate", there / "paper" / "1", "--corruptions", 20, "--out", tmp_path / "out", "--stand-in"),
        ("runs", "export", archive, "--root", there), ("runs", "import", archive, "--root", home, "--stand-in"),
    )  # fmt: skip
    out, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    lines = out.splitlines()
    lines, brought = lines[:-3], lines[-3:]
    assert not any(line.startswith("paper/0 epoch   1/16") for line in lines), "it goes on, and does not start over"
    assert [line.split(" on ")[0] for line in lines if ": validation" in line][:2] == ["paper/0", "paper/1"]
    shift = pd.read_csv(there / "paper" / "1" / "shift.csv")
    assert set(shift.severity) == {0, 1, 2, 3, 4, 5} and set(shift["count"]) == {20}
    assert {"agreement", "ATC", "DoC"} == set(pd.read_csv(there / "paper" / "1" / "estimates.csv").method)

    assert lines[-1].endswith("gpu.zip: 0.1 MB")
    assert [line.split(":")[0] for line in brought] == ["paper-none/0", "paper/0", "paper/1"]
    assert all("best weights, here" in line and "trained on stand-in" in line for line in brought)
    for path in (path for path in there.rglob("*") if path.suffix in (".json", ".csv", ".txt")):
        assert (home / path.relative_to(there)).read_bytes() == path.read_bytes()
    assert {path.name for path in home.iterdir()} == {"paper", "paper-none"}
    assert list(runs.load(home).seed) == [0, 1, 0]
    with pytest.warns(UserWarning, match="Left out, since the recipe of that name has changed"):
        assert runs.current(runs.load(home)).empty, "a rehearsal is never taken for the paper's run"


STUB = """#!/bin/sh
echo "$@" >> log
case "$*" in
-c*) echo paper-none paper-mixup_alpha-2 ;;
*bench*) mkdir -p data/bench && touch data/bench/train.csv ;;
*--recipe*)
  mkdir -p "out/paper/runs/$5/0" && [ "$6" = --seeds ] && mkdir -p "out/paper/runs/$5/1"
  [ -e patient ] || { touch patient; sleep 60; } ;;
*paper-none*) mkdir -p out/paper/runs/paper-none/0 ;;
*corruptions*) touch "$4/test_correct.txt" ;;
*competition-like) touch data/competition-like.pkl ;;
esac
"""


def test_the_script_for_a_gpu_goes_on_where_it_was_stopped(tmp_path):
    """Its order and its stop, with a stand-in for Python that writes down what it is asked."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "gpu").write_text((ROOT / "scripts" / "gpu").read_text())
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    call = ["timeout", "60", "bash", "scripts/gpu"]
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    first = subprocess.Popen(call, cwd=tmp_path, env=environment)
    late = time.monotonic() + 30
    while not (tmp_path / "patient").exists() and time.monotonic() < late:
        time.sleep(0.01)
    first.terminate()
    assert first.wait() == 128 + signal.SIGTERM
    said = [line.removeprefix("-m helpers ") for line in (tmp_path / "log").read_text().splitlines()]
    assert said == ["fetch", "bench train --record", "train --recipe paper --seeds 5 --root out/paper/runs"]
    (tmp_path / "log").unlink()
    (tmp_path / "data" / "bench" / "train.csv").unlink()
    second = subprocess.run([*call, "--set", "epochs=3"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and second.stdout.startswith("all done"), second
    said = (tmp_path / "log").read_text().splitlines()
    assert [line.removeprefix("-m helpers ") for line in said if line.startswith("-m")] == [
        "fetch",
        "train --recipe paper --seeds 5 --root out/paper/runs --set epochs=3",
        *(f"train --recipe sprint --seed {seed} --root out/paper/runs --set epochs=3" for seed in range(5)),
        "train --recipe beyond --seeds 5 --root out/paper/runs --set epochs=3",
        "train paper-none --seeds 3 --root out/paper/runs --set epochs=3",
        "train paper-mixup_alpha-2 --seeds 3 --root out/paper/runs --set epochs=3",
        *(f"evaluate out/paper/runs/{run} --corruptions 10000"
          for run in ("beyond/0", "beyond/1", "paper-none/0", "paper/0", "paper/1", "sprint/0")),
        "distort competition-like",
        "evaluate out/paper/runs/paper/0 --data data/competition-like.pkl",
        "runs export out/paper/paper.zip out/paper/runs/paper/0/ out/paper/runs/paper/1/ --split-mb 16",
        "runs export out/paper/beyond.zip out/paper/runs/sprint/0/ out/paper/runs/beyond/0/ out/paper/runs/beyond/1/ "
        "--split-mb 16",
        "runs export out/paper/ladder.zip out/paper/runs/paper-none/0/ --weights none",
    ]
    assert not (tmp_path / "data" / "bench" / "train.csv").exists(), "a rehearsal measures nothing"


def test_ctrl_c_ends_the_script_whatever_it_is_at(tmp_path):
    """Even the benchmark, without which it would go on if that failed by itself."""
    for folder in ("scripts", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts" / "gpu").write_text((ROOT / "scripts" / "gpu").read_text())
    for leave, code, log in (("kill -INT $PPID; exit 130", 130, 2), ("exit 1", 0, None)):
        stub = STUB.replace("*bench*) mkdir -p data/bench && touch data/bench/train.csv ;;", f"*bench*) {leave} ;;")
        assert leave in stub
        (tmp_path / "python").write_text(stub)
        (tmp_path / "python").chmod(0o755)
        (tmp_path / "patient").touch()
        done = subprocess.run(
            ["timeout", "--foreground", "60", "bash", "scripts/gpu"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHON": str(tmp_path / "python")},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        assert done.returncode == code, done
        assert log is None or len((tmp_path / "log").read_text().splitlines()) == log


def test_every_recipe_of_the_script_takes_the_options_of_the_rehearsal():
    rehearsal = re.search(r"scripts/gpu((?: --set \w+=\d+)+)", (ROOT / "scripts" / "README.md").read_text())[1]
    options = {name: int(value) for name, value in re.findall(r"--set (\w+)=(\d+)", rehearsal)}
    paper = recipe.get("paper")
    rungs = [rung.name for sweep in ("ladder", "mixup", "strength") for rung in recipe.SWEEPS[sweep](paper)]
    made = [recipe.get(name, **options) for name in ("sprint", "beyond", *rungs)]
    assert {(one.epochs, one.warmup_epochs, one.train_size) for one in made} == {(3, 1, 640)}
