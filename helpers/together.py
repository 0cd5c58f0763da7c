"""Several seeds of one recipe as one: the mean of what they predict, and one network with the mean of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from helpers import estimate, evaluate, runs
from helpers.augment import Augment, Settings
from helpers.model import Dropout
from helpers.recipe import Recipe
from helpers.runtime import CourseError, counted, generator, pick_device, shown
from helpers.train import training_data

FILE = "together.csv"  # beside the folders of the seeds


def mean_of_weights(models: Sequence[nn.Module], images: Tensor, augment: Augment) -> nn.Module:
    """One network with the mean of the weights of several of its shape (Wortsman et al. 2022, uniform soup).

    The means of their running statistics would fit no network, so these are counted anew on training images uint8
    [N, 3, H, W] as they are augmented (Izmailov et al. 2018, section 3.2), by the network that drops nothing.
    """
    averaged = AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    for module in averaged.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    draws = generator(0, device=images.device)
    update_bn((augment(batch, draws) for batch in images.split(500)), averaged)
    return averaged.module.eval()


def together(folder: str | Path, stand_in: bool = False) -> pd.DataFrame:
    """The seeds in a recipe's folder on the test set: each alone, then the two ways of making one of all.

    One row per network: network, accuracy with its Wilson interval low .. high, count; kept in together.csv. Nothing is
    chosen by it. Raises CourseError for fewer than two seeds with weights.
    """
    folder = Path(folder)
    found = runs.seeds(folder)
    found = estimate.siblings(found[0], found) if found else []
    if len(found) < 2:
        raise CourseError(
            f"{shown(folder)} has {counted(len(found), 'seed')} with weights, and it takes two to make a mean: train "
            "more with `python -m helpers train NAME --seeds 3 --root FOLDER`, where FOLDER/NAME is this folder."
        )
    recipe, test = Recipe.from_dict(found[0].record["recipe"]), evaluate.own_test(found[0], stand_in)
    models = [evaluate.load_model(run) for run in found]
    each = estimate.stack(models, test.images, recipe.precision)
    images = training_data(recipe, stand_in).train.images.to(pick_device())
    augment = Augment(recipe.stage, policy=recipe.policy, settings=Settings().scaled(recipe.strength))
    soup = mean_of_weights(models, images, augment)
    logits = {f"seed {run.record['recipe']['seed']}": one for run, one in zip(found, each, strict=True)}
    logits["mean of predictions"] = each.softmax(2).mean(0).log()
    logits["mean of weights"] = estimate.stack([soup], test.images, recipe.precision)[0]
    rows = [(name, *evaluate.accuracy(one, test.labels)) for name, one in logits.items()]
    runs.write_table(folder / FILE, pd.DataFrame(rows, columns=["network", "accuracy", "low", "high", "count"]))
    return pd.read_csv(folder / FILE)
