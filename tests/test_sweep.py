"""The sweep: each run once, interruptions and failures survived, forecasts, and the same records from a Ray cluster."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from typer.testing import CliRunner

from helpers import checkpoint, data, distort, evaluate, recipe, runs, sweep, train
from helpers.__main__ import app
from helpers.runtime import CourseError, git_commit
from helpers.sweep import cluster, jobs

PAIR = [TINY, TINY.but(name="tiny-plain", mixup_alpha=0.0)]
VOLATILE = ("seconds", "images_per_second")  # what the clock says is another thing each time

pytestmark = pytest.mark.usefixtures("one_thread", "without_cifar10")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Draw the stand-in set once, and less of it."""
    full = {"train": data.draw_stand_in(300, seed=5), "test": data.draw_stand_in(200, seed=6)}
    for room in (data, train, evaluate):
        monkeypatch.setattr(room, "load_set", lambda split, stand_in=False: full[split])


def swept(root, recipes=PAIR, seeds=(0, 1), **options):
    return sweep.sweep(recipes, seeds, root, stand_in=True, **options)


def result(path):
    """What a run is, without what the clock says: its record, history and weights."""
    record = {key: value for key, value in runs.read(path).record.items() if key not in VOLATILE}
    return record, *((path / name).read_bytes() for name in ("history.csv", runs.WEIGHTS, runs.LAST))


def files(root):
    return {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The store of the pair with two seeds, each run made by itself, by fit and test_run. Read it, change a copy."""
    root, before = tmp_path_factory.mktemp("reference"), torch.get_num_threads()
    images = data.split_train_val(data.draw_stand_in(300, seed=5), TINY.val_size, TINY.train_size)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_set", lambda split, stand_in: data.draw_stand_in(200, seed=6))
        for made in PAIR:
            for seed in (0, 1):
                train.fit(made.but(seed=seed), images, root / made.name / str(seed))
                evaluate.test_run(root / made.name / str(seed), stand_in=True)
    torch.set_num_threads(before)
    return root


RUNS = [Path(made.name) / str(seed) for made in PAIR for seed in (0, 1)]


# ------------------------------------------------------------------------------------------------- on this machine


def test_every_run_is_what_it_is_by_itself_and_is_made_once(reference, tmp_path, capsys):
    assert swept(tmp_path) == {}
    for run in RUNS:
        assert result(tmp_path / run) == result(reference / run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(map(str, RUNS)), "one line per run, and none per epoch"
    assert re.match(r"tiny/0 test \d+\.\d\d %  \(1 of 4 done, 0 running, 3 waiting, about 0:00:\d\d left\)$", lines[0])
    assert lines[3].endswith("(4 of 4 done, 0 running, 0 waiting)")
    before = files(tmp_path)
    assert swept(tmp_path) == {} and files(tmp_path) == before and capsys.readouterr().out == ""


def test_the_images_are_split_by_the_recipes_seed(tmp_path):
    made = TINY.but(epochs=1, warmup_epochs=0, split_seed=1)
    assert swept(tmp_path, [made], [0]) == {}
    images = data.split_train_val(data.load_set("train"), made.val_size, made.train_size, made.split_seed)
    alone = train.fit(made, images, tmp_path / "alone", device=torch.device("cpu"))
    assert (tmp_path / "tiny" / "0" / "history.csv").read_bytes() == (alone.path / "history.csv").read_bytes()


def test_a_run_asked_for_twice_is_planned_once(tmp_path):
    assert [job.label for job in sweep.plan([TINY, TINY, PAIR[1]], [0, 0], tmp_path)] == ["tiny/0", "tiny-plain/0"]


def test_what_was_trained_but_not_tested_is_tested(reference, finished_tiny, tmp_path):
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    assert [job.state for job in sweep.plan([TINY], [0], tmp_path, stand_in=True)] == ["to test"]
    weights = (tmp_path / "tiny" / "0" / runs.WEIGHTS).rename(tmp_path / "away")
    (job,) = sweep.plan([TINY], [0], tmp_path, stand_in=True)
    assert job.state == "refused: to test, and its weights are not here"
    weights.rename(tmp_path / "tiny" / "0" / runs.WEIGHTS)
    assert swept(tmp_path, [TINY], [0]) == {}
    assert result(tmp_path / "tiny" / "0") == result(reference / "tiny" / "0")


def test_distorted_images_are_asked_for_and_made_once(reference, tmp_path):
    shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    assert [job.state for job in sweep.plan([TINY], [0], tmp_path, True, corruptions=10)] == ["to distort"]
    assert swept(tmp_path, [TINY], [0], corruptions=10) == {}
    table = tmp_path / "tiny" / "0" / "shift.csv"
    before = table.stat().st_mtime_ns
    assert set(runs.pd.read_csv(table)["count"]) == {10}
    for as_many_or_fewer in (10, 5):
        assert swept(tmp_path, [TINY], [0], corruptions=as_many_or_fewer) == {}
        assert table.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("asked", "state"),
    [(10, "finished"), (11, "refused: to distort again, 10 images so far, and its weights are not here")],
)
def test_a_record_without_weights_is_believed_and_what_wants_them_is_refused(reference, tmp_path, asked, state):
    path = shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    (job,) = sweep.plan([TINY], [0], tmp_path, True, asked)
    assert job.state == "to distort"
    runs.add_to_record(path, {"corrupted": {"accuracy": 0.5, "count": 10, "severities": [1]}})
    (job,) = sweep.plan([TINY], [0], tmp_path, True, asked)
    assert job.state == "to distort", "its weights are there to make the table that is not"
    (path / runs.WEIGHTS).unlink()
    (job,) = sweep.plan([TINY], [0], tmp_path, True, asked)
    assert job.state == state


def test_on_more_distorted_images_a_run_is_tested_again_and_on_all_there_are_once(
    reference, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    path = shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    for asked, counted in ((10, 10), (20, 20), (10_000, 200)):
        assert swept(tmp_path, [TINY], [0], corruptions=asked) == {}
        assert set(runs.pd.read_csv(path / "shift.csv")["count"]) == {counted}
        assert runs.read(path).record["corrupted"]["count"] == counted
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  (")[0] for line in lines if "again" in line] == [
        f"tiny/0: to distort again, {before} images so far" for before in (10, 20)]  # fmt: skip
    assert [job.state for job in sweep.plan([TINY], [0], tmp_path, True, corruptions=10_000)] == ["finished"]


def test_failures_are_told_at_the_end_and_stop_nothing(reference, tmp_path, monkeypatch, capsys):
    diverging, steps = TINY.but(name="tiny-wild", label_smoothing=0.5), itertools.count(1)
    finite = train.mixed_cross_entropy

    def loss(logits, mixed, smoothing):
        """Infinite for the third recipe, from its third step on."""
        return finite(logits, mixed, smoothing) * (math.inf if smoothing and next(steps) >= 3 else 1)

    monkeypatch.setattr(train, "mixed_cross_entropy", loss)
    shutil.copytree(reference / "tiny-plain" / "0", tmp_path / "tiny" / "0")
    (tmp_path / "tiny-plain" / "0").mkdir(parents=True)
    (tmp_path / "tiny-plain" / "0" / "run.json").write_text("{")
    failures = swept(tmp_path, [*PAIR, diverging])
    assert list(failures) == ["tiny/0", "tiny-plain/0", "tiny-wild/0", "tiny-wild/1"]
    assert re.search(r"tiny/0 holds a run with another name, mixup_alpha: choose another folder", failures["tiny/0"])
    assert "is not a finished run" in failures["tiny-plain/0"]
    assert re.match(r"The loss stopped being finite at step 2 \(epoch 1, ", failures["tiny-wild/0"])
    for run in (RUNS[1], RUNS[3]):
        assert result(tmp_path / run) == result(reference / run)
    assert "tiny-wild/1 failed  (2 of 6 done, 0 running, 0 waiting, 4 failed)" in capsys.readouterr().out
    states = {job.label: job.state for job in sweep.plan([*PAIR, diverging], (0, 1), tmp_path, stand_in=True)}
    assert states["tiny/0"] == states["tiny-plain/0"] == "refused: damaged, or another run"
    assert states["tiny/1"] == "finished" and states["tiny-wild/0"] == "to train"


def test_an_error_that_nobody_foresaw_is_a_sentence_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "test_run", lambda path, stand_in: 1 / 0)
    assert swept(tmp_path, [TINY], [0]) == {"tiny/0": "ZeroDivisionError: division by zero"}
    monkeypatch.undo()


def test_without_images_there_is_one_sentence_and_not_one_a_run(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(CourseError, match="CIFAR-10 is not in"):
        sweep.sweep(PAIR, [0, 1], tmp_path / "store")


def test_the_stand_in_is_never_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RECORDED", tmp_path)
    with pytest.raises(CourseError, match="never recorded"):
        swept(tmp_path)
    assert files(tmp_path) == {}


def test_stopped_by_ctrl_c_the_same_call_goes_on(reference, tmp_path, monkeypatch, capsys):
    heard = jobs.Progress.epoch

    def epoch(self, made, row):
        heard(self, made, row)
        if (made.seed, row["epoch"]) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(jobs.Progress, "epoch", epoch)
    with pytest.raises(train.Interrupted, match=r"Stopped by SIGINT \(tiny/1 after epoch 2\): everything is kept"):
        swept(tmp_path)
    monkeypatch.setattr(jobs.Progress, "epoch", heard)
    planned = sweep.plan(PAIR, (0, 1), tmp_path, stand_in=True)
    assert [job.state for job in planned] == ["finished", "to resume in epoch 3", "to train", "to train"]
    assert [job.images for job in planned] == [0, 400, 800, 800], "two epochs of 200 images are left, or four"
    assert swept(tmp_path) == {}
    for run in RUNS:
        assert result(tmp_path / run) == result(reference / run)
    assert capsys.readouterr().out.splitlines()[-1].endswith("(4 of 4 done, 0 running, 0 waiting)")


def test_on_a_gpu_a_recipes_seeds_go_together_and_apart_where_one_fails(reference, tmp_path, monkeypatch, capsys):
    """The grouping alone: the training itself stays on the CPU."""
    monkeypatch.setattr(sweep, "pick_device", lambda: torch.device("cuda"))
    groups, fit_many = [], train.fit_many
    monkeypatch.setattr(train, "fit_many", lambda recipes, *rest, **options: (
        groups.append([(made.name, made.seed) for made in recipes]), fit_many(recipes, *rest, **options)))  # fmt: skip
    (tmp_path / "tiny" / "2").mkdir(parents=True)
    (tmp_path / "tiny" / "2" / "run.json").write_text("{")
    assert list(swept(tmp_path, seeds=range(4))) == ["tiny/2"]
    tried = [[("tiny", seed) for seed in seeds] for seeds in ((0, 1, 2, 3), (0, 1), (2, 3), (2,), (3,))]
    assert groups == [*tried, [("tiny-plain", seed) for seed in range(4)]]
    for run in RUNS:
        assert result(tmp_path / run) == result(reference / run)
    assert "tiny-plain/3" in capsys.readouterr().out.splitlines()[-1]


def test_groups_are_of_one_recipe_and_not_too_many():
    def job(name, seed):
        return jobs.Job(TINY.but(name=name, seed=seed), Path("x"), "to train", 1)

    many = [job(name, seed) for name in ("a", "b") for seed in range(5)]
    assert [[each.label for each in group] for group in sweep._groups(many, 3)] == [
        ["a/0", "a/1", "a/2"], ["a/3", "a/4"], ["b/0", "b/1", "b/2"], ["b/3", "b/4"]]  # fmt: skip
    assert sweep._groups(many, 1) == [[each] for each in many]


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert swept(tmp_path, [TINY]) == {}
    shown = capsys.readouterr()
    assert "1.60k/1.60k" in shown.err and "2 of 2 done" in shown.err
    assert shown.out.count("\n") == 2


def test_the_bar_leaves_out_what_a_failed_run_had_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    many = [jobs.Job(TINY.but(seed=seed), tmp_path, "to train", 800) for seed in (0, 1)]
    progress = jobs.Progress(many)
    progress.failed(many[0], "x")
    assert progress.bar.total == 800
    progress.bar.close()


def test_where_no_run_ends_for_long_there_is_a_line_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "QUIET", -1.0)
    progress = jobs.Progress([jobs.Job(TINY, tmp_path, "to train", 800)])
    progress.running = 1
    progress.epoch(TINY, {"epoch": 2})
    assert capsys.readouterr().out.startswith("tiny/0 epoch 2 of 4  (0 of 1 done, 1 running, 0 waiting, about ")


def test_the_rows_of_a_notebook_come_in_the_order_asked_for(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "out_dir", lambda profile: tmp_path / profile)
    shutil.copytree(reference, tmp_path / "quick" / "runs")
    rows = sweep.results("quick", PAIR[::-1], [1, 0])
    assert list(zip(rows.recipe, rows.seed, strict=True)) == [
        ("tiny-plain", 1), ("tiny-plain", 0), ("tiny", 1), ("tiny", 0)]  # fmt: skip
    with pytest.raises(CourseError, match="no recorded run tiny/0"):
        sweep.results("recorded", [TINY])
    (tmp_path / "quick" / "runs" / "tiny" / "0" / "run.json").write_text("{")
    with pytest.raises(CourseError, match=r"^tiny/0: .* is not a finished run"):
        sweep.results("quick", [TINY])


# ------------------------------------------------------------------------------------------------- the dry run


def test_a_forecast_comes_from_recorded_runs_of_the_network_and_writes_nothing(reference, tmp_path):
    shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    path = tmp_path / "tiny" / "0" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images_per_second": 5.0, "side_by_side": 4}))
    before = files(tmp_path)
    table, said = sweep.forecast(sweep.plan(PAIR, (0, 1), tmp_path, stand_in=True), tmp_path)
    assert list(table.state) == ["finished", *["to train"] * 3]
    assert list(table.images) == ["0", "800", "800", "800"] and list(table.time) == ["0:00:00", *["0:00:40"] * 3]
    assert said[0] == "tiny and the like: 20 images/s, as 1 recorded run of this network had it"
    assert said[1].startswith("4 runs, 1 of them finished: 2,400 images to train on, about 0:02:00 (h:mm:ss) on CPU, ")
    assert files(tmp_path) == before


def test_what_is_left_of_a_run_is_what_has_not_been_trained(stand_in, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch of five steps; and of a run on other data nothing can be said."""
    step, taken = train.Trainer.step, itertools.count(1)

    def stopping(self, *arguments):
        if next(taken) == 2 * 5 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(train.Trainer, "step", stopping)
    with pytest.raises(train.Interrupted):
        train.fit(TINY, stand_in, tmp_path / "tiny" / "0", device=torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    (job,) = sweep.plan([TINY], [0], tmp_path, stand_in=True)
    assert (job.state, job.images) == ("to resume in epoch 3", (2 * 5 - 3) * TINY.batch_size)
    (job,) = sweep.plan([TINY], [0], tmp_path)
    assert (job.state, job.images) == ("refused: damaged, or another run", 0), "on CIFAR-10 it is another"


def test_a_forecast_takes_no_rate_of_another_device(reference, tmp_path, monkeypatch):
    shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    path = tmp_path / "tiny" / "0" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "NVIDIA H200"}))
    monkeypatch.setattr(jobs, "measure", lambda made: 400.0)
    _, said = sweep.forecast(sweep.plan([TINY], [1], tmp_path, stand_in=True), tmp_path)
    assert said[0] == "tiny and the like: 400 images/s, measured for two seconds now"


def test_a_forecast_takes_the_median_of_recorded_runs(reference, tmp_path):
    for seed, rate in enumerate((1.0, 20.0, 1_000.0)):
        path = shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / str(seed))
        runs.add_to_record(path, {"recipe": TINY.but(seed=seed).to_dict(), "images_per_second": rate})
    _, said = sweep.forecast(sweep.plan([TINY], [3], tmp_path, stand_in=True), tmp_path)
    assert said[0] == "tiny and the like: 20 images/s, as 3 recorded runs of this network had it"


def test_a_forecast_takes_no_rate_of_runs_whose_steps_are_shorter(reference, tmp_path, monkeypatch):
    shutil.copytree(reference / "tiny" / "0", tmp_path / "tiny" / "0")
    monkeypatch.setattr(jobs, "measure", lambda made: 50.0)
    slower = [TINY.but(name="sharp", sam_rho=0.05), TINY.but(name="views", consistency=12.0, mixup_alpha=0.0),
              TINY.but(name="taught", teacher="tiny")]  # fmt: skip
    _, said = sweep.forecast(sweep.plan(slower, [0], tmp_path, stand_in=True), tmp_path)
    assert [line.partition(": ")[2] for line in said[:-1]] == ["50 images/s, measured for two seconds now"] * 3


def test_without_a_recorded_run_a_forecast_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "measure", lambda made: 400.0)
    other = TINY.but(name="other", width=16)
    table, said = sweep.forecast(sweep.plan([TINY, other], [0], tmp_path, stand_in=True), tmp_path)
    assert list(table.time) == ["0:00:02"] * 2 and len(said) == 3, "a line for each of two networks"
    assert said[1] == "other and the like: 400 images/s, measured for two seconds now"


def test_the_measurement_takes_steps_of_this_recipe(monkeypatch):
    taken, step = [], train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self, index, rate, side: (
        taken.append(len(index)), step(self, index, rate, side))[1])  # fmt: skip
    start = time.perf_counter()
    rate = jobs.measure(TINY, seconds=0.3)
    most = len(taken) * TINY.batch_size / 0.3
    assert set(taken) == {TINY.batch_size} and len(taken) > 1
    assert TINY.batch_size / (time.perf_counter() - start) < rate < most


def test_the_measurement_takes_steps_of_every_resolution_of_a_recipe(monkeypatch):
    """By a clock on which a step takes as many seconds as its images have pixels a side."""
    clock = [0.0]
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train.Trainer, "step", lambda self, index, rate, side: clock.__setitem__(0, clock[0] + side))
    monkeypatch.setattr(jobs, "float", lambda loss: loss, raising=False)
    made = TINY.but(resolutions=(8, 16), epochs=4)  # 5 steps an epoch, and two thirds of 2.5 for validation
    assert jobs.measure(made, seconds=200.0) == pytest.approx(200 / (5 * (8 + 16) / 2 + 2 / 3 * 2.5 * 32))
    assert jobs.measure(TINY, seconds=200.0) == pytest.approx(200 / (5 * 32 + 2 / 3 * 2.5 * 32))


@pytest.mark.parametrize(("arguments", "rows"), [
    (("ladder", "--seeds", "2"), 14), (("quick", "mixup", "--seeds", "1"), 5), (("se", "--base", "reduced"), 12),
    (("quick-dropout-0.2",), 3),
])  # fmt: skip
def test_the_dry_run_on_the_command_line(tmp_path, monkeypatch, arguments, rows):
    """Recorded runs answer for quick's network where they are of this kind of device; nothing is written."""
    monkeypatch.setattr(jobs, "measure", partial(jobs.measure, seconds=0.1))
    shown = CliRunner().invoke(app, ["sweep", *arguments, "--dry-run", "--root", str(tmp_path)])
    assert shown.exit_code == 0, shown
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["recipe", "seed", "state", "images", "time"]
    assert sum(bool(re.search(r" to train +[\d,]+ +\d+:\d\d:\d\d$", line)) for line in lines) == rows
    assert re.match(rf"{rows} runs, 0 of them finished: [\d,]+ images to train on, about \d+:", lines[-1])
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_accuracies_and_failures(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "RECIPES", {made.name: made for made in PAIR})
    shutil.copytree(reference, tmp_path / "store")
    (tmp_path / "store" / "tiny" / "1" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match="Left out"):
        shown = CliRunner().invoke(
            app, ["sweep", "tiny", "tiny-plain", "--seeds", "2", "--root", str(tmp_path / "store"), "--stand-in"]
        )
    accuracy = runs.read(reference / "tiny" / "0").record["test"]["accuracy"]
    assert re.search(rf"^tiny  +test {100 * accuracy:.2f} % over 1 seed \(", shown.stdout, re.MULTILINE)
    assert re.search(r"^tiny-plain  +test .* over 2 seeds \(.*, .*\)$", shown.stdout, re.MULTILINE)
    assert re.search(r"^tiny/1 failed: .*is not a finished run", shown.stdout, re.MULTILINE)
    assert isinstance(shown.exception, CourseError) and "1 run failed" in str(shown.exception)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("papper",), "no recipe 'papper'.*Sweeps: ladder, mixup, strength, .*, schedule, policy, beyond, climb, approach"),
    (("ladder", "--base", "nope"), "no recipe 'nope'"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, arguments, sentence):
    shown = CliRunner().invoke(app, ["sweep", *arguments, "--root", str(tmp_path)])
    assert isinstance(shown.exception, CourseError) and re.search(sentence, str(shown.exception))


# ------------------------------------------------------------------------------------------------- on a cluster


def test_without_ray_a_sentence_says_how_to_have_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CourseError, match=r"--ray needs Ray.*`pip install --editable '\.\[cluster\]'`"):
        swept(tmp_path, ray="auto")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:99999"])
def test_an_address_where_nobody_listens_is_one_sentence(tmp_path, address):
    pytest.importorskip("ray", reason="Ray is not installed: pip install --editable '.[cluster]'")
    with pytest.raises(CourseError, match=rf"There is no Ray cluster at '{address}' \(.*\): start one with"):
        swept(tmp_path, ray=address)


def test_a_folder_travels_whole(reference, tmp_path):
    folder = tmp_path / "there"
    shutil.copytree(reference / RUNS[0], folder)
    (folder / ".lock").touch()
    cluster.unpack(cluster.pack(folder), tmp_path / "back")
    assert result(tmp_path / "back") == result(folder)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(
        path.name for path in (reference / RUNS[0]).iterdir()
    )
    assert cluster.pack(tmp_path / "nowhere") == {}


def test_the_record_is_unpacked_last_and_nothing_outside_the_folder(tmp_path, monkeypatch):
    content, order = dict.fromkeys(("run.json", "../../outside", "history.csv"), b"x"), []
    replacing = cluster.replacing
    monkeypatch.setattr(cluster, "replacing", lambda path: (order.append(path.name), replacing(path))[1])
    cluster.unpack(content, tmp_path / "a" / "b")
    assert order[-1] == "run.json" and sorted(order) == ["history.csv", "outside", "run.json"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(order)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "a" / "b"}


@pytest.fixture
def node(tmp_path, monkeypatch):
    """This process as a node: its scratch folder."""
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    return tmp_path / "node" / "se-resnet-course"


def work(made, begun=None):
    return cluster.work(made, begun or {}, True, 0, "/nonexistent", git_commit())


def test_a_node_goes_on_from_what_it_has_or_what_was_begun_at_home(reference, node, stand_in, tmp_path, monkeypatch):
    def stop_after_two(made, row):
        if row["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    heard, fit_many = [], train.fit_many
    with pytest.raises(train.Interrupted):
        fit_many([TINY], stand_in, [tmp_path / "home"], on_epoch=stop_after_two)
    begun = cluster.pack(tmp_path / "home")
    monkeypatch.setattr(train, "fit_many", lambda recipes, images, paths, on_epoch: fit_many(
        recipes, images, paths, on_epoch=lambda made, row: (heard.append(row["epoch"]), stop_after_two(made, row))))
    cluster.unpack(work(TINY, begun), tmp_path / "back")
    assert heard == [3, 4] and result(tmp_path / "back") == result(reference / "tiny" / "0")
    assert [path.suffix for path in node.iterdir()] == [".lock"], "nothing is left but the lock"
    heard.clear()
    with pytest.raises(train.Interrupted):
        work(TINY)
    cluster.unpack(work(TINY), tmp_path / "again")
    assert heard == [1, 2, 3, 4] and result(tmp_path / "again") == result(reference / "tiny" / "0")


def test_a_finished_run_keeps_its_commit(reference, node, tmp_path):
    shutil.copytree(reference / RUNS[0], tmp_path / "home")
    record = runs.read(tmp_path / "home").record
    runs.write_record(tmp_path / "home", {**record, "commit": "old"})
    cluster.unpack(work(TINY, cluster.pack(tmp_path / "home")), tmp_path / "home")
    assert runs.read(tmp_path / "home").record["commit"] == "old"


def test_a_node_finds_the_images(tmp_path, monkeypatch):
    own, home = tmp_path / "own", tmp_path / "home"
    fetched = []
    monkeypatch.setattr(data, "fetch", lambda: fetched.append(os.environ["CIFAR10_ROOT"]))

    def found(own_root, home_root, stand_in=False):
        monkeypatch.setenv("CIFAR10_ROOT", str(own_root))
        cluster._find_data(stand_in, str(home_root), tmp_path / "scratch")
        return Path(os.environ["CIFAR10_ROOT"])

    assert found(own, home) == tmp_path / "scratch" / "data" and fetched == [str(tmp_path / "scratch" / "data")]
    (home / "cifar-10-batches-py").mkdir(parents=True)
    assert found(own, home) == home
    (own / "cifar-10-batches-py").mkdir(parents=True)
    assert found(own, home) == own and len(fetched) == 1
    assert not found(own, home, stand_in=True).exists(), "drawn at home, drawn everywhere"


LONG = [made.but(epochs=30) for made in PAIR]


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two workers with a CPU each; their scratch folders are below its `scratch`."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install --editable '.[cluster]'")
    from ray.cluster_utils import Cluster

    scratch = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # a short path, for its sockets
    folder = Path(scratch.name)
    # Each of Ray's dozen helpers imports jsonschema, which spends two thirds of their start on a grammar of URLs, and a
    # node gives up on helpers that are not there in 15 seconds: long on a machine of one's own, short on a busy one.
    (folder / "rfc3987_syntax.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        made.scratch = folder / "se-resnet-course"
        made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
        yield made
        made.shutdown()
    scratch.cleanup()


@pytest.fixture
def at_two_runs(nodes):
    """Does something, once, a moment after two runs have begun on the nodes; says how many were under way then."""

    def under_way():
        return [lock for lock in nodes.scratch.glob("*/.lock") if not (lock.parent / "run.json").exists()]

    def start(action):
        seen = {}

        def watch():
            late = time.monotonic() + 180
            while time.monotonic() < late and len(under_way()) < 2:
                time.sleep(0.01)
            time.sleep(0.3)
            seen.update(under_way=len(under_way()))
            action()

        threading.Thread(target=watch, daemon=True).start()
        return seen

    return start


@pytest.fixture
def everything(monkeypatch):
    """The stand-in set as the nodes draw it."""
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR10_ROOT", "/nonexistent")


def test_a_cluster_that_is_stopped_and_loses_a_node_ends_with_the_same_records(
    nodes, at_two_runs, everything, tmp_path, capfd
):
    seen = at_two_runs(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(train.Interrupted, match=r"Stopped by SIGINT with 2 runs to go"):
        swept(tmp_path / "ray", LONG, [0], ray=nodes.address)
    assert seen == {"under_way": 2}
    assert len({path.parent for path in nodes.scratch.glob("*/checkpoint-?.pt")}) == 2, "both stopped in good order"

    seen = at_two_runs(lambda: nodes.remove_node(nodes.workers[1], allow_graceful=False))
    assert swept(tmp_path / "ray", LONG, [0], ray=nodes.address) == {}
    assert seen == {"under_way": 2}, "the node was lost in the middle of a run"
    shown = capfd.readouterr()
    assert shown.err == ""
    ours = [line for line in shown.out.splitlines() if line.startswith("tiny")]  # Ray itself tells of the lost node
    assert "(1 of 2 done, " in ours[0] and ours[-1].endswith("(2 of 2 done, 0 running, 0 waiting)")

    learners = [LONG[0].but(name="taught", teacher="tiny"), LONG[0].but(name="refined", start="tiny")]
    assert swept(tmp_path / "ray", learners, [0], ray=nodes.address) == dict.fromkeys(
        ("taught/0", "refined/0"), "It learns from runs that lie here and on no node: sweep it without --ray."
    )

    assert swept(tmp_path / "here", LONG, [0]) == {}
    for run in RUNS[::2]:
        assert result(tmp_path / "ray" / run) == result(tmp_path / "here" / run)
        assert sorted(path.name for path in (tmp_path / "ray" / run).iterdir()) == sorted(
            path.name for path in (tmp_path / "here" / run).iterdir()
        )
    assert not any(checkpoint.read(tmp_path / "ray" / run)[0] for run in RUNS[::2])
