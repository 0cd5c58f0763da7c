"""The tables and pictures of the README and of figures/README.md, from data/runs and data/bench alone, between markers
in their texts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pandas as pd

from helpers import bench, figures, recipe, runs, stats
from helpers.runtime import ROOT, CourseError, counted, percent, replacing, shown

PAGES = (ROOT / "README.md", figures.FIGURES / "README.md")
_KEPT = "\N{NO-BREAK SPACE}"  # inside an interval, which a narrow column shall not break
_BLOCK = re.compile(r"(<!-- (table|figure): ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table in Markdown; the first `text` columns to the left, the others, numbers, to the right."""
    rule = ["---" if i < text else "---:" for i in range(len(head))]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def _interval(low: float, high: float, sign: str = "") -> str:
    """Two shares as the ends of an interval in per cent or points; nothing where there is none."""
    if not sign:  # a share lies between 0 and 1
        low, high = max(low, 0.0), min(high, 1.0)
    return "" if pd.isna(low) else f"{_points(low, sign)}{_KEPT}to{_KEPT}{_points(high, sign)}"


def _points(share: float, sign: str = "+") -> str:
    text = f"{100 * share:{sign}.2f}"
    return text if float(text) else f"{0:{sign}.2f}"  # not -0.00


def _cell(text: str, low: float, high: float, sign: str = "") -> str:
    return text if pd.isna(low) else f"{text} [{_interval(low, high, sign)}]"


def _p(p: float) -> str:
    if pd.isna(p):
        return ""
    said = f"<{_KEPT}0.001" if p < 0.0005 else f"{p:.3f}"  # what would round to 0.000 is not 0
    return f" (p{_KEPT}{said})"


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """The rungs of a ladder, or the values of a field, as text: a row each in their order, indexed by its name.

    rows: of `figures.rungs` (each is set against the one before) or `figures.varied` (each against the base recipe).
    Columns for each measure of `figures.measured`: mean over seeds with its 95 % interval; the difference paired by
    seed with its own; the verdict, with p after Holm's correction for the rows of the column (`helpers.stats.steps`).
    Empty where nothing was run.
    """
    if rows.empty:
        return pd.DataFrame(columns=pd.Index([], dtype=str))
    by = "rung" if "rung" in rows else "value"
    order = list(dict.fromkeys(rows[by]))
    base = None if by == "rung" else rows["value"][rows.recipe == rows.base].iloc[0]
    table = pd.DataFrame(index=pd.Index(order, name=by))
    for value, (name, part) in figures.measured(rows, by).items():
        short = name.partition(" ")[0]
        if base is None:
            found, minus = stats.steps(part, order, value, by), "minus the one before"
        else:
            found, minus = stats.against(part, base, order, value, by), f"minus {base}"
        means = stats.over_seeds(part, value, by).set_index(by)
        found = found.set_index("after")
        table[name] = pd.Series({row.Index: _cell(percent(row.mean), row.low, row.high) for row in means.itertuples()})
        table[f"{short}: {minus}, points"] = pd.Series({
            row.Index: _cell(_points(row.difference), row.low, row.high, "+") for row in found.itertuples()
        })
        table[f"{short}: verdict"] = found.verdict + found.p_holm.map(_p)
    return table.fillna("")


def tally(found: pd.DataFrame) -> str:
    """How many of the differences in a table of `compared` go which way, in a sentence for each measure."""
    parts = []
    for column in found.columns[found.columns.str.endswith("verdict")]:
        said = found[column][found[column] != ""].str.replace(r" \(p.*\)", "", regex=True).value_counts()
        counts = ", ".join(f"{said[words]} {words}" for words in stats.VERDICTS if words in said)
        counts = counts.replace(stats.ONE_SEED, "with one seed, of which nothing can be said")
        parts.append(f"{column.partition(':')[0]}: of {counted(said.sum(), 'difference')} {counts}")
    return "; ".join(parts)


def recipes(table: pd.DataFrame) -> str:
    """Every recorded recipe: what it is, and its test accuracy over seeds with the noise to expect beside it."""
    place = {key: at for at, key in enumerate(product(figures.TIERS, recipe.RECIPES))}  # other names come last
    groups = sorted(table.groupby(["tier", "recipe"], sort=False), key=lambda group: place.get(group[0], len(place)))
    rows = []
    for (tier, name), part in groups:
        row, first = stats.over_seeds(part).iloc[0], part.iloc[0]
        seen = first.stage.replace("autoaugment", first.policy).replace("_", ", ")
        mixes = {"Mixup": first.mixup_alpha, "CutMix": first.cutmix_alpha}
        seen += "".join(f", {mix} {alpha:g}" for mix, alpha in mixes.items() if alpha)
        epochs = f"{first.epochs}, after `{first.start}`" if first.start else f"{first.epochs}"
        rows.append((
            f"`{name}`", tier, seen, f"{first.parameters / 1e6:.2f} M",
            f"{first.train_size:,}", epochs, f"{row.seeds}", percent(row["mean"]),
            _interval(row.low, row.high) or row.note, _interval(row.lowest, row.highest),
            "" if pd.isna(row["std"]) else f"{100 * row['std']:.2f}", f"{100 * row.seeds_noise:.2f}",
            f"{100 * row.images_noise:.2f}", _mean_of_all(part, "test_last_accuracy"), _distorted(part),
        ))  # fmt: skip
    head = ("recipe", "tier", "augmentation, up to", "parameters", "images", "epochs", "seeds", "test accuracy, mean",
            "95 %, over seeds", "lowest to highest", "std", "expected over seeds", "over images", "last epoch",
            "corrupted")  # fmt: skip
    return markdown(head, rows, text=3)


def _mean_of_all(part: pd.DataFrame, column: str) -> str:
    """The mean over seeds; nothing where a seed was not measured, since the others would be a choice among them."""
    values = part[column].astype(float)
    return "" if values.isna().any() else percent(values.mean())


def _distorted(rows: pd.DataFrame) -> str:
    counts = sorted(set(rows.corrupted_count.dropna()))
    mean = _mean_of_all(rows, "corrupted_accuracy")
    return f"{mean} of {counts[0]:,.0f}" if mean and len(counts) == 1 else mean


def ladders(table: pd.DataFrame, page: Path = PAGES[0]) -> str:
    """Every recorded ladder: its rungs with intervals, each rung less the one before it, and its figure."""
    parts = []
    for kind, base in [(one, base) for one in figures.LADDERS for base in figures.bases(table, one)]:
        rows = figures.rungs(table, base, kind)
        found = compared(rows)
        if kind != "ladder":
            found = costs(rows, base, kind).join(found)
        found = found.reset_index()
        found["rung"] = "`" + found["rung"] + "`"
        what = {"ladder": "On", "climb": "Everything together, from", "approach": "Towards `beyond`, from"}[kind]
        parts.append(f"{what} `{base.name}` {_setting(rows)}:\n\n{markdown(list(found), found.to_numpy().tolist())}"
                     f"\n{_capital(tally(found))}. {_short(rows)}\n{_drawn(f'{kind}_{base.name}', page)}")  # fmt: skip
    return "\n".join(parts)


def costs(rows: pd.DataFrame, base: recipe.Recipe, kind: str = "climb") -> pd.DataFrame:
    """Of the rungs of a climb or an approach, indexed by `rung`: what each changes, what a run of it costs, and what
    the mean over an image and its mirror image adds, which costs a second pass.

    Seconds are means over seeds of the recorded wall clock, for comparison among rungs that one machine has run.
    """
    gained = (rows.mirrored_accuracy - rows.test_accuracy).astype(float)  # of the runs that have both
    means = rows.assign(gain=gained).groupby("rung", sort=False)[["seconds", "gain"]].mean().astype(float)
    return pd.DataFrame({
        "changes": means.index.map(figures.changes(base, kind)), "seconds": means.seconds.map("{:.0f}".format),
        "mirror images, points": means.gain.map(lambda gain: "" if pd.isna(gain) else _points(gain)),
    }, index=means.index)  # fmt: skip


def epochs(table: pd.DataFrame, page: Path = PAGES[0]) -> str:
    """Rungs of a ladder over the length of the schedule, and each less the one before it, paired by seed."""
    parts = []
    for base in figures.bases(table):
        if len(rows := figures.over_epochs(table, base)):
            found = lengths(rows).reset_index()
            words = _setting(rows, f"{rows.epochs.min()} to {rows.epochs.max()} epochs")
            parts.append(f"On `{base.name}` {words}:\n\n{markdown(list(found), found.astype(str).to_numpy().tolist())}"
                         f"{_drawn(f'epochs_{base.name}', page)}")  # fmt: skip
    return "\n".join(parts) or "None is recorded yet.\n"


def lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of `figures.over_epochs` as text: one row per length, indexed by `epochs`. Columns: how many seeds each
    rung has (one number where all have as many); for each measure the mean over seeds of each rung, and each rung less
    the one before it, paired by seed, with an interval where seeds allow.
    """
    many = rows.groupby(["epochs", "rung"]).size().groupby("epochs")
    table = pd.DataFrame({"seeds": many.agg(lambda counts: " or ".join(map(str, sorted(set(counts)))))})
    for value, (name, part) in figures.measured(rows, "rung").items():
        short, order, minus = name.partition(" ")[0], list(dict.fromkeys(part.rung)), {}
        means = part.pivot_table(index="epochs", columns="rung", values=value)[order]
        table = table.join(means.map(percent, na_action="ignore").add_prefix(f"{short}: "))
        for (before, after), (count, own) in product(pairwise(order), part.groupby("epochs")):
            for row in stats.steps(own[own.rung.isin((before, after))], (before, after), value, "rung").itertuples():
                cell = _cell(_points(row.difference), row.low, row.high, "+")
                minus.setdefault(f"{short}: {after} minus {before}, points", {})[count] = cell
        table = table.join(pd.DataFrame(minus))
    return table.fillna("")


def varied(table: pd.DataFrame, page: Path = PAGES[0]) -> str:
    """Every field of `quick` and of `paper` that was varied alone: its values with intervals, each less the base's."""
    parts = []
    for name, field, rows in figures.all_varied(table):
        what = "One change at a time" if field == figures.OTHERS else f"`{field}`"
        found = compared(rows).reset_index(names="change" if field == figures.OTHERS else field)
        parts.append(f"{what} on `{rows.base.iloc[0]}` {_setting(rows)}:\n\n"
                     f"{markdown(list(found), found.to_numpy().tolist())}\n{_capital(tally(found))}. {_short(rows)}\n"
                     f"{_drawn(name, page)}")  # fmt: skip
    return "\n".join(parts) or "None is recorded yet.\n"


def _setting(rows: pd.DataFrame, schedule: str = "") -> str:
    """What was run, in brackets, with what the distorted images were where they were counted."""
    first, seeds = rows.iloc[0], ", ".join(map(str, sorted(set(rows.seed))))
    tiers = " and ".join(dict.fromkeys(rows.tier))
    text = f"tier {tiers}, {schedule or figures.schedule(rows)}, {first.train_size:,} images, seeds {seeds}"
    by = "rung" if "rung" in rows else "value"
    if not schedule and rows.groupby(by).seed.nunique().nunique() > 1:
        text += f", fewer of some {by}s"
    if "corrupted_accuracy" in (found := figures.measured(rows, by)):
        one = found["corrupted_accuracy"][1].iloc[0]
        text += f"; corrupted: {one.corrupted_count:,.0f} test images at severities {one.corrupted_severities}"
    return f"({text})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(rows: pd.DataFrame) -> str:
    """What to bear in mind of runs of fewer epochs than the paper's; nothing of others."""
    return "" if rows.epochs.max() >= recipe.RECIPES["paper"].epochs else f"A reduced schedule. {recipe.SHORT}"


def _drawn(name: str, page: Path) -> str:
    return f"\n{line}" if (line := picture(name, page)) else ""


def reported(table: pd.DataFrame) -> str:
    """What the paper reports and what the run nearest to it reached in each tier; empty where nothing was run."""
    ours = figures.by_tier(table)
    rows = [["run", "300 epochs", *(figures.title(ours[tier]) if tier in ours else "" for tier in figures.TIERS)]]
    for column, (label, level) in (figures.REPORTED | _BESIDE).items():
        cells = []
        for part in (ours.get(tier) for tier in figures.TIERS):
            found = stats.over_seeds(part, column) if part is not None else ()
            if not len(found) or found.seeds[0] < len(part):  # not recorded of every seed
                cells.append("")
                continue
            row = found.iloc[0]
            ends = (row.low, row.high) if row.seeds > 1 else figures.over_images(part.iloc[0], column)
            cells.append(_cell(percent(row["mean"]), *ends))
        rows.append([label, percent(level) if level else "not given", *cells])
    rows.append(["hidden test, distorted", "about 86 %", *[""] * len(figures.TIERS)])
    return markdown(("classified right", "paper", *figures.TIERS), rows)


def beyond(table: pd.DataFrame) -> str:
    """What the recipes that go beyond the paper reach in full on a GPU; seconds are those of seed 0."""
    rows = []
    for name in ("sprint", "beyond"):
        part = table[(table.recipe == name) & (table.tier == "gpu")].sort_values("seed")
        if part.empty:
            continue
        mean, first, tested = stats.over_seeds(part).iloc[0], part.iloc[0], part.dropna(subset=["corrupted_accuracy"])
        low, high = (mean.low, mean.high) if mean.seeds > 1 else figures.over_images(first, "test_accuracy")
        beside = f", {first.side_by_side} side by side" if first.side_by_side > 1 else ""
        rows.append((
            f"`{name}`", f"{first.parameters / 1e6:.2f} M", f"{first.epochs}", f"{mean.seeds}",
            _cell(percent(mean["mean"]), low, high), _mean_of_all(part, "test_last_accuracy"),
            _mean_of_all(part, "mirrored_accuracy"),
            f"{_distorted(tested)}, seed {', '.join(map(str, tested.seed))}" if len(tested) else "",
            f"{first.seconds:,.0f} s, {first.device}{beside}" if first.seed == 0 else "",
        ))  # fmt: skip
    head = ("recipe", "parameters", "epochs", "seeds", "test", "last epoch", "with mirror images", "distorted",
            "seed 0 took")  # fmt: skip
    return markdown(head, rows)


# Ours alone: what the table has beyond the figure.
_BESIDE = {
    "test_last_accuracy": ("test, by the last epoch", None),
    "corrupted_accuracy": ("test, distorted by us", None),
}


def speed() -> str:
    """The recorded measurements: one row per comparison, one column per batch size; the other numbers in a sentence."""
    steps, augmented, distorted = (bench.recorded(subject) for subject in ("train", "augment", "distort"))
    loops, batches = steps.set_index(["loop", "batch"]), sorted(set(steps.batch))
    rate, ceiling, first = (loops[column] for column in ("images/s", "ceiling", "first s"))
    plain, ours, compiled = "plain loop, DataLoader", "this course", "this course, compiled"
    waits = f"{first[compiled].min():.0f} to {first[compiled].max():.0f} s"
    columns = {"": [
        "one step of the paper's recipe, against a plain float32 loop with a DataLoader",
        f"the same with `--set compiled=True` (`torch.compile`, after {waits} of compiling)",
        "share of the machine's rate at matrix products; the same, compiled",
        "the whole augmentation, against the faster of two torchvision DataLoaders",
        "and against kornia (`pip install kornia` to have its row)",
    ]}  # fmt: skip
    for batch in batches:
        others = augmented[augmented.batch == batch].set_index("augmentation")["ours"]
        columns[f"batch {batch}"] = [
            f"{rate[ours, batch] / rate[plain, batch]:.1f} ×", f"{rate[compiled, batch] / rate[plain, batch]:.1f} ×",
            f"{100 * ceiling[ours, batch]:.0f} %"
            + ("" if pd.isna(ceiling[compiled, batch]) else f", {100 * ceiling[compiled, batch]:.0f} %"),
            *(f"{others[others.index.str.startswith(name)].min():.1f} ×" for name in ("torchvision", "kornia")),
        ]  # fmt: skip
    whole = distorted.iloc[-1]
    share = f"{100 * loops.augment[ours, batches[0]]:.1f} %"
    where = [table.device.iloc[0] for table in (steps, augmented, distorted)]
    devices = where[0] if len(set(where)) == 1 else "{}; the augmentation on {}; the distortions on {}".format(*where)
    rows = [row for row in zip(*columns.values(), strict=True) if "nan" not in " ".join(row)]  # no compiler, no kornia
    return (
        markdown(list(columns), rows)
        + f"\nOn {devices}. The augmentation is {share} of a step of {batches[0]}. The "
        f"{len(distorted) - 1} scored distortions at five severities over 10,000 images ({whole.images:,} images) take "
        f"{whole.seconds:.0f} s.\n"
    )


def picture(name: str, page: Path = PAGES[0]) -> str:
    """The line that shows a published figure on a page, with its alt text; nothing where it has not been drawn."""
    path = figures.FIGURES / f"{name}.png"
    return f"![{figures.alt(name)}]({Path(os.path.relpath(path, page.parent)).as_posix()})\n" if path.exists() else ""


def fill(text: str, page: Path = PAGES[0], root: Path = runs.RECORDED) -> str:
    """The Markdown text of a page with what stands between its markers made anew from the runs below `root`.

    `<!-- table: recipes -->` or `<!-- figure: ladder_quick -->` begin a block, `<!-- end -->` ends it. Raises
    CourseError for a table or figure that there is not, or where no run is recorded below `root`.
    """
    if (table := runs.current(runs.load(root))).empty:
        raise CourseError(f"No run is recorded in {shown(root)}: train one first.")
    table = table.dropna(subset=["test_accuracy"])
    made = {"recipes": lambda: recipes(table), "ladders": lambda: ladders(table, page),
            "varied": lambda: varied(table, page), "epochs": lambda: epochs(table, page),
            "reported": lambda: reported(table), "beyond": lambda: beyond(table), "speed": speed}  # fmt: skip

    def block(match: re.Match) -> str:
        begin, kind, name, _, end = match.groups()
        if kind == "figure" and figures.alt(name):
            return begin + picture(name, page) + end
        if kind == "table" and name in made:
            return begin + made[name]() + end
        names = (name if figures.alt(name) else f"{name}_..." for name in figures.ALT) if kind == "figure" else made
        raise CourseError(f"There is no {kind} {name!r} to put between markers: expected one of {', '.join(names)}.")

    return _BLOCK.sub(block, text)


def refresh(pages: Sequence[Path] = PAGES, root: Path = runs.RECORDED) -> list[Path]:
    """Make the blocks of Markdown files anew, in place; the same runs give the same bytes."""
    for path in pages:
        if not path.exists():
            raise CourseError(f"There is no {shown(path)} to put tables into.")
    for path in pages:
        text = fill(path.read_text(), path, root)
        with replacing(path) as temporary:
            temporary.write_text(text)
    return list(pages)
