"""Measurements of this machine, each table from one run, so that its rows can be compared."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers.augment import IMAGENET_MEAN, IMAGENET_STD, STAGES, Augment, Settings
from helpers.data import load_cifar10
from helpers.recipe import get
from helpers.runtime import pick_device


def _rate(call: Callable[[], object], images: int, seconds: float = 6.0) -> float:
    """Images per second of a call, repeated for a while after one warm-up call."""
    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count += images
    return count / elapsed


def train_table(batch_size: int = 64) -> pd.DataFrame:
    """Images/s of one training step of the paper's network on random images, by memory format and arithmetic."""
    device, rows = pick_device(), []
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for precision in (torch.float32, torch.bfloat16):
            model = get("paper").network().to(device, memory_format=memory_format)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

            def step(model=model, optimizer=optimizer, precision=precision, memory_format=memory_format):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                    logits = model(images.contiguous(memory_format=memory_format))
                torch.nn.functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

            rows.append({
                "memory format": str(memory_format).removeprefix("torch."),
                "precision": str(precision).removeprefix("torch."), "images/s": round(_rate(step, batch_size), 1),
            })  # fmt: skip
    table = pd.DataFrame(rows)
    table["ratio"] = (table["images/s"] / table["images/s"].iloc[0]).round(2)
    return table


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
    return iter(torch.utils.data.DataLoader(Drawing(images, transform), batch_size=batch_size, num_workers=2))


def _course(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    augment, generator = Augment(STAGES[-1]), torch.Generator().manual_seed(0)
    while True:
        yield augment(images[torch.randint(len(images), (batch_size,))], generator)


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
        k.RandomRotation(s.rotation, p=1.0), AutoAugment("cifar10"),
        k.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue, p=1.0),
        k.RandomSharpness((s.sharpness, s.sharpness), p=s.sharpness_p),
        k.RandomGaussianBlur((3, 3), s.blur, p=s.blur_p),
        k.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        k.RandomErasing(s.erase_area, s.erase_ratio, p=s.erase_p),
    )  # fmt: skip
    while True:
        yield augment(images[torch.randint(len(images), (batch_size,))].float() / 255)


# name -> (batches without end, what its parameters are drawn for, the package it needs)
CONTESTANTS = {
    "this course": (_course, "image", "torch"),
    "torchvision on PIL, DataLoader with 2 workers": (_pil, "image", "PIL"),
    "torchvision v2 on tensors, DataLoader with 2 workers": (_v2, "image", "torchvision"),
    "kornia on the batch": (_kornia, "image; AutoAugment's sub-policy and the order of the jitter: batch", "kornia"),
}


def _peak_mb() -> float:
    """Peak resident memory of this process, and what its workers hold alone, in MB; NaN without /proc (not Linux)."""
    try:
        texts = [Path("/proc/self/status").read_text()]
        texts += [Path(f"/proc/{child.pid}/smaps_rollup").read_text() for child in multiprocessing.active_children()]
    except OSError:
        return float("nan")
    fields = r"(?:VmHWM|Private_Clean|Private_Dirty):\s*(\d+)"
    return sum(int(kb) for text in texts for kb in re.findall(fields, text)) / 1024


def _contest(name: str, images: np.ndarray, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images per second and MB above what the process held before: run in a process of its own."""
    before = _peak_mb()
    batches = CONTESTANTS[name][0](torch.from_numpy(images), batch_size)
    for _ in range(4):  # as many as two workers prefetch, so that none of these is counted
        next(batches)
    return _rate(lambda: next(batches), batch_size, seconds), _peak_mb() - before


def augment_table(batch_sizes: tuple[int, ...] = (64, 512), seconds: float = 3.0, rounds: int = 2) -> pd.DataFrame:
    """Images/s and memory of the paper's whole augmentation on CIFAR-10 on the CPU, ours and three others.

    Every contestant runs in a fresh process, one after the other, `rounds` times around; its best round counts, since
    other work on the machine can only slow it. "MB" is the peak beyond the imported libraries, workers included;
    "ours" is how many times as fast this course is at that batch size. OMP_NUM_THREADS limits the two without workers.
    Raises CourseError where CIFAR-10 is missing.
    """
    images, spawn = load_cifar10("train")[0][:4096].numpy(), multiprocessing.get_context("spawn")
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for _ in range(rounds):
        for entry in product(batch_sizes, [name for name, (*_, needs) in CONTESTANTS.items() if find_spec(needs)]):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                result = process.submit(_contest, entry[1], images, entry[0], seconds).result()
            best[entry] = max(best.get(entry, result), result)
    rows = []
    for batch_size, (name, (_, drawn, package)) in product(batch_sizes, CONTESTANTS.items()):
        rate, peak = best.get((batch_size, name), (float("nan"), float("nan")))
        times = round(best[batch_size, "this course"][0] / rate, 1)
        note = drawn if find_spec(package) else f"{package} is not installed"
        rows.append((name, batch_size, rate, times, peak, note))
    columns = ["augmentation", "batch", "images/s", "ours", "MB", "drawn for each"]
    return pd.DataFrame(rows, columns=columns).round({"images/s": 0, "MB": 0})


SUBJECTS = {"train": train_table, "augment": augment_table}
