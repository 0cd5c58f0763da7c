"""The network against timm, torchvision, and counts written down a second time."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.model import SE_PLACEMENTS, BasicBlock, Dropout, SEBlock, SEResNet, count_parameters
from helpers.runtime import CourseError, generator

LAYOUTS = [(1,), (2, 1), (1, 2, 1), (2, 2, 2, 2), (3, 3, 4, 3)]


def small(**options) -> SEResNet:
    return SEResNet(**{"blocks": (1, 1, 1, 1), "width": 8, "reduction": 4, "dropout": 0.0, **options})


@pytest.fixture(scope="module")
def paper() -> SEResNet:
    torch.manual_seed(0)
    return SEResNet()


# ---------------------------------------------------------------------------------------------------- parameters


def test_paper_network_has_the_stated_size(paper):
    assert count_parameters(paper) == 4_698_028
    assert count_parameters(paper) <= 5_000_000


def written_by_hand(blocks, width, reduction, classes=10) -> list[int]:
    """Stem, stages, head: every tensor's size listed one by one, not derived from the module."""
    counts, c = [3 * 3 * 3 * width + width + width], width
    for i, depth in enumerate(blocks):
        o, total = width << i, 0
        for k in range(depth):
            total += 3 * 3 * (c if k == 0 else o) * o + o + o  # first convolution and its norm
            total += 3 * 3 * o * o + o + o  # second
            if reduction:
                total += o * (o // reduction) + o // reduction + (o // reduction) * o + o  # SE, biased
            if k == 0 and (i > 0 or c != o):
                total += c * o + o + o  # unbiased 1x1 shortcut and its norm
        counts.append(total)
        c = o
    return [*counts, c * classes + classes]


@pytest.mark.parametrize("blocks", LAYOUTS)
@pytest.mark.parametrize(("width", "reduction"), [(32, 16), (32, 4), (16, 1), (8, 8), (32, 0)])
def test_every_stage_has_as_many_parameters_as_the_formula_says(blocks, width, reduction):
    with torch.device("meta"):
        net = SEResNet(blocks, width, reduction)
    counted = [count_parameters(part) for part in (net.stem, *net.stages, net.fc)]
    assert counted == written_by_hand(blocks, width, reduction)
    assert count_parameters(net) == sum(counted), "some parameters are in none of stem, stages and fc"


def test_frozen_parameters_are_not_counted():
    net = small()
    before = count_parameters(net)
    net.fc.bias.requires_grad_(False)
    assert count_parameters(net) == before - 10


# --------------------------------------------------------------------------------------------- squeeze-and-excitation


@settings(max_examples=30, deadline=None)
@given(
    reduction=st.integers(1, 8),
    multiple=st.integers(1, 8),
    batch=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_se_block_equals_timm(reduction, multiple, batch, height, width, seed):
    torch.manual_seed(seed)
    channels = reduction * multiple
    ours = SEBlock(channels, reduction)
    theirs = timm.layers.SqueezeExcite(channels, rd_channels=multiple)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            other.weight.copy_(mine.weight[:, :, None, None])
            other.bias.copy_(mine.bias)
    assert count_parameters(ours) == count_parameters(theirs)
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(ours(x), theirs(y))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.fc1.weight.grad, theirs.fc1.weight.grad[:, :, 0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "reduction"), [(32, 5), (32, 64), (32, 0), (32, -2)])
def test_a_reduction_that_does_not_divide_is_refused(channels, reduction):
    with pytest.raises(CourseError, match=rf"reduction of {reduction} .* {channels} channels: choose a divisor"):
        SEBlock(channels, reduction)


# ------------------------------------------------------------------------------------------------------ basic block


@pytest.mark.parametrize(("c_in", "c_out", "stride"), [(16, 16, 1), (16, 32, 2), (16, 32, 1), (16, 16, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_basic_block_without_se_is_torchvisions(c_in, c_out, stride, training):
    torch.manual_seed(1)
    ours = BasicBlock(c_in, c_out, stride, reduction=4)
    shortcut = None
    if stride != 1 or c_in != c_out:
        shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
    theirs = torchvision.models.resnet.BasicBlock(c_in, c_out, stride, shortcut)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # no two channels alike, so that a mix-up shows
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("se.") for key in missing.missing_keys)
    with torch.no_grad():
        ours.se.fc2.weight.zero_()
        ours.se.fc2.bias.fill_(40.0)  # sigmoid(40) is 1 in float32: the SE block lets everything through
    ours.train(training)
    theirs.train(training)
    x = torch.randn(4, c_in, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_se_sits_on_the_branch_and_not_on_the_skip():
    block = BasicBlock(8, 8, reduction=4).eval()
    with torch.no_grad():
        block.se.fc2.weight.zero_()
        block.se.fc2.bias.fill_(-200.0)  # closed: nothing of the branch is left
    x = torch.rand(2, 8, 5, 5)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize(("c_in", "c_out", "stride"), [(8, 8, 1), (8, 16, 2)])
@pytest.mark.parametrize(("placement", "expected"), [
    ("standard", lambda se, branch, skip, whole, x: torch.relu(se(branch(x)) + skip(x))),
    ("pre", lambda se, branch, skip, whole, x: torch.relu(branch(se(x)) + skip(x))),
    ("post", lambda se, branch, skip, whole, x: se(whole(x))),
    ("identity", lambda se, branch, skip, whole, x: torch.relu(branch(x) + se(skip(x)))),
])  # fmt: skip
def test_se_sits_where_its_placement_says(placement, expected, c_in, c_out, stride):
    """Hu et al. 2018, figure 5, put together from torchvision's block, whose weights are ours."""
    block = BasicBlock(c_in, c_out, stride, reduction=4, se_placement=placement).eval()
    theirs = torchvision.models.resnet.BasicBlock(c_in, c_out, stride, block.downsample).eval()
    theirs.load_state_dict({name: value for name, value in block.state_dict().items() if "se." not in name})
    branch = nn.Sequential(theirs.conv1, theirs.bn1, nn.ReLU(), theirs.conv2, theirs.bn2)
    x = torch.rand(2, c_in, 6, 5)
    torch.testing.assert_close(block(x), expected(block.se, branch, block.downsample, theirs, x))


@pytest.mark.parametrize("placement", SE_PLACEMENTS)
def test_the_network_hands_the_placement_to_every_block(placement):
    net = small(blocks=(1, 2), se_placement=placement)
    assert [m.se_placement for m in net.modules() if isinstance(m, BasicBlock)] == [placement] * 3


def test_an_unknown_placement_is_refused():
    with pytest.raises(CourseError, match="se_placement='middle' is unknown: expected one of standard, pre"):
        BasicBlock(8, 8, se_placement="middle")


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_drop_path_is_torchvisions_stochastic_depth(p):
    """Whole images are left out, the others scaled up; with the same mask the same numbers."""
    x, path = torch.randn(4_000, 2, 3, 3, generator=generator(1)), Dropout(p, 1, 1, 1)
    path.draw(len(x), generator(2))
    out = path(x)
    kept = (out != 0).flatten(1).any(1)
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(0.25 / len(x)))
    torch.testing.assert_close(out[kept], x[kept] / (1 - p))
    assert not out[~kept].any() and torch.equal(path.eval()(x), x)
    theirs = torchvision.ops.StochasticDepth(p, "row")(x)
    assert sorted({round(float(v), 3) for v in (theirs / x)[:, 0, 0, 0]}) == sorted(
        {round(float(v), 3) for v in (out / x)[:, 0, 0, 0]}
    )


def test_dropout_draws_for_each_image_and_feature():
    torch.manual_seed(4)
    assert len(Dropout(0.5, 100)(torch.ones(20, 100)).unique(dim=0)) == 20
    net, seen = SEResNet((1,), 64, 4, dropout=0.5).train(), []
    net.fc.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    net(torch.randn(20, 3, 8, 8))
    dropped = (seen[0] == 0).float().mean(1)  # of each image's 64 features
    assert (dropped > 0.1).all() and (dropped < 0.9).all()


def test_what_is_dropped_is_drawn_from_the_generator_given():
    drops = [Dropout(0.5, 3), Dropout(0.5, 3)]
    for drop in drops:
        drop.draw(4, generator(6))
    assert torch.equal(drops[0].drawn, drops[1].drawn)


def test_drop_path_grows_from_block_to_block():
    rates = [m.p for m in small(blocks=(1, 2, 2), drop_path=0.4).modules() if getattr(m, "shape", None) == (1, 1, 1)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert list(small(drop_path=0.4).state_dict()) == list(small().state_dict())


# ------------------------------------------------------------------------------------------------- the whole network


def test_shapes_and_strides_of_the_paper_network(paper):
    seen = []
    hooks = [stage.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[1:]))) for stage in paper.stages]
    with torch.no_grad():
        logits = paper.eval()(torch.zeros(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert seen == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert logits.shape == (2, 10)
    assert [len(stage) for stage in paper.stages] == [3, 3, 4, 3]
    assert [[block.conv1.stride[0] for block in stage] for stage in paper.stages] == [
        [1, 1, 1],
        [2, 1, 1],
        [2, 1, 1, 1],
        [2, 1, 1],
    ]
    projected = [name for name, m in paper.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert projected == [f"stages.{i}.0.downsample.0" for i in (1, 2, 3)]
    assert isinstance(paper.pool, nn.AdaptiveAvgPool2d) and paper.dropout.p == 0.5


@pytest.mark.parametrize("blocks", [(1,), (1, 2), (1, 1, 1, 1)])
def test_every_input_size_from_8_to_64(blocks):
    net = small(blocks=blocks, num_classes=7).eval()
    seen = []
    net.stages.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape)))
    halvings = len(blocks) - 1
    with torch.no_grad():
        for size in range(8, 65):
            other = 8 + (size * 29) % 57  # non-square, every residue
            assert net(torch.zeros(1, 3, size, other)).shape == (1, 7)
            expected = [math.ceil(n / 2**halvings) for n in (size, other)]
            assert seen.pop() == (1, 8 * 2**halvings, *expected)


def test_a_stem_of_stride_2_sees_every_other_place_at_the_same_parameters():
    torch.manual_seed(0)
    one, two, x = small(), small(stem_stride=2), torch.randn(2, 3, 32, 32)
    two.load_state_dict(one.state_dict())
    every_other = one.stem[0](x)[:, :, ::2, ::2]
    torch.testing.assert_close(two.stem[0](x), every_other)
    assert two.stages(two.stem(x)).shape[2:] == (2, 2) and one.stages(one.stem(x)).shape[2:] == (4, 4)


def test_gradients_reach_every_parameter(paper):
    torch.manual_seed(2)
    net = SEResNet(dropout=0.0)
    nn.functional.cross_entropy(net(torch.randn(8, 3, 16, 16)), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} gets no gradient"


def test_first_weights_are_he_normal(paper):
    for name, module in paper.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            n, expected = weight.numel(), math.sqrt(2 / weight[0].numel())
            # The standard deviation of n normal draws is known to about 1 / sqrt(2 n); five times that is no accident.
            assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * n), name
            assert abs(weight.mean().item()) < 5 * expected / math.sqrt(n), name
            if n > 5_000:  # normal, not uniform: 4.55 % lie beyond two standard deviations, none of a uniform's
                beyond = (weight.abs() > 2 * expected).float().mean().item()
                assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0455 / n), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
        if getattr(module, "bias", None) is not None:
            assert (module.bias == 0).all(), name


def test_dropout_acts_while_training_only():
    torch.manual_seed(3)
    net = small(dropout=0.5)
    x = torch.randn(4, 3, 16, 16)
    net.eval()
    assert torch.equal(net(x), net(x))
    net.dropout.train()  # dropout alone, batch norm still by its running statistics
    assert not torch.equal(net(x), net(x))
    seen = []
    net.fc.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
    for _ in range(100):
        net(x)
    dropped = torch.stack(seen)
    net.dropout.eval()
    net(x)
    kept, zeros = seen[-1], (dropped == 0) & (seen[-1] > 0)
    share = zeros.float().sum() / (len(dropped) * (kept > 0).sum())
    assert abs(share.item() - 0.5) < 0.05
    alive = dropped != 0
    torch.testing.assert_close(dropped[alive], (2 * kept).expand_as(dropped)[alive])


def test_the_seed_decides_the_weights():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return small().state_dict()

    first, again, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_channels_last_gives_the_same_logits():
    torch.manual_seed(7)
    net, x = small(blocks=(2, 2)).eval(), torch.randn(3, 3, 17, 20)
    expected = net(x)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_judged_by_itself_in_evaluation():
    torch.manual_seed(8)
    net, x = small().eval(), torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(net(x), torch.cat([net(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (0, 1)}, "1 to 4 stages of 1 or more blocks"),
        ({"blocks": ()}, "1 to 4 stages of 1 or more blocks"),
        ({"blocks": (1, 1, 1, 1, 1)}, "1 to 4 stages of 1 or more blocks"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout in \[0, 1\)"),
        ({"drop_path": 1.0}, r"drop_path in \[0, 1\)"),
        ({"width": 0}, "width is at least 1"),
        ({"num_classes": 1}, "num_classes at least 2"),
        ({"reduction": 3}, "choose a divisor"),
        ({"reduction": -1}, "choose a divisor"),
        ({"stem_stride": 3}, "expected 1 or 2"),
        ({"blocks": 3}, "give whole numbers"),
        ({"blocks": "3343"}, "give whole numbers"),
        ({"blocks": (1.0, 1)}, "give whole numbers"),
        ({"width": 2.5}, "width=2.5.* give whole numbers"),
        ({"reduction": 16.0}, "give whole numbers"),
    ],
)
def test_impossible_shapes_are_refused_with_the_range(options, message):
    with pytest.raises(CourseError, match=message):
        small(**options)


@pytest.mark.parametrize(
    "shape", [(1, 3, 7, 7), (1, 3, 7, 32), (1, 3, 32, 7), (1, 1, 32, 32), (1, 4, 9, 9), (3, 32, 32)]
)
def test_images_that_do_not_fit_are_refused_with_what_does(shape):
    with pytest.raises(CourseError, match=r"expected \[B, 3, H, W\] with H and W at least 8") as caught:
        small()(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
