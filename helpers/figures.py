"""Which published figure is drawn from which recorded run. Needs neither CIFAR-10 nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from helpers import distort, estimate, plots, recipe, runs, stats
from helpers.data import CIFAR10
from helpers.runtime import ROOT, CourseError, percent, shown

FIGURES = ROOT / "figures"

# The paper's numbers that its figures end at, and the one its title claims (PAPER: "Results Discussion").
PAPER_TRAIN_ACCURACY = 0.7341
PAPER_VAL_ACCURACY = 0.9069
PAPER_TEST_ACCURACY = 0.9594

# What the paper reports, by the column of runs.load() that is counted on the same images; None where it says nothing.
REPORTED = {
    "train_accuracy": ("training, as augmented", PAPER_TRAIN_ACCURACY),
    "val_augmented_accuracy": ("validation, augmented", PAPER_VAL_ACCURACY),
    "val_accuracy": ("validation, as it is", None),
    "test_accuracy": ("test, as it is", PAPER_TEST_ACCURACY),
}
NEAREST = ("paper", "laptop", "quick")  # the recipes that stand for the paper's, the nearest first
TIERS = ("gpu", "cpu", "quick")

# What to see in each figure, in words: for the README, and wherever else one is shown. A ladder's name has its recipe.
ALT = {
    "figure_1_architecture": "The network: a stem, four stages of residual blocks with squeeze-and-excitation, and a "
    "head; every box with its layers, every stage with its output shape and parameters",
    "figure_2_training_accuracy": "Training accuracy over epochs, a line for the mean of the seeds in a band from the "
    f"lowest to the highest, with the paper's final {percent(PAPER_TRAIN_ACCURACY)} as a dotted level",
    "figure_3_loss": "Training and validation loss over epochs, a line each for the mean of the seeds in a band from "
    "the lowest to the highest",
    "figure_4_validation_accuracy": "Validation accuracy over optimiser steps, on the images as they are and on "
    f"augmented ones, with the paper's final {percent(PAPER_VAL_ACCURACY)} on augmented ones as a dotted level",
    "ladder": "Test accuracy of each rung of the augmentation ladder: a dot for the mean over seeds with its 95 % "
    "interval, without augmentation at the top, with everything and Mixup at the bottom",
    "mixup_alpha": "Test accuracy for each of Mixup's alphas that was run: a dot for the mean over seeds with its 95 % "
    "interval",
    "kind_severity": "A heat map of the test accuracy under each kind of distortion, a row each, at growing severity "
    "from left to right",
    "predicted_accuracy": "Accuracy predicted without labels against the true one, a panel a method, a point a "
    "distorted set, with the line where both are equal",
    "reported_reproduced": "The paper's accuracies beside ours, a group of bars each for training, validation and test "
    "images, a bar for the paper and one for each tier that was run",
}


def alt(name: str) -> str:
    """The words for a figure by its file's name without .png; a ladder's are those of every ladder."""
    return ALT["ladder" if name.startswith("ladder_") else name]


def main_run(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the run nearest to the paper's that has been recorded: `paper`, else `laptop`, else `quick`."""
    for name in NEAREST:
        rows = table[table.recipe == name] if len(table) else table
        if len(rows):
            return rows
    raise CourseError(f"No run of {', '.join(NEAREST)} is recorded in {shown(runs.RECORDED)}: train one first.")


def by_tier(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """tier -> the rows of the run nearest to the paper's in it, for those tiers that have one."""
    near = table[table.recipe.isin(NEAREST)]
    return {tier: main_run(near[near.tier == tier]) for tier in TIERS if (near.tier == tier).any()}


def title(rows: pd.DataFrame) -> str:
    """What a figure says of the run it shows, so that no reader takes a short run for 300 epochs."""
    row = rows.iloc[0]
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else f"seed {row.seed}"
    return f"recipe {row.recipe}, {row.epochs} epochs, {seeds}"


def _paper(rows: pd.DataFrame, level: float, label: str) -> dict[str, Any]:
    """The paper's final number as a level to compare with; nothing for the stand-in set, which is never compared."""
    return {"reference": level, "reference_label": label} if rows.iloc[0]["data"] == CIFAR10 else {}


def training_accuracy(rows: pd.DataFrame) -> Figure:
    """Figure 2: training accuracy over epochs, counted on the augmented (and mixed) images."""
    return plots.curves({"ours": list(rows.history)}, "train_accuracy", f"Training accuracy: {title(rows)}", "%",
                        **_paper(rows, PAPER_TRAIN_ACCURACY, "paper, 300 epochs:"))  # fmt: skip


def loss(rows: pd.DataFrame) -> Figure:
    """Figure 3: cross-entropy over epochs, training and validation."""
    stacked = {f"{part} loss": [h[["epoch", f"{part}_loss"]].rename(columns={f"{part}_loss": "loss"})
                                for h in rows.history] for part in ("train", "val")}  # fmt: skip
    return plots.curves(stacked, "loss", f"Loss: {title(rows)}", "cross-entropy, nats", percent=False)


def validation_accuracy(rows: pd.DataFrame) -> Figure:
    """Figure 4: validation accuracy over optimiser steps, clean and through the augmentation, as the paper counts."""
    columns = {"images as they are": "val_accuracy", "augmented, as the paper counts": "val_augmented_accuracy"}
    stacked = {name: [h[["epoch", column]].rename(columns={column: "accuracy"}) for h in rows.history]
               for name, column in columns.items()}  # fmt: skip
    fields = {name: rows.iloc[0][name] for name in ("train_size", "batch_size")}
    return plots.curves(stacked, "accuracy", f"Validation accuracy: {title(rows)}", "%",
                        **_paper(rows, PAPER_VAL_ACCURACY, "paper, 300 epochs, augmented:"),
                        steps_per_epoch=fields["train_size"] // fields["batch_size"])  # fmt: skip


def bases(table: pd.DataFrame) -> list[recipe.Recipe]:
    """The recipes on which a ladder is named and of whose rungs at least two have been run."""
    ladders = {base: {rung.name for rung in recipe.ladder(base)} for base in recipe.RECIPES.values()}
    have = set(table.recipe.str.removesuffix("-short"))
    return [base for base, rungs in ladders.items() if rungs <= set(recipe.RECIPES) and len(rungs & have) > 1]


def rungs(table: pd.DataFrame, base: recipe.Recipe) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a ladder, with a column `rung`, and its rungs in order. Only the quick profile has `-short` runs,
    of fewer images and epochs, and compares those alone.
    """
    short = table.recipe.str.endswith("-short")
    table = table[short] if short.any() else table
    table = table.assign(rung=table.recipe.str.removesuffix("-short"))
    order = [rung.name for rung in recipe.ladder(base) if rung.name in set(table.rung)]
    return table[table.rung.isin(order)], order


def _means(rows: pd.DataFrame, by: str, order: list) -> tuple[pd.DataFrame, str]:
    """Rows for plots.intervals, in order, and the words for their intervals: over seeds, or of one seed Wilson's."""
    found = stats.over_seeds(rows, by=by).set_index(by).loc[order]
    wilson = rows.groupby(by)[["test_low", "test_high"]].first().loc[order].astype(float)
    frame = pd.DataFrame({"label": order, "value": found["mean"].to_numpy(),
                          "low": found.low.fillna(wilson.test_low).to_numpy(),
                          "high": found.high.fillna(wilson.test_high).to_numpy()})  # fmt: skip
    seeds = sorted(set(found.seeds))
    return frame, (
        "one seed, 95 % over images" if seeds == [1] else f"mean of {' or '.join(map(str, seeds))} seeds, 95 %"
    )


def ladder(table: pd.DataFrame, base: recipe.Recipe = recipe.RECIPES["quick"]) -> Figure:
    """Test accuracy of each rung of a recipe's ladder that has been run: mean over seeds and its interval."""
    rows, order = rungs(table, base)
    frame, words = _means(rows, "rung", order)
    return plots.intervals(frame, f"The ladder on {base.name}, {rows.epochs.iloc[0]} epochs: {words}")


def varied(table: pd.DataFrame, field: str) -> pd.DataFrame:
    """The recorded runs that differ in nothing but one field of the recipe and the seed, and in it the most often."""
    same = [name for name in recipe.RECIPES["paper"].to_dict() if name not in ("name", "seed", field)]
    groups = [rows for _, rows in table.groupby(table[same].astype(str).agg(" ".join, axis=1))]
    return max(groups, key=lambda rows: rows[field].nunique())


def mixup_alpha(rows: pd.DataFrame) -> Figure:
    """Test accuracy over Mixup's alpha: mean over seeds and its interval."""
    frame, words = _means(rows, "mixup_alpha", sorted(set(rows.mixup_alpha)))
    frame["label"] = [f"alpha = {alpha:g}" if alpha else "no Mixup" for alpha in frame.label]
    return plots.intervals(frame, f"Mixup's alpha, {rows.epochs.iloc[0]} epochs: {words}")


def beside(table: pd.DataFrame, name: str, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table that lies beside run.json, of all seeds of the run nearest to the paper's that has it, one below the
    other; and the rows of those runs. Both are empty where there is none.
    """

    def path(row: Any) -> Path:
        return root / row.recipe / str(row.seed) / name

    rows = table[[row.recipe in NEAREST and path(row).exists() for row in table.itertuples()]]
    if rows.empty:
        return rows, rows
    rows = main_run(rows)
    tables = [pd.read_csv(path(row)).assign(seed=row.seed) for row in rows.itertuples()]
    return pd.concat(tables, ignore_index=True), rows


def kind_severity(shift: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Test accuracy by kind and severity (the content of shift.csv), mean over seeds; kinds in the order of KINDS."""
    clean, damaged = 100 * shift[shift.kind == "clean"].accuracy.mean(), shift[shift.kind != "clean"]
    cells = 100 * damaged.pivot_table(index="kind", columns="severity", values="accuracy")
    cells = cells.loc[[kind for kind in distort.KINDS if kind in cells.index]]
    cells.index = pd.Index([kind.replace("_", " ") for kind in cells.index], name="")
    heading = f"{title(rows)}:\n{shift['count'].iloc[0]:,} test images, clean {clean:.1f} %"
    return plots.heat(cells, heading, "accuracy, %", 10, clean, ".0f")


def predicted_accuracy(trials: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Predicted against true accuracy on known distortions (the content of estimates.csv), all seeds together."""
    heading = f"Accuracy predicted without labels: {title(rows)}, {trials['count'].iloc[0]:,} validation images"
    return plots.estimates(trials, estimate.errors(trials), heading)


def reported(table: pd.DataFrame) -> Figure:
    """The paper's accuracies beside the means over seeds of the run nearest to it in each tier."""
    ours = {f"{tier}: {title(rows)}": [100 * rows[column].mean() for column in REPORTED]
            for tier, rows in by_tier(table).items()}  # fmt: skip
    paper = [100 * level if level else float("nan") for _, level in REPORTED.values()]
    frame = pd.DataFrame({"paper: 300 epochs": paper, **ours}, [label for label, _ in REPORTED.values()])
    return plots.bars(frame, "Reported and reproduced", "classified right, %")


def draw(root: Path = runs.RECORDED) -> dict[str, Figure]:
    """Every figure for which runs are recorded below `root`, by its file's name without .png."""
    table = runs.current(runs.load(root))
    if table.empty:
        raise CourseError(f"No run is recorded in {shown(root)}: train one first.")
    drawn = {"figure_1_architecture": plots.architecture(recipe.RECIPES["paper"].network())}
    if set(NEAREST) & set(table.recipe):
        rows = main_run(table)
        drawn |= {"figure_2_training_accuracy": training_accuracy(rows), "figure_3_loss": loss(rows),
                  "figure_4_validation_accuracy": validation_accuracy(rows)}  # fmt: skip
        if set(table.data) == {CIFAR10}:  # the stand-in set is never compared
            drawn["reported_reproduced"] = reported(table)
    tested = table.dropna(subset=["test_accuracy"])
    drawn |= {f"ladder_{base.name}": ladder(tested, base) for base in bases(tested)}
    if len(tested) and (rows := varied(tested, "mixup_alpha")).mixup_alpha.nunique() > 2:
        drawn["mixup_alpha"] = mixup_alpha(rows)
    for name, file, make in (("kind_severity", "shift.csv", kind_severity),
                             ("predicted_accuracy", estimate.FILE, predicted_accuracy)):  # fmt: skip
        found, rows = beside(table, file, root)
        if len(rows):
            drawn[name] = make(found, rows)
    return drawn


def regenerate(folder: Path = FIGURES, root: Path = runs.RECORDED, source: str = CIFAR10) -> list[Path]:
    """Draw every figure for which there are runs below `root` into `folder`; the same runs give the same bytes."""
    plots.start(source)
    drawn = draw(root)
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        plots.save(figure, path)
    return paths
