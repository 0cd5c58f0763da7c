"""What several kinds are made of: draws for each image, grey, Gaussian averages, streaks, zooms, fractal clouds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Draws = Sequence[Generator]  # one an image, on the CPU whatever the device: what it draws depends on nothing around it


def normal(draws: Draws, *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in draws])


def uniform(draws: Draws, *shape: int) -> Tensor:
    return torch.stack([torch.rand(shape, generator=g) for g in draws])


def grey_of(x: Tensor) -> Tensor:
    """The grey image [N, 1, H, W] of colours [N, 3, H, W], weighed as in ITU-R BT.601."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)).sum(1, keepdim=True)


def gaussian(size: int, sigma: float, truncate: int = 4, mirror: bool = False) -> Tensor:
    """A Gaussian average along one side, [size, size]; beyond the edge its own value, or the side mirrored."""
    reach = int(truncate * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    at = torch.arange(size)[:, None] + offsets
    at = torch.where(at % (2 * size) < size, at % size, -at.sub(-1) % size) if mirror else at.clamp(0, size - 1)
    taps = (weights / weights.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, at, taps).float()


def blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of [..., H, W]; beyond the edge the edge's own value."""
    height, width = x.shape[-2:]
    return gaussian(height, sigma).to(x.device) @ x @ gaussian(width, sigma).T.to(x.device)


def streak(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Each image averaged along a half-line at its own angle [N]: 2 * radius + 1 whole-pixel steps, half a Gaussian."""
    steps = torch.arange(2 * radius + 1)
    weights = torch.exp(-(steps.double() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    order = angle.argsort()  # then images that step to the same pixel are neighbours, moved as one
    dx, dy = (torch.ceil(steps[:, None] * part - 0.5).long() for part in (angle[order].cos(), angle[order].sin()))
    (height, width), reach = x.shape[2:], 2 * radius + 1
    padded = F.pad(x[order.to(x.device)], (reach,) * 4, mode="replicate")  # beyond the edge: the edge's own value
    out = torch.zeros_like(x)
    for weight, shift in zip(weights, dy * 1_000 + dx + 500, strict=True):
        start = 0
        for code, count in zip(*(run.tolist() for run in shift.unique_consecutive(return_counts=True)), strict=True):
            top, left = reach + code // 1_000, reach + code % 1_000 - 500
            window = padded[start : start + count, :, top : top + height, left : left + width]
            out[start : start + count].add_(window, alpha=weight)
            start += count
    return out[order.argsort().to(x.device)]


def zoomed(size: int, zoom: float) -> Tensor:
    """The middle of one side enlarged by linear interpolation, as a matrix [size, size]."""
    crop = math.ceil(size / zoom)
    grown = round(crop * zoom)
    at = torch.arange(size) + (grown - size) // 2  # the middle of the grown crop
    place = (size - crop) // 2 + at.double() * (crop - 1) / (grown - 1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp_min(0).float()


def plasma(x: Tensor, decay: float, draws: Draws) -> Tensor:
    """Fractal clouds for each image, [N, 1, H, W] from 0 to 1: diamond-square (Fournier et al. 1982) on a torus."""
    height, width = x.shape[2:]
    side = 1 << (max(height, width) - 1).bit_length()
    noise = 2 * uniform(draws, 1, side, side).to(x.device) - 1
    out, step, roughness = torch.zeros_like(noise), side, 1.0
    while step > 1:
        grid, between = slice(None, None, step), slice(step // 2, None, step)
        corners = out[:, :, grid, grid]
        pairs = corners + corners.roll(-1, 3)
        middles = (pairs + pairs.roll(-1, 2)) / 4 + roughness * noise[:, :, between, between]
        upper = pairs + middles + middles.roll(1, 2)
        left = corners + corners.roll(-1, 2) + middles + middles.roll(1, 3)
        out[:, :, between, between] = middles
        out[:, :, grid, between] = upper / 4 + roughness * noise[:, :, grid, between]
        out[:, :, between, grid] = left / 4 + roughness * noise[:, :, between, grid]
        step, roughness = step // 2, roughness / decay**2  # as published: the decaying number enters twice
    low, high = out.amin((2, 3), keepdim=True), out.amax((2, 3), keepdim=True)
    return ((out - low) / (high - low))[:, :, :height, :width]
