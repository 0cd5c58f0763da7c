"""The run store: write, read, query as a DataFrame. A run is a folder with `run.json` and `history.csv`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from helpers.data import CIFAR10
from helpers.runtime import ROOT, CourseError, replacing, shown

RECORDED = ROOT / "data" / "runs"
WEIGHTS = "best.safetensors"  # beside run.json: the weights of the best epoch

DEFINITIONS = {
    "train_accuracy": "share of augmented training images classified right while training, in the last epoch; under "
    "Mixup lam * correct(a) + (1 - lam) * correct(b)",
    "train_loss": "mean cross-entropy of the same images, in nats",
    "val_accuracy": "share of validation images (held out of the training set, normalised only) classified right by "
    "the best epoch, which is chosen by this number and is therefore slightly flattered",
    "val_loss": "mean cross-entropy of the same images at the best epoch, in nats",
    "val_augmented_accuracy": "as val_accuracy, at the best epoch, but with the images passed through the training "
    "augmentation, as the paper counts",
    "images_per_second": "training images by second of wall clock, validation and checkpoints included, while "
    "`side_by_side` runs shared the device",
    "test": "the 10,000 test images (normalised only) under the weights of the best epoch, looked at once, after "
    "selection; interval: Wilson, 95 %; top_2: share whose class is among the two likeliest; loss: mean cross-entropy "
    "in nats; calibration_error: expected, in 15 bins; mirrored: the same of the mean softmax of each image and its "
    "mirror image",
}


@dataclass(frozen=True)
class Run:
    """A run on disk: its folder (or one file of weights) and its record (the content of run.json)."""

    path: Path
    record: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.path if self.path.suffix == ".safetensors" else self.path / WEIGHTS

    @property
    def history(self) -> pd.DataFrame:
        """A row an epoch: epoch, learning_rate, train_loss, train_accuracy, val_loss, val_accuracy, ..."""
        try:
            return pd.read_csv(self.path / "history.csv")
        except (OSError, ValueError) as error:  # pandas' errors of parsing are ValueErrors
            raise CourseError(
                f"{shown(self.path / 'history.csv')} cannot be read ({type(error).__name__}): train the run again."
            ) from error

    @property
    def label(self) -> str:
        return f"{self.record['recipe']['name']}/{self.record['recipe']['seed']}"


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV: six decimals, the same bytes for the same numbers."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """Write history.csv, a row an epoch."""
    write_table(path / "history.csv", pd.DataFrame(rows))


def refuse_stand_in(path: Path, source: str) -> None:
    """Raise CourseError where a run on the stand-in set would land among the recorded runs."""
    if source != CIFAR10 and Path(path).resolve().is_relative_to(RECORDED.resolve()):
        raise CourseError(f"A run on the stand-in set is never recorded: choose a folder outside {shown(RECORDED)}.")


def write_record(path: Path, record: dict[str, Any]) -> Run:
    """Write run.json, with the definitions of its metrics; never for a stand-in run among the recorded ones."""
    refuse_stand_in(path, record["data"])
    with replacing(path / "run.json") as temporary:
        temporary.write_text(json.dumps({**record, "definitions": DEFINITIONS}, indent=1, sort_keys=True) + "\n")
    return Run(path, record)


def read(path: str | Path) -> Run:
    """One run by its folder, or by a .safetensors file that carries its record or lies beside its run.json.

    A run's own best.safetensors means its folder. Raises CourseError if it is not a finished run.
    """
    path = Path(path)
    path = path.parent if path.name == WEIGHTS else path
    try:
        record = _record(path)
        if missing := {"recipe", "data", "metrics"} - set(record):
            raise ValueError(f"without {missing}")
        if not all(isinstance(record[key], dict) for key in ("recipe", "metrics")):
            raise ValueError("recipe and metrics are not there")
        return Run(path, {key: record[key] for key in record if key != "definitions"})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CourseError(
            f"{shown(path)} is not a finished run ({type(error).__name__}): expected a folder with run.json and "
            "history.csv, as `python -m helpers train` leaves it, or a .safetensors file with its record inside or "
            "beside it."
        ) from error


def _record(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # reads the header, runs no code
            metadata = file.metadata() or {}
        if "recipe" in metadata:
            return {key: json.loads(value) for key, value in metadata.items()}
        path = path.parent
    return json.loads((path / "run.json").read_text())


def find(recipe: str, seed: int = 0, root: Path = RECORDED) -> Run:
    """The run of a recipe and seed in a store."""
    return read(root / recipe / str(seed))


def load(root: Path = RECORDED) -> pd.DataFrame:
    """Every finished run below `root`: one row a run, sorted by recipe and seed.

    Columns: recipe, seed, the recipe's fields, the metrics (see DEFINITIONS; accuracies in [0, 1]), test_accuracy with
    its interval test_low .. test_high on test_count images, best_epoch, seconds, images_per_second, device, and
    `history`, whose cells are DataFrames with a row an epoch.
    """
    rows = []
    for path in sorted(Path(root).glob("*/*/run.json")):
        run = read(path.parent)
        record, recipe = run.record, dict(run.record["recipe"])
        test = record.get("test", {})
        rows.append(
            {
                "recipe": recipe.pop("name"),
                **recipe,
                **record["metrics"],
                **{f"test_{key}": test.get(key) for key in ("accuracy", "low", "high", "count")},
                **{
                    key: record[key]
                    for key in ("data", "parameters", "best_epoch", "seconds", "images_per_second", "device", "commit")
                },
                "history": run.history,
            }
        )
    return pd.DataFrame(rows).sort_values(["recipe", "seed"], ignore_index=True) if rows else pd.DataFrame()
