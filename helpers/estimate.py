"""Accuracy on a set without labels: three estimators fitted on validation images, tried where the truth is known.

No test label is used: the estimators are fitted on clean validation images and tried on distorted ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor, nn

from helpers import distort, runs
from helpers.augment import Augment
from helpers.data import ImageSet
from helpers.evaluate import load_model, predict
from helpers.recipe import Recipe

FILE = "estimates.csv"


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return _share(logits.argmax(-1) == labels)


def _certainty(logits: Tensor) -> Tensor:
    """Negative entropy of the softmax, in nats [N]."""
    return -torch.special.entr(logits.double().softmax(-1)).sum(-1)


def _confidence(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1).amax(-1)


# ------------------------------------------------------------------------------------------------- the estimators


def atc(val_logits: Tensor, val_labels: Tensor, logits: Tensor) -> float:
    """Average thresholded confidence (Garg et al. 2022, arXiv:2201.04234): share of images above a threshold.

    The threshold on the negative entropy is the one above which lie as many validation images as are right. Logits
    [N, classes] of validation and [M, classes] of the set in question; the accuracy predicted for it, in [0, 1].
    """
    right = int((val_logits.argmax(1) == val_labels).sum())
    if not right:
        return 0.0
    threshold = _certainty(val_logits).sort(descending=True).values[right - 1]
    return _share(_certainty(logits) >= threshold)


def doc(val_logits: Tensor, val_labels: Tensor, logits: Tensor) -> float:
    """Difference of confidences (Guillory et al. 2021, arXiv:2107.03315), without its regression over known shifts.

    Validation accuracy less the fall in mean confidence; arguments and result as of `atc`.
    """
    fall = float(_confidence(val_logits).mean() - _confidence(logits).mean())
    return min(max(_accuracy(val_logits, val_labels) - fall, 0.0), 1.0)


def agreement(logits: Tensor) -> float:
    """Share of images on which the first of several networks, logits [S, N, classes], says the same as each other."""
    said = logits.argmax(-1)
    return _share(said[1:] == said[0])


def agreement_on_the_line(val_logits: Tensor, val_labels: Tensor, logits: Tensor) -> float:
    """Agreement between seeds (Jiang et al. 2022, arXiv:2106.13799), on the line of Baek et al. 2022, arXiv:2206.13089.

    On a normal quantile scale, the accuracy of the first network is taken to fall from validation as far as its
    agreement with the others does: a line of slope 1, since seeds of one recipe are too alike to fit one. Logits
    [S, N, classes] and [S, M, classes] of S >= 2 networks; result as of `atc`.
    """
    least = 0.5 / max(val_logits.shape[1], logits.shape[1])  # none of N images counts as half a one: 0 has no quantile
    scale = lambda share: norm.ppf(np.clip(share, least, 1 - least))  # noqa: E731
    fall = scale(agreement(val_logits)) - scale(agreement(logits))
    return float(norm.cdf(scale(_accuracy(val_logits[0], val_labels)) - fall))


def predictions(val_logits: Tensor, val_labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Method -> accuracy predicted for the first of S networks; logits as of `agreement_on_the_line`, S >= 1."""
    found = {name: method(val_logits[0], val_labels, logits[0]) for name, method in (("ATC", atc), ("DoC", doc))}
    if len(logits) > 1:
        found["agreement"] = agreement_on_the_line(val_logits, val_labels, logits)
    return found


# ------------------------------------------------------------------------------------- tried where the truth is known


def siblings(run: runs.Run, beside: Sequence[runs.Run] | None = None) -> list[runs.Run]:
    """The run and, after it, those `beside` it that differ in nothing but the seed: by default all with weights."""

    def kind(of: runs.Run) -> tuple[Recipe, str]:  # as a recipe, in which a field younger than the run has its default
        return Recipe.from_dict(of.record["recipe"]).but(seed=0), of.record["data"]

    others = [other for other in (beside or runs.seeds(run.path.parent)) if other.path != run.path]
    return [run, *(other for other in others if kind(other) == kind(run))]


def stack(models: Sequence[nn.Module], images: Tensor, precision: str) -> Tensor:
    """Logits float32 [S, N, classes] of several networks, on the CPU."""
    return torch.stack([predict(model, images, Augment("none"), precision).cpu() for model in models])


def try_on_distortions(
    models: Sequence[nn.Module], val: ImageSet, precision: str, severities: Iterable[int] = (1, 3, 5)
) -> pd.DataFrame:
    """Each method fitted on validation images and tried on the same images distorted: one row per kind, severity,
    method.

    Columns: kind, severity, method, predicted, true (of the first network), both in [0, 1], and count. Since the images
    are the same, what the errors show is what a shift does to a method, not the luck of the draw.
    """
    clean, rows = stack(models, val.images, precision), []
    for kind, severity in itertools.product(distort.KINDS, severities):
        logits = stack(models, distort.distort(val.images, kind, severity), precision)
        true = _accuracy(logits[0], val.labels)
        rows += [
            {"kind": kind, "severity": severity, "method": method, "predicted": predicted, "true": true}
            for method, predicted in predictions(clean, val.labels, logits).items()
        ]
    return pd.DataFrame(rows).assign(count=len(val.labels))


def trials(run: runs.Run, val: ImageSet, count: int = 1_000) -> pd.DataFrame:
    """`try_on_distortions` of a run beside its siblings, on the first `count` validation images of its own split.

    Read from estimates.csv beside run.json where that is whole and of as many networks and images, else computed; and
    written there unless the run is one file, or what is there is of more networks. Without weights it is read as it is.
    For a published file those of the recorded run that it was made from are read.
    """
    path, beside = runs.folder(run) / FILE, siblings(run)
    val, kept, before = val.first(count), read(path), 0
    if kept is not None:
        before = kept.networks.max() if "networks" in kept else 1 + ("agreement" in set(kept.method))  # 2: or more
        if not run.weights.exists() or (before == len(beside) and set(kept["count"]) == {len(val.labels)}):
            return kept
    models = [load_model(sibling) for sibling in beside]
    table = try_on_distortions(models, val, run.record["recipe"]["precision"]).assign(networks=len(models))
    if run.path.is_dir() and before <= len(beside):
        runs.write_table(path, table)
    return table


def read(path: Path) -> pd.DataFrame | None:
    """A table of `trials` as it was written; None where there is none, or what is left of one."""
    try:
        table = pd.read_csv(path, dtype={"predicted": float, "true": float})
    except (OSError, ValueError):
        return None
    whole = {"kind", "severity", "method", "predicted", "true", "count"} <= set(table) and len(table)
    return table if whole and table.notna().all(axis=None) else None


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """How far each method was off in `trials`: one row per method, in order of the mean absolute error.

    Columns: method, error (mean absolute), low, high (its 95 % interval, bootstrap over kinds, since a kind's
    severities err alike), bias (mean of predicted - true), under, over (between which 95 % of predicted - true lie).
    """
    rows = []
    for method, part in table.assign(off=table.predicted - table.true).groupby("method", sort=False):
        kinds = part.off.abs().groupby(part.kind).mean().to_numpy()
        interval = _interval((kinds,), np.mean)
        under, over = np.quantile(part.off, (0.025, 0.975))
        rows.append((method, kinds.mean(), *interval, part.off.mean(), under, over))
    columns = ["method", "error", "low", "high", "bias", "under", "over"]
    return pd.DataFrame(rows, columns=columns).sort_values("error", ignore_index=True)


# ---------------------------------------------------------------------------------------------- any unlabelled set


def estimate(val_logits: Tensor, val_labels: Tensor, logits: Tensor, table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the first network on images without labels: one row per method, the one that erred least in trials
    first.

    Logits as of `predictions`, table as of `trials`. Columns: method; predicted; low, high: a 95 % interval for the
    luck of which images were drawn, here and in validation (bootstrap over images), blind to what the method gets
    wrong; error: its mean absolute error in the trials; outer_low, outer_high: low and high moved by the errors between
    which 95 % of the trials lay, an interval that holds as far as this shift is like the distortions tried.
    """
    known = errors(table)
    found = predictions(val_logits, val_labels, logits)

    def again(i: np.ndarray, j: np.ndarray) -> list[float]:
        return list(predictions(val_logits[:, i], val_labels[i], logits[:, j]).values())

    ends = zip(*_interval((np.arange(len(val_labels)), np.arange(logits.shape[1])), again, draws=200), strict=True)
    luck = dict(zip(found, ends, strict=True))
    rows = []
    for row in known[known.method.isin(found)].itertuples():
        low, high = luck[row.method]
        outer = np.clip((low - row.over, high - row.under), 0, 1)
        rows.append((row.method, found[row.method], low, high, row.error, *outer))
    columns = ["method", "predicted", "low", "high", "error", "outer_low", "outer_high"]
    return pd.DataFrame(rows, columns=columns)


def _interval(samples: tuple[np.ndarray, ...], statistic, draws: int = 2_000) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap, 95 %, of a statistic of samples drawn anew independently; seeded."""
    rng = np.random.default_rng(0)
    values = [statistic(*(rng.choice(sample, len(sample)) for sample in samples)) for _ in range(draws)]
    return tuple(np.quantile(values, (0.025, 0.975), axis=0))
