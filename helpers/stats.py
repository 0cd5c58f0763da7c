"""What seeds and test images allow to say: intervals over seeds, differences between recipes, McNemar.

All accuracies are shares in [0, 1]; all intervals are 95 %. An interval over seeds is about training again, one over
images (Wilson: `helpers.evaluate.share`) about other test images under the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
from scipy.stats import binom
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import DescrStatsW

from helpers.runtime import CourseError

LEVEL = 0.05  # of a test, and one less the coverage of an interval
INSIDE = "inside the noise"
ONE_SEED = "one seed: nothing can be said"
GRID = 1e-8 / 12  # variance by rounding to a share of 10,000 images: gaps that come out equal are not without noise
VERDICTS = ("higher", "lower", INSIDE, ONE_SEED)


def images_noise(accuracy: float, count: int = 10_000) -> float:
    """Standard deviation of an accuracy over other test sets of `count` images, under the same weights: binomial."""
    return float(binom.std(count, accuracy) / count)


def seeds_noise(accuracy: float, count: int = 10_000) -> float:
    """Standard deviation of an accuracy over seeds that Jordan 2023 (arXiv:2304.01910) expects of a calibrated
    ensemble, on the same `count` test images: the square root of error / (2 count).
    """
    return float(np.sqrt((1 - accuracy) / (2 * count)))


def over_seeds(table: pd.DataFrame, value: str = "test_accuracy", by: str = "recipe", count: int = 10_000
               ) -> pd.DataFrame:  # fmt: skip
    """Mean over the seeds of each recipe with its t interval: one row per recipe, in the order of first appearance.

    table: one row per run, as runs.load() gives it. Columns: `by`, seeds, mean, std (of one run), low, high, lowest,
    highest, and the standard deviation to expect of one run: images_noise (binomial), seeds_noise (Jordan 2023), on
    `count` images. Of one seed std, low and high are NaN, and `note` says so.
    """
    rows, table = [], table if len(table) else pd.DataFrame(columns=[by, value])  # an empty store has no columns
    for name, values in table.dropna(subset=[value]).groupby(by, sort=False)[value]:
        mean, many = float(values.mean()), len(values) > 1
        found = DescrStatsW(values.to_numpy(float))
        low, high = found.tconfint_mean(LEVEL) if many else (np.nan, np.nan)
        rows.append({
            by: name, "seeds": len(values), "mean": mean, "std": found.std_ddof(1) if many else np.nan,
            "low": float(low), "high": float(high), "lowest": values.min(), "highest": values.max(),
            "images_noise": images_noise(mean, count), "seeds_noise": seeds_noise(mean, count),
            "note": "" if many else "one seed: no interval over seeds",
        })  # fmt: skip
    columns = [by, "seeds", "mean", "std", "low", "high", "lowest", "highest", "images_noise", "seeds_noise", "note"]
    return pd.DataFrame(rows, columns=columns)


def steps(table: pd.DataFrame, order: Sequence[str], value: str = "test_accuracy", by: str = "recipe") -> pd.DataFrame:
    """Each recipe in `order` less the one before it, paired by seed: one row per step between two that were run.

    By least squares an accuracy is the sum of a recipe's share, a seed's and an error, as wide for one recipe as for
    another: so all recipes of the table tell how far chance reaches, where three seeds of two would tell next to
    nothing. Of two recipes alone that is the paired t test.

    Columns: before, after, seeds (that both have), difference, low, high (t interval), p (t test), p_holm (corrected
    for the number of rows), verdict. With one seed all but the difference is NaN.
    """
    wide = _by_seed(table, order, value, by)
    return _differences(wide, pairwise(wide.columns))


def against(table: pd.DataFrame, base: str, order: Sequence[str], value: str = "test_accuracy", by: str = "recipe"
            ) -> pd.DataFrame:  # fmt: skip
    """Each recipe in `order` less `base`, paired by seed: a row each that was run, columns as those of `steps`."""
    wide = _by_seed(table, order, value, by)
    return _differences(wide, [(base, name) for name in wide.columns if name != base and base in wide.columns])


def _by_seed(table: pd.DataFrame, order: Sequence[str], value: str, by: str) -> pd.DataFrame:
    """One row per seed, one column per recipe in order; without those that were not run."""
    if table.empty:
        return pd.DataFrame()
    if table.duplicated([by, "seed"]).any():
        raise CourseError(f"Two rows have one {by} and seed: give each run once.")
    if "recipe" in table and table.duplicated(["recipe", "seed"]).any():
        raise CourseError(f"One run stands under two names of {by}, and would count double: give each run once.")
    order = list(order)
    if len(set(order)) < len(order):
        raise CourseError(f"The order {order} names one {by} twice, whose runs would count double: name each once.")
    wide = table.pivot(index="seed", columns=by, values=value).astype(float)
    return wide.reindex(columns=order).dropna(axis=1, how="all")


def _differences(wide: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    wide = wide[wide.notna().sum(axis=1) > 1]  # a seed of one recipe alone sets it against nothing
    runs = wide.rename_axis("seed").melt(ignore_index=False, var_name="recipe").dropna().reset_index()
    shares = pd.get_dummies(runs["recipe"], dtype=float)
    seeds = pd.get_dummies(runs["seed"], dtype=float, drop_first=True)
    fit = OLS(runs["value"], shares.join(seeds)).fit() if len(runs) else None
    rows = []
    for before, after in pairs:
        both = len(wide[[before, after]].dropna())
        if not both:
            continue
        contrast = [float(name == after) - float(name == before) for name in fit.params.index]
        gap, low, high, p = float(contrast @ fit.params), np.nan, np.nan, np.nan
        if fit.df_resid and both > 1:
            test = fit.t_test(contrast, cov_p=fit.normalized_cov_params * max(fit.scale, GRID))
            (low, high), p = test.conf_int(LEVEL)[0], float(test.pvalue)
        rows.append((before, after, both, gap, float(low), float(high), p))
    found = pd.DataFrame(rows, columns=["before", "after", "seeds", "difference", "low", "high", "p"])
    found["p_holm"] = holm(found["p"])
    found["verdict"] = [verdict(*row) for row in found[["difference", "p_holm"]].itertuples(index=False)]
    return found


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values corrected for their number (Holm 1979); NaN, a test that was not made, stays NaN and does not count.

    Not statsmodels' `multipletests`, which collects garbage at every call: in a notebook most of a second.
    """
    p = np.asarray(list(p), float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is sorted last
    p[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return p


def verdict(difference: float, p: float) -> str:
    """What may be said of a difference: "higher" or "lower" where p is below 5 %, else "inside the noise"."""
    if np.isnan(p):
        return ONE_SEED
    if p >= LEVEL:
        return INSIDE
    return "higher" if difference > 0 else "lower"


def checkpoints(right: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """McNemar's exact test between the weights of each two runs on the same images: one row per pair.

    right: name -> bool [N], which images it gets right (`helpers.evaluate.correct_on_test`). Columns: first, second,
    only_first, only_second (images that only the one gets right), difference (accuracy of the second less the first's),
    p, p_holm, verdict. It is about these two sets of weights; another seed of either recipe may say otherwise. Raises
    CourseError unless all are of the same images.
    """
    rows = []
    shapes = {np.shape(each) for each in right.values()}
    if len(shapes) != 1 or (0,) in shapes:
        raise CourseError("These runs were tested on different images, or on none: compare those tested on the same.")
    for (first, a), (second, b) in combinations(right.items(), 2):
        counts = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
        rows.append((first, second, counts[0, 1], counts[1, 0], (counts[1, 0] - counts[0, 1]) / len(a),
                     float(mcnemar(counts, exact=True).pvalue)))  # fmt: skip
    found = pd.DataFrame(rows, columns=["first", "second", "only_first", "only_second", "difference", "p"])
    found["p_holm"] = holm(found["p"])
    return found.assign(verdict=[verdict(*row) for row in found[["difference", "p_holm"]].itertuples(index=False)])
