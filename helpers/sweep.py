"""Recipes x seeds: train and test each, one after the other; what is finished already is not run again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from helpers import evaluate, runs, train
from helpers.recipe import Recipe


def sweep(recipes: Iterable[Recipe], seeds: Iterable[int], root: Path, stand_in: bool = False) -> pd.DataFrame:
    """Train every recipe with every seed into `root/<recipe>/<seed>`, test each once selected, load all."""
    seeds = list(seeds)
    for recipe in recipes:
        data = train.training_data(recipe, stand_in)
        for seed in seeds:
            path = Path(root) / recipe.name / str(seed)
            run = train.fit(recipe.but(seed=seed), data, path)
            if "test" not in run.record:
                evaluate.test_run(path, stand_in)
    return runs.load(root)
