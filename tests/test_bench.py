"""The measurements: what they count, and how they are kept; how fast anything is, is no test's business."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision import transforms

from helpers import bench, recipe
from helpers.augment import Augment
from helpers.data import draw_stand_in
from helpers.distort import SCORED
from helpers.runtime import CourseError


def test_the_arithmetic_of_the_network_is_that_of_its_convolutions_and_layers():
    """Twice the multiply-adds forward, and as much again for each of the two gradients (the first layer has one)."""
    counted, model = [], bench.get("paper").network()

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counted.append(2 * module.weight.numel() * output[0, 0].numel())
        elif isinstance(module, nn.Linear):
            counted.append(2 * module.weight.numel())

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    assert bench.flops_per_image() == 3 * sum(counted) - counted[0]


def test_a_table_is_kept_with_where_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RECORDED", tmp_path)
    monkeypatch.setitem(bench.SUBJECTS, "augment", lambda: bench.pd.DataFrame({"images/s": [1.5]}))
    with pytest.raises(CourseError, match=r"No measurement in .*bench augment --record"):
        bench.recorded("augment")
    bench.measure("augment")
    assert not list(tmp_path.iterdir())
    bench.measure("augment", record=True)
    kept = bench.recorded("augment")
    assert kept["images/s"].tolist() == [1.5] and {"device", "versions", "commit"} <= set(kept)
    with pytest.raises(CourseError, match="no benchmark 'nope': expected one of augment, train, distort"):
        bench.measure("nope")


def test_a_rate_is_images_by_seconds_after_a_call_that_does_not_count(monkeypatch):
    monkeypatch.setattr(bench.time, "perf_counter", map(float, itertools.count()).__next__)
    calls = []
    assert bench._rate(lambda: calls.append(1), 10, 5) == 10 * 4 / 5
    assert len(calls) == 1 + 4


def test_the_augmentation_that_is_measured_is_the_whole_of_it():
    images = draw_stand_in(40, seed=1).images
    torch.manual_seed(3)
    ours = next(bench._course(images, 8))
    torch.manual_seed(3)
    picked = images[torch.randint(40, (8,))]
    assert torch.equal(ours, Augment("rotation_autoaugment")(picked, torch.Generator().manual_seed(0)))


def test_the_rivals_leave_out_nothing_of_it():
    theirs = [type(step).__name__ for step in bench._torchvision(transforms, [transforms.ToTensor()]).transforms]
    assert theirs == ["RandomCrop", "RandomHorizontalFlip", "RandomRotation", "AutoAugment", "ColorJitter",
                      "RandomAdjustSharpness", "RandomApply", "ToTensor", "Normalize", "RandomErasing"]  # fmt: skip


def test_a_step_of_several_seeds_counts_the_images_of_all(monkeypatch):
    made = dict.fromkeys(("step", "alone"), lambda: None)
    monkeypatch.setattr(bench, "LOOPS", {"four": (lambda *_: made, 4)})
    monkeypatch.setattr(bench, "load_cifar10", lambda split: draw_stand_in(10)[:2])
    monkeypatch.setattr(bench, "_rate", lambda call, images, seconds: images)
    found = bench._loop("four", 64, 1.0)
    assert (found["step"], found["alone"]) == (256, 64)


def test_both_loops_train_the_papers_network(monkeypatch):
    """A step of each runs; ours is the engine's own generator of steps, driven as a run drives it."""
    g, made, network = torch.Generator().manual_seed(0), [], recipe.Recipe.network
    monkeypatch.setattr(recipe.Recipe, "network", lambda self: made.append(network(self)) or made[-1])
    images = torch.randint(256, (64, 3, 32, 32), generator=g, dtype=torch.uint8).numpy()
    labels = torch.randint(10, (64,), generator=g).numpy()
    for name in ("plain loop, DataLoader", "this course"):
        make, count = bench.LOOPS[name]
        parts = make(images, labels, 8, count)
        before = [weight.detach().clone() for weight in made[-1].parameters()]
        parts["step"]()
        assert sum(weight.numel() for weight in made[-1].parameters()) == 4_698_028, name
        assert not any(torch.equal(*pair) for pair in zip(before, made[-1].parameters(), strict=True)), name
        assert set(parts) == ({"step"} if name.startswith("plain") else {"step", "alone", "augment"})


def test_the_columns_of_the_steps_follow_from_the_rates(monkeypatch):
    rates = {"plain loop, DataLoader": {"step": 50.0},
             "this course": {"step": 200.0, "alone": 250.0, "augment": 4000.0}}  # fmt: skip
    monkeypatch.setattr(bench, "LOOPS", dict.fromkeys(rates, (None, 1)))
    monkeypatch.setattr(bench, "_loop", lambda name, batch, seconds: {**rates[name], "first": 0.5, "MiB": 7.0})
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    monkeypatch.setattr(bench, "load_cifar10", lambda split: None)
    monkeypatch.setattr(bench, "matmul_flops", iter((3e12, 5e12)).__next__)
    monkeypatch.setattr(bench, "flops_per_image", lambda: 1e10)
    plain, ours = bench.train_table((64,)).set_index("loop").to_dict("index").values()
    assert (plain["ours"], plain["ceiling"], plain["s/epoch"]) == (4.0, 0.125, 900.0)
    assert (ours["ours"], ours["ceiling"], ours["s/epoch"]) == (1.0, 0.5, 225.0)
    assert (ours["augment"], ours["between"], ours["first s"], ours["MiB"]) == (0.05, 0.2, 0.5, 7.0)


def test_without_a_compiler_the_other_loops_are_measured(monkeypatch):
    call = dict.fromkeys(("step", "alone", "augment"), lambda: None)
    ours = {"this course": (lambda *_: call, 1), "this course, compiled": bench.LOOPS["this course, compiled"]}
    monkeypatch.setattr(bench, "LOOPS", ours)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    monkeypatch.setattr(bench, "load_cifar10", lambda split: draw_stand_in(100)[:2])
    monkeypatch.setattr(bench, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench, "matmul_flops", lambda: 1e12)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"^Not measured, this course, compiled: .* needs the compiler \S+:"):
        table = bench.train_table((8,), seconds=0.01).set_index("loop")
    assert list(table.index) == list(ours) and table.columns[0] == "batch"
    assert table.loc["this course"].drop("MiB").notna().all()
    assert table.loc["this course, compiled"].drop("batch").isna().all()


def test_the_distortions_add_up(monkeypatch):
    monkeypatch.setattr(bench, "load_cifar10", lambda split: draw_stand_in(20)[:2])
    table = bench.distort_table()
    kinds, total = table[:-1], table.iloc[-1]
    assert tuple(kinds["kind"]) == SCORED and (kinds["images"] == 100).all() and total["images"] == 1_500
    assert total["seconds"] == pytest.approx(kinds["seconds"].sum(), abs=0.1)
    assert total["images/s"] == pytest.approx(1_500 / total["seconds"], rel=0.1)


def test_the_ceiling_counts_a_multiplication_and_an_addition_each(monkeypatch):
    """A product of two n x n matrices is 2 n^3 operations."""
    monkeypatch.setattr(bench, "_rate", lambda work, amount, seconds: amount)
    monkeypatch.setattr(bench.torch, "randn", lambda *shape: torch.zeros(shape[0], 1, 1))
    assert bench.matmul_flops() == 2 * 4096**3


def test_the_best_round_of_each_augmentation_counts_and_ours_is_the_measure(monkeypatch):
    rates = itertools.cycle([(10.0, 1.0), (40.0, 2.0), (20.0, 3.0)])

    class Here:
        def __init__(self, *_, **__):
            """As the executor is made."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, function, name, batch_size, seconds):
            found = next(rates) if name == "this course" else (4.0, 5.0)
            return SimpleNamespace(result=lambda: found)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench, "load_cifar10", lambda split: None)
    table = bench.augment_table(batch_sizes=(64,), rounds=3).set_index("augmentation")
    assert table.loc["this course", ["images/s", "ours", "MiB"]].tolist() == [40.0, 1.0, 2.0]
    other = table.drop("this course").dropna().iloc[0]
    assert (other["images/s"], other.ours) == (4.0, 10.0)
