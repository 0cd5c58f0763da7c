"""A finished run as one file to hand on: weights in half precision, the record inside, a model card beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import save
from torch import Tensor, nn

from helpers import distort, evaluate, runs
from helpers.augment import IMAGENET_MEAN, IMAGENET_STD
from helpers.data import CIFAR10
from helpers.recipe import RECIPES, SHORT
from helpers.runtime import ROOT, CourseError, percent, replacing, shown

LIMIT = 10 * 2**20  # bytes: five million parameters in half precision, the running statistics and the record
HAIR = 0.001  # of accuracy: what half precision may cost


def publish(run_dir: str | Path, path: str | Path, stand_in: bool = False) -> runs.Run:
    """Write a tested run's weights to `path` (.safetensors, fp16) with its record as metadata, and `path`.md beside it.

    The metadata holds a JSON text for each entry of run.json: recipe, metrics, test ...; the test is that of the
    rounded weights. Returns the run as `runs.read(path)` gives it. Raises CourseError for a run that is not tested, for
    weights that rounding changes by more than a hair, for more than 10 MiB, for the name of a run's own weights, and
    for a stand-in run below data/.
    """
    run, path = runs.read(run_dir), Path(path)
    if not run.path.is_dir():
        raise CourseError(f"{shown(run.path)} is one file of weights: publish the folder of a run.")
    if "test" not in run.record:
        raise CourseError(f"{shown(run.path)} has not been tested: run `python -m helpers evaluate` on it first.")
    if path.suffix != ".safetensors":
        raise CourseError(f"{shown(path)} is no name for weights: expected one that ends in .safetensors.")
    if path.name in (runs.WEIGHTS, runs.LAST):
        raise CourseError(f"{path.name} is the name of weights that lie beside their run.json: choose another.")
    if run.record["data"] != CIFAR10 and path.resolve().is_relative_to(ROOT / "data"):
        raise CourseError("A run on the stand-in set is never recorded: choose a file outside data/.")
    model, precision = evaluate.load_model(run), run.record["recipe"]["precision"]
    halves = halved(model)
    model.load_state_dict(halves)  # rounded, in the model's own float32
    record = {**run.record, "test": evaluate.test_metrics(model, evaluate.own_test(run, stand_in), precision)}
    before, after = (each["test"]["accuracy"] for each in (run.record, record))
    if abs(after - before) > HAIR:
        raise CourseError(f"Half precision changes the test accuracy from {percent(before)} to {percent(after)}: "
                          f"weights are published only if it changes by at most {percent(HAIR)}.")  # fmt: skip
    content = save(halves, {key: json.dumps(value, sort_keys=True) for key, value in record.items()})
    if len(content) > LIMIT:
        raise CourseError(f"The weights take {len(content):,} bytes: at most {LIMIT:,} are published.")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(card(run, record, path.name, len(content)))
    return runs.read(path)


def halved(model: nn.Module) -> dict[str, Tensor]:
    """A network's weights in half precision, on the CPU; counters stay whole numbers."""
    return {name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
            for name, value in model.state_dict().items()}  # fmt: skip


def card(run: runs.Run, record: dict[str, Any], name: str, size: int) -> str:
    """The model card as markdown, every number from the record: `test` of the rounded weights, the rest of the run."""
    recipe, test = record["recipe"], record["test"]
    metrics = evaluate.summary(test)
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    start = f", from the weights of {record['start']}" if record.get("start") else ""
    limits = [
        f"One run with one seed ({recipe['seed']}){start}, {recipe['epochs']} epoch{'s' * (recipe['epochs'] > 1)} on "
        f"{recipe['train_size']:,} images; another seed gives another accuracy, which the interval above does not "
        "cover.",
        "Whatever it is shown, it answers with one of the ten classes and a confidence. It was trained and tested on "
        f"32 x 32 images of {record['data']} alone.",
        *([] if start else _schedule(recipe["epochs"])),
        *_corruptions(run),
        f"Its validation accuracy of {percent(record['metrics']['val_accuracy'])} chose the epoch, which flatters it.",
    ]
    return f"""# {run.label}: SE-ResNet, {record["parameters"]:,} parameters

`{name}`, {size:,} bytes: weights of epoch {record["best_epoch"]} in half precision, the record as JSON in the metadata.

```python
from helpers import augment, evaluate, runs
model = evaluate.load_model(runs.read("{name}"))  # or the path to it
logits = evaluate.predict(model, images, augment.Augment("none"), "float32")  # images uint8 [N, 3, 32, 32], RGB
```

Without `evaluate.predict`: levels divided by 255, less {IMAGENET_MEAN}, divided by {IMAGENET_STD},
a number for each channel. The logits are, in this order, those of {", ".join(test["classes"])}.

`python -m helpers evaluate --weights {name}` (or the path to it) tests them again. MIT licence, as the course.

## Recipe

{_table(("field", "value"), sorted(recipe.items()))}

Trained on {record["device"]} in {record["seconds"]:,.0f} s, commit {record["commit"]}, {versions}.

## Data

{record["data"]}: {recipe["train_size"]:,} images of the training set to train on and {recipe["val_size"]:,} others
to choose the epoch by (stratified, split seed {recipe["split_seed"]}); {test["count"]:,} test images, looked at after
that. No image is part of the file.

## Metrics

On the test images, normalised only, under the weights of this file; intervals: Wilson, 95 %. Before rounding to half
precision the accuracy was {percent(run.record["test"]["accuracy"])}.

{_table(("", *metrics), metrics.itertuples(name=None))}

## Limits

""" + "".join(f"* {limit}\n" for limit in limits)


def _schedule(epochs: int) -> list[str]:
    full = RECIPES["paper"].epochs
    return [] if epochs >= full else [f"{epochs} of the paper's {full} epochs, a reduced schedule. {SHORT}"]


def _corruptions(run: runs.Run) -> list[str]:
    """What shift.csv beside run.json says, if the run has been tried on distorted images."""
    if not (run.path / "shift.csv").exists():
        return ["It has not been tried on distorted images."]
    table = pd.read_csv(run.path / "shift.csv")
    clean, table = table[table.kind == "clean"].iloc[0], table[table.kind != "clean"]
    mean, count = evaluate.mean_corruption_accuracy(table), int(clean["count"])
    worst = table.loc[table.accuracy.idxmin()]
    unfit = table.loc[(table.confidence - table.accuracy).abs().idxmax()]
    return [
        f"Distortions cost it accuracy: {percent(clean.accuracy)} of {count:,} test images as they are, "
        f"{evaluate.share(mean * count, count)} on average over {len(distort.SCORED)} kinds of distortion, made "
        "by the course's own code (the images of CIFAR-10-C are others); "
        f"{percent(worst.accuracy)} under {_named(worst)}.",
        f"Where its confidence fits its accuracy worst, under {_named(unfit)}, it claims "
        f"{percent(unfit.confidence)} and is right on {percent(unfit.accuracy)}.",
    ]


def _named(row: pd.Series) -> str:
    return f"{row.kind.replace('_', ' ')} of severity {row.severity}"


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
