"""Published figures: each from its runs alone, none without them, and the committed ones are those of the store."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from PIL import Image
from scipy import stats as scipy_stats

from helpers import distort, evaluate, figures, recipe, runs, tables
from helpers.augment import STAGES
from helpers.data import CIFAR10, STAND_IN
from helpers.runtime import ROOT, CourseError

QUICK = recipe.RECIPES["quick"]
ALWAYS = {"figure_1_architecture", "figure_2_training_accuracy", "figure_3_loss", "figure_4_validation_accuracy"}


pytestmark = pytest.mark.usefixtures("fresh_pyplot")


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def record(root, chosen: recipe.Recipe, accuracy: float, source: str = CIFAR10, device: str = "CPU, x86_64, 2 threads",
           corrupted: float | None = None, count: int = 1_000):  # fmt: skip
    """A run in a store, written through the room that reads it; its curves are noise, its test accuracies as given."""
    g, path = np.random.default_rng(chosen.seed), root / chosen.name / str(chosen.seed)
    columns = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_augmented_accuracy")
    history = pd.DataFrame({"epoch": np.arange(1, chosen.epochs + 1), **{name: g.random(chosen.epochs)
                                                                         for name in columns}})  # fmt: skip
    runs.write_table(path / "history.csv", history)
    return runs.write_record(path, {
        "recipe": chosen.to_dict(), "data": source, "commit": "0" * 40, "device": device, "versions": {"torch": "2.11"},
        "parameters": 1000, "best_epoch": 1, "seconds": 60.0, "images_per_second": 100.0,
        "metrics": {name: float(history[name].iloc[-1]) for name in columns},
        "test": {"accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01, "count": 10_000},
        **({"corrupted": {"accuracy": corrupted, "count": count, "severities": [1, 3, 5]}} if corrupted else {}),
    })  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """Three seeds of each rung of the ladder on `quick`."""
    for number, rung in enumerate(recipe.ladder(QUICK)):
        for seed in range(3):
            record(tmp_path / "runs", rung.but(seed=seed), 0.5 + number / 100 + seed / 1000)
    return tmp_path / "runs"


def whiskers(axis) -> np.ndarray:
    (bars,) = [collection for collection in axis.collections if isinstance(collection, LineCollection)]
    return np.array(bars.get_segments())[:, :, 0]


def test_regenerating_twice_gives_the_same_bytes(store, tmp_path):
    (tmp_path / "second").mkdir()
    for name in ("varied_dropout", "photograph"):
        (tmp_path / "second" / f"{name}.png").touch()
    first, second = (figures.regenerate(tmp_path / name, store) for name in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second]
    assert {path.stem for path in first} == ALWAYS | {"ladder_quick", "reported_reproduced"}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert not plt.get_fignums(), "every figure is closed"
    left = {path.stem for path in (tmp_path / "second").iterdir()} - {path.stem for path in second}
    assert left == {"photograph"}, "what belongs to runs that are gone goes with them"


def test_published_figures_say_what_was_run(store):
    rows = figures.main_run(runs.load(store))
    assert "recipe quick, 8 of 300 epochs, 3 seeds" in texts(figures.training_accuracy(rows))
    assert "73.41" in texts(figures.training_accuracy(rows)) and "90.69" in texts(figures.validation_accuracy(rows))
    assert len(figures.loss(rows).axes[0].collections) == 2, "a band for each line"


def test_the_ladder_is_the_mean_over_seeds_with_its_t_interval(store):
    axis = figures.ladder(runs.load(store)).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [*STAGES, "mixup"]
    samples = [[0.5 + i / 100 + seed / 1000 for seed in range(3)] for i in range(len(recipe.ladder(QUICK)))]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [100 * np.mean(sample) for sample in samples])
    expected = [scipy_stats.t.interval(0.95, 2, np.mean(sample), scipy_stats.sem(sample)) for sample in samples]
    np.testing.assert_allclose(whiskers(axis), 100 * np.array(expected))
    assert "mean of 3 seeds" in axis.figure.get_suptitle()


def test_one_seed_has_the_interval_of_its_images(tmp_path):
    """And the quick profile's short runs are compared among themselves."""
    record(tmp_path, QUICK, 0.9)
    for rung, other in zip(recipe.ladder(QUICK)[:2], recipe.ladder(recipe.RECIPES["laptop"])[:2], strict=True):
        record(tmp_path, recipe.short(rung), 0.6)
        record(tmp_path, other, 0.8)
    drawn = figures.draw(tmp_path)
    np.testing.assert_allclose(drawn["ladder_laptop"].axes[0].lines[0].get_xdata(), [80, 80])
    axis = drawn["ladder_quick"].axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [60, 60])
    np.testing.assert_allclose(whiskers(axis), [[59, 61]] * 2)
    title = axis.figure.get_suptitle()
    assert "one seed, 95 % over images" in title and "3 of 300 epochs" in title


def test_runs_whose_recipe_has_changed_are_not_drawn(store):
    record(store, QUICK.but(seed=0, width=32), 0.99)
    with pytest.warns(UserWarning, match=r"quick/0 \(width\)"):
        axis = figures.draw(store)["ladder_quick"].axes[0]
    assert axis.lines[0].get_xdata()[1] == pytest.approx(51 + 0.15), "seeds 1 and 2 alone"


def test_a_rung_that_is_not_tested_is_not_drawn(tmp_path):
    first, second = recipe.ladder(QUICK)[:2]
    record(tmp_path, first, 0.5)
    run = record(tmp_path, second, 0.6)
    del run.record["test"]
    runs.write_record(run.path, run.record)
    assert "ladder_quick" not in figures.draw(tmp_path)


def test_a_bar_for_each_tier_beside_the_papers(store):
    laptop = recipe.RECIPES["laptop"]
    record(store, laptop, 0.8)
    axis = figures.reported(runs.load(store)).axes[0]
    paper, cpu, quick = axis.containers
    assert [bars.get_label().partition(":")[0] for bars in axis.containers] == ["paper", "cpu", "quick"]
    assert [round(bar.get_width(), 2) for bar in paper][:2] == [73.41, 90.69] and np.isnan(paper[2].get_width())
    assert cpu[3].get_width() == pytest.approx(80) and quick[3].get_width() == pytest.approx(51.1)


def test_a_ladder_has_a_second_panel_where_distorted_images_were_counted(store):
    for number, rung in enumerate(recipe.ladder(QUICK)[:3]):
        for seed in range(3):
            record(store, rung.but(seed=seed), 0.6, corrupted=0.4 + number / 100 + seed / 1000)
    record(store, QUICK.but(seed=2), 0.6, corrupted=0.9, count=50)  # another setting than most: not comparable
    clean, distorted = figures.ladder(runs.load(store)).axes
    assert (clean.get_xlabel(), distorted.get_xlabel()) == ("test accuracy, %", "corrupted accuracy, %")
    assert len(clean.lines[0].get_xdata()) == len(recipe.ladder(QUICK))
    found = distorted.lines[0].get_xdata()
    np.testing.assert_allclose(found, [40.1, 41.05, 42.1], err_msg="what was not measured is not drawn")
    interval = scipy_stats.t.interval(0.95, 2, 40.1, scipy_stats.sem([40, 40.1, 40.2]))
    np.testing.assert_allclose(whiskers(distorted)[0], interval)


def test_a_field_is_varied_by_runs_alike_in_all_else(store):
    assert not any(name.startswith("varied") for name in figures.draw(store)), "the ladder varies no field alone"
    for alpha, accuracy in ((4.0, 0.6), (0.2, 0.7)):
        for seed in (0, 1):
            made = QUICK.but(name=f"alpha-{alpha * 10:.0f}", mixup_alpha=alpha, seed=seed)
            record(store, made, accuracy, corrupted=0.4)
    record(store, QUICK.but(name="wider", mixup_alpha=8.0, width=32), 0.9)
    record(store, QUICK.but(name="again", seed=7), 0.1)
    record(store, QUICK.but(name="plain", reduction=0), 0.5)
    table = runs.load(store)
    assert set(figures.fields(table)) == {"mixup_alpha", figures.OTHERS}
    rows = figures.varied(table, "mixup_alpha")
    assert list(dict.fromkeys(rows.recipe)) == ["quick", "alpha-2", "alpha-40"], "by value, one recipe a value"
    assert list(dict.fromkeys(rows["value"])) == ["no Mixup (quick)", "mixup alpha 0.2", "mixup alpha 4"]
    assert list(figures.measured(rows, "value")) == ["test_accuracy"], "quick was not counted on distorted images"
    axis = figures.draw(store)["varied_mixup_alpha"].axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [51.1, 70, 60])
    assert axis.figure.get_suptitle().endswith(" on quick, 8 of 300 epochs: mean of 2 or 3 seeds, 95 % over seeds")
    assert list(dict.fromkeys(figures.varied(table, "reduction")["value"])) == ["no SE", "reduction 4 (quick)"]


def test_what_may_differ_beside_a_field_is_not_that_field(store):
    """A width alone is no other number of blocks, nor a weight decay alone another way to decay."""
    decay = QUICK.but(name="decoupled", decoupled_decay=True, weight_decay=0.005)
    for made in (QUICK.but(name="blocks", blocks=(1, 1, 1), width=32), QUICK.but(name="width", width=32), decay,
                 QUICK.but(name="weight_decay", weight_decay=0.001)):  # fmt: skip
        record(store, made, 0.5)
    table = runs.load(store)
    for field, names in {"blocks": {"quick", "blocks"}, "width": {"quick", "width"},
                         "decoupled_decay": {"quick", "decoupled"}, "weight_decay": {"quick", "weight_decay"}}.items():
        assert set(figures.varied(table, field).recipe) == names
    others = pd.concat(figures.fields(table).values())
    assert not others[others.recipe != "quick"].duplicated(["recipe", "seed"]).any()


def test_a_climb_is_drawn_once_two_rungs_beyond_the_ladder_are_there(store):
    rungs = recipe.climb(QUICK)
    assert [rung.name for rung in rungs[:3]] == ["quick-mixup", "quick", "quick-steered"]
    assert "climb_quick" not in figures.draw(store), "its first two rungs are the ladder's"
    for number, rung in enumerate(rungs[2:5]):
        for seed in range(3):
            record(store, rung.but(seed=seed), 0.7 + number / 100 + seed / 1000)
    axis = figures.draw(store)["climb_quick"].axes[0]
    words = ["all augmentation, Mixup", "stage crop_flip, no Mixup", "nesterov True, decay all False",
             "label smoothing 0.1, ema decay 0.99", "se placement identity"]  # fmt: skip
    assert [label.get_text() for label in axis.get_yticklabels()] == words
    np.testing.assert_allclose(axis.lines[0].get_xdata()[2:], [70.1, 71.1, 72.1])


def test_an_approach_is_drawn_and_told_once_two_of_its_own_rungs_are_there(store):
    for number, rung in enumerate(recipe.approach(QUICK)[:3]):
        if number == 2:
            assert "approach_quick" not in figures.draw(store)
            plt.close("all")
        for seed in range(3):
            record(store, rung.but(seed=seed), 0.5 + number / 100 + seed / 1000)
    axis = figures.draw(store)["approach_quick"].axes[0]
    words = ["all augmentation, Mixup", "policy trivialaugment", "mixup alpha 0.2, cutmix alpha 1"]
    assert [label.get_text() for label in axis.get_yticklabels()] == words
    assert figures.alt("approach_quick") == figures.ALT["approach"]
    text = tables.ladders(runs.current(runs.load(store)).dropna(subset=["test_accuracy"]))
    assert "Towards `beyond`, from `quick` (tier quick, 8 of 300 epochs" in text
    assert "| `quick-with_trivialaugment` | policy trivialaugment |" in text


def test_the_tier_nearest_to_the_papers_is_drawn_where_a_recipe_has_run_in_two():
    rows = pd.DataFrame({"recipe": "laptop", "seed": [0, 1, 2], "tier": ["cpu", "gpu", "gpu"]})
    assert figures.main_run(rows).seed.tolist() == [1, 2]


def test_seeds_tried_on_other_images_are_not_averaged_and_a_damaged_table_is_left_out(tmp_path, monkeypatch):
    """Of as many seeds, those of more images are drawn; what a record does not say is damaged."""
    rows = pd.DataFrame({"recipe": "laptop", "seed": range(6), "tier": "cpu"})
    some = (1, 3)
    for seed, (severities, count, accuracy) in enumerate(
        [(some, 1_000, 0.5), (some, 1_000, 0.7), ((1,), 500, 0.1), (some, 200, 0.2), (some, 200, 0.2), (some, 9, 0.0)]
    ):
        path = tmp_path / "laptop" / str(seed)
        path.mkdir(parents=True)
        pd.DataFrame([{"kind": "fog", "severity": severity, "count": count, "accuracy": accuracy}
                      for severity in severities]).to_csv(path / "shift.csv", index=False)  # fmt: skip
    monkeypatch.setattr(runs, "read", lambda path: path)
    monkeypatch.setattr(evaluate, "is_told", lambda path: path.name != "5")
    with pytest.warns(UserWarning) as said:
        found, kept = figures.beside(rows, "shift.csv", tmp_path)
    assert kept.seed.tolist() == [0, 1] and found.groupby("severity").accuracy.mean().tolist() == [0.6, 0.6]
    told = [str(warning.message) for warning in said]
    assert len(told) == 4 and "5/shift.csv is damaged" in told[0]
    assert all("is of other images" in one for one in told[1:])
    with pytest.warns(UserWarning, match=r"shift\.csv is damaged"):
        assert figures.beside(rows[rows.seed == 5], "shift.csv", tmp_path)[1].empty


def test_rungs_are_drawn_over_epochs_once_three_schedules_of_one_are_there(store):
    first, last = recipe.ladder(QUICK)[1], recipe.ladder(QUICK)[-1]
    for rung, accuracies in ((first, (0.6, 0.7)), (last, (0.4, 0.6))):
        for epochs, accuracy in zip((4, 32), accuracies, strict=True):
            if (rung, epochs) == (last, 32):
                assert "epochs_quick" in figures.draw(store), "the first has three"
                assert len(figures.epochs(runs.load(store), QUICK).axes[0].containers) == 1
                plt.close("all")
            record(store, recipe.vary(rung, epochs=[epochs])[0], accuracy, corrupted=accuracy - 0.1)
    record(store, QUICK.but(name="other", epochs=16, width=8), 0.9)
    assert len(figures.epochs(runs.load(store), QUICK).axes) == 1, "neither rung itself was counted on distorted images"
    record(store, last, 0.56, corrupted=0.5)
    clean, distorted = figures.epochs(runs.load(store), QUICK).axes
    damaged = [bars.lines[0].get_xydata().tolist() for bars in distorted.containers]
    np.testing.assert_allclose(damaged[0], [(4, 50), (32, 60)])
    np.testing.assert_allclose(damaged[1], [(4, 30), (8, 50), (32, 50)])
    lines = [bars.lines[0].get_xydata() for bars in clean.containers]
    np.testing.assert_allclose(lines, [[(4, 60), (8, 51.1), (32, 70)], [(4, 40), (8, 56.1), (32, 60)]])
    (bar,) = (bar for bar in clean.containers[0].lines[2][0].get_segments() if len(bar))  # where there are seeds
    np.testing.assert_allclose(bar[:, 1], scipy_stats.t.interval(0.95, 2, 51.1, scipy_stats.sem([51, 51.1, 51.2])))
    assert (clean.get_ylabel(), distorted.get_ylabel()) == ("test accuracy, %", "corrupted accuracy, %")
    assert clean.figure.get_suptitle().endswith("schedules of several lengths: mean of 1 or 3 seeds, 95 % over seeds")
    assert figures.alt("epochs_quick") == figures.ALT["epochs"]


def test_what_the_policy_draws_is_varied_on_the_last_rung(store):
    for made in recipe.named("policy", "quick"):
        record(store, made, 0.6)
    rows = {name: rows for name, _, rows in figures.all_varied(runs.load(store))}["varied_policy"]
    assert list(dict.fromkeys(rows["value"])) == [
        "policy autoaugment (quick-rotation_autoaugment)", "policy randaugment", "policy trivialaugment"]  # fmt: skip


def test_the_strength_is_varied_on_reduced(store):
    record(store, recipe.get("reduced"), 0.6)
    assert "varied_strength_reduced" not in figures.draw(store), "one strength"
    record(store, recipe.get("reduced-strength-0.5"), 0.7)
    (rows,) = (rows for name, _, rows in figures.all_varied(runs.load(store)) if name == "varied_strength_reduced")
    assert list(rows["value"]) == ["strength 0.5", "strength 1 (reduced)"] and set(rows.base) == {"reduced"}
    assert "varied_strength_reduced" in figures.draw(store)


def test_fields_of_every_kind_can_be_varied(store):
    record(store, QUICK.but(name="deep", blocks=(2, 1, 1, 1)), 0.6)
    record(store, QUICK.but(name="smooth", nesterov=True), 0.6)
    record(store, QUICK.but(name="narrow", width=8, blocks=(3, 3, 4, 3)), 0.6)
    for made in recipe.named("strength", "paper"):
        record(store, made, 0.9)
    table, drawn = runs.load(store), figures.draw(store)
    assert "varied_strength_paper" in drawn and "varied_strength" not in drawn
    assert figures.alt("varied_strength_paper") == figures.ALT["varied"]
    others = figures.fields(table)[figures.OTHERS]
    assert list(dict.fromkeys(others["value"])) == ["quick", "nesterov True"]
    blocks = figures.fields(table)["blocks"]
    assert list(dict.fromkeys(blocks["value"])) == [
        "blocks [1, 1, 1, 1] (quick)", "blocks [2, 1, 1, 1]", "blocks [3, 3, 4, 3], width 8"]  # fmt: skip
    assert len(others) == len(table[table.recipe == "quick"]) + 1 and set(others.base) == {"quick"}
    axis = drawn["varied_others"].axes[0]
    assert axis.figure.get_suptitle().startswith("One change at a time on quick, 8 of 300 epochs: mean of 1 or 3 seeds")
    assert [label.get_text() for label in axis.get_yticklabels()] == list(dict.fromkeys(others["value"]))
    assert list(figures.varied(table, "blocks")["value"])[-1] == "blocks [3, 3, 4, 3], width 8"
    assert figures.varied(table, "nesterov")["value"].iloc[-1] == "nesterov True"
    assert set(figures.varied(table, "stage").recipe) == {rung.name for rung in recipe.ladder(QUICK)[:-1]}
    assert figures.varied(table, "mixup_alpha", base="laptop").empty and figures.varied(pd.DataFrame(), "width").empty
    with pytest.raises(CourseError, match="no field 'alpha' to vary: expected one of blocks, width"):
        figures.varied(table, "alpha")


def test_distortions_and_predictions_are_drawn_where_they_lie_beside_a_run(store):
    for seed in (0, 2):
        cells = [{"kind": kind, "severity": severity, "accuracy": 0.4 + severity / 100 + seed / 10, "count": 500}
                 for kind in ("fog", *distort.KINDS[:2]) for severity in (1, 5)]  # fmt: skip
        clean = {"kind": "clean", "severity": 0, "accuracy": 0.6, "count": 500}
        runs.write_table(store / "quick" / str(seed) / "shift.csv", pd.DataFrame([clean, *cells]))
        said = evaluate.corrupted(pd.DataFrame([clean, *cells]))
        runs.add_to_record(store / "quick" / str(seed), {"corrupted": said})
        trials = [{**cell, "method": "ATC", "predicted": 0.5, "true": cell["accuracy"]} for cell in cells]
        runs.write_table(store / "quick" / str(seed) / "estimates.csv", pd.DataFrame(trials))
    drawn = figures.draw(store)
    axis = drawn["kind_severity"].axes[0]
    expected = 100 * np.array([[0.51, 0.55]] * 3)
    np.testing.assert_allclose(np.asarray(axis.collections[0].get_array()).reshape(3, 2), expected)
    kinds = [kind.replace("_", " ") for kind in (*distort.KINDS[:2], "fog")]
    assert [label.get_text() for label in axis.get_yticklabels()] == kinds
    assert "2 seeds" in axis.get_title("left") and "500 test images, clean 60.0 %" in axis.get_title("left")
    assert sum(len(line.get_xdata()) for line in drawn["predicted_accuracy"].axes[0].lines[1:]) == 12


def test_the_stand_in_set_is_never_compared_with_the_paper(tmp_path):
    record(tmp_path, QUICK, 0.9, source=STAND_IN)
    drawn = figures.draw(tmp_path)
    assert set(drawn) == ALWAYS
    assert not any("paper, 300" in texts(figure) for figure in drawn.values())


def test_runs_on_other_data_are_not_drawn_among_those_on_cifar10(tmp_path):
    record(tmp_path, QUICK, 0.5)
    record(tmp_path, recipe.RECIPES["laptop"], 0.9, source=STAND_IN)
    drawn = figures.draw(tmp_path, CIFAR10)
    assert "recipe quick" in texts(drawn["figure_3_loss"]) and "reported_reproduced" in drawn
    plt.close("all")
    assert "reported_reproduced" not in figures.draw(tmp_path), "nor is the paper set beside both"


def test_without_a_run_the_figures_say_so(tmp_path):
    for ask in (lambda: figures.regenerate(tmp_path / "figures", tmp_path), lambda: figures.main_run(pd.DataFrame())):
        with pytest.raises(CourseError, match="train one first"):
            ask()
    assert not (tmp_path / "figures").exists()


def test_of_a_ladder_that_nobody_climbed_there_is_no_figure():
    table = runs.current(runs.load())
    table = table[table.recipe.str.startswith("quick")]
    for draw, base in ((figures.ladder, "beyond"), (figures.climb, "paper"), (figures.epochs, "paper")):
        with pytest.raises(CourseError, match=f"Nothing of the .* on {base} is in this table: train it first"):
            draw(table, recipe.RECIPES[base])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The figures of the recorded runs as `make figures` makes them: the files, and the figures as they were saved."""
    kept, draw = {}, figures.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *given: kept.update(draw(*given)) or kept)
        return figures.regenerate(tmp_path_factory.mktemp("published")), kept


def test_nothing_in_a_published_figure_is_cut_off(published):
    """Neither a legend nor a title, label or number reaches beyond the picture."""
    for name, figure in published[1].items():
        figure.set_dpi(plt.rcParams["savefig.dpi"])  # of which the size of letters depends a little
        needs, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(needs.x0, needs.y0) > -0.02 and needs.x1 < width + 0.02 and needs.y1 < height + 0.02, name


def test_the_committed_figures_are_those_of_the_recorded_runs(published):
    """Pixel for pixel. Not byte for byte: the same pixels are packed otherwise by another zlib beneath Pillow."""
    drawn, _ = published
    names = {path.name for path in (ROOT / "figures").glob("*.png")}
    assert names == {path.name for path in drawn}, "run `make figures`"
    for path in drawn:
        ours, committed = (np.asarray(Image.open(each)) for each in (path, ROOT / "figures" / path.name))
        np.testing.assert_array_equal(ours, committed, err_msg=f"{path.name}: run `make figures`")
        assert len(figures.alt(path.stem)) > 50
