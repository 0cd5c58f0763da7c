"""Files from strangers -> numpy arrays: pickles that are not run, .npy files held to their size, image folders."""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.runtime import CourseError, shown

LARGEST = 2**30  # bytes of a file: seven times the largest published set of 32 x 32 images
LONGEST, DEEPEST = 1_000_000, 8  # instructions of a pickle; lists and dicts inside one another
FORMS = (
    "the competition's .pkl, a CIFAR-10-C <kind>.npy, a CIFAR-10.1 <name>_data.npy or a folder of 32 x 32 PNG or "
    "JPEG images"
)
_Set = tuple[Any, Any, Any]  # images uint8 [N, 32, 32, 3], labels or None, ids or None, as found: not yet checked


def load(path: Path, classes: Sequence[str]) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `helpers.data.load_shifted` promises, with the names that sub-folders may have, in the labels' order."""
    if not path.is_dir() and not path.is_file():  # nor a pipe or device, which might never end
        raise CourseError(f"{shown(path)} is {'no file' if path.exists() else 'not there'}: give {FORMS}.")
    try:
        if path.is_dir():
            found = _read_folder(path, classes)
        elif (size := path.stat().st_size) > LARGEST:
            raise CourseError(f"it is {size:,} bytes long, and no set of images is longer than {LARGEST:,}")
        else:
            found = _read_arrays(path) if path.suffix == ".npy" else _read_competition(path)
        return _checked(*found, len(classes))
    except CourseError as error:
        raise CourseError(f"{shown(path)} was refused: {error}.") from None
    except Exception as error:  # a torn or foreign file fails anywhere in a reader, with any type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CourseError(f"{shown(path)} cannot be read as a set of images ({reason}): give {FORMS}.") from error


def _checked(images: Any, labels: Any, ids: Any, classes: int) -> tuple[Tensor, Tensor | None, Tensor]:
    found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
    if found != f"uint8 [{len(images)}, 32, 32, 3]" or not len(images):
        raise CourseError(f"it holds {found}, and a set of images is uint8 [N, 32, 32, 3]")

    def whole(name: str, values: Any, limit: int) -> Tensor:
        values = np.asarray(values)
        if values.shape != (len(images),):
            found = f"{len(values):,} {name}" if values.ndim == 1 else f"{name} of shape {list(values.shape)}"
            raise CourseError(f"it has {len(images):,} images and {found}, and needs one for each")
        if values.dtype.kind not in "iu" or not 0 <= values.min() <= values.max() <= limit:
            raise CourseError(f"its {name} are not whole numbers from 0 to {limit:,}")
        return torch.from_numpy(values.astype(np.int64))

    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    ids = np.arange(len(images)) if ids is None else ids
    return tensor, None if labels is None else whole("labels", labels, classes - 1), whole("ids", ids, 2**63 - 1)


# -------------------------------------------------------------------------------------------------- the four forms


def _read_competition(path: Path) -> _Set:
    content = read_pickle(path.read_bytes())
    if not isinstance(content, dict) or not {b"data", b"ids"} <= content.keys():
        found = ", ".join(map(ascii, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise CourseError(f"the pickle holds {found or 'nothing'} instead of a dict with b'data' and b'ids'")
    return content[b"data"], None, content[b"ids"]


def _read_arrays(path: Path) -> _Set:
    named = path.name.endswith("_data.npy")
    beside = path.with_name(path.name.removesuffix("_data.npy") + "_labels.npy" if named else "labels.npy")
    return read_npy(path), read_npy(beside) if beside.is_file() else None, None


def read_npy(path: Path) -> np.ndarray:
    """A .npy file whose header promises exactly the bytes that follow it; nothing is allocated before that is known."""
    with path.open("rb") as file:
        start = io.BytesIO(file.read(20_000))  # numpy would allocate whatever length a header gives for itself
        version = np.lib.format.read_magic(start)
        if version not in ((1, 0), (2, 0)):
            raise CourseError(f"{path.name} is a .npy of version {version}, and arrays of numbers need 1.0 or 2.0")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(start)
        held = path.stat().st_size - start.tell()
        if dtype.kind not in "biuf" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
            raise CourseError(f"{path.name} promises an array that the {held:,} bytes after its header are not")
        file.seek(0)
        return np.load(file, allow_pickle=False)


def _read_folder(path: Path, classes: Sequence[str]) -> _Set:
    files = [file for file in (*path.glob("*"), *path.glob("*/*")) if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    files = sorted(file for file in files if file.is_file() and not file.name.startswith("."))
    if not files:
        raise CourseError("it holds no PNG or JPEG image, neither itself nor in a folder of its own")
    folders = {file.parent.name if file.parent != path else None for file in files}
    labels = [classes.index(file.parent.name) for file in files] if folders <= set(classes) else None
    names = [file.stem for file in files]
    numbered = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    ids = [int(name) for name in names] if numbered else []
    return np.stack([_pixels(file) for file in files]), labels, ids if numbered and len({*ids}) == len(ids) else None


def _pixels(file: Path) -> np.ndarray:
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # reads the header alone: no bomb goes off
            if image.size == (32, 32) and image.mode in ("RGB", "RGBA", "L", "LA", "P"):
                return np.asarray(image.convert("RGB"))
            found = f"{image.width} x {image.height} pixels of mode {image.mode}"
    except Exception as error:  # Pillow has no one type for a torn image
        raise CourseError(f"its {file.name} is no whole PNG or JPEG ({type(error).__name__})") from error
    raise CourseError(f"its {file.name} has {found}, and images are 32 x 32 in colour or grey, of 8 bits")


# ------------------------------------------------------------------------------------------ a pickle that is not run


def read_pickle(raw: bytes) -> Any:
    """The numpy arrays, bytes, strings, ints, dicts and lists that a pickle of any protocol describes.

    Nothing that the file names is imported or called, no array is larger than the bytes that the file holds for it,
    and its instructions and the depth of its lists are bounded. Raises CourseError, as half a sentence, for anything
    else, and ValueError, IndexError or KeyError for a torn file.
    """
    return _Machine(raw).run()


@dataclass(frozen=True)
class _Name:
    """What a file asks to be imported."""

    name: str


@dataclass
class _Dtype:
    value: np.dtype


@dataclass
class _Array:
    value: np.ndarray | None = None


_MARK = object()
_NUMBERS = {kind + size for kind in "iu" for size in "1248"} | {"b1", "f2", "f4", "f8"}
_NAMES = {
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
} | {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "__builtin__.bytes"}


class _Machine:
    """As much of the pickle machine as arrays need, with stand-ins of ours for the six functions that build them."""

    def __init__(self, raw: bytes):
        self.raw, self.stack, self.memo = raw, [], {}
        self.encoded = 0  # bytes made from text, which the memo could ask for again and again

    def run(self) -> Any:
        stack, memo = self.stack, self.memo
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.raw)):
            if count == LONGEST:
                raise CourseError(f"the pickle is longer than {LONGEST:,} instructions")
            match opcode.name:
                case "PROTO":
                    pass
                case "FRAME" | "PUT" | "BINPUT" | "LONG_BINPUT" if argument > len(self.raw):
                    raise CourseError(f"the pickle promises more than its {len(self.raw):,} bytes can hold")
                case "FRAME":
                    pass
                case "MARK":
                    stack.append(_MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "INT" | "LONG" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                    stack.append(argument)
                case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                    stack.append(bytes(argument))
                case "BINSTRING" | "SHORT_BINSTRING":  # Python 2's
                    stack.append(argument.encode("latin1"))
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" as name:
                    stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple(self._last(int(name[-1]))))
                case "TUPLE":
                    stack.append(tuple(self._marked()))
                case "LIST" | "DICT" as name:
                    items = self._marked()
                    stack.append([] if name == "LIST" else {})
                    self._extend(items)
                case "APPEND":
                    self._extend(self._last(1))
                case "SETITEM":
                    self._extend(self._last(2))
                case "APPENDS" | "SETITEMS":
                    self._extend(self._marked())
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self._name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(self._name(*self._last(2)))
                case "REDUCE":
                    stack.append(self._call(*self._last(2)))
                case "BUILD":
                    self._build(stack[-2], stack.pop())
                case "STOP":
                    self.values = count  # a tree of them holds one for an instruction at most
                    return self._plain(stack.pop())
                case name:
                    raise CourseError(f"the pickle uses {name}, which no set of images needs: do not trust this file")
        raise AssertionError("genops ends with STOP or raises")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        match self.stack[-1]:
            case list() as target:
                target.extend(items)
            case dict() as target if all(isinstance(key, bytes | str) for key in items[::2]):  # their hashes are salted
                target.update(zip(items[::2], items[1::2], strict=True))
            case _:
                raise CourseError("the pickle fills something else than a list, or a dict with other keys than names")

    def _name(self, *parts: Any) -> _Name:
        name = ".".join(map(str, parts))
        if name not in _NAMES:
            raise CourseError(
                f"the pickle asks for {ascii(name[:80])[1:-1]}, which no set of images needs: do not trust this file, "
                "and get it again from where it was published"
            )
        return _Name(name.rpartition(".")[2])

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Name("encode"), (str() as text, "latin1"):  # how protocols 0 to 2 write bytes
                self.encoded += len(text)
                if self.encoded > len(self.raw):
                    raise CourseError(f"the pickle makes more of its {len(self.raw):,} bytes than they can hold")
                return text.encode("latin1")
            case _Name("bytes"), ():  # and no bytes
                return b""
            case _Name("dtype"), (str() | bytes() as code, _, _):
                code = code.decode("latin1") if isinstance(code, bytes) else code
                if code not in _NUMBERS:
                    raise CourseError(f"the pickle holds an array of {code[:20]!a}, and only numbers are read")
                return _Dtype(np.dtype(code))
            case _Name("_reconstruct"), (_Name("ndarray"), (0,), b"b"):
                return _Array()
            case _Name("_frombuffer"), (bytes() as raw, _Dtype(dtype), tuple() as shape, "C" | "F" as order):
                return _Array(_array(raw, dtype, shape, order))
            case _Name("scalar"), (_Dtype(dtype), bytes() as raw) if dtype.kind in "biu":
                return _array(raw, dtype, (), "C").item()
        raise CourseError("the pickle calls a function with something else than an array of numbers needs")

    def _build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Dtype(dtype), (_, "|" | "<" | ">" | b"|" | b"<" | b">" as order, None, None, None, *_):
                target.value = dtype.newbyteorder(order.decode() if isinstance(order, bytes) else order)
            case _Array(None), (_, tuple() as shape, _Dtype(dtype), int() as fortran, bytes() as raw):
                target.value = _array(raw, dtype, shape, "F" if fortran else "C")
            case _:
                raise CourseError("the pickle sets the state of something else than an array of numbers")

    def _plain(self, value: Any, depth: int = 0) -> Any:
        self.values -= 1
        if depth > DEEPEST or self.values < 0:
            raise CourseError(f"the pickle nests lists deeper than {DEEPEST}, or holds one of them again and again")
        match value:
            case _Array(np.ndarray() as array):
                return array
            case dict():
                return {key: self._plain(item, depth + 1) for key, item in value.items()}
            case list():
                return [self._plain(item, depth + 1) for item in value]
            case bytes() | str() | int():
                return value
        raise CourseError("the pickle holds something else than arrays, bytes, strings, ints, dicts and lists")


def _array(raw: bytes, dtype: np.dtype, shape: tuple[Any, ...], order: str) -> np.ndarray:
    sizes = len(shape) <= DEEPEST and all(isinstance(size, int) and size >= 0 for size in shape)
    if not sizes or math.prod(shape) * dtype.itemsize != len(raw):
        raise CourseError(f"the pickle promises an array that the {len(raw):,} bytes it holds for it are not")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)
