"""What `python -m helpers evaluate` measures on one set of images: tables printed, pictures and CSVs in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from helpers import distort, estimate, evaluate, plots, runs
from helpers.data import CLASSES, ImageSet, load_shifted
from helpers.recipe import Recipe
from helpers.runtime import counted, expanded, percent, shown
from helpers.train import training_data

_INTERVALS = """\
drawn: 95 % for the luck of which images were drawn, blind to what the method itself gets wrong.
in all: the same, moved by the errors between which 95 % of the known distortions lay; good if this shift is alike."""


def clean(run: runs.Run, corruptions: int, folder: Path, stand_in: bool = False) -> runs.Run:
    """A run on the clean test set, and on its first `corruptions` images distorted in every way.

    Returns the run with the results in its record; written there unless the run is one file of weights. With
    `corruptions` the other tables of a record are written too: shift.csv and reliability.csv of all severities,
    estimates.csv, test_correct.txt. Those of more images than asked for stay, and a line says so.
    """
    plots.start(run.record["data"])
    test = evaluate.own_test(run, stand_in)
    entries, logits = evaluate.tested(run, test)
    _labelled(run, test, entries["test"], logits, folder)
    recorded = run.path.is_dir()
    run = runs.add_to_record(run.path, entries) if recorded else runs.Run(run.path, {**run.record, **entries})
    if corruptions and recorded:
        before = run.record.get("corrupted", {"count": 0})["count"]
        if before > corruptions:
            print(f"{run.label} has been tried on {before:,} distorted images before: as many are told.\n")
        table = evaluate.tried(run.path, distort.SEVERITIES, corruptions, stand_in)
        _corrupted(run, table[table.kind != "clean"].reset_index(drop=True), folder)
        estimate.trials(run, _validation(run, stand_in))
        evaluate.correct_on_test(run.path, stand_in)
    elif corruptions:
        _corrupted(run, _table(run, evaluate.distorted(test.first(corruptions))), folder)
    return runs.read(run.path) if recorded else run


def shifted(run: runs.Run, path: Path, folder: Path, stand_in: bool = False) -> None:
    """A run on a CIFAR-10-C folder, or on what `load_shifted` reads, with labels or without.

    Where a set `<name>.pkl` without labels has `<name>-labels.csv` beside it, the truth is told after the estimates,
    which do not use it.
    """
    plots.start(run.record["data"])
    path = expanded(path)
    if (path / "labels.npy").exists():
        _corrupted(run, _table(run, evaluate.read_corrupted(path)), folder)
        return
    images, labels, ids = load_shifted(path)
    if labels is None:
        answers = path.parent / f"{path.stem}-labels.csv"  # as `distort competition-like` puts them beside a set
        truth = evaluate.read_answers(answers, ids) if path.suffix == ".pkl" and answers.exists() else None
        logits = _unlabelled(run, images, ids, folder, stand_in)
        if truth is not None:
            print(f"the truth, from {shown(answers)}: {evaluate.accuracy(logits, truth)}")
    else:
        test = ImageSet(images, labels, tuple(run.record.get("test", {}).get("classes", CLASSES)), path.name)
        found, logits = evaluate.report(evaluate.load_model(run), test, run.record["recipe"]["precision"])
        _labelled(run, test, found, logits, folder)


def _validation(run: runs.Run, stand_in: bool) -> ImageSet:
    """The validation images of a run's own split; CourseError where its data is not here."""
    val = training_data(Recipe.from_dict(run.record["recipe"]), stand_in).val
    evaluate.refuse_other_data(run, val)
    return val


def _labelled(run: runs.Run, test: ImageSet, found: dict[str, Any], logits: Tensor, folder: Path) -> None:
    by_class = evaluate.per_class(found["confusion"], test.classes)
    by_class["accuracy"] = [str(evaluate.Accuracy(*row[1:])) for row in by_class.itertuples(index=False)]
    counts = pd.DataFrame(found["confusion"], test.classes, [name[:6] for name in test.classes])
    print(f"{run.label} on {len(test.labels):,} images\n{evaluate.summary(found).to_string()}\n")
    print(f"{by_class[['class', 'accuracy', 'count']].to_string(index=False)}\n")
    print(f"rows true, columns predicted\n{counts.to_string()}\n")
    panel = {"as they are": {run.label: [evaluate.reliability(logits, test.labels)]}}
    _save(plots.confusion(found["confusion"], test.classes), folder / "confusion.png")
    _save(plots.reliability(panel, "Confidence against accuracy"), folder / "reliability.png")


def _table(run: runs.Run, sets: Iterable[tuple[str, int, Tensor, Tensor]]) -> pd.DataFrame:
    return evaluate.corruption_table(evaluate.load_model(run), run.record["recipe"]["precision"], sets)[0]


def _corrupted(run: runs.Run, table: pd.DataFrame, folder: Path) -> None:
    grid = 100 * table.pivot(index="kind", columns="severity", values="accuracy").loc[table.kind.unique()]
    scored = table.kind[table.kind.isin(distort.SCORED)].nunique()
    print(f"{grid.round(2).to_string()}\n")
    what = "mean corruption accuracy" if scored == len(distort.SCORED) else "mean of those that are scored"
    mean = f"{what} {percent(evaluate.mean_corruption_accuracy(table))}" if scored else "no mean"
    print(f"{mean}: {counted(scored, 'scored kind')} at {grid.shape[1]} severities, {table['count'].iloc[0]:,} images "
          "each")  # fmt: skip
    runs.write_table(folder / "corruptions.csv", table)
    title = f"{run.label}: accuracy by kind and severity"
    _save(plots.heat(grid, title, "%", 10, 100, ".1f"), folder / "corruptions.png")


def _unlabelled(run: runs.Run, images: Tensor, ids: Tensor, folder: Path, stand_in: bool) -> Tensor:
    """Writes the submission and prints the estimates; returns the run's logits [N, classes]."""
    precision = run.record["recipe"]["precision"]
    models = [evaluate.load_model(sibling) for sibling in estimate.siblings(run)]
    logits = estimate.stack(models, images, precision)
    evaluate.write_submission(folder / "submission.csv", ids, logits[0])
    print(f"{shown(folder / 'submission.csv')}: {len(ids):,} rows of ID,Labels\n")
    val = _validation(run, stand_in)
    print("trying the estimates on known distortions: minutes, if it has not been done for this run\n", flush=True)
    trials = estimate.trials(run, val)
    table = estimate.estimate(estimate.stack(models, val.images, precision), val.labels, logits, trials)
    print(f"accuracy without labels, from {len(val.labels):,} validation images and {counted(len(models), 'network')}:")
    for row in table.itertuples():
        print(f"  {row.method:<10} {percent(row.predicted)}   drawn [{percent(row.low)}, {percent(row.high)}]   "
              f"in all [{percent(row.outer_low)}, {percent(row.outer_high)}]   "
              f"off by {100 * row.error:.1f} points on known distortions")  # fmt: skip
    print(_INTERVALS)
    title = f"{run.label} on distorted validation images"
    _save(plots.estimates(trials, estimate.errors(trials), title), folder / "estimates.png")
    return logits[0]


def _save(figure: Figure, path: Path) -> None:
    plots.save(figure, path)
    print(shown(path))
