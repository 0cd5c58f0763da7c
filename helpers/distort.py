"""Test-time corruptions at five severities, after CIFAR-10-C."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from helpers.runtime import CourseError, generator

SEVERITIES = (1, 2, 3, 4, 5)

# Severities 1 to 5 of each kind, for 32 x 32 pixels in [0, 1] (Hendrycks and Dietterich 2019, arXiv:1903.12261).
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons that make full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values set to 0 or 1
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),  # standard deviation, as a share of the value
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius of the disk, its own blur
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, pixels
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, standard deviation, pixels
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # the zoom it stops before
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),  # added to V of HSV
    "contrast": (0.75, 0.50, 0.40, 0.30, 0.15),  # what is left of the distance from the mean
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # S of HSV becomes S * a + b
    "pixelate": (0.95, 0.90, 0.85, 0.75, 0.65),  # side of the small image, as a share
    "jpeg_compression": (80, 65, 58, 50, 40),  # JPEG quality
}
KINDS = tuple(CONSTANTS)


def distort(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Distort uint8 [N, 3, H, W] in one of KINDS at severity 1 (mild) to 5; uint8 of the same shape, same device.

    Every image has its own noise, from a generator of this call's own: the same arguments on the same kind of device
    give the same bytes, and no global random state is touched. A seed draws the same numbers at every severity. Values
    are rounded back to whole levels (the published files cut them off). Raises CourseError for anything else.
    """
    if kind not in CONSTANTS:
        raise CourseError(f"There is no distortion {kind!r}: expected one of {', '.join(KINDS)}.")
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise CourseError(f"severity={severity!r} is out of range: expected a whole number from 1 to 5.")
    checked(images)
    draws = generator(0xD1570, int.from_bytes(kind.encode()), int(seed), device=images.device)
    images = images.contiguous()
    constant, out = CONSTANTS[kind][int(severity) - 1], torch.empty_like(images)
    for source, target in zip(images.split(2_000), out.split(2_000), strict=True):  # bounds the memory
        if len(source):
            change = _CHANGES[kind](source.float() / 255, constant, draws)
            target.copy_((change * 255).round().clamp(0, 255))
    return out


def checked(images: Tensor) -> None:
    """Raises CourseError unless images are uint8 [N, 3, H, W], H and W at least 16."""
    good = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    if not good or min(images.shape[2:]) < 16:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise CourseError(f"Got {got} for images: expected a tensor torch.uint8 [N, 3, H, W], H and W at least 16.")


# ------------------------------------------------- the kinds: float [N, 3, H, W] in [0, 1], constants, generator


def _randn(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g, device=x.device)


def _impulse_noise(x: Tensor, share: float, g: torch.Generator) -> Tensor:
    u = torch.rand(x.shape, generator=g, device=x.device)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def _gaussian_blur(x: Tensor, sigma: float, g: torch.Generator) -> Tensor:
    offsets = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))

    def matrix(size: int) -> Tensor:
        reach = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)  # beyond the edge: the edge's own value
        taps = (weights / weights.sum()).expand(size, -1)
        return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, reach, taps).float().to(x.device)

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


def _defocus_blur(x: Tensor, constants: tuple[float, float], g: torch.Generator) -> Tensor:
    radius, sigma = constants
    reach = int(radius)
    axis = torch.arange(-reach, reach + 1).double()
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).double()
    soft = torch.exp(-(torch.tensor([1.0, 0.0, 1.0]).double()) / (2 * sigma**2))
    soft = torch.outer(soft, soft) / soft.sum() ** 2
    kernel = F.conv2d((disk / disk.sum())[None, None], soft[None, None], padding=2).float().to(x.device)
    padded = F.pad(x, (reach + 1,) * 4, mode="reflect")  # beyond the edge: mirrored, the edge itself not repeated
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel).view(x.shape)


def _motion_blur(x: Tensor, constants: tuple[int, float], g: torch.Generator) -> Tensor:
    angle = (torch.rand(len(x), generator=g, device=x.device) - 0.5) * math.pi / 2
    return _streak(x, *constants, angle)


def _streak(x: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Each image averaged along a half-line at its own angle [N]: 2 * radius + 1 whole-pixel steps, half a Gaussian."""
    steps = torch.arange(2 * radius + 1, device=x.device)
    weights = torch.exp(-(steps.double() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    dx, dy = (torch.ceil(steps * part[:, None] - 0.5).long() for part in (angle.cos(), angle.sin()))
    count, _, height, width = x.shape
    which, y, line = (torch.arange(n, device=x.device) for n in (count, height, width))
    pixels, out = x.permute(0, 2, 3, 1), 0
    for i, weight in enumerate(weights):
        rows = (y + dy[:, i, None]).clamp(0, height - 1)  # beyond the edge: the edge's own value
        columns = (line + dx[:, i, None]).clamp(0, width - 1)
        out = out + weight * pixels[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return out.permute(0, 3, 1, 2)


def _zoom_blur(x: Tensor, limit: float, g: torch.Generator) -> Tensor:
    def matrix(size: int, zoom: float) -> Tensor:
        crop = math.ceil(size / zoom)
        grown = round(crop * zoom)
        at = torch.arange(size) + (grown - size) // 2  # the middle of the grown crop
        place = (size - crop) // 2 + at.double() * (crop - 1) / (grown - 1)
        return (1 - (place[:, None] - torch.arange(size)).abs()).clamp_min(0).float()  # linear interpolation

    height, width = x.shape[2:]
    zooms = [1 + i / 100 for i in range(round((limit - 1) * 100))]
    total = sum((torch.kron(matrix(height, zoom), matrix(width, zoom)) for zoom in zooms), torch.eye(height * width))
    return (x.flatten(2) @ (total / (len(zooms) + 1)).T.to(x.device)).view(x.shape)  # one matrix for all zooms


def _brightness(x: Tensor, amount: float, g: torch.Generator) -> Tensor:
    value = x.amax(1, keepdim=True)  # V; adding to it at the same H and S scales the three channels alike
    new = (value + amount).clamp_max(1)
    return torch.where(value > 0, x * new / value.clamp_min(1e-9), new)


def _saturate(x: Tensor, constants: tuple[float, float], g: torch.Generator) -> Tensor:
    scale, offset = constants
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    new = (chroma / value.clamp_min(1e-9) * scale + offset).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)  # a grey has no hue: HSV calls it red
    return value * (1 - new * torch.where(chroma > 0, (value - x) / chroma.clamp_min(1e-9), red))


def _pixelate(x: Tensor, share: float, g: torch.Generator) -> Tensor:
    def matrix(source: int, target: int) -> Tensor:
        middle = (torch.arange(target).double()[:, None] + 0.5) * source / target
        reach, at = max(source / target, 1) / 2, torch.arange(source) + 0.5
        inside = ((at > middle - reach) & (at <= middle + reach)).float()  # a pixel counts whole or not at all
        return (inside / inside.sum(1, keepdim=True)).to(x.device)

    height, width = x.shape[2:]
    small = int(height * share), int(width * share)
    x = (x * 255).round()
    for (rows, columns), (new_rows, new_columns) in (((height, width), small), (small, (height, width))):
        x = (x @ matrix(columns, new_columns).T + 0.5).floor()  # in whole levels after each step, as Pillow does
        x = (matrix(rows, new_rows) @ x + 0.5).floor()
    return x / 255


def _jpeg_compression(x: Tensor, quality: int, g: torch.Generator) -> Tensor:
    def there_and_back(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    whole = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()  # on the CPU, one by one
    back = torch.from_numpy(np.stack([there_and_back(image) for image in whole]))
    return back.permute(0, 3, 1, 2).to(x.device).float() / 255


_CHANGES: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    "gaussian_noise": lambda x, sigma, g: x + sigma * _randn(x, g),
    "shot_noise": lambda x, photons, g: torch.poisson(x * photons, generator=g) / photons,
    "impulse_noise": _impulse_noise,
    "speckle_noise": lambda x, sigma, g: x + x * sigma * _randn(x, g),
    "defocus_blur": _defocus_blur,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "brightness": _brightness,
    "contrast": lambda x, left, g: torch.lerp(x.mean((2, 3), keepdim=True), x, left),
    "saturate": _saturate,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
