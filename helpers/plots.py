"""Data in, matplotlib Figure out. Never trains, never reads files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from seaborn.utils import relative_luminance
from torch import Tensor, nn

from helpers.data import BANNER, STAND_IN
from helpers.model import BasicBlock, count_parameters
from helpers.runtime import replacing

# Wong 2011 as seaborn orders it: told apart by readers with any common colour vision. Lines also differ in dash and
# marker, so that no meaning rests on colour alone.
PALETTE = sns.color_palette("colorblind")
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))
MARKERS = "osD^vPX"
GREY = "0.45"
SMALL = 9.6  # the smallest text: 8 points on a screen (96 pixels an inch) at the notebooks' 80, up to 10 inches wide

_stamp: str | None = None


def start(source: str) -> None:
    """Call once at the top of a notebook, with where its images come from: fonts and lines, the same everywhere.

    With the stand-in set it prints the banner, and every figure made from then on carries a stamp that says so.
    """
    global _stamp
    plt.rcdefaults()
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    plt.rcParams.update({
        "figure.dpi": 80, "savefig.dpi": 120, "figure.constrained_layout.use": True, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.titlesize": "medium", "font.family": "DejaVu Sans", "grid.color": "0.9",
        "axes.spines.top": False, "axes.spines.right": False, "image.interpolation": "nearest",
        "figure.max_open_warning": 0,  # figures/ alone has more than the 20 at which it warns
    })  # fmt: skip
    _stamp = None
    if source == STAND_IN:
        _stamp = "STAND-IN DATA, NOT CIFAR-10"
        print(BANNER)


def new(rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.2, **options: Any) -> tuple[Figure, Any]:
    """`plt.subplots` with a size in inches, stamped on the stand-in set; the one way to make a figure."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    if _stamp:
        outline = [withStroke(linewidth=3, foreground="white")]
        size = min(22, 3.2 * width)
        figure.text(0.5, 0.5, _stamp, ha="center", va="center", rotation=15, fontsize=size, alpha=0.7, weight="bold",
                    color="firebrick", path_effects=outline, zorder=100)  # fmt: skip
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whose bytes depend on the picture alone (no date, no version), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------- images


def images(
    rows: Sequence[Tensor], row_labels: Sequence[str] = (), column_labels: Sequence[str] = (), scale: float = 0.8,
    title: str = "",
) -> Figure:  # fmt: skip
    """A grid of pictures: each row a tensor [N, 3, H, W], uint8 or float in [0, 1]; names for rows and columns."""
    count = max(len(row) for row in rows)
    label_width = 0.1 * max((len(label) for label in row_labels), default=0)
    height = len(rows) * scale + 0.25 * bool(column_labels) + 0.3 * bool(title)
    longest = max((len(line) for label in column_labels for line in label.split("\n")), default=0)
    figure, axes = new(len(rows), count, count * max(scale, 0.078 * longest) + label_width, height, squeeze=False)
    _head(figure, title)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
            if j < len(row):
                axis.imshow(row[j].permute(1, 2, 0).cpu().numpy())
            if i == 0 and j < len(column_labels):
                axis.set_title(column_labels[j], loc="center", fontsize=SMALL, weight="normal")
        if i < len(row_labels):
            axes[i][0].set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=SMALL)
    return figure


def pairs(
    first: Tensor, second: Tensor, captions: Sequence[str] = (), scale: float = 0.62, title: str = ""
) -> Figure:
    """Pictures two by two: first[i] beside second[i], both uint8 [N, 3, H, W], with a caption above each pair."""
    columns = 6
    rows = -(-len(first) // columns)
    height = rows * (scale + 0.25 * bool(captions)) + 0.3 * bool(title)
    figure, axes = new(rows, columns, columns * scale * 2.2, height, squeeze=False)
    _head(figure, title)
    gap = torch.full((*first.shape[:3], 2), 255, dtype=torch.uint8, device=first.device)
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(first):
            axis.imshow(torch.cat((first[i], gap[i], second[i]), 2).permute(1, 2, 0).cpu().numpy())
        if i < len(captions):
            axis.set_title(captions[i], loc="center", fontsize=SMALL, weight="normal", pad=2)
    return figure


def answers(
    pictures: Tensor, probabilities: Tensor, classes: Sequence[str], captions: Sequence[str], title: str = ""
) -> Figure:
    """Pictures uint8 [N, 3, H, W] in a row with what a network says of each below: probabilities [N, classes] as bars.

    The likeliest class stands above its picture; its bar has another colour and a hatch.
    """
    figure, axes = new(2, len(pictures), 1.75 * len(pictures) + 0.9, 3.9, height_ratios=(1, 1.25), squeeze=False)
    _head(figure, title)
    y = np.arange(len(classes))[::-1]
    for i, (said, caption) in enumerate(zip(100 * probabilities.double().cpu().numpy(), captions, strict=True)):
        top, picture, axis = int(said.argmax()), axes[0][i], axes[1][i]
        picture.imshow(pictures[i].permute(1, 2, 0).cpu().numpy())
        picture.axis("off")
        picture.set_title(
            f"{caption}\n{classes[top]}, {said[top]:.0f} %", loc="center", fontsize=SMALL, weight="normal"
        )
        bars = axis.barh(y, said, 0.75, color=PALETTE[0], alpha=0.6)
        bars[top].set(facecolor=PALETTE[1], alpha=1, hatch="///", edgecolor="white")
        axis.set(xlim=(0, 100), xticks=(0, 50, 100), yticks=y, yticklabels=classes if i == 0 else [])
        axis.tick_params(labelsize=SMALL)
        axis.grid(axis="y", visible=False)
    figure.supxlabel("probability, %", fontsize=SMALL)
    return figure


def _head(figure: Figure, title: str) -> None:
    """A title over all panels, like those of single ones; none for ''."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", weight="bold")


def overlays(
    pictures: Tensor, maps: Mapping[str, Any], captions: Sequence[str] = (), scale: float = 0.9, title: str = ""
) -> Figure:
    """Pictures uint8 [N, 3, H, W] in a row, and below it a row for each named map [N, H, W], values in [0, 1].

    A map lies in colours over its picture in grey: black is 0, bright is 1.
    """
    grey = pictures.cpu().float().mean(1, keepdim=True) / 255
    rows = [pictures]
    for values in maps.values():
        colours = torch.from_numpy(plt.get_cmap("magma")(np.asarray(values))[..., :3]).permute(0, 3, 1, 2)
        rows.append(((2 * grey + 3 * colours) / 5).float())
    return images(rows, ["picture", *maps], captions, scale, title)


def channel_histograms(images: Tensor) -> Figure:
    """How often each of the 256 levels occurs in each channel of uint8 [N, 3, H, W]."""
    figure, axis = new(height=2.8)
    for c, (name, colour) in enumerate(
        zip(("red", "green", "blue"), (PALETTE[3], PALETTE[2], PALETTE[0]), strict=True)
    ):
        counts = torch.bincount(images[:, c].flatten(), minlength=256).numpy()
        axis.plot(counts / counts.sum() * 100, label=name, color=colour, linestyle=DASHES[c], linewidth=1.3)
    axis.set(xlabel="level (0 black, 255 full)", ylabel="share of pixels, %", xlim=(0, 255), ylim=(0, None))
    axis.legend(frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- architecture


def walk(model: nn.Module, size: int = 32) -> pd.DataFrame:
    """What an image meets on its way through SEResNet, read off the module itself by running one through it.

    One row a part (the stem, each block, pool, dropout, fc), in order of execution: name, kind, output shape
    [C, H, W], stride, parameters, and whether the skip connection projects.
    """
    rows: list[dict[str, Any]] = []
    parts = {model.stem, model.pool, model.dropout, model.fc, *(block for stage in model.stages for block in stage)}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            conv = module.conv1 if isinstance(module, BasicBlock) else module[0] if name == "stem" else None
            rows.append({
                "name": name, "kind": type(module).__name__ if name != "stem" else "Stem",
                "shape": tuple(output.shape[1:]), "stride": conv.stride[0] if conv else 1,
                "parameters": count_parameters(module),
                "projects": isinstance(module, BasicBlock) and not isinstance(module.downsample, nn.Identity),
            })  # fmt: skip

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if module in parts]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(rows)


def architecture(model: nn.Module) -> Figure:
    """Figure 1 of the paper, drawn from the module: every block with its output shape and parameters, skips beside."""
    parts = walk(model)
    groups: list[tuple[str, pd.DataFrame]] = [("stem", parts[parts.name == "stem"])]
    groups += [(f"stage {i + 1}", parts[parts.name.str.startswith(f"stages.{i}.")]) for i in range(len(model.stages))]
    groups.append(("head", parts[parts.name.isin(["pool", "dropout", "fc"])]))
    deepest = max(len(rows) for _, rows in groups)
    figure, axis = new(width=1.66 * len(groups), height=0.9 * deepest + 1.7)
    axis.set(xlim=(-0.5, len(groups) - 0.5), ylim=(-deepest + 0.5, 1.7))
    axis.axis("off")
    colours = ["0.9", *sns.light_palette(PALETTE[0], 2 * len(groups))[1 : len(groups) - 1], "0.9"]
    arrow = {"arrowstyle": "-|>", "color": "0.3", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    for x, (title, rows) in enumerate(groups):
        shape = "×".join(map(str, rows.iloc[0]["shape"])) if title != "head" else f"{rows.iloc[-1]['shape'][0]} classes"
        axis.text(x, 1.57, title, ha="center", va="center", weight="bold", fontsize=11)
        count = f"{shape}\n{rows.parameters.sum():,}\nparameters"  # one line would run into the next column's
        axis.text(x, 1.05, count, ha="center", va="center", fontsize=SMALL)
        for y, row in enumerate(rows.itertuples()):
            box = (x - 0.37, -y - 0.3), 0.74, 0.6
            style = "round,pad=0,rounding_size=0.06"
            axis.add_patch(FancyBboxPatch(*box, boxstyle=style, facecolor=colours[x], edgecolor="0.3", linewidth=0.8))
            text = _describe(model.get_submodule(row.name), row)
            axis.text(x, -y, text, ha="center", va="center", fontsize=SMALL, linespacing=1.2)
            if row.kind == "BasicBlock":
                skip = {**arrow, "color": PALETTE[3], "linestyle": "--" if row.projects else "-"}
                bend = "arc3,rad=0.8"
                ends = (x - 0.36, 0.24 - y), (x - 0.36, -0.24 - y)
                axis.add_patch(FancyArrowPatch(*ends, mutation_scale=6, connectionstyle=bend, **skip))
            if y:
                axis.add_patch(FancyArrowPatch((x, 0.7 - y), (x, 0.3 - y), mutation_scale=7, **arrow))
        if x:  # from the last block of the column before, up between the columns, into the first block of this one
            last = 1 - len(groups[x - 1][1])
            axis.plot([x - 0.64, x - 0.55, x - 0.55, x], [last, last, 0.6, 0.6], color="0.3", linewidth=0.9)
            axis.add_patch(FancyArrowPatch((x, 0.6), (x, 0.3), mutation_scale=7, **arrow))
    note = f"{count_parameters(model):,} parameters. Curved arrows are skip connections, dashed with a 1×1 convolution."
    axis.set_title(note, y=0, pad=-6, fontsize=SMALL, weight="normal", va="top")
    return figure


def _describe(module: nn.Module, row: Any) -> str:
    """The lines in a box, from the module's own settings."""
    if isinstance(module, BasicBlock):
        kernel, squeeze = "×".join(map(str, module.conv1.kernel_size)), getattr(module.se, "fc1", None)
        step = f" /{module.conv1.stride[0]}" if module.conv1.stride[0] > 1 else ""
        gates = f"SE {squeeze.in_features}→{squeeze.out_features}→{squeeze.in_features}" if squeeze else "no SE"
        return f"{kernel} conv {module.conv1.out_channels}{step}\n{kernel} conv {module.conv2.out_channels}\n{gates}"
    if isinstance(module, nn.Sequential):
        step = f" /{module[0].stride[0]}" if module[0].stride[0] > 1 else ""
        return f"{'×'.join(map(str, module[0].kernel_size))} conv {module[0].out_channels}{step}\nbatch norm\nReLU"
    if isinstance(module, nn.Linear):
        return f"linear\n{module.in_features}→{module.out_features}"
    if isinstance(module, nn.Dropout):
        return f"dropout {module.p:g}"
    return f"average pool\nto {'×'.join(map(str, row.shape[1:]))}"


def excitations(gates: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Mean gate of a channel for each class, one panel per SE block; at most 40 channels, those that differ most first.

    gates: name -> [images, channels] in [0, 1]; labels int64 [images]. A class without images has no row.
    """
    present = labels.unique().tolist()
    figure, axes = new(1, len(gates), width=8.8, height=0.22 * len(present) + 1.3, squeeze=False)
    _head(figure, title)
    for at, (axis, (name, values)) in enumerate(zip(axes[0], gates.items(), strict=True), 1):
        means = np.stack([values[labels == c].mean(0).cpu().numpy() for c in present])
        order = means.std(0).argsort()[::-1][:40]
        sns.heatmap(means[:, order], ax=axis, cmap="cividis", vmin=0, vmax=1, xticklabels=False, cbar=at == len(gates),
                    yticklabels=[classes[c] for c in present] if at == 1 else False,
                    cbar_kws={"label": "gate"})  # fmt: skip
        axis.set(xlabel=f"{len(order)} of {means.shape[1]} channels", title=name)
        axis.tick_params(axis="y", rotation=0)
    return figure


# -------------------------------------------------------------------------------------------------- runs over time


def curves(
    histories: Mapping[str, Sequence[pd.DataFrame]], column: str, title: str, ylabel: str, percent: bool = True,
    reference: float | None = None, reference_label: str = "paper, final", steps_per_epoch: int | None = None,
) -> Figure:  # fmt: skip
    """One line a name over epochs (or optimiser steps): the mean of its runs, with a band from lowest to highest.

    histories: name -> histories of the same recipe with different seeds. `reference` is drawn as a dotted level.
    """
    figure, axis = new(height=3.2)
    for i, (name, runs) in enumerate(histories.items()):
        values = np.stack([history[column].to_numpy() for history in runs]) * (100 if percent else 1)
        x = runs[0]["epoch"].to_numpy() * (steps_per_epoch or 1)
        axis.plot(x, values.mean(0), linestyle=DASHES[i % 7], marker=MARKERS[i % 7], markevery=max(1, len(x) // 12),
                  markersize=4, color=PALETTE[i % 10], label=name, linewidth=1.6)  # fmt: skip
        if len(runs) > 1:
            axis.fill_between(x, values.min(0), values.max(0), color=PALETTE[i % 10], alpha=0.2, linewidth=0)
    if reference is not None:
        level = reference * (100 if percent else 1)
        axis.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
        axis.annotate(f"{reference_label} {level:.2f}", (0, level), xycoords=("axes fraction", "data"), xytext=(4, -4),
                      textcoords="offset points", va="top", color="0.3", fontsize=SMALL)  # fmt: skip
    axis.set(title=title, ylabel=ylabel, xlabel="optimiser steps" if steps_per_epoch else "epoch")
    if not steps_per_epoch:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return figure


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, xlabel: str, ylabel: str
) -> Figure:
    """Named (x, y) series in one panel, told apart by colour and dash; several are named below it, over no line."""
    columns = 4 if sum(map(len, series)) < 70 else 2  # of the legend
    figure, axis = new(height=3.0 + 0.22 * -(-len(series) // columns))
    for i, (name, (x, y)) in enumerate(series.items()):
        axis.plot(x, y, linestyle=DASHES[i % 7], color=PALETTE[i % 10], label=name, linewidth=1.6)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(series) > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=columns)
    return figure


# ------------------------------------------------------------------------------------------------------ comparisons


def intervals(frame: pd.DataFrame, title: str, xlabel: str = "test accuracy, %") -> Figure:
    """A dot with its interval for each row: columns label, value, low, high, all but the label in [0, 1]."""
    figure, axis = new(height=0.34 * len(frame) + 1.0)
    _dots(axis, frame, xlabel)
    axis.set_title(title)
    return figure


def interval_panels(frames: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """`intervals` side by side, one panel per name (its label below) and the same rows in each; NaN leaves a row empty.
    """
    rows = len(next(iter(frames.values())))
    figure, axes = new(1, len(frames), width=8.8, height=0.34 * rows + 1.3, sharey=True, squeeze=False)
    _head(figure, title)
    for i, (axis, (xlabel, frame)) in enumerate(zip(axes[0], frames.items(), strict=True)):
        _dots(axis, frame, xlabel, i)
        axis.margins(x=0.15)
    return figure


def _dots(axis: Any, frame: pd.DataFrame, xlabel: str, style: int = 0) -> None:
    places, have = np.arange(len(frame))[::-1], frame["value"].notna().to_numpy()
    y, part = places[have], 100 * frame.loc[have, ["value", "low", "high"]].astype(float)
    value, low, high = part["value"].to_numpy(), part["low"].to_numpy(), part["high"].to_numpy()
    axis.errorbar(value, y, xerr=[value - low, high - value], fmt=MARKERS[style % 7], color=PALETTE[style % 10],
                  capsize=3, linewidth=1.4)  # fmt: skip
    for at, level, upper in zip(y, value, part["high"].fillna(part["value"]), strict=True):
        axis.annotate(
            f"{level:.1f}", (upper, at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    axis.set(xlabel=xlabel, yticks=places, ylim=(-0.7, len(frame) - 0.3))
    axis.set_yticklabels(list(frame["label"]))
    axis.margins(x=0.1)


def trends(panels: Mapping[str, Mapping[str, pd.DataFrame]], title: str, xlabel: str) -> Figure:
    """Panels side by side, their labels to the left: one line per name over values that double, with intervals.

    panels: label -> name -> columns x, value, low, high; all but x in [0, 1], NaN ends leave a point without a bar.
    """
    figure, axes = new(1, len(panels), width=8.8, height=3.4, squeeze=False)
    _head(figure, title)
    for axis, (ylabel, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (name, frame) in enumerate(lines.items()):
            x, level = frame["x"].to_numpy(), 100 * frame[["value", "low", "high"]].to_numpy(float).T
            axis.errorbar(x, level[0], yerr=[level[0] - level[1], level[2] - level[0]], capsize=3, linewidth=1.4,
                          label=name, linestyle=DASHES[i % 7], marker=MARKERS[i % 7], color=PALETTE[i % 10]
                          )  # fmt: skip
        places = sorted({x for frame in lines.values() for x in frame["x"]})
        axis.set_xscale("log", base=2)
        axis.set(xlabel=xlabel, ylabel=ylabel, xticks=places, xticklabels=map(str, places))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def forest(frame: pd.DataFrame, title: str) -> Figure:
    """Differences with their intervals, as `helpers.shift.shift` gives them: one row per measure, a dotted line at
    none.

    Filled circles where the interval lies to one side of 0, open ones where it does not. The axis is linear up to one
    spread and logarithmic beyond, so that small and large differences fit in one picture.
    """
    frame = frame.dropna(subset=["difference", "low", "high"])
    figure, axis = new(height=0.27 * len(frame) + 1.2)
    y, value = np.arange(len(frame))[::-1], frame["difference"].to_numpy()
    sure = ((frame["low"] > 0) | (frame["high"] < 0)).to_numpy()
    bars = [(value - frame["low"]).clip(lower=0), (frame["high"] - value).clip(lower=0)]
    axis.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
    axis.errorbar(value, y, xerr=bars, fmt="none", color=PALETTE[0], capsize=3, linewidth=1.4)
    for which, fill in ((sure, PALETTE[0]), (~sure, "white")):
        axis.plot(value[which], y[which], "o", color=PALETTE[0], markerfacecolor=fill, markersize=6)
    axis.margins(x=0.1)
    label = "difference of the means, in the reference's standard deviations"
    if frame[["low", "high"]].abs().max(axis=None) > 3:  # one far away would leave the others no room
        label += " (logarithmic beyond 1)"
        axis.set_xscale("symlog", linthresh=1)
        ticks = [-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100]
        axis.set_xticks([tick for tick in ticks if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(title=title, xlabel=label, yticks=y, ylim=(-0.7, len(frame) - 0.3))
    axis.set_yticklabels([str(name).replace("_", " ") for name in frame.index])
    return figure


def spectra(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Radial power spectra, as `helpers.shift.spectrum` gives them, with bands for their intervals.

    Left the power, right its ratio to the first set's, where a change shows that no eye finds left.
    """
    figure, axes = new(1, 2, width=8.8, height=3.2)
    first = next(iter(tables.values()))["power"].to_numpy()
    for i, (name, table) in enumerate(tables.items()):
        style = {"color": PALETTE[i % 10], "linestyle": DASHES[i % 7], "marker": MARKERS[i % 7], "markersize": 4}
        for axis, unit in zip(axes, (1.0, first), strict=True):
            axis.plot(table["frequency"], table["power"] / unit, label=name, linewidth=1.6, **style)
            # Strong enough that a palette of few colours, as notebooks store pictures, keeps the bands apart.
            axis.fill_between(table["frequency"], table["low"] / unit, table["high"] / unit, color=style["color"],
                              alpha=0.4, linewidth=0)  # fmt: skip
    axes[0].set(title=title, yscale="log", xlabel="cycles a pixel", ylabel="power")
    axes[1].set(title=f"relative to {next(iter(tables))}", yscale="log", xlabel="cycles a pixel", ylabel="ratio")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # few decades: 0.7, 1, 1.5, no powers of ten
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("")
    axes[0].legend(frameon=False)
    return figure


def shares(frame: pd.DataFrame, title: str) -> Figure:
    """Shares in per cent with their intervals, as `KindFinder.shares` of helpers.shift gives them, the largest on top.

    Crosses mark a column `true`, where the frame has one.
    """
    frame = frame.sort_values("share", ascending=False)
    figure, axis = new(height=0.27 * len(frame) + 1.2)
    y, value = np.arange(len(frame))[::-1], 100 * frame["share"].to_numpy()
    axis.barh(y, value, 0.7, color=PALETTE[0], alpha=0.6, label="estimated")
    axis.errorbar(value, y, xerr=[value - 100 * frame["low"], 100 * frame["high"] - value], fmt="none", color="0.25",
                  capsize=3, linewidth=1.2)  # fmt: skip
    if "true" in frame:
        axis.plot(100 * frame["true"], y, "x", color=PALETTE[3], markersize=7, markeredgewidth=2, label="true",
                  clip_on=False, zorder=3)  # fmt: skip
        axis.legend(frameon=False, loc="lower right")
    axis.set(title=title, xlabel="share of the images, %", yticks=y, ylim=(-0.7, len(frame) - 0.3), xlim=(0, None))
    axis.set_yticklabels([str(name).replace("_", " ") for name in frame.index])
    axis.grid(axis="y", visible=False)
    return figure


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Rows the true class, columns the prediction, in per cent of the row; the diagonal is what went right."""
    matrix = np.asarray(counts, float)
    total = matrix.sum(1, keepdims=True)  # of a class that is not there 0: its row stays empty
    share = 100 * np.divide(matrix, total, out=np.full_like(matrix, np.nan), where=total > 0)
    figure, axis = new(width=6.6, height=4.8)
    sns.heatmap(share, annot=True, fmt=".0f", cmap=sns.color_palette("cividis", 10), vmin=0, vmax=100, square=True,
                xticklabels=list(classes), yticklabels=list(classes), annot_kws={"size": SMALL}, ax=axis,
                cbar_kws={"label": "%"})  # fmt: skip
    _readable(axis)
    axis.set(xlabel="predicted", ylabel="true")
    plt.setp(axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    return figure


def stacked(frame: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """A horizontal bar a row, its columns laid end to end and told apart by colour and hatch, with the total beside."""
    figure, axis = new(height=0.36 * len(frame) + 1.3)
    y, left = np.arange(len(frame))[::-1], np.zeros(len(frame))
    for i, name in enumerate(frame.columns):
        values = frame[name].to_numpy(float)
        axis.barh(y, values, left=left, color=PALETTE[i % 10], hatch=("", "///", "...", "xxx", "++")[i % 5], label=name,
                  edgecolor="white", linewidth=0.5, height=0.7)  # fmt: skip
        left += values
    for at, total in zip(y, left, strict=True):
        axis.annotate(
            f"{total:,.0f}", (total, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    axis.set(title=title, xlabel=xlabel, yticks=y, yticklabels=list(frame.index))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.margins(x=0.12)
    axis.legend(frameon=False)
    return figure


def heat(frame: pd.DataFrame, title: str, label: str, low: float = 0.0, high: float = 1.0, form: str = ".2f") -> Figure:
    """A table as a heat map with its numbers written in, rows and columns named as in the frame.

    low, high: the ends of the colour scale, in steps that survive a notebook's few colours; from below zero to above it
    is blue to red, white between them.
    """
    figure, axis = new(width=0.66 * frame.shape[1] + 2.4, height=0.26 * len(frame) + 1.1)
    colours = sns.color_palette("cividis", 10) if low >= 0 else sns.color_palette("RdBu_r", 11)
    sns.heatmap(frame, annot=True, fmt=form, cmap=colours, vmin=low, vmax=high, annot_kws={"size": SMALL}, ax=axis,
                linewidths=0.5, cbar_kws={"label": label})  # fmt: skip
    _readable(axis)
    axis.set(xlabel=frame.columns.name or "", ylabel=frame.index.name or "")
    axis.set_title(title, loc="left")
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    return figure


def _readable(axis: Any) -> None:
    """The numbers on a heat map in black or white, whichever stands out more from its cell (WCAG 2, contrast ratio)."""
    mesh, columns = axis.collections[0], round(axis.get_xlim()[1])
    for text in axis.texts:
        x, y = text.get_position()
        luminance = relative_luminance(mesh.get_facecolors()[int(y) * columns + int(x)])
        text.set_color("black" if luminance > 0.18 else "white")


def diagonal(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, xlabel: str, ylabel: str,
             join: bool = True) -> Figure:  # fmt: skip
    """Named (x, y) points in per cent against the line y = x, told apart by colour and marker; joined by lines or not.

    x and y in [0, 1]: confidence against accuracy (a reliability diagram), clean against distorted.
    """
    figure, axis = new(width=7.4, height=4.2)
    axis.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1.2)
    for i, (name, (x, y)) in enumerate(series.items()):
        axis.plot(100 * np.asarray(x), 100 * np.asarray(y), linestyle=DASHES[i % 7] if join else "",
                  marker=MARKERS[i % 7], color=PALETTE[i % 10], label=name, linewidth=1.4, markersize=5)  # fmt: skip
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.legend(frameon=False, loc="outside right upper")  # beside the panel, where no line runs through it
    return figure


def reliability(panels: Mapping[str, Mapping[str, Sequence[pd.DataFrame]]], title: str) -> Figure:
    """Confidence against accuracy, one panel per set of images, one line per name through the means over its runs.

    panels: set -> name -> tables of helpers.evaluate.reliability, one a run, their `bin` told by `low`. The band goes
    from the lowest to the highest run. Bins in which a run has fewer than 20 images are left out: they are noise.
    """
    figure, axes = new(1, len(panels), width=8.8, height=3.8, sharex=True, sharey=True, squeeze=False)
    _head(figure, title)
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        axis.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1.2)
        for i, (label, tables) in enumerate(lines.items()):
            bins = pd.concat(tables).groupby("low")
            spread = bins.agg(x=("confidence", "mean"), mean=("accuracy", "mean"), low=("accuracy", "min"),
                              high=("accuracy", "max"), fewest=("count", "min"), runs=("count", "size"))  # fmt: skip
            spread = 100 * spread[(spread.fewest >= 20) & (spread.runs == len(tables))]
            axis.plot(spread.x, spread["mean"], linestyle=DASHES[i % 7], marker=MARKERS[i % 7], color=PALETTE[i % 10],
                      label=label, linewidth=1.4, markersize=4)  # fmt: skip
            axis.fill_between(spread.x, spread.low, spread.high, color=PALETTE[i % 10], alpha=0.2, linewidth=0)
        axis.set(title=name, xlabel="confidence, %", xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes[0][0].set_ylabel("right, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(lines))
    return figure


def estimates(trials: pd.DataFrame, errors: pd.DataFrame, title: str) -> Figure:
    """Predicted against true accuracy on known distortions, one panel per method with its error and the line of equals.

    trials: columns kind, severity, method, predicted, true, the last two in [0, 1]; severities differ in colour and
    marker. A thin line leads to the farthest point from its kind, named in the corner, where points are rare.
    errors: one row per method, columns method, error, low, high.
    """
    figure, axes = new(1, len(errors), width=3.0 * len(errors), height=3.7, sharex=True, sharey=True, squeeze=False)
    values = 100 * trials[["true", "predicted"]].to_numpy()
    ends = max(values.min() - 4, 0), min(values.max() + 4, 100)
    for axis, row in zip(axes[0], errors.itertuples(), strict=True):
        part = trials[trials.method == row.method]
        axis.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1.2)
        for i, (severity, points) in enumerate(part.groupby("severity")):
            axis.plot(100 * points.true, 100 * points.predicted, linestyle="", marker=MARKERS[i % 7], markersize=5,
                      color=PALETTE[i % 10], alpha=0.8, label=f"severity {severity}")  # fmt: skip
        worst = part.loc[(part.predicted - part.true).abs().idxmax()]
        axis.annotate(worst.kind.replace("_", " "), (100 * worst.true, 100 * worst.predicted), xytext=(0.04, 0.96),
                      textcoords="axes fraction", va="top", fontsize=SMALL,
                      arrowprops={"arrowstyle": "-", "color": GREY, "relpos": (0.3, 0), "shrinkB": 4})  # fmt: skip
        axis.set(title=f"{row.method}: {100 * row.error:.1f} points off\n[{100 * row.low:.1f}, {100 * row.high:.1f}]",
                 xlabel="true accuracy, %", xlim=ends, ylim=ends)  # fmt: skip
    axes[0][0].set_ylabel("predicted without labels, %")
    _head(figure, title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return figure


def bars(frame: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """Horizontal bars side by side: one group per row, one bar per column, told apart by colour and hatch."""
    columns = frame.shape[1] if sum(map(len, frame.columns)) < 80 else 1  # of the legend
    figure, axis = new(height=0.3 * len(frame) + 1.1 + 0.2 * frame.shape[1] / columns)
    y, thick = np.arange(len(frame))[::-1], 0.8 / frame.shape[1]
    for i, name in enumerate(frame.columns):
        axis.barh(y + (frame.shape[1] - 1 - 2 * i) * thick / 2, frame[name].to_numpy(float), thick, label=name,
                  color=PALETTE[i % 10], hatch=("", "///", "...", "xxx")[i % 4], edgecolor="white",
                  linewidth=0.5)  # fmt: skip
    axis.set(title=title, xlabel=xlabel, yticks=y, yticklabels=list(frame.index), ylim=(-0.6, len(frame) - 0.4))
    axis.grid(axis="y", visible=False)
    figure.legend(frameon=False, loc="outside lower center", ncols=columns)
    return figure


def histograms(
    panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, bins: Sequence[float],
    densities: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None, top: float | None = None,
) -> Figure:  # fmt: skip
    """One panel per name side by side, each with outlined histograms of its named samples, as densities over `bins`.

    densities: panel -> (x, y) of a curve drawn over it. top: where the vertical axis ends, for densities without bound.
    """
    figure, axes = new(1, len(panels), width=8.8, height=2.5, sharey=True, squeeze=False)
    for axis, (title, samples) in zip(axes[0], panels.items(), strict=True):
        for i, (name, values) in enumerate(samples.items()):
            axis.hist(np.asarray(values), bins=bins, density=True, histtype="stepfilled", alpha=0.35, label=name,
                      color=PALETTE[i % 10], edgecolor=PALETTE[i % 10], linestyle=DASHES[i % 2])  # fmt: skip
        if densities:
            axis.plot(*densities[title], color=PALETTE[3], linewidth=1.5, label="closed form")
        axis.set(title=title, xlabel=xlabel, ylim=(0, top))
    axes[0][0].set_ylabel("density")
    if densities or len(samples) > 1:
        axes[0][-1].legend(frameon=False, fontsize=SMALL)
    return figure


def fields(
    maps: Mapping[str, Sequence[Sequence[float]]], points: Tensor, labels: Tensor, extent: Sequence[float], label: str
) -> Figure:
    """Maps [H, W] over the plane side by side, values in [0, 1], NaN where there is none, and two classes of points.

    The line is at one half, the dashed ones are at 10 and 90 %. extent: left, right, bottom, top; row 0 of a map is at
    the bottom. The classes differ in colour and marker.
    """
    figure, axes = new(1, len(maps), width=8.8, height=3.2, sharey=True, squeeze=False)
    for axis, (title, values) in zip(axes[0], maps.items(), strict=True):
        picture = axis.imshow(values, extent=extent, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto",
                              interpolation="bilinear")  # fmt: skip
        axis.contour(values, levels=[0.1, 0.5, 0.9], extent=extent, origin="lower", colors="white",
                     linewidths=[0.8, 1.8, 0.8], linestyles=["--", "-", "--"])  # fmt: skip
        for c, (marker, colour) in enumerate((("o", "white"), ("^", "black"))):
            x, y = points[labels == c].T.cpu().numpy()
            axis.scatter(x, y, s=12, marker=marker, c=colour, edgecolors="0.3", linewidths=0.4)
        axis.set(title=title)
        axis.grid(visible=False)
    figure.colorbar(picture, ax=axes[0], label=label)
    return figure
