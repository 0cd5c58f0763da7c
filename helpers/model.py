"""The network of the paper: SEBlock, BasicBlock, SEResNet."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from helpers.runtime import CourseError

SE_PLACEMENTS = ("standard", "pre", "post", "identity")


class SEBlock(nn.Module):
    """Squeeze-and-excitation: weigh each channel by what the whole image says about it (Hu et al. 2018, eq. 2-4).

    [B, C, H, W] -> the same shape. `reduction` must divide `channels`; the paper leaves it open, 16 is Hu's default.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        if not isinstance(reduction, Integral) or reduction < 1 or channels % reduction:
            raise CourseError(
                f"A reduction of {reduction} does not divide {channels} channels: choose a divisor, "
                "such as 2, 4, 8 or 16, that divides the width of every stage."
            )
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean(dim=(2, 3))
        weights = torch.sigmoid(self.fc2(torch.relu(self.fc1(squeezed))))
        return x * weights[:, :, None, None]


class Dropout(nn.Dropout):
    """While training, sets a random share `p` of its input to 0 and scales the rest up. [B, ...] -> the same.

    shape: what is drawn for each image, a number for every thing that may be dropped: (channels,) for single numbers,
    (1, 1, 1) for all of them at once, which at the end of a branch is stochastic depth (Huang et al. 2016). Those drawn
    by `draw` serve until `drawn` is None again: a pass compiled as one graph cannot ask a generator, and two passes
    over the same images may want the same mask. Without them every pass draws from torch's own state.
    """

    def __init__(self, p: float, *shape: int):
        super().__init__(p)
        self.shape = shape
        self.drawn: Tensor | None = None

    def draw(self, batch: int, generator: torch.Generator) -> None:
        """Uniform numbers in [0, 1) for `batch` images, float32 [batch, *shape], on the generator's device."""
        self.drawn = torch.rand(batch, *self.shape, device=generator.device, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        drawn = torch.rand(len(x), *self.shape, device=x.device) if self.drawn is None else self.drawn
        return x * (drawn >= self.p) / (1 - self.p)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an SE block beside a skip connection (He et al. 2015, fig. 5; Hu et al. 2018, fig. 3).

    [B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]. A `reduction` of 0 leaves the SE block out;
    `drop_path` is the probability with which the branch is left out while training. `se_placement` is where the SE
    block sits (Hu et al. 2018, fig. 5): at the end of the branch ("standard"), at its beginning ("pre"), after the sum
    ("post") or on the skip connection ("identity").
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, reduction: int = 16, drop_path: float = 0.0,
        se_placement: str = "standard",
    ):  # fmt: skip
        super().__init__()
        if se_placement not in SE_PLACEMENTS:
            raise CourseError(f"se_placement={se_placement!r} is unknown: expected one of {', '.join(SE_PLACEMENTS)}.")
        self.se_placement = se_placement
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        seen = in_channels if se_placement == "pre" else out_channels
        self.se = SEBlock(seen, reduction) if reduction else nn.Identity()
        self.drop_path = Dropout(drop_path, 1, 1, 1)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        where, skip = self.se_placement, self.downsample(x)
        out = torch.relu_(self.bn1(self.conv1(self.se(x) if where == "pre" else x)))
        out = self.bn2(self.conv2(out))
        out = self.drop_path(self.se(out) if where == "standard" else out)
        out = torch.relu_(out + (self.se(skip) if where == "identity" else skip))
        return self.se(out) if where == "post" else out


class SEResNet(nn.Module):
    """The paper's network: stem, one stage per entry of `blocks`, pooled head. 4,698,028 parameters by default.

    Images float [B, 3, H, W], normalised, H and W at least 8 -> logits [B, num_classes]. The first stage is `width`
    wide at full resolution, or at half of it with a `stem_stride` of 2; each further one doubles the width and halves
    the resolution. A `reduction` of 0 is a network without SE; `se_placement` is that of `BasicBlock`. `drop_path` is
    that of the last of several blocks; it grows from block to block in equal steps from 0 (Huang et al. 2016, section
    3; the paper of this course has none).
    Weights: He normal with variance 2 / n_in as the paper writes it, biases 0, batch norm 1 and 0.
    Raises CourseError for an impossible shape, naming the range that holds.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 4, 3),
        width: int = 32,
        reduction: int = 16,
        dropout: float = 0.5,
        num_classes: int = 10,
        drop_path: float = 0.0,
        se_placement: str = "standard",
        stem_stride: int = 1,
    ):
        super().__init__()
        whole = isinstance(blocks, Sequence) and all(
            isinstance(n, Integral) for n in (*blocks, width, reduction, num_classes)
        )
        if not whole or not 1 <= len(blocks) <= 4 or min(blocks) < 1:
            raise CourseError(
                f"blocks={blocks}, width={width}, reduction={reduction}, num_classes={num_classes} is not a network: "
                "give whole numbers, and 1 to 4 stages of 1 or more blocks."
            )
        if stem_stride not in (1, 2):
            raise CourseError(f"stem_stride={stem_stride} is not a network: expected 1 or 2.")
        if width < 1 or num_classes < 2 or not (0 <= dropout < 1 and 0 <= drop_path < 1):
            raise CourseError(
                f"width={width}, num_classes={num_classes}, dropout={dropout}, drop_path={drop_path} is not a network: "
                "width is at least 1, num_classes at least 2, dropout in [0, 1), drop_path in [0, 1)."
            )
        stem = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        stages, channels, steps = [], width, max(sum(blocks) - 1, 1)
        rates = iter([drop_path * block / steps for block in range(sum(blocks))])
        for i, depth in enumerate(blocks):
            out = width * 2**i
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            sizes = [channels] + [out] * (depth - 1)
            shapes = zip(sizes, strides, strict=True)
            made = (BasicBlock(c, out, s, reduction, next(rates), se_placement) for c, s in shapes)
            stages.append(nn.Sequential(*made))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = Dropout(dropout, channels)
        self.fc = nn.Linear(channels, num_classes)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 8:
            raise CourseError(
                f"The network got a tensor of shape {list(x.shape)}: expected [B, 3, H, W] with H and W at least 8."
            )
        return self.fc(self.dropout(self.pool(self.stages(self.stem(x))).flatten(1)))


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in a module: what the competition's limit of 5,000,000 counts."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
