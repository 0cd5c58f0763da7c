"""Predictions, accuracy with intervals, confusion, calibration. The one room that opens the test labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from helpers import distort, runs
from helpers.augment import Augment
from helpers.data import ImageSet, load_set
from helpers.recipe import Recipe
from helpers.runtime import CourseError, pick_device, replacing, shown


class Accuracy(NamedTuple):
    """A share in [0, 1] with its 95 % Wilson interval and the number of images it was counted on."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of a recipe as a context; the weights stay float32 either way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    augment: Augment,
    precision: str = "bfloat16",
    generator: torch.Generator | None = None,
    batch_size: int = 500,
) -> Tensor:
    """Logits float32 [N, classes] of uint8 images [N, 3, H, W]; dropout off, batch norm by its running statistics."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = []
    for batch in images.split(batch_size):
        x = augment(batch.to(device), generator).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            logits.append(model(x).float())
    model.train(was_training)
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 accuracy with its interval (Wilson 1927, through statsmodels)."""
    correct, count = int((logits.argmax(1).cpu() == labels.cpu()).sum()), len(labels)
    low, high = proportion_confint(correct, count, method="wilson")
    value = correct / count  # rounding may leave the ends of an interval at 0 or 1 on the wrong side of it
    return Accuracy(value, min(float(low), value), max(float(high), value), count)


def confusion(logits: Tensor, labels: Tensor, classes: int = 10) -> list[list[int]]:
    """Counts [true][predicted]."""
    return confusion_matrix(labels.cpu(), logits.argmax(1).cpu(), labels=range(classes)).tolist()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: |confidence - accuracy| over equal bins (Guo et al. 2017, eq. 3)."""
    confidence, predicted = logits.softmax(1).max(1)
    gap = (predicted == labels.to(predicted.device)).double() - confidence.double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, which.cpu(), gap.cpu()).abs().sum() / len(labels))


def load_model(run: runs.Run) -> nn.Module:
    """The network of a run with the weights of its best epoch, in evaluation mode."""
    recipe, path = Recipe.from_dict(run.record["recipe"]), run.path / "best.safetensors"
    model = recipe.network()
    try:
        weights = load_file(path)
        model.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        )
    except Exception as error:  # safetensors' own type for a torn file, OSError for a missing one, another network ...
        raise CourseError(
            f"{shown(path)} cannot be read ({type(error).__name__}): weights are not kept in git; train "
            "the run again, or give a folder that has them."
        ) from error
    return model.to(pick_device(), memory_format=torch.channels_last).eval()


def test_metrics(model: nn.Module, test: ImageSet, precision: str) -> dict[str, Any]:
    """What a record says of the test set: accuracy with interval, loss, calibration error, confusion matrix."""
    logits = predict(model, test.images, Augment("none"), precision)
    value, low, high, count = accuracy(logits, test.labels)
    return {
        "accuracy": value,
        "low": low,
        "high": high,
        "count": count,
        "loss": float(F.cross_entropy(logits.cpu(), test.labels)),
        "calibration_error": calibration_error(logits, test.labels),
        "classes": list(test.classes),
        "confusion": confusion(logits, test.labels, len(test.classes)),
    }


def test_run(path: str | Path, stand_in: bool = False) -> runs.Run:
    """Evaluate a finished run on the test set and add the result to its record.

    The run must be finished: its epoch was chosen on the validation split before a test label is read here.
    """
    run = runs.read(path)
    test = load_set("test", stand_in)
    if test.source != run.record["data"]:
        raise CourseError(
            f"{shown(run.path)} was trained on {run.record['data']}, the test set here is {test.source}: "
            "evaluate it where its own data is."
        )
    metrics = test_metrics(load_model(run), test, run.record["recipe"]["precision"])
    return runs.write_record(run.path, {**run.record, "test": metrics})


# --------------------------------------------------------------------------------- beyond the clean test accuracy


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """What calibration_error sums: a row a bin of confidence that holds images, with columns low, high (the bin's
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


def shifted_metrics(
    run_dir: str | Path, severities: Iterable[int] = (1, 3, 5), count: int = 1_000, stand_in: bool = False
) -> pd.DataFrame:
    """A finished run on distorted test images: a row a kind and severity, after one row for the same images untouched.

    Columns: kind ("clean" first), severity, accuracy, low, high (Wilson, 95 %), count, calibration_error, confidence
    (mean). The first `count` test images, in every row the same. Writes the table to shift.csv beside run.json, and
    the reliability of the clean and of all distorted images to reliability.csv. Nothing is chosen by these numbers.
    """
    run = runs.read(run_dir)
    test = load_set("test", stand_in)
    if test.source != run.record["data"]:
        raise CourseError(f"{shown(run.path)} was trained on {run.record['data']}, the test set here is {test.source}.")
    if not 1 <= count <= len(test.labels):
        raise CourseError(f"count={count} is out of range: expected 1 to {len(test.labels):,} test images.")
    model, precision, test = load_model(run), run.record["recipe"]["precision"], test.take(torch.arange(count))
    rows, all_logits = [], []
    for kind, severity in [("clean", 0), *((kind, severity) for kind in distort.KINDS for severity in severities)]:
        images = distort.distort(test.images, kind, severity) if severity else test.images
        logits = predict(model, images, Augment("none"), precision).cpu()
        all_logits.append(logits)
        value = accuracy(logits, test.labels)._asdict()
        rows.append({
            "kind": kind, "severity": severity, "accuracy": value.pop("value"), **value,
            "calibration_error": calibration_error(logits, test.labels),
            "confidence": float(logits.softmax(1).max(1).values.mean()),
        })  # fmt: skip
    parts = {"clean": all_logits[:1], "distorted": all_logits[1:]}
    bins = [reliability(torch.cat(part), test.labels.repeat(len(part))).assign(images=name)
            for name, part in parts.items() if part]  # fmt: skip
    for name, table in (("shift", pd.DataFrame(rows)), ("reliability", pd.concat(bins))):
        with replacing(run.path / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")
    return pd.read_csv(run.path / "shift.csv")


def correct_on_test(run_dir: str | Path, stand_in: bool = False) -> np.ndarray:
    """Which test images a finished run gets right, bool [N]: what comparing two runs image by image needs.

    Read from test_correct.txt beside run.json (bits, as hexadecimal digits) where that is, else computed and written.
    """
    run = runs.read(run_dir)
    path = run.path / "test_correct.txt"
    if "test" not in run.record:
        raise CourseError(f"{shown(run.path)} has not been tested: run `python -m helpers evaluate` on it first.")
    if not path.exists():
        test = load_set("test", stand_in)
        logits = predict(load_model(run), test.images, Augment("none"), run.record["recipe"]["precision"])
        right = logits.argmax(1).cpu() == test.labels
        with replacing(path) as temporary:
            temporary.write_text(np.packbits(right.numpy()).tobytes().hex() + "\n")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(path.read_text().strip()), np.uint8))
    return bits[: run.record["test"]["count"]].astype(bool)
