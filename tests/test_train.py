"""The training room: against torch's own schedule and optimiser, and against kills, torn files and full disks."""

import contextlib
import copy
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import weakref
from functools import partial

import a_process
import numpy as np
import pandas as pd
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest, entropy
from sklearn.metrics import log_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import checkpoint, data, estimate, evaluate, mixing, runs, train
from helpers.augment import Augment, Settings
from helpers.model import Dropout
from helpers.recipe import RECIPES, Recipe
from helpers.runtime import CourseError, generator, pick_device

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RESULTS = ("history.csv", "best.safetensors", "last.safetensors")  # the same bytes, however often a run was interrupted
FILES = {"run.json", *RESULTS}  # what a finished run leaves
SLOTS = set(checkpoint.SLOTS)


def fit(recipe, stand_in, path, **options):
    return train.fit(recipe, stand_in, path, device=CPU, **options)


def result(path):
    return {name: (path / name).read_bytes() for name in RESULTS}


def names(path):
    return {entry.name for entry in path.iterdir()}


# ------------------------------------------------------------------------------------------------- the schedule


def torchs_rates(recipe):
    """The same schedule from torch's own LinearLR and CosineAnnealingLR, one after the other."""
    steps = train.steps_per_epoch(recipe)
    warmup, total = recipe.warmup_epochs * steps, recipe.epochs * steps
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup)
    rates = []
    for _ in range(total - warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    if warmup == 0:
        return rates
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    line = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=max(1, warmup - 1))
    rising = []
    for _ in range(warmup):
        rising.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        line.step()
    return rising + rates


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 9), st.floats(1e-4, 1))
def test_the_rate_is_torchs_own(epochs, warmup, steps, peak):
    recipe = Recipe("x", epochs=epochs, warmup_epochs=min(warmup, epochs - 1), batch_size=10, train_size=10 * steps,
                    learning_rate=peak)  # fmt: skip
    ours = [train.learning_rate(recipe, step) for step in range(epochs * steps)]
    assert ours == pytest.approx(torchs_rates(recipe), rel=1e-6, abs=1e-9 * peak)


@pytest.mark.parametrize("name", ["paper", "laptop", "quick"])
def test_the_rate_rises_to_the_peak_and_then_only_falls(name):
    recipe = RECIPES[name]
    steps = train.steps_per_epoch(recipe)
    assert steps == recipe.train_size // recipe.batch_size
    warmup, total = recipe.warmup_epochs * steps, recipe.epochs * steps
    rates = [train.learning_rate(recipe, step) for step in range(total)]
    assert rates[warmup - 1] == recipe.learning_rate == max(rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup - 1 :]))
    assert 0 < rates[0] <= recipe.learning_rate / warmup * (1 + 1e-9)
    assert 0 < rates[-1] < 1e-4 * recipe.learning_rate
    assert rates[(warmup + total) // 2] == pytest.approx(recipe.learning_rate / 2, rel=1e-3)  # half-way down the cosine


def test_the_history_holds_the_rates(finished_tiny):
    rates = runs.read(finished_tiny).history.learning_rate
    steps = train.steps_per_epoch(TINY)
    assert list(rates) == pytest.approx(
        [train.learning_rate(TINY, epoch * steps - 1) for epoch in range(1, TINY.epochs + 1)], abs=1e-6
    )


# ------------------------------------------------------------------------------------------------------ one step


def _augment(recipe, stage):
    return Augment(stage, policy=recipe.policy, settings=Settings().scaled(recipe.strength))


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "none", "mixup_alpha": 0.0},
        {"stage": "crop_flip", "mixup_alpha": 0.0, "weight_decay": 0.05, "momentum": 0.5},
        {"stage": "erasing", "mixup_alpha": 1.0, "weight_decay": 5e-4, "strength": 0.5},
        {"stage": "none", "mixup_alpha": 0.0, "momentum": 0.0, "weight_decay": 0.0},
        {"stage": "none", "mixup_alpha": 0.0, "nesterov": True, "label_smoothing": 0.1},
        {"stage": "rotation_autoaugment", "mixup_alpha": 0.2, "clip_norm": 0.5, "decay_all": False},
        {"stage": "rotation_autoaugment", "policy": "trivialaugment", "strength": 1.5, "mixup_alpha": 0.0},
        {"stage": "none", "mixup_alpha": 0.0, "decoupled_decay": True, "weight_decay": 0.1, "decay_all": False},
    ],
)
def test_the_losses_are_those_of_a_plain_loop(stand_in, tiny, changes):
    recipe = tiny.but(dropout=0.0, seed=3, **changes)
    trainer = train.Trainer(recipe, stand_in, CPU)
    model = recipe.network().to(memory_format=torch.channels_last)  # as the room does: the same sums, in the same order
    model.load_state_dict(trainer.model.state_dict())
    spared = [] if recipe.decay_all else [p for p in model.parameters() if p.ndim == 1]
    decayed = [p for p in model.parameters() if all(p is not q for q in spared)]
    make = timm.optim.SGDW if recipe.decoupled_decay else torch.optim.SGD
    optimizer = make(
        [{"params": decayed}, {"params": spared, "weight_decay": 0.0}], recipe.learning_rate, recipe.momentum,
        weight_decay=recipe.weight_decay, nesterov=recipe.nesterov,
    )  # fmt: skip
    augment, draws = _augment(recipe, recipe.stage), generator(recipe.seed, 1)
    trainer.model.train()
    model.train()
    for step in range(20):
        index = torch.randperm(recipe.train_size, generator=generator(step))[: recipe.batch_size]
        rate = 0.001 * (step + 1)  # the paper's peak by the last step
        trainer.totals.zero_()
        trainer.step(index, rate)
        loss_sum, counted_right = trainer.totals

        mixed = mixing.mixup(
            augment(stand_in.train.images[index], draws), stand_in.train.labels[index], recipe.mixup_alpha, draws
        )
        targets = mixed.lam[:, None] * F.one_hot(mixed.targets_a, 10)
        targets = targets + (1 - mixed.lam[:, None]) * F.one_hot(mixed.targets_b, 10)
        logits = model(mixed.images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()

        right = targets[range(len(index)), logits.argmax(1)].sum()
        assert float(loss_sum) / len(index) == pytest.approx(loss.item(), rel=1e-5)
        assert float(counted_right) == pytest.approx(right.item(), abs=1e-3)


@pytest.mark.parametrize(("rho", "clip"), [(0.05, 0.0), (0.5, 0.0), (0.5, 0.1)])
def test_a_sharpness_aware_step_is_the_two_steps_of_the_paper(stand_in, tiny, rho, clip):
    """Foret et al. 2021, algorithm 1, written out: uphill by rho, the gradient there, back, then SGD with it."""
    recipe = tiny.but(dropout=0.0, stage="none", mixup_alpha=0.0, seed=4, sam_rho=rho, clip_norm=clip)
    trainer = train.Trainer(recipe, stand_in, CPU)
    model = recipe.network().to(memory_format=torch.channels_last)
    model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, recipe.momentum, weight_decay=recipe.weight_decay)
    trainer.model.train()
    model.train()
    for step in range(5):
        index = torch.randperm(recipe.train_size, generator=generator(step))[: recipe.batch_size]
        loss = trainer.step(index, 0.05).item()

        x, targets = Augment("none")(stand_in.train.images[index]), stand_in.train.labels[index]
        first = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), targets)
        uphill = torch.autograd.grad(first, list(model.parameters()))
        length = torch.cat([g.flatten() for g in uphill]).norm()
        there = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(there.parameters(), uphill, strict=True):
                p += rho * g / length
        second = F.cross_entropy(there(x.contiguous(memory_format=torch.channels_last)), targets)
        for p, g in zip(model.parameters(), torch.autograd.grad(second, list(there.parameters())), strict=True):
            p.grad = g
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert loss == pytest.approx(first.item(), rel=1e-5), "what is counted is the loss at the weights themselves"
    for ours, theirs in zip(trainer.model.state_dict().values(), model.state_dict().values(), strict=True):
        if ours.is_floating_point():  # batch norm's running statistics too: the neighbour leaves no trace in them
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(views=st.integers(1, 4), classes=st.integers(2, 10), spread=st.floats(0.0, 50.0), seed=st.integers(0, 99))
def test_disagreement_is_scipys_entropy_of_the_mean_less_the_mean_entropy(views, classes, spread, seed):
    logits = spread * torch.randn(views, 5, classes, generator=generator(seed))
    each = logits.double().softmax(2).numpy()
    expected = entropy(each.mean(0), axis=1) - entropy(each, axis=2).mean(0)
    assert train.disagreement(logits).item() == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "policy", "strength"), [("crop_flip", "autoaugment", 1.0), ("colour", "trivialaugment", 0.5)]
)
def test_a_consistent_step_compares_an_image_with_two_views_of_it(stand_in, tiny, stage, policy, strength):
    """AugMix, equation 1: cross-entropy on the image itself, and 12 times the divergence of all three predictions."""
    recipe = tiny.but(dropout=0.0, stage=stage, mixup_alpha=0.0, seed=4, consistency=12.0, policy=policy,
                      strength=strength)  # fmt: skip
    trainer = train.Trainer(recipe, stand_in, CPU)
    model = recipe.network().to(memory_format=torch.channels_last)
    model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, recipe.momentum, weight_decay=recipe.weight_decay)
    trainer.model.train()
    model.train()
    draws = generator(recipe.seed, 1)
    for step in range(5):
        index = torch.randperm(recipe.train_size, generator=generator(step))[: recipe.batch_size]
        loss = trainer.step(index, 0.05).item()
        images = stand_in.train.images[index]
        views = [_augment(recipe, one)(images, draws) for one in (stage, *["rotation_autoaugment"] * 2)]
        logits = model(torch.cat(views).contiguous(memory_format=torch.channels_last)).split(len(index))
        p = [one.softmax(1) for one in logits]
        mean = (sum(p) / 3).clamp(1e-7, 1).log()
        divergence = sum(F.kl_div(mean, one, reduction="batchmean") for one in p) / 3
        expected = F.cross_entropy(logits[0], stand_in.train.labels[index]) + 12 * divergence
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.validate(trainer.model).keys() == {"val_loss", "val_accuracy", "val_augmented_accuracy"}


def test_a_taught_step_is_half_the_labels_and_half_the_mean_of_the_teachers(stand_in, tiny):
    """Hinton et al. 2015 at temperature 1: cross-entropy with the teachers' mean probabilities on the same images."""
    recipe = tiny.but(dropout=0.0, stage="none", mixup_alpha=0.0, seed=4)
    torch.manual_seed(5)
    teachers = [recipe.network().to(memory_format=torch.channels_last).eval() for _ in range(2)]
    trainer = train.Trainer(recipe, stand_in, CPU, teachers)
    model = recipe.network().to(memory_format=torch.channels_last)
    model.load_state_dict(trainer.model.state_dict())
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    trainer.model.train()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, recipe.momentum, weight_decay=recipe.weight_decay)
    for step in range(5):
        index = torch.randperm(recipe.train_size, generator=generator(step))[: recipe.batch_size]
        loss = trainer.step(index, 0.05).item()
        x = Augment("none")(stand_in.train.images[index]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            taught = sum(teacher(x).softmax(1) for teacher in teachers) / 2
        logits = model(x)
        hard = F.nll_loss(logits.log_softmax(1), stand_in.train.labels[index])
        expected = (hard - (taught * logits.log_softmax(1)).sum(1).mean()) / 2
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    for teacher, old in zip(teachers, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in teacher.state_dict().items())


def elsewhere(path):
    """Let a run's record say that it was trained on other data."""
    return runs.write_record(path, {**runs.read(path).record, "data": "CIFAR-10"})


def test_a_recipe_learns_from_the_seeds_beside_it(stand_in, tiny, tmp_path):
    recipe = tiny.but(name="taught", teacher="tiny", epochs=2)
    with pytest.raises(CourseError, match=r"taught learns from tiny, of which .* holds no finished run with weights"):
        fit(recipe, stand_in, tmp_path / "taught" / "0")
    first = tiny.but(epochs=2)
    fit(first, stand_in, tmp_path / "tiny" / "0")
    run = fit(recipe, stand_in, tmp_path / "taught" / "0")
    assert run.record["teachers"] == ["tiny/0"]
    fit(first.but(seed=1), stand_in, tmp_path / "tiny" / "1")
    elsewhere(tmp_path / "tiny" / "1")
    again = fit(recipe, stand_in, tmp_path / "taught" / "again")
    assert again.record["teachers"] == ["tiny/0"], "what was trained on other images teaches nothing here"
    plain = fit(recipe.but(name="plain", teacher=""), stand_in, tmp_path / "plain" / "0")
    assert plain.record["teachers"] == [] and not plain.history.equals(run.history)


def test_a_teacher_has_not_seen_the_validation_images(stand_in, tiny, tmp_path):
    fit(tiny.but(epochs=2), stand_in, tmp_path / "tiny" / "0")
    taught = tiny.but(name="taught", teacher="tiny", split_seed=1)
    with pytest.raises(CourseError, match="taught learns from tiny/0, which has split_seed=0, not 1: give it the same"):
        fit(taught, stand_in, tmp_path / "taught" / "0")


def test_a_recipe_trains_another_on_from_its_weights(finished_tiny, stand_in, tiny, tmp_path):
    """At a learning rate of next to nothing the weights stay nearly what they were; another seed's are another's."""
    recipe = tiny.but(name="refined", start="tiny", epochs=1, warmup_epochs=0, learning_rate=1e-6, weight_decay=0.0)
    with pytest.raises(CourseError, match=r"refined trains tiny/0 on, and .* does not hold .*: train it first"):
        fit(recipe, stand_in, tmp_path / "refined" / "0")
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    shutil.copytree(finished_tiny, tmp_path / "other" / "tiny" / "0")
    elsewhere(tmp_path / "other" / "tiny" / "0")
    with pytest.raises(CourseError, match="refined trains tiny/0 on, and"):
        fit(recipe, stand_in, tmp_path / "other" / "refined" / "0")
    run = fit(recipe, stand_in, tmp_path / "refined" / "0")
    assert run.record["start"] == "tiny/0, best.safetensors"
    theirs, ours = load_file(finished_tiny / runs.WEIGHTS), load_file(tmp_path / "refined" / "0" / runs.WEIGHTS)
    weights = [name for name in theirs if name.endswith(("weight", "bias"))]
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-4) for name in weights)
    assert not all(torch.equal(theirs[name], ours[name]) for name in weights)
    with pytest.raises(CourseError, match="trains tiny/1 on"):
        fit(recipe.but(seed=1), stand_in, tmp_path / "refined" / "1")
    for changes, said in (({"width": 2 * tiny.width}, "width="), ({"split_seed": 1}, "split_seed=0, not 1")):
        with pytest.raises(CourseError, match=f"refined learns from tiny/0, which has {said}"):
            fit(recipe.but(**changes), stand_in, tmp_path / "refined" / "other")


def test_the_published_weights_are_trained_on_where_the_store_has_none(stand_in, tiny, tmp_path, monkeypatch):
    first = fit(tiny.but(epochs=2), stand_in, tmp_path / "elsewhere" / "0")
    monkeypatch.setattr(runs, "PUBLISHED", first.weights.rename(first.path / "tiny.safetensors"))
    recipe = tiny.but(name="refined", start="tiny", epochs=1, warmup_epochs=0)
    run = fit(recipe, stand_in, tmp_path / "store" / "refined" / "0")
    assert run.record["start"] == "tiny/0, tiny.safetensors"


def test_a_refining_run_goes_on_where_it_was_stopped(finished_tiny, stand_in, tiny, tmp_path):
    recipe = tiny.but(name="refined", start="tiny")
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    whole, parts = tmp_path / "refined" / "0", tmp_path / "refined" / "1"
    fit(recipe, stand_in, whole)
    interrupted(recipe, stand_in, parts)
    fit(recipe, stand_in, parts)
    assert result(parts) == result(whole)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_a_compiled_step_trains_alike(stand_in, tiny, monkeypatch):
    """The same draws (the dropout's too), the same losses to rounding; validation stays eager."""
    from torch._inductor import config

    losses = []
    monkeypatch.setattr(config.cpp, "simdlen", 1)  # without vector instructions: half the time of compiling
    for compiled in (False, True):
        trainer = train.Trainer(tiny.but(dropout=0.5, compiled=compiled), stand_in, CPU)
        trainer.model.train()
        index = torch.arange(tiny.batch_size)
        losses.append([trainer.step(index + step, 0.02).item() for step in range(6)])
        assert trainer.validate(trainer.model).keys() == {"val_loss", "val_accuracy", "val_augmented_accuracy"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]  # else nothing was compiled


def test_a_compiled_pass_is_one_graph():
    """Nothing in it, dropout and stochastic depth least of all, makes the compiler give up half-way."""
    net = RECIPES["beyond"].but(blocks=(1, 2), width=16, dropout=0.5).network().train()
    for module in net.modules():
        if isinstance(module, Dropout):
            module.draw(4, generator(1))
    explained = torch._dynamo.explain(net)(torch.zeros(4, 3, 16, 16))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_every_size_of_the_images_is_compiled(tiny, monkeypatch):
    """As many as a recipe may have; the compiler's own limit is eight, and beyond it says nothing."""
    from torch._dynamo.testing import CompileCounter

    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    forward = train._compile(tiny.but(blocks=(1,)).network(), CPU)
    for side in range(10, 30, 2):
        forward(torch.zeros(2, 3, side, side))
    assert graphs.frame_count == 10


def test_both_passes_of_sam_drop_the_same(stand_in, tiny):
    """Eq. 2 and 3 of Foret et al. are about one loss; a step later it is another."""
    trainer, seen = train.Trainer(tiny.but(sam_rho=0.05, dropout=0.5, drop_path=0.5), stand_in, CPU), []
    for drop in trainer.drops:
        drop.register_forward_hook(lambda module, args, out: seen.append((module, module.drawn)))
    steps_of(trainer, 2)
    passes = len(trainer.drops)
    assert passes == 2 and len(seen) == 2 * 2 * passes, "two steps of two passes, through dropout and one branch"
    first, again, later = (dict(seen[i * passes : (i + 1) * passes]) for i in range(3))
    for drop in trainer.drops:
        assert torch.equal(first[drop], again[drop]) and not torch.equal(first[drop], later[drop])
        assert drop.drawn is None, "no step's mask is there for another pass"


def test_compiling_without_a_compiler_is_refused_at_once(stand_in, tiny, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CourseError, match=r"compiled=True needs the compiler \S+: install it, or leave it False"):
        train.Trainer(tiny.but(compiled=True), stand_in, CPU)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CourseError, match="needs the compiler clang or gcc"):
        train._compile(tiny.network(), torch.device("cuda"))


def test_the_loss_goes_down_and_validation_goes_up(stand_in, tiny, tmp_path):
    history = fit(tiny.but(epochs=15, mixup_alpha=0.0, dropout=0.0), stand_in, tmp_path).history
    assert history.train_loss.iloc[-1] < 0.8 * history.train_loss.iloc[0]
    assert history.val_accuracy.max() > 0.3  # ten classes: 0.1 by guessing


# ------------------------------------------------------------------------------------------------------ the data


def test_validation_and_training_images_are_strangers(without_cifar10):
    recipe = RECIPES["quick"]
    split = train.training_data(recipe, stand_in=True)
    assert split.source == data.STAND_IN
    seen = {image.numpy().tobytes() for image in split.train.images}
    assert len(split.train.labels) == recipe.train_size and len(split.val.labels) == recipe.val_size
    assert not any(image.numpy().tobytes() in seen for image in split.val.images)
    assert torch.bincount(split.val.labels).tolist() == [recipe.val_size // 10] * 10


def test_the_split_is_that_of_the_recipes_seed(tiny, monkeypatch):
    full = data.draw_stand_in(300, seed=5)
    monkeypatch.setattr(train, "load_set", lambda split, stand_in: full)
    for seed in (0, 1):
        found = train.training_data(tiny.but(split_seed=seed), stand_in=True)
        expected = data.split_train_val(full, tiny.val_size, tiny.train_size, seed)
        assert torch.equal(found.val.images, expected.val.images), seed


def test_training_does_not_depend_on_the_validation_images(stand_in, tiny, tmp_path):
    other = data.TrainingData(stand_in.train, stand_in.val._replace(images=255 - stand_in.val.images))
    a = fit(tiny, stand_in, tmp_path / "a").history
    b = fit(tiny, other, tmp_path / "b").history
    assert a.train_loss.equals(b.train_loss) and a.train_accuracy.equals(b.train_accuracy)
    assert not a.val_loss.equals(b.val_loss)


def test_every_epoch_of_every_seed_has_an_order_of_its_own(stand_in, tiny, monkeypatch):
    recipe, orders = tiny.but(epochs=3, batch_size=60), []
    for seed in range(2):
        trainer, taken = train.Trainer(recipe.but(seed=seed), stand_in, CPU), []
        monkeypatch.setattr(trainer, "step", lambda index, rate, side, taken=taken: taken.extend(index.tolist()))
        list(trainer.go())
        orders += [tuple(taken[at : at + 180]) for at in range(0, len(taken), 180)]
    assert [len(set(order)) for order in orders] == [180] * 6, "whole batches, no image twice"
    assert len(set(orders)) == len(set(map(frozenset, orders))) == 6, "and another rest left out each time"


def test_without_cifar10_nothing_but_the_quick_profile_trains(without_cifar10):
    with pytest.raises(CourseError, match="CIFAR-10 is not in"):
        train.training_data(RECIPES["quick"])


def test_another_number_of_images_is_refused(stand_in, tiny, tmp_path):
    with pytest.raises(CourseError, match=r"train_size=150 and got 200"):
        fit(tiny.but(train_size=150), stand_in, tmp_path / "run")
    with pytest.raises(CourseError, match=rf"val_size=30 and got {tiny.val_size} images"):
        fit(tiny.but(val_size=30), stand_in, tmp_path / "other")


# --------------------------------------------------------------------------------------------------- a whole run


def test_the_best_row_is_the_earliest_of_the_highest():
    history = [{"epoch": i + 1, "val_accuracy": a, "train_accuracy": -a} for i, a in enumerate((0.1, 0.7, 0.3, 0.7))]
    assert train.best_row(history) is history[1]
    assert train.best_row(history[:1]) is history[0]


def test_a_run_leaves_its_documented_files_and_nothing_else(finished_tiny, stand_in):
    assert names(finished_tiny) == FILES
    run = runs.read(finished_tiny)
    record, history = run.record, run.history
    assert list(history.epoch) == list(range(1, TINY.epochs + 1))
    assert Recipe.from_dict(record["recipe"]) == TINY and record["data"] == data.STAND_IN
    best = history.loc[history.val_accuracy.idxmax()]
    assert record["best_epoch"] == best.epoch
    for name, value in record["metrics"].items():
        row = history.iloc[-1] if name.startswith("train") else best
        assert value == pytest.approx(row[name], abs=1e-6)
    assert record["parameters"] == sum(parameter.numel() for parameter in TINY.network().parameters())
    assert record["seconds"] > 0 and record["images_per_second"] > 0
    assert "test" not in record  # a test label is not touched here
    logits = evaluate.predict(evaluate.load_model(run), stand_in.val.images, Augment("none"), "float32")
    assert evaluate.accuracy(logits, stand_in.val.labels).value == pytest.approx(best.val_accuracy, abs=1e-6)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(finished_tiny, stand_in, tiny, tmp_path):
    torch.rand(3)  # what was drawn before a run does not matter
    fit(tiny, stand_in, tmp_path / "again")
    assert result(tmp_path / "again") == result(finished_tiny)
    fit(tiny.but(seed=1), stand_in, tmp_path / "other")
    assert (tmp_path / "other" / "history.csv").read_bytes() != (finished_tiny / "history.csv").read_bytes()


def test_a_finished_run_is_returned_untouched(finished_tiny, stand_in, tiny, tmp_path, capfd):
    path = tmp_path / "run"
    shutil.copytree(finished_tiny, path)
    before = {entry: (entry.stat().st_mtime_ns, entry.read_bytes()) for entry in path.iterdir()}
    assert fit(tiny, stand_in, path).record == runs.read(finished_tiny).record
    assert {entry: (entry.stat().st_mtime_ns, entry.read_bytes()) for entry in path.iterdir()} == before
    assert capfd.readouterr() == ("", "")


def test_resume_false_starts_over(finished_tiny, stand_in, tiny, tmp_path, capfd):
    path = tmp_path / "run"
    shutil.copytree(finished_tiny, path)
    for name in ("shift.csv", "reliability.csv", estimate.FILE, "own_images.csv", "test_correct.txt"):
        (path / name).write_text("of the weights before\n")
    short = tiny.but(epochs=2)
    run = fit(short, stand_in, path, resume=False)
    assert Recipe.from_dict(run.record["recipe"]) == short and len(run.history) == 2
    assert len(capfd.readouterr().out.splitlines()) == 2
    fit(short, stand_in, tmp_path / "afresh")
    assert result(path) == result(tmp_path / "afresh") and names(path) == FILES


def test_a_fresh_start_that_is_refused_removes_nothing(finished_tiny, stand_in, tiny, tmp_path, monkeypatch):
    """Whatever is in the way: a teacher that is not there, a neighbour in use, too little memory."""
    paths = [tmp_path / "store" / "tiny" / str(seed) for seed in (0, 1)]
    shutil.copytree(finished_tiny, paths[0])
    before = {entry.name: entry.read_bytes() for entry in paths[0].iterdir()}

    def refused(recipes, match):
        with pytest.raises(CourseError, match=match):
            train.fit_many(recipes, stand_in, paths[: len(recipes)], resume=False, device=CPU)
        assert {entry.name: entry.read_bytes() for entry in paths[0].iterdir()} == before

    refused([tiny.but(teacher="laptop")], "learns from laptop")
    refused([tiny.but(start="laptop")], "trains laptop/0 on")
    refused([tiny.but(teacher="tiny")], "teacher='tiny' lies in .*/store/tiny, where this run would write over")
    refused([tiny.but(start="tiny", name="on")], "start='tiny' lies in .*/store/tiny, where this run would write over")
    with checkpoint.hold(paths[1]):
        refused([tiny, tiny.but(seed=1)], "Another process is training in .*tiny/1")
    monkeypatch.setattr(train, "Trainer", lambda *_: (_ for _ in ()).throw(
        RuntimeError("[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: not enough memory")))  # fmt: skip
    refused([tiny], "A batch of 40 does not fit into this machine's memory: give a smaller batch_size")
    refused([tiny, tiny.but(seed=1)], "does not fit into this machine's memory")
    monkeypatch.setattr(train, "Trainer", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        fit(tiny, stand_in, paths[0], resume=False)


def test_an_interrupted_fresh_start_goes_on_as_one(finished_tiny, stand_in, tiny, tmp_path):
    """None of its runs is taken for finished because of what lay there before."""
    recipes, paths = [tiny.but(seed=seed) for seed in range(2)], [tmp_path / "0", tmp_path / "1"]
    train.fit_many(recipes, stand_in, paths, device=CPU)
    whole, stamps = [result(path) for path in paths], [(path / "run.json").stat().st_mtime_ns for path in paths]

    def stop(recipe, row):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(train.Interrupted, match=r"same again, but with resume=True \(without --fresh\), to"):
        train.fit_many(recipes, stand_in, paths, resume=False, device=CPU, on_epoch=stop)
    train.fit_many(recipes, stand_in, paths, device=CPU)
    assert [result(path) for path in paths] == whole
    assert all((path / "run.json").stat().st_mtime_ns > stamp for path, stamp in zip(paths, stamps, strict=True))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 0.05}, {"blocks": (1, 2)}, {"epochs": 9}])
def test_another_recipes_folder_is_refused(finished_tiny, stand_in, tiny, tmp_path, changes):
    """Whether its run is finished or not."""
    interrupted(tiny, stand_in, tmp_path / "unfinished")
    shutil.copytree(finished_tiny, tmp_path / "finished")
    for path in (tmp_path / "unfinished", tmp_path / "finished"):
        before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
        with pytest.raises(CourseError, match=f"holds a run with another {next(iter(changes))}: .*--fresh"):
            fit(tiny.but(**changes), stand_in, path)
        assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before


def test_a_folder_with_a_run_on_other_data_is_refused(finished_tiny, stand_in, tiny, tmp_path):
    shutil.copytree(finished_tiny, tmp_path / "run")
    renamed = data.TrainingData(*(part._replace(source="CIFAR-10") for part in (stand_in.train, stand_in.val)))
    with pytest.raises(CourseError, match="another data"):
        fit(tiny, renamed, tmp_path / "run")


def test_progress_is_a_line_an_epoch_and_nothing_on_stderr(stand_in, tiny, tmp_path, capfd):
    fit(tiny, stand_in, tmp_path)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == tiny.epochs and "\r" not in out
    for epoch, line in enumerate(lines, 1):
        assert line.startswith("tiny/0 epoch") and f" {epoch}/{tiny.epochs} " in line and "val loss" in line


def test_on_a_terminal_there_is_a_bar_for_each_run_that_is_under_way(stand_in, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: True, raising=False)
    open_bars, finish = [], train._Session.finish
    monkeypatch.setattr(train._Session, "finish", lambda self: (
        open_bars.append({bar.desc for bar in train.tqdm._instances}), finish(self)))  # fmt: skip
    recipes = [tiny.but(epochs=1, warmup_epochs=0, seed=seed) for seed in range(2)]
    train.fit_many(recipes, stand_in, [tmp_path / "0", tmp_path / "1"], device=CPU)
    assert open_bars == [{"tiny/0"}, {"tiny/1"}]


# ---------------------------------------------------------------------------------------------- interrupted runs


class CtrlC(io.StringIO):
    """A terminal in front of which somebody presses Ctrl-C after some lines."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def write(self, text):
        super().write(text)
        if self.getvalue().count("\n") == self.lines:
            raise KeyboardInterrupt
        return len(text)


def interrupted(recipe, stand_in, path, epochs=2):
    """A run that dies after some epochs, with a checkpoint after every step; returns its newest slot and the other."""
    with contextlib.redirect_stdout(CtrlC(epochs)), pytest.raises(KeyboardInterrupt):
        fit(recipe, stand_in, path, checkpoint_seconds=0)
    assert not (path / "run.json").exists()
    newest = checkpoint.read(path)[0]["count"] % 2
    return path / checkpoint.SLOTS[newest], path / checkpoint.SLOTS[1 - newest]


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_an_interrupted_run_ends_with_the_same_bytes(finished_tiny, stand_in, tiny, tmp_path, epochs):
    interrupted(tiny, stand_in, tmp_path, epochs)
    torch.rand(5)
    resumed = fit(tiny, stand_in, tmp_path)
    assert result(tmp_path) == result(finished_tiny) and names(tmp_path) == FILES
    assert resumed.record["metrics"] == runs.read(finished_tiny).record["metrics"]


def test_what_an_interrupted_run_has_learned_and_taken_is_counted(stand_in, tiny, tmp_path):
    """Its history lies there to be read; the record at the end has the seconds of all its parts."""
    interrupted(tiny, stand_in, tmp_path, epochs=3)
    kept = pd.read_csv(tmp_path / "history.csv")
    assert kept.epoch.tolist() == [1, 2], "of the epochs before the last checkpoint"
    state, _ = checkpoint.read(tmp_path)
    assert state["seconds"] > 0
    checkpoint.write(tmp_path, {**state, "seconds": 1_000.0}, state["count"] + 1)
    record = fit(tiny, stand_in, tmp_path).record
    images = tiny.epochs * train.steps_per_epoch(tiny) * tiny.batch_size
    assert 1_000 < record["seconds"] < 1_100
    assert record["images_per_second"] == pytest.approx(images / record["seconds"], abs=0.06)


def test_a_run_goes_on_under_the_teachers_it_began_with(finished_tiny, stand_in, tiny, tmp_path):
    recipe = tiny.but(name="taught", teacher="tiny")
    shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    whole, parts, moved = (tmp_path / "taught" / str(number) for number in range(3))
    fit(recipe, stand_in, whole)
    for path in (parts, moved):
        interrupted(recipe, stand_in, path)
    fit(recipe, stand_in, parts)
    assert result(parts) == result(whole)
    fit(tiny.but(seed=1), stand_in, tmp_path / "tiny" / "1")
    with pytest.raises(CourseError, match="begun under the teachers tiny/0, and there are others by now"):
        fit(recipe, stand_in, moved)


def test_a_run_from_before_a_field_existed_is_the_same_run(finished_tiny, stand_in, tiny, tmp_path):
    path = shutil.copytree(finished_tiny, tmp_path / "old")
    record = json.loads((path / "run.json").read_text())
    del record["recipe"]["compiled"]
    (path / "run.json").write_text(json.dumps(record))
    assert fit(tiny, stand_in, path).record["metrics"] == record["metrics"]


def test_an_interrupted_run_knows_its_step(stand_in, tiny, tmp_path, monkeypatch):
    interrupted(tiny, stand_in, tmp_path)
    state, _ = checkpoint.read(tmp_path)
    at, real = len(state["history"]) * train.steps_per_epoch(tiny) + state["done"], mixing.mixed_cross_entropy
    monkeypatch.setattr(train, "mixed_cross_entropy", lambda *given: real(*given) * math.inf)
    with pytest.raises(CourseError, match=rf"at step {at} \(epoch 2, "):
        fit(tiny, stand_in, tmp_path)


def test_what_a_killed_process_left_half_written_is_cleared(stand_in, tiny, tmp_path):
    (tmp_path / ".checkpoint-a.pt.12345.tmp").write_bytes(b"half")
    fit(tiny.but(epochs=2), stand_in, tmp_path)
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(finished_tiny, stand_in, tiny, tmp_path, share, capfd):
    newest, _ = interrupted(tiny, stand_in, tmp_path)
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    fit(tiny, stand_in, tmp_path)
    said = capfd.readouterr().out
    assert re.search(rf"{newest.name} is torn or foreign .*: going on from the checkpoint before it", said)
    assert result(tmp_path) == result(finished_tiny)


@pytest.mark.parametrize("at", [0, 50, 200, -1])
def test_a_flipped_bit_is_noticed(stand_in, tiny, tmp_path, at):
    newest, _ = interrupted(tiny, stand_in, tmp_path)
    content = bytearray(newest.read_bytes())
    content[at] ^= 1
    newest.write_bytes(content)
    state, problems = checkpoint.read(tmp_path)
    assert state["count"] % 2 != checkpoint.SLOTS.index(newest.name) and len(problems) == 1


def test_two_torn_checkpoints_are_said_in_a_sentence(stand_in, tiny, tmp_path):
    for slot in interrupted(tiny, stand_in, tmp_path):
        slot.write_bytes(slot.read_bytes()[:-1])
    with pytest.raises(CourseError, match=r"checkpoint-a\.pt is torn.*checkpoint-b\.pt is torn.*: delete") as caught:
        fit(tiny, stand_in, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(fit(tiny, stand_in, tmp_path, resume=False).history) == tiny.epochs  # as the sentence says


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("signed", [True, False])
def test_a_hostile_checkpoint_is_not_executed(stand_in, tiny, tmp_path, signed):
    """Neither a bare pickle, nor one in a file whose checksum holds."""
    path, trap = tmp_path / "run", tmp_path / "trap"
    path.mkdir()
    if signed:
        checkpoint.write(path, {"recipe": Hostile(trap)}, 0)
    else:
        torch.save({"recipe": Hostile(trap)}, path / checkpoint.SLOTS[0])
    with pytest.raises(CourseError, match=r"checkpoint-a\.pt is torn or foreign"):
        fit(tiny, stand_in, path)
    assert not trap.exists()


@pytest.mark.parametrize("state", [[1], {"count": 1}])
def test_a_foreign_state_with_a_checksum_is_said_in_a_sentence(stand_in, tiny, tmp_path, state, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda _, buffer, save=torch.save: save(state, buffer))
    checkpoint.write(tmp_path, {}, 0)
    monkeypatch.undo()
    with pytest.raises(CourseError, match=r"checkpoint-a\.pt is torn or foreign"):
        fit(tiny, stand_in, tmp_path)


@pytest.mark.parametrize("content", [b"", b"foreign", b"foreign\n" * 9])
def test_a_foreign_checkpoint_is_said_in_a_sentence(stand_in, tiny, tmp_path, content):
    (tmp_path / checkpoint.SLOTS[1]).write_bytes(content)
    with pytest.raises(CourseError, match=r"checkpoint-b\.pt is torn or foreign"):
        fit(tiny, stand_in, tmp_path)


# ------------------------------------------------------------------------------------------------ what a recipe adds


def steps_of(trainer, count):
    """Losses of the next steps, from the sums the trainer keeps on the device."""
    losses, before = [], 0.0
    for _, _ in zip(range(count), trainer.go(), strict=False):
        total = float(trainer.totals[0])
        losses.append((total - before) / trainer.recipe.batch_size)
        before = total
    return losses


def test_the_average_is_torchs_own(stand_in, tiny):
    """EMA of weights and buffers, against torch.optim.swa_utils."""
    trainer = train.Trainer(tiny.but(ema_decay=0.9), stand_in, CPU)
    reference = AveragedModel(copy.deepcopy(trainer.model), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    reference.update_parameters(trainer.model)  # torch's first update is a copy: both start at the initial weights
    trainer.model.train()
    for step in range(5):
        trainer.step(torch.arange(step, step + tiny.batch_size), 0.05)
        reference.update_parameters(trainer.model)
    ours, theirs = trainer.average.state_dict(), reference.module.state_dict()
    for name, value in theirs.items():
        if value.is_floating_point():
            assert torch.allclose(ours[name], value, atol=1e-6), name
    assert torch.equal(ours["stem.1.num_batches_tracked"], trainer.model.state_dict()["stem.1.num_batches_tracked"])


def test_with_an_average_it_is_what_is_validated_and_kept(stand_in, tiny, tmp_path):
    run = fit(tiny.but(ema_decay=0.95), stand_in, tmp_path / "average")
    losses = run.history.set_index("epoch").val_loss
    for last, epoch in ((False, run.record["best_epoch"]), (True, tiny.epochs)):
        logits = evaluate.predict(evaluate.load_model(run, last), stand_in.val.images, Augment("none"), "float32")
        assert float(F.cross_entropy(logits.cpu(), stand_in.val.labels)) == pytest.approx(losses[epoch], abs=1e-5)
    fit(tiny, stand_in, tmp_path / "plain")
    histories = [runs.read(tmp_path / name).history for name in ("average", "plain")]
    assert list(histories[0].train_loss) == list(histories[1].train_loss), "the average does not disturb the training"
    assert list(histories[0].val_loss) != list(histories[1].val_loss)


def test_an_average_goes_on_where_it_was_stopped(stand_in, tiny, tmp_path):
    recipe = tiny.but(ema_decay=0.9)
    fit(recipe, stand_in, tmp_path / "whole")
    interrupted(recipe, stand_in, tmp_path / "parts")
    fit(recipe, stand_in, tmp_path / "parts")
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_biases_and_norms_can_be_spared_weight_decay(tiny):
    model = tiny.network()
    groups = train.parameter_groups(model, tiny.but(decay_all=False, weight_decay=0.1))
    decayed = {name for name, p in model.named_parameters() if any(p is q for q in groups[0]["params"])}
    spared = {name for name, p in model.named_parameters() if any(p is q for q in groups[1]["params"])}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert decayed | spared == {name for name, _ in model.named_parameters()} and not decayed & spared
    assert all(name.endswith("bias") or "bn" in name or ".1.weight" in name for name in spared)
    assert all(name.endswith("weight") for name in decayed)
    assert [len(group["params"]) for group in train.parameter_groups(model, tiny)] == [len(list(model.parameters()))]


def test_dropout_draws_from_the_runs_own_generator(stand_in, tiny):
    """Nothing that somebody else draws from torch's state changes a run, and the run changes nobody's draws."""
    first = steps_of(train.Trainer(tiny.but(dropout=0.5), stand_in, CPU), 4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = steps_of(train.Trainer(tiny.but(dropout=0.5), stand_in, CPU), 4)
    assert first == second and torch.equal(torch.get_rng_state(), state)
    dropout = Dropout(0.3, 2_000)
    dropout.draw(100, generator(1))
    kept = dropout.train()(torch.ones(100, 2_000))
    assert torch.equal(kept, dropout(torch.ones(100, 2_000))), "until it draws again"
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert binomtest(int((kept > 0).sum()), 200_000, 0.7).pvalue > 1e-4
    assert torch.equal(dropout.eval()(torch.ones(5)), torch.ones(5))


def test_resolutions_share_the_epochs(stand_in, tiny):
    recipe = tiny.but(resolutions=(16, 24, 32), epochs=6)
    assert [train.resolution(recipe, epoch) for epoch in range(6)] == [16, 16, 24, 24, 32, 32]
    assert [train.resolution(recipe.but(epochs=4), epoch) for epoch in range(4)] == [16, 16, 24, 32]
    trainer, sides = train.Trainer(recipe, stand_in, CPU), []
    trainer.model.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape[2:])))
    steps = trainer.go()
    for _ in range(trainer.steps + 1):
        next(steps)
    assert (16, 16) in sides and (32, 32) in sides, "trained small, validated in full"


def test_small_images_are_pillows(stand_in, tiny):
    trainer, seen = train.Trainer(tiny.but(stage="none", mixup_alpha=0.0), stand_in, CPU), []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    trainer.step(torch.arange(tiny.batch_size), 0.0, 16)
    for ours, x in zip(seen[0], Augment("none")(stand_in.train.images[:3]), strict=False):
        theirs = [Image.fromarray(c.numpy()).resize((16, 16), Image.Resampling.BILINEAR) for c in x]
        np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-4)


def test_the_linear_scaling_rule(tiny):
    larger = tiny.scaled_to(100)
    assert larger.learning_rate / tiny.learning_rate == pytest.approx(100 / tiny.batch_size)
    assert larger == tiny.but(batch_size=100, learning_rate=larger.learning_rate)


def test_several_runs_in_one_process_are_the_same_runs(stand_in, tiny, tmp_path):
    recipes = [tiny.but(seed=seed, epochs=2) for seed in range(3)]
    several = train.fit_many(recipes, stand_in, [tmp_path / "many" / str(r.seed) for r in recipes], device=CPU)
    assert [run.record["recipe"]["seed"] for run in several] == [0, 1, 2]
    for recipe, run in zip(recipes, several, strict=True):
        fit(recipe, stand_in, tmp_path / "one" / str(recipe.seed))
        assert result(run.path) == result(tmp_path / "one" / str(recipe.seed))


def test_several_runs_share_the_images(stand_in, tiny, tmp_path, monkeypatch):
    moved = []

    def to(self, device):
        """As to a GPU: a copy of what is not there yet."""
        if not any(self.images is images for images in moved):
            self = self._replace(images=self.images.clone())
            moved.append(self.images)
        return self

    monkeypatch.setattr(data.ImageSet, "to", to)
    recipes, paths = [tiny.but(seed=seed, epochs=2) for seed in range(3)], [tmp_path / name for name in "012"]
    train.fit_many(recipes, stand_in, paths, device=CPU)
    assert [len(images) for images in moved] == [tiny.train_size, tiny.val_size]
    train.fit_many(recipes, stand_in, paths, device=CPU)
    assert len(moved) == 2, "runs that are finished need none"


def train_together(recipes, stand_in, paths, on_epoch=lambda recipe, row: None):
    """Runs that take turns as they do on a GPU, though their work stays on the CPU."""
    with train.stop_requests() as stop, contextlib.ExitStack() as folders:
        shared = True, CPU, 3600.0, folders, on_epoch, len(recipes)
        sessions = [train._Session(recipe, stand_in.source, lambda: stand_in, path, *shared)
                    for recipe, path in zip(recipes, paths, strict=True)]  # fmt: skip
        train._train(sessions, stop)
        return [session.run for session in sessions]


def test_a_run_that_ends_before_its_neighbours_is_recorded_at_once(stand_in, tiny, tmp_path):
    recipes = [tiny.but(epochs=2), tiny.but(name="longer")]
    paths, alone = ([tmp_path / where / recipe.name for recipe in recipes] for where in ("together", "alone"))

    def stop_in_the_third_epoch(recipe, row):
        if row["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(train.Interrupted, match=r"Stopped by SIGINT \(longer/0 after epoch 3\)"):
        train_together(recipes, stand_in, paths, stop_in_the_third_epoch)
    assert names(paths[0]) == FILES and names(paths[1]) & SLOTS
    several = train_together(recipes, stand_in, paths)
    for recipe, path, run in zip(recipes, alone, several, strict=True):
        fit(recipe, stand_in, path)
        assert result(run.path) == result(path) and names(run.path) == FILES
    assert [run.record["side_by_side"] for run in several] == [2, 1], "what was finished before shares nothing"


def test_what_is_kept_of_a_run_is_read_on_its_own_stream(stand_in, tiny, tmp_path, monkeypatch):
    """Elsewhere a GPU would not wait for the steps that are still queued there."""
    inside, read = [], []

    @contextlib.contextmanager
    def stream(self):
        inside.append(self)
        yield
        inside.pop()

    def watched(room, name):
        real = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *given: (read.append((name, len(inside))), real(*given))[1])

    monkeypatch.setattr(train.Trainer, "on_its_stream", stream)
    watched(checkpoint, "write")
    watched(train, "save")
    fit(tiny.but(epochs=1, warmup_epochs=0), stand_in, tmp_path, checkpoint_seconds=0)
    assert set(read) == {("write", 1), ("save", 1)}


@pytest.mark.parametrize("epoch", [1, 2])
def test_asked_to_stop_in_its_last_step_a_run_is_finished_and_the_next_not_begun(stand_in, tiny, tmp_path, epoch):
    recipes = [tiny.but(epochs=2, seed=seed) for seed in range(2)]

    def stop(recipe, row):
        if (recipe.seed, row["epoch"]) == (0, epoch):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(train.Interrupted, match=rf"\(tiny/0 after epoch {epoch}\): everything is kept"):
        train.fit_many(recipes, stand_in, [tmp_path / "0", tmp_path / "1"], device=CPU, on_epoch=stop)
    assert (tmp_path / "0" / "run.json").exists() == (epoch == 2) and not names(tmp_path / "1")


# ------------------------------------------------------------------------------------- kills, in real processes

LONG = TINY.but(epochs=40)


class Looks(torch.nn.Linear):
    """A network that keeps the images it is shown, and answers by their mean colour."""

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x.mean((2, 3)))


@pytest.mark.parametrize("policy", ["autoaugment", "trivialaugment"])
def test_validation_looks_at_the_images_as_they_are_and_through_the_training_augmentation(policy, stand_in):
    """The paper counts the latter; with the recipe's own policy and strength, drawn anew in every epoch."""
    chosen = TINY.but(stage="rotation_autoaugment", policy=policy, strength=0.5, precision="float32")
    trainer, model = train.Trainer(chosen, stand_in, CPU), Looks(3, 10)
    augment = Augment(chosen.stage, policy=policy, settings=Settings().scaled(0.5))
    for epoch in range(2):
        model.seen = []
        found = trainer.validate(model)
        draws, images = generator(chosen.seed, 3, epoch), stand_in.val.images
        expected = Augment("none")(images), augment(images, draws)
        seen, model.seen = model.seen, []
        for shown, each, name in zip(seen, expected, ("val_accuracy", "val_augmented_accuracy"), strict=True):
            torch.testing.assert_close(shown, each)
            right = model(each).argmax(1) == stand_in.val.labels
            assert found[name] == pytest.approx(float(right.float().mean()))
        trainer.history.append({})


def test_the_validation_loss_is_scikit_learns_whatever_the_training_smooths(stand_in, tiny):
    trainer = train.Trainer(tiny.but(label_smoothing=0.3), stand_in, CPU)
    chances = evaluate.predict(trainer.model, stand_in.val.images, Augment("none"), "float32").double().softmax(1)
    expected = log_loss(stand_in.val.labels, chances, labels=range(10))
    assert trainer.validate(trainer.model)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_recipe_in_bfloat16_is_trained_and_validated_in_it(stand_in, tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "has_bfloat16", lambda device: True)
    for precision, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        trainer, kinds = train.Trainer(tiny.but(precision=precision), stand_in, CPU), []
        trainer.model.fc.register_forward_hook(lambda module, inputs, out, kinds=kinds: kinds.append(out.dtype))
        trainer.step(torch.arange(tiny.batch_size), 0.01)
        trainer.validate(trainer.model)
        assert kinds == [kind] * 3


@pytest.fixture(scope="module")
def processes():
    """Starts real processes quickly: a server imports what takes long once, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.train", "torch._dynamo", "pytest"])
    return context


def finish(process, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def wait_until(happens, seconds=60):
    late = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < late, "the run makes no progress"
        time.sleep(0.002)


def epochs_in(path):
    history = path / "history.csv"
    return len(history.read_text().splitlines()) - 1 if history.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    """The folder of LONG trained in one go in a process of its own, and the seconds it took."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = processes.Process(target=a_process.fit, args=(LONG, path))
    process.start()
    wait_until((path.parent / "began").exists)
    began = time.monotonic()
    assert finish(process) == 0
    return path, time.monotonic() - began


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(processes, uninterrupted, tmp_path):
    reference, seconds = uninterrupted
    draws, path, lengths = random.Random(20_260), tmp_path / "run", [0]
    for _ in range(20):
        process = processes.Process(target=a_process.fit, args=(LONG, path))
        process.start()
        aim = lengths[-1] + draws.randrange(3)  # some epochs more, then anywhere within the next: far from the end
        wait_until(lambda aim=aim: epochs_in(path) >= aim)
        time.sleep(draws.uniform(0, 1) * seconds / LONG.epochs)
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
        lengths.append(epochs_in(path))
        if lengths[-1]:  # whatever stands there is a beginning of the same run
            assert (reference / "history.csv").read_text().startswith((path / "history.csv").read_text())
    assert lengths == sorted(lengths) and 0 < lengths[-1] < LONG.epochs
    process = processes.Process(target=a_process.fit, args=(LONG, path))
    process.start()
    assert finish(process) == 0
    assert result(path) == result(reference)
    assert names(path) == FILES
    assert runs.read(path).record["metrics"] == runs.read(reference).record["metrics"]


def test_a_full_disk_is_said_in_a_sentence(processes, uninterrupted, tmp_path):
    weights = (uninterrupted[0] / "best.safetensors").stat().st_size
    process = processes.Process(target=a_process.fit, args=(LONG, tmp_path / "run", weights // 2))
    process.start()
    assert finish(process) == 0
    message = (tmp_path / "error").read_text()
    assert message.startswith("Cannot write ") and "free some space" in message and "\n" not in message
    assert "checkpoint-" in message
    assert names(tmp_path / "run") <= FILES | SLOTS


# ------------------------------------------------------------------------------------ disks, in this process


class FullDisk:
    """Stands in for os.fsync: the n-th call finds the disk full, and every later one."""

    def __init__(self, room):
        self.room = room

    def __call__(self, file):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_at_any_write_leaves_what_was_there(stand_in, tiny, tmp_path, monkeypatch):
    short = tiny.but(epochs=2, batch_size=100)  # two steps an epoch
    fit(short, stand_in, tmp_path / "reference")
    for room in itertools.count():
        path = tmp_path / str(room)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk(room))
            try:
                fit(short, stand_in, path, checkpoint_seconds=0)
                break
            except CourseError as error:
                assert "No space left on device" in str(error) and "untouched" in str(error)
        assert names(path) <= (FILES - {"run.json"}) | SLOTS
        assert checkpoint.read(path)[1] == [], "whatever checkpoint stands there is whole"
        fit(short, stand_in, path)
        assert result(path) == result(tmp_path / "reference"), room
    assert room >= 2 * train.steps_per_epoch(short) + 3  # a checkpoint a step, then weights, history and record


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_cannot_be_written_is_said_before_the_first_epoch(stand_in, tiny, tmp_path, resume, capfd):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(CourseError, match=r"^Cannot write to .*: choose a folder you may write to\.$"):
            fit(tiny, stand_in, path, resume=resume)
    assert (tmp_path / "file").read_text() == "kept" and capfd.readouterr().out == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_is_said(finished_tiny, stand_in, tiny, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CourseError, match="Cannot write"):
        fit(tiny, stand_in, tmp_path / "run")
    tmp_path.chmod(0o755)


def test_best_weights_are_plain_tensors(finished_tiny):
    stored = load_file(finished_tiny / "best.safetensors")
    assert stored.keys() == TINY.network().state_dict().keys()
    assert all(math.isfinite(float(value.double().abs().sum())) for value in stored.values())


# ---------------------------------------------------------------------------------------- what can go wrong


def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(stand_in, tiny, tmp_path, monkeypatch):
    """From the given step on the loss is infinite; the checkpoint before it stays and is good."""
    real = mixing.mixed_cross_entropy
    calls = itertools.count()

    def breaks(logits, mixed, smoothing):
        return real(logits, mixed, smoothing) * (math.inf if next(calls) >= 7 else 1)

    monkeypatch.setattr(train, "mixed_cross_entropy", breaks)
    with pytest.raises(
        CourseError,
        match=r"at step 7 \(epoch 2, learning rate ([\d.e-]+)\).*last good checkpoint is \S+checkpoint-[ab]\.pt",
    ) as caught:
        fit(tiny, stand_in, tmp_path, checkpoint_seconds=0)
    assert f"{train.learning_rate(tiny, 7):.3g}" in str(caught.value) and "\n" not in str(caught.value)
    state, problems = checkpoint.read(tmp_path)
    assert checkpoint.SLOTS[state["count"] % 2] in str(caught.value), "the newer of the two"
    assert not problems and len(state["history"]) == 1 and state["done"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert not (tmp_path / "run.json").exists()


def test_asked_to_stop_after_a_loss_that_is_not_finite_a_run_keeps_nothing_of_it(stand_in, tiny, tmp_path, monkeypatch):
    real, calls = mixing.mixed_cross_entropy, itertools.count()

    def breaks(*given):
        if (call := next(calls)) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given) * (math.inf if call >= 7 else 1)

    monkeypatch.setattr(train, "mixed_cross_entropy", breaks)
    with pytest.raises(CourseError, match="stopped being finite at step 7"):
        fit(tiny, stand_in, tmp_path, checkpoint_seconds=3_600)
    assert not names(tmp_path) & SLOTS


def test_a_loss_is_looked_at_now_and_then(stand_in, tiny, tmp_path, monkeypatch):
    """Not only where an epoch or a checkpoint ends: a run on a GPU would waste minutes."""
    real, losses = mixing.mixed_cross_entropy, []
    monkeypatch.setattr(train, "LOOK", 2)
    monkeypatch.setattr(train, "mixed_cross_entropy", lambda *given: losses.append(0) or real(*given) * math.inf)
    with pytest.raises(CourseError, match=r"at step 0 .*no checkpoint had been written yet"):
        fit(tiny, stand_in, tmp_path, checkpoint_seconds=3_600)
    assert len(losses) == 2 < train.steps_per_epoch(tiny)


def test_out_of_memory_names_a_batch_that_fits(stand_in, tiny, tmp_path, monkeypatch):
    real = train.Trainer._step

    def small_device(self, side):
        if self.recipe.batch_size > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, side)

    monkeypatch.setattr(train.Trainer, "_step", small_device)
    with pytest.raises(
        CourseError, match=r"A batch of 40 does not fit .*: batch_size=10 does \(with learning_rate=0\.025"
    ):
        fit(tiny, stand_in, tmp_path)
    monkeypatch.setattr(train.Trainer, "_step", lambda self, side: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(CourseError, match="nor does a batch of 2"):
        fit(tiny, stand_in, tmp_path)
    with pytest.raises(CourseError, match=r"2 runs side by side do not fit .*: train fewer"):
        train_together([tiny, tiny.but(seed=1)], stand_in, [tmp_path / "0", tmp_path / "1"])


def test_what_a_failed_step_held_is_free_before_a_smaller_batch_is_tried(stand_in, tiny, tmp_path, monkeypatch):
    held, alive = [], []

    def fails(self, side):
        batch = torch.zeros(3)
        held.append(weakref.ref(batch))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train.Trainer, "_step", fails)
    monkeypatch.setattr(train, "fitting_batch_size", lambda *_: alive.append(held[0]() is not None))
    with pytest.raises(CourseError, match="does not fit"):
        fit(tiny, stand_in, tmp_path)
    assert alive == [False]


def test_a_folder_belongs_to_one_process(processes, stand_in, tiny, tmp_path):
    process = processes.Process(target=a_process.fit, args=(LONG, tmp_path / "run"))
    process.start()
    wait_until(lambda: epochs_in(tmp_path / "run") >= 1)
    with pytest.raises(CourseError, match=r"Another process is training in .*run: wait for it"):
        fit(tiny, stand_in, tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    fit(LONG.but(epochs=1, warmup_epochs=0), stand_in, tmp_path / "run", resume=False)  # the dead hold no lock


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_a_run_keeps_everything(processes, uninterrupted, tmp_path, signum):
    """Twice within one epoch if it comes so: a request writes a checkpoint at once and says where it stands."""
    for aim in (3, 3, 8):
        process = processes.Process(target=a_process.fit, args=(LONG, tmp_path / "run", None, 3600.0))
        process.start()
        wait_until((tmp_path / "began").exists)
        (tmp_path / "began").unlink()
        time.sleep(0.02 * aim)
        os.kill(process.pid, signum)
        assert finish(process) == 0
        message = (tmp_path / "error").read_text()
        assert re.match(rf"Stopped by {signum.name} \(tiny/0 after epoch \d+\): everything is kept", message)
        state, problems = checkpoint.read(tmp_path / "run")
        assert state and not problems
    process = processes.Process(target=a_process.fit, args=(LONG, tmp_path / "run", None, 3600.0))
    process.start()
    assert finish(process) == 0
    assert result(tmp_path / "run") == result(uninterrupted[0])


# ------------------------------------------------------------------------------------------------------ on a GPU

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"mixup_alpha": 0.0, "ema_decay": 0.9, "clip_norm": 1.0, "nesterov": True}])
def test_the_captured_step_trains_as_the_cpu_does(stand_in, tiny, changes):
    """float32, no random draws: the same weights and batches give the same losses, replayed or eager."""
    recipe = tiny.but(stage="none", dropout=0.0, **{"mixup_alpha": 0.0, **changes})
    ours = steps_of(train.Trainer(recipe, stand_in, pick_device()), 20)  # which leaves float32 as it is
    theirs = steps_of(train.Trainer(recipe, stand_in, CPU), 20)
    assert ours == pytest.approx(theirs, rel=2e-3)


@gpu
@needs_cuda
def test_a_replayed_graph_draws_anew_each_time_and_resumes(stand_in, tiny, tmp_path):
    device, changes = torch.device("cuda"), {"epochs": 4, "warmup_epochs": 1, "blocks": (1, 1), "width": 16}
    recipe = RECIPES["paper"].but(name="x", train_size=200, val_size=100, batch_size=40, **changes)
    whole = train.Trainer(recipe, stand_in, device)
    losses = steps_of(whole, 10)
    assert len(set(losses)) == 10
    parted = train.Trainer(recipe, stand_in, device)
    first = steps_of(parted, 5)
    other = train.Trainer(recipe, stand_in, device)
    other.restore(copy.deepcopy(parted.state()))
    assert first == pytest.approx(losses[:5], rel=1e-2)
    rest = steps_of(other, 5)
    assert rest == pytest.approx(losses[5:], rel=5e-2)


@gpu
@needs_cuda
def test_several_seeds_side_by_side_on_cuda(stand_in, tiny, tmp_path):
    recipes = [tiny.but(seed=seed) for seed in range(4)]
    several = train.fit_many(recipes, stand_in, [tmp_path / str(r.seed) for r in recipes])
    accuracies = [run.record["metrics"]["val_accuracy"] for run in several]
    assert all(accuracy > 0.1 for accuracy in accuracies)
