"""Mixup and CutMix: the equations, the distribution of lambda, loss and accuracy with two targets."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from helpers.mixing import LEAST_ALPHA, Mixed, beta, cutmix, mix, mixed_correct, mixed_cross_entropy, mixup
from helpers.runtime import CourseError, generator

CPU = torch.device("cpu")


def batch(n: int = 16, size: tuple[int, int] = (32, 32)) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(1, n)
    return torch.randn(n, 3, *size, generator=g), torch.randint(10, (n,), generator=g)


def partners(mixed: Mixed, images: torch.Tensor, mix) -> torch.Tensor:
    """Which image each was mixed with, found by trying all: `mix(i, j)` is what i with j should look like."""
    n = len(images)
    errors = torch.stack([torch.stack([(mixed.images[i] - mix(i, j)).abs().max() for j in range(n)]) for i in range(n)])
    assert (errors.amin(1) < 1e-5).all()
    return errors.argmin(1)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_lambda_is_beta(alpha):
    drawn = beta(alpha, 40_000, generator(3), CPU).double()
    assert drawn.min() >= 0 and drawn.max() <= 1
    # Half by half: for a small alpha much of Beta lies so close to 1 that floating point can only say 1.
    below = drawn[drawn < 0.5]
    assert stats.kstest(below.numpy(), lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 0.01
    assert stats.binomtest(len(below), len(drawn)).pvalue > 0.01
    above = drawn[drawn > 0.5]
    assert stats.ks_2samp((1 - above).clamp(min=1e-6).numpy(), below.clamp(min=1e-6).numpy()).pvalue > 0.01


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_lambda_per_batch_or_per_image(mix):
    images, targets = batch()
    g = generator(4)
    shared, own = mix(images, targets, 1.0, g), mix(images, targets, 1.0, g, per_image=True)
    assert shared.lam.shape == own.lam.shape == (16,)
    assert shared.lam.unique().numel() == 1
    assert own.lam.unique().numel() > 8


def test_mixup_lambda_over_batches_is_beta_too():
    images, targets = batch(2, (2, 2))
    g = generator(5)
    drawn = [mixup(images, targets, 0.4, g).lam[0].item() for _ in range(2000)]
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


@pytest.mark.parametrize("per_image", [False, True])
def test_mixup_is_equation_1(per_image):
    images, targets = batch()
    mixed = mixup(images, targets, 1.0, generator(6), per_image)
    partner = partners(mixed, images, lambda i, j: mixed.lam[i] * images[i] + (1 - mixed.lam[i]) * images[j])
    assert sorted(partner.tolist()) == list(range(16))
    assert torch.equal(mixed.targets_a, targets)
    assert torch.equal(mixed.targets_b, targets[partner])


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (7, 5)])
def test_cutmix_pastes_one_rectangle_whose_area_is_lambda(per_image, size):
    n = 24
    images = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, *size).contiguous()  # an image's level is its number
    targets = torch.arange(n)
    mixed = cutmix(images, targets, 1.0, generator(7), per_image)
    for i, image in enumerate(mixed.images):
        pasted = image[0] != i
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert mixed.lam[i].item() == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6) or (
            mixed.targets_b[i] == i  # pasted from itself
        )
        if pasted.any():
            assert image[0][pasted].unique().tolist() == [mixed.targets_b[i].item()]
            rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
            assert pasted.sum() == rows * columns
    assert not per_image or mixed.lam.unique().numel() > 5


def test_cutmix_rectangles_have_the_area_and_place_of_the_paper():
    """Lambda before clipping is Beta, so away from the edge the area follows; the centre is uniform."""
    n, side = 4000, 64
    images = torch.zeros(n, 1, side, side)
    mixed = cutmix(images + torch.arange(n).view(n, 1, 1, 1), torch.arange(n), 1.0, generator(8), per_image=True)
    pasted = (mixed.images != torch.arange(n).view(n, 1, 1, 1))[:, 0]
    rows = pasted.any(2)
    inside = ~(rows[:, 0] | rows[:, -1]) & rows.any(1)
    centre = (rows.float().argmax(1) + rows.sum(1) / 2)[inside] / side
    assert 0.45 < centre.mean() < 0.55
    # The sides are equal where neither is cut off, and even, since the paper halves them with whole numbers.
    columns = pasted.any(1)
    whole = inside & ~(columns[:, 0] | columns[:, -1])
    assert whole.sum() > 500
    assert torch.equal(rows.sum(1)[whole], columns.sum(1)[whole])
    # E[lam] over uniform lam and centre, by the same definition in numpy-like brute force.
    lam, c = torch.rand(200_000, generator=generator(9)), torch.rand(2, 200_000, generator=generator(10))
    half = ((1 - lam).sqrt() * side).floor().div(2).floor()
    middle = (c * side).floor()
    extent = (middle + half).clamp(max=side) - (middle - half).clamp(min=0)
    assert mixed.lam.mean().item() == pytest.approx(1 - (extent.prod(0) / side**2).mean().item(), abs=0.012)


def test_a_box_is_as_tall_and_wide_as_its_image_and_its_centre_a_pixel(monkeypatch):
    """Lambda 15 / 16: a quarter of each side, from half of that before the centre to half after, cut at the edges."""
    monkeypatch.setattr("helpers.mixing.beta", lambda alpha, n, generator, device: torch.full((n,), 15 / 16))
    n, sides = 8_000, (8, 16)
    images = torch.arange(float(n)).view(-1, 1, 1, 1).expand(-1, 1, *sides)
    pasted = (cutmix(images, torch.arange(n), 1.0, generator(23), per_image=True).images != images)[:, 0]
    pasted = pasted[pasted.any((1, 2))]  # not those that were their own partner
    for side, along in zip(sides, (pasted.any(2), pasted.any(1)), strict=True):
        half = side // 8
        assert along.sum(1).max() == 2 * half
        last = (along * torch.arange(side)).amax(1)  # with a centre from 0 to side - 1: centre + half - 1, or the edge
        expected = torch.bincount((torch.arange(side) + half - 1).clamp(max=side - 1), minlength=side) / side
        seen = torch.bincount(last, minlength=side)
        assert not seen[expected == 0].any()
        assert stats.chisquare(seen[expected > 0], len(last) * expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_lambda_1_is_the_identity(mix, monkeypatch):
    monkeypatch.setattr("helpers.mixing.beta", lambda alpha, n, generator, device: torch.ones(n))
    images, targets = batch()
    mixed = mix(images, targets, 1.0, generator(11))
    assert torch.equal(mixed.images, images)
    assert torch.equal(mixed.lam, torch.ones(16))
    logits = torch.randn(16, 10, generator=generator(12))
    assert mixed_cross_entropy(logits, mixed).item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_alpha_0_is_off_and_draws_nothing(mix):
    images, targets = batch()
    g = generator(13)
    before = g.get_state()
    mixed = mix(images, targets, 0.0, g)
    assert mixed.images is images
    assert torch.equal(mixed.targets_b, targets) and torch.equal(mixed.lam, torch.ones(16))
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_same_generator_same_result_and_empty_batch(mix):
    images, targets = batch()
    first, again = (mix(images, targets, 0.3, generator(14)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert mix(images[:0], targets[:0], 0.3).images.shape == (0, 3, 32, 32)
    assert mix(images.bfloat16(), targets, 0.3, generator(14)).images.dtype == torch.bfloat16


def test_a_recipes_mix_is_cutmix_for_half_of_the_batches():
    """A batch is mixed by one of both, whole; CutMix alone leaves every pixel as it was in one of two images."""
    images, targets = batch(8)[0], torch.arange(8)
    g, cut = generator(20), []
    for _ in range(400):
        mixed = mix(images, targets, 1.0, 1.0, g)
        partner, lam = images[mixed.targets_b], mixed.lam[0]
        pasted = bool(((mixed.images == images) | (mixed.images == partner)).all())
        blended = torch.allclose(mixed.images, lam * images + (1 - lam) * partner, atol=1e-6)
        assert pasted or blended
        cut.append(pasted)
    assert stats.binomtest(sum(cut), len(cut)).pvalue > 0.001


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.4)])
def test_a_recipes_mix_of_one_kind_is_that_kind(mixup_alpha, cutmix_alpha):
    images, targets = batch()
    ours = mix(images, targets, mixup_alpha, cutmix_alpha, generator(21))
    kind = cutmix if cutmix_alpha else mixup
    theirs = kind(images, targets, cutmix_alpha or mixup_alpha, generator(21))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert mix(images[:0], targets[:0], 0.4, 0.4).images.shape == (0, 3, 32, 32)
    for wrong in ((-1.0, 0.4), (0.4, -1.0), (-1.0, 0.0)):
        with pytest.raises(CourseError, match="alpha"):
            mix(images, targets, *wrong)


def test_a_lambda_can_be_changed_alone():
    mixed = mixup(*batch(), 1.0, generator(22))
    mixed.lam[0] = 2.0
    assert (mixed.lam == 2.0).sum() == 1


def test_partners_are_a_uniform_permutation():
    images, targets = torch.zeros(4, 1, 2, 2), torch.arange(4)
    g = generator(15)
    seen = [tuple(mixup(images, targets, 1.0, g).targets_b.tolist()) for _ in range(2400)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_the_mixed_target(smoothing):
    images, targets = batch()
    mixed = mixup(images, targets, 1.0, generator(16), per_image=True)
    logits = torch.randn(16, 10, generator=generator(17), requires_grad=True)
    a, b = F.one_hot(mixed.targets_a, 10).float(), F.one_hot(mixed.targets_b, 10).float()
    soft = mixed.lam[:, None] * a + (1 - mixed.lam[:, None]) * b
    expected = F.cross_entropy(logits, soft, label_smoothing=smoothing)
    loss = mixed_cross_entropy(logits, mixed, smoothing)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_accuracy_counts_both_classes():
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    a, b = torch.tensor([0, 0, 2, 0, 0]), torch.tensor([1, 1, 2, 1, 1])
    mixed = Mixed(torch.zeros(5, 1, 1, 1), a, b, torch.full((5,), 0.7))
    # predicted 0 1 2 3 0: class a (0.7), class b (0.3), both (1), neither, class a again
    assert mixed_correct(logits, mixed).item() == pytest.approx(0.7 + 0.3 + 1 + 0 + 0.7)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_wrong_arguments_are_refused_in_one_sentence(mix):
    images, targets = batch()
    assert len(mix(images, targets, LEAST_ALPHA).lam) == len(images), "the least that is allowed is"
    wrong = [
        ((images.byte(), targets, 1.0), "float images"),
        ((images[0], targets, 1.0), "float images"),
        ((images, targets[:3], 1.0), "one per image"),
        ((images, targets.float(), 1.0), "int64"),
        ((images, targets, -0.1), "alpha"),
        ((images, targets, 0.005), "alpha must be 0 for no mixing, or a number of at least 0.01"),
        ((images, targets, float("nan")), "alpha"),
        ((images, targets, float("inf")), "alpha"),
        ((images, targets, "1"), "alpha"),
        ((images, [0] * len(images), 1.0), "one per image, but got a list"),
        ((images.numpy(), targets, 1.0), "float images .* but got a ndarray"),
    ]
    for arguments, says in wrong:
        with pytest.raises(CourseError, match=says) as caught:
            mix(*arguments)
        assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")
