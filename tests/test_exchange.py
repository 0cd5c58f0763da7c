"""Runs that travel: what is packed arrives, and what a stranger packs leaves the store as it was."""

import io
import json
import shutil
import stat
import struct
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from helpers import checkpoint, evaluate, exchange, recipe, runs
from helpers.runtime import CourseError

pytestmark = pytest.mark.usefixtures("one_thread", "without_cifar10")
RECORD = {"run.json", "history.csv", "shift.csv", "reliability.csv", "test_correct.txt"}


@pytest.fixture(scope="module")
def store(finished_tiny, tmp_path_factory):
    """A store with one tested run of `tiny`, tried on distorted images. Read it; copy it before changing it."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR10_ROOT", str(root / "nowhere"))
        shutil.copytree(finished_tiny, root / "tiny" / "0")
        evaluate.test_run(root / "tiny" / "0", stand_in=True)
        evaluate.shifted_metrics(root / "tiny" / "0", (3,), 50, stand_in=True)
        evaluate.correct_on_test(root / "tiny" / "0", stand_in=True)
    return root


@pytest.fixture(scope="module")
def content(store, tmp_path_factory):
    """The files of a sound archive without weights: name -> bytes."""
    return unzipped(exchange.pack(tmp_path_factory.mktemp("sound") / "a.zip", [store / "tiny" / "0"], "none")[0])


def unzipped(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, files, **fields):
    """An archive of (name, bytes) pairs, whatever the names; `fields` are set on every member."""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that comes twice
        for name, value in files:
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, with its backslash or zero byte
            for field, setting in fields.items():
                setattr(info, field, setting)
            archive.writestr(info, value)
    return path


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(files, root, match, **options):
    """The archive is refused with one sentence, and the store is as it was."""
    before = tree(root) if root.exists() else None
    with pytest.raises(CourseError, match=match) as caught:
        exchange.unpack(files, root, **options)
    assert "\n" not in str(caught.value) and "nothing was taken in" in str(caught.value)
    assert (tree(root) if root.exists() else None) == before
    assert not root.exists() or not [path for path in root.iterdir() if path.name.startswith(".")]


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_arrives_as_it_left_with_its_weights_in_half_precision(store, tmp_path, which):
    (path,) = exchange.pack(tmp_path / "a.zip", [store / "tiny" / "0"], which)
    lines = exchange.unpack([path], tmp_path / "there", stand_in=True)
    source, target = store / "tiny" / "0", tmp_path / "there" / "tiny" / "0"
    name = exchange.WEIGHTS[which]
    assert {path.name for path in target.iterdir()} == RECORD | {name}
    for file in RECORD:
        assert (target / file).read_bytes() == (source / file).read_bytes()
    ours, theirs = load_file(source / name), load_file(target / name)
    assert all(torch.equal(theirs[key], value.half() if value.is_floating_point() else value)
               for key, value in ours.items())  # fmt: skip
    (line,) = lines
    assert line.startswith("tiny/0: new; ") and "there is no recipe tiny" in line and f"{which} weights, here" in line
    again = evaluate.load_model(runs.read(target), last=which == "last")
    assert next(again.parameters()).dtype == torch.float32


def test_the_same_runs_are_the_same_bytes_and_parts_hold_whole_runs(store, tmp_path):
    for seed in (1, 2, 3):
        shutil.copytree(store / "tiny" / "0", tmp_path / "runs" / "tiny" / str(seed))
        record = runs.read(store / "tiny" / "0").record
        record["recipe"]["seed"] = seed
        runs.write_record(tmp_path / "runs" / "tiny" / str(seed), record)
    folders = sorted((tmp_path / "runs" / "tiny").iterdir())
    (whole,) = exchange.pack(tmp_path / "a.zip", folders)
    (again,) = exchange.pack(tmp_path / "b.zip", folders)
    assert whole.read_bytes() == again.read_bytes()
    size = sum(map(len, unzipped(whole).values())) // 3  # of a run, unpacked
    parts = exchange.pack(tmp_path / "c.zip", folders, split_mb=2.5 * size / 1e6)
    assert [path.name for path in parts] == ["c-1of2.zip", "c-2of2.zip"]
    assert all(path.stat().st_size <= 2.5 * size for path in parts)
    assert {name: value for path in parts for name, value in unzipped(path).items()} == unzipped(whole)
    exchange.unpack(parts, tmp_path / "there", stand_in=True)
    assert sorted(runs.load(tmp_path / "there").seed) == [1, 2, 3]
    (tmp_path / "c-other.zip").touch()
    exchange.pack(tmp_path / "c.zip", folders)  # one again, in place of two
    assert {path.name for path in tmp_path.glob("c*")} == {"c.zip", "c-other.zip"}
    exchange.pack(tmp_path / "c.zip", folders, split_mb=1.5 * size / 1e6)
    assert {path.name for path in tmp_path.glob("c*")} == {"c-1of3.zip", "c-2of3.zip", "c-3of3.zip", "c-other.zip"}
    with pytest.raises(CourseError, match=r"tiny/1 takes .* MB and does not fit into .* MB: .*--weights none"):
        exchange.pack(tmp_path / "d.zip", folders, split_mb=0.9 * size / 1e6)
    assert not list(tmp_path.glob("d*")) and not list(tmp_path.glob(".*"))


def test_all_archives_are_written_or_none(store, tmp_path, monkeypatch):
    for seed in (1, 2):
        shutil.copytree(store / "tiny" / "0", tmp_path / "tiny" / str(seed))
        record = runs.read(store / "tiny" / "0").record
        runs.write_record(tmp_path / "tiny" / str(seed), {**record, "recipe": {**record["recipe"], "seed": seed}})
    folders = sorted((tmp_path / "tiny").iterdir())
    size = sum(map(len, unzipped(exchange.pack(tmp_path / "whole.zip", folders[:1])[0]).values()))
    write, parts = exchange._write, []

    def full(path, part):
        parts.append(path)
        if len(parts) == 2:
            raise OSError(28, "No space left on device")
        write(path, part)

    monkeypatch.setattr(exchange, "_write", full)
    with pytest.raises(CourseError, match="No space left on device"):
        exchange.pack(tmp_path / "a.zip", folders, split_mb=1.5 * size / 1e6)
    assert len(parts) == 2 and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["whole.zip"]


def test_what_cannot_be_packed_is_said(store, finished_tiny, tmp_path):
    run = store / "tiny" / "0"
    shutil.copytree(run, tmp_path / "twin")
    for folders, weights, name, said in (
        ([finished_tiny], "best", "a.zip", "has not been tested"),
        ([run, tmp_path / "twin"], "best", "a.zip", "are both tiny/0"),
        ([tmp_path], "best", "a.zip", "is not a finished run"),
        ([run], "worst", "a.zip", "no weights 'worst' to export: expected best, last or none"),
        ([run], "best", "a.tar", r"expected one that ends in \.zip"),
        ([], "best", "a.zip", "no finished run to export"),
    ):
        with pytest.raises(CourseError, match=said):
            exchange.pack(tmp_path / name, folders, weights)
    for size in (0.0, 0.005, float("nan"), float("inf"), 1e9):
        with pytest.raises(CourseError, match=r"--split-mb .* is out of range: expected 0\.01 to 2,147"):
            exchange.pack(tmp_path / "a.zip", [run], split_mb=size)
    history = (run / "history.csv").read_text()
    head, shorter = history.splitlines()[0], history[: history[:-1].rindex("\n")]
    for left, said in ((None, r"history\.csv cannot be read"), (head, "has 0 rows of history for 4 epochs"),
                       (shorter, "has 3 rows of history")):  # fmt: skip
        (tmp_path / "twin" / "history.csv").unlink()
        if left is not None:
            (tmp_path / "twin" / "history.csv").write_text(left)
        with pytest.raises(CourseError, match=said):
            exchange.pack(tmp_path / "a.zip", [tmp_path / "twin"])
        (tmp_path / "twin" / "history.csv").write_text(history)
    (tmp_path / "twin" / "best.safetensors").unlink()
    with pytest.raises(CourseError, match=r"best\.safetensors cannot be read"):
        exchange.pack(tmp_path / "a.zip", [tmp_path / "twin"])
    huge = {name: value * 1e6 if value.is_floating_point() else value
            for name, value in load_file(run / "best.safetensors").items()}  # fmt: skip
    (tmp_path / "twin" / "best.safetensors").write_bytes(save(huge))
    with pytest.raises(CourseError, match="too large for half precision"):
        exchange.pack(tmp_path / "a.zip", [tmp_path / "twin"])
    assert not (tmp_path / "a.zip").exists()


# -------------------------------------------------------------------------------------------- what is here already


def test_nothing_here_is_overwritten_unless_asked(store, tmp_path):
    (path,) = exchange.pack(tmp_path / "a.zip", [store / "tiny" / "0"])
    here = tmp_path / "here"
    shutil.copytree(store, here)
    before = tree(here)
    assert exchange.unpack([path], here)[0].startswith("tiny/0: here already; ")
    assert tree(here) == before, "full precision stays where it is"

    (here / "tiny" / "0" / "shift.csv").unlink()
    assert "here already, with shift.csv added" in exchange.unpack([path], here)[0]
    assert tree(here) == before

    (here / "tiny" / "0" / "history.csv").write_bytes(before["tiny/0/history.csv"] + b"\n")
    refused([path], here, "holds another history.csv, .*--replace")
    assert "replaced" in exchange.unpack([path], here, replace=True)[0]
    assert tree(here) == before

    record = runs.read(here / "tiny" / "0").record
    runs.write_record(here / "tiny" / "0", {**record, "seconds": record["seconds"] + 1})
    refused([path], here, r"holds another run\.json")
    exchange.unpack([path], here, replace=True)
    assert set(tree(here)) == {f"tiny/0/{name}" for name in RECORD | {"best.safetensors"}}, "another run goes whole"
    assert tree(here)["tiny/0/run.json"] == before["tiny/0/run.json"]


def test_a_run_in_training_is_left_alone(store, content, tmp_path):
    path = zipped(tmp_path / "a.zip", content.items())
    here = tmp_path / "here"
    (here / "tiny" / "0").mkdir(parents=True)
    (here / "tiny" / "0" / checkpoint.SLOTS[0]).write_bytes(b"half a run")
    refused([path], here, "holds an unfinished run")
    with checkpoint.hold(here / "tiny" / "0"), pytest.raises(CourseError, match="Another process is training"):
        exchange.unpack([path], here, replace=True)
    exchange.unpack([path], here, replace=True)
    assert set(tree(here)) == set(content)


def test_all_archives_or_none(content, tmp_path, monkeypatch):
    good = zipped(tmp_path / "good.zip", content.items())
    bad = zipped(tmp_path / "bad.zip", [("x/0/run.json", b"{}")])
    refused([good, bad], tmp_path / "there", r"x/0 in .*bad\.zip was refused.*no history\.csv")
    assert not (tmp_path / "there").exists()
    with pytest.raises(CourseError, match=r"both hold tiny/0"):
        exchange.unpack([good, good], tmp_path / "there")

    other = {name.replace("tiny/0", "tiny/1"): value for name, value in content.items()}
    record = json.loads(other["tiny/1/run.json"])
    record["recipe"]["seed"] = 1
    other["tiny/1/run.json"] = json.dumps(record).encode()
    second = zipped(tmp_path / "second.zip", other.items())
    here = tmp_path / "here"
    (here / "tiny" / "1").mkdir(parents=True)
    (here / "tiny" / "1" / "run.json").write_text("what was there")
    rename, count = type(here).rename, []

    def failing(self, target):
        count.append(target)
        if len(count) == 3:  # the first run is in place, the second's old folder is out of the way
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(here), "rename", failing)
    refused([good, second], here, "No space left on device", replace=True)
    assert tree(here) == {"tiny/1/run.json": b"what was there"}

    def stopped(self, target):
        count.append(target)
        if len(count) == 3:
            raise SystemExit(130)  # Ctrl-C
        return rename(self, target)

    count.clear()
    monkeypatch.setattr(type(here), "rename", stopped)
    with pytest.raises(SystemExit):
        exchange.unpack([good, second], here, replace=True)
    assert tree(here) == {"tiny/1/run.json": b"what was there"}
    monkeypatch.undo()
    monkeypatch.setattr(type(here), "write_bytes", lambda self, value: (_ for _ in ()).throw(OSError(28, "disk full")))
    refused([good], here, r"^Cannot write to \S*/here \(disk full\), and nothing was taken in: free some space")
    monkeypatch.undo()


def test_the_recorded_runs_take_cifar10_and_current_recipes_alone(content, tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(runs, "RECORDED", tmp_path / "recorded")

    def changed(**changes):
        record = json.loads(content["tiny/0/run.json"])
        record |= {"data": changes.pop("data", "CIFAR-10")}
        record["recipe"] |= changes
        return zipped(tmp_path / "a.zip", {**content, "tiny/0/run.json": json.dumps(record).encode()}.items())

    refused([changed()], runs.RECORDED, "there is no recipe tiny, and the recorded runs are of CIFAR-10")
    monkeypatch.setitem(recipe.RECIPES, "tiny", tiny)
    refused([changed(data="stand-in")], runs.RECORDED, "trained on stand-in, and the recorded runs")
    refused([changed(momentum=0.5)], runs.RECORDED, r"the recipe tiny is another now \(momentum\)")
    (line,) = exchange.unpack([changed(momentum=0.5)], tmp_path / "there")
    assert "the recipe tiny is another now (momentum)" in line
    (line,) = exchange.unpack([changed()], runs.RECORDED)
    assert line.startswith("tiny/0: new; ") and line.endswith("% of the test images")
    assert len(runs.current(runs.load(runs.RECORDED))) == 1


# -------------------------------------------------------------------------------------------------- hostile archives


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../tiny/0/run.json", "tiny/../../x/run.json", "tiny/0/../run.json", "tiny/0/run.json/", "tiny/0/",
    "tiny/00/run.json", "tiny/-1/run.json", "tiny/0/evil.py", "tiny/0/sub/run.json", "run.json", "0/run.json",
    "tiny\\0\\run.json", "tiny/0/run.json\0.txt", "C:/tiny/0/run.json", "Tiny/0/run.json", "tiny/٠/run.json",
    "tiny/0/.lock", "tiny/0/checkpoint-a.pt", "./tiny/0/run.json", "", "tiny/0/run.json ",
])  # fmt: skip
def test_a_name_that_is_not_ours_is_refused(content, tmp_path, name):
    path = zipped(tmp_path / "a.zip", [*content.items(), (name, b"x")])
    refused([path], tmp_path / "there", r"was refused.*(should hold <recipe>/<seed>/|twice)")
    assert not (tmp_path / "there").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


def test_a_name_that_comes_twice_is_refused(content, tmp_path):
    path = zipped(tmp_path / "a.zip", [*content.items(), ("tiny/0/run.json", content["tiny/0/run.json"])])
    refused([path], tmp_path / "there", r"it holds tiny/0/run\.json twice")


def test_links_devices_and_other_packings_are_refused(content, tmp_path):
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR):
        path = zipped(tmp_path / "a.zip", content.items(), external_attr=(kind | 0o777) << 16)
        refused([path], tmp_path / "there", "is a link or device")
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = zipped(tmp_path / "a.zip", content.items(), compress_type=packing)
        refused([path], tmp_path / "there", "packed in a way that is not used here")


def test_too_much_is_refused(content, tmp_path, monkeypatch):
    bomb = [*content.items(), ("tiny/0/estimates.csv", b"0" * (2**20 + 1))]
    path = zipped(tmp_path / "a.zip", bomb, compress_type=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused([path], tmp_path / "there", r"estimates\.csv is longer than 1,048,576 bytes")
    lying = path.read_bytes()  # the archive says that it holds 4 bytes, and holds a megabyte
    path.write_bytes(lying.replace(struct.pack("<L", 2**20 + 1), struct.pack("<L", 4)))
    refused([path], tmp_path / "there", "cannot be read, .*BadZipFile")
    monkeypatch.setattr(exchange, "MOST", 3)
    refused([zipped(tmp_path / "a.zip", content.items())], tmp_path / "there", "more than 3 files")
    monkeypatch.setattr(exchange, "LARGEST", 1_000)
    refused([zipped(tmp_path / "a.zip", content.items())], tmp_path / "there", "or 1,000 bytes")


def test_what_is_no_archive_is_refused(content, tmp_path):
    for value in (b"", b"PK", b"\x1f\x8b\x08", json.dumps({}).encode(), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "a.zip").write_bytes(value)
        refused([tmp_path / "a.zip"], tmp_path / "there", "cannot be read|it holds no run")
    refused([tmp_path / "nowhere.zip"], tmp_path / "there", r"There is no file \S+nowhere\.zip, and")
    refused([tmp_path], tmp_path / "there", "There is no file")
    locked = bytearray(zipped(tmp_path / "a.zip", content.items()).read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    locked[locked.index(b"PK\x03\x04") + 6] |= 1
    (tmp_path / "a.zip").write_bytes(locked)
    refused([tmp_path / "a.zip"], tmp_path / "there", "cannot be read.*encrypted")


def test_nothing_that_differs_from_itself_is_believed(content, tmp_path):
    """Each entry changes one thing in a sound archive, and names what is then said of it."""
    names = {name.split("/")[2]: name for name in content}

    def record(change):
        value = json.loads(content[names["run.json"]])
        change(value)
        return {names["run.json"]: json.dumps(value).encode()}

    def text(name, old, new):
        assert old in content[names[name]].decode()
        return {names[name]: content[names[name]].decode().replace(old, new, 1).encode()}

    rows = content[names["history.csv"]].decode().splitlines(keepends=True)
    better, more = evaluate.share(1_999, 2_000), evaluate.share(2_008, 2_008)

    def longer(r):
        r["test"].update(count=more.count, accuracy=more.value, low=more.low, high=more.high)
        r["test"]["confusion"] = [[251 * (row == column) for column in range(8)] for row in range(8)]

    for changed, said in (
        (record(lambda r: r["recipe"].update(seed=1)), r"its record is that of tiny/1"),
        (record(lambda r: r["recipe"].update(name="../x")), "name"),
        (record(lambda r: r["recipe"].update(epochs=5)), r"history\.csv has 4 rows for 5 epochs"),
        (record(lambda r: r["recipe"].update(width=10**9)), "width=1000000000 is out of range"),
        (record(lambda r: r["recipe"].update(blocks=[50, 50, 50, 50], width=512)), "parameters, and its recipe"),
        (record(lambda r: r["recipe"].update(colour="red")), "no field 'colour'"),
        (record(lambda r: r.update(best_epoch=r["best_epoch"] % 4 + 1)), r"differ in best_epoch"),
        (record(lambda r: r["metrics"].update(val_accuracy=0.99)), "differ in val_accuracy"),
        (record(lambda r: r["metrics"].update(train_loss=float("nan"))), "NaN is no finite number"),
        (record(lambda r: r["test"].update(accuracy=0.12345)), "not a share of its test images"),
        (record(lambda r: r["test"].update(accuracy=r["test"]["low"] - 0.01)), "not a share of its test images"),
        (record(lambda r: r["test"].update(low=0.0)), "or its interval is another"),
        (record(lambda r: r["test"].update(accuracy=better.value, low=better.low, high=better.high)),
         "its confusion and its test accuracy differ"),
        (record(lambda r: r["test_last"].update(accuracy=0.99)), "or its interval is another"),
        (record(longer), "test_correct.txt and its test accuracy"),
        (record(lambda r: r["corrupted"].update(accuracy=r["corrupted"]["accuracy"] + 2e-5)),
         r"its shift\.csv and its accuracy on distorted images differ"),
        (record(lambda r: r["corrupted"].update(count=51)), r"its shift\.csv and its accuracy on distorted images"),
        (record(lambda r: r["corrupted"].update(severities=[1])), r"its shift\.csv and its accuracy on distorted"),
        (record(lambda r: r.pop("test")), "it has not been tested"),
        (record(lambda r: r.update(parameters=7)), "it has 7 parameters"),
        (record(lambda r: r.pop("commit")), r"it is not a finished run \(record must contain \['commit'\] properties"),
        ({names["run.json"]: b"[" * 100_000}, "cannot be read|is not a finished run"),
        ({names["history.csv"]: "".join(rows[:-1]).encode()}, "has 3 rows for 4 epochs"),
        ({names["history.csv"]: "".join([rows[0], rows[2], rows[1], *rows[3:]]).encode()}, "or not in order"),
        (text("history.csv", "val_accuracy", "accuracy"), "has no column val_accuracy"),
        (text("history.csv", "\n1,", "\n1,nan,"), "cannot be read|history.csv"),
        (text("shift.csv", "fog", "<script>"), r"shift\.csv has '<script>' as kind"),
        (text("shift.csv", "clean,0,0.", "clean,0,7."), r"shift\.csv has '7\.\d+' as accuracy"),
        (text("reliability.csv", "distorted", "other"), r"reliability\.csv has 'other' as images"),
        ({names["test_correct.txt"]: b"ff" * 250}, r"test_correct\.txt and its test accuracy differ"),
        ({names["test_correct.txt"]: b"__import__('os')"}, "cannot be read"),
        ({"tiny/0/own_images.csv": b"images\ntest\n"}, r"own_images\.csv has 'test' as images"),
        ({"tiny/0/estimates.csv": b"kind,severity\nfog,3\n"}, r"estimates\.csv has no column method"),
        ({"tiny/0/best.safetensors": b"\xff" * 8}, "cannot be read"),
        ({"tiny/0/best.safetensors": save({"x": torch.zeros(3)})}, "not of its recipe's network"),
    ):  # fmt: skip
        path = zipped(tmp_path / "a.zip", {**content, **changed}.items())
        refused([path], tmp_path / "there", said)
    for name in ("run.json", "history.csv"):
        kept = [(key, value) for key, value in content.items() if not key.endswith(name)]
        refused([zipped(tmp_path / "a.zip", kept)], tmp_path / "there", f"it has no {name}")


def test_a_mirrored_accuracy_that_is_none_is_refused(content, tmp_path):
    record = json.loads(content["tiny/0/run.json"])
    record["test"]["mirrored"].update(accuracy=0.999, low=0.0, high=0.001, count=7)
    files = {**content, "tiny/0/run.json": json.dumps(record).encode()}
    refused([zipped(tmp_path / "a.zip", files.items())], tmp_path / "there", "accuracy")


def test_weights_of_another_network_or_training_are_refused(store, content, tmp_path):
    weights = load_file(store / "tiny" / "0" / "best.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 4)
    for changed, said in (
        ({**weights, name: weights[name][..., :1].contiguous()}, "not of its recipe's network"),
        ({**weights, name: weights[name].to(torch.int32)}, "not of its recipe's network"),
        ({**weights, name: weights[name] * float("nan")}, "not finite"),
        ({**weights, "more": torch.zeros(1)}, "not of its recipe's network"),
        ({key: torch.zeros_like(value) for key, value in weights.items()}, "% of 2,000 test images right, and its"),
    ):
        path = zipped(tmp_path / "a.zip", {**content, "tiny/0/best.safetensors": save(changed)}.items())
        refused([path], tmp_path / "there", said, stand_in=True)
    path = zipped(tmp_path / "a.zip", {**content, "tiny/0/best.safetensors": save(weights)}.items())
    (line,) = exchange.unpack([path], tmp_path / "blind")
    assert "not tested again: their test set is not here" in line


def test_an_accuracy_counted_on_other_images_is_not_that_of_the_weights(store, content, tmp_path):
    record = json.loads(content["tiny/0/run.json"])
    half = evaluate.share(round(record["test"]["accuracy"] * 1_000), 1_000)
    record["test"] = {"accuracy": half.value, "low": half.low, "high": half.high, "count": half.count}
    files = {**content, "tiny/0/run.json": json.dumps(record).encode(),
             "tiny/0/best.safetensors": (store / "tiny" / "0" / "best.safetensors").read_bytes()}  # fmt: skip
    del files["tiny/0/test_correct.txt"]
    said = r"of 2,000 test images right, and its record says \S+ % of 1,000"
    refused([zipped(tmp_path / "a.zip", files.items())], tmp_path / "there", said, stand_in=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_taken_whole_or_not_at_all(content, tmp_path, data):
    buffer = io.BytesIO()
    zipped(buffer, content.items(), compress_type=zipfile.ZIP_DEFLATED)
    torn = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        torn[data.draw(st.integers(0, len(torn) - 1))] = data.draw(st.integers(0, 255))
    torn = torn[: data.draw(st.one_of(st.just(len(torn)), st.integers(0, len(torn))))]
    path, root = tmp_path / "a.zip", tmp_path / "there"
    path.write_bytes(torn)
    shutil.rmtree(root, ignore_errors=True)
    try:
        exchange.unpack([path], root)
    except CourseError as error:
        assert "\n" not in str(error)
        assert not root.exists()
    else:
        assert tree(root).items() <= content.items(), "what came in is what was packed; a file may have lost its entry"
        assert {"tiny/0/run.json", "tiny/0/history.csv"} <= set(tree(root))
