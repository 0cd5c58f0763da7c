"""Which published figure is drawn from which recorded run. Needs neither CIFAR-10 nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from helpers import plots, recipe, runs
from helpers.data import CIFAR10
from helpers.runtime import ROOT, CourseError, shown

FIGURES = ROOT / "figures"

# The paper's numbers that its figures end at (PAPER: "Results Discussion").
PAPER_TRAIN_ACCURACY = 0.7341
PAPER_VAL_ACCURACY = 0.9069


def main_run(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the run nearest to the paper's that has been recorded: `paper`, else `laptop`, else `quick`."""
    for name in ("paper", "laptop", "quick"):
        rows = table[table.recipe == name] if len(table) else table
        if len(rows):
            return rows
    raise CourseError(f"No run of paper, laptop or quick is recorded in {shown(runs.RECORDED)}: train one first.")


def title(rows: pd.DataFrame) -> str:
    """What a figure says of the run it shows, so that no reader takes 12 epochs for 300."""
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


def ladder(table: pd.DataFrame) -> Figure:
    """Test accuracy of each rung of the quick ladder that has been run: mean over seeds, lowest and highest seed."""
    short = table.recipe.str.endswith("-short")  # the quick profile's own, of fewer images and epochs
    table = table[short] if short.any() else table
    names = table.recipe.str.removesuffix("-short")
    rungs = [rung.name for rung in recipe.ladder(recipe.RECIPES["quick"]) if rung.name in set(names)]
    groups = [table[names == name].test_accuracy for name in rungs]
    frame = pd.DataFrame({"label": rungs, **{column: [getattr(group, how)() for group in groups] for column, how in
                                             (("value", "mean"), ("low", "min"), ("high", "max"))}})  # fmt: skip
    seeds = max((len(group) for group in groups), default=0)
    return plots.intervals(frame, f"The ladder at quick size: mean, lowest and highest of {seeds} seed(s)")


def regenerate(folder: Path = FIGURES, root: Path = runs.RECORDED, source: str = CIFAR10) -> list[Path]:
    """Draw every published figure from the runs below `root`; the same runs give the same bytes."""
    plots.start(source)
    table = runs.load(root)
    rows = main_run(table)
    drawn = {
        "figure_1_architecture": plots.architecture(recipe.RECIPES["paper"].network()),
        "figure_2_training_accuracy": training_accuracy(rows),
        "figure_3_loss": loss(rows),
        "figure_4_validation_accuracy": validation_accuracy(rows),
        "ladder_quick": ladder(table),
    }
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        plots.save(figure, path)
    return paths
