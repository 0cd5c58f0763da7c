"""What several tests share: a small training set of drawn images, a tiny recipe for it, a finished run of the two."""

from contextlib import contextmanager

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from helpers import data, plots, recipe, train
from helpers.data import CIFAR10

TINY = recipe.Recipe(
    "tiny",
    blocks=(1, 1),
    width=8,
    reduction=2,
    stem_stride=2,  # a quarter of the work
    dropout=0.1,
    epochs=4,
    batch_size=40,
    learning_rate=0.1,
    warmup_epochs=1,
    stage="crop_flip",
    mixup_alpha=0.5,
    train_size=200,
    val_size=100,
    precision="float32",
)


@pytest.fixture
def tiny():
    """A recipe that trains in well under a second."""
    return TINY


@pytest.fixture(scope="session")
def stand_in():
    """200 drawn images to train on and 100 to validate on."""
    return data.split_train_val(data.draw_stand_in(300, seed=5), TINY.val_size, TINY.train_size)


@pytest.fixture(scope="session")
def finished_tiny(stand_in, tmp_path_factory):
    """The folder of a finished run of `tiny` on `stand_in`, by one thread. Read it; copy it before changing it."""
    path = tmp_path_factory.mktemp("finished") / "tiny" / "0"
    with _threads(1):
        train.fit(TINY, stand_in, path, device=torch.device("cpu"))
    return path


@pytest.fixture
def one_thread():
    """One thread for tiny networks: two on a busy machine wait for each other longer than they work."""
    with _threads(1):
        yield


@contextmanager
def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_cifar10(monkeypatch, tmp_path):
    """CIFAR-10 is nowhere to be found, so that what may fall back on the stand-in set does."""
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))


def pytest_collection_modifyitems(items):
    """nbval gives up on a cell after 5 silent seconds; and without CIFAR-10 notebook 01 runs on the stand-in set, whose
    numbers are not those committed.
    """
    for item in items:
        if hasattr(item, "cell"):
            item.output_timeout = 120
            if item.path.name.startswith("01") and data.source(stand_in=True) == data.STAND_IN:
                item.options["check"] = False


@pytest.fixture
def fresh_pyplot():
    """The course's style on a backend without a screen, and no figure left open."""
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    plt.close("all")  # another file's, which this process has tested before
    plots.start(CIFAR10)
    yield
    plt.close("all")
    plots.start(CIFAR10)
    matplotlib.use(backend)
