"""Statistics against scipy and statsmodels called directly, and against cases small enough for a pencil."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests

from helpers import stats
from helpers.runtime import CourseError

G = np.random.default_rng(7)


def table(**values) -> pd.DataFrame:
    """One row per run, from recipe -> test accuracies by seed."""
    return pd.DataFrame([{"recipe": name, "seed": seed, "test_accuracy": value} for name, found in values.items()
                         for seed, value in enumerate(found)])  # fmt: skip


def test_the_interval_over_seeds_is_scipys():
    runs = table(b=G.normal(0.9, 0.01, 5), a=G.normal(0.8, 0.02, 3))
    found = stats.over_seeds(runs).set_index("recipe")
    assert list(found.index) == ["b", "a"], "in the order given"
    for name, values in runs.groupby("recipe").test_accuracy:
        interval = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low[name], found.high[name]) == pytest.approx(tuple(interval))
        assert found["mean"][name] == pytest.approx(values.mean()) and found["std"][name] == pytest.approx(values.std())
        assert (found.lowest[name], found.highest[name], found.seeds[name]) == (values.min(), values.max(), len(values))
        assert found.note[name] == ""


def test_an_interval_by_pencil():
    """Two seeds: t of one degree of freedom is 12.706, the standard error half the distance."""
    found = stats.over_seeds(table(a=[0.5, 0.6])).iloc[0]
    assert (found.low, found.high) == pytest.approx((0.55 - 12.7062 * 0.05, 0.55 + 12.7062 * 0.05), abs=1e-5)


@pytest.mark.filterwarnings("error")
def test_one_seed_has_no_interval_and_says_so():
    found = stats.over_seeds(table(a=[0.7], b=[0.7, 0.8])).iloc[0]
    assert found["mean"] == 0.7 and np.isnan([found["std"], found.low, found.high]).all()
    assert found.note == "one seed: no interval over seeds"
    step = stats.steps(table(a=[0.7], b=[0.6]), ["a", "b"]).iloc[0]
    assert step.difference == pytest.approx(-0.1) and step.seeds == 1
    assert np.isnan([step.low, step.high, step.p, step.p_holm]).all() and step.verdict == stats.ONE_SEED


def test_runs_without_a_value_do_not_count():
    found = stats.over_seeds(table(a=[0.7, np.nan, 0.8], b=[np.nan]))
    assert list(found.recipe) == ["a"] and found.seeds[0] == 2
    assert stats.over_seeds(table(b=[np.nan])).empty


def test_the_noise_to_expect():
    """At the paper's accuracy: 0.2 points over images, 0.14 over seeds; both shrink with the root of the count."""
    p = 0.9594
    assert stats.images_noise(p) == pytest.approx(math.sqrt(p * (1 - p) / 10_000))
    assert stats.images_noise(p) == pytest.approx((G.binomial(10_000, p, 200_000) / 10_000).std(), rel=0.02)
    assert stats.seeds_noise(p) == pytest.approx(math.sqrt(0.0406 / 20_000))
    assert stats.seeds_noise(p, 40_000) == pytest.approx(stats.seeds_noise(p) / 2)
    found = stats.over_seeds(table(a=[p, p]), count=1_000).iloc[0]
    assert (found.images_noise, found.seeds_noise) == (stats.images_noise(p, 1_000), stats.seeds_noise(p, 1_000))


def test_of_two_recipes_a_step_is_the_paired_t_test():
    base = G.normal(0.8, 0.02, 5)  # the seeds differ by more than the recipes: what pairing takes out
    runs = table(a=base, b=base + 0.01 + G.normal(0, 0.003, 5))
    (step,), (less,) = stats.steps(runs, "ab").itertuples(), stats.against(runs, "b", "ab").itertuples()
    a, b = (runs.test_accuracy[runs.recipe == name].to_numpy() for name in "ab")
    expected = scipy_stats.ttest_rel(b, a)
    assert (step.p, step.low, step.high) == pytest.approx((expected.pvalue, *expected.confidence_interval(0.95)))
    assert step.difference == pytest.approx((b - a).mean()) and step.seeds == 5 and step.p_holm == step.p
    assert (less.difference, less.low, less.p) == pytest.approx((-step.difference, -step.high, step.p))


@pytest.mark.parametrize("left_out", [(), (("b", 0), ("d", 3), ("d", 4))])
def test_all_recipes_of_a_table_tell_how_far_chance_reaches(left_out):
    """Against statsmodels' two-way analysis of variance, written as a formula; also where some seeds were not run."""
    base = G.normal(0.8, 0.02, 5)
    levels = {"a": 0, "b": 0.05, "c": 0.051, "d": 0.02}
    runs = table(**{name: base + level + G.normal(0, 0.003, 5) for name, level in levels.items()})
    runs = runs[[(row.recipe, row.seed) not in left_out for row in runs.itertuples()]]
    fit = ols("test_accuracy ~ 0 + C(recipe) + C(seed)", runs).fit()
    for found, pairs in (
        (stats.steps(runs.sample(frac=1, random_state=0), list(levels)), ["ab", "bc", "cd"]),
        (stats.against(runs, "b", ["a", "b", "never run", "c", "d"]), ["ba", "bc", "bd"]),
    ):
        assert (found.before + found.after).tolist() == pairs
        for row in found.itertuples():
            expected = fit.t_test(f"C(recipe)[{row.after}] - C(recipe)[{row.before}] = 0")
            assert (row.difference, row.p) == pytest.approx((float(expected.effect[0]), float(expected.pvalue)))
            assert (row.low, row.high) == pytest.approx(tuple(expected.conf_int(0.05)[0]))
        np.testing.assert_allclose(found.p_holm, multipletests(found.p, method="holm")[1])
        words = [stats.INSIDE if p >= 0.05 else "higher" if gap > 0 else "lower"
                 for gap, p in zip(found.difference, found.p_holm, strict=True)]  # fmt: skip
        assert list(found.verdict) == words and "lower" in words and stats.INSIDE in words
    assert stats.against(runs, "gone", ["a", "b"]).empty


def test_only_seeds_that_both_have_are_compared_and_rungs_not_run_are_passed_over():
    runs = pd.concat([table(a=[0.5, 0.6, 0.7], c=[0.6, 0.71]), table(e=[0.4]).assign(seed=9)])
    found = stats.steps(runs, ["a", "b", "c", "d", "e"])
    assert found[["before", "after", "seeds"]].to_numpy().tolist() == [["a", "c", 2]], "c and e share no seed"
    assert found.difference[0] == pytest.approx((0.1 + 0.11) / 2)
    assert stats.steps(runs, ["a"]).empty


@pytest.mark.filterwarnings("error")
def test_runs_that_agree_exactly_are_no_evidence():
    (same,) = stats.steps(table(a=[0.5, 0.6, 0.7], b=[0.5, 0.6, 0.7]), "ab").itertuples()
    assert (same.p, same.verdict) == (pytest.approx(1.0), stats.INSIDE)


def test_holm_by_pencil():
    np.testing.assert_allclose(stats.holm([0.03, np.nan, 0.01, 0.04]), [0.06, np.nan, 0.03, 0.06])
    assert np.isnan(stats.holm([np.nan])).all() and len(stats.holm([])) == 0


def test_a_verdict_is_that_of_the_corrected_p():
    """Two differences that would each pass alone, and both fail as two of two; and the same of two of three pairs."""
    steps = stats.steps(table(a=[0.8, 0.809, 0.819], b=[0.801, 0.82, 0.828], c=[0.811, 0.824, 0.833]), "abc")
    six = np.arange(20) < 6
    pairs = stats.checkpoints({"none": six & False, "six": six, "same": six & False})
    assert pairs.p[0] == 2 * 0.5**6
    for found in (steps, pairs):
        assert (found.p < 0.05).sum() == 2 and set(found.verdict) == {stats.INSIDE}


def test_what_is_compared_need_not_be_called_recipe():
    runs = table(a=[0.5, 0.6], b=[0.6, 0.7])
    found = stats.steps(runs.rename(columns={"recipe": "policy"}), "ab", by="policy")
    pd.testing.assert_frame_equal(found, stats.steps(runs, "ab"))
    with pytest.raises(CourseError, match="Two rows have one policy and seed"):
        stats.steps(pd.concat([runs, runs]).rename(columns={"recipe": "policy"}), "ab", by="policy")


@pytest.mark.parametrize(
    ("case", "said"),
    [((0.02, 0.001), "higher"), ((-0.02, 0.001), "lower"), ((0.02, 0.05), stats.INSIDE), ((-0.02, 0.2), stats.INSIDE),
     ((0.02, math.nan), stats.ONE_SEED)],
)  # fmt: skip
def test_the_verdict(case, said):
    assert stats.verdict(*case) == said


def test_mcnemar_counts_the_images_that_only_one_gets_right():
    a = G.random(2_000) < 0.7
    right = {"a": a, "b": a ^ (G.random(2_000) < 0.02), "c": a & (G.random(2_000) < 0.95)}
    found = stats.checkpoints(right)
    assert list(zip(found["first"], found["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in found.itertuples():
        x, y = right[row.first], right[row.second]
        only_x, only_y = int((x & ~y).sum()), int((y & ~x).sum())
        assert (row.only_first, row.only_second) == (only_x, only_y)
        assert row.p == pytest.approx(scipy_stats.binomtest(only_x, only_x + only_y).pvalue)
        assert row.difference == pytest.approx(y.mean() - x.mean())
    np.testing.assert_allclose(found.p_holm, multipletests(found.p, method="holm")[1])
    assert found.verdict[1] == "lower", "c gets nothing right that a does not"


def test_mcnemar_by_pencil_and_without_disagreement():
    a = np.array([True] * 5 + [False] * 3)
    found = stats.checkpoints({"a": a, "none": np.zeros(8, bool), "same": a.copy()})
    assert list(found.p) == [2 * 0.5**5, 1.0, 2 * 0.5**5] and list(found.verdict) == [stats.INSIDE] * 3
    assert stats.checkpoints({"a": a}).empty
    for other in (np.ones(1, bool), np.ones(7, bool), np.zeros(0, bool)):
        with pytest.raises(CourseError, match="tested on different images"):
            stats.checkpoints({"a": a, "other": other})
    with pytest.raises(CourseError, match="or on none"):
        stats.checkpoints({"a": np.zeros(0, bool), "b": np.zeros(0, bool)})


def test_a_run_given_twice_is_named():
    runs = table(a=[0.5, 0.6], b=[0.6, 0.7])
    with pytest.raises(CourseError, match="Two rows have one recipe and seed"):
        stats.steps(pd.concat([runs, runs]), "ab")
    with pytest.raises(CourseError, match="names one recipe twice, whose runs would count double"):
        stats.against(runs, "a", ["a", "b", "a"])
    twice = pd.concat([runs.assign(value=runs.recipe), runs[runs.recipe == "b"].assign(value="c")])
    with pytest.raises(CourseError, match="One run stands under two names of value"):
        stats.against(twice, "a", "abc", by="value")


def test_an_empty_store_has_no_means_and_no_differences():
    assert stats.over_seeds(pd.DataFrame()).empty
    assert stats.steps(pd.DataFrame(), "ab").empty and stats.against(pd.DataFrame(), "a", "ab").empty


def test_two_recipes_that_share_one_seed_are_not_set_apart_by_what_others_share():
    """The fit over all recipes has degrees of freedom left; this difference is of one seed all the same."""
    rows = [("a", 0, 0.5), ("a", 1, 0.52), ("a", 2, 0.51), ("b", 0, 0.6), ("b", 1, 0.63), ("b", 2, 0.62), ("c", 0, 0.7)]
    table = pd.DataFrame(rows, columns=["recipe", "seed", "test_accuracy"])
    found = stats.against(table, "a", ["a", "b", "c"]).set_index("after")
    assert found.seeds.tolist() == [3, 1] and found.low.notna().tolist() == [True, False]
    assert found.verdict["c"] == stats.ONE_SEED


def test_equal_gaps_are_as_uncertain_as_their_rounding():
    """Two seeds, eleven images of 10,000 apart each: an interval with a width, by scipy's t distribution."""
    rows = [("a", 0, 0.9012), ("a", 1, 0.8987), ("b", 0, 0.9023), ("b", 1, 0.8998)]
    table = pd.DataFrame(rows, columns=["recipe", "seed", "test_accuracy"])
    (found,) = stats.against(table, "a", ["a", "b"]).itertuples()
    reach = scipy_stats.t(1).ppf(0.975) * math.sqrt(1e-8 / 12)  # two seeds of two recipes: variance 4 / 4 of one run's
    assert (found.low, found.high) == pytest.approx((0.0011 - reach, 0.0011 + reach), abs=1e-9)
    assert found.p == pytest.approx(2 * scipy_stats.t(1).sf(0.0011 / math.sqrt(1e-8 / 12)), rel=1e-6)
