"""The operations one by one, with torchvision's names for them and torchvision's units.

Every public operation takes images uint8 [B, 3, H, W] and a magnitude [B], one per image on the images' device, and
returns uint8 [B, 3, H, W]. Colour jitter is brightness, contrast, color and hue; `Augment` does the first three as one
matrix (`families.colour`). The reference is torchvision.transforms.v2.functional on uint8 tensors; where AutoAugment
adds a convention of its own (shear as a slope about the top-left corner, whole pixels), AutoAugment's holds. A wrong
dtype, shape or range raises CourseError in one sentence; on CUDA the check of the range waits for the device, which
`Augment`, whose own draws need no check, never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.augment import families
from helpers.runtime import CourseError

# Every operation that a policy may draw, by family. The code of an operation is its position here.
NAMES = (
    "identity",
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *families.TONES,
    *("color", "sharpness"),
)
WARPS, TONES = range(1, 6), range(6, 13)
COLOR, SHARPNESS = 13, 14


def warp_numbers(op: Tensor, magnitude: Tensor) -> dict[str, Tensor]:
    """What `families.affine` takes, for operations [...] that are warps or not: a warp of nothing leaves an image."""
    return {NAMES[code]: magnitude * (op == code) for code in WARPS}


def within(op: Tensor, family: range) -> Tensor:
    """Whether `op` belongs to the family."""
    return (op >= families.number(family.start, op)) & (op < families.number(family.stop, op))


# What a policy applies to the images that drew it: whole levels float32 [B, 3, H, W] -> whole levels.


def warp_levels(x: Tensor, op: Tensor, magnitude: Tensor) -> Tensor:
    return families.warp(x, families.affine(warp_numbers(op, magnitude), x.shape[2:]))


def tone_levels(x: Tensor, op: Tensor, magnitude: Tensor) -> Tensor:
    """Operations [B, S], the S of an image one after the other."""
    return families.look_up(x, op - families.number(TONES.start, op), magnitude)


def color_levels(x: Tensor, factor: Tensor) -> Tensor:
    pixels = x.flatten(2)
    return torch.lerp(families.grey_of(pixels), pixels, factor.view(-1, 1, 1)).clamp_(0, 255).floor_().view(x.shape)


def sharpen_levels(x: Tensor, factor: Tensor) -> Tensor:
    return families.sharpen(x, factor).floor_()


# The public operations -----------------------------------------------------------------------------------------------


def check_images(images: Tensor) -> None:
    """Raise CourseError unless `images` is uint8 [B, 3, H, W] with H and W at least 2."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = f"a {images.dtype} tensor" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise CourseError(f"Images must be a torch.uint8 tensor with levels 0 to 255, but got {got}.")
    if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise CourseError(f"Images must have the shape [B, 3, H, W], H and W at least 2, but got {list(images.shape)}.")


def seen(value: object) -> str:
    """What somebody gave, for a sentence that refuses it: a tensor's dtype and shape, of anything else the type."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _checked(name: str, images: Tensor, magnitude: Tensor, low: float = -1e6, high: float = 1e6) -> Tensor:
    """The magnitude as float32 [B], once images and magnitude are what an operation expects."""
    check_images(images)
    if not isinstance(magnitude, Tensor) or magnitude.shape != images.shape[:1] or magnitude.is_complex():
        raise CourseError(
            f"The magnitude of {name} must be real, [{len(images)}], one per image, but got {seen(magnitude)}."
        )
    if magnitude.device != images.device:
        raise CourseError(f"The magnitude of {name} must be on {images.device}, not {magnitude.device}.")
    # Written so that NaN fails too.
    if not bool(((magnitude >= low) & (magnitude <= high)).all()):
        raise CourseError(f"The magnitude of {name} must lie in [{low:g}, {high:g}] for every image.")
    return magnitude.detach().float()


def _drawn(name: str, images: Tensor, magnitude: Tensor) -> Tensor:
    """One operation of a policy on every image."""
    op = torch.full_like(magnitude, NAMES.index(name), dtype=torch.int64)
    if name in families.TONES:
        return tone_levels(images.float(), op.unsqueeze(1), magnitude.unsqueeze(1)).to(torch.uint8)
    return warp_levels(images, op, magnitude)


def _flagged(name: str, images: Tensor) -> Tensor:
    """An operation that has no magnitude."""
    check_images(images)
    return _drawn(name, images, torch.ones(len(images), device=images.device))


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear along x about the top-left corner by a slope (0.3: three pixels in ten rows); zeros from outside."""
    return _drawn("shear_x", images, _checked("shear_x", images, magnitude))


def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear along y about the top-left corner by a slope; zeros from outside."""
    return _drawn("shear_y", images, _checked("shear_y", images, magnitude))


def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move right by whole pixels (a fraction is cut off, as in AutoAugment); zeros from outside."""
    return _drawn("translate_x", images, _checked("translate_x", images, magnitude))


def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move down by whole pixels (a fraction is cut off, as in AutoAugment); zeros from outside."""
    return _drawn("translate_y", images, _checked("translate_y", images, magnitude))


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre by degrees; zeros from outside."""
    return _drawn("rotate", images, _checked("rotate", images, magnitude))


def brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Multiply the levels by a factor >= 0 (adjust_brightness)."""
    return _drawn("brightness", images, _checked("brightness", images, magnitude, low=0))


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the mean grey by a factor >= 0 (adjust_contrast; its mean differs by half a level at most).

    So the result is within one level for factors up to 3, as for `color` and `sharpness`; beyond, that half counts
    |1 - factor| times. No policy draws a factor of 2 or more.
    """
    return _drawn("contrast", images, _checked("contrast", images, magnitude, low=0))


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the highest 0 to 8 bits of each level."""
    return _drawn("posterize", images, _checked("posterize", images, magnitude, low=0, high=8).floor())


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert the levels at or above a threshold in [0, 255]; 256 leaves all."""
    return _drawn("solarize", images, _checked("solarize", images, magnitude, low=0, high=256))


def autocontrast(images: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """Stretch each channel to 0..255; the magnitude is ignored."""
    return _flagged("autocontrast", images)


def equalize(images: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """Flatten each channel's histogram the way PIL does; the magnitude is ignored."""
    return _flagged("equalize", images)


def invert(images: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """255 minus the level; the magnitude is ignored."""
    return _flagged("invert", images)


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the grey image by a factor >= 0 (adjust_saturation; within one level for factors up to 3)."""
    factor = _checked("color", images, magnitude, low=0)
    return color_levels(images.float(), factor).to(torch.uint8)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the smoothed image by a factor >= 0 (adjust_sharpness; within one level for factors up to 3)."""
    factor = _checked("sharpness", images, magnitude, low=0)
    return sharpen_levels(images.float(), factor).to(torch.uint8)


def hue(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shift the hue by a part of the colour circle in [-0.5, 0.5] (adjust_hue)."""
    shift = _checked("hue", images, magnitude, low=-0.5, high=0.5)
    # torchvision's way back from [0, 1] to levels multiplies by just under 256 and cuts off.
    return families.turn_hue(images.float(), shift).mul_(255.999 / 255).to(torch.uint8)


def gaussian_blur(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blur with a 3x3 Gaussian of standard deviation > 0 pixels (gaussian_blur with kernel_size 3)."""
    sigma = _checked("gaussian_blur", images, magnitude, low=1e-6)
    return families.blur(images.float(), sigma).round_().to(torch.uint8)
