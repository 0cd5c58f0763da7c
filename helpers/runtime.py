"""Project root, device, number format, seeds, versions: what every other room stands on."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds, which a page of help does not need: imported by the functions that do
    import torch

ROOT = Path(__file__).resolve().parent.parent


class CourseError(Exception):
    """Something only the user can mend. The message is one sentence: what is wrong, what was expected, what to do.

    The command line prints it without a traceback and exits with 1.
    """


PROFILES = ("recorded", "quick", "paper")
PICTURES = ("drawn", "photographs")


def refuse_unknown(profile: str, pictures: str = "drawn") -> None:
    """Raise CourseError for a word that a notebook's parameter `profile` or `pictures` does not know."""
    for name, word, known in (("profile", profile, PROFILES), ("kind of pictures", pictures, PICTURES)):
        if word not in known:
            raise CourseError(f"There is no {name} {word!r}: expected one of {', '.join(known)}.")


def out_dir(profile: str) -> Path:
    """Where a profile writes what it makes: out/<profile>/, ignored by git."""
    refuse_unknown(profile)
    return ROOT / "out" / profile


def pick_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: by default convolutions round what they read
    return torch.device("cuda")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). Data order and augmentation use generators of their own."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from several integers, so that (seed, epoch) and (seed + 1, epoch - 1) share nothing."""
    import torch

    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction in [0, 1] as the course prints it: 0.9594 -> '95.94 %'."""
    return f"{100 * fraction:.{digits}f} %"


def counted(number: int, noun: str) -> str:
    """A number and its noun: '1 seed', '12,480 seeds'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def versions() -> dict[str, str]:
    """Python and the packages that can change a result, by name."""
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "pandas", "matplotlib")}
    return {"python": platform.python_version(), **packages}


def versions_and_device() -> str:
    """The same on one line, and the device on the next: what each notebook prints first."""
    return ", ".join(f"{name} {number}" for name, number in versions().items()) + f"\n{device_name(pick_device())}"


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether this device has bfloat16 of its own. Imitated, it takes longer than float32, on x86 with AVX2 tenfold."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # as torch asks itself


def device_name(device: torch.device) -> str:
    """What a run record says it ran on: the GPU's name, or the CPU's architecture and thread count; and whether what a
    recipe asks of it in bfloat16 was done in float32, for want of instructions.
    """
    import torch

    cpu = f"CPU, {platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return name if has_bfloat16(device) else f"{name}, no bfloat16"


@cache
def git_commit() -> str:
    """The commit of the working tree, with '+changes' if it is not clean; 'unknown' outside a git checkout.

    Asked once a process, since a run goes on with the code it began with while the working tree may move on.
    """

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "helpers", "pyproject.toml")
        return git("rev-parse", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shown(path: Path) -> str:
    """A path as the user should read it: relative to the project when inside it, so no machine path is printed."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def expanded(path: str | Path) -> Path:
    """A path with the home that a leading ~ or ~user stands for; CourseError where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CourseError(f"{path} begins with the home of a user who is not here: write that folder out.") from error


@contextmanager
def staging(root: Path, advice: str = "choose a folder you may write to") -> Iterator[Path]:
    """Yield a temporary folder inside `root`, from which what is whole can be renamed into place; gone at the end.

    `root` is made if need be, and goes again, with the parents made for it, if nothing has come to lie in it.
    Raises CourseError with `advice` where it cannot be written.
    """
    root, temporary = Path(root), None
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
        except OSError as error:
            raise CourseError(f"Cannot write to {shown(root)} ({error.strerror}): {advice}.") from error
        yield temporary
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block ends, remove it when it fails.

    A reader therefore sees the old file or the new one, never half of either, even across a SIGKILL or a power cut.
    Raises CourseError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise CourseError(
            f"Cannot write {shown(path)} ({reason}): free some space or choose a folder you may "
            "write to; what was there before is untouched."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
