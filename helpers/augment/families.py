"""The five families that every operation belongs to: warp, lookup table, colour matrix, filter, mask.

Each function takes a batch and one set of numbers per image, and costs a handful of kernels whatever the batch holds.
Between the families pixels travel as float32 *levels* in [0, 255]; nothing here draws random numbers.

No function waits for the device or builds a tensor from a Python list twice (see `constant`), so on CUDA all of them
can be captured in a graph after one warm-up call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601 luma with the digits that torchvision uses
LEVELS = tuple(range(256))
HALF = 0.5  # torchvision floors each grey pixel; half a level is what that takes on average


@cache
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A small constant, numbers or rows of them, on a device, copied there once.

    A copy per call would stall CUDA and break graph capture.
    """
    with torch.inference_mode(False):  # autograd may meet it too, whoever asks for it first
        return torch.tensor(values, dtype=dtype, device=device)


def number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor [1] that meets `like`.

    On the CPU a batch costs hundreds of small calls, and most of them take three times as long with a Python number,
    since torch makes a tensor of it each time.
    """
    return constant((value,), like.device, like.dtype)


@cache
def centred(count: int, device: torch.device) -> Tensor:
    """The places of `count` pixels in a row, from their middle: float32 [count]."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.float32, device=device) - (count - 1) / 2


def as_index(levels: Tensor) -> Tensor:
    """Whole levels as int64, which `gather` wants. By way of int32, which is quicker than from float32 at once."""
    return levels.int().long()


def grey_of(levels: Tensor) -> Tensor:
    """What torchvision's grey of levels [B, 3, N] is on average: [B, 1, N]. No matrix product: autocast would round."""
    return (levels * constant(GREY, levels.device).unsqueeze(1)).sum(1, keepdim=True).sub_(number(HALF, levels))


def where_it_pays(needed: Tensor, operation: Callable[..., Tensor], x: Tensor, *numbers: Tensor) -> Tensor:
    """`operation(x, *numbers)` for the images that `needed` (bool [B]) names, the others unchanged.

    On the CPU only those images are computed, and written back into `x`. Elsewhere a selection would wait for the
    device to say how many there are, so all are computed and the result is chosen. An image's result is the same.
    The operation may work in place: it gets a copy either way.
    """
    if x.device.type != "cpu":
        return torch.where(needed.view(-1, *[1] * (x.dim() - 1)), operation(x.clone(), *numbers), x)
    rows = needed.nonzero().squeeze(1)
    if len(rows) == 0:
        return x
    chosen = operation(x.index_select(0, rows), *(n.index_select(0, rows) for n in numbers))
    return x.index_copy_(0, rows, chosen)


def each_its_own(which: Tensor, operations: Iterable[Callable[..., Tensor]], x: Tensor, *numbers: Tensor) -> Tensor:
    """`where_it_pays` for several operations, of which an image has at most one: `which` int64 [B] is its position.

    An image with any other number is unchanged. On the CPU the images are sorted by operation, once for all of them.
    """
    operations = tuple(operations)
    if x.device.type != "cpu":
        for position, operation in enumerate(operations):
            x = where_it_pays(which == position, operation, x, *numbers)
        return x
    codes = which.numpy()  # numpy sorts and counts so few in a third of torch's time
    rows = codes.argsort()
    edges = codes[rows].searchsorted(np.arange(len(operations) + 1)).tolist()
    counts = [end - start for start, end in pairwise(edges)]
    if sum(counts) == 0:
        return x
    rows = torch.from_numpy(rows[edges[0] : edges[-1]])
    parts = zip(*(n.index_select(0, rows).split_with_sizes(counts) for n in (x, *numbers)), strict=True)
    changed = [operation(*part) for operation, part, count in zip(operations, parts, counts, strict=True) if count]
    return x.index_copy_(0, rows, torch.cat(changed))


# Warp ----------------------------------------------------------------------------------------------------------------


def affine(numbers: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Matrices [..., 2, 3] (float64) from output to source, in pixels from the image's centre, x right and y down.

    numbers, [...] each: rotate in degrees counter-clockwise, shear_x and shear_y as slopes about the top-left corner,
    translate_x and translate_y in whole pixels right and down (a fraction is cut off). Of rotation and the shears one
    may differ from 0; `compose` joins several. Source: torchvision's rotate and affine, whose conventions these are.
    """
    height, width = size
    angle = numbers["rotate"].double().deg2rad()
    cos, sin = angle.cos(), angle.sin()
    right, down = numbers["translate_x"].trunc(), numbers["translate_y"].trunc()
    x, y = numbers["shear_x"].double(), numbers["shear_y"].double()
    rows = (cos, x - sin, x * (height / 2) - right, y + sin, cos, y * (width / 2) - down)
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The one matrix [..., 2, 3] that does `outer` to the image first and `inner` to the result."""
    both = outer[..., :2] @ inner
    both.select(-1, 2).add_(outer.select(-1, 2))
    return both


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Nearest-neighbour resampling of x [B, C, H, W] (any dtype) by `matrix` [B, 2, 3]; zeros from outside.

    The coordinates and their roundings are those of torchvision's affine grid, so that a point exactly between two
    pixels, where rounding decides, goes to the same one.
    """
    height, width = x.shape[2:]
    half = constant((width / 2, height / 2), x.device).unsqueeze(1)
    across, down = centred(width, x.device), centred(height, x.device).unsqueeze(1)
    a, b, c = (matrix.float() / half)[..., None, None].unbind(2)  # each [B, 2, 1, 1]
    grid = (a * across + b * down).add_(c)  # [B, 2, H, W] in [-1, 1]
    return F.grid_sample(x.float(), grid.permute(0, 2, 3, 1), mode="nearest", align_corners=False).to(x.dtype)


# Lookup table --------------------------------------------------------------------------------------------------------
#
# A tone operation maps levels to levels, so it is done on a table of 256 entries per image and channel instead of on
# the pixels: table [B, 3, 256] holds what each level has become so far, occurs [B, 3, 256] how often each level occurs
# in the image. Both together say everything about the image after the operations so far that a tone operation may
# ask for, its extremes, mean and histogram, so any number of tone operations costs one reading of the pixels.


def _brightness(table: Tensor, occurs: Tensor, factor: Tensor) -> Tensor:
    return (table * factor).clamp_(max=255).floor_()


def _contrast(table: Tensor, occurs: Tensor, factor: Tensor) -> Tensor:
    grey = grey_of((occurs * table).sum(2, keepdim=True) / occurs.sum(2, keepdim=True))
    return torch.lerp(grey, table, factor).clamp_(0, 255).floor_()


def _posterize(table: Tensor, occurs: Tensor, bits: Tensor) -> Tensor:
    width = torch.sub(number(8, bits), bits).exp2_()
    return (table / width).floor_().mul_(width)


def _solarize(table: Tensor, occurs: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(table >= threshold, _invert(table), table)


def _autocontrast(table: Tensor, occurs: Tensor, _: Tensor) -> Tensor:
    present = occurs.bool()
    darkest = torch.where(present, table, number(255, table)).amin(2, keepdim=True)
    spread = torch.where(present, table, number(0, table)).amax(2, keepdim=True).sub_(darkest)
    stretched = (table - darkest).div_(spread.mul_(number(1 / 255, spread))).clamp_(0, 255).floor_()
    return torch.where(spread.bool(), stretched, table)


def _equalize(_: Tensor, occurs: Tensor, magnitude: Tensor) -> Tensor:
    """The table of the first operation, which meets an untouched image: no other asks how often its levels occur."""
    level = constant(LEVELS, occurs.device)
    below = occurs.cumsum(2).sub_(occurs)
    most = torch.where(occurs.bool(), below, number(0, occurs)).amax(2, keepdim=True)
    step = most.div_(number(255, occurs)).floor_()  # most: all pixels but those of the brightest level
    spread = below.add_((step * number(0.5, step)).floor_()).div_(step).floor_().clamp_(max=255)
    return torch.where(step.bool(), spread, level)  # too few levels to spread: left alone


def _equalize_later(table: Tensor, occurs: Tensor, magnitude: Tensor) -> Tensor:
    level = as_index(table)
    return _equalize(table, histogram(level, occurs), magnitude).gather(2, level)


def _invert(table: Tensor, *_: Tensor) -> Tensor:
    return torch.sub(number(255, table), table)


TONES = {
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
}


def histogram(levels: Tensor, counts: Tensor) -> Tensor:
    """How often each of 256 levels occurs: int64 [B, 3, N], each counted `counts` times -> float32 [B, 3, 256]."""
    return levels.new_zeros((*levels.shape[:2], 256), dtype=torch.float32).scatter_add_(2, levels, counts)


def look_up(x: Tensor, tones: Tensor, magnitudes: Tensor) -> Tensor:
    """Tone operations one after the other in a single lookup: levels [B, 3, H, W] -> levels.

    tones int64 [B, S]: for each image S positions in TONES, any other number for none. magnitudes [B, S] in
    torchvision's units. Sources: torchvision.transforms.v2.functional; PIL.ImageOps for equalize.
    """
    level = as_index(x.flatten(2))
    occurs = histogram(level, number(1, x).expand(level.shape))
    table = constant(LEVELS, x.device).expand(occurs.shape).contiguous()
    operations = TONES
    for tone, magnitude in zip(tones.unbind(1), magnitudes.unbind(1), strict=True):
        table = each_its_own(tone, operations.values(), table, occurs, magnitude.view(-1, 1, 1))
        operations = TONES | {"equalize": _equalize_later}
    return table.gather(2, level).view(x.shape)


# Colour matrix -------------------------------------------------------------------------------------------------------


def colour(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation as one 3x3 matrix and an offset per image; factors [B], 1 neutral.

    Levels [B, 3, H, W] -> levels, clipped once at the end: a highlight that brightness pushes past 255 and contrast
    brings back is not lost on the way.
    """
    pixels = x.flatten(2)
    grey = constant(GREY, x.device)
    as_it_is = constant(((1, 0, 0), (0, 1, 0), (0, 0, 1)), x.device)
    brightness, contrast, saturation = (factor.view(-1, 1, 1) for factor in (brightness, contrast, saturation))
    gain = brightness * contrast
    mix = torch.lerp(grey, as_it_is, saturation).mul_(gain)
    faded = torch.sub(number(1, x), saturation)
    offset = (brightness - gain).mul_(grey_of(pixels.mean(2, keepdim=True))).sub_(faded, alpha=HALF)
    return torch.baddbmm(offset, mix, pixels).clamp_(0, 255).view(x.shape)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue shifted by `turn` [B] (in turns, -0.5 to 0.5), saturation and value of HSV kept.

    Whole levels -> levels; `x` is written over.

    With whole levels, min(most - r, 1) is 0 where red is the largest channel and 1 elsewhere: interpolating with it
    selects without a comparison, which is several times dearer on the CPU than arithmetic.
    """
    r, g, b = x.unbind(1)
    most, least = x.amax(1), x.amin(1)
    chroma = most - least
    green = (b - r).add_(chroma, alpha=2)
    blue = (r - g).add_(chroma, alpha=4)
    not_red, not_green = (most.unsqueeze(1) - x[:, :2]).clamp_(max=1).unbind(1)
    hue = (g - b).lerp_(green.lerp_(blue, not_green), not_red)
    chroma.mul_(number(6, x))
    hue.div_(chroma.clamp(min=1))
    # A channel is full within 1/6 turn of its own hue, gone beyond 1/3, and linear in between.
    home = constant((0.0, -1 / 3, 1 / 3), x.device)
    away = hue.unsqueeze(1) + (turn.unsqueeze(1) + home).view(-1, 3, 1, 1)
    away.sub_(torch.round(away, out=x)).abs_().clamp_(1 / 6, 1 / 3)
    full = least.add_(chroma, alpha=1 / 3)  # chroma is six times itself by now
    return torch.addcmul(full.unsqueeze(1), away, chroma.unsqueeze(1), value=-1, out=x)


# Filter --------------------------------------------------------------------------------------------------------------


def smooth(x: Tensor, side: Tensor | None = None) -> Tensor:
    """The kernel (side, 1, side), side [B, 1, 1] or else 1, along both axes, without padding: a view [B, 3, H-2, W-2].

    The rows lie end to end as one long row, along which torch is several times as fast as along many short ones. Values
    around a seam mix the ends of two rows; they would belong to the border, which is left out.
    """
    width = x.shape[3]
    x = x.flatten(2)
    for step in (width, 1):
        before, here, after = x.unfold(2, x.shape[2] - 2 * step, step).unbind(2)
        sides = before + after
        x = (sides if side is None else sides.mul_(side)).add_(here)
    total = number(9, x) if side is None else torch.add(number(1, x), side, alpha=2).square_()
    return x.div_(total).unfold(2, width - 2, width)


def sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) or towards (< 1) the 3x3 mean with centre weight 5 of 13; the border stays. In place."""
    if min(x.shape[2:]) > 2:
        inner = x.narrow(2, 1, x.shape[2] - 2).narrow(3, 1, x.shape[3] - 2)
        inner.lerp_(smooth(x), (factor - number(1, x)).mul_(number(-9 / 13, x)).view(-1, 1, 1, 1))
    return x.clamp_(0, 255)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a 3x3 kernel and mirrored borders, standard deviation `sigma` [B] in pixels."""
    side = number(-0.5, x).div(sigma.square()).exp_().view(-1, 1, 1)
    return smooth(F.pad(x, (1, 1, 1, 1), mode="reflect"), side)


# Mask ----------------------------------------------------------------------------------------------------------------


def outside(box: Tensor, size: tuple[int, int]) -> Tensor:
    """1 outside and 0 inside each image's box [B, 4] (top, left, height, width): float32 [B, 1, H, W]."""
    place = constant(tuple(range(max(size))), box.device)
    start, length = box.unsqueeze(2).split_with_sizes((2, 2), dim=1)
    down, right = ((place < start) | (place >= start + length)).float().unbind(1)
    return torch.maximum(down.narrow(1, 0, size[0]).unsqueeze(2), right.narrow(1, 0, size[1]).unsqueeze(1)).unsqueeze(1)
