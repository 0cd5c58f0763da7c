"""Recipes x seeds: train and test each; what is finished is not run again, what was interrupted goes on, and what
fails does not stop the rest. On this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from helpers import data, runs, train
from helpers.recipe import Recipe
from helpers.runtime import CourseError, out_dir, pick_device
from helpers.sweep import cluster
from helpers.sweep.jobs import AGAIN, FINISHED, Job, Progress, complete, forecast, plan, sentence

__all__ = ["forecast", "plan", "results", "sweep"]

SIDE_BY_SIDE = 8  # runs of one recipe at once on a GPU; if these do not fit, half as many are tried


def sweep(recipes: Iterable[Recipe], seeds: Iterable[int], root: Path, stand_in: bool = False, corruptions: int = 0,
          ray: str = "", gpus_per_run: float = 1.0) -> dict[str, str]:  # fmt: skip
    """Train every recipe with every seed into `root/<recipe>/<seed>`, and test each once it is selected.

    With `corruptions`, each is also tested on that many distorted images, into shift.csv; again, and a line says so, if
    it was on fewer. `ray` is the address of a Ray cluster ("auto" is the one of this machine) whose nodes do the work,
    a run on `gpus_per_run` of a GPU; without it a recipe's seeds share this machine's GPU, and on a CPU run one after
    the other.
    Returns what failed: recipe/seed -> a sentence. Raises train.Interrupted if asked to stop: everything is kept, and
    the same call goes on.
    """
    jobs = plan(recipes, seeds, root, stand_in, corruptions)
    todo, source = [job for job in jobs if job.state != FINISHED], data.source(stand_in)
    if not todo:
        return {}
    for job in todo:
        runs.refuse_stand_in(job.path, source)
        if AGAIN in job.state:
            print(f"{job.label}: {job.state}")
    progress = Progress(jobs)
    try:
        if ray:
            cluster.run(todo, ray, gpus_per_run, source == data.STAND_IN, corruptions, progress)
        else:
            _run_here(todo, stand_in, corruptions, progress)
    finally:
        progress.bar.close()
    return progress.failures


def _run_here(jobs: Sequence[Job], stand_in: bool, corruptions: int, progress: Progress) -> None:
    if not all(job.trained for job in jobs):
        full = data.load_set("train", stand_in)  # without images no run can be trained: that is no failure of one

    @lru_cache(maxsize=1)
    def split(train_size: int, val_size: int, split_seed: int) -> data.TrainingData:
        return data.split_train_val(full, val_size, train_size, split_seed)

    def images(recipe: Recipe) -> data.TrainingData:
        return split(recipe.train_size, recipe.val_size, recipe.split_seed)

    def attempt(group: list[Job]) -> None:
        progress.running, problem = len(group), ""
        try:
            complete(group, images, stand_in, corruptions, progress.epoch)
        except train.Interrupted:
            raise
        except Exception as error:  # whatever it is, a night's sweep does not end for one run
            problem = sentence(error)
        # Out of the handler, since an error holds on to the memory of what failed.
        if problem and len(group) > 1:  # one of them, or together they are too large: by halves, from checkpoints
            attempt(group[: len(group) // 2])
            attempt(group[len(group) // 2 :])
            return
        for job in group:
            progress.failed(job, problem) if problem else progress.finished(job)

    for group in _groups(jobs, SIDE_BY_SIDE if pick_device().type == "cuda" else 1):
        attempt(group)


def _groups(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Runs of one recipe that go side by side, in order: they take equally long."""
    groups: list[list[Job]] = []
    for job in jobs:
        if groups and len(groups[-1]) < most and groups[-1][0].recipe.but(seed=job.recipe.seed) == job.recipe:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def results(profile: str, recipes: Iterable[Recipe], seeds: Iterable[int] = (0,)) -> pd.DataFrame:
    """The rows a notebook shows: read from the recorded runs, or, in any other profile, trained under out/<profile>/.

    Rows are as runs.load() gives them, in the order of `recipes`, then seeds. Only the quick profile may fall back on
    the stand-in set. Raises CourseError if a run was not recorded, or failed.
    """
    recipes, seeds = list(recipes), list(seeds)
    if profile == "recorded":
        return _rows(runs.current(runs.load()), recipes, seeds)
    root = out_dir(profile) / "runs"
    if failures := sweep(recipes, seeds, root, stand_in=profile == "quick"):
        raise CourseError("; ".join(f"{label}: {problem}" for label, problem in failures.items()))
    return _rows(runs.load(root), recipes, seeds)


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
