"""Test-time corruptions at five severities, after CIFAR-10-C, and sets made with them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.distort.kinds import CHANGES, CONSTANTS, KINDS, SCORED
from helpers.runtime import CourseError, generator, replacing

SEVERITIES = (1, 2, 3, 4, 5)


def distort(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Distort uint8 [N, 3, H, W] in one of KINDS at severity 1 (mild) to 5; uint8 of the same shape, same device.

    The first fifteen kinds, SCORED, make up the mean that is reported. Each image's random numbers come from a
    generator of its own, seeded by kind, seed and place in the batch: they are the same on every device, at every
    severity and whatever the other images are, and no global random state is touched. Values are rounded to whole
    levels (the published files cut them off). `frost` is a drawn texture, not comparable with the published
    photographs, and the water of `spatter` is simpler. `zoom_blur` takes (H W) squared numbers: made for small images.
    Raises CourseError for another kind, severity, type or shape.
    """
    if kind not in KINDS:
        raise CourseError(f"There is no distortion {kind!r}: expected one of {', '.join(KINDS)}.")
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise CourseError(f"severity={severity!r} is out of range: expected a whole number from 1 to 5.")
    checked(images)
    images = images.contiguous()
    constant, out = CONSTANTS[kind][int(severity) - 1], torch.empty_like(images)
    for first in range(0, len(images), 2_000):  # bounds the memory
        part = images[first : first + 2_000]
        draws = [generator(0xD1570, int.from_bytes(kind.encode()), int(seed), first + i) for i in range(len(part))]
        out[first : first + 2_000] = (CHANGES[kind](part.float() / 255, constant, draws) * 255).round().clamp(0, 255)
    return out


def checked(images: Tensor) -> None:
    """Raises CourseError unless images are uint8 [N, 3, H, W], H and W at least 16."""
    good = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    if not good or min(images.shape[2:]) < 16:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise CourseError(f"Got {got} for images: expected a tensor torch.uint8 [N, 3, H, W], H and W at least 16.")


# -------------------------------------------------------------------------------------------- sets of our own making


def write_cifar10c(
    folder: str | Path, images: Tensor, labels: Tensor, kinds: Sequence[str] = SCORED, seed: int = 0
) -> Path:
    """Write our CIFAR-10-C in the published layout, which `load_shifted` and other tools read; returns the folder.

    `<kind>.npy` uint8 [5 N, 32, 32, 3], severity 1 first, and `labels.npy` uint8 [5 N], for images uint8
    [N, 3, 32, 32] and labels [N]. These are our corruptions of the images given, not the published files.
    """
    _check_pairs(images, labels)
    for kind in (kinds := list(kinds)):
        distort(images[:0], kind, 1)  # a slip of the pen is refused before anything is written

    def save(name: str, array: np.ndarray) -> None:
        with replacing(Path(folder) / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)

    save("labels", np.tile(labels.cpu().numpy().astype(np.uint8), len(SEVERITIES)))
    for kind in kinds:
        save(kind, np.concatenate([_pixels(distort(images, kind, severity, seed)) for severity in SEVERITIES]))
    return Path(folder)


def competition_like(images: Tensor, seed: int = 0) -> tuple[Tensor, pd.DataFrame]:
    """A mix of our own in the manner of the competition's hidden set: each image distorted in a way of its own.

    Returns uint8 of the same shape, and a table of `kind` (one of SCORED) and `severity`, one row per image. Each of
    the 75 ways is as likely as another. None stays clean: the mix's accuracy is then the mean over kinds and
    severities, and who wants clean images has the test set. What the competition did to its images is not known.
    """
    checked(images)
    ways = torch.randint(len(SCORED) * len(SEVERITIES), (len(images),), generator=generator(0xC0317, int(seed)))
    kinds, severities = [SCORED[way // 5] for way in ways.tolist()], (ways % 5 + 1).tolist()
    table, out = pd.DataFrame({"kind": kinds, "severity": severities}), torch.empty_like(images)
    for way, rows in table.groupby(["kind", "severity"]).indices.items():
        which = torch.from_numpy(rows).to(images.device)
        out[which] = distort(images[which], *way, seed)
    return out, table


def write_competition_like(path: str | Path, images: Tensor, labels: Tensor, seed: int = 0) -> Path:
    """Write `competition_like` images [N, 3, 32, 32] in the competition's own format; returns the path.

    At `path` a pickled dict with b'data' uint8 [N, 32, 32, 3] and b'ids' int64 [N], which `load_shifted` reads. Beside
    it, kept apart: `<name>-labels.csv` (ID,Labels) and `<name>-kinds.csv` (ID,kind,severity). Raises CourseError for a
    path that does not end in .pkl.
    """
    _check_pairs(images, labels)
    path, ids = Path(path), np.arange(len(images))
    if path.suffix != ".pkl":
        raise CourseError(f"{path.name} is no name for the competition's format: expected one that ends in .pkl.")
    mixed, table = competition_like(images, seed)
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps({b"data": _pixels(mixed), b"ids": ids}))
    for name, columns in (("labels", {"Labels": labels.cpu().numpy()}), ("kinds", table)):
        with replacing(path.with_name(f"{path.stem}-{name}.csv")) as temporary:
            pd.DataFrame(columns).rename_axis("ID").to_csv(temporary, lineterminator="\n")
    return path


def _check_pairs(images: Tensor, labels: Tensor) -> None:
    checked(images)
    given = list(labels.shape) if isinstance(labels, Tensor) else f"a {type(labels).__name__} of"
    if images.shape[2:] != (32, 32) or given != [len(images)]:
        raise CourseError(
            f"Got images {list(images.shape)} and {given} labels: expected [N, 3, 32, 32] and a tensor of N labels."
        )


def _pixels(images: Tensor) -> np.ndarray:
    """Channels last, as published."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
