"""The evaluation room against scipy, scikit-learn and plain NumPy; predictions that leave the network as it was."""

import copy
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from helpers import data, evaluate, runs
from helpers.augment import Augment
from helpers.runtime import CourseError, generator

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


def test_an_accuracy_reads_as_per_cent():
    assert str(evaluate.Accuracy(0.9594, 0.9553, 0.9631, 10_000)) == "95.94 % [95.53, 96.31]"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_confusion_is_scikit_learns(pairs):
    labels, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    ours = evaluate.confusion(logits_that_say(predicted), labels)
    theirs = sklearn.metrics.confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(10))
    assert np.array_equal(ours, theirs)
    assert json.loads(json.dumps(ours)) == ours  # plain numbers, as a record needs them


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
    save_file(dict(tiny.but(width=16).network().state_dict()), run.path / "best.safetensors")
    with pytest.raises(CourseError) as error:
        evaluate.load_model(run)
    assert one_sentence(error)


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


def test_a_run_on_other_data_is_not_tested(run, without_cifar10):
    runs.write_record(run.path, {**run.record, "data": "CIFAR-10"})
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(CourseError, match=r"trained on CIFAR-10, the test set here is stand-in"):
        evaluate.test_run(run.path, stand_in=True)
    assert (run.path / "run.json").read_bytes() == before


def test_an_unfinished_run_is_not_tested(run, without_cifar10):
    (run.path / "run.json").unlink()
    with pytest.raises(CourseError, match="is not a finished run"):
        evaluate.test_run(run.path, stand_in=True)
    assert not (run.path / "run.json").exists()


def test_without_cifar10_no_run_on_it_is_tested(run, without_cifar10):
    with pytest.raises(CourseError, match="CIFAR-10 is not in"):
        evaluate.test_run(run.path)


@pytest.mark.parametrize("right", [0, 1, 1_999, 2_000])
def test_an_interval_holds_its_own_value(right):
    """At 100 % of 2,000 images the library's upper end comes out a rounding below 1."""
    logits = torch.eye(2)[torch.arange(2_000).ge(right).long()]
    found = evaluate.accuracy(logits, torch.zeros(2_000, dtype=torch.int64))
    assert found.low <= found.value <= found.high and found.value == right / 2_000
