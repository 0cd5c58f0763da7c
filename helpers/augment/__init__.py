"""Batched augmentation, drawn per image: uint8 in, normalised float out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.runtime import CourseError

STAGES = ("none", "crop_flip", "erasing")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augment:
    """One rung of the ladder: `none`, `crop_flip`, `erasing`, each adding to the last; then normalisation.

    Called with uint8 [B, 3, H, W] and a generator on the same device, it returns float32 [B, 3, H, W] with
    torchvision's own defaults for CIFAR-10: a crop at an offset of up to 4 pixels into a black border, a horizontal
    flip with probability 1/2, and with probability 1/2 a rectangle of 2 to 33 % of the area set to 0 (the mean).
    Every image draws its own parameters. The paper normalises with ImageNet's mean and std.
    """

    stage: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise CourseError(f"There is no augmentation stage {self.stage!r}: expected one of {', '.join(STAGES)}.")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise CourseError(f"Augment got {images.dtype} {list(images.shape)}: expected torch.uint8 [B, 3, H, W].")
        rung = STAGES.index(self.stage)
        if rung >= 1:
            images = _crop_flip(images, generator)
        mean, std = (torch.tensor(v, device=images.device).mul(255).view(3, 1, 1) for v in (self.mean, self.std))
        out = (images - mean) / std
        return _erase(out, generator) if rung >= 2 else out


def _crop_flip(images: Tensor, generator: torch.Generator | None, padding: int = 4) -> Tensor:
    batch, _, height, width = images.shape
    dev = images.device
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator, device=dev)
    flipped = torch.rand(batch, 1, generator=generator, device=dev) < 0.5
    rows = top + torch.arange(height, device=dev)
    columns = torch.arange(width, device=dev).expand(batch, width)
    columns = left + torch.where(flipped, width - 1 - columns, columns)
    padded = F.pad(images, (padding,) * 4)
    which, channel = torch.arange(batch, device=dev).view(-1, 1, 1, 1), torch.arange(3, device=dev).view(1, 3, 1, 1)
    return padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _erase(images: Tensor, generator: torch.Generator | None) -> Tensor:
    batch, _, height, width = images.shape
    dev = images.device
    u = torch.rand(5, batch, 1, generator=generator, device=dev)
    area = (0.02 + 0.31 * u[0]) * height * width
    ratio = torch.exp((2 * u[1] - 1) * torch.log(torch.tensor(1 / 0.3, device=dev)))
    h, w = (area * ratio).sqrt().round().clamp(1, height), (area / ratio).sqrt().round().clamp(1, width)
    top, left = ((height - h + 1) * u[2]).floor(), ((width - w + 1) * u[3]).floor()
    y, x = torch.arange(height, device=dev), torch.arange(width, device=dev)
    rows, columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    hidden = rows[:, :, None] & columns[:, None, :] & (u[4] < 0.5)[:, :, None]
    return images.masked_fill(hidden[:, None], 0)


def channel_stats(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 [N, 3, H, W], in [0, 1], computed."""
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
    mean = counts @ values / total
    return mean.float(), (counts @ values**2 / total - mean**2).sqrt().float()
