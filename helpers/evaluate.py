"""Predictions, accuracy with intervals, confusion, calibration. The one room that opens the test labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from helpers import runs
from helpers.augment import Augment
from helpers.data import ImageSet, load_set
from helpers.recipe import Recipe
from helpers.runtime import CourseError, pick_device, shown


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
    return Accuracy(correct / count, float(low), float(high), count)


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
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own type for a torn file, OSError for a missing one
        raise CourseError(
            f"{shown(path)} cannot be read ({type(error).__name__}): weights are not kept in git; train "
            "the run again, or give a folder that has them."
        ) from error
    model = recipe.network()
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )
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
