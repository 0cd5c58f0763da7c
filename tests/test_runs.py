"""The run store: what is written is read back, equal numbers give equal bytes, damage is said in a sentence."""

import json
import math
import shutil
import warnings

import pandas as pd
import pytest

from helpers import evaluate, runs
from helpers.recipe import RECIPES
from helpers.runtime import CourseError

HISTORY = [
    {"epoch": 1, "learning_rate": 0.02, "train_loss": 1 / 3, "val_accuracy": 0.5},
    {"epoch": 2, "learning_rate": 1e-9, "train_loss": 2 / 3, "val_accuracy": 0.25},
]


def test_write_and_read_round_trip(finished_tiny, tmp_path):
    run = runs.read(finished_tiny)
    copy = runs.write_record(tmp_path / "run", run.record)
    runs.write_history(tmp_path / "run", run.history.to_dict("records"))
    again = runs.read(tmp_path / "run")
    assert again.record == copy.record == run.record and "definitions" not in again.record
    pd.testing.assert_frame_equal(again.history, run.history)
    assert again.label == "tiny/0"
    assert (tmp_path / "run" / "run.json").read_bytes() == (finished_tiny / "run.json").read_bytes()


def test_a_history_is_the_same_bytes_for_the_same_numbers(tmp_path):
    for name in ("a", "b"):
        runs.write_history(tmp_path / name, HISTORY)
    content = (tmp_path / "a" / "history.csv").read_bytes()
    assert content == (tmp_path / "b" / "history.csv").read_bytes()
    assert content.decode() == (
        "epoch,learning_rate,train_loss,val_accuracy\n1,0.020000,0.333333,0.500000\n2,0.000000,0.666667,0.250000\n"
    )


def test_a_history_read_and_written_again_is_the_same_bytes(finished_tiny, tmp_path):
    runs.write_history(tmp_path, runs.read(finished_tiny).history.to_dict("records"))
    assert (tmp_path / "history.csv").read_bytes() == (finished_tiny / "history.csv").read_bytes()


def test_a_run_on_the_stand_in_set_is_never_recorded(finished_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RECORDED", tmp_path / "data" / "runs")
    record = runs.read(finished_tiny).record
    inside = tmp_path / "data" / "runs" / "tiny" / "0"
    for path in (inside, tmp_path / "elsewhere" / ".." / "data" / "runs" / "x" / "0"):
        with pytest.raises(CourseError, match="stand-in set is never recorded"):
            runs.write_record(path, record)
        assert not (path / "run.json").exists()
    runs.write_record(inside, {**record, "data": "CIFAR-10"})
    assert runs.read(inside).record["data"] == "CIFAR-10"


def test_nothing_but_cifar10_is_recorded_here():
    table = runs.load()
    assert len(table) == 0 or set(table.data) == {"CIFAR-10"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b'"run"', b"{}", b'{"recipe": {}}', b"\xff\xfe\x00", b'{"recipe": {}, "da'],
)
def test_a_damaged_record_is_said_in_a_sentence(tmp_path, content):
    path = tmp_path / "tiny" / "0"
    path.mkdir(parents=True)
    (path / "run.json").write_bytes(content)
    for read in (lambda: runs.read(path), lambda: runs.find("tiny", 0, tmp_path)):
        with pytest.raises(CourseError, match=r"is not a finished run .*expected .*\.$") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"Left out: .*tiny/0 is not a finished run"):
        assert runs.load(tmp_path).empty


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": {"val_accuracy": 0.5}}, r"record\.metrics must contain \['train_accuracy', 'train_loss'"),
        ({"test": {"accuracy": 1.7, "low": 0, "high": 1, "count": 10}}, r"record\.test\.accuracy must be smaller than"),
        ({"corrupted": {"accuracy": 0.5, "count": 100}}, r"record\.corrupted must contain \['severities'\]"),
        ({"corrupted": {"accuracy": 0.5, "count": 9, "severities": [0]}}, r"severities\[0\] must be bigger than"),
        ({"best_epoch": "8"}, r"record\.best_epoch must be integer"),
        ({"seconds": 0}, r"record\.seconds must be bigger than 0"),
        ({"versions": {"torch": 2}}, r"record\.versions\.torch must be string"),
        ({"recipe": {"name": "tiny", "seed": -1, "epochs": 4}}, r"record\.recipe\.seed must be bigger than"),
        ({"recipe": {"name": "tiny", "seed": 0, "epochs": 20, "ema_decay": "x"}}, "ema_decay='x' is out of range"),
        ({"recipe": {"name": "tiny", "seed": 0, "epochs": 20, "colour": "red"}},
         "has a recipe that this version of the course cannot read: A recipe has no field 'colour'"),
        ({"test": {"accuracy": 0.5, "low": 0, "high": 1, "count": 10, "mirrored": "x"}}, r"mirrored must be object"),
        ({"side_by_side": "x"}, r"record\.side_by_side must be integer"),
        ({"seconds": math.nan}, "NaN is no finite number"),
        ({"seconds": -math.inf}, "-Infinity is no finite number"),
        ({"more": 10**400}, "10000000000000000000 is no finite number"),
    ],
)
def test_what_a_record_must_hold_is_named_where_it_does_not(finished_tiny, tmp_path, change, said):
    for seed in ("0", "1"):
        shutil.copytree(finished_tiny, tmp_path / "tiny" / seed)
    path = tmp_path / "tiny" / "1" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CourseError, match=said):
        runs.read(path.parent)
    with pytest.warns(UserWarning, match=said) as caught:
        assert len(runs.load(tmp_path)) == 1, "the other stays"
    assert len(caught) == 1


def test_nothing_is_written_that_could_not_be_read(finished_tiny, tmp_path):
    shutil.copytree(finished_tiny, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(CourseError, match=r"run got a result that is not finite, and no record of it"):
        runs.add_to_record(tmp_path / "run", {"more": math.nan})
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_record_that_holds_more_than_json_does_is_said_in_a_sentence(finished_tiny, tmp_path):
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    path = tmp_path / "tiny" / "0" / "run.json"
    whole = path.read_text()
    for entry in ('"seconds": 1e999', '"more": ' + "[" * 100_000 + "]" * 100_000):
        path.write_text(whole.rstrip().removesuffix("}") + f", {entry}}}")
        with pytest.warns(UserWarning, match="Left out: .*tiny/0 is not a finished run"):
            assert runs.load(tmp_path).empty


def test_the_seeds_of_a_recipe_are_those_with_weights_and_a_damaged_one_stops_none(finished_tiny, tmp_path):
    for seed in (0, 2, 5, 10):
        shutil.copytree(finished_tiny, tmp_path / str(seed))
        record = runs.read(finished_tiny).record
        runs.write_record(tmp_path / str(seed), {**record, "recipe": {**record["recipe"], "seed": seed}})
    (tmp_path / "0" / "best.safetensors").unlink()
    (tmp_path / "5" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match=r"Left out: .*5 is not a finished run"):
        assert [run.path.name for run in runs.seeds(tmp_path)] == ["2", "10"]


def test_a_copy_of_a_run_is_no_other_seed(finished_tiny, tmp_path):
    for seed in ("0", "5"):
        shutil.copytree(finished_tiny, tmp_path / "tiny" / seed)
    with pytest.warns(UserWarning, match=r"Left out: .*tiny/5 holds the record of tiny/0: move it"):
        assert len(runs.load(tmp_path)) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_torn_record_is_said_in_a_sentence(finished_tiny, tmp_path, share):
    content = (finished_tiny / "run.json").read_bytes()
    (tmp_path / "run.json").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CourseError, match="is not a finished run"):
        runs.read(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xff", b'epoch,loss\n1,2\n1,2,3,4\n"'])
def test_a_damaged_history_is_said_in_a_sentence(finished_tiny, tmp_path, content):
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    path = tmp_path / "tiny" / "0" / "history.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CourseError, match=r"history\.csv cannot be read"):
        _ = runs.read(path.parent).history
    with pytest.warns(UserWarning, match=r"Left out: .*history\.csv cannot be read"):
        assert runs.load(tmp_path).empty


def test_a_history_that_lost_an_epoch_is_left_out(finished_tiny, tmp_path):
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    path = tmp_path / "tiny" / "0" / "history.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.warns(UserWarning, match="tiny/0 has 3 rows of history for 4 epochs"):
        assert runs.load(tmp_path).empty


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_what_is_no_run_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(CourseError, match="is not a finished run"):
        runs.read(tmp_path / "x")
    with pytest.raises(CourseError, match="is not a finished run"):
        runs.find("x", 0, tmp_path)


def test_an_empty_store_is_an_empty_table(tmp_path):
    assert runs.load(tmp_path).empty
    assert runs.load(tmp_path / "nowhere").empty


def test_load_gives_a_row_a_run_sorted_by_recipe_and_seed(finished_tiny, tmp_path):
    record = runs.read(finished_tiny).record
    for name, seed in (("b", 10), ("b", 2), ("a", 3)):
        path = tmp_path / name / str(seed)
        runs.write_record(path, {**record, "recipe": {**record["recipe"], "name": name, "seed": seed, "epochs": 2}})
        runs.write_history(path, HISTORY)
    (tmp_path / "unfinished" / "0").mkdir(parents=True)
    (tmp_path / "unfinished" / "0" / "history.csv").write_text("epoch\n1\n")
    table = runs.load(tmp_path)
    assert list(zip(table.recipe, table.seed, strict=True)) == [("a", 3), ("b", 2), ("b", 10)]
    assert set(table.val_accuracy) == {record["metrics"]["val_accuracy"]}
    assert set(record["recipe"]) - {"name"} <= set(table.columns)
    assert list(table.history[0].epoch) == [1, 2]
    assert runs.find("b", 10, tmp_path).record["recipe"]["seed"] == 10
    assert set(table.tier) == {"cpu"} and not table.ema.any() and set(table.stale) == {""}
    assert set(table.versions) == {", ".join(f"{name} {number}" for name, number in record["versions"].items())}
    assert (table.seconds > 0).all() and (table.images_per_second > 0).all()


@pytest.mark.parametrize(
    ("recipe", "device", "expected"),
    [("quick", "CPU, x86_64, 2 threads", "quick"), ("quick-mixup", "NVIDIA H200", "quick"),
     ("paper", "NVIDIA H200", "gpu"), ("laptop", "CPU, arm64, 8 threads", "cpu"), ("quickly", "CPU, arm64", "cpu")],
)  # fmt: skip
def test_the_tier(recipe, device, expected):
    assert runs.tier(recipe, device) == expected


def test_a_record_of_another_recipe_by_that_name_is_flagged_with_its_fields():
    now = RECIPES["quick"].but(seed=5).to_dict()
    assert runs.stale(now) == ""
    assert runs.stale({**now, "epochs": 9, "blocks": [1, 1, 1, 2]}) == "blocks, epochs"
    assert runs.stale({**now, "long_gone": 1}) == "long_gone"
    older = {name: value for name, value in now.items() if name not in ("compiled", "ema_decay")}
    assert runs.stale(older) == "", "written before these had a field, and run with what is their default"
    without = {name: value for name, value in now.items() if name != "width"}
    assert runs.stale(without) == "width", "quick's width is not the default"
    assert runs.stale({**now, "name": "mine", "epochs": 9}) == "", "nothing to differ from"
    assert runs.stale({**now, "name": "quick-epochs-9", "epochs": 9}) == ""
    assert runs.stale({**now, "name": "quick-epochs-9", "epochs": 7}) == "epochs"


def test_flagged_rows_are_left_out_with_a_sentence(finished_tiny, tmp_path):
    record = runs.read(finished_tiny).record
    for seed, epochs in ((0, 8), (1, 2)):
        recipe = RECIPES["quick"].but(seed=seed, epochs=epochs, ema_decay=0.9 * seed).to_dict()
        runs.write_record(tmp_path / "quick" / str(seed), {**record, "recipe": recipe})
        runs.write_history(tmp_path / "quick" / str(seed), [HISTORY[0]] * epochs)
    table = runs.load(tmp_path)
    assert list(table.stale) == ["", "ema_decay, epochs"] and list(table.ema) == [False, True]
    with pytest.warns(UserWarning, match=r"^Left out, .* has changed: quick/1 \(ema_decay, epochs\): train .*\.$"):
        assert list(runs.current(table).seed) == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(runs.current(table[:1])) == 1 and runs.current(runs.load(tmp_path / "nowhere")).empty


def test_a_run_not_tested_yet_has_no_test_accuracy(finished_tiny):
    table = runs.load(finished_tiny.parent.parent)
    assert len(table) == 1 and table.test_accuracy.isna().all() and table.test_count.isna().all()


def test_every_metric_of_a_real_record_is_defined(finished_tiny, tmp_path, without_cifar10):
    shutil.copytree(finished_tiny, tmp_path / "run")
    run = evaluate.test_run(tmp_path / "run", stand_in=True)
    assert "corrupted" not in run.record
    evaluate.shifted_metrics(tmp_path / "run", (5,), count=20, stand_in=True)
    run = runs.read(tmp_path / "run")
    measured = {"test", "test_last", "corrupted", "images_per_second"}
    assert set(run.record["metrics"]) | measured == set(runs.DEFINITIONS) and measured <= set(run.record)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["definitions"] == runs.DEFINITIONS and stored["test"] == run.record["test"]


def test_the_recorded_runs_of_this_repository_are_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = runs.current(runs.load())
    for row in table.itertuples():
        assert len(row.history) == row.epochs, row.recipe
        best = row.history.loc[row.history.val_accuracy.idxmax()]
        assert best.epoch == row.best_epoch and round(best.val_accuracy, 6) == round(row.val_accuracy, 6), row.recipe


def test_where_the_last_epoch_was_kept_its_test_accuracy_is_that_of_the_run():
    tested = runs.load().dropna(subset="test_accuracy")
    same = tested[tested.best_epoch == tested.epochs]
    assert len(same) and (same.test_last_accuracy == same.test_accuracy).all()


def test_what_the_records_say_of_distorted_images_is_what_lies_beside_them():
    for path in sorted(runs.RECORDED.glob("*/*/shift.csv")):
        assert runs.read(path.parent).record["corrupted"] == evaluate.corrupted(pd.read_csv(path)), path.parent
