"""Figures hold the numbers they were given, carry the stamp, and come out the same byte for byte."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from colorspacious import cspace_convert, deltaE
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from helpers import plots
from helpers.data import CIFAR10, CLASSES, STAND_IN, draw_stand_in
from helpers.model import SEResNet
from helpers.runtime import CourseError

LAYOUTS = [(1,), (1, 2), (2, 1, 1), (1, 1, 2, 3), (3, 3, 4, 3)]


pytestmark = pytest.mark.usefixtures("fresh_pyplot")


def net(blocks=(1, 2), width=8) -> SEResNet:
    torch.manual_seed(0)
    return SEResNet(blocks, width, reduction=4)


def history(seed: int = 0, epochs: int = 5) -> pd.DataFrame:
    g = np.random.default_rng(seed)
    columns = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_augmented_accuracy")
    return pd.DataFrame({"epoch": np.arange(1, epochs + 1), **{name: g.random(epochs) for name in columns}})


ROWS = pd.DataFrame({"label": ["a", "b"], "value": [0.5, 0.9], "low": [0.4, 0.88], "high": [0.55, 0.93]})
TREND = pd.DataFrame({"x": [6, 12, 24], "value": [0.5, 0.6, 0.9], "low": [0.4, np.nan, 0.88],
                      "high": [0.55, np.nan, 0.93]})  # fmt: skip
TRIALS = pd.DataFrame({
    "kind": ["fog", "fog", "snow"] * 2, "severity": [1, 5, 5] * 2, "method": ["a"] * 3 + ["b"] * 3,
    "predicted": [0.8, 0.7, 0.75, 0.95, 0.6, 0.5], "true": [0.8, 0.6, 0.4] * 2,
})  # fmt: skip
ERRORS = pd.DataFrame({"method": ["b", "a"], "error": [0.05, 0.15], "low": [0.01, 0.1], "high": [0.1, 0.2]})
DRAWN = draw_stand_in(40, seed=3)

SHIFT = pd.DataFrame(
    {"difference": [-0.2, 4.0, 0.1, np.nan], "low": [-0.3, 3.0, -0.1, np.nan], "high": [-0.1, 5.0, 0.3, np.nan]},
    ["red", "noise", "near_grey", "constant"],
)
SPECTRUM = pd.DataFrame({"frequency": [0.1, 0.3, 0.5], "power": [1, 0.1, 0.01], "low": 0.009, "high": 1.1})
SHARES = pd.DataFrame(
    {"share": [0.1, 0.7, 0.2], "low": [0, 0.6, 0.1], "high": [0.2, 0.8, 0.3], "true": [0, 0.75, 0.25]},
    ["clean", "shot_noise", "contrast"],
)

GATES = {"early": torch.rand(40, 3, generator=torch.manual_seed(0)), "late": torch.rand(40, 50)}
BINS = pd.DataFrame({"low": [0.2, 0.8], "confidence": [0.25, 0.9], "accuracy": [0.3, 0.8], "count": [5, 50]})

# One call of every public function that makes a figure; a test below says so when one is missing.
EXAMPLES = {
    "images": lambda: plots.images([DRAWN.images[:3], DRAWN.images[3:5]], ["one", "two"], ["x", "y", "z"]),
    "overlays": lambda: plots.overlays(DRAWN.images[:3], {"a": np.zeros((3, 32, 32)), "b": np.eye(32)[None]}, "xyz"),
    "channel_histograms": lambda: plots.channel_histograms(DRAWN.images),
    "architecture": lambda: plots.architecture(net()),
    "excitations": lambda: plots.excitations(GATES, DRAWN.labels, CLASSES, "title"),
    "reliability": lambda: plots.reliability({"clean": {"a": [BINS, BINS.assign(accuracy=0.6)]}}, "title"),
    "curves": lambda: plots.curves({"a": [history(0), history(1)], "b": [history(2)]}, "val_loss", "title", "nats"),
    "lines": lambda: plots.lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, "title", "x", "y"),
    "pairs": lambda: plots.pairs(DRAWN.images[:7], DRAWN.images[7:14], [f"0.{i}" for i in range(7)]),
    "forest": lambda: plots.forest(SHIFT, "title"),
    "spectra": lambda: plots.spectra({"a": SPECTRUM, "b": SPECTRUM.assign(power=SPECTRUM.power / 2)}, "title"),
    "shares": lambda: plots.shares(SHARES, "title"),
    "answers": lambda: plots.answers(DRAWN.images[:2], torch.eye(10)[:2], CLASSES, ["one", "two"], "title"),
    "interval_panels": lambda: plots.interval_panels({"clean, %": ROWS, "distorted, %": ROWS}, "title"),
    "intervals": lambda: plots.intervals(ROWS, "title"),
    "trends": lambda: plots.trends({"clean, %": {"a": TREND}, "distorted, %": {"a": TREND, "b": TREND}}, "title", "x"),
    "confusion": lambda: plots.confusion(np.arange(1, 101).reshape(10, 10), CLASSES),
    "heat": lambda: plots.heat(pd.DataFrame({"a": [0.1, 0.2], "b": [0.3, 0.4]}, ["p", "q"]), "title", "share"),
    "diagonal": lambda: plots.diagonal({"a": ([0.1, 0.9], [0.2, 0.8]), "b": ([0.5], [0.5])}, "title", "x", "y"),
    "estimates": lambda: plots.estimates(TRIALS, ERRORS, "title"),
    "bars": lambda: plots.bars(pd.DataFrame({"one": [1, 2], "two": [2, 3]}, ["a", "b"]), "title", "x"),
    "histograms": lambda: plots.histograms({"p": {"a": [0.1, 0.2], "b": [0.3, 0.9]}}, "x", [0, 0.5, 1]),
    "fields": lambda: plots.fields(
        {"p": [[0.1, 0.9], [0.2, 0.8]]}, torch.zeros(2, 2), torch.tensor([0, 1]), (-1, 1, -1, 1), "value"
    ),
    "stacked": lambda: plots.stacked(pd.DataFrame({"a": [1, 2], "b": [3, 4]}, ["p", "q"]), "title", "x"),
}
each_figure = pytest.mark.parametrize("name", EXAMPLES)


def makers() -> set[str]:
    functions = inspect.getmembers(plots, inspect.isfunction)
    return {
        name
        for name, function in functions
        if function.__module__ == plots.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation in (Figure, "Figure")
    }


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# ------------------------------------------------------------------------------------------------- every figure


def test_every_plot_function_has_an_example_here():
    assert makers() == set(EXAMPLES), "give each public function of helpers.plots that returns a Figure an example"


_opened: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


@each_figure
def test_every_plot_function_returns_a_figure_and_opens_no_file_of_ours(name):
    global _opened
    EXAMPLES[name]()  # whatever matplotlib reads on first use
    try:
        _opened = []
        assert type(EXAMPLES[name]()) is Figure
        opened, _opened = _opened, None
    finally:
        _opened = None
    libraries = tuple({str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, matplotlib.get_cachedir())})
    fonts = (".ttf", ".otf", ".afm", ".ttc")
    ours = [p for p in opened if not str(Path(p).resolve()).startswith(libraries) and not p.endswith(fonts)]
    assert not ours


@each_figure
def test_every_figure_is_stamped_on_the_stand_in_set_and_only_there(name, capsys):
    plots.start(STAND_IN)
    assert "STAND-IN DATA" in capsys.readouterr().out
    assert "STAND-IN DATA" in texts(EXAMPLES[name]())
    plots.start(CIFAR10)
    assert capsys.readouterr().out == ""
    assert "STAND-IN" not in texts(EXAMPLES[name]())


@each_figure
def test_the_stamp_is_to_be_seen(name):
    """Not hidden under the picture: a reddish word over it changes the pixels."""
    pixels = []
    for source in (CIFAR10, STAND_IN):
        plots.start(source)
        figure = EXAMPLES[name]()
        figure.canvas.draw()
        pixels.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int))
    height, width = pixels[0].shape[:2]
    changed = (pixels[0] != pixels[1][:height, :width]).any(-1)
    assert changed.mean() > 0.005


def test_start_undoes_what_a_notebook_changed():
    plots.start(CIFAR10)
    before = dict(plt.rcParams)
    plt.rcParams["lines.linewidth"] = 17
    plots.start(CIFAR10)
    assert dict(plt.rcParams) == before


# -------------------------------------------------------------------------------------------------------- saving


@each_figure
def test_the_same_figure_gives_the_same_bytes(name, tmp_path):
    for number in (1, 2):
        plots.save(EXAMPLES[name](), tmp_path / f"{number}.png")
    first, second = ((tmp_path / f"{number}.png").read_bytes() for number in (1, 2))
    assert first == second
    assert first.startswith(b"\x89PNG") and b"Software" not in first and b"Creation" not in first


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left on device"), CourseError), (ValueError,) * 2]
)
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, error, raised):
    path = tmp_path / "a.png"
    plots.save(EXAMPLES["lines"](), path)
    old = path.read_bytes()
    figure = EXAMPLES["lines"]()

    def half(target, **options):
        Path(target).write_bytes(b"half a pic")
        raise error

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(raised):
        plots.save(figure, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_save_closes_the_figure_and_makes_the_folder(tmp_path):
    figure = EXAMPLES["lines"]()
    assert plt.fignum_exists(figure.number)
    plots.save(figure, tmp_path / "new" / "deep" / "a.png")
    assert not plt.fignum_exists(figure.number)
    assert (tmp_path / "new" / "deep" / "a.png").is_file()


# -------------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("blocks", LAYOUTS)
@pytest.mark.parametrize("size", [32, 40])
def test_walk_agrees_with_hooks_made_here(blocks, size):
    model = net(blocks)
    rows = plots.walk(model, size)
    assert rows.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert list(rows.name) == [
        "stem",
        *(f"stages.{i}.{k}" for i, depth in enumerate(blocks) for k in range(depth)),
        *("pool", "dropout", "fc"),
    ]
    seen = {}
    for name in rows.name:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0].shape[1:], output.shape[1:])})
        )
    with torch.no_grad():
        model.eval()(torch.rand(2, 3, size, size))
    for row in rows.itertuples():
        before, after = seen[row.name]
        assert row.shape == tuple(after), row.name
        assert row.parameters == sum(p.numel() for p in model.get_submodule(row.name).parameters())
        if row.kind == "BasicBlock":
            assert row.stride == model.get_submodule(row.name).conv1.stride[0] == before[1] // after[1]
            assert row.projects == (before != after)


def test_walk_tells_the_strides_of_the_modules_themselves():
    """Also where sides are odd, and of a stem that halves the image."""
    rows = plots.walk(SEResNet((1, 1, 1), 8, 4, stem_stride=2), size=17).set_index("name")
    assert rows.stride.tolist() == [2, 1, 2, 2, 1, 1, 1] and rows["shape"]["stages.2.0"] == (32, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_walk_leaves_the_model_as_it_was(training):
    model = net().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plots.walk(model)
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("blocks", LAYOUTS)
def test_the_architecture_names_every_count(blocks):
    model = net(blocks, width=32)
    figure = plots.architecture(model)
    written = texts(figure)
    for part in (model, model.stem, *model.stages, model.fc):
        assert f"{sum(p.numel() for p in part.parameters()):,} parameters" in written.replace("\n", " ")
    for i, depth in enumerate(blocks):
        width = 32 * 2**i
        boxes = [text for text in figure.axes[0].texts if f"SE {width}→{width // 4}→{width}" in text.get_text()]
        assert len(boxes) == depth
        assert sum("/2" in box.get_text() for box in boxes) == (i > 0)
        assert f"{width}×{32 // 2**i}×{32 // 2**i}" in written
    arrows = [patch for patch in figure.axes[0].patches if patch.get_linestyle() in ("--", "dashed")]
    assert len(arrows) == len(blocks) - 1, "a dashed skip for every stage that changes the shape"


def test_excitations_are_the_mean_gates_of_each_class_that_is_there():
    labels = torch.arange(40) % 3
    panels = plots.excitations(GATES, labels, CLASSES, "title").axes
    for axis, (name, values) in zip(panels, GATES.items(), strict=False):
        drawn = np.asarray(axis.collections[0].get_array()).reshape(3, -1)
        means = np.stack([values.numpy()[labels.numpy() == c].mean(0) for c in range(3)])
        widest = means[:, np.argsort(-means.std(0))[:40]]
        np.testing.assert_allclose(drawn, widest, rtol=1e-5)
        assert axis.get_title(loc="left") == name
    assert [text.get_text() for text in panels[0].get_yticklabels()] == list(CLASSES[:3])


# ------------------------------------------------------------------------------------------------ data in, marks out


def test_images_shows_the_pixels_it_got():
    axes = plots.images([DRAWN.images[:3], DRAWN.images[3:5]], ["one", "two"], ["x", "y", "z"]).axes
    shown = [axis.images[0].get_array() if axis.images else None for axis in axes]
    for picture, given in zip(shown, [*DRAWN.images[:5], None], strict=True):
        assert (picture is None) == (given is None)
        if given is not None:
            np.testing.assert_array_equal(picture, given.permute(1, 2, 0).numpy())
    assert [axes[0].get_ylabel(), axes[3].get_ylabel()] == ["one", "two"]


@pytest.mark.parametrize("draw, given", [(plots.images, [[DRAWN.images[:3]]]),
                                         (plots.pairs, [DRAWN.images[:2], DRAWN.images[2:4]])])  # fmt: skip
def test_a_grid_of_pictures_may_have_a_title_and_keeps_its_pictures_as_large(draw, given):
    plain, titled = draw(*given), draw(*given, title="whose images these are")
    assert not plain.get_suptitle() and titled.get_suptitle() == "whose images these are"
    sizes = []
    for figure in (plain, titled):
        figure.canvas.draw()
        sizes.append(figure.axes[0].get_window_extent().height)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


def test_overlays_lay_a_map_in_colours_over_the_picture_in_grey():
    maps = np.linspace(0, 1, 2 * 32 * 32).reshape(2, 32, 32)
    axes = plots.overlays(DRAWN.images[:2], {"evidence": maps}, ["left", "right"]).axes
    pictures = [axis.get_images()[0].get_array() for axis in axes]
    for shown, given in zip(pictures[:2], DRAWN.images, strict=False):
        assert np.array_equal(shown, given.permute(1, 2, 0).numpy())
    for i, shown in enumerate(pictures[2:]):
        grey = DRAWN.images[i].numpy().mean(0)[..., None] / 255
        expected = 0.4 * grey + 0.6 * matplotlib.colormaps["magma"](maps[i])[..., :3]
        np.testing.assert_allclose(np.asarray(shown), expected, atol=1e-6)
    assert [axes[0].get_ylabel(), axes[2].get_ylabel()] == ["picture", "evidence"]
    assert [axis.get_title("center") for axis in axes[:2]] == ["left", "right"]


def test_the_ratio_of_spectra_is_read_without_powers_of_ten():
    axis = plots.spectra({"a": SPECTRUM, "b": SPECTRUM.assign(power=SPECTRUM.power * 1.9)}, "title").axes[1]
    axis.figure.canvas.draw()
    shown = [label.get_text() for label in axis.get_yticklabels(which="both") if label.get_text()]
    assert {"1", "1.5"} <= set(shown) and all(float(text) > 0 for text in shown)


def test_pairs_lie_side_by_side_with_their_captions():
    axes = EXAMPLES["pairs"]().axes
    for i, axis in enumerate(axes[:7]):
        shown = np.asarray(axis.images[0].get_array())
        np.testing.assert_array_equal(shown[:, :32], DRAWN.images[i].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(shown[:, 34:], DRAWN.images[7 + i].permute(1, 2, 0).numpy())
        assert axis.get_title() == f"0.{i}"
    assert len(axes) == 12 and not any(axis.images for axis in axes[7:])


def segments(axis) -> np.ndarray:
    (bars,) = [collection for collection in axis.collections if isinstance(collection, LineCollection)]
    return np.array(bars.get_segments())


def test_forest_fills_what_lies_to_one_side_of_none():
    axis = plots.forest(SHIFT, "title").axes[0]
    np.testing.assert_allclose(segments(axis)[:, :, 0], SHIFT[["low", "high"]].dropna())
    filled, open_ = [line for line in axis.lines if line.get_marker() == "o"]
    assert filled.get_xdata().tolist() == [-0.2, 4.0] and open_.get_xdata().tolist() == [0.1]
    assert open_.get_markerfacecolor() == "white" != filled.get_markerfacecolor()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["red", "noise", "near grey"]


def test_spectra_and_their_ratio_to_the_first():
    power, ratio = EXAMPLES["spectra"]().axes
    np.testing.assert_allclose(power.lines[1].get_ydata(), SPECTRUM.power / 2)
    np.testing.assert_allclose(ratio.lines[0].get_ydata(), 1)
    np.testing.assert_allclose(ratio.lines[1].get_ydata(), 0.5)
    assert power.lines[0].get_marker() != power.lines[1].get_marker()


def test_shares_are_bars_in_per_cent_with_the_truth_beside_them():
    axis = plots.shares(SHARES, "title").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["shot noise", "contrast", "clean"]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], [70, 20, 10])
    np.testing.assert_allclose(segments(axis)[:, :, 0], [[60, 80], [10, 30], [0, 20]])
    (crosses,) = [line for line in axis.lines if line.get_marker() == "x"]
    np.testing.assert_allclose(crosses.get_xdata(), [75, 25, 0])
    assert not plots.shares(SHARES.drop(columns="true"), "title").axes[0].get_legend()


def test_channel_histograms_are_shares_of_the_pixels_each_in_its_colour():
    drawn = plots.channel_histograms(DRAWN.images).axes[0].lines
    assert [line.get_label() for line in drawn] == ["red", "green", "blue"]
    for c, line in enumerate(drawn):
        assert np.argmax(to_rgb(line.get_color())) == c
        expected, _ = np.histogram(DRAWN.images[:, c].numpy(), bins=256, range=(0, 256))
        np.testing.assert_allclose(line.get_ydata(), 100 * expected / expected.sum())


def test_histograms_are_numpys_densities():
    axis = plots.histograms({"p": {"a": [0.1, 0.2, 0.9]}}, "x", [0, 0.5, 1]).axes[0]
    expected, _ = np.histogram([0.1, 0.2, 0.9], [0, 0.5, 1], density=True)
    assert sorted(set(axis.patches[0].get_xy()[:, 1])) == pytest.approx(sorted({0, *expected}))


@pytest.mark.parametrize(("percent", "scale"), [(True, 100), (False, 1)])
def test_curves_draw_the_mean_and_a_band_from_lowest_to_highest(percent, scale):
    seeds = [history(seed) for seed in range(4)]
    axis = plots.curves({"four": seeds, "one": [history(9)]}, "val_accuracy", "t", "y", percent).axes[0]
    values = scale * np.stack([h.val_accuracy for h in seeds])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), values.mean(0))
    np.testing.assert_allclose(axis.lines[1].get_ydata(), scale * history(9).val_accuracy)
    (band,) = axis.collections  # one run has no band
    corners = band.get_paths()[0].vertices
    for i, epoch in enumerate(seeds[0].epoch):
        at = corners[corners[:, 0] == epoch, 1]
        np.testing.assert_allclose([at.min(), at.max()], [values[:, i].min(), values[:, i].max()])


def test_curves_over_steps_with_the_papers_level():
    axis = plots.curves(
        {"a": [history()]}, "val_accuracy", "t", "y", reference=0.9069, reference_label="paper:", steps_per_epoch=703
    ).axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), 703 * history().epoch)
    assert axis.get_xlabel() == "optimiser steps"
    np.testing.assert_allclose(axis.lines[1].get_ydata(), 90.69)
    assert "paper: 90.69" in texts(axis.figure)


def test_intervals_draw_the_numbers_given():
    axis = plots.intervals(ROWS, "title").axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [50, 90])
    (bars,) = [collection for collection in axis.collections if isinstance(collection, LineCollection)]
    segments = np.array(bars.get_segments())
    np.testing.assert_allclose(segments[:, :, 0], [[40, 55], [88, 93]])
    np.testing.assert_allclose(segments[:, :, 1], [[1, 1], [0, 0]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert list(axis.get_yticks()) == [1, 0]


def test_trends_draw_a_line_a_name_over_steps_of_equal_length():
    figure = plots.trends({"clean, %": {"a": TREND, "b": TREND[1:]}}, "title", "epochs")
    (axis,) = figure.axes
    first, second = (bars.lines[0] for bars in axis.containers)
    np.testing.assert_allclose(first.get_xydata(), [(6, 50), (12, 60), (24, 90)])
    np.testing.assert_allclose(second.get_xydata(), [(12, 60), (24, 90)])
    bars = [bar for bar in axis.containers[0].lines[2][0].get_segments() if len(bar)]
    np.testing.assert_allclose(bars, [[(6, 40), (6, 55)], [(24, 88), (24, 93)]], err_msg="where there is an interval")
    places = axis.transData.transform([(x, 0) for x in TREND["x"]])[:, 0]
    np.testing.assert_allclose(np.diff(places, 2), 0, atol=1e-6, err_msg="doubling is a step of one length")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["6", "12", "24"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epochs", "clean, %")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_confusion_is_in_per_cent_of_the_true_class():
    counts = np.arange(1, 101).reshape(10, 10)
    drawn = np.asarray(plots.confusion(counts, CLASSES).axes[0].collections[0].get_array()).reshape(10, 10)
    np.testing.assert_allclose(drawn, 100 * counts / counts.sum(1, keepdims=True))


def test_stacked_bars_lie_end_to_end():
    frame = pd.DataFrame({"a": [1, 2], "b": [3000, 4]}, ["p", "q"])
    axis = plots.stacked(frame, "title", "x").axes[0]
    assert [[bar.get_width() for bar in bars] for bars in axis.containers] == [[1, 2], [3000, 4]]
    assert [bar.get_x() for bar in axis.containers[1]] == [1, 2]
    assert axis.containers[0][0].get_hatch() != axis.containers[1][0].get_hatch()
    assert "3,001" in texts(axis.figure)


@pytest.mark.parametrize("ends", [(0, 1), (-1, 1)])
def test_numbers_on_a_heat_map_can_be_read(ends):
    """WCAG 2 asks for a contrast of 4.5."""
    values = np.linspace(*ends, 30).reshape(5, 6)
    axis = plots.heat(pd.DataFrame(values), "title", "share", *ends).axes[0]
    faces = axis.collections[0].get_facecolors()
    for at, text in enumerate(axis.texts):
        low, high = sorted((relative_luminance(faces[at]), relative_luminance(text.get_color())))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (values.ravel()[at], text.get_color())


def test_a_class_that_is_not_there_leaves_its_row_empty():
    shown = plots.confusion([[3, 1], [0, 0]], ["a", "b"]).axes[0].collections[0].get_array()
    assert shown.ravel()[:2].tolist() == [75, 25] and np.isnan(shown.filled(np.nan).ravel()[2:]).all()


def test_heat_writes_its_numbers_in():
    frame = pd.DataFrame({"a": [0.125, 0.25], "b": [0.5, 1.0]}, ["p", "q"])
    axis = plots.heat(frame, "title", "share").axes[0]
    np.testing.assert_allclose(np.asarray(axis.collections[0].get_array()).reshape(2, 2), frame)
    assert [text.get_text() for text in axis.texts] == [f"{value:.2f}" for value in frame.to_numpy().ravel()]


def test_diagonal_draws_per_cent_against_the_line_of_equals():
    series = {f"line {i}": ([0.1 * i, 0.9], [0.2, 0.8]) for i in range(7)}
    axis = plots.diagonal(series, "title", "x", "y").axes[0]
    for line, (x, y) in zip(axis.lines[1:], series.values(), strict=True):
        np.testing.assert_allclose(line.get_xydata().T, [[100 * v for v in x], [100 * v for v in y]])


def test_reliability_draws_the_mean_of_the_runs_in_a_band_and_leaves_out_small_bins():
    (axis,) = plots.reliability({"clean": {"a": [BINS, BINS.assign(accuracy=0.6)]}}, "title").axes
    line = next(line for line in axis.lines if line.get_label() == "a")
    np.testing.assert_allclose(line.get_xydata(), [[90, 70]], err_msg="the bin of five images is left out")
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((60, 80))


def test_fields_mark_one_half_and_where_it_is_nearly_sure():
    values = np.tile(np.linspace(0, 1, 11), (3, 1))
    axis = plots.fields({"p": values}, torch.zeros(2, 2), torch.tensor([0, 1]), (0, 11, 0, 3), "value").axes[0]
    (contour,) = [found for found in axis.collections if hasattr(found, "levels")]
    assert list(contour.levels) == [0.1, 0.5, 0.9]
    for level, path in zip(contour.levels, contour.get_paths(), strict=True):
        np.testing.assert_allclose(path.vertices[:, 0], 10 * level + 0.5)


def test_estimates_draw_a_panel_a_method_with_its_error_and_its_worst_kind():
    figure = plots.estimates(TRIALS, ERRORS, "title")
    for axis, (method, kind) in zip(figure.axes, (("b", "fog"), ("a", "snow")), strict=True):
        part = TRIALS[TRIALS.method == method]
        mild, strong = (100 * part[part.severity == severity][["true", "predicted"]] for severity in (1, 5))
        np.testing.assert_allclose(axis.lines[1].get_xydata(), mild)
        np.testing.assert_allclose(axis.lines[2].get_xydata(), strong)
        assert axis.lines[1].get_marker() != axis.lines[2].get_marker()
        assert [text.get_text() for text in axis.texts] == [kind]
    assert figure.axes[0].get_title("left") == "b: 5.0 points off\n[1.0, 10.0]"


def test_the_name_of_the_worst_kind_lies_over_no_point():
    kinds = ["impulse noise", "speckle noise", *["fog"] * 10]  # as on record: the worst ones on the left, a few beside
    true = np.array([0.45, 0.51, 0.53, 0.62, 0.64, 0.66, 0.69, 0.7, 0.73, 0.75, 0.79, 0.81])
    predicted = np.array([0.64, 0.66, 0.64, 0.62, 0.7, 0.64, 0.6, 0.69, 0.73, 0.76, 0.8, 0.81])
    frame = pd.DataFrame({"kind": kinds, "severity": 5, "method": "a", "predicted": predicted, "true": true})
    figure = plots.estimates(frame, ERRORS[ERRORS.method == "a"], "title")
    figure.canvas.draw()
    axis = figure.axes[0]
    name = matplotlib.text.Text.get_window_extent(axis.texts[0])  # without the line to the point
    assert axis.bbox.count_contains(name.corners()) == 4
    assert name.count_contains(axis.transData.transform(axis.lines[1].get_xydata())) == 0


@pytest.mark.parametrize("names", ["abc", [f"line {i} with quite a long name" for i in range(7)]])
def test_the_names_of_lines_stand_below_the_panel(names):
    figure = plots.lines({name: ([1, 2], [i, i]) for i, name in enumerate(names)}, "title", "x", "y")
    figure.canvas.draw()
    legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert legend.y1 < panel.y0 and figure.bbox.count_contains(legend.corners()) == 4


# --------------------------------------------------------------------------------------------------- no colour alone

# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
COLOUR_VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen_as(colours, vision: str) -> np.ndarray:
    """CIE Lab (D65) of sRGB colours under a colour vision."""
    rgb = np.asarray(colours)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.asarray(COLOUR_VISION[vision]).T, 0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.008856))
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_the_first_colours_differ_for_every_colour_vision(vision):
    lab = seen_as(plots.PALETTE[:4], vision)
    closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))
    assert closest > 10, f"two colours are {closest:.1f} apart; 2.3 is just noticeable"
    greens = seen_as([(1, 0, 0), (0.55, 0.45, 0)], "deuteranopia")  # the measure itself: red and olive do collapse
    assert np.linalg.norm(greens[0] - greens[1]) < np.linalg.norm(
        np.subtract(*seen_as([(1, 0, 0), (0.55, 0.45, 0)], "usual"))
    )


def test_the_palette_is_seaborns_colour_blind_one():
    assert [to_hex(colour) for colour in plots.PALETTE] == [to_hex(c) for c in sns.color_palette("colorblind")]


def test_lines_differ_in_more_than_colour():
    names = [f"line {i}" for i in range(7)]
    axis = plots.curves({name: [history(i)] for i, name in enumerate(names)}, "val_loss", "t", "y").axes[0]
    assert len({line.get_marker() for line in axis.lines}) == 7
    assert len({str(line._unscaled_dash_pattern) for line in axis.lines}) == 7
    axis = plots.lines({name: ([0, 1], [i, i]) for i, name in enumerate(names)}, "t", "x", "y").axes[0]
    assert len({str(line._unscaled_dash_pattern) for line in axis.lines}) == 7


@pytest.mark.parametrize("vision", ["deuteranomaly", "protanomaly", "tritanomaly"])
def test_neighbouring_colours_stay_apart_for_colour_blind_readers(vision):
    """By CAM02-UCS distance at full severity, where about 1 is just noticeable; in grey, dash and marker tell."""
    space = {"name": "sRGB1+CVD", "cvd_type": vision, "severity": 100}
    seen = np.clip(cspace_convert(np.array(plots.PALETTE[:5]), space, "sRGB1"), 0, 1)
    assert deltaE(seen[:-1], seen[1:], input_space="sRGB1").min() > 15
    assert len(set(plots.MARKERS)) == len(set(plots.DASHES)) == 7
