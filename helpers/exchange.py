"""Runs that travel: packed into zip files on one machine; on another checked like a stranger's before they are kept."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from helpers import checkpoint, distort, estimate, evaluate, runs
from helpers.augment import Augment
from helpers.data import CIFAR10
from helpers.model import count_parameters
from helpers.publish import halved
from helpers.recipe import Recipe, get
from helpers.runtime import CourseError, percent, replacing, shown, staging

WEIGHTS = {"best": runs.WEIGHTS, "last": runs.LAST}
LIMITS = {**dict.fromkeys(runs.RECORDS, 2**20), **dict.fromkeys(WEIGHTS.values(), 2**26)}  # bytes of a file
LARGEST, MOST = 2**31, 4_000  # bytes unpacked, and files, of one archive
HAIR = 0.002  # of accuracy: what half precision and another device's rounding may cost

_NAME = re.compile(r"([a-z0-9_-][a-z0-9_.-]*/(?:0|[1-9][0-9]*))/([a-z_.]+)", re.ASCII)

# What the tables beside a record hold, as far as anything here reads them: the values or (lowest, highest) of a column.
_SHARE, _LOSS, _KINDS = (0, 1), (0, 1e9), ["clean", *distort.KINDS]
_COLUMNS: dict[str, dict[str, Any]] = {
    "history.csv": {"epoch": _LOSS, "learning_rate": _LOSS, "train_loss": _LOSS, "train_accuracy": _SHARE,
                    "val_loss": _LOSS, "val_accuracy": _SHARE, "val_augmented_accuracy": _SHARE},
    "shift.csv": {"kind": _KINDS, "severity": [0, *distort.SEVERITIES], "accuracy": _SHARE, "low": _SHARE,
                  "high": _SHARE, "count": _LOSS, "calibration_error": _SHARE, "confidence": _SHARE},
    "reliability.csv": {"low": _SHARE, "high": _SHARE, "count": _LOSS, "confidence": _SHARE, "accuracy": _SHARE,
                        "images": ["clean", "distorted"]},
    evaluate.OWN_IMAGES: {"images": ["training", "validation", "augmented validation"], "strength": (0, 2),
                          "accuracy": _SHARE, "low": _SHARE, "high": _SHARE, "count": _LOSS},
    estimate.FILE: {"kind": _KINDS, "severity": [*distort.SEVERITIES], "method": ["ATC", "DoC", "agreement"],
                    "predicted": _SHARE, "true": _SHARE, "count": _LOSS},
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- packing


def pack(
    path: str | Path, folders: Iterable[str | Path], weights: str = "best", split_mb: float | None = None
) -> list[Path]:
    """Write tested runs into `path` (.zip): their records, and `weights` ("best", "last" or "none") in half precision.

    With `split_mb`, as many archives of at most that many million bytes as it takes, named `path` with -1of3, -2of3 ...
    behind it, in place of what an earlier export of that name left; each holds whole runs and can be taken in by
    itself. Returns the archives; the same runs give the same bytes. Raises CourseError for a run that is unfinished or
    not tested, and for one that does not fit.
    """
    path = Path(path)
    if split_mb is not None and not 0.01 <= split_mb <= LARGEST / 1e6:
        raise CourseError(f"--split-mb {split_mb:g} is out of range: expected 0.01 to {LARGEST / 1e6:,.0f}.")
    limit = LARGEST if split_mb is None else int(split_mb * 1e6)
    if weights not in (*WEIGHTS, "none"):
        raise CourseError(f"There are no weights {weights!r} to export: expected {', '.join(WEIGHTS)} or none.")
    if path.suffix != ".zip":
        raise CourseError(f"{shown(path)} is no name for an archive: expected one that ends in .zip.")
    parts: list[dict[str, bytes]] = []
    seen: dict[str, Path] = {}
    for run in map(runs.read, folders):
        if run.label in seen:
            raise CourseError(f"{shown(seen[run.label])} and {shown(run.path)} are both {run.label}: export one.")
        seen[run.label] = run.path
        content = _content(run, weights)
        if (size := _size(content)) > limit:
            raise CourseError(f"{run.label} takes {size / 1e6:.1f} MB and does not fit into {limit / 1e6:.1f} MB: "
                              "allow more with --split-mb, or leave its weights out with --weights none.")  # fmt: skip
        for part in parts:
            if _size(part) + size <= limit:
                part.update(content)
                break
        else:
            parts.append(content)
    if not parts:
        raise CourseError("There is no finished run to export: name their folders, or the --root that holds them.")
    names = [path] if len(parts) == 1 else [
        path.with_stem(f"{path.stem}-{number}of{len(parts)}") for number in range(1, len(parts) + 1)
    ]  # fmt: skip
    with ExitStack() as all_or_none:
        for name, part in zip(names, parts, strict=True):
            _write(all_or_none.enter_context(replacing(name)), part)
    for old in path.parent.iterdir():  # of an export before this: together with these they could not be taken in
        if re.fullmatch(re.escape(path.stem) + r"(-\d+of\d+)?\.zip", old.name) and old not in names:
            old.unlink()
    return names


def _content(run: runs.Run, weights: str) -> dict[str, bytes]:
    """Name in the archive -> bytes, of one run."""
    if not run.path.is_dir():
        raise CourseError(f"{shown(run.path)} is one file of weights: export the folder of a run.")
    if "test" not in run.record:
        raise CourseError(f"{shown(run.path)} has not been tested: run `python -m helpers evaluate` on it first.")
    if len(run.history) != run.record["recipe"]["epochs"]:
        raise CourseError(f"{shown(run.path)} has {len(run.history)} rows of history for "
                          f"{run.record['recipe']['epochs']} epochs: train it again.")  # fmt: skip
    found = {name: (run.path / name).read_bytes() for name in runs.RECORDS if (run.path / name).exists()}
    if weights != "none":
        halves = halved(evaluate.load_model(run, last=weights == "last"))
        if not all(torch.isfinite(value).all() for value in halves.values()):  # what half precision cannot hold
            raise CourseError(f"The weights of {run.label} are too large for half precision: use --weights none.")
        found[WEIGHTS[weights]] = save(halves)
    return {f"{run.label}/{name}": content for name, content in found.items()}


def _size(content: dict[str, bytes]) -> int:
    """Bytes that an archive of this takes at most: 76 a file and twice its name are the format's own."""
    return sum(len(value) + 2 * len(name) + 100 for name, value in content.items())


def _write(path: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in sorted(content.items()):
            info = zipfile.ZipInfo(name)  # dated 1980: the same bytes whenever it is written
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            packed = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            archive.writestr(info, value, packed)


# -------------------------------------------------------------------------------------------------------- taking in


def unpack(
    files: Sequence[str | Path], root: str | Path = runs.RECORDED, replace: bool = False, stand_in: bool = False
) -> list[str]:
    """Take the runs of one or more archives into the store `root`, all of them or none; a sentence for each.

    Nothing in an archive is believed: it may hold the known files of `<recipe>/<seed>/` alone; tables and records must
    be whole and agree with each other; weights must fit the recipe's network and, where its test set is here,
    reproduce the recorded accuracy. The recorded runs (data/runs) take only CIFAR-10 and recipes as they are now;
    another store also takes the rest, and the sentence says so. A run that is here already is left as it is, with
    what was missing added; if it differs, `replace` puts the archive's in its place.
    Raises CourseError, naming the archive or run and what is wrong with it, before anything in the store has changed.
    """
    root = Path(root)
    with staging(root) as temporary:
        labels: dict[str, Path] = {}
        for path in map(Path, files):
            before = dict(labels)
            for label, name, content in _members(path):
                if label in before:
                    raise CourseError(f"{shown(path)} and {shown(before[label])} both hold {label}: take in one.")
                labels[label] = path
                try:
                    (temporary / "new" / label).mkdir(parents=True, exist_ok=True)
                    (temporary / "new" / label / name).write_bytes(content)
                except OSError as error:
                    raise CourseError(f"Cannot write to {shown(root)} ({error.strerror}), and nothing was taken in: "
                                      "free some space or choose another --root.") from error  # fmt: skip
        said, moves = [], []
        for label, path in labels.items():
            new = temporary / "new" / label
            with _refusal(f"{label} in {shown(path)}", new):
                notes = check(new, label, root.resolve() == runs.RECORDED.resolve(), stand_in)
            state = _compare(new, root / label, replace)
            if state != "here already":
                moves.append(label)
            said.append(f"{label}: {'; '.join([state, *notes])}")
        _move(moves, temporary, root)
    return said


@contextmanager
def _refusal(what: str, folder: Path | None = None) -> Iterator[None]:
    """One sentence for whatever a foreign file does to a reader, which can fail anywhere and with any type.

    `folder`, where `what` lies for the moment, is not named.
    """
    try:
        yield
    except CourseError as error:
        reason = str(error).rstrip(".")
        if folder:
            reason = reason.replace(f"{shown(folder)}/", "its ").replace(shown(folder), "it")
        raise CourseError(f"{what} was refused, and nothing was taken in: {reason}.") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CourseError(f"{what} cannot be read, and nothing was taken in ({reason}).") from error


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """The files of an archive, each after a look at its name, kind and size: the run's label, the name, the content."""
    if not path.is_file():
        raise CourseError(f"There is no file {shown(path)}, and nothing was taken in: give what `runs export` wrote.")
    with _refusal(shown(path)), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST or sum(member.file_size for member in members) > LARGEST:
            raise CourseError(f"it holds more than {MOST:,} files or {LARGEST:,} bytes")
        if not members:
            raise CourseError("it holds no run")
        seen = set()
        for member in members:
            match = _NAME.fullmatch(member.orig_filename)
            if not match or match[2] not in LIMITS:
                raise CourseError(f"it holds {member.orig_filename[:100]!r}, and should hold <recipe>/<seed>/ with "
                                  f"{', '.join(LIMITS)} alone")  # fmt: skip
            if member.orig_filename in seen:
                raise CourseError(f"it holds {member.filename} twice")
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                raise CourseError(f"{member.filename} is a link or device, and not a file")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CourseError(f"{member.filename} is packed in a way that is not used here")
            with archive.open(member) as file:
                content = file.read(LIMITS[match[2]] + 1)  # the size that an archive states is only what it states
            if len(content) > LIMITS[match[2]]:
                raise CourseError(f"{member.filename} is longer than {LIMITS[match[2]]:,} bytes")
            seen.add(member.orig_filename)
            yield match[1], match[2], content


# --------------------------------------------------------------------------------------------------------- checking


def check(folder: Path, label: str, recorded: bool, stand_in: bool) -> list[str]:
    """Raise CourseError if anything about an unpacked run is not as `pack` writes it; else what to say about it."""
    for name in runs.RECORDS[:2]:
        if not (folder / name).exists():
            raise CourseError(f"it has no {name}")
    record = runs.read(folder).record
    recipe, test = Recipe.from_dict(record["recipe"]), record.get("test")
    if f"{recipe.name}/{recipe.seed}" != label:
        raise CourseError(f"its record is that of {recipe.name}/{recipe.seed}")
    notes = []
    for wrong in _foreign(record):
        if recorded:
            raise CourseError(f"{wrong}, and the recorded runs are of CIFAR-10 and of recipes as they are now: choose "
                              "another --root for it")  # fmt: skip
        notes.append(wrong)
    if not test:
        raise CourseError("it has not been tested")
    with torch.device("meta"):  # shapes without memory, however large a network the record claims
        network = recipe.network()
    if record["parameters"] != count_parameters(network):
        raise CourseError(f"it has {record['parameters']:,} parameters, and its recipe {count_parameters(network):,}")
    for name in _COLUMNS:
        if (folder / name).exists():
            _check_table(folder / name)
    _check_history(pd.read_csv(folder / "history.csv"), record)
    _check_test(test, folder / "test_correct.txt")
    if "test_last" in record:
        _check_test(record["test_last"])
    if "corrupted" in record and (folder / "shift.csv").exists() and not evaluate.is_told(runs.Run(folder, record)):
        raise CourseError("its shift.csv and its accuracy on distorted images differ")
    for which, name in WEIGHTS.items():
        if (folder / name).exists():
            notes.append(_reproduce(runs.Run(folder, record), which, stand_in))
    return [percent(test["accuracy"]) + " of the test images", *notes]


def _foreign(record: dict[str, Any]) -> Iterator[str]:
    """What keeps a sound record out of the recorded runs."""
    name = record["recipe"]["name"]
    if record["data"] != CIFAR10:
        yield f"trained on {record['data'][:50]}"
    try:
        get(name)
    except CourseError:
        yield f"there is no recipe {name}"
    if fields := runs.stale(record["recipe"]):
        yield f"the recipe {name} is another now ({fields})"


def _check_table(path: Path) -> None:
    table = pd.read_csv(path)
    for column, allowed in _COLUMNS[path.name].items():
        if column not in table:
            raise CourseError(f"its {path.name} has no column {column}")
        values = table[column]
        good = values.isin(allowed) if isinstance(allowed, list) else pd.to_numeric(values).between(*allowed)
        if not good.all():
            raise CourseError(f"its {path.name} has {str(values[~good].iloc[0])[:50]!r} as {column}")


def _check_history(history: pd.DataFrame, record: dict[str, Any]) -> None:
    epochs = record["recipe"]["epochs"]
    if history.epoch.tolist() != list(range(1, epochs + 1)):
        raise CourseError(f"its history.csv has {len(history)} rows for {epochs} epochs, or not in order")
    best = history.loc[history.val_accuracy.idxmax()]
    pairs = {name: (best if name.startswith("val") else history.iloc[-1])[name] for name in record["metrics"]
             if name in history}  # fmt: skip
    wrong = [name for name, value in pairs.items() if abs(value - record["metrics"][name]) > 1e-6]
    wrong += ["best_epoch"] if best.epoch != record["best_epoch"] else []
    if wrong:
        raise CourseError(f"its record and its history.csv differ in {', '.join(wrong)}")


def _check_test(test: dict[str, Any], bits: Path | None = None) -> None:
    right = test["accuracy"] * test["count"]
    again = evaluate.share(round(right), test["count"])
    if max(abs(test[name] - each) for name, each in zip(("accuracy", "low", "high"), again[:3], strict=True)) > 1e-6:
        raise CourseError("its test accuracy is not a share of its test images, or its interval is another")
    if "confusion" in test:
        matrix = np.array(test["confusion"])
        if (matrix.trace(), matrix.sum()) != (round(right), test["count"]):
            raise CourseError("its confusion and its test accuracy differ")
    if bits and bits.exists():
        found = np.unpackbits(np.frombuffer(bytes.fromhex(bits.read_text().strip()), np.uint8))
        if len(found) != -(-test["count"] // 8) * 8 or abs(found.sum() - right) > HAIR * test["count"]:
            raise CourseError("its test_correct.txt and its test accuracy differ")
    if "mirrored" in test:
        _check_test(test["mirrored"])
        if test["mirrored"]["count"] != test["count"]:
            raise CourseError("its test accuracy and that with mirror images are of different images")


def _reproduce(run: runs.Run, which: str, stand_in: bool) -> str:
    """Test weights again where the run's own test set is here: the record must be of these weights."""
    model = evaluate.load_model(run, last=which == "last")
    claimed = run.record.get("test" if which == "best" else "test_last")
    if not claimed:
        return f"{which} weights, of which the record says no accuracy"
    try:
        test = evaluate.own_test(run, stand_in)
    except CourseError:
        return f"{which} weights, not tested again: their test set is not here"
    logits = evaluate.predict(model, test.images, Augment("none"), run.record["recipe"]["precision"])
    found = evaluate.accuracy(logits, test.labels).value
    near = max(HAIR, 2.5 / len(test.labels))  # rounding may move two images of a small test set
    if claimed["count"] != len(test.labels) or abs(found - claimed["accuracy"]) > near:
        raise CourseError(f"its {which} weights classify {percent(found)} of {len(test.labels):,} test images right, "
                          f"and its record says {percent(claimed['accuracy'])} of {claimed['count']:,}")  # fmt: skip
    return f"{which} weights, here {percent(found)}"


# ---------------------------------------------------------------------------------------------------------- keeping


def _compare(new: Path, here: Path, replace: bool) -> str:
    """How a run stands to the one in the store; adds to `new` what of the old stays. CourseError if they differ."""
    if not here.exists():
        return "new"
    with checkpoint.hold(here):  # nobody is training there
        old = {path.name: path for path in here.iterdir() if path.is_file() and path.name != ".lock"}
    if not old:
        return "new"
    same_run = "run.json" in old and old["run.json"].read_bytes() == (new / "run.json").read_bytes()
    differs = [path.name for path in sorted(new.iterdir()) if path.name in old and path.name in runs.RECORDS
               and path.read_bytes() != old[path.name].read_bytes()]  # fmt: skip
    if not replace and (differs or not same_run):
        what = f"another {', '.join(differs)}" if differs else "an unfinished run"
        raise CourseError(f"{shown(here)} holds {what}, and nothing was taken in: --replace puts the archive's there.")
    if not same_run:
        return "replaced"
    for name, path in old.items():
        if name not in runs.RECORDS or not (new / name).exists():  # weights here may be in full precision
            shutil.copy2(path, new / name)
    if added := {path.name for path in new.iterdir()} - set(old):
        return f"here already, with {', '.join(sorted(added))} added"
    return "replaced" if differs else "here already"


def _move(labels: list[str], temporary: Path, root: Path) -> None:
    """Put the runs into place by renaming folders; if one cannot be, put back those before it."""
    done: list[str] = []
    try:
        for label in labels:
            done.append(label)
            if (root / label).exists():
                (temporary / "old" / label).parent.mkdir(parents=True, exist_ok=True)
                (root / label).rename(temporary / "old" / label)
            (root / label).parent.mkdir(parents=True, exist_ok=True)
            (temporary / "new" / label).rename(root / label)
    except BaseException as error:  # Ctrl-C too
        for label in reversed(done):
            if not (temporary / "new" / label).exists():
                (root / label).rename(temporary / "new" / label)
            if (temporary / "old" / label).exists():
                (temporary / "old" / label).rename(root / label)
        if not isinstance(error, OSError):
            raise
        raise CourseError(f"Cannot write {shown(root / done[-1])} ({error.strerror}): nothing was taken in.") from error
