"""Several seeds as one: means against sums written out, and batch norm's statistics against those of all images."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import TINY
from sklearn.metrics import accuracy_score

from helpers import evaluate, runs, train
from helpers import together as room
from helpers.augment import Augment, Settings
from helpers.data import draw_stand_in
from helpers.runtime import CourseError, generator
from helpers.together import FILE, mean_of_weights, together

pytestmark = pytest.mark.usefixtures("one_thread")


def networks(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(3)
    return [TINY.network().to(memory_format=torch.channels_last).eval() for _ in range(count)]


def test_weights_are_means_and_statistics_are_counted_anew(stand_in):
    models = networks(3)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    soup = mean_of_weights(models, stand_in.train.images[:200], Augment("none"))
    for name, parameter in soup.named_parameters():
        mean = sum(model.get_parameter(name) for model in models) / 3
        torch.testing.assert_close(parameter, mean)
    seen = soup.stem[0](Augment("none")(stand_in.train.images[:200]))
    torch.testing.assert_close(soup.stem[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soup.stem[1].running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not soup.training
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_all_images_count_for_the_statistics():
    """Also those beyond the first batch, which are of another kind here."""
    images = draw_stand_in(1_000, seed=1).images
    images[500:] = 255 - images[500:] // 2
    soup = mean_of_weights(networks(2), images, Augment("none"))
    seen = soup.stem[0](Augment("none")(images))
    torch.testing.assert_close(soup.stem[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_branches_are_not_left_out_while_statistics_are_counted(stand_in):
    model = TINY.but(blocks=(1, 1, 1), drop_path=0.9).network()  # behind the last block there are no statistics
    one, again = (mean_of_weights([model], stand_in.train.images[:50], Augment("none")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), again.buffers(), strict=True))


def test_the_mean_of_one_network_is_that_network(stand_in):
    model = networks(1)[0]
    soup = mean_of_weights([model, model], stand_in.train.images[:100], Augment("none"))
    assert all(torch.equal(a, b) for a, b in zip(soup.parameters(), model.parameters(), strict=True))


@pytest.fixture(scope="module")
def no_cifar():
    """The stand-in set is the test set, wherever CIFAR-10 is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR10_ROOT", "/nonexistent/cifar")
        yield


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, stand_in, no_cifar):
    folder = tmp_path_factory.mktemp("store") / TINY.name
    for seed in (0, 1):
        train.fit(TINY.but(seed=seed), stand_in, folder / str(seed))
        evaluate.test_run(folder / str(seed), stand_in=True)
    return folder


def test_seeds_are_tested_alone_and_together(seeds):
    table = together(seeds, stand_in=True).set_index("network")
    assert list(table.index) == ["seed 0", "seed 1", "mean of predictions", "mean of weights"]
    found = [runs.read(seeds / str(seed)) for seed in (0, 1)]
    for seed, run in enumerate(found):
        test = run.record["test"]
        assert table.loc[f"seed {seed}", "accuracy"] == pytest.approx(test["accuracy"], abs=1e-6)
        assert table.loc[f"seed {seed}", "count"] == test["count"]
    test = evaluate.own_test(found[0], stand_in=True)
    p = sum(evaluate.predict(evaluate.load_model(run), test.images, Augment("none"), TINY.precision).softmax(1)
            for run in found)  # fmt: skip
    right = accuracy_score(test.labels, p.argmax(1))
    assert table.loc["mean of predictions", "accuracy"] == pytest.approx(right, abs=1e-6)
    assert (table.low < table.accuracy).all() and (table.accuracy < table.high).all()
    assert pd.read_csv(seeds / FILE).equals(table.reset_index())


def test_statistics_are_counted_on_training_images_as_they_are_augmented(seeds, tmp_path, monkeypatch):
    seen, changes = [], {"stage": "rotation_autoaugment", "policy": "randaugment", "strength": 0.5}
    shutil.copytree(seeds, tmp_path / "tiny")
    for path in (tmp_path / "tiny").glob("*/"):
        record = runs.read(path).record
        runs.write_record(path, {**record, "recipe": {**record["recipe"], **changes}})
    monkeypatch.setattr(room, "mean_of_weights", lambda models, *given: seen.append(given) or models[0])
    together(tmp_path / "tiny", stand_in=True)
    ((images, augment),) = seen
    assert torch.equal(images, train.training_data(TINY, stand_in=True).train.images)
    expected = Augment("rotation_autoaugment", policy="randaugment", settings=Settings().scaled(0.5))
    assert torch.equal(augment(images[:40], generator(1)), expected(images[:40], generator(1)))


def test_a_damaged_seed_is_left_out(seeds, tmp_path):
    for seed in ("0", "1", "2"):
        shutil.copytree(seeds / str(min(int(seed), 1)), tmp_path / seed)
    (tmp_path / "2" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match="Left out: .*2 is not a finished run") as said:
        assert together(tmp_path, stand_in=True).network.tolist()[:2] == ["seed 0", "seed 1"]
    assert len(said) == 1


def test_one_seed_is_refused(seeds, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(CourseError, match=r"x has 0 seeds with weights, and it takes two"):
        together(tmp_path / "x", stand_in=True)


def test_a_seed_of_another_recipe_is_not_one_of_them(seeds, tmp_path):
    shutil.copytree(seeds, tmp_path / "tiny")
    shutil.copytree(seeds / "1", tmp_path / "tiny" / "2")
    record = runs.read(seeds / "1").record
    runs.write_record(tmp_path / "tiny" / "2", {**record, "recipe": {**record["recipe"], "seed": 2, "momentum": 0.5}})
    assert list(together(tmp_path / "tiny", stand_in=True).network[:3]) == ["seed 0", "seed 1", "mean of predictions"]


@pytest.mark.parametrize("path", sorted(runs.RECORDED.glob(f"*/{FILE}")), ids=lambda path: path.parent.name)
def test_what_is_recorded_of_seeds_together_is_of_the_recorded_seeds(path):
    table = pd.read_csv(path).set_index("network")
    alone = table[table.index.str.startswith("seed")]
    tests = {f"seed {run.parent.name}": runs.read(run.parent).record["test"] for run in path.parent.glob("*/run.json")}
    assert set(alone.index) == set(tests)
    for name, row in alone.iterrows():
        assert row.accuracy == pytest.approx(tests[name]["accuracy"], abs=1e-6) and row["count"] == tests[name]["count"]
