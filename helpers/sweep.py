"""Recipes x seeds: train and test each, a recipe's seeds together; what is finished already is not run again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from helpers import evaluate, runs, train
from helpers.recipe import Recipe
from helpers.runtime import CourseError, out_dir


def sweep(recipes: Iterable[Recipe], seeds: Iterable[int], root: Path, stand_in: bool = False) -> pd.DataFrame:
    """Train every recipe with every seed into `root/<recipe>/<seed>`, test each once selected; their rows in order."""
    recipes, seeds = list(recipes), list(seeds)
    for recipe in recipes:
        data = train.training_data(recipe, stand_in)
        seeded, paths = (
            [recipe.but(seed=seed) for seed in seeds],
            [Path(root) / recipe.name / str(seed) for seed in seeds],
        )
        for run in train.fit_many(seeded, data, paths):
            if "test" not in run.record:
                evaluate.test_run(run.path, stand_in)
    return _rows(runs.load(root), recipes, seeds)


def results(profile: str, recipes: Iterable[Recipe], seeds: Iterable[int] = (0,)) -> pd.DataFrame:
    """The rows a notebook shows: read from the recorded runs, or, in any other profile, trained under out/<profile>/.

    Rows are as runs.load() gives them, in the order of `recipes`, then seeds. Only the quick profile may fall back on
    the stand-in set. Raises CourseError if a run was not recorded.
    """
    recipes, seeds = list(recipes), list(seeds)
    if profile == "recorded":
        return _rows(runs.current(runs.load()), recipes, seeds)
    return sweep(recipes, seeds, out_dir(profile) / "runs", stand_in=profile == "quick")


def _rows(table: pd.DataFrame, recipes: list[Recipe], seeds: list[int]) -> pd.DataFrame:
    asked = pd.MultiIndex.from_product([[recipe.name for recipe in recipes], seeds], names=["recipe", "seed"])
    have = table.set_index(["recipe", "seed"]) if len(table) else pd.DataFrame(index=asked[:0])
    missing = [f"{name}/{seed}" for name, seed in asked if (name, seed) not in have.index]
    if missing:
        raise CourseError(
            f"There is no recorded run {', '.join(missing)}: train it with `python -m helpers sweep`, or choose the "
            "profile 'quick'."
        )
    return have.loc[asked].reset_index()
