"""Distortions against colorsys, Pillow, scipy.ndimage and the noises' own theory."""

import colorsys
import math
import shutil

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from helpers import evaluate, runs
from helpers.data import draw_stand_in
from helpers.distort import _CHANGES, CONSTANTS, KINDS, SEVERITIES, _streak, distort
from helpers.runtime import CourseError, generator

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = draw_stand_in(60, seed=5).images
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
EXACT = tuple(kind for kind in KINDS if kind not in (*NOISES, "motion_blur"))  # draw nothing


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def grey(level: int, count: int = 40) -> torch.Tensor:
    return torch.full((count, 3, 32, 32), level, dtype=torch.uint8)


def levels(values: np.ndarray) -> torch.Tensor:
    """Floats in [0, 1], [N, H, W, 3], as the distortion hands them back."""
    return torch.from_numpy(np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def furthest(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int((ours.int() - theirs.int()).abs().max())


# ------------------------------------------------------------------------------------------ against other people's code


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", ["brightness", "saturate"])
def test_colour_kinds_agree_with_matplotlib_hsv(kind, severity):
    hsv = matplotlib.colors.rgb_to_hsv(channels_last(IMAGES) / 255)
    constant = CONSTANTS[kind][severity - 1]
    if kind == "brightness":
        hsv[..., 2] = np.clip(hsv[..., 2] + constant, 0, 1)
    else:
        hsv[..., 1] = np.clip(hsv[..., 1] * constant[0] + constant[1], 0, 1)
    assert furthest(distort(IMAGES, kind, severity), levels(matplotlib.colors.hsv_to_rgb(hsv))) <= 1


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(SEVERITIES))
def test_any_one_colour_agrees_with_colorsys(colour, severity):
    one = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 16, 16)
    h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
    brighter = colorsys.hsv_to_rgb(h, s, min(v + CONSTANTS["brightness"][severity - 1], 1))
    scale, offset = CONSTANTS["saturate"][severity - 1]
    richer = colorsys.hsv_to_rgb(h, min(s * scale + offset, 1), v)
    for kind, expected in (("brightness", brighter), ("saturate", richer)):
        found = distort(one, kind, severity)[0, :, 3, 5].tolist()
        assert found == pytest.approx([255 * level for level in expected], abs=0.5001)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_shrinks_towards_each_channels_own_mean(severity):
    left = {1: 0.75, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.15}[severity]
    x = channels_last(IMAGES) / 255
    means = x.mean((1, 2), keepdims=True)
    assert furthest(distort(IMAGES, "contrast", severity), levels((x - means) * left + means)) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_pillows_box_resize_there_and_back(severity):
    side = int(32 * CONSTANTS["pixelate"][severity - 1])
    box = Image.Resampling.BOX
    theirs = [
        np.asarray(Image.fromarray(i).resize((side, side), box).resize((32, 32), box)) for i in channels_last(IMAGES)
    ]
    assert furthest(distort(IMAGES, "pixelate", severity), torch.tensor(np.stack(theirs)).permute(0, 3, 1, 2)) <= 1


@pytest.mark.filterwarnings("ignore:The image decoding and encoding")
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_what_torchvision_writes_and_reads(severity):
    torchvision_io = pytest.importorskip("torchvision.io")
    if not hasattr(torchvision_io, "encode_jpeg"):
        pytest.skip("this torchvision has handed JPEG over to torchcodec")
    written = torchvision_io.encode_jpeg(list(IMAGES), quality=(80, 65, 58, 50, 40)[severity - 1])
    theirs = torch.stack(torchvision_io.decode_jpeg(written))
    difference = (distort(IMAGES, "jpeg_compression", severity).int() - theirs.int()).abs()
    assert difference.float().mean() < 0.5  # two builds of libjpeg may round the transform apart
    assert difference.max() <= 8


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_scipys_with_its_nearest_boundary(severity):
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    theirs = ndimage.gaussian_filter(channels_last(IMAGES) / 255, (0, sigma, sigma, 0), mode="nearest", truncate=4)
    assert furthest(distort(IMAGES, "gaussian_blur", severity), levels(theirs)) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur_is_a_smoothed_disk_mirrored_at_the_edge(severity):
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    y, x = np.mgrid[-8:9, -8:9]
    disk = (x**2 + y**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), sigma, radius=1, mode="constant")
    theirs = ndimage.convolve(channels_last(IMAGES) / 255, kernel[None, :, :, None], mode="mirror")
    assert furthest(distort(IMAGES, "defocus_blur", severity), levels(theirs)) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_scipys_zooms(severity):
    x, zooms = channels_last(IMAGES) / 255, range((6, 11, 16, 21, 26)[severity - 1])
    total = x.copy()
    for zoom in (1 + i / 100 for i in zooms):
        crop = math.ceil(32 / zoom)
        top = (32 - crop) // 2
        grown = ndimage.zoom(x[:, top : top + crop, top : top + crop], (1, zoom, zoom, 1), order=1, mode="nearest")
        trim = (grown.shape[1] - 32) // 2
        total += grown[:, trim : trim + 32, trim : trim + 32]
    assert furthest(distort(IMAGES, "zoom_blur", severity), levels(total / (len(zooms) + 1))) <= 1


@pytest.mark.parametrize("degrees", [-45, -20, 0, 13, 45])
def test_a_streak_is_scipys_correlation_with_half_a_gaussian_on_a_line(degrees):
    radius, sigma = 6, 2.0
    kernel = np.zeros((25, 25))  # the pixel itself in the middle
    for step in range(2 * radius + 1):
        row, column = (math.ceil(step * part(math.radians(degrees)) - 0.5) for part in (math.sin, math.cos))
        kernel[12 + row, 12 + column] += stats.norm.pdf(step, scale=sigma)
    x = channels_last(IMAGES) / 255
    theirs = ndimage.correlate(x, (kernel / kernel.sum())[None, :, :, None], mode="nearest")
    ours = _streak(IMAGES.float() / 255, radius, sigma, torch.full((len(IMAGES),), math.radians(degrees)))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)


def test_motion_blur_draws_an_angle_within_45_degrees_for_each_image():
    point = grey(0, 400)
    point[:, :, 16, 20] = 255
    y, x = np.mgrid[:32, :32]
    streaks = distort(point, "motion_blur", 5)[:, 0].double().numpy()
    total = streaks.sum((1, 2))
    centre_x, centre_y = ((streaks * axis).sum((1, 2)) / total for axis in (x, y))
    angles = np.degrees(np.arctan2(centre_y - 16, centre_x - 20)) + 180  # the light is pulled from one side: -x
    angles = (angles + 180) % 360 - 180
    assert (np.abs(angles) < 50).all()  # whole-pixel steps make the ends coarse
    assert stats.kstest(angles, stats.uniform(-45, 90).cdf).statistic < 0.12


# -------------------------------------------------------------------------------------------------- against theory


def change(kind: str, level: int, severity: int) -> np.ndarray:
    """The change in units of full brightness, before rounding and clipping."""
    x = grey(level).float() / 255
    return (_CHANGES[kind](x, CONSTANTS[kind][severity - 1], generator(3)) - x).flatten().numpy()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [64, 128])
def test_noises_have_the_mean_spread_and_shape_of_their_distribution(level, severity):
    v = level / 255
    for kind, sigma in (
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]),
        ("speckle_noise", v * (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]),
    ):
        noise = change(kind, level, severity)
        assert stats.kstest(noise, stats.norm(0, sigma).cdf).pvalue > 1e-4
        assert noise.mean() == pytest.approx(0, abs=4 * sigma / len(noise) ** 0.5)
        assert noise.std() == pytest.approx(sigma, rel=0.01)
    photons = (500, 250, 100, 75, 50)[severity - 1]
    counts = np.rint((change("shot_noise", level, severity) + v) * photons)
    expected = stats.poisson(v * photons)
    assert counts.mean() == pytest.approx(expected.mean(), rel=0.01)
    assert counts.var() == pytest.approx(expected.var(), rel=0.03)
    values, seen = np.unique(counts, return_counts=True)
    assert np.abs(seen.cumsum() / len(counts) - expected.cdf(values)).max() < 0.006


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_sets_a_binomial_number_of_values_to_each_extreme(severity):
    share, out = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1], distort(grey(100), "impulse_noise", severity)
    assert set(out.unique().tolist()) == {0, 100, 255}
    for extreme in (0, 255):
        seen = int((out == extreme).sum())
        assert stats.binomtest(seen, out.numel(), share / 2).pvalue > 1e-4


@pytest.mark.parametrize("kind", NOISES)
def test_every_image_and_channel_has_its_own_noise(kind):
    noise = distort(grey(128, 8), kind, 5).float() - 128
    correlation = np.corrcoef(noise.view(24, -1).numpy())
    assert np.abs(correlation - np.eye(24)).max() < 0.15


# ------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("kind", KINDS)
def test_the_call_alone_decides_the_bytes(kind):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), IMAGES.clone()
    one, again, other = (distort(IMAGES, kind, 2, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(IMAGES, before[2])
    assert one.dtype == torch.uint8 and one.shape == IMAGES.shape and one.is_contiguous()
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (kind in EXACT)
    assert not torch.equal(one, IMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_changes_more_than_the_last(kind):
    change = [float((distort(IMAGES, kind, s).float() - IMAGES).square().mean()) for s in SEVERITIES]
    if kind == "saturate":  # the first two fade, the other three enrich
        assert change[1] > change[0] and change[4] > change[3] > change[2]
    elif kind == "motion_blur":  # 3 and 4 differ in the length of a tail that weighs nothing
        assert change[0] < change[1] < change[2] <= change[3] * 1.0001 < change[4]
    else:
        assert change == sorted(set(change))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_size_and_number_of_images_do_not_matter(kind):
    whole = distort(IMAGES, kind, 3)
    flipped = IMAGES.flip(3).contiguous().flip(3)
    strided = torch.stack([IMAGES, 255 - IMAGES], 1)[:, 0]
    transposed = IMAGES.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (IMAGES.contiguous(memory_format=torch.channels_last), strided, flipped, transposed):
        assert torch.equal(distort(same, kind, 3), whole)
    assert distort(IMAGES[:0], kind, 3).shape == (0, 3, 32, 32)
    assert distort(IMAGES[:1], kind, 3).shape == (1, 3, 32, 32)
    assert distort(torch.zeros(2, 3, 20, 28, dtype=torch.uint8) + 90, kind, 3).shape == (2, 3, 20, 28)
    if kind in EXACT:
        assert torch.equal(distort(IMAGES[4:5], kind, 3), whole[4:5])


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in ("brightness", "saturate")])
@pytest.mark.parametrize("level", [0, 37, 255])
def test_blurs_and_averages_leave_a_plain_image_alone(kind, level):
    assert furthest(distort(grey(level, 3), kind, 5), grey(level, 3)) <= (1 if kind == "jpeg_compression" else 0)


def test_large_sets_are_distorted_in_parts_of_one_stream():
    many = grey(128, 4_100)
    out = distort(many, "gaussian_noise", 1)
    assert not torch.equal(out[:2_000], out[2_000:4_000])
    assert torch.equal(out, distort(many, "gaussian_noise", 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_what_the_cpu_gives(kind):
    ours = distort(IMAGES.cuda(), kind, 3)
    assert ours.is_cuda and torch.equal(ours, distort(IMAGES.cuda(), kind, 3))
    if kind in EXACT:
        assert furthest(ours.cpu(), distort(IMAGES, kind, 3)) <= 1
    else:
        a, b = ((out.float() - IMAGES).square().mean() for out in (ours.cpu(), distort(IMAGES, kind, 3)))
        assert float(a) == pytest.approx(float(b), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((IMAGES, "fog", 1), "gaussian_noise, shot_noise"),
        ((IMAGES, "Brightness", 1), "'Brightness'"),
        ((IMAGES, "contrast", 0), "from 1 to 5"),
        ((IMAGES, "contrast", 6), "from 1 to 5"),
        ((IMAGES, "contrast", 1.5), "from 1 to 5"),
        ((IMAGES, "contrast", True), "from 1 to 5"),
        ((IMAGES, "contrast", "3"), "from 1 to 5"),
        ((IMAGES.float(), "contrast", 1), r"torch.float32 \[60, 3, 32, 32\]"),
        ((IMAGES[0], "contrast", 1), r"\[N, 3, H, W\]"),
        ((IMAGES[:, :1], "contrast", 1), r"\[60, 1, 32, 32\]"),
        ((IMAGES[:, :, :8], "contrast", 1), "at least 16"),
        ((IMAGES.numpy(), "contrast", 1), "ndarray"),
    ],
)
def test_what_does_not_hold_is_named_in_one_sentence(arguments, names):
    with pytest.raises(CourseError, match=names) as error:
        distort(*arguments)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- a network on distorted images


@pytest.fixture
def tested(finished_tiny, tmp_path, without_cifar10):
    """A copy of a finished run on the stand-in set, tested."""
    path = shutil.copytree(finished_tiny, tmp_path / "tiny" / "0")
    evaluate.test_run(path, stand_in=True)
    return path


def test_shifted_metrics_count_the_same_images_clean_and_distorted(tested):
    table = evaluate.shifted_metrics(tested, (1, 5), count=50, stand_in=True)
    assert list(zip(table.kind, table.severity, strict=True)) == [
        ("clean", 0),
        *((k, s) for k in KINDS for s in (1, 5)),
    ]
    assert (table["count"] == 50).all()
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert table.accuracy[0] == pytest.approx(evaluate.correct_on_test(tested, stand_in=True)[:50].mean())
    bins = pd.read_csv(tested / "reliability.csv")
    for name, rows in (("clean", table[:1]), ("distorted", table[1:])):
        part = bins[bins.images == name]
        assert part["count"].sum() == rows["count"].sum()
        for column in ("accuracy", "confidence"):
            mean = np.average(part[column], weights=part["count"])
            assert mean == pytest.approx(rows[column].mean(), abs=1e-5)
    first = [(tested / f"{name}.csv").read_bytes() for name in ("shift", "reliability")]
    evaluate.shifted_metrics(tested, (1, 5), count=50, stand_in=True)
    assert first == [(tested / f"{name}.csv").read_bytes() for name in ("shift", "reliability")]


def test_correct_on_test_is_kept_and_agrees_with_the_record(tested):
    right = evaluate.correct_on_test(tested, stand_in=True)
    assert right.dtype == bool and right.mean() == pytest.approx(runs.read(tested).record["test"]["accuracy"])
    (tested / "best.safetensors").unlink()
    assert np.array_equal(evaluate.correct_on_test(tested, stand_in=True), right)


def test_reliability_sums_to_the_calibration_error():
    logits, labels = torch.randn(500, 10, generator=generator(1)) * 3, torch.arange(500) % 10
    table = evaluate.reliability(logits, labels)
    gap = (table["count"] / 500 * (table.accuracy - table.confidence).abs()).sum()
    assert gap == pytest.approx(evaluate.calibration_error(logits, labels))
    assert ((table.low < table.confidence) & (table.confidence <= table.high + 1e-6)).all()


def test_what_cannot_be_measured_is_refused(tested, finished_tiny):
    with pytest.raises(CourseError, match="count=0"):
        evaluate.shifted_metrics(tested, (1,), count=0, stand_in=True)
    with pytest.raises(CourseError, match="has not been tested"):
        evaluate.correct_on_test(finished_tiny, stand_in=True)
