"""A run's folder while it trains: two checksummed checkpoints in turn, and a lock so that one process has it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from helpers.runtime import CourseError, replacing, shown

# Two slots, written in turn: whatever happens to the one being written, the one before it is whole.
SLOTS = ("checkpoint-a.pt", "checkpoint-b.pt")
_MAGIC = b"se-resnet-course checkpoint, sha256 "


def write(folder: Path, state: dict[str, Any], count: int) -> Path:
    """Write the count-th checkpoint of this run into its slot, whole or not at all.

    The file is a line with the SHA-256 of what follows, then torch's own format; tensors and plain values only.
    It is put together in memory, since torch's writer reports a full disk with errors of its own, not OSError.
    """
    buffer = io.BytesIO()
    torch.save({**state, "count": count}, buffer)
    path = folder / SLOTS[count % 2]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n")
        file.write(buffer.getbuffer())
    return path


def read(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole (None if there is none at all), and a sentence for each that is not.

    Nothing is unpickled before its checksum holds, and then by torch's weights_only reader, which runs no code.
    Raises CourseError if there are checkpoints and none of them is whole.
    """
    states, problems = [], []
    for path in (folder / name for name in SLOTS):
        if not path.exists():
            continue
        try:
            head, _, payload = path.read_bytes().partition(b"\n")
            if head != _MAGIC + hashlib.sha256(payload).hexdigest().encode():
                raise ValueError("its checksum differs")
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not {"count", "recipe", "data"} <= set(state):
                raise ValueError("it is not a run's state")
            states.append(state)
        except Exception as error:  # a foreign file that carries a checksum can fail in torch with any type
            problems.append(f"{shown(path)} is torn or foreign ({error})")
    if problems and not states:
        raise CourseError(f"{'; '.join(problems)}: delete what is in {shown(folder)}, or start afresh (--fresh).")
    return max(states, key=lambda state: state["count"], default=None), problems


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process. The system drops the lock when the process ends, however it ends.

    Clears what a killed process left half-written. Raises CourseError if another process has the folder, or if it
    cannot be written.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise CourseError(
            f"Another process is training in {shown(folder)}: wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise CourseError(
            f"Cannot write to {shown(folder)} ({error.strerror}): choose a folder you may write to."
        ) from error
    try:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while we still hold it
        lock.release()
