"""What test_train runs in processes of their own; apart from it, since each of them imports this module."""

import resource

import torch

from helpers import data, train
from helpers.runtime import CourseError


def fit(recipe, path, size_limit=None, checkpoint_seconds=0.03):
    """Train on the images that the fixture `stand_in` draws; what goes wrong is written into a file beside the run."""
    torch.set_num_threads(1)
    if size_limit is not None:  # a file that grows beyond it fails to be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
    images = data.split_train_val(data.draw_stand_in(300, seed=5), recipe.val_size, recipe.train_size)
    (path.parent / "began").touch()
    try:
        train.fit(recipe, images, path, device=torch.device("cpu"), checkpoint_seconds=checkpoint_seconds)
    except CourseError as error:
        (path.parent / "error").write_text(str(error))
