"""The evaluation room against scipy, scikit-learn and plain NumPy; predictions that leave the network as it was."""

import copy
import json
import os
import platform
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from helpers import assess, data, distort, evaluate, plots, runs, runtime, train
from helpers.augment import Augment, Settings
from helpers.recipe import Recipe
from helpers.runtime import CourseError, generator, percent, pick_device

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_that_say(predicted, classes=10):
    """Logits float32 [N, classes] with the given arg max and otherwise random."""
    noise = torch.rand(len(predicted), classes, generator=generator(7))
    return noise + 2 * F.one_hot(predicted, classes)


# ------------------------------------------------------------------------------------------- counts and intervals


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_the_accuracy_interval_is_scipys_wilson(count, share):
    correct = round(share * count)
    labels = torch.zeros(count, dtype=torch.int64)
    predicted = (torch.arange(count) >= correct).long()
    ours = evaluate.accuracy(F.one_hot(predicted, 10).float(), labels)
    theirs = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert ours.value == correct / count and ours.count == count
    assert ours.low == pytest.approx(theirs.low, abs=1e-9) and ours.high == pytest.approx(theirs.high, abs=1e-9)


def test_of_no_images_there_is_no_accuracy():
    with pytest.raises(CourseError, match="no images to count on"):
        evaluate.accuracy(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))


def test_an_accuracy_reads_as_per_cent():
    assert str(evaluate.Accuracy(0.9594, 0.9553, 0.9631, 10_000)) == "95.94 % [95.53, 96.31]"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_confusion_is_scikit_learns(pairs):
    labels, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    ours = evaluate.confusion(logits_that_say(predicted), labels)
    theirs = sklearn.metrics.confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(10))
    assert np.array_equal(ours, theirs)
    assert json.loads(json.dumps(ours)) == ours  # plain numbers, as a record needs them


@given(st.integers(1, 300), st.integers(0, 5))
def test_metrics_are_scikit_learns(count, seed):
    draws = np.random.default_rng(seed)
    logits, labels = (
        torch.from_numpy(3 * draws.normal(size=(count, 10))),
        torch.from_numpy(draws.integers(0, 10, count)),
    )
    ours, everything = evaluate.metrics(logits, labels), {"labels": range(10)}
    assert ours["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    assert ours["top_2"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, logits, k=2, **everything))
    assert ours["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, logits.softmax(1), **everything), rel=1e-6)
    assert ours["calibration_error"] == pytest.approx(plain_calibration_error(logits.numpy(), labels.numpy(), 15))
    assert json.loads(json.dumps(ours)) == ours


def test_each_class_has_scikit_learns_recall_and_scipys_interval():
    draws = np.random.default_rng(0)
    labels, predicted = draws.integers(0, 9, 400), draws.integers(0, 10, 400)  # nothing is of the last class
    counts = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(10)).tolist()
    found = evaluate.per_class(counts, data.CLASSES)
    recall = sklearn.metrics.recall_score(labels, predicted, labels=range(9), average=None)
    assert found["class"].tolist() == list(data.CLASSES[:9])
    np.testing.assert_allclose(found.accuracy, recall)
    first = binomtest(counts[0][0], sum(counts[0])).proportion_ci(0.95, method="wilson")
    assert (found.low[0], found.high[0]) == pytest.approx((first.low, first.high))


# -------------------------------------------------------------------------------------------------- calibration


def plain_calibration_error(logits, labels, bins):
    """Guo et al. 2017, eq. 3, a bin at a time: sum over bins of |B| / n * |accuracy(B) - confidence(B)|."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 5, 15, 30])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_calibration_error_is_the_plain_one(bins, sharpness):
    draws = np.random.default_rng(bins)
    logits = (sharpness * draws.normal(size=(997, 10))).astype(np.float32)
    labels = draws.integers(0, 10, 997)
    ours = evaluate.calibration_error(torch.from_numpy(logits), torch.from_numpy(labels), bins)
    assert ours == pytest.approx(plain_calibration_error(logits.astype(float), labels, bins), abs=1e-5)


def test_a_network_that_is_right_as_often_as_it_says_has_no_calibration_error():
    # a hundred predictions at each of three confidences, of which 50, 70 and 90 are right
    confidence = torch.tensor([0.5, 0.7, 0.9]).repeat_interleave(100)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    right = torch.cat([torch.arange(100) < share for share in (50, 70, 90)])
    assert evaluate.calibration_error(logits, (~right).long()) == pytest.approx(0, abs=1e-6)


def test_a_network_that_is_sure_and_wrong_has_the_worst_calibration_error():
    logits = torch.tensor([[100.0, 0.0]] * 50)
    assert evaluate.calibration_error(logits, torch.ones(50, dtype=torch.int64)) == pytest.approx(1)
    assert evaluate.calibration_error(logits, torch.zeros(50, dtype=torch.int64)) == pytest.approx(0)


# -------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predict_leaves_the_network_as_it_was(tiny, stand_in, training, precision):
    model = tiny.but(dropout=0.5).network().train(training)
    before = copy.deepcopy(model.state_dict())
    first = evaluate.predict(model, stand_in.val.images, Augment("none"), precision)
    second = evaluate.predict(model, stand_in.val.images, Augment("none"), precision)
    assert torch.equal(first, second)  # dropout is off
    assert first.dtype == torch.float32 and first.shape == (100, 10) and not first.requires_grad
    assert model.training is training and all(module.training is training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # batch norm's too
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_float32_where_it_would_be_imitated(tiny, stand_in, monkeypatch, native):
    monkeypatch.setattr(evaluate, "has_bfloat16", lambda device: native)
    torch.manual_seed(0)
    model, images = tiny.network(), stand_in.val.images[:20]
    asked, plain = (evaluate.predict(model, images, Augment("none"), kind) for kind in ("bfloat16", "float32"))
    assert torch.equal(asked, plain) is not native
    assert (asked - plain).abs().max() < 0.1


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="Linux on x86")
def test_bfloat16_is_for_cpus_with_avx512(monkeypatch, one_thread):
    cpu, flags = torch.device("cpu"), Path("/proc/cpuinfo").read_text().split()
    if "avx_ne_convert" not in flags:  # another set of instructions for it, of CPUs without AVX-512
        assert runtime.has_bfloat16(cpu) is ({"avx512bw", "avx512vl", "avx512dq"} <= set(flags))
    for native, end in ((True, ", 1 thread"), (False, ", 1 thread, no bfloat16")):
        monkeypatch.setattr(runtime, "has_bfloat16", lambda device, native=native: native)
        assert runtime.device_name(cpu).endswith(end)


def test_predict_is_the_network_in_evaluation_mode(tiny, stand_in):
    model = tiny.network().train()
    ours = evaluate.predict(model, stand_in.val.images, Augment("none"), "float32")
    images = (stand_in.val.images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(ours, model.eval()(images), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 99, 100, 101])
def test_batches_change_neither_results_nor_order(tiny, stand_in, batch_size):
    model, images = tiny.network(), stand_in.val.images
    whole = evaluate.predict(model, images, Augment("none"), "float32")
    assert torch.allclose(
        evaluate.predict(model, images, Augment("none"), "float32", batch_size=batch_size), whole, atol=1e-5
    )
    reverse = evaluate.predict(model, images.flip(0), Augment("none"), "float32", batch_size=batch_size)
    assert torch.allclose(reverse.flip(0), whole, atol=1e-5)


def test_augmented_predictions_come_from_the_generator(tiny, stand_in):
    model, augment = tiny.network(), Augment("crop_flip")
    a, b, c = (evaluate.predict(model, stand_in.val.images, augment, "float32", generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_mirrored_predictions_are_the_mean_of_two_softmaxes(tiny, stand_in):
    model, images = tiny.network(), stand_in.val.images
    logits, ours = evaluate.predict_mirrored(model, images, "float32")
    assert torch.equal(logits, evaluate.predict(model, images, Augment("none"), "float32"))
    sides = (evaluate.predict(model, side, Augment("none"), "float32").softmax(1) for side in (images, images.flip(3)))
    mean = sum(side.double() for side in sides) / 2
    assert torch.allclose(ours.softmax(1).double(), mean, atol=1e-6)
    assert torch.allclose(ours.exp().sum(1), torch.ones(len(images)), atol=1e-5)
    assert torch.allclose(evaluate.predict_mirrored(model, images.flip(3), "float32")[1], ours, atol=1e-5)


def test_a_test_set_passes_the_network_twice(tiny, stand_in):
    """Once as it is and once mirrored: both kinds of answer come from these passes."""
    model, seen = tiny.network().eval(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found, logits = evaluate.report(model, stand_in.val, "float32")
    assert seen == [100, 100]
    assert found == evaluate.test_metrics(model, stand_in.val, "float32")
    assert found["accuracy"] == evaluate.accuracy(logits, stand_in.val.labels).value


def test_a_summary_has_a_column_of_each_kind_of_answer(tiny, stand_in):
    found = evaluate.test_metrics(tiny.network(), stand_in.val, "float32")
    for part, (_, column) in zip((found, found["mirrored"]), evaluate.summary(found).items(), strict=True):
        assert column["negative log-likelihood"] == f"{part['loss']:.4f}"
        assert column["calibration error"] == percent(part["calibration_error"])
        assert column["accuracy"].startswith(percent(part["accuracy"]))
    assert found["loss"] != found["mirrored"]["loss"]


# ------------------------------------------------------------------------------------------------ corruptions


@pytest.fixture
def corrupted(tmp_path):
    """A folder in the layout of CIFAR-10-C: two kinds, 20 images at each of five severities."""
    images, labels, *_ = data.draw_stand_in(20, seed=2)
    for kind in ("contrast", "pixelate"):
        parts = [distort.distort(images, kind, severity) for severity in distort.SEVERITIES]
        np.save(tmp_path / f"{kind}.npy", torch.cat(parts).permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "labels.npy", labels.repeat(5).numpy())
    return tmp_path


def test_a_cifar_10_c_folder_is_its_kinds_and_severities(corrupted, tiny):
    images, labels, *_ = data.draw_stand_in(20, seed=2)
    found = list(evaluate.read_corrupted(corrupted))
    assert [(kind, severity) for kind, severity, *_ in found] == [
        (kind, severity) for kind in ("contrast", "pixelate") for severity in range(1, 6)
    ]
    for kind, severity, read, truth in found:
        assert torch.equal(read, distort.distort(images, kind, severity)) and torch.equal(truth, labels)
    model = tiny.network()
    table, logits, truths = evaluate.corruption_table(model, "float32", found)
    for row, (_, _, read, truth) in zip(table.itertuples(), found, strict=True):
        predicted = evaluate.predict(model, read, Augment("none"), "float32").argmax(1)
        assert row.accuracy == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted)) and row.count == 20
    assert evaluate.accuracy(logits, truths).value == pytest.approx(table.accuracy.mean())


@pytest.mark.parametrize("damage", [
    lambda folder: [path.unlink() for path in folder.glob("[cp]*.npy")],
    lambda folder: (folder / "labels.npy").unlink(),
    lambda folder: np.save(folder / "contrast.npy", np.zeros((99, 32, 32, 3), np.uint8)),
    lambda folder: [np.save(folder / "contrast.npy", np.zeros((99, 32, 32, 3), np.uint8)),
                    np.save(folder / "labels.npy", np.zeros(99, int))],
])  # fmt: skip
def test_what_is_no_cifar_10_c_folder_is_refused(corrupted, damage):
    damage(corrupted)
    with pytest.raises(CourseError, match=r"(expected|needs one for each).*\.$") as error:
        list(evaluate.read_corrupted(corrupted))
    assert "\n" not in str(error.value)


def test_the_mean_corruption_accuracy_weighs_kinds_alike_and_leaves_out_what_is_not_scored():
    table = pd.DataFrame({
        "kind": ["clean", "contrast", "contrast", "gaussian_noise", "of our own"], "severity": [0, 1, 5, 3, 1],
        "accuracy": [0.9, 0.4, 0.6, 0.7, 0.1],
    })  # fmt: skip
    assert evaluate.mean_corruption_accuracy(table) == pytest.approx((0.5 + 0.7) / 2)


def test_a_submission_is_in_the_competitions_form(tmp_path):
    path = tmp_path / "new" / "submission.csv"
    evaluate.write_submission(path, torch.tensor([7, 3, 5]), logits_that_say(torch.tensor([0, 9, 4])))
    assert path.read_text() == "ID,Labels\n7,0\n3,9\n5,4\n"


# ------------------------------------------------------------------------------------------------ weights and runs


@pytest.fixture
def run(finished_tiny, tmp_path):
    """A finished run in a folder of its own, to be damaged or tested."""
    shutil.copytree(finished_tiny, tmp_path / "run")
    return runs.read(tmp_path / "run")


def test_the_best_weights_are_loaded(run, stand_in):
    model = evaluate.load_model(run)
    assert not model.training
    stored = load_file(run.path / "best.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], value.cpu()) for name, value in model.state_dict().items())
    logits = evaluate.predict(model, stand_in.val.images, Augment("none"), "float32").cpu()
    best = run.history.set_index("epoch").loc[run.record["best_epoch"]]
    assert evaluate.accuracy(logits, stand_in.val.labels).value == pytest.approx(best.val_accuracy, abs=1e-6)


def test_half_precision_weights_are_loaded(run, stand_in):
    path = run.path / "best.safetensors"
    full = evaluate.predict(evaluate.load_model(run), stand_in.val.images, Augment("none"), "float32")
    halves = {n: v.half() if v.is_floating_point() else v for n, v in load_file(path).items()}
    save_file(halves, path)
    model = evaluate.load_model(run)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half = evaluate.predict(model, stand_in.val.images, Augment("none"), "float32")
    assert torch.allclose(half, full, atol=0.02) and not torch.equal(half, full)


def test_a_weights_file_beside_its_record_is_the_run(run):
    assert runs.read(run.path / "best.safetensors") == run
    shutil.copy(run.path / "best.safetensors", run.path / "other.safetensors")
    other = runs.read(run.path / "other.safetensors")
    assert other.record == run.record and other.weights == run.path / "other.safetensors"
    ours, theirs = (evaluate.load_model(each).state_dict() for each in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [
    lambda weights, path: shutil.copy(weights, path),  # neither carries a record nor lies beside one
    lambda weights, path: path.write_bytes(weights.read_bytes()[:100]),
    lambda weights, path: path.write_bytes(b""),
    lambda weights, path: save_file(load_file(weights), path, {"recipe": "pickle"}),
    lambda weights, path: save_file(load_file(weights), path, {"recipe": "{}"}),
    lambda weights, path: None,
])  # fmt: skip
def test_a_file_without_a_record_is_refused_in_a_sentence(run, tmp_path, make):
    make(run.path / "best.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(
        CourseError, match=r"alone\.safetensors is not a finished run .*its record inside or beside it\.$"
    ):
        runs.read(tmp_path / "alone.safetensors")


def one_sentence(error):
    message = str(error.value)
    return "\n" not in message and message.endswith(".") and "best.safetensors" in message


def test_missing_weights_are_said_in_a_sentence(run):
    (run.path / "best.safetensors").unlink()
    with pytest.raises(CourseError) as error:
        evaluate.load_model(run)
    assert one_sentence(error)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_torn_weights_are_said_in_a_sentence(run, share):
    path = run.path / "best.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CourseError) as error:
        evaluate.load_model(run)
    assert one_sentence(error)


def test_weights_of_another_network_are_said_in_a_sentence(run, tiny):
    weights = run.weights
    sound = load_file(weights)
    whole = {name: value.long() if name == "fc.bias" else value for name, value in sound.items()}
    counter = next(name for name, value in sound.items() if value.dtype == torch.int64)
    for other in (dict(tiny.but(width=16).network().state_dict()), whole, {**sound, "more": torch.zeros(1)},
                  {**sound, counter: sound[counter].bool()},
                  {**sound, "fc.bias": sound["fc.bias"].to(torch.float8_e4m3fn)}):  # fmt: skip
        save_file(other, weights)
        with pytest.raises(CourseError, match="is not of its recipe's network") as error:
            evaluate.load_model(run)
        assert one_sentence(error)
    save_file({**sound, "fc.bias": sound["fc.bias"] / 0}, weights)
    with pytest.raises(CourseError, match="numbers that are not finite") as error:
        evaluate.load_model(run)
    assert one_sentence(error)


def test_a_network_does_not_hang_on_its_file(run, stand_in):
    model = evaluate.load_model(run)
    before = [value.clone() for value in model.state_dict().values()]
    with run.weights.open("r+b") as file:
        file.seek(-2_000, os.SEEK_END)
        file.write(b"\1" * 2_000)
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_a_network_of_any_size_is_refused_before_it_is_made(run, monkeypatch):
    """50 blocks of each width up to 4,096 would take 66 GB: nothing of it is drawn or held."""
    claimed = {**run.record["recipe"], "blocks": [50] * 4, "width": 512}
    drawn = []
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda tensor, **_: drawn.append(tensor.device.type))
    with pytest.raises(CourseError, match="is not of its recipe's network"):
        evaluate.load_model(runs.Run(run.path, {**run.record, "recipe": claimed}))
    assert set(drawn) == {"meta"}


def test_a_tested_run_gets_the_test_metrics(run, without_cifar10):
    tested = evaluate.test_run(run.path, stand_in=True)
    assert {name: tested.record[name] for name in run.record} == run.record  # nothing else changes
    assert runs.read(run.path).record == tested.record
    test = data.load_set("test", stand_in=True)
    logits = evaluate.predict(evaluate.load_model(run), test.images, Augment("none"), "float32").cpu()
    found, counts = tested.record["test"], np.array(tested.record["test"]["confusion"])
    assert found["count"] == counts.sum() == len(test.labels)
    assert found["accuracy"] == np.trace(counts) / counts.sum()
    assert found["low"] < found["accuracy"] < found["high"]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, test.labels)), rel=1e-6)
    assert found["calibration_error"] == pytest.approx(
        plain_calibration_error(logits.double().numpy(), test.labels.numpy(), 15), abs=1e-5
    )
    assert found["classes"] == list(data.STAND_IN_CLASSES)
    mirrored = evaluate.predict_mirrored(evaluate.load_model(run), test.images, "float32")[1].cpu()
    assert found["mirrored"]["accuracy"] == evaluate.accuracy(mirrored, test.labels).value
    last = evaluate.predict(evaluate.load_model(run, last=True), test.images, Augment("none"), "float32").cpu()
    assert tested.record["test_last"] == pytest.approx(evaluate.metrics(last, test.labels))


@pytest.fixture
def few(without_cifar10, monkeypatch):
    """The stand-in set, a tenth of it."""
    monkeypatch.setattr(data, "draw_stand_in", lambda count, seed=0, draw=data.draw_stand_in: draw(count // 10, seed))


@pytest.mark.parametrize("best_epoch", [1, 4])
def test_the_last_epoch_is_tested_by_its_own_weights_unless_it_is_the_best(run, few, best_epoch):
    weights = load_file(run.weights)
    weights["fc.weight"].zero_()  # those of the last epoch answer the same to every image, if they are asked
    save_file(weights, run.path / runs.LAST)
    runs.write_record(run.path, {**run.record, "best_epoch": best_epoch})
    record = evaluate.test_run(run.path, stand_in=True).record
    alike = record["test_last"] == {name: record["test"][name] for name in record["test_last"]}
    assert alike == (best_epoch == run.record["recipe"]["epochs"])


def test_the_command_evaluate_tests_what_the_command_train_tests(run, tmp_path, few):
    shutil.copytree(run.path, tmp_path / "again")
    assessed = assess.clean(run, 0, tmp_path / "out", stand_in=True)
    assert assessed.record == evaluate.test_run(tmp_path / "again", stand_in=True).record
    assert runs.read(run.path).record == assessed.record and {"test", "test_last"} <= set(assessed.record)


@pytest.mark.parametrize("measure", [
    lambda path, out: evaluate.test_run(path, stand_in=True),
    lambda path, out: evaluate.shifted_metrics(path, (1,), 10, stand_in=True),
    lambda path, out: assess.clean(runs.read(path), 0, out, stand_in=True),
], ids=["test_run", "shifted_metrics", "evaluate"])  # fmt: skip
def test_what_others_record_meanwhile_stays(run, tmp_path, few, monkeypatch, measure):
    def meanwhile(*arguments, **options):
        record = runs.read(run.path).record
        runs.write_record(run.path, {**record, "found meanwhile": 1})
        return load_model(*arguments, **options)

    load_model = evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", meanwhile)
    measure(run.path, tmp_path / "out")
    record = runs.read(run.path).record
    assert record["found meanwhile"] == 1 and {"test", "corrupted"} & set(record)


def test_the_last_weights_are_those_the_training_ended_with(run, stand_in):
    model = evaluate.load_model(run, last=True)
    logits = evaluate.predict(model, stand_in.val.images, Augment("none"), "float32").cpu()
    last = run.history.iloc[-1]
    assert evaluate.accuracy(logits, stand_in.val.labels).value == pytest.approx(last.val_accuracy, abs=1e-6)
    assert float(F.cross_entropy(logits, stand_in.val.labels)) == pytest.approx(last.val_loss, abs=1e-5)
    (run.path / "last.safetensors").unlink()
    with pytest.raises(CourseError, match=r"last\.safetensors cannot be read"):
        evaluate.load_model(run, last=True)


@pytest.mark.parametrize("left", [b"", b"ff", b"zz", b"\xff\xfe", b"ff" * 26])
def test_a_damaged_list_of_right_answers_is_made_anew(run, few, left):
    evaluate.test_run(run.path, stand_in=True)
    right = evaluate.correct_on_test(run.path, stand_in=True)
    path = run.path / "test_correct.txt"
    whole = path.read_bytes()
    assert right.sum() == round(runs.read(run.path).record["test"]["accuracy"] * len(right)) and len(right) == 200
    path.write_bytes(left)
    assert (evaluate.correct_on_test(run.path, stand_in=True) == right).all() and path.read_bytes() == whole


def test_right_answers_are_counted_in_the_precision_of_the_recorded_accuracy(run, few, monkeypatch):
    runs.write_record(run.path, {**run.record, "recipe": {**run.record["recipe"], "precision": "bfloat16"}})
    monkeypatch.setattr(evaluate, "has_bfloat16", lambda device: True)
    kinds, autocast = [], evaluate.autocast
    monkeypatch.setattr(evaluate, "autocast", lambda device, kind: kinds.append(kind) or autocast(device, kind))
    evaluate.test_run(run.path, stand_in=True)
    evaluate.correct_on_test(run.path, stand_in=True)
    assert set(kinds) == {"bfloat16"}


def test_a_run_on_its_own_images_as_they_are_and_augmented(run, few):
    made = Recipe.from_dict(run.record["recipe"])
    own, model = train.training_data(made, stand_in=True), evaluate.load_model(run)
    found, strengths = evaluate.own_images(run, stand_in=True), [0, 0.25, 0.5, 0.75, 1]
    assert list(found.images) == ["training", "validation", *["augmented validation"] * 5]
    assert list(found.strength) == [0, 0, *strengths] and list(found["count"]) == [200, *[100] * 6]
    games = [Augment("none")] * 2
    games += [Augment("rotation_autoaugment", settings=Settings().scaled(strength)) for strength in strengths]
    sets = [own.train, *[own.val] * 6]
    for row, (images, labels, *_), augment in zip(found.itertuples(), sets, games, strict=True):
        g = generator(6)  # of all batches of a set
        with torch.no_grad():
            answers = torch.cat([model(augment(x.to(pick_device()), g)).argmax(1).cpu() for x in images.split(100)])
        assert row.accuracy == sklearn.metrics.accuracy_score(labels, answers)
        interval = binomtest(int((answers == labels).sum()), len(labels)).proportion_ci(0.95, method="wilson")
        assert (row.low, row.high) == pytest.approx(tuple(interval))
    kept = run.path / evaluate.OWN_IMAGES
    for left in ("", "images,strength\nx,1\n", "\0"):
        kept.write_text(left)
        pd.testing.assert_frame_equal(evaluate.own_images(run, stand_in=True), found)
    runs.write_table(kept, found.assign(accuracy=0.5))
    assert set(evaluate.own_images(run, stand_in=True).accuracy) == {0.5}, "read, not measured again"
    kept.unlink()
    with pytest.raises(CourseError, match="was trained on CIFAR-10, the images here are stand-in"):
        evaluate.own_images(runs.Run(run.path, {**run.record, "data": data.CIFAR10}), stand_in=True)
    assert not kept.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_own_images_are_augmented_on_a_gpu_too(run, few):
    assert len(evaluate.own_images(run, stand_in=True)) == 7


def test_own_images_are_those_of_the_runs_split(run, few):
    changed = runs.write_record(run.path, {**run.record, "recipe": {**run.record["recipe"], "split_seed": 1}})
    found = evaluate.own_images(changed, stand_in=True)
    own = train.training_data(Recipe.from_dict(changed.record["recipe"]), stand_in=True)
    model = evaluate.load_model(run)
    for row, part in zip(found.itertuples(), (own.train, own.val), strict=False):
        answers = evaluate.predict(model, part.images, Augment("none"), "float32").argmax(1).cpu()
        assert row.accuracy == sklearn.metrics.accuracy_score(part.labels, answers)


def test_the_tables_of_distorted_images_are_scikit_learns(run, few, monkeypatch):
    monkeypatch.setattr(distort, "KINDS", ("contrast", "pixelate"))
    table = evaluate.shifted_metrics(run.path, (1, 5), 50, stand_in=True)
    test, model = data.load_set("test", stand_in=True).first(50), evaluate.load_model(run)
    sets = [test.images, *(distort.distort(test.images, kind, n) for kind in distort.KINDS for n in (1, 5))]
    answers = [evaluate.predict(model, one, Augment("none"), "float32").softmax(1).cpu().max(1) for one in sets]
    np.testing.assert_allclose(table.confidence, [float(sure.double().mean()) for sure, _ in answers], atol=2e-6)
    bins = pd.read_csv(run.path / "reliability.csv")
    for name, part in (("clean", answers[:1]), ("distorted", answers[1:])):
        confidence = torch.cat([sure for sure, _ in part])
        right = torch.cat([said == test.labels for _, said in part])
        own = bins[bins.images == name]
        theirs = calibration_curve(right, confidence, n_bins=15)
        np.testing.assert_allclose(own[["accuracy", "confidence"]].T, theirs, atol=2e-6)
        assert own["count"].sum() == len(right) and own.confidence.between(own.low, own.high).all()


def test_a_small_trial_never_replaces_a_large_one(run, few, monkeypatch):
    monkeypatch.setattr(distort, "KINDS", ("contrast",))
    made = []
    monkeypatch.setattr(evaluate, "load_model", lambda run, load=evaluate.load_model: made.append(1) or load(run))

    def tried(*asked):
        evaluate.tried(run.path, *asked, stand_in=True)
        said = runs.read(run.path).record["corrupted"]
        return said["severities"], said["count"], len(made)

    assert tried((2, 3), 20) == ([2, 3], 20, 1)
    assert tried((3,), 10) == ([2, 3], 20, 1), "it is read"
    assert tried((1, 3), 10) == ([1, 2, 3], 20, 2) and tried((3,), 30) == ([1, 2, 3], 30, 3)
    (run.path / "reliability.csv").unlink()
    assert tried((3,), 10) == ([1, 2, 3], 30, 4) and (run.path / "reliability.csv").exists()
    (run.path / "shift.csv").write_text("kind,severity")
    assert tried((3,), 10) == ([1, 2, 3], 30, 5), "a damaged table is made anew, of as many images"
    run.weights.unlink()
    (run.path / "reliability.csv").unlink()
    assert tried((3,), 10) == ([1, 2, 3], 30, 5), "without weights none can be made"


def test_distorted_images_that_were_tried_are_not_made_fewer(run, tmp_path, few, monkeypatch, capsys):
    monkeypatch.setattr(distort, "KINDS", ("contrast", "gaussian_blur"))
    assess.clean(run, 20, tmp_path / "out", stand_in=True)
    before = (run.path / "shift.csv").read_bytes()
    assert "as many" not in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "out" / "corruptions.csv").kind) == set(distort.KINDS), "clean is none of them"
    monkeypatch.setattr(assess, "_labelled", lambda *_: None)  # pictures, two thirds of the time, the same each time
    monkeypatch.setattr(plots, "heat", lambda *_: None)
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    again = assess.clean(runs.read(run.path), 5, tmp_path / "out", stand_in=True)
    printed = capsys.readouterr().out
    assert "tried on 20 distorted images before: as many are told" in printed and "20 images each" in printed
    assert (run.path / "shift.csv").read_bytes() == before and again.record["corrupted"]["count"] == 20
    head = "kind,severity,accuracy,count\n"
    for left in ("", "a\n", "kind,severity\nfog", f"{head}contrast,3,0.5,20\n", "\0", f"{head}contrast,3,0.x,20\n",
                 f"{head}contrast,3,1,inf\n"):  # fmt: skip
        (run.path / "shift.csv").write_text(left)
        assess.clean(runs.read(run.path), 5, tmp_path / "out", stand_in=True)
        assert (run.path / "shift.csv").read_bytes() == before, "a damaged one is made anew, of as many images"
    (run.path / "reliability.csv").unlink()
    assess.clean(runs.read(run.path), 5, tmp_path / "out", stand_in=True)
    assert (run.path / "shift.csv").read_bytes() == before and (run.path / "reliability.csv").exists()
    evaluate.shifted_metrics(run.path, (3,), 40, stand_in=True)
    assess.clean(runs.read(run.path), 5, tmp_path / "out", stand_in=True)
    assert runs.read(run.path).record["corrupted"] | {"accuracy": 0} == {
        "accuracy": 0, "count": 40, "severities": [1, 2, 3, 4, 5]}  # fmt: skip
    evaluate.shifted_metrics(run.path, (1, 2, 3, 4, 5), 20, stand_in=True)
    capsys.readouterr()
    assess.clean(runs.read(run.path), 30, tmp_path / "out", stand_in=True)
    assert "30 images each" in capsys.readouterr().out and runs.read(run.path).record["corrupted"]["count"] == 30


@pytest.mark.parametrize("measure", [evaluate.test_run, partial(evaluate.shifted_metrics, severities=(1,), count=10)])
def test_a_run_on_other_data_is_not_tested(run, few, measure):
    runs.write_record(run.path, {**run.record, "data": "CIFAR-10"})
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(CourseError, match=r"trained on CIFAR-10, the images here are stand-in"):
        measure(run.path, stand_in=True)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_an_unfinished_run_is_not_tested(run, without_cifar10):
    (run.path / "run.json").unlink()
    with pytest.raises(CourseError, match="is not a finished run"):
        evaluate.test_run(run.path, stand_in=True)
    assert not (run.path / "run.json").exists()


def test_without_cifar10_no_run_on_it_is_tested(run, without_cifar10):
    with pytest.raises(CourseError, match=r"run was trained on the stand-in set: give --stand-in"):
        evaluate.test_run(run.path)
    runs.write_record(run.path, {**run.record, "data": "CIFAR-10"})
    with pytest.raises(CourseError, match="CIFAR-10 is not in"):
        evaluate.test_run(run.path)


@pytest.mark.parametrize("right", [0, 1, 1_999, 2_000])
def test_an_interval_holds_its_own_value(right):
    """At 100 % of 2,000 images the library's upper end comes out a rounding below 1."""
    logits = torch.eye(2)[torch.arange(2_000).ge(right).long()]
    found = evaluate.accuracy(logits, torch.zeros(2_000, dtype=torch.int64))
    assert found.low <= found.value <= found.high and found.value == right / 2_000
