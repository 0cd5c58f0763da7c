"""Shifted sets in their published forms, and files made by hand to harm whoever reads them."""

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from helpers import data, readers
from helpers.runtime import CourseError

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


def refused(path) -> str:
    """The one sentence a file is refused with; reading it takes no more memory than a set of its size."""
    tracemalloc.start()
    with pytest.raises(CourseError) as caught:
        data.load_shifted(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 + 20 * (path.stat().st_size if path.exists() else 0)
    sentence = str(caught.value)
    assert path.name in sentence and sentence.endswith(".") and sentence.isascii() and sentence.isprintable()
    return sentence


@pytest.fixture
def refuse(tmp_path):
    """Write bytes as a .pkl (or another file) and see them refused."""

    def write(content: bytes, name="set.pkl") -> str:
        (tmp_path / name).write_bytes(content)
        return refused(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------ the published forms


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("ids", [np.arange(7) + 3, list(range(3, 10)), list(np.arange(3, 10, dtype=">i4"))])
def test_the_competitions_pickle(tmp_path, protocol, ids):
    path = tmp_path / "cifar_test_nolabel.pkl"
    path.write_bytes(pickle.dumps({b"data": PICTURES, b"ids": ids}, protocol=protocol))
    images, labels, found = data.load_shifted(path)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PICTURES) and images.is_contiguous()
    assert labels is None and found.tolist() == list(range(3, 10))


def test_a_pickle_of_python_2(tmp_path):
    """Python 2 wrote text as bytes (SHORT_BINSTRING, BINSTRING), and numpy's modules had other names."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    name = lambda module, name: b"c" + module + b"\n" + name + b"\n"  # noqa: E731
    dtype = name(b"numpy", b"dtype") + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNK\x00K\x00K\x00tb"
    array = (
        name(b"numpy.core.multiarray", b"_reconstruct") + name(b"numpy", b"ndarray") + b"K\x00\x85" + text(b"b")
        + b"\x87R(K\x01(K\x07K\x20K\x20K\x03t" + dtype + b"\x89T"
        + struct.pack("<i", PICTURES.size) + PICTURES.tobytes() + b"tb"
    )  # fmt: skip
    path = tmp_path / "old.pkl"
    path.write_bytes(b"\x80\x02}(" + text(b"data") + array + text(b"ids") + b"](" + b"K\x04" * 7 + b"eu.")
    images, _, ids = data.load_shifted(path)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PICTURES) and ids.tolist() == [4] * 7


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_what_is_admitted_comes_back_as_pickle_reads_it(protocol):
    content = {
        b"bytes": b"\x00\xff" * 200, "text": "Größe\n", b"numbers": [0, -1, 255, 256, -(2**31), 2**80, True],
        b"inside": {"list": [[1, [2]], []], "again": {b"": b"x"}}, "one": np.int16(-3),
        "arrays": [np.arange(6, dtype=">u2").reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 4), bool)],
    }  # fmt: skip
    raw = pickle.dumps(content, protocol=protocol)
    ours, theirs = readers.read_pickle(raw), pickle.loads(raw)
    for mine, array in zip(ours.pop("arrays"), theirs.pop("arrays"), strict=True):
        assert np.array_equal(mine, array) and (mine.dtype.kind, mine.itemsize) == (array.dtype.kind, array.itemsize)
    assert ours == theirs


def test_cifar10_c_and_cifar10_1(tmp_path):
    np.save(tmp_path / "fog.npy", PICTURES)
    assert data.load_shifted(tmp_path / "fog.npy")[1] is None
    np.save(tmp_path / "labels.npy", np.arange(7, dtype=np.uint8))
    np.save(tmp_path / "v6_data.npy", np.asfortranarray(PICTURES))
    np.save(tmp_path / "v6_labels.npy", np.arange(7)[::-1])
    for name, expected in (("fog.npy", list(range(7))), ("v6_data.npy", list(range(7))[::-1])):
        images, labels, ids = data.load_shifted(tmp_path / name)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PICTURES)
        assert labels.tolist() == expected and ids.tolist() == list(range(7))


def save(picture: np.ndarray, path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)


def test_a_folder_of_images(tmp_path):
    for i, picture in enumerate(PICTURES):
        save(picture, tmp_path / "flat" / f"{100 - i}.png")
    (tmp_path / "flat" / "readme.txt").write_text("not a picture")
    (tmp_path / "flat" / "._100.png").write_text("what a Mac puts beside a picture")
    images, labels, ids = data.load_shifted(tmp_path / "flat")
    assert labels is None and ids.tolist() == [100, 94, 95, 96, 97, 98, 99], "by name: 100.png, 94.png ..."
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PICTURES[100 - ids.numpy()])
    save(PICTURES[0], tmp_path / "flat" / "one more.JPG", quality=90)
    images, labels, ids = data.load_shifted(tmp_path / "flat")
    assert ids.tolist() == list(range(8)), "not every name is a number"
    with Image.open(tmp_path / "flat" / "one more.JPG") as picture:
        assert np.array_equal(images[7].permute(1, 2, 0).numpy(), np.asarray(picture))


def test_a_name_too_long_for_a_number_is_a_name(tmp_path):
    for name in ("9" * 19, "1"):  # 2^63 - 1 has 19 digits, and is less
        save(PICTURES[0], tmp_path / f"{name}.png")
    assert data.load_shifted(tmp_path)[2].tolist() == [0, 1]


def test_grey_pictures_with_and_without_transparency_are_read_as_grey(tmp_path):
    levels = PICTURES[0, :, :, 0]
    save(levels, tmp_path / "grey.png")
    save(np.stack((levels, 255 - levels), 2), tmp_path / "see-through.png")  # mode LA
    images = data.load_shifted(tmp_path)[0]
    assert np.array_equal(images.numpy(), np.broadcast_to(levels, (2, 3, 32, 32)))


def test_folders_named_as_classes_give_labels(tmp_path):
    for name, i in (("dog", 1), ("cat", 1), ("cat", 2)):
        save(PICTURES[i], tmp_path / "by_class" / name / f"{i}.png")
    images, labels, ids = data.load_shifted(tmp_path / "by_class")
    assert [data.CLASSES[label] for label in labels] == ["cat", "cat", "dog"]
    assert ids.tolist() == [0, 1, 2], "1.png is there twice"
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), PICTURES[2])
    save(PICTURES[3], tmp_path / "by_class" / "zebra" / "3.png")
    assert data.load_shifted(tmp_path / "by_class")[1] is None


def test_grey_and_palette_images_become_colour(tmp_path):
    grey = PICTURES[0, :, :, 0]
    save(grey, tmp_path / "1.png")
    Image.fromarray(PICTURES[1]).quantize(16).save(tmp_path / "2.png")
    images = data.load_shifted(tmp_path)[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.stack([grey] * 3, -1))
    assert len(np.unique(images[1].reshape(-1, 3), axis=0)) == 16


# ----------------------------------------------------------------------------------------------------- hostile files


def pickled(protocol, value) -> bytes:
    return pickle.dumps(value, protocol=protocol)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [(os.system, ("true",)), (eval, ("1",)), (np.load, ("x",)), (print, ("x",))])
def test_code_is_refused_and_not_run(refuse, capfd, protocol, call):
    class Hostile:
        def __reduce__(self):
            return call

    for content in (Hostile(), {b"data": Hostile(), b"ids": [1]}, [np.zeros(3), Hostile()]):
        assert "was refused: the pickle asks for" in (sentence := refuse(pickled(protocol, content)))
        assert "do not trust" in sentence
    assert capfd.readouterr().out == ""


class Anything:
    """A class of this module, with a state."""

    def __init__(self):
        self.state = 1


def test_code_hidden_anywhere_makes_nothing(refuse, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Hostile()], dtype=object), allow_pickle=True)
    assert "promises an array" in refuse(buffer.getvalue(), "bad.npy")
    objects = {b"data": np.array([Hostile()], dtype=object), b"ids": [1]}
    assert "array of 'O8'" in refuse(pickle.dumps(objects, protocol=2)), "before what the array holds is reached"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refuse(pickled(protocol, objects))
        refuse(pickled(protocol, {b"data": PICTURES, b"ids": np.arange(7), b"more": Anything()}))
    refuse(b"cposix\nmkdir\n(V" + str(tmp_path / "owned").encode() + b"\ntR.")  # GLOBAL
    refuse(b"(V" + str(tmp_path / "owned").encode() + b"\niposix\nmkdir\n.")  # INST
    refuse(b"(cposix\nmkdir\nV" + str(tmp_path / "owned").encode() + b"\no.")  # OBJ
    assert not (tmp_path / "owned").exists()


def name(module: bytes, attribute: bytes) -> bytes:
    return b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(attribute)]) + attribute + b"\x93"


RECONSTRUCT = name(b"numpy._core.multiarray", b"_reconstruct") + name(b"numpy", b"ndarray") + b"K\x00\x85C\x01b\x87R"


def dtype(code: bytes) -> bytes:
    return name(b"numpy", b"dtype") + b"\x8c" + bytes([len(code)]) + code + b"\x89\x88\x87R"


TERA = struct.pack("<Q", 2**42)
HOSTILE = {
    "a name built on numpy's": b"\x80\x04" + name(b"numpy", b"f2py.compile") + b".",
    "a name inside another": b"\x80\x04" + name(b"numpy", b"ndarray.__class__") + b".",
    "a name that is no text": b"\x80\x04KK\x93.",
    "a name with line ends": b"\x80\x04" + name(b"os\n\x1b[2J", b"system\r\n") + b".",
    "other functions of numpy": b"\x80\x04" + name(b"numpy", b"fromfile") + b".",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Pany\n.",
    "new objects": b"\x80\x02" + name(b"numpy", b"ndarray") + b")\x81.",
    "a buffer from outside": b"\x80\x05\x97.",
    "a set": b"\x80\x04\x8f.",
    "a float": b"\x80\x02G\x00\x00\x00\x00\x00\x00\x00\x00.",
    "nothing": b"\x80\x02N.",
    "a tuple": b"\x80\x02K\x01\x85.",
    "a bare name": b"\x80\x04" + name(b"numpy", b"ndarray") + b".",
    "an array never filled": b"\x80\x04" + RECONSTRUCT + b".",
    "a function's state": b"\x80\x04" + name(b"_codecs", b"encode") + b"}\x8c\x0c__defaults__K\x01\x85sb.",
    "ndarray called": b"\x80\x04" + name(b"numpy", b"ndarray") + b"\x8a\x06" + b"\x00" * 5 + b"\x7f\x85\x85R.",
    "terabytes of bytes": b"\x80\x04\x8e" + TERA + b"x.",
    "terabytes of bytearray": b"\x80\x05\x96" + TERA + b"x.",
    "terabytes of text": b"\x80\x04\x8d" + TERA + b"x.",
    "two gigabytes of bytes": b"\x80\x03B\xff\xff\xff\x7fx.",
    "a frame of terabytes": b"\x80\x04\x95" + TERA + b"}.",
    "a long of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "a memo of two thousand million": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo of any size": b"}p99999999999999\n.",
    "a shape of terabytes": b"\x80\x04" + RECONSTRUCT + b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86" + dtype(b"u1")
    + b"\x89C\x01xtb.",
    "a shape that wraps around": b"\x80\x04" + RECONSTRUCT + b"(K\x01\x8a\x09" + b"\x00" * 8 + b"\x01\x85"
    + dtype(b"u1") + b"\x89C\x00tb.",
    "a shape below nothing": b"\x80\x04" + RECONSTRUCT + b"(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86" + dtype(b"u1")
    + b"\x89C\x01xtb.",
    "an empty shape with terabytes": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x00\x8a\x09" + b"\x00" * 8 + b"\x01\x86"
    + dtype(b"u1") + b"\x89C\x00tb.",
    "a buffer shorter than its shape": b"\x80\x04" + name(b"numpy._core.numeric", b"_frombuffer") + b"(C\x01x"
    + dtype(b"u8") + b"K\x09\x85\x8c\x01CtR.",
    "a huge dtype": b"\x80\x04" + dtype(b"V999999999") + b".",
    "a huge text dtype": b"\x80\x04" + dtype(b"U999999999") + b".",
    "a dtype of many fields": b"\x80\x04" + dtype(b"u1," * 60) + b".",
    "an object array": b"\x80\x04" + RECONSTRUCT + b"(K\x01K\x01\x85" + dtype(b"O8") + b"\x89]K\x01atb.",
    "fields by a dtype's state": b"\x80\x04" + dtype(b"u1") + b"(K\x03\x8c\x01|N\x8c\x01a\x85}J\xff\xff\xff\x7f"
    b"K\x01K\x10tb.",
    "lists without end": b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b".",
    "tuples without end": b"\x80\x02)" + b"\x85" * 90_000 + b".",
    "lists through the memo": b"\x80\x02" + b"]q\x00]h\x00aq\x00" * 9_000 + b".",
    "a list inside itself": b"\x80\x02]q\x00h\x00a.",
    "a dict inside itself": b"\x80\x02}q\x00C\x01ah\x00s.",
    "ten to the ninth lists": b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 14 + b"eq" + bytes([i + 1]) for i in range(8)) + b".",
    "bytes made again and again": b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<I", 9_000) + b"x" * 9_000
    + b"X\x06\x00\x00\x00latin1\x86q\x01" + b"h\x00h\x01Rq\x02" * 9_000 + b".",
    "instructions without end": b"\x80\x02" + b"N" * (readers.LONGEST + 1) + b".",
    "keys that collide": b"\x80\x02}" + b"".join(
        b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"Ns" for i in range(1_000)) + b".",
    "a stack from below": b"\x80\x020.", "an empty stack": b"\x80\x02a.", "no mark": b"\x80\x02t.",
    "a memo that is empty": b"\x80\x02h\x09.",
    "a number of many digits": b"I" + b"9" * 9_000 + b"\n.",
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_sentence(refuse, content):
    refuse(content)
    refuse(content[:2] + b"}C\x04data" + content[2:-1] + b"sC\x03ids]K\x00as.")  # and in the place of the images


def header(descr, shape, fortran=False) -> bytes:
    text = str({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


@pytest.mark.parametrize("content", [
    header("|u1", (2**40, 32, 32, 3)), header("|u1", (2**62, 4)), header("|u1", (-1, -3072)) + b"x" * 3072,
    header("|V999999999", (1,)), header("<U999999999", (9,)), header("|O", (1,)) + pickle.dumps([1]),
    header([("a", "|u1", (2**30,)), ("b", "|O")], (1,)), header("|u1", (1, 32, 32, 3)) + b"x" * 3071,
    header("|u1", (1, 32, 32, 3)) + b"x" * 3073, header("|u1", ()) + b"x", header("|u1", (0, 32, 32, 3)),
    header("<f8", (1, 32, 32, 3)) + b"x" * 8 * 3072, b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00" + b"x" * 99,
    b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535, b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", b"PK\x03\x04" + b"x" * 99,
])  # fmt: skip
def test_a_hostile_npy_is_refused_in_one_sentence(refuse, content):
    refuse(content, "fog.npy")


def test_a_file_longer_than_any_set_is_not_read(tmp_path):
    with (tmp_path / "long.pkl").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(CourseError, match="no set of images is longer"):
        data.load_shifted(tmp_path / "long.pkl")


def test_what_might_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "zero.pkl").symlink_to("/dev/zero")
    for path in ("pipe.pkl", "zero.pkl"):
        with pytest.raises(CourseError, match=f"{path} is no file: give|/dev/zero is no file: give"):
            data.load_shifted(tmp_path / path)


@pytest.mark.parametrize(("kind", "says"), [
    ("lists without end", "nests lists deeper than 8"), ("tuples without end", "something else than arrays"),
    ("ten to the ninth lists", "again and again"), ("a list inside itself", "nests lists deeper than 8"),
    ("instructions without end", "longer than 1,000,000 instructions"),
    ("bytes made again and again", "makes more of its [0-9,]+ bytes than they can hold"),
])  # fmt: skip
def test_each_bound_of_a_pickle_is_the_one_that_refuses(refuse, kind, says):
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(refuse(HOSTILE[kind]))


# ------------------------------------------------------------------------------------------------------ mere mistakes


@pytest.mark.parametrize(("content", "says"), [
    (b"", "cannot be read"), (b"not a pickle", "cannot be read"), (pickle.dumps([1, 2]), "holds list"),
    (pickle.dumps({"data": 1}), "holds 'data' instead"), (pickle.dumps({}), "holds nothing instead"),
    (pickle.dumps({b"data": [1], b"ids": [1]}), "holds list"),
    (pickle.dumps({b"data": np.zeros((2, 32, 32)), b"ids": np.arange(2)}), r"float64 \[2, 32, 32\]"),
    (pickle.dumps({b"data": np.zeros((2, 3, 32, 32), np.uint8), b"ids": np.arange(2)}), r"uint8 \[2, 3, 32, 32\]"),
    (pickle.dumps({b"data": PICTURES.astype(np.int64), b"ids": np.arange(7)}), r"int64 \[7, 32, 32, 3\]"),
    (pickle.dumps({b"data": PICTURES[:0], b"ids": np.arange(0)}), r"uint8 \[0, 32, 32, 3\]"),
    (pickle.dumps({b"data": PICTURES, b"ids": np.arange(3)}), "7 images and 3 ids"),
    (pickle.dumps({b"data": PICTURES, b"ids": np.arange(7) - 1}), "whole numbers"),
    (pickle.dumps({b"data": PICTURES, b"ids": np.arange(7) / 2}), "whole numbers"),
    (pickle.dumps({b"data": PICTURES, b"ids": [b"x"] * 7}), "whole numbers"),
    (pickle.dumps({b"data": PICTURES, b"ids": [2**70] * 7}), "whole numbers"),
    (pickle.dumps({b"data": PICTURES, b"ids": np.arange(7)}, 4)[:-900], "promises more than its"),
    (pickle.dumps({b"data": PICTURES, b"ids": np.arange(7)}, 3)[:-900], "cannot be read"),
])  # fmt: skip
def test_another_pickle_is_refused_in_one_sentence(refuse, content, says):
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(refuse(content))


def test_labels_that_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "fog.npy", PICTURES)
    for labels, says in ((np.arange(6), "7 images and 6 labels"), (np.arange(7) + 4, "from 0 to 9"),
                         (np.arange(7) / 2, "whole numbers"),
                         (np.zeros((7, 1), int), "7 images and labels of shape [7, 1]")):  # fmt: skip
        np.save(tmp_path / "labels.npy", labels)
        assert says in refused(tmp_path / "fog.npy")
    (tmp_path / "labels.npy").write_bytes(b"torn")
    assert "cannot be read" in refused(tmp_path / "fog.npy")


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "no PNG or JPEG" in refused(tmp_path)
    save(np.zeros((64, 32, 3), np.uint8), tmp_path / "large.png")
    assert "large.png has 32 x 64 pixels" in refused(tmp_path)
    save(np.zeros((32, 32), np.uint16), tmp_path / "large.png")
    assert "mode I;16" in refused(tmp_path)
    save(PICTURES[0], tmp_path / "large.png")
    whole = (tmp_path / "large.png").read_bytes()
    for torn in (whole[:-900], b"", b"GIF89a" + whole):
        (tmp_path / "large.png").write_bytes(torn)
        assert "large.png is no whole PNG" in refused(tmp_path)
    bomb = whole[:16] + struct.pack(">II", 60_000, 60_000) + whole[24:]  # 10 GB, if it were believed
    (tmp_path / "large.png").write_bytes(bomb)
    assert "large.png" in refused(tmp_path)
    assert "is not there" in refused(tmp_path / "absent.pkl")
