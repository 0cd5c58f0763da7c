"""CIFAR-10 and shifted sets on disk -> uint8 tensors; splits; the stand-in set."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from helpers import readers
from helpers.runtime import ROOT, CourseError, expanded, generator, shown, staging

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STAND_IN_CLASSES = ("disc", "square", "triangle", "ring", "plus", "rows", "columns", "diagonals", "checks", "dots")
CIFAR10 = "CIFAR-10"
STAND_IN = "stand-in"
FILES = {  # split -> (name, official MD5), as torchvision has them, which takes seconds to import
    "train": (
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    "test": (("test_batch", "40351d587109b95175f43aff81a1287e"),),
}
BANNER = (
    "STAND-IN DATA: CIFAR-10 is not here (`python -m helpers fetch` downloads it). What follows runs on ten drawn "
    "shapes; its numbers say that the code works and nothing about the paper."
)

Split = Literal["train", "test"]


class ImageSet(NamedTuple):
    """images uint8 [N, 3, 32, 32], labels int64 [N], the ten class names, and where they come from."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = CLASSES
    source: str = CIFAR10

    def take(self, indices: Tensor) -> ImageSet:
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def first(self, count: int) -> ImageSet:
        """The first `count` images, all of them where there are not as many."""
        return self._replace(images=self.images[:count], labels=self.labels[:count])

    def to(self, device: torch.device) -> ImageSet:
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and what it is selected by; both come from the training set, never from the test set."""

    train: ImageSet
    val: ImageSet

    @property
    def source(self) -> str:
        return self.train.source

    def to(self, device: torch.device) -> TrainingData:
        return TrainingData(self.train.to(device), self.val.to(device))


# ---------------------------------------------------------------------------------------------- CIFAR-10 on disk


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds `cifar-10-batches-py`: the argument, else $CIFAR10_ROOT, else data/ of the project.

    A relative $CIFAR10_ROOT counts from the project, not from wherever a notebook's kernel happens to run.
    """
    chosen = expanded(root or os.environ.get("CIFAR10_ROOT") or "data")
    return chosen if chosen.is_absolute() or root else ROOT / chosen


def load_cifar10(split: Split, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """One half of CIFAR-10, checked against the official MD5s before a byte of it is unpickled.

    Returns images uint8 [N, 3, 32, 32] and labels int64 [N], N = 50,000 (train) or 10,000 (test).
    Raises CourseError if the folder is missing, or a file is missing, truncated or altered.
    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
    """
    if split not in FILES:
        raise CourseError(f"CIFAR-10 has no split {split!r}: choose 'train' or 'test'.")
    folder = data_root(root) / "cifar-10-batches-py"
    advice = (
        "run `python -m helpers fetch` to download the set, or set CIFAR10_ROOT to the folder that holds "
        "cifar-10-batches-py"
    )
    if not folder.is_dir():
        raise CourseError(f"CIFAR-10 is not in {shown(folder)}: {advice}.")
    entries = []
    for name, md5 in FILES[split]:
        try:
            raw = (folder / name).read_bytes()
        except FileNotFoundError:
            raise CourseError(
                f"{shown(folder / name)} is missing: delete the folder {shown(folder)}, then {advice}."
            ) from None
        except OSError as error:
            raise CourseError(
                f"{shown(folder / name)} cannot be read ({error.strerror}): mend its permissions, or {advice}."
            ) from error
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
            raise CourseError(
                f"{shown(folder / name)} is damaged ({len(raw):,} bytes, MD5 differs from the official "
                f"{md5}): delete the folder {shown(folder)}, then {advice}."
            )
        entries.append(pickle.loads(raw, encoding="latin1"))  # the MD5 above says it is the official file
    images = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([entry["labels"] for entry in entries])
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def fetch() -> Path:
    """Download CIFAR-10 through torchvision unless it is there already; returns the folder that holds it.

    The download goes to a temporary folder on the same disk and is renamed when its MD5s are right, so a broken
    connection leaves nothing behind. Raises CourseError without a network or a writable folder.
    """
    from torchvision.datasets import CIFAR10 as Reference  # here, since it takes seconds to import

    root = data_root()
    if (root / "cifar-10-batches-py").exists():
        for split in ("train", "test"):
            load_cifar10(split)  # says which file is wrong, if one is
        return root
    patience = socket.getdefaulttimeout()
    with staging(root, "set CIFAR10_ROOT to a folder you may write to") as temporary:
        socket.setdefaulttimeout(30)  # seconds without a byte: a network that swallows packets is no network
        try:
            Reference(temporary, train=True, download=True)
            (temporary / "cifar-10-batches-py").rename(root / "cifar-10-batches-py")
        except Exception as error:  # URLError, RuntimeError, OSError: torchvision has no one type for a failed download
            if not (root / "cifar-10-batches-py").exists():  # another process may have been quicker
                raise CourseError(
                    f"CIFAR-10 could not be downloaded ({type(error).__name__}: {error}): check the network and "
                    f"the space for {shown(root)} and try again, or copy cifar-10-batches-py there."
                ) from error
        finally:
            socket.setdefaulttimeout(patience)
    return root


def source(stand_in: bool = False) -> str:
    """Where `load_set` would take images from: "CIFAR-10", or "stand-in" if it is missing and that is allowed."""
    missing = not (data_root() / "cifar-10-batches-py").exists()
    return STAND_IN if stand_in and missing else CIFAR10


def load_set(split: Split, stand_in: bool = False) -> ImageSet:
    """CIFAR-10 where it is there; where it is not, the stand-in set if `stand_in` allows it, else CourseError.

    Damaged files are an error in either case: somebody who has the set wants to know that it is broken.
    """
    if source(stand_in) == STAND_IN:
        return draw_stand_in(12_000 if split == "train" else 2_000, seed=0 if split == "train" else 1)
    return ImageSet(*load_cifar10(split))


def split_train_val(
    full: ImageSet, val_size: int = 5_000, train_size: int | None = None, seed: int = 0
) -> TrainingData:
    """Cut a training set in two, each class in equal share in both (45,000/5,000 for CIFAR-10 by default).

    `train_size` keeps a stratified part of the rest for quick runs. The same seed gives the same images whatever the
    network or the run's own seed, so that runs can be compared on one validation set.
    """
    if not (isinstance(full.images, Tensor) and isinstance(full.labels, Tensor)):
        raise CourseError("Images and labels must be tensors: give torch.from_numpy(...) of numpy arrays.")
    rest = len(full.labels) - val_size
    train_size = rest if train_size is None else train_size
    if not (10 <= val_size < len(full.labels) and 10 <= train_size <= rest) or 0 < rest - train_size < 10:
        raise CourseError(
            f"Cannot split {len(full.labels):,} images into {train_size:,} for training and {val_size:,} for "
            "validation: both need at least 10, one a class, and so does what is left over, if anything is."
        )
    count, low, high = len(full.labels), int(full.labels.min()), int(full.labels.max())
    if count != len(full.images) or full.labels.dtype != torch.int64 or low < 0 or high >= len(CLASSES):
        raise CourseError(
            f"{len(full.images):,} images need as many labels, int64 from 0 to {len(CLASSES) - 1}, but got {count:,}, "
            f"{str(full.labels.dtype).removeprefix('torch.')} from {low} to {high}."
        )
    indices, labels = np.arange(len(full.labels)), full.labels.numpy()
    try:
        train, val = train_test_split(indices, test_size=val_size, stratify=labels, random_state=seed)
        if train_size < len(train):
            train, _ = train_test_split(train, train_size=train_size, stratify=labels[train], random_state=seed)
    except ValueError as error:
        raise CourseError(f"Cannot split {len(labels):,} images by class with seed {seed}: {error}") from error
    return TrainingData(full.take(torch.from_numpy(np.sort(train))), full.take(torch.from_numpy(np.sort(val))))


# -------------------------------------------------------------------------------------------- the stand-in set


def draw_stand_in(count: int, seed: int = 0) -> ImageSet:
    """Ten drawn classes of shapes and textures, `count` images in equal shares: what `quick` uses without CIFAR-10.

    Every image has its own place, size, contrast and noise; two colours that differ carry no class information.
    """
    g = generator(0x57A4D1, seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=g)

    labels = torch.arange(count) % 10
    labels = labels[torch.randperm(count, generator=g)]
    axis = torch.arange(32.0)
    y, x = axis.view(1, 32, 1) - uniform(11, 21), axis.view(1, 1, 32) - uniform(11, 21)
    size, period = uniform(6, 10), uniform(5, 8)
    wave_y, wave_x = torch.sin(y * 2 * torch.pi / period), torch.sin(x * 2 * torch.pi / period)
    distance = torch.hypot(x, y)
    square = (x.abs() < size) & (y.abs() < size)
    drawings = torch.stack(
        [
            distance < size,
            square,
            (y < size * 0.8) & (y > 2 * x.abs() - size),
            (distance < size) & (distance > size * 0.55),
            square & ((x.abs() < size * 0.35) | (y.abs() < size * 0.35)),
            (wave_y > 0).expand(-1, 32, 32),
            (wave_x > 0).expand(-1, 32, 32),
            torch.sin((x + y) * 2 * torch.pi / period / 2**0.5) > 0,
            (wave_x > 0) ^ (wave_y > 0),
            (wave_x > 0.3) & (wave_y > 0.3),
        ]
    )
    inside = drawings[labels, torch.arange(count)].unsqueeze(1)
    paper = uniform(0, 255, 3, 1, 1)
    ink = (paper + uniform(70, 128, 3, 1, 1) * torch.where(uniform(-1, 1, 3, 1, 1) > 0, 1, -1)) % 256
    noise = torch.randn(count, 3, 32, 32, generator=g) * uniform(5, 30, 1, 1, 1)
    images = (torch.where(inside, ink, paper) + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(images, labels, STAND_IN_CLASSES, STAND_IN)


SCENES = (0, 1, 8)  # what `draw_scenes` can draw, as positions in CLASSES: airplane, automobile, ship


def draw_scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Airplanes, automobiles and ships in turn, drawn by us: images uint8 [count, 3, 32, 32] and labels int64 [count].

    For showing what an operation does to a picture where CIFAR-10's photographs may not be published; never for
    training. Smooth, so that they store small. Drawn at four times the size and averaged.
    """
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[(torch.arange(128) + 0.5) / 128] * 2, indexing="ij")
    pictures, labels = [], torch.tensor(SCENES).repeat(count // len(SCENES) + 1)[:count]
    for label in labels.tolist():
        u = torch.rand(12, generator=g)
        paint, far = u[:3] * 0.6 + 0.2, 0.75 + 0.2 * u[3]
        paint[int(u[4] * 3)] = 0.95  # one strong channel, so that the thing stands out
        i, j = x - 0.5 - 0.16 * (u[5] - 0.5), y - 0.5 - 0.12 * (u[6] - 0.5)
        sky = torch.stack((0.35 + 0.5 * y, 0.55 + 0.35 * y, torch.full_like(y, 0.92))) * far
        ground = torch.tensor({0: (0.9, 0.92, 0.95), 1: (0.38, 0.5, 0.3), 8: (0.1, 0.32, 0.5)}[label])
        line = {0: 0.82, 1: 0.58, 8: 0.66}[label] + 0.06 * u[7]
        layers = [
            (y > line, ground * (0.7 + 0.4 * u[8])),
            (torch.hypot(x - 0.12 - 0.76 * u[9], y - 0.14) < 0.08, torch.tensor((1.0, 0.9, 0.45))),
        ]
        white, dark = torch.tensor((0.96, 0.95, 0.9)), torch.tensor((0.12, 0.12, 0.15))
        if label == 0:
            j = j + 0.25 * i  # climbing
            layers += [
                ((i + 0.33 > 0) & (i < -0.16) & (j < 0.02) & (j > -0.24 - (i + 0.16)), paint),
                ((i / 0.38) ** 2 + (j / 0.075) ** 2 < 1, white),
                (((i - 0.03 + 0.8 * j).abs() < 0.08) & (j > 0) & (j < 0.27), paint),
                ((i > 0.22) & (i < 0.3) & (j.abs() < 0.035), dark),
            ]
        elif label == 1:
            j = j - 0.1
            layers += [
                (y > line + 0.16, torch.tensor((0.45, 0.45, 0.48))),
                ((i.abs() < 0.24 + 0.6 * (j + 0.02)) & (j > -0.2) & (j < 0.0), paint * 0.85),
                ((i.abs() < 0.19 + 0.6 * (j + 0.02)) & (i.abs() > 0.02) & (j > -0.16) & (j < -0.03), white * 0.9),
                ((i.abs() < 0.42) & (j >= -0.02) & (j < 0.15), paint),
                (torch.minimum(torch.hypot(i + 0.24, j - 0.15), torch.hypot(i - 0.24, j - 0.15)) < 0.095, dark),
                (torch.minimum(torch.hypot(i + 0.24, j - 0.15), torch.hypot(i - 0.24, j - 0.15)) < 0.04, white * 0.8),
            ]
        else:
            layers += [
                ((i > -0.03) & (i < 0.01) & (j > -0.38) & (j < 0.2), dark),
                ((i > 0.02) & (i < 0.3 * (j + 0.38) / 0.46) & (j < 0.08), white),
                ((i < -0.04) & (-i < 0.26 * (j + 0.32) / 0.4) & (j < 0.08), white * 0.85),
                ((i.abs() < 0.4 - 0.5 * (j - 0.13)) & (j > 0.13) & (j < 0.3), paint),
            ]
        canvas = sky
        for inside, colour in layers:
            canvas = torch.where(inside, colour.view(3, 1, 1), canvas)
        pictures.append(F.avg_pool2d(canvas[None], 4)[0])
    return (torch.stack(pictures).clamp(0, 1) * 255).round().to(torch.uint8), labels


# --------------------------------------------------------------------------------------------- shifted test sets


def load_shifted(path: str | Path) -> tuple[Tensor, Tensor | None, Tensor]:
    """A test set that has moved away from CIFAR-10, in one of four forms.

    * the competition's pickle: a dict with b'data' uint8 [N, 32, 32, 3] and b'ids' (no labels); nothing in it is run,
      since a pickle from the internet may do anything (see `helpers.readers.read_pickle`);
    * CIFAR-10-C: `<kind>.npy` uint8 [N, 32, 32, 3] beside `labels.npy`;
    * CIFAR-10.1: `<name>_data.npy` beside `<name>_labels.npy`;
    * a folder of 32 x 32 PNG or JPEG images, by name; with labels where all lie in sub-folders named as in CLASSES,
      with ids where the names are numbers (`123.png`), each once.

    Returns images uint8 [N, 3, 32, 32], labels int64 [N] or None, ids int64 [N] (0 .. N-1 where the set has none).
    Raises CourseError if the file is missing, hostile, torn or of another shape.
    """
    return readers.load(expanded(path), CLASSES)
