"""Distortions against colorsys, Pillow, scipy.ndimage and the noises' own theory."""

import colorsys
import io
import math
import pickle
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
from helpers.data import draw_stand_in, load_shifted
from helpers.distort import (
    KINDS,
    SCORED,
    SEVERITIES,
    competition_like,
    distort,
    write_cifar10c,
    write_competition_like,
)  # fmt: skip
from helpers.distort.kinds import CHANGES, CONSTANTS
from helpers.distort.parts import plasma, streak
from helpers.runtime import CourseError, generator

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, LABELS = draw_stand_in(60, seed=5)[:2]
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
EXACT = (  # draw nothing
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
)  # fmt: skip


def draws(count: int, *keys: int) -> list[torch.Generator]:
    """What a kind draws from, one an image: the same numbers again for the same keys."""
    return [generator(*keys, i) for i in range(count)]


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def grey(level: int, count: int = 40) -> torch.Tensor:
    return torch.full((count, 3, 32, 32), level, dtype=torch.uint8)


def levels(values: np.ndarray) -> torch.Tensor:
    """Floats in [0, 1], [N, H, W, 3], as the distortion hands them back."""
    return torch.from_numpy(np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def furthest(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int((ours.int() - theirs.int()).abs().max())


# The constants of make_cifar_c.py in the repository of Hendrycks and Dietterich, severities 1 to 5, as published.
PUBLISHED = """
gaussian_noise .04|.06|.08|.09|.10    shot_noise 500|250|100|75|50    impulse_noise .01|.02|.03|.05|.07
speckle_noise .06|.1|.12|.16|.2    gaussian_blur .4|.6|.7|.8|1    brightness .05|.1|.15|.2|.3
contrast .75|.5|.4|.3|.15    jpeg_compression 80|65|58|50|40    pixelate .95|.9|.85|.75|.65
zoom_blur 1.06|1.11|1.16|1.21|1.26    saturate .3,0|.1,0|1.5,0|2,.1|2.5,.2    fog .2,3|.5,3|.75,2.5|1,2|1.5,1.75
glass_blur .05,1,1|.25,1,1|.4,1,1|.25,1,2|.4,1,2    defocus_blur .3,.4|.4,.5|.5,.6|1,.2|1.5,.1
motion_blur 6,1|6,1.5|6,2|8,2|9,2.5    frost 1,.2|1,.3|.9,.4|.85,.4|.75,.45
elastic_transform 0,0,.08|.05,.2,.07|.08,.06,.06|.1,.04,.05|.1,.03,.03
snow .1,.2,1,.6,8,3,.95|.1,.2,1,.5,10,4,.9|.15,.3,1.75,.55,10,4,.9|.25,.3,2.25,.6,12,6,.85|.3,.3,1.25,.65,14,12,.8
spatter .62,.1,.7,.7,.5,0|.65,.1,.8,.7,.5,0|.65,.3,1,.69,.5,0|.65,.1,.7,.69,.6,1|.65,.1,.5,.68,.6,1
"""


def test_the_constants_are_the_published_ones():
    words = iter(PUBLISHED.split())
    published = {kind: [tuple(map(float, one.split(","))) for one in row.split("|")]
                 for kind, row in zip(words, words, strict=True)}  # fmt: skip
    ours = {kind: [tuple(map(float, one if isinstance(one, tuple) else (one,))) for one in row]
            for kind, row in CONSTANTS.items()}  # fmt: skip
    assert ours == published


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


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_what_pillow_writes_and_reads(severity):
    ours = channels_last(distort(IMAGES, "jpeg_compression", severity))
    for image, found in zip(channels_last(IMAGES), ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        assert np.array_equal(np.asarray(Image.open(file)), found)


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
    x, zooms = channels_last(IMAGES) / 255, np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    assert len(zooms) == (7, 12, 16, 21, 26)[severity - 1], "numpy's, which the published code asks"
    total = x.copy()
    for zoom in zooms:
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
    ours = streak(IMAGES.float() / 255, radius, sigma, torch.full((len(IMAGES),), math.radians(degrees)))
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


def numpy_draws(count: int, *calls) -> list[list[np.ndarray]]:
    """For each image what it draws, in the order of the calls."""
    return [[call(g).numpy() for call in calls] for g in draws(count, 9)]


def changed(kind: str, severity: int, images: torch.Tensor = IMAGES[:6]) -> np.ndarray:
    """Images after a kind, from the same draws as `numpy_draws`, [N, H, W, 3], neither rounded nor cut."""
    x, count = images.float() / 255, len(images)
    return CHANGES[kind](x, CONSTANTS[kind][severity - 1], draws(count, 9)).permute(0, 2, 3, 1).numpy()


def half_gaussian_line(radius: int, sigma: float, angle: float) -> np.ndarray:
    """A streak as a kernel for scipy's correlation, the pixel itself in the middle."""
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    for step in range(2 * radius + 1):
        row, column = (math.ceil(step * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
        kernel[2 * radius + row, 2 * radius + column] += stats.norm.pdf(step, scale=sigma)
    return kernel / kernel.sum()


def scipy_zoom(x: np.ndarray, zoom: float) -> np.ndarray:
    """The middle of [32, 32] enlarged."""
    crop = math.ceil(32 / zoom)
    top = (32 - crop) // 2
    grown = ndimage.zoom(x[top : top + crop, top : top + crop], zoom, order=1, mode="nearest")
    trim = (grown.shape[0] - 32) // 2
    return grown[trim : trim + 32, trim : trim + 32]


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_is_the_published_exchange_one_pixel_after_the_other(severity, size):
    height, width = size
    images = IMAGES[:6, :, :height, :width]
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    moves = numpy_draws(6, lambda g: torch.randint(-1, 1, (rounds, 2, height - 2, width - 2), generator=g))
    blur = lambda image: ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")  # noqa: E731
    results = changed("glass_blur", severity, images)
    for image, (steps,), found in zip(channels_last(images) / 255, moves, results, strict=True):
        x = blur(image)
        for down, across in steps:
            for h in range(height - 1, 1, -1):
                for w in range(width - 1, 1, -1):
                    dy, dx = down[h - 2, w - 2], across[h - 2, w - 2]
                    x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]  # of views: the second takes the new first
        np.testing.assert_allclose(found, blur(x), atol=1e-5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_is_thresholded_noise_streaked_and_added_with_its_half_turn(severity):
    mean, sigma, zoom, threshold, radius, spread, left = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]  # fmt: skip
    drawn = numpy_draws(6, lambda g: torch.randn((1, 32, 32), generator=g), lambda g: torch.rand((), generator=g))
    for image, (noise, u), found in zip(channels_last(IMAGES[:6]) / 255, drawn, changed("snow", severity), strict=True):
        layer = scipy_zoom(mean + sigma * noise[0], zoom)
        layer = np.where(layer < threshold, 0, np.minimum(layer, 1))
        kernel = half_gaussian_line(radius, spread, math.radians(-45 - 90 * u))
        layer = ndimage.correlate(layer, kernel, mode="nearest")[..., None]
        grey = np.asarray(image @ [0.299, 0.587, 0.114])[..., None]
        pale = left * image + (1 - left) * np.maximum(image, grey * 1.5 + 0.5)
        np.testing.assert_allclose(found, pale + layer + np.rot90(layer, 2), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_is_scipys_affine_and_then_its_displacement(severity, size):
    """Shares of the shorter side; the corners lie a third of it about the middle."""
    (height, width), images = size, IMAGES[:6, :, : size[0], : size[1]]
    amount, sigma, jitter = (
        height * np.array(((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)))
    )[severity - 1]
    drawn = numpy_draws(6, lambda g: torch.rand((3, 2), generator=g), lambda g: torch.rand((2, *size), generator=g))
    corners = {32: np.array([(26, 26), (26, 6), (6, 6)]), 20: np.array([(20, 16), (20, 4), (8, 4)])}[height]
    grid, found = np.mgrid[:height, :width].astype(float), changed("elastic_transform", severity, images)
    for image, (jitters, fields), ours in zip(channels_last(images) / 255, drawn, found, strict=True):
        moved = corners + jitter * (2 * jitters - 1)
        x_to, y_to = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T  # from where a pixel (x, y, 1) comes
        matrix = np.array([[y_to[1], y_to[0]], [x_to[1], x_to[0]]])
        dx, dy = (
            ndimage.gaussian_filter(2 * f - 1, sigma, truncate=3, mode="reflect") if sigma else 0 * f for f in fields
        )
        for channel in range(3):
            warped = ndimage.affine_transform(image[..., channel], matrix, (y_to[2], x_to[2]), order=1, mode="mirror")
            theirs = ndimage.map_coordinates(
                warped, (grid[0] + amount * dy, grid[1] + amount * dx), order=1, mode="reflect"
            )
            np.testing.assert_allclose(ours[..., channel], theirs, atol=2e-3)


@pytest.mark.parametrize("decay", [3, 1.75])
def test_plasma_is_diamond_square_point_by_point(decay):
    noise = 2 * torch.rand((1, 32, 32), generator=draws(1, 4)[0])[0].double().numpy() - 1
    heights, step, wobble = np.zeros((32, 32)), 32, 100.0
    while step > 1:
        half = step // 2
        for y in range(half, 32, step):
            for x in range(half, 32, step):
                corners = [heights[(y + a) % 32, (x + b) % 32] for a in (-half, half) for b in (-half, half)]
                heights[y, x] = np.mean(corners) + wobble**2 * noise[y, x]
        for y in range(0, 32, half):
            for x in range((y + half) % step, 32, step):
                around = [heights[(y + a) % 32, x] for a in (-half, half)]
                around += [heights[y, (x + a) % 32] for a in (-half, half)]
                heights[y, x] = np.mean(around) + wobble**2 * noise[y, x]
        step, wobble = half, wobble / decay
    heights -= heights.min()
    found = plasma(torch.zeros(1, 3, 32, 32), decay, draws(1, 4))[0, 0].numpy()
    np.testing.assert_allclose(found, heights / heights.max(), atol=1e-5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_fills_a_plain_image_between_two_known_levels(severity):
    amount = (0.2, 0.5, 0.75, 1, 1.5)[severity - 1]
    foggy = distort(grey(200), "fog", severity).flatten(1)
    assert (foggy.amax(1) == 200).all()
    assert (foggy.amin(1) == round(200 * (200 / 255) / (200 / 255 + amount))).all()


def test_fog_is_grey():
    """As much in every channel, and scaled by the brightest level of the image, not of the channel."""
    image = grey(0, 8)
    image[:, 0], image[:, 1], brightest, amount = 200, 100, 200 / 255, 0.75
    expected = round(255 * (100 / 255 + amount) * brightest / (brightest + amount))
    assert (distort(image, "fog", 3)[:, 1].flatten(1).amax(1) == expected).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_a_share_of_the_image_and_a_share_of_a_texture(severity):
    image, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    texture = distort(grey(0), "frost", severity).float()
    assert 0.2 < texture.mean() / 255 / ice < 0.8 and texture.max() <= 255 * ice + 1
    assert texture[:, 2].mean() > texture[:, 0].mean()  # bluish
    assert (distort(grey(100), "frost", severity) - texture - 100 * image).abs().max() <= 1.01


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_covers_the_share_that_smoothed_noise_leaves_above_the_threshold(severity):
    mean, sigma, smooth, threshold, strength = (
        (0.62, 0.1, 0.7, 0.7, 0.5), (0.65, 0.1, 0.8, 0.7, 0.5), (0.65, 0.3, 1, 0.69, 0.5),
        (0.65, 0.1, 0.7, 0.69, 0.6), (0.65, 0.1, 0.5, 0.68, 0.6),
    )[severity - 1]  # fmt: skip
    clean = grey(255, 200) if severity > 3 else grey(0, 200)
    out = distort(clean, "spatter", severity)
    noise = np.random.default_rng(0).normal(mean, sigma, (400, 32, 32))
    wet = ndimage.gaussian_filter(noise, (0, smooth, smooth), mode="nearest") > threshold
    if severity <= 3:  # water: nothing but drops, the brightest of an image at full strength of pale turquoise
        assert (out != clean).any(1).float().mean() == pytest.approx(wet.mean(), rel=0.1)
        brightest = out.flatten(2).amax(2)
        assert furthest(brightest, torch.tensor([175, 238, 238]).mul(strength).round().expand(200, 3)) <= 1
    else:  # mud: what a blur of the drops leaves above 0.8
        cover = ndimage.gaussian_filter(wet.astype(float), (0, strength, strength), mode="nearest")
        assert (out != clean).any(1).float().mean() == pytest.approx((cover >= 0.8).mean(), rel=0.1)
        assert furthest(out.amin((0, 2, 3)), torch.tensor([63, 42, 20])) <= 1


def response(kind: str, severity: int, x: torch.Tensor) -> np.ndarray:
    """One channel of one image [H, W] after a kind, neither rounded nor cut."""
    return CHANGES[kind](x.expand(1, 3, -1, -1), CONSTANTS[kind][severity - 1], draws(1, 2))[0, 0].double().numpy()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "motion_blur"])
def test_a_blur_spreads_a_point_and_a_step_is_the_sum_of_its_points(kind, severity):
    point, step = torch.zeros(32, 32), torch.zeros(32, 32)
    point[16, 16], step[:, 16:] = 1, 1
    spread, edge = response(kind, severity, point), response(kind, severity, step)
    assert spread.min() >= 0 and spread.sum() == pytest.approx(1, abs=1e-5)
    line = spread.sum(0).cumsum()
    far = slice(0, 32 - 12)  # a motion blur also reaches into the step's right end, where all is 1
    np.testing.assert_allclose(edge[16, far], line[far], atol=2e-5)
    assert (np.diff(edge[16]) >= -1e-6).all() and edge[16, 0] < 1e-5 and edge[16, -1] == pytest.approx(1, abs=1e-5)
    y, x = np.mgrid[-16:16, -16:16]
    reach = np.hypot(x, y)[spread > 1e-4].max()
    if kind == "gaussian_blur":
        sigma = (0.4, 0.6, 0.7, 0.8, 1)[severity - 1]
        taps = stats.norm.pdf(np.arange(-4, 5), scale=sigma)
        variance = (taps * np.arange(-4, 5) ** 2).sum() / taps.sum()
        assert (spread * x**2).sum() == pytest.approx(variance, rel=0.01) and (spread * x).sum() == pytest.approx(0)
    elif kind == "defocus_blur":
        assert reach <= (0.3, 0.4, 0.5, 1, 1.5)[severity - 1] + 2**0.5
    else:  # within two radii, and one-sided: nothing to the right of the point
        assert reach <= 2 * (6, 6, 6, 8, 9)[severity - 1] + 1 and spread[:, 17:].sum() == 0


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_pulls_a_point_outwards_and_keeps_a_step_in_the_middle(severity):
    point, step = torch.zeros(32, 32), torch.zeros(32, 32)
    point[16, 24], step[:, 16:] = 1, 1
    spread, edge = response("zoom_blur", severity, point), response("zoom_blur", severity, step)
    assert (spread.sum(0) * np.arange(32)).sum() / spread.sum() > 24 and spread[:, :23].sum() == 0
    assert (np.diff(edge[16]) >= -1e-6).all() and edge[16, 13] < 1e-6 and edge[16, 18] == pytest.approx(1)


# -------------------------------------------------------------------------------------------------- against theory


def change(kind: str, level: int, severity: int) -> np.ndarray:
    """The change in units of full brightness, before rounding and clipping."""
    x = grey(level).float() / 255
    return (CHANGES[kind](x, CONSTANTS[kind][severity - 1], draws(len(x), 3)) - x).flatten().numpy()


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


def test_kinds_do_not_share_their_noise():
    one, other = (distort(grey(128, 4), kind, 3).float().sub(128).flatten() for kind in NOISES[::3])
    assert np.abs(np.corrcoef(one, other)[0, 1]) < 0.1


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


def test_the_kinds_are_the_nineteen_in_the_published_order():
    assert " ".join(SCORED) == (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
        "brightness contrast elastic_transform pixelate jpeg_compression"
    )
    assert KINDS[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_lowers_the_psnr_where_its_constants_say_so(kind):
    change = [float((distort(IMAGES, kind, s).float() - IMAGES).square().mean()) for s in SEVERITIES]
    psnr = [10 * math.log10(255**2 / c) for c in change]
    if kind == "saturate":  # the first two fade, the other three enrich
        assert psnr[1] < psnr[0] and psnr[4] < psnr[3] < psnr[2]
    elif kind == "motion_blur":  # 3 and 4 differ in the length of a tail that weighs nothing
        assert psnr[0] > psnr[1] > psnr[2] >= psnr[3] - 1e-3 and psnr[2] > psnr[4]
    elif kind == "glass_blur":  # a blur of 0.05 or 0.25 pixels is none, one of 0.4 softens what was moved; two rounds
        assert psnr[0] == pytest.approx(psnr[1], abs=0.05) and psnr[3] < psnr[4] < psnr[1] < psnr[2]
    elif kind == "elastic_transform":  # the displacement grows, but what moves most, the affine jitter, shrinks
        assert psnr == sorted(psnr)
    elif kind == "frost":  # from 3 on the image darkens, which its frost makes up for in part
        assert psnr[0] > psnr[1] > max(psnr[2:])
    elif kind == "spatter":  # three of water, two of mud
        assert psnr[0] > psnr[1] > psnr[2] and psnr[3] > psnr[4]
    else:
        assert psnr == sorted(set(psnr), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_its_place_and_nothing_around_it(kind):
    whole, others = distort(IMAGES, kind, 5, seed=1), IMAGES.clone()
    others[[0, 30, 59]] = torch.stack([255 - IMAGES[0], torch.zeros_like(IMAGES[0]), IMAGES[1]])
    same = torch.ones(60, dtype=torch.bool)
    same[[0, 30, 59]] = False
    assert torch.equal(distort(others, kind, 5, seed=1)[same], whole[same])
    for count in (1, 2, 31):
        assert torch.equal(distort(IMAGES[:count], kind, 5, seed=1), whole[:count])


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


AVERAGES = (
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression", "gaussian_blur",
)  # fmt: skip


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("level", [0, 37, 255])
def test_blurs_and_averages_leave_a_plain_image_alone(kind, level):
    assert furthest(distort(grey(level, 3), kind, 5), grey(level, 3)) <= (1 if kind == "jpeg_compression" else 0)


def test_the_parts_of_a_large_set_do_not_show():
    many = torch.full((2_020, 3, 16, 16), 128, dtype=torch.uint8)
    out = distort(many, "gaussian_noise", 1)
    assert len(out.flatten(1).unique(dim=0)) == len(many)
    assert torch.equal(out[:2_010], distort(many[:2_010], "gaussian_noise", 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_what_the_cpu_gives(kind):
    ours = distort(IMAGES.cuda(), kind, 3)
    assert ours.is_cuda and torch.equal(ours, distort(IMAGES.cuda(), kind, 3))
    near = (ours.cpu().int() - distort(IMAGES, kind, 3).int()).abs() <= 1
    assert near.float().mean() > 0.999  # a value at a threshold may fall on its other side


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((IMAGES, "rain", 1), "gaussian_noise, shot_noise"),
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


# ----------------------------------------------------------------------------------------------- sets of our own making


def test_our_cifar10c_has_the_published_layout(tmp_path):
    kinds = ("contrast", "shot_noise")
    write_cifar10c(tmp_path / "ours", IMAGES, LABELS, (kind for kind in kinds), seed=4)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["contrast.npy", "labels.npy", "shot_noise.npy"]
    raw = np.load(tmp_path / "ours" / "contrast.npy"), np.load(tmp_path / "ours" / "labels.npy")
    assert [(a.dtype, a.shape) for a in raw] == [(np.uint8, (300, 32, 32, 3)), (np.uint8, (300,))]
    for kind in kinds:
        images, labels, _ = load_shifted(tmp_path / "ours" / f"{kind}.npy")
        assert torch.equal(labels, LABELS.repeat(5))
        for severity in SEVERITIES:
            assert torch.equal(images[60 * (severity - 1) : 60 * severity], distort(IMAGES, kind, severity, seed=4))


def test_the_competition_like_mix_distorts_every_image_in_a_way_of_its_own():
    images = IMAGES.repeat(20, 1, 1, 1)
    mixed, table = competition_like(images, seed=3)
    again, same = competition_like(images, seed=3)
    other, different = competition_like(images, seed=4)
    assert torch.equal(mixed, again) and table.equals(same)
    assert not torch.equal(mixed, other) and not table.equals(different)
    assert list(table) == ["kind", "severity"] and len(table) == len(images)
    assert set(table.kind) == set(SCORED) and set(table.severity) == set(SEVERITIES)
    assert stats.chisquare(table.value_counts()).pvalue > 1e-3 and len(table.value_counts()) == 75
    for kind in EXACT[:-2]:
        rows = np.flatnonzero((table.kind == kind) & (table.severity == 2))
        assert torch.equal(mixed[rows], distort(images[rows], kind, 2))
    images[7] = 255 - images[7]
    changed, few = competition_like(images, seed=3)[0], competition_like(IMAGES, seed=3)
    keep = torch.arange(len(images)) != 7
    assert torch.equal(changed[keep], mixed[keep]) and torch.equal(few[0], mixed[:60]) and few[1].equals(table[:60])
    assert len(competition_like(IMAGES[:0])[0]) == len(competition_like(IMAGES[:0])[1]) == 0


def test_the_competition_like_file_has_the_competitions_format_and_no_labels(tmp_path):
    path = write_competition_like(tmp_path / "competition-like.pkl", IMAGES, LABELS, seed=2)
    content = pickle.loads(path.read_bytes())
    assert set(content) == {b"data", b"ids"}
    assert content[b"data"].dtype == np.uint8 and content[b"data"].shape == (60, 32, 32, 3)
    images, labels, ids = load_shifted(path)
    mixed, table = competition_like(IMAGES, seed=2)
    assert torch.equal(images, mixed) and labels is None and ids.tolist() == list(range(60))
    answers = pd.read_csv(tmp_path / "competition-like-labels.csv")
    assert list(answers) == ["ID", "Labels"] and answers.ID.tolist() == list(range(60))
    assert answers.Labels.tolist() == LABELS.tolist()
    ways = pd.read_csv(tmp_path / "competition-like-kinds.csv")
    assert list(ways) == ["ID", "kind", "severity"] and ways[["kind", "severity"]].equals(table)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    with pytest.raises(CourseError, match="no distortion 'rain'"):
        write_cifar10c(tmp_path, IMAGES, LABELS, ("contrast", "rain"))
    for images, labels in ((IMAGES, LABELS[:5]), (IMAGES[:, :, :20], LABELS), (IMAGES, LABELS.tolist()),
                           (IMAGES, torch.eye(10)[LABELS])):  # fmt: skip
        for write in (write_cifar10c, write_competition_like):
            with pytest.raises(CourseError, match="a tensor of N labels"):
                write(tmp_path / "new", images, labels)
    assert not list(tmp_path.iterdir())


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
    scored = table[table.kind.isin(SCORED)]
    by_hand = sum(scored[scored.kind == kind].accuracy.mean() for kind in SCORED) / 15
    expected = {"accuracy": pytest.approx(by_hand, abs=1e-6), "count": 50, "severities": [1, 5]}
    assert runs.read(tested).record["corrupted"] == expected
    row = runs.load(tested.parent.parent).iloc[0]
    assert (row.corrupted_accuracy, row.corrupted_count) == (pytest.approx(by_hand, abs=1e-6), 50)
    assert row.corrupted_severities == "1, 5"
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


def test_of_more_images_than_there_are_all_are_counted(tested, monkeypatch):
    few = draw_stand_in(40, seed=6)
    monkeypatch.setattr(evaluate, "load_set", lambda split, stand_in: few)
    table = evaluate.shifted_metrics(tested, (5,), count=10_000, stand_in=True)
    assert set(table["count"]) == {40} and runs.read(tested).record["corrupted"]["count"] == 40
    bins = pd.read_csv(tested / "reliability.csv").groupby("images")["count"].sum()
    assert bins.to_dict() == {"clean": 40, "distorted": 40 * len(KINDS)}


def test_correct_on_test_is_kept_and_agrees_with_the_record(tested):
    right = evaluate.correct_on_test(tested, stand_in=True)
    assert right.dtype == bool and right.mean() == pytest.approx(runs.read(tested).record["test"]["accuracy"])
    (tested / "best.safetensors").unlink()
    assert np.array_equal(evaluate.correct_on_test(tested, stand_in=True), right)


def test_reliability_is_a_row_for_each_bin_that_holds_images():
    logits, labels = torch.randn(500, 10, generator=generator(1)) * 3, torch.arange(500) % 10
    table = evaluate.reliability(logits, labels)
    confidence, right = logits.softmax(1).amax(1).numpy(), (logits.argmax(1) == labels).numpy()
    assert table["count"].sum() == 500 and np.allclose(table.high - table.low, 1 / 15)
    for low, high, count, mean, accuracy in table.itertuples(index=False):
        inside = (low < confidence) & (confidence <= high)
        expected = inside.sum(), confidence[inside].mean(), right[inside].mean()
        assert (count, mean, accuracy) == pytest.approx(expected)


def test_what_cannot_be_measured_is_refused(tested, finished_tiny):
    with pytest.raises(CourseError, match="count=0"):
        evaluate.shifted_metrics(tested, (1,), count=0, stand_in=True)
    with pytest.raises(CourseError, match="has not been tested"):
        evaluate.correct_on_test(finished_tiny, stand_in=True)
