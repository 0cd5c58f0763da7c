"""One frozen dataclass with every hyper-parameter; the named recipes; validation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from helpers.augment import STAGES, policies
from helpers.mixing import LEAST_ALPHA
from helpers.model import SE_PLACEMENTS, SEResNet
from helpers.runtime import CourseError

PRECISIONS = ("bfloat16", "float32")
SCHEDULES = ("cosine", "constant")
SHAPE = ("blocks", "width", "stem_stride", "reduction", "se_placement")  # two that agree in these have like weights
SPLIT = ("val_size", "split_seed")  # and in these the same validation images
# said wherever a reduced schedule is shown
SHORT = "On small networks and short schedules strong augmentation costs accuracy."

# What a number may be: (lowest, highest), both allowed. Wider than anyone needs, narrow enough to catch a slip.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "width": (8, 512),  # below it torch 2.14 crashes on CPUs with AVX2, in the pass back through the shortcuts
    "stem_stride": (1, 2),
    "reduction": (0, 256),
    "dropout": (0.0, 0.95),
    "epochs": (1, 5_000),
    "batch_size": (2, 16_384),
    "learning_rate": (1e-6, 10.0),
    "momentum": (0.0, 0.999),
    "clip_norm": (0.0, 1_000.0),
    "label_smoothing": (0.0, 0.5),
    "ema_decay": (0.0, 0.99999),
    "drop_path": (0.0, 0.95),
    "consistency": (0.0, 100.0),
    "sam_rho": (0.0, 2.0),
    "weight_decay": (0.0, 0.1),
    "warmup_epochs": (0, 1_000),
    "strength": (0.0, 2.0),
    "mixup_alpha": (0.0, 10.0),
    "cutmix_alpha": (0.0, 10.0),
    "train_size": (10, 45_000),
    "val_size": (10, 25_000),
    "split_seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a run. The defaults are the paper's; what it leaves open is marked (ours).

    Raises CourseError, naming the range that holds, for a value outside it or a combination that cannot work.
    """

    name: str
    seed: int = 0
    # network (paper: "Methodology")
    blocks: tuple[int, ...] = (3, 3, 4, 3)
    width: int = 32
    stem_stride: int = 1  # 2 halves the resolution from the start: a quarter of the arithmetic, the same parameters
    reduction: int = 16  # ours: Hu et al.'s default; 0 is no SE
    se_placement: str = SE_PLACEMENTS[0]
    dropout: float = 0.5
    drop_path: float = 0.0  # stochastic depth: probability of leaving out the last block's branch
    # optimiser and schedule (paper: "Optimizer and Hyper-Parameters", "Learning Rate Scheduling")
    epochs: int = 300
    batch_size: int = 64
    learning_rate: float = 0.02  # the peak, at the end of the warm-up
    momentum: float = 0.9
    nesterov: bool = False  # ours: torch's default
    weight_decay: float = 1e-4
    decay_all: bool = True  # ours: biases and norms too, as torch's SGD does by default
    decoupled_decay: bool = False  # apart from the gradient and its momentum (Loshchilov & Hutter 2019)
    warmup_epochs: int = 10
    schedule: str = "cosine"  # after the warm-up; or "constant"
    clip_norm: float = 0.0  # largest norm of the gradient; 0 is no clipping
    label_smoothing: float = 0.0
    sam_rho: float = 0.0  # sharpness-aware minimisation: radius of the neighbourhood; 0 is none, else a step costs two
    ema_decay: float = 0.0  # validate and keep an exponential moving average of weights and buffers; 0 is none
    # augmentation (paper: "Data Preprocessing Pipeline", "Mixup")
    stage: str = STAGES[-1]
    policy: str = policies.POLICIES[0]  # what the last stage draws from
    strength: float = 1.0  # ours: how far everything else reaches, as a multiple of `augment.Settings`
    mixup_alpha: float = 0.0  # Beta(alpha, alpha); 0 is no Mixup
    cutmix_alpha: float = 0.0  # the same for CutMix; with both, a coin for each batch
    consistency: float = 0.0  # weight of AugMix's loss: agree on two more views of an image, through the last stage
    teacher: str = ""  # the recipe whose finished seeds, in the same store, are to be imitated for half of the loss
    start: str = ""  # the recipe whose finished run of the same seed, in the same store or published, is trained on
    resolutions: tuple[int, ...] = (32,)  # side of the training images, each for an equal share of the epochs
    # data and arithmetic (ours)
    train_size: int = 45_000
    val_size: int = 5_000
    split_seed: int = 0
    precision: str = "bfloat16"
    compiled: bool = False  # the network's training pass through torch.compile: quicker after some compiling

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9_-][a-z0-9_.-]*", self.name):
            raise CourseError(
                f"A recipe's name is a folder's name too: {self.name!r} is not made of the letters a-z, "
                "digits, '-', '_' and, but not first, '.'."
            )
        for name, (low, high) in _RANGES.items():
            value, whole = getattr(self, name), isinstance(low, int)
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:  # NaN fails the comparison
                expected = f"a whole number from {low:,} to {high:,}" if whole else f"a number from {low:g} to {high:g}"
                raise CourseError(f"{name}={value!r} is out of range: expected {expected}.")
        for name, most, low, high in (("blocks", 4, 1, 50), ("resolutions", 10, 8, 64)):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, list | tuple) else ()
            if not 1 <= len(values) <= most or not all(type(n) is int and low <= n <= high for n in values):
                raise CourseError(
                    f"{name}={getattr(self, name)!r} is out of range: expected 1 to {most} whole numbers from {low} to "
                    f"{high}."
                )
            object.__setattr__(self, name, values)
        for name, choices in (("stage", STAGES), ("policy", policies.POLICIES), ("precision", PRECISIONS),
                              ("se_placement", SE_PLACEMENTS),
                              ("schedule", SCHEDULES), ("nesterov", (True, False)), ("decay_all", (True, False)),
                              ("decoupled_decay", (True, False)),
                              ("compiled", (True, False))):  # fmt: skip
            if getattr(self, name) not in choices or type(getattr(self, name)) is not type(choices[0]):
                raise CourseError(
                    f"{name}={getattr(self, name)!r} is unknown: expected one of {', '.join(map(str, choices))}."
                )
        if self.reduction and self.width % self.reduction:
            raise CourseError(f"reduction={self.reduction} does not divide width={self.width}: choose a divisor of it.")
        if self.warmup_epochs >= self.epochs:
            raise CourseError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs} to anneal: "
                f"expected 0 to {self.epochs - 1}, or more epochs."
            )
        if self.batch_size > self.train_size:
            raise CourseError(
                f"batch_size={self.batch_size} exceeds train_size={self.train_size}: expected 2 to {self.train_size}."
            )
        if self.strength != 1 and self.stage in STAGES[:2]:
            raise CourseError(
                f"strength={self.strength:g} changes nothing at stage={self.stage}: give a later stage, or strength=1."
            )
        for name in ("mixup_alpha", "cutmix_alpha"):
            if 0 < getattr(self, name) < LEAST_ALPHA:
                raise CourseError(
                    f"{name}={getattr(self, name):g} is too small to draw from: expected 0 for none, or at least "
                    f"{LEAST_ALPHA}."
                )
        for name in ("teacher", "start"):  # a variant's name would end at the next "-"
            if not isinstance(getattr(self, name), str) or not re.fullmatch(r"[a-z0-9_.]*", getattr(self, name)):
                raise CourseError(
                    f"{name}={getattr(self, name)!r} is no recipe to learn from: expected a name without '-', as quick "
                    "or paper."
                )
        if self.consistency and (self.mixup_alpha or self.cutmix_alpha):
            raise CourseError(
                f"consistency={self.consistency:g} compares views of one image, and Mixup or CutMix makes it two: set "
                "mixup_alpha=0 and cutmix_alpha=0, or consistency=0."
            )
        if self.nesterov and not self.momentum:
            raise CourseError("nesterov=True needs a momentum above 0: set one, or nesterov=False.")
        if len(self.resolutions) > self.epochs:
            raise CourseError(f"{len(self.resolutions)} resolutions do not fit into epochs={self.epochs}: give fewer.")

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; an unknown field is refused with the names that exist."""
        _refuse_unknown(changes)
        return replace(self, **changes)

    def scaled_to(self, batch_size: int) -> Recipe:
        """Another batch size, the learning rate in proportion to it (linear scaling rule, Goyal et al. 2017)."""
        return self.but(batch_size=batch_size, learning_rate=self.learning_rate * batch_size / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as a run record keeps them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def network(self) -> SEResNet:
        """A freshly initialised network of this shape, from torch's own random state."""
        return SEResNet(
            self.blocks, self.width, self.reduction, self.dropout,
            drop_path=self.drop_path, se_placement=self.se_placement, stem_stride=self.stem_stride,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        _refuse_unknown(values)
        return cls(**values)


def _refuse_unknown(values: dict[str, Any]) -> None:
    known = [field.name for field in fields(Recipe)]
    for name in values:
        if name not in known:
            raise CourseError(f"A recipe has no field {name!r}: expected one of {', '.join(known)}.")


def get(name: str, **changes: Any) -> Recipe:
    """The recipe of a name, with fields changed if asked: one of RECIPES, or what `vary` makes of one and names so.

    Any other name is refused with those that exist.
    """
    found = RECIPES.get(name) or _variant(name)
    if found is None:
        bases = ", ".join(base for base in RECIPES if "-" not in base)
        raise CourseError(
            f"There is no recipe {name!r}: expected one of {bases}, a rung of a ladder such as quick-none, or a "
            "recipe with other numbers, such as quick-mixup_alpha-0.2."
        )
    if found.name != name:
        raise CourseError(f"{name} is the recipe {found.name}: call it by that name, under which its runs are kept.")
    return found.but(**changes)


def named(name: str, base: str) -> list[Recipe]:
    """The recipes of a sweep on a base, or the one recipe of that name."""
    if name in SWEEPS:
        start = get(base)
        try:
            made = SWEEPS[name](start)
            if unknown := [rung.name for rung in made if rung.name not in RECIPES and _variant(rung.name) is None]:
                raise CourseError(f"there is no recipe {unknown[0]}")
        except CourseError as error:
            reason = str(error).rstrip(".")
            raise CourseError(f"The sweep {name} cannot be made on {base} ({reason}): choose another --base, such as "
                              "reduced or paper.") from error  # fmt: skip
        return made
    try:
        return [get(name)]
    except CourseError as error:
        raise CourseError(f"{error} Sweeps: {', '.join(SWEEPS)}.") from error


@cache
def _variant(name: str) -> Recipe | None:
    """What `vary` makes of a recipe in RECIPES, from `<recipe>-<field>-<value>-<field>-<value>...`; None if nothing."""
    base = max((known for known in RECIPES if name.startswith(f"{known}-")), key=len, default=name)
    words = name.removeprefix(f"{base}-").split("-")
    changes = dict(zip(words[::2], words[1::2], strict=False))
    if base not in RECIPES or 2 * len(changes) != len(words) or not set(changes) <= set(_READERS):
        return None
    try:
        values = {field: [_READERS[field](value)] for field, value in changes.items()}
    except (ValueError, KeyError):
        return None
    return vary(RECIPES[base], **values)[0]


def _reader(default: Any) -> Callable[[str], Any]:
    """How a word of a name is read as the value of a field with this default; the reverse of `_word`."""
    if isinstance(default, bool):
        return {"true": True, "false": False}.__getitem__
    if isinstance(default, tuple):
        return lambda word: tuple(int(part) for part in word.split("."))
    return type(default)


_READERS = {field.name: _reader(field.default) for field in fields(Recipe) if field.name not in ("name", "seed")}


def _word(value: Any) -> str:
    """A value as a recipe's name has it: true, crop_flip, 0.2, 0.00005 without an exponent, and 3.3.4.3 for blocks."""
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    if isinstance(value, bool | str):
        return str(value).lower()
    return np.format_float_positional(value, trim="-")


_QUICK = Recipe(
    "quick",
    blocks=(1, 1, 1, 1),
    width=16,
    reduction=4,
    dropout=0.0,
    epochs=8,
    warmup_epochs=1,
    learning_rate=0.1,
    weight_decay=5e-4,
    train_size=10_000,
    val_size=2_000,
    stage="crop_flip",
)

_PAPER = Recipe("paper", mixup_alpha=1.0)  # ours: alpha = 1, for the reasons in notebook 04

# The paper's recipe in a twelfth of its epochs, for a machine without a GPU: under two hours on two cores.
_LAPTOP = _PAPER.but(name="laptop", epochs=25, warmup_epochs=1)

# The paper's recipe on quick's network and images, three times as long as quick: a ladder that two cores can climb with
# three seeds.
_REDUCED = _PAPER.but(
    name="reduced",
    blocks=_QUICK.blocks,
    width=_QUICK.width,
    reduction=_QUICK.reduction,
    epochs=24,
    warmup_epochs=1,
    train_size=_QUICK.train_size,
    val_size=_QUICK.val_size,
)


# The paper's network with one block more in stage 3, the largest that stays below 5 million parameters, and what the
# literature since holds for the better choice of everything else. Ours.
_BEYOND = _PAPER.but(
    name="beyond",
    blocks=(3, 3, 5, 3),
    dropout=0.0,
    drop_path=0.1,  # Huang et al. 2016, scaled down: 14 blocks are few
    batch_size=256,
    learning_rate=0.2,  # 0.1 for a batch of 128 (He et al. 2015), scaled linearly (Goyal et al. 2017)
    weight_decay=5e-4,
    decay_all=False,
    nesterov=True,  # this and the two above: Zagoruyko and Komodakis 2016; He et al. 2019 on the norms
    warmup_epochs=5,
    ema_decay=0.999,
    policy="trivialaugment",  # Müller and Hutter 2021
    mixup_alpha=0.2,  # Zhang et al. 2017 on ImageNet; small, since CutMix mixes too
    cutmix_alpha=1.0,  # Yun et al. 2019
)

# One epoch more of beyond on images cropped and flipped only, unmixed (refining: Z. He et al. 2019): is it held back by
# what its images have gone through? Ours.
_REFINED = _BEYOND.but(
    name="refined",
    start="beyond",
    epochs=1,
    warmup_epochs=0,
    learning_rate=0.002,  # ours: a hundredth of beyond's peak; a tenth was worse on validation images
    ema_decay=0.0,  # a mean of so few steps would be beyond's own weights
    stage="crop_flip",
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
)

# The paper's limit of parameters and its blocks, wide and shallow, with what a short schedule is best served with: for
# 96 % in a minute of one large GPU, which it misses (notebook 06). Ours.
_SPRINT = _QUICK.but(
    name="sprint",
    width=64,
    reduction=16,
    se_placement="identity",
    epochs=36,
    warmup_epochs=2,
    batch_size=256,
    learning_rate=0.8,  # ours: set by hand in short pilots, not recorded
    nesterov=True,
    decay_all=False,
    ema_decay=0.99,
    label_smoothing=0.1,
    resolutions=(16, 24, 32),
    train_size=_PAPER.train_size,
    val_size=_PAPER.val_size,
)


def ladder(base: Recipe) -> list[Recipe]:
    """The paper's augmentation ladder on one recipe: a recipe a stage, then Mixup on top of the last.

    The rung that is the base itself keeps the base's name, so that it is not run twice.
    """
    rungs = [base.but(name=f"{base.name}-{stage}", stage=stage, mixup_alpha=0.0) for stage in STAGES]
    rungs.append(rungs[-1].but(name=f"{base.name}-mixup", mixup_alpha=1.0))
    return [base if rung.but(name=base.name) == base else rung for rung in rungs]


def _reshaped(base: Recipe) -> dict[str, Any]:
    """A deep network as a shallow one of twice the width, and the reverse: like parameters and arithmetic."""
    if max(base.blocks) > 1:
        return {"blocks": (1,) * len(base.blocks), "width": 2 * base.width}
    return {"blocks": _PAPER.blocks, "width": base.width // 2}


def climb(base: Recipe) -> list[Recipe]:
    """From all that the paper does to an image to what serves a short schedule, each rung keeping those before it.

    The paper's augmentation and Mixup; cropped and flipped images alone; then, step by step, what `ingredients` tries
    one at a time: Nesterov's momentum and norms without decay; averaged weights, and softer labels in place of dropout;
    SE on the skip connection; twice the epochs; training images that grow, which costs less. Last a wide and shallow
    network (of a deep one, for about the same parameters and arithmetic).
    """
    rungs = [ladder(base)[-1], ladder(base)[1]]
    for name, changes in (
        ("steered", {"nesterov": True, "decay_all": False}),
        ("averaged", {"ema_decay": 0.99, "label_smoothing": 0.1, "dropout": 0.0}),
        ("skip_se", {"se_placement": "identity"}),
        ("longer", {"epochs": 2 * base.epochs}),
        ("growing", {"resolutions": (16, 24, 32)}),
        ("wide", {"blocks": (1,) * len(base.blocks), "width": 2 * base.width}),
    ):
        rungs.append(rungs[-1].but(name=f"{base.name}-{name}", **changes))
    return rungs


def approach(base: Recipe) -> list[Recipe]:
    """From all that the paper does to an image to what `beyond` does with it, each rung keeping those before it.

    A rung takes a choice of `beyond` where the base has the paper's; what a base has of its own, as quick's network and
    learning rate, stays. On `paper` the last rung is `beyond`.
    """
    rungs = [ladder(base)[-1]]
    for name, choices in (
        ("with_trivialaugment", ("policy",)),
        ("with_cutmix", ("cutmix_alpha", "mixup_alpha")),
        ("with_rate", ("learning_rate", "batch_size", "weight_decay", "warmup_epochs")),
        ("with_nesterov", ("nesterov", "decay_all")),
        ("with_ema", ("ema_decay",)),
        ("with_drop_path", ("drop_path", "dropout")),
        ("with_block", ("blocks",)),
    ):
        papers = [field for field in choices if getattr(rungs[0], field) == getattr(_PAPER, field)]
        if choices[0] not in papers:
            continue
        changes = {field: getattr(_BEYOND, field) for field in papers}
        if name == "with_ema" and base.epochs < 100:
            changes = {"ema_decay": 0.99}  # the mean of a thousand steps is most of a short run
        rungs.append(rungs[-1].but(name=f"{base.name}-{name}", **changes))
    return [_BEYOND if rung.but(name=_BEYOND.name) == _BEYOND else rung for rung in rungs]


def vary(base: Recipe, **values: Iterable[Any]) -> list[Recipe]:
    """A recipe for every combination of the values that some fields take, each once, the last field fastest.

    Named `<base>-<field>-<value>...` by what differs from the base; where nothing differs, it is the base itself, and
    where RECIPES holds the same recipe, it is that one, so that nothing is run twice under two names.
    """
    named = {known.but(name=base.name, seed=base.seed): known.but(seed=base.seed) for known in RECIPES.values()}
    found = []
    for combination in product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        made = base.but(**changes)
        words = [f"-{name}-{_word(value)}" for name, value in changes.items() if value != getattr(base, name)]
        found.append(base if made == base else named.get(made, made.but(name=base.name + "".join(words))))
    return list(dict.fromkeys(found))


def ingredients(base: Recipe) -> list[Recipe]:
    """A recipe, and it with one thing changed at a time: much of what `beyond` is made of, and what was weighed for it.

    A larger batch takes its learning rate along, in proportion; a decay apart from the momentum is as much larger as
    the momentum made the other; the loss of AugMix goes without Mixup and CutMix; three blocks a stage have half the
    width of one, for about as many parameters and as much arithmetic; without its first stage a network is twice as
    wide for as many parameters, and the later stages see twice the resolution, for three times the arithmetic.
    """
    changes: list[dict[str, tuple[Any, ...]]] = [
        {"ema_decay": (0.99, 0.999)},
        {"nesterov": (True,)},
        {"decay_all": (False,)},
        {"decoupled_decay": (True,), "weight_decay": (round(base.weight_decay / (1 - base.momentum), 9),)},
        {"batch_size": (4 * base.batch_size,), "learning_rate": (4 * base.learning_rate,)},
        {"label_smoothing": (0.1,)},
        {"drop_path": (0.1,)},
        {"cutmix_alpha": (1.0,)},
        {"sam_rho": (0.05,)},
        {"mixup_alpha": (0.0,), "cutmix_alpha": (0.0,), "consistency": (12.0,)},  # 12 as in AugMix
        {"se_placement": SE_PLACEMENTS[1:]},
        {"teacher": (base.name,)},
        {name: (value,) for name, value in _reshaped(base).items()},
        {"blocks": (base.blocks[1:],), "width": (2 * base.width,)},
        {"stem_stride": (2,)},
        {"resolutions": ((16, 24, 32),)},
        {"epochs": (2 * base.epochs,)},
    ]
    return [base, *(made for change in changes for made in vary(base, **change))]


def short(recipe: Recipe) -> Recipe:
    """A few seconds' worth of a quick recipe, for notebooks that train several of them under the quick profile."""
    return recipe.but(name=f"{recipe.name}-short", train_size=3_000, val_size=500, epochs=3)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _PAPER,
        _LAPTOP,
        # A narrow net on a part of the data: CI and a first try, under a minute on two cores.
        _QUICK,
        *(
            rung
            for base in (_QUICK, _REDUCED, _LAPTOP, _PAPER)
            for rung in (*ladder(base), *climb(base), *approach(base))
        ),
        _BEYOND,
        _REFINED,
        _SPRINT,
    )
}

# What the course varies on any recipe, by the name that `python -m helpers sweep` knows it by.
SWEEPS: dict[str, Callable[[Recipe], list[Recipe]]] = {
    "ladder": ladder,
    "mixup": lambda base: vary(base, mixup_alpha=(0.0, 0.2, 0.4, 1.0, 2.0)),
    "strength": lambda base: vary(base, strength=(0.0, 0.5, 1.0, 1.5)),
    "se": lambda base: vary(base, reduction=[0, *(n for n in (4, 8, 16, 32) if base.width % n == 0)]),  # 0 is no SE
    "dropout": lambda base: vary(base, dropout=(0.0, 0.2, 0.5)),
    # the paper's 10 of 300 epochs, none, half, twice and six times as many
    "warmup": lambda base: vary(base, warmup_epochs=[round(base.epochs * share)
                                                     for share in (0, 1 / 60, 1 / 30, 1 / 15, 1 / 5)]),
    "rate": lambda base: vary(base, **{name: [getattr(base, name) * factor for factor in (0.5, 1, 2)]
                                       for name in ("learning_rate", "weight_decay")}),
    "schedule": lambda base: vary(base, epochs=[n for n in (base.epochs // 4, base.epochs // 2, base.epochs,
                                                            2 * base.epochs) if n > base.warmup_epochs]),
    "policy": lambda base: vary(ladder(base)[-2], policy=policies.POLICIES),
    "beyond": ingredients,
    "climb": climb,
    "approach": approach,
}  # fmt: skip
