"""CIFAR-10 on disk, its faults, the splits and the stand-in set."""

import hashlib
import os
import pickle
import shutil
import tarfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from helpers import augment, data
from helpers.runtime import ROOT, CourseError

needs_cifar = pytest.mark.skipif(
    not (data.data_root() / "cifar-10-batches-py").exists(), reason="CIFAR-10 is not here: set CIFAR10_ROOT"
)


@pytest.fixture(scope="module")
def cifar_copy(tmp_path_factory):
    """A folder with CIFAR-10 as links, so that a test can damage one file without copying 186 MB."""
    folder = tmp_path_factory.mktemp("root") / "cifar-10-batches-py"
    folder.mkdir()
    for file in (data.data_root() / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder.parent


def replace_file(root, name, content: bytes | None):
    """Put other bytes, or nothing, in a file's place."""
    path = root / "cifar-10-batches-py" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_the_md5s_are_torchvisions():
    from torchvision.datasets import CIFAR10

    assert {split: [list(file) for file in files] for split, files in data.FILES.items()} == {
        "train": CIFAR10.train_list, "test": CIFAR10.test_list}  # fmt: skip


@needs_cifar
@pytest.mark.parametrize(("split", "count"), [("train", 50_000), ("test", 10_000)])
def test_load_equals_torchvision(split, count):
    from torchvision.datasets import CIFAR10

    images, labels = data.load_cifar10(split)
    reference = CIFAR10(data.data_root(), train=split == "train")
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), reference.data)
    assert labels.tolist() == reference.targets
    assert tuple(reference.classes) == data.CLASSES


@needs_cifar
def test_the_mean_and_std_of_cifar10_are_those_of_its_training_images():
    from torchvision.datasets import CIFAR10

    levels, pixels = np.arange(256) / 255, CIFAR10(data.data_root(), train=True).data.reshape(-1, 3)
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T], 1) / len(pixels)
    expected = levels @ counts, np.sqrt(levels**2 @ counts - (levels @ counts) ** 2)
    computed = augment.channel_stats(data.load_cifar10("train")[0])
    for theirs, ours, stated in zip(expected, computed, (augment.CIFAR10_MEAN, augment.CIFAR10_STD), strict=True):
        assert ours == pytest.approx(theirs) and stated == pytest.approx(theirs, abs=5e-5)


@needs_cifar
def test_damaged_files_are_named(cifar_copy, monkeypatch, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(cifar_copy, root, symlinks=True)
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    original = (root / "cifar-10-batches-py" / "test_batch").read_bytes()
    for content in (original[:-1], original[: len(original) // 2], b"", original[:-1] + b"?"):
        replace_file(root, "test_batch", content)
        with pytest.raises(CourseError, match=r"test_batch is damaged .*MD5 differs"):
            data.load_cifar10("test")
    replace_file(root, "test_batch", None)
    with pytest.raises(CourseError, match=r"test_batch is missing"):
        data.load_cifar10("test")
    with pytest.raises(CourseError, match="test_batch"):  # present but not whole: a download must not hide it
        data.fetch()
    assert len(data.load_cifar10("train")[1]) == 50_000, "the other half is whole and still loads"


def test_an_altered_pickle_is_never_run(tmp_path):
    """The MD5 is checked before a byte is unpickled."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CourseError, match="damaged"):
        data.load_cifar10("test", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_missing_folder_says_where_to_put_the_files(tmp_path):
    with pytest.raises(CourseError, match=r"is not in .*cifar-10-batches-py.*helpers fetch.*CIFAR10_ROOT"):
        data.load_cifar10("train", tmp_path)
    with pytest.raises(CourseError, match="no split 'validation'"):
        data.load_cifar10("validation", tmp_path)


def test_root_comes_from_argument_then_environment_then_project(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_ROOT", "../elsewhere")
    assert data.data_root() == ROOT / "../elsewhere"
    assert data.data_root(tmp_path) == tmp_path
    monkeypatch.delenv("CIFAR10_ROOT")
    assert data.data_root() == ROOT / "data"


def test_failed_download_leaves_nothing(monkeypatch, tmp_path):
    """No network: the address is one where nothing listens."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    with pytest.raises(CourseError, match="could not be downloaded"):
        data.fetch()
    assert list(tmp_path.iterdir()) == []


def test_of_two_downloads_at_once_both_find_the_set(monkeypatch, tmp_path):
    from torchvision.datasets import CIFAR10

    def download(self, folder, **options):
        for each in (folder, tmp_path):  # ours, and that of a process that has just come first
            (each / "cifar-10-batches-py").mkdir()
            (each / "cifar-10-batches-py" / "test_batch").touch()

    monkeypatch.setattr(CIFAR10, "__init__", download)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert data.fetch() == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


@pytest.fixture
def server(tmp_path):
    """A web server on the loopback address, for the folder tmp_path/served."""
    (tmp_path / "served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@needs_cifar
def test_download_is_checked_then_renamed(monkeypatch, tmp_path, server):
    """A real archive over HTTP: torchvision downloads, checks and unpacks it; then it is there."""
    from torchvision.datasets import CIFAR10

    archive = tmp_path / "served" / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        tar.add(data.data_root() / "cifar-10-batches-py", arcname="cifar-10-batches-py", filter=_writable)
    monkeypatch.setattr(CIFAR10, "url", f"{server}/cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    root, expected = tmp_path / "root", data.load_cifar10("test")[0]
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    assert data.fetch() == root
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    assert torch.equal(data.load_cifar10("test")[0], expected)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/never-asked")
    assert data.fetch() == root

    monkeypatch.setattr(CIFAR10, "url", f"{server}/cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)  # a broken archive
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "an" / "other"))
    with pytest.raises(CourseError, match="could not be downloaded"):
        data.fetch()
    assert not (tmp_path / "an").exists(), "a folder made in vain does not stay"


def _writable(info):
    info.mode |= 0o600 if info.isfile() else 0o700
    return info


def test_unwritable_folder_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be; permissions do not bind root")
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "file" / "root"))
    with pytest.raises(CourseError, match=r"Cannot write to .*CIFAR10_ROOT"):
        data.fetch()


# --------------------------------------------------------------------------------------------------------- splits


def fake_set(count=1_000, seed=0):
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % 10))
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 32, 32) % 251
    return data.ImageSet(images.to(torch.uint8), labels)


def test_split_is_stratified_disjoint_and_seeded():
    full = fake_set()
    marked = full._replace(images=torch.arange(1_000).view(-1, 1, 1, 1))  # images that know their own index
    first, again, other = (data.split_train_val(marked, 200, 500, seed) for seed in (0, 0, 1))
    for part, share in ((first.train, 50), (first.val, 20)):
        assert set(Counter(part.labels.tolist()).values()) == {share}
        assert torch.equal(full.labels[part.images.flatten()], part.labels)
    assert not set(first.train.images.flatten().tolist()) & set(first.val.images.flatten().tolist())
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_smaller_training_part_keeps_the_validation_images():
    full = fake_set()._replace(images=torch.arange(1_000).view(-1, 1, 1, 1))
    small, large = data.split_train_val(full, 200, 100), data.split_train_val(full, 200)
    assert torch.equal(small.val.images, large.val.images)
    assert set(small.train.images.flatten().tolist()) < set(large.train.images.flatten().tolist())


def test_the_split_is_scikit_learns_in_two_steps_of_one_seed():
    full = fake_set()._replace(images=torch.arange(1_000).view(-1, 1, 1, 1))
    rest, val = train_test_split(np.arange(1_000), test_size=200, stratify=full.labels, random_state=3)
    train = train_test_split(rest, train_size=100, stratify=full.labels[rest], random_state=3)[0]
    ours = data.split_train_val(full, 200, 100, 3)
    assert ours.train.images.flatten().tolist() == sorted(train)
    assert ours.val.images.flatten().tolist() == sorted(val)


@pytest.mark.parametrize(
    ("val", "train"),
    [(0, 100), (1_000, None), (500, 501), (5, 100), (100, 5), (-1, 10), (500, 499), (500, 491)],
)
def test_impossible_splits_are_refused(val, train):
    with pytest.raises(CourseError, match="Cannot split"):
        data.split_train_val(fake_set(), val, train)


@pytest.mark.parametrize(("labels", "got"), [
    (torch.arange(1_000) % 10 + 1, "1,000, int64 from 1 to 10"), (torch.arange(900) % 10, "900, int64 from 0 to 9"),
    (torch.arange(1_000) % 10 - 1, "1,000, int64 from -1 to 8"), (torch.arange(1_000).int() % 10, "int32 from 0 to 9"),
])  # fmt: skip
def test_labels_that_do_not_fit_the_images_are_refused(labels, got):
    with pytest.raises(CourseError, match=f"1,000 images need as many labels, int64 from 0 to 9, but got .*{got}"):
        data.split_train_val(fake_set()._replace(labels=labels), 100)


def test_a_split_that_leaves_a_class_out_is_refused():
    few = fake_set().take(torch.arange(25))
    with pytest.raises(CourseError, match="Cannot split 25 images by class with seed 0: "):
        data.split_train_val(few, 10)
    with pytest.raises(CourseError, match=r"with seed -1: .*random_state"):
        data.split_train_val(fake_set(), 200, seed=-1)


def test_a_home_that_nobody_has_is_said(monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", "~nobody-of-this-name/data")
    for find in (data.data_root, lambda: data.load_shifted("~nobody-of-this-name/fog.npy")):
        with pytest.raises(CourseError, match=r"~nobody-of-this-name/.* begins with the home of a user who"):
            find()


@needs_cifar
def test_cifar_split_is_45_000_and_5_000_in_equal_shares():
    parts = data.split_train_val(data.load_set("train"))
    assert torch.bincount(parts.train.labels).tolist() == [4_500] * 10
    assert torch.bincount(parts.val.labels).tolist() == [500] * 10
    assert parts.source == "CIFAR-10"


# ------------------------------------------------------------------------------------------------ the stand-in set


def test_stand_in_only_where_allowed_and_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert data.load_set("train", stand_in=True).source == "stand-in"
    with pytest.raises(CourseError, match="is not in"):
        data.load_set("train")
    (tmp_path / "cifar-10-batches-py").mkdir()  # half of CIFAR-10 is a fault to report, not a reason to go on without
    with pytest.raises(CourseError, match="missing"):
        data.load_set("train", stand_in=True)


def test_stand_in_is_seeded_balanced_and_learnable():
    train, again, test = (data.draw_stand_in(*key) for key in ((600, 0), (600, 0), (300, 1)))
    assert torch.equal(train.images, again.images) and not torch.equal(train.images[:300], test.images)
    assert torch.bincount(train.labels).tolist() == [60] * 10
    assert train.images.dtype == torch.uint8 and train.images.shape == (600, 3, 32, 32)
    # A linear model on the power spectrum tells the classes apart, one on the mean colour does not.
    spectrum = lambda images: torch.fft.rfft2(images.float().mean(1)).abs().log1p().flatten(1).numpy()  # noqa: E731
    classify = lambda describe: LogisticRegression(max_iter=300).fit(describe(train.images), train.labels).score(  # noqa: E731
        describe(test.images), test.labels)  # fmt: skip
    steps = train.images.int().diff(dim=3).abs()
    assert (steps > 200).float().mean() < 0.01, "noise ends at black and white, and does not begin again at the other"
    score, colours = classify(spectrum), classify(lambda images: images.float().mean((2, 3)).numpy())
    assert score > 0.7 and colours < 0.2


def test_drawn_scenes_are_seeded_pictures_with_the_classes_they_show():
    images, labels = data.draw_scenes(6, seed=1)
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert [data.CLASSES[label] for label in labels] == ["airplane", "automobile", "ship"] * 2
    assert torch.equal(images, data.draw_scenes(6, seed=1)[0]) and not torch.equal(
        images, data.draw_scenes(6, seed=2)[0]
    )
    assert len(images.flatten(1).unique(dim=0)) == 6


def test_arrays_in_place_of_tensors_are_refused_in_a_sentence():
    images, labels, *names = data.draw_stand_in(100, seed=1)
    for wrong in ((images.numpy(), labels), (images, labels.numpy())):
        with pytest.raises(CourseError, match=r"must be tensors: give torch.from_numpy"):
            data.split_train_val(data.ImageSet(*wrong, *names), 20)
