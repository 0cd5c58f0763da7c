"""The stages of the paper: what each adds, the joint distribution of the draws, determinism, and refusals."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy import stats
from test_augment_ops import cifar, images_of
from torchvision.transforms import v2

from helpers import augment as rooms
from helpers.augment import STAGES, Augment, Drawn, Settings, channel_stats, families
from helpers.mixing import cutmix, mixup
from helpers.runtime import CourseError, generator

__all__ = ["cifar"]  # the fixture
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LAST = STAGES[-1]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # leaves levels as they are


def drawn(stage: str, n: int, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Drawn:
    return Augment(stage).draw(n, size, generator(seed), CPU)


def uniform(values: torch.Tensor, low: float, high: float) -> float:
    return stats.kstest(values.double().numpy(), stats.uniform(low, high - low).cdf).pvalue


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [(32, 32), (20, 48)])
def test_shapes_types_and_determinism(stage, size):
    images = images_of(1, 20, size)
    before, augment = images.clone(), Augment(stage)
    first, again = (augment(images, generator(2)) for _ in range(2))
    assert first.shape == images.shape and first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(first, again) and torch.equal(images, before)
    assert augment(images).shape == images.shape  # torch's own generator
    assert augment(images[:0], generator(2)).shape == (0, 3, *size)
    if stage != "none":
        assert not torch.equal(first, augment(images, generator(3)))


@pytest.mark.parametrize("stage", STAGES)
def test_layout_does_not_matter(stage):
    images, augment = images_of(3, 12, (32, 32)), Augment(stage)
    expected = augment(images, generator(4))
    assert torch.equal(augment(images.contiguous(memory_format=torch.channels_last), generator(4)), expected)
    wide = torch.zeros(24, 3, 32, 64, dtype=torch.uint8)
    wide[::2, :, :, 1::2] = images
    assert torch.equal(augment(wide[::2, :, :, 1::2], generator(4)), expected)


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
@pytest.mark.parametrize("stage", STAGES)
def test_batch_of_one_equals_the_same_image_in_a_batch(stage, policy):
    n = 200
    images, augment = images_of(5, n, (32, 32)), Augment(stage, policy=policy)
    numbers = augment.draw(n, (32, 32), generator(6), CPU)
    together = augment.apply(images, numbers)
    assert torch.equal(together, augment(images, generator(6)))
    for i in range(0, n, 29):
        alone = augment.apply(images[i : i + 1], Drawn(*(x[i : i + 1] for x in numbers)))
        assert torch.allclose(alone, together[i : i + 1], rtol=0, atol=1e-6)


def test_none_is_normalisation():
    images = images_of(7, 14, (32, 32))
    expected = TF.normalize(TF.to_dtype(images, scale=True), list(rooms.IMAGENET_MEAN), list(rooms.IMAGENET_STD))
    assert torch.allclose(Augment("none")(images), expected, atol=1e-5)


def test_channel_stats_give_mean_0_and_std_1(cifar):
    mean, std = channel_stats(cifar)
    x = cifar.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(x.std((0, 2, 3), correction=0).tolist())
    out = Augment("none", mean, std)(cifar)
    assert out.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert out.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-4)


def test_float_outputs_keep_mean_and_std(cifar):
    """Sharpness, blur and jitter are fair on average: grey levels stay, so the statistics stay close to the set's."""
    mean, std = channel_stats(cifar)
    images = cifar.repeat(8, 1, 1, 1)
    plain, colours = (Augment(s, mean, std)(images, generator(8)) for s in ("erasing", "sharpness_blur"))
    assert (plain.mean((0, 2, 3)) - colours.mean((0, 2, 3))).abs().max() < 0.05
    assert (plain.std((0, 2, 3)) / colours.std((0, 2, 3)) - 1).abs().max() < 0.06


def test_stages_share_their_draws():
    """Same generator, same numbers: a later stage adds, it does not reshuffle what came before."""
    numbers = [drawn(stage, 50, 9) for stage in STAGES]
    for other in numbers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(numbers[0][1:], other[1:], strict=True))
    for other in numbers[:-1]:
        assert torch.equal(numbers[0].matrix, other.matrix)
    images = images_of(10, 50, (32, 32))
    crop, erased = (Augment(stage)(images, generator(9)) for stage in STAGES[1:3])
    keep = families.outside(numbers[0].box, (32, 32))
    assert torch.equal(crop * keep, erased)


def test_crop_and_flip_are_torchvisions_with_every_offset_equally_often():
    n = 8100
    image = images_of(11, 1, (32, 32))
    padded = TF.pad(image, 4)
    views = [padded[..., top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    views = torch.cat(views + [TF.horizontal_flip(v) for v in views]).flatten(1).float()
    out = Augment("crop_flip", **PLAIN)(image.expand(n, -1, -1, -1), generator(12)).flatten(1)
    # Exact integers below 2^24: a squared distance of 0 is equality.
    probe = torch.randint(-8, 9, (views.shape[1], 2), generator=generator(13)).double()
    keys = {tuple(k): i for i, k in enumerate((views.double() @ probe).tolist())}
    assert len(keys) == 162
    which = [keys[tuple(k)] for k in (out.round().double() @ probe).tolist()]
    assert torch.equal(out[:200].round(), views[which[:200]])
    assert stats.chisquare(torch.bincount(torch.tensor(which), minlength=162).numpy()).pvalue > 0.001


def test_images_of_a_batch_draw_independently():
    """Every continuous number against every other and against its neighbour image's: no rank correlation."""
    d = drawn("sharpness_blur", 4000, 14)
    numbers = torch.cat(
        [d.matrix[:, :, 2], d.matrix[:, 0, :1], d.jitter, d.sharpened[:, None], d.blurred[:, None], d.sigma[:, None],
         d.box, d.op], 1
    ).double()  # fmt: skip
    related = {(k, k) for k in range(numbers.shape[1])} | {(a, b) for a in range(10, 14) for b in range(10, 14)}
    related |= {(14, 15), (15, 14)}  # the parts of one box, the slots of one sub-policy
    same = stats.spearmanr(numbers).statistic
    shifted = stats.spearmanr(numbers[:-1], numbers[1:]).statistic[: len(same), len(same) :]
    for a in range(len(same)):
        for b in range(len(same)):
            assert abs(shifted[a, b]) < 0.08
            assert (a, b) in related or abs(same[a, b]) < 0.08, (a, b)


def test_the_settings_are_those_of_the_recorded_runs_and_torchvisions_where_they_say_so():
    """A record does not hold them: whoever changes one makes other recipes of all that have been run."""
    s = Settings()
    erasing, flip, sharp = v2.RandomErasing(), v2.RandomHorizontalFlip(), v2.RandomAdjustSharpness(2.0)
    assert (s.erase_p, s.erase_area, s.erase_ratio) == (erasing.p, tuple(erasing.scale), tuple(erasing.ratio))
    assert (s.flip, s.sharpness_p) == (flip.p, sharp.p)
    assert (s.padding, s.rotation, s.brightness, s.contrast, s.saturation, s.hue) == (4, 15.0, 0.2, 0.2, 0.2, 0.05)
    assert (s.sharpness, s.blur, s.blur_p, s.erase_tries) == (2.0, (0.1, 1.0), 0.5, 10)


def test_a_strength_scales_what_it_says_and_no_more():
    s = Settings().scaled(1.5)
    assert (s.rotation, s.brightness, s.contrast, s.saturation, s.hue) == pytest.approx((22.5, 0.3, 0.3, 0.3, 0.075))
    assert (s.sharpness, *s.blur, *s.erase_area) == pytest.approx((2.5, 0.1, 1.45, 0.03, 0.495))
    same = ("padding", "flip", "sharpness_p", "blur_p", "erase_p", "erase_ratio", "erase_tries")
    assert all(getattr(s, name) == getattr(Settings(), name) for name in same)


@pytest.mark.parametrize("level", [1, 37, 100, 128])
def test_a_plain_set_has_no_deviation(level):
    images = torch.full((50, 3, 32, 32), level, dtype=torch.uint8)
    mean, std = channel_stats(images)
    assert mean == pytest.approx([level / 255] * 3) and std == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("strength", [1.0, 1.5])
def test_magnitudes_are_those_of_the_settings(strength):
    s = Settings().scaled(strength)
    assert Settings().scaled(1.0) == Settings() and s.brightness == 0.2 * strength and s.blur[0] == 0.1
    d = Augment(LAST, settings=s).draw(20_000, (32, 32), generator(15), CPU)
    for k, reach in enumerate((s.brightness, s.contrast, s.saturation, s.hue)):
        assert uniform(d.jitter[:, k], (k < 3) - reach, (k < 3) + reach) > 0.001
    assert uniform(d.sigma, *s.blur) > 0.001
    for flags, p in ((d.sharpened, s.sharpness_p), (d.blurred, s.blur_p), (d.box[:, 2] > 0, s.erase_p)):
        assert stats.binomtest(int(flags.sum()), len(flags), p).pvalue > 0.001


def test_at_strength_zero_crop_and_flip_are_left():
    images = images_of(17, 60, (32, 32))
    before, after = (augment(images, generator(18)) for augment in (
        Augment("crop_flip"), Augment("sharpness_blur", settings=Settings().scaled(0.0))))  # fmt: skip
    assert torch.allclose(before, after, atol=1e-4)


def test_rotation_is_uniform_and_turns_about_the_centre():
    d, without = drawn(LAST, 20_000, 16), drawn("crop_flip", 20_000, 16)
    still = ~((d.op > 0) & (d.op < 6)).any(1)  # the policy adds no geometry
    mirrored = without.matrix[still, 0, 0]
    angle = torch.atan2(d.matrix[still, 1, 0], d.matrix[still, 1, 1]).rad2deg()
    assert uniform(angle, -15, 15) > 0.001
    assert stats.binomtest(int((mirrored < 0).sum()), len(mirrored)).pvalue > 0.001
    assert torch.allclose(d.matrix[still, :, 2], without.matrix[still, :, 2])
    images = images_of(17, 40, (32, 32))
    numbers = Augment(LAST, settings=Settings(padding=0, flip=0.0)).draw(40, (32, 32), generator(18), CPU)
    for x, op, matrix in zip(images, numbers.op, numbers.matrix, strict=True):
        if not ((op > 0) & (op < 6)).any():
            degrees = math.degrees(math.atan2(matrix[1, 0], matrix[1, 1]))
            assert torch.equal(families.warp(x[None], matrix[None])[0], TF.rotate(x, degrees))


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_erased_boxes_are_torchvisions(size):
    torch.manual_seed(0)
    theirs, image = v2.RandomErasing(p=1.0), torch.zeros(3, *size)
    params = [theirs.make_params([image]) for _ in range(3000)]
    params = torch.tensor([[p["i"], p["j"], p["h"], p["w"]] for p in params if p["v"] is not None]).double()
    box = drawn("erasing", 12_000, 19, size).box.double()
    box = box[box[:, 2] > 0]
    for k in range(4):
        assert stats.ks_2samp(box[:, k].numpy(), params[:, k].numpy()).pvalue > 0.001
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0] + b[:, 2]):
        assert stats.ks_2samp(quantity(box).numpy(), quantity(params).numpy()).pvalue > 0.001
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= torch.tensor(size)).all()


def test_erased_is_the_mean_colour_in_exactly_the_box():
    images = images_of(20, 40, (32, 32)).clamp(min=1)
    out, d = Augment("erasing")(images, generator(21)), drawn("erasing", 40, 21)
    for x, (top, left, tall, wide) in zip(out, d.box.int().tolist(), strict=True):
        assert (x[:, top : top + tall, left : left + wide] == 0).all()  # 0 is the mean after normalisation


def test_colour_stage_is_torchvisions_jitter_in_a_fixed_order():
    """Brightness, contrast, saturation, hue, on images in which nothing clips; torchvision's in float, unrounded."""
    images = (images_of(22, 42, (32, 32)) // 3 + 80).to(torch.uint8)
    augment = Augment("colour", **PLAIN)
    d = augment.draw(42, (32, 32), generator(23), CPU)
    d = d._replace(box=d.box * 0)
    out = augment.apply(images, d)
    cropped = families.warp(images, d.matrix)
    for i, (b, c, s, h) in enumerate(d.jitter.tolist()):
        x = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(cropped[i].float() / 255, b), c), s)
        x = 255 * TF.adjust_hue(x, h)
        assert (out[i] - x).abs().max() < 2
        assert (out[i] - x).abs().mean() < 0.8


def test_sharpness_and_blur_are_torchvisions():
    images = images_of(24, 42, (32, 32))
    augment = Augment("sharpness_blur", **PLAIN)
    d = augment.draw(42, (32, 32), generator(25), CPU)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(42, 4)
    out = augment.apply(images, d._replace(box=d.box * 0, jitter=neutral))
    x = families.warp(images, d.matrix)
    for i in range(42):
        y = x[i].float() / 255
        if d.sharpened[i]:
            y = TF.adjust_sharpness(y, 2.0)
        if d.blurred[i]:
            y = TF.gaussian_blur(y, [3, 3], [d.sigma[i].item()] * 2)
        assert (out[i] - 255 * y).abs().max() < 0.01
    assert {(a, b) for a, b in zip(d.sharpened.tolist(), d.blurred.tolist(), strict=True)} == {
        (a, b) for a in (True, False) for b in (True, False)
    }


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
def test_never_waits_for_the_device(policy, monkeypatch):
    """On the meta device there are no values: a data-dependent shape, a boolean index or .item() would raise."""
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    out = Augment(LAST, policy=policy)(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    # torch has no meta kernel for its Dirichlet sampler; the CUDA kernel is an ordinary launch.
    monkeypatch.setattr("helpers.mixing.beta", lambda alpha, n, generator, device: torch.empty(n, device=device))
    for mix in (mixup, cutmix):
        mixed = mix(out, torch.empty(8, dtype=torch.int64, device="meta"), 1.0, per_image=True)
        assert mixed.images.shape == out.shape


def test_autograd_and_autocast_around_it_change_nothing():
    images, augment = images_of(31, 8, (32, 32)), Augment(LAST)
    expected = augment(images, generator(32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, generator(32)), expected)
    families.constant.cache_clear()
    out = augment(images, generator(32)).requires_grad_()  # fills the cache of constants; then autograd uses them
    one = torch.ones(8)
    families.colour(out, one, one, one).sum().backward()
    assert out.grad.shape == out.shape


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
def test_computing_all_and_choosing_gives_the_same(policy, monkeypatch):
    """What every device but the CPU does in `where_it_pays` and `each_its_own`, done on the CPU."""
    images, augment = images_of(26, 60, (32, 32)), Augment(LAST, policy=policy)
    expected = augment(images, generator(27))

    def all_and_choose(needed, operation, x, *numbers):
        return torch.where(needed.view(-1, *[1] * (x.dim() - 1)), operation(x.clone(), *numbers), x)

    def one_after_the_other(which, operations, x, *numbers):
        for position, operation in enumerate(operations):
            x = all_and_choose(which == position, operation, x, *numbers)
        return x

    monkeypatch.setattr("helpers.augment.families.each_its_own", one_after_the_other)
    monkeypatch.setattr("helpers.augment.policies.each_its_own", one_after_the_other)
    monkeypatch.setattr("helpers.augment.policies.where_it_pays", all_and_choose)
    monkeypatch.setattr("helpers.augment.where_it_pays", all_and_choose)
    assert torch.allclose(augment(images, generator(27)), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_and_cpu_agree():
    device = torch.device("cuda")
    images, augment = images_of(28, 64, (32, 32)), Augment(LAST)
    numbers = augment.draw(64, (32, 32), generator(29), CPU)
    expected = augment.apply(images, numbers)
    on_device = Drawn(*(n.to(device) for n in numbers))
    theirs = augment.apply(images.to(device), on_device).cpu()
    assert ((theirs - expected).abs() < 0.02).float().mean() > 0.999  # a tie or a level may fall the other way
    g = generator(30, device=device)
    static, targets = images.to(device), torch.zeros(64, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(g)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        mixup(augment(static, g), targets, 0.2, g)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.graph(graph):
        mixed = mixup(augment(static, g), targets, 0.2, g)
    torch.cuda.set_sync_debug_mode("default")
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(mixed.images.clone())
    assert seen[0].isfinite().all() and not torch.equal(*seen)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Augment("everything"), "stage 'everything'"),
        (lambda: Augment(LAST, policy="best"), "policy 'best'"),
        (lambda: Augment(LAST, mean=(0.5,)), "three numbers"),
        (lambda: Augment(LAST, std=(1.0, 0.0, 1.0)), "three numbers"),
        (lambda: Augment(LAST, std=(1.0, math.nan, 1.0)), "three numbers"),
        (lambda: Augment(LAST, mean=(math.nan, 0.0, 0.0)), "three numbers"),
        (lambda: Augment(LAST, mean=0.5), "three numbers"),
        (lambda: Augment(LAST, mean=("a", "b", "c")), "three numbers"),
        (lambda: Augment(LAST)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0), "a torch.Generator on cpu .* not a int"),
        (lambda: Settings().scaled(-1), "0 to 2"),
        (lambda: Settings(padding=-1), "padding=-1 is out of range: expected a whole number from 0"),
        (lambda: Settings(flip=2), "from 0 to 1"),
        (lambda: Settings(hue=math.nan), "from 0 to 0.5"),
        (lambda: Settings(rotation="15"), "from 0 to 180"),
        (lambda: Settings(erase_area=(2, 3)), "from 0 to 1"),
        (lambda: Settings(blur=(1.0, 0.1)), "two numbers, the smaller first"),
        (lambda: Settings(blur=0.5), "a tuple of two numbers"),
        (lambda: Settings(blur=[0.1, 1.0]), "a tuple of two numbers"),
        (lambda: Settings(erase_ratio=(0.3,)), "a tuple of two numbers"),
        (lambda: Settings(rotation=(5, 10)), "expected a number from 0 to 180"),
        (lambda: Settings(padding=4.5), "expected a whole number from 0"),
        (lambda: Settings(erase_tries=True), "expected a whole number from 1"),
        (lambda: Settings(contrast=1.5), "from 0 to 1"),
        (lambda: Settings().scaled("1"), "0 to 2"),
        (lambda: Settings().scaled(math.nan), "0 to 2"),
        (lambda: Augment(LAST)(torch.rand(2, 3, 32, 32)), "uint8"),
        (lambda: Augment(LAST)(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)), "shape"),
        (lambda: Augment(LAST)(torch.zeros(3, 32, 32, dtype=torch.uint8)), "shape"),
        (lambda: Augment(LAST)([1, 2]), "list"),
        (lambda: channel_stats(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)), "empty"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(call, says):
    with pytest.raises(CourseError, match=says) as caught:
        call()
    assert str(caught.value).endswith(".") and ". " not in str(caught.value)
