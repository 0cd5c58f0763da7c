"""A distorted image above what a network says of it: sliders in JupyterLab, one figure everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from helpers import plots
from helpers.augment import Augment
from helpers.data import CLASSES
from helpers.distort import KINDS, SEVERITIES, checked, distort
from helpers.evaluate import predict
from helpers.runtime import CourseError


def explore(
    model: nn.Module, images: Tensor, labels: Tensor, kind: str = KINDS[0], interactive: bool = False
) -> Any:
    """What a network trained on CIFAR-10 says of uint8 images [N, 3, 32, 32] with labels [N] while they are distorted.

    Without `interactive` a Figure of the first image: untouched and at severities 1, 3 and 5 of `kind`, the
    probability of each class below. With it an ipywidgets box, shown at once: the image, kind and severity are chosen,
    and the figure, the untouched image beside the distorted one, is drawn anew. The box is of use only where a kernel
    runs, so what is committed or exported should come from the figure. Raises CourseError for no images, another
    number of labels, or what `distort` refuses.
    """
    checked(images)
    if not 0 < len(images) == len(labels):
        raise CourseError(f"Got {len(images)} images and {len(labels)} labels: expected as many, and at least 1.")
    distort(images[:0], kind, 1)  # refuses another kind

    def view(image: int, kind: str, severities: Sequence[int]) -> Figure:
        clean = images[image : image + 1]
        pictures = torch.cat([clean, *(distort(clean, kind, severity) for severity in severities)])
        said = predict(model, pictures, Augment("none"), "float32").softmax(1).cpu()
        captions = ["as it is", *(f"severity {severity}" for severity in severities)]
        title = f"{CLASSES[int(labels[image])]}, {kind.replace('_', ' ')}: what the network says"
        return plots.answers(pictures, said, CLASSES, captions, title)

    if not interactive:
        return view(0, kind, (1, 3, 5))

    import ipywidgets
    from IPython.display import display

    def draw(image: int, kind: str, severity: int) -> Figure:
        figure = view(image, kind, (severity,))
        plt.close(figure)  # the box shows what is returned; a figure left open would be shown a second time
        return figure

    at_rest = {"continuous_update": False}  # one drawing a choice, not one for each value that a slider passes
    box = ipywidgets.interactive(
        draw, {"auto_display": True},
        image=ipywidgets.IntSlider(0, 0, len(images) - 1, **at_rest),
        kind=ipywidgets.Dropdown(options=[(name.replace("_", " "), name) for name in KINDS], value=kind),
        severity=ipywidgets.IntSlider(min(SEVERITIES), min(SEVERITIES), max(SEVERITIES), **at_rest),
    )  # fmt: skip
    display(box)
    return box
