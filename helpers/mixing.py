"""Mixup and CutMix on a batch: two images and their two classes become one example.

Sources: Zhang et al. 2017, mixup, arXiv:1710.09412, equation 1; Yun et al. 2019, CutMix, arXiv:1905.04899, equations 1
and 2. The paper of this course uses Mixup and leaves alpha open. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.augment.families import constant, outside
from helpers.augment.ops import seen
from helpers.runtime import CourseError

LEAST_ALPHA = 0.01  # below it both gammas behind a Beta underflow float64, and lambda comes out as 1/2


class Mixed(NamedTuple):
    """A mixed batch: image i is worth lam[i] of class targets_a[i] and 1 - lam[i] of class targets_b[i]."""

    images: Tensor  # [B, C, H, W] floating point
    targets_a: Tensor  # [B] int64
    targets_b: Tensor  # [B] int64
    lam: Tensor  # [B] float32 in [0, 1]; all the same where one was drawn for the batch


def mixup(
    images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator | None = None, per_image: bool = False
) -> Mixed:
    """lam * images + (1 - lam) * the same images in another order, lam from Beta(alpha, alpha).

    images floating point [B, C, H, W]; targets int64 [B]; alpha 0 is no mixing and draws nothing, else it is at least
    LEAST_ALPHA. generator on the images' device. per_image draws a lam for each image, otherwise the batch shares one,
    as in the Mixup paper. Raises CourseError for another dtype, shape or range.
    """
    if _off(images, targets, alpha):
        return Mixed(images, targets, targets, torch.ones(len(images), device=images.device))
    lam = beta(alpha, len(images) if per_image else 1, generator, images.device).repeat(1 if per_image else len(images))
    return _blend(images, targets, lam, lam.view(-1, 1, 1, 1).to(images.dtype), generator)


def cutmix(
    images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator | None = None, per_image: bool = False
) -> Mixed:
    """A rectangle of each image comes from the same images in another order; lam is the area that is left.

    The rectangle covers 1 - Beta(alpha, alpha) of the image around a uniform centre and is cut off at the edge, so lam
    is counted from the pixels. Arguments, errors and `per_image` (a rectangle for each image) as for `mixup`.
    """
    if _off(images, targets, alpha):
        return Mixed(images, targets, targets, torch.ones(len(images), device=images.device))
    draws = len(images) if per_image else 1
    side = (1 - beta(alpha, draws, generator, images.device)).sqrt()
    centre = torch.rand(2, draws, generator=generator, device=images.device)
    edges = []
    for n, c in zip(images.shape[2:], centre, strict=True):
        half, middle = (side * n).floor_().div_(2).floor_(), (c * n).floor_()
        edges.append(((middle - half).clamp_(min=0), (middle + half).clamp_(max=n)))
    (top, bottom), (left, right) = edges
    keep = outside(torch.stack((top, left, bottom - top, right - left), dim=1), images.shape[2:])
    lam = keep.mean((1, 2, 3)).repeat(1 if per_image else len(images))
    return _blend(images, targets, lam, keep.to(images.dtype), generator)


def mix(
    images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator | None = None
) -> Mixed:
    """What a recipe asks for: Mixup, CutMix, neither (alpha 0), or either with probability 1/2 for the whole batch."""
    if cutmix_alpha == 0:
        return mixup(images, targets, mixup_alpha, generator)
    cut = cutmix(images, targets, cutmix_alpha, generator)
    if mixup_alpha == 0:
        return cut
    blended = mixup(images, targets, mixup_alpha, generator)
    heads = torch.rand((), generator=generator, device=images.device) < 0.5
    return Mixed(*(torch.where(heads, ours, theirs) for ours, theirs in zip(cut, blended, strict=True)))


def beta(alpha: float, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """n draws from Beta(alpha, alpha), float32 [n] on `device`.

    torch.distributions.Beta takes no generator. Beta(a, b) is the first part of Dirichlet(a, b), whose sampler does;
    in float64, since for a small alpha both gammas behind it would often underflow float32.
    """
    both = constant((alpha, alpha), device, torch.float64).expand(n, 2)
    return torch._sample_dirichlet(both, generator)[:, 0].float()


def mixed_cross_entropy(logits: Tensor, mixed: Mixed, label_smoothing: float = 0.0) -> Tensor:
    """lam * cross-entropy with targets_a + (1 - lam) * cross-entropy with targets_b, averaged over logits [B, classes].

    This equals the cross-entropy with the mixed one-hot targets of the Mixup paper, since it is linear in the target.
    """
    a, b = (
        F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        for targets in (mixed.targets_a, mixed.targets_b)
    )
    return torch.lerp(b, a, mixed.lam.to(a.dtype)).mean()


def mixed_correct(logits: Tensor, mixed: Mixed) -> Tensor:
    """Sum over the batch of lam * correct(a) + (1 - lam) * correct(b): what training accuracy counts under mixing.

    A 0-dimensional tensor in [0, B], not yet on the host. The paper does not say how it counts.
    """
    predicted = logits.argmax(1)
    a, b = ((predicted == targets).float() for targets in (mixed.targets_a, mixed.targets_b))
    return torch.lerp(b, a, mixed.lam).sum()


def _off(images: Tensor, targets: Tensor, alpha: float) -> bool:
    """Whether there is nothing to mix, once the arguments are what they should be."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise CourseError(f"Mixing takes float images [B, C, H, W], but got {seen(images)}.")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        raise CourseError(f"Mixing takes targets int64 [{len(images)}], one per image, but got {seen(targets)}.")
    if not isinstance(alpha, Real) or not (alpha == 0 or LEAST_ALPHA <= alpha < math.inf):
        raise CourseError(f"alpha must be 0 for no mixing, or a number of at least {LEAST_ALPHA}, but got {alpha}.")
    return alpha == 0 or len(images) == 0


def _blend(images: Tensor, targets: Tensor, lam: Tensor, keep: Tensor, generator: torch.Generator | None) -> Mixed:
    """`keep` of the images and 1 - keep of their partners. Sorting noise permutes without waiting for the device."""
    partner = torch.rand(len(images), generator=generator, device=images.device).argsort()
    return Mixed(torch.lerp(images[partner], images, keep), targets, targets[partner], lam)
