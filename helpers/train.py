"""The training engine: one step (eager on the CPU, one captured graph on CUDA), schedule, EMA, exact resume."""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from helpers import checkpoint, runs
from helpers.augment import STAGES, Augment, Settings
from helpers.data import ImageSet, TrainingData, load_set, split_train_val
from helpers.evaluate import autocast, load_model, predict
from helpers.mixing import Mixed, mix, mixed_correct, mixed_cross_entropy
from helpers.model import Dropout, count_parameters
from helpers.recipe import SHAPE, SPLIT, Recipe
from helpers.runtime import CourseError, device_name, generator, git_commit, pick_device, replacing, shown, versions

OnEpoch = Callable[[Recipe, dict[str, float]], None]  # told a run's recipe and the epoch's row of history
LOOK = 50  # steps between two looks at whether the loss is still finite: a look makes the host wait for the device


class Interrupted(CourseError):
    """The run was asked to stop, has written a checkpoint, and goes on from there when called again."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def training_data(recipe: Recipe, stand_in: bool = False) -> TrainingData:
    """The training and validation images a recipe asks for; on the stand-in set only if `stand_in` allows it."""
    return split_train_val(load_set("train", stand_in), recipe.val_size, recipe.train_size, recipe.split_seed)


def steps_per_epoch(recipe: Recipe) -> int:
    """Whole batches in an epoch; the rest of the shuffled order is left out and is another rest each epoch."""
    return recipe.train_size // recipe.batch_size


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of optimiser step 0, 1, ...: a line up to the peak over the warm-up, then half a cosine down to zero.

    The peak is reached by the last step of the warm-up (Goyal et al. 2017; Loshchilov & Hutter 2016, eq. 5, without
    restarts: the rate only falls after the warm-up). The schedule "constant" stays at the peak instead.
    """
    warmup, total = (epochs * steps_per_epoch(recipe) for epochs in (recipe.warmup_epochs, recipe.epochs))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def resolution(recipe: Recipe, epoch: int) -> int:
    """Side of the training images in epoch 0, 1, ...: each of `recipe.resolutions` has an equal share of the epochs."""
    return recipe.resolutions[epoch * len(recipe.resolutions) // recipe.epochs]


def disagreement(logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats between V predictions of each image, logits [V, B, classes]; mean over images.

    From 0, where all agree, to log V. Source: Hendrycks et al. 2020, AugMix, section 3.
    """
    log_each = logits.log_softmax(2)
    log_mean = log_each.logsumexp(0) - math.log(len(logits))
    return (log_each.exp() * (log_each - log_mean)).sum(2).mean()


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The model's parameters for the optimiser; biases and norms are spared weight decay if the recipe says so, and all
    are spared the optimiser's where the decay is decoupled from it."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or recipe.decay_all]
    spared = [p for p in model.parameters() if not (p.ndim > 1 or recipe.decay_all)]
    coupled = 0.0 if recipe.decoupled_decay else recipe.weight_decay
    groups = [{"params": decayed, "weight_decay": coupled}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Trainer:
    """Everything a run carries from one step to the next; `state` and `restore` hold all of it.

    Every random draw (augmentation, mixing, dropout) comes from `draws`, so that runs side by side do not disturb each
    other and a resumed run draws what the uninterrupted one would have drawn. Everything a step reads or writes stays
    in the same place on the device, so that on CUDA one capture of `_step` serves for every step.
    """

    def __init__(
        self, recipe: Recipe, data: TrainingData, device: torch.device, teachers: Sequence[nn.Module] = (),
        start: nn.Module | None = None,
    ):  # fmt: skip
        if len(data.train.labels) != recipe.train_size:
            raise CourseError(
                f"The recipe asks for train_size={recipe.train_size:,} and got "
                f"{len(data.train.labels):,} images: use training_data(recipe)."
            )
        self.recipe, self.device, self.steps = recipe, device, steps_per_epoch(recipe)
        self.teachers = [teacher.to(device) for teacher in teachers]
        data = data.to(device)
        self.train, self.val = data.train, data.val
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = recipe.network()
        if start is not None:
            model.load_state_dict(start.state_dict())
        self.model = model.to(device, memory_format=torch.channels_last)
        self.forward = _compile(self.model, device) if recipe.compiled else self.model
        self.average = copy.deepcopy(self.model) if recipe.ema_decay else None
        self.draws = generator(recipe.seed, 1, device=device)
        self.drops = [module for module in self.model.modules() if isinstance(module, Dropout) and module.p]
        self.rate = torch.zeros((), device=device)  # a tensor: a captured step reads what it holds when it is replayed
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, recipe),
            lr=self.rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()] if recipe.momentum else []
        for parameter, buffer in zip(self.model.parameters(), self.momentum, strict=False):
            self.optimizer.state[parameter]["momentum_buffer"] = buffer
        settings = Settings().scaled(recipe.strength)
        self.augment = Augment(recipe.stage, policy=recipe.policy, settings=settings)
        self.views = [Augment(STAGES[-1], policy=recipe.policy, settings=settings)] * (2 if recipe.consistency else 0)
        self.index = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # of this epoch: summed loss, counted right
        self.clock = torch.zeros((), dtype=torch.int64, device=device)  # steps taken, as the device counts them
        self.bad = torch.full_like(self.clock, -1)  # the first step whose loss was not finite
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.done = 0  # steps taken in this epoch
        self.seconds = 0.0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._catch_up()

    # ------------------------------------------------------------------------------------------------ one step

    def _step(self, side: int) -> None:
        """Gather, augment, mix, forward, loss, backward, clip, SGD, average: the images at `index`, side x side."""
        recipe = self.recipe
        images = self.train.images.index_select(0, self.index)  # far quicker than [index]
        x = self.augment(images, self.draws)
        labels = self.train.labels.index_select(0, self.index)
        mixed = mix(x, labels, recipe.mixup_alpha, recipe.cutmix_alpha, self.draws)
        x = mixed.images
        if self.views:
            x = torch.cat((x, *(augment(images, self.draws) for augment in self.views)))
        x = x.contiguous(memory_format=torch.channels_last)
        if side != x.shape[-1]:
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        for drop in self.drops:
            drop.draw(len(x), self.draws)
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self._backward(x, mixed)
        if recipe.sam_rho:
            self._sharpness_aware(x, mixed)
        for drop in self.drops:
            drop.drawn = None  # it was for this step
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        if recipe.decoupled_decay:  # Loshchilov & Hutter 2019; times the rate, as in torch's AdamW
            with torch.no_grad():
                decayed = self.optimizer.param_groups[0]["params"]
                torch._foreach_mul_(decayed, 1 - self.rate * recipe.weight_decay)
        self.optimizer.step()
        with torch.no_grad():
            self.loss.copy_(loss)
            if self.average is not None:
                self._follow()
            self.totals += torch.stack((loss * recipe.batch_size, mixed_correct(logits, mixed))).double()
            first = (self.bad < 0) & ~torch.isfinite(loss)
            self.bad.copy_(torch.where(first, self.clock, self.bad))
            self.clock += 1

    def _backward(self, x: Tensor, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its logits, with the gradient left at the parameters.

        x: the mixed images, below them as many again for each further view of `consistency`.
        """
        with autocast(self.device, self.recipe.precision):
            logits = self.forward(x)
        views = logits.float().split(self.recipe.batch_size)
        logits = views[0]
        loss = mixed_cross_entropy(logits, mixed, self.recipe.label_smoothing)
        if self.teachers:
            loss = torch.lerp(loss, F.cross_entropy(logits, self._taught(x[: len(logits)])), 0.5)
        if self.recipe.consistency:
            loss = loss + self.recipe.consistency * disagreement(torch.stack(views))
        loss.backward()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def _taught(self, x: Tensor) -> Tensor:
        """What the teachers predict of the same images on average: probabilities [B, classes] (Hinton et al. 2015)."""
        with autocast(self.device, self.recipe.precision):
            return sum(teacher(x).float().softmax(1) for teacher in self.teachers) / len(self.teachers)

    def _sharpness_aware(self, x: Tensor, mixed: Mixed) -> None:
        """Replace the gradient by that at the worst neighbour, `sam_rho` away along it (Foret et al. 2021, eq. 2, 3).

        Running statistics stay those of the weights themselves: batch norm's momentum is 0 meanwhile.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        with torch.no_grad():
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])))
            here = [p.clone() for p in parameters]
            away = torch._foreach_mul([p.grad for p in parameters], self.recipe.sam_rho / (length + 1e-12))
            torch._foreach_add_(parameters, away)
        for norm in norms:
            norm.momentum = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(x, mixed)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            torch._foreach_copy_(parameters, here)

    def _follow(self) -> None:
        """Move the averaged weights and buffers towards the trained ones (Polyak & Juditsky 1992); copy counters."""
        pairs = list(zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - self.recipe.ema_decay)
        torch._foreach_copy_(*map(list, zip(*counts, strict=True)))

    def step(self, index: Tensor, rate: float, side: int = 32) -> Tensor:
        """One optimiser step on the training images at `index` int64 [batch_size]; on CUDA a graph is replayed.

        Returns the batch's mean loss, in a tensor on the device that the next step writes over.
        """
        self.index.copy_(index, non_blocking=True)
        self.rate.fill_(rate)
        if self.device.type != "cuda":
            self._step(side)
        else:
            if side not in self._graphs:
                self._graphs[side] = self._capture(side)
            self._graphs[side].replay()
        return self.loss

    def _capture(self, side: int) -> torch.cuda.CUDAGraph:
        """Record one step as a graph. The warm-up steps that a capture needs are undone: they train nothing."""
        before = copy.deepcopy(self.state())
        tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # the same shapes at every step
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    self._step(side)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.draws)
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(side)
        finally:
            torch.backends.cudnn.benchmark = tuned
        self.restore(before)
        return graph

    # ------------------------------------------------------------------------------------------------ a whole run

    def on_its_stream(self) -> AbstractContextManager:
        """The context that queues this run's work beside that of other runs; on a CPU it does nothing.

        What reads the state belongs in it too: outside, a copy does not wait for the steps that are still queued.
        """
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average

    @property
    def finished(self) -> bool:
        return len(self.history) == self.recipe.epochs

    def go(self) -> Iterator[None]:
        """Train on from where the state is, pausing after every step; an epoch's last step adds its row of history."""
        while not self.finished:
            number = len(self.history)
            order = torch.randperm(self.recipe.train_size, generator=generator(self.recipe.seed, 2, number))
            batches = order[: self.steps * self.recipe.batch_size].to(self.device).split(self.recipe.batch_size)
            self.model.train()
            while self.done < self.steps:
                rate = learning_rate(self.recipe, number * self.steps + self.done)
                self.step(batches[self.done], rate, resolution(self.recipe, number))
                self.done += 1
                if self.done == self.steps:
                    self._close_epoch(rate)
                    yield
                    break
                yield

    def _close_epoch(self, rate: float) -> None:
        loss, correct = (self.totals / (self.steps * self.recipe.batch_size)).tolist()
        row = {"epoch": len(self.history) + 1, "learning_rate": rate, "train_loss": loss, "train_accuracy": correct,
               **self.validate(self.evaluated)}  # fmt: skip
        self.history.append(row)
        if best_row(self.history) is row:
            self.best = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
        self.done = 0
        self.totals.zero_()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the validation images as they are, and accuracy through the training augmentation."""
        clean = predict(model, self.val.images, Augment("none"), self.recipe.precision)
        draws = generator(self.recipe.seed, 3, len(self.history), device=self.device)
        augmented = predict(model, self.val.images, self.augment, self.recipe.precision, draws)
        share = lambda logits: float((logits.argmax(1) == self.val.labels).float().mean())  # noqa: E731
        return {"val_loss": float(F.cross_entropy(clean, self.val.labels)), "val_accuracy": share(clean),
                "val_augmented_accuracy": share(augmented)}  # fmt: skip

    def check_finite(self, kept: str) -> None:
        """Raise CourseError with the step and its learning rate if a loss was not finite; makes the host wait."""
        with self.on_its_stream():
            bad = int(self.bad)
        if bad >= 0:
            raise CourseError(
                f"The loss stopped being finite at step {bad} (epoch {bad // self.steps + 1}, learning rate "
                f"{learning_rate(self.recipe, bad):.3g}): lower the learning rate or clip the gradients; {kept}."
            )

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain values; the tensors are the run's own, not copies."""
        average = {} if self.average is None else self.average.state_dict()
        return {"recipe": self.recipe.to_dict(), "data": self.train.source, "model": dict(self.model.state_dict()),
                "average": dict(average), "momentum": self.momentum, "best": self.best, "draws": self.draws.get_state(),
                "totals": self.totals, "clock": self.clock, "bad": self.bad, "done": self.done,
                "history": [dict(row) for row in self.history], "seconds": self.seconds}  # fmt: skip

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state, in place: a captured graph goes on using the same memory."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for ours, saved in zip(
            [*self.momentum, self.totals, self.clock, self.bad],
            [*state["momentum"], state["totals"], state["clock"], state["bad"]],
            strict=True,
        ):
            ours.copy_(saved)
        self.draws.set_state(state["draws"].cpu())
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.history, self.done, self.seconds = state["history"], state["done"], state["seconds"]
        self._catch_up()

    def _catch_up(self) -> None:
        """Let the run's own stream wait for what has been queued elsewhere: tensors that are new or restored."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))


def _compile(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model's pass as fused kernels, made at the first step with a compiler: on a CPU of C++, on CUDA of C."""
    if device.type == "cpu":  # what torch would call, and on CUDA Triton
        wanted = [os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")]
    else:
        wanted = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]
    if not any(map(shutil.which, wanted)):
        raise CourseError(f"compiled=True needs the compiler {' or '.join(wanted)}: install it, or leave it False.")
    torch._dynamo.config.recompile_limit = 64  # of all networks of a process; beyond it nothing is compiled, silently
    return torch.compile(model, dynamic=False)  # a graph for each size of the images, each of fixed shapes


def best_row(history: list[dict[str, float]]) -> dict[str, float]:
    """The epoch to keep: the highest validation accuracy, the earliest of equals."""
    return max(history, key=lambda row: row["val_accuracy"])


# ------------------------------------------------------------------------------------------------ runs in folders


def fit(
    recipe: Recipe, data: TrainingData, run_dir: str | Path, resume: bool = True, device: torch.device | None = None,
    checkpoint_seconds: float = 60.0,
) -> runs.Run:  # fmt: skip
    """Train a recipe into a folder and return the finished run; a run that is finished already is returned as it is.

    The folder gets `run.json` and `history.csv` (see helpers.runs), `best.safetensors` (weights of the epoch with the
    highest validation accuracy), `last.safetensors` (of the last) and, until it is finished, checkpoints: every
    `checkpoint_seconds` after a step, and when SIGINT or SIGTERM asks to stop (Interrupted is raised then). Killed at
    any moment and called again with `resume`, the run goes on from the last checkpoint and on a CPU ends with the same
    bytes on the same machine.
    Raises CourseError if the folder holds another recipe's run, is in use, or cannot be written; if the loss stops
    being finite; if the device is out of memory.
    """
    return fit_many([recipe], data, [run_dir], resume, device, checkpoint_seconds)[0]


def fit_many(
    recipes: Sequence[Recipe], data: TrainingData, run_dirs: Sequence[str | Path], resume: bool = True,
    device: torch.device | None = None, checkpoint_seconds: float = 60.0, on_epoch: OnEpoch | None = None,
) -> list[runs.Run]:  # fmt: skip
    """Train several recipes, or one with several seeds, in one process; otherwise as `fit`.

    On CUDA they take turns step by step, each with its own graph on its own stream, so that the device works on several
    small batches at once. On a CPU, which one batch fills, they run one after the other. `on_epoch` is called after
    each epoch of each, instead of the bar and the lines that are shown otherwise.
    """
    device = device or pick_device()
    with stop_requests() as stop, ExitStack() as folders:
        on_device = cache(lambda: data.to(device))  # once for all, and only if one of them is left to train
        beside = len(recipes) if device.type == "cuda" else 1
        sessions = [_Session(recipe, data.source, on_device, Path(path), resume, device, checkpoint_seconds, folders,
                             on_epoch, beside) for recipe, path in zip(recipes, run_dirs, strict=True)]  # fmt: skip
        together = [sessions] if device.type == "cuda" else [[session] for session in sessions]
        _begin(together[0] if recipes else [])
        for session in () if resume else sessions:  # all at once: interrupted, none is what it was before
            session.clear()
        for group in together:
            _train(group, stop)
        return [session.run for session in sessions]


class _Session:
    """One run and its folder: checkpoints in time, the lines it prints, the record at the end.

    Made, it holds the folder and has refused what cannot work; `begin` builds what trains. So a fresh start removes
    (`clear`) nothing before all runs of a call have passed, and the first have been built.
    """

    def __init__(self, recipe: Recipe, source: str, data: Callable[[], TrainingData], path: Path, resume: bool,
                 device: torch.device, checkpoint_seconds: float, folders: ExitStack,
                 on_epoch: OnEpoch | None, beside: int):  # fmt: skip
        runs.refuse_stand_in(path, source)
        for name in ("teacher", "start"):
            if getattr(recipe, name) == path.resolve().parent.name:
                raise CourseError(f"{name}={getattr(recipe, name)!r} lies in {shown(path.parent)}, where this run "
                                  "would write over what it learns from: choose another folder.")  # fmt: skip
        folders.enter_context(checkpoint.hold(path))
        self.recipe, self.data, self.device = recipe, data, device
        self.beside = beside  # runs that may share the device; `side_by_side`: those that did
        self.path, self.every, self.count, self.resume = path, checkpoint_seconds, 0, resume
        self.label = f"{recipe.name}/{recipe.seed}"
        self.run, self.trainer, self.side_by_side = None, None, 1
        self.state, self.problems = None, []
        self.on_epoch = on_epoch or self.show
        self.quiet = on_epoch is not None or not sys.stderr.isatty()
        git_commit()  # the code that begins now
        if resume and (path / "run.json").exists():
            self.run = runs.read(path)
            _refuse_another(self.run.record["recipe"], self.run.record["data"], recipe, source, path)
            return
        if resume:
            self.state, self.problems = checkpoint.read(path)
        if self.state:
            _refuse_another(self.state["recipe"], self.state["data"], recipe, source, path)
        self.teachers = _teachers(recipe, path.parent.parent, source)
        begun = self.state.get("teachers", []) if self.state else []
        if self.state and begun != [teacher.label for teacher in self.teachers]:
            raise CourseError(f"{shown(path)} was begun under the teachers {', '.join(begun)}, and there are others by "
                              "now: start afresh with resume=False (--fresh).")  # fmt: skip
        self.begins = _start(recipe, path.parent.parent, source)

    def clear(self) -> None:
        """Remove the run that was here."""
        for name in (*runs.RECORDS, runs.WEIGHTS, runs.LAST, *checkpoint.SLOTS):  # the record first
            (self.path / name).unlink(missing_ok=True)

    def begin(self) -> None:
        """Put the run on the device, as it was left."""
        data, val_size = self.data(), self.recipe.val_size
        if len(data.val.labels) != val_size:
            raise CourseError(f"The recipe asks for val_size={val_size:,} and got {len(data.val.labels):,} images: use "
                              "training_data(recipe).")  # fmt: skip
        with _memory_advice(self.recipe, self.device, self.beside):
            self.trainer = Trainer(self.recipe, data, self.device,
                                   [load_model(teacher) for teacher in self.teachers],
                                   load_model(self.begins) if self.begins else None)  # fmt: skip
        if self.state:
            self.trainer.restore(self.state)
            self.count, self.state = self.state["count"], None
        for problem in self.problems:
            print(f"{problem}: going on from the checkpoint before it")
        self.steps = self.trainer.go()

    @property
    def epoch(self) -> int:
        """How many are done."""
        return len(self.trainer.history) if self.trainer else self.recipe.epochs

    @property
    def working(self) -> bool:
        return self.trainer is not None and not self.trainer.finished

    def start(self, side_by_side: int) -> None:
        """The clock and the bar run from here, beside those of the other runs which share the device."""
        trainer, self.side_by_side, self.saved = self.trainer, side_by_side, time.perf_counter()
        self.bar = tqdm(total=trainer.recipe.epochs * trainer.steps, unit="step", desc=self.label, disable=self.quiet,
                        initial=len(trainer.history) * trainer.steps + trainer.done)  # fmt: skip

    def advance(self) -> None:
        """One step; a line when it closed an epoch; a checkpoint when one is due."""
        trainer = self.trainer
        with _memory_advice(trainer.recipe, trainer.device, self.beside), trainer.on_its_stream():
            next(self.steps)
        self.bar.update()
        due = time.perf_counter() - self.saved >= self.every
        if due or trainer.done % LOOK == 0:
            trainer.check_finite(self.kept)
        if trainer.done == 0:
            self.on_epoch(trainer.recipe, trainer.history[-1])
        if due:
            self.save()

    def show(self, recipe: Recipe, row: dict[str, float]) -> None:
        self.bar.write(
            f"{self.label} epoch {row['epoch']:>3}/{recipe.epochs}  "
            f"train loss {row['train_loss']:.3f} acc {row['train_accuracy']:.3f}  "
            f"val loss {row['val_loss']:.3f} acc {row['val_accuracy']:.3f}", file=sys.stdout,
        )  # fmt: skip

    @property
    def kept(self) -> str:
        if not self.count:
            return "no checkpoint had been written yet"
        return f"the last good checkpoint is {shown(self.path / checkpoint.SLOTS[self.count % 2])}"

    def save(self) -> None:
        self.trainer.check_finite(self.kept)
        self.count += 1
        self.tick()
        names = [teacher.label for teacher in self.teachers]
        with self.trainer.on_its_stream():
            checkpoint.write(self.path, {**self.trainer.state(), "teachers": names}, self.count)
        if self.trainer.history:
            runs.write_history(self.path, self.trainer.history)

    def tick(self) -> None:
        now = time.perf_counter()
        self.trainer.seconds, self.saved = self.trainer.seconds + now - self.saved, now

    def finish(self) -> None:
        """Weights, history, and last the record, which says that the run is done; then the checkpoints may go."""
        if self.run is None:
            self.tick()
            self.bar.close()
            trainer, recipe = self.trainer, self.trainer.recipe
            best, last = best_row(trainer.history), trainer.history[-1]
            for name, weights in ((runs.WEIGHTS, trainer.best), (runs.LAST, trainer.evaluated.state_dict())):
                with replacing(self.path / name) as temporary, trainer.on_its_stream():
                    temporary.write_bytes(save({key: value.contiguous() for key, value in weights.items()}))
            runs.write_history(self.path, trainer.history)
            names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_augmented_accuracy")
            metrics = {name: (last if name.startswith("train") else best)[name] for name in names}
            images = recipe.epochs * trainer.steps * recipe.batch_size
            self.run = runs.write_record(self.path, {
                "recipe": recipe.to_dict(), "data": trainer.train.source, "commit": git_commit(),
                "side_by_side": self.side_by_side,
                "versions": versions(), "device": device_name(trainer.device),
                "parameters": count_parameters(trainer.model), "best_epoch": best["epoch"],
                "seconds": round(trainer.seconds, 1), "images_per_second": round(images / trainer.seconds, 1),
                "metrics": metrics, "teachers": [teacher.label for teacher in self.teachers],
                "start": self.begins and f"{self.begins.label}, {self.begins.weights.name}",
            })  # fmt: skip
            self.trainer = self.steps = None  # their memory is for those that go on
        for name in checkpoint.SLOTS:
            (self.path / name).unlink(missing_ok=True)


def _teachers(recipe: Recipe, store: Path, source: str) -> list[runs.Run]:
    """The finished seeds of the recipe's teacher in the same store; CourseError if none is there with weights."""
    if not recipe.teacher:
        return []
    found = [runs.read(path.parent) for path in sorted((store / recipe.teacher).glob("*/run.json"))]
    found = sorted((run for run in found if run.weights.exists() and run.record["data"] == source),
                   key=lambda run: run.record["recipe"]["seed"])  # fmt: skip
    if not found:
        raise CourseError(f"{recipe.name} learns from {recipe.teacher}, of which {shown(store)} holds no finished run "
                          "with weights: train that first, with the same --root.")  # fmt: skip
    for run in found:
        _refuse_unlike(recipe, run, SPLIT)
    return found


def _refuse_unlike(recipe: Recipe, run: runs.Run, names: Sequence[str]) -> None:
    pairs = {name: (getattr(Recipe.from_dict(run.record["recipe"]), name), getattr(recipe, name)) for name in names}
    differs = [f"{name}={theirs!r}, not {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if differs:
        raise CourseError(f"{recipe.name} learns from {run.label}, which has {', '.join(differs)}: give it the same.")


def _start(recipe: Recipe, store: Path, source: str) -> runs.Run | None:
    """The run whose weights are trained on, in the same store or else the published one; CourseError if neither is it,
    or if it is a network of another shape or has seen this one's validation images."""
    if not recipe.start:
        return None
    path = store / recipe.start / str(recipe.seed)
    held = path if (path / runs.WEIGHTS).exists() else runs.PUBLISHED
    run = runs.read(held) if held.exists() else None
    if not run or run.label != f"{recipe.start}/{recipe.seed}" or run.record["data"] != source:
        raise CourseError(f"{recipe.name} trains {recipe.start}/{recipe.seed} on, and {shown(store)} does not hold "
                          "that as a finished run with weights: train it first, with the same --root.")  # fmt: skip
    _refuse_unlike(recipe, run, (*SHAPE, *SPLIT))
    return run


def _begin(sessions: list[_Session]) -> list[_Session]:
    """Build those that are not finished and not built yet; returns all that are not finished."""
    unrecorded = [session for session in sessions if session.run is None]
    for session in unrecorded:
        if session.trainer is None:
            session.begin()
    return unrecorded


def _train(sessions: list[_Session], stop: dict[str, int]) -> None:
    """A step of each in turn until all are done; on a request to stop, a checkpoint of each, then Interrupted."""
    unrecorded = _begin(sessions)
    for session in unrecorded:
        session.start(len(unrecorded))
    for session in sessions:
        if not session.working:
            session.finish()
    while working := [session for session in sessions if session.working]:
        for session in working:
            session.advance()
            if not session.working:  # at once: its seconds do not include those of runs that go on
                session.finish()
        if stop:
            for session in working:
                if session.working:
                    session.save()
            at = ", ".join(f"{session.label} after epoch {session.epoch}" for session in working)
            again = "the same again" + ", but with resume=True (without --fresh)," * (not sessions[0].resume)
            raise Interrupted(f"Stopped by {signal.Signals(stop['signum']).name} ({at}): everything is kept; call "
                              f"{again} to go on.", stop["signum"])  # fmt: skip


@contextmanager
def stop_requests() -> Iterator[dict[str, int]]:
    """Collect SIGINT and SIGTERM in a dict instead of dying in the middle of a step or a write."""
    stop: dict[str, int] = {}
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, lambda signum, frame: stop.update(signum=signum))
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_another(held: dict[str, Any], held_data: str, recipe: Recipe, source: str, run_dir: Path) -> None:
    held = Recipe.from_dict(held).to_dict()  # a field that is younger than the run has its default
    differs = [name for name, value in recipe.to_dict().items() if held[name] != value]
    differs += ["data"] if held_data != source else []
    if differs:
        raise CourseError(
            f"{shown(run_dir)} holds a run with another {', '.join(differs)}: choose another folder, or "
            "start afresh with resume=False (--fresh)."
        )


# ------------------------------------------------------------------------------------------------ memory


@contextmanager
def _memory_advice(recipe: Recipe, device: torch.device, beside: int) -> Iterator[None]:
    """Turn a device's lack of memory into a sentence: fewer runs at once, or the batch size that would fit."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # what they hold is the memory of the failed step
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no type of its own for it
            raise
        raise CourseError(f"A batch of {recipe.batch_size} does not fit into this machine's memory: give a smaller "
                          "batch_size, or free some memory.") from error  # fmt: skip
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    name = device_name(device)
    if beside > 1:
        raise CourseError(f"{beside} runs side by side do not fit into the memory of {name}: train fewer of them at "
                          "once, or let `sweep` do it, which parts them by itself.")  # fmt: skip
    fits = fitting_batch_size(recipe, device)
    advice = "nor does a batch of 2, so free some of it"
    if fits:
        rate = recipe.scaled_to(fits).learning_rate
        advice = f"batch_size={fits} does (with learning_rate={rate:g} by the linear scaling rule)"
    raise CourseError(f"A batch of {recipe.batch_size} does not fit into the memory of {name}: {advice}.")


def fitting_batch_size(recipe: Recipe, device: torch.device) -> int | None:
    """The largest of half, a quarter ... of the batch size whose step fits beside what is in use; found by trying."""
    batch_size = recipe.batch_size // 2
    while batch_size >= 2:
        small = recipe.scaled_to(batch_size).but(train_size=max(10, batch_size), compiled=False)
        blank = torch.zeros(small.train_size, 3, 32, 32, dtype=torch.uint8)
        images = ImageSet(blank, torch.zeros(small.train_size, dtype=torch.int64))
        try:
            Trainer(small, TrainingData(images, images), device)._step(max(recipe.resolutions))
            return batch_size
        except torch.OutOfMemoryError:
            batch_size //= 2
    return None
