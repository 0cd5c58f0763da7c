"""The README says what is recorded: its tables come out the same, and a number that was tampered with does not."""

import re

import pytest
from test_figures import QUICK, record

from helpers import figures, recipe, runs, tables
from helpers.runtime import ROOT, CourseError, percent

README = (ROOT / "README.md").read_text()


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_readme_is_what_the_store_makes_of_it():
    assert tables.fill(README) == README, "run `make figures`"
    assert set(re.findall(r"<!-- table: (\w+) -->", README)) == {"recipes", "ladders", "reported", "speed"}
    assert README.count("<!-- end -->") == len(re.findall(r"<!-- (?:table|figure): ", README))


@pytest.mark.parametrize(
    "number", [r"\d\d\.\d\d %", r"\d\d\.\d\d to \d", r"\d\.\d ×", r"\| 0\.\d\d\d \|", "inside the noise", r"take \d+ s"]
)
def test_a_number_tampered_with_is_noticed(number):
    """The first of its form between markers; refreshing mends it."""
    start = README.index("<!-- table: recipes -->")
    found = re.compile(number).search(README, start)
    wrong = re.sub(r"\d|in", lambda digit: "9" if digit[0] != "9" else "1", found[0], count=1)
    tampered = README[: found.start()] + wrong + README[found.end() :]
    assert tampered != README and tables.fill(tampered) == README


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


def test_a_column_for_each_tier_empty_where_nothing_was_run(tmp_path):
    record(tmp_path, QUICK, 0.5)
    record(tmp_path, QUICK.but(seed=1), 0.6)
    record(tmp_path, recipe.RECIPES["laptop"], 0.8)
    head, _, run, *rows, test, hidden = cells(tables.reported(runs.load(tmp_path)))
    assert head == ["classified right", "paper", "gpu", "cpu", "quick"]
    assert run[2:] == ["", "recipe laptop, 25 epochs, seed 0", "recipe quick, 8 epochs, 2 seeds"]
    assert test == ["test, as it is", "95.94 %", "", "80.00 % [79.00 to 81.00]", "55.00 % [-8.53 to 118.53]"]
    assert hidden == ["hidden test, distorted", "about 86 %", "", "", ""] and all(row[2] == "" for row in rows)
    assert "[" not in rows[0][3], "one seed: no interval of the training accuracy"


def test_a_ladder_of_one_seed_says_so(tmp_path):
    for rung in recipe.ladder(QUICK)[:3]:
        record(tmp_path, rung, 0.5)
    text = tables.ladders(runs.load(tmp_path))
    rows = cells(text)[2:]
    assert "10,000 images, seeds 0)" in text
    assert [row[2] for row in rows] == ["one seed: no interval over seeds"] * 3
    assert [row[3:] for row in rows[1:]] == [["+0.00", "", "", "one seed: nothing can be said"]] * 2


def test_markers_without_a_table_or_figure_behind_them_are_refused():
    for kind, name in (("table", "ladder"), ("figure", "figure_9")):
        with pytest.raises(CourseError, match=f"There is no {kind} '{name}' .*: expected one of "):
            tables.fill(f"<!-- {kind}: {name} -->\nold\n<!-- end -->\n")
    text = "before\n<!-- figure: figure_3_loss -->\nold\n<!-- end -->\nafter"
    shown = f"![{figures.ALT['figure_3_loss']}](figures/figure_3_loss.png)"
    assert tables.fill(text) == f"before\n<!-- figure: figure_3_loss -->\n{shown}\n<!-- end -->\nafter"


def test_refreshing_touches_the_blocks_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# a | 1 |\n<!-- table: speed -->\n<!-- end -->\nb\n")
    tables.refresh(path)
    first = path.read_text()
    assert first.startswith("# a | 1 |\n<!-- table: speed -->\n|") and first.endswith("<!-- end -->\nb\n")
    assert tables.refresh(path).read_text() == first
