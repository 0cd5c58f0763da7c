"""Which published figure is drawn from which recorded run. Needs neither CIFAR-10 nor a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import distort, estimate, evaluate, plots, recipe, runs, stats
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
# kind -> the rungs on a base, in their order
LADDERS = {"ladder": recipe.ladder, "climb": recipe.climb, "approach": recipe.approach}

_DOTS = ": dots are means over seeds, bars their 95 % intervals; a second panel, if any, counts distorted images"

# What to see in each figure, in words: for the README, and wherever else one is shown. Of ladders and of varied fields
# there are several: ladder_<recipe>, climb_<recipe>, approach_<recipe>, epochs_<recipe> and varied_<field>.
ALT = {
    "figure_1_architecture": "The network: a stem, four stages of residual blocks with squeeze-and-excitation, and a "
    "head; every box with its layers, every stage with its output shape and parameters",
    "figure_2_training_accuracy": "Training accuracy over epochs (of several seeds their mean, in a band from the "
    f"lowest to the highest), with the paper's final {percent(PAPER_TRAIN_ACCURACY)} as a dotted level",
    "figure_3_loss": "Training and validation loss over epochs, a line each (of several seeds their mean, in a band "
    "from the lowest to the highest)",
    "figure_4_validation_accuracy": "Validation accuracy over optimiser steps, on the images as they are and on "
    f"augmented ones, with the paper's final {percent(PAPER_VAL_ACCURACY)} on augmented ones as a dotted level",
    "ladder": "Test accuracy of each rung of the augmentation ladder, from no augmentation at the top to everything "
    "with Mixup at the bottom" + _DOTS,
    "climb": "Test accuracy of each rung of a climb from the paper's augmentation, at the top, to what a short "
    "schedule is best served with" + _DOTS,
    "approach": "Test accuracy of each rung from the paper's augmentation, at the top, to that of beyond" + _DOTS,
    "varied": "Test accuracy with one setting of a recipe changed at a time, all else being equal" + _DOTS,
    "epochs": "Test accuracy over the epochs of the schedule, on a scale that doubles: a line for each rung of the "
    "augmentation ladder, with 95 % intervals; a second panel, if any, counts distorted images",
    "kind_severity": "A heat map of the test accuracy under each kind of distortion, a row each, at growing severity "
    "from left to right",
    "predicted_accuracy": "Accuracy predicted without labels against the true one, one panel per method, one "
    "point per distorted set, with the line where both are equal",
    "reported_reproduced": "The paper's accuracies beside ours, a group of bars each for training, validation "
    "(augmented, and as it is) and test images, a bar for the paper and one for each kind of run",
}


def alt(name: str) -> str:
    """The words for a figure by its file's name without .png; "" for a name that no figure has."""
    family, _, member = name.partition("_")
    if family in (*LADDERS, "epochs", "varied"):  # of which there are several
        name = family if member else ""
    return ALT.get(name, "")


def main_run(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the run nearest to the paper's that has been recorded: `paper`, else `laptop`, else `quick`; of one
    that several tiers have, those of the first of TIERS."""
    for name in NEAREST:
        rows = table[table.recipe == name] if len(table) else table
        if len(rows):
            return rows[rows.tier == min(rows.tier, key=TIERS.index)]  # tiers are not averaged
    raise CourseError(f"No run of {', '.join(NEAREST)} is recorded in {shown(runs.RECORDED)}: train one first.")


def by_tier(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """tier -> the rows of the run nearest to the paper's in it, for those tiers that have one."""
    near = table[table.recipe.isin(NEAREST)]
    return {tier: main_run(near[near.tier == tier]) for tier in TIERS if (near.tier == tier).any()}


def schedule(rows: pd.DataFrame) -> str:
    """Epochs in words, so that no reader takes a short run for the paper's: "25 of 300 epochs"."""
    epochs, full = rows.epochs.iloc[0], recipe.RECIPES["paper"].epochs
    return f"{epochs} epochs" if epochs >= full else f"{epochs} of {full} epochs"


def title(rows: pd.DataFrame) -> str:
    """What a figure says of the run it shows."""
    row = rows.iloc[0]
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else f"seed {row.seed}"
    return f"recipe {row.recipe}, {schedule(rows)}, {seeds}"


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


def bases(table: pd.DataFrame, kind: str = "ladder") -> list[recipe.Recipe]:
    """The recipes on which a ladder of that kind is named and of whose rungs at least two have been run.

    Those that a climb and an approach share with the augmentation ladder do not count.
    """
    have, found = set(table.recipe.str.removesuffix("-short")), []
    for base in (known for known in recipe.RECIPES.values() if not ("-" in known.name or known.start)):
        names = {rung.name for rung in LADDERS[kind](base)}
        shared = {rung.name for rung in recipe.ladder(base)} if kind != "ladder" else set()
        if names <= set(recipe.RECIPES) and len(have & names - shared) > 1:
            found.append(base)
    return found


def rungs(table: pd.DataFrame, base: recipe.Recipe, kind: str = "ladder") -> pd.DataFrame:
    """The rows of a ladder in the order of its rungs, with a column `rung`. Only the quick profile has `-short` runs,
    of fewer images and epochs, and compares those alone.
    """
    order = {rung.name: at for at, rung in enumerate(LADDERS[kind](base))}
    table = table.assign(rung=table.recipe.str.removesuffix("-short"))
    table = table[table.rung.isin(order)]
    short = table.recipe.str.endswith("-short")
    table = table[short] if short.any() else table
    return table.sort_values("rung", key=lambda names: names.map(order), kind="stable")


def measured(rows: pd.DataFrame, by: str) -> dict[str, tuple[str, pd.DataFrame]]:
    """What can be compared between groups of runs: a column of runs.load() -> its name, and the rows that have it.

    Always the clean test accuracy; that on distorted images where two groups or more have it, counted on equally many
    images at the same severities: of several such settings the one that most runs have. A field that is varied has no
    such column where its base was not counted so.
    """
    found = {"test_accuracy": ("test accuracy", rows)}
    part = rows.dropna(subset=["corrupted_accuracy"])
    if len(part):
        setting = part.corrupted_count.astype(str) + " at " + part.corrupted_severities
        part = part[setting == setting.mode()[0]]
    if part[by].nunique() > 1 and ("base" not in part or (part.recipe == part.base).any()):
        found["corrupted_accuracy"] = ("corrupted accuracy", part)
    return found


def over_images(row: Any, value: str) -> tuple[float, float]:
    """The 95 % interval over test images of one run (a row of runs.load()): of `test_accuracy` as recorded, of
    `corrupted_accuracy` as if each image had been counted once, which is the cautious end of it; else NaN."""
    if value == "corrupted_accuracy" and not pd.isna(row.corrupted_accuracy):
        found = evaluate.share(row.corrupted_accuracy * row.corrupted_count, int(row.corrupted_count))
        return found.low, found.high
    return (row.test_low, row.test_high) if value == "test_accuracy" else (np.nan, np.nan)


def _means(part: pd.DataFrame, value: str, by: str, single: bool) -> pd.DataFrame:
    """value, low, high of each group, indexed by it: the mean over seeds with its interval. Where each recipe of a
    figure has a single seed, that over images: beside intervals over seeds it would look like a surer one."""
    found = stats.over_seeds(part, value, by).set_index(by)[["mean", "low", "high"]].rename(columns={"mean": "value"})
    if single:
        for row in part.itertuples():
            found.loc[getattr(row, by), ["low", "high"]] = over_images(row, value)
    return found


def _compare(rows: pd.DataFrame, by: str, title: str) -> Figure:
    """A dot a group with its interval, a panel for each measure."""
    single, order = bool((rows.groupby(by).size() == 1).all()), list(dict.fromkeys(rows[by]))
    frames = {f"{name}, %": _means(part, value, by, single).reindex(order).reset_index(names="label")
              for value, (name, part) in measured(rows, by).items()}  # fmt: skip
    return plots.interval_panels(frames, f"{title}: {_seeds(rows, by)}")


def _seeds(rows: pd.DataFrame, by: str) -> str:
    seeds = sorted(set(rows.groupby(by).size()))
    many = " or ".join(map(str, seeds))
    return "one seed, 95 % over images" if seeds == [1] else f"mean of {many} seeds, 95 % over seeds"


_NONE = {"mixup_alpha": "no Mixup", "cutmix_alpha": "no CutMix", "reduction": "no SE"}  # what a 0 means


def _words(field: str, value: Any) -> str:
    if not value and field in _NONE:
        return _NONE[field]
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return f"{field.replace('_', ' ')} {format(value, 'g') if number else value}"


def _run(rows: pd.DataFrame, what: str, base: recipe.Recipe) -> pd.DataFrame:
    if rows.empty:
        raise CourseError(f"Nothing of the {what} on {base.name} is in this table: train it first, or choose another.")
    return rows


def ladder(table: pd.DataFrame, base: recipe.Recipe = recipe.RECIPES["quick"]) -> Figure:
    """Test accuracy of each rung of a recipe's ladder that has been run, on clean and, where counted, distorted images:
    mean over seeds and its interval.
    """
    rows = _run(rungs(table, base), "ladder", base)
    rows = rows.assign(rung=rows.rung.map(_added(base)))
    return _compare(rows, "rung", f"The ladder on {base.name}, {schedule(rows)}")


def _added(base: recipe.Recipe) -> dict[str, str]:
    """The rungs of the augmentation ladder: recipe -> what it adds, in a word."""
    return {rung.name: "mixup" if rung.mixup_alpha else rung.stage for rung in recipe.ladder(base)}


def changes(base: recipe.Recipe, kind: str = "climb") -> dict[str, str]:
    """The rungs of a climb or an approach: recipe -> what it changes of the one before, in words."""
    found, before = {}, None
    for rung in LADDERS[kind](base):
        now = {name: value for name, value in rung.to_dict().items() if name != "name"}
        new = [_words(name, value) for name, value in now.items() if before and before[name] != value]
        found[rung.name] = ", ".join(new) or "all augmentation, Mixup"
        before = now
    return found


def _rung_by_rung(table: pd.DataFrame, base: recipe.Recipe, kind: str) -> Figure:
    rows = _run(rungs(table, base, kind), kind, base)
    return _compare(rows.assign(rung=rows.rung.map(changes(base, kind))), "rung",
                    f"The {kind} from {base.name}, {schedule(rows)}" + " at first" * (rows.epochs.nunique() > 1)
                    )  # fmt: skip


def climb(table: pd.DataFrame, base: recipe.Recipe = recipe.RECIPES["quick"]) -> Figure:
    """As `ladder`, of the climb on a recipe: one row per rung, named by what it changes of the one before."""
    return _rung_by_rung(table, base, "climb")


def approach(table: pd.DataFrame, base: recipe.Recipe = recipe.RECIPES["quick"]) -> Figure:
    """As `climb`, of the approach to `beyond` on a recipe."""
    return _rung_by_rung(table, base, "approach")


def varied(table: pd.DataFrame, field: str, base: str = "quick") -> pd.DataFrame:
    """The runs of the recipe `base` and of those that differ from it in nothing but one field, sorted by its value.

    With a batch size the learning rate is expected to differ too, in proportion (`Recipe.scaled_to`), with the
    blocks of a stage the width, and with decoupled decay its size.
    table: as runs.load() gives it. Adds the columns `value` (the field's value in words) and `base`. Empty where `base`
    is not in the table. Raises CourseError for a field that recipes do not have.
    """
    names = [name for name in recipe.RECIPES["paper"].to_dict() if name not in ("name", "seed")]
    if field not in names:
        raise CourseError(f"A recipe has no field {field!r} to vary: expected one of {', '.join(names)}.")
    if table.empty:
        return table
    scaled = {"batch_size": {"learning_rate": table.learning_rate / table.batch_size}, "blocks": {"width": 0},
              "decoupled_decay": {"weight_decay": 0}}  # fmt: skip
    if not (own := table.recipe == base).any():
        return table[:0]
    others = table.assign(**scaled.get(field, {}))[[name for name in names if name != field]]
    texts = [tuple(map(str, row)) for row in others.itertuples(index=False)]  # some values are lists
    like = texts[own.argmax()]
    rows = table[[text == like for text in texts]]
    held, words = rows[rows.recipe == base].iloc[0], rows[field].map(lambda value: _words(field, value))
    for other in scaled.get(field, {}):  # which may differ beside the field, and not alone
        own, varies = rows[other] == held[other], rows[field].map(str) != str(held[field])
        words = words.where(own, words + ", " + rows[other].map(lambda value, other=other: _words(other, value)))
        rows, words = rows[own | varies], words[own | varies]
    words = words.mask(words.isin(words[rows.recipe == base]), lambda own: own + f" ({base})")
    rows = rows.assign(value=words, base=base)
    first = rows.sort_values("recipe", key=lambda names: names != base, kind="stable").groupby("value").recipe.first()
    rows = rows[rows.recipe == rows["value"].map(first)]  # one recipe a value, under whatever names it was run
    order = rows[field].map(lambda value: tuple(value) if isinstance(value, list) else value)
    return rows.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def vary(rows: pd.DataFrame, field: str) -> Figure:
    """Test accuracy over the values of one field (rows: of `varied`): mean over seeds and its interval."""
    what = "One change at a time" if field == OTHERS else f"{field} varied"
    return _compare(rows, "value", f"{what} on {rows.base.iloc[0]}, {schedule(rows)}")


OTHERS = "others"  # the fields of which one value beside the base's has been run, together


def fields(table: pd.DataFrame, base: str = "quick") -> dict[str, pd.DataFrame]:
    """field -> the rows of `varied`, for each field that has three values or more there; below OTHERS the fields that
    have two, the base once and then each with its other value. Stages are a ladder's matter.
    """
    names = [name for name in recipe.RECIPES["paper"].to_dict() if name not in ("name", "seed", "stage")]
    found = {name: rows for name in names if len(rows := varied(table, name, base))}
    several = {name: rows for name, rows in found.items() if rows["value"].nunique() > 2}
    others = [rows for rows in found.values() if rows["value"].nunique() == 2]
    if others:
        own = others[0].recipe == others[0].base
        parts = [others[0][own].assign(value=others[0].base), *(rows[rows.recipe != rows.base] for rows in others)]
        several[OTHERS] = pd.concat(parts, ignore_index=True)
    return several


def all_varied(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(the figure's name, field, rows) of `fields`, on quick and on the paper's recipe; of the policy, which only the
    last rung of the ladder below Mixup draws from, on that; and of the strength, which quick has no use for, on
    reduced.
    """
    found = []
    for base in ("quick", "paper"):
        policies = varied(table, "policy", recipe.ladder(recipe.get(base))[-2].name)
        several = {"policy": policies} if len(policies) and policies["value"].nunique() > 1 else {}
        found += [(f"varied_{field}" + f"_{base}" * (base != "quick"), field, rows)
                  for field, rows in (fields(table, base) | several).items()]  # fmt: skip
    strengths = varied(table, "strength", "reduced")
    if len(strengths) and strengths["value"].nunique() > 1:
        found.append(("varied_strength_reduced", "strength", strengths))
    return found


def over_epochs(table: pd.DataFrame, base: recipe.Recipe) -> pd.DataFrame:
    """The runs of those rungs of a recipe's ladder of which three lengths of the schedule or more have been run, the
    recipe being equal in all else: a rung after the other, the shortest first, with what it adds as a column `rung`.
    Empty where there are none.
    """
    parts = [varied(table, "epochs", name).assign(rung=added) for name, added in _added(base).items()]
    return pd.concat([part if part.epochs.nunique() > 2 else part[:0] for part in parts], ignore_index=True)


def epochs(table: pd.DataFrame, base: recipe.Recipe = recipe.RECIPES["reduced"]) -> Figure:
    """Test accuracy of rungs of a ladder over the length of the schedule (`over_epochs`), on clean and, where counted,
    distorted images: the mean over seeds, with its interval where there are several."""
    rows = _run(over_epochs(table, base), "schedules of several lengths", base)
    single = bool((rows.groupby("recipe").size() == 1).all())
    panels = {f"{name}, %": {rung: _means(own, value, "epochs", single).sort_index().reset_index(names="x")
                             for rung, own in part.groupby("rung", sort=False)}
              for value, (name, part) in measured(rows, "rung").items()}  # fmt: skip
    return plots.trends(panels, f"Rungs on {base.name}, schedules of several lengths: {_seeds(rows, 'recipe')}",
                        f"epochs (the paper's: {recipe.RECIPES['paper'].epochs})")  # fmt: skip


def beside(table: pd.DataFrame, name: str, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table that lies beside run.json, of the seeds of the run nearest to the paper's that has it, one below the
    other; and the rows of those runs. Both are empty where there is none. A damaged one is left out, and so is what was
    tried on other images than most seeds were, or on fewer; warnings name them.
    """

    def path(row: Any) -> Path:
        return root / row.recipe / str(row.seed) / name

    rows = table[[row.recipe in NEAREST and path(row).exists() for row in table.itertuples()]]
    found = {row.Index: one for row in rows.itertuples() if (one := _whole(path(row))) is not None}
    if not found:
        return rows[:0], rows[:0]
    rows = main_run(rows.loc[list(found)])
    tried = {index: (int(found[index]["count"].iloc[0]), found[index][["kind", "severity"]].drop_duplicates().to_csv())
             for index in rows.index}  # fmt: skip
    usual = max(tried.values(), key=lambda key: (list(tried.values()).count(key), key))
    for row in rows.itertuples():
        if tried[row.Index] != usual:
            warnings.warn(f"Left out: {shown(path(row))} is of other images than those of most seeds.", stacklevel=2)
    rows = rows.loc[[index for index in rows.index if tried[index] == usual]]
    return pd.concat([found[row.Index].assign(seed=row.seed) for row in rows.itertuples()], ignore_index=True), rows


def _whole(path: Path) -> pd.DataFrame | None:
    """A table of distorted images; None, with a warning, for what is left of one."""
    if path.name == estimate.FILE:
        found = estimate.read(path)
    else:
        found = pd.read_csv(path) if evaluate.is_told(runs.read(path.parent)) else None
    if found is not None:
        return found
    warnings.warn(f"Left out: {shown(path)} is damaged: make it anew with `evaluate --corruptions`.", stacklevel=2)
    return None


def kind_severity(shift: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Test accuracy by kind and severity (the content of shift.csv), mean over seeds; kinds in the order of KINDS."""
    clean, damaged = 100 * shift[shift.kind == "clean"].accuracy.mean(), shift[shift.kind != "clean"]
    cells = 100 * damaged.pivot_table(index="kind", columns="severity", values="accuracy")
    cells = cells.loc[[kind for kind in distort.KINDS if kind in cells.index]]
    cells.index = pd.Index([kind.replace("_", " ") for kind in cells.index], name="")
    heading = f"{title(rows)}:\n{shift['count'].iloc[0]:,} test images, clean {clean:.1f} %"
    low = 10 * (cells.min(axis=None) // 10)  # a scale from chance on would spend its steps where no cell is
    return plots.heat(cells, heading, "accuracy, %", low, clean, ".0f")


def predicted_accuracy(trials: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Predicted against true accuracy on known distortions (the content of estimates.csv), all seeds together."""
    heading = f"Accuracy predicted without labels:\n{title(rows)}, {trials['count'].iloc[0]:,} validation images"
    return plots.estimates(trials, estimate.errors(trials), heading)


def reported(table: pd.DataFrame) -> Figure:
    """The paper's accuracies beside the means over seeds of the run nearest to it in each tier."""
    ours = {f"{tier}: {title(rows)}": [100 * rows[column].mean() for column in REPORTED]
            for tier, rows in by_tier(table).items()}  # fmt: skip
    paper = [100 * level if level else float("nan") for _, level in REPORTED.values()]
    frame = pd.DataFrame({"paper: 300 epochs": paper, **ours}, [label for label, _ in REPORTED.values()])
    return plots.bars(frame, "Reported, and our runs so far", "classified right, %")


def draw(root: Path = runs.RECORDED, source: str | None = None) -> dict[str, Figure]:
    """Every figure for which runs are recorded below `root`, by its file's name without .png; of runs on the data
    `source` alone, if given."""
    table = runs.current(runs.load(root))
    table = table[table.data == source].reset_index(drop=True) if source and len(table) else table
    if table.empty:
        raise CourseError(f"No run is recorded in {shown(root)}: train one first.")
    drawn = {"figure_1_architecture": plots.architecture(recipe.RECIPES["paper"].network())}
    if set(NEAREST) & set(table.recipe):
        rows = main_run(table)
        drawn |= {"figure_2_training_accuracy": training_accuracy(rows), "figure_3_loss": loss(rows),
                  "figure_4_validation_accuracy": validation_accuracy(rows)}  # fmt: skip
        if set(table.data) == {CIFAR10}:  # the stand-in set is never compared
            drawn["reported_reproduced"] = reported(table.dropna(subset=["test_accuracy"]))
    tested = table.dropna(subset=["test_accuracy"])
    for kind, make in (("ladder", ladder), ("climb", climb), ("approach", approach)):
        drawn |= {f"{kind}_{base.name}": make(tested, base) for base in bases(tested, kind)}
    drawn |= {name: vary(rows, field) for name, field, rows in all_varied(tested)}
    drawn |= {f"epochs_{base.name}": epochs(tested, base) for base in bases(tested) if len(over_epochs(tested, base))}
    for name, file, make in (("kind_severity", "shift.csv", kind_severity),
                             ("predicted_accuracy", estimate.FILE, predicted_accuracy)):  # fmt: skip
        found, rows = beside(table, file, root)
        if len(rows):
            drawn[name] = make(found, rows)
    return drawn


def regenerate(folder: Path = FIGURES, root: Path = runs.RECORDED, source: str = CIFAR10) -> list[Path]:
    """Draw every figure for which there are runs below `root` into `folder`, and remove there those of runs that are
    gone; the same runs give the same bytes."""
    plots.start(source)
    drawn = draw(root, source)
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        plots.save(figure, path)
    for old in set(folder.glob("*.png")) - set(paths):
        if alt(old.stem):  # one of ours, of runs that are gone
            old.unlink()
    return paths
