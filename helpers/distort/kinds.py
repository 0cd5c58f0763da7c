"""The nineteen kinds of CIFAR-10-C as functions of a batch: float [N, 3, H, W] in [0, 1], constants, draws -> float.

Written from the definitions of Hendrycks and Dietterich 2019, arXiv:1903.12261, and of their generator for CIFAR-10.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from helpers.distort.parts import Draws, blurred, gaussian, grey_of, normal, plasma, streak, uniform, zoomed

# Severities 1 to 5 of each kind, for 32 x 32 pixels in [0, 1]; the first fifteen make up the mean that is reported.
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons that make full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values set to 0 or 1
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius of the disk, its own blur
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # blur, reach, rounds of moves
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, standard deviation, pixels
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # the zoom it stops before
    "snow": (  # flakes: mean, deviation, zoom, threshold; streak: radius, deviation; what is left of the image
        (0.10, 0.2, 1.00, 0.60, 8, 3, 0.95),
        (0.10, 0.2, 1.00, 0.50, 10, 4, 0.90),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.90),
        (0.25, 0.3, 2.25, 0.60, 12, 6, 0.85),
        (0.30, 0.3, 1.25, 0.65, 14, 12, 0.80),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # shares of the image and of the frost
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of its roughness
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),  # added to V of HSV
    "contrast": (0.75, 0.50, 0.40, 0.30, 0.15),  # what is left of the distance from the mean
    "elastic_transform": (  # shares of the side: displacement, its smoothness, jitter of the corners
        (0, 0, 0.08),
        (0.05, 0.20, 0.07),
        (0.08, 0.06, 0.06),
        (0.10, 0.04, 0.05),
        (0.10, 0.03, 0.03),
    ),
    "pixelate": (0.95, 0.90, 0.85, 0.75, 0.65),  # side of the small image, as a share
    "jpeg_compression": (80, 65, 58, 50, 40),  # JPEG quality
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),  # standard deviation, as a share of the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, pixels
    "spatter": (  # liquid: mean, deviation, its blur, threshold; strength of water or blur of mud; mud?
        (0.62, 0.1, 0.7, 0.70, 0.5, False),
        (0.65, 0.1, 0.8, 0.70, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # S of HSV becomes S * a + b
}
KINDS = tuple(CONSTANTS)
SCORED = KINDS[:15]

# ------------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    return x + sigma * normal(draws, *x.shape[1:]).to(x.device)


def _shot_noise(x: Tensor, photons: int, draws: Draws) -> Tensor:
    rates = (x * photons).cpu()
    counts = [torch.poisson(rate, generator=g) for rate, g in zip(rates, draws, strict=True)]
    return torch.stack(counts).to(x.device) / photons


def _impulse_noise(x: Tensor, share: float, draws: Draws) -> Tensor:
    u = uniform(draws, *x.shape[1:]).to(x.device)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def _speckle_noise(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    return x + x * sigma * normal(draws, *x.shape[1:]).to(x.device)


# -------------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(x: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    radius, sigma = constants
    reach, (height, width) = int(radius), x.shape[2:]
    axis = torch.arange(-reach, reach + 1).double()
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).double()
    soft = torch.exp(-(torch.tensor([1.0, 0.0, 1.0]).double()) / (2 * sigma**2))
    soft = torch.outer(soft, soft) / soft.sum() ** 2
    kernel = F.conv2d((disk / disk.sum())[None, None], soft[None, None], padding=2)[0, 0].tolist()
    padded = F.pad(x, (reach + 1,) * 4, mode="reflect")  # beyond the edge: mirrored, the edge itself not repeated
    out = torch.zeros_like(x)
    for i, row in enumerate(kernel):
        for j, weight in enumerate(row):
            out.add_(padded[:, :, i : i + height, j : j + width], alpha=weight)
    return out


def _glass_blur(x: Tensor, constants: tuple[float, int, int], draws: Draws) -> Tensor:
    sigma, reach, rounds = constants
    height, width = x.shape[2:]
    own = torch.arange(height * width).view(height, width)
    inner = slice(reach + 1, height + 1 - reach), slice(reach + 1, width + 1 - reach)
    shape = (rounds, 2, *own[inner].shape)
    moves = torch.stack([torch.randint(-reach, reach, shape, generator=g) for g in draws], 2)
    x = blurred(x, sigma)
    for down, across in moves:  # each [N, rows, columns]
        # The published swap of two NumPy views copies: the pixel takes its partner's value, the partner keeps it. The
        # partner lies above or to the left and its turn comes later, so that all pixels can be done at once.
        source = own.repeat(len(x), 1, 1)
        source[:, *inner] += down * width + across
        x = x.flatten(2).gather(2, source.view(len(x), 1, -1).expand(-1, 3, -1).to(x.device)).view(x.shape)
    return blurred(x, sigma)


def _gaussian_blur(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    return blurred(x, sigma)


def _motion_blur(x: Tensor, constants: tuple[int, float], draws: Draws) -> Tensor:
    return streak(x, *constants, (uniform(draws) - 0.5) * math.pi / 2)


def _zoom_blur(x: Tensor, limit: float, draws: Draws) -> Tensor:
    height, width = x.shape[2:]
    zooms = np.arange(1, limit, 0.01).tolist()  # as published, with its rounding: 7, 12, 16, 21, 26 of them
    total = sum((torch.kron(zoomed(height, zoom), zoomed(width, zoom)) for zoom in zooms), torch.eye(height * width))
    return (x.flatten(2) @ (total / (len(zooms) + 1)).T.to(x.device)).view(x.shape)  # one matrix for all zooms


# ----------------------------------------------------------------------------------------------------------- weather


def _snow(x: Tensor, constants: tuple[float, ...], draws: Draws) -> Tensor:
    mean, sigma, zoom, threshold, radius, spread, left = constants
    height, width = x.shape[2:]
    flakes = mean + sigma * normal(draws, 1, height, width).to(x.device)
    flakes = zoomed(height, zoom).to(x.device) @ flakes @ zoomed(width, zoom).T.to(x.device)
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp_max(1))
    flakes = streak(flakes, radius, spread, -(uniform(draws) + 0.5) * math.pi / 2)
    pale = torch.maximum(x, grey_of(x) * 1.5 + 0.5)
    return torch.lerp(pale, x, left) + flakes + flakes.flip(2, 3)


def _fog(x: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    amount, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, draws)) * brightest / (brightest + amount)


def _frost(x: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """A drawn texture, since the published photographs are not ours to ship: not comparable with the published kind."""
    image, ice = constants
    sheet = plasma(x, 1.6, draws)
    veins = (1 - (2 * plasma(x, 1.4, draws) - 1).abs()) ** 6  # bright along one contour of a second fractal
    tint = torch.tensor([0.80, 0.90, 1.00], device=x.device).view(3, 1, 1)
    return image * x + ice * (tint * (0.25 + 0.5 * sheet + 0.6 * veins)).clamp_max(1)


# ------------------------------------------------------------------------------------------------ colour and digital


def _brightness(x: Tensor, amount: float, draws: Draws) -> Tensor:
    value = x.amax(1, keepdim=True)  # V; adding to it at the same H and S scales the three channels alike
    new = (value + amount).clamp_max(1)
    return torch.where(value > 0, x * new / value.clamp_min(1e-9), new)


def _contrast(x: Tensor, left: float, draws: Draws) -> Tensor:
    return torch.lerp(x.mean((2, 3), keepdim=True), x, left)


def _saturate(x: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    scale, offset = constants
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    new = (chroma / value.clamp_min(1e-9) * scale + offset).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)  # a grey has no hue: HSV calls it red
    return value * (1 - new * torch.where(chroma > 0, (value - x) / chroma.clamp_min(1e-9), red))


def _elastic_transform(x: Tensor, constants: tuple[float, float, float], draws: Draws) -> Tensor:
    count, _, height, width = x.shape
    amount, sigma, jitter = (share * min(height, width) for share in constants)
    middle, reach = torch.tensor([width // 2, height // 2]), min(height, width) // 3
    corners = (middle + reach * torch.tensor([[1, 1], [1, -1], [-1, -1]])).float()
    moved = corners + jitter * (2 * uniform(draws, 3, 2) - 1)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), corners.expand(count, 3, 2)).to(x.device)
    size = torch.tensor([width, height], device=x.device)
    y, line = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((line, y), -1).float().to(x.device)  # [H, W, 2]: x, y
    at = (F.pad(pixels, (0, 1), value=1.0).view(1, -1, 3) @ back).view(count, height, width, 2)
    x = F.grid_sample(x, 2 * at / (size - 1) - 1, "bilinear", "reflection", align_corners=True)
    if amount:
        field = 2 * uniform(draws, 2, height, width).to(x.device) - 1
        rows, columns = (gaussian(n, sigma, 3, mirror=True).to(x.device) for n in (height, width))
        at = pixels + amount * (rows @ field @ columns.T).permute(0, 2, 3, 1)
        x = F.grid_sample(x, (2 * at + 1) / size - 1, "bilinear", "reflection", align_corners=False)
    return x


def _pixelate(x: Tensor, share: float, draws: Draws) -> Tensor:
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


def _jpeg_compression(x: Tensor, quality: int, draws: Draws) -> Tensor:
    def there_and_back(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer, formats=("JPEG",)))

    whole = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()  # on the CPU, one by one
    back = torch.from_numpy(np.stack([there_and_back(image) for image in whole]))
    return back.permute(0, 3, 1, 2).to(x.device).float() / 255


def _spatter(x: Tensor, constants: tuple[Any, ...], draws: Draws) -> Tensor:
    mean, sigma, smooth, threshold, strength, mud = constants
    liquid = blurred(mean + sigma * normal(draws, 1, *x.shape[2:]), smooth)
    if mud:
        cover = blurred((liquid > threshold).float(), strength)
        cover, colour = torch.where(cover < 0.8, 0.0, cover), (63, 42, 20)  # brown
    else:
        relief = _relief(torch.where(liquid < threshold, 0.0, liquid.clamp_max(1)))
        brightest = relief.amax((2, 3), keepdim=True).clamp_min(1e-9)
        cover, colour = strength * relief / brightest, (175, 238, 238)  # turquoise
    cover, colour = cover.to(x.device), torch.tensor(colour, device=x.device).view(3, 1, 1) / 255
    return (x * (1 - cover) if mud else x) + cover * colour


def _relief(liquid: Tensor) -> Tensor:
    """How brightly water shines, [N, 1, H, W]: its level times a relief of the distance from the edge of its drop.

    Simpler than published, where Canny finds the edges and the distances' histogram is equalised.
    """
    wet = (liquid[:, 0] > 0).numpy()
    distance = np.stack([ndimage.distance_transform_edt(image) for image in wet]).clip(max=20)
    slope = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])[None, None]  # light from one side
    padded = F.pad(_box(torch.from_numpy(distance).float().unsqueeze(1)), (1,) * 4, mode="reflect")
    return liquid * _box(F.conv2d(padded, slope).clamp_min(0))


def _box(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, 1)


CHANGES: dict[str, Callable[[Tensor, Any, Draws], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
