"""Measurements of this machine, each table from one run, so that its rows can be compared."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import distort, runtime
from helpers.augment import IMAGENET_MEAN, IMAGENET_STD, STAGES, Augment, Settings
from helpers.data import ImageSet, TrainingData, load_cifar10
from helpers.recipe import get
from helpers.runtime import ROOT, CourseError, device_name, git_commit, pick_device, replacing, shown, versions
from helpers.train import Trainer


def _rate(call: Callable[[], object], images: int, seconds: float) -> float:
    """Images per second of a call, repeated for a while after one warm-up call."""
    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count += images
    return count / elapsed


# Augmentation: the paper's whole pipeline with one set of numbers, by four libraries ---------------------------------


class Drawing(torch.utils.data.Dataset):
    """Endless images, each put through a transform when a worker asks for it."""

    def __init__(self, images: list, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images[index % len(self.images)])


def _torchvision(library, to_float: list) -> Callable:
    """The pipeline in the vocabulary that torchvision.transforms and torchvision.transforms.v2 share."""
    s, t = Settings(), library
    return t.Compose([
        t.RandomCrop(32, padding=s.padding), t.RandomHorizontalFlip(s.flip), t.RandomRotation(s.rotation),
        t.AutoAugment(t.AutoAugmentPolicy.CIFAR10), t.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue),
        t.RandomAdjustSharpness(s.sharpness, s.sharpness_p), t.RandomApply([t.GaussianBlur(3, s.blur)], s.blur_p),
        *to_float, t.Normalize(IMAGENET_MEAN, IMAGENET_STD), t.RandomErasing(s.erase_p, s.erase_area, s.erase_ratio),
    ])  # fmt: skip


def _loader(images: list, transform: Callable, batch_size: int) -> Iterator[torch.Tensor]:
    # Started as this system starts workers by default: a process that was spawned itself would spawn them, and each
    # would hold the libraries once more.
    method = multiprocessing.get_all_start_methods()[0]
    loader = torch.utils.data.DataLoader(
        Drawing(images, transform), batch_size=batch_size, num_workers=2, multiprocessing_context=method
    )
    return iter(loader)


def _course(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    augment, generator = Augment(STAGES[-1]), torch.Generator().manual_seed(0)
    while True:
        yield augment(images.index_select(0, torch.randint(len(images), (batch_size,))), generator)


def _pil(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    from PIL import Image
    from torchvision import transforms

    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    return _loader(pictures, _torchvision(transforms, [transforms.ToTensor()]), batch_size)


def _v2(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    from torchvision.transforms import v2

    return _loader(list(images), _torchvision(v2, [v2.ToDtype(torch.float32, scale=True)]), batch_size)


def _kornia(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    import kornia.augmentation as k
    from kornia.augmentation.auto import AutoAugment

    s = Settings()
    augment = torch.nn.Sequential(
        k.RandomCrop((32, 32), padding=s.padding), k.RandomHorizontalFlip(p=s.flip),
        k.RandomRotation(s.rotation, resample="nearest", p=1.0), AutoAugment("cifar10"),
        k.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue, p=1.0),
        k.RandomSharpness((s.sharpness, s.sharpness), p=s.sharpness_p),
        k.RandomGaussianBlur((3, 3), s.blur, p=s.blur_p),
        k.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        k.RandomErasing(s.erase_area, s.erase_ratio, p=s.erase_p),
    )  # fmt: skip
    while True:
        yield augment(images.index_select(0, torch.randint(len(images), (batch_size,))).float() / 255)


# name -> (batches without end, what its parameters are drawn for, the package it needs)
CONTESTANTS = {
    "this course": (_course, "image", "torch"),
    "torchvision on PIL, DataLoader with 2 workers": (_pil, "image", "PIL"),
    "torchvision v2 on tensors, DataLoader with 2 workers": (_v2, "image", "torchvision"),
    "kornia on the batch": (_kornia, "image; AutoAugment's sub-policy and the order of the jitter: batch", "kornia"),
}


def _peak_mib() -> float:
    """Peak resident memory of this process, and what its workers hold alone, in MiB; NaN without /proc (not Linux)."""
    try:
        texts = [Path("/proc/self/status").read_text()]
        texts += [Path(f"/proc/{child.pid}/smaps_rollup").read_text() for child in multiprocessing.active_children()]
    except OSError:
        return float("nan")
    fields = r"(?:VmHWM|Private_Clean|Private_Dirty):\s*(\d+)"
    return sum(int(kb) for text in texts for kb in re.findall(fields, text)) / 1024


def _forget_peak() -> None:
    """Let the kernel count this process's peak anew from what it holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _contest(name: str, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images per second and MiB above what the process held before: run in a process of its own.

    It loads CIFAR-10 itself, as a training process does: one that never held a large block is slower, since the C
    library then returns every batch's memory to the system. What loading left free is given back first: what a batch
    takes of it would not show in the peak.
    """
    images = load_cifar10("train")[0][:4096].clone()
    gc.collect()
    with suppress(OSError, AttributeError):  # the C library's of Linux
        ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    before = _peak_mib()
    batches = CONTESTANTS[name][0](images, batch_size)
    for _ in range(4):  # as many as two workers prefetch, so that none of these is counted
        next(batches)
    return _rate(lambda: next(batches), batch_size, seconds), max(0.0, _peak_mib() - before)


def augment_table(batch_sizes: tuple[int, ...] = (64, 512), seconds: float = 3.0, rounds: int = 4) -> pd.DataFrame:
    """Images/s and memory of the paper's whole augmentation on CIFAR-10 on the CPU, ours and three others.

    Every contestant runs in a fresh process, one after the other, `rounds` times around; its best round counts, since
    other work on the machine can only slow it. "MiB" is the peak beyond libraries and data set, and what workers hold;
    "ours" is how many times as fast this course is at that batch size. OMP_NUM_THREADS limits the two without workers.
    Raises CourseError where CIFAR-10 is missing.
    """
    load_cifar10("train")  # says what is wrong, if anything is, before a process is started
    spawn = multiprocessing.get_context("spawn")
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for _ in range(rounds):
        for entry in product(batch_sizes, [name for name, (*_, needs) in CONTESTANTS.items() if find_spec(needs)]):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                result = process.submit(_contest, entry[1], entry[0], seconds).result()
            best[entry] = max(best.get(entry, result), result)
    rows = []
    for batch_size, (name, (_, drawn, package)) in product(batch_sizes, CONTESTANTS.items()):
        rate, peak = best.get((batch_size, name), (float("nan"), float("nan")))
        times = round(best[batch_size, "this course"][0] / rate, 1)
        note = drawn if find_spec(package) else f"{package} is not installed"
        rows.append((name, batch_size, rate, times, peak, note))
    columns = ["augmentation", "batch", "images/s", "ours", "MiB", "drawn for each"]
    return pd.DataFrame(rows, columns=columns).round({"images/s": 0, "MiB": 0})


# Training: one step of the paper's whole recipe, ours and what most CIFAR-10 repositories do -------------------------


def matmul_flops() -> float:
    """Floating-point operations a second of a large matrix product, measured: the ceiling of a recipe in bfloat16."""
    kind = torch.bfloat16 if runtime.has_bfloat16(pick_device()) else torch.float32
    a, b = torch.randn(2, 4096, 4096).to(pick_device(), kind)
    return _rate(lambda: a @ b, 2 * 4096**3, seconds=3.0)


def flops_per_image(name: str = "paper") -> int:
    """Floating-point operations of a recipe's network for one image, forward and backward, as torch counts them."""
    model, counter = get(name).network(), FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() // 2


def _plain(images: np.ndarray, labels: np.ndarray, batch_size: int, count: int) -> dict[str, Callable[[], object]]:
    """The plain loop: PIL transforms in a DataLoader with two workers, float32, a line of PyTorch after the other."""
    recipe, device = get("paper"), pick_device()
    batches, model = _pil(torch.from_numpy(images), batch_size), recipe.network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    targets = torch.from_numpy(labels[:batch_size]).to(device)

    def step() -> float:
        x, lam, partner = next(batches).to(device), float(np.random.beta(1.0, 1.0)), torch.randperm(batch_size)
        logits = model(lam * x + (1 - lam) * x[partner])
        loss = lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"step": step}


def _engine(
    images: np.ndarray, labels: np.ndarray, batch_size: int, count: int, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Our engine, driven as `train.fit_many` drives it: a step of each of `count` runs; and two parts of a step."""
    part = ImageSet(torch.from_numpy(images), torch.from_numpy(labels))
    recipe = get("paper").but(train_size=len(images), compiled=compiled).scaled_to(batch_size)
    few = part.take(torch.arange(64))  # validation is no part of a step
    trainers = [Trainer(recipe.but(seed=seed), TrainingData(part, few), pick_device()) for seed in range(count)]
    runs = [trainer.go() for trainer in trainers]
    first = trainers[0]
    index, x = torch.arange(batch_size, device=first.device), first.train.images[:batch_size]

    def step() -> None:
        for trainer, run in zip(trainers, runs, strict=True):
            with trainer.on_its_stream():
                next(run)

    return {"step": step, "alone": lambda: first.step(index, 0.01), "augment": lambda: first.augment(x, first.draws)}


LOOPS = {
    "plain loop, DataLoader": (_plain, 1),
    "this course": (_engine, 1),
    "this course, compiled": (partial(_engine, compiled=True), 1),
    "this course, 4 seeds at once": (_engine, 4),
}


def _loop(name: str, batch_size: int, seconds: float) -> dict[str, float]:
    """Images/s of a loop's parts, seconds of its first step, peak memory in MiB: run in a process of its own."""
    images, labels = (part[:4096].numpy() for part in load_cifar10("train"))
    _forget_peak()
    before, (make, count) = _peak_mib(), LOOPS[name]
    parts = make(images, labels, batch_size, count)
    start = time.perf_counter()
    parts["step"]()
    first = time.perf_counter() - start
    per_call = {part: batch_size * (count if part == "step" else 1) for part in parts}
    windows = [  # in turn, so that what else the machine does meets all parts alike
        {part: _rate(call, per_call[part], seconds / 5) for part, call in parts.items()} for _ in range(5)
    ]
    rates = pd.DataFrame(windows).median().to_dict()
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _peak_mib() - before
    return {**rates, "first": first, "MiB": peak}


def train_table(batch_sizes: tuple[int, ...] = (64, 512), seconds: float = 12.0) -> pd.DataFrame:
    """One training step of the paper's recipe on CIFAR-10, whole ladder and Mixup included, ours and the plain loop.

    Each loop runs in a fresh process, one after the other. "ours" is how many times as fast "this course" is at that
    batch size; "ceiling" the share of this device's matrix products that the network's arithmetic makes up,
    the mean of two measurements around the table; "first s" is the first step, which compiles or captures; "augment"
    and "between" are shares of our step, the latter what is lost between steps. Memory is the device's on CUDA, else
    the process's beyond libraries and data set. Without the C++ compiler that "compiled" needs on a CPU, its rows are
    empty and a warning says so.
    Raises CourseError where CIFAR-10 is missing.
    """
    load_cifar10("train")
    spawn, rows, ceiling = multiprocessing.get_context("spawn"), [], matmul_flops()
    together = torch.cuda.is_available()  # on a CPU, one run after the other is as fast
    for batch_size in batch_sizes:
        for name in [name for name, (_, count) in LOOPS.items() if count == 1 or together]:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                found = process.submit(_loop, name, batch_size, seconds)
            try:
                rows.append({"loop": name, "batch": batch_size, **found.result()})
            except CourseError as error:  # compiling, without a compiler
                warnings.warn(f"Not measured, {name}: {error}", stacklevel=2)
                rows.append({"loop": name, "batch": batch_size})
    ceiling = (ceiling + matmul_flops()) / 2 / flops_per_image()
    table = pd.DataFrame(rows).rename(columns={"step": "images/s"})
    ours = table[table["loop"] == "this course"].set_index("batch")["images/s"]
    return pd.DataFrame({
        "loop": table["loop"], "batch": table["batch"], "images/s": table["images/s"].round(1),
        "ours": (table["batch"].map(ours) / table["images/s"]).round(2),
        "ceiling": (table["images/s"] / ceiling).round(3), "s/epoch": (45_000 / table["images/s"]).round(1),
        "augment": (table["images/s"] / table["augment"]).round(4),
        "between": (1 - table["images/s"] / table["alone"]).round(4),
        "first s": table["first"].round(1), "MiB": table["MiB"].round(0),
    })  # fmt: skip


# Distortion: what a whole CIFAR-10-C takes --------------------------------------------------------------------------


def distort_table() -> pd.DataFrame:
    """Seconds for each scored kind of `distort` over CIFAR-10's 10,000 test images, all five severities; a row for all.

    Raises CourseError where CIFAR-10 is missing.
    """
    images, rows = load_cifar10("test")[0].to(pick_device()), []
    for kind in distort.SCORED:
        distort.distort(images[:100], kind, 1)
        start = time.perf_counter()
        for severity in distort.SEVERITIES:
            distort.distort(images, kind, severity)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rows.append((kind, time.perf_counter() - start, len(images) * len(distort.SEVERITIES)))
    rows.append((f"all {len(rows)}", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    table = pd.DataFrame(rows, columns=["kind", "seconds", "images"])
    return table.assign(**{"images/s": (table["images"] / table["seconds"]).round(0)}).round({"seconds": 2})


# Recorded measurements ------------------------------------------------------------------------------------------------

SUBJECTS = {"augment": augment_table, "train": train_table, "distort": distort_table}
RECORDED = ROOT / "data" / "bench"


def known(subject: str) -> str:
    """The subject, if it is one of SUBJECTS; else CourseError."""
    if subject not in SUBJECTS:
        raise CourseError(f"There is no benchmark {subject!r}: expected one of {', '.join(SUBJECTS)}.")
    return subject


def measure(subject: str, record: bool = False) -> pd.DataFrame:
    """The table of a subject, measured now; with `record` kept in data/bench/<subject>.csv with device and versions."""
    table = SUBJECTS[known(subject)]()
    if record:
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        with replacing(RECORDED / f"{subject}.csv") as temporary:
            table.assign(device=device_name(pick_device()), versions=packages, commit=git_commit()).to_csv(
                temporary, index=False, lineterminator="\n"
            )
    return table


def recorded(subject: str) -> pd.DataFrame:
    """The recorded table of a subject; CourseError if there is none."""
    path = RECORDED / f"{subject}.csv"
    if not path.exists():
        raise CourseError(f"No measurement in {shown(path)}: run `python -m helpers bench {subject} --record`.")
    return pd.read_csv(path)
