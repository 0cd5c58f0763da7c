"""The command line: `python -m helpers --help`. A thin layer of typer over the rooms."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

STOPPED = b"error: stopped by Ctrl-C\n"

if __name__ == "__main__":  # importing torch takes seconds, and half-imported C code may lose any exception
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, STOPPED), os._exit(130)))
    if len(sys.argv) > 1 and "--help" not in sys.argv:  # help does without
        import torch  # noqa: F401

import typer  # noqa: E402

from helpers.runtime import ROOT, CourseError, counted, out_dir, percent, shown  # noqa: E402

app = typer.Typer(help="The SE-ResNet course on the command line.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)  # fmt: skip

Profile = Annotated[str, typer.Option(help="recorded (read runs), quick (train small) or paper (train in full).")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a field, as in --set epochs=3; repeatable.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this notebook (05 or its name); repeatable.")]
StandIn = Annotated[bool, typer.Option("--stand-in", help="Go on with ten drawn shapes where CIFAR-10 is missing.")]


@app.command()
def fetch() -> None:
    """Download CIFAR-10 and check it, into $CIFAR10_ROOT or data/; does nothing if it is there and whole."""
    from helpers import data

    print(f"CIFAR-10 is complete in {shown(data.fetch())}")


@app.command()
def train(recipe: Annotated[str | None, typer.Argument(help="A named recipe, such as quick, laptop or paper.")] = None,
          name: Annotated[str | None, typer.Option("--recipe", help="The same, as an option.")] = None,
          seed: Annotated[int | None, typer.Option(help="The run's seed. Default: 0.")] = None,
          seeds: Annotated[int | None, typer.Option(help="Train seeds 0 to N-1 in one go: side by side on a GPU, one "
                                                    "after the other on a CPU.", metavar="N", min=1,
                                                    max=1_000)] = None,
          change: Changes = None,
          root: Annotated[Path | None, typer.Option(help="For <root>/<recipe>/<seed>. Default: out/runs.")] = None,
          run_dir: Annotated[Path | None, typer.Option(help="One run's folder, wherever it is.")] = None,
          fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
          stand_in: StandIn = False) -> None:  # fmt: skip
    """Train a recipe and test it once selected. Called again after an interruption, it goes on where it was."""
    from helpers import evaluate
    from helpers import recipe as recipes
    from helpers import train as training

    if (recipe is None) == (name is None):
        raise CourseError("Give one recipe to train, as in `train paper` or `train --recipe paper`.")
    if seed is not None and seeds is not None:
        raise CourseError("Give --seed K for the one run or --seeds N for seeds 0 to N-1, not both.")
    if run_dir and (root or seeds):
        raise CourseError("--run-dir is the folder of one run: give --root with --seeds, or --run-dir and one --seed.")
    chosen = recipes.get(name if recipe is None else recipe, **_fields(change))
    seeded = [chosen.but(seed=number) for number in (range(seeds) if seeds else [seed or 0])]
    _warn(stand_in)
    store = root or ROOT / "out" / "runs"
    paths = [run_dir or store / each.name / str(each.seed) for each in seeded]
    for run in training.fit_many(seeded, training.training_data(chosen, stand_in), paths, resume=not fresh):
        _tell(run if "test" in run.record else evaluate.test_run(run.path, stand_in))


@app.command()
def evaluate(run: Annotated[Path | None, typer.Argument(help="A run's folder, a recipe's with several seeds, or a "
                                                                  ".safetensors file.")] = None,
             weights: Annotated[Path | None, typer.Option(help="The same, as an option.")] = None,
             data: Annotated[Path | None, typer.Option(help="A shifted set or a CIFAR-10-C folder; default: the clean "
                                                            "test set, its result kept in the run's record.")] = None,
             corruptions: Annotated[int, typer.Option(help="Also distort the first N test images in every way.",
                                                      min=0, max=10_000)] = 0,
             out: Annotated[Path | None, typer.Option(help="Default: out/evaluate/<run>/<set>.")] = None,
             stand_in: StandIn = False) -> None:  # fmt: skip
    """Measure weights on a set of images; where it has no labels, write a submission and estimate the accuracy.

    Where NAME.pkl has NAME-labels.csv beside it (ID,Labels), the truth is told after the estimates.
    """
    from helpers import assess, runs
    from helpers import together as seeds

    if (run is None) == (weights is None):
        raise CourseError("Give one run to evaluate: its folder, or --weights and a folder or .safetensors file.")
    if data and corruptions:
        raise CourseError("--corruptions distorts the clean test images: give it or --data, not both.")
    run = run or weights
    if not (run / "run.json").exists() and any(run.glob("*/run.json")):
        if data or corruptions or out:
            raise CourseError("Several seeds together are tested on clean images, and the result is kept beside them: "
                              "leave out --data, --corruptions and --out.")  # fmt: skip
        print(seeds.together(run, stand_in).round(4).to_string(index=False))
        return
    chosen = runs.read(run)
    # With its folder's name: the kinds of every CIFAR-10-C are called alike. Without the root, or it would lie there.
    name = "-".join(data.resolve().parts[1:][-2:]) if data else "test"
    folder = out or ROOT / "out" / "evaluate" / chosen.label.replace("/", "-") / name
    if data:
        assess.shifted(chosen, data, folder, stand_in)
    else:
        _tell(assess.clean(chosen, corruptions, folder, stand_in))


@app.command()
def sweep(
    names: Annotated[list[str], typer.Argument(help="Sweeps (ladder, mixup, strength, se, dropout, warmup, rate, "
                                                    "schedule, policy, beyond, climb, approach) and named recipes (the "
                                                    "recipe beyond: `train beyond --seeds 3`).",
                                               metavar="NAME...")],
    base: Annotated[str | None, typer.Option(help="The recipe that a sweep varies: quick (the default), reduced, "
                                                  "laptop, paper.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each: 0, 1, ...", min=1, max=1_000)] = 3,
    root: Annotated[Path | None, typer.Option(help="Default: out/runs; data/runs records them.")] = None,
    corruptions: Annotated[int, typer.Option(help="Also test each run on N distorted test images, again where it was "
                                                  "on fewer.", min=0, max=10_000)] = 0,
    ray: Annotated[str, typer.Option(help="Address of the Ray cluster that does the work; auto finds it.")] = "",
    gpus_per_run: Annotated[float | None, typer.Option(help="With --ray: the share of a GPU for a run. Default: 1.",
                                                       min=0.01, max=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and for how long.")] = False,
    stand_in: StandIn = False,
) -> None:  # fmt: skip
    """Train and test recipes with several seeds. Finished runs are not repeated, interrupted ones go on."""
    from helpers import recipe as recipe_room
    from helpers import runs
    from helpers import sweep as sweeping

    if base and not set(names) & set(recipe_room.SWEEPS):
        raise CourseError(f"--base {base} changes nothing: of {', '.join(names)}, none is a sweep.")
    if gpus_per_run and not ray:
        raise CourseError("--gpus-per-run is for --ray: without it a recipe's seeds share this machine's GPU.")
    chosen = [recipe for name in names for recipe in recipe_room.named(name, base or "quick")]
    root = root or ROOT / "out" / "runs"
    if dry_run:
        table, said = sweeping.forecast(sweeping.plan(chosen, range(seeds), root, stand_in, corruptions), root)
        print(table.to_string(index=False), *said, sep="\n")
        return
    _warn(stand_in)
    failures = sweeping.sweep(chosen, range(seeds), root, stand_in, corruptions, ray, gpus_per_run or 1.0)
    done = runs.load(root)
    for recipe in dict.fromkeys(chosen) if len(done) else ():
        rows = done[(done.recipe == recipe.name) & (done.seed < seeds)].dropna(subset="test_accuracy")
        values = ", ".join(map(percent, rows.test_accuracy)) or "none"
        mean = f"test {percent(rows.test_accuracy.mean())} " if len(rows) else ""
        print(f"{recipe.name:<28} {mean}over {counted(len(rows), 'seed')} ({values})")
    for label, problem in failures.items():
        print(f"{label} failed: {problem}")
    if failures:
        raise CourseError(f"{counted(len(failures), 'run')} failed, as said above: the same command tries again.")


archive = typer.Typer(help="Runs on this machine, and their way to another.", no_args_is_help=True)
app.add_typer(archive, name="runs")


@archive.command("list")
def runs_list(root: Annotated[Path | None, typer.Option(help="Default: data/runs, the recorded runs.")] = None) -> None:
    """A line for each run: what it is, what it reached, what is kept of it."""
    from helpers import runs

    table = runs.load(root or runs.RECORDED)
    if table.empty:
        raise CourseError(f"There is no finished run in {shown(root or runs.RECORDED)}: train one first.")
    print(runs.listing(table, root or runs.RECORDED).to_string(index=False))


@archive.command("export")
def runs_export(
    file: Annotated[Path, typer.Argument(help="The archive to write, a .zip.")],
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of runs. Default: all below --root.")] = None,
    root: Annotated[Path | None, typer.Option(help="Default: out/runs.")] = None,
    weights: Annotated[str, typer.Option(help="Weights to pack, in half precision: best, last or none.")] = "best",
    split_mb: Annotated[float | None, typer.Option(help="Write archives of at most this many MB.", min=0.01)] = None,
) -> None:
    """Pack tested runs, records and weights, into archives that `runs import` takes in on another machine."""
    from helpers import exchange

    if folders and root:
        raise CourseError("Give the folders of runs or the --root that holds them, not both.")
    below = sorted(path.parent for path in (root or ROOT / "out" / "runs").glob("*/*/run.json"))
    for path in exchange.pack(file, folders or below, weights, split_mb):
        print(f"{shown(path)}: {path.stat().st_size / 1e6:.1f} MB")


@archive.command("import")
def runs_import(
    files: Annotated[list[Path], typer.Argument(help="What `runs export` wrote.")],
    root: Annotated[Path | None, typer.Option(help="Default: data/runs; it takes current runs on CIFAR-10.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the archive's where a run here differs.")] = False,
    stand_in: StandIn = False,
) -> None:
    """Check archives of runs, test their weights again, and take them into the store: all of them or none."""
    from helpers import exchange, runs

    for line in exchange.unpack(files, root or runs.RECORDED, replace, stand_in):
        print(line)


@archive.command("publish")
def runs_publish(
    run: Annotated[Path, typer.Argument(help="The folder of a tested run.")],
    file: Annotated[Path, typer.Argument(help="The file to write, a .safetensors; its model card goes beside it.")],
    stand_in: StandIn = False,
) -> None:
    """Write a run's weights, in half precision and tested again, and its record as one file with a model card."""
    from helpers import publish

    _tell(publish.publish(run, file, stand_in))
    print(f"model card in {shown(file.with_suffix('.md'))}")


distorted = typer.Typer(help="Write distorted test images of our own making.", no_args_is_help=True)
app.add_typer(distorted, name="distort")
Seed = Annotated[int, typer.Option(help="Which of many such sets.")]


@distorted.command("cifar10c")
def distort_cifar10c(
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind; repeatable. Default: the fifteen.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: data/CIFAR-10-C-ours.")] = None,
    seed: Seed = 0, stand_in: StandIn = False,
) -> None:  # fmt: skip
    """Our CIFAR-10-C of the test set, in the published layout: 154 MB a kind, five severities each."""
    from helpers import data
    from helpers import distort as distortions

    _warn(stand_in)
    test, folder = data.load_set("test", stand_in), out or ROOT / "data" / "CIFAR-10-C-ours"
    print(shown(distortions.write_cifar10c(folder, test.images, test.labels, kind or distortions.SCORED, seed)))


@distorted.command("competition-like")
def distort_competition_like(
    out: Annotated[Path | None, typer.Option(help="Default: data/competition-like.pkl.")] = None,
    seed: Seed = 0, stand_in: StandIn = False,
) -> None:  # fmt: skip
    """A mix of our own, a kind and severity for each test image, in the competition's format; labels apart."""
    from helpers import data
    from helpers import distort as distortions

    _warn(stand_in)
    test, path = data.load_set("test", stand_in), out or ROOT / "data" / "competition-like.pkl"
    path = distortions.write_competition_like(path, test.images, test.labels, seed)
    print(*(shown(path.with_name(name)) for name in (path.name, f"{path.stem}-labels.csv", f"{path.stem}-kinds.csv")),
          sep="\n")  # fmt: skip


@app.command()
def bench(
    subjects: Annotated[list[str] | None, typer.Argument(help="augment, train, distort; all by default.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the table in data/bench/ for the notebooks.")] = False,
) -> None:
    """Measure this machine against the usual ways; every row of a table comes from the same run."""
    from helpers import bench as benches

    chosen = [benches.known(subject) for subject in subjects or benches.SUBJECTS]  # before minutes go by
    for subject in chosen:
        print(benches.measure(subject, record).to_string(index=False))


@app.command()
def figures() -> None:
    """Regenerate figures/ and the tables in the README and in figures/README.md from the recorded runs."""
    from helpers import figures as figure_room
    from helpers import tables

    for path in [*figure_room.regenerate(), *tables.refresh()]:
        print(shown(path))


@app.command()
def notebooks(only: Only = None) -> None:
    """Run the committed notebooks once in profile recorded, store their outputs, and check their format.

    What they count from images is stored from CIFAR-10 alone, so it is fetched first.
    """
    from helpers import data
    from helpers import notebooks as notebook_room

    notebook_room.choose(only)  # a slip of the pen is refused before anything is done
    data.fetch()
    notebook_room.refresh(only=only)
    problems = [problem for entry in notebook_room.choose(only) for problem in notebook_room.check(entry.path)]
    if problems:
        print(*problems, sep="\n")
        raise CourseError(f"{counted(len(problems), 'problem')} of format in the notebooks: mend what is listed above.")


@app.command()
def reproduce(profile: Profile = "quick",
              only: Only = None,
              resume: Annotated[bool, typer.Option(help="Keep runs trained earlier.")] = False) -> None:  # fmt: skip
    """Run every notebook end to end into out/<profile>/, with figures, report.html and summary.json."""
    from helpers import checkpoint, data, runs
    from helpers import figures as figure_room
    from helpers import notebooks as notebook_room

    folder = out_dir(profile)
    notebook_room.choose(only)  # a slip of the pen is refused before anything is removed
    there = _images_are_there(profile)
    source = data.STAND_IN if profile == "quick" and not there else data.CIFAR10
    pictures = "photographs" if there else "drawn"
    store = runs.RECORDED if profile == "recorded" else folder / "runs"
    with _alone(folder):
        if profile == "quick" and not (resume or only):  # a quick run is cheap, and should come from the code as it is
            for lock in folder.glob("runs/*/*/.lock"):
                with checkpoint.hold(lock.parent):  # refused where a notebook trains there
                    pass
            if folder.exists():
                shutil.rmtree(folder.resolve())
        summary = notebook_room.reproduce(
            profile, folder, only, {"pictures": pictures}, data_source=source,
            results=lambda: {"test accuracy": _accuracies(runs.load(store), source)},
        )  # fmt: skip
        print(f"\ndata      {source}")
        for label, accuracy in summary["results"]["test accuracy"].items():
            print(f"accuracy  {label}: {accuracy}")
        if summary["results"]["test accuracy"]:
            figure_room.regenerate(folder / "figures", store, source)
            print(f"figures   {shown(folder / 'figures')}")
    print(f"report    {shown(folder / 'report.html')}\nsummary   {shown(folder / 'summary.json')}")
    print(f"time      {summary['seconds']:.0f} s")
    if source == data.STAND_IN:
        print(data.BANNER)
    if summary["state"] != "passed":
        raise CourseError("Not every notebook passed: the lines above name the cell and its error.")


@app.command()
def report() -> None:
    """Write the course as it is stored to out/report.html: one page that needs no network. Runs nothing."""
    from helpers import notebooks as notebook_room

    print(shown(notebook_room.course_report(ROOT / "out" / "report.html")))


def _warn(stand_in: bool) -> None:
    """The banner, where the stand-in set is about to be used."""
    from helpers import data

    if data.source(stand_in) == data.STAND_IN:
        print(data.BANNER)


def _images_are_there(profile: str) -> bool:
    """Whether CIFAR-10 is on this machine, fetched if need be.

    Without it and without a network the quick profile goes on with the stand-in set, and the recorded one, which
    computes nothing from images, with drawn pictures; the paper's stops.
    """
    from helpers import data

    try:
        data.fetch()
    except CourseError as error:
        if profile == "paper" or (data.data_root() / "cifar-10-batches-py").exists():
            raise
        print(error)
        print(f"{data.BANNER}\n" if profile == "quick" else "Going on without: recorded runs, drawn pictures.\n")
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a profile's folder for one `reproduce` at a time; the lock lies beside it, since the folder may go."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise CourseError(f"Another `reproduce` is at work in {shown(folder)}: wait for it to end.") from None
    with lock:
        yield


def _accuracies(table, source: str) -> dict[str, str]:
    """recipe/seed -> test accuracy with its interval, of the runs on this data."""
    tested = table[table.data == source].dropna(subset=["test_accuracy"]) if len(table) else table
    return {f"{row.recipe}/{row.seed}, {row.epochs} epochs":
            f"{percent(row.test_accuracy)} of {int(row.test_count):,} test images [{percent(row.test_low)}, "
            f"{percent(row.test_high)}]" for row in tested.itertuples()}  # fmt: skip


def _fields(changes: list[str] | None) -> dict[str, object]:
    """`name=value` pairs; a value that is no Python literal is taken as text."""
    fields = {}
    for change in changes or []:
        name, equals, text = change.partition("=")
        if not equals:
            raise CourseError(f"--set {change!r} has no value: expected field=value, as in --set epochs=3.")
        if name in ("name", "seed"):
            raise CourseError(f"--set cannot change the {name}: choose a recipe by its name, and a seed with --seed.")
        try:
            fields[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            fields[name] = text
    return fields


def _tell(run) -> None:
    from helpers import runs

    record, test = run.record, run.record["test"]
    validation = f"validation {percent(record['metrics']['val_accuracy'])} (epoch {record['best_epoch']})"
    if run.path.name == runs.LAST:  # which is not the epoch that the record's validation is of
        validation = f"the last of {record['recipe']['epochs']} epochs"
    tested = f"test {percent(test['accuracy'])} [{percent(test['low'])}, {percent(test['high'])}]"
    rate = f"{record['images_per_second']:,.0f} images/s"
    print(f"{run.label} on {record['data']}: {validation}, {tested}, {rate}, in {shown(run.path)}")


def _stop(*_: object) -> None:
    """Leave on Ctrl-C by an exception that clears up on its way and that no library takes for its own."""
    os.write(2, STOPPED)
    sys.exit(130)


def main() -> None:
    """Run a command; a mistake the user can mend is one sentence and exit code 1, never a traceback."""
    signal.signal(signal.SIGINT, _stop)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(128 + error.signum if hasattr(error, "signum") else 1)  # the shell's code for a signal that stopped us
    except BrokenPipeError:  # `... | head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written, a full disk: the user's to mend, whoever met it
        print(f"error: {error.strerror or error}: {error.filename or 'output'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
