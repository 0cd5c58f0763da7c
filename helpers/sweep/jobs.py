"""The runs of a sweep: what is left to do of each, how long that takes, the doing, and how far the whole is."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from helpers import checkpoint, data, evaluate, runs, train
from helpers.recipe import Recipe
from helpers.runtime import CourseError, counted, device_name, percent, pick_device, shown

FINISHED, AGAIN = "finished", "to distort again"
QUIET = 300.0  # seconds after which a line is due off a terminal, even if no run has ended

# Two recipes that agree in these take the same time for an image; anything else costs next to nothing.
_SPEED = ("blocks", "width", "stem_stride", "reduction", "batch_size", "resolutions", "sam_rho", "consistency",
          "teacher", "precision", "compiled")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its recipe, with its seed; its folder; what is left to do, in words; how many images it still
    has to train on; whether its training is over.
    """

    recipe: Recipe
    path: Path
    state: str
    images: int
    trained: bool = False

    @property
    def label(self) -> str:
        return f"{self.recipe.name}/{self.recipe.seed}"


def plan(recipes: Iterable[Recipe], seeds: Iterable[int], root: Path, stand_in: bool = False,
         corruptions: int = 0) -> list[Job]:  # fmt: skip
    """Every run that is asked for, once, with what is left of it. Reads the folders below `root`, writes nothing."""
    if Path(root).exists() and not Path(root).is_dir():
        raise CourseError(f"{shown(root)} is a file, and runs need a folder: give another --root.")
    seeds, source = list(seeds), data.source(stand_in)
    asked = dict.fromkeys(recipe.but(seed=seed) for recipe in recipes for seed in seeds)
    return [_look(recipe, Path(root) / recipe.name / str(recipe.seed), source, corruptions) for recipe in asked]


def _look(recipe: Recipe, path: Path, source: str, corruptions: int) -> Job:
    steps = train.steps_per_epoch(recipe)
    trained = (path / "run.json").exists()
    try:
        held = runs.read(path).record if trained else checkpoint.read(path)[0]
        if held and (Recipe.from_dict(held["recipe"]) != recipe or held["data"] != source):
            raise CourseError
    except CourseError:  # what is wrong is said where the run is asked to go on
        return Job(recipe, path, "refused: damaged, or another run", 0)
    if trained:
        run = runs.Run(path, held)
        lacks = ", ".join(filter(None, ["to test" * ("test" not in held), _to_distort(run, corruptions)]))
        if lacks and not run.weights.exists():
            lacks = f"refused: {lacks}, and its weights are not here"
        return Job(recipe, path, lacks or FINISHED, 0, trained=True)
    taken = len(held["history"]) * steps + held["done"] if held else 0
    state = f"to resume in epoch {len(held['history']) + 1}" if held else "to train"
    return Job(recipe, path, state, (recipe.epochs * steps - taken) * recipe.batch_size)


def _to_distort(run: runs.Run, corruptions: int) -> str:
    """In words, that a run is not yet tested on that many distorted images, or on all there are; "" if it is."""
    before = evaluate.tried_on(run)
    if before >= min(corruptions, run.record.get("test", {}).get("count", corruptions)):
        return ""
    return f"{AGAIN}, {before:,} images so far" if before else "to distort"


def complete(jobs: Sequence[Job], images: Callable[[Recipe], data.TrainingData], stand_in: bool, corruptions: int,
             on_epoch: train.OnEpoch) -> None:  # fmt: skip
    """Train runs of one recipe side by side, where they are not trained, then test them; with `corruptions`, on that
    many distorted images too.
    """
    if not all(job.trained for job in jobs):
        recipes, paths = [job.recipe for job in jobs], [job.path for job in jobs]
        train.fit_many(recipes, images(recipes[0]), paths, on_epoch=on_epoch)
    for job in jobs:
        run = runs.read(job.path)
        if "test" not in run.record:
            run = evaluate.test_run(job.path, stand_in)
        if _to_distort(run, corruptions):
            evaluate.shifted_metrics(job.path, count=corruptions, stand_in=stand_in)


def sentence(error: Exception) -> str:
    """An error in one line: a CourseError is one already."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CourseError) else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------ how long it takes


def forecast(jobs: Sequence[Job], root: Path) -> tuple[pd.DataFrame, list[str]]:
    """What a sweep would do: one row per run (recipe, seed, state, images, time h:mm:ss), and sentences on speed and
    sum.

    The time is that of training alone, on the device of this machine: from recorded runs of the same network on a
    device of this name, else from a measurement of two seconds.
    """
    device, known = pick_device(), _recorded((runs.RECORDED, root))
    rates: dict[tuple, float] = {}
    said = []
    for job in jobs:
        key = _speed(job.recipe)
        if job.images and key not in rates:
            found = known.get(key, [])
            rates[key] = statistics.median(found) if found else measure(job.recipe)
            said_by = f"as {counted(len(found), 'recorded run')} of this network had it"
            how = said_by if found else "measured for two seconds now"
            said.append(f"{job.recipe.name} and the like: {rates[key]:,.0f} images/s, {how}")
    seconds = [job.images / rates[_speed(job.recipe)] if job.images else 0.0 for job in jobs]
    table = pd.DataFrame({
        "recipe": [job.recipe.name for job in jobs], "seed": [job.recipe.seed for job in jobs],
        "state": [job.state for job in jobs], "images": [f"{job.images:,}" for job in jobs],
        "time": [_clock(each) for each in seconds],
    })  # fmt: skip
    finished = sum(job.state == FINISHED for job in jobs)
    said.append(
        f"{counted(len(jobs), 'run')}, {finished} of them finished: {sum(job.images for job in jobs):,} images to "
        f"train on, about {_clock(sum(seconds))} (h:mm:ss) on {device_name(device)}"
    )
    return table, said


def _speed(recipe: Recipe) -> tuple:
    return tuple(getattr(recipe, name) for name in _SPEED)


def _recorded(stores: Iterable[Path]) -> dict[tuple, list[float]]:
    """Images per second of the runs in some stores on this kind of device, all that shared it together, by network."""
    found: dict[tuple, list[float]] = {}
    for path in {path.resolve() for store in stores for path in Path(store).glob("*/*/run.json")}:
        try:
            record = runs.read(path.parent).record
            key = _speed(Recipe.from_dict(record["recipe"]))
        except CourseError:
            continue
        if record["device"] == device_name(pick_device()):
            found.setdefault(key, []).append(record["images_per_second"] * record.get("side_by_side", 1))
    return found


def measure(recipe: Recipe, seconds: float = 2.0) -> float:
    """Training images a second of a recipe on this device, as a run counts them, measured on blank images.

    A teacher's pass is left out: how many seeds will teach is not known before they are trained.
    """
    device, size = pick_device(), max(recipe.batch_size, 10)
    blank = data.ImageSet(torch.zeros(size, 3, 32, 32, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64))
    trainer = train.Trainer(recipe.but(train_size=size), data.TrainingData(blank, blank), device)
    index = torch.arange(recipe.batch_size, device=device)
    sides, an_image = {32, *recipe.resolutions}, {}  # side -> seconds an image
    for side in sides:
        float(trainer.step(index, 0.0, side))  # compiling and capturing; float() waits for the device
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / len(sides):
            float(trainer.step(index, 0.0, side))
            steps += 1
        an_image[side] = elapsed / (steps * recipe.batch_size)
    trained = statistics.mean(an_image[train.resolution(recipe, epoch)] for epoch in range(recipe.epochs))
    # validation passes its images forward twice an epoch, clean and augmented, and a forward pass is a third of a step
    return recipe.train_size / (recipe.train_size * trained + 2 / 3 * recipe.val_size * an_image[32])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# ------------------------------------------------------------------------------------------------ how far the whole is


class Progress:
    """A bar over all images on a terminal; a line for every run that ends, and one now and then if none does."""

    def __init__(self, jobs: Sequence[Job]):
        self.runs, self.running = len(jobs), 0
        self.left = {job.label: job.images for job in jobs if job.state != FINISHED}  # images, of runs that go on
        self.failures: dict[str, str] = {}
        self.trained, self.start = 0, time.monotonic()
        self.told = self.start
        self.bar = tqdm(total=sum(self.left.values()), unit="image", unit_scale=True, smoothing=0,
                        disable=not sys.stderr.isatty())  # fmt: skip

    def epoch(self, recipe: Recipe, row: dict[str, float]) -> None:
        label = f"{recipe.name}/{recipe.seed}"
        self._count(label, min(self.left[label], train.steps_per_epoch(recipe) * recipe.batch_size))
        if self.bar.disable and time.monotonic() - self.told > QUIET:
            self._tell(f"{label} epoch {row['epoch']} of {recipe.epochs}")

    def finished(self, job: Job) -> None:
        self._count(job.label, self.left[job.label])
        del self.left[job.label]
        self.running -= 1
        self._tell(f"{job.label} test {percent(runs.read(job.path).record['test']['accuracy'])}")

    def failed(self, job: Job, sentence: str) -> None:
        self.failures[job.label] = sentence
        self.bar.total -= self.left.pop(job.label)
        self.running -= 1
        self._tell(f"{job.label} failed")

    def _count(self, label: str, images: int) -> None:
        self.left[label] -= images
        self.trained += images
        self.bar.update(images)

    def _tell(self, text: str) -> None:
        done, ahead = self.runs - len(self.left) - len(self.failures), sum(self.left.values())
        parts = [f"{done} of {self.runs} done", f"{self.running} running", f"{len(self.left) - self.running} waiting"]
        parts += [f"{len(self.failures)} failed"] * bool(self.failures)
        if ahead and self.trained:
            parts.append(f"about {_clock(ahead * (time.monotonic() - self.start) / self.trained)} left")
        self.told = time.monotonic()
        self.bar.set_description(", ".join(parts[:2]))
        self.bar.write(f"{text}  ({', '.join(parts)})", file=sys.stdout)
        sys.stdout.flush()
