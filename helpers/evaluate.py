"""Predictions, accuracy with intervals, confusion, calibration; clean, mirrored, corrupted. Opens the test labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from helpers import distort, runs
from helpers.augment import STAGES, Augment, Settings
from helpers.data import STAND_IN, ImageSet, load_set, load_shifted, source, split_train_val
from helpers.recipe import Recipe
from helpers.runtime import CourseError, generator, has_bfloat16, percent, pick_device, replacing, shown

OWN_IMAGES = "own_images.csv"


class Accuracy(NamedTuple):
    """A share in [0, 1] with its 95 % Wilson interval and the number of images it was counted on."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of a recipe as a context; the weights stay float32 either way.

    So does the arithmetic of a recipe in bfloat16 on a device that would only imitate it: the record's device says so.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" and has_bfloat16(device))


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    augment: Augment,
    precision: str = "bfloat16",
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Logits float32 [N, classes] of uint8 images [N, 3, H, W]; dropout off, batch norm by its running statistics.

    batch_size: by default 500 on a GPU and 100 on a CPU, where the C library asks the system anew for every block of
    memory above 32 MiB, which costs more than a larger batch saves.
    """
    device = next(model.parameters()).device
    batch_size = batch_size or (500 if device.type == "cuda" else 100)
    was_training = model.training
    model.eval()
    logits = []
    for batch in images.split(batch_size):
        x = augment(batch.to(device), generator).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            logits.append(model(x).float())
    model.train(was_training)
    return torch.cat(logits)


def predict_mirrored(model: nn.Module, images: Tensor, precision: str = "bfloat16") -> tuple[Tensor, Tensor]:
    """Logits of images as `predict` gives them, and with test-time augmentation by flipping, both [N, classes].

    The second are the log of the mean softmax of each image and its mirror image. Log-probabilities serve as logits:
    their softmax is that mean.
    """
    logits, flipped = (predict(model, side, Augment("none"), precision) for side in (images, images.flip(3)))
    return logits, torch.logaddexp(logits.log_softmax(1), flipped.log_softmax(1)) - math.log(2)


def share(correct: float, count: int) -> Accuracy:
    """correct / count with its interval (Wilson 1927, through statsmodels); correct may be a mean of several counts.

    Raises CourseError for a count of 0.
    """
    if not count:
        raise CourseError("There are no images to count on: give at least one.")
    low, high = proportion_confint(correct, count, method="wilson")
    value = correct / count  # rounding may leave the ends of an interval at 0 or 1 on the wrong side of it
    return Accuracy(value, min(float(low), value), max(float(high), value), count)


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 accuracy with its interval."""
    return share(int((logits.argmax(1).cpu() == labels.cpu()).sum()), len(labels))


def confusion(logits: Tensor, labels: Tensor, classes: int = 10) -> list[list[int]]:
    """Counts [true][predicted]."""
    return confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), labels=range(classes)).tolist()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: |confidence - accuracy| over equal bins (Guo et al. 2017, eq. 3)."""
    table = reliability(logits, labels, bins)
    return float((table["count"] * (table.confidence - table.accuracy).abs()).sum() / len(labels))


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """What calibration_error sums: one row per bin of confidence that holds images, with columns low, high (the bin's
    edges), count, confidence (mean) and accuracy, all but the count in [0, 1].
    """
    confidence, predicted = logits.softmax(1).max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    table = pd.DataFrame({
        "bin": which.cpu().numpy(), "count": 1, "confidence": confidence.double().cpu().numpy(),
        "accuracy": (predicted == labels.to(predicted.device)).double().cpu().numpy(),
    })  # fmt: skip
    table = table.groupby("bin").agg({"count": "size", "confidence": "mean", "accuracy": "mean"}).reset_index()
    table.insert(0, "high", (table["bin"] + 1) / bins)
    table.insert(0, "low", table.pop("bin") / bins)
    return table


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """accuracy, low, high (Wilson, 95 %), count, top_2, loss (negative log-likelihood, nats), calibration_error."""
    logits, labels = logits.cpu(), labels.cpu()
    value, low, high, count = accuracy(logits, labels)
    return {
        "accuracy": value,
        "low": low,
        "high": high,
        "count": count,
        "top_2": float((logits.topk(2).indices == labels[:, None]).any(1).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "calibration_error": calibration_error(logits, labels),
    }


def per_class(counts: list[list[int]], classes: Sequence[str]) -> pd.DataFrame:
    """Recall of each class from a confusion matrix: columns class, accuracy, low, high (Wilson, 95 %), count.

    A class without images has no row.
    """
    rows = [
        (name, *share(row[i], sum(row))) for i, (name, row) in enumerate(zip(classes, counts, strict=True)) if any(row)
    ]
    return pd.DataFrame(rows, columns=["class", "accuracy", "low", "high", "count"])


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be stored as


def load_model(run: runs.Run, last: bool = False) -> nn.Module:
    """The network of a run with the weights of its best epoch (or of its last), float32 (stored so or in half), in
    evaluation mode. Raises CourseError where they are not there, damaged, not finite, or another network's.
    """
    recipe, path = Recipe.from_dict(run.record["recipe"]), run.path / runs.LAST if last else run.weights
    with torch.device("meta"):  # shapes without memory, however large a network the record claims
        model = recipe.network()
    try:
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CourseError(
            f"{shown(path)} cannot be read ({type(error).__name__}): weights are not kept in git; train "
            "the run again, or give a folder that has them."
        ) from error
    found, expected = ({name: (value.shape, torch.float32 if value.dtype in _FLOATS else value.dtype)
                        for name, value in each.items()} for each in (weights, model.state_dict()))  # fmt: skip
    if found != expected:
        raise CourseError(f"{shown(path)} is not of its recipe's network: train the run again.")
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise CourseError(f"{shown(path)} holds numbers that are not finite: train the run again.")
    model.to_empty(device="cpu").load_state_dict(weights)  # copies: the file may change while the network is used
    return model.to(pick_device(), memory_format=torch.channels_last).eval()


def summary(found: dict[str, Any]) -> pd.DataFrame:
    """The numbers of `report` as text: one row per metric, a column without and one with the mirror image."""
    columns = {"as they are": found, "mean softmax with the mirror image": found["mirrored"]}
    return pd.DataFrame({name: {
        "accuracy": str(Accuracy(part["accuracy"], part["low"], part["high"], part["count"])),
        "top-2 accuracy": percent(part["top_2"]), "negative log-likelihood": f"{part['loss']:.4f}",
        "calibration error": percent(part["calibration_error"]),
    } for name, part in columns.items()})  # fmt: skip


def report(model: nn.Module, test: ImageSet, precision: str) -> tuple[dict[str, Any], Tensor]:
    """What a record says of a network on a test set, and the network's logits float32 [N, classes].

    The record says `metrics` of the logits; `mirrored`, those of `predict_mirrored`; the classes; the confusion.
    """
    logits, mirrored = predict_mirrored(model, test.images, precision)
    found = {**metrics(logits, test.labels), "mirrored": metrics(mirrored, test.labels),
             "classes": list(test.classes), "confusion": confusion(logits, test.labels, len(test.classes))}  # fmt: skip
    return found, logits


def test_metrics(model: nn.Module, test: ImageSet, precision: str) -> dict[str, Any]:
    """What a record says of a network on a test set, see `report`."""
    return report(model, test, precision)[0]


def own_test(run: runs.Run, stand_in: bool = False) -> ImageSet:
    """The test set of the data that a run was trained on; CourseError where that is not here."""
    if run.record["data"] == STAND_IN and not stand_in and source(stand_in=True) == STAND_IN:
        raise CourseError(f"{shown(run.path)} was trained on the stand-in set: give --stand-in (stand_in=True).")
    test = load_set("test", stand_in)
    refuse_other_data(run, test)
    return test


def refuse_other_data(run: runs.Run, images: ImageSet) -> None:
    """Raise CourseError if these images are not of the data that a run was trained on."""
    if images.source != run.record["data"]:
        raise CourseError(
            f"{shown(run.path)} was trained on {run.record['data']}, the images here are {images.source}: evaluate it "
            "where its own data is."
        )


def tested(run: runs.Run, test: ImageSet) -> tuple[dict[str, Any], Tensor]:
    """What the record of a run says of its test set, and the logits float32 [N, classes] of the best epoch's weights.

    It says `test` of these weights and, where the weights of the last epoch are kept, `test_last` of those.
    """
    precision = run.record["recipe"]["precision"]
    found, logits = report(load_model(run), test, precision)
    entries, last = {"test": found}, logits
    if (run.path / runs.LAST).exists():
        if run.record["best_epoch"] < run.record["recipe"]["epochs"]:
            last = predict(load_model(run, last=True), test.images, Augment("none"), precision)
        entries["test_last"] = metrics(last, test.labels)
    return entries, logits


def test_run(path: str | Path, stand_in: bool = False) -> runs.Run:
    """Evaluate a finished run on the test set and add the result to its record, see `tested`.

    The run must be finished: its epoch was chosen on the validation split before a test label is read here.
    """
    run = runs.read(path)
    entries, _ = tested(run, own_test(run, stand_in))
    return runs.add_to_record(run.path, entries)


# --------------------------------------------------------------------------------- beyond the clean test accuracy


def distorted(
    test: ImageSet, severities: Iterable[int] = distort.SEVERITIES
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(kind, severity, images, labels) of a set distorted in every way of distort.KINDS."""
    for kind, severity in itertools.product(distort.KINDS, severities):
        yield kind, severity, distort.distort(test.images, kind, severity), test.labels


def read_corrupted(folder: Path) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(kind, severity, images, labels) of a CIFAR-10-C folder, whose `<kind>.npy` hold severities 1 to 5 in turn.

    Raises CourseError if a file is not of the published layout, or if there is none.
    """
    paths = [path for kind in distort.KINDS if (path := Path(folder) / f"{kind}.npy").exists()]
    if not paths:
        raise CourseError(
            f"{shown(folder)} holds no <kind>.npy of CIFAR-10-C: expected {distort.KINDS[0]}.npy or others."
        )
    for path in paths:
        images, labels, _ = load_shifted(path)
        if labels is None or len(labels) % 5 or not len(labels):
            raise CourseError(f"{shown(path)} is not five severities with their labels: expected 5 x N images beside "
                              "labels.npy, as CIFAR-10-C is published.")  # fmt: skip
        size = len(labels) // 5
        for severity, part in zip(
            distort.SEVERITIES, zip(images.split(size), labels.split(size), strict=True), strict=True
        ):
            yield path.stem, severity, *part


def corruption_table(
    model: nn.Module, precision: str, sets: Iterable[tuple[str, int, Tensor, Tensor]]
) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """A row a (kind, severity, images, labels), and the logits and labels of all of them, one after another.

    Columns: kind, severity, accuracy, low, high (Wilson, 95 %), count, calibration_error, confidence (mean).
    """
    rows, all_logits, all_labels = [], [], []
    for kind, severity, images, labels in sets:
        logits = predict(model, images, Augment("none"), precision).cpu()
        value = accuracy(logits, labels)._asdict()
        rows.append({
            "kind": kind, "severity": severity, "accuracy": value.pop("value"), **value,
            "calibration_error": calibration_error(logits, labels),
            "confidence": float(logits.softmax(1).max(1).values.mean()),
        })  # fmt: skip
        all_logits.append(logits)
        all_labels.append(labels)
    return pd.DataFrame(rows), torch.cat(all_logits), torch.cat(all_labels)


def mean_corruption_accuracy(table: pd.DataFrame) -> float:
    """Mean over the scored kinds of the mean over severities (Hendrycks and Dietterich 2019), in [0, 1]."""
    return float(table[table.kind.isin(distort.SCORED)].groupby("kind").accuracy.mean().mean())


def corrupted(table: pd.DataFrame) -> dict[str, Any]:
    """What a record says of distorted images, from the table that shifted_metrics writes: mean corruption accuracy in
    [0, 1], the images that each row counts, the severities.
    """
    severities = sorted(set(table.loc[table.kind.isin(distort.SCORED), "severity"].tolist()))
    accuracy = round(mean_corruption_accuracy(table), 6)  # of a CSV with as many decimals
    return {"accuracy": accuracy, "count": int(table["count"].iloc[0]), "severities": severities}


def is_told(run: runs.Run) -> bool:
    """Whether a run's record says of distorted images what the shift.csv beside it says; False without either."""
    try:
        again = corrupted(pd.read_csv(run.path / "shift.csv"))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError):  # what is left of it
        return False
    said = run.record.get("corrupted", {"accuracy": -1.0})
    return {**again, "accuracy": 0} == {**said, "accuracy": 0} and abs(again["accuracy"] - said["accuracy"]) <= 1e-5


def tried_on(run: runs.Run) -> int:
    """How many test images a run has been tried on under each distortion; 0 where its shift.csv is damaged, or missing.

    Of a run that came without that table and without weights to make it again, its record alone is believed.
    """
    bare = not (run.weights.exists() or (run.path / "shift.csv").exists())
    return run.record.get("corrupted", {"count": 0})["count"] if bare or is_told(run) else 0


def shifted_metrics(
    run_dir: str | Path, severities: Iterable[int] = distort.SEVERITIES, count: int = 1_000, stand_in: bool = False
) -> pd.DataFrame:
    """A finished run on distorted test images: one row per kind and severity, after one row for the same images
    untouched.

    Columns: those of corruption_table, kind "clean" first. The first `count` test images, or all if there are fewer, in
    every row the same. Writes the table to shift.csv beside run.json, the reliability of the clean and of all distorted
    images to reliability.csv, and the mean over the scored kinds into the record, as `corrupted`. Nothing is chosen by
    these numbers.
    """
    if count < 1:
        raise CourseError(f"count={count} is out of range: expected at least one test image.")
    run = runs.read(run_dir)
    test = own_test(run, stand_in).first(count)
    model, precision = load_model(run), run.record["recipe"]["precision"]
    sets = itertools.chain([("clean", 0, test.images, test.labels)], distorted(test, severities))
    table, logits, labels = corruption_table(model, precision, sets)
    parts = {"clean": slice(0, len(test.labels)), "distorted": slice(len(test.labels), None)}
    bins = [reliability(logits[part], labels[part]).assign(images=name) for name, part in parts.items()
            if len(labels[part])]  # fmt: skip
    runs.write_table(run.path / "shift.csv", table)
    runs.write_table(run.path / "reliability.csv", pd.concat(bins))
    if len(table) > 1:
        runs.add_to_record(run.path, {"corrupted": corrupted(table)})
    return pd.read_csv(run.path / "shift.csv")


def tried(
    run_dir: str | Path, severities: Iterable[int] = distort.SEVERITIES, count: int = 1_000, stand_in: bool = False
) -> pd.DataFrame:
    """The table of `shifted_metrics`: read where the run was tried on as many images at these severities, or on more,
    else made, with no fewer images and severities than before. So a small trial never replaces a large one.
    """
    run = runs.read(run_dir)
    before = run.record.get("corrupted", {"count": 0, "severities": []})
    enough = before["count"] >= count and {*before["severities"]}.issuperset(severities)
    whole = (run.path / "reliability.csv").exists() or not run.weights.exists()  # without weights none can be made
    if enough and whole and is_told(run):
        return pd.read_csv(run.path / "shift.csv")
    return shifted_metrics(run_dir, sorted({*before["severities"], *severities}), max(count, before["count"]), stand_in)


def own_images(run: runs.Run, stand_in: bool = False) -> pd.DataFrame:
    """How many of its own images a finished run gets right, in float32: one row per set, of its first 5,000 or all.

    Columns: images ("training" and "validation", as they are; "augmented validation", by all that the paper does to an
    image), strength (of that augmentation, `augment.Settings.scaled`, 0 to 1 by quarters; else 0), accuracy, low, high
    (Wilson, 95 %), count. Read from own_images.csv in the run's folder (`runs.folder`) where that is, else measured and
    kept there (but not of a file of weights whose run is not recorded). Raises CourseError where the images that the
    run was trained on are not here.
    """
    path, columns = runs.folder(run) / OWN_IMAGES, ["images", "strength", "accuracy", "low", "high", "count"]
    try:
        return pd.read_csv(path)[columns]
    except (OSError, ValueError, KeyError):  # there is none, or what is left of one
        pass
    made = Recipe.from_dict(run.record["recipe"])
    own = split_train_val(load_set("train", stand_in), made.val_size, made.train_size, made.split_seed)
    refuse_other_data(run, own.val)
    train, val = own.train.first(5_000), own.val.first(5_000)
    ways = [("training", train, 0, Augment("none")), ("validation", val, 0, Augment("none"))]
    ways += [("augmented validation", val, strength, Augment(STAGES[-1], settings=Settings().scaled(strength)))
             for strength in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    model, rows = load_model(run), []
    for name, part, strength, augment in ways:
        logits = predict(model, part.images, augment, "float32", generator(6, device=pick_device()))
        rows.append((name, strength, *accuracy(logits, part.labels)))
    table = pd.DataFrame(rows, columns=columns)
    if path.parent.is_dir():
        runs.write_table(path, table)
    return table


def write_submission(path: Path, ids: Tensor, logits: Tensor) -> None:
    """The competition's submission: a header ID,Labels and one row per image, labels 0 to 9."""
    frame = pd.DataFrame({"ID": ids.cpu().numpy(), "Labels": logits.argmax(1).cpu().numpy()})
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def read_answers(path: Path, ids: Tensor) -> Tensor:
    """The labels, int64 [N] from 0 to 9, that a table in a submission's form (ID,Labels) gives the images `ids` [N].

    Raises CourseError for a file that is no such table, or lacks an image's label.
    """
    try:
        table = pd.read_csv(path).set_index("ID")["Labels"].loc[ids.tolist()]
    except (OSError, ValueError, KeyError):
        table = pd.Series(dtype=float)
    if len(table) != len(ids) or not table.isin(range(10)).all():
        raise CourseError(f"{shown(path)} does not give the {len(ids):,} images their labels: expected rows of "
                          "ID,Labels, labels 0 to 9, one for each image; mend it or move it away.")  # fmt: skip
    return torch.tensor(table.to_numpy(), dtype=torch.int64)


def correct_on_test(run_dir: str | Path, stand_in: bool = False) -> np.ndarray:
    """Which test images a finished run gets right, bool [N]: what comparing two runs image by image needs.

    Read from test_correct.txt beside run.json (bits, as hexadecimal digits) where that is whole, else computed and
    written.
    """
    run = runs.read(run_dir)
    path = run.path / "test_correct.txt"
    if "test" not in run.record:
        raise CourseError(f"{shown(run.path)} has not been tested: run `python -m helpers evaluate` on it first.")
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(path.read_text().strip()), np.uint8))
    except (OSError, ValueError):
        bits = []
    if len(bits) != -(-run.record["test"]["count"] // 8) * 8:
        test = own_test(run, stand_in)
        logits = predict(load_model(run), test.images, Augment("none"), run.record["recipe"]["precision"])
        bits = (logits.argmax(1).cpu() == test.labels).numpy()
        with replacing(path) as temporary:
            temporary.write_text(np.packbits(bits).tobytes().hex() + "\n")
    return bits[: run.record["test"]["count"]].astype(bool)
