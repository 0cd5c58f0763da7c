"""Accuracy without labels: the estimators on cases whose answer is known, the trials, the intervals, the whole path."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import bootstrap, norm

from helpers import assess, data, distort, estimate, evaluate, publish, runs
from helpers.runtime import CourseError, generator, percent

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(count, seed, sharpness=3.0, nets=1):
    """Logits [nets, count, 10] and labels that they get right about as often as they say."""
    g = generator(seed)
    base = sharpness * torch.randn(count, 10, generator=g)
    labels = torch.multinomial(base.softmax(1), 1, generator=g)[:, 0]
    return base + torch.randn(nets, count, 10, generator=g), labels


# ------------------------------------------------------------------------------------------------- the estimators


@given(st.integers(1, 400), st.integers(0, 20))
def test_without_a_shift_each_method_predicts_the_validation_accuracy(count, seed):
    logits, labels = drawn(count, seed, nets=3)
    truth = sklearn.metrics.accuracy_score(labels, logits[0].argmax(1))
    assert estimate.atc(logits[0], labels, logits[0]) == truth
    assert estimate.doc(logits[0], labels, logits[0]) == pytest.approx(truth)
    least = 0.5 / count  # none and all have no normal quantile
    assert estimate.agreement_on_the_line(logits, labels, logits) == pytest.approx(np.clip(truth, least, 1 - least))


def test_atc_is_the_share_above_the_threshold_of_garg_et_al():
    """Against the definition, a threshold at a time: share above it as near as can be to the validation accuracy."""
    (val, labels), (other, _) = drawn(300, 1), drawn(500, 2, sharpness=1.0)
    entropy = lambda x: (x.softmax(-1) * x.log_softmax(-1)).sum(-1).numpy()  # noqa: E731
    score, truth = entropy(val[0].double()), sklearn.metrics.accuracy_score(labels, val[0].argmax(1))
    threshold = min(score, key=lambda t: abs((score >= t).mean() - truth))
    assert estimate.atc(val[0], labels, other[0]) == (entropy(other[0].double()) >= threshold).mean()


def test_atc_of_a_network_that_is_never_right_is_none():
    logits = torch.eye(10)
    assert estimate.atc(logits, (torch.arange(10) + 1) % 10, logits) == 0


def test_doc_takes_the_fall_in_confidence_off_the_accuracy():
    def sure(share, count):  # two classes; the first has this share
        return torch.tensor([[share, 1 - share]]).log().repeat(count, 1)

    labels = (torch.arange(10) >= 8).long()  # 80 % right
    assert estimate.doc(sure(0.9, 10), labels, sure(0.7, 30)) == pytest.approx(0.6, abs=1e-6)
    assert estimate.doc(sure(0.6, 10), labels, sure(0.95, 30)) == 1.0, "a share stays one"


def test_networks_that_are_the_same_agree_on_everything():
    logits, _ = drawn(50, 3)
    assert estimate.agreement(logits.repeat(4, 1, 1)) == 1
    assert estimate.agreement(torch.stack([logits[0], -logits[0], logits[0]])) == 0.5
    labels = logits[0].argmax(1)
    assert estimate.agreement_on_the_line(logits.repeat(2, 1, 1), labels, logits.repeat(2, 1, 1)) == pytest.approx(0.99)


def test_agreement_moves_the_accuracy_along_a_line_of_slope_one():
    said = lambda *classes: torch.nn.functional.one_hot(torch.tensor(classes), 10).float()  # noqa: E731
    labels = torch.tensor([0] * 9 + [1])  # the first network is right on 90 %
    val = torch.stack([said(*[0] * 10), said(*[0] * 8, 1, 1)])  # 80 % agree
    other = torch.stack([said(*[0] * 10), said(*[0] * 6, *[1] * 4)])  # 60 % agree
    expected = norm.cdf(norm.ppf(0.9) - norm.ppf(0.8) + norm.ppf(0.6))
    assert estimate.agreement_on_the_line(val, labels, other) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- trials, intervals


def table(errors):
    """Trials of one method whose errors are given: {kind: [errors by severity]}."""
    rows = [{"kind": kind, "severity": i, "method": "ATC", "predicted": 0.5 + error, "true": 0.5, "count": 100}
            for kind, values in errors.items() for i, error in enumerate(values)]  # fmt: skip
    return pd.DataFrame(rows)


def test_agreement_on_everything_has_a_quantile_of_the_larger_set():
    """None of 1,000 images counts as half a one, not as half of ten: 10 validation images of which 9 agree."""
    logits = torch.eye(10).repeat(100, 1)
    val = torch.stack((torch.eye(10), torch.eye(10)))
    val[1, 0] = val[1, 1]
    found = estimate.agreement_on_the_line(val, torch.arange(10), torch.stack((logits, logits)))
    quantile = lambda share: norm.ppf(np.clip(share, 0.0005, 0.9995))  # noqa: E731
    assert found == pytest.approx(norm.cdf(quantile(1.0) - (quantile(0.9) - quantile(1.0))))


def test_the_method_that_erred_least_comes_first():
    off = {"DoC": 0.2, "ATC": 0.1}
    rows = [(kind, 1, method, 0.5 + off[method], 0.5, 10) for kind in ("fog", "snow") for method in off]
    table = pd.DataFrame(rows, columns=["kind", "severity", "method", "predicted", "true", "count"])
    assert estimate.errors(table).method.tolist() == ["ATC", "DoC"]


def test_errors_are_the_mean_absolute_error_with_an_interval_over_kinds():
    draws = np.random.default_rng(0)
    given_ = {f"kind {i}": draws.normal(0.02, 0.05) + draws.normal(0, 0.005, 3) for i in range(19)}
    (row,) = estimate.errors(table(given_)).itertuples()
    every = np.concatenate(list(given_.values()))
    assert row.error == pytest.approx(sklearn.metrics.mean_absolute_error(np.full(57, 0.5), 0.5 + every))
    assert row.bias == pytest.approx(every.mean())
    assert (row.under, row.over) == pytest.approx(tuple(np.quantile(every, (0.025, 0.975))))
    kinds = [np.abs(values).mean() for values in given_.values()]
    theirs = bootstrap((kinds,), np.mean, method="percentile", n_resamples=5_000, random_state=1).confidence_interval
    assert (row.low, row.high) == pytest.approx(tuple(theirs), abs=0.002)


def test_an_estimate_has_an_interval_for_the_draw_and_a_wider_one_for_the_method():
    (val, labels), (other, _) = drawn(400, 4), drawn(900, 5, sharpness=2.0)
    trials = table({"a": [-0.1] * 20, "b": [0.05] * 20})
    (row,) = estimate.estimate(val, labels, other, trials).itertuples()
    assert row.method == "ATC" and row.predicted == estimate.atc(val[0], labels, other[0])
    assert row.low < row.predicted < row.high and row.error == pytest.approx(0.075)
    assert (row.outer_low, row.outer_high) == pytest.approx((row.low - 0.05, row.high + 0.1))
    spread = np.sqrt(0.25 / 400 + 0.25 / 900)  # no share of 400 and of 900 images can vary more
    assert 0.5 * spread < (row.high - row.low) / 3.92 < 1.3 * spread
    again = estimate.estimate(val, labels, other, trials)
    assert again.low[0] == row.low, "seeded"


def test_the_interval_holds_the_luck_of_validation_too():
    """Every image as sure as every other: DoC is the validation accuracy, and its interval scipy's of that alone."""
    labels = torch.arange(80) % 10
    val = torch.nn.functional.one_hot(labels, 10).float()[None]
    val[:, :20] = val[:, :20].roll(1, 2)  # a quarter wrong
    trials = table({"a": [0.0], "b": [0.0]}).assign(method="DoC")
    (row,) = estimate.estimate(val, labels, val[:, :50], trials).itertuples()
    right = (val[0].argmax(1) == labels).numpy().astype(float)
    theirs = bootstrap((right,), np.mean, method="percentile", random_state=1).confidence_interval
    assert row.predicted == pytest.approx(0.75) and (row.low, row.high) == pytest.approx(tuple(theirs), abs=0.026)


def test_the_interval_holds_the_luck_of_a_small_set():
    (val, labels), (other, _) = drawn(4_000, 4), drawn(60, 5, sharpness=2.0)
    (row,) = estimate.estimate(val, labels, other, table({"a": [0.0], "b": [0.0]})).itertuples()
    assert (row.high - row.low) / 3.92 > 0.5 * np.sqrt(0.25 / 60)


def test_the_interval_for_the_draw_covers_it():
    """Sets drawn the same way as validation: 95 % of the intervals should hold the expected share."""
    held = 0
    trials = table({"a": [0.0], "b": [0.0]})
    expected = evaluate.accuracy(*(part[0] if part.ndim == 3 else part for part in drawn(200_000, 99))).value
    for seed in range(40):
        (val, labels), (other, _) = drawn(200, 100 + seed), drawn(200, 200 + seed)
        (row,) = estimate.estimate(val, labels, other, trials).itertuples()
        held += row.low <= expected <= row.high
    assert held >= 33  # fewer than one time in a hundred, if 38 are expected


# ------------------------------------------------------------------------------------------------- runs, end to end


@pytest.fixture
def seeds(finished_tiny, tmp_path):
    """Two finished runs of one recipe with other seeds and weights; one of another recipe; one without weights."""
    store = tmp_path / "tiny"
    for seed in range(4):
        shutil.copytree(finished_tiny, store / str(seed))
        record = runs.read(finished_tiny).record
        changed = {"seed": seed} | ({"momentum": 0.5} if seed == 2 else {})
        runs.write_record(store / str(seed), {**record, "recipe": {**record["recipe"], **changed}})
    weights = load_file(store / "1" / "best.safetensors")
    weights["fc.weight"] += 0.2 * torch.randn(weights["fc.weight"].shape, generator=generator(1))
    save_file(weights, store / "1" / "best.safetensors")
    (store / "3" / "best.safetensors").unlink()
    return store


def test_siblings_differ_in_the_seed_alone_and_have_weights(seeds):
    names = [[sibling.path.name for sibling in estimate.siblings(runs.read(seeds / seed))] for seed in ("0", "1", "2")]
    assert names == [["0", "1"], ["1", "0"], ["2"]]
    runs.write_record(seeds / "1", {**runs.read(seeds / "1").record, "data": "CIFAR-10"})
    assert len(estimate.siblings(runs.read(seeds / "0"))) == 1, "nor is what was trained on other images"


def test_a_seed_from_before_a_field_existed_is_a_sibling(seeds):
    record = runs.read(seeds / "1").record
    del record["recipe"]["compiled"]
    runs.write_record(seeds / "1", record)
    names = [[sibling.path.name for sibling in estimate.siblings(runs.read(seeds / seed))] for seed in ("0", "1")]
    assert names == [["0", "1"], ["1", "0"]]


def test_trials_are_fitted_and_tried_on_validation_images_and_kept(seeds, stand_in, monkeypatch):
    monkeypatch.setattr(distort, "KINDS", ("contrast", "pixelate"))
    run, val = runs.read(seeds / "0"), stand_in.val
    found = estimate.trials(run, val, count=60)
    assert len(found) == 2 * 3 * 3 and set(found["count"]) == {60} and set(found.method) == {"ATC", "DoC", "agreement"}
    models = [evaluate.load_model(runs.read(seeds / seed)) for seed in ("0", "1")]
    clean = estimate.stack(models, val.images[:60], "float32")
    other = estimate.stack(models, distort.distort(val.images[:60], "contrast", 5), "float32")
    row = found[(found.kind == "contrast") & (found.severity == 5)].set_index("method")
    assert row.true.tolist() == [sklearn.metrics.accuracy_score(val.labels[:60], other[0].argmax(1))] * 3
    for method, predicted in estimate.predictions(clean, val.labels[:60], other).items():
        assert row.predicted[method] == pytest.approx(predicted)
    kept = (seeds / "0" / "estimates.csv").read_bytes()
    monkeypatch.setattr(estimate, "try_on_distortions", None)  # what is kept is not made again
    pd.testing.assert_frame_equal(estimate.trials(run, val, count=60), found, atol=1e-6)
    assert (seeds / "0" / "estimates.csv").read_bytes() == kept
    (seeds / "0" / "estimates.csv").unlink()
    (seeds / "1").rename(seeds.parent / "away")
    monkeypatch.undo()
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    assert set(estimate.trials(run, val, count=60).method) == {"ATC", "DoC"}
    (seeds.parent / "away").rename(seeds / "1")
    assert "agreement" in set(estimate.trials(run, val, count=60).method), "a sibling has come since"
    shutil.copytree(seeds / "1", seeds / "4")
    record = runs.read(seeds / "1").record
    runs.write_record(seeds / "4", {**record, "recipe": {**record["recipe"], "seed": 4}})
    assert set(estimate.trials(run, val, count=60).networks) == {3}, "and another"
    assert set(estimate.trials(run, val, count=50)["count"]) == {50}, "of fewer images"
    kept = (seeds / "0" / "estimates.csv").read_bytes()
    for seed in ("1", "4"):
        shutil.rmtree(seeds / seed)
    assert set(estimate.trials(run, val, count=50).networks) == {1}
    assert (seeds / "0" / "estimates.csv").read_bytes() == kept, "what took more networks is not written over"


HEAD = "kind,severity,method,predicted,true,count\n"


@pytest.mark.parametrize("left", ["", "a\n", HEAD, f"{HEAD}contrast,1,ATC,x,0.5,60\n", f"{HEAD}fog,1,ATC,,1,9\n", "\0"])
def test_damaged_trials_are_made_anew(seeds, stand_in, monkeypatch, left):
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    run = runs.read(seeds / "2")
    found = estimate.trials(run, stand_in.val, count=60)
    (seeds / "2" / "estimates.csv").write_text(left)
    pd.testing.assert_frame_equal(estimate.trials(run, stand_in.val, count=60), found)


def test_a_published_file_reads_what_was_tried_for_its_record(seeds, stand_in, tmp_path, monkeypatch, without_cifar10):
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    run = evaluate.test_run(seeds / "2", stand_in=True)
    published = publish.publish(run.path, tmp_path / "x.safetensors", stand_in=True)
    estimate.trials(run, stand_in.val, count=60)
    found = estimate.read(run.path / estimate.FILE).assign(predicted=0.5)
    runs.write_table(run.path / estimate.FILE, found)
    monkeypatch.setattr(runs, "RECORDED", seeds.parent)
    pd.testing.assert_frame_equal(estimate.trials(published, stand_in.val, count=60), found)
    other = runs.Run(published.path, {**published.record, "commit": "0" * 40})
    before = evaluate.own_images(other, stand_in=True)
    assert not list(seeds.parent.rglob(evaluate.OWN_IMAGES)), "of weights whose run is not recorded nothing is kept"
    pd.testing.assert_frame_equal(evaluate.own_images(published, stand_in=True), before)
    runs.write_table(run.path / evaluate.OWN_IMAGES, before.assign(accuracy=0.25))
    assert set(evaluate.own_images(published).accuracy) == {0.25}, "kept beside the recorded run, and read"
    assert not estimate.trials(other, stand_in.val, count=60).predicted.eq(0.5).all()


def test_estimates_are_fitted_on_images_of_the_runs_own_data(seeds, tmp_path, without_cifar10):
    """A run on CIFAR-10, where that is not: the submission is written, and nothing is fitted on drawn shapes."""
    record = runs.read(seeds / "0").record
    run = runs.Run(seeds / "0", {**record, "data": data.CIFAR10})
    pixels = data.draw_stand_in(20, seed=8).images.permute(0, 2, 3, 1).contiguous().numpy()
    (tmp_path / "set.pkl").write_bytes(pickle.dumps({b"data": pixels, b"ids": np.arange(20)}))
    with pytest.raises(CourseError, match="trained on CIFAR-10, the images here are stand-in"):
        assess.shifted(run, tmp_path / "set.pkl", tmp_path / "out", stand_in=True)
    assert len(pd.read_csv(tmp_path / "out" / "submission.csv")) == 20
    assert not (seeds / "0" / "estimates.csv").exists()


def test_an_unlabelled_set_gets_a_submission_and_an_estimate(seeds, tmp_path, without_cifar10, monkeypatch, capsys):
    monkeypatch.setattr(distort, "KINDS", ("contrast", "pixelate"))
    images = data.draw_stand_in(50, seed=8).images
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    with (tmp_path / "set.pkl").open("wb") as file:
        pickle.dump({b"data": pixels, b"ids": np.arange(50) + 100}, file)
    run, out = runs.read(seeds / "0" / "best.safetensors"), tmp_path / "out"
    given, trials, found, made = [], estimate.trials, [], estimate.estimate
    monkeypatch.setattr(estimate, "trials", lambda run, val: given.append(val) or trials(run, val))
    monkeypatch.setattr(estimate, "estimate", lambda *known: found.append(made(*known)) or found[-1])
    assess.shifted(run, tmp_path / "set.pkl", out, stand_in=True)
    held_out = assess.training_data(assess.Recipe.from_dict(run.record["recipe"]), True).val
    assert torch.equal(given[0].images, held_out.images), "tried on images that the network has not learned from"
    printed = capsys.readouterr().out
    assert data.BANNER in printed and "50 rows of ID,Labels" in printed
    assert all(f"  {method} " in printed for method in ("ATC", "DoC", "agreement")) and "truth" not in printed
    for row in found[0].itertuples():
        low, high, outer_low, outer_high = map(percent, (row.low, row.high, row.outer_low, row.outer_high))
        assert f"drawn [{low}, {high}]   in all [{outer_low}, {outer_high}]" in printed
        assert (low, high) != (outer_low, outer_high)
    submission = pd.read_csv(out / "submission.csv")
    logits = estimate.stack([evaluate.load_model(run)], images, "float32")[0]
    assert submission.ID.tolist() == list(range(100, 150)) and submission.Labels.tolist() == logits.argmax(1).tolist()
    assert sorted(path.name for path in out.iterdir()) == ["estimates.png", "submission.csv"]
    assert (seeds / "0" / "estimates.csv").exists()


def test_a_folder_without_labels_may_be_the_current_one(seeds, tmp_path, without_cifar10, monkeypatch, capsys):
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    (tmp_path / "set").mkdir()
    for number, image in enumerate(data.draw_stand_in(12, seed=8).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "set" / f"{number}.png")
    monkeypatch.chdir(tmp_path / "set")
    assess.shifted(runs.read(seeds / "1"), Path("."), tmp_path / "out", stand_in=True)
    assert "12 rows of ID,Labels" in capsys.readouterr().out


def test_labels_beside_an_unlabelled_set_are_told_after_the_estimates(
    seeds, tmp_path, without_cifar10, monkeypatch, capsys
):
    images, labels, *_ = data.draw_stand_in(50, seed=8)
    path, run = distort.write_competition_like(tmp_path / "set.pkl", images, labels), runs.read(seeds / "1")
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    answers = tmp_path / "set-labels.csv"
    table = pd.read_csv(answers)
    table.sample(frac=1, random_state=0).to_csv(answers, index=False)  # in any order: an image is found by its ID
    assess.shifted(run, path, tmp_path / "out", stand_in=True)
    submission = pd.read_csv(tmp_path / "out" / "submission.csv")
    right = sklearn.metrics.accuracy_score(table.Labels, submission.Labels)
    before, _, told = capsys.readouterr().out.partition("the truth, from ")
    assert "ATC" in before and f"set-labels.csv: {percent(right)}" in told
    for damage in (table[1:], table.assign(Labels=10), table.assign(Labels=0.5), table.rename(columns={"ID": "id"}),
                   pd.concat([table, table[:1]])):  # fmt: skip
        damage.to_csv(answers, index=False)
        with pytest.raises(CourseError, match=r"set-labels\.csv does not give the 50 images their labels"):
            assess.shifted(run, path, tmp_path / "refused", stand_in=True)
    assert not (tmp_path / "refused").exists(), "refused before minutes go by"


def test_a_labelled_set_and_a_cifar_10_c_folder_are_told_apart(seeds, tmp_path, monkeypatch, capsys):
    images, labels, *_ = data.draw_stand_in(50, seed=8)
    folder, out = tmp_path / "corrupted", tmp_path / "out"
    folder.mkdir()
    np.save(folder / "contrast.npy", images.permute(0, 2, 3, 1).numpy())
    np.save(folder / "labels.npy", labels.numpy())
    run = runs.read(seeds / "1")
    drawn = {}
    monkeypatch.setattr(assess, "_save", lambda figure, path: drawn.update({path.name: figure.axes[0]}))
    assess.shifted(run, folder, out)
    said = capsys.readouterr().out
    assert re.search(r"mean of those that are scored \S+ %: 1 scored kind at 5 severities, 10 images each\n", said)
    logits = evaluate.predict(evaluate.load_model(run), images, evaluate.Augment("none"), "float32").cpu()
    answers = logits.argmax(1)
    right = [sklearn.metrics.accuracy_score(*pair) for pair in zip(labels.split(10), answers.split(10), strict=True)]
    np.testing.assert_allclose(pd.read_csv(out / "corruptions.csv").accuracy, right)
    np.testing.assert_allclose(drawn["corruptions.png"].collections[0].get_array().ravel(), 100 * np.array(right))
    assess.shifted(run, folder / "contrast.npy", out)
    assert str(evaluate.accuracy(logits, labels)) in capsys.readouterr().out
    (folder / "contrast.npy").rename(folder / "saturate.npy")  # which CIFAR-10-C does not score
    assess.shifted(run, folder, out)
    assert "no mean: 0 scored kinds at 5 severities, 10 images each" in capsys.readouterr().out
    (folder / "saturate.npy").rename(folder / "contrast.npy")
    shares = 100 * sklearn.metrics.confusion_matrix(labels, answers, labels=range(10), normalize="true")
    np.testing.assert_allclose(drawn["confusion.png"].collections[0].get_array().reshape(10, 10), shares)
    panel = drawn["reliability.png"]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("confidence, %", "right, %")
