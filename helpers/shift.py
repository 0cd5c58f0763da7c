"""What differs between two sets of images, without labels or a network: measures, spectra, kinds of damage, twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from scipy.stats import ks_2samp
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits
from torch import Tensor

from helpers.distort import KINDS, SEVERITIES, checked, distort
from helpers.distort.parts import grey_of
from helpers.runtime import CourseError

MEASURES = {
    "red": "mean of the red channel, 0 to 1",
    "green": "mean of the green channel",
    "blue": "mean of the blue channel",
    "red_std": "standard deviation of the red channel",
    "green_std": "standard deviation of the green channel",
    "blue_std": "standard deviation of the blue channel",
    "brightness": "mean of the grey image, 0 to 1",
    "contrast": "standard deviation of the grey image",
    "saturation": "mean S of HSV",
    "sharpness": "variance of the grey image's Laplacian",
    "noise": "standard deviation of pixel noise: median absolute residual (Donoho 1994) of Immerkaer's mask (1996)",
    "extremes": "share of values that are exactly 0 or 255",
    "repeats": "share of neighbours in a row that are exactly equal",
    "blocks": "mean step from left to right across the borders of 8 x 8 blocks over the mean step elsewhere",
    "letter_boxed": "1 if two opposite edges (or all four) are bars of one colour with a straight end, else 0",
    "near_grey": "1 if the channels differ by less than 4 levels on average, else 0",
    "near_constant": "1 if the contrast is below 0.05, else 0",
}
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
_HIGH_PASS = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))


def measures(images: Tensor) -> pd.DataFrame:
    """One row per image of uint8 [N, 3, H, W], one column per measure (see MEASURES); no labels and no network are
    needed.
    """
    checked(images)
    parts = [_measure(part) for part in images.split(2_000) if len(part)]
    return pd.DataFrame(np.concatenate(parts) if parts else np.empty((0, len(MEASURES))), columns=list(MEASURES))


def _residual(x: Tensor) -> Tensor:
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), torch.tensor(_HIGH_PASS, device=x.device)[None, None])


def _measure(images: Tensor) -> np.ndarray:
    x = images.float() / 255
    grey, top, chroma = grey_of(x), x.amax(1), x.amax(1) - x.amin(1)
    laplacian = F.conv2d(grey, torch.tensor(_LAPLACIAN, device=x.device)[None, None])
    step = (x[..., 1:] - x[..., :-1]).abs()
    border = torch.arange(1, x.shape[3], device=x.device) % 8 == 0
    contrast = grey.std((1, 2, 3))
    columns = (
        *x.mean((2, 3)).T,
        *x.std((2, 3)).T,
        grey.mean((1, 2, 3)),
        contrast,
        (chroma / top.clamp_min(1e-9)).mean((1, 2)),
        laplacian.var((1, 2, 3)),
        _residual(x).view(len(x), -1).abs().median(1).values / (6 * 0.6745),  # 0.6745: the median of |N(0, 1)|
        ((images == 0) | (images == 255)).float().mean((1, 2, 3)),
        (step == 0).float().mean((1, 2, 3)),
        (step[..., border].mean((1, 2, 3)) + 1e-3) / (step[..., ~border].mean((1, 2, 3)) + 1e-3),
        _barred(x) | _barred(x.transpose(2, 3)),
        chroma.mean((1, 2)) < 4 / 255,
        contrast < 0.05,
    )
    return torch.stack([column.float() for column in columns], 1).double().cpu().numpy()


def _barred(x: Tensor) -> Tensor:
    """Whether rows at top and bottom have one colour each, and the first other row differs along half of its length."""
    level = 8 / 255  # as far as one colour may differ

    def bar(x: Tensor) -> Tensor:
        colour = x[:, :, :1].median(3, keepdim=True).values
        off = (x - colour).abs().amax(1)  # [N, H, W]
        height = ((off.amax(2) < level).cumprod(1)).sum(1)
        after = off.gather(1, height.clamp_max(x.shape[2] - 1).view(-1, 1, 1).expand(-1, 1, x.shape[3])).squeeze(1)
        return (height > 0) & (height < x.shape[2]) & ((after > 2 * level).float().mean(1) > 0.5)

    return bar(x) & bar(x.flip(2))


# ------------------------------------------------------------------------------------------- differences of two sets


def _resample(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Column means [resamples, M] of values [N, M] drawn N at a time with replacement: Efron's bootstrap (1979)."""
    count = len(values)
    draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples))
    return np.stack([weights.astype(float) @ values for weights in draws]) / count


def _at_least(count: int, *sets: Tensor) -> None:
    for images in sets:
        checked(images)
    if min(map(len, sets)) < count:
        found = " and ".join(str(len(images)) for images in sets)
        raise CourseError(f"Got {found} images: expected at least {count}{' in each set' * (len(sets) > 1)}.")


def shift(reference: Tensor, other: Tensor, resamples: int = 1_000, seed: int = 0) -> pd.DataFrame:
    """How far the measures of one set of images lie from another's: one row per measure, both sets uint8 [N, 3, H, W].

    Columns: the two means; `difference`, that of the means in units of the reference's standard deviation, with `low`
    and `high`, its 95 % interval (percentile bootstrap: images of both sets drawn anew, the unit kept); `ks`, the
    Kolmogorov-Smirnov statistic, the largest gap between the two cumulative distributions, 0 to 1; and `p`, its p-value
    for one measure looked at alone. A measure that is constant in the reference has no unit: the difference is 0 or not
    a number. Raises CourseError for fewer than two images.
    """
    _at_least(2, reference, other)
    a, b, rng = measures(reference), measures(other), np.random.default_rng(seed)
    spread, gap = a.std(), b.mean() - a.mean()
    unit = spread.where(spread > 1e-9)
    gaps = _resample(b.to_numpy(), resamples, rng) - _resample(a.to_numpy(), resamples, rng)
    low, high = np.quantile(gaps, (0.025, 0.975), axis=0)
    tests = [ks_2samp(a[name], b[name], method="asymp") for name in a]
    table = pd.DataFrame({"reference": a.mean(), "other": b.mean(), "difference": (gap / unit).where(gap != 0, 0.0)})
    table = table.assign(low=low / unit, high=high / unit)
    return table.assign(ks=[float(test.statistic) for test in tests], p=[float(test.pvalue) for test in tests])


def _ring_power(images: Tensor) -> Tensor:
    """Power [N, W / 2] of the grey image at 1 .. W / 2 cycles across it; white noise of variance v has v everywhere but
    at 1, where the mean that is taken away before the window costs about a fifteenth."""
    grey = grey_of(images.float() / 255).squeeze(1)
    window = torch.outer(*(torch.hann_window(size, device=images.device) for size in grey.shape[1:]))
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window
    power = torch.fft.fft2(grey).abs() ** 2 / (window**2).sum()
    ky, kx = (torch.fft.fftfreq(size, device=images.device) for size in grey.shape[1:])
    ring = (torch.hypot(ky[:, None], kx) * images.shape[3]).round().long().flatten()
    inside = (ring > 0) & (ring <= images.shape[3] // 2)
    total = torch.zeros(len(images), images.shape[3] // 2, device=images.device)
    total = total.index_add_(1, ring[inside] - 1, power.flatten(1)[:, inside])
    return total / torch.bincount(ring[inside] - 1)


def spectrum(images: Tensor, resamples: int = 1_000, seed: int = 0) -> pd.DataFrame:
    """Radial power spectrum of uint8 [N, 3, H, W]: one row per spatial frequency, from coarse to fine.

    Columns: frequency in cycles a pixel (0.5 is the finest), power (mean over the images of the grey image's squared
    Fourier amplitude in a ring, Hann window after Welch 1967, in squared grey levels of 0 to 1: noise of variance v has
    v at every frequency but the coarsest, which has a fifteenth less), low and high (95 %, percentile bootstrap over
    the images).
    """
    _at_least(2, images)
    power = np.concatenate([_ring_power(part).double().cpu().numpy() for part in images.split(2_000)])
    low, high = np.quantile(_resample(power, resamples, np.random.default_rng(seed)), (0.025, 0.975), axis=0)
    frequency = np.arange(1, power.shape[1] + 1) / images.shape[3]
    return pd.DataFrame({"frequency": frequency, "power": power.mean(0), "low": low, "high": high})


class Apart(NamedTuple):
    """The area under the ROC curve of a classifier that tells two sets apart, with its 95 % interval."""

    auc: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}]"


def told_apart(a: Tensor, b: Tensor, resamples: int = 1_000, seed: int = 0) -> Apart:
    """The classifier two-sample test (Lopez-Paz and Oquab 2017) of two sets uint8 [N, 3, H, W].

    Gradient-boosted trees on features of each image are asked which set it is from, five-fold, each image by trees that
    have not seen it. The AUC is the chance that an image of `b` looks more like `b` than one of `a` does: 0.5 means
    that these features cannot tell the sets apart, 1 that they always can. Interval: percentile bootstrap over the
    images, with the trees as they are. The sets must hold different images: of one image clean and distorted, each
    would give the other's side away. Raises CourseError for fewer than 25 images on a side: four fifths of them must
    be enough for a tree to part, which leaves 20 on each side of a cut.
    """
    _at_least(25, a, b)
    if a.shape[2:] != b.shape[2:]:
        raise CourseError(f"Got images {list(a.shape)} and {list(b.shape)}: expected both sets of one size.")
    x, y = np.concatenate((_features(a), _features(b))), np.repeat((0, 1), (len(a), len(b)))
    folds = list(StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y))
    with _one_thread():
        scores = cross_val_predict(_trees(seed), x, y, cv=folds, method="predict_proba")[:, 1]
    for _, fold in folds:  # the scores of one fold's trees are not those of another's: compare by rank within each
        scores[fold] = pd.Series(scores[fold]).rank(pct=True)
    places, place = np.unique(scores, return_inverse=True)
    rng = np.random.default_rng(seed)

    def auc(first: np.ndarray, second: np.ndarray) -> float:
        below, above = (np.bincount(part, minlength=len(places)).astype(float) for part in (first, second))
        return float((below.cumsum() - below / 2) @ above / (below.sum() * above.sum()))

    first, second = place[: len(a)], place[len(a) :]
    drawn = [auc(rng.choice(first, len(first)), rng.choice(second, len(second))) for _ in range(resamples)]
    return Apart(auc(first, second), *map(float, np.quantile(drawn, (0.025, 0.975))))


def _one_thread() -> threadpool_limits:
    """For the trees: their threads wait for each other at every cut, and where another program has one of the cores
    several take two to three times as long as one; alone on two cores they would save a third."""
    return threadpool_limits(1, user_api="openmp")


def _trees(seed: int) -> HistGradientBoostingClassifier:
    return HistGradientBoostingClassifier(
        learning_rate=0.1, max_iter=60, max_leaf_nodes=15, early_stopping=False, random_state=seed
    )


def _features(images: Tensor) -> np.ndarray:
    """What the trees see of each image: its measures, its spectrum, and how the finest detail is spread."""
    parts = [np.concatenate((_measure(part), _detail(part)), 1) for part in images.split(2_000)]
    return np.concatenate(parts)


def _detail(images: Tensor) -> np.ndarray:
    x = images.float() / 255
    fine = _residual(x).view(len(x), 3, x.shape[2] - 2, x.shape[3] - 2)
    inner, size = x[..., 1:-1, 1:-1], fine.abs().mean((1, 2, 3)) + 1e-4
    red, green, blue = (F.normalize(fine[:, c].flatten(1), dim=1) for c in range(3))
    dark = inner < inner.flatten(1).median(1).values.view(-1, 1, 1, 1)
    down, along = (x.diff(dim=dim).abs().mean((1, 2, 3)) + 1e-4 for dim in (2, 3))
    falling, rising = (
        (x[..., 1:, a] - x[..., :-1, b]).abs().mean((1, 2, 3)) + 1e-4
        for a, b in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None)))
    )
    columns = (
        *(_ring_power(images) + 1e-7).log().T,
        *torch.quantile(x.flatten(1), torch.tensor([0.01, 0.05, 0.5, 0.95, 0.99], device=x.device), dim=1),
        (red * green).sum(1),  # noise is its own in each channel, detail is not
        (green * blue).sum(1),
        (fine.abs() * dark).sum((1, 2, 3)) / (dark.sum((1, 2, 3)) + 1) / size,  # shot and speckle spare the dark
        fine.abs().amax((1, 2, 3)) / size,
        fine.square().mean((1, 2, 3)).sqrt() / size,  # few large values, as salt and pepper has
        (down / along).log(),  # which way a streak runs
        (falling / rising).log(),
        (falling * rising / (down * along)).log(),
        ((x - x.mean(1, keepdim=True)).diff(dim=3).abs().mean((1, 2, 3)) + 1e-4).log(),  # colour is first to go in JPEG
        size.log(),
    )
    return torch.stack(columns, 1).double().cpu().numpy()


# --------------------------------------------------------------------------------------------- which kind of damage


@dataclass(frozen=True)
class KindFinder:
    """Trees that know the kinds of helpers.distort, with what they take for what.

    `confusion`: one row per true kind ("clean" first, then KINDS), a column what it was taken for, in shares of the
    row, counted on images that the trees had not seen, as many of each severity.
    """

    model: HistGradientBoostingClassifier
    confusion: pd.DataFrame
    tested: int  # images a row

    def shares(self, images: Tensor, resamples: int = 200, seed: int = 0) -> pd.DataFrame:
        """How much of each kind a set uint8 [N, 3, H, W] seems to hold: one row per kind, columns share, low, high,
        taken.

        `taken` is the share of images that the trees take for the kind. `share` corrects it: the mix of rows of the
        confusion, none negative, whose sum comes nearest to `taken` (black-box shift estimation, Lipton et al. 2018, by
        non-negative least squares). Interval: 95 %, percentile bootstrap over these images and those behind the
        confusion, if severities 1 to 5 are as frequent here as there: a set of mild damage alone seems partly clean.
        Other damage, or two kinds at once, is given to the kinds it resembles.
        """
        _at_least(1, images)
        if (features := _features(images)).shape[1] != self.model.n_features_in_:
            raise CourseError(f"Got images {list(images.shape)}: expected the size of those that taught the kinds.")
        rng, names = np.random.default_rng(seed), list(self.confusion)
        with _one_thread():
            found = np.searchsorted(self.model.classes_, self.model.predict(features))
        taken = np.bincount(found, minlength=len(names)) / len(found)
        rows = self.confusion.to_numpy()

        def solve(rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
            weights, _ = nnls(rows.T, taken)
            return weights / weights.sum() if weights.any() else taken  # of kinds that no row explains

        drawn = [
            solve(
                np.stack([rng.multinomial(self.tested, row / row.sum()) for row in rows]) / self.tested,
                rng.multinomial(len(found), taken) / len(found),
            )
            for _ in range(resamples)
        ]
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        share = solve(rows, taken)
        columns = {"share": share, "low": np.minimum(low, share), "high": np.maximum(high, share), "taken": taken}
        return pd.DataFrame(columns, names).rename_axis("kind")


def learn_kinds(clean: Tensor, count: int = 1_000, seed: int = 0) -> KindFinder:
    """Teach trees the kinds of helpers.distort on clean images uint8 [N, 3, H, W], which should be training images.

    `count` images of each kind, a fifth at each severity, teach; half as many others, of other images, fill the
    confusion. Raises CourseError for fewer than ten images, or a count below ten; with fewer than 1.5 * count images,
    some are used again.
    """
    _at_least(10, clean)
    if count < 10:
        raise CourseError(f"count={count} is out of range: expected at least 10, so that each severity is seen.")
    rng, names = np.random.default_rng(seed), ["clean", *KINDS]
    order = rng.permutation(len(clean))
    learn, test = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]

    def examples(pool: np.ndarray, count: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for kind in names:
            images = clean[torch.from_numpy(rng.choice(pool, count, replace=count > len(pool)))]
            if kind != "clean":
                each = zip(images.tensor_split(len(SEVERITIES)), SEVERITIES, strict=True)
                images = torch.cat([distort(part, kind, severity, seed + key) for part, severity in each])
            parts.append(_features(images))
        return np.concatenate(parts), np.repeat(np.arange(len(names)), count)

    x, y = examples(learn, count, 1)
    tried, truth = examples(test, count // 2, 2)
    with _one_thread():
        model = _trees(seed).fit(x, y)
        taken = model.predict(tried)
    confusion = pd.crosstab(truth, taken, normalize="index").reindex(columns=range(len(names)), fill_value=0.0)
    return KindFinder(model, pd.DataFrame(confusion.to_numpy(), names, names), count // 2)


# ---------------------------------------------------------------------------------------------------- near-duplicates


def near_duplicates(a: Tensor, b: Tensor, furthest: float = 0.2) -> pd.DataFrame:
    """Pairs of images, one of each set uint8 [N, 3, 32, 32], that show the same picture: the closest first.

    Columns: index_a, index_b, distance, mirrored. The ten images of `a` nearest to each image of `b`, and to its mirror
    image, are found by the correlation of 8 x 8 thumbnails; their distance is 1 minus the highest normalised
    cross-correlation of all pixels but a margin of three, over shifts of up to four pixels, after the mean of a 9 x 9
    neighbourhood is taken away. So copies with other brightness, contrast or colour balance are near (0: the same),
    unrelated pictures far (about 1); without the margin, all pictures in frames would be twins. The likest two are also
    compared with either one enlarged, up to 1.3 times and along one axis or both. Pictures without detail have no
    distance and are left out; a picture that was turned may be missed.

    On CIFAR-10's training against test images the default finds twins of 242 of the 263 test images that Barz and
    Denzler (2020) list as near-duplicates, and of 332 that they do not, most of them the same picture to our eyes; from
    0.2 on, silhouettes on an empty sky or sea pass for twins too. A set against itself pairs each image with itself.
    Raises CourseError for an empty set and for images of another size.
    """
    _at_least(1, a, b)
    if {a.shape[2:], b.shape[2:]} != {(32, 32)}:
        raise CourseError(f"Got images {list(a.shape)} and {list(b.shape)}: expected [N, 3, 32, 32].")
    thumbnails, count = torch.cat([_thumbnail(part) for part in a.split(2_000)]), min(10, len(a))
    index = torch.empty(2, count, len(b), dtype=torch.long, device=b.device)
    peak = torch.empty(index.shape, device=b.device)
    for columns in torch.arange(len(b), device=b.device).split(100):
        for mirrored, view in enumerate((b[columns], b[columns].flip(3))):
            index[mirrored][:, columns] = near = (thumbnails @ _thumbnail(view).T).topk(count, 0).indices
            match = _likeness(a[near.flatten()], view).view(near.shape)
            likest, rows = match.topk(min(2, count), 0)
            ours = a[near.gather(0, rows).flatten()]
            zoomed = [
                _likeness(*pair) for zoom in _ZOOMS for pair in ((_zoom(ours, zoom), view), (ours, _zoom(view, zoom)))
            ]
            match.scatter_(0, rows, torch.stack([likest.flatten(), *zoomed]).amax(0).view(likest.shape))
            peak[mirrored][:, columns] = match
    mirrored, place, index_b = (peak >= 1 - furthest).nonzero().T
    columns = index[mirrored, place, index_b], index_b, (1 - peak[mirrored, place, index_b]).clamp_min(0), mirrored > 0
    names = "index_a", "index_b", "distance", "mirrored"
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in zip(names, columns, strict=True)})
    return table.sort_values([*names[2:], *names[:2]]).drop_duplicates(["index_a", "index_b"]).reset_index(drop=True)


_ZOOMS = ((1.15, 1.15), (1.3, 1.3), (1.15, 1.0), (1.0, 1.15))  # of height and width
_REACH, _MARGIN, _PADDED = 4, 3, 40  # pixels; padded beyond size and reach, so that no shift wraps around


def _thumbnail(images: Tensor) -> Tensor:
    small = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True))


def _zoom(images: Tensor, zoom: tuple[float, float]) -> Tensor:
    """The middle of the enlarged images, at their own size."""
    size = [round(side * z) for side, z in zip(images.shape[2:], zoom, strict=True)]
    top, left = ((new - old) // 2 for new, old in zip(size, images.shape[2:], strict=True))
    grown = F.interpolate(images.float(), size, mode="bilinear")
    return grown[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def _likeness(a: Tensor, b: Tensor) -> Tensor:
    """Highest normalised cross-correlation [k * N] of k times N images with N others, each k with the same one."""
    which = torch.arange(len(b), device=b.device).repeat(len(a) // len(b))
    ours, theirs = _correlable(a), [part[which] for part in _correlable(b)]
    cross, energy = _at_shifts((ours[0].conj() * theirs[0]).sum(1)), ours[1] * theirs[2]
    return (cross / energy.clamp_min(1e-4).sqrt()).flatten(1).amax(1)


def _at_shifts(spectra: Tensor) -> Tensor:
    at = torch.arange(-_REACH, _REACH + 1, device=spectra.device)
    return torch.fft.irfft2(spectra, s=(_PADDED, _PADDED))[:, at][:, :, at]


def _correlable(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spectra [N, 3, ...] of the detail; its energy [N, 9, 9] in the overlap, as the first and as the second image."""
    x = images.float() / 255
    x = (x - F.avg_pool2d(F.pad(x, (4,) * 4, mode="reflect"), 9, 1))[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    parts = x, x.square().sum(1), torch.ones_like(x[0, 0])
    detail, energy, ones = (torch.fft.rfft2(part, s=(_PADDED, _PADDED)) for part in parts)
    return detail, _at_shifts(energy.conj() * ones), _at_shifts(ones.conj() * energy)
