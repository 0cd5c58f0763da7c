"""The run store: write, read, query as a DataFrame. A run is a folder with `run.json` and `history.csv`."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastjsonschema  # jsonschema takes seconds to import where Jupyter is installed too
import pandas as pd
from safetensors import SafetensorError, safe_open

from helpers.data import CIFAR10
from helpers.recipe import Recipe, get
from helpers.runtime import ROOT, CourseError, percent, replacing, shown

RECORDED = ROOT / "data" / "runs"
PUBLISHED = ROOT / "data" / "weights" / "beyond.safetensors"  # the one file of weights that the repository holds
WEIGHTS, LAST = "best.safetensors", "last.safetensors"  # beside run.json: weights of the best and of the last epoch
# What is recorded of a run; all but the first two come with its tests and hold for the weights that were tested.
RECORDS = ("run.json", "history.csv", "shift.csv", "reliability.csv", "estimates.csv", "own_images.csv",
           "test_correct.txt")  # fmt: skip

DEFINITIONS = {
    "train_accuracy": "share of augmented training images classified right while training, in the last epoch; under "
    "Mixup lam * correct(a) + (1 - lam) * correct(b)",
    "train_loss": "mean in the same epoch of what was minimised, in nats: the cross-entropy with the mixed and "
    "smoothed labels, half of it with what the teachers predict where there are any, plus the weighted disagreement of "
    "views; weight decay not counted",
    "val_accuracy": "share of validation images (held out of the training set, normalised only) classified right by "
    "the best epoch, which is chosen by this number and is therefore slightly flattered",
    "val_loss": "mean cross-entropy of the same images at the best epoch, in nats",
    "val_augmented_accuracy": "as val_accuracy, at the best epoch, but with the images passed through the training "
    "augmentation, as the paper counts",
    "images_per_second": "training images by second of wall clock, validation and checkpoints included, while "
    "`side_by_side` runs shared the device",
    "test": "the first `count` test images (normalised only) under the weights of the best epoch, which they "
    "did not choose; interval: Wilson, 95 %; top_2: share whose class is among the two likeliest; loss: mean "
    "cross-entropy in nats; calibration_error: expected, in 15 bins; mirrored: the same of the mean softmax of each "
    "image and its mirror image",
    "test_last": "accuracy on the same test images under the weights of the last epoch, which nothing was chosen for; "
    "weights of either epoch are the moving average of those trained where ema_decay is above 0",
    "corrupted": "accuracy of the best epoch's weights on the first `count` test images under our versions of the "
    "fifteen kinds of distortion that CIFAR-10-C scores: mean over the kinds of the mean over `severities` (Hendrycks "
    "and Dietterich 2019); nothing is chosen by it",
}

_LOSS, _POSITIVE = {"type": "number", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0}
_SHARE = {**_LOSS, "maximum": 1}
_COUNT, _TEXT = {"type": "integer", "minimum": 1}, {"type": "string", "minLength": 1}


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with at least these fields, each by its schema."""
    return {"type": "object", "properties": fields, "required": list(fields)}


# What every record holds; `test`, `test_last` and `corrupted` come once the run is evaluated, other entries are free.
SCHEMA = _object({
    "recipe": _object({"name": _TEXT, "seed": {"type": "integer", "minimum": 0}, "epochs": _COUNT}),
    "data": _TEXT, "commit": _TEXT, "device": _TEXT, "versions": {"type": "object", "additionalProperties": _TEXT},
    "parameters": _COUNT, "best_epoch": _COUNT, "seconds": _POSITIVE, "images_per_second": _POSITIVE,
    "metrics": _object({"train_accuracy": _SHARE, "train_loss": _LOSS, "val_accuracy": _SHARE, "val_loss": _LOSS,
                        "val_augmented_accuracy": _SHARE}),
})  # fmt: skip
_TESTED = _object({"accuracy": _SHARE, "low": _SHARE, "high": _SHARE, "count": _COUNT})
SCHEMA["properties"] |= {"side_by_side": _COUNT, "test_last": _TESTED, "test": {**_TESTED, "properties": {
    **_TESTED["properties"], "mirrored": _TESTED, "classes": {"type": "array", "items": _TEXT},
    "confusion": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
}}}  # fmt: skip
SCHEMA["properties"]["corrupted"] = _object({
    "accuracy": _SHARE, "count": _COUNT,
    "severities": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1, "maximum": 5}},
})  # fmt: skip
_refuse_misfit = fastjsonschema.compile(SCHEMA)  # the record, or a ValueError that says what is wrong with it


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
        """One row per epoch: epoch, learning_rate, train_loss, train_accuracy, val_loss, val_accuracy, ..."""
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
    """Write history.csv, one row per epoch."""
    write_table(path / "history.csv", pd.DataFrame(rows))


def refuse_stand_in(path: Path, source: str) -> None:
    """Raise CourseError where a run on the stand-in set would land among the recorded runs."""
    if source != CIFAR10 and Path(path).resolve().is_relative_to(RECORDED.resolve()):
        raise CourseError(f"A run on the stand-in set is never recorded: choose a folder outside {shown(RECORDED)}.")


def write_record(path: Path, record: dict[str, Any]) -> Run:
    """Write run.json, with the definitions of its metrics; never for a stand-in run among the recorded ones, nor with
    a number that is not finite."""
    refuse_stand_in(path, record["data"])
    try:
        text = json.dumps({**record, "definitions": DEFINITIONS}, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise CourseError(f"{shown(path)} got a result that is not finite, and no record of it: train it again with a "
                          "lower learning rate.") from error  # fmt: skip
    with replacing(path / "run.json") as temporary:
        temporary.write_text(text + "\n")
    return Run(path, record)


def add_to_record(path: Path, entries: dict[str, Any]) -> Run:
    """Set entries of a run's record as it is now, since others may have added to it while these were measured."""
    return write_record(path, {**read(path).record, **entries})


def read(path: str | Path) -> Run:
    """One run by its folder, or by a .safetensors file that carries its record or lies beside its run.json.

    A run's own best.safetensors means its folder. Raises CourseError if it is not a finished run, or if its recipe is
    none.
    """
    path = Path(path)
    path = path.parent if path.name == WEIGHTS and (path.parent / "run.json").exists() else path
    try:
        record = _refuse_misfit(_record(path), name_prefix="record")
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CourseError(
            f"{shown(path)} is not a finished run ({reason}): expected a folder with run.json and "
            "history.csv, as `python -m helpers train` leaves it, or a .safetensors file with its record inside or "
            "beside it."
        ) from error
    try:
        Recipe.from_dict(record["recipe"])
    except CourseError as error:
        raise CourseError(f"{shown(path)} has a recipe that this version of the course cannot read: {error}") from error
    return Run(path, {key: record[key] for key in record if key != "definitions"})


def _record(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # reads the header, runs no code
            metadata = file.metadata() or {}
        if "recipe" in metadata:
            return {key: _parsed(value) for key, value in metadata.items()}
        path = path.parent
    return _parsed((path / "run.json").read_text())


def _parsed(text: str) -> Any:
    """JSON of numbers that a float can hold: Python's own also reads NaN, takes 1e999 for infinity and counts on."""

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is no finite number")
        return value

    def whole(digits: str) -> int:
        number(digits)
        return int(digits)

    return json.loads(text, parse_float=number, parse_int=whole, parse_constant=number)


def seeds(folder: str | Path) -> list[Run]:
    """The finished runs with weights in a recipe's folder, by seed; a damaged one is left out, with a warning."""
    found = []
    for path in Path(folder).glob("*/run.json"):
        try:
            found.append(read(path.parent))
        except CourseError as error:
            warnings.warn(f"Left out: {error}", stacklevel=2)
    return sorted((run for run in found if run.weights.exists()), key=lambda run: run.record["recipe"]["seed"])


def find(recipe: str, seed: int = 0, root: Path = RECORDED) -> Run:
    """The run of a recipe and seed in a store."""
    return read(root / recipe / str(seed))


def folder(run: Run) -> Path:
    """Where the tables of a run lie: its own folder; of a published file that of the recorded run it was made from."""
    if run.path.is_dir():
        return run.path
    try:
        recorded = find(*run.label.rsplit("/", 1), RECORDED)
    except CourseError:
        return run.path
    same = all(recorded.record[key] == run.record[key] for key in ("recipe", "data", "commit", "metrics"))
    return recorded.path if same else run.path


def tier(recipe: str, device: str) -> str:
    """What a run may be compared with: `quick` (a quick recipe, anywhere), `cpu`, or `gpu`."""
    if recipe.split("-")[0] == "quick":
        return "quick"
    return "cpu" if device.startswith("CPU") else "gpu"


_DEFAULTS = Recipe("defaults").to_dict()  # what a record means that was written before a field existed


def stale(recipe: dict[str, Any]) -> str:
    """The fields in which a record's recipe differs from the recipe of that name as it is now; "" if in none.

    A field that the record was written without had the value that is now its default. A name that `recipe.get` does
    not know has nothing to differ from.
    """
    try:
        now = get(recipe["name"], seed=recipe["seed"]).to_dict()
    except CourseError:
        return ""
    then = {**_DEFAULTS, **recipe}
    return ", ".join(sorted(name for name in {*then, *now} if then.get(name) != now.get(name)))


def load(root: Path = RECORDED) -> pd.DataFrame:
    """Every finished run below `root`: one row a run, sorted by recipe and seed.

    Columns: recipe, seed, the recipe's fields, the metrics (see DEFINITIONS; accuracies in [0, 1]), test_accuracy with
    its interval test_low .. test_high on test_count images, all of the best epoch's weights; test_last_accuracy, that
    of the last epoch's; mirrored_accuracy, of the mean over each test image and its mirror image; corrupted_accuracy
    under distortions, on corrupted_count images at corrupted_severities (as text); data, parameters, best_epoch,
    seconds (wall clock), images_per_second, side_by_side (the runs that shared the device, this one too), device,
    commit, versions (as text); tier; ema (whether those weights are a moving average); stale (the fields that the named
    recipe has changed since, see `current`); and `history`, whose cells are DataFrames with one row per epoch. A
    damaged run, and one that lies in another's folder, is left out, with a warning that names it.
    """
    rows = []
    for path in sorted(Path(root).glob("*/*/run.json")):
        try:
            run = read(path.parent)
            history = run.history
            if path.parent.parts[-2:] != tuple(run.label.split("/")):
                raise CourseError(f"{shown(path.parent)} holds the record of {run.label}: move it where that belongs.")
            if len(history) != run.record["recipe"]["epochs"]:
                raise CourseError(f"{shown(path.parent)} has {len(history)} rows of history for "
                                  f"{run.record['recipe']['epochs']} epochs: train the run again.")  # fmt: skip
        except CourseError as error:
            warnings.warn(f"Left out: {error}", stacklevel=2)
            continue
        record, recipe = run.record, {**_DEFAULTS, **run.record["recipe"]}
        test = record.get("test", {})
        corrupted = record.get("corrupted", {})
        last = test if record["best_epoch"] == recipe["epochs"] else record.get("test_last", {})
        rows.append(
            {
                "recipe": recipe["name"],
                **{name: value for name, value in recipe.items() if name != "name"},
                **record["metrics"],
                **{f"test_{key}": test.get(key) for key in ("accuracy", "low", "high", "count")},
                "test_last_accuracy": last.get("accuracy"),
                "mirrored_accuracy": test.get("mirrored", {}).get("accuracy"),
                "corrupted_accuracy": corrupted.get("accuracy"),
                "corrupted_count": corrupted.get("count"),
                "corrupted_severities": ", ".join(map(str, corrupted.get("severities", []))),
                **{
                    key: record[key]
                    for key in ("data", "parameters", "best_epoch", "seconds", "images_per_second", "device", "commit")
                },
                "side_by_side": record.get("side_by_side", 1),
                "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
                "tier": tier(recipe["name"], record["device"]),
                "ema": recipe["ema_decay"] > 0,
                "stale": stale(recipe),
                "history": history,
            }
        )
    return pd.DataFrame(rows).sort_values(["recipe", "seed"], ignore_index=True) if rows else pd.DataFrame()


def listing(table: pd.DataFrame, root: Path = RECORDED) -> pd.DataFrame:
    """What a person wants to see of load(root): one row per run, as text."""

    def share(values: pd.Series) -> pd.Series:
        return values.map(percent, na_action="ignore").fillna("")

    weights = [[name.removesuffix(".safetensors") for name in (WEIGHTS, LAST) if (Path(root) / row.recipe /
                str(row.seed) / name).exists()] for row in table.itertuples()]  # fmt: skip
    return pd.DataFrame({
        "recipe": table.recipe, "seed": table.seed, "tier": table.tier, "data": table.data, "epochs": table.epochs,
        "validation": share(table.val_accuracy), "test": share(table.test_accuracy),
        "test, last": share(table.test_last_accuracy), "images/s": table.images_per_second.round().astype(int),
        "hours": (table.seconds / 3600).round(2), "commit": table.commit.str[:9],
        "weights": [" ".join(names) for names in weights], "changed since": table.stale,
    })  # fmt: skip


def current(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of load() whose recipe is still the one of its name; a warning names those left out."""
    old = table[table["stale"] != ""] if len(table) else table
    if len(old):
        names = "; ".join(f"{row.recipe}/{row.seed} ({row.stale})" for row in old.itertuples())
        warnings.warn(f"Left out, since the recipe of that name has changed: {names}: train them again.", stacklevel=2)
    return table.drop(old.index).reset_index(drop=True)
