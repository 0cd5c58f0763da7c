"""The explorer: its figure without widgets, and its widgets by setting their values and looking at what is drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from helpers import data, distort, interactive
from helpers.augment import IMAGENET_MEAN
from helpers.model import SEResNet
from helpers.runtime import CourseError

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_pyplot")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SEResNet((1,), 8, 4).eval()


@pytest.fixture
def scenes():
    return data.draw_scenes(6, seed=1)


def bars(figure):
    """What the lower panels show: probabilities [pictures, classes], in [0, 1]."""
    half = len(figure.axes) // 2
    return np.array([[bar.get_width() for bar in axis.patches] for axis in figure.axes[half:]]) / 100


def pictures(figure):
    """What the upper panels show: uint8 [pictures, 32, 32, 3]."""
    return np.stack([axis.images[0].get_array() for axis in figure.axes[: len(figure.axes) // 2]])


def said(model, images):
    """The network's answer by hand, without the helpers' own `predict`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(mean.flatten(), torch.as_tensor(IMAGENET_MEAN).flatten())
    with torch.no_grad():
        return model((images.float() / 255 - mean) / std).softmax(1).numpy()


def test_the_static_figure_shows_severities_with_the_probabilities_of_the_network(model, scenes):
    images, labels = scenes
    figure = interactive.explore(model, images, labels, "fog")
    expected = torch.cat([images[:1], *(distort.distort(images[:1], "fog", severity) for severity in (1, 3, 5))])
    assert np.array_equal(pictures(figure), expected.permute(0, 2, 3, 1).numpy())
    assert np.allclose(bars(figure), said(model, expected), atol=1e-5)
    top = said(model, expected).argmax(1)
    captions = [axis.get_title() for axis in figure.axes[:4]]
    assert [caption.splitlines()[0] for caption in captions] == ["as it is", "severity 1", "severity 3", "severity 5"]
    assert all(data.CLASSES[best] in caption for best, caption in zip(top, captions, strict=True))
    assert figure.get_suptitle().startswith("airplane, fog")
    marked = [[bool(bar.get_hatch()) for bar in axis.patches] for axis in figure.axes[4:]]
    assert [row.index(True) for row in marked] == top.tolist() and sum(map(sum, marked)) == 4


def test_the_widgets_draw_what_is_chosen(model, scenes, capsys):
    images, labels = scenes
    box = interactive.explore(model, images, labels, "contrast", interactive=True)
    image, kind, severity = box.children[:3]
    assert (image.value, kind.value, severity.value) == (0, "contrast", 1)
    assert (image.max, [value for _, value in kind.options]) == (5, list(distort.KINDS))
    assert (severity.min, severity.max) == (1, 5)
    for widget, value in ((severity, 4), (kind, "snow"), (image, 2)):
        before = box.result
        widget.value = value
        assert box.result is not before, "drawn anew"
        index, expected = image.value, images[image.value : image.value + 1]
        expected = torch.cat([expected, distort.distort(expected, kind.value, severity.value)])
        assert np.array_equal(pictures(box.result), expected.permute(0, 2, 3, 1).numpy())
        assert np.allclose(bars(box.result), said(model, expected), atol=1e-5)
        assert box.result.get_suptitle().startswith(f"{data.CLASSES[labels[index]]}, {kind.value}")
    assert "interactive" in capsys.readouterr().out  # shown, as its text where there is no front end


def test_neither_way_leaves_a_second_figure_to_show(model, scenes):
    interactive.explore(model, *scenes)
    assert len(plt.get_fignums()) == 1
    plt.close("all")
    interactive.explore(model, *scenes, interactive=True).children[2].value = 5
    assert plt.get_fignums() == []


def test_bad_input_is_one_sentence(scenes):
    images, labels = scenes
    for arguments, named in (((images, labels[:2]), "6 images and 2 labels"), ((images[:0], labels[:0]), "0 images"),
                             ((images.float(), labels), "float32"), ((images, labels, "rain"), "rain")):  # fmt: skip
        for lively in (False, True):
            with pytest.raises(CourseError, match=named):
                interactive.explore(nn.Identity(), *arguments, interactive=lively)
