"""Measures against made-up images, intervals against scipy and coverage, spectra against theory, twins made here."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import rgb_to_hsv
from scipy import fft, ndimage, signal, stats
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2.functional import center_crop, resize

from helpers import data, shift
from helpers.data import draw_stand_in
from helpers.distort import KINDS, distort
from helpers.runtime import CourseError, generator
from helpers.shift import MEASURES, measures

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = draw_stand_in(60, seed=5).images


def grey(level: int, count: int = 40) -> torch.Tensor:
    return torch.full((count, 3, 32, 32), level, dtype=torch.uint8)


def photographs(count: int, seed: int = 0) -> torch.Tensor:
    """Noise with the spectrum of photographs, power falling as the frequency squared, the same in each channel."""
    g = generator(0xF070, seed)
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp_min(1 / 32)
    shape = torch.fft.irfft2(torch.fft.rfft2(torch.randn(count, 1, 32, 32, generator=g)) / frequency)
    tint = torch.rand(count, 3, 1, 1, generator=g) * 90 - 45
    return (128 + tint + 45 * shape / shape.std((1, 2, 3), keepdim=True)).clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------- the measures


def test_measures_of_constructed_images():
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 255
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * torch.ones(3, 1, 1)
    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, 16:] = 255
    plain, colour, checks, halves = measures(
        torch.stack([grey(51, 1)[0], red, (board * 255).byte(), half])
    ).itertuples()
    assert (plain.red, plain.brightness, plain.contrast, plain.saturation) == pytest.approx((0.2, 0.2, 0, 0), abs=1e-6)
    assert (plain.sharpness, plain.noise, plain.extremes, plain.repeats) == pytest.approx((0, 0, 0, 1), abs=1e-6)
    assert (colour.red, colour.green, colour.red_std, colour.brightness) == pytest.approx((1, 0, 0, 0.299), abs=1e-6)
    assert (colour.saturation, colour.extremes) == pytest.approx((1, 1))
    assert checks.repeats == 0 and checks.sharpness == pytest.approx(16, rel=1e-2)  # the Laplacian is +-4
    assert checks.noise == pytest.approx(8 / (6 * 0.6745))
    assert halves.blocks > 100 and checks.blocks == pytest.approx(1)
    assert (halves.brightness, halves.repeats) == pytest.approx((0.5, 30 / 31))
    assert halves.blue_std == pytest.approx(np.std([0.0, 1.0] * 512, ddof=1), rel=1e-3)
    assert [row.near_constant for row in (plain, colour, checks, halves)] == [1, 1, 0, 0]
    assert [row.near_grey for row in (plain, colour, checks, halves)] == [1, 0, 1, 1]


def test_measures_of_pictures_against_matplotlib_and_scipy():
    images = photographs(30, seed=12)
    x, found = images.permute(0, 2, 3, 1).double().numpy() / 255, measures(images)
    np.testing.assert_allclose(found.saturation, rgb_to_hsv(x)[..., 1].mean((1, 2)), atol=1e-6)
    grey = x @ [0.299, 0.587, 0.114]
    laplacian = [ndimage.laplace(each)[1:-1, 1:-1].var(ddof=1) for each in grey]
    np.testing.assert_allclose(found.sharpness, laplacian, rtol=1e-4)
    steps = np.abs(np.diff(x, axis=2)).mean((1, 3))  # [image, step from column i to i + 1]
    at = np.isin(np.arange(31), (7, 15, 23))
    blocks = (steps[:, at].mean(1) + 1e-3) / (steps[:, ~at].mean(1) + 1e-3)
    np.testing.assert_allclose(found.blocks, blocks, rtol=1e-4)


def test_a_bar_may_differ_by_seven_levels_and_what_follows_must_by_seventeen():
    images = torch.stack([photographs(1, seed=1)[0]] * 4)
    images[:, :, 3:-3] = 200  # within the bars a plain image: its first row decides
    for edge in (slice(0, 3), slice(-3, None)):
        images[:, :, edge] = 100
        images[0, :, edge, ::2], images[1, :, edge, ::2] = 107, 109
    images[2, :, 3:-3], images[3, :, 3:-3] = 117, 116
    assert measures(images).letter_boxed.tolist() == [1, 0, 1, 0]


def test_the_bounds_of_near_grey_and_near_constant():
    tinted = torch.stack([grey(100, 1)[0] for _ in range(4)])
    for image, chroma in enumerate((3, 5, 3, 5)):
        tinted[image, image // 2] += chroma
    assert measures(tinted).near_grey.tolist() == [1, 0, 1, 0]
    waves = torch.ones(3, 32, 32) * torch.tensor([1.0, -1.0]).repeat(16)  # its contrast is its height
    images = torch.stack([128 + height * waves for height in (12, 13, 14)]).byte()  # 0.05 of 255 is 12.75
    assert measures(images).near_constant.tolist() == [1, 0, 0]


def test_letter_boxes_are_bars_at_two_opposite_edges():
    photo = photographs(1, seed=1)[0]
    examples = {name: photo.clone() for name in ("none", "wide", "tall", "frame", "one bar", "ragged", "unlike")}
    for edge in (slice(0, 3), slice(-3, None)):
        examples["wide"][:, edge] = 0
        examples["tall"][:, :, edge] = 255
        examples["frame"][:, edge], examples["frame"][:, :, edge] = 0, 0
        examples["ragged"][:, edge] = 0
        examples["ragged"][:, 3:-3, :24] = 0  # the first other row is black along most of its length
    examples["one bar"][:, :3] = 0
    examples["unlike"][:, :3], examples["unlike"][:, -3:] = 0, 255
    found = measures(torch.stack([*examples.values()]))["letter_boxed"]
    assert found.tolist() == [0, 1, 1, 1, 0, 0, 1]
    assert measures(torch.cat((grey(0, 1), grey(200, 1))))["letter_boxed"].tolist() == [0, 0]


@pytest.mark.parametrize("sigma", [5, 10, 20])
def test_the_noise_measure_recovers_the_noise_that_was_added(sigma):
    noisy = np.clip(np.rint(np.random.default_rng(0).normal(128, sigma, (50, 3, 32, 32))), 0, 255).astype(np.uint8)
    assert measures(torch.from_numpy(noisy))["noise"].mean() == pytest.approx(sigma / 255, rel=0.05)


def test_measures_of_no_images_are_an_empty_table():
    assert list(measures(IMAGES[:0]).columns) == list(MEASURES) and len(measures(IMAGES[:0])) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_measures():
    np.testing.assert_allclose(measures(IMAGES.cuda()), measures(IMAGES), atol=1e-4)
    np.testing.assert_allclose(shift.spectrum(IMAGES.cuda()), shift.spectrum(IMAGES), rtol=1e-3)
    ours, theirs = (shift.near_duplicates(part, part) for part in (IMAGES.cuda(), IMAGES))
    pd.testing.assert_frame_equal(ours[["index_a", "index_b"]][:60], theirs[["index_a", "index_b"]][:60])


# --------------------------------------------------------------------------------------------------- two sets compared


def test_a_set_is_not_shifted_from_itself():
    table = shift.shift(IMAGES, IMAGES)
    assert list(table.index) == list(MEASURES)
    assert (table[["difference", "ks"]] == 0).all(axis=None) and (table["p"] == 1).all()
    known = table.dropna()
    assert (known.low <= 0).all() and (known.high >= 0).all()


def test_shift_agrees_with_scipy_and_counts_in_the_references_spread():
    a, b = measures(IMAGES[:30]), measures(IMAGES[30:])
    table = shift.shift(IMAGES[:30], IMAGES[30:], resamples=4_000)
    for name in ("red", "contrast", "sharpness", "noise", "blocks"):
        assert table.ks[name] == pytest.approx(stats.ks_2samp(a[name], b[name]).statistic)
        gap, unit = b[name].mean() - a[name].mean(), a[name].std(ddof=1)
        assert table.difference[name] == pytest.approx(gap / unit)
        drawn = stats.bootstrap((a[name], b[name]), lambda x, y, axis: y.mean(axis) - x.mean(axis), method="percentile",
                                n_resamples=4_000, random_state=1)  # fmt: skip
        low, high = np.array(drawn.confidence_interval) / unit
        assert table.loc[name, ["low", "high"]].to_numpy(float) == pytest.approx([low, high], abs=0.06 * (high - low))
    again = shift.shift(IMAGES[:30], IMAGES[30:], resamples=4_000)
    pd.testing.assert_frame_equal(table, again)
    assert not shift.shift(IMAGES[:30], IMAGES[30:], seed=1).low.equals(table.low)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        draws = shift._resample(rng.normal(3, 2, (60, 1)), 300, rng)
        low, high = np.quantile(draws, (0.025, 0.975))
        held.append(low <= 3 <= high)
    assert 0.89 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(
    ("kind", "measure", "sign"),
    [
        ("brightness", "brightness", 1),
        ("contrast", "contrast", -1),
        ("saturate", "saturation", 1),
        ("gaussian_blur", "sharpness", -1),
        ("gaussian_noise", "noise", 1),
        ("impulse_noise", "extremes", 1),
        ("pixelate", "repeats", 1),
    ],
)
def test_shift_recognises_what_a_distortion_moves(kind, measure, sign):
    wave = torch.sin(torch.linspace(0, 5, 32)) * 40  # smooth pictures: what is sharp or noisy was added
    x = (
        torch.rand(80, 3, 1, 1, generator=generator(4)) * 80
        + 90
        + wave * torch.rand(80, 1, 32, 1, generator=generator(5))
    )
    clean = (x + torch.randn(80, 3, 32, 32, generator=generator(6)) * 3).clamp(0, 255).byte()
    quiet = shift.shift(clean[:40], clean[40:])
    loud = shift.shift(clean[:40], distort(clean[40:], kind, 5))
    if measure == "extremes":  # the reference has none, and so no unit
        assert np.isnan(loud.difference[measure]) and loud.other[measure] > 0 == loud.reference[measure]
    else:
        assert loud.difference[measure] * sign > 1 and (loud.low * loud.high)[measure] > 0
    assert loud.ks[measure] > 0.45 > quiet.ks[measure]


def test_blocks_give_jpeg_away():
    slope = torch.linspace(-60, 60, 32) * torch.rand(80, 3, 32, 1, generator=generator(8))
    smooth = (128 + slope).byte()
    assert shift.shift(smooth[:40], smooth[40:]).ks["blocks"] < 0.4
    assert shift.shift(smooth[:40], distort(smooth[40:], "jpeg_compression", 5)).ks["blocks"] > 0.6


# -------------------------------------------------------------------------------------------------------- the spectrum


def test_white_noise_has_its_variance_at_every_frequency():
    noise = np.random.default_rng(0).normal(128, 20, (400, 1, 32, 32)).repeat(3, 1)
    table = shift.spectrum(torch.from_numpy(np.clip(np.rint(noise), 0, 255).astype(np.uint8)))
    np.testing.assert_allclose(table.frequency, np.arange(1, 17) / 32)
    np.testing.assert_allclose(table.power[1:], (20**2 + 1 / 12) / 255**2, rtol=0.05)  # the first ring loses the mean
    assert ((table.low < table.power) & (table.power < table.high)).all()


@pytest.mark.parametrize("cycles", [3, 9, 14])
def test_a_wave_stands_out_at_its_frequency(cycles):
    wave = (128 + 100 * torch.sin(2 * torch.pi * cycles * torch.arange(32) / 32)).byte().expand(4, 3, 32, 32)
    for turned in (wave, wave.transpose(2, 3)):
        assert shift.spectrum(turned).power.idxmax() == cycles - 1


def test_the_spectrums_interval_is_scipys_bootstrap():
    table, power = shift.spectrum(IMAGES, resamples=4_000), shift._ring_power(IMAGES).double().numpy()
    drawn = stats.bootstrap((power,), np.mean, method="percentile", n_resamples=4_000, random_state=1)
    width = drawn.confidence_interval.high - drawn.confidence_interval.low
    assert (np.abs(table.low - drawn.confidence_interval.low) < 0.06 * width).all()
    assert (np.abs(table.high - drawn.confidence_interval.high) < 0.06 * width).all()


def test_the_power_of_a_ring_is_the_mean_of_scipys_periodograms_in_it():
    images = photographs(4, seed=13)
    x = images.permute(0, 2, 3, 1).double().numpy() / 255 @ [0.299, 0.587, 0.114]
    window = np.outer(*[signal.windows.hann(32, sym=False)] * 2)
    power = np.abs(fft.fft2((x - x.mean((1, 2), keepdims=True)) * window)) ** 2 / (window**2).sum()
    ring = np.rint(np.hypot(*np.meshgrid(*[32 * fft.fftfreq(32)] * 2)))
    theirs = [[each[ring == radius].mean() for radius in range(1, 17)] for each in power]
    np.testing.assert_allclose(shift._ring_power(images), theirs, rtol=1e-3)


def test_a_frequency_is_counted_in_whole_rings_across_a_wide_image():
    """Cycles across the width; a wave that runs up and down a lower image has as many a pixel, and so its ring."""
    wave = (128 + 100 * torch.sin(2 * torch.pi * torch.arange(64) / 8)).byte()
    across, down = wave.expand(2, 3, 32, 64), wave[:32, None].expand(2, 3, 32, 64)
    for turned in (across, down):
        table = shift.spectrum(turned)
        assert len(table) == 32 and table.frequency[table.power.idxmax()] == 1 / 8


def test_blur_takes_the_fine_frequencies_and_noise_adds_them():
    clean = photographs(60)
    coarse, fine = slice(0, 3), slice(12, 16)
    power = {kind: shift.spectrum(distort(clean, kind, 5)) for kind in ("gaussian_blur", "gaussian_noise")}
    plain = shift.spectrum(clean)
    assert (power["gaussian_blur"].high[fine] < plain.low[fine] / 3).all()
    added = (power["gaussian_noise"].power - plain.power)[fine]  # 0.1 in each channel, weighted as grey is
    np.testing.assert_allclose(added, 0.1**2 * (0.299**2 + 0.587**2 + 0.114**2), rtol=0.25)
    assert (np.abs(np.log(power["gaussian_noise"].power / plain.power)[coarse]) < 0.2).all()


# ------------------------------------------------------------------------------------------------- told apart, and how


def test_the_smallest_sets_that_are_taken_can_be_told_apart():
    dark, bright = (torch.randint(low, low + 30, (25, 3, 32, 32), generator=generator(low), dtype=torch.uint8)
                    for low in (0, 220))  # fmt: skip
    assert shift.told_apart(dark, bright, resamples=20).auc == 1.0


def test_kinds_that_no_row_explains_are_given_as_they_are_taken(finder):
    """A kind that the trees never answered on what filled the confusion, and do answer now."""
    confusion = finder.confusion.assign(clean=0.0, fog=finder.confusion.fog + finder.confusion.clean)
    all_clean = SimpleNamespace(**known(finder), predict=lambda x: np.zeros(len(x), int))
    found = shift.KindFinder(all_clean, confusion, finder.tested).shares(photographs(40, seed=9), resamples=20)
    assert found.share["clean"] == 1.0 and found.notna().all(axis=None)


def test_equal_sets_are_not_told_apart_and_unequal_ones_are():
    clean = photographs(400)
    same = shift.told_apart(clean[:200], clean[200:])
    assert same.low < 0.5 < same.high
    noisy = shift.told_apart(clean[:200], distort(clean[200:], "gaussian_noise", 1))
    assert noisy.low > 0.95 and noisy.low <= noisy.auc <= noisy.high <= 1
    assert noisy == shift.told_apart(clean[:200], distort(clean[200:], "gaussian_noise", 1))


def test_the_auc_and_its_interval_are_scikit_learns(monkeypatch):
    """Of scores with ties, in two folds of which the second's trees answer on another scale."""
    rng, side = np.random.default_rng(0), np.repeat((0, 1), 30)
    scores = np.round(rng.normal(size=60) + side)
    folds = [np.arange(0, 60, 2), np.arange(1, 60, 2)]
    ranks = np.empty(60)
    for fold in folds:
        ranks[fold] = stats.rankdata(scores[fold])
    scores[folds[1]] += 50
    monkeypatch.setattr(shift, "cross_val_predict", lambda *_, **__: np.stack((1 - scores, scores), 1))
    monkeypatch.setattr(shift.StratifiedKFold, "split", lambda self, x, y: [(None, fold) for fold in folds])
    found = shift.told_apart(IMAGES[:30], IMAGES[30:])
    assert found.auc == pytest.approx(roc_auc_score(side, ranks))
    drawn = [roc_auc_score(side, ranks[np.concatenate((rng.choice(30, 30), 30 + rng.choice(30, 30)))])
             for _ in range(1_000)]  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.02)


def known(finder) -> dict:
    """What trees with other answers must have of those that they stand for."""
    return {name: getattr(finder.model, name) for name in ("classes_", "n_features_in_")}


@pytest.fixture(scope="module")
def finder():
    return shift.learn_kinds(photographs(300, seed=2), count=60)


def test_kinds_are_learned_with_their_confusion(finder):
    assert list(finder.confusion.index) == list(finder.confusion.columns) == ["clean", *KINDS]
    np.testing.assert_allclose(finder.confusion.sum(axis=1), 1)
    diagonal = pd.Series(np.diag(finder.confusion), finder.confusion.index)
    assert diagonal.mean() > 0.4 > 3 / len(diagonal), "far above chance, on 60 images a kind"
    assert diagonal["gaussian_noise"] > 0.6


def test_a_known_mix_is_found_again(finder):
    clean = photographs(300, seed=3)
    parts = [distort(part, "impulse_noise", severity) for part, severity in
             zip(clean[100:200].split(20), (1, 2, 3, 4, 5), strict=True)]  # fmt: skip
    mix = torch.cat((clean[:100], *parts, distort(clean[200:], "contrast", 5)))
    table = finder.shares(mix)
    truth = pd.Series(0.0, table.index)
    truth[["clean", "impulse_noise", "contrast"]] = 1 / 3
    assert table.share.sum() == pytest.approx(1) and (table.share >= 0).all()
    assert (table.share - truth).abs().mean() < 0.05 and (table.share - truth)["impulse_noise"] < 0.08
    assert ((table.low <= table.share) & (table.share <= table.high)).all()
    assert table.taken.sum() == pytest.approx(1)
    pd.testing.assert_frame_equal(table, finder.shares(mix))


def test_images_of_another_size_than_those_that_taught_are_refused(finder):
    with pytest.raises(CourseError, match=r"\[60, 3, 32, 20\]: expected the size of those that taught"):
        finder.shares(IMAGES[..., :20])


def test_a_perfect_confusion_corrects_nothing(finder):
    names = list(finder.confusion)
    sure = shift.KindFinder(finder.model, pd.DataFrame(np.eye(len(names)), names, names), finder.tested)
    table = sure.shares(photographs(50, seed=4))
    np.testing.assert_allclose(table.share, table.taken, atol=1e-9)


def test_the_interval_of_a_share_holds_the_luck_of_both_draws(finder):
    """Of a kind that half of the images are taken for: binomial, over these images and over those of the confusion."""
    names = list(finder.confusion)
    half = SimpleNamespace(**known(finder), predict=lambda x: np.arange(len(x)) % 2)
    sure = pd.DataFrame(np.eye(len(names)), names, names)
    blurry = sure.copy()
    blurry.loc["clean", names[:2]] = 0.9, 0.1  # a tenth of the clean images is taken for the first kind
    images = photographs(200, seed=11)
    table = shift.KindFinder(half, sure, 1_000_000).shares(images, resamples=2_000)
    low, high = stats.binom(200, 0.5).ppf((0.025, 0.975)) / 200
    assert (table.low["clean"], table.high["clean"]) == pytest.approx((low, high), abs=0.011)
    widths = [(table.high - table.low)["clean"] for table in
              (shift.KindFinder(half, blurry, tested).shares(images, resamples=2_000) for tested in (1_000_000, 50))]
    # the share is taken / P(clean | clean): by propagation of its two relative errors
    expected = [3.92 * 0.5 / 0.9 * np.sqrt(0.25 / 200 / 0.5**2 + 0.09 / tested / 0.9**2) for tested in (1_000_000, 50)]
    assert widths == pytest.approx(expected, rel=0.1)


def test_what_teaches_the_kinds_does_not_fill_their_confusion(monkeypatch):
    clean = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)  # each image says which it is
    seen = []
    monkeypatch.setattr(shift, "KINDS", ("fog",))
    monkeypatch.setattr(shift, "distort", lambda images, *_: images)
    monkeypatch.setattr(shift, "_features", lambda images: seen.append({*images[:, 0, 0, 0].tolist()}) or
                        np.zeros((len(images), 2)))  # fmt: skip
    shift.learn_kinds(clean, count=40)
    taught, tested = seen[0] | seen[1], seen[2] | seen[3]
    assert len(taught) == 40 and len(tested) == 20 and not taught & tested


# -------------------------------------------------------------------------------------------------------------- twins


def altered(images: torch.Tensor) -> dict[str, torch.Tensor]:
    x = images.float()
    return {
        "the same": x,
        "brighter": x * 0.7 + 60,
        "another colour balance": x * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1) + 10,
        "noise": x + 10 * torch.randn(x.shape, generator=generator(1)),
        "shifted": x.roll((2, -3), (2, 3)),
        "mirrored": x.flip(3),
        "mirrored, shifted, darker": x.flip(3).roll(-2, 3) * 0.8,
        "enlarged": center_crop(resize(x, [37, 37]), [32, 32]),
        "wider": center_crop(resize(x, [32, 37]), [32, 32]),
        "blurred": distort(images, "gaussian_blur", 3).float(),
        "JPEG": distort(images, "jpeg_compression", 5).float(),
    }


def test_copies_are_found_and_unrelated_images_are_not():
    originals, others = photographs(40, seed=7), photographs(400, seed=8)
    copies = altered(originals[:20])
    b = torch.cat([*copies.values(), originals[20:]]).clamp(0, 255).byte()
    pairs = shift.near_duplicates(torch.cat((others, originals[:20])), b)
    assert set(zip(pairs.index_a - 400, pairs.index_b, strict=True)) == {(i % 20, i) for i in range(20 * len(copies))}
    assert pairs.distance.is_monotonic_increasing and pairs.distance.between(0, 0.25).all()
    by_kind = pairs.groupby(pairs.index_b // 20)
    furthest = by_kind.distance.max().set_axis(list(copies))
    assert furthest["the same"] == pytest.approx(0, abs=1e-4) and furthest["brighter"] < 0.01
    mirrored = by_kind.mirrored.all().set_axis(list(copies))
    assert [name for name in copies if mirrored[name]] == ["mirrored", "mirrored, shifted, darker"]


@pytest.mark.parametrize("size", [(37, 37), (42, 42), (37, 32), (32, 37)])
def test_an_enlarged_copy_is_found_whichever_set_it_is_in(size):
    originals = photographs(20, seed=14)
    enlarged = center_crop(resize(originals.float(), size), [32, 32]).clamp(0, 255).byte()
    for a, b in ((originals, enlarged), (enlarged, originals)):
        for i in range(20):  # one by one: whether it is among the likest two of many is another question
            assert len(shift.near_duplicates(a[i : i + 1], b[i : i + 1])) == 1


def test_the_distance_is_that_of_numpys_correlation():
    a, b = photographs(2, seed=9)
    b = ((a.float() + b) / 2).byte()
    (distance,) = shift.near_duplicates(a[None], b[None], furthest=1).distance
    pad = lambda image: np.pad(image.numpy() / 255, ((0, 0), (4, 4), (4, 4)), mode="reflect")  # noqa: E731

    def detail(image):
        means = np.lib.stride_tricks.sliding_window_view(pad(image), (9, 9), (1, 2)).mean((3, 4))
        return (image.numpy() / 255 - means)[:, 3:-3, 3:-3]

    def overlap(image, y, x):
        return image[:, max(y, 0) : 26 + min(y, 0), max(x, 0) : 26 + min(x, 0)].ravel()

    best = 0
    for other in (detail(b), detail(b.flip(2))):
        for y in range(-4, 5):
            for x in range(-4, 5):
                u, v = overlap(detail(a), y, x), overlap(other, -y, -x)
                best = max(best, u @ v / np.sqrt((u @ u) * (v @ v)))
    assert distance == pytest.approx(1 - best, abs=1e-4)


def test_frames_do_not_make_twins_and_images_without_detail_have_none():
    framed = photographs(60, seed=10)
    for edge in (slice(0, 2), slice(-2, None)):
        framed[:, :, edge] = 0
        framed[:, :, :, edge] = 0
    assert len(shift.near_duplicates(framed[:30], framed[30:])) == 0
    assert len(shift.near_duplicates(grey(10), grey(10))) == 0
    assert list(shift.near_duplicates(framed, grey(10))) == ["index_a", "index_b", "distance", "mirrored"]


# Forty of the pairs (training image, test image) that Barz and Denzler (2020) call near-duplicates, as they list them.
KNOWN_TWINS = [
    (6801, 2901), (22402, 896), (34116, 673), (43161, 516), (44097, 3745), (40396, 4989), (19059, 7029),
    (17419, 3991), (2362, 7052), (37995, 5243), (45515, 4362), (31706, 2830), (34546, 576), (47578, 1071),
    (35894, 3641), (37361, 1920), (49426, 3520), (6844, 9703), (3887, 4297), (7524, 6563), (26647, 7075),
    (41091, 4424), (23051, 535), (48375, 3663), (22956, 6435), (35398, 8299), (37987, 5863), (16752, 6350),
    (12446, 4332), (2889, 4105), (41088, 5423), (17624, 3763), (46506, 40), (11817, 2911), (20304, 104),
    (37755, 7225), (41379, 6503), (44426, 6864), (37546, 6893), (8171, 6668),
]  # fmt: skip


@pytest.mark.skipif(data.source(stand_in=True) == data.STAND_IN, reason="CIFAR-10 is not here: set CIFAR10_ROOT")
def test_known_twins_in_cifar10_are_found():
    """They were found by a network's features and by eye; a few are turned, or another moment of the same scene."""
    train, test = (data.load_cifar10(split)[0] for split in ("train", "test"))
    few = torch.cat((torch.tensor([i for i, _ in KNOWN_TWINS]), torch.arange(3_000)))
    pairs = shift.near_duplicates(train[few], test[[j for _, j in KNOWN_TWINS]])
    found = {(int(few[i]), KNOWN_TWINS[j][1]) for i, j in zip(pairs.index_a, pairs.index_b, strict=True)}
    assert len(found & {*KNOWN_TWINS}) >= 36


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: shift.shift(IMAGES, IMAGES[:1]), "60 and 1 images: expected at least 2 in each"),
        (lambda: shift.spectrum(IMAGES[:1]), "Got 1 images: expected at least 2."),
        (lambda: shift.told_apart(IMAGES, IMAGES[:24]), "60 and 24 images"),
        (lambda: shift.learn_kinds(IMAGES, count=9), "count=9 is out of range"),
        (lambda: shift.near_duplicates(IMAGES, IMAGES[..., :20]), r"and \[60, 3, 32, 20\]: expected \[N, 3, 32, 32\]"),
        (lambda: shift.learn_kinds(IMAGES[:9]), "at least 10"),
        (lambda: shift.measures(IMAGES.float()), "torch.float32"),
        (lambda: shift.near_duplicates(IMAGES, IMAGES.numpy()), "ndarray"),
        (lambda: shift.near_duplicates(IMAGES, IMAGES[:0]), "60 and 0 images"),
        (lambda: shift.told_apart(IMAGES, IMAGES[..., :20]), r"\[60, 3, 32, 20\]: expected both sets of one size"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, says):
    with pytest.raises(CourseError, match=says):
        call()
