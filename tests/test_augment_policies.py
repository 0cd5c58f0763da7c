"""The policies against torchvision's: the tables, what is drawn and how often, and the order of application."""

from collections import Counter
from itertools import product

import pytest
import torch
from scipy import stats
from test_augment_ops import images_of
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from helpers.augment import families, ops, policies
from helpers.runtime import generator

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (32, 32)
THEIRS = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "randaugment": v2.RandAugment(),
    "trivialaugment": v2.TrivialAugmentWide(),
}
NAME = {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"}


def unit(name: str, magnitude: float) -> float:
    """torchvision's magnitude of a policy in the unit of its functional operation, as its own code converts it."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1 + magnitude
    if name.startswith("translate"):
        return int(magnitude)
    return {"solarize": 255 * magnitude, "autocontrast": 1, "equalize": 1, "invert": 1}.get(name, magnitude)


def recorded(policy: str, n: int, monkeypatch) -> list[tuple]:
    """What torchvision applies to n images: for each a tuple of (operation, magnitude)."""
    transform, image, log = THEIRS[policy], torch.zeros(3, *SIZE, dtype=torch.uint8), []

    def record(image, transform_id, magnitude, **_):
        name = NAME.get(transform_id, transform_id.lower())
        if name != "identity":
            log[-1] += ((name, round(unit(name, magnitude), 3)),)
        return image

    monkeypatch.setattr(transform, "_apply_image_or_video_transform", record)
    torch.manual_seed(0)
    for _ in range(n):
        log.append(())
        transform(image)
    return log


def ours(policy: str, n: int, seed: int = 0) -> list[tuple]:
    op, magnitude, _ = policies.draw(policy, torch.rand(5, n, generator=generator(seed)), SIZE)
    drawn = []
    for codes, values in zip(op.tolist(), magnitude.tolist(), strict=True):
        pairs = [(ops.NAMES[c], m) for c, m in zip(codes, values, strict=True) if c]
        drawn.append(tuple((k, round(int(m) if k.startswith("translate") else m, 3)) for k, m in pairs))
    return drawn


def chi_square(a: list, b: list) -> float:
    """p-value that two samples of categories come from one distribution; rare categories are pooled."""
    counts = Counter(a), Counter(b)
    common = [k for k in counts[0] | counts[1] if counts[0][k] + counts[1][k] >= 10]
    table = [[c[k] for k in common] + [sum(c.values()) - sum(c[k] for k in common)] for c in counts]
    table = [row for row in zip(*table, strict=True) if sum(row)]
    return stats.chi2_contingency(table).pvalue


def test_cifar10_table_is_torchvisions():
    space = THEIRS["autoaugment"]._AUGMENTATION_SPACE
    theirs = THEIRS["autoaugment"]._get_policies(v2.AutoAugmentPolicy.CIFAR10)
    mine = policies.sub_policies("autoaugment", SIZE)
    assert len(mine) == len(theirs) == 25
    for pair, expected in zip(mine, theirs, strict=True):
        for (name, probability, base, delta), (transform_id, p, strength) in zip(pair, expected, strict=True):
            assert name == NAME.get(transform_id, transform_id.lower())
            assert probability == p
            bins, signed = space[transform_id]
            values = bins(10, *SIZE)
            top = 0.0 if values is None else float(values[strength])
            _same(name, base, delta, top, signed)


@pytest.mark.parametrize(("policy", "bins"), [("randaugment", [9]), ("trivialaugment", range(31))])
@pytest.mark.parametrize("size", [(32, 32), (28, 40)])
def test_spaces_are_torchvisions(policy, bins, size):
    space = THEIRS[policy]._AUGMENTATION_SPACE
    expected = {}
    for transform_id, (values, signed) in space.items():
        tops = values(31, *size)
        name = NAME.get(transform_id, transform_id.lower())
        expected[name] = [(0.0 if tops is None else float(tops[b]), signed) for b in bins]
    pairs = policies.sub_policies(policy, size)
    if policy == "randaugment":
        assert len(set(pairs)) == 14 * 14
        slots = [second for _, second in pairs[:14]]  # the pairs are a product: the second runs fastest
    else:
        assert {second[0] for _, second in pairs} == {"identity"}
        slots = [first for first, _ in pairs]
    assert {name for name, *_ in slots} == set(expected)
    for name, tops in expected.items():
        mine = [slot for slot in slots if slot[0] == name]
        assert len(mine) == len(tops)
        for (_, probability, base, delta), (top, signed) in zip(mine, tops, strict=True):
            assert probability == 1
            _same(name, base, delta, top, signed)


def _same(name, base, delta, top, signed) -> None:
    for sign in (1, -1) if signed else (1,):
        got = base + sign * delta
        got = int(got) if name.startswith("translate") else got
        assert name == "identity" or got == pytest.approx(unit(name, sign * top), abs=1e-4)


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_frequencies_and_magnitudes_match_torchvisions(policy, monkeypatch):
    """The joint distribution of both operations, their magnitudes and signs, over many draws."""
    assert chi_square(ours(policy, 40_000), recorded(policy, 6000, monkeypatch)) > 0.001


def test_autoaugment_draws_are_joint_and_independent_between_images():
    """Image i and image i + 1 of a batch draw independently, and so do an image's slots given the sub-policy."""
    drawn = ours("autoaugment", 40_000, seed=1)
    first = [d[0][0] if d else "none" for d in drawn]
    table = Counter(zip(first[::2], first[1::2], strict=True))
    names = sorted(set(first))
    common = [n for n in names if first.count(n) > 800]
    grid = [[table[a, b] for b in common] for a in common]
    assert stats.chi2_contingency(grid).pvalue > 0.001
    # Sub-policy 22, translate_y 0.9 then 0.7 at one strength: the signs are drawn separately.
    pairs = Counter(tuple(m > 0 for _, m in d) for d in drawn if [k for k, _ in d] == ["translate_y", "translate_y"])
    assert len(pairs) == 4 and stats.chisquare(list(pairs.values())).pvalue > 0.001


def test_magnitudes_follow_the_image_size():
    _, _, _, delta = policies.sub_policies("autoaugment", (64, 96))[1][1]  # translate_x at strength 9
    assert delta == pytest.approx(150 / 331 * 96)
    _, _, _, delta = policies.sub_policies("autoaugment", (64, 96))[3][1]  # translate_y at strength 9
    assert delta == pytest.approx(150 / 331 * 64)


ALONE = {name: getattr(ops, name) for name in ops.NAMES[1:]} | {"identity": lambda x, m: x}
AT = {"shear_x": 0.2, "shear_y": -0.3, "translate_x": 5.0, "translate_y": -9.0, "rotate": 20.0, "posterize": 5.0,
      "solarize": 120.0, "brightness": 1.4, "contrast": 0.6, "color": 1.5, "sharpness": 1.9}  # fmt: skip


def test_both_slots_in_order_for_all_pairs():
    """Every pair of operations equals the one after the other, but for two warps, which are one resampling."""
    pairs = list(product(ops.NAMES, repeat=2))
    images = images_of(20, len(pairs), SIZE)
    op = torch.tensor([[ops.NAMES.index(name) for name in pair] for pair in pairs])
    magnitude = torch.tensor([[AT.get(name, 1.0) for name in pair] for pair in pairs])
    warped = families.warp(images, policies.geometry(op, magnitude, SIZE))
    together = policies.apply("randaugment", warped.float(), op, magnitude).to(torch.uint8)
    for i, pair in enumerate(pairs):
        x = images[i : i + 1]
        for name, m in zip(pair, magnitude[i], strict=True):
            x = ALONE[name](x, m.view(1))
        one_warp_at_most = any(ops.NAMES.index(name) not in ops.WARPS for name in pair)
        if one_warp_at_most or set(pair) == {"translate_x", "translate_y"}:
            assert torch.equal(together[i], x[0]), pair


def test_autoaugment_never_warps_late():
    """Its warps come first, or after a colour operation, which leaves the black from outside black."""
    read = set(families.TONES) | {"sharpness"}
    warps = {ops.NAMES[code] for code in ops.WARPS}
    for policy, late in (("autoaugment", False), ("randaugment", True), ("trivialaugment", False)):
        pairs = [(a[0], b[0]) for a, b in policies.sub_policies(policy, SIZE)]
        assert any(a in read and b in warps for a, b in pairs) == late


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_an_image_does_not_depend_on_its_companions(policy):
    images = images_of(21, 70, SIZE)
    op, magnitude, _ = policies.draw(policy, torch.rand(5, 70, generator=generator(22)), SIZE)
    together = policies.apply(policy, images.float(), op, magnitude)
    for i in range(0, 70, 7):
        alone = policies.apply(policy, images[i : i + 1].float(), op[i : i + 1], magnitude[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize(("reference", "bins"), [(v2.TrivialAugmentWide, 31), (v2.AutoAugment, 10)])
def test_solarize_inverts_the_levels_that_torchvisions_does(reference, bins):
    """To the level, at every strength: 85 and 51 are thresholds themselves, which a float32 may miss."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    make, _ = reference()._AUGMENTATION_SPACE["Solarize"]
    for strength, magnitude in enumerate(make(bins, 32, 32).tolist()):
        threshold, _ = policies._magnitude("solarize", strength, bins, (32, 32), wide=bins == 31)
        assert torch.equal(TF.solarize(levels, threshold), TF.solarize(levels, 255.0 * magnitude))
