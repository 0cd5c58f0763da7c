"""The paper's augmentation, batched on any device, with every parameter drawn for each image.

    augment = Augment("rotation_autoaugment")
    inputs = augment(images, generator)     # uint8 [B, 3, H, W] -> float32 [B, 3, H, W], normalised

The paper ("Data Preprocessing Pipeline") names random crop, flips, rotation, random erasing, AutoAugment, colour
distortion, blur and sharpness, and says in which steps they were added; it gives no magnitude, probability or order.
`Settings` decides; `Settings.scaled` makes its numbers larger or smaller together.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.augment import families, ops, policies
from helpers.augment.families import constant, number, where_it_pays
from helpers.runtime import CourseError

STAGES = ("none", "crop_flip", "erasing", "colour", "sharpness_blur", "rotation_autoaugment")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # `channel_stats` of the 50,000 training images, as a test computes again
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


# The lowest and the highest that a setting, or each of its two numbers, may be. More than 1 +- 1 would be a negative.
_LIMITS = {
    **dict.fromkeys(("flip", "sharpness_p", "blur_p", "erase_p", "erase_area"), (0, 1)),
    **dict.fromkeys(("brightness", "contrast", "saturation"), (0, 1)),
    **dict.fromkeys(("blur", "erase_ratio"), (0.001, 1000)),
    "padding": (0, 1000), "rotation": (0, 180), "hue": (0, 0.5), "sharpness": (0, 1000), "erase_tries": (1, 1000),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Every number that the paper leaves open, with the reason for the choice. CourseError for one out of range.

    The order is: crop, flip, rotation, AutoAugment, colour jitter, sharpness, blur, normalisation, erasing. Geometry
    comes first since it then is one warp; erasing last, as in the papers on both, so that nothing blurs the hole.
    As one warp, what a crop moved out of the picture and a translation moves in again is not black, as it would be in
    torchvision, one after the other: of white images through crop, flip, rotation and AutoAugment's geometry 18 % of
    the pixels end up black, there 21 %.
    """

    padding: int = 4  # He et al. 2015 for CIFAR-10; the usual RandomCrop(32, padding=4)
    flip: float = 0.5  # torchvision's default
    rotation: float = 15.0  # degrees each way: a car stays a car; no default to follow
    brightness: float = 0.2  # factors in 1 +- 0.2 and hue in +- 0.05 of a turn, half of what torchvision's
    contrast: float = 0.2  # ImageNet examples use: AutoAugment distorts colours as well
    saturation: float = 0.2
    hue: float = 0.05
    sharpness: float = 2.0  # the factor in torchvision's own example of RandomAdjustSharpness
    sharpness_p: float = 0.5  # its default
    blur: tuple[float, float] = (0.1, 1.0)  # sigma in pixels, kernel 3x3: from nothing to clearly soft
    blur_p: float = 0.5  # as for sharpness; always blurring would leave no sharp image to learn from
    erase_p: float = 0.5  # this and the next two are RandomErasing's defaults (Zhong et al. 2020)
    erase_area: tuple[float, float] = (0.02, 0.33)  # part of the image
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # height to width, uniform in the logarithm
    erase_tries: int = 10  # boxes drawn until one fits, as torchvision does; if none does, nothing is erased

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            pair, whole = isinstance(default, tuple), isinstance(default, int)
            numbers = value if pair and isinstance(value, tuple) else (value,)
            fits = len(numbers) == 1 + pair and all(
                isinstance(number, int if whole else int | float) and not isinstance(number, bool)
                and low <= number <= high for number in numbers
            )  # fmt: skip
            if not fits or numbers[0] > numbers[-1]:
                expected = "a tuple of two numbers, the smaller first," if pair else f"a {'whole ' * whole}number"
                raise CourseError(f"{name}={value!r} is out of range: expected {expected} from {low:g} to {high:g}.")

    def scaled(self, strength: float) -> Settings:
        """The same, but rotation, colours, sharpness, blur and erased area reach `strength` (0 to 2) times as far.

        Crop, flip and the probabilities stay, and so does the policy, whose magnitudes were searched for. Raises
        CourseError for another strength.
        """
        if not isinstance(strength, int | float) or not 0 <= strength <= 2:
            raise CourseError(f"strength={strength!r} is out of range: expected a number from 0 to 2.")
        reach = {name: getattr(self, name) * strength for name in ("rotation", "brightness", "contrast", "saturation")}
        low, high = self.blur
        return replace(
            self, **reach, hue=self.hue * strength, sharpness=1 + (self.sharpness - 1) * strength,
            blur=(low, low + (high - low) * strength), erase_area=tuple(part * strength for part in self.erase_area),
        )  # fmt: skip


class Drawn(NamedTuple):
    """Everything random about a batch of B images. An image's result depends on its own rows alone."""

    matrix: Tensor  # [B, 2, 3] float64: crop, flip, rotation and the policy's geometry as one warp
    op: Tensor  # [B, 2] int64: the policy's operations, positions in `ops.NAMES`
    magnitude: Tensor  # [B, 2]
    jitter: Tensor  # [B, 4]: factors of brightness, contrast and saturation; turn of the hue
    sharpened: Tensor  # [B] bool
    blurred: Tensor  # [B] bool
    sigma: Tensor  # [B] standard deviation of the blur in pixels
    box: Tensor  # [B, 4] top, left, height, width of the erased rectangle in pixels; height 0 for none


class Augment:
    """The paper's augmentation up to a stage, then normalisation.

    stage: one of STAGES, each of which adds to the one before it. Given the same generator state every stage draws
    the same numbers, so two stages differ by what the later one adds and by nothing else.
    mean, std: per channel, of images in [0, 1]; the paper uses ImageNet's.
    policy: what the last stage draws from, one of `policies.POLICIES`; the paper uses AutoAugment.

    Raises CourseError for an unknown stage or policy and for a mean or std that is not three numbers (std > 0).
    """

    def __init__(
        self,
        stage: str,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        policy: str = "autoaugment",
        settings: Settings = Settings(),
    ) -> None:
        if stage not in STAGES:
            raise CourseError(f"There is no augmentation stage {stage!r}; choose one of {', '.join(STAGES)}.")
        if policy not in policies.POLICIES:
            raise CourseError(f"There is no policy {policy!r}; choose one of {', '.join(policies.POLICIES)}.")
        try:
            fits = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
        except TypeError:  # not numbers, or one alone
            fits = False
        if not fits:
            raise CourseError(f"mean and std must be three numbers each, std positive, but got {mean} and {std}.")
        self.stage, self.policy, self.settings = stage, policy, settings
        scale, shift = (1 / (255 * s) for s in std), (-m / s for m, s in zip(mean, std, strict=True))
        self.normal = (tuple(scale), tuple(shift))
        s, unit = settings, (0.0, 1.0)
        turn = math.radians(s.rotation) if self._does("rotation_autoaugment") else 0.0
        ranges = (
            *[unit] * 5,  # the policy's
            (-turn, turn),
            (-s.flip, 1 - s.flip),  # flip where negative
            *[(-float(s.padding), s.padding + 1.0)] * 2,  # crop
            *((1 - reach, 1 + reach) for reach in (s.brightness, s.contrast, s.saturation)),
            (-s.hue, s.hue),
            s.blur,
            *[unit] * 3,  # sharpen, blur, erase or not
            *[unit] * 2,  # where to erase, from the top and from the left
            *[s.erase_area] * s.erase_tries,
            *[(math.log(s.erase_ratio[0]), math.log(s.erase_ratio[1]))] * s.erase_tries,
        )
        # Two columns with a row for each row of `draw`: the lowest number, and how far the highest lies above it.
        self.ranges = tuple((low,) for low, _ in ranges), tuple((high - low,) for low, high in ranges)
        self.chances = ((s.sharpness_p,), (s.blur_p,), (s.erase_p,))

    def __repr__(self) -> str:
        return f"Augment({self.stage!r})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment images uint8 [B, 3, H, W] -> float32 [B, 3, H, W], normalised, on the same device.

        generator: on the images' device; None is torch's global one. The same state and batch give the same result.
        Raises CourseError for images of another dtype or shape and for a generator of another device.
        """
        ops.check_images(images)
        known = isinstance(generator, torch.Generator)
        if generator is not None and not (known and generator.device.type == images.device.type):
            got = f"one on {generator.device}" if known else f"a {type(generator).__name__}"
            raise CourseError(f"The generator must be a torch.Generator on {images.device} like the images, not {got}.")
        size = (images.shape[2], images.shape[3])
        with torch.inference_mode():  # hundreds of small calls take a seventh less time without autograd's part in each
            drawn = self.draw(len(images), size, generator, images.device)
        return self.apply(images, drawn)

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator | None, device: torch.device) -> Drawn:
        """Draw for `batch` images of `size` (height, width): uniform numbers in one call, then transformed."""
        low, span = (constant(column, device) for column in self.ranges)
        u = torch.rand(len(low), batch, generator=generator, device=device).mul_(span).add_(low)
        op, magnitude, geometry = policies.draw(self.policy, u[0:5], size)
        angle, side = u[5:7].double()
        right, down = u[7:9].floor().double()
        cos, sin, mirror = angle.cos(), angle.sin(), torch.ones_like(side).copysign_(side)
        rows = (mirror * cos, mirror.neg_().mul_(sin), right, sin, cos, down)
        matrix = torch.stack(rows, dim=1).view(batch, 2, 3)
        if self._does("rotation_autoaugment"):
            matrix = families.compose(matrix, geometry)
        sharpened, blurred, erased = u[14:17] < constant(self.chances, device)
        box = self._draw_box(u[17:], erased, size)
        return Drawn(matrix, op, magnitude, u[9:13].T, sharpened, blurred, u[13], box)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """The deterministic half: images uint8 [B, 3, H, W] and what was drawn for them -> float32 [B, 3, H, W]."""
        result = torch.empty(images.shape, device=images.device)  # made here: autograd takes nothing made below
        device = images.device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)  # bfloat16 has no room for 256 levels
        with torch.inference_mode(), torch.autocast(device, enabled=False) if cast else nullcontext():
            x = images.float()
            if self._does("crop_flip"):
                x = families.warp(x, drawn.matrix)
            if self._does("rotation_autoaugment"):
                x = policies.apply(self.policy, x, drawn.op, drawn.magnitude)
            if self._does("colour"):
                brightness, contrast, saturation, hue = drawn.jitter.unbind(1)
                x = families.turn_hue(families.colour(x, brightness, contrast, saturation).round_(), hue)
            if self._does("sharpness_blur"):
                factor = constant((self.settings.sharpness,), x.device)
                x = where_it_pays(drawn.sharpened, partial(families.sharpen, factor=factor), x)
                x = where_it_pays(drawn.blurred, families.blur, x, drawn.sigma)
            scale, shift = constant(self.normal, x.device).view(2, 3, 1, 1)
            torch.add(x.mul_(scale), shift, out=result)
            if self._does("erasing"):
                result.mul_(families.outside(drawn.box, images.shape[2:]))
        return result

    def _does(self, stage: str) -> bool:
        return STAGES.index(self.stage) >= STAGES.index(stage)

    def _draw_box(self, u: Tensor, erased: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [B, 4] to erase, the first of several tries that fits, as torchvision's RandomErasing draws them."""
        limit = constant(((size[0],), (size[1],)), u.device)
        start, area, ratio = u.split_with_sizes((2, self.settings.erase_tries, self.settings.erase_tries))
        area, ratio = area * number(size[0] * size[1], u), ratio.exp()
        sides = torch.stack((area * ratio, area / ratio), dim=1).sqrt_().round_()  # [tries, 2, B]: height and width
        fits = (sides < limit).all(1).logical_and_(erased)
        so_far = fits.cumsum(0)
        first = fits & (so_far == number(1, so_far))
        sides = (sides * first.unsqueeze(1)).sum(0)
        start = (limit - sides).add_(number(1, u)).mul_(start).floor_()
        return torch.cat((start, sides)).T


def channel_stats(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of a set uint8 [N, 3, H, W], of pixels in [0, 1].

    The deviation is that over all pixels of the set. ImageNet's well-known one is smaller than that would be: it is
    probably the mean over single images (pytorch/vision, pull request 1965).
    Raises CourseError for images of another dtype or shape, and for an empty set.
    """
    ops.check_images(images)
    if len(images) == 0:
        raise CourseError("An empty set of images has no mean and standard deviation.")
    chunks = (chunk.double().div_(255) for chunk in images.split(1000))
    sums = sum(torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3)))) for x in chunks)
    mean, square = sums / (images.numel() / 3)
    return tuple(mean.tolist()), tuple((square - mean**2).clamp_min(0).sqrt().tolist())
