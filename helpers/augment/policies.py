"""AutoAugment for CIFAR-10, RandAugment and TrivialAugment-wide, drawn for each image of a batch.

All three are the same thing: a list of equally likely sub-policies of two slots, each slot an operation, the
probability of applying it and a magnitude whose sign is drawn. AutoAugment lists 25, RandAugment all pairs of its 14
operations at one strength, TrivialAugment its 14 operations at 31 strengths with the second slot empty.

Sources: Cubuk et al. 2019, AutoAugment, arXiv:1805.09501, table 7 (the 25 sub-policies); Cubuk et al. 2020,
RandAugment, arXiv:1909.13719; Müller and Hutter 2021, TrivialAugment, arXiv:2103.10158. Ranges and rounding of the
magnitudes are those of torchvision.transforms.v2, with which the tests compare every frequency.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from helpers.augment import ops
from helpers.augment.families import affine, compose, constant, each_its_own, number, where_it_pays

# (operation, probability, strength in 0..9), twice for each sub-policy. A strength of - means that there is none.
_CIFAR10 = """
invert 0.1 -        contrast 0.2 6
rotate 0.7 2        translate_x 0.3 9
sharpness 0.8 1     sharpness 0.9 3
shear_y 0.5 8       translate_y 0.7 9
autocontrast 0.5 -  equalize 0.9 -
shear_y 0.2 7       posterize 0.3 7
color 0.4 3         brightness 0.6 7
sharpness 0.3 9     brightness 0.7 9
equalize 0.6 -      equalize 0.5 -
contrast 0.6 7      sharpness 0.6 5
color 0.7 7         translate_x 0.5 8
equalize 0.3 -      autocontrast 0.4 -
translate_y 0.4 3   sharpness 0.2 6
brightness 0.9 6    color 0.2 8
solarize 0.5 2      invert 0.0 -
equalize 0.2 -      autocontrast 0.6 -
equalize 0.2 -      equalize 0.6 -
color 0.9 9         equalize 0.6 -
autocontrast 0.8 -  solarize 0.2 8
brightness 0.1 3    color 0.7 0
solarize 0.4 5      autocontrast 0.9 -
translate_y 0.9 9   translate_y 0.7 9
autocontrast 0.9 -  solarize 0.8 3
equalize 0.8 -      invert 0.1 -
translate_y 0.7 9   autocontrast 0.9 -
"""


_UNSEARCHED = tuple(name for name in ops.NAMES if name != "invert")  # what RandAugment and TrivialAugment choose from
_FACTORS = ("brightness", "contrast", "color", "sharpness")
POLICIES = ("autoaugment", "randaugment", "trivialaugment")


def _magnitude(name: str, strength: int, bins: int, size: tuple[int, int], wide: bool) -> tuple[float, float]:
    """An operation at one of `bins` strengths -> (base, delta): its magnitude is base + delta or base - delta.

    wide: the ranges of TrivialAugment-wide instead of AutoAugment's.
    """

    def part_of(top: float) -> float:
        # In float32 like torchvision's, whose half of 32 pixels is therefore 15.999999 and moves an image by 15.
        return torch.linspace(0, top, bins)[strength].item()

    if name.startswith("shear"):
        return 0.0, part_of(0.99 if wide else 0.3)
    if name.startswith("translate"):
        return 0.0, part_of(32 if wide else 150 / 331 * size[name == "translate_x"])
    if name == "rotate":
        return 0.0, part_of(135 if wide else 30)
    if name in _FACTORS:
        return 1.0, part_of(0.99 if wide else 0.9)
    if name == "posterize":
        return 8.0 - round(part_of(6 if wide else 4)), 0.0
    if name == "solarize":  # from the top, as torchvision counts: in float32 not the same as 1 less the part
        return 255 * torch.linspace(1, 0, bins)[strength].item(), 0.0
    return 1.0, 0.0


@cache
def sub_policies(policy: str, size: tuple[int, int]) -> tuple[tuple[tuple[str, float, float, float], ...], ...]:
    """The sub-policies for images of `size` (height, width): (operation, probability, base, delta) for two slots.

    One of them is drawn with equal probability, then each slot is applied with its own probability at magnitude
    base + delta or base - delta, in the units of `helpers.augment.ops`.
    """

    def slot(name: str, probability: float, strength: int, bins: int) -> tuple[str, float, float, float]:
        return name, probability, *_magnitude(name, strength, bins, size, wide=policy == "trivialaugment")

    if policy == "autoaugment":
        words = [line.replace("-", "0").split() for line in _CIFAR10.split("\n") if line]
        return tuple(tuple(slot(w[i], float(w[i + 1]), int(w[i + 2]), bins=10) for i in (0, 3)) for w in words)
    if policy == "randaugment":  # two operations at strength 9 of 0..30
        return tuple(product((slot(name, 1.0, 9, bins=31) for name in _UNSEARCHED), repeat=2))
    empty = ("identity", 1.0, 0.0, 0.0)
    return tuple((slot(name, 1.0, strength, bins=31), empty) for name in _UNSEARCHED for strength in range(31))


@cache
def _outcomes(policy: str, size: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """All that can be drawn, so that drawing is one reading of a table: N sub-policies and their 16 outcomes each.

    Returns thresholds [N, 4], under which a uniform number applies the first and the second slot and makes the
    first and the second magnitude base - delta; and for all outcomes, the four yes or no as binary digits: the
    operations int64 [N * 16, 2], their magnitudes float32 and the matrix of `geometry`, float64 [N * 16, 2, 3].
    """
    slots = [[(ops.NAMES.index(name), *rest) for name, *rest in pair] for pair in sub_policies(policy, size)]
    code, probability, base, delta = torch.tensor(slots, dtype=torch.float32).unsqueeze(1).unbind(-1)  # [N, 1, 2] each
    yes = torch.tensor(list(product((0.0, 1.0), repeat=4)))  # [16, 4]
    op, magnitude = (code * yes[:, :2]).long(), base + delta * (1 - 2 * yes[:, 2:])  # position 0 is the identity
    empty = op[..., :1] == 0  # a lone operation moves to the first slot: fewer images have one in the second
    op, magnitude = (torch.where(empty, slots.flip(-1), slots) for slots in (op, magnitude))
    op, magnitude = op.flatten(0, 1), magnitude.flatten(0, 1)
    thresholds = torch.cat((probability.squeeze(1), torch.full_like(probability.squeeze(1), 0.5)), dim=1)
    return tuple(table.to(device) for table in (thresholds, op, magnitude, geometry(op, magnitude, size)))


def draw(policy: str, uniform: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sub-policies for B images of `size` from uniform numbers [5, B] in [0, 1).

    Returns the operations int64 [B, 2], positions in `ops.NAMES`; their magnitudes float32 [B, 2]; and the warps that
    can be done before everything else (all of AutoAugment's) as matrices float64 [B, 2, 3].
    """
    thresholds, *outcomes = _outcomes(policy, size, uniform.device)
    sub_policy = (uniform[0] * number(len(thresholds), uniform)).long()
    yes = thresholds.index_select(0, sub_policy) > uniform[1:].T
    digits = (yes * constant((8, 4, 2, 1), uniform.device, torch.int64)).sum(1)
    outcome = digits.add_(sub_policy, alpha=16)
    return tuple(table.index_select(0, outcome) for table in outcomes)


def _pixels_read(op: Tensor) -> Tensor:
    """Whether an operation depends on the image around a pixel, or moves black: a later warp cannot overtake it."""
    return ops.within(op, ops.TONES) | (op == ops.SHARPNESS)


def geometry(op: Tensor, magnitude: Tensor, size: tuple[int, int]) -> Tensor:
    """The matrices [B, 2, 3] of the warps in both slots, the second only if nothing of the first must come before."""
    early = torch.stack((op[:, 0], op[:, 1] * ~_pixels_read(op[:, 0])), dim=1)
    return compose(*affine(ops.warp_numbers(early, magnitude), size).unbind(1))


_LEVELS = (ops.color_levels, ops.sharpen_levels)  # in the order of their codes, COLOR first


def apply(policy: str, x: Tensor, op: Tensor, magnitude: Tensor) -> Tensor:
    """All of a policy but its early warps: whole levels float32 [B, 3, H, W] -> whole levels, possibly in place.

    A tone operation of the first slot waits for one of the second, so that two tones are one lookup. Nothing can come
    between them: an image has one operation in a slot.
    """
    if policy == "trivialaugment":  # one operation an image: the second slot is empty
        op, magnitude = op[:, :1], magnitude[:, :1]
    (first, *second), (strength, *other) = op.unbind(1), magnitude.unbind(1)
    x = each_its_own(first - number(ops.COLOR, op), _LEVELS, x, strength)
    x = where_it_pays(ops.within(op, ops.TONES).any(1), ops.tone_levels, x, op, magnitude)
    if policy == "randaugment":  # the one policy that warps after a tone or a sharpening
        late = ops.within(second[0], ops.WARPS) & _pixels_read(first)
        x = where_it_pays(late, ops.warp_levels, x, *second, *other)
    return each_its_own(second[0] - number(ops.COLOR, op), _LEVELS, x, *other) if second else x
