"""The loop: one step, the schedule, checkpoints and exact resume."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from helpers import runs
from helpers.augment import Augment
from helpers.data import TrainingData, load_set, split_train_val
from helpers.evaluate import autocast, predict
from helpers.mixing import mixed_correct, mixed_cross_entropy, mixup
from helpers.model import count_parameters
from helpers.recipe import Recipe
from helpers.runtime import (
    CourseError,
    device_name,
    generator,
    git_commit,
    pick_device,
    replacing,
    seed_everything,
    shown,
    versions,
)


def training_data(recipe: Recipe, stand_in: bool = False) -> TrainingData:
    """The training and validation images a recipe asks for; on the stand-in set only if `stand_in` allows it."""
    return split_train_val(load_set("train", stand_in), recipe.val_size, recipe.train_size, recipe.split_seed)


def steps_per_epoch(recipe: Recipe) -> int:
    """Whole batches in an epoch; the rest of the shuffled order is left out and is another rest each epoch."""
    return recipe.train_size // recipe.batch_size


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of optimiser step 0, 1, ...: a line up to the peak over the warm-up, then half a cosine down to zero.

    The peak is reached by the last step of the warm-up (Goyal et al. 2017; Loshchilov & Hutter 2016, eq. 5, without
    restarts: the rate only falls after the warm-up).
    """
    warmup, total = (epochs * steps_per_epoch(recipe) for epochs in (recipe.warmup_epochs, recipe.epochs))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """Everything a run carries from one step to the next; `state` and `restore` hold all of it."""

    def __init__(self, recipe: Recipe, data: TrainingData, device: torch.device):
        if len(data.train.labels) != recipe.train_size:
            raise CourseError(
                f"The recipe asks for train_size={recipe.train_size:,} and got "
                f"{len(data.train.labels):,} images: use training_data(recipe)."
            )
        seed_everything(recipe.seed)
        self.recipe, self.device = recipe, device
        self.train, self.val = (
            part._replace(images=part.images.to(device), labels=part.labels.to(device))
            for part in (data.train, data.val)
        )
        self.model = recipe.network().to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.augment = Augment(recipe.stage)
        self.draws = generator(recipe.seed, 1, device=device)  # augmentation and Mixup; dropout uses torch's own
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.commit = git_commit()  # now, since the working tree may move on while the run goes on

    def step(self, index: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One optimiser step on the images at `index`; returns the summed loss and the number counted right."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x = self.augment(self.train.images[index], self.draws)
        mixed = mixup(x, self.train.labels[index], self.recipe.mixup_alpha, self.draws)
        with autocast(self.device, self.recipe.precision):
            logits = self.model(mixed.images.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        loss = mixed_cross_entropy(logits, mixed)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach() * len(index), mixed_correct(logits.detach(), mixed)

    def epoch(self, bar: tqdm) -> dict[str, float]:
        """Train one epoch and look at the validation images; returns its row of the history."""
        recipe, number = self.recipe, len(self.history)
        order = torch.randperm(recipe.train_size, generator=generator(recipe.seed, 2, number)).to(self.device)
        steps = steps_per_epoch(recipe)
        self.model.train()
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for i, index in enumerate(order[: steps * recipe.batch_size].split(recipe.batch_size)):
            rate = learning_rate(recipe, number * steps + i)
            step_loss, step_correct = self.step(index, rate)
            loss += step_loss
            correct += step_correct
            bar.update()
        seen = steps * recipe.batch_size
        row = {
            "epoch": number + 1,
            "learning_rate": rate,
            "train_loss": float(loss) / seen,
            "train_accuracy": float(correct) / seen,
            **self.validate(number),
        }
        if not math.isfinite(row["train_loss"]):
            raise CourseError(
                f"The loss is {row['train_loss']} in epoch {number + 1}: lower the learning rate (now "
                f"{recipe.learning_rate:g}) and train again; the epochs before it are kept."
            )
        return row

    def validate(self, number: int) -> dict[str, float]:
        clean = predict(self.model, self.val.images, Augment("none"), self.recipe.precision)
        draws = generator(self.recipe.seed, 3, number, device=self.device)
        augmented = predict(self.model, self.val.images, self.augment, self.recipe.precision, draws)
        share = lambda logits: float((logits.argmax(1) == self.val.labels).float().mean())  # noqa: E731
        return {
            "val_loss": float(F.cross_entropy(clean, self.val.labels)),
            "val_accuracy": share(clean),
            "val_augmented_accuracy": share(augmented),
        }

    def state(self) -> dict[str, Any]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            "recipe": self.recipe.to_dict(),
            "data": self.train.source,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.get_state(),
            "random": [torch.get_rng_state(), *cuda],
            "history": self.history,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["random"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][1], self.device)
        self.history, self.seconds = state["history"], state["seconds"]


def best_row(history: list[dict[str, float]]) -> dict[str, float]:
    """The epoch to keep: the highest validation accuracy, the earliest of equals."""
    return max(history, key=lambda row: row["val_accuracy"])


def fit(
    recipe: Recipe, data: TrainingData, run_dir: str | Path, resume: bool = True, device: torch.device | None = None
) -> runs.Run:
    """Train a recipe into a folder and return the finished run; a run that is finished already is returned as it is.

    The folder gets `run.json` and `history.csv` (see helpers.runs), `best.safetensors` (weights of the epoch with the
    highest validation accuracy) and `checkpoint.pt`, each written whole or not at all. Killed at any moment and called
    again with `resume`, the run goes on from its last full epoch and ends with the same bytes on the same machine.
    Raises CourseError if the folder holds another recipe's run, or cannot be written.
    """
    run_dir, device = Path(run_dir), device or pick_device()
    runs.refuse_stand_in(run_dir, data.source)
    _prepare(run_dir, fresh=not resume)
    if (run_dir / "run.json").exists():
        finished = runs.read(run_dir)
        _refuse_another(finished.record["recipe"], finished.record["data"], recipe, data.source, run_dir)
        return finished
    trainer = Trainer(recipe, data, device)
    state = _read_checkpoint(run_dir / "checkpoint.pt")
    if state:
        _refuse_another(state["recipe"], state["data"], recipe, data.source, run_dir)
        trainer.restore(state)
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=recipe.epochs * steps_per_epoch(recipe),
        initial=len(trainer.history) * steps_per_epoch(recipe),
        disable=not on_terminal,
        unit="step",
        desc=f"{recipe.name}/{recipe.seed}",
    ) as bar:
        while len(trainer.history) < recipe.epochs:
            start = time.perf_counter()
            row = trainer.epoch(bar)
            trainer.history.append(row)
            trainer.seconds += time.perf_counter() - start
            _save(trainer, run_dir)
            bar.write(
                f"{recipe.name}/{recipe.seed} epoch {row['epoch']:>3}/{recipe.epochs}  "
                f"train loss {row['train_loss']:.3f} acc {row['train_accuracy']:.3f}  "
                f"val loss {row['val_loss']:.3f} acc {row['val_accuracy']:.3f}",
                file=sys.stdout,
            )
    return _finish(trainer, run_dir)


def _prepare(run_dir: Path, fresh: bool) -> None:
    """Make the folder now, not after the first epoch; clear what a killed process left half-written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for name in ("run.json", "history.csv", "checkpoint.pt", "best.safetensors") if fresh else ():  # record first
            (run_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise CourseError(
            f"Cannot write to {shown(run_dir)} ({error.strerror}): choose a folder you may write to."
        ) from error


def _save(trainer: Trainer, run_dir: Path) -> None:
    """Best weights first, checkpoint last: a kill in between repeats the epoch, which writes the same best again.

    Both go through memory, since their own writers report a full disk with errors of their own, not OSError.
    """
    if best_row(trainer.history) is trainer.history[-1]:
        with replacing(run_dir / "best.safetensors") as temporary:
            temporary.write_bytes(save({k: v.contiguous() for k, v in trainer.model.state_dict().items()}))
    checkpoint = io.BytesIO()
    torch.save(trainer.state(), checkpoint)
    with replacing(run_dir / "checkpoint.pt") as temporary:
        temporary.write_bytes(checkpoint.getbuffer())
    runs.write_history(run_dir, trainer.history)


def _finish(trainer: Trainer, run_dir: Path) -> runs.Run:
    recipe, best, last = trainer.recipe, best_row(trainer.history), trainer.history[-1]
    runs.write_history(run_dir, trainer.history)
    return runs.write_record(
        run_dir,
        {
            "recipe": recipe.to_dict(),
            "data": trainer.train.source,
            "commit": trainer.commit,
            "versions": versions(),
            "device": device_name(trainer.device),
            "parameters": count_parameters(trainer.model),
            "best_epoch": best["epoch"],
            "seconds": round(trainer.seconds, 1),
            "images_per_second": round(
                recipe.epochs * steps_per_epoch(recipe) * recipe.batch_size / trainer.seconds, 1
            ),
            "metrics": {
                name: (last if name.startswith("train") else best)[name]
                for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_augmented_accuracy")
            },
        },
    )


def _refuse_another(held: dict[str, Any], held_data: str, recipe: Recipe, source: str, run_dir: Path) -> None:
    differs = [name for name, value in recipe.to_dict().items() if held.get(name) != value]
    differs += ["data"] if held_data != source else []
    if differs:
        raise CourseError(
            f"{shown(run_dir)} holds a run with another {', '.join(differs)}: choose another folder, or "
            "start afresh with resume=False (--fresh)."
        )


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=torch.device("cpu"), weights_only=True)
        return {**state, "recipe": dict(state["recipe"])}
    except Exception as error:  # torch.load fails with many types on a torn or foreign file
        raise CourseError(
            f"{shown(path)} cannot be read ({type(error).__name__}): delete it to start this run afresh."
        ) from error
