"""The README says what is recorded: its tables come out the same, and a number that was tampered with does not."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests
from test_figures import QUICK, record

from helpers import figures, recipe, runs, stats, tables
from helpers.runtime import ROOT, CourseError, percent

KEPT = "\N{NO-BREAK SPACE}"  # an interval is not broken
PAGES = {path: path.read_text() for path in tables.PAGES}


def cells(text: str) -> list[list[str]]:
    text = text.replace(KEPT, " ")
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_pages_are_what_the_store_makes_of_them():
    for path, text in PAGES.items():
        assert tables.fill(text, path) == text, "run `make figures`"
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- (?:table|figure): ", text))
    whole = "".join(PAGES.values())
    known = {"recipes", "ladders", "varied", "epochs", "reported", "beyond", "speed"}
    assert set(re.findall(r"<!-- table: (\w+) -->", whole)) == known


def test_every_published_figure_is_on_the_page_beside_it_and_no_link_is_broken():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
        assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
    shown = set(re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", PAGES[figures.FIGURES / "README.md"]))
    assert shown == {path.name for path in figures.FIGURES.glob("*.png")}


def test_a_number_tampered_with_is_noticed():
    """The first of each form between markers of a page; refreshing mends them all."""
    forms = {r"\d\d\.\d\d %", rf"\d\d\.\d\d{KEPT}to{KEPT}\d", r"\d\.\d ×", rf"\(p{KEPT}0\.\d{{3}}\)",
             r"inside the noise \(",
             r"take \d+ s"}  # fmt: skip
    met = set()
    for path, text in PAGES.items():
        tampered = text
        for form in forms:
            if found := re.compile(form).search(tampered, text.index("<!-- table: ")):
                wrong = re.sub(r"\d|in", lambda digit: "9" if digit[0] != "9" else "1", found[0], count=1)
                tampered = tampered[: found.start()] + wrong + tampered[found.end() :]
                met.add(form)
        assert tampered != text and tables.fill(tampered, path) == text
    assert met == forms


def test_the_means_are_those_of_the_records():
    """Counted here without the room that makes the table."""
    recorded = runs.load()
    rows = {row[0].strip("`"): row for row in cells(tables.recipes(recorded))[2:]}
    assert set(rows) == set(recorded.recipe)
    for name, row in rows.items():
        values = recorded[recorded.recipe == name].test_accuracy
        assert row[7] == percent(values.mean()) and row[6] == str(len(values))
        assert row[9] == f"{100 * values.min():.2f} to {100 * values.max():.2f}"
        assert row[10] == (f"{100 * values.std():.2f}" if len(values) > 1 else ""), "one run has no spread"
    assert rows["refined"][5] == "1, after `beyond`", "of 301 epochs in all"


def test_a_mean_over_some_of_the_seeds_is_not_shown(tmp_path):
    """The last epoch's and the corrupted accuracy: those that have them would be a choice."""
    for seed, corrupted in ((0, 0.4), (1, None), (2, 0.5)):
        record(tmp_path, QUICK.but(seed=seed), 0.6, corrupted=corrupted)
    assert cells(tables.recipes(runs.load(tmp_path)))[2][-2:] == ["", ""]
    assert cells(tables.reported(runs.load(tmp_path)))[-2] == ["test, distorted by us", "not given", "", "", ""]
    record(tmp_path, QUICK.but(seed=1), 0.6, corrupted=0.6)
    assert cells(tables.recipes(runs.load(tmp_path)))[2][-2:] == ["", "50.00 % of 1,000"]
    record(tmp_path, QUICK.but(seed=2), 0.6, corrupted=0.5, count=200)
    assert cells(tables.recipes(runs.load(tmp_path)))[2][-2:] == ["", "50.00 %"], "not each of as many images"


def test_runs_of_another_recipe_by_now_or_untested_are_not_told(tmp_path):
    record(tmp_path, QUICK, 0.5)
    record(tmp_path, QUICK.but(seed=1, width=32), 0.9)
    run = record(tmp_path, recipe.RECIPES["laptop"], 0.9)
    del run.record["test"]
    runs.write_record(run.path, run.record)
    with pytest.warns(UserWarning, match=r"quick/1 \(width\)"):
        (row,) = cells(tables.fill("<!-- table: recipes -->\n<!-- end -->", root=tmp_path))[2:]
    assert (row[0], *row[6:8]) == ("`quick`", "1", "50.00 %")


def test_a_column_for_each_tier_empty_where_nothing_was_run(tmp_path):
    record(tmp_path, QUICK, 0.5, corrupted=0.3)
    record(tmp_path, QUICK.but(seed=1), 0.6, corrupted=0.4)
    record(tmp_path, recipe.RECIPES["laptop"], 0.8, corrupted=0.7)
    head, _, run, *rows, test, last, distorted, hidden = cells(tables.reported(runs.load(tmp_path)))
    assert head == ["classified right", "paper", "gpu", "cpu", "quick"]
    assert run[2:] == ["", "recipe laptop, 25 of 300 epochs, seed 0", "recipe quick, 8 of 300 epochs, 2 seeds"]
    assert test == ["test, as it is", "95.94 %", "", "80.00 % [79.00 to 81.00]", "55.00 % [0.00 to 100.00]"]
    assert last[1:] == ["not given", "", "", ""], "not recorded"
    assert distorted[1:] == ["not given", "", "70.00 % [67.09 to 72.76]", "35.00 % [0.00 to 98.53]"]
    assert hidden == ["hidden test, distorted", "about 86 %", "", "", ""] and all(row[2] == "" for row in rows)
    assert "[" not in rows[0][3], "one seed: no interval of the training accuracy"


def test_what_goes_beyond_the_paper_is_told_of_whole_runs_on_a_gpu(tmp_path):
    sprint, gpu = recipe.RECIPES["sprint"], "NVIDIA H200"
    for seed, corrupted in enumerate((0.7, None, 0.72)):
        record(tmp_path, sprint.but(seed=seed), 0.90 + seed / 100, device=gpu, corrupted=corrupted)
    record(tmp_path, recipe.RECIPES["beyond"], 0.8, device="CPU, x86_64, 2 threads")
    record(tmp_path, recipe.get("sprint-width-32"), 0.9, device=gpu)
    head, _, row = cells(tables.beyond(runs.load(tmp_path)))
    assert row[0] == "`sprint`" and row[2:4] == ["36", "3"] and row[-1] == "60 s, NVIDIA H200"
    low, high = t.interval(0.95, 2, 0.91, 0.01 / np.sqrt(3))
    assert row[4] == f"91.00 % [{100 * low:.2f} to {100 * high:.2f}]"
    assert row[head.index("distorted")] == "71.00 % of 1,000, seed 0, 2"
    record(tmp_path, recipe.RECIPES["beyond"].but(seed=1), 0.8, device=gpu)
    row = cells(tables.beyond(runs.load(tmp_path)))[3]
    assert row[4] == "80.00 % [79.00 to 81.00]", "one run: over its images"
    assert row[head.index("seed 0 took")] == "", "another seed's time is not told as its"
    run = record(tmp_path, recipe.RECIPES["beyond"].but(seed=0), 0.8, device=gpu)
    runs.add_to_record(run.path, {"side_by_side": 5})
    assert set(runs.load(tmp_path).side_by_side) == {1, 5}
    assert cells(tables.beyond(runs.load(tmp_path)))[3][-1] == "60 s, NVIDIA H200, 5 side by side"


def test_a_ladder_of_one_seed_says_so(tmp_path):
    for rung in recipe.ladder(QUICK)[:3]:
        record(tmp_path, rung, 0.5)
    text = tables.ladders(runs.load(tmp_path))
    rows = cells(text)[2:]
    assert "10,000 images, seeds 0)" in text and recipe.SHORT in text
    assert [row[1] for row in rows] == ["50.00 %"] * 3
    assert [row[2:] for row in rows[1:]] == [["+0.00", stats.ONE_SEED]] * 2
    assert "Test: of 2 differences 2 with one seed, of which nothing can be said." in text


def test_a_climb_is_told_with_what_it_changes_and_costs(tmp_path):
    for number, rung in enumerate(recipe.climb(QUICK)[:4]):
        for seed in range(2):
            accuracy = 0.5 + number / 10 + seed * (number + 1) / 100
            path = record(tmp_path, rung.but(seed=seed), accuracy).path
            run = runs.read(path)
            run.record["test"]["mirrored"] = {**run.record["test"], "accuracy": accuracy + 0.015}
            runs.write_record(path, {**run.record, "seconds": 10.0 + 20 * number + 4 * seed})
    rows = figures.rungs(runs.load(tmp_path), QUICK, "climb")
    found = tables.costs(rows, QUICK)
    assert list(found.index) == ["quick-mixup", "quick", "quick-steered", "quick-averaged"]
    assert found.changes.iloc[2] == "nesterov True, decay all False"
    assert list(found.seconds) == ["12", "32", "52", "72"]
    assert set(found["mirror images, points"]) == {"+1.50"}
    text = tables.ladders(runs.load(tmp_path))
    assert "Everything together, from `quick` (tier quick, 8 of 300 epochs, 10,000 images, seeds 0, 1):" in text
    assert "| `quick-averaged` | label smoothing 0.1, ema decay 0.99 | 72 | +1.50 | 82.00 % [" in text


def test_no_difference_is_told_without_a_minus():
    assert tables._cell("x", -1e-6, 1e-6, "+") == f"x [+0.00{KEPT}to{KEPT}+0.00]" and tables._points(-1e-6) == "+0.00"
    assert tables._cell("x", -0.01, 0.995) == f"x [0.00{KEPT}to{KEPT}99.50]" and tables._points(-0.0123) == "-1.23"


def test_mirror_images_are_told_of_the_runs_that_have_them(tmp_path):
    """A seed without them does not move the mean of those with."""
    rung = recipe.climb(QUICK)[0]
    for seed, accuracy in enumerate((0.5, 0.6, 0.9)):
        run = runs.read(record(tmp_path, rung.but(seed=seed), accuracy).path)
        if seed < 2:
            run.record["test"]["mirrored"] = {**run.record["test"], "accuracy": accuracy + 0.02}
        runs.write_record(run.path, run.record)
    rows = runs.load(tmp_path).assign(rung=rung.name)
    assert tables.costs(rows, QUICK)["mirror images, points"].tolist() == ["+2.00"]


def test_a_ladder_is_told_on_clean_and_on_distorted_images(tmp_path):
    """Against statsmodels' analysis of variance of the numbers that went into the store."""
    g, ladder = np.random.default_rng(3), recipe.ladder(recipe.RECIPES["reduced"])
    steps = np.array([0, 1, 6, 7, 12, 12, 13])[:, None] / 100
    clean, distorted = (0.5 + steps + g.normal(0, 0.004, (7, 3)) for _ in range(2))
    for row, rung in enumerate(ladder):
        for seed in range(3):
            record(tmp_path, rung.but(seed=seed), clean[row, seed], corrupted=distorted[row, seed])
    table = runs.load(tmp_path)
    text, found = tables.ladders(table), tables.compared(figures.rungs(table, recipe.RECIPES["reduced"]))
    found = found.replace(KEPT, " ", regex=True)
    assert list(found.index) == [rung.name for rung in ladder] and found.index[-1] == "reduced"
    assert "On `reduced` (tier cpu, 24 of 300 epochs, 10,000 images, seeds 0, 1, 2; " in text
    assert "corrupted: 1,000 test images at severities 1, 3, 5):" in text
    for short, name, values in (("test", "test accuracy", clean), ("corrupted", "corrupted accuracy", distorted)):
        cells_of = pd.DataFrame(values).melt(ignore_index=False, var_name="seed").reset_index(names="rung")
        fit = ols("value ~ 0 + C(rung) + C(seed)", cells_of).fit()
        less = [fit.t_test(f"C(rung)[{row}] - C(rung)[{row - 1}] = 0") for row in range(1, 7)]
        p = multipletests([float(one.pvalue) for one in less], method="holm")[1]
        for row, one in enumerate(less, 1):
            gap, (low, high) = one.effect[0], one.conf_int(0.05)[0]
            word = ("higher" if gap > 0 else "lower") if p[row - 1] < 0.05 else "inside the noise"
            said = "p < 0.001" if p[row - 1] < 0.0005 else f"p {p[row - 1]:.3f}"
            assert found.iloc[row][[f"{short}: minus the one before, points", f"{short}: verdict"]].tolist() == [
                f"{100 * gap:+.2f} [{100 * low:+.2f} to {100 * high:+.2f}]", f"{word} ({said})",
            ]  # fmt: skip
            assert found[name].iloc[row].startswith(f"{percent(values[row].mean())} [")
        assert min(p) < 0.0005 < max(p), "both forms are met"
        higher = found[f"{short}: verdict"].str.startswith("higher").sum()
        assert (f"{short}: of 6 differences {higher} higher" in tables.tally(found)) == (higher > 0)


def test_schedules_are_told_with_what_sets_the_last_rung_from_the_first(tmp_path):
    first, last = recipe.ladder(QUICK)[1], recipe.ladder(QUICK)[-1]
    for rung, epochs, values in ((first, 4, [0.5]), (first, 8, [0.6, 0.62, 0.61]), (first, 16, [0.7]),
                                 (last, 4, [0.3]), (last, 8, [0.45, 0.5, 0.5])):  # fmt: skip
        for seed, accuracy in enumerate(values):
            record(tmp_path, recipe.vary(rung.but(seed=seed), epochs=[epochs])[0], accuracy)
    assert tables.epochs(runs.load(tmp_path)[:3]) == "None is recorded yet.\n"
    alone = cells(tables.epochs(runs.load(tmp_path)))
    assert alone[0] == ["epochs", "seeds", "test: crop_flip"], "the last has two lengths only"
    record(tmp_path, recipe.vary(last, epochs=[32])[0], 0.8)
    text = tables.epochs(runs.load(tmp_path))
    assert text.startswith("On `quick` (tier quick, 4 to 32 epochs, 10,000 images, seeds 0, 1, 2):")
    rows = cells(text)
    assert rows[0][2:] == ["test: crop_flip", "test: mixup", "test: mixup minus crop_flip, points"]
    low, high = t.interval(0.95, 2, -38 / 3, np.std([-15, -12, -11], ddof=1) / np.sqrt(3))
    assert rows[2:] == [
        ["4", "1", "50.00 %", "30.00 %", "-20.00"],
        ["8", "3", "61.00 %", "48.33 %", f"-12.67 [{low:+.2f} to {high:+.2f}]"],
        ["16", "1", "70.00 %", "", ""], ["32", "1", "", "80.00 %", ""],
    ]  # fmt: skip


def test_a_varied_field_is_set_against_the_base(tmp_path):
    for name, alpha, accuracies in (("quick", 0.0, (0.6, 0.61, 0.62)), ("a", 0.2, (0.65, 0.66, 0.67)),
                                    ("b", 1.0, (0.56, 0.57, 0.58))):  # fmt: skip
        for seed, accuracy in enumerate(accuracies):
            record(tmp_path, QUICK.but(name=name, mixup_alpha=alpha, seed=seed), accuracy + seed * alpha / 1000)
    table = runs.load(tmp_path)
    rows = cells(tables.varied(table))
    assert rows[0][:3] == ["mixup_alpha", "test accuracy", "test: minus no Mixup (quick), points"]
    assert [row[0] for row in rows[2:]] == ["no Mixup (quick)", "mixup alpha 0.2", "mixup alpha 1"]
    assert rows[2][2:] == ["", ""] and rows[3][2].startswith("+5.02 [") and rows[4][2].startswith("-3.90 [")
    assert rows[3][3].startswith("higher") and rows[4][3].startswith("lower")
    assert "Test: of 2 differences 1 higher, 1 lower." in tables.varied(table)
    assert tables.varied(table[:3]) == "None is recorded yet.\n"


def test_markers_without_a_table_or_figure_behind_them_are_refused():
    for kind, name in (("table", "ladder"), ("figure", "figure_9"), ("figure", "ladder")):
        with pytest.raises(CourseError, match=f"There is no {kind} '{name}' .*: expected one of "):
            tables.fill(f"<!-- {kind}: {name} -->\nold\n<!-- end -->\n")
    text = "before\n<!-- figure: figure_3_loss -->\nold\n<!-- end -->\nafter"
    shown = f"![{figures.ALT['figure_3_loss']}](figures/figure_3_loss.png)"
    assert tables.fill(text) == f"before\n<!-- figure: figure_3_loss -->\n{shown}\n<!-- end -->\nafter"


def test_refreshing_touches_the_blocks_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# a | 1 |\n<!-- table: speed -->\n<!-- end -->\nb\n")
    tables.refresh([path])
    first = path.read_text()
    assert first.startswith("# a | 1 |\n<!-- table: speed -->\n|") and first.endswith("<!-- end -->\nb\n")
    assert tables.refresh([path])[0].read_text() == first
    path.write_text("<!-- table: speed -->\n<!-- end -->\n")
    with pytest.raises(CourseError, match=r"There is no \S*missing\.md to put tables into"):
        tables.refresh([path, tmp_path / "missing.md"])
    assert path.read_text() == "<!-- table: speed -->\n<!-- end -->\n", "all pages or none"
