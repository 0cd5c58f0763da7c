"""A published file: the record inside, the weights rounded and nothing more, a card with the record's own numbers."""

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from statsmodels.stats.proportion import proportion_confint

from helpers import data, evaluate, publish, recipe, runs
from helpers.model import count_parameters
from helpers.runtime import ROOT, CourseError, percent

pytestmark = pytest.mark.usefixtures("one_thread", "without_cifar10")


@pytest.fixture
def tested(finished_tiny, tmp_path):
    """A finished and tested run in a folder of its own."""
    shutil.copytree(finished_tiny, tmp_path / "run")
    return evaluate.test_run(tmp_path / "run", stand_in=True)


def test_a_published_file_is_the_run_in_half_precision(tested, tmp_path):
    path = tmp_path / "weights" / "tiny.safetensors"
    published = publish.publish(tested.path, path, stand_in=True)
    ours, theirs = load_file(tested.path / "best.safetensors"), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value.half() if value.is_floating_point() else value)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["recipe"]) == tested.record["recipe"]
        assert json.loads(file.metadata()["metrics"]) == tested.record["metrics"]
    assert published.record | {"test": None} == tested.record | {"test": None}
    test = data.load_set("test", stand_in=True)
    again = evaluate.test_metrics(evaluate.load_model(runs.read(path)), test, "float32")
    assert again == published.record["test"], "the record inside is of these very weights"
    assert abs(again["accuracy"] - tested.record["test"]["accuracy"]) <= 0.001
    assert path.stat().st_size < 0.6 * (tested.path / "best.safetensors").stat().st_size + 5_000


def test_the_card_says_recipe_data_metrics_and_limits(tested, tmp_path):
    path = tmp_path / "tiny.safetensors"
    test = publish.publish(tested.path, path, stand_in=True).record["test"]
    card = path.with_suffix(".md").read_text()
    for field, value in tested.record["recipe"].items():
        assert f"| {field} | {value} |" in card
    for heading in ("Recipe", "Data", "Metrics", "Limits"):
        assert f"## {heading}\n" in card
    assert percent(test["accuracy"]) in card and percent(test["mirrored"]["accuracy"]) in card
    assert "stand-in" in card and f"{path.stat().st_size:,} bytes" in card and tested.record["commit"] in card
    assert "not been tried on distorted images" in card
    evaluate.shifted_metrics(tested.path, (3,), 50, stand_in=True)
    publish.publish(tested.path, path, stand_in=True)
    assert "not been tried" not in path.with_suffix(".md").read_text()
    card, table = path.with_suffix(".md").read_text(), pd.read_csv(tested.path / "shift.csv")
    mean, clean = evaluate.mean_corruption_accuracy(table), int(table["count"].iloc[0])
    low, high = proportion_confint(mean * clean, clean, method="wilson")
    assert f"{100 * mean:.2f} % [{100 * low:.2f}, {100 * high:.2f}] on average over 15 kinds" in card
    table.loc[7, ["accuracy", "confidence"]] = 0.9, 0.1  # too modest is no fit either
    table.to_csv(tested.path / "shift.csv", index=False)
    card = publish.card(runs.read(tested.path), tested.record, path.name, 1)
    row = table.loc[7]
    assert f"under {row.kind.replace('_', ' ')} of severity 3, it claims 10.00 % and is right on 90.00 %." in card
    assert max(map(len, card.splitlines())) < 300
    table.loc[table.kind == "clean", "confidence"] = 2.0  # further off than any, but clean is no distortion
    table.to_csv(tested.path / "shift.csv", index=False)
    assert publish.card(runs.read(tested.path), tested.record, path.name, 1) == card
    with pytest.raises(CourseError, match=r"tiny.safetensors is one file of weights: publish the folder of a run"):
        publish.publish(path, tmp_path / "again.safetensors", stand_in=True)


def test_the_card_tells_a_stranger_how_to_predict(tested, tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    publish.publish(tested.path, path, stand_in=True)
    card, test = path.with_suffix(".md").read_text(), data.load_set("test", stand_in=True)
    monkeypatch.chdir(tmp_path)
    told = {"images": test.images[:50]}
    exec(card.split("```python\n")[1].split("```")[0], told)  # from the folder that the file lies in
    mean, std = (torch.tensor(eval(text)).view(3, 1, 1) for text in re.findall(r"\(0\.[^)]*\)", card)[:2])
    with torch.no_grad():
        by_hand = evaluate.load_model(runs.read(path)).eval()((test.images[:50] / 255 - mean) / std)
    assert torch.allclose(told["logits"], by_hand, atol=1e-4)
    assert f"those of {', '.join(test.classes)}.\n" in card


def test_the_committed_card_is_that_of_the_record():
    path, run = runs.PUBLISHED, runs.read(runs.RECORDED / "beyond/0")
    assert [each.name for each in path.parent.glob("*.safetensors")] == [path.name], "one file of weights, no more"
    card = publish.card(run, runs.read(path).record, path.name, path.stat().st_size)
    assert path.with_suffix(".md").read_text() == card and "a reduced schedule" not in card


def test_the_card_of_a_run_that_went_on_says_from_where():
    run = runs.read(runs.RECORDED / "refined/0")
    card = publish.card(run, run.record, "refined.safetensors", 1)
    assert "* One run with one seed (0), from the weights of beyond/0, beyond.safetensors, 1 epoch on 45,000" in card
    assert "a reduced schedule" not in card, "its weights have had more"


def test_the_largest_network_under_the_limit_of_parameters_can_be_published(tested, tmp_path, monkeypatch):
    full = recipe.RECIPES["beyond"].network()
    save_file(dict(full.state_dict()), tested.path / "best.safetensors")
    runs.write_record(tested.path, {**tested.record, "recipe": recipe.RECIPES["beyond"].to_dict()})
    monkeypatch.setattr(evaluate, "test_metrics", lambda *rest: tested.record["test"])
    publish.publish(tested.path, tmp_path / "full.safetensors", stand_in=True)
    assert 9_900_000 < (tmp_path / "full.safetensors").stat().st_size <= publish.LIMIT


def test_a_published_file_is_read_whatever_it_is_called(tested, tmp_path):
    publish.publish(tested.path, tmp_path / "one.safetensors", stand_in=True)
    alone = (tmp_path / "one.safetensors").rename(tmp_path / runs.WEIGHTS)
    assert runs.read(alone).path == alone and runs.read(alone).label == tested.label
    assert count_parameters(evaluate.load_model(runs.read(alone))) == tested.record["parameters"]
    assert runs.read(tested.path / runs.WEIGHTS).path == tested.path, "a run's own means its folder"


def test_what_should_not_be_published_is_refused(tested, tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    with pytest.raises(CourseError, match="stand-in set is never recorded"):
        publish.publish(tested.path, ROOT / "data" / "weights" / "tiny.safetensors", stand_in=True)
    with pytest.raises(CourseError, match=r"expected one that ends in \.safetensors"):
        publish.publish(tested.path, tmp_path / "tiny.pt", stand_in=True)
    for name in (runs.WEIGHTS, runs.LAST):  # of a run's own weights, which it would write over
        with pytest.raises(CourseError, match=f"{name} is the name of weights that lie beside their run.json"):
            publish.publish(tested.path, tested.path / name, stand_in=True)
    monkeypatch.setattr(publish, "LIMIT", 1_000)
    with pytest.raises(CourseError, match="at most 1,000 are published"):
        publish.publish(tested.path, path, stand_in=True)
    test = {**tested.record["test"], "accuracy": tested.record["test"]["accuracy"] + 0.002}
    runs.write_record(tested.path, {**tested.record, "test": test})
    with pytest.raises(CourseError, match=r"Half precision changes the test accuracy from .* %\.$"):
        publish.publish(tested.path, path, stand_in=True)
    runs.write_record(tested.path, {key: value for key, value in tested.record.items() if key != "test"})
    with pytest.raises(CourseError, match="has not been tested"):
        publish.publish(tested.path, path, stand_in=True)
    assert not path.exists() and not path.with_suffix(".md").exists()
