"""A sweep's runs as Ray tasks: each trains in a scratch folder of the node it lands on and comes home as bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from helpers import checkpoint, data, runs, train
from helpers.recipe import Recipe
from helpers.runtime import ROOT, CourseError, counted, git_commit, replacing
from helpers.sweep.jobs import Job, Progress, complete, sentence

RETRIES = 5  # of a run whose worker or node was lost, before it counts as failed


def run(jobs: Sequence[Job], address: str, gpus_per_run: float, stand_in: bool, corruptions: int,
        progress: Progress) -> None:  # fmt: skip
    """Send the jobs to a Ray cluster and unpack what comes back into their folders, as it comes.

    A task takes one CPU and, where the cluster has GPUs, `gpus_per_run` of one. If its worker is lost, Ray starts it
    again elsewhere, from its checkpoint if the node still has it. The nodes need this environment; they get the code of
    helpers/ from here. Raises CourseError without Ray or a cluster, Interrupted when asked to stop.
    """
    ray = _connect(address)
    try:
        with train.stop_requests() as stop, ExitStack() as folders:
            have = ray.cluster_resources()
            gpus = gpus_per_run if have.get("GPU") else 0
            slots = int(have["GPU"] / gpus if gpus else have.get("CPU", 0))
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_there)
            pending = {}
            for job in jobs:
                if job.recipe.teacher or job.recipe.start:
                    progress.failed(job, "It learns from runs that lie here and on no node: sweep it without --ray.")
                    continue
                try:
                    folders.enter_context(checkpoint.hold(job.path))
                except CourseError as error:
                    progress.failed(job, str(error))
                    continue
                reference = task.options(name=job.label).remote(
                    job.recipe.to_dict(), pack(job.path), stand_in, corruptions, str(data.data_root()), git_commit())
                pending[reference] = job
            while pending:
                progress.running = min(len(pending), slots)
                for reference in ray.wait(list(pending), timeout=1.0)[0]:
                    _take_home(ray, reference, pending.pop(reference), progress)
                if stop:
                    for reference in pending:
                        ray.cancel(reference)
                    ray.wait(list(pending), num_returns=len(pending), timeout=30.0)  # for them to write checkpoints
                    name = signal.Signals(stop["signum"]).name
                    raise train.Interrupted(f"Stopped by {name} with {counted(len(pending), 'run')} to go: what has "
                                            "finished is kept; call the same again to go on.", stop["signum"])
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    """Ray, connected and quiet. Its statistics stay here, and its hints are for those who write for it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise CourseError("--ray needs Ray, which is not installed: run `pip install --editable '.[cluster]'` in the "
                          "course's folder, here and on every node.") from None
    try:
        if match := re.fullmatch(r"(.+):(\d+)", address):  # Ray itself knocks for minutes, and aloud
            socket.create_connection((match[1], int(match[2])), timeout=10.0).close()
        ray.init(address, logging_level="error", log_to_driver=False,
                 runtime_env={"py_modules": [str(ROOT / "helpers")]})
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CourseError(f"There is no Ray cluster at {address!r} ({reason}): start one with `ray start --head`, or "
                          "give its address, as in --ray 10.0.0.1:6379.") from error
    return ray


def _take_home(ray: Any, reference: Any, job: Job, progress: Progress) -> None:
    try:
        content, problem = ray.get(reference)
        if not problem:
            unpack(content, job.path)
            for name in checkpoint.SLOTS:  # of a beginning that was made here
                (job.path / name).unlink(missing_ok=True)
    except ray.exceptions.RayError as error:  # the worker was lost once too often, or cannot start at all
        problem = f"Ray gave up on it ({str(error).strip().splitlines()[-1].strip()})."
    except CourseError as error:
        problem = str(error)
    if problem:
        progress.failed(job, problem)
    else:
        progress.finished(job)


# ------------------------------------------------------------------------------------------------ on the node


def _there(recipe: dict[str, Any], begun: dict[str, bytes], stand_in: bool, corruptions: int, home_data: str,
           commit: str) -> tuple[dict[str, bytes], str]:  # fmt: skip
    """A task: the files of the run and "", or nothing and a sentence on what went wrong."""
    try:
        return work(Recipe.from_dict(recipe), begun, stand_in, corruptions, home_data, commit), ""
    except train.Interrupted:
        os._exit(1)  # the node has to go, a checkpoint is written: Ray sees a lost worker and starts the run elsewhere
    except Exception as error:
        return {}, sentence(error)


def work(recipe: Recipe, begun: dict[str, bytes], stand_in: bool, corruptions: int, home_data: str,
         commit: str) -> dict[str, bytes]:  # fmt: skip
    """Complete a run in this machine's scratch folder, from what is there, else from what was `begun` at home.

    Returns its files by name and removes the folder. `commit` is that of the code, which arrives here without its git.
    """
    scratch = Path(tempfile.gettempdir()) / "se-resnet-course"
    _find_data(stand_in, home_data, scratch)
    key = json.dumps([recipe.to_dict(), stand_in, commit], sort_keys=True)
    folder = scratch / hashlib.sha256(key.encode()).hexdigest()[:16]
    scratch.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=120):  # a worker that has lost its node may work on for a moment
        if begun and not folder.exists():
            unpack(begun, folder)
        before = (folder / "run.json").exists()
        job, images = Job(recipe, folder, "", 0), partial(train.training_data, stand_in=stand_in)
        complete([job], images, stand_in, corruptions, lambda recipe, row: None)
        if not before:
            runs.add_to_record(folder, {"commit": commit})
        content = pack(folder)
        shutil.rmtree(folder)
    return content


def _find_data(stand_in: bool, home_data: str, scratch: Path) -> None:
    """Set this worker's CIFAR10_ROOT: its own, the one that holds at home if it is here too, or a download."""
    if stand_in:
        os.environ["CIFAR10_ROOT"] = str(scratch / "none")
        return
    places = [os.environ.get("CIFAR10_ROOT") or home_data, home_data]
    here = [place for place in places if (Path(place) / "cifar-10-batches-py").is_dir()]
    os.environ["CIFAR10_ROOT"] = here[0] if here else str(scratch / "data")
    if not here:
        scratch.mkdir(parents=True, exist_ok=True)
        with FileLock(scratch / "data.lock"):  # several tasks of a node begin at once
            data.fetch()


# ------------------------------------------------------------------------------------------------ folders in transit


def pack(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder by name, without locks and what is half-written."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*")) if path.is_file()}


def unpack(content: dict[str, bytes], folder: Path) -> None:
    """Write the files of `pack` into a folder, each whole or not at all, the record last: it says that all is there."""
    for name in sorted(content, key=lambda name: name == "run.json"):
        with replacing(folder / Path(name).name) as temporary:
            temporary.write_bytes(content[name])
