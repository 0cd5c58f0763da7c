"""Mixup on a batch: images and targets blended with the same weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixed(NamedTuple):
    """images float [B, 3, H, W]; two classes int64 [B] for each image; lam [B], the weight of the first, in [0, 1]."""

    images: Tensor
    targets_a: Tensor
    targets_b: Tensor
    lam: Tensor


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator | None = None) -> Mixed:
    """Blend each image with a partner drawn from the batch (Zhang et al. 2017, eq. 1): lam * a + (1 - lam) * b.

    One lam ~ Beta(alpha, alpha) for the batch, as the authors' code draws it; alpha = 0 leaves the batch as it is.
    """
    batch, dev = len(images), images.device
    if alpha == 0:
        return Mixed(images, targets, targets, torch.ones(batch, device=dev))
    # A Dirichlet over two classes is a Beta, and its sampler takes a generator where torch's Beta does not.
    lam = torch._sample_dirichlet(torch.full((2,), alpha, dtype=torch.float64, device=dev), generator)[0].float()
    partner = torch.randperm(batch, generator=generator, device=dev)
    return Mixed(torch.lerp(images[partner], images, lam), targets, targets[partner], lam.expand(batch))


def mixed_cross_entropy(logits: Tensor, mixed: Mixed) -> Tensor:
    """Mean over the batch of lam * CE(logits, a) + (1 - lam) * CE(logits, b): cross-entropy with the mixed target."""
    a = F.cross_entropy(logits, mixed.targets_a, reduction="none")
    b = F.cross_entropy(logits, mixed.targets_b, reduction="none")
    return torch.lerp(b, a, mixed.lam).mean()


def mixed_correct(logits: Tensor, mixed: Mixed) -> Tensor:
    """Sum over the batch of lam * correct(a) + (1 - lam) * correct(b): what training accuracy counts under Mixup."""
    predicted = logits.argmax(1)
    return torch.lerp((predicted == mixed.targets_b).float(), (predicted == mixed.targets_a).float(), mixed.lam).sum()
